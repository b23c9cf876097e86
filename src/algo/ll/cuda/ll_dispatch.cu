/*
 * Low-latency dispatch. Roles, each done by some blocks of the grid:
 *
 *   ids      all my tokens' ids (and weights) to every rank, each value with the call's number beside it
 *   send     a token at a time by 16 warps: quantised, one copy to each rank that wants it, then its flag there
 *   spread   every rank's ids become bitmaps per local expert, from which every position follows; then each row, as its
 *            flag comes, by pieces of 1024 elements to its experts' rows
 *   book     counts, ranges and statistics; what combine needs of this call
 *
 * ids and send (ll_send.cuh) wait for credit only, spread and book for the ids and rows of peers.
 */
#include <cuda_runtime.h>
#include <string.h>

#include "algo/ll/cuda/ll_index.cuh"
#include "algo/ll/cuda/ll_send.cuh"

/* ---- book ---- */

EPX__DEVICE uint32_t rows_before(const ll_dispatch_t &p, const ll_index_t &x, uint32_t part, uint32_t u, uint32_t all)
{
    return u < all ? place_of(p, x, part, u)
                   : place_of(p, x, part, all - 1) +
                         (x.bits[(size_t)part * p.words + (all - 1) / 32] >> (all - 1) % 32 & 1);
}

static __device__ void book_counts(const ll_dispatch_t &p, const ll_index_t &x)
{
    const ll_common_t &l = p.l;
    uint32_t ranks = (uint32_t)l.c.ranks, places = l.c.layout.ll.tokens_max, all = ranks * places;
    for (uint32_t i = threadIdx.x; i < p.parts * ranks; i += LL_THREADS) {
        uint32_t part = i / ranks, r = i % ranks, begin = rows_before(p, x, part, r * places, all);
        ll_book_part(p, part, r, begin, rows_before(p, x, part, (r + 1) * places, all));
    }
    for (uint32_t i = threadIdx.x; l.ranked && p.expert_stats && i < all * l.topk; i += LL_THREADS) {
        uint32_t e = x.ids[i];
        bool first = e != LL_NONE;
        for (uint32_t j = i / l.topk * l.topk; first && j < i; j++)
            first = x.ids[j] != e;
        if (first)
            atomicAdd(&p.expert_stats[e], 1);
    }
}

/* How many of the token's ranks are below this one: 64 ranks at a time. */
EPX__DEVICE int32_t place_among_ranks(const ll_common_t &l, const ll_head_t &h, uint32_t source, uint32_t token)
{
    const uint64_t *ids = ll_ids(l, l.c.window, h.slot, (int)source) + (size_t)token * l.topk;
    int32_t place = 0;
    for (int32_t base = 0; base < l.c.rank; base += 64) {
        uint64_t below = 0;
#pragma unroll 8
        for (uint32_t k = 0; k < l.topk; k++) {
            int32_t id = (int32_t)(uint32_t)ld_relaxed_sys_u64(&ids[k]);
            int32_t r = id < 0 ? l.c.rank : epx__expert_rank(&l.map, id);
            below |= r < l.c.rank && r >= base && r < base + 64 ? 1ull << (r - base) : 0;
        }
        place += __popcll(below);
    }
    return place;
}

/* What combine returns, in token order, so that every owner's first tokens are complete first. */
static __device__ void book_lists(const ll_dispatch_t &p, const ll_head_t &h, const ll_index_t &x)
{
    __shared__ uint32_t sums[LL_THREADS / 32];
    const ll_common_t &l = p.l;
    uint32_t ranks = (uint32_t)l.c.ranks, places = l.c.layout.ll.tokens_max, all = ranks * places;
    uint32_t outputs = 0, pairs = 0;
    for (uint32_t first = 0; first < all; first += LL_THREADS) {
        uint32_t q = first + threadIdx.x, t, source, n = 0, total;
        if (q < (ranks - 1) * places) { /* others' tokens first */
            t = q / (ranks - 1);
            source = ((uint32_t)l.c.rank + 1 + (q + t) % (ranks - 1)) % ranks;
        } else {
            t = q - (ranks - 1) * places;
            source = (uint32_t)l.c.rank;
        }
        uint32_t u = source * places + t;
        for (uint32_t k = 0; q < all && k < l.topk; k++)
            n += x.ids[u * l.topk + k] != LL_NONE;
        uint32_t at = outputs + scan_block<LL_THREADS / 32>(source == (uint32_t)l.c.rank ? 0 : n, sums, &total);
        outputs += total;
        for (uint32_t k = 0; n && source != (uint32_t)l.c.rank && k < l.topk; k++) {
            uint32_t e = x.ids[u * l.topk + k];
            if (e != LL_NONE)
                l.r.list[at++] = ll_back_t{(int32_t)(l.ranked ? 0 : e * all + place_of(p, x, e, u)), (int32_t)source,
                                           (int32_t)t, (int32_t)k};
        }
        at = pairs + scan_block<LL_THREADS / 32>(n != 0, sums, &total);
        pairs += total;
        if (n)
            l.r.rank_list[at] = ll_back_t{(int32_t)u, (int32_t)source, (int32_t)t, place_among_ranks(l, h, source, t)};
    }
    if (threadIdx.x == 0) {
        l.r.list_count[0] = outputs;
        l.r.list_count[1] = pairs;
    }
}

