/*
 * GPU memory for demo and bench (mem.h): libepx_bench_cuda.so.
 *
 * Times are between two events of the stream. A short spinning kernel goes first, so that the host has enqueued the
 * call by the time the first event passes: what is timed is the call on the GPU, and waits on the host where the call
 * itself has one.
 */
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>

#include "cuda/carry_cuda.h"
#include "cuda/floor_cuda.h"

#define CHILL_BYTES ((size_t)256 << 20) /* several times any L2 */
#define HEAD_START_NS 30000

static thread_local char words[256];

static int failed(cudaError_t error, const char *what)
{
    if (error == cudaSuccess)
        return 0;
    snprintf(words, sizeof words, "%s: %s", what, cudaGetErrorString(error));
    (void)cudaGetLastError();
    return 1;
}

typedef struct gpu {
    int device;
    cudaStream_t stream;
    cudaEvent_t start, stop;
    void *chill;
    void *floor; /* where there is one, the ranks' GPUs can start together */
} gpu_t;

static __global__ void spin(uint64_t ns)
{
    uint64_t start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    while (now - start < ns);
}

static int gpu_open(int device, void **context)
{
    gpu_t *gpu = (gpu_t *)calloc(1, sizeof *gpu);
    if (!gpu)
        return failed(cudaErrorMemoryAllocation, "opening the GPU");
    gpu->device = device;
    if (failed(cudaSetDevice(device), "choosing the GPU") ||
        failed(cudaStreamCreateWithFlags(&gpu->stream, cudaStreamNonBlocking), "a stream") ||
        failed(cudaEventCreate(&gpu->start), "an event") || failed(cudaEventCreate(&gpu->stop), "an event") ||
        failed(cudaMalloc(&gpu->chill, CHILL_BYTES), "memory to empty the cache with")) {
        free(gpu);
        return 1;
    }
    *context = gpu;
    return 0;
}

static void gpu_close(void *context)
{
    gpu_t *gpu = (gpu_t *)context;
    cudaSetDevice(gpu->device);
    cudaFree(gpu->chill);
    cudaEventDestroy(gpu->start);
    cudaEventDestroy(gpu->stop);
    cudaStreamDestroy(gpu->stream);
    free(gpu);
}

static const char *gpu_words(void)
{
    return words;
}

static void *gpu_alloc(void *context, size_t bytes)
{
    gpu_t *gpu = (gpu_t *)context;
    void *memory = NULL;
    if (failed(cudaSetDevice(gpu->device), "choosing the GPU") || failed(cudaMalloc(&memory, bytes), "GPU memory"))
        return NULL;
    if (failed(cudaMemsetAsync(memory, 0, bytes, gpu->stream), "zeroing"))
        return NULL;
    return memory;
}

static void gpu_free(void *context, void *memory)
{
    gpu_t *gpu = (gpu_t *)context;
    cudaStreamSynchronize(gpu->stream);
    cudaFree(memory);
}

static int gpu_sync(void *context)
{
    return failed(cudaStreamSynchronize(((gpu_t *)context)->stream), "waiting for the stream");
}

static int gpu_copy(void *context, void *to, const void *from, size_t bytes)
{
    gpu_t *gpu = (gpu_t *)context;
    return failed(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, gpu->stream), "copying") || gpu_sync(context);
}

static int gpu_fill(void *context, void *device, int byte, size_t bytes)
{
    return failed(cudaMemsetAsync(device, byte, bytes, ((gpu_t *)context)->stream), "filling");
}

static epx_stream_t gpu_stream(void *context)
{
    return ((gpu_t *)context)->stream;
}

static int gpu_time_start(void *context)
{
    gpu_t *gpu = (gpu_t *)context;
    spin<<<1, 1, 0, gpu->stream>>>(HEAD_START_NS);
    if (gpu->floor)
        floor_cuda_meet(gpu->floor);
    return failed(cudaGetLastError(), "spinning") || failed(cudaEventRecord(gpu->start, gpu->stream), "timing");
}

static int gpu_time_stop(void *context, double *us)
{
    gpu_t *gpu = (gpu_t *)context;
    float ms = 0;
    if (failed(cudaEventRecord(gpu->stop, gpu->stream), "timing") ||
        failed(cudaEventSynchronize(gpu->stop), "timing") ||
        failed(cudaEventElapsedTime(&ms, gpu->start, gpu->stop), "timing"))
        return 1;
    *us = ms * 1e3;
    return 0;
}

