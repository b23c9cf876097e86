/*
 * Device memory as demo and bench see it: a table of operations, one for CPU memory (mem_cpu.c) and one for GPUs, which
 * lies in libepx_bench_cuda.so and is opened only when the group runs on GPUs (mem.c). That library exports
 *
 *     const mem_ops_t *epx_bench_mem(void);
 *
 * Functions that can fail return 0, or non-zero after writing words for `words`. One context belongs to one rank;
 * calls on it come from one thread.
 */
#ifndef EPX_TOOL_MEM_H
#define EPX_TOOL_MEM_H

#include <stddef.h>
#include <stdint.h>

#include "pattern.h"

#include <epx/epx.h>

enum { MEM_ABI = 4 };

/*
 * What the floor of dispatch and combine moves on one rank: the very (source row, destination row) list that the
 * library moves, with nothing to count or to wait for. Rows are row_bytes wide; received areas lie side by side.
 */
typedef struct floor_plan {
    int rank, ranks;
    int threads;                       /* CPU threads that copy for this rank in the library */
    uint32_t tokens;                   /* of this rank */
    const int32_t *dst_rank, *dst_row; /* host, [tokens][ranks]: ranks ascending, -1 padded, and the row there */
    const uint32_t *recv_rows;         /* host, [ranks]: rows each rank receives */
    size_t row_bytes;                  /* row and side data */
    uint32_t hidden;                   /* elements that combine adds */
    pattern_format_t format;
    const void *x;        /* device, [tokens][row_bytes], what dispatch sends */
    uint8_t *const *area; /* CPU: [ranks] the received area of each, shared by all, made before the fork */
    /* Or NULL. Ranks of other domains are in no list; their GPUs' memory is not opened, and nobody meets. */
    const int32_t *domain_of;
    uint8_t *const *out; /* CPU, combine: [tokens] where each sum goes; NULL: into memory of the floor's own */
    /* Host all-gather over the ranks, e.g. for memory handles: at most 512 bytes each. */
    int (*allgather)(void *context, const void *mine, size_t bytes, void *all);
    void *allgather_context;
} floor_plan_t;

/* A mem_ops knows the first two; the last one is the sum of low latency's (bench_ll_floor.c). */
typedef enum floor_kind { FLOOR_DISPATCH = 0, FLOOR_COMBINE = 1, FLOOR_PAIR = 2 } floor_kind_t;

/*
 * Host memory, pinned, in two parts, and copies between it and as much memory of the device, which the floor between
 * domains has beside the stream's work. A run is begin, then ready and landed as often as one likes until all is ready
 * and has landed, then end. None of them waits.
 */
typedef struct carry_ops {
    /* Each part and its twin on the device has `bytes`; `out` is what leaves the device, `in` what goes to it. */
    int (*open)(void *context, size_t bytes, void **carry, char **out, char **in);
    /* So many bytes of both are to be copied, after what the stream holds by now. */
    int (*begin)(void *carry, size_t out_bytes, size_t in_bytes);
    const char *(*ready)(void *carry, size_t *bytes); /* how many of `out` have come; NULL, or words */
    const char *(*landed)(void *carry, size_t bytes); /* so many of `in` may be copied, in all; NULL, or words */
    int (*end)(void *carry);                          /* the stream goes on when the copies are done */
    void (*close)(void *carry);
} carry_ops_t;

typedef struct mem_ops {
    uint32_t abi; /* MEM_ABI */
    const char *name;
    int (*open)(int device, void **context);
    void (*close)(void *context);
    const char *(*words)(void); /* of the thread's last failure */

    void *(*alloc)(void *context, size_t bytes); /* 256-byte aligned, zeroed, touched; NULL when there is none */
    void (*free)(void *context, void *memory);
    int (*copy_in)(void *context, void *device, const void *host, size_t bytes); /* done when they return */
    int (*copy_out)(void *context, void *host, const void *device, size_t bytes);
    int (*fill)(void *context, void *device, int byte, size_t bytes);

    epx_stream_t (*stream)(void *context); /* that the library's calls are made on */
    int (*sync)(void *context);
    int (*time_start)(void *context);            /* in the stream; then the call; then */
    int (*time_stop)(void *context, double *us); /* waits for the call's end */
    int (*chill)(void *context);                 /* makes the last-level cache cold; the CPU's does nothing */

    /* Graphs: what is enqueued between begin and end is recorded instead. The CPU's refuse in words. end is called
     * after every begin that went well; launch enqueues. */
    int (*graph_begin)(void *context);
    int (*graph_end)(void *context, void **graph);
    int (*graph_launch)(void *context, void *graph);
    void (*graph_free)(void *context, void *graph); /* NULL is fine */

    /* Floors. Collective over the ranks where open says so; a variant is one way of doing it, and the fastest counts.
     */
    int (*floor_open)(void *context, const floor_plan_t *plan, void **floor);
    int (*floor_variants)(void *floor, floor_kind_t kind);
    const char *(*floor_variant_name)(void *floor, floor_kind_t kind, int variant);
    int (*floor_run)(void *floor, floor_kind_t kind, int variant); /* enqueues, between time_start and time_stop */
    void (*floor_close)(void *floor);
    const carry_ops_t *carry; /* NULL: this memory is the host's */
} mem_ops_t;

/* The table for a resolved backend; NULL with `why` (one line, good until the thread asks again). */
const mem_ops_t *mem_ops_for(epx_backend_t backend, const char **why);

extern const mem_ops_t mem_ops_cpu;

#endif
