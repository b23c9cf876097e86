/*
 * Rows between domains. A step does a bounded piece of four things and never waits:
 *   send     gather rows that cross into a chunk, put it
 *   arrive   tell the domain how many rows lie in my receive rings
 *   pull     copy my rows out of every member's receive rings (my own too) to their final rows
 *   free     what all have taken goes back to the sender as credit
 *
 * A record is x, side, ids, weights, one after the other, rounded up to 16 bytes. Ids are global, as the sender has
 * them. With one rank a domain and a lease to receive in, x goes straight to its place (rail_straight.c) and the rest
 * of the record through the ring.
 */
#include <string.h>

#include "algo/ht/cpu/rail.h"
#include "base/fail.h"
#include "base/mutate.h"

#define STREAM_BYTES (2u << 20) /* below this in all, rows stay in the cache */
#define PULL_BYTES (2u << 20)   /* pulled of one stream by one step, about */

/* Of a record, all but x, which is a multiple of 16 bytes itself. */
static size_t rest_bytes(const epx__row_shape_t *shape)
{
    size_t bytes = shape->side_bytes + (size_t)shape->topk * shape->idx_bytes;
    bytes += shape->weights ? (size_t)shape->topk * 4 : 0;
    return (bytes + 15) / 16 * 16;
}

static size_t record_bytes(const epx__row_shape_t *shape)
{
    return shape->row_bytes + rest_bytes(shape);
}

/* Do my rails put x straight into my lease? */
static bool straight(const epx__ht_rails_t *rails, const epx__target_t *target)
{
    return rails->members == 1 && !target->own && target->place.x;
}

size_t epx__rail_rows_fill(const epx__ht_cpu_t *ht, const epx__exchange_handle_t *handle, const epx__target_t *target,
                           const epx__row_shape_t *shape, int domain, epx__rail_message_t *message)
{
    size_t first = (size_t)ht->routing[handle->index].start[ht->rails->rail[domain].rank];
    if (straight(ht->rails, target))
        message->x_place = (uint64_t)((uint8_t *)target->place.x - ht->window) + first * shape->row_bytes;
    return sizeof *message;
}

void epx__rail_rows_heard(const epx__ht_cpu_t *ht, const epx__row_shape_t *shape)
{
    epx__ht_rails_t *rails = ht->rails;
    for (int d = 0; d < rails->domains; d++) {
        epx__ht_rail_t *rail = &rails->rail[d];
        rail->x_place = d == rails->home ? 0 : rail->mail.x_place;
        if (rail->x_place)
            rail->out.ring_stride = rest_bytes(shape);
    }
}

epx_status_t epx__rail_rows_init(epx__ht_cpu_t *ht, const epx__exchange_handle_t *handle, const epx__row_shape_t *shape,
                                 const epx__target_t *target)
{
    epx__ht_rails_t *rails = ht->rails;
    const epx__rail_routing_t *routing = &rails->routing[handle->index];
    size_t ranks = (size_t)ht->exchange->topology->ranks;
    for (int d = 0; d < rails->domains; d++) {
        epx__ht_rail_t *rail = &rails->rail[d];
        uint32_t in = d == rails->home ? 0 : (uint32_t)routing->in_count[rails->index * rails->domains + d];
        uint32_t out = d == rails->home ? 0 : (uint32_t)routing->cross_count[d];
        EPX__TRY(epx__rail_stream_init(rails, &rail->out, record_bytes(shape), out, rail->chunks_sent));
        EPX__TRY(epx__rail_stream_init(rails, &rail->in, record_bytes(shape), in, rail->chunks_freed));
        if (straight(rails, target))
            rail->in.ring_stride = rest_bytes(shape);
        for (int i = 0; i < rails->members; i++) {
            size_t source = (size_t)epx__topology_rank(ht->exchange->topology, d, i);
            uint32_t mine =
                d == rails->home ? 0 : (uint32_t)handle->matrix[source * ranks + (size_t)ht->exchange->rank];
            rails->pulls[i * rails->domains + d] = (epx__rail_pull_t){.count = mine};
        }
    }
    return EPX_OK;
}

/* The streams that counted in this half count from there in the next. */
void epx__rail_rows_end(epx__ht_cpu_t *ht, const epx__exchange_handle_t *handle)
{
    epx__ht_rails_t *rails = ht->rails;
    const epx__rail_routing_t *routing = &rails->routing[handle->index];
    for (int i = 0; i < rails->members; i++)
        for (int d = 0; d < rails->domains; d++)
            if (d != rails->home)
                rails->streamed[i * rails->domains + d] += (uint64_t)routing->in_count[i * rails->domains + d];
}

/* ---- send ---- */

