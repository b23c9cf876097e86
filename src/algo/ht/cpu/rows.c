/*
 * The second half of a dispatch: rows to their final places.
 *
 * Sending has two ways. To a direct place (a lease), all such destinations are served in one pass over the tokens, so
 * that a row is read once however many ranks want it. To a ring (the receiver's own memory), by destination, as far as
 * the credit goes. Draining my own rings is the third thing; a step does a bounded piece of each and never blocks.
 */
#include <inttypes.h>
#include <string.h>

#include "algo/ht/cpu/ht_cpu.h"
#include "algo/ht/cpu/rail.h"
#include "base/fail.h"
#include "base/mutate.h"

#define PASS_BYTES (8u << 20)   /* sent by one step of a pass, about */
#define RING_BYTES (1u << 20)   /* moved by one step of one ring, about */
#define STREAM_BYTES (2u << 20) /* below this in all, rows stay in the cache */
#define ALONE_POLLS 64          /* stuck polls before a pass starts without the late destinations */

/* Where rows of one destination go, and how far they are. */
typedef struct lane {
    epx_place_t place; /* arrays at the destination; the caller's own for my rows */
    bool direct, ready, in_pass, sent_all;
    uint64_t capacity; /* of the ring */
    int32_t count;     /* rows I send there */
    int32_t cursor;    /* rows sent (ring) */
    int32_t in_count;  /* rows it sends me */
    int32_t in_cursor; /* rows drained or seen */
    epx_place_t ring;  /* its ring here, when I bring my own memory */
    uint64_t ring_rows;
} lane_t;

typedef struct rows_job {
    epx__ht_cpu_t *ht;
    epx__exchange_handle_t *handle;
    const epx__ht_routing_t *routing;
    const epx_rows_t *rows;
    const epx__target_t *target;
    epx__row_shape_t shape;
    bool first;
    bool streaming;      /* enough bytes for stores past the cache to pay */
    lane_t *lanes;       /* [members] */
    int16_t *lane_of;    /* [ranks] place in the domain */
    uint32_t pass_token; /* next token of the pass, when one runs */
    uint32_t pass_end;   /* of the piece that workers do now */
    bool passing;
    /* What a parallel piece works on. */
    lane_t *piece_lane;
    int piece_member;
    int32_t piece_from, piece_to;
} rows_job_t;

/* ---- one row ---- */

/* An expert's number at `rank`, -1 when it is not there. Which ids are there is as random as routing is: no branch on
 * it in the usual case of equal blocks. */
static inline int64_t local_at(const epx__experts_t *map, int64_t id, int rank)
{
    if (!map->rank_of) {
        uint64_t local = (uint64_t)id - (uint64_t)rank * map->per_rank;
        return local < map->per_rank ? (int64_t)local : -1;
    }
    bool there = id >= 0 && id < (int64_t)map->experts && map->rank_of[id] == rank;
    return there ? map->local_of[id] : -1;
}

/* The token's ids as the destination numbers them: its own experts, -1 elsewhere; weights likewise, 0 elsewhere. */
static void write_topk(const rows_job_t *job, const epx_place_t *place, size_t row, size_t token, int rank)
{
    const epx_dispatch_t *args = &job->handle->args;
    const epx__experts_t map = job->handle->map;
    uint32_t topk = job->shape.topk;
    int64_t local[EPX_TOPK_MAX];
    for (uint32_t k = 0; k < topk; k++)
        local[k] = local_at(&map, epx__topk_id(args->topk_idx, args->topk_idx_bits, token * topk + k), rank);
    if (place->topk_idx && args->topk_idx_bits == 64)
        memcpy((int64_t *)place->topk_idx + row * topk, local, topk * sizeof *local);
    else if (place->topk_idx)
        for (uint32_t k = 0; k < topk; k++)
            ((int32_t *)place->topk_idx)[row * topk + k] = (int32_t)local[k];
    if (!place->topk_weights)
        return;
    const float *weights = args->topk_weights + token * topk;
    for (uint32_t k = 0; k < topk; k++) {
        uint32_t bits, keep = local[k] < 0 ? 0 : UINT32_MAX;
        memcpy(&bits, &weights[k], 4);
        bits &= keep;
        memcpy(&place->topk_weights[row * topk + k], &bits, 4);
    }
}

