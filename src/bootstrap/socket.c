/* Sockets of the bootstrap and the list of them: see socket.h. */
#include "bootstrap/socket.h"

#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/fail.h"

enum { BACKLOG = 4096, KEEPALIVE_IDLE_S = 5, KEEPALIVE_INTERVAL_S = 2, KEEPALIVE_COUNT = 3, USER_TIMEOUT_MS = 10000 };

static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static epx__socket_t *list;
static pthread_once_t fork_once = PTHREAD_ONCE_INIT;

static void before_fork(void)
{
    pthread_mutex_lock(&list_lock);
}

static void after_fork_parent(void)
{
    pthread_mutex_unlock(&list_lock);
}

/* The child drops its copies; the parent's connections do not notice. */
static void after_fork_child(void)
{
    for (epx__socket_t *socket = list; socket; socket = socket->next) {
        close(socket->fd);
        socket->open = false;
    }
    list = NULL;
    pthread_mutex_unlock(&list_lock);
}

static void watch_forks(void)
{
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

/* With list_lock held, so that no fork comes between the system call that made `fd` and this. */
static void enlist(epx__socket_t *owned, int fd)
{
    *owned = (epx__socket_t){.fd = fd, .open = true, .next = list};
    if (list)
        list->previous = owned;
    list = owned;
}

static void delist(epx__socket_t *owned)
{
    if (owned->previous)
        owned->previous->next = owned->next;
    else
        list = owned->next;
    if (owned->next)
        owned->next->previous = owned->previous;
    owned->open = false;
    owned->previous = owned->next = NULL;
}

void epx__socket_close(epx__socket_t *owned)
{
    pthread_mutex_lock(&list_lock);
    if (owned->open) {
        close(owned->fd);
        delist(owned);
    }
    pthread_mutex_unlock(&list_lock);
}

void epx__socket_move(epx__socket_t *to, epx__socket_t *from)
{
    pthread_mutex_lock(&list_lock);
    int fd = from->fd;
    bool open = from->open;
    if (open) {
        delist(from);
        enlist(to, fd);
    } else {
        *to = (epx__socket_t){.open = false};
    }
    pthread_mutex_unlock(&list_lock);
}

static epx_status_t new_socket(epx__socket_t *owned, int family)
{
    pthread_once(&fork_once, watch_forks);
    int fd = -1;
    errno = ENOMEM;
    if (!epx__alloc_fault()) {
        pthread_mutex_lock(&list_lock);
        fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, IPPROTO_TCP);
        if (fd >= 0)
            enlist(owned, fd);
        pthread_mutex_unlock(&list_lock);
    }
    if (fd < 0)
        return epx__fail(errno == ENOMEM ? EPX_E_NOMEM : EPX_E_SYSTEM, "rendezvous: no socket to be had: %s",
                         strerror(errno));
    return EPX_OK;
}

bool epx__socket_reserve(epx__socket_t *reserved)
{
    pthread_once(&fork_once, watch_forks);
    pthread_mutex_lock(&list_lock);
    int fd = eventfd(0, EFD_CLOEXEC);
    if (fd >= 0)
        enlist(reserved, fd);
    pthread_mutex_unlock(&list_lock);
    return fd >= 0;
}

static socklen_t to_sockaddr(const epx__endpoint_t *endpoint, struct sockaddr_storage *address)
{
    memset(address, 0, sizeof(*address));
    if (endpoint->family == 6) {
        struct sockaddr_in6 *six = (struct sockaddr_in6 *)address;
        six->sin6_family = AF_INET6;
        six->sin6_port = htons(endpoint->port);
        memcpy(&six->sin6_addr, endpoint->address, 16);
        return sizeof(*six);
    }
    struct sockaddr_in *four = (struct sockaddr_in *)address;
    four->sin_family = AF_INET;
    four->sin_port = htons(endpoint->port);
    memcpy(&four->sin_addr, endpoint->address, 4);
    return sizeof(*four);
}

/* A peer whose host vanished (no FIN, no RST) is noticed after about ten seconds. */
static void set_options(int fd)
{
    int one = 1, idle = KEEPALIVE_IDLE_S, interval = KEEPALIVE_INTERVAL_S, count = KEEPALIVE_COUNT;
    int user_timeout = USER_TIMEOUT_MS;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof(interval));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof(count));
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &user_timeout, sizeof(user_timeout));
}

static void from_sockaddr(const struct sockaddr_storage *address, epx__endpoint_t *endpoint)
{
    *endpoint = (epx__endpoint_t){0};
    if (address->ss_family == AF_INET6) {
        const struct sockaddr_in6 *six = (const struct sockaddr_in6 *)address;
        endpoint->family = 6;
        memcpy(endpoint->address, &six->sin6_addr, 16);
    } else if (address->ss_family == AF_INET) {
        const struct sockaddr_in *four = (const struct sockaddr_in *)address;
        endpoint->family = 4;
        memcpy(endpoint->address, &four->sin_addr, 4);
    }
}

bool epx__socket_here(const epx__socket_t *connected, epx__endpoint_t *endpoint)
{
    struct sockaddr_storage address;
    socklen_t length = sizeof(address);
    memset(&address, 0, sizeof(address));
    if (getsockname(connected->fd, (struct sockaddr *)&address, &length))
        return false;
    from_sockaddr(&address, endpoint);
    return endpoint->family != 0;
}

