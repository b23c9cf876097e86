/* Low latency between domains of GPUs, the host's side: what ll_host.c needs of ll_far_host.c. */
#ifndef EPX_ALGO_LL_CUDA_LL_FAR_HOST_H
#define EPX_ALGO_LL_CUDA_LL_FAR_HOST_H

#include "algo/ht/cuda/host.h"
#include "algo/ll/cuda/ll_cuda.h"

/* One allocation, cut twice by the same function: once to measure. */
typedef struct ll_cutter {
    char *base;
    size_t at;
} ll_cutter_t;

static inline void *ll_cut(ll_cutter_t *c, size_t count, size_t bytes)
{
    c->at = (c->at + 255) / 256 * 256;
    void *piece = c->base ? c->base + c->at : NULL;
    c->at += count * bytes;
    return piece;
}

typedef struct ll_far_host {
    epx__exchange_t *exchange;
    ht_cuda_t *ht;
    char *slab;     /* device memory, one allocation */
    uint64_t *sent; /* pinned host memory, [count][2]; then two int32_t: the result of a try */
    uint64_t told;  /* bytes and puts that are in exchange->traffic already */
    uint64_t told_puts;
    int32_t *place; /* device, [ranks] */
    int32_t *rank_of;
    epx_port_channel_t *channels;
    ll_far_t far; /* as kernels get it */
} ll_far_host_t;

/* Local: memory, tables, kernels. `far` is zeroed, and to be released also when this fails. */
epx_status_t epx__ll_far_make(ll_far_host_t *far, epx__exchange_t *exchange);
void epx__ll_far_release(ll_far_host_t *far);
/* Collective, when all ranks have made it: connects what connects late. */
epx_status_t epx__ll_far_try(const ll_far_host_t *far);
/* What the kernels have pushed, into exchange->traffic. */
void epx__ll_far_count(ll_far_host_t *far);
/* Enqueue; 0, or a cudaError_t. `blocks`: the most. */
int epx__ll_far_send(const ll_far_host_t *far, const ll_dispatch_t *p, uint32_t blocks, void *stream);
int epx__ll_far_take(const ll_far_host_t *far, const ll_dispatch_t *p, uint32_t blocks, void *stream);
int epx__ll_far_home(const ll_far_host_t *far, const ll_combine_t *p, uint32_t blocks, void *stream);
int epx__ll_far_back(const ll_far_host_t *far, const ll_combine_t *p, uint32_t blocks, void *stream);

#endif
