/* Open and close: the parts of a bootstrap are made, joined to the others, and taken down. */
#include "bootstrap/bootstrap.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/env.h"
#include "base/fail.h"
#include "base/log.h"
#include "bootstrap/meet.h"
#include "bootstrap/state.h"

bool epx__bootstrap_ours(const epx__bootstrap_t *b)
{
    return b->pid == getpid();
}

int epx__bootstrap_rank(const epx__bootstrap_t *b)
{
    return b->rank;
}

int epx__bootstrap_ranks(const epx__bootstrap_t *b)
{
    return b->ranks;
}

static void release_all(epx__message_t *message)
{
    while (message) {
        epx__message_t *next = message->next;
        epx__message_release(message);
        message = next;
    }
}

/* Everything but the thread. Takes one that was only half made, too. */
static void dismantle(epx__bootstrap_t *b)
{
    if (!b)
        return;
    for (int i = 0; b->link && i < b->links; i++)
        epx__connection_close(&b->link[i]);
    for (int i = 0; b->guests && i < EPX__GUESTS; i++)
        epx__socket_close(&b->guests[i].socket);
    epx__socket_close(&b->standby);
    for (int i = 0; b->parts && i < b->ranks; i++)
        epx__message_release(b->parts[i]);
    release_all(b->inbox_first);
    release_all(b->notices_first);
    release_all(b->kept_first);
    epx__message_release(b->outcome);
    epx__message_release(b->bye);
    epx__message_release(b->spare);
    if (b->wake_fd >= 0)
        close(b->wake_fd);
    epx__free(b->link);
    epx__free(b->peers);
    epx__free(b->guests);
    epx__free(b->tried);
    epx__free(b->state);
    epx__free(b->polls);
    epx__free(b->told);
    epx__free(b->parts);
    epx__free(b->reached);
    pthread_cond_destroy(&b->changed);
    pthread_mutex_destroy(&b->lock);
    pthread_mutex_destroy(&b->listeners_lock);
    epx__free(b);
}

static void init_locks(epx__bootstrap_t *b)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&b->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&b->lock, NULL);
    pthread_mutex_init(&b->listeners_lock, NULL);
}

static epx_status_t assemble(int rank, int ranks, uint64_t timeout_ms, epx__bootstrap_t **assembled)
{
    epx__bootstrap_t *b = epx__calloc(1, sizeof(*b));
    if (!b)
        return epx__fail(EPX_E_NOMEM, "bootstrap: no memory for a group of %d ranks", ranks);
    b->rank = rank;
    b->ranks = ranks;
    b->timeout_ms = timeout_ms;
    b->pid = getpid();
    b->wake_fd = -1;
    b->before = -1;
    init_locks(b);
    size_t count = (size_t)ranks;
    b->links = ranks == 1 ? 0 : ranks;
    epx__frame_t bye = {.type = EPX__FRAME_BYE, .from = (uint32_t)rank};
    bool made = (b->state = epx__calloc(count, sizeof(*b->state))) && (b->told = epx__calloc(count, sizeof(*b->told)));
    if (made && b->links)
        made = (b->link = epx__calloc((size_t)b->links, sizeof(*b->link))) &&
               (b->polls = epx__calloc(count + 2 + EPX__GUESTS, 2 * sizeof(*b->polls))) &&
               (b->peers = epx__calloc(count, sizeof(*b->peers))) && (b->tried = epx__calloc(count, 1)) &&
               (b->guests = epx__calloc(EPX__GUESTS, sizeof(*b->guests))) &&
               (b->bye = epx__message_create(&bye, NULL)) && (b->spare = epx__message_create(&bye, NULL));
    if (made && b->links && rank == 0)
        made = (b->parts = epx__calloc(count, sizeof(*b->parts))) &&
               (b->reached = epx__calloc(count, sizeof(*b->reached)));
    epx_status_t status = EPX_E_NOMEM;
    if (made && b->links) {
        errno = ENOMEM;
        b->wake_fd = epx__alloc_fault() ? -1 : eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        made = b->wake_fd >= 0;
        status = made || errno == ENOMEM ? status : EPX_E_SYSTEM;
    }
    if (made) {
        *assembled = b;
        return EPX_OK;
    }
    status = status == EPX_E_NOMEM
                 ? epx__fail(status, "bootstrap: no memory for a group of %d ranks", ranks)
                 : epx__fail(status, "bootstrap: no descriptor to be had for its thread: %s", strerror(errno));
    dismantle(b);
    return status;
}

