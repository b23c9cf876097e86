/*
 * Low-latency dispatch with flags, the sender's side: ids, weights and shape to every near rank, rows to who wants
 * them. Both wait for credit only: that a rank has taken what came in the slot's last call. With mask_on_timeout each
 * rank is sent to as it gives credit. But ids, which permit outputs, go to nobody while a rank owes.
 */
#ifndef EPX_ALGO_LL_CUDA_LL_SEND_CUH
#define EPX_ALGO_LL_CUDA_LL_SEND_CUH

#include "algo/ll/cuda/ll_index.cuh"
#include "algo/ll/cuda/ll_row.cuh"

EPX__DEVICE void team_sync(uint32_t team)
{
    bar_sync(team + 1, LL_TEAM_WARPS * 32);
}

/* ---- who may be sent to ---- */

EPX__DEVICE bool has_credit(const ll_common_t &l, const ll_head_t &h, int rank)
{
    return h.n <= l.slots || ld_acquire_sys_u64(&ll_words(l, l.c.window, h.slot, rank)->taken) >= h.n - l.slots;
}
EPX__DEVICE int credit_of(const ll_common_t &l, const ll_head_t &h, int rank)
{
    if (has_credit(l, h, rank))
        return LL_CAME;
    const uint64_t *taken = &ll_words(l, l.c.window, h.slot, rank)->taken;
    return ll_wait_slow<false>(l, h.n, taken, h.n - l.slots, rank, HT_STAGE_CREDIT, NULL, NULL);
}

EPX__DEVICE bool settled(const ll_common_t &l, const ll_head_t &h, int rank)
{
    uint64_t owed = ll_owed(l, h.slot, rank);
    if (owed && !ll_settled(l, h.n, h.slot, rank, owed))
        return false;
    if (owed)
        ll_settle(l, h.slot, rank);
    return true;
}

/* The block that sends ids: all near ranks that are not masked, into h.go, when each has given credit. h.stop: stop. */
static __device__ void await_ranks(const ll_common_t &l, ll_head_t &h)
{
    for (uint32_t first = threadIdx.x / 32 * 32; first < (uint32_t)l.c.ranks; first += LL_THREADS) {
        int r = (int)(first + threadIdx.x % 32);
        bool near = r < l.c.ranks && ll_near(l, r);
        int credit = near && !l.masked[r] ? credit_of(l, h, r) : LL_ABSENT;
        if (credit == LL_STOP || (near && !settled(l, h, r)))
            h.stop = 1;
        uint32_t go = __ballot_sync(ALL_LANES, credit == LL_CAME);
        if (threadIdx.x % 32 == 0)
            h.go[first / 32] = go;
    }
    __syncthreads();
}

/* The block: no near rank owes. A place in `back` is another rank's in the next call: whoever is told ids may write
 * where one that owes still does. h.stop: stop. */
static __device__ void settle(const ll_common_t &l, ll_head_t &h)
{
    bool good = true;
    for (int r = (int)threadIdx.x; r < l.c.ranks; r += LL_THREADS)
        good = (!ll_near(l, r) || settled(l, h, r)) && good;
    if (__syncthreads_or(!good) && threadIdx.x == 0)
        h.stop = 1;
    __syncthreads();
}

/*
 * With mask_on_timeout ranks are served as they give credit: would all wait for one that is lost, then its turn to be
 * given up would come when all others give up each other. One thread's look at a rank that is to be sent to. False: it
 * waits.
 */
EPX__DEVICE bool look_at(const ll_common_t &l, const ll_head_t &h, int r, bool late, bool *go)
{
    *go = false;
    if (*(volatile uint32_t *)&l.masked[r])
        return true;
    *go = has_credit(l, h, r);
    if (!*go && late)
        ll_give_up(l, h.n, r);
    return *go || late;
}

/* The block: who of h.left can be sent to now, into h.go. LL_CAME: somebody; LL_ABSENT: nobody is left; LL_STOP. */
static __device__ int find_turn(const ll_common_t &l, ll_head_t &h, uint64_t start)
{
    for (uint32_t polls = 1;; polls++) {
        bool some = false, left = false, late = globaltimer_ns() - start > l.c.timeout_ns;
        bool stop = threadIdx.x == 0 && polls % 16 == 0 && ht_stopped(l.c, h.n, polls % 1024 == 0);
        for (uint32_t first = threadIdx.x / 32 * 32; first < (uint32_t)l.c.ranks; first += LL_THREADS) {
            bool waits = h.left[first / 32] >> threadIdx.x % 32 & 1, go = false;
            int r = (int)(first + threadIdx.x % 32); /* nobody gives up itself */
            waits = waits && !look_at(l, h, r, late && r != l.c.rank, &go);
            uint32_t now = __ballot_sync(ALL_LANES, go), later = __ballot_sync(ALL_LANES, waits);
            if (threadIdx.x % 32 == 0) {
                h.go[first / 32] = now;
                h.left[first / 32] = later;
            }
            some = some || now;
            left = left || later;
        }
        if (__syncthreads_or(stop))
            return LL_STOP;
        if (__syncthreads_or(some))
            return LL_CAME;
        if (!__syncthreads_or(left))
            return LL_ABSENT;
    }
}

