/*
 * The low-latency part of a rank's window: fixed worst-case slots. Pure; shared with nvcc. docs/PROTOCOL-LL.md says who
 * writes and who reads each part.
 *
 *   [ words | sources | back | flags ]
 *
 *   words    [slots][ranks] lines, written by the peer
 *   sources  [slots][ranks], each a block of a source's top-k ids (and weights) of all its tokens, then [tokens_max]
 *            rows: a token's row has its own index, so nothing is counted before sending. A source in another domain
 *            puts all of it in one piece, a record: the block, and right behind it the rows that come here, in order
 *   back     [slots][tokens_max * topk_max] rows: expert outputs on their way home. algo/ll/cuda: by (token, place);
 *            the CPU: by the rank that they come from, each rank's by (token, place), without gaps
 *   flags  [slots][ranks][tokens_max] and [slots][tokens_max][topk_max] words, one a row place: the number of the call
 *          whose row lies there (algo/ll/cuda; the CPU has one word a source)
 */
#ifndef EPX_PLAN_LL_H
#define EPX_PLAN_LL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <epx/ll.h>

#include "plan/routing.h"

#define EPX__LL_TOKENS_MOST (1u << 20) /* of one rank */

/* One line a slot and peer: halves of calls in different slots may come in any order, so one line for all slots would
 * run ahead of a call that is late, or go back. Each word is the number of the last call it is true for; it only grows.
 */
typedef struct epx__ll_words {
    uint64_t dispatched; /* `from` has put ids and rows of that call here */
    uint64_t combined;   /* `from` has put its expert outputs of that call here */
    uint64_t taken;      /* `from` has taken out what I dispatched to it in that call: credit */
    uint64_t left_out;   /* `from` has left me out of that call, said instead of `combined`: no outputs came or will */
    uint64_t spare[4];
} epx__ll_words_t;

/* At the head of an ids block; then int32_t ids[tokens][topk], then float weights[tokens][topk] when flagged.
 * algo/ll/cuda: each value is a word of its own with the call's number in its upper half, so that it is its own arrival
 * signal: a word of the shape, at 64 bytes ids [tokens_max][topk], from the next multiple of 16 bytes on the weights.
 */
typedef struct epx__ll_block {
    uint64_t number;
    uint64_t shape; /* hash of hidden, topk, experts, format: the same on all ranks */
    uint32_t tokens;
    uint32_t weights;      /* 1: weights follow */
    uint32_t back_each;    /* the row of the source's `back` at which the reader's rows begin: a row a choice */
    uint32_t back_by_rank; /* the same when the reader adds first: a row a token */
    uint64_t spare[4];
} epx__ll_block_t;

/* Between domains (algo/ll/net.h): the memories that puts name, and the most words that one serving of a rank tells. */
enum { EPX__LL_NET_WINDOW = 0, EPX__LL_NET_OUT = 1, EPX__LL_NET_MEMORIES = 2 };
enum { EPX__LL_NET_WORDS = 4 }; /* each word of a line */

typedef struct epx__ll_layout {
    uint32_t ranks, tokens_max, hidden_max, topk_max, slots;
    size_t row_bytes;    /* of one row place, in rows and in back: a bf16 row; an fp8 row with its scales fits in it */
    size_t block_bytes;  /* of one ids block */
    size_t source_bytes; /* of one block and its rows */
    size_t words_offset, sources_offset, back_offset, row_flags_offset, back_flags_offset; /* in the window */
    size_t total_bytes;                                                                    /* of this part */
} epx__ll_layout_t;

/* `at`: where the part begins in the window. tokens_max 0: nothing. EPX_E_INVALID in words when it does not fit 64
 * bits. */
epx_status_t epx__ll_layout_make(uint32_t ranks, uint32_t tokens_max, uint32_t hidden_max, uint32_t topk_max,
                                 uint32_t slots, size_t at, epx__ll_layout_t *layout);

/* With `far` ranks in other domains: one piece of memory for what is on its way to one of them (algo/ll/net.h): a
 * source's place, and at least all choices of one token. */
EPX__INLINE size_t epx__ll_piece_bytes(const epx__ll_layout_t *l)
{
    size_t token = l->topk_max * l->row_bytes;
    return l->source_bytes > token ? l->source_bytes : token;
}

/* The largest tokens_max that takes at most `bytes` of a rank, of its window and for `far` ranks; 0: not even one. */
uint32_t epx__ll_tokens_fit(const epx__ll_layout_t *shape, uint32_t far, size_t bytes);
/* All that low latency takes of a rank; SIZE_MAX: more than 64 bits say. */
size_t epx__ll_bytes(const epx__ll_layout_t *l, uint32_t far);

EPX__INLINE size_t epx__ll_block_at(const epx__ll_layout_t *l, uint64_t slot, uint32_t source)
{
    return l->sources_offset + (size_t)(slot * l->ranks + source) * l->source_bytes;
}
EPX__INLINE size_t epx__ll_row_at(const epx__ll_layout_t *l, uint64_t slot, uint32_t source, uint32_t token)
{
    return epx__ll_block_at(l, slot, source) + l->block_bytes + (size_t)token * l->row_bytes;
}
/* `place`: the index of the chosen expert among the token's top-k, or of the rank among the token's ranks. */
EPX__INLINE size_t epx__ll_back_at(const epx__ll_layout_t *l, uint64_t slot, uint32_t token, uint32_t place)
{
    return l->back_offset + ((size_t)(slot * l->tokens_max + token) * l->topk_max + place) * l->row_bytes;
}
/* Between CPUs: row `k` of the slot, rows of `stride` bytes one after the other. */
EPX__INLINE size_t epx__ll_back_row_at(const epx__ll_layout_t *l, uint64_t slot, uint64_t k, size_t stride)
{
    return epx__ll_back_at(l, slot, 0, 0) + (size_t)k * stride;
}
/* In a record, from its start: the first row. */
EPX__INLINE size_t epx__ll_record_rows(uint32_t tokens, uint32_t topk, bool weights)
{
    return (sizeof(epx__ll_block_t) + (size_t)tokens * topk * (weights ? 8 : 4) + 15) / 16 * 16;
}
EPX__INLINE size_t epx__ll_words_at(const epx__ll_layout_t *l, uint64_t slot, uint32_t from)
{
    return l->words_offset + (size_t)(slot * l->ranks + from) * sizeof(epx__ll_words_t);
}
EPX__INLINE size_t epx__ll_row_flag_at(const epx__ll_layout_t *l, uint64_t slot, uint32_t source, uint32_t token)
{
    return l->row_flags_offset + ((size_t)(slot * l->ranks + source) * l->tokens_max + token) * 8;
}
EPX__INLINE size_t epx__ll_back_flag_at(const epx__ll_layout_t *l, uint64_t slot, uint32_t token, uint32_t place)
{
    return l->back_flags_offset + ((size_t)(slot * l->tokens_max + token) * l->topk_max + place) * 8;
}

#endif
