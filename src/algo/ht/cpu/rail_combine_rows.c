/* Combine with several domains: where a member's rows are, and how far they have been read; and the other side of it,
 * the expert that stages rows which do not lie in the window. */
#include "algo/ht/cpu/rail_combine.h"

#include <string.h>

/* ---- reading rows of a member ---- */

/* Where member e's row j for (domain d, my index) is, and its weights. */
static const uint8_t *row_of(const epx__rail_combine_t *job, int e, int d, size_t start, uint32_t j,
                             const uint8_t **weights)
{
    const epx__combine_member_t *m = &job->members[e];
    const uint8_t *x = m->x + (start + j) * m->x_stride;
    *weights = m->weights + (start + j) * job->topk * 4;
    if (!m->x_staged && !m->weights_staged)
        return x;
    epx__row_shape_t shape = {
        .row_bytes = m->x_staged ? job->row_bytes : 0, .topk = m->weights_staged ? job->topk : 0, .weights = 1};
    epx_place_t ring =
        epx__place_at(epx__combine_ring_at(job, job->ht->peers[e].base, job->rails->index, d), &shape, m->ring_rows);
    size_t slot = j % m->ring_rows;
    if (m->x_staged)
        x = (const uint8_t *)ring.x + slot * job->row_bytes;
    if (m->weights_staged)
        *weights = (const uint8_t *)ring.topk_weights + slot * job->topk * 4;
    return x;
}

void epx__combine_look(epx__rail_combine_t *job, int d)
{
    for (int e = 0; e < job->rails->members; e++) {
        epx__combine_source_t *source = &job->sources[epx__combine_at(job, e, d)];
        const epx__combine_member_t *m = &job->members[e];
        if (source->there == source->count || !job->ht->peers[e].heard)
            continue;
        if (!m->x_staged && !m->weights_staged) {
            source->there = source->count;
            continue;
        }
        uint64_t base = job->rails->pulled[epx__combine_at(job, e, d)];
        uint64_t ever = epx__word_load(&epx__rails_words(job->rails->rails, job->rails->index, e, d)->staged);
        source->there = ever > base ? (uint32_t)(ever - base) : 0;
    }
}

void epx__combine_tell_read(epx__rail_combine_t *job, int d, const uint32_t *before)
{
    for (int e = 0; e < job->rails->members; e++) {
        const epx__combine_source_t *source = &job->sources[epx__combine_at(job, e, d)];
        if (source->cursor == before[e])
            continue;
        epx__ht_peer_t *peer = &job->ht->peers[e];
        uint64_t bytes = (uint64_t)(source->cursor - before[e]) * job->row_bytes;
        if (peer == job->ht->self)
            job->ht->exchange->traffic.local_bytes += bytes;
        else
            job->ht->exchange->traffic.domain_bytes += bytes;
        epx__rail_words_t *words = epx__rails_words(job->rails->rails, e, job->rails->index, d);
        epx__word_post(peer, &words->read, job->rails->pulled[epx__combine_at(job, e, d)] + source->cursor);
    }
}

void epx__combine_remember(const epx__rail_combine_t *job, int d, uint32_t *before)
{
    for (int e = 0; e < job->rails->members; e++)
        before[e] = job->sources[epx__combine_at(job, e, d)].cursor;
}

int epx__combine_take(epx__rail_combine_t *job, int d, const uint8_t *mask, const void **rows, const uint8_t **weights)
{
    int n = 0;
    for (int e = 0; e < job->rails->members; e++)
        if (mask[e / 8] >> (e % 8) & 1) {
            const epx__combine_source_t *source = &job->sources[epx__combine_at(job, e, d)];
            if (source->cursor >= source->there)
                return -1;
        }
    for (int e = 0; e < job->rails->members; e++)
        if (mask[e / 8] >> (e % 8) & 1) {
            epx__combine_source_t *source = &job->sources[epx__combine_at(job, e, d)];
            rows[n] = row_of(job, e, d, source->start, source->cursor, &weights[n]);
            source->cursor++;
            n++;
        }
    return n;
}

/* ---- expert ---- */

bool epx__combine_stage_step(epx__rail_combine_t *job, int i, int d)
{
    epx__combine_stage_t *stage = &job->stages[epx__combine_at(job, i, d)];
    epx__ht_peer_t *peer = &job->ht->peers[i];
    epx__ht_rails_t *rails = job->rails;
    if (peer == job->ht->self || epx__row_shape_bytes(&job->staged) == 0 || stage->staged == stage->count)
        return false;
    uint64_t base = rails->lent[epx__combine_at(job, i, d)];
    uint64_t ever = epx__word_load(&epx__rails_words(rails->rails, rails->index, i, d)->read);
    uint64_t read = ever > base ? ever - base : 0;
    uint64_t rows = job->stage_rows - (stage->staged - read),
             most = EPX__COMBINE_STEP_BYTES / epx__row_shape_bytes(&job->staged) + 1;
    rows = rows < stage->count - stage->staged ? rows : stage->count - stage->staged;
    rows = rows < most ? rows : most;
    if (rows == 0)
        return false;
    size_t start = (size_t)job->routing->start[epx__topology_rank(rails->rails->topology, d, i)];
    epx_place_t ring = epx__place_at(epx__combine_ring_at(job, job->ht->window, i, d), &job->staged, job->stage_rows);
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
