/*
 * Deterministic inputs that every rank can make for every rank, and what must come of them by the reference.
 *
 * Everything follows from (seed, op): how many tokens each rank has, where they go, and every byte. An element of a row
 * tells its source rank, its token, its column and its op, in base-256 digits: exact as bf16, fp16, fp32 and bytes.
 */
#ifndef EPX_TEST_INPUTS_H
#define EPX_TEST_INPUTS_H

#include "algo/reference.h"
#include "common/world.h"

typedef enum xt_format {
    XT_BF16 = 1,
    XT_FP16 = 2,
    XT_FP32 = 3,
    XT_BYTES = 4
} xt_format_t; /* first three: epx_dtype_t */

enum xt_tokens {
    XT_TOKENS_MIXED,
    XT_TOKENS_RANDOM,
    XT_TOKENS_NONE,
    XT_TOKENS_ONE_RANK,
    XT_TOKENS_FULL,
    XT_TOKENS_UNEVEN,
    XT_TOKENS_KINDS
};
enum xt_routing {
    XT_ROUTE_MIXED,
    XT_ROUTE_UNIFORM,
    XT_ROUTE_SKEWED,
    XT_ROUTE_ONE_RANK,
    XT_ROUTE_HOLES,
    XT_ROUTE_REPEATED,
    XT_ROUTE_NOBODY,
    XT_ROUTE_SELF,
    XT_ROUTE_ALL,
    XT_ROUTE_KINDS
};

/* What all ranks agree on for one operation. */
typedef struct xt_shape {
    int ranks;
    uint64_t seed;
    uint32_t op;         /* names the inputs */
    uint32_t tokens_max; /* a rank has 0 .. tokens_max */
    uint32_t topk;       /* 0: a mask */
    uint32_t experts;
    const int32_t *expert_rank; /* or NULL */
    int bits;
    bool weights;
    uint32_t alignment;
    enum xt_tokens tokens;
    enum xt_routing routing;
    xt_format_t format;
    size_t row_bytes;
    uint32_t side_elems, side_elem_bytes; /* 0: none */
} xt_shape_t;

/* One rank's, packed, in host memory. */
typedef struct xt_inputs {
    uint32_t tokens;
    uint8_t *x, *side;
    void *ids;
    float *weights;
    uint8_t *in_rank;
} xt_inputs_t;

uint32_t xt_tokens_of(const xt_shape_t *shape, int rank);
void xt_inputs_make(const xt_shape_t *shape, int rank, xt_inputs_t *inputs);
/* Other rows for the same routing (dispatch_again): x and side of `inputs` are made anew for `shape`. */
void xt_inputs_rows(const xt_shape_t *shape, int rank, uint32_t version, xt_inputs_t *inputs);
void xt_inputs_fini(xt_inputs_t *inputs);

/* What must come: at one rank, from all ranks' inputs. */
typedef struct xt_expect {
    xt_shape_t shape;
    int at;
    int32_t *local_of;
    epx__ref_shape_t ref;
    xt_inputs_t *all; /* [ranks] */
    epx__ref_received_t got;
    int32_t *matrix;   /* [ranks][ranks] rows */
    uint32_t *rows_at; /* [ranks] */
} xt_expect_t;

void xt_expect_make(const xt_shape_t *shape, int at, xt_expect_t *expect);
/* The reference's receipt for other rows; the caller ends it with epx__ref_received_fini. */
void xt_expect_again(xt_expect_t *expect, const xt_shape_t *again, uint32_t version, epx__ref_received_t *got);
void xt_expect_fini(xt_expect_t *expect);
bool xt_goes(const xt_expect_t *expect, int source, uint32_t token, int to);

/* Expert outputs [rows_at[rank]][hidden] and their weights [..][topk], of combine number `version`: values whose sum
 * depends on the order of adding. Biases likewise, [tokens][hidden]. Host memory, free() it. */
void *xt_outputs_make(const xt_expect_t *expect, int rank, uint32_t version, epx_dtype_t dtype, uint32_t hidden);
float *xt_out_weights_make(const xt_expect_t *expect, int rank, uint32_t version);
void *xt_bias_make(const xt_expect_t *expect, int rank, uint32_t which, epx_dtype_t dtype, uint32_t hidden);

#endif
