/*
 * epx: expert-parallel exchange.
 *
 * Moves the tokens of a Mixture-of-Experts layer to the ranks that hold their experts (dispatch) and
 * brings the experts' outputs back, summed (combine). The life of a program:
 *
 *     epx_group_create    who takes part            once
 *     epx_buffer_create   window, channels, pools   once, or a few
 *     epx_dispatch        rows out                  \
 *     ... the experts ...                            > every layer, every step
 *     epx_combine         rows back, summed         /
 *     epx_handle_release, epx_lease_release
 *     epx_buffer_destroy, epx_group_destroy
 *
 * Conventions, for the whole header:
 *   - Sizes are bytes where the name ends in _bytes, else elements. Indices count from 0.
 *   - A struct begins with `size`; set it to sizeof. A field that is zero means its default.
 *   - Outputs come last and are written on success only.
 *   - A function that fails has enqueued nothing and changed nothing, unless it says otherwise; the
 *     words are in epx_error_detail() of the calling thread.
 *   - "device" memory is GPU memory with the CUDA backend and any memory with the CPU backend.
 *   - A stream is a cudaStream_t with the CUDA backend. The CPU backend ignores it: a call returns
 *     when its work is done.
 *   - Collective calls are made by all ranks of the group, in the same order on each buffer.
 *   - Threads: one call at a time per buffer; buffers and groups are independent of each other.
 *   - Calls of one buffer run one after another, on whatever streams. Calls of two buffers of a GPU may be under way at
 *     once where it has SMs for both: `sms` that fit together. Else put them on one stream, in the same order on all
 *     ranks, or each may wait for one that waits for it, until the deadline.
 *   - A buffer, handle or lease that is no more (destroyed, released; its place taken again or not) is refused in
 * words.
 *   - Rows a rank receives come in the order (source rank, token index), always.
 */
#ifndef EPX_EPX_H
#define EPX_EPX_H

#include <stddef.h>
#include <stdint.h>

#include <epx/status.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EPX_VERSION_MAJOR 0
#define EPX_VERSION_MINOR 1
#define EPX_VERSION_PATCH 0

#if defined(__GNUC__)
#define EPX_API __attribute__((visibility("default")))
#else
#define EPX_API
#endif

#define EPX_TOPK_MAX 32 /* the most experts one token may choose */

typedef struct epx_group epx_group_t;
typedef struct epx_buffer epx_buffer_t;
typedef struct epx_handle epx_handle_t;
typedef void *epx_stream_t;
typedef uint64_t epx_lease_t; /* 0 is no lease */

typedef enum epx_backend { EPX_BACKEND_AUTO = 0, EPX_BACKEND_CPU = 1, EPX_BACKEND_CUDA = 2 } epx_backend_t;

/* Number formats that combine can add. Dispatch takes any bytes. */
typedef enum epx_dtype { EPX_DTYPE_DEFAULT = 0, EPX_BF16 = 1, EPX_FP16 = 2, EPX_FP32 = 3 } epx_dtype_t;

/* ---- errors, version ------------------------------------------------------------------------- */

/* Version as (major << 16 | minor << 8 | patch). */
EPX_API uint32_t epx_version(void);

/* "EPX_E_PEER", or "EPX_E_?" for a number that is no status. */
EPX_API const char *epx_status_name(epx_status_t status);

/* The code's general meaning, one line. */
EPX_API const char *epx_status_text(epx_status_t status);

/* What the last failing call of this thread complained of, in words; "" if none failed. Valid until the
 * thread's next epx call. */
EPX_API const char *epx_error_detail(void);

/* ---- group ----------------------------------------------------------------------------------- */

/* Names one rendezvous. Make it on one rank, give it to all by any means. It carries an address, a port
 * and a secret token: whoever has it can join. */
typedef struct epx_unique_id {
    unsigned char bytes[128];
} epx_unique_id_t;

/*
 * Make an id and listen behind it. The calling process must be the one in which rank 0 joins.
 *
 * address   numeric IP to listen on; NULL is 127.0.0.1 (all ranks on this host).
 */
EPX_API epx_status_t epx_unique_id_create(const char *address, epx_unique_id_t *id);

/* The caller's own all-gather: `mine` (bytes) of every rank lands in `all`, in rank order. Returns 0 on
 * success. Called only inside epx_group_create, by the calling thread. */
