/*
 * Channels of one rank to all others: what src/channel's files share, and what algo and api see.
 *
 * The protocol, once (docs/PROTOCOL-NET.md has it at length):
 *   producer   takes window of its channel (issued - acked < window), then a FIFO slot, fills it, commits it (port.h)
 *   proxy      takes slots in order. Each request gets its channel's next sequence number and becomes one put with one
 *              notice (kind, lane, sequence modulo the space); the space is twice the window, so a number names one
 *              request. An add's words travel in a slot of their own, by sequence modulo the window
 *   target     the proxy marks what has arrived and carries out each lane in sequence order: signals counted, adds
 * done, nothing for a plain put (its bytes are there). Each counts one that is owed to the sender credit     a notice
 * of its own kind, "n more applied", outside of sequence and window; sums, so order does not matter. Told when a
 * quarter of the window is owed, and always before the proxy goes idle. n = 0 is "I leave": with it come the numbers of
 * requests applied on each channel, ever, since credit told before may arrive later; what is not among them never will
 * be. It is answered by the same, once nothing of the answering peer's is on its way; then the leaver goes
 *
 * A lane is one channel of one peer at the receiving proxy. Its number is the same for what the peer sends and for the
 * credit it gives: (peer / proxies) * channels + channel, at proxy (peer mod proxies). Both ends compute it.
 *
 * Notice: kind in bits 31..30, lane in the middle, sequence (or n) in the low log2(2 * window) bits. What does not fit
 * is refused at creation.
 */
#ifndef EPX_CHANNEL_CHANNELS_H
#define EPX_CHANNEL_CHANNELS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

#include <epx/channel.h>

#include "base/clock.h"
#include "net/net.h"

#define EPX__CHANNELS_MEMORIES 16
#define EPX__CHANNELS_PROXIES 32
#define EPX__CHANNELS_WORDS 514
#define EPX__CHANNELS_CREDITS 4    /* puts to a peer that credit may have under way beside its requests' share */
#define EPX__MEMORY_ANY UINT32_MAX /* as a source: all memory of this process; its offsets are addresses */

enum { EPX__NOTICE_PUT = 0, EPX__NOTICE_SIGNAL = 1, EPX__NOTICE_ADD = 2, EPX__NOTICE_CREDIT = 3 };

typedef struct epx__channels_config {
    int rank, ranks;
    const uint8_t *wanted; /* [ranks] 1: port channels to it; NULL: to all but this rank. Mutual */
    const char *net;       /* spec */
    const char *address, *nic;
    uint32_t channels;   /* to each peer; 0: default */
    uint32_t proxies;    /* 0: default */
    uint32_t window;     /* power of two; 0: default */
    uint32_t fifo_slots; /* of each proxy, power of two; 0: default */
    const epx_channel_memory_t *memories;
    uint32_t memory_count; /* equal on all ranks */
    bool no_threads;       /* the caller steps the proxies itself (tests; algorithms that wait anyway) */
    bool device_producers; /* GPU threads push: `tickets` is GPU memory, proxies do not sleep */
    bool any_sources;      /* requests may name EPX__MEMORY_ANY, where the network can: see epx__channels_any */
    uint64_t *tickets;     /* [epx_channels_tickets()] zeroed words, or NULL: in the host block */
    uint64_t timeout_ms;
    /* Every rank's `bytes` into all, in rank order. Collective, in create only. 0 is success. */
    epx_status_t (*allgather)(void *context, const void *mine, size_t bytes, void *all);
    void *allgather_context;
    /* Counters or credit have moved: called by a proxy, must not block. May be NULL. */
    void (*changed)(void *context);
    void *changed_context;
} epx__channels_config_t;

/* Where things lie in the host block: one piece of memory, 4096-aligned, that a GPU may map and peers may write. */
typedef struct epx__block_layout {
    size_t fault;   /* [ranks] lines: epx_status_t */
    size_t issued;  /* [ranks * channels] lines, producers */
    size_t acked;   /* [ranks * channels] lines, own proxy */
    size_t signals; /* [ranks * channels] lines, own proxy */
    size_t barrier; /* [ranks * channels] lines, own proxy: the peers' barrier adds */
    size_t head;    /* [proxies] lines, producers */
    size_t tail;    /* [proxies] lines, proxy */
    size_t asleep;  /* [proxies] lines, proxy */
    size_t bye_in;  /* [ranks * channels] words, the network: what a peer that leaves has applied */
    size_t bye_out; /* [ranks * channels] words, own proxy */
    size_t add_in;  /* [ranks * channels][window] add slots, the network */
    size_t add_out; /* [ranks * channels][window] add slots, own proxy */
    size_t slots;   /* [proxies][fifo_slots] requests */
    size_t total;
} epx__block_layout_t;