static __device__ bool book(const ll_dispatch_t &p, ll_head_t &h, const ll_index_t &x)
{
    const ll_common_t &l = p.l;
    uint32_t places = l.c.layout.ll.tokens_max, all = (uint32_t)l.c.ranks * places;
    bool stop = false;
    book_counts(p, x);
    book_lists(p, h, x);
    for (uint32_t i = threadIdx.x; i < all * l.topk; i += LL_THREADS) {
        uint32_t e = x.ids[i], u = i / l.topk, source = u / places, k = i - source * places * l.topk;
        l.r.pos[i] = e == LL_NONE ? -1 : (int32_t)(l.ranked ? place_of(p, x, 0, u) : e * all + place_of(p, x, e, u));
        if (!p.topk_weights || e == LL_NONE)
            continue;
        const uint64_t *word = &ll_weights(l, l.c.window, h.slot, (int)source)[k];
        uint64_t seen = ld_relaxed_sys_u64(word);
        if (!ll_is<true>(seen, h.n)) {
            stop = stop || ll_wait_slow<true>(l, h.n, word, h.n, (int)source, HT_STAGE_ARRIVAL, NULL, NULL) == LL_STOP;
            seen = ld_relaxed_sys_u64(word);
        }
        l.r.weights[i] = __uint_as_float((uint32_t)seen);
    }
    for (int r = (int)threadIdx.x; r < l.c.ranks; r += LL_THREADS) {
        if (l.masked[r])
            continue;
        const uint64_t *word = ll_block(l, l.c.window, h.slot, r);
        uint64_t want = ll_stamped(p.stamp_shape, h.n), seen = ld_relaxed_sys_u64(word);
        if (!ll_is<true>(seen, h.n)) {
            stop = stop || ll_wait_slow<true>(l, h.n, word, h.n, r, HT_STAGE_SHAPE, NULL, NULL) == LL_STOP;
            seen = ld_relaxed_sys_u64(word);
        }
        if (ll_is<true>(seen, h.n) && seen != want) {
            ht_fault_t f = {EPX_E_MISMATCH, HT_STAGE_SHAPE, r, want, seen, 0};
            ht_fail(l.c, h.n, f);
        }
    }
    if (__syncthreads_or(stop))
        return false;
    if (threadIdx.x == 0) /* for the buffer's next kernel */
        l.taken[h.slot] = h.n;
    return true;
}

/* ---- spread ---- */

/* Of a row that did not come they are 0: what lies there may be of an older call, and of another format. */
EPX__DEVICE void put_scales(const ll_dispatch_t &p, const char *wire, bool came, uint32_t at, size_t part, size_t row)
{
    const ll_common_t &l = p.l;
    uint32_t lane = threadIdx.x % 32, all = (uint32_t)l.c.ranks * l.c.layout.ll.tokens_max;
    const uint32_t *scales = (const uint32_t *)(wire + l.hidden);
    if (!p.ue8m0) {
        uint32_t b = at / 128 + lane, blocks = l.hidden / 128;
        if (lane < LL_PIECE / 128 && b < blocks)
            p.recv_scales[(part * blocks + b) * all + row] = came ? ld_relaxed_sys_u32(&scales[b]) : 0;
        return;
    }
    uint32_t b = at / 512 + lane, blocks = l.hidden / 512;
    if (lane < LL_PIECE / 512 && b < blocks) {
        uint8_t four[4];
        for (int i = 0; i < 4; i++)
            four[i] = came ? epx__ue8m0_of_f32_up(__uint_as_float(ld_relaxed_sys_u32(&scales[b * 4 + i]))) : 0;
        p.recv_scales[(part * blocks + b) * all + row] = (uint32_t)epx__ue8m0_pack(four);
    }
}

