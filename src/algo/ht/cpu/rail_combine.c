/*
 * Combine with several domains. A rank is four things at once, each a bounded step that never waits:
 *   expert   stages, for each rank i of its domain and each domain d, the rows that belong to rank (d, i), when x does
 * not lie in the window: a ring per (i, d), `staged` and `read` rail     sums, for each other domain d, its domain's
 * rows of each crossing token of its rail there, in rank order, rounds once, and sends the sums in chunks owner    adds
 * each of its tokens' domain sums in domain order: its own domain's in fp32 as it is, the others as they came; then the
 * biases; rounds once lender   stays until everybody has read its rows: then x may be overwritten
 *
 * No circle: every stream (a staging ring, a rail's ring) is read in token order by one reader, streams share nothing,
 * and an owner that waits for one row of token t has read all rows of earlier tokens, so the stream that would bring it
 * has room. The words of stage and read count over all combines, staged or not.
 */
#include <string.h>

#include "algo/ht/cpu/rail.h"
#include "base/fail.h"
#include "base/mutate.h"
#include "plan/format.h"

#define STREAM_BYTES (2u << 20) /* below this in all, rows stay in the cache */
#define STEP_BYTES (2u << 20)   /* summed or staged by one step of one stream, about */

/* Rows of member e for one domain's tokens of mine (or of my rail there). */
typedef struct source {
    uint32_t count, cursor; /* all, and read */
    uint32_t there;         /* to be read */
    size_t start;           /* first of them at that member */
} source_t;

/* Rows of mine that member i reads for domain d's tokens. */
typedef struct stage {
    uint32_t count, staged;
    bool done; /* read by its reader */
} stage_t;

typedef struct member {
    const uint8_t *x, *weights; /* row 0 of what it received, when it is read in place */
    size_t x_stride;
    bool x_staged, weights_staged;
    uint64_t ring_rows;
} member_t;

/* Tokens whose rows have been found, to be added by all threads. */
#define BATCH 64u
typedef struct batch {
    uint32_t n;
    int count[BATCH];        /* rows of the own domain */
    uint8_t *to[BATCH];      /* rail: where the sum goes */
    const void **rows;       /* [BATCH][members] */
    const uint8_t **weights; /* [BATCH][members] */
    const uint8_t **sums;    /* [BATCH][domains], owner */
} batch_t;

typedef struct combine_job {
    epx__ht_cpu_t *ht;
    epx__ht_rails_t *rails;
    const epx__exchange_handle_t *handle;
    const epx__ht_routing_t *routing;
    const epx__rail_routing_t *crossing;
    const epx_combine_t *args;
    size_t x_offset, weights_offset, row_bytes;
    uint32_t topk;
    bool weights, streaming;
    size_t record; /* of a sum on the network: row, then weights */
    epx__row_shape_t staged;
    uint64_t stage_rows; /* of one of my rings */
    member_t *members;   /* [members] */
    source_t *sources;   /* [members][domains] */
    stage_t *stages;     /* [members][domains] */
    uint32_t token;      /* owner: next */
    uint32_t *came;      /* [domains] owner: rows used of that domain's sums */
    batch_t *batch;
} combine_job_t;

static size_t at(const combine_job_t *job, int member, int domain)
{
    return (size_t)member * (size_t)job->rails->domains + (size_t)domain;
}

/* The ring in expert e's reserve for reader i and domain d: one piece each. */
static size_t ring_bytes(const combine_job_t *job)
{
    size_t pieces = (size_t)job->rails->members * (size_t)job->rails->domains;
    return job->ht->exchange->layout.reserve_bytes / pieces / EPX__ROW_ALIGN * EPX__ROW_ALIGN;
}

static uint8_t *ring_at(const combine_job_t *job, uint8_t *window, int reader, int domain)
{
    return window + job->ht->exchange->layout.reserve_offset + at(job, reader, domain) * ring_bytes(job);
}

/* First row at rank `where` of `source`. */
static size_t first_row(const combine_job_t *job, int where, int source)
{
    size_t ranks = (size_t)job->ht->exchange->topology->ranks, row = 0;
    for (int s = 0; s < source; s++)
        row += (size_t)job->handle->matrix[(size_t)s * ranks + (size_t)where];
    return row;
}

/* ---- reading rows of a member ---- */

