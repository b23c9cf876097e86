/*
 * combine with several domains, the rail blocks (rail_combine.cu): for each other domain d, my domain's rows of each
 * token of my rail's there, summed in rank order, into the send ring.
 *
 * A block takes a chunk at a time, or as much of it as has been staged, a record a warp. What it looks at across PCIe:
 * for a chunk two words for room and two to push it, and while rows are staged a word of each member for each step.
 */
#ifndef EPX_ALGO_HT_CUDA_RAIL_SUM_CUH
#define EPX_ALGO_HT_CUDA_RAIL_SUM_CUH

#include "algo/ht/cuda/rail_lend.cuh"
#include "algo/ht/cuda/sum.cuh"

/* How far the block is in the stream towards one domain: pushed chunks lie in the state, records in `hands`. */
EPX__DEVICE uint64_t *packed_word(const ht_rails_t &r, int d)
{
    return &r.hands[(size_t)d * HT_HANDS];
}

/* One thread: the next records towards d, to the end of their chunk, if there is room for it. Room is across PCIe and
 * looked for once a chunk: it does not go away. */
EPX__DEVICE rail_step_t next_records(const ht_rail_combine_t &p, uint64_t n, int d)
{
    const ht_rails_t &r = *p.c.rails;
    uint32_t total = (uint32_t)p.h.in_count[r.index * r.domains + d], packed = rail_count(*packed_word(r, d), n);
    uint32_t chunk = packed / p.cut.rows_per_chunk, end = (chunk + 1) * p.cut.rows_per_chunk;
    rail_step_t s = {packed < total ? 1 : 0, packed, 0};
    if (packed == total || (packed % p.cut.rows_per_chunk == 0 && !rail_room(r, n, d, p.cut, chunk)))
        return s;
    s.count = (end < total ? end : total) - packed;
    return s;
}

/* Warp: of `count` records towards d, from `from` on, how many have all their rows there; 32 at most. A lane looks at
 * the words of a member, then at a record. */
EPX__DEVICE uint32_t records_staged(const ht_rail_combine_t &p, ht_lender_t *lenders, uint64_t n, int d, uint32_t from,
                                    uint32_t count)
{
    const ht_rails_t &r = *p.c.rails;
    uint32_t lane = threadIdx.x % 32;
    for (int e = (int)lane; e < r.members; e += 32) {
        bool ring = lender_ring(lenders[e]) != 0;
        uint64_t word = ring ? ld_acquire_sys_u64(&rail_words(r, r.index, e, d)->staged) : 0;
        lenders[e].staged = ring ? rail_count(word, n) : UINT32_MAX; /* in place all are */
    }
    __syncwarp();
    bool there = lane < count;
    const int32_t *row = p.h.sum_row + ((size_t)d * r.tokens_max + from + lane) * (uint32_t)r.members;
    for (int e = 0; e < r.members && there; e++)
        there = row[e] < 0 || (uint32_t)(row[e] - p.h.sum_first[d * r.members + e]) < lenders[e].staged;
    uint32_t missing = ~__ballot_sync(0xffffffffu, there);
    return missing ? (uint32_t)__ffs((int)missing) - 1 : 32;
}

/* Warp: the records towards d that may be made now, all of one chunk. */
EPX__DEVICE void sum_step(const ht_rail_combine_t &p, ht_lender_t *lenders, bool staged, uint64_t n, int d,
                          rail_step_t *step)
{
    if (threadIdx.x == 0)
        *step = next_records(p, n, d);
    __syncwarp();
    if (!staged || step->count == 0)
        return;
    uint32_t count = records_staged(p, lenders, n, d, step->from, step->count);
    if (threadIdx.x == 0)
        step->count = count;
}

/* Lane: pieces of the record at `to` from `v` on, of the rows `row` at each member. */
template <int dtype, int pieces>
EPX__DEVICE void sum_pieces(const ht_rail_combine_t &p, const ht_lender_t *lenders, int d, const int32_t *row, char *to,
                            uint64_t v)
{
    int members = p.c.rails->members;
    const int32_t *first = p.h.sum_first + d * members;
    float sum[pieces][8] = {};
    for (int e = 0; e < members; e++) {
        if (row[e] >= 0)
            add_pieces<dtype, pieces>(sum,
                                      row_at(p, lenders[e], d, (uint32_t)row[e], (uint32_t)(row[e] - first[e])).x + v);
    }
    store_pieces<dtype, pieces>(to + v, sum);
}

