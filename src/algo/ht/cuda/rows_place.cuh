/*
 * rows: where they go. What a rank publishes of its place, what its peers make of it, and the destinations of a token.
 */
#ifndef EPX_ALGO_HT_CUDA_ROWS_PLACE_CUH
#define EPX_ALGO_HT_CUDA_ROWS_PLACE_CUH

#include "algo/ht/cuda/wait.cuh"

/* Where rows for one rank go. Pointers that are NULL: that part is dropped. */
typedef struct ht_dest {
    char *x, *side, *idx, *weights, *src;
    uint32_t first; /* my first row there */
    uint32_t rows;  /* that I have for it */
    uint32_t ring;  /* 0: final rows */
    uint32_t batch; /* 0: it wants no progress words */
    uint64_t room;  /* rows at x */
} ht_dest_t;
static_assert(sizeof(ht_dest_t) == HT_DEST_BYTES, "the host sizes the table");

/* The same offsets as epx__place_layout_make's, which the API cut the lease by. */
typedef struct ht_place_offsets {
    uint64_t side, idx, weights, src;
} ht_place_offsets_t;

EPX__DEVICE uint64_t align_row(uint64_t bytes)
{
    return (bytes + EPX__ROW_ALIGN - 1) / EPX__ROW_ALIGN * EPX__ROW_ALIGN;
}
EPX__DEVICE ht_place_offsets_t place_offsets(const epx__row_shape_t &shape, uint64_t capacity)
{
    ht_place_offsets_t o;
    o.side = align_row(capacity * shape.row_bytes);
    o.idx = align_row(o.side + capacity * shape.side_bytes);
    o.weights = align_row(o.idx + capacity * shape.topk * shape.idx_bytes);
    o.src = align_row(o.weights + (shape.weights ? capacity * shape.topk * 4 : 0));
    return o;
}

EPX__DEVICE void place_pointers(const epx__row_shape_t &shape, char *base, uint64_t capacity, ht_dest_t *d)
{
    ht_place_offsets_t o = place_offsets(shape, capacity);
    d->x = base;
    d->side = shape.side_bytes ? base + o.side : NULL;
    d->idx = shape.topk ? base + o.idx : NULL;
    d->weights = shape.topk && shape.weights ? base + o.weights : NULL;
    d->src = shape.src_token ? base + o.src : NULL;
}

/* ---- publishing, and reading what peers published ---- */

/* Ring (or place) of the i-th peer in this rank's window. */
EPX__DEVICE uint64_t ring_offset(const ht_rows_t &p, int peer)
{
    int place = p.c.rails ? p.c.rails->index_of[peer] : peer < p.c.rank ? peer : peer - 1;
    return p.place_offset + (p.direct ? 0 : p.ring_bytes * (uint64_t)place);
}

/* Words of the message, after the shape. */
enum { WORD_SHAPE, WORD_PLACE, WORD_ROOM, WORDS }; /* room: capacity | direct << 40 | batch << 41 */

EPX__DEVICE void publish_places(const ht_rows_t &p, uint64_t n, ht_lead_t lead)
{
    const ht_common_t &c = p.c;
    for (int r = (int)threadIdx.x; r < c.ranks; r += (int)blockDim.x) {
        if (!ht_neighbour(c, r))
            continue;
        uint64_t words[WORDS] = {c.shape, ring_offset(p, r), p.capacity | p.direct << 40 | (uint64_t)p.batch << 41};
        if (r != (int)threadIdx.x)
            lead = ht_lead_t{c.peers[r], 0};
        if (!ht_post_led(c, n, r, lead, words, WORDS))
            return;
    }
}

EPX__DEVICE bool read_place(const ht_rows_t &p, uint64_t n, int r, ht_dest_t *d)
{
    const ht_common_t &c = p.c;
    d->first = (uint32_t)p.h.first[r];
    d->rows = (uint32_t)p.h.matrix[(size_t)c.rank * (uint32_t)c.ranks + (uint32_t)r];
    if (r == c.rank) {
        d->x = (char *)p.place.x;
        d->side = (char *)p.place.side;
        d->idx = (char *)p.place.topk_idx;
        d->weights = (char *)p.place.topk_weights;
        d->src = (char *)(p.own ? p.h.src_token : p.place.src_token);
        d->ring = d->batch = 0;
        d->room = UINT64_MAX;
        return true;
    }
    if (!ht_near(c, r)) { /* never looked up */
        *d = ht_dest_t{};
        return true;
    }
    uint64_t words[WORDS];
    char *window = c.peers[r]; /* looked up before the message comes */
    if (!ht_read_packets(c, n, r, words, WORDS))
        return false;
    uint64_t capacity = words[WORD_ROOM] & ((1ull << 40) - 1);
    place_pointers(p.row_shape, window + words[WORD_PLACE], capacity, d);
    d->room = capacity;
    d->ring = words[WORD_ROOM] >> 40 & 1 ? 0 : (uint32_t)capacity;
    d->batch = (uint32_t)(words[WORD_ROOM] >> 41);
    if (d->rows == 0 || (d->ring ? capacity != 0 : d->first + (uint64_t)d->rows <= capacity))
        return true;
    ht_fault_t f = {EPX_E_OVERFLOW, HT_STAGE_OVERFLOW, r, capacity, d->first + (uint64_t)d->rows, 0};
    ht_fail(c, n, f);
    return false;
}

/* ---- destinations of a token ---- */

/* Lane's destination of one token. */
typedef struct ht_aim {
    int32_t rank, row; /* rank -1: none, nor any in later slots; AIM_FAR: in another domain */
} ht_aim_t;
#define AIM_FAR (-2)

EPX__DEVICE ht_aim_t aim_at(const ht_rows_t &p, uint32_t token, uint32_t slot)
{
    ht_aim_t a = {-1, -1};
    size_t i = (size_t)token * p.h.slots + slot;
    if (slot < p.h.slots && token < p.tokens) {
        a.rank = __ldg(&p.h.dst_rank[i]);
        a.row = __ldg(&p.h.dst_row[i]);
        if (p.c.rails && a.rank >= 0 && !ht_near(p.c, a.rank))
            a.rank = AIM_FAR;
    }
    return a;
}

/* Lane: is this token's row to be loaded? Places behind the first 32 may name near ranks where these are all far. */
EPX__DEVICE bool aimed(const ht_rows_t &p, ht_aim_t a)
{
    return a.rank >= 0 || (p.h.slots > 32 && a.rank != -1);
}

EPX__DEVICE uint64_t dest_row(const ht_dest_t &d, int32_t row)
{
    return d.ring ? ((uint32_t)row - d.first) % d.ring : (uint64_t)(uint32_t)row;
}

#endif
