/*
 * In-band dispatch, the sending side: all my tokens' ids to every rank, and each token's row to the ranks that want it.
 * A warp sends one piece of 512 elements of one token; nothing is announced, for each word is its own signal. A rank
 * whose places may be spoilt gets the same words, and a flag after the row.
 */
#ifndef EPX_ALGO_LL_CUDA_LL_INBAND_SEND_CUH
#define EPX_ALGO_LL_CUDA_LL_INBAND_SEND_CUH

#include "algo/ll/cuda/ll_inband.cuh"
#include "algo/ll/cuda/ll_number.cuh"

/* ---- ids ---- */

/* Word w of my ids, without the number. */
EPX__DEVICE ll_word_t pack_word(const ll_common_t &l, uint32_t w, uint32_t *bad)
{
    uint32_t mine = l.tokens * l.topk;
    uint16_t ids[LL_IDS_IN_WORD];
#pragma unroll
    for (uint32_t i = 0; i < LL_IDS_IN_WORD; i++) {
        uint32_t at = w * LL_IDS_IN_WORD + i;
        int64_t given = at < mine ? epx__topk_id(l.topk_idx, l.bits, at) : -1;
        bool good = given >= 0 && given < (int64_t)l.map.experts;
        *bad += !good && given != -1;
        ids[i] = good ? (uint16_t)given : (uint16_t)LL_NO_ID;
    }
    return ll_pack_ids(ids, 0);
}

/* The whole block. `word` of `bad` bad ids: this thread's first, packed while the block was entered. */
static __device__ void send_ids(const ll_dispatch_t &p, const ll_entry_t &e, ll_word_t word, uint32_t bad)
{
    const ll_common_t &l = p.l;
    uint32_t pairs = l.c.layout.ll.tokens_max * l.topk, words = ll_id_words(pairs), ranks = (uint32_t)l.c.ranks;
    uint32_t all_bad = 0, mine = l.tokens * l.topk;
    for (uint32_t i = threadIdx.x; i < words * ranks; i += LL_INBAND_THREADS) {
        uint32_t k = i / words, w = i - k * words, r = ((uint32_t)l.c.rank + 1 + k) % ranks;
        if (i != threadIdx.x) {
            bad = 0;
            word = pack_word(l, w, &bad);
        }
        all_bad += k == 0 ? bad : 0; /* every word once */
        if (e.to[r] != LL_NOBODY)
            st_relaxed_sys_pair(ll_ids(l, e.peer[r], e.slot, l.c.rank) + 2 * w, word.first, word.second | e.n << 32);
    }
    for (uint32_t i = threadIdx.x; p.topk_weights && i < mine * ranks; i += LL_INBAND_THREADS) {
        uint32_t k = i / mine, at = i - k * mine, r = ((uint32_t)l.c.rank + 1 + k) % ranks;
        if (e.to[r] != LL_NOBODY)
            st_relaxed_sys_u64(&ll_weights(l, e.peer[r], e.slot, l.c.rank)[at],
                               ll_stamped(__float_as_uint(p.topk_weights[at]), e.n));
    }
    if (all_bad)
        atomicAdd(&l.c.state->bad_ids, all_bad);
    if (__syncthreads_or(all_bad) && threadIdx.x == 0) /* seldom: the host's word is across PCIe */
        l.c.host->bad_ids = *(volatile uint32_t *)&l.c.state->bad_ids;
}

/* ---- rows ---- */

/* A warp's piece of a token, loaded. Lane k < topk has choice k. */
typedef struct ll_piece {
    uint4 a, b;
    int64_t id;
    uint32_t token, at;
} ll_piece_t;

template <bool fp8>
EPX__DEVICE ll_piece_t load_piece(const ll_dispatch_t &p, uint32_t unit, uint32_t pieces)
{
    const ll_common_t &l = p.l;
    uint32_t lane = threadIdx.x % 32, index = unit / pieces;
    ll_piece_t u;
    u.token = blockIdx.x - p.send_first + index * p.send_blocks;
    u.at = (unit - index * pieces) * LL_SEND_PIECE;
    const char *x = p.x + (size_t)u.token * l.hidden * 2;
    uint32_t e = u.at + lane * (fp8 ? 16 : 8), f = e + (fp8 ? 8 : 256);
    u.a = e < l.hidden ? ld_global_16(x + (size_t)e * 2) : make_uint4(0, 0, 0, 0);
    u.b = f < l.hidden ? ld_global_16(x + (size_t)f * 2) : make_uint4(0, 0, 0, 0);
    u.id = lane < l.topk ? epx__topk_id(l.topk_idx, l.bits, (size_t)u.token * l.topk + lane) : -1;
    return u;
}

