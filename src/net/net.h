/*
 * What a network must do for port channels: a small table of operations. loop/ and sim/ (ranks of one process) are in
 * libepx.so, ofi/ (libfabric) in the plug-in libepx_ofi.so, which plugin.c opens when it is there.
 *
 * The promise, and nothing more: puts are reliable and UNORDERED; a put may carry a 32-bit notice, which the target
 * sees after all of that put's bytes are in its memory. An endpoint moves only while its owner calls progress, at the
 * target too. Source memory may be read until the put's SENT event.
 *
 * An endpoint belongs to one thread at a time; only loop and sim endpoints of one process touch each other, and they
 * lock. Nothing here blocks.
 */
#ifndef EPX_NET_NET_H
#define EPX_NET_NET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <epx/status.h>

#include "net/nic.h"

#define EPX__NET_ABI 2u

typedef struct epx__net_config {
    const char *argument; /* what follows the colon of "ofi:tcp" or "sim:7"; NULL when nothing does */
    const char *address;  /* IP to listen on; NULL: the network's choice */
    const char *nic;      /* interface or device by name; NULL: the nearest (net/nic.h) */
    uint32_t turn;        /* which of several equally near ones: modulo their number */
    uint32_t peers_max;
    uint32_t puts_max;    /* puts of this endpoint under way at once */
    uint32_t notices_max; /* notices on their way to this endpoint at once */
    uint64_t lost_ms;     /* a peer that takes nothing for that long, with nothing under way to it, is lost; 0: 30000 */
} epx__net_config_t;

/* Where an endpoint is. Plain bytes: it travels. */
typedef struct epx__net_address {
    uint32_t bytes;
    char net[28]; /* "loop", "ofi:tcp;ofi_rxm": both sides must be the same */
    uint8_t data[224];
} epx__net_address_t;

/* What a peer needs to write registered memory. Plain bytes: it travels. */
typedef struct epx__net_key {
    uint64_t base, key, bytes;
} epx__net_key_t;

typedef struct epx__net_memory epx__net_memory_t; /* one registration, the owner's side */

typedef struct epx__net_put {
    uint32_t peer; /* as connect numbered it */
    uint32_t notice;
    bool with_notice;                /* false only with bytes > 0 */
    const epx__net_memory_t *memory; /* of the source; may be NULL when bytes is 0 */
    size_t offset;                   /* in it */
    const epx__net_key_t *to;        /* may be NULL when bytes is 0 */
    size_t to_offset;
    size_t bytes;    /* 0: a notice alone */
    uint64_t cookie; /* comes back in the SENT event */
} epx__net_put_t;

enum {
    EPX__NET_SENT = 1,   /* that put's source memory may be used again: cookie, peer */
    EPX__NET_NOTICE = 2, /* value */
    EPX__NET_LOST =
        3 /* a peer cannot be reached any more: peer (cookie: the put that found out). Words in epx__detail. */
};

typedef struct epx__net_event {
    uint32_t kind, value, peer;
    uint64_t cookie;
} epx__net_event_t;

typedef struct epx__net epx__net_t;

typedef struct epx__net_ops {
    const char *name;
    epx_status_t (*open)(const epx__net_config_t *config, epx__net_t **net);
    void (*close)(epx__net_t *net); /* bounded; drops what is under way; NULL is not allowed */
    epx_status_t (*address)(epx__net_t *net, epx__net_address_t *address);
    /* Numbers peers 0, 1, 2 ... in the order of the calls. Returns at once: nothing is sent before the first put. */
    epx_status_t (*connect)(epx__net_t *net, const epx__net_address_t *address, uint32_t *peer);
    /* Let the network read and write this memory. `device`: GPU memory. EPX_E_UNSUPPORTED in words: stage it. */
    epx_status_t (*enroll)(epx__net_t *net, void *base, size_t bytes, bool device, epx__net_memory_t **memory,
                           epx__net_key_t *key);
    void (*withdraw)(epx__net_t *net, epx__net_memory_t *memory); /* no put of it under way; NULL is fine */
    /* EPX_OK: accepted. EPX_E_BUSY (no words): no room now, call progress. EPX_E_INVALID: outside of a registration, in
     * words. EPX_E_PEER: it is gone. */
    epx_status_t (*put)(epx__net_t *net, const epx__net_put_t *put);
    /* Move things along and hand out at most `max` events. */
    epx_status_t (*progress)(epx__net_t *net, epx__net_event_t *events, uint32_t max, uint32_t *count);
    /* EPX_OK when every accepted put has been handed out as SENT or LOST, else EPX_E_BUSY: call progress. */
    epx_status_t (*flush)(epx__net_t *net);
    /* A descriptor that turns readable when progress has something, -1 where there is none (then poll). */
    int (*wait_fd)(epx__net_t *net);
    /* Call before sleeping on it: false when there is something already. */
    bool (*arm)(epx__net_t *net);
} epx__net_ops_t;

/* The part of every endpoint that the table's users see. */
struct epx__net {
    const epx__net_ops_t *ops;
    size_t put_bytes_max;         /* of one put; the caller splits */
    const char *why;              /* one line: what was chosen and why. Lives as long as the endpoint */
    bool device_memory;           /* enroll takes GPU memory */
    const epx__net_memory_t *any; /* stands for all of this process's memory as a source: its offsets are addresses.
                                     NULL: sources must be enrolled */
    bool unclean; /* set by the user before close: some peer was lost, or did not say that all is done */
};

/* Where in a memory a put's bytes come from. By numbers: the memory that stands for all begins at address 0. */
static inline const char *epx__net_at(const char *base, size_t offset)
{
    return (const char *)((uintptr_t)base + offset);
}

/*
 * Open the endpoint that `spec` names: "ofi", "ofi:PROVIDER", "loop", "sim", "sim:SEED"; NULL or "" is "ofi".
 * config->argument is filled in from it.
 */
epx_status_t epx__net_open(const char *spec, const epx__net_config_t *config, epx__net_t **net);
void epx__net_close(epx__net_t *net); /* NULL is fine */
/* Right form? Without opening anything. */
epx_status_t epx__net_check_spec(const char *spec);

/* Checks common to every put: ranges, and a notice or bytes. `local_bytes`: of the registration. */
epx_status_t epx__net_put_check(const epx__net_put_t *put, size_t local_bytes);

extern const epx__net_ops_t epx__net_loop;
extern const epx__net_ops_t epx__net_sim;

/* ---- plug-in ---- */

/* What the plug-in takes from libepx.so, whose inside it cannot link. */
typedef struct epx__net_host {
    uint32_t abi;
    epx_status_t (*fail)(epx_status_t code, const char *format, ...) __attribute__((format(printf, 2, 3)));
    void (*log)(int level, const char *format, ...) __attribute__((format(printf, 2, 3)));
    void *(*calloc)(size_t count, size_t size);
    void (*free)(void *memory);
    epx_status_t (*put_check)(const epx__net_put_t *put, size_t local_bytes);
    uint64_t (*now_ns)(void);
    void (*nic_look)(const char *root, epx__nic_t *nic);
    int (*nic_here)(void);
    int (*nic_choose)(const epx__nic_t *nics, int count, int node, uint32_t turn, int *near);
} epx__net_host_t;

/* The plug-in's only symbol: "epx_ofi_plugin". NULL when the ABI is another. */
typedef const epx__net_ops_t *(*epx__net_plugin_fn)(const epx__net_host_t *host);
/* libepx_ofi.so's table, opened on first use. EPX_E_UNSUPPORTED in words (what was tried) when it is not there. */
epx_status_t epx__net_plugin_ofi(const epx__net_ops_t **ops);

#endif
