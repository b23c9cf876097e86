/* Making the rails of a buffer: a window that the domain maps, and port channels to the rails of the other domains. */
#include "api/rails.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "algo/rails.h"
#include "base/alloc.h"
#include "base/env.h"
#include "base/fail.h"
#include "device/cpu/wait.h"

#define RAIL_PROXIES 1u

typedef struct own {
    epx_buffer_t *buffer;
    epx__export_t *exports; /* [ranks] */
    uint8_t *wanted;        /* [ranks] */
    epx__device_t *host;    /* of the rails window: host memory, also when the group's device is a GPU */
    uint8_t *pinned;        /* [ranks of the domain] its window is pinned for the GPU here */
    bool window_open, block_pinned;
    uint64_t *tickets; /* of GPU producers */
    int notice_slot;
} own_t;

static bool on_gpu(const epx_group_t *group)
{
    return group->device->ops->backend != EPX_BACKEND_CPU;
}

const char *epx__group_address(const epx_group_t *group)
{
    const char *address = epx__env_text(EPX__ENV_ADDRESS);
    return address || !group->loopback || epx__env_value(EPX__ENV_NIC) ? address : "127.0.0.1";
}

epx_status_t epx__group_choose_net(epx_group_t *group, const char *asked)
{
    if (group->topology.domains == 1)
        return EPX_OK;
    const char *spec = asked && asked[0] ? asked : epx__env_text(EPX__ENV_NET);
    if (!spec || !spec[0])
        spec = "ofi";
    epx__net_config_t config = {.address = epx__group_address(group),
                                .nic = epx__env_text(EPX__ENV_NIC),
                                .peers_max = 1,
                                .puts_max = 1,
                                .notices_max = 1};
    epx__net_t *net;
    if (strlen(spec) >= sizeof group->net)
        return epx__fail(EPX_E_INVALID, "the network's name \"%.40s...\" is too long", spec);
    EPX__TRY(epx__net_open(spec, &config, &net));
    snprintf(group->net, sizeof group->net, "%s", spec);
    snprintf(group->net_why, sizeof group->net_why, "%s%s", net->why,
             on_gpu(group) ? "; rows pass through pinned host memory" : "");
    epx__net_close(net);
    return EPX_OK;
}

/* A proxy: signals or credit have come. Whoever waits on the rank's bell looks again. */
static void on_change(void *context)
{
    epx_buffer_t *buffer = context;
    uint8_t *control = (uint8_t *)buffer->x.window.base + buffer->x.layout.control_offset;
    epx__bell_ring((epx__bell_t *)(void *)((epx__control_t *)(void *)control)->bell);
}

/* Another rank, of whatever domain, has failed. Called by the bootstrap's watcher. */
static void on_notice(void *context, int from, const void *data, size_t bytes)
{
    epx_buffer_t *buffer = context;
    epx__exchange_fault(&buffer->x, EPX_E_PEER, "rank %d failed %.*s", from, (int)bytes, (const char *)data);
    buffer->x.ops->interrupt(&buffer->x);
}

/* A GPU's rails window is host memory as well, which kernels and the network both reach. */
static epx_status_t choose_host(epx_group_t *group, own_t *own)
{
    if (on_gpu(group))
        return epx__device_cpu.open(-1, &own->host);
    own->host = group->device;
    return EPX_OK;
}

static epx_status_t open_window(epx_buffer_t *buffer, epx__rails_t *rails, own_t *own)
{
    epx_group_t *group = buffer->group;
    const epx__topology_t *topology = &group->topology;
    own->exports = epx__calloc((size_t)group->ranks, sizeof *own->exports);
    own->wanted = epx__calloc((size_t)group->ranks, 1);
    rails->member = epx__calloc((size_t)topology->per_domain, sizeof *rails->member);
    own->pinned = epx__calloc((size_t)topology->per_domain, 1);
    if (!own->exports || !own->wanted || !rails->member || !own->pinned)
        return epx__fail(EPX_E_NOMEM, "no memory for the rails of %d ranks", group->ranks);
    EPX__TRY(choose_host(group, own));
    EPX__TRY(epx__rails_layout_make(topology, buffer->x.config.tokens_max, buffer->x.config.experts_max,
                                    buffer->x.config.reserve_bytes, &rails->layout));
    EPX__TRY(epx__window_create(own->host, group->fdserver, rails->layout.total, &rails->window,
                                &own->exports[group->rank]));
    own->window_open = true;
    if (on_gpu(group)) /* as epx_channels_tickets counts them */
        return group->device->ops->words_alloc(group->device, RAIL_PROXIES + (size_t)group->ranks * EPX__RAIL_CHANNELS,
                                               &own->tickets);
    return EPX_OK;
}