/* Where member e's row j for (domain d, my index) is, and its weights. */
static const uint8_t *row_of(const combine_job_t *job, int e, int d, size_t start, uint32_t j, const uint8_t **weights)
{
    const member_t *m = &job->members[e];
    const uint8_t *x = m->x + (start + j) * m->x_stride;
    *weights = m->weights + (start + j) * job->topk * 4;
    if (!m->x_staged && !m->weights_staged)
        return x;
    epx__row_shape_t shape = {
        .row_bytes = m->x_staged ? job->row_bytes : 0, .topk = m->weights_staged ? job->topk : 0, .weights = 1};
    epx_place_t ring = epx__place_at(ring_at(job, job->ht->peers[e].base, job->rails->index, d), &shape, m->ring_rows);
    size_t slot = j % m->ring_rows;
    if (m->x_staged)
        x = (const uint8_t *)ring.x + slot * job->row_bytes;
    if (m->weights_staged)
        *weights = (const uint8_t *)ring.topk_weights + slot * job->topk * 4;
    return x;
}

static void look_for_rows(combine_job_t *job, int d)
{
    for (int e = 0; e < job->rails->members; e++) {
        source_t *source = &job->sources[at(job, e, d)];
        const member_t *m = &job->members[e];
        if (source->there == source->count || !job->ht->peers[e].heard)
            continue;
        if (!m->x_staged && !m->weights_staged) {
            source->there = source->count;
            continue;
        }
        uint64_t base = job->rails->pulled[at(job, e, d)];
        uint64_t ever = epx__word_load(&epx__rails_words(job->rails->rails, job->rails->index, e, d)->staged);
        source->there = ever > base ? (uint32_t)(ever - base) : 0;
    }
}

static void tell_read(combine_job_t *job, int d, const uint32_t *before)
{
    for (int e = 0; e < job->rails->members; e++) {
        const source_t *source = &job->sources[at(job, e, d)];
        if (source->cursor == before[e])
            continue;
        epx__ht_peer_t *peer = &job->ht->peers[e];
        uint64_t bytes = (uint64_t)(source->cursor - before[e]) * job->row_bytes;
        if (peer == job->ht->self)
            job->ht->exchange->traffic.local_bytes += bytes;
        else
            job->ht->exchange->traffic.domain_bytes += bytes;
        epx__rail_words_t *words = epx__rails_words(job->rails->rails, e, job->rails->index, d);
        epx__word_post(peer, &words->read, job->rails->pulled[at(job, e, d)] + source->cursor);
    }
}

static void remember(const combine_job_t *job, int d, uint32_t *before)
{
    for (int e = 0; e < job->rails->members; e++)
        before[e] = job->sources[at(job, e, d)].cursor;
}

/* Take the next row of each member in `mask`, if all are there: n rows, in rank order; -1 when not. */
static int take_rows(combine_job_t *job, int d, const uint8_t *mask, const void **rows, const uint8_t **weights)
{
    int n = 0;
    for (int e = 0; e < job->rails->members; e++)
        if (mask[e / 8] >> (e % 8) & 1) {
            const source_t *source = &job->sources[at(job, e, d)];
            if (source->cursor >= source->there)
                return -1;
        }
    for (int e = 0; e < job->rails->members; e++)
        if (mask[e / 8] >> (e % 8) & 1) {
            source_t *source = &job->sources[at(job, e, d)];
            rows[n] = row_of(job, e, d, source->start, source->cursor, &weights[n]);
            source->cursor++;
            n++;
        }
    return n;
}

/* ---- rail: sums for another domain's tokens ---- */

static void rail_part(void *context, int part, int parts)
{
    const combine_job_t *job = context;
    const batch_t *batch = job->batch;
    size_t members = (size_t)job->rails->members;
    uint32_t from = batch->n * (uint32_t)part / (uint32_t)parts, to = batch->n * (uint32_t)(part + 1) / (uint32_t)parts;
    for (uint32_t i = from; i < to; i++) {
        epx__sum_rows(batch->to[i], batch->rows + i * members, batch->count[i], NULL, 0, job->args->hidden,
                      job->args->dtype, false);
        if (job->weights)
            epx__rail_sum_weights(batch->weights + i * members, batch->count[i], job->topk,
                                  (float *)(void *)(batch->to[i] + job->row_bytes));
    }
}

/*
 * With one rank a domain, a domain's sum of a token is its one row: adding it to +0 and rounding changes nothing that
 * the owner's sum would show (-0 becomes +0, in there as well). So rows that the network can read where they are are
 * put from there, a chunk at a time.
 */
