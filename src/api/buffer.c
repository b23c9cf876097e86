/* Buffers: the window, its imports, the pools; failures that stay. */
#include <stdio.h>
#include <string.h>

#include "api/check.h"
#include "api/objects.h"
#include "api/rails.h"
#include "base/alloc.h"
#include "base/env.h"
#include "base/fail.h"

/* ---- configuration ---- */

static epx_status_t fill_defaults(epx_buffer_config_t *c, const epx_group_t *group)
{
    uint64_t lease = c->lease_bytes, reserve = c->reserve_bytes, sms = 0, usual = 32u << 20;
    if (group->device->ops->backend == EPX_BACKEND_CUDA)
        usual = 64u << 20;
    if (!lease)
        EPX__TRY(epx__env_u64(EPX__ENV_LEASE_BYTES, 0, UINT64_MAX / 4, 0, &lease));
    if (!reserve)
        EPX__TRY(epx__env_u64(EPX__ENV_RESERVE_BYTES, 0, UINT64_MAX / 4, usual, &reserve));
    if (!c->sms)
        EPX__TRY(epx__env_u64(EPX__ENV_SMS, 1, 1024, 0, &sms));
    if (lease > SIZE_MAX / 4 || reserve > SIZE_MAX / 4)
        return epx__fail(EPX_E_INVALID, "lease_bytes %llu or reserve_bytes %llu is more than any machine has",
                         (unsigned long long)lease, (unsigned long long)reserve);
    c->lease_bytes = (lease + EPX__PAGE - 1) / EPX__PAGE * EPX__PAGE;
    c->reserve_bytes = (reserve + EPX__PAGE - 1) / EPX__PAGE * EPX__PAGE;
    c->sms = c->sms ? c->sms : (int)sms;
    c->tokens_max = c->tokens_max ? c->tokens_max : 8192;
    c->topk_max = c->topk_max ? c->topk_max : 16;
    c->experts_max = c->experts_max ? c->experts_max : 1024;
    c->handles_max = c->handles_max ? c->handles_max : 64;
    c->leases_max = c->leases_max ? c->leases_max : 256;
    c->timeout_ms = c->timeout_ms ? c->timeout_ms : group->timeout_ms;
    if (c->ll_tokens_max)
        c->ll_slots = c->ll_slots ? c->ll_slots : 2;
    return EPX_OK;
}

static epx_status_t check_config(const epx_buffer_config_t *c, int ranks)
{
    if (c->topk_max > EPX_TOPK_MAX)
        return epx__fail(EPX_E_INVALID, "topk_max is %u; at most %d", c->topk_max, EPX_TOPK_MAX);
    if (c->tokens_max > INT32_MAX / 2 || c->experts_max > 1u << 20 || c->handles_max > 65536 || c->leases_max > 65536)
        return epx__fail(
            EPX_E_INVALID,
            "tokens_max %u, experts_max %u, handles_max %u or leases_max %u is too large (2^30, 2^20, 65536, "
            "65536 are the most)",
            c->tokens_max, c->experts_max, c->handles_max, c->leases_max);
    if ((uint64_t)c->tokens_max * (uint64_t)ranks > INT32_MAX)
        return epx__fail(EPX_E_INVALID, "tokens_max %u on %d ranks: together at most %d tokens", c->tokens_max, ranks,
                         INT32_MAX);
    EPX__TRY(epx__check_timeout("epx_buffer_create", c->timeout_ms));
    if (c->sms < 0)
        return epx__fail(EPX_E_INVALID, "sms is %d; it must not be negative", c->sms);
    if (c->ll_tokens_max && (c->ll_hidden_max == 0 || c->ll_hidden_max % 8 || c->ll_hidden_max > 1u << 24))
        return epx__fail(EPX_E_INVALID, "ll_hidden_max is %u; a multiple of 8 up to 2^24, for ll_tokens_max %u",
                         c->ll_hidden_max, c->ll_tokens_max);
    if (c->ll_tokens_max > 1u << 20 || c->ll_slots > 1024)
        return epx__fail(EPX_E_INVALID, "ll_tokens_max %u or ll_slots %u is too large (2^20 and 1024 are the most)",
                         c->ll_tokens_max, c->ll_slots);
    if (c->expert_rank && (c->experts == 0 || c->experts > c->experts_max))
        return epx__fail(EPX_E_INVALID, "expert_rank is given for %u experts; 1 to experts_max (%u) would be right",
                         c->experts, c->experts_max);
    return EPX_OK;
}

