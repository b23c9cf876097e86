/*
 * Low-latency dispatch with in-band arrival (docs/PROTOCOL-LL.md). Roles, each done by blocks of its own where there
 * are enough of them (ll_roles_of):
 *
 *   ids      all my tokens' ids (and weights) to every rank; then, that its outputs may come  ll_inband_send.cuh
 *   send     rows to the ranks that want them, one piece of 512 elements a warp              ll_inband_send.cuh
 *   take     rows as they come, one piece of 1024 elements a warp, to their experts' rows    ll_inband_take.cuh
 *   books    counts | lists | sums | places: four blocks                                     ll_inband_books.cuh
 *
 * The chain that matters: number and credit, while the first piece is loaded; ids there; every block that takes works
 * out the positions by itself; words there; out.
 */
#include <cuda_runtime.h>
#include <string.h>

#include "algo/ll/cuda/ll_inband_books.cuh"
#include "algo/ll/cuda/ll_inband_send.cuh"
#include "algo/ll/cuda/ll_inband_take.cuh"
#include "algo/ll/cuda/ll_launch.cuh"

/* ---- the slot's last call ---- */

/*
 * One thread a rank, in the block that sends the shapes, which permit outputs into `back`. That rank may have written
 * outputs of `call` there that were not added: it was given up in the slot's last call, or the call was released after
 * its send half. Until it says that no more come; false: stop.
 */
static __device__ __noinline__ bool left_behind(const ll_common_t &l, uint64_t n, uint32_t slot, int r, uint64_t call)
{
    uint32_t at = slot * (uint32_t)l.c.ranks + (uint32_t)r;
    if (!ll_settled(l, n, slot, r, call))
        return false;
    *(volatile uint64_t *)&l.owed[at] = 0;
    *(volatile uint64_t *)&l.unread[at] = 0;
    return true;
}

/* The whole block: every place of the slot's outputs is empty. Seldom, and slow. */
static __device__ __noinline__ void refill_outputs(const ll_common_t &l, uint32_t slot)
{
    const epx__ll_layout_t *layout = &l.c.layout.ll;
    char *back = l.c.window + epx__ll_back_at(layout, slot, 0, 0);
    size_t bytes = (size_t)layout->tokens_max * layout->topk_max * layout->row_bytes;
    for (size_t at = (size_t)threadIdx.x * 16; at < bytes; at += LL_INBAND_THREADS * 16)
        ll_refill(back + at);
    __syncthreads();
    fence_acq_rel_sys(); /* covers what the barrier has shown to its thread: whichever says next that it is done */
}

/* The whole block: outputs of this call may come. What earlier kernels, or this block, filled with the empty pattern is
 * performed before the shapes say so. */
static __device__ void permit_outputs(const ll_dispatch_t &p, const ll_entry_t &e)
{
    const ll_common_t &l = p.l;
    uint32_t ranks = (uint32_t)l.c.ranks, lane = threadIdx.x % 32;
    bool last = threadIdx.x / 32 == LL_INBAND_WARPS - 1, left = false, stop = false;
    if (last && p.recv) /* else it has told, and so fenced */
        fence_acq_rel_sys();
    if (threadIdx.x < ranks && e.left[threadIdx.x]) {
        left = true;
        stop = !left_behind(l, e.n, e.slot, (int)threadIdx.x, e.left[threadIdx.x]);
    }
    if (__syncthreads_or(stop))
        return;
    if (__syncthreads_or(left))
        refill_outputs(l, e.slot);
    for (uint32_t r = lane; last && r < ranks; r += 32)
        if (e.to[r] != LL_NOBODY)
            st_relaxed_sys_u64(ll_block(l, e.peer[r], e.slot, l.c.rank), ll_stamped(p.stamp_shape, e.n));
}

/* ---- entering ---- */

/*
 * A thread's look at what is kept for one rank in one slot. Which slot it is comes from memory too; so that all loads
 * are under way at once, there is a thread for every slot, and one of them finds that it has looked at the right one.
 */
typedef struct ll_look {
    uint64_t n;
    uint32_t slot, masked; /* of this call; */
    uint32_t r, looked_at; /* of this thread */
    uint64_t alarm, taken, spoilt, given_up, released;
    char *peer;
} ll_look_t;

