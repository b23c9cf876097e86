/* All-gather and barrier: how rank 0 brings the parts together, and how a caller waits (state.h has the protocol). */
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/fail.h"
#include "bootstrap/state.h"

enum { QUERY_BEFORE_NS = 200000000 };

static const char *kind_name(uint32_t kind)
{
    return kind == EPX__KIND_BARRIER ? "barrier" : "all-gather";
}

static const char *kind_with_article(uint32_t kind)
{
    return kind == EPX__KIND_BARRIER ? "a barrier" : "an all-gather";
}

/* ---- rank 0's half ------------------------------------------------------------------------------ */

/* Needs no memory, unless the rank has not yet taken the outcome of an operation that it gave up. */
static bool queue_outcome(epx__bootstrap_t *b, uint32_t rank, epx__message_t *message)
{
    epx__connection_t *link = &b->link[rank];
    bool queued = epx__connection_queue(link, message, &link->outcome_entry) || epx__relay_to(b, rank, message);
    if (link->first || link->failed)
        epx__bootstrap_wake(b);
    return queued;
}

static void hand_out(epx__bootstrap_t *b, uint32_t rank, epx__message_t *message)
{
    if (rank != 0) {
        if (!queue_outcome(b, rank, message))
            epx__bootstrap_fail(b, EPX_E_NOMEM, "no memory for a message of the bootstrap");
    } else if (message->frame.sequence == b->waiting_for && !b->outcome) {
        __atomic_add_fetch(&message->references, 1, __ATOMIC_RELAXED);
        b->outcome = message;
        pthread_cond_broadcast(&b->changed);
    }
}

static void drop_part(epx__bootstrap_t *b, uint32_t rank)
{
    epx__message_release(b->parts[rank]);
    b->parts[rank] = NULL;
}

/* Words to one rank whose part cannot be used; forgets the part. */
static void abort_part(epx__bootstrap_t *b, uint32_t rank, epx_status_t status, const char *words)
{
    epx__frame_t frame = {.type = EPX__FRAME_ABORT,
                          .tag = (uint32_t)status,
                          .sequence = b->parts[rank]->frame.sequence,
                          .bytes = (uint32_t)strlen(words)};
    drop_part(b, rank);
    epx__message_t *message = epx__message_create(&frame, words);
    if (!message) {
        epx__bootstrap_fail(b, EPX_E_NOMEM, "no memory for a message of the bootstrap");
        return;
    }
    hand_out(b, rank, message);
    epx__message_release(message);
}

static void abort_below(epx__bootstrap_t *b, uint64_t number, epx_status_t status, const char *words)
{
    for (uint32_t rank = 0; rank < (uint32_t)b->ranks; rank++)
        if (b->parts[rank] && b->parts[rank]->frame.sequence < number)
            abort_part(b, rank, status, words);
}

/* A rank other than `rank` that has given up the operation; ranks when none. */
static uint32_t who_gave_up(const epx__bootstrap_t *b, uint64_t sequence)
{
    uint32_t rank = 0;
    while (rank < (uint32_t)b->ranks && b->reached[rank] <= sequence)
        rank++;
    return rank;
}

/* "rank 0 has given up ...": with the names of those for whom it had waited, as far as they are still not here. */
static void gave_up_words(const epx__bootstrap_t *b, uint32_t rank, char *words, size_t room)
{
    uint8_t present[EPX__RANKS_MAX / 8];
    char missing[200];
    int used = snprintf(words, room, "rank %u has given up on this operation", rank);
    if (!b->parts[rank])
        return; /* it never was in it */
    epx__collective_present(b, b->parts[rank]->frame.sequence, present);
    epx__wire_missing(present, sizeof(present), (uint32_t)b->ranks, missing, sizeof(missing));
    if (missing[0])
        snprintf(words + used, room - (size_t)used, "; missing was rank %s", missing);
}

