/* Making what low latency needs between domains: see algo/ll/net.h. */
#include "algo/ll/net.h"

#include <unistd.h>

#include "api/rails.h"
#include "base/alloc.h"
#include "base/fail.h"

#define WINDOW 64 /* requests under way to one rank: those of several calls */
#define PAGE 4096u

static bool on_gpu(const epx_group_t *group)
{
    return group->device->ops->backend != EPX_BACKEND_CPU;
}

static size_t staging_bytes(const epx_buffer_t *buffer)
{
    return on_gpu(buffer->group) ? epx__ll_net_staging_bytes(&buffer->x.layout.ll) : 0; /* whole pages */
}

static size_t out_bytes(const epx_buffer_t *buffer, const epx__ll_net_t *net)
{
    return (size_t)buffer->x.layout.ll.slots * net->far * net->piece_bytes;
}

/* `staging` and `out` in whole pages of their own, for they may be pinned. */
static epx_status_t memory_cut(epx_buffer_t *buffer, epx__ll_net_t *net)
{
    const epx_group_t *group = buffer->group;
    const epx__ll_layout_t *layout = &buffer->x.layout.ll;
    size_t staging = staging_bytes(buffer), bytes = (staging + out_bytes(buffer, net) + PAGE - 1) / PAGE * PAGE;
    net->memory = epx__calloc(bytes + PAGE, 1);
    if (!net->memory)
        return epx__fail(EPX_E_NOMEM,
                         "low latency between domains: no memory for %u slots of %u ranks, %zu bytes each; give less "
                         "ll_tokens_max or ll_slots",
                         layout->slots, net->far, net->piece_bytes);
    uint8_t *base = (uint8_t *)(((uintptr_t)net->memory + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
    net->staging = staging ? base : NULL;
    net->out = base + staging;
    if (!on_gpu(group))
        return EPX_OK;
    EPX__TRY(group->device->ops->host_pin(group->device, base, bytes));
    net->pinned = true;
    const epx_channels_config_t sizes = {.channels = 1}; /* as channels_init asks */
    return group->device->ops->words_alloc(group->device, epx_channels_tickets(group->ranks, &sizes), &net->tickets);
}

static epx_status_t memory_init(epx_buffer_t *buffer, epx__ll_net_t *net)
{
    const epx_group_t *group = buffer->group;
    net->place = epx__calloc((size_t)group->ranks, sizeof *net->place);
    net->wanted = epx__calloc((size_t)group->ranks, 1);
    if (!net->place || !net->wanted)
        return epx__fail(EPX_E_NOMEM, "no memory for low latency between %d ranks", group->ranks);
    const epx__topology_t *topology = &group->topology;
    const epx__ll_layout_t *layout = &buffer->x.layout.ll;
    for (int r = 0; r < group->ranks; r++) {
        net->wanted[r] = topology->domain_of[r] != topology->domain_of[group->rank];
        net->place[r] = net->wanted[r] ? (int32_t)net->far++ : -1;
    }
    net->piece_bytes = epx__ll_piece_bytes(layout);
    net->help = !on_gpu(group) && sysconf(_SC_NPROCESSORS_ONLN) < 2l * group->host_ranks;
    return memory_cut(buffer, net);
}

/* A record is pushed whole, so the channel's window must hold its puts and the words. */
static epx_status_t window_for(epx_buffer_t *buffer, const epx__ll_net_t *net, epx__channels_t *channels)
{
    uint64_t puts = net->piece_bytes / channels->put_bytes_max + 1, need = puts + EPX__LL_NET_WORDS;
    if (need > channels->window)
        return epx__fail(
            EPX_E_INVALID,
            "low latency between domains: a record of %zu bytes takes %llu puts of %s, and %u may be under "
            "way; give less ll_tokens_max (%u now)",
            net->piece_bytes, (unsigned long long)puts, buffer->group->net, channels->window,
            buffer->x.config.ll_tokens_max);
    return EPX_OK;
}

static epx_status_t channels_init(epx_buffer_t *buffer, epx__ll_net_t *net)
{
    epx_group_t *group = buffer->group;
    const epx__ll_layout_t *layout = &buffer->x.layout.ll;
    bool gpu = on_gpu(group);
    epx_channel_memory_t memories[EPX__LL_NET_MEMORIES] = {
        [EPX__LL_NET_WINDOW] = {(uint8_t *)buffer->x.window.base + layout->words_offset, layout->total_bytes, 0},
        [EPX__LL_NET_OUT] = {net->out, out_bytes(buffer, net), 0}};
    if (gpu)
        memories[EPX__LL_NET_WINDOW] = (epx_channel_memory_t){net->staging, staging_bytes(buffer), 0};
    epx__channels_config_t config = {.wanted = net->wanted,
                                     .channels = 1,
                                     .proxies = 0, /* by the number of ranks */
                                     .window = WINDOW,
                                     .memories = memories,
                                     .memory_count = EPX__LL_NET_MEMORIES,
                                     .device_producers = gpu,
                                     .tickets = net->tickets};
    EPX__TRY(epx__buffer_channels_create(buffer, &config, &net->channels));
    if (gpu) {
        EPX__TRY(group->device->ops->host_pin(group->device, net->channels->block, net->channels->layout.total));
        net->pinned_too = true;
    }
    return window_for(buffer, net, net->channels);
}

epx_status_t epx__buffer_ll_net_open(epx_buffer_t *buffer)
{
    epx_group_t *group = buffer->group;
    if (group->topology.domains == 1 || buffer->x.config.ll_tokens_max == 0)
        return EPX_OK;
    epx__ll_net_t *net = epx__calloc(1, sizeof *net);
    epx_status_t status = EPX_OK;
    buffer->x.ll_net = net;
    if (net)
        status = memory_init(buffer, net);
    else
        status = epx__fail(EPX_E_NOMEM, "no memory for low latency between %d ranks", group->ranks);
    EPX__TRY(epx__group_agree(group, status, "making low latency's memory between domains"));
    status = channels_init(buffer, net);
    EPX__TRY(epx__group_agree(group, status, "connecting low latency between domains"));
    /* Some networks connect at the first put: now, not in the first call with its shorter deadline. GPU threads do it
     * for their channels when the implementation is made. */
    status = on_gpu(group) ? EPX_OK : epx_channels_barrier(net->channels);
    return epx__group_agree(group, status, "trying low latency's channels");
}

void epx__buffer_ll_net_close(epx_buffer_t *buffer)
{
    epx__ll_net_t *net = buffer->x.ll_net;
    if (!net)
        return;
    epx__device_t *device = buffer->group->device;
    buffer->x.ll_net = NULL;
    if (net->pinned_too)
        device->ops->host_unpin(device, net->channels->block);
    epx__group_channels_destroy(buffer->group, net->channels);
    if (net->pinned)
        device->ops->host_unpin(device, net->staging);
    if (net->tickets)
        device->ops->words_free(device, net->tickets);
    epx__free(net->memory);
    epx__free(net->place);
    epx__free(net->wanted);
    epx__free(net);
}
