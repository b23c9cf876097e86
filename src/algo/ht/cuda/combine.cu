/*
 * combine: the owner of a token adds its rows, in rank order in fp32 from +0, then the biases, and rounds once.
 *
 * x in a lease is read in place: adding blocks load the rows of (token, chunk) from the peers' windows into a warp's
 * stage, one buffer a row, while the item before is added. x elsewhere is pushed by other blocks (flow.cuh) into a ring
 * of the owner's reserve, which the owner publishes with its message; the owner's own rows are read where they are.
 * Weights go the same ways.
 *
 * A warp that waits for a pushed row has added and counted all rows of its earlier items, so rings always empty.
 */
#include <cuda_runtime.h>

#include "algo/ht/cuda/flow.cuh"

/* Where the rows of one rank are read. ring 0: by row; else by position among my rows there, modulo the ring. */
typedef struct ht_source {
    const char *x;
    uint64_t x_stride;
    const float *weights;
    uint32_t x_ring, w_ring;
    uint32_t first, rows;
} ht_source_t;
static_assert(sizeof(ht_source_t) == HT_SOURCE_BYTES, "the host sizes the table");

/* Lane's row of one item. */
typedef struct ht_pick {
    int32_t rank, row; /* -1: none */
} ht_pick_t;

EPX__DEVICE bool pushes_x(const ht_combine_t &p)
{
    return p.x_offset == 0;
}
EPX__DEVICE bool pushes_weights(const ht_combine_t &p)
{
    return p.weights && p.weights_offset == 0;
}
EPX__DEVICE uint64_t ring_of(const ht_combine_t &p, int peer)
{
    return p.ring_offset + p.ring_bytes * (uint64_t)(peer < p.c.rank ? peer : peer - 1);
}

EPX__DEVICE bool publish_x(const ht_combine_t &p, uint64_t n)
{
    const ht_common_t &c = p.c;
    for (int r = (int)threadIdx.x; r < c.ranks; r += (int)blockDim.x) {
        if (r == c.rank)
            continue;
        epx__message_t *m = ht_slot(c, n, r);
        if (!m)
            return false;
        m->x = p.x_offset;
        m->x_stride = p.x_stride;
        m->weights = p.weights_offset;
        m->ring = ring_of(p, r);
        m->ring_rows = p.ring_rows;
        m->spare[0] = p.batch;
        st_release_sys_u64(&m->sequence, n);
    }
    return true;
}

EPX__DEVICE bool read_source(const ht_combine_t &p, uint64_t n, int r, ht_source_t *s)
{
    const ht_common_t &c = p.c;
    s->first = (uint32_t)p.h.first[r];
    s->rows = (uint32_t)p.h.matrix[(size_t)c.rank * (uint32_t)c.ranks + (uint32_t)r];
    s->x_ring = s->w_ring = 0;
    if (r == c.rank) {
        s->x = p.x;
        s->x_stride = p.x_stride;
        s->weights = p.weights;
        return true;
    }
    const epx__message_t *m = ht_message(c, n, r);
    if (!m)
        return false;
    uint64_t x = ld_relaxed_sys_u64(&m->x), weights = ld_relaxed_sys_u64(&m->weights);
    char *ring = c.window + ring_of(p, r);
    s->x = x ? c.peers[r] + x : ring;
    s->x_stride = x ? ld_relaxed_sys_u64(&m->x_stride) : p.row_bytes;
    s->x_ring = x ? 0 : (uint32_t)p.ring_rows;
    s->weights = (const float *)(weights ? c.peers[r] + weights : ring + p.ring_weights);
    s->w_ring = p.weights && !weights ? (uint32_t)p.ring_rows : 0;
    return true;
}

/* ---- pushing ---- */

