/*
 * Who relays when rank 0 is gone.
 *
 * The middle (at first rank 0) has a connection to every other rank, and all that ranks tell each other passes through
 * it. Every other rank listens from the start at a standby endpoint, which all know (PEERS), and lets nobody in. When
 * the middle leaves or dies, the lowest rank that is still here takes its place:
 *
 *   everybody  first reads the old connection to its end, so that nothing overtakes what went through the old middle;
 *              keeps in a queue what it wants to say; connects to the successor's standby endpoint, says its hello with
 *              the token, and goes on when it is welcomed. Who refuses connections is gone: then the next one's turn.
 *   successor  lets the others in by their token, tells each who has left or died so far, and is told the same by them
 *              (a middle that dies may have told some and not others). Ranks that do not come it probes, with a
 *              connection to their standby endpoint that says nothing: the kernel of a living rank takes it, however
 *              slow that rank is; a refusal means that the rank is gone. So a slow rank is never taken for dead.
 *
 * Collectives need all ranks and end with rank 0; what goes on is news of deaths and leaves, notices, and messages.
 */
#include <errno.h>
#include <string.h>

#include "base/fail.h"
#include "base/log.h"
#include "bootstrap/state.h"

enum { ACCEPTS_A_TURN = 64 };
#define TRY_NS 300000000ull      /* for one connect */
#define PAUSE_NS 20000000ull     /* between two */
#define PROBE_NS 250000000ull    /* between two rounds of probes, and before the first */
#define ROUND_NS 100000000ull    /* the longest that a round goes on at once */
#define PATIENCE_NS 10000000000u /* with a host that neither takes nor refuses a connection */

/* ---- the choice ---- */

static bool is_here(const epx__bootstrap_t *b, int rank)
{
    return b->state[rank] == EPX__RANK_HERE;
}

/* The lowest rank that can be the middle. This rank itself can, even while it leaves: the others do not know that yet.
 * With nobody else it is alone. */
static uint32_t choose(const epx__bootstrap_t *b)
{
    for (int rank = 1; rank < b->ranks; rank++) {
        if (rank == b->rank && b->standby.open)
            break;
        if (rank != b->rank && is_here(b, rank) && b->peers[rank].family && !b->tried[rank])
            return (uint32_t)rank;
    }
    return (uint32_t)b->rank;
}

/* What had waited to be sent to the middle, which is now this rank. */
static void relay_own(epx__bootstrap_t *b, epx__connection_t *unsent)
{
    bool good = true;
    while (unsent->first) {
        epx__message_t *message = unsent->first->message;
        if (message->frame.type == EPX__FRAME_DATA)
            good = epx__relay_to(b, message->frame.to, message) && good;
        else if (message->frame.type == EPX__FRAME_NOTICE)
            good = epx__relay_to_others(b, (uint32_t)b->rank, message) && good;
        epx__connection_pop(unsent);
    }
    if (!good)
        epx__bootstrap_fail(b, EPX_E_NOMEM, "no memory for a message of the bootstrap");
}

static void become_middle(epx__bootstrap_t *b, epx__connection_t *unsent)
{
    for (int rank = 0; rank < b->ranks; rank++) {
        if (rank == b->rank || !is_here(b, rank))
            continue;
        epx__connection_renew(&b->link[rank]);
        b->link[rank].awaited = true;
        b->link[rank].to_middle = false;
    }
    b->awaited_since_ns = epx__now_ns();
    b->probe_ns = b->awaited_since_ns + PROBE_NS;
    if (unsent)
        relay_own(b, unsent);
    if (b->state[b->rank] == EPX__RANK_LEFT)
        epx__say_bye(b);
    epx__log(EPX__LOG_INFO, "bootstrap: this rank passes on messages now");
}

void epx__succession_begin(epx__bootstrap_t *b, epx__connection_t *unsent)
{
    b->succeeded = true;
    b->middle = choose(b);
    if ((int)b->middle == b->rank) {
        become_middle(b, unsent);
        return;
    }
    epx__connection_t *link = &b->link[b->middle];
    epx__connection_renew(link);
    link->awaited = link->to_middle = true;
    link->half_close = b->state[b->rank] == EPX__RANK_LEFT;
    if (unsent)
        epx__connection_move(link, unsent);
    b->try_ns = epx__now_ns();
    b->seek_until_ns = b->try_ns + PATIENCE_NS;
}

