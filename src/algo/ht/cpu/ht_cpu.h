/*
 * HT on the CPU: what the files of this folder share. The protocol is in docs/PROTOCOL-HT.md.
 *
 * A half (half.c) is a loop over a step function that never blocks: it posts and reads mail, sends, drains; when
 * nothing moves the loop pauses (spin, yield, sleep on the bell), looking at the alarm and the deadline.
 */
#ifndef EPX_ALGO_HT_CPU_H
#define EPX_ALGO_HT_CPU_H

#include <string.h>

#include "algo/exchange.h"
#include "base/clock.h"
#include "device/cpu/copy.h"
#include "device/cpu/wait.h"

/* A rank of my domain (myself too), as seen from here. */
typedef struct epx__ht_peer {
    int rank;
    uint8_t *base;         /* its window as mapped here */
    epx__words_t *to_it;   /* my line in its window: I write */
    epx__words_t *from_it; /* its line in my window: it writes */
    /* What my words say so far: they only grow. */
    uint64_t sent;     /* rows I put into its place */
    uint64_t received; /* rows of its that I have seen complete, or taken out of its ring here */
    uint64_t staged;   /* rows I staged for it */
    uint64_t pulled;   /* rows of its expert outputs that I have read */
    uint64_t lent;     /* rows of my expert outputs that it had to read, ever */
    /* This half. */
    bool posted, heard;
    epx__message_t mail; /* its message, once heard */
} epx__ht_peer_t;

/* What one dispatch decided, in this implementation's terms. */
typedef struct epx__ht_routing {
    int32_t *dst_rank, *dst_row; /* [tokens][slots]: ranks ascending, final rows there */
    int32_t *list;               /* tokens by destination: list[list_start[p] + j] is the j-th bound for rank p */
    int32_t *list_start;         /* [ranks + 1] */
    int32_t *first;              /* [ranks] my first row at each rank */
    int32_t *start;              /* [ranks] each source's first row here */
    int32_t *src_token;          /* [rows] */
    int32_t *slab;               /* all of the above */
} epx__ht_routing_t;

typedef struct epx__ht_cpu {
    epx__exchange_t *exchange;
    int members;           /* ranks of my domain */
    epx__ht_peer_t *peers; /* [members], by place in the domain */
    epx__ht_peer_t *self;
    epx__ht_routing_t *routing; /* [handles_max] */
    epx__workers_t *workers;
    uint64_t sequence;           /* number of the last half begun here */
    uint8_t *window;             /* my own */
    int32_t *counts;             /* [ranks + experts] scratch for begin */
    struct epx__ht_rails *rails; /* between domains; NULL with one */
} epx__ht_cpu_t;

struct epx__ht_rails;
struct epx__rail_message;

typedef enum epx__step { EPX__STEP_STUCK, EPX__STEP_MOVED, EPX__STEP_DONE, EPX__STEP_FAILED } epx__step_t;

/* Whom a stuck half waits for, for the words of a deadline. */
typedef struct epx__blame {
    int rank;
    const char *stage;
    uint64_t expected, seen;
    /* Set by the caller who wants them: the others waited for alike. The one blamed may itself wait for one of them. */
    char *also; /* text of at most also_bytes, "" when there are none; NULL: not wanted */
    size_t also_bytes;
} epx__blame_t;

/* The first rank is the one blamed, later ones are also named. */
void epx__blame_rank(epx__blame_t *blame, int rank, const char *stage, uint64_t expected, uint64_t seen);

