/*
 * In-band dispatch, the books, each in a block of its own: counts, ranges and statistics; the outputs that go home in
 * combine; the sums that do; every choice's row and weight.
 *
 * A block runs each of these once a kernel, with instructions that come from memory then. So what is written here is
 * short rather than unrolled, and what does not need ids is worked out before they come.
 */
#ifndef EPX_ALGO_LL_CUDA_LL_INBAND_BOOKS_CUH
#define EPX_ALGO_LL_CUDA_LL_INBAND_BOOKS_CUH

#include "algo/ll/cuda/ll_inband_index.cuh"

/* ---- counts ---- */

/* Rows of that part before pair u, which may be one past the last. */
static __device__ __noinline__ uint32_t rows_before(const ll_dispatch_t &p, const ll_ids_t &x, uint32_t part,
                                                    uint32_t u, uint32_t all)
{
    return u < all ? place_of(p, x, part, u)
                   : place_of(p, x, part, all - 1) + (x.bits[part * p.words + (all - 1) / 32] >> (all - 1) % 32 & 1);
}

/* Rank-major: a token counts once for each of its experts here, however often it names it. */
static __device__ void count_ranked(const ll_dispatch_t &p, const ll_ids_t &x, uint32_t choices)
{
    const ll_common_t &l = p.l;
    for (uint32_t i = threadIdx.x; i < choices; i += LL_INBAND_THREADS) {
        uint32_t e = local_of(l, x.ids[i]);
        bool first = e != LL_NONE;
        for (uint32_t j = i / l.topk * l.topk; first && j < i; j++)
            first = x.ids[j] != x.ids[i];
        if (first)
            atomicAdd(&p.expert_stats[e], 1);
    }
}

static __device__ void book_counts(const ll_dispatch_t &p, const ll_ids_t &x)
{
    const ll_common_t &l = p.l;
    uint32_t ranks = (uint32_t)l.c.ranks, places = l.c.layout.ll.tokens_max, all = ranks * places;
    for (uint32_t i = threadIdx.x; i < p.parts * ranks; i += LL_INBAND_THREADS) {
        uint32_t part = i / ranks, r = i % ranks, begin = rows_before(p, x, part, r * places, all);
        ll_book_part(p, part, r, begin, rows_before(p, x, part, (r + 1) * places, all));
    }
    if (l.ranked && p.expert_stats)
        count_ranked(p, x, all * l.topk);
}

/* The peers' shapes are mine, and their places for outputs are empty (acquire). False: stop. */
EPX__DEVICE bool same_shape(const ll_dispatch_t &p, const ll_entry_t &e, uint32_t r)
{
    const ll_common_t &l = p.l;
    const uint64_t *word = ll_block(l, l.c.window, e.slot, (int)r);
    uint64_t want = ll_stamped(p.stamp_shape, e.n), seen = ld_acquire_sys_u64(word);
    if (!ll_is<true>(seen, e.n)) {
        if (ll_wait_slow<true>(l, e.n, word, e.n, (int)r, HT_STAGE_SHAPE, NULL, NULL) != LL_CAME)
            return false;
        seen = ld_acquire_sys_u64(word);
    }
    if (seen == want)
        return true;
    ht_fault_t f = {EPX_E_MISMATCH, HT_STAGE_SHAPE, (int)r, want, seen, 0};
    ht_fail(l.c, e.n, f);
    return false;
}

/* The whole block. False: stop. */
static __device__ __noinline__ bool keep_counts(const ll_dispatch_t &p, const ll_entry_t &e)
{
    const ll_common_t &l = p.l;
    ll_ids_t x = ids_at(p);
    uint32_t ranks = (uint32_t)l.c.ranks;
    bool good = true;
    book_counts(p, x);
    if (threadIdx.x < ranks) {
        uint64_t *spoilt = &l.spoilt[e.slot * ranks + threadIdx.x];
        if (e.from[threadIdx.x] != LL_NOBODY)
            good = same_shape(p, e, threadIdx.x);
        else if (*(volatile uint64_t *)spoilt == 0) /* nobody takes what it sends in this call */
            *(volatile uint64_t *)spoilt = e.n;
    }
    if (!__syncthreads_and(good))
        return false;
    if (threadIdx.x == 0) /* told by the buffer's next kernel; this one's blocks are over then */
        *(volatile uint64_t *)&l.taken[e.slot] = e.n;
    return true;
}

/* ---- lists ---- */

/* How many of the token's ranks are below this one: 64 ranks at a time. `ids`: the token's. */
EPX__DEVICE int32_t ranks_below(const ll_common_t &l, const uint16_t *ids)
{
    int32_t place = 0;
    for (int32_t base = 0; base < l.c.rank; base += 64) {
        uint64_t below = 0;
#pragma unroll 1
        for (uint32_t k = 0; k < l.topk; k++) {
            int32_t r = ids[k] == LL_NO_ID ? l.c.rank : epx__expert_rank(&l.map, ids[k]);
            below |= r < l.c.rank && r >= base && r < base + 64 ? 1ull << (r - base) : 0;
        }
        place += __popcll(below);
    }
    return place;
}