/* Warp: the k-th record towards d. */
template <int dtype>
EPX__DEVICE void sum_record(const ht_rail_combine_t &p, const ht_lender_t *lenders, int d, uint32_t k)
{
    const ht_rails_t &r = *p.c.rails;
    const int32_t *row = p.h.sum_row + ((size_t)d * r.tokens_max + k) * (uint32_t)r.members;
    const int32_t *first = p.h.sum_first + d * r.members;
    char *to = rail_send(r, d) + epx__rail_at(&p.cut, k);
    uint32_t lane = threadIdx.x % 32;
    uint64_t v = lane * 16;
    for (; v + (SUM_PIECES - 1) * 512 < p.row_bytes; v += SUM_PIECES * 512)
        sum_pieces<dtype, SUM_PIECES>(p, lenders, d, row, to, v);
    for (; v < p.row_bytes; v += 512)
        sum_pieces<dtype, 1>(p, lenders, d, row, to, v);
    if (!p.weights || lane >= p.topk)
        return;
    float sum = 0.0f;
    for (int e = 0; e < r.members; e++) {
        if (row[e] < 0)
            continue;
        const char *weights = row_at(p, lenders[e], d, (uint32_t)row[e], (uint32_t)(row[e] - first[e])).weights;
        sum = __fadd_rn(sum, ld_relaxed_sys_f32((const float *)weights + lane));
    }
    ((float *)(to + p.row_bytes))[lane] = sum;
}

/* Thread e, after the records are made: if member e's rows are staged, tell it how many of (d, my index) are read. */
EPX__DEVICE void tell_read(const ht_rail_combine_t &p, const ht_lender_t *lenders, uint64_t n, int d,
                           const rail_step_t &s)
{
    const ht_rails_t &r = *p.c.rails;
    for (int e = (int)threadIdx.x; e < r.members; e += (int)blockDim.x) {
        int32_t last = -1;
        for (uint32_t k = s.from; k < s.from + s.count && lender_ring(lenders[e]); k++) {
            int32_t row = p.h.sum_row[((size_t)d * r.tokens_max + k) * (uint32_t)r.members + (uint32_t)e];
            last = row > last ? row : last;
        }
        if (last >= 0)
            st_release_sys_u64(&rail_words(r, e, r.index, d)->read,
                               rail_word(n, (uint32_t)(last - p.h.sum_first[d * r.members + e]) + 1));
    }
}

/* One thread, after the records are made: count them, put the chunk if it is whole. */
EPX__DEVICE bool sum_made(const ht_rail_combine_t &p, uint64_t n, int d, const rail_step_t &s)
{
    const ht_rails_t &r = *p.c.rails;
    uint32_t total = (uint32_t)p.h.in_count[r.index * r.domains + d], to = s.from + s.count;
    *packed_word(r, d) = rail_word(n, to);
    if (to != total && to % p.cut.rows_per_chunk != 0)
        return true;
    return rail_put(p.c, n, d, p.cut, s.from / p.cut.rows_per_chunk, total);
}

template <int dtype>
EPX__DEVICE bool rail_block(const ht_rail_combine_t &p, ht_block_t *b, ht_lender_t *lenders, uint32_t block)
{
    __shared__ rail_step_t step;
    const ht_rails_t &r = *p.c.rails;
    rail_idle_t idle = {};
    if (!read_lenders(p, b->n, lenders))
        return false;
    bool staged = least_ring(p, lenders) != 0;
    for (;;) {
        bool left = false, moved = false;
        int waiting = -1;
        for (uint32_t i = block; i < (uint32_t)r.domains - 1; i += p.rail_blocks) {
            int d = rail_other(r, i), ok = 1;
            __syncthreads(); /* `step` has been read by all */
            if (threadIdx.x < 32)
                sum_step(p, lenders, staged, b->n, d, &step);
            __syncthreads();
            left = left || step.go != 0;
            waiting = step.go != 0 ? d : waiting;
            if (step.count == 0)
                continue;
            for (uint32_t k = threadIdx.x / 32; k < step.count; k += COMBINE_WARPS)
                sum_record<dtype>(p, lenders, d, step.from + k);
            moved = true;
            __syncthreads();
            tell_read(p, lenders, b->n, d, step);
            if (threadIdx.x == 0)
                ok = sum_made(p, b->n, d, step);
            if (!__syncthreads_and(ok))
                return false;
        }
        if (!left)
            return true;
        int peer = moved ? -1 : rail_channel(r, waiting, 0)->peer;
        if (!rail_go_on(p.c, b->n, moved, &idle, waiting, peer, HT_STAGE_ROOM))
            return false;
    }
}

#endif
