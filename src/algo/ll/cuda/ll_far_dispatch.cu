/*
 * Low-latency dispatch between domains: `send` and `take` (ll_far.cuh). A record is what the CPU puts: the block, ids
 * and weights, and right behind them the rows that its receiver wants, in token order, without gaps (plan/ll.h). In the
 * receiver's window it becomes what a near rank would have stored there: stamped ids and weights, rows at the places of
 * their tokens, flags. The kernels of the domain, which come next in the stream, see no difference.
 */
#include <cuda_runtime.h>
#include <string.h>

#include "algo/ll/cuda/ll_far.cuh"

EPX__DEVICE int32_t far_rank_of(const ll_common_t &l, size_t pair)
{
    int64_t id = ll_id(l, pair);
    return id < 0 ? -1 : epx__expert_rank(&l.map, id);
}

/* ---- send ---- */

/* One thread, one token: outputs for it that come from ranks below `rank`: by choice, and by rank. */
EPX__DEVICE void count_below(const ll_common_t &l, uint32_t t, int32_t rank, uint32_t *each, uint32_t *by_rank)
{
    for (uint32_t k = 0; k < l.topk; k++) {
        int32_t r = far_rank_of(l, (size_t)t * l.topk + k);
        if (r < 0 || r >= rank)
            continue;
        bool again = false;
        for (uint32_t j = 0; j < k; j++)
            again = again || far_rank_of(l, (size_t)t * l.topk + j) == r;
        ++*each;
        *by_rank += !again;
    }
}

/* The block: where the ranks' outputs for my tokens begin in my `back`: the ranks one after the other. */
static __device__ void write_head(const ll_far_dispatch_t &p, ll_far_head_t &h, char *record, int32_t rank)
{
    const ll_common_t &l = p.d.l;
    uint32_t each = 0, by_rank = 0, all_each, all_by_rank;
    for (uint32_t t = threadIdx.x; t < l.tokens; t += LL_FAR_THREADS)
        count_below(l, t, rank, &each, &by_rank);
    scan_block<LL_FAR_WARPS>(each, h.sums, &all_each);
    scan_block<LL_FAR_WARPS>(by_rank, h.sums, &all_by_rank);
    if (threadIdx.x != 0)
        return;
    l.r.first[rank] = all_each;
    l.r.first[l.c.ranks + rank] = all_by_rank;
    epx__ll_block_t block = {};
    block.number = h.n;
    block.shape = p.d.stamp_shape;
    block.tokens = l.tokens;
    block.weights = p.d.topk_weights != NULL;
    block.back_each = all_each;
    block.back_by_rank = all_by_rank;
    *(epx__ll_block_t *)record = block;
}

/* The block: ids and weights of all my tokens. */
EPX__DEVICE void write_ids(const ll_far_dispatch_t &p, char *record)
{
    const ll_common_t &l = p.d.l;
    uint32_t pairs = l.tokens * l.topk;
    int32_t *ids = (int32_t *)(record + sizeof(epx__ll_block_t));
    float *weights = (float *)(ids + pairs);
    for (uint32_t i = threadIdx.x; i < pairs; i += LL_FAR_THREADS) {
        ids[i] = (int32_t)ll_id(l, i);
        if (p.d.topk_weights)
            weights[i] = p.d.topk_weights[i];
    }
}

template <bool fp8>
EPX__DEVICE void stage_row(const ll_far_dispatch_t &p, uint32_t token, char *row)
{
    for (uint32_t at = 0; at < p.d.l.hidden; at += 512) {
        uint4 a, b;
        float scale = 0.0f;
        load_piece<fp8>(p.d, token, at, &a, &b);
        if (fp8)
            a = quantise16(a, b, p.d.round_scale || p.d.ue8m0, &scale);
        store_piece<fp8>(row, p.d.l.hidden, at, a, b, scale);
    }
}