__device__ bool push_flow(const ht_combine_t &p, uint64_t n, int to, ht_flow_t *f)
{
    const ht_common_t &c = p.c;
    int ok = 1;
    if (threadIdx.x % 32 == 0)
        ok = ht_message(c, n, to) != NULL;
    if (!__shfl_sync(0xffffffffu, ok, 0))
        return false;
    const epx__message_t *m = mail_at(c, c.window, to, n);
    char *ring = c.peers[to] + ld_relaxed_sys_u64(&m->ring);
    uint32_t rows = (uint32_t)ld_relaxed_sys_u64(&m->ring_rows);
    f->peer = to;
    f->rows = (uint32_t)p.h.matrix[(size_t)to * (uint32_t)c.ranks + (uint32_t)c.rank];
    f->batch = (uint32_t)ld_relaxed_sys_u64(&m->spare[0]);
    f->gate = take_words(c, c.window, to);
    f->gate_lag = rows / f->batch;
    f->publish = put_words(c, c.peers[to], c.rank);
    f->counts = c.produced + (size_t)to * HT_WORDS;
    f->from_first = (uint64_t)(uint32_t)p.h.start[to];
    f->from_ring = 0;
    f->to_first = 0;
    f->to_ring = rows;
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

/* ---- adding ---- */

EPX__DEVICE ht_pick_t pick_at(const ht_combine_t &p, uint64_t item, uint32_t slot)
{
    ht_pick_t k = {-1, -1};
    size_t i = (size_t)(item / p.cut.chunks) * p.h.slots + slot;
    if (slot < p.h.slots) {
        k.rank = __ldg(&p.h.dst_rank[i]);
        k.row = __ldg(&p.h.dst_row[i]);
    }
    return k;
}
EPX__DEVICE const char *x_row(const ht_source_t &s, int32_t row)
{
    uint64_t at = s.x_ring ? ((uint32_t)row - s.first) % s.x_ring : (uint64_t)(uint32_t)row;
    return s.x + at * s.x_stride;
}
EPX__DEVICE const float *w_row(const ht_source_t &s, int32_t row, uint32_t topk)
{
    uint64_t at = s.w_ring ? ((uint32_t)row - s.first) % s.w_ring : (uint64_t)(uint32_t)row;
    return s.weights + at * topk;
}
EPX__DEVICE uint32_t chunk_of(const ht_combine_t &p, uint64_t item, uint64_t *at)
{
    *at = item % p.cut.chunks * p.cut.chunk_bytes;
    return p.row_bytes - *at < p.cut.chunk_bytes ? (uint32_t)(p.row_bytes - *at) : p.cut.chunk_bytes;
}

/* Lane: has its row come? Rows in place have. */
EPX__DEVICE bool row_ready(const ht_combine_t &p, const ht_source_t *sources, uint64_t n, ht_pick_t k, bool wait)
{
    if (k.rank < 0 || (sources[k.rank].x_ring == 0 && sources[k.rank].w_ring == 0))
        return true;
    uint32_t b = ((uint32_t)k.row - sources[k.rank].first) / p.batch;
    const uint64_t *word = put_words(p.c, p.c.window, k.rank) + b % HT_WORDS;
    uint64_t want = batch_word(n, b);
    return wait ? ht_wait(p.c, n, word, want, k.rank, HT_STAGE_ARRIVAL) : ld_acquire_sys_u64(word) >= want;
}

/* Lane: its pushed row's chunk has been read. */
EPX__DEVICE void row_read(const ht_combine_t &p, const ht_source_t *sources, uint64_t n, ht_pick_t k)
{
    if (k.rank < 0 || k.rank == p.c.rank)
        return;
    const ht_source_t &s = sources[k.rank];
    if ((s.x_ring == 0 && s.w_ring == 0) || s.rows <= p.ring_rows)
        return; /* it fits as a whole: nobody waits for room */
    uint32_t b = ((uint32_t)k.row - s.first) / p.batch;
    count_batch(p.c.consumed + (size_t)k.rank * HT_WORDS, take_words(p.c, p.c.peers[k.rank], p.c.rank), n, b,
                batch_total(s.rows, p.batch, b, p.cut.chunks));
}

/* Warp: start loading the item's rows, lane j's into buffer j of stage i. */
EPX__DEVICE void pull_item(const ht_combine_t &p, const ht_source_t *sources, const ht_stages_t &s, uint32_t i,
                           uint64_t item, ht_pick_t k)
{
    uint64_t at;
    uint32_t bytes = chunk_of(p, item, &at), rows = (uint32_t)__popc(__ballot_sync(0xffffffffu, k.rank >= 0));
    if (threadIdx.x % 32 == 0)
        mbarrier_expect_bytes(&s.bars[i], rows * bytes);
    __syncwarp();
    if (k.rank >= 0) {
        fence_proxy_async(); /* announced by words, read by the engine */
        bulk_load(stage_at(s, i) + threadIdx.x % 32 * p.cut.chunk_bytes, x_row(sources[k.rank], k.row) + at, bytes,
                  &s.bars[i]);
    }
}

template <int dtype>
EPX__DEVICE void add_16(float *sum, uint4 v)
{
    uint32_t u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (dtype == EPX_FP32) {
            sum[i] = __fadd_rn(sum[i], __uint_as_float(u[i]));
        } else if (dtype == EPX_BF16) {
            sum[2 * i] = __fadd_rn(sum[2 * i], __uint_as_float(u[i] << 16));
            sum[2 * i + 1] = __fadd_rn(sum[2 * i + 1], __uint_as_float(u[i] & 0xffff0000u));
        } else {
            sum[2 * i] = __fadd_rn(sum[2 * i], f32_of_fp16_bits(u[i] & 0xffffu));
            sum[2 * i + 1] = __fadd_rn(sum[2 * i + 1], f32_of_fp16_bits(u[i] >> 16));
        }
    }
}
template <int dtype>
EPX__DEVICE uint4 round_16(const float *sum)
{
    uint32_t u[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (dtype == EPX_FP32)
            u[i] = __float_as_uint(sum[i]);
        else if (dtype == EPX_BF16)
            u[i] = bf16x2_of_f32(sum[2 * i], sum[2 * i + 1]);
        else
            u[i] = fp16x2_of_f32(sum[2 * i], sum[2 * i + 1]);
    }
    return make_uint4(u[0], u[1], u[2], u[3]);
}

