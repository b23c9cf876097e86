/*
 * What loop and sim share: endpoints of one process that reach each other by pointer.
 *
 * Every endpoint is in one process-wide list under one lock and counts its references: whoever connects to it, or has
 * a put under way from it, keeps its memory, not its life. Its own lock guards all the rest. Lock order: list, then
 * one endpoint; never two endpoints at once.
 */
#ifndef EPX_NET_LOCAL_H
#define EPX_NET_LOCAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "net/net.h"

#define EPX__LOCAL_REGIONS 64

struct epx__net_memory {
    uint64_t key; /* 0: free */
    char *base;
    size_t bytes;
};

typedef struct epx__local {
    epx__net_t net; /* first: an epx__net_t is one of these */
    pthread_mutex_t lock;
    atomic_uint refs;
    uint64_t id; /* never used again in this process */
    bool closed;
    bool armed; /* the owner is about to sleep on fd */
    int fd;
    uint64_t next_key;
    struct epx__net_memory regions[EPX__LOCAL_REGIONS];
    struct epx__local **peers; /* owner only */
    uint32_t peer_count, peers_max;
    uint32_t puts, puts_max;       /* accepted and not yet handed out as SENT or LOST */
    uint32_t notices, notices_max; /* on their way here, or in `events` */
    epx__net_event_t *events;      /* ring, [events_max] */
    uint32_t event_head, event_count, events_max;
    struct epx__local *next;    /* in the list */
    struct epx__net_memory any; /* net.any */
    char why_text[160];
} epx__local_t;

/* Fill the base of an endpoint whose memory is zeroed (`self`); adds it to the list. */
epx_status_t epx__local_init(epx__local_t *self, const epx__net_ops_t *ops, const epx__net_config_t *config);
/* Mark closed, leave the list, let go of the peers. The memory goes with the last reference. */
void epx__local_close(epx__local_t *self);
void epx__local_keep(epx__local_t *self);
void epx__local_drop(epx__local_t *self);

/* Under self->lock: append (there is room by the counts above) and wake a sleeping owner. */
void epx__local_push(epx__local_t *self, const epx__net_event_t *event);
void epx__local_wake(epx__local_t *self);
/* Under self->lock: the memory that the key names, NULL in words. */
char *epx__local_find(epx__local_t *self, const epx__net_key_t *key, size_t offset, size_t bytes);
/* Under self->lock: hand out events. */
uint32_t epx__local_take(epx__local_t *self, epx__net_event_t *events, uint32_t max);

/* The operations that need nothing else. */
epx_status_t epx__local_address(epx__net_t *net, epx__net_address_t *address);
epx_status_t epx__local_connect(epx__net_t *net, const epx__net_address_t *address, uint32_t *peer);
epx_status_t epx__local_enroll(epx__net_t *net, void *base, size_t bytes, bool device, epx__net_memory_t **memory,
                               epx__net_key_t *key);
void epx__local_withdraw(epx__net_t *net, epx__net_memory_t *memory);
epx_status_t epx__local_flush(epx__net_t *net);
int epx__local_wait_fd(epx__net_t *net);

#endif