void epx__collective_part(epx__bootstrap_t *b, uint32_t rank, epx__message_t *part)
{
    char words[300];
    uint64_t sequence = part->frame.sequence;
    gave_up_words(b, rank, words, sizeof(words));
    drop_part(b, rank);
    b->parts[rank] = part;
    if (b->reached[rank] < sequence)
        b->reached[rank] = sequence;
    abort_below(b, sequence, EPX_E_TIMEOUT, words);
    uint32_t gone = who_gave_up(b, sequence);
    if (gone < (uint32_t)b->ranks) {
        snprintf(words, sizeof(words), "rank %u has given up on this operation", gone);
        abort_part(b, rank, EPX_E_TIMEOUT, words);
    }
    epx__collective_look(b);
}

void epx__collective_giveup(epx__bootstrap_t *b, uint32_t rank, uint64_t sequence, epx_status_t status)
{
    char words[160];
    if (b->reached[rank] <= sequence)
        b->reached[rank] = sequence + 1;
    snprintf(words, sizeof(words), "rank %u cannot take part: %s", rank, epx__status_text(status));
    abort_below(b, sequence + 1, EPX_E_PEER, words);
}

/* NULL when all parts belong together, else words. */
static const char *disagreement(const epx__bootstrap_t *b, char *words, size_t room)
{
    const epx__frame_t *first = &b->parts[0]->frame;
    for (int rank = 1; rank < b->ranks; rank++) {
        const epx__frame_t *other = &b->parts[rank]->frame;
        if (other->tag == first->tag && other->total == first->total && other->bytes == first->bytes)
            continue;
        snprintf(words, room, "the ranks disagree: rank 0 is in %s of %llu bytes, rank %d in %s of %llu bytes",
                 kind_with_article(first->tag), (unsigned long long)first->total, rank, kind_with_article(other->tag),
                 (unsigned long long)other->total);
        return words;
    }
    return NULL;
}

static void complete(epx__bootstrap_t *b)
{
    char words[200];
    if (disagreement(b, words, sizeof(words))) {
        abort_below(b, UINT64_MAX, EPX_E_MISMATCH, words);
        return;
    }
    size_t bytes = b->parts[0]->frame.bytes;
    epx__frame_t frame = {.type = EPX__FRAME_RESULT, .sequence = b->parts[0]->frame.sequence};
    epx__message_t *result = NULL;
    if (bytes * (size_t)b->ranks <= EPX__PAYLOAD_MAX) {
        frame.bytes = (uint32_t)(bytes * (size_t)b->ranks);
        result = epx__message_create(&frame, NULL);
    }
    if (!result) {
        abort_below(b, UINT64_MAX, EPX_E_NOMEM, "rank 0 has no memory to bring the parts together");
        return;
    }
    for (uint32_t rank = 0; rank < (uint32_t)b->ranks; rank++) {
        if (bytes)
            memcpy(result->payload + rank * bytes, b->parts[rank]->payload, bytes);
        drop_part(b, rank);
    }
    for (uint32_t rank = 0; rank < (uint32_t)b->ranks; rank++)
        hand_out(b, rank, result);
    epx__message_release(result);
}

/* A rank whose part is missing and will not come, first of all one that died; ranks when none. */
static int who_is_gone(const epx__bootstrap_t *b)
{
    int left = b->ranks;
    for (int rank = 0; rank < b->ranks; rank++) {
        if (b->parts[rank] || b->state[rank] == EPX__RANK_HERE)
            continue;
        if (b->state[rank] == EPX__RANK_DEAD)
            return rank;
        left = left < b->ranks ? left : rank;
    }
    return left;
}

/* Who has left may have done so because another died after it had given its part. */
static void gone_words(const epx__bootstrap_t *b, int rank, char *words, size_t room)
{
    int dead = 0;
    if (b->state[rank] == EPX__RANK_DEAD) {
        snprintf(words, room, "rank %d is gone (its connection ended without a goodbye)", rank);
        return;
    }
    while (dead < b->ranks && b->state[dead] != EPX__RANK_DEAD)
        dead++;
    int used = snprintf(words, room, "rank %d has left the group", rank);
    if (dead < b->ranks)
        snprintf(words + used, room - (size_t)used, "; rank %d is gone (its connection ended without a goodbye)", dead);
}