typedef struct piece {
    epx__ht_cpu_t *ht;
    const epx__exchange_handle_t *handle;
    const epx_rows_t *rows;
    const epx__target_t *target;
    const epx__row_shape_t *shape;
    epx__ht_rail_t *rail;
    int member;
    uint32_t from, to; /* rows of the stream; pulls: of my list */
} piece_t;

static void gather_part(void *context, int part, int parts)
{
    const piece_t *piece = context;
    const epx__ht_rails_t *rails = piece->ht->rails;
    const epx_dispatch_t *args = &piece->handle->args;
    const epx__row_shape_t *shape = piece->shape;
    const int32_t *token =
        rails->routing[piece->handle->index].cross_token + (size_t)piece->rail->domain * rails->rails->tokens_max;
    uint8_t *ring = (uint8_t *)rails->rails->window.base + epx__rails_send(rails->rails, piece->rail->domain);
    uint32_t span = piece->to - piece->from;
    uint32_t from = piece->from + (uint32_t)((uint64_t)span * (uint32_t)part / (uint32_t)parts);
    uint32_t to = piece->from + (uint32_t)((uint64_t)span * (uint32_t)(part + 1) / (uint32_t)parts);
    for (uint32_t k = from; k < to; k++) {
        size_t t = (size_t)token[k], ids = (size_t)shape->topk * shape->idx_bytes;
        uint8_t *at = epx__rail_row(ring, &piece->rail->out, k);
        if (!piece->rail->x_place) {
            memcpy(at, (const uint8_t *)piece->rows->x + t * piece->rows->x_stride_bytes, shape->row_bytes);
            at += shape->row_bytes;
        }
        if (shape->side_bytes)
            epx__side_row(piece->rows, at, (int64_t)t);
        at += shape->side_bytes;
        if (ids)
            memcpy(at, (const uint8_t *)args->topk_idx + t * ids, ids);
        if (shape->weights)
            memcpy(at + ids, args->topk_weights + t * shape->topk, 4 * (size_t)shape->topk);
    }
}

/* Is the whole chunk one piece of the caller's memory that the network can read? */
static bool whole_piece(const piece_t *piece, const int32_t *token, epx__rail_source_t *source)
{
    uint32_t rows = piece->to - piece->from;
    size_t row = piece->shape->row_bytes;
    if (piece->rail->x_place || piece->rail->out.ring_stride != row || piece->rows->x_stride_bytes != row ||
        token[piece->to - 1] - token[piece->from] != (int32_t)(rows - 1))
        return false;
    return epx__rail_source(piece->ht->rails, (const uint8_t *)piece->rows->x + (size_t)token[piece->from] * row,
                            rows * row, source);
}

/* One chunk: x straight to its place, or with the rest through the ring. */
static bool send_step(epx__half_t *half, piece_t *piece)
{
    epx__ht_rails_t *rails = piece->ht->rails;
    epx__ht_rail_t *rail = piece->rail;
    const int32_t *token =
        rails->routing[piece->handle->index].cross_token + (size_t)rail->domain * rails->rails->tokens_max;
    uint32_t room = epx__rail_room(rails, rail);
    epx__rail_source_t source;
    if (room == 0 || !epx__rail_chunk_room(rail))
        return false;
    piece->from = rail->out.packed;
    piece->to = rail->out.packed + room;
    if (whole_piece(piece, token, &source))
        return epx__rail_put_from(half, rails, rail, &source);
    if (rail->out.ring_stride)
        epx__workers_run(piece->ht->workers, gather_part, piece);
    rail->out.packed = piece->to;
    if (EPX__MUTATE(rail_x_late))
        epx__rail_put(half, rails, rail);
    if (rail->x_place && !epx__rail_put_x(half, rails, rail, piece->rows, token, piece->from, piece->to))
        return true;
    epx__rail_put(half, rails, rail);
    return true;
}

/* ---- arrive ---- */

static bool arrive_step(epx__ht_cpu_t *ht, epx__ht_rail_t *rail)
{
    epx__ht_rails_t *rails = ht->rails;
    if (!epx__rail_look(rail))
        return false;
    uint64_t rows = rails->streamed[rails->index * rails->domains + rail->domain] + rail->in.moved;
    for (int m = 0; m < rails->members; m++) {
        epx__rail_words_t *words = epx__rails_words(rails->rails, m, rails->index, rail->domain);
        epx__word_post(&ht->peers[m], &words->arrived, rows);
    }
    return true;
}

/* ---- pull ---- */

