/*
 * Low latency on GPUs, the host's side: its life and memory. Everything is allocated and every kernel loaded when the
 * buffer is made. ll_calls.c makes the calls.
 */
#include <string.h>

#include "algo/ll/cuda/ll_host.h"
#include "algo/ll/cuda/ll_inband.h"
#include "base/alloc.h"
#include "base/fail.h"
#include "base/log.h"

extern const epx__ll_ops_t epx__ll_cuda;

/* ---- memory ---- */

/* The most experts that a call can find on this rank. */
static size_t experts_here(const epx__exchange_t *x)
{
    size_t ranks = (size_t)x->topology->ranks, experts = x->config.experts_max;
    return x->config.expert_rank ? experts : (experts + ranks - 1) / ranks;
}

static void cut_device(ll_cuda_t *ll, ll_cutter_t *c)
{
    const epx__exchange_t *x = ll->exchange;
    const epx__ll_layout_t *l = &x->layout.ll;
    size_t ranks = l->ranks, rows = ranks * l->tokens_max, pairs = rows * l->topk_max;
    ll->state = ll_cut(c, 1, sizeof *ll->state);
    ll->masked = ll_cut(c, ranks, 4);
    ll->taken = ll_cut(c, l->slots, 8);
    ll->combined = ll_cut(c, l->slots, 8);
    ll->owed = ll_cut(c, l->slots * ranks, 8);
    ll->spoilt = ll_cut(c, l->slots * ranks, 8);
    ll->unread = ll_cut(c, l->slots * ranks, 8);
    for (uint32_t i = 0; i < l->slots; i++) {
        ll_record_t *r = &ll->records[i];
        r->number = ll_cut(c, 2, 8);
        r->pos = ll_cut(c, pairs, 4);
        r->weights = ll_cut(c, pairs, 4);
        r->list = ll_cut(c, pairs, sizeof(ll_back_t));
        r->rank_list = ll_cut(c, rows, sizeof(ll_back_t));
        r->list_count = ll_cut(c, 2, 4);
        r->decided = ll_cut(c, ranks, 4);
        r->asked = ll_cut(c, ranks, 4);
        r->gone = ll_cut(c, ranks, 4);
        r->rows_in = ll_cut(c, rows, 8);
        r->shares_in = ll_cut(c, l->tokens_max, 8);
        r->home_to = ll_cut(c, ranks, 8);
        r->first = ll_cut(c, 2 * ranks, 4);
        r->first_there = ll_cut(c, 2 * ranks, 4);
        if (x->config.ll_zero_copy)
            ll->zero_copy[i] = ll_cut(c, experts_here(x) * rows, (size_t)l->hidden_max * 2);
    }
    uint64_t index = ll_index_bytes(pairs, experts_here(x), (rows + 31) / 32);
    ll->index = index > LL_SHARED_MOST ? ll_cut(c, index, 1) : NULL;
}

/* In-band arrival: asked for, one domain, and a shape that its kernels know. From what is equal on all ranks alone. */
static bool inband_fits(const epx__exchange_t *x)
{
    const epx__ll_layout_t *l = &x->layout.ll;
    uint64_t rows = (uint64_t)l->ranks * l->tokens_max;
    return x->ll_inband && !x->ll_net && l->ranks <= LL_INBAND_RANKS_MOST &&
           l->slots * l->ranks <= LL_INBAND_THREADS - 32 && /* a thread each, in warps but the last */
           x->config.experts_max <= LL_INBAND_EXPERTS_MOST &&
           ll_inband_index_bytes(rows * l->topk_max, experts_here(x), ll_bitmap_words(rows)) <= LL_SHARED_MOST;
}

/* Load every kernel that the buffer uses, and fill the places with the empty pattern. */
static cudaError_t prepare_kernels(const ll_cuda_t *ll)
{
    const epx__exchange_t *x = ll->exchange;
    const epx__ll_layout_t *l = &x->layout.ll;
    cudaStream_t stream = ll->ht->device->stream;
    if (!ll->inband) {
        cudaError_t error = (cudaError_t)epx__ll_load_dispatch(stream);
        return error == cudaSuccess ? (cudaError_t)epx__ll_load_combine(stream) : error;
    }
    char *base = x->window.base;
    /* The rows of every (slot, source), but not the ids before them; and all of `back`. */
    cudaError_t error = cudaMemset2DAsync(base + epx__ll_row_at(l, 0, 0, 0), l->source_bytes, 0xff,
                                          l->source_bytes - l->block_bytes, (size_t)l->slots * l->ranks, stream);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(base + l->back_offset, 0xff, l->row_flags_offset - l->back_offset, stream);
    if (error == cudaSuccess)
        error = (cudaError_t)epx__ll_load_inband_dispatch(stream);
    return error == cudaSuccess ? (cudaError_t)epx__ll_load_inband_combine(stream) : error;
}