static void write_row(const rows_job_t *job, const epx_place_t *place, size_t row, size_t token, int rank)
{
    const epx_rows_t *rows = job->rows;
    epx__copy_row((uint8_t *)place->x + row * rows->row_bytes, (const uint8_t *)rows->x + token * rows->x_stride_bytes,
                  rows->row_bytes, job->streaming);
    if (place->side)
        epx__side_row(rows, (uint8_t *)place->side + row * job->shape.side_bytes, (int64_t)token);
    if (job->shape.topk)
        write_topk(job, place, row, token, rank);
    if (place->src_token)
        place->src_token[row] = (int32_t)token;
}

/* ---- sending: the pass over tokens ---- */

static void pass_part(void *context, int part, int parts)
{
    rows_job_t *job = context;
    uint32_t slots = job->handle->slots, span = job->pass_end - job->pass_token;
    uint32_t from = job->pass_token + (uint32_t)((uint64_t)span * (uint32_t)part / (uint32_t)parts);
    uint32_t to = job->pass_token + (uint32_t)((uint64_t)span * (uint32_t)(part + 1) / (uint32_t)parts);
    for (uint32_t t = from; t < to; t++)
        for (uint32_t s = 0; s < slots; s++) {
            size_t at = (size_t)t * slots + s;
            int32_t rank = job->routing->dst_rank[at];
            if (rank < 0)
                break;
            if (job->lane_of[rank] < 0)
                continue; /* of another domain: by rail */
            const lane_t *lane = &job->lanes[job->lane_of[rank]];
            if (lane->in_pass)
                write_row(job, &lane->place, (size_t)job->routing->dst_row[at], t, rank);
        }
    epx__copy_fence();
}

static void count_bytes(rows_job_t *job, int member, uint64_t rows)
{
    epx_traffic_t *traffic = &job->ht->exchange->traffic;
    uint64_t bytes = rows * epx__row_shape_bytes(&job->shape);
    if (&job->ht->peers[member] == job->ht->self)
        traffic->local_bytes += bytes;
    else
        traffic->domain_bytes += bytes;
}

static void pass_end(rows_job_t *job)
{
    epx__ht_cpu_t *ht = job->ht;
    for (int i = 0; i < ht->members; i++) {
        lane_t *lane = &job->lanes[i];
        if (!lane->in_pass)
            continue;
        lane->in_pass = false;
        lane->sent_all = true;
        count_bytes(job, i, (uint64_t)lane->count);
        epx__ht_peer_t *peer = &ht->peers[i];
        if (peer == ht->self) {
            lane->in_cursor = lane->in_count;
            continue;
        }
        peer->sent += (uint64_t)lane->count;
        epx__word_post(peer, &peer->to_it->sent, peer->sent);
    }
    job->passing = false;
}

/* Start a pass with the destinations that are ready; without the late ones only after a little patience. */
static bool pass_start(rows_job_t *job, uint64_t stuck_polls)
{
    int ready = 0, late = 0;
    for (int i = 0; i < job->ht->members; i++) {
        const lane_t *lane = &job->lanes[i];
        if (lane->sent_all || (lane->ready && !lane->direct))
            continue;
        ready += lane->ready;
        late += !lane->ready;
    }
    if (ready == 0 || (late > 0 && stuck_polls < ALONE_POLLS))
        return false;
    for (int i = 0; i < job->ht->members; i++) {
        lane_t *lane = &job->lanes[i];
        lane->in_pass = lane->ready && lane->direct && !lane->sent_all;
    }
    job->passing = true;
    job->pass_token = 0;
    return true;
}

/* Mutation only: say that all rows are there before they are. */
static void pass_tell_early(rows_job_t *job)
{
    for (int i = 0; i < job->ht->members; i++) {
        epx__ht_peer_t *peer = &job->ht->peers[i];
        if (job->lanes[i].in_pass && peer != job->ht->self)
            epx__word_post(peer, &peer->to_it->sent, peer->sent + (uint64_t)job->lanes[i].count);
    }
}

static bool pass_step(rows_job_t *job, uint64_t stuck_polls)
{
    if (!job->passing && !pass_start(job, stuck_polls))
        return false;
    if (EPX__MUTATE(sent_first))
        pass_tell_early(job);
    uint32_t tokens = job->handle->args.tokens;
    uint32_t piece = (uint32_t)(PASS_BYTES / (job->rows->row_bytes + 1)) + 1;
    job->pass_end = tokens - job->pass_token < piece ? tokens : job->pass_token + piece;
    epx__workers_run(job->ht->workers, pass_part, job);
    job->pass_token = job->pass_end;
    if (job->pass_token == tokens)
        pass_end(job);
    return true;
}

/* ---- sending: rings ---- */

