/* The thread that reads the sockets, sends what is queued, notices deaths, and carries out the leave. */
#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/fail.h"
#include "base/log.h"
#include "bootstrap/state.h"

enum { MESSAGES_A_TURN = 64 };

static void close_all(epx__bootstrap_t *b)
{
    for (int i = 0; i < b->links; i++) {
        b->link[i].awaited = false;
        epx__connection_close(&b->link[i]);
    }
    for (int i = 0; i < EPX__GUESTS; i++)
        epx__socket_close(&b->guests[i].socket);
    epx__socket_close(&b->standby); /* whoever looks for this rank finds it gone */
    pthread_cond_broadcast(&b->changed);
}

/* Once: say bye to all who are here, and give up what the others still wait for. */
static void begin_to_leave(epx__bootstrap_t *b)
{
    if (b->state[b->rank] != EPX__RANK_HERE)
        return;
    __atomic_store_n(&b->state[b->rank], EPX__RANK_LEFT, __ATOMIC_RELEASE);
    if (b->rank == 0)
        epx__collective_look(b);
    epx__say_bye(b);
}

static void write_out(epx__connection_t *link)
{
    if (!link->socket.open || link->awaited)
        return;
    epx__connection_flush(link);
    if (link->half_close && !link->shut && !link->first) {
        link->shut = true;
        shutdown(link->socket.fd, SHUT_WR);
    }
}

/* Everything that others sent before they heard our bye is relayed, and the bye is through. */
static bool has_left(epx__bootstrap_t *b)
{
    bool through = epx__succession_settled(b);
    for (int i = 0; i < b->links; i++) {
        const epx__connection_t *link = &b->link[i];
        through = through && !(link->socket.open && !link->failed && !(link->ended && !link->first));
    }
    return through || epx__now_ns() >= b->close_by_ns;
}

static void read_in(epx__bootstrap_t *b, int index)
{
    epx__connection_t *link = &b->link[index];
    for (int i = 0; i < MESSAGES_A_TURN && link->socket.open && !link->ended; i++) {
        epx__message_t *message = NULL;
        const char *wrong = NULL;
        int got = epx__connection_read(link, (uint32_t)b->ranks, &message, &wrong);
        if (got == 1)
            epx__relay_take(b, (uint32_t)index, message);
        else if (got == -1)
            epx__relay_lost(b, (uint32_t)index, wrong);
        else if (got == -2)
            epx__bootstrap_fail(b, EPX_E_NOMEM, "no memory for a message of the bootstrap");
        if (got != 1)
            break;
    }
    if (link->socket.open && link->failed)
        epx__relay_lost(b, (uint32_t)index, "the connection broke");
}

/* [0] the bell, [1 + rank] connections, then the standby socket and its guests. */
static int fill_polls(epx__bootstrap_t *b)
{
    struct pollfd *next = b->polls;
    *next++ = (struct pollfd){.fd = b->wake_fd, .events = POLLIN};
    for (int i = 0; i < b->links; i++) {
        const epx__connection_t *link = &b->link[i];
        short events = (short)((link->ended ? 0 : POLLIN) | (link->first && !link->awaited ? POLLOUT : 0));
        *next++ = (struct pollfd){.fd = link->socket.open && events ? link->socket.fd : -1, .events = events};
    }
    if (!epx__succession_receives(b))
        return (int)(next - b->polls);
    *next++ = (struct pollfd){.fd = b->standby.fd, .events = POLLIN};
    for (int i = 0; i < EPX__GUESTS; i++) {
        const epx__socket_t *socket = &b->guests[i].socket;
        *next++ = (struct pollfd){.fd = socket->open ? socket->fd : -1, .events = POLLIN};
    }
    return (int)(next - b->polls);
}

static void look_at_guests(epx__bootstrap_t *b, const struct pollfd *polls)
{
    for (int i = 0; i < EPX__GUESTS; i++)
        if (polls[1 + i].revents && b->guests[i].socket.open)
            epx__succession_hear(b, &b->guests[i]);
    if (polls[0].revents)
        epx__succession_accept(b);
}

static void look(epx__bootstrap_t *b, int polled)
{
    uint64_t count;
    if (b->polls[0].revents) {
        ssize_t ignored = read(b->wake_fd, &count, sizeof(count));
        (void)ignored;
    }
    for (int i = 0; i < b->links; i++) {
        short ready = b->polls[1 + i].revents;
        if (!ready || !b->link[i].socket.open)
            continue;
        if (ready & ~POLLOUT)
            read_in(b, i);
        bool was_full = b->link[i].queued_bytes > EPX__QUEUE_BYTES_MAX;
        write_out(&b->link[i]);
        if (was_full && b->link[i].queued_bytes <= EPX__QUEUE_BYTES_MAX)
            pthread_cond_broadcast(&b->changed);
    }
    if (polled > 1 + b->links)
        look_at_guests(b, b->polls + 1 + b->links);
}

static int poll_ms(const epx__bootstrap_t *b)
{
    uint64_t due_ns = epx__succession_due_ns(b);
    if (b->closing && b->close_by_ns < due_ns)
        due_ns = b->close_by_ns;
    return due_ns == UINT64_MAX ? -1 : epx__milliseconds_until(due_ns);
}

void *epx__watcher_main(void *bootstrap)
{
    epx__bootstrap_t *b = bootstrap;
    epx__log_set_rank(b->rank);
    pthread_mutex_lock(&b->lock);
    for (;;) {
        if (b->failed != EPX_OK)
            close_all(b);
        if (b->closing)
            begin_to_leave(b);
        pthread_mutex_unlock(&b->lock);
        epx__listeners_tell(b); /* before anything that may take a while */
        pthread_mutex_lock(&b->lock);
        epx__succession_turn(b);
        for (int i = 0; i < b->links; i++)
            write_out(&b->link[i]);
        if (b->closing && has_left(b))
            break;
        int count = fill_polls(b), timeout_ms = poll_ms(b);
        pthread_mutex_unlock(&b->lock);
        epx__poll(b->polls, b->polls + count, count, timeout_ms);
        pthread_mutex_lock(&b->lock);
        look(b, count);
    }
    close_all(b);
    pthread_mutex_unlock(&b->lock);
    return NULL;
}