static epx_status_t allocate(ll_cuda_t *ll)
{
    const epx__ll_layout_t *l = &ll->exchange->layout.ll;
    ll_cutter_t measure = {0};
    ll->records = epx__calloc(l->slots, sizeof *ll->records);
    ll->zero_copy = epx__calloc(l->slots, sizeof *ll->zero_copy);
    ll->masked_by_caller = epx__calloc(l->ranks, 1);
    if (!ll->records || !ll->zero_copy || !ll->masked_by_caller)
        return epx__fail(EPX_E_NOMEM, "no memory for %u low-latency slots", l->slots);
    cut_device(ll, &measure);
    measure.at += 256;
    cudaError_t error = cudaMalloc((void **)&ll->slab, measure.at);
    if (error != cudaSuccess)
        return epx__fail(EPX_E_NOMEM, "GPU memory for %u low-latency slots of %u tokens (%zu bytes): %s", l->slots,
                         l->tokens_max, measure.at, cudaGetErrorString(error));
    error = cudaHostAlloc((void **)&ll->gave_up, l->ranks * 4ull, cudaHostAllocMapped | cudaHostAllocPortable);
    if (error != cudaSuccess)
        return epx__fail(EPX_E_NOMEM, "pinned host memory for low latency: %s", cudaGetErrorString(error));
    memset(ll->gave_up, 0, l->ranks * 4ull);
    ll_cutter_t device = {.base = ll->slab};
    cut_device(ll, &device);
    error = cudaMemsetAsync(ll->slab, 0, measure.at, ll->ht->device->stream);
    if (error == cudaSuccess) /* as mask_set does: the driver loads what fills when it is first used */
        error = cudaMemsetAsync(ll->masked, 0, 4, ll->ht->device->stream);
    if (error == cudaSuccess)
        error = prepare_kernels(ll);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(ll->ht->device->stream);
    if (error != cudaSuccess)
        return epx__cuda_fail(error, "making low latency");
    /* Not on a shared GPU: blocks that wait for a kernel before them could keep its room from another rank's. */
    ll->early = ll->inband && ll->ht->sms == ll->ht->device->sms && epx__ll_awaits_kernel_before();
    return ll->far ? epx__ll_far_make(ll->far, ll->exchange) : EPX_OK;
}

static void release(ll_cuda_t *ll)
{
    if (ll->far)
        epx__ll_far_release(ll->far);
    epx__free(ll->far);
    (void)cudaFree(ll->slab);
    (void)cudaFreeHost(ll->gave_up);
    epx__free(ll->records);
    epx__free(ll->zero_copy);
    epx__free(ll->masked_by_caller);
    epx__free(ll);
}

static epx_status_t create(epx__exchange_t *exchange)
{
    int before;
    if (experts_here(exchange) >= LL_NONE)
        return epx__fail(EPX_E_INVALID, "low latency on GPUs: at most %u experts on a rank", LL_NONE - 1);
    ll_cuda_t *ll = epx__calloc(1, sizeof *ll);
    if (!ll)
        return epx__fail(EPX_E_NOMEM, "no memory for low latency");
    ll->exchange = exchange;
    ll->ht = exchange->impl;
    ll->inband = inband_fits(exchange);
    ll->far = exchange->ll_net ? epx__calloc(1, sizeof *ll->far) : NULL;
    if (exchange->ll_net && !ll->far) {
        epx__free(ll);
        return epx__fail(EPX_E_NOMEM, "no memory for low latency between domains");
    }
    if (exchange->ll_inband && exchange->rank == 0)
        epx__log(2, "low latency: %s",
                 ll->inband ? "rows are their own arrival signal"
                            : "rows come with flags: several domains, or the shape");
    epx_status_t status = epx__cuda_enter(ll->ht->ordinal, &before);
    if (status == EPX_OK) {
        status = allocate(ll);
        if (status != EPX_OK)
            release(ll);
        epx__cuda_leave(exchange->device->ordinal, before);
    } else {
        release(ll);
    }
    if (status == EPX_OK)
        exchange->ll = ll;
    return status;
}

static epx_status_t start(epx__exchange_t *exchange)
{
    ll_cuda_t *ll = exchange->ll;
    int before;
    EPX__TRY(epx__cuda_enter(ll->ht->ordinal, &before));
    epx_status_t status = epx__ll_far_try(ll->far);
    epx__cuda_leave(ll->ht->ordinal, before);
    return status;
}

static void count_traffic(epx__exchange_t *exchange)
{
    ll_cuda_t *ll = exchange->ll;
    if (ll->far)
        epx__ll_far_count(ll->far);
}

/* Local and bounded. */
static void destroy(epx__exchange_t *exchange)
{
    ll_cuda_t *ll = exchange->ll;
    int before;
    if (!ll || epx__cuda_enter(ll->ht->ordinal, &before) != EPX_OK)
        return;
    epx__ht_cuda_stop(ll->ht);
    release(ll);
    (void)cudaGetLastError();
    epx__cuda_leave(exchange->device->ordinal, before);
    exchange->ll = NULL;
}

static epx_status_t combine_buffer(epx__exchange_t *exchange, epx__ll_call_t *call, void **memory)
{
    const ll_cuda_t *ll = exchange->ll;
    *memory = ll->zero_copy[call->index];
    return EPX_OK;
}

static epx_status_t mask_get(epx__exchange_t *exchange, int32_t *masked)
{
    const ll_cuda_t *ll = exchange->ll;
    for (int r = 0; r < exchange->topology->ranks; r++)
        masked[r] = ll->masked_by_caller[r] || __atomic_load_n(&ll->gave_up[r], __ATOMIC_RELAXED);
    return EPX_OK;
}

const epx__ll_ops_t epx__ll_cuda = {
    .name = "cuda",
    .create = create,
    .destroy = destroy,
    .dispatch_send = epx__ll_cuda_dispatch_send,
    .dispatch_recv = epx__ll_cuda_dispatch_recv,
    .combine_send = epx__ll_cuda_combine_send,
    .combine_recv = epx__ll_cuda_combine_recv,
    .dispatch = epx__ll_cuda_dispatch,
    .combine = epx__ll_cuda_combine,
    .combine_buffer = combine_buffer,
    .mask_set = epx__ll_cuda_mask_set,
    .mask_get = mask_get,
    .start = start,
    .count_traffic = count_traffic,
};
