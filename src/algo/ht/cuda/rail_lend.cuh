/*
 * combine with several domains: whose rows are read where, and staging one's own for the others (rail_combine.cu).
 *
 * The mail of the half says where a member's x and weights are: in a lease, or in its reserve in a ring for each
 * (reader, domain). `staged` (by the lender, at the reader) and `read` (by the reader, at the lender) count a ring's
 * rows.
 */
#ifndef EPX_ALGO_HT_CUDA_RAIL_LEND_CUH
#define EPX_ALGO_HT_CUDA_RAIL_LEND_CUH

#include "algo/ht/cuda/rail.cuh"

#define COMBINE_WARPS 16u
#define COMBINE_THREADS (COMBINE_WARPS * 32u)

/* A member of my domain, whose rows I read. ring 0: in place, by row; else by number in the stream, modulo the ring. */
typedef struct ht_lender {
    const char *x; /* row 0, or its reserve */
    uint64_t x_stride;
    const char *weights;
    uint32_t x_ring, w_ring, ring_weights; /* ring_weights: offset of the weights in a ring */
    uint32_t rows, read;                   /* owner: rows of its, and read */
    uint32_t staged;                       /* rail: rows of the stream looked at that are there */
    uint32_t spare[4];
} ht_lender_t;
static_assert(sizeof(ht_lender_t) == HT_LENDER_BYTES, "the host sizes the table");

typedef struct rail_step {
    int32_t go; /* 1: work, 0: none now, -1: stop */
    uint32_t from, count;
} rail_step_t;

EPX__DEVICE bool stages_x(const ht_rail_combine_t &p)
{
    return p.x_offset == 0;
}
EPX__DEVICE bool stages_weights(const ht_rail_combine_t &p)
{
    return p.weights && p.weights_offset == 0;
}
EPX__DEVICE uint64_t ring_at(const ht_rail_combine_t &p, int reader, int d)
{
    return p.ring_offset + p.ring_bytes * (uint64_t)(reader * p.c.rails->domains + d);
}

/* ---- mail ---- */

/* Words of the message, after the shape. Offsets of 0: staged. rings: rows | offset of the weights in a ring << 32. */
enum { WORD_SHAPE, WORD_X, WORD_STRIDE, WORD_WEIGHTS, WORD_RING, WORDS };

EPX__DEVICE void publish_x(const ht_rail_combine_t &p, uint64_t n)
{
    const ht_common_t &c = p.c;
    uint64_t words[WORDS] = {c.shape, p.x_offset, p.x_stride, p.weights_offset, p.ring_rows | p.ring_weights << 32};
    for (int r = (int)threadIdx.x; r < c.ranks; r += (int)blockDim.x) {
        if (ht_neighbour(c, r) && !ht_post_packets(c, n, r, 0, words, WORDS))
            return;
    }
}

/* One thread. */
EPX__DEVICE bool read_lender(const ht_rail_combine_t &p, uint64_t n, int e, ht_lender_t *l)
{
    const ht_common_t &c = p.c;
    const ht_rails_t &r = *c.rails;
    int rank = r.rank_of[r.home * r.members + e];
    *l = ht_lender_t{};
    l->rows = (uint32_t)p.h.matrix[(size_t)c.rank * (uint32_t)c.ranks + (uint32_t)rank];
    if (rank == c.rank) {
        l->x = p.x;
        l->x_stride = p.x_stride;
        l->weights = (const char *)p.weights;
        return true;
    }
    uint64_t words[WORDS];
    if (!ht_read_packets(c, n, rank, words, WORDS))
        return false;
    const char *window = c.peers[rank];
    uint32_t ring = (uint32_t)words[WORD_RING];
    l->x = window + words[WORD_X];
    l->x_stride = words[WORD_X] ? words[WORD_STRIDE] : p.row_bytes;
    l->x_ring = words[WORD_X] ? 0 : ring;
    l->weights = window + words[WORD_WEIGHTS];
    l->w_ring = p.weights && !words[WORD_WEIGHTS] ? ring : 0;
    l->ring_weights = (uint32_t)(words[WORD_RING] >> 32);
    return true;
}

/* Block: all of them. False: stop. */
EPX__DEVICE bool read_lenders(const ht_rail_combine_t &p, uint64_t n, ht_lender_t *lenders)
{
    bool ok = true;
    for (int e = (int)threadIdx.x; e < p.c.rails->members && ok; e += (int)blockDim.x)
        ok = read_lender(p, n, e, &lenders[e]);
    return __syncthreads_and(ok) != 0;
}

