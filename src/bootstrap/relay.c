/* What each incoming frame does, at rank 0 (which relays) and elsewhere. All with the lock held. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/fail.h"
#include "base/log.h"
#include "bootstrap/state.h"

void epx__bootstrap_wake(epx__bootstrap_t *b)
{
    uint64_t one = 1;
    if (b->watched) {
        ssize_t ignored = write(b->wake_fd, &one, sizeof(one)); /* full means: already awake */
        (void)ignored;
    }
}

void epx__bootstrap_fail(epx__bootstrap_t *b, epx_status_t status, const char *words)
{
    if (b->failed != EPX_OK)
        return;
    b->failed = status;
    snprintf(b->failed_words, sizeof(b->failed_words), "%s", words);
    epx__log(EPX__LOG_WARN, "bootstrap: %s; leaving the group", words);
    pthread_cond_broadcast(&b->changed);
    epx__bootstrap_wake(b);
}

static void no_memory(epx__bootstrap_t *b)
{
    epx__bootstrap_fail(b, EPX_E_NOMEM, "no memory for a message of the bootstrap");
}

static void set_state(epx__bootstrap_t *b, uint32_t rank, epx__rank_state_t state)
{
    __atomic_store_n(&b->state[rank], (uint8_t)state, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&b->changed);
}

static void into_inbox(epx__bootstrap_t *b, epx__message_t *message)
{
    __atomic_add_fetch(&message->references, 1, __ATOMIC_RELAXED);
    epx__message_append(&b->inbox_first, &b->inbox_last, message);
    pthread_cond_broadcast(&b->changed);
}

bool epx__relay_to(epx__bootstrap_t *b, uint32_t to, epx__message_t *message)
{
    if ((int)to == b->rank) {
        into_inbox(b, message);
        return true;
    }
    epx__connection_t *link = &b->link[b->rank == 0 ? to : 0];
    bool queued = epx__connection_queue(link, message, NULL);
    if (link->first || link->failed)
        epx__bootstrap_wake(b); /* the rest goes out when the socket takes it */
    return queued;
}

bool epx__relay_to_others(epx__bootstrap_t *b, uint32_t except, epx__message_t *message)
{
    for (int rank = 1; rank < b->links; rank++)
        if ((uint32_t)rank != except && b->state[rank] == EPX__RANK_HERE && !epx__relay_to(b, (uint32_t)rank, message))
            return false;
    return true;
}

static void tell_others(epx__bootstrap_t *b, epx__frame_type_t type, uint32_t rank)
{
    epx__message_t *news = epx__message_create(&(epx__frame_t){.type = (uint8_t)type, .tag = rank}, NULL);
    if (!news || !epx__relay_to_others(b, rank, news))
        no_memory(b);
    epx__message_release(news);
}

void epx__relay_lost(epx__bootstrap_t *b, uint32_t rank, const char *wrong)
{
    epx__connection_t *link = &b->link[b->rank == 0 ? rank : 0];
    if (b->state[rank] == EPX__RANK_HERE && b->rank == 0 && b->closing && !wrong && !link->failed) {
        link->ended = true; /* its answer to our bye; what others sent to it may still be on its way */
        return;
    }
    epx__connection_close(link);
    pthread_cond_broadcast(&b->changed);
    if (b->state[rank] != EPX__RANK_HERE || b->failed != EPX_OK)
        return;
    set_state(b, rank, EPX__RANK_DEAD);
    epx__log(EPX__LOG_INFO, "bootstrap: rank %u is gone: %s", rank,
             wrong ? wrong : "its connection ended without a goodbye");
    if (b->rank != 0)
        return;
    tell_others(b, EPX__FRAME_DEATH, rank);
    epx__collective_look(b);
}

static void keep_notice(epx__bootstrap_t *b, epx__message_t *message)
{
    __atomic_add_fetch(&message->references, 1, __ATOMIC_RELAXED);
    /* A notice may sit in queues to other ranks too, but `next` is only used here. */
    epx__message_append(&b->notices_first, &b->notices_last, message);
}

