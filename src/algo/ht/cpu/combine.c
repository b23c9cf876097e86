/*
 * Combine: every owner reads the rows of its tokens where the expert ranks have them, and adds.
 *
 * A rank is two things at once. As owner it walks its tokens in order, as far as all of a token's rows are there, and
 * counts what it has read (`read`). As expert rank it stages what does not lie in its window (`staged`, within the
 * credit that `read` gives) and stays until everybody has read: then x may be overwritten.
 */
#include <inttypes.h>
#include <string.h>

#include "algo/ht/cpu/ht_cpu.h"
#include "algo/ht/cpu/rail.h"
#include "base/clock.h"
#include "base/fail.h"
#include "base/mutate.h"
#include "plan/format.h"

#define SUM_BYTES (4u << 20)   /* read by one step of summing, about */
#define STAGE_BYTES (1u << 20) /* staged by one step for one owner, about */
#define STREAM_BYTES (2u << 20)

typedef struct lane {
    /* As owner: rows of mine at that rank. */
    int32_t count, cursor; /* all, and read so far */
    uint64_t there;        /* of them, there to be read */
    const uint8_t *x, *weights;
    uint64_t x_stride;
    uint64_t x_ring, weights_ring; /* rows of the ring when x (weights) are staged, else 0 */
    /* As expert: rows here that belong to that rank. */
    int32_t in_count, in_staged;
    uint64_t ring_rows; /* of the ring I feed; 0: nothing is staged */
    epx_place_t ring;
} lane_t;

typedef struct combine_job {
    epx__ht_cpu_t *ht;
    const epx__exchange_handle_t *handle;
    const epx__ht_routing_t *routing;
    const epx_combine_t *args;
    size_t x_offset, weights_offset; /* in my window; 0: staged */
    size_t row_bytes, stride;
    uint32_t topk;
    bool weights, streaming;
    epx__row_shape_t staged; /* what a ring row holds */
    lane_t *lanes;
    int16_t *lane_of;
    uint32_t token, token_end; /* next to sum; end of the piece that workers do */
    int stage_member;
    int32_t stage_from, stage_to;
} combine_job_t;

/* ---- as owner ---- */

static const uint8_t *x_row(const lane_t *lane, uint64_t j)
{
    return lane->x + (lane->x_ring ? j % lane->x_ring : j) * lane->x_stride;
}

static void add_weights(const combine_job_t *job, uint32_t token, const lane_t *const *lanes, const uint64_t *row,
                        int n)
{
    float *out = job->args->out_topk_weights + (size_t)token * job->topk;
    for (uint32_t k = 0; k < job->topk; k++) {
        float sum = 0.0f;
        for (int i = 0; i < n; i++) {
            uint64_t j = lanes[i]->weights_ring ? row[i] % lanes[i]->weights_ring : row[i];
            float weight;
            memcpy(&weight, lanes[i]->weights + (j * job->topk + k) * 4, 4);
            sum += weight;
        }
        out[k] = sum;
    }
}

static void sum_token(const combine_job_t *job, uint32_t token)
{
    uint32_t slots = job->handle->slots;
    const lane_t *lanes[slots];
    const void *rows[slots];
    uint64_t row[slots];
    int n = 0;
    for (uint32_t s = 0; s < slots; s++) {
        size_t at = (size_t)token * slots + s;
        int32_t rank = job->routing->dst_rank[at];
        if (rank < 0)
            break;
        lanes[n] = &job->lanes[job->lane_of[rank]];
        row[n] = (uint64_t)(job->routing->dst_row[at] - job->routing->first[rank]);
        rows[n] = x_row(lanes[n], row[n]);
        n++;
    }
    const void *bias[2];
    int biases = 0;
    for (int b = 0; b < 2; b++)
        if (job->args->bias[b])
            bias[biases++] = (const uint8_t *)job->args->bias[b] + (size_t)token * job->row_bytes;
    epx__sum_rows((uint8_t *)job->args->out + (size_t)token * job->row_bytes, rows, n, bias, biases, job->args->hidden,
                  job->args->dtype, job->streaming);
    if (job->weights && job->args->out_topk_weights)
        add_weights(job, token, lanes, row, n);
}

static void sum_part(void *context, int part, int parts)
{
    const combine_job_t *job = context;
    uint32_t span = job->token_end - job->token;
    uint32_t from = job->token + (uint32_t)((uint64_t)span * (uint32_t)part / (uint32_t)parts);
    uint32_t to = job->token + (uint32_t)((uint64_t)span * (uint32_t)(part + 1) / (uint32_t)parts);
    for (uint32_t t = from; t < to; t++)
        sum_token(job, t);
    epx__copy_fence();
}

