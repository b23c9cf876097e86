/*
 * Rows past the rings.
 *
 * From where they lie: rows that are one after the other in the caller's memory are put from there, when the network
 * can read it (the buffer's window, or any memory, by the network's word). The half then ends only when all that was
 * put on this rail has taken effect at the peer: until then the network reads the caller's rows. A half that fails
 * before that halts the channels, so that nobody reads them after the call.
 *
 * To where they belong: with one rank a domain, the rail is the receiver. When its rows go into a lease, its message
 * of the half says where mine begin, and x is put there, row after row: received rows lie by (source, token). The rest
 * of the record (side data, ids, weights) passes through the ring. x of a chunk's rows is put before the chunk, on the
 * same channel, so the chunk's signal says that both have landed; without a rest the chunk is its signal.
 */
#include <string.h>

#include "algo/ht/cpu/rail.h"
#include "base/mutate.h"

#define RUN_BYTES (64u << 10) /* rows are put from where they lie in pieces of at least that much; else gathered */
#define CHUNK_REQUESTS 20u    /* of a chunk of at most 512 KiB: 8 long runs, 9 gathered pieces between, the chunk */

bool epx__rail_source(const epx__ht_rails_t *rails, const void *from, size_t bytes, epx__rail_source_t *source)
{
    const epx__window_t *window = &rails->ht->exchange->window;
    uintptr_t base = (uintptr_t)window->base, at = (uintptr_t)from;
    size_t total = rails->ht->exchange->layout.total_bytes;
    if (at >= base && at - base < total && bytes <= total - (at - base)) {
        *source = (epx__rail_source_t){EPX__RAILS_MEMORY_WINDOW, at - base};
        return true;
    }
    *source = (epx__rail_source_t){EPX__MEMORY_ANY, at};
    return epx__channels_any(rails->rails->channels);
}

bool epx__rail_push(epx__half_t *half, epx__ht_rail_t *rail, const epx__rail_source_t *source, uint32_t to_memory,
                    uint64_t to, size_t bytes, bool signal)
{
    uint64_t memories = epx_port_memories(to_memory, source->memory);
    epx_status_t status = bytes == 0 ? epx_port_signal(rail->data)
                          : signal   ? epx_port_put_signal(rail->data, memories, to, source->offset, bytes)
                                     : epx_port_put(rail->data, memories, to, source->offset, bytes);
    if (status != EPX_OK) {
        epx__rail_failed(half, rail, status);
        return false;
    }
    epx_traffic_t *traffic = &half->ht->exchange->traffic;
    traffic->net_bytes += bytes;
    traffic->net_puts += bytes > 0;
    rail->straight |= source->memory != EPX__RAILS_MEMORY_RAILS;
    half->lent |= source->memory == EPX__MEMORY_ANY;
    return true;
}

bool epx__rail_put_from(epx__half_t *half, epx__ht_rails_t *rails, epx__ht_rail_t *rail,
                        const epx__rail_source_t *source)
{
    epx__rail_stream_t *out = &rail->out;
    uint32_t end = epx__rail_chunk_end(out);
    uint8_t *ring = half->ht->window; /* any base: its offset is asked for */
    size_t at = (size_t)(epx__rail_row(ring, out, out->moved) - ring);
    if (!epx__rail_push(half, rail, source, EPX__RAILS_MEMORY_RAILS, epx__rails_receive(rails->rails, rails->home) + at,
                        (end - out->moved) * out->ring_stride, true))
        return false;
    out->packed = out->moved = end;
    rail->chunks_sent++;
    return true;
}

bool epx__rail_chunk_room(const epx__ht_rail_t *rail)
{
    return epx__channels_room(rail->data, CHUNK_REQUESTS);
}

/* ---- x to its final rows ---- */

typedef struct gather {
    const epx_rows_t *rows;
    const int32_t *token;
    uint8_t *to;
    uint32_t from, until;
} gather_t;

