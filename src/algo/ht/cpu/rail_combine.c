/*
 * Combine with several domains. A rank is four things at once, each a bounded step that never waits:
 *
 *   expert   stages, for each rank i of its domain and each domain d, the rows that belong to rank (d, i), when x does
 *            not lie in the window: a ring per (i, d), `staged` and `read`
 *   rail     sums, for each other domain d, its domain's rows of each crossing token of its rail there, in rank order,
 *            rounds once, and sends the sums in chunks
 *   owner    adds each of its tokens' domain sums in domain order: its own domain's in fp32 as it is, the others as
 *            they came; then the biases; rounds once
 *   lender   stays until everybody has read its rows: then x may be overwritten
 *
 * No circle: every stream (a staging ring, a rail's ring) is read in token order by one reader, streams share nothing,
 * and an owner that waits for one row of token t has read all rows of earlier tokens, so the stream that would bring it
 * has room. The words of stage and read count over all combines, staged or not.
 */
#include "algo/ht/cpu/rail_combine.h"

#include <string.h>

#include "base/fail.h"
#include "base/mutate.h"
#include "plan/format.h"

#define STREAM_BYTES (2u << 20) /* below this in all, rows stay in the cache */

/* ---- owner ---- */

/* Which ranks of domain d a token goes to, as a mask; false when none. */
static bool mask_of(const epx__rail_combine_t *job, uint32_t token, int d, uint8_t *mask)
{
    const epx__topology_t *topology = job->rails->rails->topology;
    const int32_t *rank = job->routing->dst_rank + (size_t)token * job->handle->slots;
    bool any = false;
    memset(mask, 0, job->rails->rails->layout.mask_bytes);
    for (uint32_t s = 0; s < job->handle->slots && rank[s] >= 0; s++)
        if (topology->domain_of[rank[s]] == d) {
            int i = topology->index_of[rank[s]];
            mask[i / 8] |= (uint8_t)(1u << (i % 8));
            any = true;
        }
    return any;
}

static bool crosses(const epx__rail_combine_t *job, uint32_t token, int d)
{
    const int32_t *tokens = job->crossing->cross_token + (size_t)d * job->rails->rails->tokens_max;
    return job->came[d] < (uint32_t)job->crossing->cross_count[d] && tokens[job->came[d]] == (int32_t)token;
}

/* The sums of other domains for this token, by domain; NULL where it did not go. `came` advances. */
static void take_sums(epx__rail_combine_t *job, uint32_t token, const uint8_t **sums)
{
    epx__ht_rails_t *rails = job->rails;
    for (int d = 0; d < rails->domains; d++) {
        sums[d] = NULL;
        if (d == rails->home || !crosses(job, token, d))
            continue;
        uint8_t *ring = (uint8_t *)rails->rails->window.base + epx__rails_receive(rails->rails, d);
        sums[d] = epx__rail_row(ring, &rails->rail[d].in, job->came[d]++);
    }
}

static void owner_part(void *context, int part, int parts)
{
    const epx__rail_combine_t *job = context;
    const epx__combine_batch_t *batch = job->batch;
    size_t members = (size_t)job->rails->members, domains = (size_t)job->rails->domains;
    uint32_t from = batch->n * (uint32_t)part / (uint32_t)parts, to = batch->n * (uint32_t)(part + 1) / (uint32_t)parts;
    for (uint32_t i = from; i < to; i++) {
        epx__rail_rows_t own = {batch->rows + i * members, batch->weights + i * members, batch->count[i]};
        epx__rail_sum_t sum = {.args = job->args,
                               .row_bytes = job->row_bytes,
                               .topk = job->topk,
                               .weights = job->weights,
                               .streaming = job->streaming,
                               .domains = job->rails->domains,
                               .home = job->rails->home,
                               .members = job->rails->members,
                               .own = &own,
                               .sums = batch->sums + i * domains};
        epx__rail_sum(&sum, job->token + i);
    }
    epx__copy_fence();
}

/* Are the other domains' sums of this token here? */
static bool sums_there(const epx__rail_combine_t *job, uint32_t token)
{
    const epx__ht_rails_t *rails = job->rails;
    for (int d = 0; d < rails->domains; d++)
        if (d != rails->home && crosses(job, token, d) && job->came[d] >= rails->rail[d].in.moved)
            return EPX__MUTATE(rail_sum_early);
    return true;
}