static void localise(const piece_t *piece, const uint8_t *record, size_t row)
{
    const epx__row_shape_t *shape = piece->shape;
    const epx_place_t *place = &piece->target->place;
    const epx__experts_t *map = &piece->handle->map;
    int me = piece->ht->exchange->rank;
    const uint8_t *weights = record + (size_t)shape->topk * shape->idx_bytes;
    for (uint32_t k = 0; k < shape->topk; k++) {
        int64_t id;
        int32_t narrow;
        if (shape->idx_bytes == 4) {
            memcpy(&narrow, record + 4 * (size_t)k, 4);
            id = narrow;
        } else
            memcpy(&id, record + 8 * (size_t)k, 8);
        bool here = id >= 0 && id < (int64_t)map->experts && epx__expert_rank(map, id) == me;
        int64_t local = here ? epx__expert_local(map, id) : -1;
        if (place->topk_idx && shape->idx_bytes == 4)
            ((int32_t *)place->topk_idx)[row * shape->topk + k] = (int32_t)local;
        else if (place->topk_idx)
            ((int64_t *)place->topk_idx)[row * shape->topk + k] = local;
        float weight = 0.0f;
        if (shape->weights && here)
            memcpy(&weight, weights + 4 * (size_t)k, 4);
        if (shape->weights && place->topk_weights)
            place->topk_weights[row * shape->topk + k] = weight;
    }
}

static void pull_part(void *context, int part, int parts)
{
    const piece_t *piece = context;
    const epx__ht_rails_t *rails = piece->ht->rails;
    const epx__row_shape_t *shape = piece->shape;
    const epx_place_t *place = &piece->target->place;
    const epx__rail_routing_t *crossing = &rails->routing[piece->handle->index];
    const epx__ht_routing_t *routing = &piece->ht->routing[piece->handle->index];
    int d = piece->rail->domain, source = epx__topology_rank(rails->rails->topology, d, piece->member);
    const int32_t *row_of = crossing->pull_row + (size_t)source * rails->rails->tokens_max;
    const int32_t *token_of = crossing->pull_token + (size_t)source * rails->rails->tokens_max;
    uint8_t *ring = rails->rails->member[piece->member] + epx__rails_receive(rails->rails, d);
    bool streaming = piece->ht->exchange->streaming && (uint64_t)piece->handle->rows * shape->row_bytes > STREAM_BYTES;
    bool x_there = straight(rails, piece->target);
    uint32_t span = piece->to - piece->from;
    uint32_t from = piece->from + (uint32_t)((uint64_t)span * (uint32_t)part / (uint32_t)parts);
    uint32_t to = piece->from + (uint32_t)((uint64_t)span * (uint32_t)(part + 1) / (uint32_t)parts);
    for (uint32_t j = from; j < to; j++) {
        const uint8_t *record = epx__rail_row(ring, &piece->rail->in, (uint64_t)row_of[j]);
        size_t row = (size_t)routing->start[source] + j;
        if (!x_there) {
            if (place->x)
                epx__copy_row((uint8_t *)place->x + row * shape->row_bytes, record, shape->row_bytes, streaming);
            record += shape->row_bytes;
        }
        if (place->side && shape->side_bytes)
            memcpy((uint8_t *)place->side + row * shape->side_bytes, record, shape->side_bytes);
        if (shape->topk)
            localise(piece, record + shape->side_bytes, row);
        if (place->src_token)
            place->src_token[row] = token_of[j];
        routing->src_token[row] = token_of[j];
    }
    epx__copy_fence();
}

/* How far down the stream nothing is mine any more. */
static uint32_t needless(const epx__ht_rails_t *rails, const piece_t *piece, const epx__rail_pull_t *pull,
                         uint32_t arrived)
{
    int source = epx__topology_rank(rails->rails->topology, piece->rail->domain, piece->member);
    const int32_t *row_of = rails->routing[piece->handle->index].pull_row + (size_t)source * rails->rails->tokens_max;
    if (pull->next == pull->count || (uint32_t)row_of[pull->next] > arrived)
        return arrived;
    return (uint32_t)row_of[pull->next];
}