/* Are all rows of this token there? If so count them as read. */
static bool token_ready(combine_job_t *job, uint32_t token)
{
    uint32_t slots = job->handle->slots;
    const int32_t *rank = job->routing->dst_rank + (size_t)token * slots;
    for (uint32_t s = 0; s < slots && rank[s] >= 0; s++) {
        const lane_t *lane = &job->lanes[job->lane_of[rank[s]]];
        if ((uint64_t)lane->cursor >= lane->there)
            return false;
    }
    for (uint32_t s = 0; s < slots && rank[s] >= 0; s++)
        job->lanes[job->lane_of[rank[s]]].cursor++;
    return true;
}

static void look_for_rows(combine_job_t *job)
{
    for (int i = 0; i < job->ht->members; i++) {
        lane_t *lane = &job->lanes[i];
        const epx__ht_peer_t *peer = &job->ht->peers[i];
        if (peer == job->ht->self || !peer->heard || lane->there == (uint64_t)lane->count)
            continue;
        if (lane->x_ring || lane->weights_ring)
            lane->there = epx__word_load(&peer->from_it->staged) - peer->pulled + (uint64_t)lane->cursor;
        else
            lane->there = (uint64_t)lane->count;
    }
}

static void tell_read(combine_job_t *job, const int32_t *before)
{
    for (int i = 0; i < job->ht->members; i++) {
        epx__ht_peer_t *peer = &job->ht->peers[i];
        int32_t rows = job->lanes[i].cursor - before[i];
        if (peer == job->ht->self || rows == 0)
            continue;
        peer->pulled += (uint64_t)rows;
        job->ht->exchange->traffic.domain_bytes += (uint64_t)rows * job->row_bytes;
        epx__word_post(peer, &peer->to_it->read, peer->pulled);
    }
}

static bool sum_step(combine_job_t *job)
{
    uint32_t tokens = job->handle->args.tokens;
    if (job->token == tokens)
        return false;
    int32_t before[job->ht->members];
    for (int i = 0; i < job->ht->members; i++)
        before[i] = job->lanes[i].cursor;
    look_for_rows(job);
    uint32_t most = (uint32_t)(SUM_BYTES / (job->row_bytes * job->handle->slots)) + 1;
    uint32_t end = job->token;
    while (end < tokens && end - job->token < most && token_ready(job, end))
        end++;
    if (end == job->token)
        return false;
    job->token_end = end;
    if (EPX__MUTATE(read_first)) {
        tell_read(job, before);
        for (int i = 0; i < job->ht->members; i++)
            before[i] = job->lanes[i].cursor;
    }
    epx__workers_run(job->ht->workers, sum_part, job);
    job->token = end;
    tell_read(job, before);
    return true;
}

/* ---- as expert rank ---- */

static void stage_part(void *context, int part, int parts)
{
    combine_job_t *job = context;
    const lane_t *lane = &job->lanes[job->stage_member];
    size_t start = (size_t)job->routing->start[job->ht->peers[job->stage_member].rank];
    int64_t span = job->stage_to - job->stage_from;
    int32_t from = job->stage_from + (int32_t)(span * part / parts);
    int32_t to = job->stage_from + (int32_t)(span * (part + 1) / parts);
    for (int32_t j = from; j < to; j++) {
        size_t slot = (size_t)((uint64_t)j % lane->ring_rows), row = start + (size_t)j;
        if (job->staged.row_bytes)
            epx__copy_row((uint8_t *)lane->ring.x + slot * job->row_bytes,
                          (const uint8_t *)job->args->x + row * job->stride, job->row_bytes, false);
        if (job->staged.topk)
            memcpy(lane->ring.topk_weights + slot * job->topk, job->args->topk_weights + row * job->topk,
                   4 * job->topk);
    }
}