/* What an add carries. */
typedef struct epx__add_slot {
    uint64_t memory, offset;
    int64_t value;
    uint64_t spare;
} epx__add_slot_t;

/* One lane, proxy's own: both directions of (peer, channel). */
typedef struct epx__lane {
    uint32_t number; /* rank * channels + channel: place in all tables */
    uint32_t lane;   /* of notices, here */
    uint32_t lane_there;
    uint32_t rank, net_peer;
    uint64_t sent;    /* out: next sequence number */
    uint64_t next;    /* in: next to apply */
    uint32_t owed;    /* in: applied and not yet told */
    bool listed;      /* in the proxy's list of lanes that owe */
    bool dead;        /* peer lost, or has left, or told that we leave; or a request was refused: they are dropped */
    uint8_t *arrived; /* in: [2 * window] kind + 1, 0 nothing */
    /* Out: ring of requests that have left the FIFO and that the network had no room for. */
    epx_port_request_t *waiting; /* [window] */
    uint32_t waiting_head, waiting_count;
    /* Of the first lane of its peer, for all: */
    bool said, heard;   /* our bye; the peer's */
    bool lost;          /* without both byes: nothing is put to it, nothing waited for */
    uint32_t under_way; /* puts to it that the network has not let go of */
} epx__lane_t;

typedef struct epx__proxy {
    struct epx_channels *owner;
    uint32_t index;
    pthread_mutex_t lock; /* of all below: who steps holds it */
    epx__net_t *net;
    epx__net_memory_t **memory; /* [memories + 1], the block last */
    epx__net_key_t *keys;       /* [ranks][memories + 1] of the peers, for this proxy */
    epx__lane_t *lanes;         /* [lane_count] */
    uint32_t lane_count;
    uint32_t share;              /* of the network's puts, each peer's */
    epx_port_request_t *waiting; /* the lanes', one after the other */
    uint32_t waiting_count;      /* of all lanes */
    uint32_t answers;            /* byes heard and not yet answered */
    uint32_t *owing;             /* ring of lanes that owe, [lane_count] */
    uint32_t owing_head, owing_count;
    uint64_t tail; /* FIFO */
    bool working;  /* thread: false ends it */
    pthread_t thread;
    bool started;
    int wake_fd;
    atomic_uint helpers; /* threads that step this proxy while they wait: its own thread keeps out */
    atomic_bool stop;
    bool halted; /* under `lock`: never step again; `net` is closed */
} epx__proxy_t;

struct epx_channels {
    epx__channels_config_t config; /* defaults filled in */
    uint32_t rank, ranks, channels, proxies, window, fifo_slots;
    uint32_t sequence_bits, lane_bits;
    uint32_t memory_count;
    epx_channel_memory_t memory[EPX__CHANNELS_MEMORIES + 1]; /* the block last */
    uint64_t *peer_bytes;                                    /* [ranks][memories + 1] */
    char *block_memory, *block;
    epx__block_layout_t layout;
    epx__proxy_t *proxy;      /* [proxies] */
    epx_port_channel_t *port; /* [ranks * channels] */
    uint64_t barrier_epoch;
    pthread_mutex_t words_lock;
    int fault_status; /* first fault; this and its words under words_lock */
    char words[EPX__CHANNELS_WORDS - 2];
    atomic_ullong net_bytes, net_puts, credits;
    size_t put_bytes_max;
    bool any_sources; /* asked for, and the network can */
    bool left;
    char why[320];
    /* src/api's: the memory channels' table, and what it must undo. */
    epx_memory_channel_t *mapped; /* [ranks * channels] or NULL */
    void *api;
};
typedef struct epx_channels epx__channels_t;

static inline uint64_t *epx__block_word(const epx__channels_t *self, size_t part, uint32_t line)
{
    return (uint64_t *)(void *)(self->block + part + (size_t)line * 64);
}

