/*
 * What GPUs need at least: the same rows moved to the same places by the bulk copy engine (dispatch), the same rows
 * read from the same places and added (combine), with nothing to count or to wait for. Several grids are tried; bench
 * takes the fastest. Rows live in plain allocations that peers open by IPC handles, or by pointer inside one process.
 */
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cuda/floor_cuda.h"
#include <epx/device/ptx.cuh>

#define RANKS_MAX 64

typedef struct way {
    const char *name;
    uint32_t sms, warps, stages, chunk;
} way_t;

/* Dispatch: a whole row a stage (chunk unused). Combine: `chunk` bytes of a row. */
static const way_t dispatch_ways[] = {{"16 SMs", 16, 14, 1, 0}, {"16 SMs, 2 stages", 16, 7, 2, 0},
                                      {"24 SMs", 24, 14, 1, 0}, {"32 SMs", 32, 14, 1, 0},
                                      {"64 SMs", 64, 14, 1, 0}, {"128 SMs", 128, 8, 1, 0}}; /* few rows: low latency */
static const way_t combine_ways[] = {
    {"24 SMs", 24, 16, 2, 2048}, {"32 SMs", 32, 16, 2, 1024}, {"48 SMs", 48, 16, 2, 1024}, {"64 SMs", 64, 8, 2, 2048}};

typedef struct work {
    const char *x;
    char *out;
    const int32_t *rank, *row; /* [tokens][slots] */
    char *area[RANKS_MAX];
    uint32_t tokens, slots, row_bytes, chunk, stages;
    int format;
} work_t;

typedef struct floor {
    work_t work;
    int device, ranks, me;
    cudaStream_t stream;
    void *tables;
    uint32_t combine_bytes;
    bool opened[RANKS_MAX];
    uint64_t *words[RANKS_MAX]; /* [RANKS_MAX] of each rank, behind its area: how often each other has come to meet */
    uint64_t meetings;
} floor_t;

typedef struct stage {
    char *memory;
    uint64_t *bar;
} stage_t;

EPX__DEVICE void wait_bar(uint64_t *bar, uint32_t parity)
{
    while (!mbarrier_try_wait(bar, parity))
        ;
}

EPX__DEVICE void init_bars(uint64_t *bars, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        mbarrier_init(&bars[i]);
    mbarrier_fence_init();
}

static __global__ void __launch_bounds__(512, 1) floor_dispatch(const __grid_constant__ work_t p)
{
    extern __shared__ __align__(128) char shared[];
    uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32, step = gridDim.x * warps, turn = 0;
    char *memory = shared + (size_t)warp * p.stages * p.row_bytes;
    uint64_t *bars = (uint64_t *)(shared + (size_t)warps * p.stages * p.row_bytes) + warp * p.stages;
    if (threadIdx.x % 32 != 0)
        return;
    init_bars(bars, p.stages);
    uint32_t first = warp * gridDim.x + blockIdx.x, parity = 0, loaded = first;
    for (uint32_t t = first; t < p.tokens; t += step, turn++) {
        for (; loaded < p.tokens && loaded <= t + (p.stages - 1) * step; loaded += step) {
            uint32_t s = (loaded - first) / step % p.stages;
            bulk_wait_read_all();
            mbarrier_expect_bytes(&bars[s], p.row_bytes);
            bulk_load(memory + (size_t)s * p.row_bytes, p.x + (size_t)loaded * p.row_bytes, p.row_bytes, &bars[s]);
        }
        uint32_t s = turn % p.stages;
        wait_bar(&bars[s], parity >> s & 1);
        parity ^= 1u << s;
        for (uint32_t j = 0; j < p.slots; j++) {
            int32_t rank = p.rank[(size_t)t * p.slots + j];
            if (rank < 0)
                break;
            bulk_store(p.area[rank] + (size_t)p.row[(size_t)t * p.slots + j] * p.row_bytes,
                       memory + (size_t)s * p.row_bytes, p.row_bytes);
        }
        bulk_commit();
    }
    bulk_wait_done();
}

/* Start loading the rows of item k; returns how many there are. */
EPX__DEVICE uint32_t floor_load(const work_t &p, uint32_t chunks, uint32_t k, char *stage, uint64_t *bar)
{
    uint32_t lane = threadIdx.x % 32, t = k / chunks, at = k % chunks * p.chunk;
    uint32_t bytes = p.row_bytes - at < p.chunk ? p.row_bytes - at : p.chunk;
    int32_t rank = lane < p.slots ? p.rank[(size_t)t * p.slots + lane] : -1;
    uint32_t rows = (uint32_t)__popc(__ballot_sync(0xffffffffu, rank >= 0));
    if (lane == 0)
        mbarrier_expect_bytes(bar, rows * bytes);
    __syncwarp();
    if (rank >= 0)
        bulk_load(stage + (size_t)lane * p.chunk,
                  p.area[rank] + (size_t)p.row[(size_t)t * p.slots + lane] * p.row_bytes + at, bytes, bar);
    return rows;
}

