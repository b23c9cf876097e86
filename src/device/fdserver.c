/*
 * Passing descriptors to other processes of this host: one thread behind an abstract UNIX socket with a random name.
 *
 * Who may have one: a process of the same user (or root), by what the kernel says of the connection, that also knows
 * the 16-byte token, which travels in the export over the group's own connections. Requests have one size; each
 * connection has a second from accept to its reply, and CLIENTS_MAX of them are held at once (the oldest gives way).
 * The thread never blocks on a client, so close() ends within one poll.
 *
 * Offers are a list under `lock`; the descriptor is sent under that lock, so that a withdrawn one is never sent.
 */
#include "device/fdserver.h"
#include "device/device.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/clock.h"
#include "base/fail.h"
#include "device/identity.h"

#define CLIENTS_MAX 64
#define CLIENT_MS 1000
#define BACKLOG 256
#define STARVED_MS 20 /* out of descriptors: accept again after that */

typedef struct offer {
    struct offer *next;
    uint64_t key;
    int fd; /* borrowed */
} offer_t;

typedef struct client {
    int socket;
    uint64_t until_ns;
} client_t;

struct epx__fdserver {
    int listener, stop; /* stop: an eventfd that close() writes */
    char name[64];
    uint8_t token[16];
    uint64_t process; /* whose thread it is: not a child's after fork */
    pthread_t thread;
    pthread_mutex_t lock; /* offers, next_key */
    offer_t *offers;
    uint64_t next_key;
    /* The thread's own, in order of arrival. */
    client_t clients[CLIENTS_MAX];
    int client_count;
    bool starved;
};

socklen_t epx__fd_address(const char *name, size_t name_room, struct sockaddr_un *address)
{
    size_t length = strnlen(name, name_room);
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    if (length == 0 || length == name_room || length + 1 > sizeof address->sun_path)
        return 0;
    memcpy(address->sun_path + 1, name, length);
    return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length);
}

bool epx__fd_peer_allowed(int socket)
{
    struct ucred peer;
    socklen_t bytes = sizeof peer;
    return getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) == 0 && bytes == sizeof peer &&
           (peer.uid == geteuid() || peer.uid == 0);
}

/* Takes the same time wherever the first difference is. */
static bool tokens_equal(const uint8_t *a, const uint8_t *b)
{
    volatile uint8_t differ = 0;
    for (int i = 0; i < 16; i++)
        differ = (uint8_t)(differ | (a[i] ^ b[i]));
    return differ == 0;
}

/* ---- the thread ---- */