/* One lane a choice: what goes with a row of rank-major order. */
EPX__DEVICE void put_choices(const ll_dispatch_t &p, const ll_head_t &h, uint32_t source, uint32_t t, uint32_t e,
                             size_t row)
{
    const ll_common_t &l = p.l;
    uint32_t lane = threadIdx.x % 32;
    if (lane >= l.topk)
        return;
    if (p.recv_topk_idx)
        p.recv_topk_idx[row * l.topk + lane] = e == LL_NONE ? -1 : (int32_t)e;
    if (!p.recv_topk_weights)
        return;
    uint64_t seen = 0;
    if (e != LL_NONE) {
        const uint64_t *word = &ll_weights(l, l.c.window, h.slot, (int)source)[t * l.topk + lane];
        seen = ld_relaxed_sys_u64(word);
        if (!ll_is<true>(seen, h.n)) {
            int came = ll_wait_slow<true>(l, h.n, word, h.n, (int)source, HT_STAGE_ARRIVAL, NULL, NULL);
            seen = came == LL_CAME ? ld_relaxed_sys_u64(word) : 0;
        }
    }
    p.recv_topk_weights[row * l.topk + lane] = __uint_as_float((uint32_t)seen);
}

/* One lane: has the row come? With mask_on_timeout it may come at the very deadline: one answer for all its pieces. */
static __device__ __noinline__ int agree_on_row(const ll_common_t &l, const ll_head_t &h, uint32_t source, uint32_t t,
                                                int came)
{
    if (came == LL_STOP)
        return LL_STOP;
    if (ll_decide(&l.r.rows_in[source * l.c.layout.ll.tokens_max + t], h.n, came == LL_CAME) == 0)
        return LL_ABSENT;
    const uint64_t *flag = (const uint64_t *)(l.c.window + epx__ll_row_flag_at(&l.c.layout.ll, h.slot, source, t));
    return ll_follow(l, h.n, flag, (int)source);
}

/* One warp: one piece of one row, to all its places. */
template <bool fp8>
EPX__DEVICE bool spread_piece(const ll_dispatch_t &p, const ll_head_t &h, const ll_index_t &x, uint32_t source,
                              uint32_t t, uint32_t piece)
{
    const ll_common_t &l = p.l;
    const uint32_t vectors = LL_PIECE / (fp8 ? 512 : 256), element = fp8 ? 1 : 2;
    uint32_t lane = threadIdx.x % 32, places = l.c.layout.ll.tokens_max, all = (uint32_t)l.c.ranks * places;
    uint32_t u = source * places + t, at = piece * LL_PIECE, bytes = l.hidden * element;
    uint32_t e = lane < l.topk ? x.ids[u * l.topk + lane] : LL_NONE;
    uint32_t same = __match_any_sync(ALL_LANES, e);
    uint32_t choices = __ballot_sync(ALL_LANES, e != LL_NONE && (uint32_t)__ffs((int)same) - 1 == lane);
    if (choices == 0)
        return true;
    uint32_t row = e == LL_NONE ? 0 : place_of(p, x, l.ranked ? 0 : e, u);
    const uint64_t *flag = (const uint64_t *)(l.c.window + epx__ll_row_flag_at(&l.c.layout.ll, h.slot, source, t));
    int came = lane ? LL_CAME : ll_wait_flag(l, h.n, flag, (int)source, HT_STAGE_ARRIVAL, NULL, NULL);
    if (l.mask_on_timeout && lane == 0)
        came = agree_on_row(l, h, source, t, came);
    came = __shfl_sync(ALL_LANES, came, 0);
    if (came == LL_STOP)
        return false;
    const char *wire = l.c.window + epx__ll_row_at(&l.c.layout.ll, h.slot, source, t);
    uint4 v[vectors];
#pragma unroll
    for (uint32_t j = 0; j < vectors; j++) {
        uint32_t b = at * element + j * 512 + lane * 16;
        v[j] = b < bytes && came == LL_CAME ? ld_global_16(wire + b) : make_uint4(0, 0, 0, 0);
    }
    if (l.ranked)
        choices &= 0u - choices; /* once */
    for (uint32_t m = choices; m; m &= m - 1) {
        int k = __ffs((int)m) - 1;
        size_t to = __shfl_sync(ALL_LANES, row, k), part = l.ranked ? 0 : __shfl_sync(ALL_LANES, e, k);
        char *out = p.recv_x + (part * all + to) * bytes + (size_t)at * element;
#pragma unroll
        for (uint32_t j = 0; j < vectors; j++) {
            uint32_t b = j * 512 + lane * 16;
            if (at * element + b < bytes)
                st_global_16(out + b, v[j]);
        }
        if (fp8)
            put_scales(p, wire, came == LL_CAME, at, part, to);
        if (piece == 0 && lane == 0)
            p.src_info[part * all + to] = (int32_t)t;
        if (piece == 0 && l.ranked)
            put_choices(p, h, source, t, e, to);
    }
    return true;
}