static bool stage_step(combine_job_t *job, int member)
{
    lane_t *lane = &job->lanes[member];
    epx__ht_peer_t *peer = &job->ht->peers[member];
    if (lane->ring_rows == 0 || lane->in_staged == lane->in_count)
        return false;
    uint64_t room = lane->ring_rows - (peer->staged - epx__word_load(&peer->from_it->read));
    if (EPX__MUTATE(stage_no_credit))
        room = lane->ring_rows;
    uint64_t left = (uint64_t)(lane->in_count - lane->in_staged);
    uint64_t most = STAGE_BYTES / epx__row_shape_bytes(&job->staged) + 1;
    uint64_t rows = left < room ? left : room;
    rows = rows < most ? rows : most;
    if (rows == 0)
        return false;
    job->stage_member = member;
    job->stage_from = lane->in_staged;
    job->stage_to = lane->in_staged + (int32_t)rows;
    if (EPX__MUTATE(staged_first)) {
        epx__word_post(peer, &peer->to_it->staged, peer->staged + rows);
        epx__sleep_ns(50000); /* a few rows are written too fast to be seen missing */
    }
    epx__workers_run(job->ht->workers, stage_part, job);
    lane->in_staged += (int32_t)rows;
    peer->staged += rows;
    epx__word_post(peer, &peer->to_it->staged, peer->staged);
    return true;
}

/* ---- the half ---- */

static void fill(epx__half_t *half, epx__ht_peer_t *peer, epx__message_t *message, void *tail)
{
    (void)tail;
    const combine_job_t *job = half->job;
    const lane_t *lane = &job->lanes[peer - half->ht->peers];
    uint64_t start = (uint64_t)job->routing->start[peer->rank];
    if (job->x_offset) {
        message->x = job->x_offset + start * job->stride;
        message->x_stride = job->stride;
    }
    if (job->weights_offset)
        message->weights = job->weights_offset + start * job->topk * 4;
    message->ring = lane->ring_rows ? epx__ht_ring_offset(half->ht, peer) : 0;
    message->ring_rows = lane->ring_rows;
}

static epx_status_t hear(epx__half_t *half, epx__ht_peer_t *peer, const void *tail)
{
    (void)tail;
    const combine_job_t *job = half->job;
    lane_t *lane = &job->lanes[peer - half->ht->peers];
    const epx__message_t *mail = &peer->mail;
    epx__row_shape_t staged = {.row_bytes = mail->x ? 0 : job->row_bytes,
                               .topk = job->weights && !mail->weights ? job->topk : 0,
                               .weights = 1};
    epx_place_t ring = epx__place_at(peer->base + mail->ring, &staged, mail->ring_rows);
    lane->x = mail->x ? peer->base + mail->x : ring.x;
    lane->x_stride = mail->x ? mail->x_stride : job->row_bytes;
    lane->x_ring = mail->x ? 0 : mail->ring_rows;
    lane->weights = mail->weights ? peer->base + mail->weights : (const uint8_t *)ring.topk_weights;
    lane->weights_ring = mail->weights || !job->weights ? 0 : mail->ring_rows;
    return EPX_OK;
}

static epx__step_t work(epx__half_t *half)
{
    combine_job_t *job = half->job;
    bool moved = sum_step(job), done = job->token == job->handle->args.tokens;
    for (int i = 0; i < job->ht->members; i++) {
        const epx__ht_peer_t *peer = &job->ht->peers[i];
        if (peer == job->ht->self)
            continue;
        moved |= stage_step(job, i);
        done &= epx__word_load(&peer->from_it->read) == peer->lent || EPX__MUTATE(x_reused_early);
    }
    return done ? EPX__STEP_DONE : moved ? EPX__STEP_MOVED : EPX__STEP_STUCK;
}

/* Outputs that are not there are that rank's own doing; unread rows may mean that their reader waits for another. */
static void blame(epx__half_t *half, epx__blame_t *out)
{
    combine_job_t *job = half->job;
    for (int i = 0; i < job->ht->members; i++) {
        const lane_t *lane = &job->lanes[i];
        if (lane->cursor < lane->count && (uint64_t)lane->cursor >= lane->there)
            epx__blame_rank(out, job->ht->peers[i].rank, "its expert outputs", (uint64_t)lane->count, lane->there);
    }
    for (int i = 0; i < job->ht->members; i++) {
        const epx__ht_peer_t *peer = &job->ht->peers[i];
        uint64_t read = epx__word_load(&peer->from_it->read);
        if (peer != job->ht->self && read != peer->lent)
            epx__blame_rank(out, peer->rank, "having read its rows", peer->lent, read);
    }
}