static epx_status_t import_window(epx_group_t *group, const own_t *own, int rank, void **mapped)
{
    if (!on_gpu(group))
        return epx__group_import(group, rank, &own->exports[rank], mapped);
    return epx__window_import(own->host, &own->exports[rank], group->timeout_ms, mapped);
}

static epx_status_t map_members(epx_buffer_t *buffer, epx__rails_t *rails, own_t *own)
{
    epx_group_t *group = buffer->group;
    epx__export_t mine = own->exports[group->rank];
    EPX__TRY(epx__bootstrap_allgather(group->bootstrap, &mine, sizeof mine, own->exports, group->timeout_ms));
    for (int i = 0; i < group->topology.per_domain; i++) {
        int rank = epx__topology_rank(&group->topology, rails->domain, i);
        void *mapped = rails->window.base;
        if (rank != group->rank)
            EPX__TRY(import_window(group, own, rank, &mapped));
        rails->member[i] = mapped;
        EPX__TRY(group->device->ops->host_pin(group->device, mapped, rails->layout.total));
        own->pinned[i] = 1;
    }
    return EPX_OK;
}

epx_status_t epx__buffer_channels_create(epx_buffer_t *buffer, struct epx__channels_config *config,
                                         struct epx_channels **channels)
{
    epx_group_t *group = buffer->group;
    epx__gathering_t gathering = {.group = group};
    uint64_t timeout_ms = buffer->x.config.timeout_ms; /* of halves; making the channels may take the group's */
    config->rank = group->rank;
    config->ranks = group->ranks;
    config->net = group->net;
    config->address = epx__group_address(group);
    config->nic = epx__env_text(EPX__ENV_NIC);
    config->timeout_ms = timeout_ms > group->timeout_ms ? timeout_ms : group->timeout_ms;
    config->allgather = epx__group_gather;
    config->allgather_context = &gathering;
    config->changed = on_gpu(group) ? NULL : on_change; /* kernels poll */
    config->changed_context = buffer;
    epx_status_t status = epx__channels_create(config, channels);
    epx__group_gather_no_more(&gathering, status);
    return status;
}

static epx_status_t open_channels(epx_buffer_t *buffer, epx__rails_t *rails, own_t *own)
{
    epx_group_t *group = buffer->group;
    const epx__topology_t *topology = &group->topology;
    /* By number: EPX__RAILS_MEMORY_RAILS, EPX__RAILS_MEMORY_WINDOW. */
    epx_channel_memory_t memories[] = {{rails->window.base, rails->layout.total, 0},
                                       {buffer->x.window.base, buffer->x.layout.total_bytes, 0}};
    bool gpu = on_gpu(group);
    for (int d = 0; d < topology->domains; d++)
        own->wanted[epx__topology_rank(topology, d, rails->index)] = d != rails->domain;
    epx__channels_config_t config = {
        .wanted = own->wanted,
        .channels = EPX__RAIL_CHANNELS,
        .proxies = RAIL_PROXIES,
        .memories = memories,
        .memory_count = gpu ? 1 : 2, /* GPU memory is not for the network: its rows pass through the rails window */
        .any_sources = !gpu,
        .device_producers = gpu,
        .tickets = own->tickets};
    EPX__TRY(epx__buffer_channels_create(buffer, &config, &rails->channels));
    EPX__TRY(group->device->ops->host_pin(group->device, rails->channels->block, rails->channels->layout.total));
    own->block_pinned = true;
    return EPX_OK;
}

