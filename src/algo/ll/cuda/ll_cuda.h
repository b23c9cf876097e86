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
#define LL_RANKS_MOST 4096u /* a group has no more */
#define LL_TEAM_WARPS 16u   /* warps that send one token */
#define LL_PIECE 1024u      /* elements of a row that a warp spreads */
#define LL_SUM_PIECE 512u   /* elements of a row that a warp adds */
#define LL_KIND_DISPATCH 6  /* for the words of a failure; after enum epx__kind */
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
    /* With mask_on_timeout: what all pieces of a row do alike (ll_decide). */
    uint64_t *rows_in;   /* [ranks * tokens_max] of dispatch: 1 it came, 0 it did not */
    uint64_t *shares_in; /* [tokens_max] of combine: bits of the token's choices whose outputs came */
    uint64_t *home_to;   /* [ranks] of combine: 1 my outputs go to it, 0 it is left out */
    /* Between domains. The row at which outputs begin in `back`: [0] with a row a choice, [1] with a row a token. */
    uint32_t *first;       /* [2][ranks] each rank's in mine */
    uint32_t *first_there; /* [2][ranks] mine in each source's */
} ll_record_t;

/* What this rank has to say to a far rank in one slot: words by their place in epx__ll_words_t (algo/ll/net.h). */
enum { LL_DISPATCHED = 0, LL_COMBINED = 1, LL_TAKEN = 2, LL_LEFT_OUT = 3, LL_WORDS = 4 };
typedef struct ll_line {
    uint64_t want[LL_WORDS]; /* what its words should be */
    uint64_t told[LL_WORDS]; /* what they are once all that was pushed is applied */
    uint64_t put;            /* requests issued to it when the last put from this piece of `out` was pushed */
    uint64_t next;           /* home: the row of its outputs that the next piece begins with; 0 between kernels */
} ll_line_t;

/* Ways to the ranks of other domains (ll_far.cuh). A far rank is known by its place among them. */
typedef struct ll_far {
    uint32_t count;
    const int32_t *rank_of;             /* [count] */
    const epx_port_channel_t *channels; /* [count] */
    char *staging;                      /* pinned host memory: the window's low-latency part, as far ranks put it */
    char *out;                          /* pinned host memory, [slots][count] pieces: on their way out */
    uint64_t piece_bytes;
    ll_line_t *lines;   /* [slots][count] */
    uint32_t *pending;  /* [count] 1: some word is wanted and not told */
    uint32_t *agreed;   /* [count] what the blocks of the running kernel agreed on */
    uint32_t *arrived;  /* [count] of them have done their part; 0 between kernels */
    uint64_t *left_ns;  /* [count] when it was first seen that it takes nothing more; 0 it does */
    uint64_t *sent;     /* [count][2] bytes and puts, ever */
    uint64_t *sent_too; /* the same in pinned host memory */
} ll_far_t;

typedef struct ll_common {
    ht_common_t c;
    ll_state_t *state;
    ll_record_t r;
    uint32_t *masked;           /* device, [ranks] */
    uint32_t *gave_up;          /* pinned host memory, [ranks]: masked by a deadline */
    uint64_t *taken, *combined; /* [slots] to be told by the next kernel */
    uint64_t *owed;             /* [slots][ranks] the call in which that rank was given up there; 0 nobody */
    uint64_t *unread; /* [slots][ranks] the call whose outputs from it may come here, and are not added yet; 0 none */
    uint64_t *spoilt; /* in-band kernels alone, [slots][ranks]: from that call on, its rows' places there may hold what
                         nobody took; 0 never */
    const int32_t *place; /* device, [ranks] among the far ranks, -1 near; NULL: all are near */
    ll_far_t far;         /* with one domain nothing */
    epx__experts_t map;   /* device pointers */
    uint32_t hidden, topk, tokens, local_experts, slots;
    uint32_t mask_on_timeout, ranked; /* ranked: rank-major */
    uint32_t early;                   /* kernels are launched while the one before ends: ll_launch.cuh */
    int64_t *wait_ns;
    int bits;
    const void *topk_idx;
} ll_common_t;

typedef struct ll_dispatch {
    ll_common_t l;
    /* roles of blocks: [first, first + blocks); a block may have several and does them in this order */
    uint32_t ids_block, send_first, send_blocks, book_block, recv_first,
        recv_blocks;                             /* ids_block, book_block: ~0 none */
    uint32_t list_block, sum_block, place_block; /* in-band kernels: parts of the books */
    uint32_t send, recv;                         /* which halves this kernel does */
    uint32_t indexed;                            /* positions are in `index` already (large shapes) */
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

/*
 * Between domains, around the kernels above: `send` and `home` put what is for far ranks into `out` and push it; `take`
 * and `back` bring what has come to `staging` on into the own window, as if near ranks had stored it there. A far
 * rank's part in a call is a unit; it is shared by `parts` blocks.
 */
typedef struct ll_far_dispatch {
    ll_dispatch_t d;
    uint32_t parts, stride; /* stride: of a record's rows */
} ll_far_dispatch_t;

typedef struct ll_far_combine {
    ll_combine_t c;
    uint32_t parts;
} ll_far_combine_t;

/* Trying the channels, as ht_try_t. */
typedef struct ll_far_try {
    ll_far_t far;
    uint32_t memory;
    const uint64_t *barrier;
    uint64_t barrier_offset;
    int32_t rank;
    int32_t *status, *peer; /* pinned host memory */
} ll_far_try_t;

#ifndef LL_FAR_WARPS /* tests/emulate takes fewer */
#define LL_FAR_WARPS 16u
#endif
#define LL_FAR_THREADS (LL_FAR_WARPS * 32u)
#define LL_FAR_MOST 1024u /* ranks of other domains */
#define LL_FAR_PARTS 8u   /* blocks that share a unit, at most */

int epx__ll_launch_far_send(const ll_far_dispatch_t *p, uint32_t blocks, void *stream);
int epx__ll_launch_far_take(const ll_far_dispatch_t *p, uint32_t blocks, void *stream);
int epx__ll_launch_far_home(const ll_far_combine_t *p, uint32_t blocks, void *stream);
int epx__ll_launch_far_back(const ll_far_combine_t *p, uint32_t blocks, void *stream);
int epx__ll_launch_far_try(const ll_far_try_t *p, void *stream);
int epx__ll_load_far_dispatch(void *stream);
int epx__ll_load_far_combine(void *stream);

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
/* 1: they wait for the kernel before. 0: they were compiled for older GPUs, where they cannot, and where a driver that
 * makes code of older PTX cannot add it. */
int epx__ll_awaits_kernel_before(void);
int epx__ll_load_dispatch(void *stream);
int epx__ll_load_combine(void *stream);

#ifdef __cplusplus
}
#endif

#endif