void epx__succession_inherit(epx__bootstrap_t *b, epx__connection_t *unsent)
{
    if ((int)b->middle == b->rank)
        relay_own(b, unsent);
    else
        epx__connection_move(&b->link[b->middle], unsent);
}

/* ---- the others ---- */

/* The chosen one is gone, too. */
static void try_next(epx__bootstrap_t *b)
{
    epx__connection_t *link = &b->link[b->middle];
    b->tried[b->middle] = 1;
    link->awaited = false;
    epx__succession_begin(b, link);
    epx__connection_close(link);
}

/* Connect and say hello. Then the answer comes as from any connection. */
static void seek(epx__bootstrap_t *b)
{
    epx__connection_t *link = &b->link[b->middle];
    uint64_t now = epx__now_ns();
    if (now >= b->seek_until_ns) {
        try_next(b);
        return;
    }
    if (link->socket.open || now < b->try_ns)
        return;
    uint8_t hello[EPX__HELLO_BYTES];
    epx__socket_t socket = {.open = false};
    int error = 0;
    epx__hello_encode(&b->hello, hello);
    epx__endpoint_t endpoint = b->peers[b->middle];
    pthread_mutex_unlock(&b->lock);
    epx_status_t status = epx__socket_connect(&socket, &endpoint, now + TRY_NS, &error);
    bool said = status == EPX_OK && !error && epx__socket_send_now(&socket, hello, sizeof(hello));
    pthread_mutex_lock(&b->lock);
    b->try_ns = epx__now_ns() + PAUSE_NS;
    if (said)
        epx__socket_move(&link->socket, &socket);
    else
        epx__socket_close(&socket);
    if (status == EPX_OK && error == ECONNREFUSED)
        try_next(b);
}

/* Who has left or died, to one rank. */
static void tell_states(epx__bootstrap_t *b, uint32_t to)
{
    for (uint32_t rank = 0; rank < (uint32_t)b->ranks; rank++) {
        if (is_here(b, (int)rank) || rank == to || (int)rank == b->rank)
            continue;
        epx__frame_t frame = {.type = b->state[rank] == EPX__RANK_LEFT ? EPX__FRAME_LEFT : EPX__FRAME_DEATH,
                              .from = (uint32_t)b->rank,
                              .tag = rank};
        epx__message_t *news = epx__message_create(&frame, NULL);
        if (!news || !epx__relay_to(b, to, news))
            epx__bootstrap_fail(b, EPX_E_NOMEM, "no memory for a message of the bootstrap");
        epx__message_release(news);
    }
}

void epx__succession_welcomed(epx__bootstrap_t *b)
{
    b->link[b->middle].awaited = false;
    if (b->state[b->rank] == EPX__RANK_HERE) /* else our bye is in the queue, and nothing comes after it */
        tell_states(b, b->middle);
    epx__connection_flush(&b->link[b->middle]);
}

/* Strangers had taken all places; or it is gone, and will refuse the next connection. */
void epx__succession_turned_away(epx__bootstrap_t *b)
{
    epx__connection_t *link = &b->link[b->middle];
    epx__socket_close(&link->socket); /* what is queued is kept */
    epx__message_release(link->incoming);
    link->incoming = NULL;
    link->have = 0;
    b->try_ns = epx__now_ns() + PAUSE_NS;
}

/* ---- the new middle ---- */

static bool any_awaited(const epx__bootstrap_t *b)
{
    for (int rank = 1; rank < b->ranks; rank++)
        if (b->link[rank].awaited)
            return true;
    return false;
}

bool epx__succession_receives(const epx__bootstrap_t *b)
{
    return b->succeeded && b->before < 0 && (int)b->middle == b->rank && b->standby.open && any_awaited(b);
}

static bool belongs(const epx__bootstrap_t *b, const epx__hello_t *hello)
{
    const epx__hello_t *mine = &b->hello;
    return epx__token_equal(hello->token, mine->token) && hello->protocol == mine->protocol &&
           hello->ranks == mine->ranks && hello->sizes_hash == mine->sizes_hash &&
           hello->config_hash == mine->config_hash && hello->rank < mine->ranks && b->link[hello->rank].awaited;
}