static bool rows_are_sums(const combine_job_t *job, const source_t *own, epx__rail_source_t *source)
{
    const epx_combine_t *args = job->args;
    if (job->rails->members != 1 || job->record != job->row_bytes || args->x_stride_bytes != job->row_bytes)
        return false;
    return epx__rail_source(job->rails, (const uint8_t *)args->x + own->start * job->row_bytes,
                            own->count * job->row_bytes, source);
}

static bool rail_step_straight(epx__half_t *half, combine_job_t *job, epx__ht_rail_t *rail, source_t *own,
                               epx__rail_source_t source)
{
    epx__ht_rails_t *rails = job->rails;
    uint32_t room = epx__rail_room(rails, rail);
    if (room == 0 || !epx__rail_chunk_room(rail))
        return false;
    source.offset += own->cursor * job->row_bytes;
    if (!epx__rail_put_from(half, rails, rail, &source))
        return true; /* the half has failed */
    own->cursor += room;
    epx__rail_words_t *words = epx__rails_words(rails->rails, 0, 0, rail->domain);
    epx__word_post(job->ht->self, &words->read, rails->pulled[at(job, 0, rail->domain)] + own->cursor);
    return true;
}

static bool rail_step(epx__half_t *half, combine_job_t *job, epx__ht_rail_t *rail)
{
    epx__ht_rails_t *rails = job->rails;
    batch_t *batch = job->batch;
    int d = rail->domain;
    uint32_t room = epx__rail_room(rails, rail), before[rails->members];
    uint32_t most = (uint32_t)(STEP_BYTES / rail->out.stride) + 1;
    size_t mask_bytes = rails->rails->layout.mask_bytes, members = (size_t)rails->members;
    const uint8_t *masks = job->crossing->in_mask + (size_t)d * rails->rails->tokens_max * mask_bytes;
    uint8_t *ring = (uint8_t *)rails->rails->window.base + epx__rails_send(rails->rails, d);
    source_t *self = &job->sources[at(job, rails->index, d)];
    epx__rail_source_t source;
    if (rows_are_sums(job, self, &source))
        return rail_step_straight(half, job, rail, self, source);
    if (!epx__rail_chunk_room(rail))
        return false;
    if (room == 0)
        return epx__rail_put(half, rails, rail);
    remember(job, d, before);
    look_for_rows(job, d);
    for (batch->n = 0; batch->n < room && batch->n < most && batch->n < BATCH; batch->n++) {
        uint32_t k = rail->out.packed + batch->n, i = batch->n;
        batch->count[i] =
            take_rows(job, d, masks + k * mask_bytes, batch->rows + i * members, batch->weights + i * members);
        if (batch->count[i] < 0)
            break;
        batch->to[i] = epx__rail_row(ring, &rail->out, k);
    }
    if (batch->n)
        epx__workers_run(job->ht->workers, rail_part, job);
    rail->out.packed += batch->n;
    tell_read(job, d, before);
    return epx__rail_put(half, rails, rail) || batch->n > 0;
}

/* ---- owner ---- */

/* Which ranks of domain d a token goes to, as a mask; false when none. */
static bool mask_of(const combine_job_t *job, uint32_t token, int d, uint8_t *mask)
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

static bool crosses(const combine_job_t *job, uint32_t token, int d)
{
    const int32_t *tokens = job->crossing->cross_token + (size_t)d * job->rails->rails->tokens_max;
    return job->came[d] < (uint32_t)job->crossing->cross_count[d] && tokens[job->came[d]] == (int32_t)token;
}

/* The sums of other domains for this token, by domain; NULL where it did not go. `came` advances. */
static void take_sums(combine_job_t *job, uint32_t token, const uint8_t **sums)
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
    const combine_job_t *job = context;
    const batch_t *batch = job->batch;
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
static bool sums_there(const combine_job_t *job, uint32_t token)
{
    const epx__ht_rails_t *rails = job->rails;
    for (int d = 0; d < rails->domains; d++)
        if (d != rails->home && crosses(job, token, d) && job->came[d] >= rails->rail[d].in.moved)
            return EPX__MUTATE(rail_sum_early);
    return true;
}

