/* The thread that reads the sockets, sends what is queued, notices deaths, and carries out the leave. */
#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/fail.h"
#include "base/log.h"
#include "bootstrap/state.h"

enum { MESSAGES_A_TURN = 64 };

static uint32_t rank_behind(const epx__bootstrap_t *b, int index)
{
    return b->rank == 0 ? (uint32_t)index : 0;
}

static void close_all(epx__bootstrap_t *b)
{
    for (int i = 0; i < b->links; i++)
        epx__connection_close(&b->link[i]);
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
    for (int i = 0; i < b->links; i++) {
        epx__connection_queue(&b->link[i], b->bye, &b->link[i].bye_entry);
        /* Rank 0 goes on relaying until the others have answered; a leaf has said its last word. */
        b->link[i].half_close = b->rank != 0;
    }
}

static void write_out(epx__connection_t *link)
{
    if (!link->socket.open)
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
    for (int i = 0; i < b->links; i++) {
        const epx__connection_t *link = &b->link[i];
        if (link->socket.open && !link->failed && !(link->ended && !link->first))
            return epx__now_ns() >= b->close_by_ns;
    }
    return true;
}

static void read_in(epx__bootstrap_t *b, int index)
{
    epx__connection_t *link = &b->link[index];
    for (int i = 0; i < MESSAGES_A_TURN && link->socket.open && !link->ended; i++) {
        epx__message_t *message = NULL;
        const char *wrong = NULL;
        int got = epx__connection_read(link, (uint32_t)b->ranks, &message, &wrong);
        if (got == 1)
            epx__relay_take(b, rank_behind(b, index), message);
        else if (got == -1)
            epx__relay_lost(b, rank_behind(b, index), wrong);
        else if (got == -2)
            epx__bootstrap_fail(b, EPX_E_NOMEM, "no memory for a message of the bootstrap");
        if (got != 1)
            break;
    }
    if (link->socket.open && link->failed)
        epx__relay_lost(b, rank_behind(b, index), "the connection broke");
}

static int fill_polls(epx__bootstrap_t *b)
{
    b->polls[0] = (struct pollfd){.fd = b->wake_fd, .events = POLLIN};
    for (int i = 0; i < b->links; i++) {
        const epx__connection_t *link = &b->link[i];
        short events = (short)((link->ended ? 0 : POLLIN) | (link->first ? POLLOUT : 0));
        b->polls[1 + i] = (struct pollfd){.fd = link->socket.open && events ? link->socket.fd : -1, .events = events};
    }
    return 1 + b->links;
}

static void look(epx__bootstrap_t *b)
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
        for (int i = 0; i < b->links; i++)
            write_out(&b->link[i]);
        if (b->closing && has_left(b))
            break;
        int count = fill_polls(b);
        int timeout_ms = b->closing ? epx__milliseconds_until(b->close_by_ns) : -1;
        pthread_mutex_unlock(&b->lock);
        epx__listeners_tell(b);
        if (poll(b->polls, (nfds_t)count, timeout_ms) < 0)
            for (int i = 0; i < count; i++)
                b->polls[i].revents = 0;
        pthread_mutex_lock(&b->lock);
        look(b);
    }
    close_all(b);
    pthread_mutex_unlock(&b->lock);
    return NULL;
}
