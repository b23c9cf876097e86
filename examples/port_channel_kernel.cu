/* The same from a kernel: a GPU thread pushes requests into the FIFO (pinned host memory) and waits on counters there.
 * Two ranks, threads of one process, one GPU. The memory that travels is pinned host memory, which every network takes.
 */
#include <epx/channel.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include <cuda_runtime.h>

enum { RANKS = 2, ROUNDS = 100, WORDS = 1024 };
static epx_unique_id_t id;

static void must(epx_status_t status)
{
    if (status == EPX_OK)
        return;
    fprintf(stderr, "%s: %s\n", epx_status_name(status), epx_error_detail());
    exit(status == EPX_E_UNSUPPORTED ? 77 : 1);
}

static void must_cuda(cudaError_t error)
{
    if (error == cudaSuccess)
        return;
    fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
    exit(1);
}

/* One block. Words [0, WORDS) come, [WORDS, 2 WORDS) go. Every round: write, put with signal, wait, look. */
__global__ void trade(epx_port_channel_t channel, epx_port_channel_t back, uint64_t *memory, int rank, int *result)
{
    __shared__ int status;
    for (uint64_t round = 1; round <= ROUNDS; round++) {
        for (int i = threadIdx.x; i < WORDS; i += blockDim.x)
            memory[WORDS + i] = round * 1000 + i + rank;
        __threadfence_system();
        __syncthreads();
        if (threadIdx.x == 0) {
            status = epx_port_put_signal(&channel, epx_port_memories(0, 0), 0, WORDS * 8, WORDS * 8);
            if (status == EPX_OK)
                status = epx_port_wait(&channel, round);
            if (status == EPX_OK)
                status = epx_port_flush(&channel); /* what goes may be written again */
        }
        __syncthreads();
        if (status != EPX_OK) {
            *result = -status;
            return;
        }
        for (int i = threadIdx.x; i < WORDS; i += blockDim.x)
            if (*(volatile uint64_t *)&memory[i] != round * 1000 + i + (1 - rank))
                atomicAdd(result, 1);
        /* Nobody overwrites what the peer has not looked at: channel 1 says "read" each way. */
        __syncthreads();
        if (threadIdx.x == 0) {
            status = epx_port_signal(&back);
            if (status == EPX_OK)
                status = epx_port_wait(&back, round);
        }
        __syncthreads();
        if (status != EPX_OK) {
            *result = -status;
            return;
        }
    }
}

static void *rank_main(void *argument)
{
    int rank = (int)(intptr_t)argument, *result;
    epx_group_t *group;
    epx_channels_t *channels;
    uint64_t *memory, *tickets;
    cudaStream_t stream;
    epx_group_config_t group_config = {.size = sizeof group_config, .rank = rank, .ranks = RANKS, .id = &id};
    group_config.backend = EPX_BACKEND_CPU; /* the channels' own memory is in the host here */
    must(epx_group_create(&group_config, &group));
    must_cuda(cudaHostAlloc((void **)&memory, 2 * WORDS * 8, cudaHostAllocMapped));
    must_cuda(cudaHostAlloc((void **)&result, sizeof *result, cudaHostAllocMapped));
    *result = 0;
    epx_channel_memory_t mine = {memory, 2 * WORDS * 8, 0};
    epx_channels_config_t config = {.size = sizeof config, .memories = &mine, .memory_count = 1, .channels = 2};
    must_cuda(cudaMalloc((void **)&tickets, epx_channels_tickets(RANKS, &config) * 8));
    must_cuda(cudaMemset(tickets, 0, epx_channels_tickets(RANKS, &config) * 8));
    config.device_tickets = tickets;
    must(epx_channels_create(group, &config, &channels));
    size_t bytes;
    void *block = epx_channels_host_block(channels, &bytes);
    must_cuda(cudaHostRegister(block, bytes, cudaHostRegisterMapped));
    must_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    const epx_port_channel_t *table = &epx_channels_port_table(channels)[(1 - rank) * 2];
    trade<<<1, 256, 0, stream>>>(table[0], table[1], memory, rank, result);
    must_cuda(cudaGetLastError());
    must_cuda(cudaStreamSynchronize(stream));
    printf("rank %d: %d rounds from a kernel, result %d\n", rank, ROUNDS, *result);
    if (*result)
        exit(1);
    must(epx_group_barrier(group, 0));
    must_cuda(cudaHostUnregister(block));
    epx_channels_destroy(channels);
    epx_group_destroy(group);
    cudaFree(tickets);
    cudaFreeHost(memory);
    cudaFreeHost(result);
    return NULL;
}

int main(void)
{
    pthread_t threads[RANKS];
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        printf("skipped: no GPU\n");
        return 77;
    }
    setenv("EPX_NET", "loop", 0);
    must(epx_unique_id_create(NULL, &id));
    for (intptr_t r = 0; r < RANKS; r++)
        pthread_create(&threads[r], NULL, rank_main, (void *)r);
    for (int r = 0; r < RANKS; r++)
        pthread_join(threads[r], NULL);
    return 0;
}