/* Exclusive sum over the first `warps` warps of the block (n is 0 in the others), *total the whole. */
EPX__DEVICE uint32_t scan_block(uint32_t n, uint32_t warps, uint32_t *totals, uint32_t *total)
{
    uint32_t lane = threadIdx.x % 32, w = threadIdx.x / 32, up = n, before = 0, all = 0;
#pragma unroll 1
    for (uint32_t d = 1; d < 32; d *= 2) {
        uint32_t other = __shfl_up_sync(ALL_LANES, up, d);
        up += lane >= d ? other : 0;
    }
    if (lane == 31)
        totals[w] = up;
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = 0; i < warps; i++) {
        uint32_t s = totals[i];
        before += i < w ? s : 0;
        all += s;
    }
    __syncthreads();
    *total = all;
    return before + up - n;
}

EPX__DEVICE ll_pair_t home_of_pair(const ll_common_t &l, uint32_t q)
{
    uint32_t ranks = (uint32_t)l.c.ranks, places = l.c.layout.ll.tokens_max;
    return ll_pair_home(q < ranks * places ? q : 0, (uint32_t)l.c.rank, ranks, places);
}

/* The whole block: what combine returns, expert outputs or (sums) a sum a token. `home`: of the pair numbered
 * threadIdx.x. */
static __device__ __noinline__ void keep_list(const ll_dispatch_t &p, bool sums, ll_pair_t home)
{
    __shared__ uint32_t totals[LL_INBAND_WARPS];
    const ll_common_t &l = p.l;
    ll_ids_t x = ids_at(p);
    uint32_t places = l.c.layout.ll.tokens_max, all = (uint32_t)l.c.ranks * places, listed = 0, total;
#pragma unroll 1
    for (uint32_t base = 0; base < all; base += LL_INBAND_THREADS) {
        uint32_t q = base + threadIdx.x, bits = 0, warps = (all - base + 31) / 32;
        if (base)
            home = home_of_pair(l, q);
        uint32_t u = home.source * places + home.token;
        const uint16_t *ids = &x.ids[u * l.topk];
#pragma unroll 1
        for (uint32_t k = 0; q < all && k < l.topk; k++)
            bits |= local_of(l, ids[k]) != LL_NONE ? 1u << k : 0;
        uint32_t to_go = sums || home.source == (uint32_t)l.c.rank ? 0 : bits; /* its own are added where they lie */
        uint32_t n = sums ? bits != 0 : (uint32_t)__popc(to_go);
        uint32_t at = listed + scan_block(n, warps < LL_INBAND_WARPS ? warps : LL_INBAND_WARPS, totals, &total);
        if (sums && bits)
            l.r.rank_list[at] = ll_back_t{(int32_t)u, (int32_t)home.source, (int32_t)home.token, ranks_below(l, ids)};
#pragma unroll 1
        for (uint32_t m = to_go; m; m &= m - 1) {
            uint32_t k = (uint32_t)__ffs((int)m) - 1, e = local_of(l, ids[k]);
            l.r.list[at++] = ll_back_t{(int32_t)(l.ranked ? 0 : e * all + place_of(p, x, e, u)), (int32_t)home.source,
                                       (int32_t)home.token, (int32_t)k};
        }
        listed += total;
    }
    if (threadIdx.x == 0)
        l.r.list_count[sums] = listed;
}

/* ---- places ---- */

/* The whole block: every choice's row and weight. False: stop, in some thread. */
static __device__ __noinline__ bool keep_places(const ll_dispatch_t &p, const ll_entry_t &entry)
{
    const ll_common_t &l = p.l;
    ll_ids_t x = ids_at(p);
    uint32_t places = l.c.layout.ll.tokens_max, all = (uint32_t)l.c.ranks * places;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < all * l.topk; i += LL_INBAND_THREADS) {
        uint32_t e = local_of(l, x.ids[i]), u = i / l.topk, source = u / places;
        uint32_t row = e == LL_NONE ? 0 : place_of(p, x, part_of(l, e), u);
        l.r.pos[i] = e == LL_NONE ? -1 : (int32_t)(l.ranked ? row : e * all + row);
        if (!p.topk_weights || e == LL_NONE)
            continue;
        const uint64_t *word = &ll_weights(l, l.c.window, entry.slot, (int)source)[i - source * places * l.topk];
        uint64_t seen = ld_relaxed_sys_u64(word);
        if (!ll_is<true>(seen, entry.n)) {
            if (ll_wait_slow<true>(l, entry.n, word, entry.n, (int)source, HT_STAGE_ARRIVAL, NULL, NULL) != LL_CAME)
                return false;
            seen = ld_relaxed_sys_u64(word);
        }
        l.r.weights[i] = __uint_as_float((uint32_t)seen);
    }
    return true;
}

#endif