/* The block: its part of the record's rows. Returns how many rows all of it has. */
template <bool fp8>
static __device__ uint32_t stage_rows(const ll_far_dispatch_t &p, ll_far_head_t &h, char *record, int32_t rank)
{
    const ll_common_t &l = p.d.l;
    char *first = record + epx__ll_record_rows(l.tokens, l.topk, p.d.topk_weights != NULL);
    uint32_t rows = 0, total;
    for (uint32_t tile = 0; tile < l.tokens; tile += LL_FAR_THREADS, rows += total) {
        uint32_t t = tile + threadIdx.x;
        bool wants = false;
        for (uint32_t k = 0; t < l.tokens && k < l.topk; k++)
            wants = wants || far_rank_of(l, (size_t)t * l.topk + k) == rank;
        uint32_t at = rows + scan_block<LL_FAR_WARPS>(wants, h.sums, &total);
        h.index[threadIdx.x] = wants && at % p.parts == h.part ? at : FAR_NO_ROW;
        __syncthreads();
        for (uint32_t i = threadIdx.x / 32; i < LL_FAR_THREADS; i += LL_FAR_WARPS)
            if (h.index[i] != FAR_NO_ROW)
                stage_row<fp8>(p, tile + i, first + (size_t)h.index[i] * p.stride);
        __syncthreads();
    }
    return rows;
}

template <bool fp8>
__global__ void __launch_bounds__(LL_FAR_THREADS, 1) ll_far_send_kernel(const __grid_constant__ ll_far_dispatch_t p)
{
    __shared__ ll_far_head_t h;
    const ll_common_t &l = p.d.l;
    if (l.c.ranks == 0) /* a first launch, so that the driver has made room for it */
        return;
    uint64_t ids = epx__ll_record_rows(l.tokens, l.topk, p.d.topk_weights != NULL);
    /* The number is taken by the domain's send, which comes next. */
    if (!far_enter(l, h, FAR_SEND, ld_relaxed_sys_u64(&l.state->number) + 1, p.parts,
                   ids + (uint64_t)l.tokens * p.stride) ||
        !far_settle(l, h))
        return;
    while (far_turn(l, h)) {
        int rank = l.far.rank_of[h.place];
        char *record = l.far.out + far_out_at(l, h.slot, h.place);
        uint32_t rows = 0;
        if (h.what == FAR_YES) {
            if (h.part == 0) {
                write_head(p, h, record, rank);
                write_ids(p, record);
            }
            rows = stage_rows<fp8>(p, h, record, rank);
        }
        if (!far_last(l, h, p.parts))
            continue;
        bool good = true;
        /* To one that has gone it counts as sent: who waits for its outputs says so. */
        *(volatile uint32_t *)&l.r.asked[rank] = h.what != FAR_GIVEN_UP && !*(volatile uint32_t *)&l.masked[rank];
        if (h.what == FAR_YES) {
            good = far_put(l, h, h.place, epx__ll_block_at(&l.c.layout.ll, h.slot, (uint32_t)l.c.rank),
                           ids + (uint64_t)rows * p.stride);
            far_want(l, h, h.place, LL_DISPATCHED);
        }
        if (!good || !far_tell(l, h, h.place))
            h.stop = 1;
    }
}

/* ---- take ---- */

/* Thread 0: the record's head, and is it that of this call, with the shape that this rank has? False: stop. */
static __device__ bool read_head(const ll_far_dispatch_t &p, ll_far_head_t &h, const char *record)
{
    const ll_common_t &l = p.d.l;
    const epx__ll_block_t *from = (const epx__ll_block_t *)record;
    int rank = l.far.rank_of[h.place];
    h.block.number = ld_relaxed_sys_u64(&from->number);
    h.block.shape = ld_relaxed_sys_u64(&from->shape);
    h.block.tokens = ld_relaxed_sys_u32(&from->tokens);
    h.block.weights = ld_relaxed_sys_u32(&from->weights);
    l.r.first_there[rank] = ld_relaxed_sys_u32(&from->back_each);
    l.r.first_there[l.c.ranks + rank] = ld_relaxed_sys_u32(&from->back_by_rank);
    if (h.block.number == h.n && h.block.shape == p.d.stamp_shape && h.block.tokens <= l.c.layout.ll.tokens_max)
        return true;
    return far_fail(l, h, h.place, EPX_E_MISMATCH, HT_STAGE_SHAPE, p.d.stamp_shape, h.block.shape);
}

