/*
 * Who wants to hear of deaths and notices. The watcher calls them with `listeners_lock` held, so that after
 * epx__bootstrap_off_death or _off_notice has returned no call is under way.
 */
#include <string.h>
#include <unistd.h>

#include "base/fail.h"
#include "base/log.h"
#include "bootstrap/state.h"

bool epx__bootstrap_dead(const epx__bootstrap_t *b, int rank)
{
    return rank >= 0 && rank < b->ranks && __atomic_load_n(&b->state[rank], __ATOMIC_ACQUIRE) == EPX__RANK_DEAD;
}

static epx_status_t enter(epx__bootstrap_t *b, const epx__listener_t *listener, int *slot)
{
    pthread_mutex_lock(&b->listeners_lock);
    int free_slot = 0;
    while (free_slot < EPX__LISTENERS_MAX && b->listeners[free_slot].used)
        free_slot++;
    if (free_slot < EPX__LISTENERS_MAX) {
        b->listeners[free_slot] = *listener;
        for (int rank = 0; rank < b->ranks; rank++)
            b->told[rank] &= ~(1ull << free_slot);
        *slot = free_slot;
    }
    pthread_mutex_unlock(&b->listeners_lock);
    if (free_slot == EPX__LISTENERS_MAX)
        return epx__fail(EPX_E_BUSY, "%d listeners on one group already", EPX__LISTENERS_MAX);
    epx__bootstrap_wake(b); /* to hear what happened before */
    return EPX_OK;
}

static void leave(epx__bootstrap_t *b, int slot)
{
    if (slot < 0 || slot >= EPX__LISTENERS_MAX)
        return;
    pthread_mutex_lock(&b->listeners_lock);
    b->listeners[slot] = (epx__listener_t){.used = false};
    pthread_mutex_unlock(&b->listeners_lock);
}

epx_status_t epx__bootstrap_on_death(epx__bootstrap_t *b, epx__bootstrap_death_fn fn, void *context, int *slot)
{
    return enter(b, &(epx__listener_t){.used = true, .death = fn, .context = context}, slot);
}

void epx__bootstrap_off_death(epx__bootstrap_t *b, int slot)
{
    leave(b, slot);
}

epx_status_t epx__bootstrap_on_notice(epx__bootstrap_t *b, uint32_t tag, epx__bootstrap_notice_fn fn, void *context,
                                      int *slot)
{
    return enter(b, &(epx__listener_t){.used = true, .notice = fn, .tag = tag, .context = context}, slot);
}

void epx__bootstrap_off_notice(epx__bootstrap_t *b, int slot)
{
    leave(b, slot);
}

void epx__bootstrap_notify(epx__bootstrap_t *b, uint32_t tag, const void *data, size_t bytes)
{
    if (b->ranks == 1 || b->pid != getpid())
        return;
    epx__frame_t frame = {.type = EPX__FRAME_NOTICE,
                          .from = (uint32_t)b->rank,
                          .tag = tag,
                          .bytes = (uint32_t)(bytes < EPX__NOTICE_MAX ? bytes : EPX__NOTICE_MAX)};
    epx__message_t *message = epx__message_create(&frame, data);
    pthread_mutex_lock(&b->lock);
    bool middle = (int)b->middle == b->rank;
    bool told =
        message && (middle ? epx__relay_to_others(b, b->middle, message) : epx__relay_to(b, b->middle, message));
    pthread_mutex_unlock(&b->lock);
    epx__message_release(message);
    if (!told)
        epx__log(EPX__LOG_WARN, "bootstrap: no memory to tell the other ranks of a failure");
}

static void tell_deaths(epx__bootstrap_t *b)
{
    for (int rank = 0; rank < b->ranks; rank++) {
        if (!epx__bootstrap_dead(b, rank))
            continue;
        for (int slot = 0; slot < EPX__LISTENERS_MAX; slot++) {
            epx__listener_t *listener = &b->listeners[slot];
            if (!listener->used || !listener->death || b->told[rank] >> slot & 1)
                continue;
            b->told[rank] |= 1ull << slot;
            listener->death(listener->context, rank);
        }
    }
}

static bool tell_notice(epx__bootstrap_t *b, const epx__message_t *message)
{
    bool heard = false;
    for (int slot = 0; slot < EPX__LISTENERS_MAX; slot++) {
        epx__listener_t *listener = &b->listeners[slot];
        if (!listener->used || !listener->notice || listener->tag != message->frame.tag)
            continue;
        listener->notice(listener->context, (int)message->frame.from, message->payload, message->frame.bytes);
        heard = true;
    }
    return heard;
}

/* Notices in their order; the last ones that nobody listens for yet are kept. */
static void tell_notices(epx__bootstrap_t *b, epx__message_t *fresh)
{
    epx__message_t *old = b->kept_first, *message = old ? old : fresh;
    b->kept_first = b->kept_last = NULL;
    b->kept_count = 0;
    while (message) {
        epx__message_t *next = message->next;
        if (!next && old) { /* the kept ones are through */
            next = fresh;
            old = NULL;
        }
        if (tell_notice(b, message)) {
            epx__message_release(message);
        } else {
            epx__message_append(&b->kept_first, &b->kept_last, message);
            b->kept_count++;
        }
        message = next;
    }
    while (b->kept_count > EPX__KEPT_NOTICES_MAX) {
        epx__message_t *oldest = b->kept_first;
        b->kept_first = oldest->next;
        b->kept_count--;
        epx__message_release(oldest);
    }
}

void epx__listeners_tell(epx__bootstrap_t *b)
{
    pthread_mutex_lock(&b->listeners_lock);
    pthread_mutex_lock(&b->lock);
    epx__message_t *fresh = b->notices_first;
    b->notices_first = b->notices_last = NULL;
    pthread_mutex_unlock(&b->lock);
    tell_deaths(b);
    tell_notices(b, fresh);
    pthread_mutex_unlock(&b->listeners_lock);
}
