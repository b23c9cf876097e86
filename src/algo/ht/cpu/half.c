/*
 * One half: mail to and from every peer, the half's own work, and the waiting.
 *
 * mail[me][n & 1] in a peer's window is mine to write once that peer's consumed number has reached n - 2. Its
 * `sequence` goes in last. A peer's message is copied out, then counted as consumed: nobody reads a mailbox twice.
 */
#include "algo/ht/cpu/ht_cpu.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "algo/alarm.h"
#include "algo/ht/cpu/rail.h"
#include "base/fail.h"
#include "base/mutate.h"

#define CLOSED_PATIENCE_NS 50000000u

static epx__bell_t *bell_of(uint8_t *window, const epx__window_layout_t *layout)
{
    return (epx__bell_t *)((epx__control_t *)(window + layout->control_offset))->bell;
}

static epx__message_t *mailbox(uint8_t *window, const epx__window_layout_t *layout, int source, uint64_t sequence)
{
    size_t slot = (size_t)source * 2 + (EPX__MUTATE(one_deep_mailbox) ? 0 : sequence & 1);
    return (epx__message_t *)(window + layout->mail_offset + slot * layout->message_bytes);
}

void epx__word_post(epx__ht_peer_t *peer, uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    epx__bell_ring((epx__bell_t *)((epx__control_t *)peer->base)->bell);
}

/* ---- failing ---- */

epx_status_t epx__half_fail(epx__half_t *half, epx_status_t status, int peer, const char *format, ...)
{
    char words[448];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(words, sizeof words, format, arguments);
    va_end(arguments);
    half->status = epx__alarm_raise(half->ht->exchange, status, half->sequence, peer, "%s", words);
    return half->status;
}

/* ---- mail ---- */

static bool post_mail(epx__half_t *half, epx__ht_peer_t *peer)
{
    epx__exchange_t *exchange = half->ht->exchange;
    uint64_t consumed = epx__word_load(&peer->from_it->consumed);
    if (consumed + 2 < half->sequence && !EPX__MUTATE(no_consumed))
        return false;
    if (EPX__MUTATE(consumed_equal) && half->sequence > 2 && consumed + 2 != half->sequence)
        return false;
    epx__message_t *box = mailbox(peer->base, &exchange->layout, exchange->rank, half->sequence);
    epx__message_t message = {.kind = (uint32_t)half->kind, .generation = half->generation, .shape = half->shape};
    if (EPX__MUTATE(sequence_first))
        epx__word_post(peer, &box->sequence, half->sequence);
    if (half->fill)
        half->fill(half, peer, &message, box + 1);
    memcpy((uint8_t *)box + sizeof box->sequence, (uint8_t *)&message + sizeof message.sequence,
           sizeof message - sizeof message.sequence);
    epx__word_post(peer, &box->sequence, half->sequence);
    peer->posted = true;
    return true;
}

const char *epx__half_kind(uint32_t kind)
{
    static const char *const names[] = {"nothing", "dispatch_begin", "dispatch_end or dispatch_again",
                                        "combine", "barrier",        "check"};
    return kind < sizeof names / sizeof names[0] ? names[kind] : "something unknown";
}

static epx_status_t check_mail(epx__half_t *half, const epx__ht_peer_t *peer)
{
    const epx__message_t *mail = &peer->mail;
    if (EPX__MUTATE(no_kind_check))
        return EPX_OK;
    if (mail->kind != (uint32_t)half->kind)
        return epx__half_fail(half, EPX_E_MISMATCH, peer->rank,
                              "collective %" PRIu64
                              " of this buffer is %s on rank %d but %s on rank %d; all ranks must make "
                              "the same calls in the same order",
                              half->sequence, epx__half_kind(half->kind), half->ht->exchange->rank,
                              epx__half_kind(mail->kind), peer->rank);
    if (mail->generation != half->generation)
        return epx__half_fail(
            half, EPX_E_MISMATCH, peer->rank,
            "%s is about dispatch %u on rank %d but about dispatch %u on rank %d; all ranks must pass the "
            "handle of the same dispatch",
            half->operation, half->generation, half->ht->exchange->rank, mail->generation, peer->rank);
    if (mail->shape != half->shape)
        return epx__half_fail(
            half, EPX_E_MISMATCH, peer->rank,
            "%s: ranks %d and %d disagree on the shape (row or side bytes, hidden, dtype, topk, id width, "
            "experts, or whether weights are given)",
            half->operation, half->ht->exchange->rank, peer->rank);
    return EPX_OK;
}

