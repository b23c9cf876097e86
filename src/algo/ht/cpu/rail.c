/*
 * Rails: making them, a half's messages, streams of chunks through the rings.
 *
 * A message of half n is written into inbox slot n & 3. Safe: whoever sends it has heard the rail's message n - 1,
 * which was sent once that rank's mail of half n - 2 was posted, hence once every rank of its domain had read the mail
 * of half n - 4 and, with it, that slot. The outbox slot of n is free by then too: what lay there was heard at n - 4.
 *
 * A ring is cut anew by each half: the rail's message of this half says that it is empty there, for a half ends only
 * when all its rows have been taken. (Credit for the last chunks may still be on its way: then there is less room for a
 * moment.) A chunk's put lands before its signal.
 */
#include "algo/ht/cpu/rail.h"

#include <inttypes.h>
#include <sched.h>
#include <string.h>

#include "base/alloc.h"
#include "base/fail.h"
#include "base/mutate.h"

#define CHUNK_BYTES (512u << 10)
#define SLOTS_MAX 32u /* below the channels' window: a push never waits */

/* ---- making ---- */

static epx_status_t routing_init(epx__rail_routing_t *routing, const epx__ht_rails_t *rails)
{
    size_t domains = (size_t)rails->domains, ranks = domains * (size_t)rails->members;
    size_t tokens = rails->rails->tokens_max, masks = domains * tokens * rails->rails->layout.mask_bytes;
    size_t ints = domains + domains * tokens + ranks + 2 * ranks * tokens;
    routing->slab = epx__calloc(1, ints * sizeof(int32_t) + 2 * masks);
    if (!routing->slab)
        return epx__fail(EPX_E_NOMEM, "no memory for a handle's crossings (%zu tokens, %zu ranks)", tokens, ranks);
    routing->cross_count = routing->slab;
    routing->cross_token = routing->cross_count + domains;
    routing->in_count = routing->cross_token + domains * tokens;
    routing->pull_row = routing->in_count + ranks;
    routing->pull_token = routing->pull_row + ranks * tokens;
    routing->cross_mask = (uint8_t *)(routing->pull_token + ranks * tokens);
    routing->in_mask = routing->cross_mask + masks;
    return EPX_OK;
}

epx_status_t epx__ht_rails_open(epx__ht_cpu_t *ht)
{
    epx__exchange_t *exchange = ht->exchange;
    const epx__topology_t *topology = exchange->topology;
    if (!exchange->net)
        return EPX_OK;
    epx__ht_rails_t *rails = epx__calloc(1, sizeof *rails);
    if (!rails)
        return epx__fail(EPX_E_NOMEM, "no memory for the rails");
    ht->rails = rails;
    rails->ht = ht;
    rails->rails = exchange->net;
    rails->domains = topology->domains;
    rails->members = topology->per_domain;
    rails->home = topology->domain_of[exchange->rank];
    rails->index = topology->index_of[exchange->rank];
    size_t ranks = (size_t)topology->ranks;
    rails->rail = epx__calloc((size_t)rails->domains, sizeof *rails->rail);
    rails->routing = epx__calloc(exchange->config.handles_max, sizeof *rails->routing);
    rails->pulls = epx__calloc(ranks, sizeof *rails->pulls);
    rails->streamed = epx__calloc(ranks, sizeof *rails->streamed);
    rails->lent = epx__calloc(ranks, sizeof *rails->lent);
    rails->pulled = epx__calloc(ranks, sizeof *rails->pulled);
    if (!rails->rail || !rails->routing || !rails->pulls || !rails->streamed || !rails->lent || !rails->pulled)
        return epx__fail(EPX_E_NOMEM, "no memory for the rails of %zu ranks", ranks);
    for (uint32_t h = 0; h < exchange->config.handles_max; h++)
        EPX__TRY(routing_init(&rails->routing[h], rails));
    for (int d = 0; d < rails->domains; d++) {
        if (d == rails->home)
            continue;
        epx__ht_rail_t *rail = &rails->rail[d];
        rail->domain = d;
        rail->rank = epx__rails_peer(rails->rails, d);
        rail->messages = epx__rails_channel(rails->rails, d, EPX__RAIL_MESSAGES);
        rail->data = epx__rails_channel(rails->rails, d, EPX__RAIL_DATA);
        rail->credit = epx__rails_channel(rails->rails, d, EPX__RAIL_CREDIT);
    }
    return EPX_OK;
}

