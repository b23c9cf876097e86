/*
 * In-band dispatch, the receiving side: a warp takes one piece of 1024 elements of one row, writes it to the rows of
 * all the token's experts here, and fills the places with the empty pattern again.
 */
#ifndef EPX_ALGO_LL_CUDA_LL_INBAND_TAKE_CUH
#define EPX_ALGO_LL_CUDA_LL_INBAND_TAKE_CUH

#include "algo/ll/cuda/ll_inband_index.cuh"
#include "plan/format.h"

/* A row under way: lane k < topk has choice k's local expert and row; `first`, the lanes whose row is written. */
typedef struct ll_spread {
    uint32_t e, row, first;
} ll_spread_t;

/* Rows of pair u, whose local experts are in `e`. Each lane counts for its own choice: no lane waits for another. */
EPX__DEVICE ll_spread_t rows_of(const ll_dispatch_t &p, const ll_ids_t &x, uint32_t u, uint32_t e)
{
    const ll_common_t &l = p.l;
    ll_spread_t s = {e, 0, 0};
    uint32_t same = __match_any_sync(ALL_LANES, e);
    s.first = __ballot_sync(ALL_LANES, e != LL_NONE && (uint32_t)__ffs((int)same) - 1 == threadIdx.x % 32);
    if (l.ranked)
        s.first &= 0u - s.first; /* once */
    if (e != LL_NONE)
        s.row = place_of(p, x, part_of(l, e), u);
    return s;
}

/* Scales of a piece, lane i % width the i-th, to every row: as many rows at once as the warp has room for. */
EPX__DEVICE void put_scales(const ll_dispatch_t &p, const ll_spread_t &s, uint32_t value, uint32_t first_block,
                            uint32_t blocks, uint32_t width)
{
    const ll_common_t &l = p.l;
    uint32_t lane = threadIdx.x % 32, all = (uint32_t)l.c.ranks * l.c.layout.ll.tokens_max;
    uint32_t block = first_block + lane % width;
    for (uint32_t m = s.first; m;) {
        int k = -1;
        for (uint32_t group = 0; m && group < 32 / width; group++, m &= m - 1)
            k = lane / width == group ? __ffs((int)m) - 1 : k;
        uint32_t from = k < 0 ? 0 : (uint32_t)k;
        size_t part = part_of(l, __shfl_sync(ALL_LANES, s.e, from)), row = __shfl_sync(ALL_LANES, s.row, from);
        if (k >= 0 && block < blocks)
            p.recv_scales[(part * blocks + block) * all + row] = value;
    }
}

/* `scales`: lanes 0 and 1 have the piece's two words. */
EPX__DEVICE void spread_scales(const ll_dispatch_t &p, const ll_spread_t &s, uint4 scales, uint32_t at)
{
    uint32_t lane = threadIdx.x % 32, hidden = p.l.hidden;
    if (p.ue8m0) {
        uint8_t four[4] = {
            epx__ue8m0_of_f32_up(__uint_as_float(scales.x)), epx__ue8m0_of_f32_up(__uint_as_float(scales.y)),
            epx__ue8m0_of_f32_up(__uint_as_float(scales.z)), epx__ue8m0_of_f32_up(__uint_as_float(scales.w))};
        uint32_t packed = __shfl_sync(ALL_LANES, (uint32_t)epx__ue8m0_pack(four), lane % 2);
        put_scales(p, s, packed, at / 512, hidden / 512, 2);
        return;
    }
    uint32_t word = lane % 8 / 4, x = __shfl_sync(ALL_LANES, scales.x, word);
    uint32_t y = __shfl_sync(ALL_LANES, scales.y, word), z = __shfl_sync(ALL_LANES, scales.z, word);
    uint32_t w = __shfl_sync(ALL_LANES, scales.w, word);
    uint32_t value = lane % 4 < 2 ? (lane % 4 ? y : x) : (lane % 4 == 2 ? z : w);
    put_scales(p, s, value, at / 128, hidden / 128, 8);
}

