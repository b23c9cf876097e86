/*
 * GPU memory for the tests in tests/common: one arena a GPU and process, cut by the library's own arena, since cudaFree
 * waits for every kernel of the process, also for those of ranks that wait for the caller. Each rank's thread has a
 * stream.
 *
 * Include it once in a GPU test's program: it makes the backend cuda, and skips the program where there is no GPU.
 */
#ifndef EPX_TEST_MEMORY_CUDA_H
#define EPX_TEST_MEMORY_CUDA_H

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/arena.h"
#include "common/world.h"

#define GPU_MAX 16
#define GPU_ARENA_BYTES ((size_t)1 << 30)

#define GPU_CHECK(call)                                                                                                \
    do {                                                                                                               \
        cudaError_t gpu_error = (call);                                                                                \
        if (gpu_error != cudaSuccess) {                                                                                \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(gpu_error));              \
            exit(4);                                                                                                   \
        }                                                                                                              \
    } while (0)

static pthread_mutex_t gpu_lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    char *base;
    epx__arena_t arena;
} gpu_memory[GPU_MAX];
static __thread int gpu_mine = -1;
static __thread cudaStream_t gpu_stream_mine;
static cudaStream_t gpu_streams[XT_RANKS_MAX];

static inline int gpu_count(void)
{
    int devices = 0;
    GPU_CHECK(cudaGetDeviceCount(&devices));
    return devices < GPU_MAX ? devices : GPU_MAX;
}

/* Rank r of this host has GPU r modulo their number, as the library chooses too. */
static void gpu_enter(int rank)
{
    gpu_mine = rank % gpu_count();
    GPU_CHECK(cudaSetDevice(gpu_mine));
    GPU_CHECK(cudaStreamCreateWithFlags(&gpu_stream_mine, cudaStreamNonBlocking));
    gpu_streams[rank] = gpu_stream_mine;
    pthread_mutex_lock(&gpu_lock);
    if (!gpu_memory[gpu_mine].base) {
        GPU_CHECK(cudaMalloc((void **)&gpu_memory[gpu_mine].base, GPU_ARENA_BYTES));
        if (epx__arena_init(&gpu_memory[gpu_mine].arena, GPU_ARENA_BYTES, 256, 65536) != EPX_OK)
            exit(4);
    }
    pthread_mutex_unlock(&gpu_lock);
}

/* For the next ranks everything is as in a new process, but that the GPUs are started and the arenas there: tests leave
 * memory behind, and streams beyond the hardware's queues would wait for each other. */
static void gpu_leave(void)
{
    for (int gpu = 0; gpu < GPU_MAX; gpu++) {
        if (!gpu_memory[gpu].base)
            continue;
        GPU_CHECK(cudaSetDevice(gpu));
        GPU_CHECK(cudaDeviceSynchronize());
        epx__arena_fini(&gpu_memory[gpu].arena);
        if (epx__arena_init(&gpu_memory[gpu].arena, GPU_ARENA_BYTES, 256, 65536) != EPX_OK)
            exit(4);
    }
    for (int rank = 0; rank < XT_RANKS_MAX; rank++) {
        if (gpu_streams[rank])
            GPU_CHECK(cudaStreamDestroy(gpu_streams[rank]));
        gpu_streams[rank] = NULL;
    }
}

static void *gpu_alloc(size_t bytes)
{
    size_t offset = 0;
    pthread_mutex_lock(&gpu_lock);
    epx_status_t status = epx__arena_take(&gpu_memory[gpu_mine].arena, bytes ? bytes : 1, &offset);
    pthread_mutex_unlock(&gpu_lock);
    return status == EPX_OK ? gpu_memory[gpu_mine].base + offset : NULL;
}

static void gpu_free(void *memory)
{
    if (!memory)
        return;
    GPU_CHECK(cudaStreamSynchronize(gpu_stream_mine));
    pthread_mutex_lock(&gpu_lock);
    epx__arena_give(&gpu_memory[gpu_mine].arena, (size_t)((char *)memory - gpu_memory[gpu_mine].base));
    pthread_mutex_unlock(&gpu_lock);
}

/* The stream is empty before: a copy that waited for a kernel could stand in another rank's way, for which that kernel
 * waits. */
static void gpu_copy(void *to, const void *from, size_t bytes)
{
    GPU_CHECK(cudaStreamSynchronize(gpu_stream_mine));
    if (bytes)
        GPU_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, gpu_stream_mine));
    GPU_CHECK(cudaStreamSynchronize(gpu_stream_mine));
}

/* By a copy: the driver's own kernels that fill are loaded when first used, which waits for the whole device. */
static void gpu_fill(void *device, int byte, size_t bytes)
{
    void *image = malloc(bytes ? bytes : 1);
    if (!image)
        exit(4);
    memset(image, byte, bytes);
    gpu_copy(device, image, bytes);
    free(image);
}

static epx_stream_t gpu_stream(void)
{
    return gpu_stream_mine;
}

const xt_memory_t xt_memory_cuda = {
    .backend = EPX_BACKEND_CUDA,
    .alloc = gpu_alloc,
    .free = gpu_free,
    .put = gpu_copy,
    .get = gpu_copy,
    .fill = gpu_fill,
    .stream = gpu_stream,
    .enter = gpu_enter,
    .leave = gpu_leave,
    .apart = true,
};

/* Before main: no CUDA call here, for ranks that are processes are forked later. */
__attribute__((constructor)) static void gpu_choose(void)
{
    if (access("/dev/nvidiactl", F_OK) != 0) {
        printf("skipped: no NVIDIA driver on this machine (/dev/nvidiactl)\n");
        fflush(stdout);
        _exit(77);
    }
    setenv("EPX_TEST_BACKEND", "cuda", 1);
    setenv("EPX_TEST_RANKS_MAX", "8", 0); /* contexts of 16 processes do not fit one GPU */
    setenv("CUDA_MODULE_LOADING", "EAGER", 0);
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32",
           0); /* a hardware queue a stream: ranks on one GPU wait for each other */
}

#endif