epx_status_t epx__buffer_rails_open(epx_buffer_t *buffer)
{
    epx_group_t *group = buffer->group;
    if (group->topology.domains == 1)
        return EPX_OK;
    epx__rails_t *rails = epx__calloc(1, sizeof *rails);
    own_t *own = epx__calloc(1, sizeof *own);
    epx_status_t status = EPX_OK;
    if (!rails || !own) {
        epx__free(rails);
        epx__free(own);
        status = epx__fail(EPX_E_NOMEM, "no memory for the rails of a buffer");
    } else {
        own->buffer = buffer;
        own->notice_slot = -1;
        buffer->x.net = rails;
        rails->api = own;
        rails->topology = &group->topology;
        rails->domain = group->topology.domain_of[group->rank];
        rails->index = group->topology.index_of[group->rank];
        rails->tokens_max = buffer->x.config.tokens_max;
        rails->experts_max = buffer->x.config.experts_max;
        rails->help = !on_gpu(group) && sysconf(_SC_NPROCESSORS_ONLN) < 2l * group->host_ranks;
        status = open_window(buffer, rails, own);
    }
    EPX__TRY(epx__group_agree(group, status, "making the rails between domains"));
    status = map_members(buffer, rails, own);
    EPX__TRY(epx__group_agree(group, status, "mapping the domain's rails windows"));
    status = open_channels(buffer, rails, own);
    buffer->x.notice_tag = 0x4e000000u + (uint32_t)group->buffers++;
    EPX__TRY(epx__group_agree(group, status, "connecting the rails"));
    /* Some networks connect at the first put: now, not in the first dispatch with its shorter deadline. What GPU
     * threads push, only they may push: the exchange tries their channels itself when it is made. */
    status = on_gpu(group) ? EPX_OK : epx_channels_barrier(rails->channels);
    return epx__group_agree(group, status, "trying the rails");
}

epx_status_t epx__buffer_rails_listen(epx_buffer_t *buffer)
{
    const epx__rails_t *rails = buffer->x.net;
    own_t *own = rails ? rails->api : NULL;
    return !own ? EPX_OK
                : epx__bootstrap_on_notice(buffer->group->bootstrap, buffer->x.notice_tag, on_notice, buffer,
                                           &own->notice_slot);
}

void epx__buffer_rails_listen_no_more(epx_buffer_t *buffer)
{
    const epx__rails_t *rails = buffer->x.net;
    own_t *own = rails ? rails->api : NULL;
    if (own)
        epx__bootstrap_off_notice(buffer->group->bootstrap, own->notice_slot);
}

void epx__buffer_rails_lost(epx_buffer_t *buffer, int rank)
{
    epx__rails_t *rails = buffer->x.net;
    if (rails)
        epx__channels_lost(rails->channels, rank);
}

void epx__buffer_rails_close(epx_buffer_t *buffer)
{
    epx__rails_t *rails = buffer->x.net;
    epx_group_t *group = buffer->group;
    if (!rails)
        return;
    own_t *own = rails->api;
    if (own->block_pinned)
        group->device->ops->host_unpin(group->device, rails->channels->block);
    epx__group_channels_destroy(group, rails->channels);
    group->device->ops->words_free(group->device, own->tickets);
    for (int i = 0; rails->member && own->exports && own->pinned && i < group->topology.per_domain; i++) {
        int rank = epx__topology_rank(&group->topology, rails->domain, i);
        if (own->pinned[i])
            group->device->ops->host_unpin(group->device, rails->member[i]);
        if (rank != group->rank && rails->member[i])
            epx__window_unimport(own->host, &own->exports[rank], rails->member[i]);
    }
    if (own->window_open)
        epx__window_destroy(own->host, group->fdserver, &rails->window, &own->exports[group->rank]);
    if (own->host && own->host != group->device)
        own->host->ops->close(own->host);
    epx__free(rails->member);
    epx__free(own->exports);
    epx__free(own->wanted);
    epx__free(own->pinned);
    epx__free(own);
    epx__free(rails);
    buffer->x.net = NULL;
}