/* Lane k: the rank of choice k, or -1; *first: the first lane of each rank. */
EPX__DEVICE int ranks_of(const ll_common_t &l, const ll_piece_t &u, uint32_t *first)
{
    int rank = u.id < 0 || u.id >= (int64_t)l.map.experts ? -1 : epx__expert_rank(&l.map, u.id);
    uint32_t same = __match_any_sync(ALL_LANES, rank);
    *first = __ballot_sync(ALL_LANES, rank >= 0 && (uint32_t)__ffs((int)same) - 1 == threadIdx.x % 32);
    return rank;
}

template <bool fp8>
EPX__DEVICE void send_piece(const ll_dispatch_t &p, const ll_entry_t &entry, const ll_piece_t &u)
{
    const ll_common_t &l = p.l;
    uint32_t lane = threadIdx.x % 32, e = u.at + lane * (fp8 ? 16 : 8), f = e + 256;
    uint4 a = u.a, scales = make_uint4(0, 0, 0, 0);
    uint32_t first;
    int rank = ranks_of(l, u, &first);
    if (fp8) {
        float scale;
        a = quantise16(u.a, u.b, p.round_scale || p.ue8m0, &scale);
        scales.x = __float_as_uint(scale); /* lane 0 gathers the piece's four */
        scales.y = __float_as_uint(__shfl_down_sync(ALL_LANES, scale, 8));
        scales.z = __float_as_uint(__shfl_down_sync(ALL_LANES, scale, 16));
        scales.w = __float_as_uint(__shfl_down_sync(ALL_LANES, scale, 24));
    }
    a = ll_full(a);
    uint4 b = ll_full(u.b);
    size_t row_at = epx__ll_row_at(&l.c.layout.ll, entry.slot, (uint32_t)l.c.rank, u.token);
    for (uint32_t m = first; m; m &= m - 1) {
        int r = __shfl_sync(ALL_LANES, rank, __ffs((int)m) - 1);
        if (entry.to[r] == LL_NOBODY)
            continue;
        char *row = entry.peer[r] + row_at;
        if (e < l.hidden)
            st_relaxed_sys_16(row + (size_t)e * (fp8 ? 1 : 2), a);
        if (!fp8 && f < l.hidden)
            st_relaxed_sys_16(row + (size_t)f * 2, b);
        if (fp8 && lane == 0)
            st_relaxed_sys_16(row + l.hidden + u.at / LL_SEND_PIECE * 16, scales);
    }
}

/* The whole block: row by row, each with a flag where it is asked for. Seldom: kept out of the way of what is often. */
template <bool fp8>
static __device__ __noinline__ void send_rows_with_flags(const ll_dispatch_t &p, const ll_entry_t &e)
{
    const ll_common_t &l = p.l;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t pieces = (l.hidden + LL_SEND_PIECE - 1) / LL_SEND_PIECE;
    uint32_t rows = ll_dealt(l.tokens, blockIdx.x - p.send_first, p.send_blocks);
    for (uint32_t i = 0; i < rows; i++) {
        for (uint32_t piece = warp; piece < pieces; piece += LL_INBAND_WARPS)
            send_piece<fp8>(p, e, load_piece<fp8>(p, i * pieces + piece, pieces));
        __syncthreads(); /* the release below covers what the barrier has shown to its thread */
        if (warp != 0)
            continue;
        ll_piece_t u = load_piece<fp8>(p, i * pieces, pieces);
        uint32_t first;
        int rank = ranks_of(l, u, &first);
        size_t flag = epx__ll_row_flag_at(&l.c.layout.ll, e.slot, (uint32_t)l.c.rank, u.token);
        if ((first >> lane & 1) && e.to[rank] == LL_FLAGS)
            st_release_sys_u64((uint64_t *)(e.peer[rank] + flag), e.n);
        __syncwarp();
    }
}

/* The whole block. `u`: this warp's first piece, loaded while the block was entered. */
template <bool fp8>
static __device__ void send_rows(const ll_dispatch_t &p, const ll_entry_t &e, ll_piece_t u, uint32_t units)
{
    uint32_t lane = threadIdx.x % 32, pieces = (p.l.hidden + LL_SEND_PIECE - 1) / LL_SEND_PIECE;
    bool flags = false;
    for (int r = (int)lane; r < p.l.c.ranks; r += 32)
        flags = flags || e.to[r] == LL_FLAGS;
    if (__any_sync(ALL_LANES, flags)) { /* the same answer in all warps of the block */
        send_rows_with_flags<fp8>(p, e);
        return;
    }
    for (uint32_t unit = threadIdx.x / 32; unit < units; u = load_piece<fp8>(p, unit, pieces)) {
        send_piece<fp8>(p, e, u);
        unit += LL_INBAND_WARPS;
        if (unit >= units)
            break;
    }
}

#endif