void epx__ht_rails_close(epx__ht_cpu_t *ht)
{
    epx__ht_rails_t *rails = ht->rails;
    if (!rails)
        return;
    for (uint32_t h = 0; rails->routing && h < ht->exchange->config.handles_max; h++)
        epx__free(rails->routing[h].slab);
    epx__free(rails->routing);
    epx__free(rails->rail);
    epx__free(rails->pulls);
    epx__free(rails->streamed);
    epx__free(rails->lent);
    epx__free(rails->pulled);
    epx__free(rails);
    ht->rails = NULL;
}

/* ---- a half's messages ---- */

void epx__ht_rails_start(epx__half_t *half)
{
    epx__ht_rails_t *rails = half->ht->rails;
    half->rails_done = !rails;
    for (int d = 0; rails && d < rails->domains; d++) {
        rails->rail[d].posted = rails->rail[d].heard = d == rails->home;
        rails->rail[d].straight = false;
    }
    epx__ht_rails_sleep(half, false);
}

void epx__ht_rails_end(epx__half_t *half)
{
    epx__ht_rails_sleep(half, true);
}

void epx__ht_rails_sleep(epx__half_t *half, bool sleep)
{
    epx__ht_rails_t *rails = half->ht->rails;
    if (!rails || !rails->rails->help || half->helping == !sleep)
        return;
    half->helping = !sleep;
    if (sleep)
        epx__channels_help_end(rails->rails->channels);
    else
        epx__channels_help_begin(rails->rails->channels);
}

bool epx__ht_rails_help(epx__half_t *half)
{
    if (!half->helping)
        return false;
    if (epx__channels_help(half->ht->rails->rails->channels))
        return true;
    sched_yield(); /* cores are few: whoever we wait for may want this one */
    return false;
}

epx_status_t epx__rail_failed(epx__half_t *half, const epx__ht_rail_t *rail, epx_status_t status)
{
    char words[EPX__CHANNELS_WORDS];
    epx__channels_words(half->ht->rails->rails->channels, words);
    return epx__half_fail(half, status, rail->rank, "%s on rank %d: the channel to rank %d: %s%s", half->operation,
                          half->ht->exchange->rank, rail->rank, epx__status_text(status), words);
}

static epx_status_t post(epx__half_t *half, epx__ht_rails_t *rails, epx__ht_rail_t *rail)
{
    size_t out = epx__rails_outbox(rails->rails, rail->domain, half->sequence);
    epx__rail_message_t *message = (epx__rail_message_t *)(void *)((uint8_t *)rails->rails->window.base + out);
    memset(message, 0, sizeof *message);
    message->sequence = half->sequence;
    message->kind = (uint32_t)half->kind;
    message->generation = half->generation;
    message->shape = half->shape;
    size_t bytes = sizeof *message;
    if (half->rail_fill)
        bytes = half->rail_fill(half, rail->domain, message);
    size_t to = epx__rails_inbox(rails->rails, rails->home, half->sequence);
    epx_status_t status = epx_port_put_signal(rail->messages, 0, to, out, bytes);
    if (status != EPX_OK)
        return epx__rail_failed(half, rail, status);
    epx_traffic_t *traffic = &half->ht->exchange->traffic;
    traffic->net_bytes += bytes;
    traffic->net_puts++;
    rail->posted = true;
    return EPX_OK;
}

