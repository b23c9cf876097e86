/*
 * Port channels, the producer's and the waiter's side, for C and for kernels.
 *
 * A port channel is a one-way path to one peer. Its requests go through a FIFO in host memory to a proxy thread, which
 * carries them out on the network in the order of the FIFO. At the peer they take effect in that order:
 *
 *     put(a); put(b); signal()      the peer that has seen the signal sees a and b
 *
 * Who writes what:
 *   *issued          producers, one more per request, before it is pushed; waits while issued - *acked == window
 *   *acked           this rank's proxy: requests applied at the peer, ever
 *   *fifo_head       producers: slots taken, ever; waits while head - *fifo_tail == slots
 *   slot             the producer that took it; the commit word last (release). Its bit 0 is the lap's parity, so a
 *                    slot of the lap before reads as empty whatever it holds
 *   *fifo_tail       proxy: slots that are free again
 *   *signals         this rank's proxy: signals of the peer applied here, ever. Waits compare with >=
 *   *fault           this rank's proxy: 0, or why this channel can do no more (epx_status_t)
 *
 * With GPU producers `issued` and `fifo_head` are in GPU memory, all else in pinned host memory. A proxy takes requests
 * of one processor: either the CPU's threads or one GPU's.
 *
 * These functions return a status and leave no words in epx_error_detail(): epx_channels_status tells of a fault.
 */
#ifndef EPX_DEVICE_PORT_H
#define EPX_DEVICE_PORT_H

#include <stddef.h>

#include <epx/device/order.h>
#include <epx/status.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { EPX_PORT_PUT = 1, EPX_PORT_PUT_SIGNAL = 2, EPX_PORT_SIGNAL = 3, EPX_PORT_ADD = 4 };

/* One slot of the FIFO: a cache line. */
typedef struct epx_port_request {
    uint64_t commit; /* parity | kind << 8 | channel number << 32 */
    uint64_t source_offset;
    uint64_t destination_offset;
    uint64_t bytes;    /* ADD: the value */
    uint64_t memories; /* source | destination << 32 */
    uint64_t spare[3];
} epx_port_request_t;

typedef struct epx_port_channel {
    epx_port_request_t *slots;
    uint64_t slot_count; /* a power of two */
    uint64_t *fifo_head;
    const uint64_t *fifo_tail;
    uint64_t
        *asleep; /* not 0: the proxy must be woken after a push (never with GPU producers: it does not sleep then) */
    uint64_t *issued;
    const uint64_t *acked;
    const uint64_t *signals;
    const uint64_t *fault;
    uint64_t window;        /* requests under way at most; 0: no such channel (this rank itself, or not asked for) */
    uint64_t put_bytes_max; /* of one request: puts are split */
    uint64_t timeout_ns;    /* of every wait, from its first look */
    void *owner;            /* epx_channels_t, host only */
    uint32_t number;        /* rank * channels + channel */
    int32_t peer;
} epx_port_channel_t;

#if !defined(__CUDA_ARCH__)
/* In libepx.so: wake the proxy of this channel. */
EPX_API void epx_port_wake(const epx_port_channel_t *channel);
#endif

/* One look at *word: 1 when it has come to `value`. */
EPX_DEVICE_FN int epx_port_reached(const uint64_t *word, uint64_t value)
{
    return epx_ld_acquire_sys_u64(word) >= value;
}

/* Give up? EPX_OK: one turn waited; else the fault, or EPX_E_TIMEOUT. */
EPX_DEVICE_FN epx_status_t epx_port_turn(const epx_port_channel_t *channel, uint64_t *start_ns, uint32_t *turn)
{
    uint64_t fault = epx_ld_acquire_sys_u64(channel->fault);
    if (fault)
        return (epx_status_t)fault;
    if (*turn % 64 == 0) {
        uint64_t now = epx_clock_ns();
        if (*start_ns == 0)
            *start_ns = now;
        else if (now - *start_ns > channel->timeout_ns)
            return EPX_E_TIMEOUT;
    }
    epx_wait_turn((*turn)++);
    return EPX_OK;
}

EPX_DEVICE_FN epx_status_t epx_port_wait_word(const epx_port_channel_t *channel, const uint64_t *word, uint64_t value)
{
    uint64_t start = 0;
    uint32_t turn = 0;
    while (!epx_port_reached(word, value)) {
        epx_status_t status = epx_port_turn(channel, &start, &turn);
        if (status != EPX_OK) /* what a peer that leaves has done is told before the fault that says so */
            return epx_port_reached(word, value) ? EPX_OK : status;
    }
    return EPX_OK;
}

/* Take one of a bounded number: *taken grows by one once *taken - *freed < bound. */
EPX_DEVICE_FN epx_status_t epx_port_take(const epx_port_channel_t *channel, uint64_t *taken, const uint64_t *freed,
                                         uint64_t bound, uint64_t *number)
{
    uint64_t start = 0;
    uint32_t turn = 0;
    for (;;) {
        uint64_t low = epx_ld_acquire_sys_u64(freed); /* before `taken`, so that the difference is never negative */
        uint64_t high = epx_ld_relaxed_sys_u64(taken);
        if (high - low < bound) {
            if (epx_cas_u64(taken, high, high + 1)) {
                *number = high;
                return EPX_OK;
            }
            continue;
        }
        epx_status_t status = epx_port_turn(channel, &start, &turn);
        if (status != EPX_OK)
            return status;
    }
}

