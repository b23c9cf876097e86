/* Who sends what where: the routing of all ranks and everything that follows from it. */
#include "bench.h"

#include "routing_file.h"
#include "routing_gen.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A file's tokens, dealt to the ranks in order: as the file has them when the numbers of ranks agree, else equally. */
static void deal_tokens(bench_work_t *work, const routing_file_t *file, long at_most)
{
    for (int r = 0; r < work->ranks; r++) {
        uint64_t share = file->ranks == (uint32_t)work->ranks
                             ? file->tokens[r]
                             : file->total * ((uint64_t)r + 1) / (uint64_t)work->ranks -
                                   file->total * (uint64_t)r / (uint64_t)work->ranks;
        work->tokens[r] = (uint32_t)(share > (uint64_t)at_most ? (uint64_t)at_most : share);
    }
}

static void copy_ids(bench_work_t *work, const routing_file_t *file)
{
    uint64_t at = 0, in_file = 0;
    for (int r = 0; r < work->ranks; r++) {
        uint64_t share = file->ranks == (uint32_t)work->ranks
                             ? file->tokens[r]
                             : file->total * ((uint64_t)r + 1) / (uint64_t)work->ranks - in_file;
        memcpy(work->ids + at * work->topk, file->ids + in_file * work->topk,
               work->tokens[r] * (size_t)work->topk * sizeof *work->ids);
        in_file += share;
        at += work->tokens[r];
    }
}

static int make_ids(bench_work_t *work, const bench_options_t *options)
{
    routing_gen_t gen;
    routing_kind_t kind = strcmp(options->routing, "zipf") == 0 ? ROUTING_ZIPF : ROUTING_UNIFORM;
    if (routing_gen_init(&gen, kind, work->experts, work->topk, (uint64_t)options->seed))
        return -1;
    for (int r = 0; r < work->ranks; r++)
        for (uint32_t t = 0; t < work->tokens[r]; t++)
            routing_gen_token(&gen, r, t, work->ids + (work->first[r] + t) * work->topk);
    routing_gen_fini(&gen);
    return 0;
}

/* Experts in consecutive blocks: of equal size where the ranks divide them, else of sizes that differ by one. */
static void place_experts(bench_work_t *work)
{
    for (uint32_t e = 0; e < work->experts; e++) {
        int32_t at = (int32_t)((uint64_t)e * (uint64_t)work->ranks / work->experts);
        work->expert_rank[e] = at;
        work->expert_local[e] = (int32_t)work->local_experts[at]++;
    }
    work->mapped = work->experts % (uint32_t)work->ranks != 0;
}

/* Rows come in the order (source, token): walking the tokens in that order, a destination's next row is its count. */
static void place_rows(bench_work_t *work)
{
    size_t ranks = (size_t)work->ranks;
    for (int s = 0; s < work->ranks; s++)
        for (uint64_t t = work->first[s]; t < work->first[s] + work->tokens[s]; t++) {
            int32_t *to = work->dst_rank + t * ranks, *row = work->dst_row + t * ranks;
            size_t slot = 0;
            for (size_t d = 0; d < ranks; d++)
                row[d] = to[d] = -1;
            for (int32_t d = 0; d < work->ranks; d++) {
                uint64_t choices = 0;
                for (uint32_t k = 0; k < work->topk; k++) {
                    int64_t id = work->ids[t * work->topk + k];
                    choices += id >= 0 && work->expert_rank[id] == d;
                }
                if (!choices)
                    continue;
                work->logical_choices += choices;
                work->wire_choices += d != s ? choices : 0;
                to[slot] = d;
                row[slot++] = (int32_t)work->recv_rows[d]++;
                work->matrix[(size_t)s * ranks + (size_t)d]++;
                work->logical_rows++;
                work->wire_rows += d != s;
            }
        }
}

static bool allocate_tables(bench_work_t *work)
{
    size_t ranks = (size_t)work->ranks, total = work->total + 1;
    work->ids = malloc(total * work->topk * sizeof *work->ids);
    work->expert_rank = calloc(work->experts, sizeof *work->expert_rank);
    work->expert_local = calloc(work->experts, sizeof *work->expert_local);
    work->local_experts = calloc(ranks, sizeof *work->local_experts);
    work->dst_rank = malloc(total * ranks * sizeof *work->dst_rank);
    work->dst_row = malloc(total * ranks * sizeof *work->dst_row);
    work->recv_rows = calloc(ranks, sizeof *work->recv_rows);
    work->matrix = calloc(ranks * ranks, sizeof *work->matrix);
    return work->ids && work->expert_rank && work->expert_local && work->local_experts && work->dst_rank &&
           work->dst_row && work->recv_rows && work->matrix;
}

static int fill_work(bench_work_t *work, const bench_options_t *options, const routing_file_t *file)
{
    for (int r = 0; r < work->ranks; r++) {
        if (!file)
            work->tokens[r] = (uint32_t)options->tokens;
        work->first[r] = work->total;
        work->total += work->tokens[r];
        work->most_tokens = work->tokens[r] > work->most_tokens ? work->tokens[r] : work->most_tokens;
    }
    if (!allocate_tables(work))
        return -1;
    if (file)
        copy_ids(work, file);
    else if (make_ids(work, options))
        return -1;
    place_experts(work);
    place_rows(work);
    for (int r = 0; r < work->ranks; r++)
        work->most_rows = work->recv_rows[r] > work->most_rows ? work->recv_rows[r] : work->most_rows;
    return 0;
}

int bench_work_init(bench_work_t *work, bench_options_t *options)
{
    routing_file_t file = {0};
    bool from_file = strcmp(options->routing, "uniform") != 0 && strcmp(options->routing, "zipf") != 0;
    if (from_file) {
        const char *error = routing_file_read(options->routing, &file);
        if (error)
            return options_refuse("bench", "--routing: %s (or give uniform or zipf)", error);
        options->topk = file.topk;
        options->experts = file.experts;
    }
    *work = (bench_work_t){
        .ranks = (int)options->ranks, .topk = (uint32_t)options->topk, .experts = (uint32_t)options->experts};
    work->tokens = calloc((size_t)work->ranks, sizeof *work->tokens);
    work->first = calloc((size_t)work->ranks, sizeof *work->first);
    int failed = !work->tokens || !work->first;
    if (!failed && from_file)
        deal_tokens(work, &file, options->tokens);
    failed = failed || fill_work(work, options, from_file ? &file : NULL);
    routing_file_fini(&file);
    if (failed)
        fprintf(stderr, "epx bench: no memory for the routing of %ld ranks\n", options->ranks);
    options->tokens = failed ? 0 : work->most_tokens;
    return failed ? 1 : 0;
}

void bench_work_fini(bench_work_t *work)
{
    void *const parts[] = {work->tokens,   work->first,   work->ids,       work->expert_rank, work->expert_local,
                           work->dst_rank, work->dst_row, work->recv_rows, work->matrix,      work->local_experts};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        free(parts[i]);
    *work = (bench_work_t){0};
}

bool bench_next_row(const bench_work_t *work, int rank, int *source, uint32_t *token)
{
    for (; *source < work->ranks; (*source)++, *token = 0)
        for (; *token < work->tokens[*source]; (*token)++) {
            const int32_t *to = work->dst_rank + (work->first[*source] + *token) * (size_t)work->ranks;
            for (int slot = 0; slot < work->ranks && to[slot] >= 0; slot++)
                if (to[slot] == rank)
                    return true;
        }
    return false;
}