static epx__step_t read_mail(epx__half_t *half, epx__ht_peer_t *peer)
{
    epx__exchange_t *exchange = half->ht->exchange;
    epx__message_t *box = mailbox(half->ht->window, &exchange->layout, peer->rank, half->sequence);
    uint64_t there = epx__word_load(&box->sequence);
    if (there < half->sequence && !(EPX__MUTATE(stale_mail) && there > 0))
        return EPX__STEP_STUCK;
    if (EPX__MUTATE(consumed_first))
        epx__word_post(peer, &peer->to_it->consumed, half->sequence);
    memcpy(&peer->mail, box, sizeof *box);
    if (check_mail(half, peer) != EPX_OK)
        return EPX__STEP_FAILED;
    if (half->hear && (half->status = half->hear(half, peer, box + 1)) != EPX_OK)
        return EPX__STEP_FAILED;
    peer->heard = true;
    epx__word_post(peer, &peer->to_it->consumed, half->sequence);
    return EPX__STEP_MOVED;
}

static epx__step_t mail_step(epx__half_t *half)
{
    epx__ht_cpu_t *ht = half->ht;
    bool moved = false, all = true;
    for (int i = 0; i < ht->members; i++) {
        epx__ht_peer_t *peer = &ht->peers[i];
        if (peer == ht->self)
            continue;
        if (!peer->posted)
            moved |= post_mail(half, peer);
        if (!peer->heard) {
            epx__step_t step = read_mail(half, peer);
            if (step == EPX__STEP_FAILED)
                return step;
            moved |= step == EPX__STEP_MOVED;
        }
        all &= peer->posted && peer->heard;
    }
    return moved ? EPX__STEP_MOVED : all ? EPX__STEP_DONE : EPX__STEP_STUCK;
}

/* ---- the loop ---- */

static epx__step_t step(epx__half_t *half)
{
    if (!half->rails_done) { /* the domain's mail says that the rails' messages are here */
        epx__step_t rails = epx__ht_rails_mail(half);
        if (rails != EPX__STEP_DONE)
            return rails;
        half->rails_done = true;
        if (half->rail_heard)
            half->rail_heard(half);
    }
    epx__step_t mail = mail_step(half);
    if (mail == EPX__STEP_FAILED || !half->work)
        return mail;
    epx__step_t work = half->work(half);
    if (work == EPX__STEP_FAILED)
        return work;
    if (mail == EPX__STEP_DONE && work == EPX__STEP_DONE)
        return EPX__STEP_DONE;
    return mail == EPX__STEP_MOVED || work == EPX__STEP_MOVED ? EPX__STEP_MOVED : EPX__STEP_STUCK;
}

/* The waiter's last look before it sleeps: a step, kept for the loop. */
static bool look(void *context)
{
    epx__half_t *half = context;
    half->last = step(half);
    half->looked = true;
    return half->last != EPX__STEP_STUCK || epx__alarm_is_up(half->ht->exchange);
}

static bool named(const char *also, int rank)
{
    char name[24];
    int length = snprintf(name, sizeof name, "rank %d", rank);
    for (const char *at = also; (at = strstr(at, name)); at += length)
        if (at[length] == ',' || at[length] == 0)
            return true;
    return false;
}