/* One request: credit first, then a slot, then its words, the commit word last. */
EPX_DEVICE_FN epx_status_t epx_port_push(const epx_port_channel_t *channel, uint32_t kind, uint64_t memories,
                                         uint64_t destination_offset, uint64_t source_offset, uint64_t bytes)
{
    uint64_t credit, ticket;
    if (channel->window == 0)
        return EPX_E_INVALID;
    epx_status_t status = epx_port_take(channel, channel->issued, channel->acked, channel->window, &credit);
    if (status != EPX_OK)
        return status;
    status = epx_port_take(channel, channel->fifo_head, channel->fifo_tail, channel->slot_count, &ticket);
    if (status != EPX_OK) {
        epx_sub_u64(channel->issued, 1);
        return status;
    }
    epx_port_request_t *slot = &channel->slots[ticket & (channel->slot_count - 1)];
    uint64_t parity = (ticket / channel->slot_count + 1) & 1;
    epx_st_relaxed_sys_u64(&slot->source_offset, source_offset);
    epx_st_relaxed_sys_u64(&slot->destination_offset, destination_offset);
    epx_st_relaxed_sys_u64(&slot->bytes, bytes);
    epx_st_relaxed_sys_u64(&slot->memories, memories);
    epx_st_release_sys_u64(&slot->commit, parity | (uint64_t)kind << 8 | (uint64_t)channel->number << 32);
#if !defined(__CUDA_ARCH__)
    epx_fence_sc_sys();
    if (epx_ld_relaxed_sys_u64(channel->asleep))
        epx_port_wake(channel);
#endif
    return EPX_OK;
}

/* Memories: source of this rank | destination of the peer, by their numbers in epx_channels_config_t. */
EPX_DEVICE_FN uint64_t epx_port_memories(uint32_t destination, uint32_t source)
{
    return (uint64_t)destination << 32 | source;
}

/*
 * Copy `bytes` from this rank's memory to the peer's. The source may be used again after a flush (or any answer of the
 * peer's to a later signal).
 * Returns  EPX_OK: pushed. EPX_E_TIMEOUT: no window or no room in the FIFO. The channel's fault, if it has one. Ranges
 *          that leave the memory are the fault of the channel: epx_channels_status says which.
 */
EPX_DEVICE_FN epx_status_t epx_port_put(const epx_port_channel_t *channel, uint64_t memories,
                                        uint64_t destination_offset, uint64_t source_offset, uint64_t bytes)
{
    while (bytes > channel->put_bytes_max) {
        epx_status_t status =
            epx_port_push(channel, EPX_PORT_PUT, memories, destination_offset, source_offset, channel->put_bytes_max);
        if (status != EPX_OK)
            return status;
        destination_offset += channel->put_bytes_max;
        source_offset += channel->put_bytes_max;
        bytes -= channel->put_bytes_max;
    }
    return epx_port_push(channel, EPX_PORT_PUT, memories, destination_offset, source_offset, bytes);
}

/* The same, and one signal after it: cheaper than the two calls. */
EPX_DEVICE_FN epx_status_t epx_port_put_signal(const epx_port_channel_t *channel, uint64_t memories,
                                               uint64_t destination_offset, uint64_t source_offset, uint64_t bytes)
{
    if (bytes > channel->put_bytes_max) {
        uint64_t first = bytes - channel->put_bytes_max;
        epx_status_t status = epx_port_put(channel, memories, destination_offset, source_offset, first);
        if (status != EPX_OK)
            return status;
        destination_offset += first;
        source_offset += first;
        bytes -= first;
    }
    return epx_port_push(channel, EPX_PORT_PUT_SIGNAL, memories, destination_offset, source_offset, bytes);
}

/* One more signal at the peer, after all earlier requests of this channel. */
EPX_DEVICE_FN epx_status_t epx_port_signal(const epx_port_channel_t *channel)
{
    return epx_port_push(channel, EPX_PORT_SIGNAL, 0, 0, 0, 0);
}

/* Add `value` (any, 0 and negative too) to the 64-bit word at that offset of the peer's (host) memory. The peer's proxy
 * adds, with release order, after all earlier requests of this channel. */
EPX_DEVICE_FN epx_status_t epx_port_atomic_add(const epx_port_channel_t *channel, uint32_t destination_memory,
                                               uint64_t destination_offset, int64_t value)
{
    return epx_port_push(channel, EPX_PORT_ADD, epx_port_memories(destination_memory, 0), destination_offset, 0,
                         (uint64_t)value);
}

/* The peer has signalled this rank on the same channel number at least `count` times, ever. */
EPX_DEVICE_FN epx_status_t epx_port_wait(const epx_port_channel_t *channel, uint64_t count)
{
    if (channel->window == 0)
        return EPX_E_INVALID;
    return epx_port_wait_word(channel, channel->signals, count);
}

/* All requests pushed so far, by this thread and by any that has told it so, have taken effect at the peer. */
EPX_DEVICE_FN epx_status_t epx_port_flush(const epx_port_channel_t *channel)
{
    if (channel->window == 0)
        return EPX_E_INVALID;
    return epx_port_wait_word(channel, channel->acked, epx_ld_relaxed_sys_u64(channel->issued));
}

#ifdef __cplusplus
}
#endif

#endif
