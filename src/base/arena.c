/*
 * First-fit offsets. The pieces tile [0, size) in address order: no gaps, no two free neighbours. Every piece
 * begins at a multiple of `align` and is a multiple of it long.
 */
#include "base/arena.h"

#include <string.h>

#include "base/alloc.h"
#include "base/fail.h"
#include "base/log.h"

epx_status_t epx__arena_init(epx__arena_t *arena, size_t bytes, size_t align, uint32_t pieces_max)
{
    if (!align || (align & (align - 1)))
        return epx__fail(EPX_E_INVALID, "arena: alignment %zu must be a power of two", align);
    if (!pieces_max)
        return epx__fail(EPX_E_INVALID, "arena: at least one piece is needed");
    size_t usable = bytes & ~(align - 1);
    epx__arena_piece_t *pieces = epx__calloc(pieces_max, sizeof(*pieces));
    if (!pieces)
        return epx__fail(EPX_E_NOMEM, "arena: no memory for the table of %u pieces", pieces_max);
    pieces[0].bytes = usable;
    *arena = (epx__arena_t){.pieces = pieces, .count = usable ? 1 : 0, .capacity = pieces_max, .align = align};
    return EPX_OK;
}

void epx__arena_fini(epx__arena_t *arena)
{
    epx__free(arena->pieces);
    memset(arena, 0, sizeof(*arena));
}

static void insert_after(epx__arena_t *arena, uint32_t at)
{
    epx__arena_piece_t *pieces = arena->pieces;
    memmove(&pieces[at + 2], &pieces[at + 1], (arena->count - at - 1) * sizeof(*pieces));
    arena->count++;
}

static void remove_piece(epx__arena_t *arena, uint32_t at)
{
    epx__arena_piece_t *pieces = arena->pieces;
    memmove(&pieces[at], &pieces[at + 1], (arena->count - at - 1) * sizeof(*pieces));
    arena->count--;
}

epx_status_t epx__arena_take(epx__arena_t *arena, size_t bytes, size_t *offset)
{
    size_t unit = arena->align;
    size_t need = bytes ? bytes : 1;
    bool possible = need <= SIZE_MAX - (unit - 1);
    bool table_full = false;
    need = possible ? (need + unit - 1) & ~(unit - 1) : need;
    for (uint32_t i = 0; possible && i < arena->count; i++) {
        epx__arena_piece_t *piece = &arena->pieces[i];
        if (piece->used || piece->bytes < need)
            continue;
        if (piece->bytes > need) {
            if (arena->count == arena->capacity) { /* no room for the remainder; a later piece may fit exactly */
                table_full = true;
                continue;
            }
            insert_after(arena, i);
            piece[1] = (epx__arena_piece_t){.offset = piece->offset + need, .bytes = piece->bytes - need};
            piece->bytes = need;
        }
        piece->used = true;
        *offset = piece->offset;
        return EPX_OK;
    }
    if (table_full)
        return epx__fail(EPX_E_BUSY, "all %u pieces of the memory are in use; release some", arena->capacity);
    return epx__fail(EPX_E_BUSY, "%zu bytes asked for, the largest free piece has %zu; release some", bytes,
                     epx__arena_largest(arena));
}

/* The piece whose bytes hold `offset`; arena->count when none. */
static uint32_t piece_at(const epx__arena_t *arena, size_t offset)
{
    uint32_t low = 0, high = arena->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const epx__arena_piece_t *piece = &arena->pieces[middle];
        if (offset < piece->offset)
            high = middle;
        else if (offset - piece->offset >= piece->bytes)
            low = middle + 1;
        else
            return middle;
    }
    return arena->count;
}

void epx__arena_give(epx__arena_t *arena, size_t offset)
{
    uint32_t at = piece_at(arena, offset);
    if (at == arena->count || !arena->pieces[at].used || arena->pieces[at].offset != offset) {
        epx__log(EPX__LOG_WARN, "arena: offset %zu was given back, but no piece in use begins there", offset);
        return;
    }
    arena->pieces[at].used = false;
    if (at + 1 < arena->count && !arena->pieces[at + 1].used) {
        arena->pieces[at].bytes += arena->pieces[at + 1].bytes;
        remove_piece(arena, at + 1);
    }
    if (at > 0 && !arena->pieces[at - 1].used) {
        arena->pieces[at - 1].bytes += arena->pieces[at].bytes;
        remove_piece(arena, at);
    }
}

const epx__arena_piece_t *epx__arena_find(const epx__arena_t *arena, size_t offset, size_t bytes)
{
    uint32_t at = piece_at(arena, offset);
    if (at == arena->count || !arena->pieces[at].used)
        return NULL;
    const epx__arena_piece_t *piece = &arena->pieces[at];
    return bytes <= piece->bytes - (offset - piece->offset) ? piece : NULL;
}

size_t epx__arena_largest(const epx__arena_t *arena)
{
    size_t largest = 0;
    for (uint32_t i = 0; i < arena->count; i++)
        if (!arena->pieces[i].used && arena->pieces[i].bytes > largest)
            largest = arena->pieces[i].bytes;
    return largest;
}