/* The block: ids of all tokens as words; the same from all parts, which read back their own. Part 0: weights, shape. */
static __device__ void take_ids(const ll_far_dispatch_t &p, ll_far_head_t &h, const char *record, int rank)
{
    const ll_common_t &l = p.d.l;
    uint32_t pairs = l.c.layout.ll.tokens_max * l.topk, there = h.block.tokens * l.topk;
    const uint32_t *ids = (const uint32_t *)(record + sizeof(epx__ll_block_t)), *weights = ids + there;
    uint64_t *to = ll_ids(l, l.c.window, h.slot, rank), *weights_to = ll_weights(l, l.c.window, h.slot, rank);
    for (uint32_t i = threadIdx.x; i < pairs; i += LL_FAR_THREADS)
        *(volatile uint64_t *)&to[i] = ll_stamped(i < there ? ld_relaxed_sys_u32(&ids[i]) : 0xffffffffu, h.n);
    if (h.part != 0)
        return;
    for (uint32_t i = threadIdx.x; h.block.weights && i < there; i += LL_FAR_THREADS)
        weights_to[i] = ll_stamped(ld_relaxed_sys_u32(&weights[i]), h.n);
    if (threadIdx.x == 0)
        *ll_block(l, l.c.window, h.slot, rank) = ll_stamped((uint32_t)h.block.shape, h.n);
}

EPX__DEVICE bool comes_here(const ll_common_t &l, const uint64_t *ids, uint32_t t)
{
    for (uint32_t k = 0; k < l.topk; k++) {
        int32_t id = (int32_t)(uint32_t)((const volatile uint64_t *)ids)[(size_t)t * l.topk + k];
        if (id >= 0 && id < (int32_t)l.map.experts && epx__expert_rank(&l.map, id) == l.c.rank)
            return true;
    }
    return false;
}

/* The block: its part of the record's rows, each to the place of its token, and its flag. */
static __device__ void take_rows(const ll_far_dispatch_t &p, ll_far_head_t &h, const char *record, int rank)
{
    const ll_common_t &l = p.d.l;
    const uint64_t *ids = ll_ids(l, l.c.window, h.slot, rank);
    const char *first = record + epx__ll_record_rows(h.block.tokens, l.topk, h.block.weights != 0);
    uint32_t rows = 0, total;
    for (uint32_t tile = 0; tile < h.block.tokens; tile += LL_FAR_THREADS, rows += total) {
        uint32_t t = tile + threadIdx.x;
        bool here = t < h.block.tokens && comes_here(l, ids, t);
        uint32_t at = rows + scan_block<LL_FAR_WARPS>(here, h.sums, &total);
        h.index[threadIdx.x] = here && at % p.parts == h.part ? at : FAR_NO_ROW;
        __syncthreads();
        for (uint32_t i = threadIdx.x / 32; i < LL_FAR_THREADS; i += LL_FAR_WARPS) {
            if (h.index[i] == FAR_NO_ROW)
                continue;
            uint32_t token = tile + i, s = (uint32_t)rank;
            copy_16(l.c.window + epx__ll_row_at(&l.c.layout.ll, h.slot, s, token),
                    first + (size_t)h.index[i] * p.stride, p.stride);
            if (threadIdx.x % 32 == 0) /* read by a later kernel: no order is needed */
                *(uint64_t *)(l.c.window + epx__ll_row_flag_at(&l.c.layout.ll, h.slot, s, token)) = h.n;
        }
        __syncthreads();
    }
}