/* The next tokens all of whose rows are here. */
static void find_batch(combine_job_t *job)
{
    epx__ht_rails_t *rails = job->rails;
    batch_t *batch = job->batch;
    uint32_t left = job->handle->args.tokens - job->token, most = (uint32_t)(STEP_BYTES / job->row_bytes) + 1;
    size_t members = (size_t)rails->members;
    uint8_t mask[rails->rails->layout.mask_bytes];
    for (batch->n = 0; batch->n < left && batch->n < most && batch->n < BATCH; batch->n++) {
        uint32_t i = batch->n, token = job->token + i;
        if (!sums_there(job, token))
            return;
        batch->count[i] = 0;
        if (mask_of(job, token, rails->home, mask))
            batch->count[i] =
                take_rows(job, rails->home, mask, batch->rows + i * members, batch->weights + i * members);
        if (batch->count[i] < 0)
            return;
        take_sums(job, token, batch->sums + (size_t)i * (size_t)rails->domains);
    }
}

static bool owner_step(epx__half_t *half, combine_job_t *job)
{
    epx__ht_rails_t *rails = job->rails;
    uint32_t before[rails->members];
    bool moved = false;
    for (int d = 0; d < rails->domains; d++)
        if (d != rails->home)
            epx__rail_look(&rails->rail[d]);
    remember(job, rails->home, before);
    look_for_rows(job, rails->home);
    find_batch(job);
    if (job->batch->n) {
        epx__workers_run(job->ht->workers, owner_part, job);
        job->token += job->batch->n;
        tell_read(job, rails->home, before);
        moved = true;
    }
    for (int d = 0; d < rails->domains; d++)
        if (d != rails->home && rails->rail[d].in.freed < job->came[d])
            moved |= epx__rail_free(half, &rails->rail[d], job->came[d]);
    return moved;
}

/* ---- expert ---- */

static bool stage_step(combine_job_t *job, int i, int d)
{
    stage_t *stage = &job->stages[at(job, i, d)];
    epx__ht_peer_t *peer = &job->ht->peers[i];
    epx__ht_rails_t *rails = job->rails;
    if (peer == job->ht->self || epx__row_shape_bytes(&job->staged) == 0 || stage->staged == stage->count)
        return false;
    uint64_t base = rails->lent[at(job, i, d)];
    uint64_t ever = epx__word_load(&epx__rails_words(rails->rails, rails->index, i, d)->read);
    uint64_t read = ever > base ? ever - base : 0;
    uint64_t rows = job->stage_rows - (stage->staged - read),
             most = STEP_BYTES / epx__row_shape_bytes(&job->staged) + 1;
    rows = rows < stage->count - stage->staged ? rows : stage->count - stage->staged;
    rows = rows < most ? rows : most;
    if (rows == 0)
        return false;
    size_t start = (size_t)job->routing->start[epx__topology_rank(rails->rails->topology, d, i)];
    epx_place_t ring = epx__place_at(ring_at(job, job->ht->window, i, d), &job->staged, job->stage_rows);
    for (uint64_t j = stage->staged; j < stage->staged + rows; j++) {
        size_t slot = (size_t)(j % job->stage_rows);
        if (job->staged.row_bytes)
            memcpy((uint8_t *)ring.x + slot * job->row_bytes,
                   (const uint8_t *)job->args->x + (start + j) * job->args->x_stride_bytes, job->row_bytes);
        if (job->staged.topk)
            memcpy(ring.topk_weights + slot * job->topk, job->args->topk_weights + (start + j) * job->topk,
                   4 * job->topk);
    }
    stage->staged += (uint32_t)rows;
    epx__word_post(peer, &epx__rails_words(rails->rails, i, rails->index, d)->staged, base + stage->staged);
    return true;
}

/* ---- the half ---- */

static void fill(epx__half_t *half, epx__ht_peer_t *peer, epx__message_t *message, void *tail)
{
    (void)tail;
    (void)peer;
    const combine_job_t *job = half->job;
    message->x = job->x_offset;
    message->x_stride = job->args->x_stride_bytes;
    message->weights = job->weights_offset;
    message->ring_rows = job->stage_rows;
}

static void member_of(combine_job_t *job, int e, const uint8_t *base, const epx__message_t *mail)
{
    member_t *m = &job->members[e];
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
    combine_job_t *job = half->job;
    member_of(job, (int)(peer - half->ht->peers), peer->base, &peer->mail);
    return EPX_OK;
}