typedef int (*epx_allgather_fn)(void *context, const void *mine, size_t bytes, void *all);

/* Device numbers count from 1 in a config, so that 0 can mean "the default". */
#define EPX_DEVICE(ordinal) ((ordinal) + 1)

typedef struct epx_group_config {
    size_t size;
    /*
     * How the ranks find each other: `id` (with rank and ranks), or `allgather` (with rank and ranks), or
     * neither: then the rendezvous, and rank and ranks where they are not given, come from the environment that
     * torchrun, mpirun or srun made (docs/bootstrap.md), and a process with none of these is a group of one.
     */
    int rank;
    int ranks;
    const epx_unique_id_t *id;
    epx_allgather_fn allgather;
    void *allgather_context;
    epx_backend_t backend; /* AUTO: CUDA where a usable GPU is, else CPU */
    int device;            /* EPX_DEVICE(n); default: rank on this host modulo the number of GPUs */
    int ranks_per_domain;  /* split the found domains into smaller ones; default EPX_RANKS_PER_DOMAIN, or as found */
    const char *net;       /* network between domains, e.g. "ofi:tcp", "loop"; default EPX_NET */
    int threads;           /* CPU threads that copy for this rank; default EPX_THREADS, or cores / ranks on this host */
    uint64_t timeout_ms;   /* deadline of every wait; default EPX_TIMEOUT_MS (30000) */
} epx_group_config_t;

/*
 * Join the group. Collective.
 *
 * Returns   EPX_OK; EPX_E_INVALID; EPX_E_TIMEOUT (names the ranks that never came); EPX_E_MISMATCH (another
 *           build or configuration, on every rank); EPX_E_SYSTEM, EPX_E_NOMEM.
 */
EPX_API epx_status_t epx_group_create(const epx_group_config_t *config, epx_group_t **group);

/* Leave. Not collective, bounded; NULL is fine. Destroy the group's buffers first. */
EPX_API void epx_group_destroy(epx_group_t *group);

/* All ranks have called it. On the host; `timeout_ms` 0 is the group's. */
EPX_API epx_status_t epx_group_barrier(epx_group_t *group, uint64_t timeout_ms);

/* All-gather of `bytes` host bytes of every rank into all[ranks][bytes]. Collective; for set-up, not speed. */
EPX_API epx_status_t epx_group_allgather(epx_group_t *group, const void *mine, size_t bytes, void *all);

typedef struct epx_group_info {
    size_t size;
    int rank, ranks;
    int domains;              /* how many */
    int ranks_per_domain;     /* equal in all */
    int domain;               /* this rank's */
    int domain_index;         /* this rank's place in its domain */
    const int32_t *domain_of; /* [ranks]; valid while the group lives */
    epx_backend_t backend;
    int device;                                                   /* ordinal from 0; -1 with the CPU backend */
    int threads;                                                  /* CPU threads that copy for this rank */
    const char *backend_why, *domain_why, *threads_why, *net_why; /* one line each: why this choice */
    const char *net;                                              /* "none" with one domain */
} epx_group_info_t;

/* Fill `info` (set info->size first). */
EPX_API epx_status_t epx_group_get_info(const epx_group_t *group, epx_group_info_t *info);

/* ---- buffer ---------------------------------------------------------------------------------- */

typedef struct epx_buffer_config {
    size_t size;
    size_t lease_bytes;   /* window memory for leases; default EPX_LEASE_BYTES (512 MiB) */
    size_t reserve_bytes; /* window memory for rounds, the library's own; default EPX_RESERVE_BYTES (32 MiB, CUDA 64) */
    uint32_t tokens_max;  /* tokens of one dispatch on one rank; default 8192 */
    uint32_t topk_max;    /* default 16, at most EPX_TOPK_MAX */
    uint32_t experts_max; /* default 1024 */
    uint32_t handles_max; /* handles alive at once; default 64 */
    uint32_t leases_max;  /* leases alive at once; default 256 */
    /* Which rank holds which expert: host, [experts] ranks, copied. Default (NULL): experts are a multiple of
     * the ranks and come in equal consecutive blocks. A rank's local expert numbers follow ascending expert ids. */
    const int32_t *expert_rank;
    uint32_t experts; /* length of expert_rank */
    int sms;          /* CUDA: SMs per call; default by docs/PERFORMANCE.md's formula */
    uint64_t timeout_ms;
    /* Low latency (ll.h); all 0: the buffer has none. */
    uint32_t ll_tokens_max; /* M: tokens of one call on one rank */
    uint32_t ll_hidden_max; /* largest hidden of its rows */
    uint32_t ll_slots;      /* calls in flight; default 2 */
    int ll_zero_copy;       /* make the combine buffers */
    int ll_mask_on_timeout; /* a rank that misses a deadline of a low-latency call is masked instead of being an error;
                               CPU: so is one that dies or destroys its buffer */
} epx_buffer_config_t;

