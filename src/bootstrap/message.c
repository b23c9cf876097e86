/* Tagged messages between two ranks, in pieces of at most EPX__PAYLOAD_MAX bytes. */
#include <string.h>
#include <unistd.h>

#include "base/fail.h"
#include "bootstrap/state.h"

static epx_status_t usable(const epx__bootstrap_t *b, int peer, const char *what)
{
    if (peer < 0 || peer >= b->ranks)
        return epx__fail(EPX_E_INVALID, "%s: rank %d does not exist; the group has ranks 0 to %d", what, peer,
                         b->ranks - 1);
    if (b->pid != getpid())
        return epx__fail(EPX_E_INVALID, "%s: a forked child cannot use its parent's group", what);
    return EPX_OK;
}

static size_t queued_bytes(const epx__bootstrap_t *b, int to)
{
    if (to == b->rank)
        return 0;
    const epx__connection_t *link = epx__relay_way(b, (uint32_t)to);
    return link->first ? link->queued_bytes : 0;
}

static epx_status_t send_piece(epx__bootstrap_t *b, const epx__frame_t *frame, const void *payload,
                               uint64_t deadline_ns)
{
    int to = (int)frame->to;
    EPX__TRY(epx__bootstrap_reachable(b, to, "send"));
    while (queued_bytes(b, to) > EPX__QUEUE_BYTES_MAX) {
        if (!epx__bootstrap_wait(b, deadline_ns))
            return epx__fail(EPX_E_TIMEOUT, "send: %zu bytes to rank %d wait to be taken", queued_bytes(b, to), to);
        EPX__TRY(epx__bootstrap_reachable(b, to, "send"));
    }
    epx__message_t *message = epx__message_create(frame, payload);
    bool queued = message && epx__relay_to(b, frame->to, message);
    epx__message_release(message);
    if (!queued)
        return epx__fail(EPX_E_NOMEM, "send: no memory for %u bytes to rank %d", frame->bytes, to);
    return EPX_OK;
}

epx_status_t epx__bootstrap_send(epx__bootstrap_t *b, int to, uint32_t tag, const void *data, size_t bytes)
{
    EPX__TRY(usable(b, to, "send"));
    if (bytes && !data)
        return epx__fail(EPX_E_INVALID, "send: data is NULL");
    uint64_t deadline_ns = epx__now_ns() + b->timeout_ms * 1000000u;
    size_t done = 0;
    epx_status_t status;
    pthread_mutex_lock(&b->lock);
    do {
        size_t count = bytes - done < EPX__PAYLOAD_MAX ? bytes - done : EPX__PAYLOAD_MAX;
        epx__frame_t frame = {.type = EPX__FRAME_DATA,
                              .flags = done + count < bytes ? EPX__FRAME_MORE : 0,
                              .from = (uint32_t)b->rank,
                              .to = (uint32_t)to,
                              .tag = tag,
                              .bytes = (uint32_t)count,
                              .sequence = done,
                              .total = bytes};
        status = send_piece(b, &frame, data ? (const char *)data + done : NULL, deadline_ns);
        done += count;
    } while (status == EPX_OK && done < bytes);
    pthread_mutex_unlock(&b->lock);
    return status;
}

static bool wanted(const epx__message_t *message, int from, uint32_t tag)
{
    return (int)message->frame.from == from && message->frame.tag == tag;
}

/* The pieces of one message follow each other, except where its sender failed half way: a piece that starts anew
 * shows it, and the remains are dropped. True: a whole message is first in line. */
static bool whole(epx__bootstrap_t *b, int from, uint32_t tag)
{
    for (epx__message_t *m = b->inbox_first; m; m = m->next)
        if (wanted(m, from, tag) && !(m->frame.flags & EPX__FRAME_MORE))
            return true;
    return false;
}

/* Take the pieces up to the last one out of the inbox, and copy them if they fit together to `bytes`. */
static epx_status_t take(epx__bootstrap_t *b, int from, uint32_t tag, uint8_t *data, size_t bytes)
{
    epx__message_t *first = NULL, *last = NULL, *m = b->inbox_first;
    uint64_t total = 0, done = 0;
    bool fits = true, ended = false;
    while (m) { /* rebuild the inbox without them */
        epx__message_t *next = m->next;
        if (ended || !wanted(m, from, tag)) {
            epx__message_append(&first, &last, m);
            m = next;
            continue;
        }
        if (m->frame.sequence == 0) {
            done = 0;
            total = m->frame.total;
            fits = total == bytes;
        }
        fits = fits && m->frame.sequence == done && m->frame.total == total && m->frame.bytes <= bytes - done;
        if (fits && m->frame.bytes)
            memcpy(data + done, m->payload, m->frame.bytes);
        done += m->frame.bytes;
        ended = !(m->frame.flags & EPX__FRAME_MORE);
        epx__message_release(m);
        m = next;
    }
    b->inbox_first = first;
    b->inbox_last = last;
    if (fits && done == bytes)
        return EPX_OK;
    return epx__fail(EPX_E_MISMATCH, "receive: the message with tag %u from rank %d has %llu bytes, not %zu", tag, from,
                     (unsigned long long)total, bytes);
}

epx_status_t epx__bootstrap_recv(epx__bootstrap_t *b, int from, uint32_t tag, void *data, size_t bytes,
                                 uint64_t timeout_ms)
{
    EPX__TRY(usable(b, from, "receive"));
    if (bytes && !data)
        return epx__fail(EPX_E_INVALID, "receive: data is NULL");
    timeout_ms = timeout_ms ? timeout_ms : b->timeout_ms;
    uint64_t deadline_ns = epx__now_ns() + timeout_ms * 1000000u;
    epx_status_t status = EPX_OK;
    pthread_mutex_lock(&b->lock);
    while (status == EPX_OK && !whole(b, from, tag)) {
        status = epx__bootstrap_reachable(b, from, "receive");
        if (status == EPX_OK && !epx__bootstrap_wait(b, deadline_ns))
            status = epx__fail(EPX_E_TIMEOUT, "receive: rank %d has sent no message with tag %u within %llu ms", from,
                               tag, (unsigned long long)timeout_ms);
    }
    if (status == EPX_OK)
        status = take(b, from, tag, data, bytes);
    pthread_mutex_unlock(&b->lock);
    return status;
}