/* Biases and the result of one 16-byte piece. */
template <int dtype>
EPX__DEVICE void end_16(const ht_combine_t &p, float *sum, uint64_t at)
{
    for (int b = 0; b < 2; b++) {
        if (p.bias[b])
            add_16<dtype>(sum, *(const uint4 *)(p.bias[b] + at));
    }
    st_global_16(p.out + at, round_16<dtype>(sum));
}

/* Warp: add the first `rows` buffers of a stage. */
template <int dtype>
EPX__DEVICE void add_staged(const ht_combine_t &p, const char *stage, uint32_t rows, uint64_t item)
{
    uint64_t at;
    uint32_t bytes = chunk_of(p, item, &at);
    uint64_t out = item / p.cut.chunks * p.row_bytes + at;
#pragma unroll 2
    for (uint32_t v = threadIdx.x % 32 * 16; v < bytes; v += 512) {
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (uint32_t j = 0; j < rows; j++)
            add_16<dtype>(sum, *(const uint4 *)(stage + (size_t)j * p.cut.chunk_bytes + v));
        end_16<dtype>(p, sum, out + v);
    }
}

/* Warp: the same straight from where the rows are, any number of them. */
template <int dtype>
EPX__DEVICE void add_plain(const ht_combine_t &p, const ht_source_t *sources, uint64_t item)
{
    uint64_t at;
    uint32_t bytes = chunk_of(p, item, &at);
    uint64_t out = item / p.cut.chunks * p.row_bytes + at;
    for (uint32_t v = threadIdx.x % 32 * 16; v < bytes; v += 512) {
        float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (uint32_t j = 0; j < p.h.slots; j++) {
            ht_pick_t k = pick_at(p, item, j);
            if (k.rank < 0)
                break;
            add_16<dtype>(sum, ld_global_16(x_row(sources[k.rank], k.row) + at + v));
        }
        end_16<dtype>(p, sum, out + v);
    }
}

/* Warp: the token's weights, likewise in rank order. */
EPX__DEVICE void add_weights(const ht_combine_t &p, const ht_source_t *sources, uint64_t item)
{
    uint32_t lane = threadIdx.x % 32;
    if (!p.weights || item % p.cut.chunks != 0 || lane >= p.topk)
        return;
    float sum = 0.0f;
    for (uint32_t j = 0; j < p.h.slots; j++) {
        ht_pick_t k = pick_at(p, item, j);
        if (k.rank < 0)
            break;
        sum = __fadd_rn(sum, ld_relaxed_sys_f32(w_row(sources[k.rank], k.row, p.topk) + lane));
    }
    p.out_weights[item / p.cut.chunks * p.topk + lane] = sum;
}

