/*
 * combine: where rows are read. What a rank publishes of its expert outputs, what their owners make of it, and the rows
 * of a token.
 */
#ifndef EPX_ALGO_HT_CUDA_COMBINE_ROWS_CUH
#define EPX_ALGO_HT_CUDA_COMBINE_ROWS_CUH

#include "algo/ht/cuda/flow.cuh"

/* Where the rows of one rank are read. ring 0: by row; else by position among my rows there, modulo the ring. */
typedef struct ht_source {
    const char *x;
    uint64_t x_stride;
    const float *weights;
    uint32_t x_ring, w_ring;
    uint32_t first, rows;
} ht_source_t;
static_assert(sizeof(ht_source_t) == HT_SOURCE_BYTES, "the host sizes the table");

/* Lane's row of one item. */
typedef struct ht_pick {
    int32_t rank, row; /* -1: none */
} ht_pick_t;

EPX__DEVICE bool pushes_x(const ht_combine_t &p)
{
    return p.x_offset == 0;
}
EPX__DEVICE bool pushes_weights(const ht_combine_t &p)
{
    return p.weights && p.weights_offset == 0;
}
EPX__DEVICE uint64_t ring_of(const ht_combine_t &p, int peer)
{
    return p.ring_offset + p.ring_bytes * (uint64_t)(peer < p.c.rank ? peer : peer - 1);
}

/* Words of the message, after the shape. An offset of 0: pushed into the reader's ring. */
enum { WORD_SHAPE, WORD_X, WORD_STRIDE, WORD_WEIGHTS, WORD_RING, WORDS };

EPX__DEVICE void publish_x(const ht_combine_t &p, uint64_t n, ht_lead_t lead)
{
    const ht_common_t &c = p.c;
    for (int r = (int)threadIdx.x; r < c.ranks; r += (int)blockDim.x) {
        if (r == c.rank)
            continue;
        uint64_t words[WORDS] = {c.shape, p.x_offset, p.x_stride, p.weights_offset, ring_of(p, r)};
        if (r != (int)threadIdx.x)
            lead = ht_lead_t{c.peers[r], 0};
        if (!ht_post_led(c, n, r, lead, words, WORDS))
            return;
    }
}

EPX__DEVICE bool read_source(const ht_combine_t &p, uint64_t n, int r, ht_source_t *s)
{
    const ht_common_t &c = p.c;
    s->first = (uint32_t)p.h.first[r];
    s->rows = (uint32_t)p.h.matrix[(size_t)c.rank * (uint32_t)c.ranks + (uint32_t)r];
    s->x_ring = s->w_ring = 0;
    if (r == c.rank) {
        s->x = p.x;
        s->x_stride = p.x_stride;
        s->weights = p.weights;
        return true;
    }
    uint64_t words[WORDS];
    const char *window = c.peers[r]; /* looked up before the message comes */
    if (!ht_read_packets(c, n, r, words, WORDS))
        return false;
    uint64_t x = words[WORD_X], weights = words[WORD_WEIGHTS];
    char *ring = c.window + ring_of(p, r);
    s->x = x ? window + x : ring;
    s->x_stride = x ? words[WORD_STRIDE] : p.row_bytes;
    s->x_ring = x ? 0 : (uint32_t)p.ring_rows;
    s->weights = (const float *)(weights ? window + weights : ring + p.ring_weights);
    s->w_ring = p.weights && !weights ? (uint32_t)p.ring_rows : 0;
    return true;
}

EPX__DEVICE ht_pick_t pick_at(const ht_combine_t &p, uint32_t token, uint32_t slot)
{
    ht_pick_t k = {-1, -1};
    size_t i = (size_t)token * p.h.slots + slot;
    if (slot < p.h.slots && token < p.tokens) {
        k.rank = __ldg(&p.h.dst_rank[i]);
        k.row = __ldg(&p.h.dst_row[i]);
    }
    return k;
}
EPX__DEVICE const char *x_row(const ht_source_t &s, int32_t row)
{
    uint64_t at = s.x_ring ? ((uint32_t)row - s.first) % s.x_ring : (uint64_t)(uint32_t)row;
    return s.x + at * s.x_stride;
}
EPX__DEVICE const float *w_row(const ht_source_t &s, int32_t row, uint32_t topk)
{
    uint64_t at = s.w_ring ? ((uint32_t)row - s.first) % s.w_ring : (uint64_t)(uint32_t)row;
    return s.weights + at * topk;
}
EPX__DEVICE uint32_t chunk_bytes_of(const ht_combine_t &p, uint32_t chunk)
{
    uint32_t left = (uint32_t)p.row_bytes - chunk * p.cut.chunk_bytes;
    return left < p.cut.chunk_bytes ? left : p.cut.chunk_bytes;
}

/* Lane: has its row come? Rows in place have. */
EPX__DEVICE bool row_ready(const ht_combine_t &p, const ht_source_t *sources, uint64_t n, ht_pick_t k, bool wait)
{
    if (k.rank < 0 || (sources[k.rank].x_ring == 0 && sources[k.rank].w_ring == 0))
        return true;
    uint32_t b = ((uint32_t)k.row - sources[k.rank].first) / p.batch;
    const uint64_t *word = put_words(p.c, p.c.window, k.rank) + b % HT_WORDS;
    uint64_t want = batch_word(n, b);
    return wait ? ht_wait(p.c, n, word, want, k.rank, HT_STAGE_ARRIVAL) : ld_acquire_sys_u64(word) >= want;
}

/* Rows of that rank pass through a ring that is too small for all of them: it waits for room. */
EPX__DEVICE bool wants_credit(const ht_combine_t &p, const ht_source_t &s)
{
    return (s.x_ring != 0 || s.w_ring != 0) && s.rows > p.ring_rows;
}

#endif
