/* Low latency on GPUs, the host's side: what ll_host.c (its life) and ll_calls.c (its calls) share. */
#ifndef EPX_ALGO_LL_CUDA_LL_HOST_H
#define EPX_ALGO_LL_CUDA_LL_HOST_H

#include "algo/ll/cuda/ll_far_host.h"
#include "algo/ll/ll.h"

typedef struct ll_cuda {
    epx__exchange_t *exchange;
    ht_cuda_t *ht;
    char *slab;                /* device memory, one allocation */
    uint32_t *gave_up;         /* pinned host memory, [ranks] */
    uint8_t *masked_by_caller; /* [ranks] */
    ll_state_t *state;
    uint32_t *masked;
    uint64_t *taken, *combined, *owed, *spoilt, *unread;
    bool inband;          /* all calls of the buffer, on all ranks */
    bool early;           /* launched while the kernel before ends (ll_launch.cuh) */
    ll_record_t *records; /* [slots] */
    char **zero_copy;     /* [slots] */
    char *index;          /* for shapes that do not fit into shared memory; NULL: all fit */
    ll_far_host_t *far;   /* NULL: one domain */
} ll_cuda_t;

epx_status_t epx__ll_cuda_dispatch_send(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
epx_status_t epx__ll_cuda_dispatch_recv(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
epx_status_t epx__ll_cuda_dispatch(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
epx_status_t epx__ll_cuda_combine_send(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
epx_status_t epx__ll_cuda_combine_recv(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
epx_status_t epx__ll_cuda_combine(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
epx_status_t epx__ll_cuda_mask_set(epx__exchange_t *exchange, int rank, int masked, epx_stream_t stream);

#endif
