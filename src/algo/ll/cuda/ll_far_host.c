/*
 * Low latency between domains of GPUs, the host's side: tables, trying the channels, the blocks of a kernel.
 *
 * A far rank's part of a call is shared by as many blocks as there are for each, at most LL_FAR_PARTS: writing and
 * reading pinned memory across PCIe takes few SMs, but one alone does not fill it.
 */
#include "algo/ll/cuda/ll_far_host.h"

#include <string.h>

#include "algo/ll/net.h"
#include "base/fail.h"

static const epx__ll_net_t *net_of(const ll_far_host_t *f)
{
    return f->exchange->ll_net;
}

static void cut_device(ll_far_host_t *f, ll_cutter_t *c)
{
    const epx__ll_layout_t *l = &f->exchange->layout.ll;
    size_t count = net_of(f)->far;
    f->place = ll_cut(c, l->ranks, sizeof *f->place);
    f->rank_of = ll_cut(c, count, sizeof *f->rank_of);
    f->channels = ll_cut(c, count, sizeof *f->channels);
    f->far.lines = ll_cut(c, l->slots * count, sizeof *f->far.lines);
    f->far.pending = ll_cut(c, count, 4);
    f->far.agreed = ll_cut(c, count, 4);
    f->far.arrived = ll_cut(c, count, 4);
    f->far.left_ns = ll_cut(c, count, 8);
    f->far.sent = ll_cut(c, 2 * count, 8);
}

