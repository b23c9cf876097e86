/*
 * Low latency between domains, the rank's side of its port channels. One channel to each far rank; this thread is its
 * only producer, so room that was seen is room that is there, and no push waits.
 *
 *   data    is put from the slot's piece of `out`, which is filled again once `acked` has come to the requests that
 * were issued with that put a word  is an atomic_add of what it lacks, pushed after the data that it is about: the far
 * proxy adds once all earlier requests of the channel are there, in the order of their pushes. A plain put would not
 * do: the network may show it before the rows
 *
 * A word for which there is no room (a far proxy that applies nothing, so a rank that is given up) is kept in `want`
 * and told later; since a word only grows, one add makes up for all that were missed.
 *
 * A far rank that is gone (it has all that it needed and left; or it is lost) takes nothing any more: what is for it is
 * dropped, as stores to the window of a near rank that has left would be. Whoever waits for it says so.
 */
#include <sched.h>
#include <stddef.h>

#include "algo/alarm.h"
#include "algo/ll/cpu/ll_cpu.h"
#include "base/alloc.h"
#include "base/fail.h"
#include "base/mutate.h"

/* A dead process sends nothing, but what it had handed to its kernel or its card may still land here. Its machine is
 * as near as the network is fast; this is many round trips. */
#define REST_NS 250000000u

/* A rank that fails tells why and leaves, over two networks: leaving may be heard first. The reason gets that long. */
#define REASON_NS 250000000u

_Static_assert(offsetof(epx__ll_words_t, dispatched) == 8 * EPX__LL_DISPATCHED &&
                   offsetof(epx__ll_words_t, combined) == 8 * EPX__LL_COMBINED &&
                   offsetof(epx__ll_words_t, taken) == 8 * EPX__LL_TAKEN &&
                   offsetof(epx__ll_words_t, left_out) == 8 * EPX__LL_LEFT_OUT,
               "a word's place in its line");

epx_status_t epx__ll_net_open(epx__ll_cpu_t *ll)
{
    size_t ranks = ll->layout.ranks;
    ll->lines = epx__calloc((size_t)ll->layout.slots * ll->net->far, sizeof *ll->lines);
    ll->pending = epx__calloc(ranks, 1);
    ll->died_ns = epx__calloc(ranks, sizeof *ll->died_ns);
    ll->left_ns = epx__calloc(ranks, sizeof *ll->left_ns);
    if (!ll->lines || !ll->pending || !ll->died_ns || !ll->left_ns)
        return epx__fail(EPX_E_NOMEM, "no memory for low latency with %u ranks of other domains", ll->net->far);
    return EPX_OK;
}

void epx__ll_net_close(epx__ll_cpu_t *ll)
{
    epx__free(ll->lines);
    epx__free(ll->pending);
    epx__free(ll->died_ns);
    epx__free(ll->left_ns);
}

static epx__ll_line_t *line_of(const epx__ll_cpu_t *ll, int rank, uint64_t slot)
{
    return &ll->lines[slot * ll->net->far + (uint32_t)ll->net->place[rank]];
}

static bool room(const epx_port_channel_t *channel, uint64_t requests)
{
    uint64_t away = epx_ld_relaxed_sys_u64(channel->issued) - epx_ld_acquire_sys_u64(channel->acked);
    uint64_t queued = epx_ld_relaxed_sys_u64(channel->fifo_head) - epx_ld_acquire_sys_u64(channel->fifo_tail);
    return away + requests <= channel->window && queued + requests <= channel->slot_count;
}

static void count(epx__ll_cpu_t *ll, uint64_t bytes, uint64_t puts)
{
    ll->exchange->traffic.net_bytes += bytes;
    ll->exchange->traffic.net_puts += puts;
}

bool epx__ll_net_gone(const epx__ll_cpu_t *ll, int rank)
{
    return epx_ld_acquire_sys_u64(epx__ll_net_channel(ll->net, rank)->fault) != 0;
}

bool epx__ll_net_left(epx__ll_cpu_t *ll, int rank)
{
    if (!epx__ll_net_gone(ll, rank))
        return false;
    uint64_t now = epx__now_ns();
    if (ll->left_ns[rank] == 0)
        ll->left_ns[rank] = now;
    return now - ll->left_ns[rank] >= REASON_NS;
}

/* ---- words ---- */

/* Everything that this line lacks, as far as there is room; true when it lacks nothing. */
static bool push_line(epx__ll_cpu_t *ll, int rank, uint64_t slot)
{
    /* What ends a call's part goes last, and `left_out` before a later call's `combined`. */
    static const int order[] = {EPX__LL_TAKEN, EPX__LL_LEFT_OUT, EPX__LL_COMBINED, EPX__LL_DISPATCHED};
    const epx_port_channel_t *channel = epx__ll_net_channel(ll->net, rank);
    epx__ll_line_t *line = line_of(ll, rank, slot);
    bool gone = epx__ll_net_gone(ll, rank);
    size_t at =
        epx__ll_words_at(&ll->layout, slot, (uint32_t)ll->exchange->rank) - ll->layout.words_offset; /* of the line */
    for (size_t i = 0; i < sizeof order / sizeof order[0]; i++) {
        int word = order[i];
        uint64_t lacks = line->want[word] - line->told[word];
        if (lacks == 0)
            continue;
        if (gone) {
            line->told[word] = line->want[word];
            continue;
        }
        if (!room(channel, 1))
            return false;
        if (epx_port_atomic_add(channel, EPX__LL_NET_WINDOW, at + 8 * (size_t)word, (int64_t)lacks) != EPX_OK)
            return false;
        line->told[word] = line->want[word];
        count(ll, sizeof(epx__add_slot_t), 1);
    }
    return true;
}

