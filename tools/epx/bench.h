/*
 * epx bench, in parts: options (bench.c), who sends what where (bench_work.c), what every rank does (bench_rank.c), its
 * inputs (bench_fill.c), the loop that times (bench_time.c), table and JSON (bench_report.c). High throughput:
 * bench_ht.c, its check of every row bench_verify.c. Low latency: bench_ll.h.
 */
#ifndef EPX_TOOL_BENCH_H
#define EPX_TOOL_BENCH_H

#include "mem.h"
#include "options.h"
#include "place.h"
#include "ranks.h"

typedef enum bench_op {
    BENCH_DISPATCH,
    BENCH_DISPATCH_CACHED,
    BENCH_COMBINE,
    BENCH_LAYOUT,
    BENCH_LL_DISPATCH,
    BENCH_LL_COMBINE,
    BENCH_LL_PAIR,
    BENCH_OPS
} bench_op_t;
extern const char *const bench_op_names[BENCH_OPS];
#define BENCH_OP_CHOICES "dispatch,dispatch_cached,combine,layout,ll_dispatch,ll_combine,ll_pair"
/* Calls in one replay of a graph (--graph); ll_combine has one, since each needs the dispatch before it. */
enum { BENCH_GRAPH_CALLS = 24 };

typedef struct bench_options {
    option_list_t ops;
    int backend; /* epx_backend_t's numbers: auto, cpu, cuda */
    long ranks, domains, threads;
    bool as_threads, own_memory, no_floor;
    bool halves, pre_reduced, graph; /* of low latency */
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
    uint32_t *tokens;                       /* [ranks] */
    uint64_t *first;                        /* [ranks] index of a rank's first token in the arrays below */
    uint64_t total;                         /* tokens of all ranks */
    int64_t *ids;                           /* [total][topk] */
    int32_t *expert_rank;                   /* [experts] */
    int32_t *expert_local;                  /* [experts] its number at its rank */
    uint32_t *local_experts;                /* [ranks] */
    int32_t *dst_rank, *dst_row;            /* [total][ranks]: ranks ascending, -1 padded; row there */
    uint32_t *recv_rows;                    /* [ranks] */
    int32_t *matrix;                        /* [ranks][ranks] rows from i to j */
    uint64_t logical_rows, wire_rows;       /* sums over all ranks; wire: without a rank's rows to itself */
    uint64_t logical_choices, wire_choices; /* the same, counting a row for each chosen expert */
    bool mapped; /* experts are not a multiple of the ranks: expert_rank goes to the library */
} bench_work_t;

/* 0, or an exit code after a line on stderr. May change topk, experts and tokens of the options (routing files). */
int bench_work_init(bench_work_t *work, bench_options_t *options);
void bench_work_fini(bench_work_t *work);

/* What the ranks write for the report; memory shared by all. */
typedef struct bench_result {
    place_t place;
    char floor_name[BENCH_OPS][96];
    bool has_floor[BENCH_OPS]; /* measured in turn with each operation */
    uint64_t wrong[BENCH_OPS];
    double times[]; /* [2 * BENCH_OPS: the operations, then their floors][iters][ranks] us */
} bench_result_t;

typedef struct bench {
    bench_options_t options;
    bench_work_t work;
    bench_result_t *result;
    bool ll;                       /* the operations are those of low latency, else none is */
    pattern_format_t row_format;   /* of x */
    size_t row_bytes, side_bytes;  /* of x, and of its side data */
    size_t sent_bytes, back_bytes; /* of a row as dispatch and as combine move it */
    size_t floor_row_bytes;
    uint8_t *floor_shared;
    size_t floor_shared_bytes;
    uint8_t **floor_area; /* [ranks] in it; low latency: bench_ll.h */
} bench_t;

static inline double *bench_times(const bench_t *bench, int series, int iteration)
{
    return bench->result->times +
           ((size_t)series * (size_t)bench->options.iters + (size_t)iteration) * (size_t)bench->options.ranks;
}

/* Of a rank's area for the floor: what it takes for rows that are dispatched to it. */
static inline size_t bench_floor_rows_bytes(const bench_t *bench, int rank)
{
    return (bench->work.recv_rows[rank] * bench->floor_row_bytes + 4095) / 4096 * 4096;
}

/* A floor's operations: of the backend's memory (mem.h), or of the network's. */
typedef struct floor_ops {
    int (*variants)(void *floor, floor_kind_t kind);
    const char *(*variant_name)(void *floor, floor_kind_t kind, int variant);
    int (*run)(void *floor, floor_kind_t kind, int variant);
    void (*close)(void *floor);
    const char *(*words)(void);
} floor_ops_t;

enum { BENCH_MEMORY_MOST = 16 };

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
    void *floor;                     /* NULL: there is none */
    void *memory[BENCH_MEMORY_MOST]; /* by bench_get; freed with the rank */
    int memories;
} bench_rank_t;

int bench_rank_body(rank_t *rank); /* rank->user is a bench_t */

/* Device memory for as long as the rank lives, never of 0 bytes. NULL after words. */
void *bench_get(bench_rank_t *self, size_t bytes);

/* Everything after joining, by mode: buffer, memory, floor, operations. */
int bench_ht(bench_rank_t *self);
int bench_ll(bench_rank_t *self);

/* bench_net.c: the floor between domains, over libfabric ("ofi:..."). Collective; sets floor and floor_ops, or fails.
 */
int floor_net_open(bench_rank_t *self, const floor_plan_t *plan);

/* ---- inputs: rows with a number in every byte ---- */

/* Kinds of pattern. */
enum { BENCH_X = 1, BENCH_SIDE, BENCH_WEIGHT, BENCH_Y };

float bench_weight(const bench_t *bench, int source, uint32_t token, uint32_t k); /* of a token's k-th choice */
int bench_fill_routing(bench_rank_t *self);                                       /* ids and weights */
int bench_fill_x(bench_rank_t *self, uint32_t generation);
int bench_fill_y(bench_rank_t *self); /* high throughput: a row for each row that came */

/* ---- timing ---- */

/* An operation as the loop sees it. ready (may be NULL) and end are not timed. */
typedef struct bench_timed {
    bench_op_t op;
    floor_kind_t floor_kind;
    int calls; /* that one run holds: an iteration's time is divided by them */
    int (*ready)(bench_rank_t *self, void *call);
    int (*run)(bench_rank_t *self, void *call);
    void (*end)(bench_rank_t *self, void *call);
    void *call;
} bench_timed_t;

/* The operation and its floor in turn, a few passes each, so that both see the same machine. */
int bench_time(bench_rank_t *self, const bench_timed_t *timed);

/* ---- the check ---- */

/* A table of the device's as host memory; `keep` is freed by the caller. NULL when it failed. */
const void *bench_look(bench_rank_t *self, const void *device, size_t bytes, void **keep);

/* Each adds the number of wrong rows to *wrong; non-zero when it could not look. */
int bench_verify_dispatch(bench_rank_t *self, epx_handle_t *handle, const epx_received_t *received, bool cached,
                          uint64_t *wrong);
int bench_verify_combine(bench_rank_t *self, uint64_t *wrong);
int bench_verify_layout(bench_rank_t *self, uint64_t *wrong);

/* Row `row` of what `rank` receives: who sent it. Iterate with the two cursors from 0, 0. */
bool bench_next_row(const bench_work_t *work, int rank, int *source, uint32_t *token);

int bench_report(const bench_t *bench);

#endif