epx_status_t epx__socket_listen(epx__socket_t *listener, epx__endpoint_t *endpoint)
{
    struct sockaddr_storage address;
    socklen_t length = to_sockaddr(endpoint, &address);
    char text[EPX__ENDPOINT_TEXT];
    epx__endpoint_text(endpoint, text);
    EPX__TRY(new_socket(listener, address.ss_family));
    int one = 1;
    /* A restarted job finds its port in TIME_WAIT; a listener that lives still keeps us out. */
    setsockopt(listener->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (bind(listener->fd, (struct sockaddr *)&address, length) || listen(listener->fd, BACKLOG) ||
        getsockname(listener->fd, (struct sockaddr *)&address, &length)) {
        int error = errno;
        epx__socket_close(listener);
        return epx__fail(EPX_E_SYSTEM, "rendezvous: cannot listen at %s: %s%s", text, strerror(error),
                         error == EADDRINUSE      ? " (another program or job has that port; choose one with EPX_ROOT)"
                         : error == EADDRNOTAVAIL ? " (it must be an address of the host on which rank 0 runs)"
                                                  : "");
    }
    endpoint->port = ntohs(address.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&address)->sin6_port
                                                         : ((struct sockaddr_in *)&address)->sin_port);
    return EPX_OK;
}

bool epx__socket_accept(epx__socket_t *listener, epx__socket_t *accepted)
{
    pthread_mutex_lock(&list_lock);
    int fd = accept4(listener->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0)
        enlist(accepted, fd);
    pthread_mutex_unlock(&list_lock);
    if (fd >= 0)
        set_options(fd);
    return fd >= 0;
}

int epx__milliseconds_until(uint64_t deadline_ns)
{
    uint64_t now = epx__now_ns();
    if (now >= deadline_ns)
        return 0;
    uint64_t left = (deadline_ns - now + 999999u) / 1000000u;
    return left > INT_MAX ? INT_MAX : (int)left;
}

/* 0, or the errno of the attempt. */
static int finish_connect(int fd, uint64_t deadline_ns)
{
    struct pollfd poll_one = {.fd = fd, .events = POLLOUT};
    int error = 0;
    socklen_t length = sizeof(error);
    int ready = poll(&poll_one, 1, epx__milliseconds_until(deadline_ns));
    if (ready == 0 || (ready < 0 && errno == EINTR))
        return ETIMEDOUT;
    if (ready < 0 || getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length))
        return errno;
    return error;
}

/* Connecting to a free local port can, once in a while, connect a socket to itself. */
static bool is_self(int fd)
{
    struct sockaddr_storage mine, theirs;
    memset(&mine, 0, sizeof(mine));
    memset(&theirs, 0, sizeof(theirs));
    socklen_t mine_length = sizeof(mine), theirs_length = sizeof(theirs);
    if (getsockname(fd, (struct sockaddr *)&mine, &mine_length) ||
        getpeername(fd, (struct sockaddr *)&theirs, &theirs_length))
        return false;
    return mine_length == theirs_length && !memcmp(&mine, &theirs, mine_length);
}

epx_status_t epx__socket_connect(epx__socket_t *connected, const epx__endpoint_t *endpoint, uint64_t deadline_ns,
                                 int *error)
{
    struct sockaddr_storage address;
    socklen_t length = to_sockaddr(endpoint, &address);
    EPX__TRY(new_socket(connected, address.ss_family));
    set_options(connected->fd);
    *error = 0;
    if (connect(connected->fd, (struct sockaddr *)&address, length))
        *error = errno == EINPROGRESS || errno == EINTR ? finish_connect(connected->fd, deadline_ns) : errno;
    if (!*error && is_self(connected->fd))
        *error = ECONNREFUSED;
    if (*error)
        epx__socket_close(connected);
    return EPX_OK;
}

bool epx__socket_send_now(const epx__socket_t *to, const void *data, size_t bytes)
{
    return send(to->fd, data, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)bytes;
}

int epx__socket_receive(const epx__socket_t *from, void *data, size_t bytes, uint64_t deadline_ns)
{
    size_t have = 0;
    while (have < bytes) {
        ssize_t got = recv(from->fd, (char *)data + have, bytes - have, MSG_DONTWAIT);
        if (got == 0)
            return 0;
        if (got > 0) {
            have += (size_t)got;
            continue;
        }
        if (errno != EAGAIN && errno != EINTR)
            return -2;
        struct pollfd poll_one = {.fd = from->fd, .events = POLLIN};
        if (poll(&poll_one, 1, epx__milliseconds_until(deadline_ns)) == 0 && epx__now_ns() >= deadline_ns)
            return -1;
    }
    return 1;
}

int epx__poll(struct pollfd *polls, struct pollfd *scratch, int count, int timeout_ms)
{
    nfds_t used = 0;
    for (int i = 0; i < count; i++)
        if (polls[i].fd >= 0)
            scratch[used++] = polls[i];
    int ready = poll(scratch, used, timeout_ms);
    used = 0;
    for (int i = 0; i < count; i++)
        polls[i].revents = polls[i].fd < 0 || ready <= 0 ? 0 : scratch[used++].revents;
    return ready;
}

uint32_t epx__descriptors_spare(uint32_t wanted)
{
    uint32_t had = 0;
    int *fds = epx__calloc(wanted, sizeof(*fds));
    if (!fds)
        return 0;
    while (had < wanted && (fds[had] = eventfd(0, EFD_CLOEXEC)) >= 0)
        had++;
    for (uint32_t i = 0; i < had; i++)
        close(fds[i]);
    epx__free(fds);
    return had;
}
