/*
 * The exchange on NVIDIA GPUs: what host code (C) and kernels (CUDA C) share. docs/PROTOCOL-HT.md is the protocol;
 * its section on CUDA says what differs from the CPU.
 *
 * One half is one kernel. Its blocks wait for peers, never for each other (begin's grid barrier excepted, whose grid is
 * small enough to be resident). The last block to finish tells the peers, waits for them and advances the sequence
 * word.
 */
#ifndef EPX_ALGO_HT_CUDA_HT_CUDA_H
#define EPX_ALGO_HT_CUDA_HT_CUDA_H

#include "algo/rail_wire.h"
#include "plan/routing.h"
#include "plan/window.h"
#include <epx/device/port.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HT_WORDS (EPX__CUDA_CHUNK_WORDS / 2u) /* progress words per peer and direction */
#define HT_BATCH_LEAST 32u                    /* rows behind one progress word, where there is room */
#define HT_BATCH_GOOD 64u                     /* more words than 16 a ring, while there are so many behind each */
#define HT_WORD_SHIFT 20                      /* a progress word is sequence << 20 | batch + 1, so that it only grows */
#define HT_WARPS_MAX 16u
#define HT_SHARED_OWN 1024u /* bytes of shared memory that kernels have besides what they are launched with */
#define HT_DEST_BYTES 64u   /* a rank's line in the table of destinations (rows) and of sources (combine) */
#define HT_SOURCE_BYTES 40u
#define HT_SLOTS_BULK 32u /* rows of one token that combine loads by bulk copies; more go the plain way */

/* Where a half was when it failed. Texts in exchange.c, in this order. */
enum ht_stage {
    HT_STAGE_MAILBOX,  /* waiting for the peer to have read my last message but one */
    HT_STAGE_MESSAGE,  /* waiting for the peer's message */
    HT_STAGE_KIND,     /* the peer is in another operation */
    HT_STAGE_HANDLE,   /* ... in the same operation of another handle */
    HT_STAGE_SHAPE,    /* ... with other arguments */
    HT_STAGE_CREDIT,   /* waiting for room in the peer's ring */
    HT_STAGE_ARRIVAL,  /* waiting for the peer's rows */
    HT_STAGE_END,      /* waiting for the peer to end the half */
    HT_STAGE_BARRIER,  /* waiting for this kernel's other blocks */
    HT_STAGE_OVERFLOW, /* more rows than room */
    HT_STAGE_OWED,     /* low latency: the peer has not ended the slot's last call here and may still write there */
    HT_STAGE_TOLD,     /* a peer told of its failure */
    HT_STAGE_RAIL,     /* waiting for the message of the rail in another domain */
    HT_STAGE_COME,     /* waiting for what comes from another domain */
    HT_STAGE_ROOM,     /* waiting for credit of the rail */
    HT_STAGE_STAGED,   /* waiting for rows that the peer stages */
    HT_STAGE_CHANNEL,  /* waiting for room in the channel to a rank of another domain */
    HT_STAGE_GONE      /* the rank in another domain has left or cannot be reached */
};

/* In device memory, one per exchange. Kernels of one exchange run one after another. */
typedef struct ht_state {
    uint64_t sequence;    /* of the last half that ended; advanced by the last block */
    uint32_t blocks_done; /* blocks of the running kernel that finished; 0 between kernels */
    uint32_t barrier;     /* arrivals at begin's grid barrier; 0 between kernels */
    uint32_t fault;       /* 1: somebody has taken the right to write the host's record */
    uint32_t bad_ids;     /* ever */
    /* How often a warp has taken the next token, of rows (to send, to add) and of ids. 0 between kernels. */
    uint32_t taken_rows, taken_ids;
    uint32_t begun; /* combine that pushes: blocks that have begun. 0 between kernels */
} ht_state_t;

/* In pinned host memory that kernels see, one per exchange. */
typedef struct ht_host {
    uint32_t ready; /* written last: the record below is complete */
    uint32_t status, kind, stage;
    int32_t peer;
    uint32_t abort;   /* written by the host: end all waits */
    uint32_t bad_ids; /* ever; as of the last begin */
    uint32_t pad;
    uint64_t sequence, expected, seen, waited_ns;
} ht_host_t;

/* Another domain's rail: how many chunks have passed before this half, ever (what channels count from), and how far the
 * keeper is in this one. In device memory. */
typedef struct ht_rail_state {
    uint64_t sent_base, freed_base; /* advanced by the last block of a half */
    uint64_t arrived, freed;        /* the keeper's own, of the half: sequence << 32 | rows; chunks */
    uint64_t pushed;                /* the sending block's own: sequence << 32 | chunks */
} ht_rail_state_t;

/* The ways to other domains. In device memory, written once by the host; with one domain there is none. Streams are
 * numbered member * domains + domain. */
