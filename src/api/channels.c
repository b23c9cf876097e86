/*
 * epx_channels_create and its undoing: the group's parts put together for src/channel, and the memory channels.
 *
 * The library's own memory (a config entry without base) is a window: [ the caller's bytes | a line for each memory
 * channel's signals, by the peer that writes it ]. Every rank of the domain maps it.
 */
#include <stdio.h>
#include <string.h>

#include "api/check.h"
#include "api/objects.h"
#include "api/rails.h"
#include "base/alloc.h"
#include "base/env.h"
#include "base/fail.h"
#include "channel/channels.h"

#define LINE 64

/* What hangs on an epx_channels_t made here. */
typedef struct own {
    epx_group_t *group;
    epx__gathering_t gathering;
    epx_channel_memory_t memories[EPX__CHANNELS_MEMORIES];
    epx__window_t window;
    epx__export_t *exports; /* [ranks] */
    void **mapped;          /* [ranks] */
    uint64_t *given;        /* [ranks * channels] lines: signals given on memory channels */
    size_t window_bytes;    /* the caller's part */
    int death_slot;
} own_t;

static void on_death(void *context, int rank)
{
    epx__channels_lost(context, rank);
}

void epx__group_channels_destroy(epx_group_t *group, epx__channels_t *channels)
{
    int slot = -1;
    if (channels && epx__bootstrap_on_death(group->bootstrap, on_death, channels, &slot) == EPX_OK) {
        epx__channels_leave(channels);
        epx__bootstrap_off_death(group->bootstrap, slot);
    }
    epx__channels_destroy(channels);
}

static epx_status_t make_window(own_t *own, const epx_channels_config_t *config, uint32_t channels)
{
    int ranks = own->group->ranks;
    int windows = 0;
    for (uint32_t m = 0; m < config->memory_count; m++) {
        own->memories[m] = config->memories[m];
        if (own->memories[m].base)
            continue;
        if (windows++ || own->memories[m].device || own->memories[m].bytes == 0)
            return epx__fail(
                EPX_E_INVALID,
                "epx_channels_create: memory %u has no base; at most one such, in host memory, of at least "
                "one byte",
                m);
        own->window_bytes = (own->memories[m].bytes + LINE - 1) / LINE * LINE;
        size_t bytes = own->window_bytes + (size_t)ranks * channels * LINE;
        epx_status_t status = epx__window_create(own->group->device, own->group->fdserver, bytes, &own->window,
                                                 &own->exports[own->group->rank]);
        if (status != EPX_OK)
            return status;
        own->memories[m].base = own->window.base;
    }
    return EPX_OK;
}

static epx_status_t map_domain(own_t *own, uint32_t channels)
{
    epx_group_t *group = own->group;
    const epx__topology_t *topology = &group->topology;
    epx__export_t mine = own->exports[group->rank];
    if (!own->window.base)
        mine.bytes = 0;
    EPX__TRY(epx__bootstrap_allgather(group->bootstrap, &mine, sizeof mine, own->exports, group->timeout_ms));
    for (int r = 0; r < group->ranks; r++) {
        size_t least = own->window_bytes + (size_t)group->ranks * channels * LINE;
        if (r == group->rank || topology->domain_of[r] != topology->domain_of[group->rank] || !own->window.base)
            continue;
        if (own->exports[r].bytes < least)
            return epx__fail(
                EPX_E_MISMATCH,
                "epx_channels_create: the library's own memory is %zu bytes here and less on rank %d; memory "
                "that memory channels use must be of one size",
                own->window_bytes, r);
        EPX__TRY(epx__group_import(group, r, &own->exports[r], &own->mapped[r]));
    }
    return EPX_OK;
}

/* Every entry is filled in; those that cannot be have no `remote`. */
static epx_status_t fill_memory_table(epx_channels_t *channels, own_t *own)
{
    uint32_t c = channels->channels;
    channels->mapped = epx__calloc((size_t)channels->ranks * c, sizeof *channels->mapped);
    own->given = epx__calloc((size_t)channels->ranks * c, LINE);
    if (!channels->mapped || !own->given)
        return epx__fail(EPX_E_NOMEM, "epx_channels_create: no memory for %u memory channels", channels->ranks * c);
    for (uint32_t number = 0; number < channels->ranks * c; number++) {
        uint32_t rank = number / c, channel = number % c;
        char *there = own->mapped[rank];
        size_t written_here = own->window_bytes + (size_t)number * LINE;
        size_t written_there = own->window_bytes + ((size_t)channels->rank * c + channel) * LINE;
        channels->mapped[number] = (epx_memory_channel_t){
            .remote = there,
            .remote_bytes = own->window_bytes,
            .remote_signals = there ? (uint64_t *)(void *)(there + written_there) : NULL,
            .local_signals = there ? (uint64_t *)(void *)((char *)own->window.base + written_here) : NULL,
            .given = (uint64_t *)(void *)((char *)own->given + (size_t)number * LINE),
            .fault = epx__block_word(channels, channels->layout.fault, rank),
            .timeout_ns = channels->config.timeout_ms * 1000000u,
            .peer = (int32_t)rank,
            .channel = channel,
        };
    }
    return EPX_OK;
}