void epx__collective_look(epx__bootstrap_t *b)
{
    char words[160];
    int missing = 0, parts = 0;
    for (int rank = 0; rank < b->ranks; rank++) {
        parts += b->parts[rank] != NULL;
        missing += b->parts[rank] == NULL;
    }
    int gone = parts ? who_is_gone(b) : b->ranks;
    if (gone < b->ranks) {
        gone_words(b, gone, words, sizeof(words));
        abort_below(b, UINT64_MAX, EPX_E_PEER, words);
        return;
    }
    if (!missing)
        complete(b);
}

void epx__collective_present(const epx__bootstrap_t *b, uint64_t sequence, uint8_t present[EPX__RANKS_MAX / 8])
{
    memset(present, 0, EPX__RANKS_MAX / 8);
    for (int rank = 0; rank < b->ranks; rank++)
        if (b->parts[rank] && b->parts[rank]->frame.sequence == sequence)
            present[rank / 8] |= (uint8_t)(1u << (rank % 8));
}

/* ---- a caller's half ---------------------------------------------------------------------------- */

bool epx__bootstrap_wait(epx__bootstrap_t *b, uint64_t deadline_ns)
{
    struct timespec until = {.tv_sec = (time_t)(deadline_ns / 1000000000u),
                             .tv_nsec = (long)(deadline_ns % 1000000000u)};
    if (epx__now_ns() >= deadline_ns)
        return false;
    pthread_cond_timedwait(&b->changed, &b->lock, &until);
    return true;
}

epx_status_t epx__bootstrap_reachable(epx__bootstrap_t *b, int rank, const char *what)
{
    if (b->failed != EPX_OK)
        return epx__fail(b->failed, "%s: rank %d left the group: %s", what, b->rank, b->failed_words);
    uint8_t state = b->state[rank];
    if (state == EPX__RANK_DEAD)
        return epx__fail(EPX_E_PEER, "%s: rank %d is gone (its connection ended without a goodbye)", what, rank);
    if (state == EPX__RANK_LEFT)
        return epx__fail(EPX_E_PEER, "%s: rank %d has left the group", what, rank);
    return EPX_OK;
}

/* Tell rank 0 that this operation will not have our part. Needs no memory. */
static void give_up(epx__bootstrap_t *b, uint64_t sequence, epx_status_t status)
{
    if (b->rank == 0) {
        epx__collective_giveup(b, 0, sequence, status);
        return;
    }
    if (b->spare->references != 1 || b->middle != 0)
        return;
    b->spare->frame = (epx__frame_t){
        .type = EPX__FRAME_GIVEUP, .from = (uint32_t)b->rank, .tag = (uint32_t)status, .sequence = sequence};
    epx__frame_encode(&b->spare->frame, b->spare->header);
    epx__connection_queue(&b->link[0], b->spare, &b->link[0].spare_entry);
    epx__bootstrap_wake(b);
}

static epx_status_t timed_out(epx__bootstrap_t *b, const char *what, uint64_t sequence, uint64_t timeout_ms)
{
    char missing[400];
    if (b->rank == 0)
        epx__collective_present(b, sequence, b->present);
    else if (!b->answered)
        return epx__fail(EPX_E_TIMEOUT, "%s: not finished within %llu ms, and rank 0 does not say who is missing", what,
                         (unsigned long long)timeout_ms);
    epx__wire_missing(b->present, sizeof(b->present), (uint32_t)b->ranks, missing, sizeof(missing));
    return epx__fail(EPX_E_TIMEOUT, "%s: missing after %llu ms: rank %s", what, (unsigned long long)timeout_ms,
                     missing[0] ? missing : "none (the last came too late)");
}

static void ask_who_is_missing(epx__bootstrap_t *b, uint64_t sequence)
{
    epx__frame_t frame = {.type = EPX__FRAME_QUERY, .from = (uint32_t)b->rank, .sequence = sequence};
    epx__message_t *query = b->rank == 0 ? NULL : epx__message_create(&frame, NULL);
    if (query)
        epx__relay_to(b, 0, query); /* without memory, the answer will lack names */
    epx__message_release(query);
}