template <bool fp8>
static __device__ void spread(const ll_dispatch_t &p, const ll_head_t &h, const ll_index_t &x)
{
    const ll_common_t &l = p.l;
    uint32_t pieces = (l.hidden + LL_PIECE - 1) / LL_PIECE, places = l.c.layout.ll.tokens_max;
    uint32_t all = (uint32_t)l.c.ranks * places, first = blockIdx.x - p.recv_first;
    uint32_t rows = first < all ? (all - first + p.recv_blocks - 1) / p.recv_blocks : 0;
    for (uint32_t unit = threadIdx.x / 32; unit < rows * pieces; unit += LL_THREADS / 32) {
        uint32_t q = first + unit / pieces * p.recv_blocks; /* own tokens first, then the next rank's */
        uint32_t source = ((uint32_t)l.c.rank + q / places) % (uint32_t)l.c.ranks;
        if (!spread_piece<fp8>(p, h, x, source, q % places, unit % pieces))
            return;
    }
}

/* ---- the kernel ---- */

/* A dispatch takes its number when it sends; its other kernel finds it in the record. */
EPX__DEVICE void enter(const ll_dispatch_t &p, ll_head_t &h)
{
    const ll_common_t &l = p.l;
    if (threadIdx.x == 0) {
        h.n = p.send ? ld_relaxed_sys_u64(&l.state->number) + 1 : *(volatile uint64_t *)l.r.number;
        h.stop = ht_stopped(l.c, h.n, false);
        h.start = l.wait_ns ? globaltimer_ns() : 0;
        h.slot = h.n % l.slots;
    }
    __syncthreads();
    if (p.send && threadIdx.x == 0 && atomicAdd(&l.state->arrived, 1) == gridDim.x - 1) { /* all have read it */
        *(volatile uint32_t *)&l.state->arrived = 0;
        *(volatile uint64_t *)l.r.number = h.n;
        st_relaxed_sys_u64(&l.state->number, h.n);
    }
}

template <bool fp8, bool large>
__global__ void __launch_bounds__(LL_THREADS, 1) ll_dispatch_kernel(const __grid_constant__ ll_dispatch_t p)
{
    extern __shared__ __align__(16) char memory[];
    __shared__ ll_head_t h;
    if (p.l.c.ranks == 0) /* a first launch, so that the driver has made room for it */
        return;
    enter(p, h);
    if (h.stop)
        return;
    uint32_t b = blockIdx.x;
    bool ids = b == p.ids_block, rows = p.send && b - p.send_first < p.send_blocks;
    if (ids || rows)
        send<fp8>(p, h, ids, rows);
    bool books = b == p.book_block, spreads = p.recv && b - p.recv_first < p.recv_blocks;
    if (h.stop || !(books || spreads))
        return;
    if (books && !p.send && threadIdx.x < 32)
        ll_tell_finished(p.l);
    ll_index_t x = index_at(p, large ? p.index : memory);
    if (!p.indexed && !make_index(p, h, x, books ? p.l.wait_ns : NULL))
        return;
    if (books && !book(p, h, x))
        return;
    if (spreads)
        spread<fp8>(p, h, x);
}

typedef void (*ll_kernel_t)(ll_dispatch_t);

static ll_kernel_t kernel_of(bool fp8, bool large)
{
    if (fp8)
        return large ? ll_dispatch_kernel<true, true> : ll_dispatch_kernel<true, false>;
    return large ? ll_dispatch_kernel<false, true> : ll_dispatch_kernel<false, false>;
}

extern "C" int epx__ll_launch_dispatch(const ll_dispatch_t *p, uint32_t blocks, uint32_t shared_bytes, void *stream)
{
    kernel_of(p->fp8, p->index != NULL)<<<blocks, LL_THREADS, shared_bytes, (cudaStream_t)stream>>>(*p);
    return (int)cudaGetLastError();
}

/* Load every kernel, and launch it once: its local memory is there before another kernel waits for a peer. */
extern "C" int epx__ll_load_dispatch(void *stream)
{
    ll_dispatch_t nothing;
    memset(&nothing, 0, sizeof nothing);
    for (int i = 0; i < 4; i++) {
        cudaError_t error = cudaFuncSetAttribute((const void *)kernel_of(i & 1, i & 2),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, LL_SHARED_MOST);
        if (error != cudaSuccess)
            return (int)error;
        kernel_of(i & 1, i & 2)<<<1, LL_THREADS, 0, (cudaStream_t)stream>>>(nothing);
    }
    return (int)cudaGetLastError();
}
