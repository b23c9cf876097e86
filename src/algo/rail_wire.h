/*
 * What rails agree on, for C and for kernels: messages, the words of a domain, where things lie in a rails window, and
 * how a ring is cut. Plain structs and arithmetic. docs/PROTOCOL-NET.md is the protocol.
 */
#ifndef EPX_ALGO_RAIL_WIRE_H
#define EPX_ALGO_RAIL_WIRE_H

#include "plan/routing.h" /* EPX__INLINE */

enum { EPX__RAIL_MESSAGES = 0, EPX__RAIL_DATA = 1, EPX__RAIL_CREDIT = 2, EPX__RAIL_CHANNELS = 3 };
/* Memories of the channels: the rails window; the buffer's, not on GPUs. */
enum { EPX__RAILS_MEMORY_RAILS = 0, EPX__RAILS_MEMORY_WINDOW = 1 };
enum { EPX__RAIL_INBOX = 4 }; /* messages deep: no rank is more than two halves ahead of its domain, nor of its rails */

#define EPX__RAIL_CHUNK_BYTES (512u << 10)
#define EPX__RAIL_SLOTS_MAX 32u /* below the channels' window: a push never waits */

/* What rank `domain index` i writes here about the stream of domain d, and what others write back. CPU: rows, ever.
 * CUDA: sequence << 32 | rows of that half. */
typedef struct epx__rail_words {
    uint64_t arrived; /* dispatch: rows of (d, i) that lie in i's receive ring or did */
    uint64_t taken;   /* dispatch: rows of my receive ring d that i needs no more */
    uint64_t staged;  /* combine: rows that i has put up for me to sum, for domain d's token */
    uint64_t read;    /* combine: rows of mine that i has read, for domain d's tokens */
    uint64_t spare[4];
} epx__rail_words_t;

/* Header of a rail's message. BEGIN is followed by: int32_t counts[ranks], int32_t experts[experts] (by global id),
 * int32_t token[crossing], uint8_t mask[crossing][mask_bytes] of the ranks in the reader's domain. */
typedef struct epx__rail_message {
    uint64_t sequence, shape, tokens, recv_max;
    uint32_t kind, generation, crossing, experts;
    uint64_t x_place; /* ROWS: where in my window your rows go, x alone, one after the other; 0: through the ring */
    uint64_t spare;
} epx__rail_message_t;

typedef struct epx__rails_layout {
    size_t words, inbox, outbox, receive, send, total;
    size_t message_bytes, ring_bytes;
    size_t mask_bytes; /* of one token's ranks in a domain */
} epx__rails_layout_t;

/* Message slot of one domain in the inbox; the same in the outbox. */
EPX__INLINE size_t epx__rail_slot(const epx__rails_layout_t *layout, int domain, uint64_t sequence)
{
    return ((size_t)domain * EPX__RAIL_INBOX + sequence % EPX__RAIL_INBOX) * layout->message_bytes;
}

/* How a ring is cut for records of `stride` bytes: row k lies in slot k / rows_per_chunk % slots. */
typedef struct epx__rail_cut {
    size_t stride;
    uint32_t rows_per_chunk, slots;
} epx__rail_cut_t;

/* False: a record does not fit the ring. */
EPX__INLINE bool epx__rail_cut_make(size_t ring_bytes, size_t stride, epx__rail_cut_t *cut)
{
    size_t most = ring_bytes / 4 < EPX__RAIL_CHUNK_BYTES ? ring_bytes / 4 : EPX__RAIL_CHUNK_BYTES;
    cut->stride = stride;
    cut->rows_per_chunk = cut->slots = 1;
    if (stride == 0)
        return true;
    if (stride > ring_bytes)
        return false;
    if (most / stride > 1)
        cut->rows_per_chunk = (uint32_t)(most / stride);
    size_t slots = ring_bytes / (stride * cut->rows_per_chunk);
    cut->slots = slots < EPX__RAIL_SLOTS_MAX ? (uint32_t)slots : EPX__RAIL_SLOTS_MAX;
    return true;
}
/* Offset of record k in the ring. */
EPX__INLINE size_t epx__rail_at(const epx__rail_cut_t *cut, uint32_t k)
{
    size_t slot = k / cut->rows_per_chunk % cut->slots;
    return (slot * cut->rows_per_chunk + k % cut->rows_per_chunk) * cut->stride;
}
/* Chunks that `rows` records make. */
EPX__INLINE uint32_t epx__rail_chunks(const epx__rail_cut_t *cut, uint32_t rows)
{
    return rows / cut->rows_per_chunk + (rows % cut->rows_per_chunk ? 1 : 0);
}
/* Chunks that may be given back when `rows` of `total` are done with: whole ones, and the last. */
EPX__INLINE uint32_t epx__rail_whole_chunks(const epx__rail_cut_t *cut, uint32_t rows, uint32_t total)
{
    return rows == total ? epx__rail_chunks(cut, rows) : rows / cut->rows_per_chunk;
}
/* Rows that have come in `chunks` chunks. */
EPX__INLINE uint32_t epx__rail_come(const epx__rail_cut_t *cut, uint64_t chunks, uint32_t total)
{
    return chunks * cut->rows_per_chunk < total ? (uint32_t)(chunks * cut->rows_per_chunk) : total;
}
/* Consecutive records that are in the ring together wherever they begin: a reader that gives back nothing before it has
 * seen so many does not wait for itself. */
EPX__INLINE uint32_t epx__rail_together(const epx__rail_cut_t *cut)
{
    return (cut->slots - 1) * cut->rows_per_chunk + 1;
}

/* Places in a sorted list below `value`. */
EPX__INLINE uint32_t epx__rail_below(const int32_t *list, uint32_t count, int32_t value)
{
    uint32_t low = 0, high = count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (list[middle] < value)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Rows by several hands: hand h of `hands` does rows h, h + hands, ... in order and has done `done` of them. Its first
 * row that is not done; the least of all hands bounds what is done. */
EPX__INLINE uint32_t epx__rail_undone(uint32_t hand, uint32_t hands, uint32_t done)
{
    return hand + done * hands;
}
/* How much of a stream a reader needs no more: `next` of its `count` rows (at list[0 .. count - 1]) is the first that
 * is not out, `come` rows have come. */
EPX__INLINE uint32_t epx__rail_needless(const int32_t *list, uint32_t count, uint32_t next, uint32_t come)
{
    return next >= count || (uint32_t)list[next] > come ? come : (uint32_t)list[next];
}

#endif