/* Make window, channels and pools. Collective; every rank passes the same configuration (timeout_ms and sms may
 * differ). Nothing is allocated after this. */
EPX_API epx_status_t epx_buffer_create(epx_group_t *group, const epx_buffer_config_t *config, epx_buffer_t **buffer);

/* Not collective, bounded whatever the peers do; NULL is fine. Leases and handles of the buffer die with it. CUDA: what
 * is under way may end, at its deadline at the latest. Not so replayed graphs, whose streams are not known here: wait
 * for those first. */
EPX_API void epx_buffer_destroy(epx_buffer_t *buffer);

/* EPX_OK, or the buffer's first failure (its words in epx_error_detail). A failed buffer can only be destroyed.
 * EPX_E_DATA (bad ids counted as -1) is told once and leaves the buffer usable. Does not wait. */
EPX_API epx_status_t epx_buffer_status(epx_buffer_t *buffer);

/* All ranks have come to this point of their streams. Collective. */
EPX_API epx_status_t epx_buffer_barrier(epx_buffer_t *buffer, epx_stream_t stream);

/* ---- layout ---------------------------------------------------------------------------------- */

typedef struct epx_layout {
    size_t size;
    const void *topk_idx; /* device, [tokens][topk] ids, -1 is nobody */
    int topk_idx_bits;    /* 64 (default) or 32 */
    uint32_t tokens, topk, experts;
    /* Outputs, device, each may be NULL. */
    int32_t *tokens_per_rank;   /* [ranks] */
    int32_t *tokens_per_domain; /* [domains] */
    int32_t *tokens_per_expert; /* [experts] */
    uint8_t *in_rank;           /* [tokens][ranks], 1 where the token goes to that rank */
} epx_layout_t;

/* Count where tokens would go. Local. */
EPX_API epx_status_t epx_layout(epx_buffer_t *buffer, const epx_layout_t *layout, epx_stream_t stream);

/* ---- dispatch -------------------------------------------------------------------------------- */

/* What one token carries. Borrowed until the stream passes the call. */
typedef struct epx_rows {
    const void *x;                   /* device, [tokens], rows 16-byte aligned */
    size_t row_bytes;                /* a multiple of 16 */
    size_t x_stride_bytes;           /* from row to row; default row_bytes */
    const void *side;                /* device, side data such as scales; NULL is none */
    size_t side_elem_bytes;          /* 1, 2, 4 or 8 */
    uint32_t side_elems;             /* per token; side_elem_bytes * side_elems is a multiple of 4 */
    int64_t side_token_stride_bytes; /* default side_elems * side_elem_bytes */
    int64_t side_elem_stride_bytes;  /* default side_elem_bytes */
} epx_rows_t;

typedef struct epx_dispatch {
    size_t size;
    epx_rows_t rows;
    uint32_t tokens; /* may be 0; then pointers may be NULL */
    /* Routing: top-k ids, or a mask. */
    const void *topk_idx; /* device, [tokens][topk], -1 is nobody; a token crosses once per destination rank */
    int topk_idx_bits;    /* 64 (default) or 32 */
    uint32_t topk;
    uint32_t experts;
    const float
        *topk_weights;      /* device, [tokens][topk], or NULL on all ranks; with 0 tokens any other pointer will do */
    const uint8_t *in_rank; /* device, [tokens][ranks]; used when topk is 0 */
    uint32_t expert_alignment; /* counts per expert are rounded up to it; default 1 */
    uint32_t recv_tokens_max;  /* worst-case mode: room for that many rows, no host wait; default: exact */
    int sms;
    uint64_t timeout_ms;
} epx_dispatch_t;

/* Where received rows go: all NULL is a lease. Memory of the caller's must hold as many rows as will come
 * (recv_tokens_max in the worst-case mode). A pointer that is NULL while `x` is given: that part is dropped. */