EPX__DEVICE bool goes(const ll_head_t &h, int rank)
{
    return h.go[rank / 32] >> rank % 32 & 1;
}

/* The block: ids, weights and the shape to the ranks in h.go. Returns this thread's ids that are none. */
static __device__ uint32_t store_ids(const ll_dispatch_t &p, const ll_head_t &h, int64_t first)
{
    const ll_common_t &l = p.l;
    uint32_t pairs = l.c.layout.ll.tokens_max * l.topk, mine = l.tokens * l.topk, bad = 0;
    for (uint32_t i = threadIdx.x; i < pairs; i += LL_THREADS) {
        int64_t given = i == threadIdx.x ? first : i < mine ? epx__topk_id(l.topk_idx, l.bits, i) : -1;
        int64_t id = given < 0 || given >= (int64_t)l.map.experts ? -1 : given;
        bad += id != given;
        for (int k = 1; k <= l.c.ranks; k++) {
            int r = (l.c.rank + k) % l.c.ranks;
            if (goes(h, r))
                st_relaxed_sys_u64(&ll_ids(l, l.c.peers[r], h.slot, l.c.rank)[i], ll_stamped((uint32_t)id, h.n));
        }
    }
    for (uint32_t i = threadIdx.x; p.topk_weights && i < mine; i += LL_THREADS) {
        uint32_t weight = __float_as_uint(p.topk_weights[i]);
        for (int k = 1; k <= l.c.ranks; k++) {
            int r = (l.c.rank + k) % l.c.ranks;
            if (goes(h, r))
                st_relaxed_sys_u64(&ll_weights(l, l.c.peers[r], h.slot, l.c.rank)[i], ll_stamped(weight, h.n));
        }
    }
    for (int r = (int)threadIdx.x; r < l.c.ranks; r += LL_THREADS)
        if (goes(h, r))
            st_relaxed_sys_u64(ll_block(l, l.c.peers[r], h.slot, l.c.rank), ll_stamped(p.stamp_shape, h.n));
    return bad;
}

/* ---- rows ---- */

/* Which ranks want the token: the first lane of each. */
EPX__DEVICE uint32_t wanted(const ll_common_t &l, uint32_t token, int *rank)
{
    uint32_t lane = threadIdx.x % 32;
    int64_t id = lane < l.topk ? ll_id(l, (size_t)token * l.topk + lane) : -1;
    *rank = id < 0 ? -1 : epx__expert_rank(&l.map, id);
    uint32_t same = __match_any_sync(ALL_LANES, *rank);
    bool first = *rank >= 0 && (uint32_t)__ffs((int)same) - 1 == lane;
    return __ballot_sync(ALL_LANES, first);
}

template <bool fp8>
EPX__DEVICE void send_piece(const ll_dispatch_t &p, const ll_head_t &h, uint32_t token, uint32_t at, uint32_t ranks,
                            int rank, uint4 a, uint4 b)
{
    const ll_common_t &l = p.l;
    float scale = 0.0f;
    if (fp8)
        a = quantise16(a, b, p.round_scale || p.ue8m0, &scale);
    for (uint32_t m = ranks; m; m &= m - 1) {
        int r = __shfl_sync(ALL_LANES, rank, __ffs((int)m) - 1);
        char *row = l.c.peers[r] + epx__ll_row_at(&l.c.layout.ll, h.slot, (uint32_t)l.c.rank, token);
        store_piece<fp8>(row, l.hidden, at, a, b, scale);
    }
}

/* A team: the token to these of its ranks, the same in all its warps. `a`, `b`: the warp's first piece. */
template <bool fp8>
EPX__DEVICE void send_token(const ll_dispatch_t &p, const ll_head_t &h, uint32_t t, uint32_t ranks, int rank, uint4 a,
                            uint4 b)
{
    const ll_common_t &l = p.l;
    uint32_t team = threadIdx.x / 32 / LL_TEAM_WARPS, w = threadIdx.x / 32 % LL_TEAM_WARPS;
    for (uint32_t at = w * 512; at < l.hidden; at += LL_TEAM_WARPS * 512) {
        if (at != w * 512)
            load_piece<fp8>(p, t, at, &a, &b);
        send_piece<fp8>(p, h, t, at, ranks, rank, a, b);
    }
    team_sync(team);
    if (w == 0 && (ranks >> threadIdx.x % 32 & 1) && *(volatile uint32_t *)&h.stop == 0)
        st_release_sys_u64(
            (uint64_t *)(l.c.peers[rank] + epx__ll_row_flag_at(&l.c.layout.ll, h.slot, (uint32_t)l.c.rank, t)), h.n);
}