static epx_status_t allocate(ll_far_host_t *f)
{
    size_t pinned = (size_t)net_of(f)->far * 16 + 16;
    ll_cutter_t measure = {0};
    cut_device(f, &measure);
    cudaError_t error = cudaMalloc((void **)&f->slab, measure.at);
    if (error != cudaSuccess)
        return epx__fail(EPX_E_NOMEM, "GPU memory for low latency with %u ranks of other domains (%zu bytes): %s",
                         net_of(f)->far, measure.at, cudaGetErrorString(error));
    error = cudaHostAlloc((void **)&f->sent, pinned, cudaHostAllocMapped | cudaHostAllocPortable);
    if (error != cudaSuccess)
        return epx__fail(EPX_E_NOMEM, "pinned host memory for low latency: %s", cudaGetErrorString(error));
    memset(f->sent, 0, pinned);
    ll_cutter_t device = {.base = f->slab};
    cut_device(f, &device);
    error = cudaMemsetAsync(f->slab, 0, measure.at, f->ht->device->stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(f->ht->device->stream);
    return error == cudaSuccess ? EPX_OK : epx__cuda_fail(error, "making low latency between domains");
}

static epx_status_t put(const ll_far_host_t *f, void *to, const void *from, size_t bytes)
{
    return f->exchange->device->ops->copy_in(f->exchange->device, to, from, bytes);
}

static epx_status_t fill(ll_far_host_t *f)
{
    const epx__ll_net_t *net = net_of(f);
    int32_t ranks = (int32_t)f->exchange->layout.ll.ranks;
    EPX__TRY(put(f, f->place, net->place, sizeof *f->place * (size_t)ranks));
    for (int32_t r = 0; r < ranks; r++) {
        if (net->place[r] < 0)
            continue;
        EPX__TRY(put(f, &f->rank_of[net->place[r]], &r, sizeof r));
        EPX__TRY(put(f, &f->channels[net->place[r]], epx__ll_net_channel(net, r), sizeof *f->channels));
    }
    f->far.count = net->far;
    f->far.rank_of = f->rank_of;
    f->far.channels = f->channels;
    f->far.staging = (char *)net->staging;
    f->far.out = (char *)net->out;
    f->far.piece_bytes = net->piece_bytes;
    f->far.sent_too = f->sent;
    return EPX_OK;
}

epx_status_t epx__ll_far_make(ll_far_host_t *f, epx__exchange_t *exchange)
{
    f->exchange = exchange;
    f->ht = exchange->impl;
    if (net_of(f)->far > LL_FAR_MOST)
        return epx__fail(EPX_E_UNSUPPORTED, "low latency on GPUs: at most %u ranks of other domains", LL_FAR_MOST);
    EPX__TRY(allocate(f));
    EPX__TRY(fill(f));
    int error = epx__ll_load_far_dispatch(f->ht->device->stream);
    if (error == 0)
        error = epx__ll_load_far_combine(f->ht->device->stream);
    return error == 0 ? EPX_OK : epx__cuda_fail((cudaError_t)error, "loading low latency's kernels between domains");
}

void epx__ll_far_release(ll_far_host_t *f)
{
    (void)cudaFree(f->slab);
    (void)cudaFreeHost(f->sent);
}

epx_status_t epx__ll_far_try(const ll_far_host_t *f)
{
    epx__channels_t *channels = net_of(f)->channels;
    char words[EPX__CHANNELS_WORDS];
    int32_t *result = (int32_t *)(void *)(f->sent + 2 * (size_t)net_of(f)->far);
    ll_far_try_t p = {.far = f->far,
                      .memory = channels->memory_count,
                      .barrier = epx__block_word(channels, channels->layout.barrier, 0),
                      .barrier_offset = channels->layout.barrier,
                      .rank = f->exchange->rank,
                      .status = &result[0],
                      .peer = &result[1]};
    int error = epx__ll_launch_far_try(&p, f->ht->device->stream);
    if (error == 0)
        error = (int)cudaStreamSynchronize(f->ht->device->stream);
    if (error != 0)
        return epx__cuda_fail((cudaError_t)error, "trying low latency's channels");
    if (result[0] == EPX_OK)
        return EPX_OK;
    epx__channels_words(channels, words);
    return epx__fail((epx_status_t)result[0], "low latency's channel to rank %d, in another domain: %s%s", result[1],
                     epx__status_text((epx_status_t)result[0]), words);
}

void epx__ll_far_count(ll_far_host_t *f)
{
    uint64_t bytes = 0, puts = 0;
    for (uint32_t i = 0; i < f->far.count; i++) {
        bytes += __atomic_load_n(&f->sent[2 * i], __ATOMIC_RELAXED);
        puts += __atomic_load_n(&f->sent[2 * i + 1], __ATOMIC_RELAXED);
    }
    f->exchange->traffic.net_bytes += bytes - f->told;
    f->exchange->traffic.net_puts += puts - f->told_puts;
    f->told = bytes;
    f->told_puts = puts;
}

/* ---- launching ---- */

static uint32_t parts_of(const ll_far_host_t *f, uint32_t blocks)
{
    uint32_t parts = blocks / f->far.count;
    return parts < 1 ? 1 : parts < LL_FAR_PARTS ? parts : LL_FAR_PARTS;
}
static uint32_t blocks_of(const ll_far_host_t *f, uint32_t blocks, uint32_t parts)
{
    return blocks < f->far.count * parts ? blocks : f->far.count * parts;
}

static ll_far_dispatch_t dispatch_of(const ll_far_host_t *f, const ll_dispatch_t *p, uint32_t blocks)
{
    uint32_t wire = p->fp8 ? p->l.hidden + p->l.hidden / 128 * 4 : p->l.hidden * 2;
    return (ll_far_dispatch_t){.d = *p, .parts = parts_of(f, blocks), .stride = (wire + 15) / 16 * 16};
}

int epx__ll_far_send(const ll_far_host_t *f, const ll_dispatch_t *p, uint32_t blocks, void *stream)
{
    ll_far_dispatch_t d = dispatch_of(f, p, blocks);
    return epx__ll_launch_far_send(&d, blocks_of(f, blocks, d.parts), stream);
}

int epx__ll_far_take(const ll_far_host_t *f, const ll_dispatch_t *p, uint32_t blocks, void *stream)
{
    ll_far_dispatch_t d = dispatch_of(f, p, blocks);
    return epx__ll_launch_far_take(&d, blocks_of(f, blocks, d.parts), stream);
}

int epx__ll_far_home(const ll_far_host_t *f, const ll_combine_t *p, uint32_t blocks, void *stream)
{
    ll_far_combine_t c = {.c = *p, .parts = parts_of(f, blocks)};
    return epx__ll_launch_far_home(&c, blocks_of(f, blocks, c.parts), stream);
}

int epx__ll_far_back(const ll_far_host_t *f, const ll_combine_t *p, uint32_t blocks, void *stream)
{
    ll_far_combine_t c = {.c = *p, .parts = parts_of(f, blocks)};
    return epx__ll_launch_far_back(&c, blocks_of(f, blocks, c.parts), stream);
}
