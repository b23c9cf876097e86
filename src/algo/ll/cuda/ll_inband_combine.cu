/*
 * Low-latency combine with in-band arrival (docs/PROTOCOL-LL.md). A warp works on a piece of 256 elements of one row:
 *
 *   push   an expert's output, or (by_rank) this rank's weighted sum of a token's, into the owner's place for it; each
 *          word is its own arrival signal, so nothing is announced
 *   add    all rows of one token, as their words come, in order, rounded once; then their places are empty again
 *
 * In every block some warps push and the others add; those that have pushed add too. An owner's places are free, and
 * empty, when I write: it has dispatched this call to me after it combined the slot's last one.
 */
#include <cuda_runtime.h>
#include <string.h>

#include "algo/ll/cuda/ll_inband.cuh"
#include "algo/ll/cuda/ll_launch.cuh"
#include "algo/ll/cuda/ll_number.cuh"

#define BATCH 4u /* rows of a sum that a lane loads at once, before it goes home */
/* Warps of a block, [by_rank], and of those the ones that push, in a kernel that adds as well. A token's eight choices
 * at once need 80 registers a lane; sums over a few ranks fewer, but they wait for more loads. */
#define WARPS(by_rank) ((by_rank) ? LL_HOME_WARPS : LL_HOME_WARPS * 6 / 7)
#define PUSHERS(by_rank) ((by_rank) ? LL_HOME_WARPS * 9 / 14 : LL_HOME_WARPS * 3 / 7)
#define ON_ITS_WAY 1u /* of ll_entry.from: that rank has my tokens, and is not masked */
#define GIVEN_UP 2u   /* it has my tokens, and is masked since */

/* ---- push ---- */

EPX__DEVICE char *home_of(const ll_common_t &l, const ll_entry_t &e, const ll_back_t &b)
{
    return e.peer[b.source] + epx__ll_back_at(&l.c.layout.ll, e.slot, (uint32_t)b.token, (uint32_t)b.place);
}

/* The i-th row to push: expert outputs for other ranks, then, with halves, this rank's own; or all ranks' sums. */
template <bool by_rank>
EPX__DEVICE ll_back_t row_to_push(const ll_combine_t &p, uint32_t others, uint32_t i)
{
    const ll_common_t &l = p.l;
    if (by_rank)
        return l.r.rank_list[i];
    if (i < others)
        return l.r.list[i];
    uint32_t pair = i - others; /* of my own tokens */
    return ll_back_t{l.r.pos[(size_t)l.c.rank * l.c.layout.ll.tokens_max * l.topk + pair], l.c.rank,
                     (int32_t)(pair / l.topk), (int32_t)(pair % l.topk)};
}

/* A row under way; row < 0: none. By rank, lane k < topk has choice k's row of the caller and its weight. */
typedef struct ll_home {
    ll_back_t b;
    int32_t pos;
    float weight;
} ll_home_t;

#define NO_ROW (ll_back_t{-1, 0, 0, 0})

/* What a warp pushes: pieces of rows, one by one. While one is loaded, the next is looked up, and the one after found:
 * each is a way to memory and back, and needs what the one before has brought. */
typedef struct ll_pushing {
    uint32_t unit, pieces, stride, others, rows;
    ll_home_t now, next;
    ll_back_t after;
    uint32_t at; /* this lane's bytes in `now`, and what they hold */
    uint4 v;
} ll_pushing_t;

template <bool by_rank>
EPX__DEVICE ll_home_t look_up(const ll_combine_t &p, ll_back_t b)
{
    const ll_common_t &l = p.l;
    uint32_t lane = threadIdx.x % 32;
    ll_home_t h = {b, -1, 0.0f};
    if (!by_rank || b.row < 0 || lane >= l.topk)
        return h;
    h.pos = l.r.pos[(size_t)b.row * l.topk + lane];
    if (p.pre_reduced)
        h.weight = l.r.weights[(size_t)b.row * l.topk + lane];
    return h;
}