/* channels.c: collective. */
epx_status_t epx__channels_create(const epx__channels_config_t *config, epx__channels_t **channels);
/* Local, bounded by the timeout; NULL is fine. Leaving is the part of destroy that waits: for those that may yet be
 * lost (epx__channels_lost) meanwhile. Nothing is pushed after it. */
void epx__channels_leave(epx__channels_t *channels);
void epx__channels_destroy(epx__channels_t *channels);

/* block.c: sizes and their limits, in words. */
epx_status_t epx__channels_sizes(epx__channels_t *self);
void epx__block_layout_make(epx__channels_t *self);
uint32_t epx__channels_lane(const epx__channels_t *self, uint32_t rank, uint32_t channel);

/* lane.c */
epx_status_t epx__lane_notice(epx__proxy_t *proxy, uint32_t notice);
bool epx__lane_tell(epx__proxy_t *proxy, bool idle); /* credit; true when something was told */
/* We leave: tell every living peer with whom all is done. False: call again. Then: has everybody been told, and have
 * all answered that they put nothing more? */
bool epx__lane_bye(epx__proxy_t *proxy);
bool epx__lane_parted(const epx__proxy_t *proxy);
void epx__lane_answer(epx__proxy_t *proxy); /* byes that were heard, with our own */
static inline uint32_t epx__notice(const epx__channels_t *self, uint32_t kind, uint32_t lane, uint32_t low)
{
    return kind << 30 | lane << self->sequence_bits | (low & ((1u << self->sequence_bits) - 1));
}

/* proxy.c */
/* To the lane's peer, which may have `most` puts under way. */
epx_status_t epx__proxy_put(epx__proxy_t *proxy, const epx__lane_t *lane, const epx__net_put_t *put, uint32_t most);
epx__lane_t *epx__proxy_first(epx__proxy_t *proxy, uint32_t rank); /* lane of that peer */
bool epx__proxy_taken(epx__proxy_t *proxy);                        /* nothing is left in its FIFO */
bool epx__proxy_step(epx__proxy_t *proxy);                         /* under its lock; true when anything moved */
bool epx__proxy_idle(epx__proxy_t *proxy); /* under its lock: nothing to carry out, nothing owed */
epx_status_t epx__proxy_start(epx__proxy_t *proxy);
void epx__proxy_end(epx__proxy_t *proxy);
void epx__proxy_wake(epx__proxy_t *proxy);
/* The channel to `rank` can do no more; all channels with rank -1. First words win. */
void epx__channels_fault(epx__channels_t *self, int rank, epx_status_t status, const char *words);

/* Under the proxy's lock: `rank` has said that it leaves. Its channels refuse from now on; that is no fault. */
void epx__channels_left(epx__proxy_t *proxy, uint32_t rank);

/* Step all proxies once from a thread that waits; their own threads keep out between help_begin and help_end. */
void epx__channels_help_begin(epx__channels_t *self);
bool epx__channels_help(epx__channels_t *self);
void epx__channels_help_end(epx__channels_t *self);
/* May requests name EPX__MEMORY_ANY as their source? */
bool epx__channels_any(const epx__channels_t *self);
/* For good: closes the endpoints, so that nothing that was pushed is read any more. Channels refuse what comes. */
void epx__channels_halt(epx__channels_t *self);
/* Under the proxy's lock, or when nobody else has it: withdraw its memory, close its endpoint. */
void epx__proxy_close_net(epx__proxy_t *proxy);
/* Room for n more requests on this channel, whose only producer asks: pushing them will not wait. */
bool epx__channels_room(const epx_port_channel_t *channel, uint64_t n);
/* Everything pushed on this channel, whose only producer asks, has taken effect at the peer. */
bool epx__channels_applied(const epx_port_channel_t *channel);
/* ": " and the words of the first fault, or "". Any thread; here, since plug-ins ask too. */
static inline void epx__channels_words(epx__channels_t *self, char words[EPX__CHANNELS_WORDS])
{
    pthread_mutex_lock(&self->words_lock);
    snprintf(words, EPX__CHANNELS_WORDS, "%s%s", self->fault_status ? ": " : "", self->fault_status ? self->words : "");
    pthread_mutex_unlock(&self->words_lock);
}
/* Somebody else knows that `rank` is gone (the bootstrap). Any thread. */
void epx__channels_lost(epx__channels_t *self, int rank);

#endif