static void answer_query(epx__bootstrap_t *b, uint32_t from, uint64_t sequence)
{
    uint8_t present[EPX__RANKS_MAX / 8];
    epx__collective_present(b, sequence, present);
    epx__frame_t frame = {.type = EPX__FRAME_ANSWER, .sequence = sequence, .bytes = (uint32_t)(b->ranks + 7) / 8};
    epx__message_t *answer = epx__message_create(&frame, present);
    if (!answer || !epx__relay_to(b, from, answer))
        no_memory(b);
    epx__message_release(answer);
}

/* Returns false when the frame is none that rank 0 may get. */
static bool take_at_root(epx__bootstrap_t *b, uint32_t from, epx__message_t *message)
{
    const epx__frame_t *frame = &message->frame;
    if (frame->from != from || b->state[from] != EPX__RANK_HERE)
        return false;
    switch (frame->type) {
    case EPX__FRAME_DATA:
        if (!epx__relay_to(b, frame->to, message))
            no_memory(b);
        return true;
    case EPX__FRAME_NOTICE:
        keep_notice(b, message);
        if (!epx__relay_to_others(b, from, message))
            no_memory(b);
        return true;
    case EPX__FRAME_BYE:
        set_state(b, from, EPX__RANK_LEFT);
        tell_others(b, EPX__FRAME_LEFT, from);
        epx__collective_look(b);
        return true;
    case EPX__FRAME_GATHER:
        __atomic_add_fetch(&message->references, 1, __ATOMIC_RELAXED);
        epx__collective_part(b, from, message);
        return true;
    case EPX__FRAME_GIVEUP:
        epx__collective_giveup(b, from, frame->sequence, (epx_status_t)frame->tag);
        return true;
    case EPX__FRAME_QUERY:
        answer_query(b, from, frame->sequence);
        return true;
    default:
        return false;
    }
}

static bool take_elsewhere(epx__bootstrap_t *b, epx__message_t *message)
{
    const epx__frame_t *frame = &message->frame;
    switch (frame->type) {
    case EPX__FRAME_DATA:
        if ((int)frame->to != b->rank)
            return false;
        into_inbox(b, message);
        return true;
    case EPX__FRAME_NOTICE:
        keep_notice(b, message);
        return true;
    case EPX__FRAME_BYE: /* rank 0 leaves, and with it the group's middle: send what is queued, then no more */
        set_state(b, 0, EPX__RANK_LEFT);
        b->link[0].half_close = true;
        return true;
    case EPX__FRAME_LEFT:
        set_state(b, frame->tag, EPX__RANK_LEFT);
        return true;
    case EPX__FRAME_DEATH:
        set_state(b, frame->tag, EPX__RANK_DEAD);
        return true;
    case EPX__FRAME_RESULT:
    case EPX__FRAME_ABORT:
        if (frame->sequence == b->waiting_for && !b->outcome) {
            __atomic_add_fetch(&message->references, 1, __ATOMIC_RELAXED);
            b->outcome = message;
            pthread_cond_broadcast(&b->changed);
        }
        return true; /* else: of an operation that this rank has given up */
    case EPX__FRAME_ANSWER:
        if (frame->sequence == b->waiting_for) {
            memset(b->present, 0, sizeof(b->present));
            memcpy(b->present, message->payload, frame->bytes);
            b->answered = true;
        }
        return true;
    default:
        return false;
    }
}

void epx__relay_take(epx__bootstrap_t *b, uint32_t from, epx__message_t *message)
{
    bool known = b->rank == 0 ? take_at_root(b, from, message) : take_elsewhere(b, message);
    epx__message_release(message);
    if (!known) {
        b->link[b->rank == 0 ? from : 0].failed = true;
        epx__relay_lost(b, from, "it sent something that does not belong here");
    }
}