/* The next tokens all of whose rows are here. */
static void find_batch(epx__rail_combine_t *job)
{
    epx__ht_rails_t *rails = job->rails;
    epx__combine_batch_t *batch = job->batch;
    uint32_t left = job->handle->args.tokens - job->token,
             most = (uint32_t)(EPX__COMBINE_STEP_BYTES / job->row_bytes) + 1;
    size_t members = (size_t)rails->members;
    uint8_t mask[rails->rails->layout.mask_bytes];
    for (batch->n = 0; batch->n < left && batch->n < most && batch->n < EPX__COMBINE_BATCH; batch->n++) {
        uint32_t i = batch->n, token = job->token + i;
        if (!sums_there(job, token))
            return;
        batch->count[i] = 0;
        if (mask_of(job, token, rails->home, mask))
            batch->count[i] =
                epx__combine_take(job, rails->home, mask, batch->rows + i * members, batch->weights + i * members);
        if (batch->count[i] < 0)
            return;
        take_sums(job, token, batch->sums + (size_t)i * (size_t)rails->domains);
    }
}

static bool owner_step(epx__half_t *half, epx__rail_combine_t *job)
{
    epx__ht_rails_t *rails = job->rails;
    uint32_t before[rails->members];
    bool moved = false;
    for (int d = 0; d < rails->domains; d++)
        if (d != rails->home)
            epx__rail_look(&rails->rail[d]);
    epx__combine_remember(job, rails->home, before);
    epx__combine_look(job, rails->home);
    find_batch(job);
    if (job->batch->n) {
        epx__workers_run(job->ht->workers, owner_part, job);
        job->token += job->batch->n;
        epx__combine_tell_read(job, rails->home, before);
        moved = true;
    }
    for (int d = 0; d < rails->domains; d++)
        if (d != rails->home && rails->rail[d].in.freed < job->came[d])
            moved |= epx__rail_free(half, &rails->rail[d], job->came[d]);
    return moved;
}

/* ---- the half ---- */

static void fill(epx__half_t *half, epx__ht_peer_t *peer, epx__message_t *message, void *tail)
{
    (void)tail;
    (void)peer;
    const epx__rail_combine_t *job = half->job;
    message->x = job->x_offset;
    message->x_stride = job->args->x_stride_bytes;
    message->weights = job->weights_offset;
    message->ring_rows = job->stage_rows;
}

static void member_of(epx__rail_combine_t *job, int e, const uint8_t *base, const epx__message_t *mail)
{
    epx__combine_member_t *m = &job->members[e];
    m->x = base + mail->x;
    m->x_stride = (size_t)mail->x_stride;
    m->weights = base + mail->weights;
    m->x_staged = mail->x == 0;
    m->weights_staged = job->weights && mail->weights == 0;
    m->ring_rows = mail->ring_rows;
}

static epx_status_t hear(epx__half_t *half, epx__ht_peer_t *peer, const void *tail)
{
    (void)tail;
    epx__rail_combine_t *job = half->job;
    member_of(job, (int)(peer - half->ht->peers), peer->base, &peer->mail);
    return EPX_OK;
}

static epx__step_t work(epx__half_t *half)
{
    epx__rail_combine_t *job = half->job;
    epx__ht_rails_t *rails = job->rails;
    bool moved = false, done = true;
    if (!half->rails_done)
        return EPX__STEP_STUCK;
    for (int n = 1; n <= rails->domains; n++) { /* what others wait for first, my own last */
        int d = (rails->home + n) % rails->domains;
        for (int i = 0; i < rails->members; i++)
            moved |= epx__combine_stage_step(job, i, d);
        if (d == rails->home)
            continue;
        moved |= epx__combine_rail_step(half, job, &rails->rail[d]);
        done &= rails->rail[d].out.moved == rails->rail[d].out.total;
    }
    moved |= owner_step(half, job);
    done &= job->token == job->handle->args.tokens;
    for (int i = 0; i < rails->members; i++)
        for (int d = 0; d < rails->domains; d++) {
            uint64_t read = epx__word_load(&epx__rails_words(rails->rails, rails->index, i, d)->read);
            done &= read >= rails->lent[epx__combine_at(job, i, d)] + job->stages[epx__combine_at(job, i, d)].count;
        }
    for (int d = 0; d < rails->domains; d++)
        done &= d == rails->home || rails->rail[d].in.freed == rails->rail[d].in.total;
    done = done && epx__rail_let_go(rails);
    if (half->status != EPX_OK)
        return EPX__STEP_FAILED;
    return done ? EPX__STEP_DONE : moved ? EPX__STEP_MOVED : EPX__STEP_STUCK;
}