static epx__step_t work(epx__half_t *half)
{
    combine_job_t *job = half->job;
    epx__ht_rails_t *rails = job->rails;
    bool moved = false, done = true;
    if (!half->rails_done)
        return EPX__STEP_STUCK;
    for (int n = 1; n <= rails->domains; n++) { /* what others wait for first, my own last */
        int d = (rails->home + n) % rails->domains;
        for (int i = 0; i < rails->members; i++)
            moved |= stage_step(job, i, d);
        if (d == rails->home)
            continue;
        moved |= rail_step(half, job, &rails->rail[d]);
        done &= rails->rail[d].out.moved == rails->rail[d].out.total;
    }
    moved |= owner_step(half, job);
    done &= job->token == job->handle->args.tokens;
    for (int i = 0; i < rails->members; i++)
        for (int d = 0; d < rails->domains; d++) {
            uint64_t read = epx__word_load(&epx__rails_words(rails->rails, rails->index, i, d)->read);
            done &= read >= rails->lent[at(job, i, d)] + job->stages[at(job, i, d)].count;
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
    combine_job_t *job = half->job;
    const epx__ht_rails_t *rails = job->rails;
    for (int d = 0; d < rails->domains; d++) {
        const epx__ht_rail_t *rail = &rails->rail[d];
        for (int e = 0; e < rails->members; e++) {
            const source_t *source = &job->sources[at(job, e, d)];
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
            uint64_t expected = rails->lent[at(job, i, d)] + job->stages[at(job, i, d)].count;
            uint64_t read = epx__word_load(&epx__rails_words(rails->rails, rails->index, i, d)->read);
            if (read < expected)
                epx__blame_rank(out, job->ht->peers[i].rank, "having read its rows", expected, read);
        }
}

static epx_status_t init_streams(combine_job_t *job)
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
            job->stages[at(job, i, d)] = (stage_t){.count = (uint32_t)job->handle->matrix[theirs * ranks + (size_t)me]};
            job->sources[at(job, i, d)] =
                (source_t){.count = (uint32_t)job->handle->matrix[mine * ranks + (size_t)job->ht->peers[i].rank],
                           .start = first_row(job, job->ht->peers[i].rank, (int)mine)};
        }
        if (d == rails->home)
            continue;
        uint32_t out = (uint32_t)job->crossing->in_count[at(job, rails->index, d)];
        uint32_t in = (uint32_t)job->crossing->cross_count[d];
        EPX__TRY(epx__rail_stream_init(rails, &rail->out, job->record, out, rail->chunks_sent));
        EPX__TRY(epx__rail_stream_init(rails, &rail->in, job->record, in, rail->chunks_freed));
    }
    if (epx__row_shape_bytes(&job->staged) > 0 && rails->members > 1) {
        job->stage_rows = epx__place_capacity(&job->staged, ring_bytes(job));
        if (job->stage_rows == 0)
            return epx__fail(EPX_E_INVALID,
                             "reserve_bytes %zu is too small to stage rows of %zu bytes for %zu ranks: at least %zu is "
                             "needed, or put x into a lease",
                             job->ht->exchange->config.reserve_bytes, epx__row_shape_bytes(&job->staged), ranks,
                             ranks * (epx__row_shape_bytes(&job->staged) + 2u * EPX__PAGE));
    }
    return EPX_OK;
}

static void count_on(combine_job_t *job)
{
    size_t n = (size_t)job->rails->members * (size_t)job->rails->domains;
    for (size_t i = 0; i < n; i++) {
        job->rails->lent[i] += job->stages[i].count;
        job->rails->pulled[i] += job->sources[i].count;
    }
}

static epx_status_t run(combine_job_t *job)
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
    job->members[self] =
        (member_t){.x = args->x, .x_stride = args->x_stride_bytes, .weights = (const uint8_t *)args->topk_weights};
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
    member_t members[rails->members];
    source_t sources[pairs];
    stage_t stages[pairs];
    uint32_t came[rails->domains];
    size_t members_n = (size_t)rails->members, domains_n = (size_t)rails->domains;
    const void *rows[BATCH * members_n];
    const uint8_t *row_weights[BATCH * members_n], *sums[BATCH * domains_n];
    batch_t batch = {.rows = rows, .weights = row_weights, .sums = sums};
    combine_job_t job = {.ht = ht,
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
    const uint8_t *weights = (const uint8_t *)combine->topk_weights;
    const uint8_t *leases = ht->window + exchange->layout.lease_offset;
    if (weights && weights >= leases && weights < leases + exchange->layout.lease_bytes)
        job.weights_offset = (size_t)(weights - ht->window);
    job.staged = (epx__row_shape_t){.row_bytes = job.x_offset ? 0 : job.row_bytes,
                                    .topk = job.weights && !job.weights_offset ? job.topk : 0,
                                    .weights = 1};
    job.record = (job.row_bytes + (job.weights ? 4 * (size_t)job.topk : 0) + 15) / 16 * 16;
    return run(&job);
}