static void ring_part(void *context, int part, int parts)
{
    rows_job_t *job = context;
    const lane_t *lane = job->piece_lane;
    int rank = job->ht->peers[job->piece_member].rank;
    int64_t span = job->piece_to - job->piece_from;
    int32_t from = job->piece_from + (int32_t)(span * part / parts);
    int32_t to = job->piece_from + (int32_t)(span * (part + 1) / parts);
    const int32_t *list = job->routing->list + job->routing->list_start[rank];
    for (int32_t j = from; j < to; j++)
        write_row(job, &lane->place, (size_t)((uint64_t)j % lane->capacity), (size_t)list[j], rank);
    epx__copy_fence();
}

static int32_t piece_rows(const rows_job_t *job, uint64_t possible)
{
    uint64_t most = RING_BYTES / epx__row_shape_bytes(&job->shape) + 1;
    return (int32_t)(possible < most ? possible : most);
}

static bool ring_step(rows_job_t *job, int member)
{
    lane_t *lane = &job->lanes[member];
    epx__ht_peer_t *peer = &job->ht->peers[member];
    if (!lane->ready || lane->direct || lane->sent_all)
        return false;
    uint64_t in_ring = peer->sent - epx__word_load(&peer->from_it->taken);
    uint64_t left = (uint64_t)(lane->count - lane->cursor);
    uint64_t room = EPX__MUTATE(no_credit) ? lane->capacity : lane->capacity - in_ring;
    int32_t rows = piece_rows(job, left < room ? left : room);
    if (left > 0 && room == 0)
        return false;
    job->piece_lane = lane;
    job->piece_member = member;
    job->piece_from = lane->cursor;
    job->piece_to = lane->cursor + rows;
    if (rows)
        epx__workers_run(job->ht->workers, ring_part, job);
    lane->cursor += rows;
    lane->sent_all = lane->cursor == lane->count;
    peer->sent += (uint64_t)rows;
    count_bytes(job, member, (uint64_t)rows);
    epx__word_post(peer, &peer->to_it->sent, peer->sent);
    return true;
}

/* ---- receiving ---- */

static void copy_part(void *to, const void *from, size_t to_row, size_t from_row, size_t rows, size_t row_bytes,
                      bool streaming)
{
    if (to && row_bytes)
        epx__copy_row((uint8_t *)to + to_row * row_bytes, (const uint8_t *)from + from_row * row_bytes,
                      rows * row_bytes, streaming && row_bytes % 16 == 0 && ((uintptr_t)to & 15) == 0);
}

static void drain_part(void *context, int part, int parts)
{
    rows_job_t *job = context;
    const lane_t *lane = job->piece_lane;
    const epx__row_shape_t *shape = &job->shape;
    const epx_place_t *to = &job->target->place, *ring = &lane->ring;
    bool streaming = job->streaming;
    int64_t span = job->piece_to - job->piece_from;
    int32_t from = job->piece_from + (int32_t)(span * part / parts);
    int32_t until = job->piece_from + (int32_t)(span * (part + 1) / parts);
    size_t start = (size_t)job->routing->start[job->ht->peers[job->piece_member].rank];
    for (int32_t j = from; j < until;) {
        size_t slot = (size_t)((uint64_t)j % lane->ring_rows), row = start + (size_t)j;
        size_t run = (size_t)(until - j); /* rows up to the ring's end */
        if (run > lane->ring_rows - slot)
            run = (size_t)(lane->ring_rows - slot);
        copy_part(to->x, ring->x, row, slot, run, shape->row_bytes, streaming);
        copy_part(to->side, ring->side, row, slot, run, shape->side_bytes, false);
        copy_part(to->topk_idx, ring->topk_idx, row, slot, run, (size_t)shape->topk * shape->idx_bytes, false);
        copy_part(to->topk_weights, ring->topk_weights, row, slot, run, 4 * (size_t)shape->topk, false);
        copy_part(to->src_token, ring->src_token, row, slot, run, 4, false);
        if (ring->src_token && job->first)
            memcpy(job->routing->src_token + row, ring->src_token + slot, 4 * run);
        j += (int32_t)run;
    }
    epx__copy_fence();
}

