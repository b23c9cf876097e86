/*
 * One operation of the exchange as a test drives it: begin, end, again, combine, release; each part compared with the
 * reference exactly, guards around the caller's memory looked at, and memory poisoned as soon as the library is done
 * with it. Parts of several steps may interleave.
 */
#ifndef EPX_TEST_STEP_H
#define EPX_TEST_STEP_H

#include "common/inputs.h"

typedef enum xt_place { XT_PLACE_ANY, XT_PLACE_LEASE, XT_PLACE_OWN } xt_place_t;
typedef enum xt_from { XT_FROM_ANY, XT_FROM_RECEIVED, XT_FROM_LEASE, XT_FROM_ANYWHERE } xt_from_t;

/* Memory of the backend with a guard behind it. */
typedef struct xt_area {
    uint8_t *memory;
    size_t bytes;
} xt_area_t;

typedef struct xt_step {
    xt_rank_t *self;
    epx_buffer_t *buffer;
    xt_shape_t shape;
    bool worst_case;
    xt_place_t place; /* a choice of this rank's own: others may differ */
    xt_expect_t expect;
    uint32_t recv_max;
    xt_area_t x, side, ids, weights, mask; /* device copies of this rank's inputs */
    epx_handle_t *handle;
    epx_received_t received;
    xt_area_t own[5]; /* places of received x, side, topk_idx, topk_weights, src_token */
    uint32_t version; /* of again and combine; grows */
    uint32_t busy;    /* how often a lease was refused for want of room */
} xt_step_t;

/* Each returns false when a call failed (the buffer may be broken then: stop). */
bool xt_step_begin(xt_step_t *step, xt_rank_t *self, epx_buffer_t *buffer, const xt_shape_t *shape, bool worst_case);
bool xt_step_counts(xt_step_t *step);
bool xt_step_end(xt_step_t *step, xt_place_t place);
/* Other rows over the same routing, received and checked, and given back at once. */
bool xt_step_again(xt_step_t *step, xt_place_t place, xt_format_t format, size_t row_bytes, uint32_t side_elems,
                   uint32_t side_elem_bytes);
bool xt_step_combine(xt_step_t *step, xt_from_t from, epx_dtype_t dtype, uint32_t hidden, bool weights, int biases);
/* Give everything back. Also after a failure, and when nothing was begun (zeroed step). */
void xt_step_release(xt_step_t *step);
/* The received lease alone (poisoned first). */
void xt_step_release_received(xt_step_t *step);

/* epx_layout of the step's routing, compared. */
bool xt_step_layout(xt_step_t *step);

/* All of it in the usual order. */
bool xt_step_whole(xt_rank_t *self, epx_buffer_t *buffer, const xt_shape_t *shape, bool worst_case, xt_place_t place,
                   xt_from_t from);

xt_area_t xt_area_make(xt_rank_t *self, size_t bytes);
void xt_area_free(xt_rank_t *self, xt_area_t *area, const char *what); /* looks at the guard */

#endif