typedef struct epx_place {
    void *x;             /* device, [rows][row_bytes] */
    void *side;          /* device, [rows][side_elems] packed */
    void *topk_idx;      /* device, [rows][topk], as wide as the ids given */
    float *topk_weights; /* device, [rows][topk] */
    int32_t *src_token;  /* device, [rows] */
} epx_place_t;

typedef struct epx_received {
    size_t size;
    uint32_t rows;       /* rows that came; recv_tokens_max in the worst-case mode */
    void *x;             /* [rows][row_bytes] */
    void *side;          /* [rows][side_elems] packed, or NULL */
    void *topk_idx;      /* [rows][topk] local expert numbers, -1 for experts elsewhere and for tail rows; or NULL */
    float *topk_weights; /* [rows][topk], 0 where topk_idx is -1; or NULL */
    int32_t *src_token;  /* [rows] token index at its source; rows of one source are consecutive; tail rows -1 */
    epx_lease_t lease;   /* release it when done; 0 with the caller's memory */
} epx_received_t;

typedef struct epx_counts {
    size_t size;
    uint32_t rows; /* that this rank receives */
    uint32_t local_experts;
    const int32_t *rows_per_expert; /* [local_experts], (row, expert) pairs, rounded up to expert_alignment */
    const int32_t *rows_matrix;     /* [ranks][ranks]: [i][j] rows from i to j */
    const int32_t *tokens;          /* [ranks]: tokens each rank dispatched */
} epx_counts_t;                     /* host memory of the handle; valid until it is released */

/*
 * First half: exchange the counts. Collective.
 *
 * dispatch  copied; the memory its pointers name is borrowed until the stream passes epx_dispatch_end.
 * handle    the routing this call decided; combine and dispatch_again need it. Release it.
 * Returns   EPX_OK; EPX_E_INVALID; EPX_E_BUSY (no handle free); EPX_E_BROKEN; CPU also EPX_E_TIMEOUT, EPX_E_PEER,
 *           EPX_E_MISMATCH.
 */
EPX_API epx_status_t epx_dispatch_begin(epx_buffer_t *buffer, const epx_dispatch_t *dispatch, epx_stream_t stream,
                                        epx_handle_t **handle);

/* How many rows come. Waits on the host for the counts. Not in the worst-case mode under graph capture. */
EPX_API epx_status_t epx_handle_counts(epx_handle_t *handle, epx_counts_t *counts);

/*
 * Second half: the rows. Collective. Once per handle; later epx_dispatch_again.
 *
 * place     NULL, or a struct with x NULL: a lease; EPX_E_BUSY when the window has no room: bring memory instead.
 * Order     rows are visible to later work on `stream`.
 */
EPX_API epx_status_t epx_dispatch_end(epx_handle_t *handle, const epx_place_t *place, epx_stream_t stream,
                                      epx_received_t *received);

/* Both halves. In exact mode waits on the host for the counts. When only the second half
 * is refused here (EPX_E_BUSY: the window has no room), *handle is set all the same: the peers are in that half
 * already, so call epx_dispatch_end with other memory. */
EPX_API epx_status_t epx_dispatch(epx_buffer_t *buffer, const epx_dispatch_t *dispatch, const epx_place_t *place,
                                  epx_stream_t stream, epx_handle_t **handle, epx_received_t *received);

/* The same routing, other rows (of any row_bytes): the backward of combine, or a cached dispatch. No ids or weights
 * travel and received->topk_idx and topk_weights are NULL. No host wait. Collective. */
EPX_API epx_status_t epx_dispatch_again(epx_handle_t *handle, const epx_rows_t *rows, const epx_place_t *place,
                                        epx_stream_t stream, epx_received_t *received);

/* Give the handle back. Its memory is reused once `stream` has passed. NULL is fine. */
EPX_API void epx_handle_release(epx_handle_t *handle, epx_stream_t stream);

/* Tables for frontends that show the routing. Device memory of the handle; valid until it is released. */
typedef struct epx_handle_tables {
    size_t size;
    uint32_t tokens, rows, slots;
    const int32_t *dst_rank;    /* [tokens][slots] ranks ascending, -1 padded */
    const int32_t *dst_row;     /* [tokens][slots] row at that rank */
    const int32_t *src_token;   /* [rows] token index at its source (complete after dispatch_end) */
    const int32_t *rows_matrix; /* host, [ranks][ranks] */
    const int32_t *tokens_of;   /* host, [ranks] */
} epx_handle_tables_t;