/* Not refused, and nobody is given up by deadline: docs/PROTOCOL-LL.md says why. Domains and shape have a say too
 * (algo/ll/cuda). */
static epx_status_t choose_inband(epx__exchange_t *x)
{
    const char *text = epx__env_text(EPX__ENV_LL_INBAND);
    if (strcmp(text, "auto") && strcmp(text, "0") && strcmp(text, "1"))
        return epx__fail(EPX_E_INVALID, "EPX_LL_INBAND is \"%.64s\"; it must be auto, 0 or 1", text);
    x->ll_inband = strcmp(text, "0") && !x->config.ll_mask_on_timeout;
    return EPX_OK;
}

/* What must be equal on all ranks. */
typedef struct agreement {
    uint64_t lease_bytes, reserve_bytes;
    uint32_t tokens_max, topk_max, experts_max, handles_max, experts, map_hash;
    uint32_t ll_tokens_max, ll_hidden_max, ll_slots, ll_inband;
} agreement_t;

typedef struct card {
    agreement_t agreement;
    epx__export_t exported;
} card_t;

static agreement_t agreement_of(const epx_buffer_t *buffer)
{
    const epx_buffer_config_t *c = &buffer->x.config;
    agreement_t a = {.lease_bytes = c->lease_bytes,
                     .reserve_bytes = c->reserve_bytes,
                     .tokens_max = c->tokens_max,
                     .topk_max = c->topk_max,
                     .experts_max = c->experts_max,
                     .handles_max = c->handles_max,
                     .experts = c->expert_rank ? c->experts : 0,
                     .ll_tokens_max = c->ll_tokens_max,
                     .ll_hidden_max = c->ll_hidden_max,
                     .ll_slots = c->ll_slots,
                     .ll_inband = c->ll_tokens_max ? buffer->x.ll_inband : 0};
    for (uint32_t e = 0; c->expert_rank && e < c->experts; e++)
        a.map_hash = (a.map_hash ^ (uint32_t)c->expert_rank[e]) * 16777619u;
    return a;
}

static epx_status_t check_agreement(const agreement_t *mine, const agreement_t *theirs, int rank)
{
    if (!memcmp(mine, theirs, sizeof *mine))
        return EPX_OK;
    return epx__fail(
        EPX_E_MISMATCH,
        "epx_buffer_create: rank %d passes another configuration (lease_bytes %llu, reserve_bytes %llu, "
        "tokens_max %u, topk_max %u, experts_max %u, handles_max %u, map of %u experts, ll_tokens_max %u, "
        "ll_hidden_max %u, ll_slots %u, in-band %u) than this rank (%llu, %llu, %u, %u, %u, %u, %u, %u, %u, %u, %u); "
        "they, and the "
        "map itself, must be equal on all ranks",
        rank, (unsigned long long)theirs->lease_bytes, (unsigned long long)theirs->reserve_bytes, theirs->tokens_max,
        theirs->topk_max, theirs->experts_max, theirs->handles_max, theirs->experts, theirs->ll_tokens_max,
        theirs->ll_hidden_max, theirs->ll_slots, theirs->ll_inband, (unsigned long long)mine->lease_bytes,
        (unsigned long long)mine->reserve_bytes, mine->tokens_max, mine->topk_max, mine->experts_max, mine->handles_max,
        mine->experts, mine->ll_tokens_max, mine->ll_hidden_max, mine->ll_slots, mine->ll_inband);
}

/* ---- making ---- */

static epx_status_t copy_map(epx_buffer_t *buffer)
{
    epx_buffer_config_t *c = &buffer->x.config;
    epx__experts_t map;
    if (!c->expert_rank)
        return EPX_OK;
    buffer->expert_rank = epx__calloc(c->experts, sizeof(int32_t));
    buffer->expert_local = epx__calloc(c->experts, sizeof(int32_t));
    if (!buffer->expert_rank || !buffer->expert_local)
        return epx__fail(EPX_E_NOMEM, "no memory for a map of %u experts", c->experts);
    memcpy(buffer->expert_rank, c->expert_rank, sizeof(int32_t) * c->experts);
    c->expert_rank = buffer->expert_rank;
    return epx__experts_make(c->experts, (uint32_t)buffer->group->ranks, buffer->expert_rank, buffer->expert_local,
                             &map);
}

/* Leases of different buffers have different numbers, so that one of another buffer is not taken for one's own. */
static void number_leases(epx_buffer_t *buffer)
{
    static atomic_uint buffers;
    uint32_t first = (atomic_fetch_add(&buffers, 1) + 1) * 0x9e3779b9u; /* far apart, however many there are */
    for (uint32_t i = 0; i < buffer->x.config.leases_max; i++)
        buffer->leases[i].generation = first;
}