EPX__DEVICE uint32_t lender_ring(const ht_lender_t &l)
{
    return l.x_ring ? l.x_ring : l.w_ring;
}
/* The smallest ring that any member stages in; 0: nobody stages. All threads alike. */
EPX__DEVICE uint32_t least_ring(const ht_rail_combine_t &p, const ht_lender_t *lenders)
{
    uint32_t least = 0;
    for (int e = 0; e < p.c.rails->members; e++) {
        uint32_t ring = lender_ring(lenders[e]);
        least = ring && (!least || ring < least) ? ring : least;
    }
    return least;
}

/* Rows of one stream at member e. */
typedef struct rail_from {
    const char *x, *weights;
} rail_from_t;

/* Where row `row` of member e is, the j-th of (domain d, my index). */
EPX__DEVICE rail_from_t row_at(const ht_rail_combine_t &p, const ht_lender_t &l, int d, uint32_t row, uint32_t j)
{
    uint64_t ring = ring_at(p, p.c.rails->index, d), w_bytes = 4ull * p.topk;
    rail_from_t f;
    f.x = l.x_ring ? l.x + ring + j % l.x_ring * p.row_bytes : l.x + row * l.x_stride;
    f.weights = l.w_ring ? l.weights + ring + l.ring_weights + j % l.w_ring * w_bytes : l.weights + row * w_bytes;
    return f;
}

/* ---- stage ---- */

/* One thread: rows of the stream (i, d) that may be staged now. */
EPX__DEVICE rail_step_t stage_step(const ht_rail_combine_t &p, uint64_t n, int i, int d)
{
    const ht_rails_t &r = *p.c.rails;
    int reader = r.rank_of[d * r.members + i]; /* whose tokens; i reads */
    uint32_t rows = (uint32_t)p.h.matrix[(size_t)reader * (uint32_t)p.c.ranks + (uint32_t)p.c.rank];
    rail_step_t s = {0, rail_count(r.told[i * r.domains + d], n), 0};
    if (s.from == rows)
        return s;
    uint32_t read = rail_count(ld_acquire_sys_u64(&rail_words(r, r.index, i, d)->read), n);
    uint32_t room = (uint32_t)p.ring_rows - (s.from - read), left = rows - s.from;
    s.go = 1;
    s.count = room < left ? room : left;
    s.count = s.count < COMBINE_WARPS ? s.count : COMBINE_WARPS;
    return s;
}

/* Warp: row j of the stream. */
EPX__DEVICE void stage_row(const ht_rail_combine_t &p, int i, int d, uint32_t j)
{
    const ht_rails_t &r = *p.c.rails;
    uint64_t row = (uint64_t)(uint32_t)p.h.start[r.rank_of[d * r.members + i]] + j, slot = j % p.ring_rows;
    char *ring = p.c.window + ring_at(p, i, d);
    if (stages_x(p))
        copy_16(ring + slot * p.row_bytes, p.x + row * p.x_stride, p.row_bytes);
    if (stages_weights(p))
        rail_copy(ring + p.ring_weights + slot * 4 * p.topk, (const char *)(p.weights + row * p.topk), 4 * p.topk);
}

EPX__DEVICE bool stage_block(const ht_rail_combine_t &p, ht_block_t *b, uint32_t block, uint32_t blocks)
{
    __shared__ rail_step_t step;
    const ht_rails_t &r = *p.c.rails;
    rail_idle_t idle = {};
    for (;;) {
        bool left = false, moved = false;
        int waiting = p.c.rank;
        for (int s = (int)block; s < r.members * r.domains; s += (int)blocks) {
            int i = s / r.domains, d = s % r.domains;
            if (i == r.index)
                continue;    /* read where they are */
            __syncthreads(); /* `step` has been read by all */
            if (threadIdx.x == 0)
                step = stage_step(p, b->n, i, d);
            __syncthreads();
            left = left || step.go != 0;
            waiting = step.go != 0 ? r.rank_of[r.home * r.members + i] : waiting;
            if (step.count == 0)
                continue;
            if (threadIdx.x / 32 < step.count)
                stage_row(p, i, d, step.from + threadIdx.x / 32);
            moved = true;
            __syncthreads();
            if (threadIdx.x == 0) {
                r.told[s] = rail_word(b->n, step.from + step.count);
                fence_acq_rel_sys();
                st_release_sys_u64(&rail_words(r, i, r.index, d)->staged, rail_word(b->n, step.from + step.count));
            }
        }
        if (!left)
            return true;
        if (!rail_go_on(p.c, b->n, moved, &idle, -1, waiting, HT_STAGE_CREDIT))
            return false;
    }
}

#endif