static void gather_part(void *context, int part, int parts)
{
    const gather_t *gather = context;
    const epx_rows_t *rows = gather->rows;
    uint32_t span = gather->until - gather->from;
    uint32_t from = (uint32_t)((uint64_t)span * (uint32_t)part / (uint32_t)parts);
    uint32_t to = (uint32_t)((uint64_t)span * (uint32_t)(part + 1) / (uint32_t)parts);
    for (uint32_t i = from; i < to; i++)
        memcpy(gather->to + i * rows->row_bytes,
               (const uint8_t *)rows->x + (size_t)gather->token[gather->from + i] * rows->x_stride_bytes,
               rows->row_bytes);
}

/* How many rows from k on lie one after the other where they are. */
static uint32_t run_of(const epx_rows_t *rows, const int32_t *token, uint32_t k, uint32_t to)
{
    uint32_t n = 1;
    if (rows->x_stride_bytes == rows->row_bytes)
        while (k + n < to && token[k + n] == token[k] + (int32_t)n)
            n++;
    return n;
}

/* A run worth a put of its own: long, or all there is. */
static bool worth(const epx_rows_t *rows, uint32_t run, uint32_t all)
{
    return run == all || run * rows->row_bytes >= RUN_BYTES;
}

/* Rows [k, until) through the chunk's slot of the send ring, behind what of their records goes through the ring. */
static bool put_gathered(epx__half_t *half, epx__ht_rails_t *rails, epx__ht_rail_t *rail, gather_t *gather,
                         uint32_t chunk)
{
    const epx__rail_stream_t *out = &rail->out;
    uint8_t *window = rails->rails->window.base;
    uint8_t *slot = epx__rail_row(window + epx__rails_send(rails->rails, rail->domain), out, chunk);
    gather->to = slot + out->rows_per_chunk * out->ring_stride + (gather->from - chunk) * gather->rows->row_bytes;
    epx__workers_run(rails->ht->workers, gather_part, gather);
    epx__rail_source_t source = {EPX__RAILS_MEMORY_RAILS, (uint64_t)(gather->to - window)};
    return epx__rail_push(half, rail, &source, EPX__RAILS_MEMORY_WINDOW,
                          rail->x_place + (uint64_t)gather->from * gather->rows->row_bytes,
                          (gather->until - gather->from) * gather->rows->row_bytes, false);
}

bool epx__rail_put_x(epx__half_t *half, epx__ht_rails_t *rails, epx__ht_rail_t *rail, const epx_rows_t *rows,
                     const int32_t *token, uint32_t from, uint32_t to)
{
    for (uint32_t k = from; k < to;) {
        uint32_t run = run_of(rows, token, k, to), until = k;
        const uint8_t *x = (const uint8_t *)rows->x + (size_t)token[k] * rows->x_stride_bytes;
        epx__rail_source_t source;
        bool readable = epx__rail_source(rails, x, run * rows->row_bytes, &source);
        if (readable && worth(rows, run, to - from)) {
            if (!epx__rail_push(half, rail, &source, EPX__RAILS_MEMORY_WINDOW,
                                rail->x_place + (uint64_t)k * rows->row_bytes, run * rows->row_bytes, false))
                return false;
            k += run;
            continue;
        }
        while (until < to) { /* short runs together, up to the next long one */
            run = run_of(rows, token, until, to);
            if (readable && worth(rows, run, to - from))
                break;
            until += run;
        }
        gather_t gather = {.rows = rows, .token = token, .from = k, .until = until};
        if (!put_gathered(half, rails, rail, &gather, from))
            return false;
        k = until;
    }
    return true;
}

/* ---- the end ---- */

bool epx__rail_let_go(const epx__ht_rails_t *rails)
{
    for (int d = 0; d < rails->domains; d++)
        if (d != rails->home && rails->rail[d].straight && !epx__channels_applied(rails->rail[d].data))
            return EPX__MUTATE(rail_let_go_early);
    return true;
}

void epx__rail_blame_straight(const epx__ht_rails_t *rails, epx__blame_t *blame)
{
    for (int d = 0; d < rails->domains; d++) {
        const epx__ht_rail_t *rail = &rails->rail[d];
        if (d != rails->home && rail->straight && !epx__channels_applied(rail->data))
            epx__blame_rank(blame, rail->rank, "having taken the rows put to it",
                            epx_ld_relaxed_sys_u64(rail->data->issued), epx_ld_acquire_sys_u64(rail->data->acked));
    }
}