static epx_status_t init_lanes(combine_job_t *job)
{
    epx__ht_cpu_t *ht = job->ht;
    const epx_combine_t *args = job->args;
    int ranks = ht->exchange->topology->ranks, me = ht->exchange->rank;
    for (int i = 0; i < ht->members; i++) {
        lane_t *lane = &job->lanes[i];
        epx__ht_peer_t *peer = &ht->peers[i];
        *lane = (lane_t){.count = job->handle->matrix[(size_t)me * (size_t)ranks + (size_t)peer->rank],
                         .in_count = job->handle->matrix[(size_t)peer->rank * (size_t)ranks + (size_t)me]};
        job->lane_of[peer->rank] = (int16_t)i;
        size_t start = (size_t)job->routing->start[me];
        if (peer == ht->self) {
            lane->x = (const uint8_t *)args->x + start * job->stride;
            lane->x_stride = job->stride;
            lane->weights = (const uint8_t *)(args->topk_weights ? args->topk_weights + start * job->topk : NULL);
            lane->there = (uint64_t)lane->count;
        } else if (lane->in_count > 0 && epx__row_shape_bytes(&job->staged) > 0) {
            lane->ring_rows = epx__place_capacity(&job->staged, epx__ht_ring_bytes(ht));
            if (lane->ring_rows > (uint64_t)lane->in_count)
                lane->ring_rows = (uint64_t)lane->in_count;
            lane->ring = epx__place_at(ht->window + epx__ht_ring_offset(ht, peer), &job->staged, lane->ring_rows);
            if (lane->ring_rows == 0)
                return epx__fail(
                    EPX_E_INVALID,
                    "reserve_bytes %zu is too small to stage rows of %zu bytes for %d ranks: at least %zu is "
                    "needed, or put x into a lease",
                    ht->exchange->config.reserve_bytes, epx__row_shape_bytes(&job->staged), ht->members,
                    (size_t)ht->members * (epx__row_shape_bytes(&job->staged) + 2u * EPX__PAGE));
        }
    }
    return EPX_OK;
}

/* Rows that peers have to read of mine in this half. */
static void lend(combine_job_t *job)
{
    for (int i = 0; i < job->ht->members; i++) {
        epx__ht_peer_t *peer = &job->ht->peers[i];
        if (peer == job->ht->self)
            continue;
        peer->lent += (uint64_t)job->lanes[i].in_count;
        if (job->lanes[i].ring_rows > 0 || EPX__MUTATE(staged_direct_missing))
            continue;
        /* Read in place: all are there. Counted as staged, for `read` counts them too and a later ring compares the
         * two. The mail that follows wakes the reader. */
        peer->staged += (uint64_t)job->lanes[i].in_count;
        __atomic_store_n(&peer->to_it->staged, peer->staged, __ATOMIC_RELEASE);
    }
}

epx_status_t epx__ht_cpu_combine(epx__exchange_t *exchange, epx__exchange_handle_t *handle,
                                 const epx_combine_t *combine, size_t x_offset, epx_stream_t stream)
{
    (void)stream;
    epx__ht_cpu_t *ht = exchange->impl;
    if (ht->rails)
        return epx__ht_rail_combine(exchange, handle, combine, x_offset);
    lane_t lanes[ht->members];
    int16_t lane_of[exchange->topology->ranks];
    combine_job_t job = {.ht = ht,
                         .handle = handle,
                         .routing = &ht->routing[handle->index],
                         .args = combine,
                         .x_offset = x_offset == SIZE_MAX ? 0 : x_offset,
                         .row_bytes = combine->hidden * epx__dtype_bytes(combine->dtype),
                         .stride = combine->x_stride_bytes,
                         .topk = handle->args.topk,
                         .weights = combine->topk_weights != NULL,
                         .lanes = lanes,
                         .lane_of = lane_of};
    job.weights_offset = epx__weights_offset(ht, combine->topk_weights);
    job.staged = (epx__row_shape_t){.row_bytes = job.x_offset ? 0 : job.row_bytes,
                                    .topk = job.weights && !job.weights_offset ? job.topk : 0,
                                    .weights = 1};
    job.streaming = exchange->streaming && (uint64_t)handle->args.tokens * job.row_bytes > STREAM_BYTES;
    EPX__TRY(init_lanes(&job));
    lend(&job);

    uint64_t shape = epx__shape_mix(0, job.row_bytes);
    shape = epx__shape_mix(shape, (uint64_t)combine->dtype);
    shape = epx__shape_mix(shape, job.weights);
    epx__half_t half = {.ht = ht,
                        .operation = "combine",
                        .kind = EPX__KIND_COMBINE,
                        .generation = handle->generation,
                        .shape = shape,
                        .fill = fill,
                        .hear = hear,
                        .work = work,
                        .blame = blame,
                        .job = &job};
    return epx__half_run(&half, combine->timeout_ms);
}