void epx__succession_hear(epx__bootstrap_t *b, epx__guest_t *guest)
{
    uint8_t welcome[EPX__FRAME_BYTES];
    epx__hello_t hello;
    int got = epx__guest_read(guest, &hello);
    if (got == 0)
        return;
    if (got < 0 || !belongs(b, &hello)) {
        epx__socket_close(&guest->socket);
        return;
    }
    epx__connection_t *link = &b->link[hello.rank];
    epx__socket_move(&link->socket, &guest->socket);
    link->awaited = false;
    epx__frame_encode(&(epx__frame_t){.type = EPX__FRAME_WELCOME}, welcome);
    link->failed = !epx__socket_send_now(&link->socket, welcome, sizeof(welcome));
    tell_states(b, hello.rank);
    epx__connection_flush(link);
    epx__log(EPX__LOG_INFO, "bootstrap: rank %u has come over", hello.rank);
}

void epx__succession_accept(epx__bootstrap_t *b)
{
    uint32_t turned_away = 0;
    for (int i = 0; i < ACCEPTS_A_TURN; i++) {
        epx__socket_t socket;
        if (!epx__socket_accept(&b->standby, &socket))
            break;
        epx__succession_hear(b, epx__guest_enter(b->guests, EPX__GUESTS, &socket, &turned_away));
    }
}

/* The awaited ranks one after the other, some of them now. */
static void probe(epx__bootstrap_t *b)
{
    uint64_t start = epx__now_ns(), now = start;
    if (now < b->probe_ns)
        return;
    for (; b->probe_next < b->ranks && now - start < ROUND_NS; b->probe_next++) {
        int rank = b->probe_next, error = ECONNREFUSED;
        epx__endpoint_t endpoint = b->peers[rank];
        epx__socket_t socket = {.open = false};
        epx_status_t status = EPX_OK;
        if (!b->link[rank].awaited)
            continue;
        if (endpoint.family) {
            pthread_mutex_unlock(&b->lock);
            status = epx__socket_connect(&socket, &endpoint, now + ROUND_NS, &error);
            epx__socket_close(&socket);
            pthread_mutex_lock(&b->lock);
        }
        now = epx__now_ns();
        if (status == EPX_OK && (error == ECONNREFUSED || (error && now - b->awaited_since_ns > PATIENCE_NS)))
            epx__relay_gone(b, (uint32_t)rank, EPX__RANK_DEAD);
    }
    if (b->probe_next == b->ranks) {
        b->probe_next = 0;
        b->probe_ns = now + PROBE_NS;
    }
}

static void drop_late_guests(epx__bootstrap_t *b)
{
    uint64_t now = epx__now_ns();
    bool receives = epx__succession_receives(b);
    for (int i = 0; i < EPX__GUESTS; i++)
        if (b->guests[i].socket.open && (!receives || now - b->guests[i].since_ns > EPX__GUEST_NS))
            epx__socket_close(&b->guests[i].socket);
}

/* ---- for the watcher ---- */

void epx__succession_turn(epx__bootstrap_t *b)
{
    if (!b->succeeded || b->failed != EPX_OK)
        return;
    if (b->before >= 0) {
        if (epx__now_ns() < b->before_until_ns)
            return;
        epx__relay_lost(b, (uint32_t)b->before, "it said bye and did not hang up");
    }
    if ((int)b->middle != b->rank) {
        if (b->link[b->middle].awaited)
            seek(b);
        return;
    }
    if (any_awaited(b))
        probe(b);
    drop_late_guests(b);
}

uint64_t epx__succession_due_ns(const epx__bootstrap_t *b)
{
    if (!b->succeeded || b->failed != EPX_OK)
        return UINT64_MAX;
    if (b->before >= 0)
        return b->before_until_ns;
    if ((int)b->middle == b->rank)
        return any_awaited(b) ? b->probe_ns : UINT64_MAX;
    const epx__connection_t *link = &b->link[b->middle];
    return !link->awaited ? UINT64_MAX : link->socket.open ? b->seek_until_ns : b->try_ns;
}

void epx__say_bye(epx__bootstrap_t *b)
{
    for (int rank = 0; rank < b->ranks; rank++) {
        epx__connection_t *link = &b->link[rank];
        if (rank == b->rank || ((int)b->middle != b->rank && rank != (int)b->middle))
            continue;
        epx__connection_queue(link, b->bye, &link->bye_entry);
        /* The middle goes on relaying until the others have answered; who is not in the middle has said its last word.
         */
        link->half_close = (int)b->middle != b->rank;
    }
}

bool epx__succession_settled(const epx__bootstrap_t *b)
{
    if (!b->succeeded || b->failed != EPX_OK)
        return true;
    if ((int)b->middle == b->rank)
        return !any_awaited(b);
    const epx__connection_t *link = &b->link[b->middle];
    return link->shut && !link->awaited;
}