/* Rank 0 is here, so that a collective can get an outcome. When it is not, a rank that died is the better reason:
 * rank 0 may have left because of it. */
static epx_status_t root_here(epx__bootstrap_t *b, const char *what)
{
    bool here = b->failed == EPX_OK && b->state[0] == EPX__RANK_HERE;
    for (int rank = 0; rank < b->ranks && !here && b->failed == EPX_OK; rank++)
        if (b->state[rank] == EPX__RANK_DEAD)
            return epx__bootstrap_reachable(b, rank, what);
    return here ? EPX_OK : epx__bootstrap_reachable(b, 0, what);
}

/* Wait for b->outcome. */
static epx_status_t await_outcome(epx__bootstrap_t *b, const char *what, uint64_t deadline_ns, uint64_t timeout_ms)
{
    uint64_t before = timeout_ms * 250000u < QUERY_BEFORE_NS ? timeout_ms * 250000u : QUERY_BEFORE_NS;
    uint64_t query_ns = deadline_ns - before;
    bool asked = b->rank == 0;
    while (!b->outcome) {
        EPX__TRY(root_here(b, what));
        if (epx__bootstrap_wait(b, asked ? deadline_ns : query_ns))
            continue;
        if (asked)
            return timed_out(b, what, b->waiting_for, timeout_ms);
        ask_who_is_missing(b, b->waiting_for);
        asked = true;
    }
    if (b->outcome->frame.type == EPX__FRAME_RESULT)
        return EPX_OK;
    char words[EPX__WORDS_MAX + 1];
    epx__wire_words(b->outcome->payload, b->outcome->frame.bytes, words, sizeof(words));
    uint32_t status = b->outcome->frame.tag;
    return epx__fail(status > EPX_OK && status <= EPX_E_DATA ? (epx_status_t)status : EPX_E_PEER, "%s: %s", what,
                     words);
}

/* Before our part is sent: a message that the outcome will fit into, whatever it is. */
static bool prepare_room(epx__bootstrap_t *b, const epx__frame_t *part)
{
    epx__connection_t *link = &b->link[0];
    size_t bytes = (size_t)part->bytes * (size_t)b->ranks;
    epx__frame_t frame = {.type = EPX__FRAME_RESULT, .sequence = part->sequence};
    frame.bytes = bytes > EPX__WORDS_MAX ? (uint32_t)bytes : EPX__WORDS_MAX;
    epx__message_release(link->room);
    link->room = b->rank == 0 ? NULL : epx__message_create(&frame, NULL);
    link->room_bytes = frame.bytes;
    return b->rank == 0 || link->room;
}

/* One chunk: our `count` bytes out, everybody's in at all + r * bytes. */
static epx_status_t chunk(epx__bootstrap_t *b, epx__frame_t *frame, const uint8_t *mine, uint8_t *all, size_t bytes,
                          uint64_t deadline_ns, uint64_t timeout_ms)
{
    const char *what = kind_name(frame->tag);
    EPX__TRY(root_here(b, what));
    epx__message_t *part = prepare_room(b, frame) ? epx__message_create(frame, mine) : NULL;
    if (!part) {
        give_up(b, frame->sequence, EPX_E_NOMEM);
        return epx__fail(EPX_E_NOMEM, "%s: no memory for %u bytes", what, frame->bytes);
    }
    b->waiting_for = frame->sequence;
    b->answered = false;
    if (b->rank == 0) {
        epx__collective_part(b, 0, part);
    } else {
        bool queued = epx__relay_to(b, 0, part);
        epx__message_release(part);
        if (!queued)
            give_up(b, frame->sequence, EPX_E_NOMEM);
        if (!queued)
            return epx__fail(EPX_E_NOMEM, "%s: no memory to send %u bytes", what, frame->bytes);
    }
    EPX__TRY(await_outcome(b, what, deadline_ns, timeout_ms));
    if (b->outcome->frame.bytes != (uint64_t)frame->bytes * (uint64_t)b->ranks)
        return epx__fail(EPX_E_MISMATCH, "%s: rank 0 sent a result of another size", what);
    for (int rank = 0; rank < b->ranks && frame->bytes; rank++)
        memcpy(all + (size_t)rank * bytes, b->outcome->payload + (size_t)rank * frame->bytes, frame->bytes);
    return EPX_OK;
}

