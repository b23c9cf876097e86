/*
 * epx, low-latency mode: for decoding, where few tokens move and every microsecond counts.
 *
 * No counts go ahead, no host waits: each call can be captured in a CUDA graph and replayed with other routing. A call
 * is whole or in two halves, so that computation can run in between:
 *
 *     epx_ll_dispatch_send   epx_ll_dispatch_recv   ... experts ...   epx_ll_combine_send   epx_ll_combine_recv
 *
 * A buffer is made for it with epx_buffer_config_t's ll_tokens_max (M) and ll_hidden_max. One copy of a token crosses
 * to each rank that wants it; the receiver spreads it to its experts. Notation: R ranks, L local experts, M =
 * ll_tokens_max, H = hidden, k = topk. The conventions of epx.h hold: "device" memory, streams, sizes, errors, threads.
 */
#ifndef EPX_LL_H
#define EPX_LL_H

#include <epx/epx.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct epx_ll_handle epx_ll_handle_t;

typedef enum epx_ll_format {
    EPX_LL_BF16 = 0, /* the same bits; GPUs, where EPX_LL_INBAND is not 0: but for eight NaNs 0xFFFF side by side, one
                        of which becomes 0xFFFE */
    EPX_LL_FP8 = 1   /* e4m3, a scale per 128 elements: max(amax, 1e-4) / 448 */
} epx_ll_format_t;

typedef enum epx_ll_order {
    EPX_LL_EXPERT_MAJOR = 0, /* rows of each local expert together */
    EPX_LL_RANK_MAJOR = 1    /* rows of each source rank, once each; the caller adds its experts itself */
} epx_ll_order_t;

typedef struct epx_ll_dispatch {
    size_t size;
    const void *x;        /* device, [tokens][H] bf16, rows 16-byte aligned */
    uint32_t tokens;      /* at most M; may be 0 */
    uint32_t hidden;      /* a multiple of 8; of 128 with FP8 (of 512 with ue8m0) */
    const void *topk_idx; /* device, [tokens][k], -1 is nobody */
    int topk_idx_bits;    /* 64 (default) or 32 */
    uint32_t topk, experts;
    const float *topk_weights; /* device, [tokens][k]; needed for a pre-reduced combine and for weights in rank-major
                                  order, else NULL, the same on all ranks */
    epx_ll_format_t format;
    int round_scale; /* FP8: scales rounded up to powers of two */
    int ue8m0;       /* FP8: scales as packed exponents, four to an int32 (implies round_scale) */
    epx_ll_order_t order;
    /* Outputs, device, the caller's memory. Rows come by (source rank, token index); what is past the counts is
     * untouched. */
    void *recv_x;      /* expert-major [L][R*M][H], rank-major [R*M][H]; e4m3 or bf16 */
    void *recv_scales; /* FP8: fp32 [L][H/128][R*M] (rank-major [H/128][R*M]); ue8m0: int32 [L][H/512][R*M]: the row is
                          the fastest index */
    int32_t *recv_count;      /* expert-major [L]: rows of each expert; rank-major [R]: rows of each source */
    int32_t *src_info;        /* expert-major [L][R*M], rank-major [R*M]: token index at its source */
    int64_t *layout_range;    /* [L][R] (begin << 32 | count) of each source's rows; rank-major [R]. May be NULL */
    int32_t *recv_topk_idx;   /* rank-major [R*M][k]: local expert numbers, -1 elsewhere; else NULL */
    float *recv_topk_weights; /* rank-major [R*M][k], with topk_weights given; else NULL */
    int32_t *expert_stats;    /* [L], += rows received; or NULL */
    int64_t *wait_ns;         /* [R], += nanoseconds waited for each source; or NULL */
    int sms;
    uint64_t timeout_ms; /* a rank that misses it is an error, or masked when the buffer says ll_mask_on_timeout */
} epx_ll_dispatch_t;

/* Whole calls. Collective. Enqueued on `stream`; results visible to later work on it. */
EPX_API epx_status_t epx_ll_dispatch(epx_buffer_t *buffer, const epx_ll_dispatch_t *dispatch, epx_stream_t stream,
                                     epx_ll_handle_t **handle);