/* A dispatch takes its number and slot when it sends; its other kernel finds them. */
EPX__DEVICE ll_look_t look(const ll_dispatch_t &p, bool ids, bool sends)
{
    const ll_common_t &l = p.l;
    uint32_t ranks = (uint32_t)l.c.ranks, at = threadIdx.x;
    ll_look_t k = {0, 0, 0, at, 0, 0, 0, 0, 0, 0, NULL};
    if (at >= l.slots * ranks)
        return k;
    for (; k.r >= ranks; k.r -= ranks)
        k.looked_at++;
    if (p.send) {
        k.n = ld_relaxed_sys_u64(&l.state->number);
        k.slot = *(volatile uint32_t *)&l.state->slot;
    } else {
        k.n = *(volatile uint64_t *)l.r.number;
        k.slot = (uint32_t)((volatile uint64_t *)l.r.number)[1];
    }
    k.masked = *(volatile uint32_t *)&l.masked[k.r];
    k.spoilt = *(volatile uint64_t *)&l.spoilt[at];
    k.peer = l.c.peers[k.r];
    if (k.r == 0)
        k.alarm = ld_relaxed_sys_u64(alarm_of(l.c, l.c.window));
    if (ids) {
        k.given_up = *(volatile uint64_t *)&l.owed[at];
        k.released = *(volatile uint64_t *)&l.unread[at];
    }
    if (ids || sends) /* last, for nothing after it is loaded until it has come */
        k.taken = ld_acquire_sys_u64(&ll_words(l, l.c.window, k.looked_at, (int)k.r)->taken);
    if (p.send) {
        k.n++;
        k.slot = k.slot + 1 == l.slots ? 0 : k.slot + 1;
    }
    return k;
}

/* The last block to have read them stores them for the next dispatch, and for this call's later kernels. One thread. */
EPX__DEVICE void advance(const ll_common_t &l, const ll_entry_t &e)
{
    if (atomicAdd(&l.state->arrived, 1) != gridDim.x - 1)
        return;
    *(volatile uint32_t *)&l.state->arrived = 0;
    *(volatile uint32_t *)&l.state->slot = e.slot;
    ((volatile uint64_t *)l.r.number)[0] = e.n;
    ((volatile uint64_t *)l.r.number)[1] = e.slot;
    st_relaxed_sys_u64(&l.state->number, e.n);
}

/* The whole block. False: stop. */
static __device__ bool enter(const ll_dispatch_t &p, ll_entry_t &e, const ll_look_t &k, bool ids, bool sends)
{
    const ll_common_t &l = p.l;
    bool stop = false;
    if (threadIdx.x < l.slots * (uint32_t)l.c.ranks && k.looked_at == k.slot) {
        e.peer[k.r] = k.peer;
        e.from[k.r] = k.masked ? LL_NOBODY : k.spoilt && k.spoilt < k.n ? LL_FLAGS : LL_INBAND;
        e.to[k.r] = LL_NOBODY;
        if ((ids || sends) && !k.masked)
            e.to[k.r] = ll_way_to(l, k.n, k.slot, (int)k.r, k.taken, &stop);
        if (ids) {
            e.left[k.r] = k.given_up > k.released ? k.given_up : k.released;
            l.r.asked[k.r] = e.to[k.r] != LL_NOBODY;
        }
        if (k.r == 0) {
            e.n = k.n;
            e.slot = k.slot;
            stop = (k.alarm && ht_stopped(l.c, k.n, false)) || stop;
        }
    } else if (ids && !p.recv && threadIdx.x / 32 == LL_INBAND_WARPS - 1) {
        ll_tell_inband(l); /* not after waiting for credit: peers may wait for just this */
    }
    return __syncthreads_or(stop) == 0;
}

/* ---- the kernel ---- */

