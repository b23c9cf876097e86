/*
 * The plain one-process meaning of low-latency dispatch and combine. Every implementation is compared with it, exactly.
 */
#ifndef EPX_ALGO_LL_REFERENCE_H
#define EPX_ALGO_LL_REFERENCE_H

#include <epx/ll.h>

#include "plan/format.h"
#include "plan/routing.h"

/* One rank's arguments, host memory. */
typedef struct epx__ref_ll_rank {
    uint32_t tokens;
    const uint16_t *x;            /* [tokens][hidden] bf16 */
    const void *topk_idx;         /* [tokens][topk] */
    const float *topk_weights;    /* [tokens][topk], given at dispatch */
    const float *combine_weights; /* [tokens][topk], given at combine; NULL: 1 for each */
    const uint8_t *masked;        /* [ranks] whom this rank masks; NULL: nobody */
} epx__ref_ll_rank_t;

typedef struct epx__ref_ll_shape {
    int ranks;
    epx__experts_t map;
    uint32_t topk, hidden, tokens_max;
    int bits;
    epx_ll_format_t format;
    int round_scale, ue8m0;
    epx_ll_order_t order;
    int pre_reduced;
} epx__ref_ll_shape_t;

/* What rank `at` receives, in the shapes of epx_ll_dispatch_t; what is past the counts is 0. */
typedef struct epx__ref_ll_received {
    uint32_t parts, local_experts; /* parts of recv_x: local experts, or 1 */
    uint8_t *x;
    uint32_t *scales; /* fp32 or packed */
    int32_t *count, *src_info;
    int64_t *layout_range;
    int32_t *topk_idx;
    float *topk_weights;
    int32_t *expert_rows; /* [local experts], for the statistics */
} epx__ref_ll_received_t;

epx_status_t epx__ref_ll_dispatch(const epx__ref_ll_shape_t *shape, const epx__ref_ll_rank_t *ranks, int at,
                                  epx__ref_ll_received_t *out);
void epx__ref_ll_received_fini(epx__ref_ll_received_t *received);

/* Row of (source, token) in expert `local`'s part at rank `at` (rank-major: in the one part). -1: not there. */
int64_t epx__ref_ll_row(const epx__ref_ll_shape_t *shape, const epx__ref_ll_rank_t *ranks, int at, int source,
                        uint32_t token, int32_t local);

/* What rank `at` gets back. y[r]: rank r's outputs, [parts][ranks * tokens_max][hidden] bf16. weight_left [tokens]. */
epx_status_t epx__ref_ll_combine(const epx__ref_ll_shape_t *shape, const epx__ref_ll_rank_t *ranks, int at,
                                 const uint16_t *const *y, uint16_t *out, float *weight_left);

#endif
