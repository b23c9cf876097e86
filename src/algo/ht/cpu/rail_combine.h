/*
 * Combine with several domains: what rail_combine*.c share. rail_combine.c says who does what.
 *
 *   rail_combine.c        owner, and the half
 *   rail_combine_rail.c   rail
 *   rail_combine_rows.c   reading rows of a member; expert
 */
#ifndef EPX_ALGO_HT_RAIL_COMBINE_H
#define EPX_ALGO_HT_RAIL_COMBINE_H

#include "algo/ht/cpu/rail.h"

#define EPX__COMBINE_STEP_BYTES (2u << 20) /* summed or staged by one step of one stream, about */

/* Rows of member e for one domain's tokens of mine (or of my rail there). */
typedef struct epx__combine_source {
    uint32_t count, cursor; /* all, and read */
    uint32_t there;         /* to be read */
    size_t start;           /* first of them at that member */
} epx__combine_source_t;

/* Rows of mine that member i reads for domain d's tokens. */
typedef struct epx__combine_stage {
    uint32_t count, staged;
    bool done; /* read by its reader */
} epx__combine_stage_t;

typedef struct epx__combine_member {
    const uint8_t *x, *weights; /* row 0 of what it received, when it is read in place */
    size_t x_stride;
    bool x_staged, weights_staged;
    uint64_t ring_rows;
} epx__combine_member_t;

/* Tokens whose rows have been found, to be added by all threads. */
#define EPX__COMBINE_BATCH 64u
typedef struct epx__combine_batch {
    uint32_t n;
    int count[EPX__COMBINE_BATCH];   /* rows of the own domain */
    uint8_t *to[EPX__COMBINE_BATCH]; /* rail: where the sum goes */
    const void **rows;               /* [EPX__COMBINE_BATCH][members] */
    const uint8_t **weights;         /* [EPX__COMBINE_BATCH][members] */
    const uint8_t **sums;            /* [EPX__COMBINE_BATCH][domains], owner */
} epx__combine_batch_t;

typedef struct epx__rail_combine {
    epx__ht_cpu_t *ht;
    epx__ht_rails_t *rails;
    const epx__exchange_handle_t *handle;
    const epx__ht_routing_t *routing;
    const epx__rail_routing_t *crossing;
    const epx_combine_t *args;
    size_t x_offset, weights_offset, row_bytes;
    uint32_t topk;
    bool weights, streaming;
    size_t record; /* of a sum on the network: row, then weights */
    epx__row_shape_t staged;
    uint64_t stage_rows;            /* of one of my rings */
    epx__combine_member_t *members; /* [members] */
    epx__combine_source_t *sources; /* [members][domains] */
    epx__combine_stage_t *stages;   /* [members][domains] */
    uint32_t token;                 /* owner: next */
    uint32_t *came;                 /* [domains] owner: rows used of that domain's sums */
    epx__combine_batch_t *batch;
} epx__rail_combine_t;

static inline size_t epx__combine_at(const epx__rail_combine_t *job, int member, int domain)
{
    return (size_t)member * (size_t)job->rails->domains + (size_t)domain;
}

/* The ring in expert e's reserve for reader i and domain d: one piece each. */
static inline size_t epx__combine_ring_bytes(const epx__rail_combine_t *job)
{
    size_t pieces = (size_t)job->rails->members * (size_t)job->rails->domains;
    return job->ht->exchange->layout.reserve_bytes / pieces / EPX__ROW_ALIGN * EPX__ROW_ALIGN;
}

static inline uint8_t *epx__combine_ring_at(const epx__rail_combine_t *job, uint8_t *window, int reader, int domain)
{
    return window + job->ht->exchange->layout.reserve_offset +
           epx__combine_at(job, reader, domain) * epx__combine_ring_bytes(job);
}

/* rail_combine_rows.c: see what has come from the members for domain d's tokens; how far they were read before, and
 * tell the members that have been read since. */
void epx__combine_look(epx__rail_combine_t *job, int d);
void epx__combine_remember(const epx__rail_combine_t *job, int d, uint32_t *before);
void epx__combine_tell_read(epx__rail_combine_t *job, int d, const uint32_t *before);
/* Take the next row of each member in `mask`, if all are there: n rows, in rank order; -1 when not. */
int epx__combine_take(epx__rail_combine_t *job, int d, const uint8_t *mask, const void **rows, const uint8_t **weights);
/* As expert: put up rows for reader i, domain d's tokens. True when any were. */
bool epx__combine_stage_step(epx__rail_combine_t *job, int i, int d);

/* rail_combine_rail.c: sums for another domain's tokens, or the rows themselves. True when anything moved. */
bool epx__combine_rail_step(epx__half_t *half, epx__rail_combine_t *job, epx__ht_rail_t *rail);

#endif