EPX_API epx_status_t epx_handle_get_tables(epx_handle_t *handle, epx_handle_tables_t *tables);

/* ---- combine --------------------------------------------------------------------------------- */

typedef struct epx_combine {
    size_t size;
    const void *x;             /* device, [rows][hidden], as received; in a lease it is read in place by its owners */
    size_t x_stride_bytes;     /* default hidden * element size */
    epx_dtype_t dtype;         /* default EPX_BF16 */
    uint32_t hidden;           /* hidden * element size is a multiple of 16 */
    const float *topk_weights; /* device, [rows][topk], or NULL on all ranks; with 0 rows any other pointer will do */
    const void *bias[2];       /* device, [tokens][hidden] each, or NULL */
    void *out;                 /* device, [tokens][hidden] */
    float *out_topk_weights;   /* device, [tokens][topk]; needed with topk_weights */
    int sms;
    uint64_t timeout_ms;
} epx_combine_t;

/*
 * Bring every row back to its token and add: out[t] = sum over ranks of x rows of t, in rank order in fp32 inside a
 * domain, the partial sums in domain order, then the biases, rounded once to dtype. Collective. A handle may be
 * combined any number of times. `x` may be overwritten once the stream has passed the call.
 */
EPX_API epx_status_t epx_combine(epx_handle_t *handle, const epx_combine_t *combine, epx_stream_t stream);

/* ---- leases ---------------------------------------------------------------------------------- */

/* A piece of the window for expert outputs, so that combine reads it in place. 256-byte aligned. */
EPX_API epx_status_t epx_lease(epx_buffer_t *buffer, size_t bytes, epx_stream_t stream, epx_lease_t *lease,
                               void **memory);

/* Give it back; reused once `stream` has passed. 0 is fine. */
EPX_API epx_status_t epx_lease_release(epx_buffer_t *buffer, epx_lease_t lease, epx_stream_t stream);

/* ---- what there is --------------------------------------------------------------------------- */

/* EPX_OK if the backend can be used here; `why` gets one line either way (static memory). */
EPX_API epx_status_t epx_backend_usable(epx_backend_t backend, const char **why);

/* The environment variables, one by one: EPX_E_INVALID past the last. Strings are static; `value` is NULL when unset.
 */
typedef struct epx_env_entry {
    size_t size;
    const char *name, *value, *default_text, *meaning;
} epx_env_entry_t;
EPX_API epx_status_t epx_env_get(uint32_t index, epx_env_entry_t *entry);

/*
 * Send a pattern unique to (from, to, slot) through every channel slot between the ranks of this domain and look at
 * what came. Collective. works: host, [ranks], 1 where everything between that rank and this one came right; 0 for
 * ranks of other domains, which are not looked at (`epx check` sends rows to those).
 */
EPX_API epx_status_t epx_buffer_check(epx_buffer_t *buffer, uint8_t *works);

/* Bytes this rank has moved since the buffer was made. On GPUs those put on the network alone, the others stay 0: what
 * kernels move inside a domain is known to the GPU's own counters. */
typedef struct epx_traffic {
    size_t size;
    uint64_t local_bytes;  /* to itself */
    uint64_t domain_bytes; /* to ranks of its domain */
    uint64_t net_bytes;    /* payload put on the network */
    uint64_t net_puts;
} epx_traffic_t;
EPX_API epx_status_t epx_buffer_get_traffic(epx_buffer_t *buffer, epx_traffic_t *traffic);

/* ---- for frontends in an interpreted language ------------------------------------------------ */

/* An object of the interpreter, and how its lock is taken, a reference dropped, and the lock given back. For Python:
 * PyGILState_Ensure, Py_DecRef, PyGILState_Release. */
typedef struct epx_owner {
    int (*enter)(void);
    void (*drop)(void *object);
    void (*leave)(int state);
    void *object;
    const int *gone; /* not 0: the interpreter has ended; the object stays. May be NULL */
} epx_owner_t;

/* The deleter of a DLManagedTensor whose manager_ctx is an epx_owner_t: drops the object. In C, since tensors also die
 * while an exception is on its way, when the interpreter can run no function. */
EPX_API void epx_owner_drop(void *managed);

#ifdef __cplusplus
}
#endif

#endif
