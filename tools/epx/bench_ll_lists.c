/* Which row goes where, for the floor of low latency. */
#include "bench_ll_floor.h"

#include <stdlib.h>

static int part_init(ll_part_t *part, floor_kind_t kind, size_t items, int slots, int ranks)
{
    *part = (ll_part_t){.kind = kind, .slots = (uint32_t)slots};
    part->dst_rank = malloc((items * (size_t)slots + 1) * sizeof *part->dst_rank);
    part->dst_row = malloc((items * (size_t)slots + 1) * sizeof *part->dst_row);
    part->out = malloc((items + 1) * sizeof *part->out);
    part->rows = calloc((size_t)ranks, sizeof *part->rows);
    return part->dst_rank && part->dst_row && part->out && part->rows ? 0 : 1;
}

/* The count-th place of the item that is being made. */
static void add(ll_part_t *part, uint32_t count, int rank, size_t row)
{
    size_t at = (size_t)part->items * part->slots + count;
    part->dst_rank[at] = rank;
    part->dst_row[at] = (int32_t)row;
}

static void next_item(ll_part_t *part, uint32_t count)
{
    if (count < part->slots)
        part->dst_rank[(size_t)part->items * part->slots + count] = -1;
    part->items++;
}

int ll_part_copies(ll_part_t *part, const bench_ll_t *ll, size_t pieces)
{
    const bench_rank_t *rank = ll->self;
    const bench_work_t *work = &rank->bench->work;
    if (part_init(part, FLOOR_DISPATCH, rank->tokens * pieces, work->ranks, work->ranks))
        return 1;
    for (int r = 0; r < work->ranks; r++)
        part->rows[r] = work->recv_rows[r] * (uint32_t)pieces;
    for (uint64_t t = rank->first; t < rank->first + rank->tokens; t++)
        for (size_t piece = 0; piece < pieces; piece++) {
            uint32_t count = 0;
            for (; count < (uint32_t)work->ranks && work->dst_rank[t * (uint64_t)work->ranks + count] >= 0; count++)
                add(part, count, work->dst_rank[t * (uint64_t)work->ranks + count],
                    (size_t)work->dst_row[t * (uint64_t)work->ranks + count] * pieces + piece);
            next_item(part, count);
        }
    return 0;
}

int ll_part_places(ll_part_t *part, const bench_ll_t *ll, floor_kind_t kind)
{
    const bench_rank_t *rank = ll->self;
    const bench_work_t *work = &rank->bench->work;
    int me = rank->rank->rank, source = 0;
    uint32_t token = 0, *next = calloc(ll->local_experts + 1, sizeof *next);
    if (!next || part_init(part, kind, rank->rows, (int)work->topk, work->ranks)) {
        free(next);
        return 1;
    }
    for (; bench_next_row(work, me, &source, &token); token++) {
        const int64_t *ids = work->ids + (work->first[source] + token) * work->topk;
        uint32_t count = 0;
        for (uint32_t k = 0; k < work->topk; k++)
            if (ids[k] >= 0 && work->expert_rank[ids[k]] == me) {
                size_t expert = (size_t)work->expert_local[ids[k]];
                add(part, count++, 0, expert * ll->places + next[expert]++);
            }
        next_item(part, count);
    }
    free(next);
    return 0;
}

/* Which of the token's ranks `rank` is, in ascending order. */
static size_t rank_place(const bench_work_t *work, uint64_t token, int rank)
{
    const int32_t *ranks = work->dst_rank + token * (uint64_t)work->ranks;
    size_t place = 0;
    while (ranks[place] != rank)
        place++;
    return place;
}

int ll_part_push(ll_part_t *part, const bench_ll_t *ll, size_t pieces)
{
    const bench_rank_t *rank = ll->self;
    const bench_work_t *work = &rank->bench->work;
    bool reduced = rank->bench->options.pre_reduced;
    int me = rank->rank->rank, source = 0;
    uint32_t token = 0;
    if (part_init(part, FLOOR_DISPATCH, rank->rows * (size_t)work->topk * pieces, work->ranks, work->ranks))
        return 1;
    for (int r = 0; r < work->ranks; r++)
        part->rows[r] = work->tokens[r] * work->topk * (uint32_t)pieces;
    for (; bench_next_row(work, me, &source, &token); token++) {
        uint64_t at = work->first[source] + token;
        const int64_t *ids = work->ids + at * work->topk;
        for (uint32_t k = 0; k < work->topk; k++) {
            if (!reduced && (ids[k] < 0 || work->expert_rank[ids[k]] != me))
                continue;
            size_t row = (size_t)token * work->topk + (reduced ? rank_place(work, at, me) : k);
            for (size_t piece = 0; piece < pieces; piece++) {
                add(part, 0, source, row * pieces + piece);
                next_item(part, 1);
            }
            if (reduced)
                break;
        }
    }
    return 0;
}

int ll_part_reduced_push(ll_part_t *part, const bench_ll_t *ll, uint8_t *const *back_area)
{
    const bench_work_t *work = &ll->self->bench->work;
    int me = ll->self->rank->rank, source = 0;
    uint32_t token = 0, item = 0;
    if (ll_part_places(part, ll, FLOOR_COMBINE))
        return 1;
    for (; bench_next_row(work, me, &source, &token); token++) {
        size_t row = (size_t)token * work->topk + rank_place(work, work->first[source] + token, me);
        part->out[item++] = back_area[source] + row * ll->self->bench->row_bytes;
    }
    return 0;
}

int ll_part_sum(ll_part_t *part, const bench_ll_t *ll)
{
    const bench_rank_t *rank = ll->self;
    const bench_work_t *work = &rank->bench->work;
    bool reduced = rank->bench->options.pre_reduced;
    if (part_init(part, FLOOR_COMBINE, rank->tokens, (int)work->topk, work->ranks))
        return 1;
    for (uint32_t token = 0; token < rank->tokens; token++) {
        uint64_t at = rank->first + token;
        uint32_t count = 0;
        for (uint32_t k = 0; k < work->topk && !reduced; k++)
            if (work->ids[at * work->topk + k] >= 0)
                add(part, count++, rank->rank->rank, (size_t)token * work->topk + k);
        for (uint32_t r = 0;
             reduced && r < (uint32_t)work->ranks && work->dst_rank[at * (uint64_t)work->ranks + r] >= 0; r++)
            add(part, count++, rank->rank->rank, (size_t)token * work->topk + r);
        part->out[token] = (uint8_t *)rank->out + token * rank->bench->row_bytes;
        next_item(part, count);
    }
    return 0;
}

void ll_part_fini(ll_part_t *part)
{
    free(part->dst_rank);
    free(part->dst_row);
    free(part->out);
    free(part->rows);
}
