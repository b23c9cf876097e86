/* Combine with several domains, as rail: one sum of the domain's rows for each token of another domain's rank. */
#include "algo/ht/cpu/rail_combine.h"

static void rail_part(void *context, int part, int parts)
{
    const epx__rail_combine_t *job = context;
    const epx__combine_batch_t *batch = job->batch;
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
static bool rows_are_sums(const epx__rail_combine_t *job, const epx__combine_source_t *own, epx__rail_source_t *source)
{
    const epx_combine_t *args = job->args;
    if (job->rails->members != 1 || job->record != job->row_bytes || args->x_stride_bytes != job->row_bytes)
        return false;
    return epx__rail_source(job->rails, (const uint8_t *)args->x + own->start * job->row_bytes,
                            own->count * job->row_bytes, source);
}

static bool rail_step_straight(epx__half_t *half, epx__rail_combine_t *job, epx__ht_rail_t *rail,
                               epx__combine_source_t *own, epx__rail_source_t source)
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
    epx__word_post(job->ht->self, &words->read, rails->pulled[epx__combine_at(job, 0, rail->domain)] + own->cursor);
    return true;
}

bool epx__combine_rail_step(epx__half_t *half, epx__rail_combine_t *job, epx__ht_rail_t *rail)
{
    epx__ht_rails_t *rails = job->rails;
    epx__combine_batch_t *batch = job->batch;
    int d = rail->domain;
    uint32_t room = epx__rail_room(rails, rail), before[rails->members];
    uint32_t most = (uint32_t)(EPX__COMBINE_STEP_BYTES / rail->out.stride) + 1;
    size_t mask_bytes = rails->rails->layout.mask_bytes, members = (size_t)rails->members;
    const uint8_t *masks = job->crossing->in_mask + (size_t)d * rails->rails->tokens_max * mask_bytes;
    uint8_t *ring = (uint8_t *)rails->rails->window.base + epx__rails_send(rails->rails, d);
    epx__combine_source_t *self = &job->sources[epx__combine_at(job, rails->index, d)];
    epx__rail_source_t source;
    if (rows_are_sums(job, self, &source))
        return rail_step_straight(half, job, rail, self, source);
    if (!epx__rail_chunk_room(rail))
        return false;
    if (room == 0)
        return epx__rail_put(half, rails, rail);
    epx__combine_remember(job, d, before);
    epx__combine_look(job, d);
    for (batch->n = 0; batch->n < room && batch->n < most && batch->n < EPX__COMBINE_BATCH; batch->n++) {
        uint32_t k = rail->out.packed + batch->n, i = batch->n;
        batch->count[i] =
            epx__combine_take(job, d, masks + k * mask_bytes, batch->rows + i * members, batch->weights + i * members);
        if (batch->count[i] < 0)
            break;
        batch->to[i] = epx__rail_row(ring, &rail->out, k);
    }
    if (batch->n)
        epx__workers_run(job->ht->workers, rail_part, job);
    rail->out.packed += batch->n;
    epx__combine_tell_read(job, d, before);
    return epx__rail_put(half, rails, rail) || batch->n > 0;
}