static epx_status_t make_pools(epx_buffer_t *buffer)
{
    const epx_buffer_config_t *c = &buffer->x.config;
    size_t ranks = (size_t)buffer->group->ranks, each = ranks * ranks + ranks + c->experts_max;
    buffer->x.peer = epx__calloc(ranks, sizeof *buffer->x.peer);
    buffer->exports = epx__calloc(ranks, sizeof *buffer->exports);
    buffer->leases = epx__calloc(c->leases_max, sizeof *buffer->leases);
    buffer->handles = epx__calloc(c->handles_max, sizeof *buffer->handles);
    buffer->handle_slab = epx__calloc(c->handles_max, each * sizeof(int32_t));
    if (!buffer->x.peer || !buffer->exports || !buffer->leases || !buffer->handles || !buffer->handle_slab)
        return epx__fail(EPX_E_NOMEM, "no memory for a buffer's pools (%u handles, %u leases)", c->handles_max,
                         c->leases_max);
    number_leases(buffer);
    for (uint32_t i = 0; i < c->handles_max; i++) {
        epx_handle_t *handle = &buffer->handles[i];
        handle->buffer = buffer;
        handle->h.index = i;
        handle->h.matrix = buffer->handle_slab + i * each;
        handle->h.tokens_of = handle->h.matrix + ranks * ranks;
        handle->h.expert_rows = handle->h.tokens_of + ranks;
    }
    return epx__arena_init(&buffer->arena, c->lease_bytes, EPX__ROW_ALIGN, c->leases_max + 1);
}

static epx_status_t import_peers(epx_buffer_t *buffer)
{
    epx_group_t *group = buffer->group;
    const epx__topology_t *topology = &group->topology;
    for (int r = 0; r < group->ranks; r++) {
        if (topology->domain_of[r] != topology->domain_of[group->rank])
            continue;
        if (r == group->rank)
            buffer->x.peer[r] = buffer->x.window.base;
        else
            EPX__TRY(epx__group_import(group, r, &buffer->exports[r], &buffer->x.peer[r]));
    }
    return EPX_OK;
}

static epx_status_t exchange_cards(epx_buffer_t *buffer, const epx__export_t *exported)
{
    epx_group_t *group = buffer->group;
    card_t mine = {.agreement = agreement_of(buffer), .exported = *exported};
    card_t *all = epx__calloc((size_t)group->ranks, sizeof *all);
    epx_status_t status = all ? EPX_OK : epx__fail(EPX_E_NOMEM, "no memory for %d cards", group->ranks);
    status = epx__group_agree(group, status, "making a buffer");
    if (status == EPX_OK)
        status = epx__bootstrap_allgather(group->bootstrap, &mine, sizeof mine, all, group->timeout_ms);
    for (int r = 0; status == EPX_OK && r < group->ranks; r++) {
        buffer->exports[r] = all[r].exported;
        status = check_agreement(&mine.agreement, &all[r].agreement, r);
    }
    epx__free(all);
    return status;
}

/* The watcher of the bootstrap tells that a rank is gone: whoever waits learns at once. A buffer whose low latency goes
 * on without that rank is in order still; halves of high throughput look for the dead themselves. */
static void on_death(void *context, int rank)
{
    epx_buffer_t *buffer = context;
    const epx__ll_ops_t *ll_ops = buffer->group->ll_ops;
    epx__buffer_rails_lost(buffer, rank);
    if (buffer->x.ll && ll_ops->outlives && ll_ops->outlives(&buffer->x, rank))
        return;
    epx__exchange_fault(&buffer->x, EPX_E_PEER, "rank %d is gone (its process ended or its host is out of reach)",
                        rank);
    buffer->x.ops->interrupt(&buffer->x);
}

static epx_status_t local_parts(epx_buffer_t *buffer, const epx_buffer_config_t *config, epx__export_t *exported,
                                bool *window_open)
{
    epx_group_t *group = buffer->group;
    epx__exchange_t *x = &buffer->x;
    EPX__TRY(epx__config_copy(&x->config, sizeof x->config, config, "epx_buffer_config_t"));
    EPX__TRY(fill_defaults(&x->config, group));
    EPX__TRY(check_config(&x->config, group->ranks));
    EPX__TRY(choose_inband(x));
    EPX__TRY(copy_map(buffer));
    EPX__TRY(make_pools(buffer));
    EPX__TRY(epx__buffer_enter(buffer));
    buffer->entered = true;
    uint32_t chunk_words = group->device->ops->backend == EPX_BACKEND_CUDA ? EPX__CUDA_CHUNK_WORDS : 0;
    EPX__TRY(epx__window_layout_make((uint32_t)group->ranks, &x->config, chunk_words, &x->layout));
    EPX__TRY(epx__ll_check_memory(buffer));
    EPX__TRY(epx__window_create(group->device, group->fdserver, x->layout.total_bytes, &x->window, exported));
    *window_open = true;
    return EPX_OK;
}

