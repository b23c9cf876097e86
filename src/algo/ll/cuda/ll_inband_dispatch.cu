/*
 * Low-latency dispatch with in-band arrival (docs/PROTOCOL-LL.md). Roles, each done by blocks of its own where there
 * are enough of them (ll_roles_of):
 *
 *   ids      all my tokens' ids (and weights) to every rank                                  ll_inband_send.cuh
 *   send     rows to the ranks that want them, one piece of 512 elements a warp              ll_inband_send.cuh
 *   take     rows as they come, one piece of 1024 elements a warp, to their experts' rows    ll_inband_take.cuh
 *   books    counts | lists | places: three blocks                                           ll_inband_books.cuh
 *
 * The chain that matters: number and credit, while the first piece is loaded; ids there; every block that takes works
 * out the positions by itself; words there; out.
 */
#include <cuda_runtime.h>
#include <string.h>

#include "algo/ll/cuda/ll_inband_books.cuh"
#include "algo/ll/cuda/ll_inband_send.cuh"
#include "algo/ll/cuda/ll_inband_take.cuh"

/* ---- the slot's last call ---- */

/*
 * One thread a rank, in the block that sends the ids, which permit outputs into `back`. That rank may have written
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
    fence_acq_rel_sys();
    __syncthreads();
}

/* ---- entering ---- */

/* One thread: this call's number and slot. A dispatch takes them when it sends; its other kernel finds them. */
EPX__DEVICE uint64_t number_of(const ll_dispatch_t &p, uint32_t *slot)
{
    const ll_common_t &l = p.l;
    if (!p.send) {
        *slot = (uint32_t)((volatile uint64_t *)l.r.number)[1];
        return *(volatile uint64_t *)l.r.number;
    }
    uint32_t last = *(volatile uint32_t *)&l.state->slot;
    *slot = last + 1 == l.slots ? 0 : last + 1;
    return ld_relaxed_sys_u64(&l.state->number) + 1;
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

/* The whole block, one thread a rank. False: stop. */
static __device__ bool enter(const ll_dispatch_t &p, ll_entry_t &e, bool ids, bool sends)
{
    const ll_common_t &l = p.l;
    int r = (int)threadIdx.x;
    bool stop = false, left = false;
    if (r < l.c.ranks) {
        uint32_t slot, masked = *(volatile uint32_t *)&l.masked[r];
        /* All loads before the first wait for one: each is a way to memory and back. */
        uint64_t alarm = r ? 0 : ld_relaxed_sys_u64(alarm_of(l.c, l.c.window)), n = number_of(p, &slot);
        uint32_t at = slot * (uint32_t)l.c.ranks + (uint32_t)r;
        uint64_t spoilt = *(volatile uint64_t *)&l.spoilt[at], given_up = 0, released = 0;
        if (ids) {
            given_up = *(volatile uint64_t *)&l.owed[at];
            released = *(volatile uint64_t *)&l.unread[at];
        }
        e.peer[r] = l.c.peers[r];
        e.from[r] = masked ? LL_NOBODY : spoilt && spoilt < n ? LL_FLAGS : LL_INBAND;
        e.to[r] = LL_NOBODY;
        if ((ids || sends) && !masked)
            e.to[r] = ll_way_to(l, n, slot, r, &stop);
        if (ids) {
            left = given_up || released;
            if (left && !left_behind(l, n, slot, r, given_up > released ? given_up : released))
                stop = true;
            l.r.asked[r] = e.to[r] != LL_NOBODY;
        }
        if (r == 0) {
            e.n = n;
            e.slot = slot;
            stop = (alarm && ht_stopped(l.c, n, false)) || stop;
        }
    } else if (ids && threadIdx.x / 32 == LL_INBAND_WARPS - 1) {
        /* What earlier kernels filled with the empty pattern comes before the ids that permit writing there. */
        if (p.recv)
            fence_acq_rel_sys();
        else
            ll_tell_inband(l); /* not after waiting for credit: peers may wait for just this */
    }
    stop = __syncthreads_or(stop) != 0;
    if (p.send && threadIdx.x == 0)
        advance(l, e);
    if (ids && __syncthreads_or(left) && !stop)
        refill_outputs(l, e.slot);
    return !stop;
}

/* ---- the kernel ---- */

template <bool fp8>
static __device__ void receive(const ll_dispatch_t &p, const ll_entry_t &e, const ll_ids_t &x, bool takes)
{
    const ll_common_t &l = p.l;
    uint32_t b = blockIdx.x;
    bool counts = b == p.book_block, lists = b == p.list_block, places = b == p.place_block;
    /* Before the books write l.taken: this warp comes to the barriers of make_ids after it has told. */
    if (counts && threadIdx.x / 32 == LL_INBAND_WARPS - 1)
        ll_tell_inband(l);
    if (!make_ids(p, e, x, counts ? l.wait_ns : NULL))
        return;
    if (counts || lists || places)
        count_before(p, x);
    if (lists)
        keep_lists(p);
    if (places && !__syncthreads_and(keep_places(p, e)))
        return;
    if (counts && !keep_counts(p, e))
        return;
    if (takes)
        take_rows<fp8>(p, e, x);
}

template <bool fp8>
__global__ void __launch_bounds__(LL_INBAND_THREADS, 1) ll_inband_dispatch(const __grid_constant__ ll_dispatch_t p)
{
    __shared__ ll_entry_t e;
    if (p.l.c.ranks == 0) /* a first launch, so that the driver has made room for it */
        return;
    uint32_t b = blockIdx.x, warp = threadIdx.x / 32, bad = 0;
    uint32_t pieces = (p.l.hidden + LL_SEND_PIECE - 1) / LL_SEND_PIECE, units = 0;
    bool ids = b == p.ids_block, sends = p.send && b - p.send_first < p.send_blocks;
    bool takes = p.recv && b - p.recv_first < p.recv_blocks;
    bool books = p.recv && (b == p.book_block || b == p.list_block || b == p.place_block);
    /* What does not need the number is loaded meanwhile. */
    ll_ids_t x = ids_at(p);
    if (takes || books)
        for (uint32_t i = threadIdx.x; i < p.parts * p.words; i += LL_INBAND_THREADS)
            x.bits[i] = 0;
    ll_piece_t piece = {};
    if (sends)
        units = ll_dealt(p.l.tokens, b - p.send_first, p.send_blocks) * pieces;
    if (warp < units)
        piece = load_piece<fp8>(p, warp, pieces);
    ll_word_t word = {0, 0};
    if (ids) {
        uint32_t words = ll_id_words(p.l.c.layout.ll.tokens_max * p.l.topk);
        word = pack_word(p.l, threadIdx.x % words, &bad);
    }
    if (!enter(p, e, ids, sends))
        return;
    if (ids)
        send_ids(p, e, word, bad);
    if (sends)
        send_rows<fp8>(p, e, piece, units);
    if (takes || books)
        receive<fp8>(p, e, x, takes);
}

extern "C" int epx__ll_launch_inband_dispatch(const ll_dispatch_t *p, uint32_t blocks, uint32_t shared_bytes,
                                              void *stream)
{
    if (p->fp8)
        ll_inband_dispatch<true><<<blocks, LL_INBAND_THREADS, shared_bytes, (cudaStream_t)stream>>>(*p);
    else
        ll_inband_dispatch<false><<<blocks, LL_INBAND_THREADS, shared_bytes, (cudaStream_t)stream>>>(*p);
    return (int)cudaGetLastError();
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
