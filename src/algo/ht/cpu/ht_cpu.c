/* HT on the CPU: making and ending it, barrier, self-test, tables. */
#include "algo/ht/cpu/ht_cpu.h"
#include "algo/ht/cpu/rail.h"

#include <string.h>

#include "algo/alarm.h"
#include "base/alloc.h"
#include "base/fail.h"

size_t epx__ht_ring_bytes(const epx__ht_cpu_t *ht)
{
    return ht->exchange->layout.reserve_bytes / (size_t)ht->members / EPX__ROW_ALIGN * EPX__ROW_ALIGN;
}

size_t epx__ht_ring_offset(const epx__ht_cpu_t *ht, const epx__ht_peer_t *peer)
{
    return ht->exchange->layout.reserve_offset + (size_t)(peer - ht->peers) * epx__ht_ring_bytes(ht);
}

/* ---- making ---- */

/* One slab a handle, touched as far as it is used. A mask may send a token to every rank, so slots count ranks. */
static epx_status_t routing_init(epx__ht_routing_t *routing, const epx_buffer_config_t *config, size_t ranks)
{
    size_t per_slot = config->tokens_max * ranks;
    routing->slab = epx__calloc(4 * per_slot + 3 * ranks + 1, sizeof(int32_t));
    if (!routing->slab)
        return epx__fail(EPX_E_NOMEM, "no memory for a handle's tables (%u tokens, %zu ranks)", config->tokens_max,
                         ranks);
    routing->dst_rank = routing->slab;
    routing->dst_row = routing->dst_rank + per_slot;
    routing->list = routing->dst_row + per_slot;
    routing->src_token = routing->list + per_slot;
    routing->first = routing->src_token + per_slot;
    routing->start = routing->first + ranks;
    routing->list_start = routing->start + ranks;
    return EPX_OK;
}

static void peers_init(epx__ht_cpu_t *ht)
{
    epx__exchange_t *exchange = ht->exchange;
    const epx__topology_t *topology = exchange->topology;
    int domain = topology->domain_of[exchange->rank];
    ht->window = exchange->window.base;
    for (int i = 0; i < ht->members; i++) {
        epx__ht_peer_t *peer = &ht->peers[i];
        peer->rank = epx__topology_rank(topology, domain, i);
        peer->base = exchange->peer[peer->rank];
        peer->to_it = (epx__words_t *)(peer->base + exchange->layout.words_offset) + exchange->rank;
        peer->from_it = (epx__words_t *)(ht->window + exchange->layout.words_offset) + peer->rank;
        if (peer->rank == exchange->rank)
            ht->self = peer;
    }
}

static void destroy(epx__exchange_t *exchange)
{
    epx__ht_cpu_t *ht = exchange->impl;
    if (!ht)
        return;
    for (int i = 0; ht->self && i < ht->members; i++)
        if (&ht->peers[i] != ht->self)
            epx__word_post(&ht->peers[i], &ht->peers[i].to_it->closed, 1);
    epx__ht_rails_close(ht);
    epx__workers_destroy(ht->workers);
    for (uint32_t h = 0; ht->routing && h < exchange->config.handles_max; h++)
        epx__free(ht->routing[h].slab);
    epx__free(ht->routing);
    epx__free(ht->peers);
    epx__free(ht->counts);
    epx__free(ht);
    exchange->impl = NULL;
}

static epx_status_t make(epx__exchange_t *exchange, epx__ht_cpu_t *ht)
{
    size_t ranks = (size_t)exchange->topology->ranks;
    ht->exchange = exchange;
    ht->members = exchange->topology->per_domain;
    ht->peers = epx__calloc((size_t)ht->members, sizeof *ht->peers);
    ht->routing = epx__calloc(exchange->config.handles_max, sizeof *ht->routing);
    ht->counts = epx__calloc(ranks + exchange->config.experts_max, sizeof(int32_t));
    if (!ht->peers || !ht->routing || !ht->counts)
        return epx__fail(EPX_E_NOMEM, "no memory for the exchange of %zu ranks", ranks);
    for (uint32_t h = 0; h < exchange->config.handles_max; h++)
        EPX__TRY(routing_init(&ht->routing[h], &exchange->config, ranks));
    EPX__TRY(epx__workers_create(exchange->threads, &ht->workers));
    peers_init(ht);
    return epx__ht_rails_open(ht);
}

static epx_status_t create(epx__exchange_t *exchange)
{
    epx__ht_cpu_t *ht = epx__calloc(1, sizeof *ht);
    if (!ht)
        return epx__fail(EPX_E_NOMEM, "no memory for the exchange");
    exchange->impl = ht;
    epx_status_t status = make(exchange, ht);
    if (status != EPX_OK)
        destroy(exchange);
    return status;
}

/* ---- small halves ---- */

epx_status_t epx__ht_cpu_barrier(epx__exchange_t *exchange, epx_stream_t stream)
{
    (void)stream;
    epx__half_t half = {.ht = exchange->impl, .operation = "barrier", .kind = EPX__KIND_BARRIER};
    return epx__half_run(&half, 0);
}

/* The self-test: a pattern unique to (from, to, slot) in both mailboxes, in the reserve's rings, twice. */
static uint64_t pattern(int from, int to, uint64_t slot, uint64_t index)
{
    return epx__shape_mix(epx__shape_mix(epx__shape_mix(slot + 1, (uint64_t)from + 1), (uint64_t)to + 1), index);
}

