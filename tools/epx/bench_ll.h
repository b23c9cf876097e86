/*
 * Low latency in a bench: set-up and calls (bench_ll.c), the check (bench_ll_verify.c), the floor (bench_ll_floor.c).
 *
 * Rows come expert-major: [local expert][place], a place for each of ranks * tokens_max rows. What an expert "puts out"
 * for a row is made up (y), so that combine's sums can be worked out again anywhere from (expert, source, token).
 */
#ifndef EPX_TOOL_BENCH_LL_H
#define EPX_TOOL_BENCH_LL_H

#include "bench.h"

#include <epx/ll.h>

typedef struct bench_ll {
    bench_rank_t *self;
    size_t places;    /* rows of one local expert's part */
    int64_t *experts; /* host, [local experts]: their numbers among all */
    uint32_t local_experts;
    bool fp8;
    /* Device memory; x, y, out, ids and weights are the rank's (bench_rank_t). */
    void *recv_x;
    float *recv_scales;
    int32_t *recv_count, *src_info;
    int64_t *layout_range;
    epx_ll_dispatch_t dispatch; /* as it is called every time; a half in a stream or a graph may still read it */
    epx_ll_combine_t combine;
    epx_ll_handle_t *handle; /* of the last dispatch */
} bench_ll_t;

/* Iterate over the choices of all tokens that fall on `expert`, in the order in which its rows come. `at` starts with
 * zeros; false at the end. */
typedef struct bench_ll_cursor {
    int source;
    uint32_t token;
} bench_ll_cursor_t;
bool bench_ll_next(const bench_work_t *work, int64_t expert, bench_ll_cursor_t *at);

/* What `expert` puts out for that token; as pattern_key gives it, other in each generation. */
uint64_t bench_ll_output_key(const bench_rank_t *self, int64_t expert, int source, uint32_t token);

/* Each adds what was wrong to *wrong; non-zero when it could not look. */
int bench_ll_verify_dispatch(bench_ll_t *ll, uint64_t *wrong);
int bench_ll_verify_combine(bench_ll_t *ll, uint64_t *wrong);

/* Bytes of a rank's area that the floor shares (bench_t.floor_area). */
size_t bench_ll_floor_bytes(const bench_t *bench, int rank);
/* Collective; sets self->floor and its operations. 0, also where there is no floor. */
int bench_ll_floor_open(bench_ll_t *ll);

#endif
