/*
 * Low-latency combine. In every block some warps push rows home and the others add what comes:
 *
 *   copiers   a row at a time: an expert's output, or (by_rank) this rank's weighted sum of a token's, into the owner's
 *             place for it; each tells in shared memory how many rows it has done
 *   tellers   when all copiers have done a row, its flag at the owner. The release waits for the SM's stores under way;
 *             the copiers go on meanwhile, and several tellers wait at the same time
 *   adders    a piece of a token's row each: wait for the flags of the token's rows, add in order, round once
 *
 * An owner's place is free when I write: it has dispatched this call to me after it combined the slot's last one, or,
 * when it released that, after all had said that they are done with it.
 */
#include <cuda_runtime.h>
#include <string.h>

#include "algo/ll/cuda/ll_row.cuh"

#define COPIERS_MOST 28u
#define TELLERS 4u

typedef struct ll_head {
    uint64_t n, slot;
    uint32_t stop;
    uint32_t done[COPIERS_MOST]; /* rows that each copier has put */
    uint32_t copiers, claimed;   /* claimed: pieces that some adder of this block has taken */
} ll_head_t;

/* ---- push ---- */

EPX__DEVICE char *home_row(const ll_common_t &l, const ll_head_t &h, const ll_back_t &b)
{
    return l.c.peers[b.source] + epx__ll_back_at(&l.c.layout.ll, h.slot, (uint32_t)b.token, (uint32_t)b.place);
}

/* The i-th row to push: expert outputs for other ranks, then, with halves, this rank's own; or all ranks' sums. */
EPX__DEVICE ll_back_t row_to_push(const ll_combine_t &p, uint32_t i)
{
    const ll_common_t &l = p.l;
    if (p.by_rank)
        return l.r.rank_list[i];
    uint32_t others = l.r.list_count[0];
    if (i < others)
        return l.r.list[i];
    uint32_t pair = i - others; /* of my own tokens */
    return ll_back_t{l.r.pos[(size_t)l.c.rank * l.c.layout.ll.tokens_max * l.topk + pair], l.c.rank,
                     (int32_t)(pair / l.topk), (int32_t)(pair % l.topk)};
}
EPX__DEVICE uint32_t rows_to_push(const ll_combine_t &p)
{
    const ll_common_t &l = p.l;
    if (p.by_rank)
        return l.r.list_count[1];
    return l.r.list_count[0] + (p.recv ? 0 : l.tokens * l.topk);
}
/* Do outputs go to rank r in this call? With mask_on_timeout who adds may mask it meanwhile: the first look holds for
 * all blocks, or a row could come after the word that none will. */
EPX__DEVICE bool sends_to(const ll_combine_t &p, const ll_head_t &h, int r)
{
    uint32_t *masked = &p.l.masked[r];
    return p.l.mask_on_timeout ? ll_decide(&p.l.r.home_to[r], h.n, *(volatile uint32_t *)masked == 0) != 0 : !*masked;
}
EPX__DEVICE bool goes_home(const ll_combine_t &p, const ll_head_t &h, const ll_back_t &b)
{
    return b.row >= 0 && ll_near(p.l, b.source) && sends_to(p, h, b.source);
}

static __device__ void copier(const ll_combine_t &p, ll_head_t &h)
{
    const ll_common_t &l = p.l;
    uint32_t count = rows_to_push(p), done = 0, i = blockIdx.x;
    ll_back_t b = i < count ? row_to_push(p, i) : ll_back_t{-1, 0, 0, 0};
    while (i < count) {
        uint32_t next = i + gridDim.x;
        ll_back_t later = next < count ? row_to_push(p, next) : b;
        if (goes_home(p, h, b)) {
            char *to = home_row(l, h, b);
            if (p.pre_reduced)
                push_sum(p, threadIdx.x / 32, h.copiers, b.row, to);
            else
                push_plain(p, threadIdx.x / 32, h.copiers, p.by_rank ? ranked_row(p, b.row) : b.row, to);
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) { /* atomics, as racecheck knows no other release and acquire in shared memory */
            __threadfence_block();
            atomicExch(&h.done[threadIdx.x / 32], ++done);
        }
        b = later;
        i = next;
    }
}