/* Each token waits for the credit of its own ranks. */
template <bool fp8>
static __device__ void send_rows(const ll_dispatch_t &p, ll_head_t &h)
{
    const ll_common_t &l = p.l;
    const uint32_t teams = LL_THREADS / 32 / LL_TEAM_WARPS;
    uint32_t team = threadIdx.x / 32 / LL_TEAM_WARPS, w = threadIdx.x / 32 % LL_TEAM_WARPS, lane = threadIdx.x % 32;
    for (uint32_t t = (blockIdx.x - p.send_first) * teams + team; t < l.tokens; t += p.send_blocks * teams) {
        int rank;
        uint4 a, b;
        load_piece<fp8>(p, t, w * 512, &a, &b); /* while it is found out where to */
        uint32_t ranks = wanted(l, t, &rank);
        bool mine = (ranks >> lane & 1) && ll_near(l, rank) && !l.masked[rank];
        int credit = mine ? credit_of(l, h, rank) : LL_ABSENT;
        ranks = __ballot_sync(ALL_LANES, credit == LL_CAME);
        if (__any_sync(ALL_LANES, credit == LL_STOP)) {
            h.stop = 1;
            ranks = 0;
        }
        send_token<fp8>(p, h, t, ranks, rank, a, b);
    }
    __syncthreads();
}

/* The block's tokens to the ranks in h.go. */
template <bool fp8>
static __device__ void send_rows_of_turn(const ll_dispatch_t &p, const ll_head_t &h)
{
    const uint32_t teams = LL_THREADS / 32 / LL_TEAM_WARPS;
    uint32_t team = threadIdx.x / 32 / LL_TEAM_WARPS, w = threadIdx.x / 32 % LL_TEAM_WARPS, lane = threadIdx.x % 32;
    for (uint32_t t = (blockIdx.x - p.send_first) * teams + team; t < p.l.tokens; t += p.send_blocks * teams) {
        int rank;
        uint4 a, b;
        uint32_t ranks = wanted(p.l, t, &rank);
        ranks = __ballot_sync(ALL_LANES, (ranks >> lane & 1) && goes(h, rank));
        if (ranks == 0)
            continue;
        load_piece<fp8>(p, t, w * 512, &a, &b);
        send_token<fp8>(p, h, t, ranks, rank, a, b);
    }
}

/* ---- send ---- */

/* As ranks give credit: ids, the block's part of the rows, or both. Returns this thread's ids that are none. */
template <bool fp8>
static __device__ __noinline__ uint32_t send_in_turns(const ll_dispatch_t &p, ll_head_t &h, bool ids, bool rows,
                                                      int64_t id)
{
    const ll_common_t &l = p.l;
    uint64_t start = globaltimer_ns();
    uint32_t bad = 0;
    int what = LL_STOP;
    for (uint32_t first = threadIdx.x / 32 * 32; first < (uint32_t)l.c.ranks; first += LL_THREADS) {
        int r = (int)(first + threadIdx.x % 32);
        uint32_t near = __ballot_sync(ALL_LANES, r < l.c.ranks && ll_near(l, r));
        if (threadIdx.x % 32 == 0)
            h.left[first / 32] = near;
        if (ids && (near >> threadIdx.x % 32 & 1))
            l.r.asked[r] = 0;
    }
    if (ids)
        settle(l, h);
    else
        __syncthreads();
    while (!h.stop && (what = find_turn(l, h, start)) == LL_CAME) {
        for (int r = (int)threadIdx.x; ids && r < l.c.ranks; r += LL_THREADS)
            if (goes(h, r))
                l.r.asked[r] = 1;
        if (ids)
            bad = store_ids(p, h, id);
        if (rows)
            send_rows_of_turn<fp8>(p, h);
        __syncthreads();
    }
    if (what == LL_STOP && threadIdx.x == 0)
        h.stop = 1;
    __syncthreads();
    return bad;
}

/* The block: the ids, its part of the rows, or both. h.stop: stop. */
template <bool fp8>
static __device__ void send(const ll_dispatch_t &p, ll_head_t &h, bool ids, bool rows)
{
    const ll_common_t &l = p.l;
    uint32_t bad = 0;
    int64_t id = ids && threadIdx.x < l.tokens * l.topk ? epx__topk_id(l.topk_idx, l.bits, threadIdx.x) : -1;
    if (ids && threadIdx.x / 32 == LL_THREADS / 32 - 1) /* while the first id is on its way */
        ll_tell_finished(l);
    if (l.mask_on_timeout) {
        bad = send_in_turns<fp8>(p, h, ids, rows, id);
    } else if (ids) {
        await_ranks(l, h);
        if (h.stop)
            return;
        for (int r = (int)threadIdx.x; r < l.c.ranks; r += LL_THREADS)
            if (ll_near(l, r))
                l.r.asked[r] = goes(h, r);
        bad = store_ids(p, h, id);
    }
    if (bad)
        atomicAdd(&l.c.state->bad_ids, bad);
    __syncthreads();
    if (ids && threadIdx.x == 0)
        l.c.host->bad_ids = *(volatile uint32_t *)&l.c.state->bad_ids;
    if (rows && !l.mask_on_timeout)
        send_rows<fp8>(p, h);
}

#endif