/* The caller's signals are not for this thread; only faults of its own reach it. */
static int create_quiet_thread(epx__bootstrap_t *b)
{
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS, SIGPROF};
    sigset_t quiet, before;
    sigfillset(&quiet);
    for (size_t i = 0; i < sizeof(faults) / sizeof(faults[0]); i++)
        sigdelset(&quiet, faults[i]);
    pthread_sigmask(SIG_SETMASK, &quiet, &before);
    int error = pthread_create(&b->watcher, NULL, epx__watcher_main, b);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error)
        pthread_setname_np(b->watcher, "epx-bootstrap");
    return error;
}

static epx_status_t start_watcher(epx__bootstrap_t *b)
{
    b->watched = true;
    int error = epx__alloc_fault() ? EAGAIN : create_quiet_thread(b);
    if (!error)
        return EPX_OK;
    b->watched = false;
    return epx__fail(EPX_E_NOMEM, "bootstrap: no thread to be had: %s", strerror(error));
}

/* All have come: welcome them, or tell them that rank 0 fails at the last step. */
static void tell_joined(epx__bootstrap_t *b, epx_status_t status)
{
    uint8_t refusal[EPX__FRAME_BYTES + EPX__WORDS_MAX], welcome[EPX__FRAME_BYTES];
    size_t refusal_bytes = status == EPX_OK ? 0 : epx__join_refusal(status, epx__detail(), refusal);
    epx__frame_encode(&(epx__frame_t){.type = EPX__FRAME_WELCOME}, welcome);
    for (int rank = 1; rank < b->ranks; rank++) {
        /* One that has gone meanwhile is found dead by the watcher. */
        if (status == EPX_OK)
            epx__socket_send_now(&b->link[rank].socket, welcome, sizeof(welcome));
        else
            epx__socket_send_now(&b->link[rank].socket, refusal, refusal_bytes);
    }
}

/* Where each rank would take the middle's place. */
static epx__message_t *peers_message(const epx__bootstrap_t *b)
{
    epx__frame_t frame = {.type = EPX__FRAME_PEERS, .bytes = (uint32_t)b->ranks * EPX__ENDPOINT_BYTES};
    epx__message_t *peers = epx__message_create(&frame, NULL);
    for (int rank = 0; peers && rank < b->ranks; rank++)
        epx__endpoint_put(&b->peers[rank], peers->payload + rank * EPX__ENDPOINT_BYTES);
    return peers;
}

static epx_status_t open_root(const epx__join_t *join, epx__socket_t *listener, epx__bootstrap_t **opened)
{
    epx__bootstrap_t *b = NULL;
    epx__join_t mine = *join;
    if (mine.hello.failure == EPX_OK)
        mine.hello.failure = (uint32_t)assemble((int)join->hello.rank, (int)join->hello.ranks, join->timeout_ms, &b);
    epx_status_t status = epx__join_root(&mine, listener, b); /* without `b` too: it tells the others */
    epx__socket_close(listener);
    if (status == EPX_OK) {
        epx__message_t *peers = peers_message(b);
        b->hello = join->hello;
        pthread_mutex_lock(&b->lock);
        status = peers ? start_watcher(b) : epx__fail(EPX_E_NOMEM, "bootstrap: no memory for %d endpoints", b->ranks);
        tell_joined(b, status);
        for (int rank = 1; status == EPX_OK && rank < b->ranks; rank++)
            epx__connection_queue(&b->link[rank], peers, &b->link[rank].spare_entry);
        if (status == EPX_OK)
            epx__bootstrap_wake(b);
        pthread_mutex_unlock(&b->lock);
        epx__message_release(peers);
    }
    if (status == EPX_OK)
        *opened = b;
    else
        dismantle(b);
    return status;
}

