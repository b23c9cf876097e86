/*
 * combine: the owner of a token adds its rows, in rank order in fp32 from +0, then the biases, and rounds once.
 *
 * x in a lease is read in place: adding blocks load the rows of (token, chunk) from the peers' windows into a warp's
 * stage, one buffer a row, while the item before is added. x elsewhere is pushed by the first blocks (flow.cuh) into a
 * ring of the owner's reserve, which the owner publishes with its message; the owner's own rows are read where they
 * are. Weights go the same ways.
 *
 * A block that has pushed all it had adds too, once all blocks of its rank have begun: while one still waits for an SM,
 * with rows to push or tokens to add that are its own, nobody may keep one only to wait. Who adds the smallest token
 * under way waits for rows that need no room but what earlier tokens give back, so rings always empty.
 */
#include <cuda_runtime.h>

#include "algo/ht/cuda/combine_add.cuh"

/* ---- pushing ---- */

/* What the announcing warp needs of a flow: nothing of the owner's message, so it waits for nobody. All ranks cut their
 * rings alike, so rows in a ring and rows of a batch are mine as well as the owner's. */
__device__ void push_told(const ht_combine_t &p, int to, ht_flow_t *f)
{
    const ht_common_t &c = p.c;
    f->peer = to;
    f->rows = (uint32_t)p.h.matrix[(size_t)to * (uint32_t)c.ranks + (uint32_t)c.rank];
    f->batch = p.batch;
    f->publish = put_words(c, c.peers[to], c.rank);
    f->counts = c.produced + (size_t)to * HT_WORDS;
}
__device__ bool push_flow(const ht_combine_t &p, uint64_t n, int to, ht_flow_t *f)
{
    const ht_common_t &c = p.c;
    uint64_t words[WORDS];
    if (!ht_read_packets(c, n, to, words, WORDS))
        return false;
    char *ring = c.peers[to] + words[WORD_RING];
    push_told(p, to, f);
    f->gate = take_words(c, c.window, to);
    f->gate_lag = (uint32_t)p.ring_rows / p.batch;
    f->from_first = (uint64_t)(uint32_t)p.h.start[to];
    f->from_ring = 0;
    f->to_first = 0;
    f->to_ring = (uint32_t)p.ring_rows;
    f->x = p.x;
    f->x_to = ring;
    f->x_bytes = pushes_x(p) ? p.row_bytes : 0;
    f->x_stride = p.x_stride;
    f->x_to_stride = p.row_bytes;
    for (int i = 0; i < FLOW_PARTS; i++)
        f->part[i].bytes = 0;
    f->part[0].from = (const char *)p.weights;
    f->part[0].to = ring + p.ring_weights;
    f->part[0].bytes = pushes_weights(p) ? (uint64_t)p.topk * 4 : 0;
    return true;
}

/* ---- the half ---- */

EPX__DEVICE bool any_credit(const ht_combine_t &p, const ht_source_t *sources)
{
    bool credit = false;
    for (int r = (int)threadIdx.x % 32; r < p.c.ranks; r += 32)
        credit = credit || (r != p.c.rank && wants_credit(p, sources[r]));
    return __any_sync(0xffffffffu, credit) != 0;
}

template <int dtype>
EPX__DEVICE void add_block(const ht_combine_t &p, ht_block_t *b, char *shared)
{
    ht_source_t *sources = (ht_source_t *)(shared + p.cut.table_offset);
    uint32_t blocks = gridDim.x - p.push_blocks, warp = threadIdx.x / 32, announcer = p.threads / 32 - 1;
    ht_adder_t x = {sources, b, UINT32_MAX, blocks * p.cut.warps, 0, false};
    if (blockIdx.x >= p.push_blocks)
        x.own = warp * blocks + blockIdx.x - p.push_blocks;
    bool bulk = EPX__BULK && p.slots_bulk, ok = true;
    ht_loader_t l = {};
    if (bulk && warp < p.cut.warps)
        l = loader_first(p, x);
    for (int r = (int)threadIdx.x; r < p.c.ranks && ok; r += (int)blockDim.x)
        ok = read_source(p, b->n, r, &sources[r]);
    fence_proxy_async(); /* where rows are was published by ordinary stores */
    if (!__syncthreads_and(ok))
        return;
    x.credit = any_credit(p, sources);
    if (warp == announcer && x.credit) {
        ht_added_t added = {&p, sources};
        announce<ht_added_t, count_token_at<ht_added_t, added_at>, publish_token_at<ht_added_t, added_at>>(added, b,
                                                                                                           p.cut.warps);
    }
    if (warp >= p.cut.warps)
        return;
    if (bulk) {
        ht_stages_t s = stages_init(p.cut, shared);
        add_tokens<dtype>(p, x, s, l);
    } else {
        add_tokens_plain<dtype>(p, x);
    }
    tell_ended(b);
}

