/*
 * Channels: one-way paths between ranks, for programs (and kernels) that move their own bytes.
 *
 *   memory channel   inside a domain: put is stores, signal is one more store           epx/device/memory.h
 *   port channel     to any rank: requests that a proxy thread carries out on the network   epx/device/port.h
 *
 * Tables are dense: entry [rank * channels + channel] is the channel of that number to that rank; the entries of this
 * rank itself, and of ranks that cannot be reached in that way, are there and refuse (EPX_E_INVALID).
 *
 * Life: epx_channels_create (collective) with the memory that peers may write; put, signal, wait ... through the
 * inline functions; epx_channels_destroy (local). docs/channels.md compares the verbs with those of other libraries.
 */
#ifndef EPX_CHANNEL_H
#define EPX_CHANNEL_H

#include <epx/device/memory.h>
#include <epx/device/port.h>
#include <epx/epx.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct epx_channels epx_channels_t;

/* Memory that peers may write. Its number is its place in the config, the same on every rank; sizes may differ. */
typedef struct epx_channel_memory {
    void *base; /* NULL: the library makes it (zeroed, page-aligned, mapped by the domain); at most one such */
    size_t bytes;
    int device; /* 1: GPU memory. Refused in words where the network cannot reach it: then stage it */
} epx_channel_memory_t;

typedef struct epx_channels_config {
    size_t size;
    const epx_channel_memory_t *memories; /* copied; the memory itself is borrowed until destroy */
    uint32_t memory_count;                /* 1 to 16, equal on all ranks */
    uint32_t channels;                    /* to each peer; default EPX_CHANNELS, or 4 */
    uint32_t proxies;                     /* threads; default EPX_PROXIES, or 1 for every 16 ranks, at most 8 */
    uint32_t window;                      /* requests under way on one channel, a power of two; default 128 */
    uint32_t fifo_slots;                  /* of one proxy, a power of two; default 1024 */
    /* GPU producers: epx_channels_tickets() zeroed words of GPU memory. NULL: CPU threads push. */
    uint64_t *device_tickets;
    uint64_t timeout_ms; /* of every wait; default the group's */
} epx_channels_config_t;

/*
 * Make all channels to all ranks. Collective.
 *
 * Returns   EPX_OK; EPX_E_INVALID (sizes that do not fit, in words); EPX_E_MISMATCH (the ranks disagree);
 *           EPX_E_UNSUPPORTED (no such network here); EPX_E_NOMEM, EPX_E_SYSTEM, EPX_E_NET.
 */
EPX_API epx_status_t epx_channels_create(epx_group_t *group, const epx_channels_config_t *config,
                                         epx_channels_t **channels);

/* Waits (within the timeout, at most 2 s) until the requests already pushed are applied at the living peers, then lets
 * go. Not collective; NULL is fine. Nobody may use the channels any more. */
EPX_API void epx_channels_destroy(epx_channels_t *channels);

/* What follows takes NULL for `channels` too: then NULL, 0 or EPX_E_INVALID. Results that are not wanted may be NULL.
 *
 * [ranks * channels] entries each; valid while the channels live. */
EPX_API const epx_port_channel_t *epx_channels_port_table(const epx_channels_t *channels);
EPX_API const epx_memory_channel_t *epx_channels_memory_table(const epx_channels_t *channels);
EPX_API uint32_t epx_channels_per_peer(const epx_channels_t *channels);
EPX_API void *epx_channels_memory(const epx_channels_t *channels, uint32_t memory);

/* The host memory that a GPU must be able to reach before kernels use the port table (cudaHostRegister, mapped), and
 * how many words of GPU memory device_tickets is for a configuration. */
EPX_API void *epx_channels_host_block(const epx_channels_t *channels, size_t *bytes);
EPX_API size_t epx_channels_tickets(int ranks, const epx_channels_config_t *config);

/* All ranks have come here, and everything pushed before on any channel has taken effect. Collective; one thread. */
EPX_API epx_status_t epx_channels_barrier(epx_channels_t *channels);

/* EPX_OK, or the first fault, its words in epx_error_detail(). Does not wait. */
EPX_API epx_status_t epx_channels_status(epx_channels_t *channels);

/* The network, proxies and channels chosen and why, one line. */
EPX_API const char *epx_channels_why(const epx_channels_t *channels);

/* Payload bytes and puts given to the network so far, credit notices aside. */
EPX_API void epx_channels_traffic(const epx_channels_t *channels, uint64_t *bytes, uint64_t *puts);

#ifdef __cplusplus
}
#endif

#endif