template <bool fp8>
static __device__ void receive(const ll_dispatch_t &p, const ll_entry_t &e, const ll_ids_t &x, bool takes)
{
    const ll_common_t &l = p.l;
    uint32_t b = blockIdx.x;
    bool counts = b == p.book_block, lists = b == p.list_block, sums = b == p.sum_block, places = b == p.place_block;
    ll_taking_t first = {0, 0, 0, {0, 0}, 0};
    ll_pair_t home = {0, 0};
    if (lists || sums)
        home = home_of_pair(l, threadIdx.x);
    if (takes)
        first = first_taken(p);
    /* Before the books write l.taken: this warp comes to the barriers of make_ids after it has told. */
    if (counts && threadIdx.x / 32 == LL_INBAND_WARPS - 1)
        ll_tell_inband(l);
    if (!make_ids(p, e, x, counts ? l.wait_ns : NULL))
        return;
    if (lists)
        keep_list(p, false, home);
    if (sums)
        keep_list(p, true, home);
    if (places && !__syncthreads_and(keep_places(p, e)))
        return;
    if (counts && !keep_counts(p, e))
        return;
    if (takes)
        take_rows<fp8>(p, e, x, first);
}

template <bool fp8>
__global__ void __launch_bounds__(LL_INBAND_THREADS, 1) ll_inband_dispatch(const __grid_constant__ ll_dispatch_t p)
{
    __shared__ ll_entry_t e;
    await_kernel_before();
    if (p.l.c.ranks == 0) /* a first launch, so that the driver has made room for it */
        return;
    uint32_t b = blockIdx.x, warp = threadIdx.x / 32, bad = 0;
    uint32_t pieces = (p.l.hidden + LL_SEND_PIECE - 1) / LL_SEND_PIECE, units = 0;
    bool ids = b == p.ids_block, sends = p.send && b - p.send_first < p.send_blocks;
    bool takes = p.recv && b - p.recv_first < p.recv_blocks;
    bool books = p.recv && (b == p.book_block || b == p.list_block || b == p.sum_block || b == p.place_block);
    /* What does not need the number is loaded before it is waited for. */
    ll_piece_t piece = {};
    if (sends)
        units = ll_dealt(p.l.tokens, b - p.send_first, p.send_blocks) * pieces;
    if (warp < units)
        piece = load_piece<fp8>(p, warp, pieces);
    ll_look_t known = look(p, ids, sends);
    ll_ids_t x = ids_at(p);
    if (takes || books)
        for (uint32_t i = threadIdx.x; i < p.parts * p.words; i += LL_INBAND_THREADS)
            x.bits[i] = 0;
    ll_word_t word = {0, 0};
    if (ids) {
        uint32_t words = ll_id_words(p.l.c.layout.ll.tokens_max * p.l.topk);
        word = pack_word(p.l, threadIdx.x % words, &bad);
    }
    bool go_on = enter(p, e, known, ids, sends);
    if (go_on && ids)
        send_ids(p, e, word, bad);
    if (go_on && sends)
        send_rows<fp8>(p, e, piece, units);
    if (p.send && threadIdx.x == LL_INBAND_THREADS - 1) /* after what peers wait for */
        advance(p.l, e);
    if (!go_on)
        return;
    if (ids)
        permit_outputs(p, e);
    if (takes || books)
        receive<fp8>(p, e, x, takes);
}

extern "C" int epx__ll_launch_inband_dispatch(const ll_dispatch_t *p, uint32_t blocks, uint32_t shared_bytes,
                                              void *stream)
{
    return ll_launch(p->fp8 ? ll_inband_dispatch<true> : ll_inband_dispatch<false>, p, blocks, LL_INBAND_THREADS,
                     shared_bytes, stream);
}

extern "C" int epx__ll_awaits_kernel_before(void)
{
    cudaFuncAttributes a;
    return cudaFuncGetAttributes(&a, (const void *)ll_inband_dispatch<false>) == cudaSuccess && a.ptxVersion >= 90;
}

/* Load both kernels, and launch them once: their local memory is there before another kernel waits for a peer. */
extern "C" int epx__ll_load_inband_dispatch(void *stream)
{
    ll_dispatch_t nothing;
    memset(&nothing, 0, sizeof nothing);
    const void *kernels[] = {(const void *)ll_inband_dispatch<false>, (const void *)ll_inband_dispatch<true>};
    for (uint32_t fp8 = 0; fp8 < 2; fp8++) {
        cudaError_t error =
            cudaFuncSetAttribute(kernels[fp8], cudaFuncAttributeMaxDynamicSharedMemorySize, LL_SHARED_MOST);
        if (error != cudaSuccess)
            return (int)error;
        nothing.fp8 = fp8;
        int launched = epx__ll_launch_inband_dispatch(&nothing, 1, 0, stream);
        if (launched)
            return launched;
    }
    return 0;
}