static bool drain_step(rows_job_t *job, int member)
{
    lane_t *lane = &job->lanes[member];
    epx__ht_peer_t *peer = &job->ht->peers[member];
    if (lane->in_cursor == lane->in_count)
        return false;
    uint64_t there = epx__word_load(&peer->from_it->sent) - peer->received;
    if (there == 0)
        return false;
    int32_t rows = job->target->own ? piece_rows(job, there) : (int32_t)there;
    if (EPX__MUTATE(taken_first))
        epx__word_post(peer, &peer->to_it->taken, peer->received + (uint64_t)rows);
    if (job->target->own) {
        job->piece_lane = lane;
        job->piece_member = member;
        job->piece_from = lane->in_cursor;
        job->piece_to = lane->in_cursor + rows;
        epx__workers_run(job->ht->workers, drain_part, job);
    }
    lane->in_cursor += rows;
    peer->received += (uint64_t)rows;
    if (job->target->own)
        epx__word_post(peer, &peer->to_it->taken, peer->received);
    else if (!EPX__MUTATE(taken_direct_missing)) /* so that a later ring counts from the right number */
        __atomic_store_n(&peer->to_it->taken, peer->received, __ATOMIC_RELEASE);
    return true;
}

/* ---- the half ---- */

static void fill(epx__half_t *half, epx__ht_peer_t *peer, epx__message_t *message, void *tail)
{
    (void)tail;
    const rows_job_t *job = half->job;
    const lane_t *lane = &job->lanes[peer - half->ht->peers];
    message->direct = !job->target->own;
    message->place = job->target->own ? epx__ht_ring_offset(half->ht, peer) : job->target->lease_offset;
    message->capacity = job->target->own ? lane->ring_rows : job->target->capacity;
}

static epx_status_t hear(epx__half_t *half, epx__ht_peer_t *peer, const void *tail)
{
    (void)tail;
    rows_job_t *job = half->job;
    lane_t *lane = &job->lanes[peer - half->ht->peers];
    lane->direct = peer->mail.direct != 0;
    lane->capacity = peer->mail.capacity;
    lane->place = epx__place_at(peer->base + peer->mail.place, &job->shape, lane->capacity);
    lane->ready = true;
    return EPX_OK;
}

static size_t rail_fill(epx__half_t *half, int domain, epx__rail_message_t *message)
{
    const rows_job_t *job = half->job;
    return epx__rail_rows_fill(half->ht, job->handle, job->target, &job->shape, domain, message);
}

static void rail_heard(epx__half_t *half)
{
    const rows_job_t *job = half->job;
    epx__rail_rows_heard(half->ht, &job->shape);
}

static epx__step_t work(epx__half_t *half)
{
    rows_job_t *job = half->job;
    bool moved = pass_step(job, half->stuck_polls), done = !job->passing;
    for (int i = 0; i < job->ht->members; i++) {
        moved |= ring_step(job, i);
        moved |= drain_step(job, i);
        done &= job->lanes[i].sent_all;
        done &= job->lanes[i].in_cursor == job->lanes[i].in_count || EPX__MUTATE(end_before_received);
    }
    if (job->ht->rails) {
        epx__step_t rails = epx__rail_rows_step(half, job->handle, job->rows, job->target, &job->shape);
        if (rails == EPX__STEP_FAILED)
            return rails;
        moved |= rails == EPX__STEP_MOVED;
        done &= rails == EPX__STEP_DONE;
    }
    return done ? EPX__STEP_DONE : moved ? EPX__STEP_MOVED : EPX__STEP_STUCK;
}

static void blame(epx__half_t *half, epx__blame_t *out)
{
    rows_job_t *job = half->job;
    for (int i = 0; i < job->ht->members; i++) {
        const lane_t *lane = &job->lanes[i];
        const epx__ht_peer_t *peer = &job->ht->peers[i];
        if (lane->in_cursor < lane->in_count)
            epx__blame_rank(out, peer->rank, "its rows", (uint64_t)lane->in_count, (uint64_t)lane->in_cursor);
        else if (!lane->sent_all)
            epx__blame_rank(out, peer->rank, "room in its ring", (uint64_t)lane->count, (uint64_t)lane->cursor);
    }
    if (job->ht->rails)
        epx__rail_rows_blame(job->ht, out);
}

