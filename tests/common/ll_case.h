/*
 * One low-latency call from deterministic inputs, half by half, compared with the reference. Every rank can make every
 * rank's inputs and outputs from (seed, op) alone.
 */
#ifndef EPX_TEST_LL_CASE_H
#define EPX_TEST_LL_CASE_H

#include <epx/ll.h>

#include "algo/ll_reference.h"
#include "common/world.h"

/* Of a buffer and of all calls on it. */
typedef struct xl_world {
    xt_rank_t *self;
    epx_buffer_t *buffer;
    uint64_t seed;
    uint32_t tokens_max, hidden_max, topk_max, experts; /* largest; a call takes some of them */
    const int32_t *expert_rank;                         /* or NULL */
    int32_t local_of[512];
    epx__experts_t map;
    uint8_t masked[XT_RANKS_MAX]; /* at all ranks alike, but for the masked ones, which are not there */
    bool zero_copy;
    uint64_t wire;       /* bytes that this rank must have given to the network by now (docs/PROTOCOL-LL.md) */
    bool wire_unknown;   /* calls in between do not count it: it is not compared */
    uint32_t loose_from; /* from that op on it may be less: others may have left, and nothing is put to them; 0 never */
} xl_world_t;

/* What a call is like. */
typedef struct xl_call {
    xl_world_t *world;
    uint32_t op, variant;
    epx__ref_ll_shape_t shape;
    bool weights, combine_weights, zero_copy, whole;
    epx__ref_ll_rank_t all[XT_RANKS_MAX];
    epx__ref_ll_received_t want;
    uint16_t *y[XT_RANKS_MAX]; /* outputs of every rank, host */
    epx_ll_handle_t *handle;
    /* device memory */
    void *x, *ids, *weight, *weight2, *recv_x, *scales, *y_mine, *out;
    int32_t *count, *src, *stats, *topk_idx;
    int64_t *range, *wait;
    float *topk_weights, *left;
} xl_call_t;

/* Make the buffer and the map. `config`: what to add. */
bool xl_open(xl_world_t *w, xt_rank_t *self, const epx_buffer_config_t *config);
void xl_close(xl_world_t *w);

/* Everything of call `op` but the calls themselves: inputs, what must come, device memory. */
void xl_make(xl_call_t *c, xl_world_t *w, uint32_t op);
bool xl_dispatch_send(xl_call_t *c);
bool xl_dispatch_recv(xl_call_t *c); /* and compare; whole calls: does both */
bool xl_combine_send(xl_call_t *c);
bool xl_combine_recv(xl_call_t *c); /* and compare */
/* Other ids and values for the same call: what a replayed graph finds. */
void xl_remake(xl_call_t *c, uint32_t variant);
void xl_fini(xl_call_t *c);
/* After a wait that did not end: where every far rank's channel and words are, for who looks for the reason. */
void xl_say_channels(const xl_world_t *w);
/* All of one call, and the bytes on the wire. */
bool xl_run(xl_world_t *w, uint32_t op);
/* Two calls in flight, op and op + 1: halves in an order that is the same on all ranks and keeps each call's own. */
bool xl_run_pair(xl_world_t *w, uint32_t op);
/* The bytes of a call that is over, `combined` or released; and are those of all calls what the traffic says? */
void xl_count_wire(const xl_call_t *c, bool combined);
bool xl_check_wire(xl_world_t *w, uint32_t op);
/* The parts of recv and combine without comparing, for graphs: enqueue only. */
epx_ll_dispatch_t xl_dispatch_of(const xl_call_t *c);
epx_ll_combine_t xl_combine_of(const xl_call_t *c);
void xl_put_inputs(xl_call_t *c);
void xl_check_dispatch(xl_call_t *c);
void xl_put_outputs(xl_call_t *c);
void xl_check_combine(xl_call_t *c);

#endif