typedef struct epx__half epx__half_t;
struct epx__half {
    epx__ht_cpu_t *ht;
    const char *operation; /* "dispatch_begin", ... */
    enum epx__kind kind;
    uint32_t generation;
    uint64_t shape;
    uint64_t sequence;
    epx__deadline_t deadline;
    epx__waiter_t waiter;
    epx_status_t status; /* of a failed step */
    epx__step_t last;
    bool looked; /* `last` has not been acted upon */
    uint64_t stuck_polls;
    bool waiting;             /* the window says for whom */
    uint64_t closed_since_ns; /* a rank that is waited for was seen to have destroyed its buffer; 0: none */
    /* Fill the half's own part of the message to `peer` (and its tail), given zeroed; take what its message says. */
    void (*fill)(epx__half_t *half, epx__ht_peer_t *peer, epx__message_t *message, void *tail);
    epx_status_t (*hear)(epx__half_t *half, epx__ht_peer_t *peer, const void *tail);
    /* What else the half does; NULL: nothing. DONE or STUCK when it has nothing to do. */
    epx__step_t (*work)(epx__half_t *half);
    /* Several domains: the tail of the message to the rail of `domain` (its bytes in all); the rails are heard. */
    size_t (*rail_fill)(epx__half_t *half, int domain, struct epx__rail_message *message);
    void (*rail_heard)(epx__half_t *half);
    bool rails_done, helping;
    bool lent; /* the network was given memory of the caller's to read */
    void (*blame)(epx__half_t *half, epx__blame_t *blame);
    void *job;
};

/* Take the next number and run the half to its end. timeout_ms 0 is the buffer's. */
epx_status_t epx__half_run(epx__half_t *half, uint64_t timeout_ms);

/* The call behind an enum epx__kind, in words. */
const char *epx__half_kind(uint32_t kind);

/* Fail inside a half: record, tell every peer. Returns `status`. */
epx_status_t epx__half_fail(epx__half_t *half, epx_status_t status, int peer, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

static inline uint64_t epx__word_load(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
/* Store a word in a peer's window, after everything this thread wrote, and wake the peer. */
void epx__word_post(epx__ht_peer_t *peer, uint64_t *word, uint64_t value);

/* Hash for the shape of a half. */
static inline uint64_t epx__shape_mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * 0x9e3779b97f4a7c15ull;
    return hash ^ (hash >> 29);
}

/* The ring of `peer` in my reserve (one piece a member): offset and bytes. */
size_t epx__ht_ring_offset(const epx__ht_cpu_t *ht, const epx__ht_peer_t *peer);
size_t epx__ht_ring_bytes(const epx__ht_cpu_t *ht);

/* One token's side data, packed. */
static inline void epx__side_row(const epx_rows_t *rows, uint8_t *to, int64_t token)
{
    const uint8_t *from = (const uint8_t *)rows->side + token * rows->side_token_stride_bytes;
    size_t elem = rows->side_elem_bytes;
    if (rows->side_elem_stride_bytes == (int64_t)elem) {
        memcpy(to, from, elem * rows->side_elems);
        return;
    }
    for (uint32_t i = 0; i < rows->side_elems; i++)
        memcpy(to + i * elem, from + (int64_t)i * rows->side_elem_stride_bytes, elem);
}

/* Of x and weights in combine: the offset of weights in the window, 0 when they lie elsewhere; what must be staged. */
static inline size_t epx__weights_offset(const epx__ht_cpu_t *ht, const float *topk_weights)
{
    const uint8_t *weights = (const uint8_t *)topk_weights, *leases = ht->window + ht->exchange->layout.lease_offset;
    bool leased = weights && weights >= leases && weights < leases + ht->exchange->layout.lease_bytes;
    return leased ? (size_t)(weights - ht->window) : 0;
}

/* The halves. */
epx_status_t epx__ht_cpu_layout(epx__exchange_t *exchange, const epx_layout_t *layout, const epx__experts_t *map,
                                epx_stream_t stream);
epx_status_t epx__ht_cpu_begin(epx__exchange_t *exchange, epx__exchange_handle_t *handle, epx_stream_t stream);
epx_status_t epx__ht_cpu_rows(epx__exchange_t *exchange, epx__exchange_handle_t *handle, const epx_rows_t *rows,
                              bool first, const epx__target_t *target, epx_stream_t stream);
epx_status_t epx__ht_cpu_combine(epx__exchange_t *exchange, epx__exchange_handle_t *handle,
                                 const epx_combine_t *combine, size_t x_offset, epx_stream_t stream);
epx_status_t epx__ht_cpu_barrier(epx__exchange_t *exchange, epx_stream_t stream);
epx_status_t epx__ht_cpu_check(epx__exchange_t *exchange, uint8_t *works);

#endif