static __global__ void __launch_bounds__(512, 1) floor_combine(const __grid_constant__ work_t p)
{
    extern __shared__ __align__(128) char shared[];
    uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, parity = 0;
    size_t stage_bytes = (size_t)p.slots * p.chunk;
    char *memory = shared + warp * 2 * stage_bytes;
    uint64_t *bars = (uint64_t *)(shared + warps * 2 * stage_bytes) + warp * 2;
    if (lane == 0)
        init_bars(bars, 2);
    __syncwarp();
    uint32_t chunks = (p.row_bytes + p.chunk - 1) / p.chunk, items = p.tokens * chunks, step = gridDim.x * warps;
    uint32_t k = warp * gridDim.x + blockIdx.x, i = 0, rows = 0, next = 0;
    if (k < items)
        next = floor_load(p, chunks, k, memory, &bars[0]);
    for (; k < items; k += step, i ^= 1) {
        rows = next;
        if (k + step < items)
            next = floor_load(p, chunks, k + step, memory + (i ^ 1) * stage_bytes, &bars[i ^ 1]);
        wait_bar(&bars[i], parity >> i & 1);
        parity ^= 1u << i;
        uint32_t at = k % chunks * p.chunk, bytes = p.row_bytes - at < p.chunk ? p.row_bytes - at : p.chunk;
        for (uint32_t v = lane * 16; v < bytes; v += 512) {
            float sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
            for (uint32_t j = 0; j < rows; j++) {
                uint4 u = *(const uint4 *)(memory + i * stage_bytes + (size_t)j * p.chunk + v);
                const uint32_t w[4] = {u.x, u.y, u.z, u.w};
                for (int q = 0; q < 4; q++) { /* as bf16; other formats cost no more */
                    sum[2 * q] += __uint_as_float(w[q] << 16);
                    sum[2 * q + 1] += __uint_as_float(w[q] & 0xffff0000u);
                }
            }
            st_global_16(p.out + (size_t)(k / chunks) * p.row_bytes + at + v,
                         make_uint4(bf16x2_of_f32(sum[0], sum[1]), bf16x2_of_f32(sum[2], sum[3]),
                                    bf16x2_of_f32(sum[4], sum[5]), bf16x2_of_f32(sum[6], sum[7])));
        }
        __syncwarp();
    }
}

/* ---- starting together ---- */

typedef struct meeting {
    uint64_t *words[RANKS_MAX];
    int ranks, me;
    uint64_t number;
} meeting_t;

static __global__ void floor_meeting(const __grid_constant__ meeting_t p)
{
    int r = (int)threadIdx.x;
    if (r >= p.ranks)
        return;
    st_release_sys_u64(p.words[r] + p.me, p.number);
    uint64_t start = globaltimer_ns();
    while (ld_acquire_sys_u64(p.words[p.me] + r) < p.number && globaltimer_ns() - start < 1000000000u)
        ;
}

void floor_cuda_meet(void *floor)
{
    floor_t *f = (floor_t *)floor;
    meeting_t m;
    memcpy(m.words, f->words, sizeof m.words);
    m.ranks = f->ranks;
    m.me = f->me;
    m.number = ++f->meetings;
    floor_meeting<<<1, RANKS_MAX, 0, f->stream>>>(m);
}

/* ---- memory of all ranks ---- */

typedef struct card {
    uint64_t process, pointer, words_at;
    int32_t device;
    cudaIpcMemHandle_t handle;
} card_t;

static const char *open_areas(floor_t *f, const floor_plan_t *plan, const card_t *mine)
{
    static thread_local char words[200];
    card_t all[RANKS_MAX];
    if (plan->allgather(plan->allgather_context, mine, sizeof *mine, all))
        return "the ranks' memory handles could not be gathered";
    for (int r = 0; r < plan->ranks; r++) {
        cudaError_t error = cudaSuccess;
        if (plan->domain_of && plan->domain_of[r] != plan->domain_of[plan->rank])
            continue;
        if (all[r].process == mine->process) {
            if (all[r].device != f->device)
                error = cudaDeviceEnablePeerAccess(all[r].device, 0);
            if (error == cudaErrorPeerAccessAlreadyEnabled)
                error = cudaSuccess;
            f->work.area[r] = (char *)(uintptr_t)all[r].pointer;
        } else {
            error = cudaIpcOpenMemHandle((void **)&f->work.area[r], all[r].handle, cudaIpcMemLazyEnablePeerAccess);
            f->opened[r] = error == cudaSuccess;
        }
        f->words[r] = (uint64_t *)(f->work.area[r] + all[r].words_at);
        (void)cudaGetLastError();
        if (error != cudaSuccess) {
            snprintf(words, sizeof words, "memory of rank %d: %s", r, cudaGetErrorString(error));
            return words;
        }
    }
    return NULL;
}