static void blame(epx__half_t *half, epx__blame_t *out)
{
    epx__rail_combine_t *job = half->job;
    const epx__ht_rails_t *rails = job->rails;
    for (int d = 0; d < rails->domains; d++) {
        const epx__ht_rail_t *rail = &rails->rail[d];
        for (int e = 0; e < rails->members; e++) {
            const epx__combine_source_t *source = &job->sources[epx__combine_at(job, e, d)];
            if (source->cursor < source->count && source->cursor >= source->there)
                epx__blame_rank(out, job->ht->peers[e].rank, "its expert outputs", source->count, source->there);
        }
        if (d != rails->home && rail->in.moved < rail->in.total)
            epx__blame_rank(out, rail->rank, "its domain's sums", rail->in.total, rail->in.moved);
        if (d != rails->home && rail->out.moved < rail->out.total)
            epx__blame_rank(out, rail->rank, "room in its receive ring", rail->out.total, rail->out.moved);
    }
    epx__rail_blame_straight(rails, out);
    for (int i = 0; i < rails->members; i++)
        for (int d = 0; d < rails->domains; d++) {
            uint64_t expected = rails->lent[epx__combine_at(job, i, d)] + job->stages[epx__combine_at(job, i, d)].count;
            uint64_t read = epx__word_load(&epx__rails_words(rails->rails, rails->index, i, d)->read);
            if (read < expected)
                epx__blame_rank(out, job->ht->peers[i].rank, "having read its rows", expected, read);
        }
}

/* First row at rank `where` of `source`. */
static size_t first_row(const epx__rail_combine_t *job, int where, int source)
{
    size_t ranks = (size_t)job->ht->exchange->topology->ranks, row = 0;
    for (int s = 0; s < source; s++)
        row += (size_t)job->handle->matrix[(size_t)s * ranks + (size_t)where];
    return row;
}

static epx_status_t init_streams(epx__rail_combine_t *job)
{
    epx__ht_rails_t *rails = job->rails;
    const epx__topology_t *topology = rails->rails->topology;
    size_t ranks = (size_t)topology->ranks;
    int me = job->ht->exchange->rank;
    for (int d = 0; d < rails->domains; d++) {
        epx__ht_rail_t *rail = &rails->rail[d];
        job->came[d] = 0;
        for (int i = 0; i < rails->members; i++) {
            size_t theirs = (size_t)epx__topology_rank(topology, d, i);
            size_t mine = (size_t)epx__topology_rank(topology, d, rails->index);
            job->stages[epx__combine_at(job, i, d)] =
                (epx__combine_stage_t){.count = (uint32_t)job->handle->matrix[theirs * ranks + (size_t)me]};
            job->sources[epx__combine_at(job, i, d)] = (epx__combine_source_t){
                .count = (uint32_t)job->handle->matrix[mine * ranks + (size_t)job->ht->peers[i].rank],
                .start = first_row(job, job->ht->peers[i].rank, (int)mine)};
        }
        if (d == rails->home)
            continue;
        uint32_t out = (uint32_t)job->crossing->in_count[epx__combine_at(job, rails->index, d)];
        uint32_t in = (uint32_t)job->crossing->cross_count[d];
        EPX__TRY(epx__rail_stream_init(rails, &rail->out, job->record, out, rail->chunks_sent));
        EPX__TRY(epx__rail_stream_init(rails, &rail->in, job->record, in, rail->chunks_freed));
    }
    if (epx__row_shape_bytes(&job->staged) > 0 && rails->members > 1) {
        job->stage_rows = epx__place_capacity(&job->staged, epx__combine_ring_bytes(job));
        if (job->stage_rows == 0)
            return epx__fail(EPX_E_INVALID,
                             "reserve_bytes %zu is too small to stage rows of %zu bytes for %zu ranks: at least %zu is "
                             "needed, or put x into a lease",
                             job->ht->exchange->config.reserve_bytes, epx__row_shape_bytes(&job->staged), ranks,
                             ranks * (epx__row_shape_bytes(&job->staged) + 2u * EPX__PAGE));
    }
    return EPX_OK;
}