/* Warp: all its items through the stages, one loaded ahead where its rows have come. */
template <int dtype>
EPX__DEVICE bool add_items(const ht_combine_t &p, const ht_source_t *sources, ht_stages_t &s, uint64_t n, uint32_t w,
                           uint32_t warps)
{
    uint32_t lane = threadIdx.x % 32, i = 0;
    uint64_t items = (uint64_t)p.tokens * p.cut.chunks;
    ht_pick_t next = {-1, -1};
    bool loaded = false;
    for (uint64_t item = w, ahead; item < items; item = ahead, i ^= 1) {
        ahead = item + warps;
        ht_pick_t k = loaded ? next : pick_at(p, item, lane);
        uint32_t rows = (uint32_t)__popc(__ballot_sync(0xffffffffu, k.rank >= 0));
        if (!loaded) {
            if (!__all_sync(0xffffffffu, row_ready(p, sources, n, k, true)))
                return false;
            pull_item(p, sources, s, i, item, k);
        }
        loaded = false;
        if (ahead < items) {
            next = pick_at(p, ahead, lane);
            loaded = __all_sync(0xffffffffu, row_ready(p, sources, n, next, false)) != 0;
            if (loaded)
                pull_item(p, sources, s, i ^ 1, ahead, next);
        }
        stage_wait(s, i);
        add_staged<dtype>(p, stage_at(s, i), rows, item);
        add_weights(p, sources, item);
        __syncwarp();
        row_read(p, sources, n, k);
    }
    return true;
}

template <int dtype>
EPX__DEVICE bool add_items_plain(const ht_combine_t &p, const ht_source_t *sources, uint64_t n, uint32_t w,
                                 uint32_t warps)
{
    uint32_t lane = threadIdx.x % 32;
    uint64_t items = (uint64_t)p.tokens * p.cut.chunks;
    for (uint64_t item = w; item < items; item += warps) {
        bool ok = true;
        for (uint32_t j = lane; j < p.h.slots && ok; j += 32)
            ok = row_ready(p, sources, n, pick_at(p, item, j), true);
        if (!__all_sync(0xffffffffu, ok))
            return false;
        add_plain<dtype>(p, sources, item);
        add_weights(p, sources, item);
        __syncwarp();
        for (uint32_t j = lane; j < p.h.slots; j += 32)
            row_read(p, sources, n, pick_at(p, item, j));
    }
    return true;
}

template <int dtype>
EPX__DEVICE void add_block(const ht_combine_t &p, ht_block_t *b, char *shared)
{
    ht_source_t *sources = (ht_source_t *)(shared + p.cut.table_offset);
    uint32_t blocks = gridDim.x - p.push_blocks, warps = blocks * p.cut.warps;
    uint32_t w = threadIdx.x / 32 * blocks + blockIdx.x - p.push_blocks;
    bool ok = true;
    for (int r = (int)threadIdx.x; r < p.c.ranks && ok; r += (int)blockDim.x)
        ok = read_source(p, b->n, r, &sources[r]);
    if (!__syncthreads_and(ok))
        return;
    if (EPX__BULK && p.slots_bulk) {
        ht_stages_t s = stages_init(p.cut, shared);
        add_items<dtype>(p, sources, s, b->n, w, warps);
    } else {
        add_items_plain<dtype>(p, sources, b->n, w, warps);
    }
}

template <int dtype>
__global__ void __launch_bounds__(HT_WARPS_MAX * 32, 1) ht_combine_kernel(const __grid_constant__ ht_combine_t p)
{
    extern __shared__ __align__(128) char shared[];
    __shared__ ht_block_t b;
    if (!ht_enter(p.c, &b))
        return;
    if (blockIdx.x == 0)
        publish_x(p, b.n);
    if (blockIdx.x < p.push_blocks) {
        ht_stages_t s = stages_init(p.cut, shared);
        flows_run<ht_combine_t, push_flow>(p, s, b.n, threadIdx.x / 32 * p.push_blocks + blockIdx.x,
                                           p.push_blocks * p.cut.warps, (uint32_t *)(shared + p.cut.table_offset));
    } else {
        add_block<dtype>(p, &b, shared);
    }
    bulk_wait_done();
    fence_proxy_async();
    if (!ht_last_block(p.c, &b))
        return;
    if (!ht_stopped(p.c, b.n, false)) {
        ht_tell_end(p.c, b.n);
        ht_wait_ends(p.c, &b); /* the owners of my rows have read them: x may be overwritten */
    }
    ht_leave(p.c, &b);
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
    return (int)cudaLaunchKernel(combine_kernel(p->dtype), dim3(blocks), dim3(p->cut.warps * 32), arguments,
                                 p->cut.total_bytes, (cudaStream_t)stream);
}

extern "C" int epx__ht_load_combine(uint32_t shared_bytes)
{
    for (int dtype = EPX_BF16; dtype <= EPX_FP32; dtype++) {
        cudaError_t error =
            cudaFuncSetAttribute(combine_kernel(dtype), cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
        if (error != cudaSuccess)
            return (int)error;
    }
    return 0;
}