/* What goes with a row: its token; rank-major, one lane a choice, local experts and weights. False: stop. */
EPX__DEVICE bool put_side(const ll_dispatch_t &p, const ll_entry_t &e, const ll_spread_t &s, uint32_t source,
                          uint32_t t)
{
    const ll_common_t &l = p.l;
    uint32_t lane = threadIdx.x % 32, all = (uint32_t)l.c.ranks * l.c.layout.ll.tokens_max;
    if (s.first >> lane & 1)
        p.src_info[(size_t)part_of(l, s.e) * all + s.row] = (int32_t)t;
    if (!l.ranked)
        return true;
    size_t row = __shfl_sync(ALL_LANES, s.row, __ffs((int)s.first) - 1);
    if (lane >= l.topk)
        return true;
    if (p.recv_topk_idx)
        p.recv_topk_idx[row * l.topk + lane] = s.e == LL_NONE ? -1 : (int32_t)s.e;
    if (!p.recv_topk_weights)
        return true;
    uint64_t seen = 0;
    if (s.e != LL_NONE) {
        const uint64_t *word = &ll_weights(l, l.c.window, e.slot, (int)source)[t * l.topk + lane];
        seen = ld_relaxed_sys_u64(word);
        if (!ll_is<true>(seen, e.n)) {
            if (ll_wait_slow<true>(l, e.n, word, e.n, (int)source, HT_STAGE_ARRIVAL, NULL, NULL) != LL_CAME)
                return false;
            seen = ld_relaxed_sys_u64(word);
        }
    }
    p.recv_topk_weights[row * l.topk + lane] = __uint_as_float((uint32_t)seen);
    return true;
}

/* A lane's words of one piece of a row: vectors 512 bytes apart, and (lanes 0 and 1, fp8) one of scales. */
template <int vectors>
struct ll_words_of {
    char *at, *scales_at;
    uint32_t have; /* bit j: vector j is part of the row */
    bool has_scales;
    uint4 v[vectors], scales;
};

template <bool fp8, int vectors>
EPX__DEVICE void find_words(const ll_dispatch_t &p, const ll_entry_t &e, ll_pair_t from, uint32_t at,
                            ll_words_of<vectors> *w)
{
    const ll_common_t &l = p.l;
    const uint32_t element = fp8 ? 1 : 2;
    uint32_t lane = threadIdx.x % 32, scale_word = at / LL_SEND_PIECE + lane;
    char *wire = l.c.window + epx__ll_row_at(&l.c.layout.ll, e.slot, from.source, from.token);
    w->at = wire + (size_t)at * element + lane * 16;
    w->scales_at = wire + l.hidden + scale_word * 16;
    w->has_scales = fp8 && lane < 2 && scale_word < ll_scale_words(l.hidden);
    w->have = 0;
#pragma unroll
    for (int j = 0; j < vectors; j++)
        w->have |= (uint32_t)j * 512 + lane * 16 < (l.hidden - at) * element ? 1u << j : 0;
}

/* All of them; or, once more, those that are not there yet. Nothing here waits for what it loads. */
template <bool again, int vectors>
EPX__DEVICE void load_words(ll_words_of<vectors> *w)
{
#pragma unroll
    for (int j = 0; j < vectors; j++) {
        if (!again)
            w->v[j] = make_uint4(0, 0, 0, 0);
        if ((w->have >> j & 1) && (!again || ll_empty(w->v[j])))
            w->v[j] = ld_relaxed_sys_16(w->at + j * 512);
    }
    if (!again)
        w->scales = make_uint4(0, 0, 0, 0);
    if (w->has_scales && (!again || ll_empty(w->scales)))
        w->scales = ld_relaxed_sys_16(w->scales_at);
}
template <int vectors>
EPX__DEVICE bool some_missing(const ll_words_of<vectors> *w)
{
    bool missing = ll_empty(w->scales);
#pragma unroll
    for (int j = 0; j < vectors; j++)
        missing = missing || ll_empty(w->v[j]);
    return missing;
}

/* One warp: until all its words are there, which have been looked at once. False: stop, in all its lanes. */
template <int vectors>
EPX__DEVICE bool await_words(const ll_dispatch_t &p, const ll_entry_t &e, ll_pair_t from, ll_words_of<vectors> *w)
{
    uint32_t start = 0, polls = 1;
    bool go_on = true;
    while (__all_sync(ALL_LANES, go_on)) {
        if (!__any_sync(ALL_LANES, some_missing(w)))
            return true;
        load_words<true>(w);
        if (++polls % 64 != 0 || !some_missing(w))
            continue;
        start = ll_patience(p.l, e.n, (int)from.source, NULL, start, polls);
        go_on = start != 0;
        load_words<false>(w); /* all anew: nothing is kept in registers over a long wait */
    }
    return false;
}