static __device__ void teller(const ll_combine_t &p, ll_head_t &h, uint32_t which)
{
    const ll_common_t &l = p.l;
    uint32_t lane = threadIdx.x % 32, count = rows_to_push(p), row = which + 1;
    for (uint32_t i = blockIdx.x + which * gridDim.x; i < count; i += TELLERS * gridDim.x, row += TELLERS) {
        ll_back_t b = row_to_push(p, i);
        while (!__all_sync(ALL_LANES, lane >= h.copiers || atomicOr(&h.done[lane], 0u) >= row))
            ; /* the copiers of this block wait for nobody */
        __threadfence_block();
        if (lane == 0 && goes_home(p, h, b))
            st_release_sys_u64(
                (uint64_t *)(l.c.peers[b.source] +
                             epx__ll_back_flag_at(&l.c.layout.ll, h.slot, (uint32_t)b.token, (uint32_t)b.place)),
                h.n);
        __syncwarp();
    }
}

/* ---- add ---- */

EPX__DEVICE const uint64_t *flag_of(const ll_common_t &l, const ll_head_t &h, uint32_t t, uint32_t place)
{
    return (const uint64_t *)(l.c.window + epx__ll_back_flag_at(&l.c.layout.ll, h.slot, t, place & 0xff));
}

/* Whose rows of this call will be here: asked, and neither masked nor given up since. */
EPX__DEVICE int share_of(const ll_combine_t &p, const ll_head_t &h, int rank, const uint64_t *flag)
{
    const ll_common_t &l = p.l;
    uint32_t *gone = &l.r.gone[rank];
    if (!l.r.asked[rank])
        return LL_ABSENT;
    bool masked = l.masked[rank] && !l.mask_on_timeout; /* by the caller: left out, also what has come already */
    if (!masked && (flag == NULL || ld_acquire_sys_u64(flag) >= h.n))
        return LL_CAME;
    const uint64_t *left_out = &ll_words(l, l.c.window, h.slot, rank)->left_out;
    int came = masked ? LL_ABSENT : ll_wait_slow<false>(l, h.n, flag, h.n, rank, HT_STAGE_ARRIVAL, left_out, gone);
    if (came == LL_ABSENT && ld_acquire_sys_u64(left_out) < h.n) {
        ll_give_up(l, h.n, rank);
        *(volatile uint32_t *)gone = ll_decision(h.n, 2);
    }
    return came;
}

/*
 * With mask_on_timeout one piece of a token may see the flag of a row that comes at the very deadline, and another not;
 * so may two lanes with the same row. The first piece that has looked at all its rows decides for the token: lane k
 * gives what it saw of choice k, and gets what holds.
 */
static __device__ __noinline__ int agree_on_shares(const ll_combine_t &p, const ll_head_t &h, uint32_t t, int rank,
                                                   uint32_t place, int came)
{
    uint32_t lane = threadIdx.x % 32, shares = __ballot_sync(ALL_LANES, came == LL_CAME);
    if (p.by_rank) { /* one row for all choices of a rank: seen by one of them, it is in for all */
        uint32_t same = __match_any_sync(ALL_LANES, rank);
        shares = __ballot_sync(ALL_LANES, (shares & same) != 0);
    }
    uint32_t decided = lane ? 0 : ll_decide(&p.l.r.shares_in[t], h.n, shares);
    decided = __shfl_sync(ALL_LANES, decided, 0);
    if (!(decided >> lane & 1))
        return LL_ABSENT;
    return came == LL_CAME ? LL_CAME : ll_follow(p.l, h.n, flag_of(p.l, h, t, place), rank);
}

