/* The objects behind the opaque pointers of epx.h. */
#ifndef EPX_API_OBJECTS_H
#define EPX_API_OBJECTS_H

#include <pthread.h>

#include "algo/exchange.h"
#include "algo/ll/ll.h"
#include "api/names.h"

struct epx_group {
    epx__bootstrap_t *bootstrap;
    epx__fdserver_t *fdserver;
    epx__device_t *device;
    const epx__exchange_ops_t *exchange_ops; /* of the backend, inside one domain */
    const epx__ll_ops_t *ll_ops;             /* NULL: the backend has no low latency */
    epx__topology_t topology;
    int rank, ranks;
    int buffers;    /* made so far with several domains: the same number on all ranks */
    int host_ranks; /* ranks on this host */
    bool loopback;  /* 127.0.0.1 is one place for all ranks */
    int threads;
    uint32_t spins;
    bool streaming;
    uint64_t timeout_ms;
    char net[64];
    char net_asked[64]; /* by the configuration, else empty; also in one domain, for channels */
    char backend_why[512], domain_why[512], threads_why[512], net_why[512];
    struct epx__verdict *verdicts; /* [ranks] scratch of epx__group_agree */
    atomic_int references;         /* the caller's, and one a buffer */
};

struct epx_handle {
    epx_buffer_t *buffer;
    uint64_t number; /* of this use of the slot (names.h) */
    epx__exchange_handle_t h;
    bool rows_done;      /* dispatch_end has been called */
    epx_stream_t stream; /* of its last release */
};

/* A place in the lease table. A released lease keeps its range until the place is used again, so that whoever takes
 * overlapping memory on another stream can wait for the release. */
typedef struct epx__lease {
    enum { EPX__LEASE_NEVER, EPX__LEASE_HELD, EPX__LEASE_RELEASED } state;
    uint32_t generation;
    size_t offset, bytes; /* in the window's lease part */
    epx_stream_t stream;  /* of the release */
} epx__lease_t;

struct epx_ll_handle {
    epx_buffer_t *buffer;
    uint64_t number; /* of this use of the slot (names.h) */
    epx__ll_call_t call;
};

struct epx_buffer {
    uint32_t place; /* in the table of this process's buffers (names.h) */
    epx_group_t *group;
    epx__exchange_t x;
    epx__export_t *exports; /* [ranks] */
    epx__arena_t arena;     /* offsets in the window's lease part */
    epx__lease_t *leases;   /* [leases_max] */
    epx_handle_t *handles;  /* [handles_max] */
    int32_t *handle_slab;   /* their host counts */
    int32_t *expert_local;  /* of the configured map */
    int32_t *expert_rank;
    epx_ll_handle_t *ll_handles; /* [ll_slots]; call n has place n % ll_slots */
    uint64_t ll_calls;           /* so far */
    uint32_t dispatches;         /* so far: the generations of handles */
    int death_slot, notice_slot;
    bool told;    /* the caller has had the first failure */
    bool entered; /* it has a place, and so a name */
    bool created; /* the exchange is up */
};

/* EPX_OK when the buffer can take a call; else its failure, the first time as it was, then EPX_E_BROKEN. */
epx_status_t epx__buffer_usable(epx_buffer_t *buffer, const char *call);
/* Pass on the status of a call of the exchange: a failure of the buffer has then been told. */
epx_status_t epx__buffer_told(epx_buffer_t *buffer, epx_status_t status);

/* Low latency (ll.c): refuses, with what would fit, a shape that this host has no memory for. */
epx_status_t epx__ll_check_memory(const epx_buffer_t *buffer);

/* Leases (lease.c). */
epx_status_t epx__lease_give(epx_buffer_t *buffer, epx_lease_t lease, epx_stream_t stream);
epx_status_t epx__lease_take(epx_buffer_t *buffer, size_t bytes, epx_stream_t stream, epx_lease_t *lease,
                             size_t *window_offset);
/* The offset in the window of [memory, memory + bytes) when it lies inside one held lease, else SIZE_MAX. */
size_t epx__lease_find(const epx_buffer_t *buffer, const void *memory, size_t bytes);

/* Group (group.c): all ranks learn whether all succeeded; a rank that failed names itself. */
epx_status_t epx__group_agree(epx_group_t *group, epx_status_t mine, const char *doing);
void epx__group_unref(epx_group_t *group);
/* Collective (domains.c): topology, host_ranks, loopback and their words. */
epx_status_t epx__group_find_domains(epx_group_t *group, const epx_group_config_t *config);
/* What channel/channels.h calls while channels are made. A rank that fails between two of these all-gathers must not be
 * waited for in the second. */
typedef struct epx__gathering {
    epx_group_t *group;
    int done;
} epx__gathering_t;
enum { EPX__GATHERINGS = 2 }; /* of one epx__channels_create: what is agreed on, and the addresses */
epx_status_t epx__group_gather(void *gathering, const void *mine, size_t bytes, void *all);
/* After a failure: the others are told that this rank takes part in no more of them. */
void epx__group_gather_no_more(const epx__gathering_t *gathering, epx_status_t status);
/* Map the window of another rank of the domain; a failure names it, and says when it is gone. */
epx_status_t epx__group_import(epx_group_t *group, int rank, const epx__export_t *exported, void **mapped);

/* Config structs: copy `size` bytes of the caller's struct over zeros; refuse sizes that cannot be. */
epx_status_t epx__config_copy(void *to, size_t to_bytes, const void *from, const char *what);

#endif