enum { CHECK_WORDS = 4 };

static size_t ring_probe_offset(const epx__ht_cpu_t *ht, int domain_index)
{
    return ht->exchange->layout.reserve_offset + (size_t)domain_index * epx__ht_ring_bytes(ht);
}

static void check_fill(epx__half_t *half, epx__ht_peer_t *peer, epx__message_t *message, void *tail)
{
    (void)tail;
    epx__ht_cpu_t *ht = half->ht;
    int me = ht->exchange->rank;
    uint64_t probe[CHECK_WORDS];
    for (uint64_t i = 0; i < CHECK_WORDS; i++)
        probe[i] = pattern(me, peer->rank, half->sequence & 1, i);
    memcpy(&message->direct, probe, sizeof probe);
    if (epx__ht_ring_bytes(ht) >= sizeof probe)
        memcpy(peer->base + ring_probe_offset(ht, (int)(ht->self - ht->peers)), probe, sizeof probe);
}

static epx_status_t check_hear(epx__half_t *half, epx__ht_peer_t *peer, const void *tail)
{
    (void)tail;
    epx__ht_cpu_t *ht = half->ht;
    uint8_t *works = half->job;
    uint64_t got[CHECK_WORDS], ring[CHECK_WORDS];
    memcpy(got, &peer->mail.direct, sizeof got);
    memcpy(ring, got, sizeof ring);
    if (epx__ht_ring_bytes(ht) >= sizeof ring)
        memcpy(ring, ht->window + ring_probe_offset(ht, (int)(peer - ht->peers)), sizeof ring);
    for (uint64_t i = 0; i < CHECK_WORDS; i++) {
        uint64_t expected = pattern(peer->rank, ht->exchange->rank, half->sequence & 1, i);
        if (got[i] != expected || ring[i] != expected)
            works[peer->rank] = 0;
    }
    return EPX_OK;
}

static epx_status_t check_half(epx__ht_cpu_t *ht, uint8_t *works)
{
    epx__half_t half = {
        .ht = ht, .operation = "check", .kind = EPX__KIND_CHECK, .fill = check_fill, .hear = check_hear, .job = works};
    return epx__half_run(&half, 0);
}

epx_status_t epx__ht_cpu_check(epx__exchange_t *exchange, uint8_t *works)
{
    epx__ht_cpu_t *ht = exchange->impl;
    memset(works, 0, (size_t)exchange->topology->ranks);
    for (int i = 0; i < ht->members; i++)
        works[ht->peers[i].rank] = 1;
    /* Barriers keep the probes from rings in use, and place the two checks on halves of both parities. */
    EPX__TRY(epx__ht_cpu_barrier(exchange, NULL));
    EPX__TRY(check_half(ht, works));
    EPX__TRY(epx__ht_cpu_barrier(exchange, NULL));
    EPX__TRY(epx__ht_cpu_barrier(exchange, NULL));
    EPX__TRY(check_half(ht, works));
    return epx__ht_cpu_barrier(exchange, NULL);
}

/* ---- the rest of the table ---- */

static epx_status_t counts(epx__exchange_t *exchange, epx__exchange_handle_t *handle)
{
    (void)exchange;
    (void)handle;
    return EPX_OK; /* begin has filled them in */
}

static epx_status_t tables(epx__exchange_t *exchange, epx__exchange_handle_t *handle, epx_handle_tables_t *out)
{
    const epx__ht_cpu_t *ht = exchange->impl;
    const epx__ht_routing_t *routing = &ht->routing[handle->index];
    out->dst_rank = routing->dst_rank;
    out->dst_row = routing->dst_row;
    out->src_token = routing->src_token;
    return EPX_OK;
}

static epx_status_t no_mark(epx__exchange_t *exchange, uint32_t mark, epx_stream_t stream)
{
    (void)exchange;
    (void)mark;
    (void)stream;
    return EPX_OK; /* calls end when their work is done: nothing to order */
}

/* Own faults are set where they happen; what a peer told while no call was under way is found here. */
static void poll_fault(epx__exchange_t *exchange)
{
    const epx__ht_cpu_t *ht = exchange->impl;
    if (!atomic_load(&exchange->fault.ready) && epx__alarm_is_up(exchange))
        (void)epx__alarm_read(exchange, ht->sequence);
}

static void interrupt(epx__exchange_t *exchange)
{
    epx__control_t *control = exchange->window.base;
    __atomic_store_n(&control->alarm[0], 1, __ATOMIC_RELEASE);
    epx__bell_ring((epx__bell_t *)control->bell);
}

const epx__exchange_ops_t epx__exchange_cpu = {
    .name = "cpu",
    .create = create,
    .destroy = destroy,
    .layout = epx__ht_cpu_layout,
    .begin = epx__ht_cpu_begin,
    .counts = counts,
    .rows = epx__ht_cpu_rows,
    .combine = epx__ht_cpu_combine,
    .barrier = epx__ht_cpu_barrier,
    .check = epx__ht_cpu_check,
    .tables = tables,
    .mark = no_mark,
    .wait_mark = no_mark,
    .poll_fault = poll_fault,
    .interrupt = interrupt,
};