__global__ void __launch_bounds__(LL_FAR_THREADS, 1) ll_far_take_kernel(const __grid_constant__ ll_far_dispatch_t p)
{
    __shared__ ll_far_head_t h;
    const ll_common_t &l = p.d.l;
    if (l.c.ranks == 0)
        return;
    if (!far_enter(l, h, FAR_TAKE, *(volatile uint64_t *)l.r.number, p.parts, 0))
        return;
    while (far_turn(l, h)) {
        int rank = l.far.rank_of[h.place];
        const char *record = far_staging(l, epx__ll_block_at(&l.c.layout.ll, h.slot, (uint32_t)rank));
        if (h.what == FAR_YES) {
            if (threadIdx.x == 0 && !read_head(p, h, record))
                h.stop = 1;
            if (threadIdx.x == 0 && h.part == 0 && l.wait_ns)
                l.wait_ns[rank] += (int64_t)(globaltimer_ns() - h.start);
            __syncthreads();
            if (h.stop)
                return;
            take_ids(p, h, record, rank);
            __syncthreads();
            take_rows(p, h, record, rank);
        }
        if (!far_last(l, h, p.parts))
            continue;
        far_want(l, h, h.place, LL_TAKEN); /* masked ranks hear it too: they may send on, nobody looks */
        if (!far_tell(l, h, h.place))
            h.stop = 1;
    }
}

/* ---- trying the channels: see algo/ht/cuda/rail.cu ---- */

__global__ void ll_far_try_kernel(const __grid_constant__ ll_far_try_t p)
{
    for (uint32_t i = threadIdx.x; i < p.far.count; i += blockDim.x) {
        const epx_port_channel_t *channel = &p.far.channels[i];
        epx_status_t status =
            epx_port_atomic_add(channel, p.memory, p.barrier_offset + (uint64_t)(uint32_t)p.rank * 64, 1);
        if (status == EPX_OK)
            status = epx_port_wait_word(channel, p.barrier + (uint64_t)(uint32_t)channel->peer * 8, 1);
        if (status == EPX_OK)
            continue;
        *(volatile int32_t *)p.peer = channel->peer;
        *(volatile int32_t *)p.status = (int32_t)status;
    }
}

extern "C" int epx__ll_launch_far_try(const ll_far_try_t *p, void *stream)
{
    ll_far_try_kernel<<<1, 64, 0, (cudaStream_t)stream>>>(*p);
    return (int)cudaGetLastError();
}

/* ---- launching ---- */

extern "C" int epx__ll_launch_far_send(const ll_far_dispatch_t *p, uint32_t blocks, void *stream)
{
    if (p->d.fp8)
        ll_far_send_kernel<true><<<blocks, LL_FAR_THREADS, 0, (cudaStream_t)stream>>>(*p);
    else
        ll_far_send_kernel<false><<<blocks, LL_FAR_THREADS, 0, (cudaStream_t)stream>>>(*p);
    return (int)cudaGetLastError();
}

extern "C" int epx__ll_launch_far_take(const ll_far_dispatch_t *p, uint32_t blocks, void *stream)
{
    ll_far_take_kernel<<<blocks, LL_FAR_THREADS, 0, (cudaStream_t)stream>>>(*p);
    return (int)cudaGetLastError();
}

extern "C" int epx__ll_load_far_dispatch(void *stream)
{
    ll_far_dispatch_t nothing;
    ll_far_try_t no_try;
    memset(&nothing, 0, sizeof nothing);
    memset(&no_try, 0, sizeof no_try);
    int error = epx__ll_launch_far_send(&nothing, 1, stream);
    nothing.d.fp8 = 1;
    error = error ? error : epx__ll_launch_far_send(&nothing, 1, stream);
    error = error ? error : epx__ll_launch_far_take(&nothing, 1, stream);
    return error ? error : epx__ll_launch_far_try(&no_try, stream);
}