static epx_status_t collective(epx__bootstrap_t *b, epx__kind_t kind, const uint8_t *mine, size_t bytes, uint8_t *all,
                               uint64_t deadline_ns, uint64_t timeout_ms)
{
    size_t chunk_bytes = EPX__PAYLOAD_MAX / (size_t)b->ranks, done = 0;
    epx_status_t status = EPX_OK;
    uint64_t operation = ++b->operation, number = 0;
    do {
        size_t count = bytes - done < chunk_bytes ? bytes - done : chunk_bytes;
        epx__frame_t frame = {.type = EPX__FRAME_GATHER,
                              .from = (uint32_t)b->rank,
                              .tag = (uint32_t)kind,
                              .bytes = (uint32_t)count,
                              .sequence = operation << 32 | number++,
                              .total = bytes};
        status = chunk(b, &frame, mine ? mine + done : NULL, all ? all + done : NULL, bytes, deadline_ns, timeout_ms);
        b->waiting_for = 0;
        epx__message_release(b->outcome);
        epx__message_release(b->link[0].room);
        b->outcome = b->link[0].room = NULL;
        done += count;
    } while (status == EPX_OK && done < bytes);
    return status;
}

static epx_status_t run(epx__bootstrap_t *b, epx__kind_t kind, const void *mine, size_t bytes, void *all,
                        uint64_t timeout_ms)
{
    if (b->ranks == 1) {
        if (bytes && mine != all)
            memmove(all, mine, bytes);
        return EPX_OK;
    }
    if (b->pid != getpid())
        return epx__fail(EPX_E_INVALID, "%s: a forked child cannot use its parent's group", kind_name(kind));
    timeout_ms = timeout_ms ? timeout_ms : b->timeout_ms;
    uint64_t deadline_ns = epx__now_ns() + timeout_ms * 1000000u;
    epx_status_t status = EPX_OK;
    pthread_mutex_lock(&b->lock);
    while (b->busy && status == EPX_OK)
        if (!epx__bootstrap_wait(b, deadline_ns))
            status = epx__fail(EPX_E_TIMEOUT, "%s: another thread of this rank was in a collective call for %llu ms",
                               kind_name(kind), (unsigned long long)timeout_ms);
    if (status == EPX_OK) {
        b->busy = true;
        status = collective(b, kind, mine, bytes, all, deadline_ns, timeout_ms);
        b->busy = false;
        pthread_cond_broadcast(&b->changed);
    }
    pthread_mutex_unlock(&b->lock);
    return status;
}

epx_status_t epx__bootstrap_allgather(epx__bootstrap_t *bootstrap, const void *mine, size_t bytes, void *all,
                                      uint64_t timeout_ms)
{
    if (bytes && (!mine || !all))
        return epx__fail(EPX_E_INVALID, "all-gather: %s is NULL", mine ? "all" : "mine");
    return run(bootstrap, EPX__KIND_ALLGATHER, mine, bytes, all, timeout_ms);
}

epx_status_t epx__bootstrap_barrier(epx__bootstrap_t *bootstrap, uint64_t timeout_ms)
{
    return run(bootstrap, EPX__KIND_BARRIER, NULL, 0, NULL, timeout_ms);
}

/* One word for the last of them: who is in an earlier one learns the same. */
void epx__bootstrap_skip(epx__bootstrap_t *b, int count, epx_status_t why)
{
    if (count < 1 || b->ranks == 1 || b->pid != getpid())
        return;
    pthread_mutex_lock(&b->lock);
    b->operation += (uint64_t)count;
    give_up(b, b->operation << 32, why);
    pthread_mutex_unlock(&b->lock);
}
