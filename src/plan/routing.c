/*
 * Top-k ids -> counts -> positions, on the host.
 */
#include "plan/routing.h"

#include <string.h>

#include "base/fail.h"

epx_status_t epx__experts_make(uint32_t experts, uint32_t ranks, const int32_t *rank_of, int32_t *local_of,
                               epx__experts_t *out)
{
    if (ranks == 0 || experts > INT32_MAX)
        return epx__fail(EPX_E_INVALID, "%u experts on %u ranks: at least one rank, at most %d experts", experts, ranks,
                         INT32_MAX);
    if (!rank_of) {
        if (experts % ranks != 0)
            return epx__fail(EPX_E_INVALID,
                             "%u experts are no multiple of %u ranks; give a map (expert_rank) or a multiple", experts,
                             ranks);
        *out = (epx__experts_t){.experts = experts, .ranks = ranks, .per_rank = experts / ranks};
        if (experts > 0 && experts <= 1u << 20)
            out->inverse = ((1ull << EPX__INVERSE_SHIFT) + out->per_rank - 1) / out->per_rank;
        return EPX_OK;
    }
    if (!local_of)
        return epx__fail(EPX_E_INVALID, "a map of %u experts needs room for their local numbers", experts);
    for (uint32_t e = 0; e < experts; e++) {
        if (rank_of[e] < 0 || (uint32_t)rank_of[e] >= ranks)
            return epx__fail(EPX_E_INVALID, "expert_rank[%u] is %d; it must be in [0, %u)", e, rank_of[e], ranks);
    }
    for (uint32_t e = 0; e < experts; e++) { /* runs once a buffer */
        int32_t below = 0;
        for (uint32_t lower = 0; lower < e; lower++)
            below += rank_of[lower] == rank_of[e];
        local_of[e] = below;
    }
    *out = (epx__experts_t){.experts = experts, .ranks = ranks, .rank_of = rank_of, .local_of = local_of};
    return EPX_OK;
}

uint32_t epx__experts_at(const epx__experts_t *map, uint32_t rank)
{
    if (!map->rank_of)
        return map->per_rank;
    uint32_t n = 0;
    for (uint32_t e = 0; e < map->experts; e++)
        n += (uint32_t)map->rank_of[e] == rank;
    return n;
}

uint32_t epx__experts_most(const epx__experts_t *map)
{
    if (!map->rank_of)
        return map->per_rank;
    uint32_t most = 0;
    for (uint32_t e = 0; e < map->experts; e++) {
        uint32_t n = (uint32_t)map->local_of[e] + 1;
        most = n > most ? n : most;
    }
    return most;
}

uint32_t epx__routing_slots(uint32_t topk, uint32_t ranks)
{
    uint32_t slots = topk == 0 || topk > ranks ? ranks : topk;
    return slots > 0 ? slots : 1;
}

/* The mask's counterpart of epx__token_ranks. */
static uint32_t mask_ranks(const uint8_t *in_rank, size_t token, uint32_t ranks, int32_t *out)
{
    uint32_t n = 0;
    for (uint32_t r = 0; r < ranks; r++) {
        if (in_rank[token * ranks + r])
            out[n++] = (int32_t)r;
    }
    return n;
}

static void count_experts(const epx__routing_in_t *in, int32_t *expert_count)
{
    for (size_t i = 0; i < (size_t)in->tokens * in->topk; i++) {
        int64_t id = epx__topk_id(in->topk_idx, in->bits, i);
        if (id >= 0 && id < (int64_t)in->map.experts)
            expert_count[id]++;
    }
}

/* Up to 64 ranks a token's destinations are a word of bits: no sorting, no branch on what the ids are. */
static inline uint64_t token_bits(const epx__experts_t *map, const void *ids, int bits, size_t token, uint32_t topk,
                                  int32_t *expert_count, uint32_t *bad)
{
    uint64_t destinations = 0;
    for (uint32_t k = 0; k < topk; k++) {
        int64_t id = epx__topk_id(ids, bits, token * topk + k);
        if ((uint64_t)id >= map->experts) {
            *bad += id != -1;
            continue;
        }
        expert_count[id]++;
        destinations |= 1ull << epx__expert_rank(map, id);
    }
    return destinations;
}

static inline void make_by_bits(const epx__routing_in_t *in, int bits, uint32_t slots, int32_t *rank_count,
                                int32_t *expert_count, int32_t *dst_rank, int32_t *dst_row, uint32_t *bad)
{
    const epx__experts_t map = in->map;
    for (size_t t = 0; t < in->tokens; t++) {
        int32_t *to = dst_rank + t * slots, *row = dst_row + t * slots;
        uint64_t left = token_bits(&map, in->topk_idx, bits, t, in->topk, expert_count, bad);
        for (uint32_t s = 0; s < slots; s++, left &= left - 1) {
            to[s] = left ? __builtin_ctzll(left) : -1;
            row[s] = left ? rank_count[to[s]]++ : -1;
        }
    }
}

static void make_by_sorting(const epx__routing_in_t *in, uint32_t slots, int32_t *rank_count, int32_t *dst_rank,
                            int32_t *dst_row, uint32_t *bad)
{
    for (size_t t = 0; t < in->tokens; t++) {
        int32_t *to = dst_rank + t * slots, *row = dst_row + t * slots;
        uint32_t n = in->topk ? (uint32_t)epx__token_ranks(&in->map, in->topk_idx, in->bits, t, in->topk, to, bad)
                              : mask_ranks(in->in_rank, t, in->map.ranks, to);
        for (uint32_t s = 0; s < n; s++)
            row[s] = rank_count[to[s]]++;
        for (uint32_t s = n; s < slots; s++)
            to[s] = row[s] = -1;
    }
}

void epx__routing_make(const epx__routing_in_t *in, uint32_t slots, int32_t *rank_count, int32_t *expert_count,
                       int32_t *dst_rank, int32_t *dst_row, uint32_t *bad)
{
    uint32_t wrong = 0;
    memset(rank_count, 0, in->map.ranks * sizeof *rank_count);
    if (expert_count)
        memset(expert_count, 0, in->map.experts * sizeof *expert_count);
    if (in->topk && expert_count && in->map.ranks <= 64) {
        if (in->bits == 32)
            make_by_bits(in, 32, slots, rank_count, expert_count, dst_rank, dst_row, &wrong);
        else
            make_by_bits(in, 64, slots, rank_count, expert_count, dst_rank, dst_row, &wrong);
    } else {
        make_by_sorting(in, slots, rank_count, dst_rank, dst_row, &wrong);
        if (expert_count)
            count_experts(in, expert_count);
    }
    *bad = wrong;
}

uint64_t epx__routing_starts(const int32_t *matrix, int ranks, int at, int32_t *start)
{
    uint64_t sum = 0;
    for (int i = 0; i < ranks; i++) {
        start[i] = (int32_t)sum;
        sum += (uint64_t)matrix[(size_t)i * (size_t)ranks + (size_t)at];
    }
    return sum;
}

void epx__routing_firsts(const int32_t *matrix, int ranks, int rank, int32_t *first)
{
    memset(first, 0, (size_t)ranks * sizeof *first);
    for (int h = 0; h < rank; h++) {
        for (int j = 0; j < ranks; j++)
            first[j] += matrix[(size_t)h * (size_t)ranks + (size_t)j];
    }
}
