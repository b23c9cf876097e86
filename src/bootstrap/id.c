/*
 * Unique ids: made by listening at once, so that the address in the id is already served when it is handed out.
 * The listening sockets wait in a table of this process until rank 0 joins and takes its own.
 */
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/random.h>

#include "base/alloc.h"
#include "base/fail.h"
#include "bootstrap/bootstrap.h"
#include "bootstrap/socket.h"

enum { IDS_MAX = 256 }; /* made and not yet joined */

static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;
static struct {
    epx_unique_id_t id;
    epx__socket_t listener;
    epx__socket_t spare; /* so that rank 0 can hear the others, if only to refuse them */
} table[IDS_MAX];

static void before_fork(void)
{
    pthread_mutex_lock(&table_lock);
}

static void after_fork(void)
{
    pthread_mutex_unlock(&table_lock);
}

/* A child must not inherit the lock as another thread held it. Registered after the list of sockets has registered
 * itself, so that this lock is taken before that one, as everywhere. */
static void watch_forks(void)
{
    pthread_atfork(before_fork, after_fork, after_fork);
}

bool epx__random_bytes(void *bytes, size_t count)
{
    ssize_t got;
    do
        got = getrandom(bytes, count, 0);
    while (got < 0 && errno == EINTR);
    return got == (ssize_t)count;
}

static epx_status_t enter(const epx_unique_id_t *id, epx__socket_t *listener, epx__socket_t *spare)
{
    epx_status_t status = EPX_E_BUSY;
    pthread_mutex_lock(&table_lock);
    for (int i = 0; i < IDS_MAX && status != EPX_OK; i++) {
        if (table[i].listener.open)
            continue;
        table[i].id = *id;
        epx__socket_move(&table[i].listener, listener);
        epx__socket_move(&table[i].spare, spare);
        status = EPX_OK;
    }
    pthread_mutex_unlock(&table_lock);
    if (status != EPX_OK)
        epx__fail(status, "%d unique ids were made in this process and rank 0 joined none of them", IDS_MAX);
    return status;
}

epx_status_t epx__unique_id_create(const char *address, epx_unique_id_t *id)
{
    epx__id_t made = {0};
    if (!id)
        return epx__fail(EPX_E_INVALID, "unique id: the place for the result is NULL");
    const char *wrong = epx__endpoint_parse_address(address ? address : "127.0.0.1", &made.endpoint);
    if (wrong)
        return epx__fail(EPX_E_INVALID, "unique id: address \"%.60s\": %s", address, wrong);
    if (!epx__random_bytes(made.token, sizeof(made.token)))
        return epx__fail(EPX_E_SYSTEM, "unique id: no random bytes to be had: %s", strerror(errno));
    epx__socket_t listener = {0}, spare = {0};
    EPX__TRY(epx__socket_listen(&listener, &made.endpoint));
    if (!epx__socket_reserve(&spare)) {
        epx__socket_close(&listener);
        return epx__fail(EPX_E_SYSTEM, "unique id: no descriptor to be had: %s", strerror(errno));
    }
    pthread_once(&fork_once, watch_forks);
    epx_unique_id_t encoded;
    epx__id_encode(&made, &encoded);
    epx_status_t status = enter(&encoded, &listener, &spare);
    if (status != EPX_OK) {
        epx__socket_close(&spare);
        epx__socket_close(&listener);
        return status;
    }
    *id = encoded;
    return EPX_OK;
}

epx_status_t epx__unique_id_take(const epx_unique_id_t *id, epx__socket_t *listener)
{
    bool found = false;
    pthread_mutex_lock(&table_lock);
    for (int i = 0; i < IDS_MAX && !found; i++) {
        if (!table[i].listener.open || memcmp(&table[i].id, id, sizeof(*id)) != 0)
            continue;
        epx__socket_move(listener, &table[i].listener);
        epx__socket_close(&table[i].spare);
        found = true;
    }
    pthread_mutex_unlock(&table_lock);
    if (!found)
        return epx__fail(EPX_E_INVALID, "rank 0 must join in the process that made the unique id, and an id serves one "
                                        "group only; this one is not waiting here");
    return EPX_OK;
}
