/*
 * Memory channels: the peer's memory is mapped here, so a put is stores and a signal is one more store. For C and for
 * kernels (there every function is called by one thread, except put, which any group of threads may share).
 *
 *   *remote_signals  written by this rank (one thread at a time) in the peer's memory: signals given, ever
 *   *local_signals   written by the peer in this rank's memory. Waits compare with >=
 */
#ifndef EPX_DEVICE_MEMORY_H
#define EPX_DEVICE_MEMORY_H

#include <string.h>

#include <epx/device/order.h>
#include <epx/status.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct epx_memory_channel {
    void *remote; /* the peer's memory as mapped here; NULL: the peer is in another domain */
    uint64_t remote_bytes;
    uint64_t *remote_signals;
    const uint64_t *local_signals;
    uint64_t *given; /* signals given so far; this rank's own word */
    const uint64_t *fault;
    uint64_t timeout_ns;
    int32_t peer;
    uint32_t channel;
} epx_memory_channel_t;

/* Copy to the peer's memory. `lane` of `lanes` threads take every lanes-th 16 bytes (0 of 1: all). EPX_E_INVALID
 * outside of the peer's memory, with nothing written. */
EPX_DEVICE_FN epx_status_t epx_memory_put(const epx_memory_channel_t *channel, uint64_t offset, const void *source,
                                          uint64_t bytes, uint32_t lane, uint32_t lanes)
{
    char *to = (char *)channel->remote + offset;
    const char *from = (const char *)source;
    if (!channel->remote || offset > channel->remote_bytes || bytes > channel->remote_bytes - offset)
        return EPX_E_INVALID;
    if (lanes == 1) {
        memcpy(to, from, bytes);
        return EPX_OK;
    }
    for (uint64_t at = (uint64_t)lane * 16; at < bytes; at += (uint64_t)lanes * 16)
        memcpy(to + at, from + at, bytes - at < 16 ? bytes - at : 16);
    return EPX_OK;
}

/* One more signal, after this thread's earlier puts (in a kernel: after those of threads that it has synchronised
 * with). */
EPX_DEVICE_FN epx_status_t epx_memory_signal(const epx_memory_channel_t *channel)
{
    if (!channel->remote)
        return EPX_E_INVALID;
    uint64_t next = epx_ld_relaxed_sys_u64(channel->given) + 1;
    epx_st_relaxed_sys_u64(channel->given, next);
    epx_st_release_sys_u64(channel->remote_signals, next);
    return EPX_OK;
}

/* The peer has signalled at least `count` times, ever. EPX_E_TIMEOUT, or the channels' fault. */
EPX_DEVICE_FN epx_status_t epx_memory_wait(const epx_memory_channel_t *channel, uint64_t count)
{
    uint64_t start = 0;
    uint32_t turn = 0;
    if (!channel->remote)
        return EPX_E_INVALID;
    while (epx_ld_acquire_sys_u64(channel->local_signals) < count) {
        uint64_t fault = epx_ld_acquire_sys_u64(channel->fault);
        if (fault)
            return (epx_status_t)fault;
        if (turn % 64 == 0) {
            uint64_t now = epx_clock_ns();
            if (start == 0)
                start = now;
            else if (now - start > channel->timeout_ns)
                return EPX_E_TIMEOUT;
        }
        epx_wait_turn(turn++);
    }
    return EPX_OK;
}

#ifdef __cplusplus
}
#endif

#endif
