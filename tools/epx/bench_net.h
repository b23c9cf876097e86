/* The floor between domains (bench_net.c), and who sends how much and where in it (bench_net_lists.c). */
#ifndef EPX_TOOL_BENCH_NET_H
#define EPX_TOOL_BENCH_NET_H

#include "bench.h"
#include "stream.h"

/* A list for the memory's own floor (mem.h): where each token's rows are in this domain. */
typedef struct net_part {
    int32_t *dst_rank, *dst_row; /* [tokens][ranks] */
    uint32_t tokens;
    void *floor;    /* NULL: nothing to do */
    int variant[2]; /* by floor_kind_t: the fastest */
} net_part_t;

typedef struct net_floor {
    floor_plan_t plan;
    const bench_work_t *work;
    const int32_t *domain_of;
    int domain;
    const mem_ops_t *mem;
    void *context; /* of mem */
    const stream_ops_t *ops;
    void *stream[2];     /* by floor_kind_t */
    size_t out_bytes[2]; /* by floor_kind_t: of the stream */
    size_t in_bytes[2];
    uint32_t *out_rows, *back_rows; /* [ranks] of this rank's tokens to its rail there; of that rail's tokens here */
    uint32_t out_total, back_total;
    size_t *bytes; /* [6][ranks] for the streams' plans: to, from, at of dispatch and of combine */
    uint8_t **area;
    uint8_t *send, *rows; /* CPU; rows: this rank's tokens, then what arrives */
    char *from, *into;    /* what the stream sends, where it lands */
    void *carry;          /* GPU, else NULL: host memory of the two, and copies between it and the GPU */
    net_part_t copies, partial, final;
    char name[96];
} net_floor_t;

/* Each non-zero when there is no memory. */
int net_count_rows(net_floor_t *self);
int net_make_lists(net_floor_t *self);
void net_free_lists(net_floor_t *self);

#endif
