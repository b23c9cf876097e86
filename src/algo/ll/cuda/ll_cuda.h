/*
 * Low latency on NVIDIA GPUs: what host code (C) and kernels (CUDA C) share. docs/PROTOCOL-LL.md is the protocol.
 *
 * A call is one kernel or two for dispatch and one or two for combine. Blocks wait for peers, never for each other. A
 * call's number is taken from device memory by the dispatch kernel, so that a graph can be replayed. Ids and weights
 * are their own arrival signals (the number is their upper half); each row has a flag word. What a kernel did for the
 * slot as a whole (`taken`, `combined`) is told by the buffer's next kernel, when it is certain and costs nothing.
 *
 * There are two sets of kernels: with flags (ll_dispatch.cu, ll_combine.cu), and in-band (ll_inband*), where each word
 * of a row is its own signal. A buffer uses one of them for all its calls, the same on all ranks (ll_host.c).
 */
#ifndef EPX_ALGO_LL_CUDA_LL_CUDA_H
#define EPX_ALGO_LL_CUDA_LL_CUDA_H

#include "algo/ht/cuda/ht_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LL_NONE 0xffffu /* local expert of an id that is not of this rank */
#define LL_SHARED_MOST 163840u
#define LL_THREADS 1024
#define LL_TEAM_WARPS 16u  /* warps that send one token */
#define LL_PIECE 1024u     /* elements of a row that a warp spreads */
#define LL_SUM_PIECE 512u  /* elements of a row that a warp adds */
#define LL_KIND_DISPATCH 6 /* for the words of a failure; after enum epx__kind */
#define LL_KIND_COMBINE 7

/* Device memory, one per buffer. Kernels of one buffer's low latency run one after another. */
typedef struct ll_state {
    uint64_t number;  /* of the last dispatch */
    uint32_t arrived; /* blocks of the running dispatch that have read it; 0 between kernels */
    uint32_t slot;    /* number % slots; in-band kernels alone keep it */
} ll_state_t;

/* A row to return: `row` of the caller's outputs (RANKED: the index of (source, token)) to `token` of `source`. */
typedef struct ll_back {
    int32_t row, source, token, place;
} ll_back_t;

/* What a call keeps between its kernels, device memory. */
typedef struct ll_record {
    uint64_t *number;     /* [2] and its slot, which in-band kernels alone keep */
    int32_t *pos;         /* [ranks * tokens_max][topk] row in the output of each choice, -1 not of this rank */
    float *weights;       /* likewise */
    ll_back_t *list;      /* expert outputs of other ranks' tokens, token-major */
    ll_back_t *rank_list; /* (source, token) pairs that came here, token-major, this rank's own too */
    uint32_t *list_count; /* [2] */
    uint32_t *decided;    /* [ranks] 0, 1 heard, 2 given up: the first to know decides for all blocks */
    uint32_t *asked;      /* [ranks] I sent to it */
    uint32_t *gone;       /* [ranks] given up or left out in combine */
} ll_record_t;

typedef struct ll_common {
    ht_common_t c;
    ll_state_t *state;
    ll_record_t r;
    uint32_t *masked;           /* device, [ranks] */
    uint32_t *gave_up;          /* pinned host memory, [ranks]: masked by a deadline */
    uint64_t *taken, *combined; /* [slots] to be told by the next kernel */
    uint64_t *owed;             /* [slots][ranks] the call in which that rank was given up there; 0 nobody */
    /* In-band kernels alone; 0 never. */
    uint64_t *spoilt;   /* [slots][ranks] from that call on, its rows' places there may hold what nobody took */
    uint64_t *unread;   /* [slots][ranks] the call whose outputs from it were pushed here, and not added yet */
    epx__experts_t map; /* device pointers */
    uint32_t hidden, topk, tokens, local_experts, slots;
    uint32_t mask_on_timeout, ranked; /* ranked: rank-major */
    int64_t *wait_ns;
    int bits;
    const void *topk_idx;
} ll_common_t;

typedef struct ll_dispatch {
    ll_common_t l;
    /* roles of blocks: [first, first + blocks); a block may have several and does them in this order */
    uint32_t ids_block, send_first, send_blocks, book_block, recv_first,
        recv_blocks;                  /* ids_block, book_block: ~0 none */
    uint32_t list_block, place_block; /* in-band kernels: parts of the books */
    uint32_t send, recv;              /* which halves this kernel does */
    uint32_t indexed;                 /* positions are in `index` already (large shapes) */
    uint32_t fp8, round_scale, ue8m0, stamp_shape;
    uint32_t parts, words; /* of the bitmaps: [parts][words] */
    char *index;           /* global: ids, bits, before; for large shapes */
    const char *x;
    const float *topk_weights;
    char *recv_x;
    uint32_t *recv_scales;
    int32_t *recv_count, *src_info, *recv_topk_idx, *expert_stats;
    int64_t *layout_range;
    float *recv_topk_weights;
} ll_dispatch_t;

typedef struct ll_combine {
    ll_common_t l;
    uint32_t send, recv, by_rank, pre_reduced;
    const char *x;
    const float *topk_weights;
    char *out;
    float *weight_left;
} ll_combine_t;

/* Bytes of ids, bitmaps and counts before each word. */
static inline uint64_t ll_index_bytes(uint64_t pairs, uint64_t parts, uint64_t words)
{
    return (pairs * 2 + 15) / 16 * 16 + parts * words * 4 + (parts * words * 4 + 15) / 16 * 16;
}

int epx__ll_launch_dispatch(const ll_dispatch_t *p, uint32_t blocks, uint32_t shared_bytes, void *stream);
int epx__ll_launch_combine(const ll_combine_t *p, uint32_t blocks, void *stream);
/* With in-band arrival (ll_inband.h): the same calls, every shape whose ids and bitmaps fit into shared memory. */
int epx__ll_launch_inband_dispatch(const ll_dispatch_t *p, uint32_t blocks, uint32_t shared_bytes, void *stream);
int epx__ll_launch_inband_combine(const ll_combine_t *p, uint32_t blocks, void *stream);
int epx__ll_load_inband_dispatch(void *stream);
int epx__ll_load_inband_combine(void *stream);
int epx__ll_load_dispatch(void *stream);
int epx__ll_load_combine(void *stream);

#ifdef __cplusplus
}
#endif

#endif