/* Halves. The struct's memory is borrowed until the stream passes the recv half. EPX_E_BUSY: every slot of the ring is
 * owned by a handle that has not been combined or released (ll_slots of the buffer's configuration), or a rank that was
 * given up while the slot was in use is alive and may still write there. */
EPX_API epx_status_t epx_ll_dispatch_send(epx_buffer_t *buffer, const epx_ll_dispatch_t *dispatch, epx_stream_t stream,
                                          epx_ll_handle_t **handle);
EPX_API epx_status_t epx_ll_dispatch_recv(epx_ll_handle_t *handle, epx_stream_t stream);

typedef struct epx_ll_combine {
    size_t size;
    const void *x;   /* device, [L][R*M][H] bf16 as dispatched (rank-major dispatch: [R*M][H], already added by the
                        caller);   NULL: the caller has written epx_ll_combine_buffer's memory */
    int pre_reduced; /* each rank adds its own experts' weighted outputs first: one row per (token, rank) returns. Needs
                        topk_weights at dispatch */
    const void *topk_idx;      /* device, [tokens][k] of the dispatch, same width */
    const float *topk_weights; /* device, [tokens][k]; NULL: 1 for each (rank-major: always added unweighted) */
    void *out;                 /* device, [tokens][H] bf16 */
    float *weight_left;        /* device, [tokens]: sum of the weights whose ranks were not masked; or NULL */
    int64_t *wait_ns;          /* [R], += nanoseconds waited for each rank; or NULL */
    int sms;
    uint64_t timeout_ms;
} epx_ll_combine_t;

/*
 * out[t] = round(sum over j of topk_weights[t][j] * y[t][j]), products and sums in fp32 from +0, in top-k order,
 * y[t][j] the bf16 output of the j-th chosen expert; ids of -1 and masked ranks add nothing. Pre-reduced: each rank
 * rounds its own weighted sum (in top-k order) to bf16, and those are added in rank order.
 */
EPX_API epx_status_t epx_ll_combine(epx_ll_handle_t *handle, const epx_ll_combine_t *combine, epx_stream_t stream);
EPX_API epx_status_t epx_ll_combine_send(epx_ll_handle_t *handle, const epx_ll_combine_t *combine, epx_stream_t stream);
EPX_API epx_status_t epx_ll_combine_recv(epx_ll_handle_t *handle, epx_stream_t stream);

/* The handle's slot is free again, as it is once combined: a handle is combined once, and released or not after that.
 * After a dispatch that is not combined all ranks leave that combine out. After its send half: the slot's next dispatch
 * waits until the others have sent their outputs. NULL is fine. */
EPX_API void epx_ll_handle_release(epx_ll_handle_t *handle, epx_stream_t stream);

/* Memory for expert outputs that combine reads in place, [L][R*M][H] bf16, when the buffer was made with ll_zero_copy.
 */
EPX_API epx_status_t epx_ll_combine_buffer(epx_ll_handle_t *handle, void **memory);

/* A masked rank is neither sent to nor waited for; its tokens count 0. Local: every rank masks for itself. Takes effect
 * for calls made (or captured) later; `masked` [R] is host memory, 1 is masked. */
EPX_API epx_status_t epx_ll_mask_set(epx_buffer_t *buffer, int rank, int masked, epx_stream_t stream);
EPX_API epx_status_t epx_ll_mask_get(epx_buffer_t *buffer, int32_t *masked);
EPX_API epx_status_t epx_ll_mask_clear(epx_buffer_t *buffer, epx_stream_t stream);

/* What low latency of that shape takes, in bytes, without making anything. */
typedef struct epx_ll_plan {
    size_t size;
    /* in */
    uint32_t ranks, tokens_max, hidden, topk, experts, slots;
    /* out */
    uint64_t dispatch_bytes, combine_bytes, ids_bytes, words_bytes, window_bytes; /* window: all slots together */
    uint64_t zero_copy_bytes;                                                     /* ordinary memory, when asked for */
    uint64_t staging_bytes; /* pinned host memory, on GPUs in several domains: the window's rows, ids and words again */
} epx_ll_plan_t;
EPX_API epx_status_t epx_ll_plan(epx_ll_plan_t *plan);

#ifdef __cplusplus
}
#endif

#endif