static epx_status_t make_ll(epx_buffer_t *buffer)
{
    const epx_buffer_config_t *c = &buffer->x.config;
    if (c->ll_tokens_max == 0)
        return EPX_OK;
    if (!buffer->group->ll_ops)
        return epx__fail(EPX_E_UNSUPPORTED, "the %s backend has no low-latency mode in this build",
                         buffer->x.ops->name);
    buffer->ll_handles = epx__calloc(c->ll_slots, sizeof *buffer->ll_handles);
    if (!buffer->ll_handles)
        return epx__fail(EPX_E_NOMEM, "no memory for %u low-latency handles", c->ll_slots);
    for (uint32_t i = 0; i < c->ll_slots; i++) {
        buffer->ll_handles[i].buffer = buffer;
        buffer->ll_handles[i].call.index = i;
    }
    return buffer->group->ll_ops->create(&buffer->x);
}

static epx_status_t build(epx_buffer_t *buffer, const epx_buffer_config_t *config)
{
    epx_group_t *group = buffer->group;
    epx__export_t exported;
    bool window_open = false;
    epx_status_t status = local_parts(buffer, config, &exported, &window_open);
    if (window_open)
        buffer->exports[group->rank] = exported;
    EPX__TRY(epx__group_agree(group, status, "making a buffer's window and pools"));
    EPX__TRY(exchange_cards(buffer, &exported));
    status = import_peers(buffer);
    EPX__TRY(epx__group_agree(group, status, "mapping the peers' windows"));
    EPX__TRY(epx__buffer_rails_open(buffer));
    EPX__TRY(epx__buffer_ll_net_open(buffer));
    status = buffer->x.ops->create(&buffer->x);
    buffer->created = status == EPX_OK;
    if (status == EPX_OK)
        status = make_ll(buffer);
    if (buffer->x.ll_net && group->ll_ops && group->ll_ops->start) {
        EPX__TRY(epx__group_agree(group, status, "making a buffer's exchange"));
        status = group->ll_ops->start(&buffer->x);
    }
    if (status == EPX_OK)
        status = epx__bootstrap_on_death(group->bootstrap, on_death, buffer, &buffer->death_slot);
    if (status == EPX_OK)
        status = epx__buffer_rails_listen(buffer);
    return epx__group_agree(group, status, "making a buffer's exchange");
}

static void unmake(epx_buffer_t *buffer)
{
    epx_group_t *group = buffer->group;
    epx__exchange_t *x = &buffer->x;
    if (buffer->entered)
        epx__buffer_leave(buffer);
    if (buffer->death_slot >= 0)
        epx__bootstrap_off_death(group->bootstrap, buffer->death_slot);
    epx__buffer_rails_listen_no_more(buffer); /* its words go where the exchange is, which is freed now */
    if (x->ll)
        group->ll_ops->destroy(x);
    epx__buffer_ll_net_close(buffer);
    if (buffer->created)
        x->ops->destroy(x);
    epx__buffer_rails_close(buffer);
    for (int r = 0; x->peer && r < group->ranks; r++)
        if (r != group->rank && x->peer[r])
            epx__window_unimport(group->device, &buffer->exports[r], x->peer[r]);
    if (x->window.base)
        epx__window_destroy(group->device, group->fdserver, &x->window, &buffer->exports[group->rank]);
    epx__arena_fini(&buffer->arena);
    epx__free(x->peer);
    epx__free(buffer->exports);
    epx__free(buffer->leases);
    epx__free(buffer->handles);
    epx__free(buffer->handle_slab);
    epx__free(buffer->ll_handles);
    epx__free(buffer->expert_rank);
    epx__free(buffer->expert_local);
    epx__free(buffer);
    epx__group_unref(group);
}

