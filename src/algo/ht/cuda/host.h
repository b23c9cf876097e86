/* The host side of the exchange on GPUs: what exchange.c (its life) and halves.c (its operations) share. */
#ifndef EPX_ALGO_HT_CUDA_HOST_H
#define EPX_ALGO_HT_CUDA_HOST_H

#include <cuda_runtime_api.h>
#include <pthread.h>

#include "algo/exchange.h"
#include "algo/ht/cuda/ht_cuda.h"
#include "device/cuda/cuda_device.h"

typedef struct ht_cuda {
    epx__exchange_t *exchange;
    const epx__cuda_device_t *device;
    int ordinal, sms;  /* sms: the most one kernel may take, so that all ranks of this GPU are resident */
    int shared_max;    /* dynamic shared memory of a block */
    char *slab;        /* device memory, one allocation */
    char *pinned;      /* host memory that kernels see, one allocation */
    ht_state_t *state; /* device */
    ht_host_t *host;
    char **peers;                                                         /* device */
    int32_t *rank_of, *local_of, *expert_list, *expert_start, *domain_of; /* device; the first four with a map */
    uint32_t *produced, *consumed, *taken, *bit, *before, *expert_count;
    uint64_t *recv_max_of;
    uint32_t groups_max;
    uint32_t *works;      /* pinned, of check */
    ht_record_t *records; /* [handles_max] */
    uint64_t *tickets;    /* [handles_max] of each handle's last begin */
    uint64_t ticket;      /* of the last begin */
    /* Halves of a buffer run one after another, also when the caller changes streams. */
    cudaEvent_t order;
    cudaStream_t order_stream;
    bool ordered;
    cudaEvent_t *marks; /* [leases_max + handles_max] */
    bool *marked;
    uint32_t marks_count;
    atomic_uint bad_seen;
    /* Several domains; device memory but for the last ones. */
    ht_rails_t *rails; /* NULL with one domain */
    char **rail_member;
    int32_t *rail_rank_of, *rail_index_of;
    epx_port_channel_t *rail_channels;
    ht_rail_state_t *rail_state;
    uint64_t *rail_told, *rail_come, *rail_hands;
    uint32_t *rail_before;
    int32_t *try_result; /* pinned: status, peer */
    pthread_t watcher;
    bool watching;
    atomic_bool watch_stop;
} ht_cuda_t;

epx_status_t epx__ht_cuda_layout(epx__exchange_t *, const epx_layout_t *, const epx__experts_t *, epx_stream_t);
epx_status_t epx__ht_cuda_begin(epx__exchange_t *, epx__exchange_handle_t *, epx_stream_t);
epx_status_t epx__ht_cuda_counts(epx__exchange_t *, epx__exchange_handle_t *);
epx_status_t epx__ht_cuda_rows(epx__exchange_t *, epx__exchange_handle_t *, const epx_rows_t *, bool,
                               const epx__target_t *, epx_stream_t);
epx_status_t epx__ht_cuda_combine(epx__exchange_t *, epx__exchange_handle_t *, const epx_combine_t *, size_t,
                                  epx_stream_t);
epx_status_t epx__ht_cuda_barrier(epx__exchange_t *, epx_stream_t);
epx_status_t epx__ht_cuda_check(epx__exchange_t *, uint8_t *);

/* halves.c, for rail_host.c and low latency */
/* Where this call runs: device entered, order with the buffer's call before (of either mode, perhaps on another
 * stream). */
typedef struct epx__ht_scope {
    ht_cuda_t *h;
    cudaStream_t stream;
    int before;
    bool captured;
} epx__ht_scope_t;
epx_status_t epx__ht_cuda_open(epx__exchange_t *exchange, epx_stream_t stream, epx__ht_scope_t *s);
epx_status_t epx__ht_cuda_close(epx__ht_scope_t *s, int error, const char *what);
uint64_t epx__ht_cuda_mix(uint64_t hash, uint64_t value);
ht_common_t epx__ht_cuda_common(ht_cuda_t *h, enum epx__kind kind, uint32_t generation, uint64_t shape,
                                uint64_t timeout_ms);
uint32_t epx__ht_cuda_blocks(const ht_cuda_t *h, int asked, uint32_t otherwise);
uint64_t epx__ht_cuda_in_window(const epx__exchange_t *x, const void *memory, size_t bytes);

/* rail_host.c: several domains. */
epx_status_t epx__ht_cuda_rails_fill(ht_cuda_t *h); /* the device's table of the ways to other domains */
/* Collective, when everything is made: tries the channels, starts the thread that tells other domains of failures. */
epx_status_t epx__ht_cuda_rails_start(ht_cuda_t *h, epx_status_t made);
void epx__ht_cuda_rails_stop(ht_cuda_t *h);
/* The blocks of a rows kernel: fills rail_send, rail_pull and the cut; *blocks: all of them. */
epx_status_t epx__ht_cuda_rail_rows(const ht_cuda_t *h, int asked, const epx__row_shape_t *shape, ht_rows_t *p,
                                    uint32_t *blocks);
epx_status_t epx__ht_cuda_rail_combine(epx__exchange_t *, epx__exchange_handle_t *, const epx_combine_t *, size_t,
                                       epx_stream_t);

/* Before anything is freed, more than once is fine: what is under way, of either mode, has a deadline, and may end.
 * Then the abort word ends the waits of what has not, and of replayed graphs, whose streams are not known here. */
void epx__ht_cuda_stop(ht_cuda_t *h);
/* There have been so many ids that were none, ever. */
void epx__ht_cuda_bad_ids(ht_cuda_t *h, uint32_t bad);
/* A kernel's record, or words of a peer, into exchange->fault. Does not wait. */
void epx__ht_cuda_poll_fault(epx__exchange_t *exchange);

#endif