/* False: it adds nothing. */
EPX__DEVICE bool push_block(const ht_combine_t &p, ht_block_t *b, char *shared)
{
    uint32_t warp = threadIdx.x / 32, announcer = p.threads / 32 - 1;
    bool ok = true;
    if (warp < announcer) {
        ht_stages_t none = {};
        ok = flows_run<ht_combine_t, push_flow, false>(p, none, b, warp * p.push_blocks + blockIdx.x,
                                                       p.push_blocks * announcer, (uint32_t *)shared);
        tell_ended(b);
    } else {
        flows_announce<ht_combine_t, push_told>(p, announcer, b, blockIdx.x, p.push_blocks);
    }
    if (threadIdx.x == 0)
        ok = ok && add_relaxed_gpu_u32(&p.c.state->begun, 0) == gridDim.x;
    ok = __syncthreads_and(ok) != 0;
    ht_block_start(b);
    __syncthreads();
    return ok;
}

template <int dtype>
__global__ void __launch_bounds__(HT_WARPS_MAX * 32 + 32, 1) ht_combine_kernel(const __grid_constant__ ht_combine_t p)
{
    extern __shared__ __align__(128) char shared[];
    __shared__ ht_block_t b;
    ht_lead_t lead = {};
    if (!ht_enter_led(p.c, &b, &lead))
        return;
    if (p.push_blocks && threadIdx.x == 0)
        add_relaxed_gpu_u32(&p.c.state->begun, 1);
    if (blockIdx.x == 0)
        publish_x(p, b.n, lead);
    if (blockIdx.x >= p.push_blocks || push_block(p, &b, shared))
        add_block<dtype>(p, &b, shared);
    bulk_wait_done();
    fence_proxy_async();
    if (!ht_count_block(p.c, &b, true))
        return;
    /* The owners of my rows have read them: x may be overwritten. */
    ht_leave(p.c, &b, b.stop == 0 && ht_wait_ends(p.c, &b));
}

static const void *combine_kernel(int dtype)
{
    if (dtype == EPX_FP32)
        return (const void *)ht_combine_kernel<EPX_FP32>;
    return dtype == EPX_FP16 ? (const void *)ht_combine_kernel<EPX_FP16> : (const void *)ht_combine_kernel<EPX_BF16>;
}

extern "C" int epx__ht_launch_combine(const ht_combine_t *p, uint32_t blocks, void *stream)
{
    ht_combine_t params = *p;
    void *arguments[] = {&params};
    return (int)cudaLaunchKernel(combine_kernel(p->dtype), dim3(blocks), dim3(p->threads), arguments,
                                 p->cut.total_bytes, (cudaStream_t)stream);
}

extern "C" int epx__ht_load_combine(uint32_t shared_bytes, void *stream)
{
    for (int dtype = EPX_BF16; dtype <= EPX_FP32; dtype++) {
        ht_combine_t p = {};
        p.dtype = dtype;
        p.threads = 32;
        p.cut.total_bytes = shared_bytes;
        cudaError_t error =
            cudaFuncSetAttribute(combine_kernel(dtype), cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
        int launched = error == cudaSuccess ? epx__ht_launch_combine(&p, 1, stream) : (int)error;
        if (launched != 0)
            return launched;
    }
    return 0;
}