epx_status_t epx_buffer_create(epx_group_t *group, const epx_buffer_config_t *config, epx_buffer_t **out)
{
    if (!group || !config || !out)
        return epx__fail(EPX_E_INVALID, "epx_buffer_create: group, config and buffer must not be NULL");
    epx_buffer_t *buffer = epx__calloc(1, sizeof *buffer);
    if (!buffer) {
        epx_status_t status = epx__fail(EPX_E_NOMEM, "no memory for a buffer");
        return epx__group_agree(group, status, "making a buffer's window and pools");
    }
    atomic_fetch_add(&group->references, 1);
    buffer->group = group;
    buffer->death_slot = -1;
    buffer->x.ops = group->exchange_ops;
    buffer->x.rank = group->rank;
    buffer->x.topology = &group->topology;
    buffer->x.threads = group->threads;
    buffer->x.spins = group->spins;
    buffer->x.streaming = group->streaming;
    buffer->x.device = group->device;
    buffer->x.bootstrap = group->bootstrap;
    epx_status_t status = build(buffer, config);
    if (status != EPX_OK) {
        char words[EPX__DETAIL_BYTES];
        snprintf(words, sizeof words, "%s", epx__detail());
        unmake(buffer);
        epx__detail_set(words);
        return status;
    }
    *out = epx__buffer_name(buffer);
    return EPX_OK;
}

/* In a forked child it is its parent's still, whose peers hear what is written to its window and its sockets. */
void epx_buffer_destroy(epx_buffer_t *buffer)
{
    if (buffer && epx__buffer_find(&buffer, "epx_buffer_destroy") == EPX_OK &&
        epx__bootstrap_ours(buffer->group->bootstrap))
        unmake(buffer);
}

/* ---- state ---- */

epx_status_t epx__buffer_usable(epx_buffer_t *buffer, const char *call)
{
    buffer->x.ops->poll_fault(&buffer->x);
    epx__fault_t *fault = &buffer->x.fault;
    if (!atomic_load(&fault->ready))
        return EPX_OK;
    if (buffer->told)
        return epx__fail(EPX_E_BROKEN, "%s: the buffer failed before and can only be destroyed; it was: %s", call,
                         fault->words);
    buffer->told = true;
    return epx__fail((epx_status_t)atomic_load(&fault->status), "%s", fault->words);
}

epx_status_t epx__buffer_told(epx_buffer_t *buffer, epx_status_t status)
{
    if (status != EPX_OK && atomic_load(&buffer->x.fault.ready))
        buffer->told = true;
    return status;
}

epx_status_t epx_buffer_status(epx_buffer_t *buffer)
{
    EPX__TRY(epx__buffer_find(&buffer, "epx_buffer_status"));
    buffer->x.ops->poll_fault(&buffer->x);
    epx__fault_t *fault = &buffer->x.fault;
    if (atomic_load(&fault->ready)) {
        buffer->told = true;
        return epx__fail((epx_status_t)atomic_load(&fault->status), "%s", fault->words);
    }
    uint32_t bad = atomic_exchange(&fault->bad_ids, 0);
    if (bad)
        return epx__fail(EPX_E_DATA, "%u top-k ids were neither -1 nor the number of an expert; they were taken as -1",
                         bad);
    return EPX_OK;
}

epx_status_t epx_buffer_barrier(epx_buffer_t *buffer, epx_stream_t stream)
{
    EPX__TRY(epx__buffer_find(&buffer, "epx_buffer_barrier"));
    EPX__TRY(epx__buffer_usable(buffer, "epx_buffer_barrier"));
    return epx__buffer_told(buffer, buffer->x.ops->barrier(&buffer->x, stream));
}

epx_status_t epx_buffer_check(epx_buffer_t *buffer, uint8_t *works)
{
    EPX__TRY(epx__buffer_find(&buffer, "epx_buffer_check"));
    if (!works)
        return epx__fail(EPX_E_INVALID, "epx_buffer_check: works is NULL");
    EPX__TRY(epx__buffer_usable(buffer, "epx_buffer_check"));
    return epx__buffer_told(buffer, buffer->x.ops->check(&buffer->x, works));
}

epx_status_t epx_buffer_get_traffic(epx_buffer_t *buffer, epx_traffic_t *traffic)
{
    EPX__TRY(epx__buffer_find(&buffer, "epx_buffer_get_traffic"));
    if (!traffic || traffic->size != sizeof *traffic)
        return epx__fail(EPX_E_INVALID,
                         "epx_buffer_get_traffic: traffic must not be NULL and traffic->size must be %zu",
                         sizeof *traffic);
    const epx__ll_ops_t *ll_ops = buffer->group->ll_ops;
    if (buffer->x.ll && ll_ops->count_traffic)
        ll_ops->count_traffic(&buffer->x);
    *traffic = buffer->x.traffic;
    traffic->size = sizeof *traffic;
    return EPX_OK;
}