static int gpu_chill(void *context)
{
    gpu_t *gpu = (gpu_t *)context;
    return failed(cudaMemsetAsync(gpu->chill, 1, CHILL_BYTES, gpu->stream), "emptying the cache");
}

static int gpu_graph_begin(void *context)
{
    return failed(cudaStreamBeginCapture(((gpu_t *)context)->stream, cudaStreamCaptureModeThreadLocal),
                  "beginning a graph");
}

/* Uploaded too, so that the first launch is like the others. */
static int gpu_graph_end(void *context, void **graph)
{
    gpu_t *gpu = (gpu_t *)context;
    cudaGraph_t recorded = NULL;
    cudaGraphExec_t exec = NULL;
    if (failed(cudaStreamEndCapture(gpu->stream, &recorded), "ending a graph"))
        return 1;
    int bad = failed(cudaGraphInstantiate(&exec, recorded, 0), "making a graph");
    cudaGraphDestroy(recorded);
    if (bad)
        return 1;
    if (failed(cudaGraphUpload(exec, gpu->stream), "uploading a graph") || gpu_sync(context)) {
        cudaGraphExecDestroy(exec);
        return 1;
    }
    *graph = exec;
    return 0;
}

static int gpu_graph_launch(void *context, void *graph)
{
    return failed(cudaGraphLaunch((cudaGraphExec_t)graph, ((gpu_t *)context)->stream), "launching a graph");
}

static void gpu_graph_free(void *context, void *graph)
{
    cudaStreamSynchronize(((gpu_t *)context)->stream);
    if (graph)
        cudaGraphExecDestroy((cudaGraphExec_t)graph);
}

static int failed_by(const char *error)
{
    if (error)
        snprintf(words, sizeof words, "%s", error);
    return error != NULL;
}

static int gpu_floor_open(void *context, const floor_plan_t *plan, void **floor)
{
    gpu_t *gpu = (gpu_t *)context;
    const char *error = floor_cuda_open(gpu->device, gpu->stream, plan, floor);
    if (!error && !plan->domain_of) /* milliseconds of a network need no start to the microsecond */
        gpu->floor = *floor;
    return failed_by(error);
}

static int gpu_floor_run(void *floor, floor_kind_t kind, int variant)
{
    return failed((cudaError_t)floor_cuda_run(floor, kind, variant), "the floor");
}

static int gpu_carry_open(void *context, size_t bytes, void **carry, char **out, char **in)
{
    gpu_t *gpu = (gpu_t *)context;
    return failed_by(carry_cuda_open(gpu->device, gpu->stream, bytes, carry, out, in));
}

static int gpu_carry_begin(void *carry, size_t out_bytes, size_t in_bytes)
{
    return failed_by(carry_cuda_begin(carry, out_bytes, in_bytes));
}

static int gpu_carry_end(void *carry)
{
    return failed_by(carry_cuda_end(carry));
}

extern "C" __attribute__((visibility("default"))) const mem_ops_t *epx_bench_mem(void)
{
    static const carry_ops_t carry = {gpu_carry_open,    gpu_carry_begin, carry_cuda_ready,
                                      carry_cuda_landed, gpu_carry_end,   carry_cuda_close};
    static mem_ops_t ops;
    ops.abi = MEM_ABI;
    ops.name = "cuda";
    ops.open = gpu_open;
    ops.close = gpu_close;
    ops.words = gpu_words;
    ops.alloc = gpu_alloc;
    ops.free = gpu_free;
    ops.copy_in = gpu_copy;
    ops.copy_out = gpu_copy;
    ops.fill = gpu_fill;
    ops.stream = gpu_stream;
    ops.sync = gpu_sync;
    ops.time_start = gpu_time_start;
    ops.time_stop = gpu_time_stop;
    ops.chill = gpu_chill;
    ops.graph_begin = gpu_graph_begin;
    ops.graph_end = gpu_graph_end;
    ops.graph_launch = gpu_graph_launch;
    ops.graph_free = gpu_graph_free;
    ops.floor_open = gpu_floor_open;
    ops.floor_variants = floor_cuda_variants;
    ops.floor_variant_name = floor_cuda_variant_name;
    ops.floor_run = gpu_floor_run;
    ops.floor_close = floor_cuda_close; /* the last thing a rank does with its context but free and close */
    ops.carry = &carry;
    return &ops;
}