static bool push_all(epx__ll_cpu_t *ll, int rank)
{
    bool all = true;
    for (uint64_t slot = 0; slot < ll->layout.slots; slot++)
        all = push_line(ll, rank, slot) && all;
    ll->pending[rank] = !all;
    return all;
}

void epx__ll_net_tell(epx__ll_cpu_t *ll, int rank, uint64_t number, int word)
{
    uint64_t slot = number % ll->layout.slots;
    line_of(ll, rank, slot)->want[word] = number;
    if (!push_line(ll, rank, slot)) {
        ll->pending[rank] = 1;
        if (EPX__MUTATE(ll_net_word_lost))
            line_of(ll, rank, slot)->told[word] = number;
    }
}

void epx__ll_net_retry(epx__ll_cpu_t *ll)
{
    for (int r = 0; ll->net && r < (int)ll->layout.ranks; r++)
        if (ll->pending[r] && !EPX__MUTATE(ll_net_no_retry))
            push_all(ll, r);
}

static bool room_for_words(epx__ll_cpu_t *ll, int rank, void *context)
{
    (void)context;
    return epx__ll_net_gone(ll, rank) || room(epx__ll_net_channel(ll->net, rank), EPX__LL_NET_WORDS);
}

static epx_status_t tell_pending(epx__ll_cpu_t *ll, int rank, void *context)
{
    (void)context;
    ll->again = !push_all(ll, rank);
    return EPX_OK;
}

epx_status_t epx__ll_net_settle(epx__ll_cpu_t *ll, const epx__ll_wait_t *half)
{
    bool any = false;
    for (int r = 0; r < (int)ll->layout.ranks; r++) {
        ll->done[r] = !ll->net || !ll->pending[r] || ll->masked[r];
        any = any || !ll->done[r];
    }
    epx__ll_wait_t wait = {.operation = half->operation,
                           .stage = "room for words in the channel to it",
                           .number = half->number,
                           .timeout_ms = half->timeout_ms,
                           .ready = room_for_words,
                           .serve = tell_pending};
    return any && !EPX__MUTATE(ll_net_no_settle) ? epx__ll_serve_all(ll, &wait) : EPX_OK;
}

/* ---- data ---- */

uint8_t *epx__ll_net_out(const epx__ll_cpu_t *ll, int rank, uint64_t number)
{
    return ll->net->out + epx__ll_net_out_at(ll->net, number % ll->layout.slots, rank);
}

bool epx__ll_net_ready(const epx__ll_cpu_t *ll, int rank, uint64_t number, size_t bytes)
{
    const epx_port_channel_t *channel = epx__ll_net_channel(ll->net, rank);
    const epx__ll_line_t *line = line_of(ll, rank, number % ll->layout.slots);
    if (epx__ll_net_gone(ll, rank) && !EPX__MUTATE(ll_net_waits_for_gone))
        return true;
    bool free = epx_ld_acquire_sys_u64(channel->acked) >= line->put || EPX__MUTATE(ll_net_out_reused);
    return free && room(channel, bytes / channel->put_bytes_max + 1 + EPX__LL_NET_WORDS);
}

epx_status_t epx__ll_net_put(epx__ll_cpu_t *ll, int rank, uint64_t number, size_t offset, size_t bytes)
{
    const epx_port_channel_t *channel = epx__ll_net_channel(ll->net, rank);
    uint64_t slot = number % ll->layout.slots;
    if (epx__ll_net_gone(ll, rank))
        return EPX_OK;
    epx_status_t status =
        epx_port_put(channel, epx_port_memories(EPX__LL_NET_WINDOW, EPX__LL_NET_OUT), offset - ll->layout.words_offset,
                     epx__ll_net_out_at(ll->net, slot, rank), bytes);
    if (status != EPX_OK)
        return epx__alarm_raise(ll->exchange, status, number, rank,
                                "low latency: call %llu: the channel to rank %d: %s", (unsigned long long)number, rank,
                                epx__status_text(status));
    line_of(ll, rank, slot)->put = epx_ld_relaxed_sys_u64(channel->issued);
    count(ll, bytes, (bytes + channel->put_bytes_max - 1) / channel->put_bytes_max);
    return EPX_OK;
}

/* ---- the dead ---- */

void epx__ll_net_died(epx__ll_cpu_t *ll, int rank)
{
    uint64_t none = 0;
    __atomic_compare_exchange_n(&ll->died_ns[rank], &none, epx__now_ns(), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    epx__channels_lost(ll->net->channels, rank); /* its requests are dropped from now on; nobody waits for them */
}

uint64_t epx__ll_net_rest_ns(epx__ll_cpu_t *ll, int rank)
{
    uint64_t died = __atomic_load_n(&ll->died_ns[rank], __ATOMIC_RELAXED), now = epx__now_ns();
    if (died == 0) { /* the watcher has not said it yet */
        epx__ll_net_died(ll, rank);
        died = now;
    }
    return now - died >= REST_NS ? 0 : REST_NS - (now - died);
}

/* ---- proxies ---- */

void epx__ll_net_help_begin(epx__ll_cpu_t *ll)
{
    if (ll->net && ll->net->help)
        epx__channels_help_begin(ll->net->channels);
}

bool epx__ll_net_help(epx__ll_cpu_t *ll)
{
    if (!ll->net || !ll->net->help)
        return false;
    if (epx__channels_help(ll->net->channels))
        return true;
    sched_yield(); /* cores are few: whoever we wait for may want this one */
    return false;
}

void epx__ll_net_help_end(epx__ll_cpu_t *ll)
{
    if (ll->net && ll->net->help)
        epx__channels_help_end(ll->net->channels);
}