/* One warp: one piece of one token. Lane k has choice k: its rank, and by rank its place among the token's ranks. */
static __device__ bool add_piece(const ll_combine_t &p, const ll_head_t &h, uint32_t t, uint32_t piece)
{
    const ll_common_t &l = p.l;
    uint32_t lane = threadIdx.x % 32, bytes = l.hidden * 2;
    size_t pair = (size_t)t * l.topk + lane;
    int64_t id = lane < l.topk ? ll_id(l, pair) : -1;
    int rank = id < 0 ? -1 : epx__expert_rank(&l.map, id);
    uint32_t place = lane;
    if (p.by_rank) {
        uint32_t same = __match_any_sync(ALL_LANES, rank);
        uint32_t leaders = __ballot_sync(ALL_LANES, rank >= 0 && (uint32_t)__ffs((int)same) - 1 == lane);
        place = 0;
        for (uint32_t m = leaders; m; m &= m - 1)
            place += __shfl_sync(ALL_LANES, rank, __ffs((int)m) - 1) < rank;
        if (!(leaders >> lane & 1) && rank >= 0)
            place |= 0x100; /* counted by another lane */
    }
    int64_t local = -1; /* row of my own expert, added where it lies */
    if (!p.by_rank && p.send && rank == l.c.rank)
        local = l.r.pos[((size_t)l.c.rank * l.c.layout.ll.tokens_max + t) * l.topk + lane];
    int came = LL_ABSENT;
    if (rank >= 0)
        came = share_of(p, h, rank, local >= 0 ? NULL : flag_of(l, h, t, place));
    if (__any_sync(ALL_LANES, came == LL_STOP))
        return false;
    if (l.mask_on_timeout) {
        came = agree_on_shares(p, h, t, rank, place, came);
        if (__any_sync(ALL_LANES, came == LL_STOP))
            return false;
    }
    const char *row = local >= 0 ? p.x + (size_t)local * bytes
                                 : l.c.window + epx__ll_back_at(&l.c.layout.ll, h.slot, t, place & 0xff);
    float weight = 1.0f;
    if (came == LL_CAME && p.topk_weights)
        weight = p.topk_weights[pair];
    uint32_t shares = __ballot_sync(ALL_LANES, came == LL_CAME), order = shares;
    uint32_t mine = came == LL_CAME && !(place & 0x100) ? 1u << (place & 31) : 0;
    if (p.by_rank)
        order = __reduce_or_sync(ALL_LANES, mine); /* places that came */
    for (uint32_t base = piece * LL_SUM_PIECE * 2; base < bytes && base < (piece + 1) * LL_SUM_PIECE * 2; base += 512) {
        uint32_t at = base + lane * 16;
        float acc[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (uint32_t m = order; m;) {
            uint4 v[BATCH];
            float w[BATCH];
            uint32_t have = 0;
#pragma unroll
            for (uint32_t i = 0; i < BATCH; i++) {
                int k = m ? __ffs((int)m) - 1 : 0;
                if (p.by_rank)
                    k = __ffs((int)__ballot_sync(ALL_LANES, mine == 1u << k)) - 1;
                k = k < 0 ? 0 : k;
                const char *from = (const char *)__shfl_sync(ALL_LANES, (unsigned long long)row, k);
                w[i] = __shfl_sync(ALL_LANES, weight, k);
                if (m) {
                    v[i] = at < bytes ? ld_global_16(from + at) : make_uint4(0, 0, 0, 0);
                    have = i + 1;
                }
                m &= m - 1;
            }
#pragma unroll
            for (uint32_t i = 0; i < BATCH; i++)
                if (i < have)
                    add8(acc, v[i], w[i], !p.by_rank);
        }
        if (at < bytes)
            st_global_16(p.out + (size_t)t * bytes + at, round8(acc));
    }
    if (piece == 0 && p.weight_left) {
        float left = 0.0f;
        for (uint32_t m = shares; m; m &= m - 1)
            left = __fadd_rn(left, __shfl_sync(ALL_LANES, weight, __ffs((int)m) - 1));
        if (lane == 0)
            p.weight_left[t] = left;
    }
    return true;
}

/* Whoever has time takes the block's next piece. */
static __device__ void adder(const ll_combine_t &p, ll_head_t &h)
{
    uint32_t pieces = (p.l.hidden + LL_SUM_PIECE - 1) / LL_SUM_PIECE;
    for (;;) {
        uint32_t claim = threadIdx.x % 32 ? 0 : atomicAdd(&h.claimed, 1);
        uint32_t unit = __shfl_sync(ALL_LANES, claim, 0) * gridDim.x + blockIdx.x;
        if (unit >= p.l.tokens * pieces || !add_piece(p, h, unit / pieces, unit % pieces))
            return;
    }
}

/* ---- the kernel ---- */

/* One warp of block 0. Halves: between them outputs come, and after a release nobody waits for them. */
static __device__ void note_unread(const ll_combine_t &p, const ll_head_t &h)
{
    const ll_common_t &l = p.l;
    uint64_t *unread = l.unread + h.slot * (uint64_t)l.c.ranks;
    if (p.send && p.recv)
        return;
    for (int r = (int)(threadIdx.x % 32); r < l.c.ranks; r += 32)
        *(volatile uint64_t *)&unread[r] = p.send && l.r.asked[r] ? h.n : 0;
}

/* One warp of block 0: who gets nothing in this call hears of it at once. */
static __device__ void tell_left_out(const ll_combine_t &p, const ll_head_t &h)
{
    const ll_common_t &l = p.l;
    for (int r = (int)(threadIdx.x % 32); r < l.c.ranks; r += 32) {
        bool unheard = l.mask_on_timeout && *(volatile uint32_t *)&l.r.decided[r] != ll_decision(h.n, 1);
        if (ll_near(l, r) && (unheard || !sends_to(p, h, r)))
            st_release_sys_u64(&ll_words(l, l.c.peers[r], h.slot, l.c.rank)->left_out, h.n);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) /* for the buffer's next kernel */
        l.combined[h.slot] = h.n;
}

__global__ void __launch_bounds__(LL_THREADS, 1) ll_combine_kernel(const __grid_constant__ ll_combine_t p)
{
    __shared__ ll_head_t h;
    uint32_t warp = threadIdx.x / 32;
    if (p.l.c.ranks == 0) /* a first launch, so that the driver has made room for it */
        return;
    if (threadIdx.x < COPIERS_MOST)
        h.done[threadIdx.x] = 0;
    if (threadIdx.x == 0) {
        h.n = *(volatile uint64_t *)p.l.r.number;
        h.slot = h.n % p.l.slots;
        h.copiers = p.by_rank || !p.recv ? COPIERS_MOST : COPIERS_MOST / 2; /* sums: a row in one go, added later */
        h.claimed = 0;
        h.stop = ht_stopped(p.l.c, h.n, false);
    }
    __syncthreads();
    if (h.stop)
        return;
    if (blockIdx.x == 0 && warp == LL_THREADS / 32 - 1) {
        ll_tell_finished(p.l);
        note_unread(p, h);
        if (p.send)
            tell_left_out(p, h);
    }
    if (p.send && warp < h.copiers)
        copier(p, h);
    else if (p.send && warp >= LL_THREADS / 32 - TELLERS)
        teller(p, h, warp - (LL_THREADS / 32 - TELLERS));
    if (p.recv)
        adder(p, h);
}

extern "C" int epx__ll_launch_combine(const ll_combine_t *p, uint32_t blocks, void *stream)
{
    ll_combine_kernel<<<blocks, LL_THREADS, 0, (cudaStream_t)stream>>>(*p);
    return (int)cudaGetLastError();
}

extern "C" int epx__ll_load_combine(void *stream)
{
    ll_combine_t nothing;
    memset(&nothing, 0, sizeof nothing);
    return epx__ll_launch_combine(&nothing, 1, stream);
}