typedef struct ht_rails {
    int32_t domains, members, home, index;
    uint32_t tokens_max;
    epx__rails_layout_t layout;
    char *window;                       /* own rails window: host memory */
    char *const *member;                /* [members] those of the domain */
    const int32_t *rank_of;             /* [domains][members] */
    const int32_t *domain_of;           /* [ranks] */
    const int32_t *index_of;            /* [ranks] */
    const epx_port_channel_t *channels; /* [domains][EPX__RAIL_CHANNELS] */
    ht_rail_state_t *state;             /* [domains] */
    uint64_t *told;                     /* [members][domains] keeper: taken, as told */
    uint64_t *come;                     /* [members][domains] keeper, for the pulling blocks: arrived */
    uint64_t *hands;                    /* [members * domains][HT_HANDS] rows each hand has done of a stream */
    uint32_t *before;                   /* [domains][groups_max] scratch of begin */
} ht_rails_t;

#define HT_HANDS 64u /* blocks that share a stream, at most */

/* What every kernel gets. */
typedef struct ht_common {
    int32_t rank, ranks;
    char *window;       /* own */
    char *const *peers; /* device, [ranks]: their windows as this device sees them */
    epx__window_layout_t layout;
    ht_state_t *state;
    ht_host_t *host;
    uint32_t *produced; /* [ranks][HT_WORDS] rows put towards that peer, of a batch under way; 0 when it is complete */
    uint32_t *consumed; /* likewise: rows taken */
    uint32_t *taken;    /* [ranks] how often a warp has taken the next row of that peer to move. 0 between kernels */
    const ht_rails_t *rails; /* device; NULL with one domain */
    uint64_t timeout_ns;
    uint32_t kind, generation;
    uint64_t shape;
} ht_common_t;

/* One handle's arrays, device memory. begin writes them, later halves read them. */
typedef struct ht_record {
    int32_t *dst_rank, *dst_row; /* [tokens][slots] */
    int32_t *matrix;             /* [ranks][ranks] */
    int32_t *tokens_of;          /* [ranks] */
    int32_t *first;              /* [ranks] my first row there */
    int32_t *start;              /* [ranks] its first row here */
    int32_t *src_token;          /* [src_rows] */
    uint64_t src_rows;
    uint32_t slots;
    /* Several domains. */
    int32_t *cross_count; /* [domains] my tokens that go there */
    int32_t *cross_token; /* [domains][tokens_max] which, ascending */
    int32_t *cross_at;    /* [domains][tokens_max] and back: place of a token among them, -1 */
    int32_t *in_count;    /* [members][domains] tokens of (d, i) that come to my domain */
    int32_t *pull_row;    /* [ranks][tokens_max] my rows of each source elsewhere: place in its crossing */
    int32_t *pull_token;  /* the same: its token */
    int32_t *sum_row;     /* [domains][tokens_max][members] of my rails' tokens: row at each member, -1 */
    int32_t *sum_first;   /* [domains][members] first row of my rail there at each member */
    /* Pinned host memory: what the host waits for. Each word is the number that this begin was launched with << 32 and
     * a count: the matrix, tokens of each rank, ids ever that were none, rows of each local expert. */
    uint64_t *host_words;
} ht_record_t;

#define HT_HOST_TOKENS(ranks) ((size_t)(ranks) * (size_t)(ranks))
#define HT_HOST_BAD(ranks) (HT_HOST_TOKENS(ranks) + (size_t)(ranks))
#define HT_HOST_EXPERTS(ranks) (HT_HOST_BAD(ranks) + 1)

typedef struct ht_begin {
    ht_common_t c;
    ht_record_t h;
    epx__experts_t map;          /* device pointers */
    const int32_t *expert_list;  /* with a map: experts by (rank, local number); NULL otherwise */
    const int32_t *expert_start; /* [ranks + 1] into it */
    const void *topk_idx;
    const uint8_t *in_rank;
    uint32_t tokens, topk, alignment, groups_max;
    int bits;
    uint64_t recv_max;
    uint64_t ticket;
    /* scratch */
    uint32_t *bit;          /* [ranks][groups_max] which of 32 tokens go there */
    uint32_t *before;       /* [ranks][groups_max] how many of earlier groups do */
    uint32_t *expert_count; /* [experts] zero between kernels */
    uint64_t *recv_max_of;  /* [ranks] */
} ht_begin_t;

/* How a kernel's shared memory is cut: each warp has `stages` stages of `stage_bytes`. */
typedef struct ht_cut {
    uint32_t warps, stages, stage_bytes;
    uint32_t chunk_bytes, chunks; /* of a row's payload */
    uint32_t bars_offset, table_offset, total_bytes;
} ht_cut_t;