void epx__blame_rank(epx__blame_t *blame, int rank, const char *stage, uint64_t expected, uint64_t seen)
{
    if (blame->rank < 0) {
        blame->rank = rank;
        blame->stage = stage;
        blame->expected = expected;
        blame->seen = seen;
    } else if (blame->also && rank != blame->rank && !named(blame->also, rank)) {
        size_t n = strlen(blame->also);
        snprintf(blame->also + n, blame->also_bytes - n, "%s rank %d", n ? "," : "; nor", rank);
    }
}

static void blame_mail(const epx__half_t *half, epx__blame_t *blame)
{
    for (int i = 0; i < half->ht->members; i++) {
        const epx__ht_peer_t *peer = &half->ht->peers[i];
        if (peer == half->ht->self || (peer->posted && peer->heard))
            continue;
        const epx__message_t *box = mailbox(half->ht->window, &half->ht->exchange->layout, peer->rank, half->sequence);
        if (peer->posted)
            epx__blame_rank(blame, peer->rank, "its message", half->sequence, epx__word_load(&box->sequence));
        else
            epx__blame_rank(blame, peer->rank, "its mailbox to be free", half->sequence - 2,
                            epx__word_load(&peer->from_it->consumed));
    }
}

static epx__blame_t find_blame(epx__half_t *half, char *also, size_t also_bytes)
{
    epx__blame_t blame = {.rank = -1, .stage = "nothing that it knows of", .also = also, .also_bytes = also_bytes};
    if (half->rails_done)
        blame_mail(half, &blame);
    else
        epx__ht_rails_blame(half, &blame);
    if ((blame.rank < 0 || also) && half->blame)
        half->blame(half, &blame);
    return blame;
}

/* Whom this rank waits for, for others to say; -1 nobody. */
static void say_waiting(epx__half_t *half, int rank)
{
    epx__ht_cpu_t *ht = half->ht;
    epx__control_t *control = (epx__control_t *)(ht->window + ht->exchange->layout.control_offset);
    if (rank >= 0 || half->waiting)
        __atomic_store_n(&control->waits[0], (uint64_t)(rank + 1), __ATOMIC_RELAXED);
    half->waiting = rank >= 0;
}

/* The rank blamed may be held up itself: "; rank 1 waits for rank 4", as far as this domain's windows say. */
static void follow(const epx__half_t *half, int rank, char *words, size_t bytes)
{
    const epx__ht_cpu_t *ht = half->ht;
    size_t used = 0;
    words[0] = 0;
    for (int hops = 0; hops < 3; hops++) {
        const epx__control_t *control = NULL;
        for (int i = 0; i < ht->members; i++)
            if (ht->peers[i].rank == rank && &ht->peers[i] != ht->self)
                control = (const epx__control_t *)(ht->peers[i].base + ht->exchange->layout.control_offset);
        int next = control ? (int)__atomic_load_n(&control->waits[0], __ATOMIC_RELAXED) - 1 : -1;
        if (next < 0 || next == rank || used + 32 > bytes)
            return;
        used += (size_t)snprintf(words + used, bytes - used, "; rank %d waits for rank %d", rank, next);
        rank = next;
    }
}

/* A rank that has destroyed its buffer may have done so since somebody else failed or died. That news is on its way
 * here too, and says more: it gets a moment. */
static bool patience(epx__half_t *half)
{
    uint64_t now = epx__now_ns();
    if (half->closed_since_ns == 0)
        half->closed_since_ns = now;
    return now - half->closed_since_ns < CLOSED_PATIENCE_NS;
}