/* A rank that cannot take part still comes to say so, for the others would wait for it. */
static void decline(const epx__join_t *join, epx_status_t why)
{
    char words[EPX__DETAIL_BYTES];
    epx__join_t sorry = *join;
    epx__socket_t connected = {.open = false};
    snprintf(words, sizeof(words), "%s", epx__detail());
    sorry.hello.failure = (uint32_t)why;
    epx__join_leaf(&sorry, &connected);
    epx__socket_close(&connected);
    epx__detail_set(words);
}

static epx_status_t open_leaf(const epx__join_t *join, epx__bootstrap_t **opened)
{
    epx__bootstrap_t *b = NULL;
    epx_status_t status = (epx_status_t)join->hello.failure;
    if (status == EPX_OK)
        status = assemble((int)join->hello.rank, (int)join->hello.ranks, join->timeout_ms, &b);
    if (status != EPX_OK) {
        decline(join, status);
        return status;
    }
    bool unheard = false;
    epx__join_t mine = *join;
    mine.standby = &b->standby;
    mine.unheard = &unheard;
    b->hello = join->hello;
    b->link[0].to_middle = true;
    status = epx__join_leaf(&mine, &b->link[0].socket);
    if (status == EPX_OK)
        status = start_watcher(b);
    if (status == EPX_OK) {
        *opened = b;
        return EPX_OK;
    }
    dismantle(b);
    if (unheard) /* with the descriptor that is free now */
        decline(join, status);
    return status;
}

static epx_status_t join_all(const epx__bootstrap_config_t *config, epx__meeting_t *meeting, uint64_t timeout_ms,
                             epx__bootstrap_t **opened)
{
    epx__join_t join = {.where = meeting->where, .timeout_ms = timeout_ms};
    join.deadline_ns = epx__now_ns() + timeout_ms * 1000000u;
    join.hello = (epx__hello_t){
        .protocol = EPX__WIRE_PROTOCOL,
        .rank = (uint32_t)meeting->rank,
        .ranks = (uint32_t)meeting->ranks,
        .version = EPX_VERSION_MAJOR << 16 | EPX_VERSION_MINOR << 8 | EPX_VERSION_PATCH,
        .pid = (uint32_t)getpid(),
        .sizes_hash = epx__sizes_hash(),
        .config_hash = config->config_hash,
        .failure = (uint32_t)config->failure,
    };
    memcpy(join.hello.token, meeting->where.token, EPX__TOKEN_BYTES);
    gethostname(join.hello.host, sizeof(join.hello.host) - 1);
    snprintf(join.hello.config_words, sizeof(join.hello.config_words), "%s",
             config->config_words ? config->config_words : "");
    return meeting->rank == 0 ? open_root(&join, &meeting->listener, opened) : open_leaf(&join, opened);
}

epx_status_t epx__bootstrap_open(const epx__bootstrap_config_t *config, epx__bootstrap_t **bootstrap)
{
    epx__meeting_t meeting;
    epx__bootstrap_t *opened = NULL;
    uint64_t timeout_ms = config->timeout_ms;
    if (!timeout_ms)
        EPX__TRY(epx__env_u64(EPX__ENV_TIMEOUT_MS, 1, 1000000000, 30000, &timeout_ms));
    EPX__TRY(epx__meet(config, &meeting));
    epx__log_set_rank(meeting.rank);
    epx_status_t status = EPX_OK;
    if (meeting.ranks > 1) {
        status = join_all(config, &meeting, timeout_ms, &opened);
    } else {
        epx__socket_close(&meeting.listener); /* of an id made for one */
        status = config->failure == EPX_OK ? assemble(0, 1, timeout_ms, &opened) : config->failure;
    }
    if (status == EPX_OK)
        *bootstrap = opened;
    return status;
}

void epx__bootstrap_close(epx__bootstrap_t *b)
{
    if (!b || !epx__bootstrap_ours(b))
        return; /* a forked child: its copies of the sockets are closed, and the rest may be locked by nobody */
    if (b->watched) {
        pthread_mutex_lock(&b->lock);
        b->closing = true;
        b->close_by_ns = epx__now_ns() + EPX__CLOSE_NS;
        epx__bootstrap_wake(b);
        pthread_mutex_unlock(&b->lock);
        pthread_join(b->watcher, NULL);
    }
    dismantle(b);
}
