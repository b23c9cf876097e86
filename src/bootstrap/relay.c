/* What each incoming frame does, in the middle (which relays) and elsewhere. All with the lock held. */
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

epx__connection_t *epx__relay_way(const epx__bootstrap_t *b, uint32_t to)
{
    return &b->link[(int)b->middle == b->rank ? to : b->middle];
}

bool epx__relay_to(epx__bootstrap_t *b, uint32_t to, epx__message_t *message)
{
    if ((int)to == b->rank) {
        into_inbox(b, message);
        return true;
    }
    epx__connection_t *link = epx__relay_way(b, to);
    bool queued = epx__connection_queue(link, message, NULL);
    if (link->first || link->failed)
        epx__bootstrap_wake(b); /* the rest goes out when the socket takes it */
    return queued;
}

bool epx__relay_to_others(epx__bootstrap_t *b, uint32_t except, epx__message_t *message)
{
    for (int rank = 0; rank < b->links; rank++)
        if (rank != b->rank && (uint32_t)rank != except && b->state[rank] == EPX__RANK_HERE &&
            !epx__relay_to(b, (uint32_t)rank, message))
            return false;
    return true;
}

static void tell_others(epx__bootstrap_t *b, epx__frame_type_t type, uint32_t rank)
{
    epx__frame_t frame = {.type = (uint8_t)type, .from = (uint32_t)b->rank, .tag = rank};
    epx__message_t *news = epx__message_create(&frame, NULL);
    if (!news || !epx__relay_to_others(b, rank, news))
        no_memory(b);
    epx__message_release(news);
}

void epx__relay_gone(epx__bootstrap_t *b, uint32_t rank, epx__rank_state_t how)
{
    set_state(b, rank, how);
    b->link[rank].awaited = false;
    if (!b->link[rank].socket.open)
        epx__connection_close(&b->link[rank]); /* what was kept for it */
    epx__log(EPX__LOG_INFO, "bootstrap: rank %u %s", rank, how == EPX__RANK_LEFT ? "has left" : "is gone");
    tell_others(b, how == EPX__RANK_LEFT ? EPX__FRAME_LEFT : EPX__FRAME_DEATH, rank);
    if (b->rank == 0)
        epx__collective_look(b);
}

/* The connection over which everything went has ended. To a rank that has sent its own bye through it, that is the
 * answer, and it needs no other. */
static void lost_middle(epx__bootstrap_t *b, epx__connection_t *link, const char *wrong)
{
    if (b->state[b->rank] != EPX__RANK_HERE && link->shut) {
        epx__connection_close(link);
        return;
    }
    if (link->awaited && !wrong) {
        epx__succession_turned_away(b);
        return;
    }
    if (link->awaited)
        b->tried[b->middle] = 1;
    else if (b->state[b->middle] == EPX__RANK_HERE)
        set_state(b, b->middle, EPX__RANK_DEAD);
    epx__log(EPX__LOG_INFO, "bootstrap: rank %u, through which messages pass, is gone: %s", b->middle,
             wrong ? wrong : "its connection ended without a goodbye");
    link->awaited = false;
    epx__succession_begin(b, link);
    epx__connection_close(link);
}