static epx_status_t check(epx__half_t *half, const epx__ht_rail_t *rail)
{
    const epx__rail_message_t *mail = &rail->mail;
    int me = half->ht->exchange->rank;
    if (mail->sequence != half->sequence)
        return epx__half_fail(half, EPX_E_NET, rail->rank,
                              "%s on rank %d: rank %d's message is number %" PRIu64 ", not %" PRIu64, half->operation,
                              me, rail->rank, mail->sequence, half->sequence);
    if (mail->kind != (uint32_t)half->kind)
        return epx__half_fail(half, EPX_E_MISMATCH, rail->rank,
                              "collective %" PRIu64
                              " of this buffer is %s on rank %d but %s on rank %d; all ranks must make "
                              "the same calls in the same order",
                              half->sequence, epx__half_kind(half->kind), me, epx__half_kind(mail->kind), rail->rank);
    if (mail->generation != half->generation)
        return epx__half_fail(
            half, EPX_E_MISMATCH, rail->rank,
            "%s is about dispatch %u on rank %d but about dispatch %u on rank %d; all ranks must pass the "
            "handle of the same dispatch",
            half->operation, half->generation, me, mail->generation, rail->rank);
    if (mail->shape != half->shape)
        return epx__half_fail(
            half, EPX_E_MISMATCH, rail->rank,
            "%s: ranks %d and %d disagree on the shape (row or side bytes, hidden, dtype, topk, id width, "
            "experts, or whether weights are given)",
            half->operation, me, rail->rank);
    return EPX_OK;
}

static epx__step_t hear(epx__half_t *half, epx__ht_rails_t *rails, epx__ht_rail_t *rail)
{
    if (!epx_port_reached(rail->messages->signals, half->sequence))
        return EPX__STEP_STUCK;
    const uint8_t *inbox =
        (uint8_t *)rails->rails->window.base + epx__rails_inbox(rails->rails, rail->domain, half->sequence);
    memcpy(&rail->mail, inbox, sizeof rail->mail);
    if (check(half, rail) != EPX_OK)
        return EPX__STEP_FAILED;
    rail->heard = true;
    return EPX__STEP_MOVED;
}

epx__step_t epx__ht_rails_mail(epx__half_t *half)
{
    epx__ht_rails_t *rails = half->ht->rails;
    bool moved = false, all = true;
    for (int d = 0; d < rails->domains; d++) {
        epx__ht_rail_t *rail = &rails->rail[d];
        if (!rail->posted) {
            if (post(half, rails, rail) != EPX_OK)
                return EPX__STEP_FAILED;
            moved = true;
        }
        if (!rail->heard) {
            epx__step_t step = hear(half, rails, rail);
            if (step == EPX__STEP_FAILED)
                return step;
            moved |= step == EPX__STEP_MOVED;
        }
        all &= rail->heard;
    }
    return all ? EPX__STEP_DONE : moved ? EPX__STEP_MOVED : EPX__STEP_STUCK;
}

void epx__ht_rails_blame(epx__half_t *half, epx__blame_t *blame)
{
    const epx__ht_rails_t *rails = half->ht->rails;
    for (int d = 0; rails && d < rails->domains; d++)
        if (!rails->rail[d].heard)
            epx__blame_rank(blame, rails->rail[d].rank, "its message from another domain", half->sequence,
                            epx_ld_acquire_sys_u64(rails->rail[d].messages->signals));
}

epx_status_t epx__ht_rails_gone(const epx__half_t *half, int rank)
{
    const epx__ht_rails_t *rails = half->ht->rails;
    for (int d = 0; rails && d < rails->domains; d++)
        if (d != rails->home && rails->rail[d].rank == rank)
            return (epx_status_t)epx_ld_acquire_sys_u64(rails->rail[d].messages->fault);
    return EPX_OK;
}

/* ---- streams ---- */

