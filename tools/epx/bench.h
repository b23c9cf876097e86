/*
 * epx bench, in parts: options (bench.c), who sends what where (bench_work.c), one rank's run (bench_rank.c), the check
 * of every row (bench_verify.c), table and JSON (bench_report.c).
 */
#ifndef EPX_TOOL_BENCH_H
#define EPX_TOOL_BENCH_H

#include "mem.h"
#include "options.h"
#include "ranks.h"

typedef enum bench_op { BENCH_DISPATCH, BENCH_DISPATCH_CACHED, BENCH_COMBINE, BENCH_LAYOUT, BENCH_OPS } bench_op_t;
extern const char *const bench_op_names[BENCH_OPS];
#define BENCH_OP_CHOICES "dispatch,dispatch_cached,combine,layout"

typedef struct bench_options {
    option_list_t ops;
    int backend; /* epx_backend_t's numbers: auto, cpu, cuda */
    long ranks, domains, threads;
    bool as_threads, own_memory, no_floor;
    long tokens, hidden, topk, experts;
    int dtype; /* pattern_format_t's numbers: bf16, fp16, fp32, fp8 (bytes, with scales as side data) */
    const char *routing, *net, *json;
    long iters, warmup, sms, seed, timeout_s;
} bench_options_t;

/* Everything about the routing of all ranks; made before the fork, the same for all. Own arithmetic: the library's
 * answers are compared with it. */
typedef struct bench_work {
    int ranks;
    uint32_t topk, experts, most_tokens, most_rows;
    uint32_t *tokens;                 /* [ranks] */
    uint64_t *first;                  /* [ranks] index of a rank's first token in the arrays below */
    uint64_t total;                   /* tokens of all ranks */
    int64_t *ids;                     /* [total][topk] */
    int32_t *expert_rank;             /* [experts] */
    int32_t *expert_local;            /* [experts] its number at its rank */
    uint32_t *local_experts;          /* [ranks] */
    int32_t *dst_rank, *dst_row;      /* [total][ranks]: ranks ascending, -1 padded; row there */
    uint32_t *recv_rows;              /* [ranks] */
    int32_t *matrix;                  /* [ranks][ranks] rows from i to j */
    uint64_t logical_rows, wire_rows; /* sums over all ranks; wire: without a rank's rows to itself */
    bool mapped;                      /* experts are not a multiple of the ranks: expert_rank goes to the library */
} bench_work_t;

/* 0, or an exit code after a line on stderr. May change topk, experts and tokens of the options (routing files). */
int bench_work_init(bench_work_t *work, bench_options_t *options);
void bench_work_fini(bench_work_t *work);

/* What the ranks write for the report; memory shared by all. */
typedef struct bench_result {
    char backend[16], net[64], floor_name[BENCH_OPS][96];
    char backend_why[200], domain_why[200], threads_why[200], net_why[200];
    int domains, threads, device;
    bool has_floor[BENCH_OPS]; /* measured in turn with each operation */
    uint64_t wrong[BENCH_OPS];
    double times[]; /* [2 * BENCH_OPS: the operations, then their floors][iters][ranks] us */
} bench_result_t;

typedef struct bench {
    bench_options_t options;
    bench_work_t work;
    bench_result_t *result;
    size_t row_bytes, side_bytes, floor_row_bytes;
    uint8_t *floor_shared;
    size_t floor_shared_bytes;
    uint8_t **floor_area; /* [ranks] in it */
} bench_t;

static inline double *bench_times(const bench_t *bench, int series, int iteration)
{
    return bench->result->times +
           ((size_t)series * (size_t)bench->options.iters + (size_t)iteration) * (size_t)bench->options.ranks;
}

/* A floor's operations: of the backend's memory (mem.h), or of the network's. */
typedef struct floor_ops {
    int (*variants)(void *floor, floor_kind_t kind);
    const char *(*variant_name)(void *floor, floor_kind_t kind, int variant);
    int (*run)(void *floor, floor_kind_t kind, int variant);
    void (*close)(void *floor);
    const char *(*words)(void);
} floor_ops_t;

/* bench_net.c: the floor between domains on the CPU. `net`: as the group names it, "ofi:tcp;ofi_rxm". Collective; 0, or
 * non-zero and words. */
int floor_net_open(const floor_plan_t *plan, const bench_work_t *work, const int32_t *domain_of, const char *net,
                   void **floor);
extern const floor_ops_t floor_net_ops;

/* One rank's objects. */
typedef struct bench_rank {
    rank_t *rank;
    const bench_t *bench;
    epx_group_info_t info;
    const mem_ops_t *mem;
    void *context;
    epx_stream_t stream;
    epx_buffer_t *buffer;
    uint32_t tokens, rows;
    uint64_t first;
    uint32_t generation; /* of the rows in x */
    void *x, *ids, *out, *y;
    uint8_t *side;
    float *weights;
    epx_lease_t y_lease;
    epx_place_t place; /* of the caller's memory; x NULL for leases */
    int32_t *layout_rank, *layout_expert;
    uint8_t *layout_in_rank;
    void *host; /* for copies out */
    size_t host_bytes;
    floor_ops_t floor_ops;
    void *floor;
} bench_rank_t;

int bench_rank_body(rank_t *rank); /* rank->user is a bench_t */

/* Kinds of pattern. */
enum { BENCH_X = 1, BENCH_SIDE, BENCH_WEIGHT, BENCH_Y };

/* Each adds the number of wrong rows to *wrong; non-zero when it could not look. */
int bench_verify_dispatch(bench_rank_t *self, epx_handle_t *handle, const epx_received_t *received, bool cached,
                          uint64_t *wrong);
int bench_verify_combine(bench_rank_t *self, uint64_t *wrong);
int bench_verify_layout(bench_rank_t *self, uint64_t *wrong);

/* Row `row` of what `rank` receives: who sent it. Iterate with the two cursors from 0, 0. */
bool bench_next_row(const bench_work_t *work, int rank, int *source, uint32_t *token);

int bench_report(const bench_t *bench);

#endif
