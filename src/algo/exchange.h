/*
 * The seam between the API (arguments checked, pools and leases kept) and an implementation of the exchange
 * (algo/ht/cpu in libepx.so, algo/ht/cuda in the plug-in).
 *
 * The API owns: window and its imports, lease arena, handle slots' states, the sticky status. An implementation owns
 * the protocol: sequence numbers, mailboxes, rows. docs/PROTOCOL-HT.md says who writes which word.
 */
#ifndef EPX_ALGO_EXCHANGE_H
#define EPX_ALGO_EXCHANGE_H

#include <stdatomic.h>

#include "base/arena.h"
#include "bootstrap/bootstrap.h"
#include "device/device.h"
#include "plan/routing.h"
#include "plan/topology.h"
#include "plan/window.h"

typedef struct epx__exchange epx__exchange_t;
typedef struct epx__exchange_handle epx__exchange_handle_t;

/* A late failure: the first one wins and stays. Written by any thread, read by the next call. */
typedef struct epx__fault {
    atomic_int status; /* epx_status_t, 0 none */
    char words[512];   /* complete once `ready` is set */
    atomic_int ready;
    atomic_uint bad_ids; /* ids counted as -1 since last told */
} epx__fault_t;

/* One dispatch's decisions, the API's part; an implementation keeps more behind it (`impl_handles` + index). */
struct epx__exchange_handle {
    uint32_t index;      /* place in the pool */
    uint32_t generation; /* of this use of the place: counts the dispatches of the buffer, so equal on all ranks */
    enum { EPX__HANDLE_FREE, EPX__HANDLE_BEGUN, EPX__HANDLE_DONE } state;
    epx_dispatch_t args; /* as given, defaults filled in */
    epx__experts_t map;
    uint32_t slots; /* per token in dst_rank, dst_row */
    uint32_t local_experts;
    bool worst_case;
    bool counted;         /* the three below are filled in */
    uint32_t rows;        /* that come to this rank */
    int32_t *matrix;      /* host, [ranks][ranks] */
    int32_t *tokens_of;   /* host, [ranks] */
    int32_t *expert_rows; /* host, [local experts], aligned */
};

/* Where one dispatch's rows land at this rank. */
typedef struct epx__target {
    bool own;          /* caller's memory: rows pass through the ring and are copied out */
    epx_place_t place; /* final addresses; with a lease, inside the window */
    size_t
        lease_offset; /* own == false: the lease's offset in the window; own: a lease for the whole, else the reserve */
    uint32_t capacity; /* rows there is room for */
} epx__target_t;

typedef struct epx__exchange_ops {
    const char *name;
    epx_status_t (*create)(epx__exchange_t *exchange); /* fills exchange->impl; collective */
    void (*destroy)(epx__exchange_t *exchange);        /* local, bounded */
    epx_status_t (*layout)(epx__exchange_t *exchange, const epx_layout_t *layout, const epx__experts_t *map,
                           epx_stream_t stream);
    epx_status_t (*begin)(epx__exchange_t *exchange, epx__exchange_handle_t *handle, epx_stream_t stream);
    epx_status_t (*counts)(epx__exchange_t *exchange, epx__exchange_handle_t *handle); /* fills the handle's counts */
    /* `first`: with ids and weights (dispatch_end); else dispatch_again. */
    epx_status_t (*rows)(epx__exchange_t *exchange, epx__exchange_handle_t *handle, const epx_rows_t *rows, bool first,
                         const epx__target_t *target, epx_stream_t stream);
    /* x_offset: place of combine->x in the window, or SIZE_MAX when it lies elsewhere. */
    epx_status_t (*combine)(epx__exchange_t *exchange, epx__exchange_handle_t *handle, const epx_combine_t *combine,
                            size_t x_offset, epx_stream_t stream);
    epx_status_t (*barrier)(epx__exchange_t *exchange, epx_stream_t stream);
    epx_status_t (*check)(epx__exchange_t *exchange, uint8_t *works);
    epx_status_t (*tables)(epx__exchange_t *exchange, epx__exchange_handle_t *handle, epx_handle_tables_t *tables);
    /* Stream order of leases and handles: mark where `stream` is; wait (on `stream`) for a mark. CPU: nothing. */
    epx_status_t (*mark)(epx__exchange_t *exchange, uint32_t mark, epx_stream_t stream);
    epx_status_t (*wait_mark)(epx__exchange_t *exchange, uint32_t mark, epx_stream_t stream);
    /* Look for late failures (a kernel's record) and put them into exchange->fault. Does not wait. */
    void (*poll_fault)(epx__exchange_t *exchange);
    /* From any thread: a rank is lost, or told of a failure: end all waits (fault is set already). */
    void (*interrupt)(epx__exchange_t *exchange);
} epx__exchange_ops_t;

struct epx__exchange {
    const epx__exchange_ops_t *ops;
    void *impl;
    int rank;
    const epx__topology_t *topology;
    epx_buffer_config_t config; /* defaults filled in; timeout_ms as well */
    int threads;
    uint32_t spins;
    bool streaming;
    epx__device_t *device;
    epx__bootstrap_t *bootstrap; /* collective use in create only */
    epx__window_t window;
    void **peer; /* [ranks] their windows as mapped here; own base at [rank]; NULL outside the domain */
    epx__window_layout_t layout;
    void *ll; /* of the low-latency implementation; NULL: the buffer has none */
    epx__fault_t fault;
    epx_traffic_t traffic;
    void *net;           /* what carries rows between domains (algo/rails.h); NULL with one domain */
    void *ll_net;        /* what carries low latency between domains (algo/ll/net.h); NULL: nothing needed */
    uint32_t notice_tag; /* of failures told to other domains through the bootstrap */
};

/* Set the fault (first one wins) and return its status. */
epx_status_t epx__exchange_fault(epx__exchange_t *exchange, epx_status_t status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

extern const epx__exchange_ops_t epx__exchange_cpu;

#endif
