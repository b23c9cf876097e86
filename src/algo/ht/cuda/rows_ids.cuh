/*
 * rows: what goes beside the payload. Ids, weights and source tokens travel with a handle's first rows, into a lease by
 * one warp of each sending block while the others move the payload; later dispatches take the source tokens from the
 * handle. All are small and scattered, so what they cost is ways to memory, one after another: loads of several tokens
 * are under way together.
 */
#ifndef EPX_ALGO_HT_CUDA_ROWS_IDS_CUH
#define EPX_ALGO_HT_CUDA_ROWS_IDS_CUH

#include "algo/ht/cuda/rows_place.cuh"

#define IDS_AHEAD 4u

/* The k-th choice of one token. */
typedef struct ht_choice {
    uint32_t k;
    int64_t id;
    float weight;
} ht_choice_t;

EPX__DEVICE ht_choice_t choice_at(const ht_rows_t &p, uint32_t token, uint32_t k)
{
    ht_choice_t c = {k, -1, 0.0f};
    size_t at = (size_t)token * p.topk + k;
    if (k < p.topk && token < p.tokens) {
        c.id = epx__topk_id(p.topk_idx, p.bits, at);
        if (p.row_shape.weights)
            c.weight = p.topk_weights[at];
    }
    return c;
}

/* Lane with choice k: the id as the destination sees it, its weight; k = 0: where the row came from. */
EPX__DEVICE void send_ids(const ht_rows_t &p, const ht_dest_t &d, uint64_t row, uint32_t token, int rank, ht_choice_t c)
{
    if (c.k == 0 && d.src)
        ((int32_t *)d.src)[row] = (int32_t)token;
    if (c.k >= p.topk || (!d.idx && !d.weights))
        return;
    bool here = c.id >= 0 && c.id < (int64_t)p.map.experts && epx__expert_rank(&p.map, c.id) == rank;
    int32_t local = here ? epx__expert_local(&p.map, c.id) : -1;
    uint64_t at = row * p.topk + c.k;
    if (d.idx && p.bits == 32)
        ((int32_t *)d.idx)[at] = local;
    else if (d.idx)
        ((int64_t *)d.idx)[at] = local;
    if (d.weights)
        ((float *)d.weights)[at] = here ? c.weight : 0.0f;
}

/* Warp: `lanes` lanes a token, each with a choice and the aim of that slot, to the token's destinations in turn. */
EPX__DEVICE void send_ids_of(const ht_rows_t &p, const ht_dest_t *dests, uint32_t token, uint32_t lanes, ht_aim_t a,
                             ht_choice_t c)
{
    uint32_t first = threadIdx.x % 32 / lanes * lanes;
    for (uint32_t slot = 0; slot < p.h.slots; slot++) {
        ht_aim_t to = {__shfl_sync(0xffffffffu, a.rank, (int)(first + slot % lanes)),
                       __shfl_sync(0xffffffffu, a.row, (int)(first + slot % lanes))};
        if (slot >= lanes) /* a mask may name more ranks than there are lanes */
            to = aim_at(p, token, slot);
        if (!__any_sync(0xffffffffu, to.rank != -1))
            break;
        if (to.rank >= 0)
            send_ids(p, dests[to.rank], dest_row(dests[to.rank], to.row), token, to.rank, c);
    }
}

/* Warps beside the senders, and senders that have nothing left to send: ids, weights and source tokens, whoever is free
 * the next few tokens. Only when nobody asks for progress words, which would have to cover them. */