epx_status_t epx__rail_stream_init(const epx__ht_rails_t *rails, epx__rail_stream_t *stream, size_t stride,
                                   uint32_t total, uint64_t base)
{
    size_t ring = rails->rails->layout.ring_bytes;
    size_t most = ring / 4 < CHUNK_BYTES ? ring / 4 : CHUNK_BYTES;
    *stream = (epx__rail_stream_t){
        .stride = stride, .ring_stride = stride, .total = total, .base = base, .rows_per_chunk = 1, .slots = 1};
    if (stride == 0)
        return EPX_OK;
    if (stride > ring)
        return epx__fail(
            EPX_E_INVALID,
            "a row of %zu bytes does not fit the ring between two domains (%zu bytes); create the buffer with "
            "more reserve_bytes: at least %zu",
            stride, ring, stride * 4 * (size_t)(rails->domains - 1));
    if (most / stride > 1)
        stream->rows_per_chunk = (uint32_t)(most / stride);
    size_t slots = ring / (stride * stream->rows_per_chunk);
    stream->slots = slots < SLOTS_MAX ? (uint32_t)slots : SLOTS_MAX;
    return EPX_OK;
}

uint8_t *epx__rail_row(uint8_t *ring, const epx__rail_stream_t *stream, uint64_t k)
{
    uint64_t slot = k / stream->rows_per_chunk % stream->slots;
    return ring + slot * stream->rows_per_chunk * stream->stride + k % stream->rows_per_chunk * stream->ring_stride;
}

/* The end of the chunk that row `moved` begins. */
uint32_t epx__rail_chunk_end(const epx__rail_stream_t *out)
{
    return out->total - out->moved < out->rows_per_chunk ? out->total : out->moved + out->rows_per_chunk;
}

uint32_t epx__rail_room(const epx__ht_rails_t *rails, epx__ht_rail_t *rail)
{
    (void)rails;
    epx__rail_stream_t *out = &rail->out;
    if (out->moved == out->total)
        return 0;
    uint64_t away = rail->chunks_sent - epx_ld_acquire_sys_u64(rail->credit->signals);
    if (away >= out->slots && !EPX__MUTATE(rail_no_credit))
        return 0;
    return epx__rail_chunk_end(out) - out->packed;
}

bool epx__rail_put(epx__half_t *half, epx__ht_rails_t *rails, epx__ht_rail_t *rail)
{
    epx__rail_stream_t *out = &rail->out;
    uint32_t end = epx__rail_chunk_end(out);
    if (out->moved == out->total || out->packed < end)
        return false;
    uint8_t *ring = half->ht->window; /* any base: its offset is asked for */
    size_t at = (size_t)(epx__rail_row(ring, out, out->moved) - ring);
    epx__rail_source_t source = {EPX__RAILS_MEMORY_RAILS, epx__rails_send(rails->rails, rail->domain) + at};
    return epx__rail_put_from(half, rails, rail, &source);
}

bool epx__rail_look(epx__ht_rail_t *rail)
{
    epx__rail_stream_t *in = &rail->in;
    if (in->moved == in->total)
        return false;
    uint64_t chunks = epx_ld_acquire_sys_u64(rail->data->signals) - in->base;
    uint64_t rows = chunks * in->rows_per_chunk;
    uint32_t there = rows < in->total ? (uint32_t)rows : in->total;
    bool moved = there > in->moved;
    in->moved = there;
    return moved;
}

bool epx__rail_free(epx__half_t *half, epx__ht_rail_t *rail, uint32_t rows)
{
    epx__rail_stream_t *in = &rail->in;
    uint64_t chunks = rows / in->rows_per_chunk + (rows == in->total && rows % in->rows_per_chunk ? 1 : 0);
    bool moved = false;
    in->freed = rows;
    while (rail->chunks_freed < in->base + chunks) {
        epx_status_t status = epx_port_signal(rail->credit);
        if (status != EPX_OK) {
            epx__rail_failed(half, rail, status);
            return moved;
        }
        rail->chunks_freed++;
        moved = true;
    }
    return moved;
}
