/*
 * HT between domains on the CPU: what rail*.c share. docs/PROTOCOL-NET.md has the protocol.
 *
 * Every half begins with one message to and from each rail; only then does a rank write its domain's mailboxes. So the
 * domain's mail says that the rails' messages lie in the sender's inbox.
 *
 * dispatch  a row crosses once per domain, in chunks, into the rail's receive ring; the ranks of that domain copy what
 *           is theirs out of the ring (`arrived`, `taken`); the rail gives the slots back as credit
 * combine   the rail sums its domain's rows of a token, rounds once, sends the sum back in chunks; the owner adds the
 *           domains in their order
 */
#ifndef EPX_ALGO_HT_RAIL_H
#define EPX_ALGO_HT_RAIL_H

#include "algo/ht/cpu/ht_cpu.h"
#include "algo/rails.h"

/* Rows of one half on their way through a ring. Row k lies in slot k / rows_per_chunk % slots. */
typedef struct epx__rail_stream {
    size_t stride; /* of a record: chunks and slots are cut by it */
    size_t
        ring_stride; /* what of a record passes through the ring: all, or all but x, which goes straight to its place */
    uint32_t rows_per_chunk, slots;
    uint32_t total;
    uint32_t packed; /* out: rows in the send ring or gone */
    uint32_t moved;  /* out: rows put; in: rows that have arrived */
    uint32_t freed;  /* in: rows nobody needs any more */
    uint64_t base;   /* chunks ever before this half */
} epx__rail_stream_t;

/* Another domain. */
typedef struct epx__ht_rail {
    int domain, rank;
    const epx_port_channel_t *messages, *data, *credit;
    uint64_t chunks_sent, chunks_freed; /* ever: put by me; given back by me */
    bool posted, heard;                 /* this half's message */
    bool straight;                      /* in this half something was put from where the caller has it */
    uint64_t x_place;                   /* in its window, of my rows; 0: through the ring */
    epx__rail_message_t mail;
    epx__rail_stream_t out, in;
} epx__ht_rail_t;

/* One handle's crossings. */
typedef struct epx__rail_routing {
    int32_t *cross_count; /* [domains] my tokens that go there */
    int32_t *cross_token; /* [domains][tokens_max] */
    uint8_t *cross_mask;  /* [domains][tokens_max][mask_bytes] */
    int32_t *in_count;    /* [members][domains] tokens of (d, i) that come to my domain */
    uint8_t *in_mask;     /* [domains][tokens_max][mask_bytes] of my own rails' tokens */
    int32_t *pull_row;    /* [ranks][tokens_max] of each source elsewhere: place in its crossing, of its rows for me */
    int32_t *pull_token;  /* the same: its token */
    void *slab;
} epx__rail_routing_t;

/* How far I am in the stream (member i, domain d). */
typedef struct epx__rail_pull {
    uint32_t next;  /* of my rows in it */
    uint32_t count; /* of my rows in it */
    uint32_t taken; /* rows of the stream, as told */
} epx__rail_pull_t;

typedef struct epx__ht_rails {
    epx__rails_t *rails;
    epx__ht_cpu_t *ht;
    int domains, members, home, index;
    epx__ht_rail_t *rail;         /* [domains]; home's is not used */
    epx__rail_routing_t *routing; /* [handles_max] */
    epx__rail_pull_t *pulls;      /* [members][domains] */
    uint64_t *streamed;           /* [members][domains] dispatch rows ever: what arrived and taken count from */
    uint64_t *lent;               /* [members][domains] combine: rows ever that i reads of mine for d */
    uint64_t *pulled;             /* [members][domains] combine: rows ever that I read of i's for d */
} epx__ht_rails_t;

/* rail.c */
epx_status_t epx__ht_rails_open(epx__ht_cpu_t *ht);
void epx__ht_rails_close(epx__ht_cpu_t *ht);
/* The half's message to and from every rail; DONE when all are heard. */
epx__step_t epx__ht_rails_mail(epx__half_t *half);
void epx__ht_rails_start(epx__half_t *half);
void epx__ht_rails_end(epx__half_t *half);
/* With too few cores for proxies of their own: step them; true when anything moved. */
bool epx__ht_rails_help(epx__half_t *half);
/* Around a wait that may sleep: the proxies' own threads take over. */
void epx__ht_rails_sleep(epx__half_t *half, bool sleep);
void epx__ht_rails_blame(epx__half_t *half, epx__blame_t *blame); /* only if some message is missing */
/* Why the rail `rank` can be waited for no more (it has left, or cannot be reached); EPX_OK: it may still come. */
epx_status_t epx__ht_rails_gone(const epx__half_t *half, int rank);

/* Begin: what crosses, from dst_rank; the message's tail; and what rail messages of member i say (its window). */
void epx__ht_rails_cross(epx__ht_cpu_t *ht, const epx__exchange_handle_t *handle);
size_t epx__ht_rails_fill_begin(const epx__ht_rails_t *rails, const epx__exchange_handle_t *handle, int domain,
                                const int32_t *rank_count, const int32_t *expert_count, epx__rail_message_t *message);