static bool pull_step(piece_t *piece)
{
    epx__ht_cpu_t *ht = piece->ht;
    epx__ht_rails_t *rails = ht->rails;
    int at = piece->member * rails->domains + piece->rail->domain;
    epx__rail_pull_t *pull = &rails->pulls[at];
    uint32_t total = (uint32_t)rails->routing[piece->handle->index].in_count[at];
    if (pull->taken == total)
        return false;
    int source = epx__topology_rank(rails->rails->topology, piece->rail->domain, piece->member);
    const int32_t *row_of = rails->routing[piece->handle->index].pull_row + (size_t)source * rails->rails->tokens_max;
    const epx__rail_words_t *words = epx__rails_words(rails->rails, rails->index, piece->member, piece->rail->domain);
    uint64_t ever = epx__word_load(&words->arrived);
    uint32_t arrived = ever > rails->streamed[at] ? (uint32_t)(ever - rails->streamed[at]) : 0;
    uint32_t most = (uint32_t)(PULL_BYTES / piece->rail->in.stride) + 1, n = 0;
    while (n < most && pull->next + n < pull->count && (uint32_t)row_of[pull->next + n] < arrived)
        n++;
    piece->from = pull->next;
    piece->to = pull->next + n;
    epx__rail_words_t *mine = epx__rails_words(rails->rails, piece->member, rails->index, piece->rail->domain);
    if (EPX__MUTATE(rail_taken_first) && n) { /* and wide enough a gap to be seen */
        epx__word_post(&ht->peers[piece->member], &mine->taken, rails->streamed[at] + arrived);
        epx__sleep_ns(2000000);
    }
    if (n)
        epx__workers_run(ht->workers, pull_part, piece);
    pull->next += n;
    uint32_t taken = needless(rails, piece, pull, arrived);
    if (taken == pull->taken)
        return n > 0;
    pull->taken = taken;
    epx__word_post(&ht->peers[piece->member], &mine->taken, rails->streamed[at] + taken);
    return true;
}

/* ---- free ---- */

static bool free_step(epx__half_t *half, epx__ht_cpu_t *ht, epx__ht_rail_t *rail)
{
    epx__ht_rails_t *rails = ht->rails;
    uint64_t base = rails->streamed[rails->index * rails->domains + rail->domain];
    uint32_t least = rail->in.moved;
    if (rail->in.freed == rail->in.total)
        return false;
    for (int m = 0; m < rails->members; m++) {
        const epx__rail_words_t *words = epx__rails_words(rails->rails, rails->index, m, rail->domain);
        uint64_t taken = epx__word_load(&words->taken);
        uint32_t rows = taken > base ? (uint32_t)(taken - base) : 0;
        least = rows < least ? rows : least;
    }
    return least > rail->in.freed && epx__rail_free(half, rail, least);
}

/* ---- the step ---- */

epx__step_t epx__rail_rows_step(epx__half_t *half, const epx__exchange_handle_t *handle, const epx_rows_t *rows,
                                const epx__target_t *target, const epx__row_shape_t *shape)
{
    epx__ht_cpu_t *ht = half->ht;
    epx__ht_rails_t *rails = ht->rails;
    bool moved = false, done = true;
    if (!half->rails_done)
        return EPX__STEP_STUCK;
    for (int n = 1; n < rails->domains; n++) { /* the next domain first: not all to the same one */
        epx__ht_rail_t *rail = &rails->rail[(rails->home + n) % rails->domains];
        piece_t piece = {.ht = ht, .handle = handle, .rows = rows, .target = target, .shape = shape, .rail = rail};
        moved |= send_step(half, &piece);
        moved |= arrive_step(ht, rail);
        for (int m = 0; m < rails->members; m++) {
            piece.member = (rails->index + m) % rails->members;
            moved |= pull_step(&piece);
            int at = piece.member * rails->domains + rail->domain;
            done &= rails->pulls[at].taken == (uint32_t)rails->routing[handle->index].in_count[at];
        }
        moved |= free_step(half, ht, rail);
        done &= rail->out.moved == rail->out.total && rail->in.freed == rail->in.total;
    }
    done = done && epx__rail_let_go(rails);
    if (half->status != EPX_OK)
        return EPX__STEP_FAILED;
    return done ? EPX__STEP_DONE : moved ? EPX__STEP_MOVED : EPX__STEP_STUCK;
}

void epx__rail_rows_blame(epx__ht_cpu_t *ht, epx__blame_t *blame)
{
    const epx__ht_rails_t *rails = ht->rails;
    for (int d = 0; d < rails->domains; d++) {
        const epx__ht_rail_t *rail = &rails->rail[d];
        if (d == rails->home)
            continue;
        if (rail->in.moved < rail->in.total)
            epx__blame_rank(blame, rail->rank, "its rows from another domain", rail->in.total, rail->in.moved);
        if (rail->out.moved < rail->out.total)
            epx__blame_rank(blame, rail->rank, "room in its receive ring", rail->out.total, rail->out.moved);
    }
    epx__rail_blame_straight(rails, blame);
    for (int m = 0; m < rails->members; m++)
        for (int d = 0; d < rails->domains; d++) {
            const epx__rail_pull_t *pull = &rails->pulls[m * rails->domains + d];
            if (pull->next < pull->count)
                epx__blame_rank(blame, ht->peers[m].rank, "rows that it receives from another domain", pull->count,
                                pull->next);
        }
}