/* Weighted sum over my experts of one token, in top-k order, of the elements at byte `at`. */
EPX__DEVICE uint4 sum_here(const ll_combine_t &p, const ll_home_t &h, uint32_t at, bool inside)
{
    uint32_t bytes = p.l.hidden * 2;
    float acc[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (uint32_t m = __ballot_sync(ALL_LANES, h.pos >= 0); m;) {
        uint4 v[BATCH];
        float w[BATCH];
        uint32_t have = 0;
#pragma unroll
        for (uint32_t i = 0; i < BATCH; i++, m &= m - 1) {
            int k = m ? __ffs((int)m) - 1 : 0;
            size_t row = (size_t)__shfl_sync(ALL_LANES, h.pos, k);
            w[i] = __shfl_sync(ALL_LANES, h.weight, k);
            v[i] = make_uint4(0, 0, 0, 0);
            if (m) {
                have = i + 1;
                if (inside)
                    v[i] = ld_global_16(p.x + row * bytes + at);
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < BATCH; i++)
            if (i < have)
                add8(acc, v[i], w[i], true);
    }
    return round8(acc);
}

/* One warp: the elements to push. */
template <bool by_rank>
EPX__DEVICE void load_push(const ll_combine_t &p, ll_pushing_t *u)
{
    uint32_t bytes = p.l.hidden * 2;
    int32_t row = u->now.b.row;
    u->at = (u->unit - u->unit / u->pieces * u->pieces) * LL_HOME_PIECE * 2 + threadIdx.x % 32 * 16;
    u->v = make_uint4(0, 0, 0, 0);
    if (row < 0)
        return;
    if (by_rank && p.pre_reduced) {
        u->v = sum_here(p, u->now, u->at, u->at < bytes);
        return;
    }
    if (by_rank) { /* rank-major: a row of its own, the same for every choice */
        uint32_t some = __ballot_sync(ALL_LANES, u->now.pos >= 0);
        row = __shfl_sync(ALL_LANES, u->now.pos, some ? __ffs((int)some) - 1 : 0);
    }
    if (u->at < bytes)
        u->v = ld_global_16(p.x + (size_t)row * bytes + u->at);
}

/* The row of a unit; `early`, loaded from the list before it was known how long the list is. */
template <bool by_rank>
EPX__DEVICE ll_back_t row_of_unit(const ll_combine_t &p, const ll_pushing_t &u, uint32_t unit, ll_back_t early)
{
    uint32_t row = unit / u.pieces;
    return row < u.others ? early : row < u.rows ? row_to_push<by_rank>(p, u.others, row) : NO_ROW;
}
template <bool by_rank>
EPX__DEVICE ll_back_t early_row(const ll_combine_t &p, uint32_t row)
{
    const epx__ll_layout_t *l = &p.l.c.layout.ll;
    uint32_t room = l->ranks * l->tokens_max * (by_rank ? 1 : l->topk_max);
    return row >= room ? NO_ROW : by_rank ? p.l.r.rank_list[row] : p.l.r.list[row];
}

/* One warp of `warps`: its first piece, and what it holds. */
template <bool by_rank>
EPX__DEVICE ll_pushing_t first_push(const ll_combine_t &p, uint32_t warps)
{
    const ll_common_t &l = p.l;
    ll_pushing_t u;
    u.pieces = (l.hidden + LL_HOME_PIECE - 1) / LL_HOME_PIECE;
    u.stride = gridDim.x * warps;
    u.unit = blockIdx.x * warps + threadIdx.x / 32;
    ll_back_t now = early_row<by_rank>(p, u.unit / u.pieces);
    ll_back_t next = early_row<by_rank>(p, (u.unit + u.stride) / u.pieces);
    ll_back_t after = early_row<by_rank>(p, (u.unit + 2 * u.stride) / u.pieces);
    u.others = l.r.list_count[by_rank];
    u.rows = u.others + (by_rank || p.recv ? 0 : l.tokens * l.topk);
    u.now = look_up<by_rank>(p, row_of_unit<by_rank>(p, u, u.unit, now));
    u.next = look_up<by_rank>(p, row_of_unit<by_rank>(p, u, u.unit + u.stride, next));
    u.after = row_of_unit<by_rank>(p, u, u.unit + 2 * u.stride, after);
    load_push<by_rank>(p, &u);
    return u;
}

/* One warp. `u`: its first piece, looked up while the block was entered. */
template <bool by_rank>
static __device__ void push(const ll_combine_t &p, const ll_entry_t &e, ll_pushing_t u)
{
    uint32_t bytes = p.l.hidden * 2, all = u.rows * u.pieces;
    while (u.unit < all) {
        const ll_back_t b = u.now.b;
        if (b.row >= 0 && e.to[b.source] != LL_NOBODY && u.at < bytes)
            st_relaxed_sys_16(home_of(p.l, e, b) + u.at, ll_full(u.v));
        u.unit += u.stride;
        u.now = u.next;
        u.next = look_up<by_rank>(p, u.after);
        uint32_t row = (u.unit + 2 * u.stride) / u.pieces;
        u.after = row < u.rows ? row_to_push<by_rank>(p, u.others, row) : NO_ROW;
        if (u.unit < all)
            load_push<by_rank>(p, &u);
    }
}

/* ---- add ---- */

/* A token's rows, lane i the i-th in the order of adding. */
typedef struct ll_rows {
    char *home; /* this token's places, row_bytes apart: the i-th row comes to the i-th */
    uint32_t there,
        remote;      /* rows to be added; those of them whose words come to their places. The same in all lanes */
    int32_t local;   /* else the row of `x` where it lies, complete */
    int rank;        /* whose */
    uint32_t choice; /* of this lane's choice: the lane that has its row */
    float weight;    /* of this lane's choice */
} ll_rows_t;

/* By rank: lane i gets the i-th of the token's ranks, ascending. */
EPX__DEVICE int ranks_in_order(int rank, uint32_t *choice)
{
    uint32_t lane = threadIdx.x % 32, same = __match_any_sync(ALL_LANES, rank), place = 0;
    bool leads = rank >= 0 && (uint32_t)__ffs((int)same) - 1 == lane;
    uint32_t leaders = __ballot_sync(ALL_LANES, leads);
    for (uint32_t m = leaders; m; m &= m - 1)
        place += __shfl_sync(ALL_LANES, rank, __ffs((int)m) - 1) < rank;
    int mine = -1;
    for (uint32_t m = leaders; m; m &= m - 1) {
        int k = __ffs((int)m) - 1, r = __shfl_sync(ALL_LANES, rank, k);
        mine = __shfl_sync(ALL_LANES, place, k) == lane ? r : mine;
    }
    *choice = place;
    return mine;
}

template <bool by_rank>
EPX__DEVICE ll_rows_t rows_of_token(const ll_combine_t &p, const ll_entry_t &e, uint32_t t)
{
    const ll_common_t &l = p.l;
    uint32_t lane = threadIdx.x % 32;
    size_t pair = (size_t)t * l.topk + lane;
    bool mine = lane < l.topk;
    int64_t id = mine ? ll_id(l, pair) : -1;
    ll_rows_t s = {NULL, 0, 0, -1, id < 0 ? -1 : epx__expert_rank(&l.map, id), lane, 1.0f};
    if (mine && p.topk_weights)
        s.weight = p.topk_weights[pair];
    if (by_rank)
        s.rank = ranks_in_order(s.rank, &s.choice);
    else if (s.rank == l.c.rank && p.send) /* my own expert's: added where it lies */
        s.local = l.r.pos[((size_t)l.c.rank * l.c.layout.ll.tokens_max + t) * l.topk + lane];
    uint32_t from = s.rank < 0 ? 0 : e.from[s.rank];
    s.home = l.c.window + epx__ll_back_at(&l.c.layout.ll, e.slot, t, 0);
    s.there = __ballot_sync(ALL_LANES, from == ON_ITS_WAY);
    s.remote = __ballot_sync(ALL_LANES, from == ON_ITS_WAY && s.local < 0);
    if (from == GIVEN_UP) /* it may write into the slot, until it says that it does not */
        *(volatile uint64_t *)&l.owed[e.slot * (uint32_t)l.c.ranks + (uint32_t)s.rank] = e.n;
    return s;
}

/* Up to `most` rows of one piece under way: those of the lowest bits of `order`. */
template <int most>
struct ll_batch {
    uint4 v[most];
};

template <int most>
EPX__DEVICE void load_batch(const ll_combine_t &p, const ll_rows_t &s, uint32_t order, uint32_t at, bool inside,
                            ll_batch<most> *b)
{
    const ll_common_t &l = p.l;
#pragma unroll
    for (int i = 0; i < most; i++, order &= order - 1) {
        b->v[i] = make_uint4(0, 0, 0, 0);
        if (!order)
            continue;
        uint32_t k = (uint32_t)__ffs((int)order) - 1;
        int32_t local = __shfl_sync(ALL_LANES, s.local, k);
        const char *row =
            s.remote >> k & 1 ? s.home + (size_t)k * l.c.layout.ll.row_bytes : p.x + (size_t)local * l.hidden * 2;
        if (inside)
            b->v[i] = ld_relaxed_sys_16(row + at);
    }
}

/* Look once more at what is not there yet. The lowest row that this lane still misses, or 32. */
template <int most>
EPX__DEVICE uint32_t poll_batch(const ll_combine_t &p, const ll_rows_t &s, uint32_t order, uint32_t at, bool inside,
                                ll_batch<most> *b)
{
    uint32_t missing = 32;
#pragma unroll
    for (int i = 0; i < most; i++, order &= order - 1) {
        uint32_t k = (uint32_t)__ffs((int)order) - 1;
        if (!order || !(s.remote >> k & 1) || !inside || !ll_empty(b->v[i])) /* a local row of all ones is a value */
            continue;
        b->v[i] = ld_relaxed_sys_16(s.home + (size_t)k * p.l.c.layout.ll.row_bytes + at);
        if (ll_empty(b->v[i]))
            missing = missing < k ? missing : k;
    }
    return missing;
}

/* Until the batch is complete. Rows that will not come are taken out of *order. False: stop. */
template <int most>
EPX__DEVICE bool await_batch(const ll_combine_t &p, const ll_entry_t &e, const ll_rows_t &s, uint32_t at, bool inside,
                             uint32_t *order, ll_batch<most> *b)
{
    const ll_common_t &l = p.l;
    uint32_t start = 0;
    load_batch(p, s, *order, at, inside, b);
    for (uint32_t polls = 1;; polls++) {
        uint32_t missing = poll_batch(p, s, *order, at, inside, b);
        if (!__any_sync(ALL_LANES, missing < 32))
            return true;
        if (polls % 64 != 0)
            continue;
        int rank = __shfl_sync(ALL_LANES, s.rank, missing % 32);
        if (missing < 32)
            start = ll_patience(l, e.n, rank, &ll_words(l, l.c.window, e.slot, rank)->left_out, start, polls);
        if (__any_sync(ALL_LANES, missing < 32 && start == 0))
            return false;
        uint32_t lost = __reduce_or_sync(ALL_LANES, missing < 32 && start == 1 ? 1u << missing : 0);
        start = start == 1 ? 0 : start;
        *order &= ~lost;
        load_batch(p, s, *order, at, inside, b); /* all anew: nothing is kept in registers over a long wait */
    }
}

/* One warp: adds up to `most` rows of *order, and takes them out of it; those that do not come are not added, and
 * taken out of *there too. False: stop. */
template <bool by_rank>
EPX__DEVICE bool add_batch(const ll_combine_t &p, const ll_entry_t &e, const ll_rows_t &s, uint32_t at, bool inside,
                           uint32_t *order, uint32_t *there, float *acc)
{
    const int most = by_rank ? 4 : 8;
    ll_batch<most> b;
    uint32_t before = *order;
    if (!await_batch(p, e, s, at, inside, order, &b))
        return false;
    *there &= ~(before & ~*order);
#pragma unroll
    for (int i = 0; i < most; i++, *order &= *order - 1) {
        if (!*order)
            continue;
        uint32_t k = (uint32_t)__ffs((int)*order) - 1;
        add8(acc, b.v[i], __shfl_sync(ALL_LANES, s.weight, k), !by_rank);
        if (inside && (s.remote >> k & 1))
            ll_refill(s.home + (size_t)k * p.l.c.layout.ll.row_bytes + at);
    }
    return true;
}

/* One warp: one piece of one token. False: stop. */
template <bool by_rank>
static __device__ bool add_piece(const ll_combine_t &p, const ll_entry_t &e, uint32_t t, uint32_t piece)
{
    uint32_t lane = threadIdx.x % 32, bytes = p.l.hidden * 2, at = piece * LL_HOME_PIECE * 2 + lane * 16;
    ll_rows_t s = rows_of_token<by_rank>(p, e, t);
    float acc[8] = {0, 0, 0, 0, 0, 0, 0, 0}, left = 0.0f;
    uint32_t there = s.there;
    for (uint32_t order = there; order;)
        if (!add_batch<by_rank>(p, e, s, at, at < bytes, &order, &there, acc))
            return false;
    if (at < bytes)
        st_global_16(p.out + (size_t)t * bytes + at, round8(acc));
    if (piece != 0 || !p.weight_left)
        return true;
    int64_t id = lane < p.l.topk ? ll_id(p.l, (size_t)t * p.l.topk + lane) : -1;
    uint32_t shares = __ballot_sync(ALL_LANES, id >= 0 && (there >> s.choice & 1));
    for (uint32_t m = shares; m; m &= m - 1)
        left = __fadd_rn(left, __shfl_sync(ALL_LANES, s.weight, __ffs((int)m) - 1));
    if (lane == 0)
        p.weight_left[t] = left;
    return true;
}

/* Whoever has time takes the block's next piece. */
template <bool by_rank>
static __device__ void add(const ll_combine_t &p, ll_entry_t &e)
{
    uint32_t pieces = (p.l.hidden + LL_HOME_PIECE - 1) / LL_HOME_PIECE;
    for (;;) {
        uint32_t claim = threadIdx.x % 32 ? 0 : atomicAdd(&e.claimed, 1);
        uint32_t unit = __shfl_sync(ALL_LANES, claim, 0) * gridDim.x + blockIdx.x;
        if (unit >= p.l.tokens * pieces || !add_piece<by_rank>(p, e, unit / pieces, unit % pieces))
            return;
    }
}

/* ---- the kernel ---- */

/* What one thread a rank finds out. */
typedef struct ll_known {
    uint64_t n, alarm;
    uint32_t slot, asked, masked;
    char *peer;
} ll_known_t;

EPX__DEVICE ll_known_t look(const ll_common_t &l)
{
    uint32_t r = threadIdx.x;
    ll_known_t k = {0, 0, 0, 0, 0, NULL};
    if (r >= (uint32_t)l.c.ranks)
        return k;
    k.n = ((volatile uint64_t *)l.r.number)[0];
    k.slot = (uint32_t)((volatile uint64_t *)l.r.number)[1];
    k.asked = *(volatile uint32_t *)&l.r.asked[r];
    k.masked = *(volatile uint32_t *)&l.masked[r];
    k.alarm = r ? 0 : ld_relaxed_sys_u64(alarm_of(l.c, l.c.window));
    k.peer = l.c.peers[r];
    return k;
}

/* The whole block, one thread a rank. False: stop. */
static __device__ bool enter(const ll_combine_t &p, ll_entry_t &e, const ll_known_t &k)
{
    const ll_common_t &l = p.l;
    uint32_t r = threadIdx.x;
    bool stop = false;
    if (r < (uint32_t)l.c.ranks) {
        e.peer[r] = k.peer;
        e.to[r] = k.masked ? LL_NOBODY : LL_INBAND;
        e.from[r] = !k.asked ? 0 : k.masked ? GIVEN_UP : ON_ITS_WAY;
        if (r == 0) {
            e.n = k.n;
            e.slot = k.slot;
            e.claimed = 0;
            stop = k.alarm && ht_stopped(l.c, k.n, false);
        }
        if (blockIdx.x == 0 && p.send != p.recv) /* halves: between them, outputs lie in the slot */
            *(volatile uint64_t *)&l.unread[k.slot * (uint32_t)l.c.ranks + r] = p.send && k.asked ? k.n : 0;
    }
    return __syncthreads_or(stop) == 0;
}

/* One warp of block 0. */
static __device__ void tell(const ll_combine_t &p, const ll_entry_t &e)
{
    const ll_common_t &l = p.l;
    ll_tell_inband(l);
    if (!p.send)
        return;
    for (int r = (int)(threadIdx.x % 32); r < l.c.ranks; r += 32) /* who gets nothing hears of it at once */
        if (e.to[r] == LL_NOBODY)
            st_release_sys_u64(&ll_words(l, e.peer[r], e.slot, l.c.rank)->left_out, e.n);
    __syncwarp();
    if (threadIdx.x % 32 == 0) /* for the buffer's next kernel */
        *(volatile uint64_t *)&l.combined[e.slot] = e.n;
}

template <bool by_rank>
__global__ void __launch_bounds__(WARPS(by_rank) * 32, 1) ll_inband_combine(const __grid_constant__ ll_combine_t p)
{
    __shared__ ll_entry_t e;
    const ll_common_t &l = p.l;
    await_kernel_before();
    if (l.c.ranks == 0) /* a first launch, so that the driver has made room for it */
        return;
    uint32_t warp = threadIdx.x / 32, pushers = p.send && p.recv ? PUSHERS(by_rank) : WARPS(by_rank);
    bool pushes = p.send && warp < pushers;
    ll_known_t known = look(l);
    ll_pushing_t first = {};
    if (pushes) /* on its way while the block is entered */
        first = first_push<by_rank>(p, pushers);
    if (!enter(p, e, known))
        return;
    if (blockIdx.x == 0 && warp == WARPS(by_rank) - 1)
        tell(p, e);
    if (pushes)
        push<by_rank>(p, e, first);
    if (p.recv)
        add<by_rank>(p, e);
}

extern "C" int epx__ll_launch_inband_combine(const ll_combine_t *p, uint32_t blocks, void *stream)
{
    return p->by_rank ? ll_launch(ll_inband_combine<true>, p, blocks, WARPS(true) * 32, 0, stream)
                      : ll_launch(ll_inband_combine<false>, p, blocks, WARPS(false) * 32, 0, stream);
}

extern "C" int epx__ll_load_inband_combine(void *stream)
{
    ll_combine_t nothing;
    memset(&nothing, 0, sizeof nothing);
    int error = epx__ll_launch_inband_combine(&nothing, 1, stream);
    nothing.by_rank = 1;
    return error ? error : epx__ll_launch_inband_combine(&nothing, 1, stream);
}