void epx__ht_rails_hear_begin(epx__ht_rails_t *rails, epx__exchange_handle_t *handle, int member, uint64_t sequence,
                              uint64_t *recv_max);

/* Streams. */
epx_status_t epx__rail_stream_init(const epx__ht_rails_t *rails, epx__rail_stream_t *stream, size_t stride,
                                   uint32_t total, uint64_t base);
uint8_t *epx__rail_row(uint8_t *ring, const epx__rail_stream_t *stream, uint64_t k);
/* Out: rows that may be packed now, up to a chunk; then put what is whole. */
uint32_t epx__rail_room(const epx__ht_rails_t *rails, epx__ht_rail_t *rail);
bool epx__rail_put(epx__half_t *half, epx__ht_rails_t *rails, epx__ht_rail_t *rail);
/* The end of the chunk that row `moved` begins. */
uint32_t epx__rail_chunk_end(const epx__rail_stream_t *out);
/* A channel to this rail refused. */
epx_status_t epx__rail_failed(epx__half_t *half, const epx__ht_rail_t *rail, epx_status_t status);
/* In: look for chunks that have come; give back what is done with. */
bool epx__rail_look(epx__ht_rail_t *rail);
bool epx__rail_free(epx__half_t *half, epx__ht_rail_t *rail, uint32_t rows);

/* rail_straight.c: rows put from where they lie, and to where they belong, past the rings. */
typedef struct epx__rail_source {
    uint32_t memory; /* of the channels */
    uint64_t offset;
} epx__rail_source_t;

/* Can the network read these bytes where they are? */
bool epx__rail_source(const epx__ht_rails_t *rails, const void *from, size_t bytes, epx__rail_source_t *source);
/* The chunk that is next, all of it one piece at `source`, into the rail's ring. */
bool epx__rail_put_from(epx__half_t *half, epx__ht_rails_t *rails, epx__ht_rail_t *rail,
                        const epx__rail_source_t *source);
/* x of rows [from, to) of the stream, rows of one chunk, to their final places; token[k]: row k's token. */
bool epx__rail_put_x(epx__half_t *half, epx__ht_rails_t *rails, epx__ht_rail_t *rail, const epx_rows_t *rows,
                     const int32_t *token, uint32_t from, uint32_t to);
/* Room for all requests of a chunk, however it is cut. */
bool epx__rail_chunk_room(const epx__ht_rail_t *rail);
/* Nothing of the caller's is read by the network any more. */
bool epx__rail_let_go(const epx__ht_rails_t *rails);
void epx__rail_blame_straight(const epx__ht_rails_t *rails, epx__blame_t *blame);
/* One request on the rail's data channel, counted; false: it failed, and so has the half. */
bool epx__rail_push(epx__half_t *half, epx__ht_rail_t *rail, const epx__rail_source_t *source, uint32_t to_memory,
                    uint64_t to, size_t bytes, bool signal);

/* rail_rows.c: the part of dispatch_end and dispatch_again that crosses. */
epx_status_t epx__rail_rows_init(epx__ht_cpu_t *ht, const epx__exchange_handle_t *handle, const epx__row_shape_t *shape,
                                 const epx__target_t *target);
/* The half's message to the rail of `domain` (its bytes); what the rails' messages say. */
size_t epx__rail_rows_fill(const epx__ht_cpu_t *ht, const epx__exchange_handle_t *handle, const epx__target_t *target,
                           const epx__row_shape_t *shape, int domain, epx__rail_message_t *message);
void epx__rail_rows_heard(const epx__ht_cpu_t *ht, const epx__row_shape_t *shape);
epx__step_t epx__rail_rows_step(epx__half_t *half, const epx__exchange_handle_t *handle, const epx_rows_t *rows,
                                const epx__target_t *target, const epx__row_shape_t *shape);
void epx__rail_rows_blame(epx__ht_cpu_t *ht, epx__blame_t *blame);
void epx__rail_rows_end(epx__ht_cpu_t *ht, const epx__exchange_handle_t *handle);

/* rail_sum.c */
typedef struct epx__rail_rows { /* of one token in the own domain, in rank order */
    const void *const *rows;
    const uint8_t *const *weights; /* [topk] floats each */
    int count;
} epx__rail_rows_t;

typedef struct epx__rail_sum {
    const epx_combine_t *args;
    size_t row_bytes;
    uint32_t topk;
    bool weights, streaming;
    int domains, home, members;
    const epx__rail_rows_t *own;
    const uint8_t *const *sums; /* [domains] records of the others: row, weights; NULL where the token did not go */
} epx__rail_sum_t;

void epx__rail_sum(const epx__rail_sum_t *sum, uint32_t token);
void epx__rail_sum_weights(const uint8_t *const *weights, int n, uint32_t topk, float *out);

/* rail_combine.c: all of combine when there are several domains. */
epx_status_t epx__ht_rail_combine(epx__exchange_t *exchange, epx__exchange_handle_t *handle,
                                  const epx_combine_t *combine, size_t x_offset);

#endif