void epx__relay_lost(epx__bootstrap_t *b, uint32_t rank, const char *wrong)
{
    epx__connection_t *link = &b->link[rank];
    pthread_cond_broadcast(&b->changed);
    if ((int)rank == b->before) { /* its last words are through: now the next one's turn */
        b->before = -1;
        epx__succession_inherit(b, link);
        epx__connection_close(link);
        return;
    }
    if ((int)b->middle != b->rank && rank == b->middle && b->failed == EPX_OK) {
        lost_middle(b, link, wrong);
        return;
    }
    if (b->state[rank] == EPX__RANK_HERE && (int)b->middle == b->rank && b->closing && !wrong && !link->failed) {
        link->ended = true; /* its answer to our bye; what others sent to it may still be on its way */
        return;
    }
    epx__connection_close(link);
    if (b->state[rank] == EPX__RANK_HERE && b->failed == EPX_OK)
        epx__relay_gone(b, rank, EPX__RANK_DEAD);
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

/* News of a third rank, from one who comes over from the old middle. A rank that is connected here knows better. */
static void hear_of(epx__bootstrap_t *b, uint32_t rank, epx__rank_state_t how)
{
    if ((int)rank != b->rank && b->state[rank] == EPX__RANK_HERE && !b->link[rank].socket.open)
        epx__relay_gone(b, rank, how);
}

/* Frames that only rank 0 gets. */
static bool take_part(epx__bootstrap_t *b, uint32_t from, epx__message_t *message)
{
    const epx__frame_t *frame = &message->frame;
    switch (frame->type) {
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

/* Returns false when the frame is none that the middle may get. */
static bool take_in_the_middle(epx__bootstrap_t *b, uint32_t from, epx__message_t *message)
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
        epx__relay_gone(b, from, EPX__RANK_LEFT);
        return true;
    case EPX__FRAME_LEFT:
    case EPX__FRAME_DEATH:
        if (b->rank == 0)
            return false;
        hear_of(b, frame->tag, frame->type == EPX__FRAME_LEFT ? EPX__RANK_LEFT : EPX__RANK_DEAD);
        return true;
    default:
        return b->rank == 0 && take_part(b, from, message);
    }
}

/* The middle leaves: send it what is queued, then no more; hear it to the end; and turn to its successor. */
static void middle_leaves(epx__bootstrap_t *b)
{
    set_state(b, b->middle, EPX__RANK_LEFT);
    b->link[b->middle].half_close = true;
    if (b->state[b->rank] != EPX__RANK_HERE)
        return; /* our own bye goes the same way */
    b->before = (int)b->middle;
    b->before_until_ns = epx__now_ns() + EPX__CLOSE_NS + EPX__CLOSE_NS / 2;
    epx__succession_begin(b, NULL);
}

static void take_peers(epx__bootstrap_t *b, const epx__message_t *message)
{
    for (uint32_t rank = 0; rank < (uint32_t)b->ranks && (rank + 1) * EPX__ENDPOINT_BYTES <= message->frame.bytes;
         rank++)
        epx__endpoint_get(message->payload + rank * EPX__ENDPOINT_BYTES, &b->peers[rank]);
}

static bool take_elsewhere(epx__bootstrap_t *b, uint32_t from, epx__message_t *message)
{
    const epx__frame_t *frame = &message->frame;
    if (b->link[from].awaited && frame->type != EPX__FRAME_WELCOME)
        return false;
    switch (frame->type) {
    case EPX__FRAME_DATA:
        if ((int)frame->to != b->rank)
            return false;
        into_inbox(b, message);
        return true;
    case EPX__FRAME_NOTICE:
        keep_notice(b, message);
        return true;
    case EPX__FRAME_BYE:
        if (from != b->middle)
            return false;
        middle_leaves(b);
        return true;
    case EPX__FRAME_WELCOME:
        if (!b->link[from].awaited)
            return false;
        epx__succession_welcomed(b);
        return true;
    case EPX__FRAME_LEFT:
    case EPX__FRAME_DEATH:
        if ((int)frame->tag != b->rank && b->state[frame->tag] == EPX__RANK_HERE)
            set_state(b, frame->tag, frame->type == EPX__FRAME_LEFT ? EPX__RANK_LEFT : EPX__RANK_DEAD);
        return true;
    case EPX__FRAME_PEERS:
        take_peers(b, message);
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
    bool middle = (int)b->middle == b->rank && (int)from != b->before;
    bool known = middle ? take_in_the_middle(b, from, message) : take_elsewhere(b, from, message);
    epx__message_release(message);
    if (!known) {
        b->link[from].failed = true;
        epx__relay_lost(b, from, "it sent something that does not belong here");
    }
}