static epx_status_t init_lanes(rows_job_t *job)
{
    epx__ht_cpu_t *ht = job->ht;
    int ranks = ht->exchange->topology->ranks, me = ht->exchange->rank;
    for (int p = 0; p < ranks; p++)
        job->lane_of[p] = -1;
    for (int i = 0; i < ht->members; i++) {
        lane_t *lane = &job->lanes[i];
        epx__ht_peer_t *peer = &ht->peers[i];
        *lane = (lane_t){.count = job->handle->matrix[(size_t)me * (size_t)ranks + (size_t)peer->rank],
                         .in_count = job->handle->matrix[(size_t)peer->rank * (size_t)ranks + (size_t)me]};
        lane->sent_all = lane->count == 0;
        job->lane_of[peer->rank] = (int16_t)i;
        if (peer == ht->self) {
            lane->ready = lane->direct = true;
            lane->place = job->target->place;
        } else if (job->target->own && lane->in_count > 0) {
            lane->ring_rows = epx__place_capacity(&job->shape, epx__ht_ring_bytes(ht));
            if (lane->ring_rows > (uint64_t)lane->in_count)
                lane->ring_rows = (uint64_t)lane->in_count;
            lane->ring = epx__place_at(ht->window + epx__ht_ring_offset(ht, peer), &job->shape, lane->ring_rows);
            if (lane->ring_rows == 0)
                return epx__fail(
                    EPX_E_INVALID,
                    "reserve_bytes %zu is too small to receive rows of %zu bytes from %d ranks into the caller's "
                    "memory; at least %zu is needed",
                    ht->exchange->config.reserve_bytes, epx__row_shape_bytes(&job->shape), ht->members,
                    (size_t)ht->members * (epx__row_shape_bytes(&job->shape) + 2u * EPX__PAGE));
        }
    }
    return EPX_OK;
}

/* The handle keeps where each row came from, also when the caller wants no src_token. Ring rows are there already. */
static void keep_src_token(const rows_job_t *job)
{
    const epx__ht_routing_t *routing = job->routing;
    if (job->target->place.src_token) {
        memcpy(routing->src_token, job->target->place.src_token, 4 * (size_t)job->handle->rows);
        return;
    }
    int me = job->ht->exchange->rank;
    memcpy(routing->src_token + routing->start[me], routing->list + routing->list_start[me],
           4 * (size_t)(routing->list_start[me + 1] - routing->list_start[me]));
}

/* Rows past the last one in the worst-case mode. */
static void mark_tail(const rows_job_t *job)
{
    const epx_place_t *place = &job->target->place;
    size_t topk = job->shape.topk;
    for (size_t row = job->handle->rows; row < job->target->capacity; row++) {
        if (place->topk_idx)
            memset((uint8_t *)place->topk_idx + row * topk * job->shape.idx_bytes, 0xff, topk * job->shape.idx_bytes);
        if (place->topk_weights)
            memset(place->topk_weights + row * topk, 0, 4 * topk);
        if (place->src_token)
            place->src_token[row] = -1;
    }
}

epx_status_t epx__ht_cpu_rows(epx__exchange_t *exchange, epx__exchange_handle_t *handle, const epx_rows_t *rows,
                              bool first, const epx__target_t *target, epx_stream_t stream)
{
    (void)stream;
    epx__ht_cpu_t *ht = exchange->impl;
    const epx_dispatch_t *args = &handle->args;
    lane_t lanes[ht->members];
    int16_t lane_of[exchange->topology->ranks];
    rows_job_t job = {.ht = ht,
                      .handle = handle,
                      .routing = &ht->routing[handle->index],
                      .rows = rows,
                      .target = target,
                      .first = first,
                      .lanes = lanes,
                      .lane_of = lane_of};
    job.shape = (epx__row_shape_t){.row_bytes = rows->row_bytes,
                                   .side_bytes = rows->side_elem_bytes * rows->side_elems,
                                   .topk = first ? args->topk : 0,
                                   .idx_bytes = (uint32_t)args->topk_idx_bits / 8,
                                   .weights = first && args->topk && args->topk_weights,
                                   .src_token = 1};
    job.streaming = exchange->streaming && (uint64_t)args->tokens * rows->row_bytes > STREAM_BYTES;
    EPX__TRY(init_lanes(&job));
    if (ht->rails)
        EPX__TRY(epx__rail_rows_init(ht, handle, &job.shape, target));

    uint64_t shape = epx__shape_mix(0, job.shape.row_bytes);
    shape = epx__shape_mix(shape, rows->side_elem_bytes * 1000003u + rows->side_elems);
    shape = epx__shape_mix(shape, first);
    epx__half_t half = {.ht = ht,
                        .operation = first ? "dispatch_end" : "dispatch_again",
                        .kind = EPX__KIND_ROWS,
                        .generation = handle->generation,
                        .shape = shape,
                        .fill = fill,
                        .hear = hear,
                        .work = work,
                        .rail_fill = rail_fill,
                        .rail_heard = rail_heard,
                        .blame = blame,
                        .job = &job};
    EPX__TRY(epx__half_run(&half, args->timeout_ms));
    if (ht->rails)
        epx__rail_rows_end(ht, handle);
    if (first)
        keep_src_token(&job);
    if (handle->worst_case)
        mark_tail(&job);
    return EPX_OK;
}
