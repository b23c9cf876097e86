/*
 * Low-latency dispatch. Roles, each done by some blocks of the grid:
 *
 *   ids      all my tokens' ids (and weights) to every rank, each value with the call's number beside it
 *   send     a token at a time by 16 warps: quantised, one copy to each rank that wants it, then its flag there
 *   spread   every rank's ids become bitmaps per local expert, from which every position follows; then each row, as its
 *            flag comes, by pieces of 1024 elements to its experts' rows
 *   book     counts, ranges and statistics; what combine needs of this call
 *
 * ids and send wait for credit only (`taken` of the slot's last call), spread and book for the ids and rows of peers.
 * With mask_on_timeout they send to each rank as it gives credit.
 */
#include <cuda_runtime.h>
#include <string.h>

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

/* A rank given up in the slot's last call may still write there, until it says that it is done with it. */
EPX__DEVICE uint64_t *owed_by(const ll_common_t &l, const ll_head_t &h, int rank)
{
    return &l.owed[h.slot * (uint64_t)l.c.ranks + (uint64_t)rank];
}
EPX__DEVICE bool settled(const ll_common_t &l, const ll_head_t &h, int rank)
{
    uint64_t owed = *owed_by(l, h, rank);
    if (owed && !ll_settled(l, h.n, h.slot, rank, owed))
        return false;
    *owed_by(l, h, rank) = 0;
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

/*
 * With mask_on_timeout ranks are served as they give credit: would all wait for one that is lost, then its turn to be
 * given up would come when all others give up each other. One thread's look at a rank that is to be sent to; `ids`:
 * also at what it owes. False: it waits.
 */
EPX__DEVICE bool look_at(const ll_common_t &l, const ll_head_t &h, int r, bool ids, bool late, bool *go, bool *stop)
{
    const epx__ll_words_t *words = ll_words(l, l.c.window, h.slot, r);
    uint64_t owed = ids ? *owed_by(l, h, r) : 0;
    *go = false;
    if (owed && ld_acquire_sys_u64(&words->combined) < owed && ld_acquire_sys_u64(&words->left_out) < owed) {
        ht_fault_t f = {EPX_E_BUSY, HT_STAGE_OWED, r, owed, ld_relaxed_sys_u64(&words->combined), l.c.timeout_ns};
        if (late)
            ht_fail(l.c, h.n, f);
        *stop = *stop || late;
        return late;
    }
    if (owed)
        *owed_by(l, h, r) = 0;
    if (*(volatile uint32_t *)&l.masked[r])
        return true;
    *go = has_credit(l, h, r);
    if (!*go && late)
        ll_give_up(l, h.n, r);
    return *go || late;
}

/* The block: who of h.left can be sent to now, into h.go. LL_CAME: somebody; LL_ABSENT: nobody is left; LL_STOP. */
static __device__ int find_turn(const ll_common_t &l, ll_head_t &h, bool ids, uint64_t start)
{
    for (uint32_t polls = 1;; polls++) {
        bool some = false, left = false, late = globaltimer_ns() - start > l.c.timeout_ns;
        bool stop = threadIdx.x == 0 && polls % 16 == 0 && ht_stopped(l.c, h.n, polls % 1024 == 0);
        for (uint32_t first = threadIdx.x / 32 * 32; first < (uint32_t)l.c.ranks; first += LL_THREADS) {
            bool waits = h.left[first / 32] >> threadIdx.x % 32 & 1, go = false;
            waits = waits && !look_at(l, h, (int)(first + threadIdx.x % 32), ids, late, &go, &stop);
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
    int what;
    for (uint32_t first = threadIdx.x / 32 * 32; first < (uint32_t)l.c.ranks; first += LL_THREADS) {
        int r = (int)(first + threadIdx.x % 32);
        uint32_t near = __ballot_sync(ALL_LANES, r < l.c.ranks && ll_near(l, r));
        if (threadIdx.x % 32 == 0)
            h.left[first / 32] = near;
        if (ids && (near >> threadIdx.x % 32 & 1))
            l.r.asked[r] = 0;
    }
    __syncthreads();
    while ((what = find_turn(l, h, ids, start)) == LL_CAME) {
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

EPX__DEVICE void put_scales(const ll_dispatch_t &p, const char *wire, uint32_t at, size_t part, size_t row)
{
    const ll_common_t &l = p.l;
    uint32_t lane = threadIdx.x % 32, all = (uint32_t)l.c.ranks * l.c.layout.ll.tokens_max;
    const uint32_t *scales = (const uint32_t *)(wire + l.hidden);
    if (!p.ue8m0) {
        uint32_t b = at / 128 + lane, blocks = l.hidden / 128;
        if (lane < LL_PIECE / 128 && b < blocks)
            p.recv_scales[(part * blocks + b) * all + row] = ld_relaxed_sys_u32(&scales[b]);
        return;
    }
    uint32_t b = at / 512 + lane, blocks = l.hidden / 512;
    if (lane < LL_PIECE / 512 && b < blocks) {
        uint8_t four[4];
        for (int i = 0; i < 4; i++)
            four[i] = epx__ue8m0_of_f32_up(__uint_as_float(ld_relaxed_sys_u32(&scales[b * 4 + i])));
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
            (void)ll_wait_slow<true>(l, h.n, word, h.n, (int)source, HT_STAGE_ARRIVAL, NULL, NULL);
            seen = ld_relaxed_sys_u64(word);
        }
    }
    p.recv_topk_weights[row * l.topk + lane] = __uint_as_float((uint32_t)seen);
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
            put_scales(p, wire, at, part, to);
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