EPX__DEVICE void send_ids_aside(const ht_rows_t &p, const ht_dest_t *dests)
{
    uint32_t lanes = 1, lane = threadIdx.x % 32;
    while (lanes < p.topk)
        lanes *= 2;
    uint32_t tokens = 32 / lanes, *turns = &p.c.state->taken_ids;
    uint32_t turn = lane == 0 ? add_relaxed_gpu_u32(turns, 1) : 0;
    for (;;) {
        uint32_t t0 = __shfl_sync(0xffffffffu, turn, 0) * IDS_AHEAD * tokens + lane / lanes;
        if (t0 - lane / lanes >= p.tokens)
            return;
        turn = lane == 0 ? add_relaxed_gpu_u32(turns, 1) : 0; /* on its way meanwhile */
        ht_choice_t c[IDS_AHEAD];
        ht_aim_t a[IDS_AHEAD];
#pragma unroll
        for (uint32_t i = 0; i < IDS_AHEAD; i++) {
            a[i] = aim_at(p, t0 + i * tokens, lane % lanes);
            c[i] = choice_at(p, t0 + i * tokens, lane % lanes);
        }
#pragma unroll
        for (uint32_t i = 0; i < IDS_AHEAD; i++)
            send_ids_of(p, dests, t0 + i * tokens, lanes, a[i], c[i]);
    }
}

/* Rows behind the last one (worst case): ids -1, weights 0, no source. All threads of all blocks. */
EPX__DEVICE void fill_tail(const ht_rows_t &p)
{
    uint64_t total = (uint64_t)(uint32_t)p.h.start[p.c.ranks - 1] +
                     (uint32_t)p.h.matrix[(size_t)(p.c.ranks - 1) * (uint32_t)p.c.ranks + (uint32_t)p.c.rank];
    uint64_t at = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x, step = (uint64_t)gridDim.x * blockDim.x;
    for (uint64_t i = total * p.topk + at; i < p.tail_to * p.topk; i += step) {
        if (p.place.topk_idx && p.bits == 32)
            ((int32_t *)p.place.topk_idx)[i] = -1;
        else if (p.place.topk_idx)
            ((int64_t *)p.place.topk_idx)[i] = -1;
        if (p.place.topk_weights)
            p.place.topk_weights[i] = 0.0f;
    }
    int32_t *src = p.own ? p.h.src_token : p.place.src_token;
    for (uint64_t i = total + at; p.first && src && i < p.tail_to && (!p.own || i < p.h.src_rows); i += step)
        src[i] = -1;
}

/* Elements at, at + step, ... of `count` from one array to the other: of 16 bytes where both are aligned like that. The
 * loads of one round are under way together. */
EPX__DEVICE void copy_words(int32_t *to, const int32_t *from, uint64_t count, uint64_t at, uint64_t step)
{
    uint64_t pieces = ((uintptr_t)to | (uintptr_t)from) % 16 ? 0 : count / 4, done = pieces * 4;
    for (uint64_t i = at; i < pieces; i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (uint32_t j = 0; j < 4; j++)
            v[j] = i + j * step < pieces ? ld_global_16(from + 4 * (i + j * step)) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            if (i + j * step < pieces)
                st_global_16(to + 4 * (i + j * step), v[j]);
        }
    }
    for (uint64_t i = done + at; i < count; i += 4 * step) {
        uint32_t v[4];
#pragma unroll
        for (uint32_t j = 0; j < 4; j++)
            v[j] = i + j * step < count ? ld_relaxed_sys_u32((const uint32_t *)&from[i + j * step]) : 0;
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) {
            if (i + j * step < count)
                to[i + j * step] = (int32_t)v[j];
        }
    }
}

/*
 * Where rows came from. With ids (first) it travels: into a lease, from where the handle keeps a copy; with the
 * caller's memory into the handle's array. Later dispatches of the handle take it from there.
 */
EPX__DEVICE void copy_sources(const ht_rows_t &p, bool keep, uint64_t at, uint64_t step)
{
    const int32_t *from = keep ? p.place.src_token : p.h.src_token;
    int32_t *to = keep ? p.h.src_token : p.place.src_token;
    if (!to || !from)
        return;
    uint64_t rows = p.tail_to
                        ? p.tail_to
                        : (uint64_t)(uint32_t)p.h.start[p.c.ranks - 1] +
                              (uint32_t)p.h.matrix[(size_t)(p.c.ranks - 1) * (uint32_t)p.c.ranks + (uint32_t)p.c.rank];
    uint64_t known = rows < p.h.src_rows ? rows : p.h.src_rows;
    copy_words(to, from, known, at, step);
    for (uint64_t i = known + at; !keep && i < rows; i += step)
        to[i] = -1;
}

#endif