static void own_free(own_t *own)
{
    epx_group_t *group = own->group;
    for (int r = 0; own->mapped && r < group->ranks; r++)
        if (own->mapped[r])
            epx__window_unimport(group->device, &own->exports[r], own->mapped[r]);
    if (own->window.base)
        epx__window_destroy(group->device, group->fdserver, &own->window, &own->exports[group->rank]);
    epx__free(own->given);
    epx__free(own->mapped);
    epx__free(own->exports);
    epx__free(own);
    epx__group_unref(group);
}

static epx_status_t fill_config(const epx_group_t *group, const epx_channels_config_t *given, own_t *own,
                                epx__channels_config_t *config)
{
    uint64_t proxies = given->proxies, channels = given->channels;
    if (!given->memories || given->memory_count < 1 || given->memory_count > EPX__CHANNELS_MEMORIES)
        return epx__fail(EPX_E_INVALID, "epx_channels_create: %u memories; 1 to %d are possible", given->memory_count,
                         EPX__CHANNELS_MEMORIES);
    if (!proxies)
        EPX__TRY(epx__env_u64(EPX__ENV_PROXIES, 1, EPX__CHANNELS_PROXIES, 0, &proxies));
    if (!channels)
        EPX__TRY(epx__env_u64(EPX__ENV_CHANNELS, 1, 65536, 0, &channels));
    *config = (epx__channels_config_t){
        .rank = group->rank,
        .ranks = group->ranks,
        .net = group->net_asked[0] ? group->net_asked : epx__env_text(EPX__ENV_NET),
        .address = epx__group_address(group),
        .nic = epx__env_text(EPX__ENV_NIC),
        .channels = (uint32_t)channels,
        .proxies = (uint32_t)proxies,
        .window = given->window,
        .fifo_slots = given->fifo_slots,
        .memories = own->memories,
        .memory_count = given->memory_count,
        .tickets = given->device_tickets,
        .device_producers = given->device_tickets != NULL,
        .timeout_ms = given->timeout_ms ? given->timeout_ms : group->timeout_ms,
        .allgather = epx__group_gather,
        .allgather_context = &own->gathering,
    };
    return epx__net_check_spec(config->net);
}

static epx_status_t build(own_t *own, const epx_channels_config_t *given, epx_channels_t **out)
{
    epx_group_t *group = own->group;
    epx__channels_config_t config;
    epx_channels_t *channels = NULL;
    epx_status_t status = fill_config(group, given, own, &config);
    epx__channels_t sizes = {.ranks = (uint32_t)group->ranks, .rank = (uint32_t)group->rank};
    if (status == EPX_OK) {
        sizes.memory_count = given->memory_count;
        sizes.config = config;
        status = epx__channels_sizes(&sizes);
    }
    if (status == EPX_OK)
        status = make_window(own, given, sizes.channels);
    EPX__TRY(epx__group_agree(group, status, "making the memory of channels"));
    status = map_domain(own, sizes.channels);
    EPX__TRY(epx__group_agree(group, status, "mapping the peers' channel memory"));
    own->gathering = (epx__gathering_t){.group = group};
    status = epx__channels_create(&config, &channels);
    epx__group_gather_no_more(&own->gathering, status);
    if (status == EPX_OK)
        status = fill_memory_table(channels, own);
    if (status == EPX_OK)
        status = epx__bootstrap_on_death(group->bootstrap, on_death, channels, &own->death_slot);
    status = epx__group_agree(group, status, "making channels");
    if (status != EPX_OK) {
        if (own->death_slot >= 0)
            epx__bootstrap_off_death(group->bootstrap, own->death_slot);
        epx__group_channels_destroy(group, channels);
        return status;
    }
    channels->api = own;
    *out = channels;
    return EPX_OK;
}

epx_status_t epx_channels_create(epx_group_t *group, const epx_channels_config_t *config, epx_channels_t **channels)
{
    epx_channels_config_t given;
    if (!group || !channels)
        return epx__fail(EPX_E_INVALID, "epx_channels_create: group and channels must not be NULL");
    EPX__TRY(epx__config_copy(&given, sizeof given, config, "epx_channels_config_t"));
    EPX__TRY(epx__check_timeout("epx_channels_create", given.timeout_ms));
    own_t *own = epx__calloc(1, sizeof *own);
    if (own) {
        own->exports = epx__calloc((size_t)group->ranks, sizeof *own->exports);
        own->mapped = epx__calloc((size_t)group->ranks, sizeof *own->mapped);
    }
    if (!own || !own->exports || !own->mapped) {
        epx__free(own ? own->exports : NULL);
        epx__free(own ? own->mapped : NULL);
        epx__free(own);
        epx_status_t status = epx__fail(EPX_E_NOMEM, "epx_channels_create: no memory for %d ranks", group->ranks);
        return epx__group_agree(group, status, "making the memory of channels");
    }
    atomic_fetch_add(&group->references, 1);
    own->group = group;
    own->death_slot = -1;
    epx_status_t status = build(own, &given, channels);
    if (status != EPX_OK) {
        char words[EPX__DETAIL_BYTES];
        snprintf(words, sizeof words, "%s", epx__detail());
        own_free(own);
        epx__detail_set(words);
    }
    return status;
}

void epx_channels_destroy(epx_channels_t *channels)
{
    if (!channels)
        return;
    own_t *own = channels->api;
    if (!epx__bootstrap_ours(own->group->bootstrap))
        return; /* a forked child: they are its parent's, whose sockets it shares */
    epx__bootstrap_off_death(own->group->bootstrap, own->death_slot);
    epx__group_channels_destroy(own->group, channels);
    own_free(own);
}
