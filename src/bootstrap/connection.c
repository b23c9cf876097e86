/* Messages with a count of references, and the two queues of a connection. */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#include "base/alloc.h"
#include "bootstrap/state.h"

epx__message_t *epx__message_create(const epx__frame_t *frame, const void *payload)
{
    epx__message_t *message = epx__calloc(1, sizeof(*message) + frame->bytes);
    if (!message)
        return NULL;
    message->references = 1;
    message->frame = *frame;
    epx__frame_encode(frame, message->header);
    if (payload && frame->bytes)
        memcpy(message->payload, payload, frame->bytes);
    return message;
}

void epx__message_release(epx__message_t *message)
{
    if (message && __atomic_sub_fetch(&message->references, 1, __ATOMIC_ACQ_REL) == 0)
        epx__free(message);
}

void epx__message_append(epx__message_t **first, epx__message_t **last, epx__message_t *message)
{
    message->next = NULL;
    if (*first)
        (*last)->next = message;
    else
        *first = message;
    *last = message;
}

void epx__connection_pop(epx__connection_t *link)
{
    epx__queued_t *entry = link->first;
    link->first = entry->next;
    if (!link->first)
        link->last = NULL;
    link->queued_bytes -= EPX__FRAME_BYTES + entry->message->frame.bytes;
    link->first_sent = 0;
    epx__message_release(entry->message);
    entry->message = NULL;
    if (!entry->embedded)
        epx__free(entry);
}

void epx__connection_close(epx__connection_t *link)
{
    while (link->first)
        epx__connection_pop(link);
    epx__message_release(link->incoming);
    epx__message_release(link->room);
    link->incoming = link->room = NULL;
    link->have = 0;
    link->shut = true;
    epx__socket_close(&link->socket);
}

void epx__connection_renew(epx__connection_t *link)
{
    link->half_close = link->shut = link->ended = link->failed = false;
    link->have = 0;
    link->first_sent = 0;
}

void epx__connection_move(epx__connection_t *to, epx__connection_t *from)
{
    epx__queued_t *first = NULL, *last = NULL;
    from->first_sent = 0; /* whoever read the beginning is gone */
    while (from->first) {
        epx__queued_t *entry = from->first;
        uint8_t type = entry->message->frame.type;
        if (type == EPX__FRAME_GATHER || type == EPX__FRAME_GIVEUP || type == EPX__FRAME_QUERY) {
            epx__connection_pop(from);
            continue;
        }
        size_t bytes = EPX__FRAME_BYTES + entry->message->frame.bytes;
        from->first = entry->next;
        from->queued_bytes -= bytes;
        to->queued_bytes += bytes;
        entry->next = NULL;
        if (last)
            last->next = entry;
        else
            first = entry;
        last = entry;
    }
    from->last = NULL;
    if (!first)
        return;
    last->next = to->first;
    to->first = first;
    if (!to->last)
        to->last = last;
}

bool epx__connection_queue(epx__connection_t *link, epx__message_t *message, epx__queued_t *embedded)
{
    if ((!link->socket.open && !link->awaited) || link->shut || link->failed)
        return true; /* nobody is there to hear it; who needs an answer will notice */
    epx__queued_t *entry = embedded;
    if (embedded) {
        if (embedded->message)
            return false; /* still under way from the last time */
        *embedded = (epx__queued_t){.embedded = true};
    } else {
        entry = epx__calloc(1, sizeof(*entry));
        if (!entry)
            return false;
    }
    entry->message = message;
    __atomic_add_fetch(&message->references, 1, __ATOMIC_RELAXED);
    if (link->last)
        link->last->next = entry;
    else
        link->first = entry;
    link->last = entry;
    link->queued_bytes += EPX__FRAME_BYTES + message->frame.bytes;
    epx__connection_flush(link);
    return true;
}

/* The middle has closed its end. What is sent now would be lost; what stays in the queue goes to its successor. */
static bool is_deserted(const epx__connection_t *link)
{
    struct pollfd end = {.fd = link->socket.fd, .events = POLLRDHUP};
    return link->to_middle && poll(&end, 1, 0) > 0 && end.revents;
}

void epx__connection_flush(epx__connection_t *link)
{
    if (link->first && !link->failed && !link->awaited && is_deserted(link))
        return;
    while (link->first && !link->failed && !link->awaited) {
        epx__message_t *message = link->first->message;
        size_t sent = link->first_sent, header = sizeof(message->header), total = header + message->frame.bytes;
        struct iovec parts[2] = {
            {.iov_base = message->header + (sent < header ? sent : header),
             .iov_len = sent < header ? header - sent : 0},
            {.iov_base = message->payload + (sent < header ? 0 : sent - header),
             .iov_len = sent < header ? message->frame.bytes : total - sent},
        };
        struct msghdr what = {.msg_iov = parts, .msg_iovlen = 2};
        ssize_t now = sendmsg(link->socket.fd, &what, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (now < 0 && errno == EINTR)
            continue;
        if (now < 0 && errno == EAGAIN)
            return;
        if (now < 0) {
            link->failed = true;
            return;
        }
        link->first_sent += (size_t)now;
        if (link->first_sent == total)
            epx__connection_pop(link);
    }
}

/* One recv: bytes got, 0 nothing now, -1 the peer has closed or the connection broke. */
static ssize_t receive(epx__connection_t *link, void *to, size_t bytes)
{
    ssize_t got;
    do
        got = recv(link->socket.fd, to, bytes, MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    if (got > 0)
        return got;
    return got < 0 && errno == EAGAIN ? 0 : -1;
}

/* A message for what has been announced. */
static epx__message_t *make_room(epx__connection_t *link, const epx__frame_t *frame)
{
    epx__message_t *room = link->room;
    bool outcome = frame->type == EPX__FRAME_RESULT || frame->type == EPX__FRAME_ABORT;
    if (!room || !outcome || room->frame.sequence != frame->sequence || frame->bytes > link->room_bytes)
        return epx__message_create(frame, NULL);
    link->room = NULL;
    room->frame = *frame;
    epx__frame_encode(frame, room->header);
    return room;
}

int epx__connection_read(epx__connection_t *link, uint32_t ranks, epx__message_t **message, const char **wrong)
{
    *wrong = NULL;
    if (!link->incoming) {
        ssize_t got = receive(link, link->header + link->have, sizeof(link->header) - link->have);
        if (got <= 0)
            return (int)got;
        link->have += (size_t)got;
        if (link->have < sizeof(link->header))
            return 0;
        epx__frame_t frame;
        *wrong = epx__frame_parse(link->header, ranks, &frame);
        if (*wrong)
            return -1;
        link->incoming = make_room(link, &frame);
        if (!link->incoming)
            return -2;
        link->have = 0;
    }
    epx__message_t *incoming = link->incoming;
    while (link->have < incoming->frame.bytes) {
        ssize_t got = receive(link, incoming->payload + link->have, incoming->frame.bytes - link->have);
        if (got <= 0)
            return (int)got;
        link->have += (size_t)got;
    }
    link->have = 0;
    link->incoming = NULL;
    *message = incoming;
    return 1;
}
