/* See host.h. The plug-in's host side as it is, on a state of high throughput that is made up. */
#include "emulate_ll/host.h"

#include <stdlib.h>

#include "algo/ll/cuda/ll_host.c"

/* ---- what the plug-in's other files would do ---- */

epx_status_t epx__cuda_fail(cudaError_t error, const char *what)
{
    return epx__fail(EPX_E_DEVICE, "%s: error %d", what, (int)error);
}
epx_status_t epx__cuda_enter(int ordinal, int *before)
{
    *before = ordinal;
    return EPX_OK;
}
void epx__cuda_leave(int ordinal, int before)
{
    (void)ordinal, (void)before;
}

/* ---- the buffer's state ---- */

static __thread int sms_of_rank;
static epx__ll_ops_t ops;

static void *zeroed(size_t count, size_t bytes)
{
    void *memory = calloc(count ? count : 1, bytes);
    if (!memory)
        exit(3);
    return memory;
}

static ht_cuda_t *make_ht(epx__exchange_t *x)
{
    ht_cuda_t *ht = zeroed(1, sizeof *ht);
    epx__cuda_device_t *device = zeroed(1, sizeof *device);
    epx__experts_t map;
    device->sms = sms_of_rank;
    ht->exchange = x;
    ht->device = device;
    ht->sms = sms_of_rank;
    ht->state = zeroed(1, sizeof *ht->state);
    ht->host = zeroed(1, sizeof *ht->host);
    ht->peers = zeroed((size_t)x->topology->ranks, sizeof *ht->peers);
    for (int r = 0; r < x->topology->ranks; r++)
        ht->peers[r] = x->peer[r];
    if (!x->config.expert_rank)
        return ht;
    ht->rank_of = zeroed(x->config.experts, sizeof(int32_t));
    ht->local_of = zeroed(x->config.experts, sizeof(int32_t));
    memcpy(ht->rank_of, x->config.expert_rank, sizeof(int32_t) * x->config.experts);
    if (epx__experts_make(x->config.experts, (uint32_t)x->topology->ranks, ht->rank_of, ht->local_of, &map) != EPX_OK)
        exit(3);
    return ht;
}

static epx_status_t emu_create(epx__exchange_t *x)
{
    void *impl = x->impl;
    x->impl = make_ht(x);
    epx_status_t status = epx__ll_cuda.create(x);
    x->impl = impl;
    if (status == EPX_OK && ((ll_cuda_t *)x->ll)->inband != x->ll_inband)
        return epx__fail(EPX_E_INVALID, "not in-band");
    return status;
}

static void emu_destroy(epx__exchange_t *x)
{
    ht_cuda_t *ht = x->ll ? ((ll_cuda_t *)x->ll)->ht : NULL;
    epx__ll_cuda.destroy(x);
    if (!ht)
        return;
    free((void *)ht->device);
    free(ht->state);
    free(ht->host);
    free(ht->peers);
    free(ht->rank_of);
    free(ht->local_of);
    free(ht);
}

/* A kernel's record becomes the buffer's failure, as the plug-in's poll does. */
static epx_status_t told(epx__exchange_t *x, epx_status_t status)
{
    const ht_host_t *h = ((ll_cuda_t *)x->ll)->ht->host;
    if (status == EPX_OK && h->ready)
        return epx__exchange_fault(
            x, (epx_status_t)h->status, "kernel %u, stage %u, rank %d, call %llu: %llx, not %llx", h->kind, h->stage,
            h->peer, (unsigned long long)h->sequence, (unsigned long long)h->seen, (unsigned long long)h->expected);
    return status;
}

#define HALF(name)                                                                                                     \
    static epx_status_t emu_##name(epx__exchange_t *x, epx__ll_call_t *call, epx_stream_t stream)                      \
    {                                                                                                                  \
        return told(x, epx__ll_cuda.name(x, call, stream));                                                            \
    }
HALF(dispatch_send)
HALF(dispatch_recv)
HALF(combine_send)
HALF(combine_recv)
HALF(dispatch)
HALF(combine)

void emu_use(epx_group_t *group, int sms)
{
    epx__ll_ops_t mine = epx__ll_cuda;
    mine.create = emu_create;
    mine.destroy = emu_destroy;
    mine.dispatch_send = emu_dispatch_send;
    mine.dispatch_recv = emu_dispatch_recv;
    mine.combine_send = emu_combine_send;
    mine.combine_recv = emu_combine_recv;
    mine.dispatch = emu_dispatch;
    mine.combine = emu_combine;
    ops = mine; /* the same from every thread */
    sms_of_rank = sms;
    group->ll_ops = &ops;
}
