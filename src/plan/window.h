/*
 * What lies where in a rank's window. Pure. The same on every rank of a buffer, so that a peer's word is found by
 * offset alone. docs/PROTOCOL-HT.md says who writes and who reads each part.
 *
 *   [ control | errors | words | mailboxes | chunk words | reserve | leases | low latency (ll.h) ]
 *
 * All words that peers write are 8 bytes, 8-aligned, one writer each; each writer's words share no cache line with
 * another's.
 */
#ifndef EPX_PLAN_WINDOW_H
#define EPX_PLAN_WINDOW_H

#include <stddef.h>
#include <stdint.h>

#include <epx/epx.h>

#include "plan/ll.h"

#define EPX__LINE 64
#define EPX__PAGE 4096
#define EPX__ROW_ALIGN 256        /* of every array in a lease */
#define EPX__CUDA_CHUNK_WORDS 512 /* progress words a peer: 256 for rows put, 256 for rows taken (algo/ht/cuda) */

/* ---- control: at the window's start ---- */

/* An error that rank `from` tells this rank. `word` is written last (release): 0 none, else the status. */
typedef struct epx__error_slot {
    uint64_t word;
    uint64_t sequence;
    int32_t peer; /* whom the error is about, -1 nobody */
    int32_t status;
    char words[232];
} epx__error_slot_t;

typedef struct epx__control {
    uint64_t bell[8];  /* epx__bell_t (CPU) */
    uint64_t alarm[8]; /* [0]: not 0 when some error slot or fault is set. Idempotent: anyone may store 1 */
    uint64_t waits[8]; /* [0]: 1 + the rank that the owner waits for just now, 0 nobody (CPU). For the words of others
                          only: who waits for the owner says whom it waits for in turn */
} epx__control_t;

/* ---- mailboxes: [source][2], written by `source`; slot = sequence & 1 ---- */

enum epx__kind {
    EPX__KIND_BEGIN = 1,   /* counts */
    EPX__KIND_ROWS = 2,    /* dispatch_end, dispatch_again: where my rows may be written */
    EPX__KIND_COMBINE = 3, /* where my expert outputs may be read */
    EPX__KIND_BARRIER = 4,
    EPX__KIND_CHECK = 5
};

/* One half's message to one peer. `sequence` is written last (release). Offsets are in the sender's window. */
typedef struct epx__message {
    uint64_t sequence;   /* the half's number; grows by one a half, 1 is the first */
    uint32_t kind;       /* enum epx__kind */
    uint32_t generation; /* of the handle: epx__exchange_handle_t's tag */
    uint64_t shape;      /* hash of what both sides must agree on (row_bytes, topk, experts, dtype ...) */
    /* BEGIN */
    uint64_t tokens;   /* that the sender dispatches */
    uint64_t recv_max; /* recv_tokens_max of the sender; 0: exact mode */
    /* ROWS: where the reader's rows go. direct 1: `place` is the whole place of `capacity` rows, rows go to their final
     * rows. direct 0: `place` is the reader's own ring of `capacity` rows, row j goes to j modulo capacity. */
    uint64_t direct, place, capacity;
    /* COMBINE: where the reader's rows of x (and of the weights) are. An offset of 0: in the staging ring. */
    uint64_t x, x_stride;     /* row j at x + j * x_stride */
    uint64_t weights;         /* row j at weights + j * topk * 4 */
    uint64_t ring, ring_rows; /* staging ring of the reader's own: place layout of what is staged; ring 0: nothing is */
    uint64_t spare[2];
    /* BEGIN: int32_t to_rank[ranks], then int32_t to_expert[local experts of the reader]; with CUDA uint64_t from
     * EPX__COUNTS_OFFSET on (algo/ht/cuda/counts.cuh) */
} epx__message_t;

#define EPX__COUNTS_OFFSET ((sizeof(epx__message_t) + 15) / 16 * 16)

/* ---- words: written by the peer `from`, [ranks] lines each ---- */

typedef struct epx__words {
    uint64_t consumed; /* `from` has read my messages up to this sequence */
    uint64_t sent;     /* rows `from` has put into my lease or its ring here, ever (sum over operations) */
    uint64_t taken;    /* rows of mine that `from` has received or taken out of its ring, ever: my credit there */
    uint64_t staged;   /* combine: rows `from` has put up for me to read, ever */
    uint64_t read;     /* combine: rows of mine that `from` has read, ever */
    uint64_t closed;   /* 1: `from` has destroyed its buffer; nothing more will come */
    uint64_t spare[2];
} epx__words_t;

typedef struct epx__window_layout {
    uint32_t ranks;
    size_t control_offset;
    size_t errors_offset;      /* epx__error_slot_t [ranks] */
    size_t mail_offset;        /* [ranks][2] messages */
    size_t message_bytes;      /* of one slot */
    size_t words_offset;       /* epx__words_t [ranks] */
    size_t chunk_words_offset; /* uint64_t [ranks][chunk_words]: progress by chunk (CUDA) */
    uint32_t chunk_words;
    size_t reserve_offset, reserve_bytes;
    size_t lease_offset, lease_bytes;
    epx__ll_layout_t ll; /* after the leases; tokens_max 0: none */
    size_t total_bytes;
} epx__window_layout_t;

/* `chunk_words`: per source, 0 on the CPU. Refuses in words what does not fit 64 bits. */
epx_status_t epx__window_layout_make(uint32_t ranks, const epx_buffer_config_t *config, uint32_t chunk_words,
                                     epx__window_layout_t *layout);

/*
 * The arrays of a place that holds `capacity` rows: x, side, topk_idx, topk_weights, src_token, in this order, each
 * EPX__ROW_ALIGN-aligned, offsets from the place's start. Absent parts take nothing. Receivers and sources compute the
 * same from the message.
 */
typedef struct epx__place_layout {
    size_t x, side, topk_idx, topk_weights, src_token, total_bytes;
} epx__place_layout_t;

typedef struct epx__row_shape {
    size_t row_bytes, side_bytes;
    uint32_t topk;      /* 0: neither ids nor weights */
    uint32_t idx_bytes; /* 4 or 8 */
    uint32_t weights;   /* 1: topk_weights travel */
    uint32_t src_token; /* 1: src_token travels */
} epx__row_shape_t;

epx__place_layout_t epx__place_layout_make(const epx__row_shape_t *shape, uint64_t capacity);
/* The addresses of a place of `capacity` rows at `base`; NULL for parts that are absent. */
epx_place_t epx__place_at(uint8_t *base, const epx__row_shape_t *shape, uint64_t capacity);
/* Bytes one row takes in all its arrays together (without alignment). */
size_t epx__row_shape_bytes(const epx__row_shape_t *shape);
/* The most rows that fit `bytes`; 0 when none. */
uint64_t epx__place_capacity(const epx__row_shape_t *shape, size_t bytes);

#endif
