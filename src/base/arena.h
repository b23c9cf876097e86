/*
 * Offsets in a piece of memory that somebody else owns: first fit, a bounded number of pieces, no allocation after
 * init. Freed neighbours join. Not thread-safe: the owner locks.
 */
#ifndef EPX_BASE_ARENA_H
#define EPX_BASE_ARENA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <epx/status.h>

typedef struct epx__arena_piece {
    size_t offset, bytes;
    bool used;
} epx__arena_piece_t;

typedef struct epx__arena {
    epx__arena_piece_t *pieces; /* in address order */
    uint32_t count, capacity;
    size_t align;
} epx__arena_t;

epx_status_t epx__arena_init(epx__arena_t *arena, size_t bytes, size_t align, uint32_t pieces_max);
void epx__arena_fini(epx__arena_t *arena);
/* EPX_E_BUSY in words when no piece is large enough, or the pieces are used up. */
epx_status_t epx__arena_take(epx__arena_t *arena, size_t bytes, size_t *offset);
void epx__arena_give(epx__arena_t *arena, size_t offset);
/* The used piece that covers [offset, offset + bytes), else NULL. */
const epx__arena_piece_t *epx__arena_find(const epx__arena_t *arena, size_t offset, size_t bytes);
size_t epx__arena_largest(const epx__arena_t *arena);

#endif
