/*
 * The plain one-process meaning of dispatch and combine. Every other implementation is compared with it, exactly.
 * It sees all ranks' inputs at once, moves nothing, waits for nothing, and is written to be read, not to be fast.
 */
#ifndef EPX_ALGO_REFERENCE_H
#define EPX_ALGO_REFERENCE_H

#include "plan/format.h"
#include "plan/routing.h"
#include "plan/topology.h"

/* One rank's dispatch arguments, host memory. */
typedef struct epx__ref_rank {
    uint32_t tokens;
    const void *x;        /* [tokens][row_bytes] */
    const void *side;     /* [tokens][side_bytes] packed, or NULL */
    const void *topk_idx; /* [tokens][topk], or NULL with in_rank */
    const float *topk_weights;
    const uint8_t *in_rank; /* [tokens][ranks], when topk is 0 */
} epx__ref_rank_t;

typedef struct epx__ref_shape {
    int ranks;
    epx__experts_t map;
    uint32_t topk;
    int bits;
    size_t row_bytes, side_bytes;
    uint32_t expert_alignment;
} epx__ref_shape_t;

/* What rank `at` receives. Arrays are the reference's (free with epx__ref_received_fini). */
typedef struct epx__ref_received {
    uint32_t rows;
    uint8_t *x, *side;
    int64_t *topk_idx; /* [rows][topk] local numbers, -1 elsewhere */
    float *topk_weights;
    int32_t *src_rank, *src_token;
    int32_t *rows_per_expert; /* [local experts], aligned */
    uint32_t local_experts;
} epx__ref_received_t;

epx_status_t epx__ref_dispatch(const epx__ref_shape_t *shape, const epx__ref_rank_t *ranks, int at,
                               epx__ref_received_t *out);
void epx__ref_received_fini(epx__ref_received_t *received);

/*
 * What rank `at` gets back. y[r] is rank r's expert output, [rows of r][hidden] in the order of dispatch; weights[r]
 * [rows][topk] or weights NULL. Adds in rank order in fp32 inside each domain; a partial sum of another domain is
 * rounded once to dtype; domains in domain order; then biases; then one rounding. A domain without rows adds nothing.
 */
epx_status_t epx__ref_combine(const epx__ref_shape_t *shape, const epx__topology_t *topology,
                              const epx__ref_rank_t *ranks, int at, const void *const *y, const float *const *weights,
                              const void *const *bias, int biases, uint32_t hidden, epx_dtype_t dtype, void *out,
                              float *out_weights);

#endif