static void count_on(epx__rail_combine_t *job)
{
    size_t n = (size_t)job->rails->members * (size_t)job->rails->domains;
    for (size_t i = 0; i < n; i++) {
        job->rails->lent[i] += job->stages[i].count;
        job->rails->pulled[i] += job->sources[i].count;
    }
}

static epx_status_t run(epx__rail_combine_t *job)
{
    const epx_combine_t *args = job->args;
    uint64_t shape = epx__shape_mix(0, job->row_bytes);
    shape = epx__shape_mix(shape, (uint64_t)args->dtype);
    shape = epx__shape_mix(shape, job->weights);
    epx__half_t half = {.ht = job->ht,
                        .operation = "combine",
                        .kind = EPX__KIND_COMBINE,
                        .generation = job->handle->generation,
                        .shape = shape,
                        .fill = fill,
                        .hear = hear,
                        .work = work,
                        .blame = blame,
                        .job = job};
    EPX__TRY(init_streams(job));
    /* My own rows are read where they are. */
    int self = job->rails->index;
    job->members[self] = (epx__combine_member_t){
        .x = args->x, .x_stride = args->x_stride_bytes, .weights = (const uint8_t *)args->topk_weights};
    EPX__TRY(epx__half_run(&half, args->timeout_ms));
    count_on(job);
    return EPX_OK;
}

epx_status_t epx__ht_rail_combine(epx__exchange_t *exchange, epx__exchange_handle_t *handle,
                                  const epx_combine_t *combine, size_t x_offset)
{
    epx__ht_cpu_t *ht = exchange->impl;
    epx__ht_rails_t *rails = ht->rails;
    size_t pairs = (size_t)rails->members * (size_t)rails->domains;
    epx__combine_member_t members[rails->members];
    epx__combine_source_t sources[pairs];
    epx__combine_stage_t stages[pairs];
    uint32_t came[rails->domains];
    size_t members_n = (size_t)rails->members, domains_n = (size_t)rails->domains;
    const void *rows[EPX__COMBINE_BATCH * members_n];
    const uint8_t *row_weights[EPX__COMBINE_BATCH * members_n], *sums[EPX__COMBINE_BATCH * domains_n];
    epx__combine_batch_t batch = {.rows = rows, .weights = row_weights, .sums = sums};
    epx__rail_combine_t job = {.ht = ht,
                               .rails = rails,
                               .handle = handle,
                               .routing = &ht->routing[handle->index],
                               .crossing = &rails->routing[handle->index],
                               .args = combine,
                               .x_offset = x_offset == SIZE_MAX ? 0 : x_offset,
                               .row_bytes = combine->hidden * epx__dtype_bytes(combine->dtype),
                               .topk = handle->args.topk,
                               .weights = combine->topk_weights != NULL,
                               .streaming = exchange->streaming && (uint64_t)handle->args.tokens * combine->hidden *
                                                                           epx__dtype_bytes(combine->dtype) >
                                                                       STREAM_BYTES,
                               .members = members,
                               .sources = sources,
                               .stages = stages,
                               .came = came,
                               .batch = &batch};
    job.weights_offset = epx__weights_offset(ht, combine->topk_weights);
    job.staged = (epx__row_shape_t){.row_bytes = job.x_offset ? 0 : job.row_bytes,
                                    .topk = job.weights && !job.weights_offset ? job.topk : 0,
                                    .weights = 1};
    job.record = (job.row_bytes + (job.weights ? 4 * (size_t)job.topk : 0) + 15) / 16 * 16;
    return run(&job);
}