/* A row comes with a flag. Acquire: its words are there, and those of older calls are gone. False: stop. */
EPX__DEVICE bool await_flag(const ll_dispatch_t &p, const ll_entry_t &e, ll_pair_t from)
{
    size_t flag = epx__ll_row_flag_at(&p.l.c.layout.ll, e.slot, from.source, from.token);
    return ll_wait_flag(p.l, e.n, (const uint64_t *)(p.l.c.window + flag), (int)from.source, HT_STAGE_ARRIVAL, NULL,
                        NULL) == LL_CAME;
}

/* One warp: one piece of one row, from element `at` on, to all its places. False: stop, in all its lanes. */
template <bool fp8>
EPX__DEVICE bool take_piece(const ll_dispatch_t &p, const ll_entry_t &e, const ll_ids_t &x, ll_pair_t from, uint32_t at)
{
    const ll_common_t &l = p.l;
    const int vectors = LL_TAKE_PIECE / (fp8 ? 512 : 256);
    const uint32_t element = fp8 ? 1 : 2;
    uint32_t lane = threadIdx.x % 32, u = from.source * l.c.layout.ll.tokens_max + from.token;
    size_t all = (size_t)l.c.ranks * l.c.layout.ll.tokens_max;
    uint32_t local = lane < l.topk ? local_of(l, x.ids[u * l.topk + lane]) : LL_NONE;
    ll_words_of<vectors> w;
    if (!__any_sync(ALL_LANES, local != LL_NONE))
        return true;
    bool go_on = e.from[from.source] != LL_FLAGS || await_flag(p, e, from);
    find_words<fp8>(p, e, from, at, &w);
    load_words<false>(&w); /* on their way while positions are counted */
    ll_spread_t s = rows_of(p, x, u, local);
    if (!__all_sync(ALL_LANES, go_on) || !await_words(p, e, from, &w))
        return false;
    for (uint32_t m = s.first; m; m &= m - 1) {
        int k = __ffs((int)m) - 1;
        size_t part = part_of(l, __shfl_sync(ALL_LANES, s.e, k)), row = __shfl_sync(ALL_LANES, s.row, k);
        char *out = p.recv_x + ((part * all + row) * l.hidden + at) * element + lane * 16;
#pragma unroll
        for (int j = 0; j < vectors; j++)
            if (w.have >> j & 1)
                st_global_16(out + j * 512, w.v[j]);
    }
#pragma unroll
    for (int j = 0; j < vectors; j++) /* also where flags came: nobody relies on it there */
        if (w.have >> j & 1)
            ll_refill(w.at + j * 512);
    if (fp8) {
        if (w.has_scales)
            ll_refill(w.scales_at);
        spread_scales(p, s, w.scales, at);
    }
    bool good = at != 0 || put_side(p, e, s, from.source, from.token);
    return __all_sync(ALL_LANES, good) != 0;
}

/* A warp's part of what this block takes: pieces of rows, one by one. */
typedef struct ll_taking {
    uint32_t unit, units, pieces;
    ll_pair_t from;
    uint32_t at;
} ll_taking_t;

EPX__DEVICE void find_taken(const ll_dispatch_t &p, ll_taking_t *t)
{
    /* The pieces of a row go to one block after the other: a row has one place or eight, and all are equally busy. */
    uint32_t piece = blockIdx.x - p.recv_first + t->unit * p.recv_blocks, row = piece / t->pieces;
    t->from = ll_pair_taken(row, (uint32_t)p.l.c.rank, (uint32_t)p.l.c.ranks, p.l.c.layout.ll.tokens_max);
    t->at = (piece - row * t->pieces) * LL_TAKE_PIECE;
}
/* The warp's first: known before any id is. */
EPX__DEVICE ll_taking_t first_taken(const ll_dispatch_t &p)
{
    uint32_t rows = (uint32_t)p.l.c.ranks * p.l.c.layout.ll.tokens_max;
    ll_taking_t t;
    t.unit = threadIdx.x / 32;
    t.pieces = (p.l.hidden + LL_TAKE_PIECE - 1) / LL_TAKE_PIECE;
    t.units = ll_dealt(rows * t.pieces, blockIdx.x - p.recv_first, p.recv_blocks);
    find_taken(p, &t);
    return t;
}

template <bool fp8>
static __device__ void take_rows(const ll_dispatch_t &p, const ll_entry_t &e, const ll_ids_t &x, ll_taking_t t)
{
    while (t.unit < t.units) {
        if (!take_piece<fp8>(p, e, x, t.from, t.at))
            return;
        t.unit += LL_INBAND_WARPS;
        if (t.unit < t.units)
            find_taken(p, &t);
    }
}

#endif