/* One reply, with a descriptor when fd >= 0. A client that does not take it at once gets none. */
static void reply(int socket, epx_status_t status, int fd)
{
    epx__fd_reply_t answer = {.magic = EPX__FD_REPLY_MAGIC, .status = (int32_t)status};
    struct iovec part = {.iov_base = &answer, .iov_len = sizeof answer};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    epx__fd_control_t control;
    if (fd >= 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
    }
    (void)sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void answer_request(epx__fdserver_t *server, int socket, const epx__fd_request_t *request)
{
    if (!tokens_equal(request->token, server->token)) {
        reply(socket, EPX_E_INVALID, -1);
        return;
    }
    pthread_mutex_lock(&server->lock);
    const offer_t *offer = server->offers;
    while (offer && offer->key != request->key)
        offer = offer->next;
    reply(socket, offer ? EPX_OK : EPX_E_PEER, offer ? offer->fd : -1);
    pthread_mutex_unlock(&server->lock);
}

/* Read what came; true when the connection is to end (answered, or garbage, or gone). */
static bool serve(epx__fdserver_t *server, int socket)
{
    struct {
        epx__fd_request_t request;
        char more; /* a longer message is garbage, and shows here */
    } buffer;
    /* No room for control data: descriptors that a client sends along are dropped by the kernel. */
    ssize_t got = recv(socket, &buffer, sizeof buffer, MSG_DONTWAIT);
    if (got < 0)
        return errno != EAGAIN && errno != EINTR;
    if (got == (ssize_t)sizeof buffer.request && buffer.request.magic == EPX__FD_REQUEST_MAGIC)
        answer_request(server, socket, &buffer.request);
    return true;
}

static void drop_client(epx__fdserver_t *server, int index)
{
    close(server->clients[index].socket);
    server->client_count--;
    memmove(&server->clients[index], &server->clients[index + 1],
            (size_t)(server->client_count - index) * sizeof server->clients[0]);
}

/* At most as many as we can hold each time, so that other work has its turn. */
static void accept_clients(epx__fdserver_t *server)
{
    for (int i = 0; i < CLIENTS_MAX; i++) {
        int socket = accept4(server->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (socket < 0) {
            server->starved = errno != EAGAIN && errno != EINTR && errno != ECONNABORTED;
            return;
        }
        if (!epx__fd_peer_allowed(socket)) {
            close(socket);
            continue;
        }
        if (server->client_count == CLIENTS_MAX)
            drop_client(server, 0);
        server->clients[server->client_count++] =
            (client_t){.socket = socket, .until_ns = epx__now_ns() + CLIENT_MS * 1000000ull};
    }
}

/* Milliseconds to the first client's deadline; deadlines come in order of arrival. */
static int poll_timeout(const epx__fdserver_t *server)
{
    if (server->client_count == 0)
        return server->starved ? STARVED_MS : -1;
    uint64_t now = epx__now_ns(), until = server->clients[0].until_ns;
    int left = until > now ? (int)((until - now) / 1000000u) + 1 : 0;
    return server->starved && left > STARVED_MS ? STARVED_MS : left;
}

static void serve_clients(epx__fdserver_t *server, const struct pollfd *polled, int count)
{
    uint64_t now = epx__now_ns();
    for (int i = count - 1; i >= 0; i--) { /* backwards: dropping moves only those behind */
        bool over = polled[i].revents != 0 && serve(server, server->clients[i].socket);
        if (over || now >= server->clients[i].until_ns)
            drop_client(server, i);
    }
}

static void *server_main(void *context)
{
    epx__fdserver_t *server = context;
    for (;;) {
        struct pollfd polled[2 + CLIENTS_MAX];
        int count = server->client_count;
        polled[0] = (struct pollfd){.fd = server->stop, .events = POLLIN};
        /* -1 is skipped by poll: no spinning on a listener that we cannot accept from. */
        polled[1] = (struct pollfd){.fd = server->starved ? -1 : server->listener, .events = POLLIN};
        for (int i = 0; i < count; i++)
            polled[2 + i] = (struct pollfd){.fd = server->clients[i].socket, .events = POLLIN};
        int ready = poll(polled, (nfds_t)(2 + count), poll_timeout(server));
        if (ready < 0 && errno != EINTR)
            break; /* out of kernel memory: peers' requests time out in words */
        if (ready < 0)
            continue;
        if (polled[0].revents)
            break;
        serve_clients(server, polled + 2, count);
        bool look = server->starved || polled[1].revents;
        server->starved = false;
        if (look)
            accept_clients(server);
    }
    while (server->client_count > 0)
        drop_client(server, server->client_count - 1);
    return NULL;
}

/* ---- open and close ---- */

static epx_status_t listen_somewhere(epx__fdserver_t *server)
{
    server->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    server->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (server->listener < 0 || server->stop < 0)
        return epx__fail(EPX_E_SYSTEM, "socket for passing descriptors: %s", strerror(errno));
    uint8_t random[16];
    EPX__TRY(epx__random_fill(random, sizeof random));
    EPX__TRY(epx__random_fill(server->token, sizeof server->token));
    size_t at = (size_t)snprintf(server->name, sizeof server->name, "epx-");
    for (size_t i = 0; i < sizeof random; i++)
        at += (size_t)snprintf(server->name + at, sizeof server->name - at, "%02x", random[i]);
    struct sockaddr_un address;
    socklen_t bytes = epx__fd_address(server->name, sizeof server->name, &address);
    if (bind(server->listener, (struct sockaddr *)&address, bytes) != 0 || listen(server->listener, BACKLOG) != 0)
        return epx__fail(EPX_E_SYSTEM, "listening on an abstract UNIX socket: %s", strerror(errno));
    return EPX_OK;
}

static epx_status_t start_thread(epx__fdserver_t *server)
{
    sigset_t all, before; /* the application's signals are not for this thread */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = epx__alloc_fault() ? EAGAIN : pthread_create(&server->thread, NULL, server_main, server);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0)
        return epx__fail(EPX_E_SYSTEM, "starting the thread that passes descriptors: %s", strerror(error));
    return EPX_OK;
}

static void free_server(epx__fdserver_t *server)
{
    if (server->listener >= 0)
        close(server->listener);
    if (server->stop >= 0)
        close(server->stop);
    while (server->offers) {
        offer_t *offer = server->offers;
        server->offers = offer->next;
        epx__free(offer);
    }
    pthread_mutex_destroy(&server->lock);
    memset(server->token, 0, sizeof server->token);
    epx__free(server);
}

epx_status_t epx__fdserver_open(epx__fdserver_t **server)
{
    epx__fdserver_t *made = epx__calloc(1, sizeof *made);
    if (!made)
        return epx__fail(EPX_E_NOMEM, "no memory for the descriptor server");
    made->listener = made->stop = -1;
    made->next_key = 1;
    made->process = epx__process_id();
    pthread_mutex_init(&made->lock, NULL);
    epx_status_t status = listen_somewhere(made);
    if (status == EPX_OK)
        status = start_thread(made);
    if (status != EPX_OK) {
        free_server(made);
        return status;
    }
    *server = made;
    return EPX_OK;
}

void epx__fdserver_close(epx__fdserver_t *server)
{
    if (!server)
        return;
    if (server->process != epx__process_id()) {
        /* A child of fork has no such thread, and the clients' descriptors are copies of its parent's. */
        for (int i = 0; i < server->client_count; i++)
            close(server->clients[i].socket);
        free_server(server);
        return;
    }
    uint64_t one = 1;
    while (write(server->stop, &one, sizeof one) < 0 && errno == EINTR) {
    }
    pthread_join(server->thread, NULL);
    free_server(server);
}

/* ---- offers ---- */

epx_status_t epx__fdserver_offer(epx__fdserver_t *server, int fd, epx__export_t *export_)
{
    offer_t *offer = epx__calloc(1, sizeof *offer);
    if (!offer)
        return epx__fail(EPX_E_NOMEM, "no memory to offer a descriptor");
    pthread_mutex_lock(&server->lock);
    *offer = (offer_t){.next = server->offers, .key = server->next_key++, .fd = fd};
    server->offers = offer;
    pthread_mutex_unlock(&server->lock);
    export_->key = offer->key;
    memcpy(export_->socket, server->name, sizeof export_->socket);
    memcpy(export_->token, server->token, sizeof export_->token);
    return EPX_OK;
}

void epx__fdserver_withdraw(epx__fdserver_t *server, uint64_t key)
{
    pthread_mutex_lock(&server->lock);
    offer_t **at = &server->offers;
    while (*at && (*at)->key != key)
        at = &(*at)->next;
    offer_t *gone = *at;
    if (gone)
        *at = gone->next;
    pthread_mutex_unlock(&server->lock);
    epx__free(gone);
}
