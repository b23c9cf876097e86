/*
 * Asking another process's fd server for a descriptor. Everything it says is checked: size, magic, exactly one
 * descriptor; others that come along are closed.
 */
#include "device/device.h"
#include "device/fdserver.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/clock.h"
#include "base/fail.h"

#define RETRY_NS 2000000u /* the server's queue was full, or it dropped us for newer ones */

enum attempt { DONE, AGAIN };

/* Close every descriptor in the message but the first; that one, or -1. */
static int take_descriptor(struct msghdr *message)
{
    int taken = -1;
    for (struct cmsghdr *at = CMSG_FIRSTHDR(message); at; at = CMSG_NXTHDR(message, at)) {
        if (at->cmsg_level != SOL_SOCKET || at->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (at->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(at) + i * sizeof fd, sizeof fd);
            if (taken < 0)
                taken = fd;
            else
                close(fd);
        }
    }
    return taken;
}

static epx_status_t judge(const epx__fd_reply_t *answer, ssize_t got, int *fd)
{
    bool sound = got == (ssize_t)sizeof *answer && answer->magic == EPX__FD_REPLY_MAGIC;
    if (sound && answer->status == EPX_OK && *fd >= 0)
        return EPX_OK;
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
    if (sound && answer->status == EPX_E_INVALID)
        return epx__fail(EPX_E_PEER, "the exporter refused our token: the export is not from this group");
    if (sound && answer->status == EPX_E_PEER)
        return epx__fail(EPX_E_PEER, "the exporter no longer offers this window: it was destroyed");
    return epx__fail(EPX_E_PEER, "the exporter's answer makes no sense (%zd bytes): another program", got);
}

static int left_ms(epx__deadline_t *deadline)
{
    uint64_t left = epx__deadline_left_ms(deadline);
    return left > 60000 ? 60000 : (int)left;
}

static epx_status_t receive(int socket, epx__deadline_t *deadline, enum attempt *attempt, int *fd)
{
    struct pollfd polled = {.fd = socket, .events = POLLIN};
    while (poll(&polled, 1, left_ms(deadline)) <= 0) {
        if (epx__deadline_passed(deadline))
            return epx__fail(EPX_E_TIMEOUT, "the exporter did not hand over its window's descriptor in %llu ms",
                             (unsigned long long)(deadline->timeout_ns / 1000000u));
    }
    epx__fd_reply_t answer;
    epx__fd_control_t control;
    struct iovec part = {.iov_base = &answer, .iov_len = sizeof answer};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (got == 0 || (got < 0 && (errno == ECONNRESET || errno == EINTR || errno == EAGAIN)))
        return EPX_OK; /* dropped: once more */
    if (got < 0)
        return epx__fail(EPX_E_SYSTEM, "recvmsg for a descriptor: %s", strerror(errno));
    *attempt = DONE;
    *fd = take_descriptor(&message);
    if (*fd < 0 && (message.msg_flags & MSG_CTRUNC))
        return epx__fail(EPX_E_SYSTEM, "no room in this process for one more descriptor, that of a peer's window");
    return judge(&answer, got, fd);
}

static epx_status_t connect_and_ask(int socket, const epx__export_t *export_, const struct sockaddr_un *address,
                                    socklen_t address_bytes, epx__deadline_t *deadline, enum attempt *attempt, int *fd)
{
    *attempt = AGAIN;
    if (connect(socket, (const struct sockaddr *)address, address_bytes) != 0) {
        if (errno == EAGAIN || errno == EINTR || errno == EINPROGRESS)
            return EPX_OK; /* its queue is full */
        if (errno == ECONNREFUSED || errno == ENOENT)
            return epx__fail(EPX_E_UNSUPPORTED, "nobody passes descriptors under this window's name: the exporter is "
                                                "gone, or in another network namespace");
        return epx__fail(EPX_E_SYSTEM, "connect to the exporter's UNIX socket: %s", strerror(errno));
    }
    if (!epx__fd_peer_allowed(socket))
        return epx__fail(EPX_E_UNSUPPORTED, "the exporter's socket belongs to another user");
    epx__fd_request_t request = {.magic = EPX__FD_REQUEST_MAGIC, .spare = 0, .key = export_->key};
    memcpy(request.token, export_->token, sizeof request.token);
    if (send(socket, &request, sizeof request, MSG_NOSIGNAL) != (ssize_t)sizeof request) {
        if (errno == EPIPE || errno == ECONNRESET || errno == EAGAIN || errno == EINTR)
            return EPX_OK;
        return epx__fail(EPX_E_SYSTEM, "send to the exporter's UNIX socket: %s", strerror(errno));
    }
    return receive(socket, deadline, attempt, fd);
}

epx_status_t epx__fd_fetch(const epx__export_t *export_, uint64_t timeout_ms, int *fd)
{
    struct sockaddr_un address;
    socklen_t address_bytes = epx__fd_address(export_->socket, sizeof export_->socket, &address);
    if (address_bytes == 0 || export_->key == 0)
        return epx__fail(EPX_E_INVALID, "this export names no descriptor server");
    epx__deadline_t deadline = epx__deadline_ms(timeout_ms);
    enum attempt attempt = AGAIN;
    while (!epx__deadline_passed(&deadline)) {
        if (epx__alloc_fault())
            return epx__fail(EPX_E_NOMEM, "no memory for a UNIX socket");
        int from = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (from < 0)
            return epx__fail(EPX_E_SYSTEM, "UNIX socket to fetch a descriptor: %s", strerror(errno));
        int got = -1;
        epx_status_t status = connect_and_ask(from, export_, &address, address_bytes, &deadline, &attempt, &got);
        close(from);
        if (status == EPX_OK && attempt == DONE)
            *fd = got;
        if (status != EPX_OK || attempt == DONE)
            return status;
        epx__sleep_ns(RETRY_NS);
    }
    return epx__fail(EPX_E_TIMEOUT, "the exporter's descriptor server took no request in %llu ms",
                     (unsigned long long)timeout_ms);
}