typedef struct ht_rows {
    ht_common_t c;
    ht_record_t h;
    epx__experts_t map;
    ht_cut_t cut;
    uint32_t tokens, topk, batch; /* batch: rows behind a progress word; 0 asks for none (a lease) */
    int bits;
    uint32_t first, own;  /* first: ids, weights and source tokens travel; own: the caller's memory */
    uint32_t send_blocks; /* the others copy out */
    uint32_t send_warps;  /* of a block's cut.warps; the others have nothing to send */
    /* what travels */
    const char *x, *side;
    uint64_t row_bytes, x_stride;
    uint32_t side_bytes, side_elems, side_elem_bytes, side_bulk;
    int64_t side_token_stride, side_elem_stride;
    const void *topk_idx;
    const float *topk_weights;
    epx__row_shape_t row_shape; /* of what travels */
    /* where it lands */
    uint64_t direct, place_offset,
        capacity; /* whole place; else rings of `capacity` rows at place_offset + i * ring_bytes */
    uint64_t ring_bytes;
    epx_place_t place; /* final arrays */
    uint64_t tail_to;  /* rows of the place: ids behind the last row are set to -1; 0: no tail */
    /* Several domains: after the near_blocks of the domain come rail_send, rail_pull and one keeper. */
    uint32_t near_blocks, rail_send, rail_pull;
    epx__rail_cut_t rail_cut;
} ht_rows_t;

typedef struct ht_combine {
    ht_common_t c;
    ht_record_t h;
    ht_cut_t cut;                             /* for adding */
    uint32_t threads;                         /* warps that push, if any, and one more; cut.warps of them add */
    uint32_t tokens, topk, batch, slots_bulk; /* slots_bulk 0: the plain way */
    uint32_t push_blocks;                     /* the first ones push, then add; the others add */
    int dtype;
    uint64_t row_bytes, x_stride;
    const char *x;
    uint64_t x_offset;       /* in the window; 0: elsewhere, pushed */
    const float *weights;    /* or NULL */
    uint64_t weights_offset; /* likewise */
    const char *bias[2];
    char *out;
    float *out_weights;
    /* rings in my reserve, one per peer in rank order */
    uint64_t ring_offset, ring_bytes, ring_rows, ring_weights;
} ht_combine_t;

/* Combine with several domains: blocks stage, sum for rails, add for the owner, and one keeper, in this order. */
typedef struct ht_rail_combine {
    ht_common_t c;
    ht_record_t h;
    uint32_t tokens, topk;
    uint32_t stage_blocks, rail_blocks, owner_blocks;
    uint32_t shared_bytes;
    int dtype;
    uint64_t row_bytes, x_stride;
    const char *x;
    uint64_t x_offset;    /* in the window; 0: elsewhere, staged */
    const float *weights; /* or NULL */
    uint64_t weights_offset;
    const char *bias[2];
    char *out;
    float *out_weights;
    /* rings in the own reserve, one per (reader, domain); the readers cut theirs alike */
    uint64_t ring_offset, ring_bytes, ring_rows, ring_weights;
    epx__rail_cut_t cut;
} ht_rail_combine_t;

#define HT_LENDER_BYTES 64u

typedef struct ht_check {
    ht_common_t c;
    uint32_t *works; /* pinned host memory, [ranks]; grows by one for each right half */
} ht_check_t;

typedef struct ht_layout {
    epx__experts_t map;
    const int32_t *domain_of; /* device, [ranks] */
    const void *topk_idx;
    int bits;
    uint32_t tokens, topk, ranks;
    int32_t *tokens_per_rank, *tokens_per_domain, *tokens_per_expert;
    uint8_t *in_rank;
} ht_layout_t;

/* Launchers: 0, or a cudaError_t. They enqueue and return. */
int epx__ht_launch_begin(const ht_begin_t *p, uint32_t blocks, void *stream);
int epx__ht_launch_rows(const ht_rows_t *p, uint32_t blocks, void *stream);
int epx__ht_launch_combine(const ht_combine_t *p, uint32_t blocks, void *stream);
int epx__ht_launch_barrier(const ht_common_t *c, void *stream);
int epx__ht_launch_check(const ht_check_t *p, void *stream);
int epx__ht_launch_layout(const ht_layout_t *p, void *stream);
/* Load every kernel now, on the current device, allow it `shared_bytes` of shared memory, and launch it with nothing to
 * do. */
int epx__ht_load_begin(void *stream);
int epx__ht_load_small(void *stream);
int epx__ht_load_rows(uint32_t shared_bytes, void *stream);
int epx__ht_load_combine(uint32_t shared_bytes, void *stream);
int epx__ht_load_rail_combine(uint32_t shared_bytes, void *stream);
int epx__ht_load_try(void *stream);

/* rail_combine.cu */
int epx__ht_launch_rail_combine(const ht_rail_combine_t *p, uint32_t blocks, void *stream);
/* rail.cu: one add to the rails' barrier words on every channel, and wait for theirs: connects what connects late. */
typedef struct ht_try {
    const ht_rails_t *rails;
    uint32_t memory;         /* number of the host block as a memory of the channels */
    const uint64_t *barrier; /* the block's barrier words, a line each, by rank * channels + channel */
    uint64_t barrier_offset; /* of the first in the block */
    int32_t rank;
    int32_t *status; /* pinned host memory: epx_status_t, and */
    int32_t *peer;   /* whom it is about */
} ht_try_t;
int epx__ht_launch_try(const ht_try_t *p, void *stream);

#ifdef __cplusplus
}
#endif

#endif