static const char *put_tables(floor_t *f, const floor_plan_t *plan)
{
    size_t entries = (size_t)plan->tokens * (size_t)plan->ranks;
    if (cudaMalloc(&f->tables, entries * 8 + 16) != cudaSuccess)
        return "no GPU memory for the floor's tables";
    int32_t *rank = (int32_t *)f->tables, *row = rank + entries;
    if (cudaMemcpyAsync(rank, plan->dst_rank, entries * 4, cudaMemcpyDefault, f->stream) != cudaSuccess ||
        cudaMemcpyAsync(row, plan->dst_row, entries * 4, cudaMemcpyDefault, f->stream) != cudaSuccess ||
        cudaStreamSynchronize(f->stream) != cudaSuccess)
        return "the floor's tables could not be copied";
    f->work.rank = rank;
    f->work.row = row;
    return NULL;
}

const char *floor_cuda_open(int device, void *stream, const floor_plan_t *plan, void **out)
{
    if (plan->ranks > RANKS_MAX)
        return "the floor of more than 64 ranks is not built";
    floor_t *f = (floor_t *)calloc(1, sizeof *f);
    char *area = NULL;
    card_t mine;
    memset(&mine, 0, sizeof mine);
    if (!f)
        return "no memory for the floor";
    f->device = device;
    f->ranks = plan->ranks;
    f->me = plan->rank;
    f->stream = (cudaStream_t)stream;
    f->work.x = (const char *)plan->x;
    f->work.tokens = plan->tokens;
    f->work.slots = (uint32_t)plan->ranks;
    f->work.row_bytes = (uint32_t)plan->row_bytes;
    f->combine_bytes = plan->hidden * (plan->format == PATTERN_FP32 ? 4u : 2u);
    size_t row = f->combine_bytes > plan->row_bytes ? f->combine_bytes : plan->row_bytes;
    cudaSetDevice(device);
    size_t area_bytes = (plan->recv_rows[plan->rank] + 1) * row;
    mine.words_at = (area_bytes + 255) / 256 * 256;
    if (cudaMalloc((void **)&area, mine.words_at + RANKS_MAX * 8) != cudaSuccess ||
        cudaMalloc((void **)&f->work.out, (plan->tokens + 1) * row) != cudaSuccess ||
        cudaMemsetAsync(area, 0x3c, area_bytes, f->stream) != cudaSuccess ||
        cudaMemsetAsync(area + mine.words_at, 0, RANKS_MAX * 8, f->stream) != cudaSuccess)
        return "no GPU memory for the floor's rows";
    mine.process = (uint64_t)getpid();
    mine.pointer = (uint64_t)(uintptr_t)area;
    mine.device = device;
    cudaIpcGetMemHandle(&mine.handle, area);
    (void)cudaGetLastError();
    const char *error = put_tables(f, plan);
    const char *open_error = open_areas(f, plan, &mine); /* collective: also after an error */
    cudaFuncSetAttribute(floor_dispatch, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10);
    cudaFuncSetAttribute(floor_combine, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 << 10);
    if (error || open_error)
        return error ? error : open_error;
    *out = f;
    return NULL;
}

int floor_cuda_variants(void *floor, floor_kind_t kind)
{
    (void)floor;
    return kind == FLOOR_DISPATCH ? (int)(sizeof dispatch_ways / sizeof *dispatch_ways)
                                  : (int)(sizeof combine_ways / sizeof *combine_ways);
}

const char *floor_cuda_variant_name(void *floor, floor_kind_t kind, int variant)
{
    (void)floor;
    return kind == FLOOR_DISPATCH ? dispatch_ways[variant].name : combine_ways[variant].name;
}

int floor_cuda_run(void *floor, floor_kind_t kind, int variant)
{
    const floor_t *f = (const floor_t *)floor;
    work_t work = f->work;
    const size_t most = 226 << 10;
    if (kind == FLOOR_DISPATCH) {
        way_t way = dispatch_ways[variant];
        work.stages = way.stages;
        uint32_t fit = (uint32_t)(most / (way.stages * ((size_t)work.row_bytes + 8)));
        uint32_t warps = fit < way.warps ? fit : way.warps;
        if (warps == 0)
            return (int)cudaErrorInvalidValue;
        size_t bytes = (size_t)warps * way.stages * (work.row_bytes + 8);
        floor_dispatch<<<way.sms, warps * 32, bytes, f->stream>>>(work);
    } else {
        way_t way = combine_ways[variant];
        work.row_bytes = f->combine_bytes;
        work.chunk = way.chunk;
        while (way.warps > 1 && way.warps * (2 * (size_t)work.slots * work.chunk + 16) > most)
            way.warps /= 2;
        size_t bytes = way.warps * (2 * (size_t)work.slots * work.chunk + 16);
        floor_combine<<<way.sms, way.warps * 32, bytes, f->stream>>>(work);
    }
    return (int)cudaGetLastError();
}

void floor_cuda_close(void *floor)
{
    floor_t *f = (floor_t *)floor;
    cudaStreamSynchronize(f->stream);
    for (int r = 0; r < f->ranks; r++) {
        if (f->opened[r])
            cudaIpcCloseMemHandle(f->work.area[r]);
    }
    cudaFree(f->work.area[f->me]);
    cudaFree(f->work.out);
    cudaFree(f->tables);
    free(f);
}
