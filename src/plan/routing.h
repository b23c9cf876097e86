/*
 * From top-k ids to counts and positions. Pure; the inline parts are shared with nvcc.
 */
#ifndef EPX_PLAN_ROUTING_H
#define EPX_PLAN_ROUTING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <epx/epx.h>

#if defined(__CUDACC__)
#define EPX__INLINE __host__ __device__ static inline
#else
#define EPX__INLINE static inline
#endif

#define EPX__INVERSE_SHIFT 44

/* Which rank holds an expert, and its number there. With `rank_of` NULL: equal consecutive blocks. */
typedef struct epx__experts {
    uint32_t experts, ranks;
    uint32_t per_rank;       /* experts / ranks when rank_of is NULL */
    uint64_t inverse;        /* of per_rank, rounded up, times 2^44: exact below 2^20 experts; 0: divide */
    const int32_t *rank_of;  /* [experts] or NULL */
    const int32_t *local_of; /* [experts] or NULL: number at its rank, by ascending id */
} epx__experts_t;

/* Checks the map (every entry in [0, ranks)) or the division; fills local_of (caller's memory, [experts]) when a map is
 * given. EPX_E_INVALID in words. */
epx_status_t epx__experts_make(uint32_t experts, uint32_t ranks, const int32_t *rank_of, int32_t *local_of,
                               epx__experts_t *out);

EPX__INLINE int32_t epx__expert_rank(const epx__experts_t *m, int64_t expert)
{
    if (m->rank_of)
        return m->rank_of[expert];
#if !defined(__CUDA_ARCH__)
    if (m->inverse)
        return (int32_t)((uint64_t)expert * m->inverse >> EPX__INVERSE_SHIFT);
#endif
    return (int32_t)((uint32_t)expert / m->per_rank);
}
EPX__INLINE int32_t epx__expert_local(const epx__experts_t *m, int64_t expert)
{
    return m->rank_of ? m->local_of[expert] : (int32_t)((uint32_t)expert % m->per_rank);
}
/* How many experts `rank` holds. */
uint32_t epx__experts_at(const epx__experts_t *map, uint32_t rank);
/* The largest number of experts on one rank. */
uint32_t epx__experts_most(const epx__experts_t *map);

/* An id, whatever its width. */
EPX__INLINE int64_t epx__topk_id(const void *ids, int bits, size_t index)
{
    return bits == 32 ? (int64_t)((const int32_t *)ids)[index] : ((const int64_t *)ids)[index];
}

/*
 * The distinct ranks that one token goes to, ascending, into ranks[0 .. returned - 1].
 * An id that is neither -1 nor in [0, experts) counts as -1 and adds one to *bad.
 */
EPX__INLINE int epx__token_ranks(const epx__experts_t *map, const void *ids, int bits, size_t token, uint32_t topk,
                                 int32_t *ranks, uint32_t *bad)
{
    int n = 0;
    for (uint32_t k = 0; k < topk; k++) {
        int64_t id = epx__topk_id(ids, bits, token * topk + k);
        if (id < 0 || id >= (int64_t)map->experts) {
            *bad += id != -1;
            continue;
        }
        int32_t rank = epx__expert_rank(map, id);
        int at = n;
        while (at > 0 && ranks[at - 1] > rank)
            at--;
        if (at > 0 && ranks[at - 1] == rank)
            continue;
        for (int i = n; i > at; i--)
            ranks[i] = ranks[i - 1];
        ranks[at] = rank;
        n++;
    }
    return n;
}

/* Where one dispatch's tokens come from: ids or mask. */
typedef struct epx__routing_in {
    epx__experts_t map;
    uint32_t tokens, topk;
    int bits;               /* of the ids */
    const void *topk_idx;   /* [tokens][topk] */
    const uint8_t *in_rank; /* [tokens][ranks], when topk is 0 */
} epx__routing_in_t;

/* Slots of a token in the tables below: min(topk, ranks), or ranks with a mask. At least 1. */
uint32_t epx__routing_slots(uint32_t topk, uint32_t ranks);

/*
 * Count and place. All outputs are caller's memory.
 *
 *   rank_count [ranks]: tokens bound for each rank.
 *
 *   expert_count [experts] or NULL: (token, expert) pairs per global expert. A repeated id counts each time.
 *
 *   dst_rank [tokens][slots]: destination ranks ascending, -1 padded.
 *
 *   dst_row [tokens][slots]: place among this source's tokens bound for that rank (not the final row), -1 padded.
 *
 *   bad: ids that were neither -1 nor an expert.
 */
void epx__routing_make(const epx__routing_in_t *in, uint32_t slots, int32_t *rank_count, int32_t *expert_count,
                       int32_t *dst_rank, int32_t *dst_row, uint32_t *bad);

/*
 * First rows: start[i] at rank `at` of source i = sum of matrix[h][at] over h < i. matrix [ranks][ranks], [i][j] rows
 * from i to j. Returns the total (64 bits: the caller checks the limit).
 */
uint64_t epx__routing_starts(const int32_t *matrix, int ranks, int at, int32_t *start);
/* This rank's first row at every destination: first[j] = sum of matrix[h][j] over h < rank. */
void epx__routing_firsts(const int32_t *matrix, int ranks, int rank, int32_t *first);

/* A count of rows rounded up to the alignment (at least 1). */
EPX__INLINE int32_t epx__align_rows(int32_t rows, uint32_t alignment)
{
    return alignment <= 1 ? rows : (int32_t)(((uint32_t)rows + alignment - 1) / alignment * alignment);
}

#endif