/* Nothing moved: is somebody gone, or the time over? */
static epx_status_t check_stuck(epx__half_t *half)
{
    epx__blame_t blame = find_blame(half, NULL, 0);
    bool dead = epx__bootstrap_dead(half->ht->exchange->bootstrap, blame.rank);
    say_waiting(half, blame.rank);
    for (int i = 0; blame.rank >= 0 && i < half->ht->members; i++)
        if (half->ht->peers[i].rank == blame.rank && (dead || epx__word_load(&half->ht->peers[i].from_it->closed))) {
            /* It may have done its part since the last look, and only then closed. */
            half->last = step(half);
            half->looked = true;
            if (half->last != EPX__STEP_STUCK || (!dead && patience(half)))
                return EPX_OK;
            return epx__half_fail(half, EPX_E_PEER, blame.rank, "%s on rank %d waits for %s of rank %d, which %s",
                                  half->operation, half->ht->exchange->rank, blame.stage, blame.rank,
                                  dead ? "is gone" : "has destroyed its buffer");
        }
    if (blame.rank >= 0 && epx__ht_rails_gone(half, blame.rank) != EPX_OK) {
        half->last = step(half); /* its last words may have come since */
        half->looked = true;
        if (half->last != EPX__STEP_STUCK)
            return EPX_OK;
        return epx__half_fail(half, EPX_E_PEER, blame.rank,
                              "%s on rank %d waits for %s of rank %d, which has left or cannot be reached",
                              half->operation, half->ht->exchange->rank, blame.stage, blame.rank);
    }
    if (!epx__deadline_passed(&half->deadline))
        return EPX_OK;
    char also[96] = "", chain[112];
    blame = find_blame(half, also, sizeof also);
    follow(half, blame.rank, chain, sizeof chain);
    return epx__half_fail(half, EPX_E_TIMEOUT, blame.rank,
                          "%s (half %" PRIu64 ") on rank %d waited %.1f s for rank %d: %s (expected %" PRIu64
                          ", seen %" PRIu64 ")%s%s",
                          half->operation, half->sequence, half->ht->exchange->rank,
                          (double)epx__deadline_waited_ns(&half->deadline) * 1e-9, blame.rank, blame.stage,
                          blame.expected, blame.seen, also, chain);
}

static epx_status_t run(epx__half_t *half)
{
    for (;;) {
        if (epx__alarm_is_up(half->ht->exchange))
            EPX__TRY(epx__alarm_read(half->ht->exchange, half->sequence));
        if (!half->looked)
            half->last = step(half);
        half->looked = false;
        if (half->last == EPX__STEP_FAILED)
            return half->status;
        if (half->last == EPX__STEP_DONE)
            return epx__alarm_is_up(half->ht->exchange) && !EPX__MUTATE(no_last_look)
                       ? epx__alarm_read(half->ht->exchange, half->sequence)
                       : EPX_OK;
        if (half->last == EPX__STEP_MOVED) {
            if (half->waiting)
                say_waiting(half, -1);
            epx__waiter_progress(&half->waiter);
            epx__ht_rails_help(half);
            half->deadline.start_ns = 0;
            half->stuck_polls = 0;
            continue;
        }
        half->stuck_polls++;
        EPX__TRY(check_stuck(half));
        if (half->looked)
            continue;
        if (epx__ht_rails_help(half))
            continue;
        bool deep = half->waiter.polls > half->waiter.spins; /* it will sleep, not only look again */
        if (deep)
            epx__ht_rails_sleep(half, true);
        epx__waiter_pause(&half->waiter, look, half);
        if (deep)
            epx__ht_rails_sleep(half, false);
    }
}

epx_status_t epx__half_run(epx__half_t *half, uint64_t timeout_ms)
{
    epx__ht_cpu_t *ht = half->ht;
    half->sequence = ++ht->sequence;
    half->deadline = epx__deadline_ms(timeout_ms ? timeout_ms : ht->exchange->config.timeout_ms);
    epx__waiter_init(&half->waiter, bell_of(ht->window, &ht->exchange->layout), ht->exchange->spins);
    for (int i = 0; i < ht->members; i++)
        ht->peers[i].posted = ht->peers[i].heard = false;
    ht->self->posted = ht->self->heard = true;
    epx__ht_rails_start(half);
    epx_status_t status = run(half);
    say_waiting(half, -1);
    if (status != EPX_OK && half->lent) /* the caller may free it as soon as it is told */
        epx__channels_halt(ht->rails->rails->channels);
    epx__ht_rails_end(half);
    return status;
}
