/*
 * What low-latency dispatch and combine mean, in the plainest way: every position is counted anew from all ranks' ids.
 */
#include "algo/ll_reference.h"

#include <string.h>

#include "base/alloc.h"
#include "base/fail.h"

/* The k-th choice of a token: an expert, or -1. */
static int64_t choice(const epx__ref_ll_shape_t *s, const epx__ref_ll_rank_t *source, uint32_t token, uint32_t k)
{
    int64_t id = epx__topk_id(source->topk_idx, s->bits, (size_t)token * s->topk + k);
    return id >= 0 && id < (int64_t)s->map.experts ? id : -1;
}

/* Does the token go to (rank, local)? local -1: to any expert there. A rank that masks the other one breaks it. */
static bool goes(const epx__ref_ll_shape_t *s, const epx__ref_ll_rank_t *ranks, int source, uint32_t token, int rank,
                 int32_t local)
{
    if ((ranks[source].masked && ranks[source].masked[rank]) || (ranks[rank].masked && ranks[rank].masked[source]))
        return false;
    for (uint32_t k = 0; k < s->topk; k++) {
        int64_t e = choice(s, &ranks[source], token, k);
        if (e >= 0 && epx__expert_rank(&s->map, e) == rank && (local < 0 || epx__expert_local(&s->map, e) == local))
            return true;
    }
    return false;
}

int64_t epx__ref_ll_row(const epx__ref_ll_shape_t *s, const epx__ref_ll_rank_t *ranks, int at, int source,
                        uint32_t token, int32_t local)
{
    int64_t row = 0;
    if (s->order == EPX_LL_RANK_MAJOR)
        local = -1;
    if (!goes(s, ranks, source, token, at, local))
        return -1;
    for (int r = 0; r <= source; r++)
        for (uint32_t t = 0; t < (r < source ? ranks[r].tokens : token); t++)
            row += goes(s, ranks, r, t, at, local);
    return row;
}

static epx_status_t received_init(const epx__ref_ll_shape_t *s, int at, epx__ref_ll_received_t *r)
{
    memset(r, 0, sizeof *r);
    r->local_experts = epx__experts_at(&s->map, (uint32_t)at);
    r->parts = s->order == EPX_LL_RANK_MAJOR ? 1 : r->local_experts;
    size_t places = (size_t)s->ranks * s->tokens_max, rows = r->parts * places + 1, ranks = (size_t)s->ranks;
    r->x = epx__calloc(rows, (size_t)s->hidden * 2);
    r->scales = epx__calloc(rows, (s->hidden / 128 + 1) * sizeof *r->scales);
    r->count = epx__calloc(r->parts + ranks, sizeof *r->count);
    r->src_info = epx__calloc(rows, sizeof *r->src_info);
    r->layout_range = epx__calloc((r->parts + 1) * ranks, sizeof *r->layout_range);
    r->topk_idx = epx__calloc(rows * s->topk, sizeof *r->topk_idx);
    r->topk_weights = epx__calloc(rows * s->topk, sizeof *r->topk_weights);
    r->expert_rows = epx__calloc((size_t)r->local_experts + 1, sizeof *r->expert_rows);
    if (r->x && r->scales && r->count && r->src_info && r->layout_range && r->topk_idx && r->topk_weights &&
        r->expert_rows)
        return EPX_OK;
    epx__ref_ll_received_fini(r);
    return epx__fail(EPX_E_NOMEM, "no memory for the reference's %zu rows", rows);
}

void epx__ref_ll_received_fini(epx__ref_ll_received_t *r)
{
    epx__free(r->x);
    epx__free(r->scales);
    epx__free(r->count);
    epx__free(r->src_info);
    epx__free(r->layout_range);
    epx__free(r->topk_idx);
    epx__free(r->topk_weights);
    epx__free(r->expert_rows);
    memset(r, 0, sizeof *r);
}

static void put_row(const epx__ref_ll_shape_t *s, const uint16_t *x, epx__ref_ll_received_t *r, size_t part, size_t row)
{
    size_t places = (size_t)s->ranks * s->tokens_max, at = part * places + row, blocks = s->hidden / 128;
    float scale[1024];
    int32_t packed[256];
    if (s->format == EPX_LL_BF16) {
        memcpy(r->x + at * s->hidden * 2, x, (size_t)s->hidden * 2);
        return;
    }
    epx__fp8_row(x, EPX_BF16, s->hidden, s->round_scale || s->ue8m0, r->x + at * s->hidden, scale, packed);
    if (s->ue8m0)
        blocks /= 4;
    for (size_t b = 0; b < blocks; b++)
        r->scales[(part * blocks + b) * places + row] = s->ue8m0 ? (uint32_t)packed[b] : epx__bits_of_f32(scale[b]);
}

static void put_topk(const epx__ref_ll_shape_t *s, const epx__ref_ll_rank_t *source, int at, uint32_t token,
                     epx__ref_ll_received_t *r, size_t row)
{
    for (uint32_t k = 0; k < s->topk; k++) {
        int64_t e = choice(s, source, token, k);
        bool here = e >= 0 && epx__expert_rank(&s->map, e) == at;
        r->topk_idx[row * s->topk + k] = here ? epx__expert_local(&s->map, e) : -1;
        r->topk_weights[row * s->topk + k] =
            here && source->topk_weights ? source->topk_weights[(size_t)token * s->topk + k] : 0.0f;
    }
}

/* One part: an expert's rows (local), or everything's (-1). */
static void fill_part(const epx__ref_ll_shape_t *s, const epx__ref_ll_rank_t *ranks, int at, int32_t local,
                      epx__ref_ll_received_t *r)
{
    size_t part = local < 0 ? 0 : (size_t)local, row = 0, places = (size_t)s->ranks * s->tokens_max;
    for (int source = 0; source < s->ranks; source++) {
        size_t begin = row;
        for (uint32_t t = 0; t < ranks[source].tokens; t++) {
            if (!goes(s, ranks, source, t, at, local))
                continue;
            put_row(s, ranks[source].x + (size_t)t * s->hidden, r, part, row);
            r->src_info[part * places + row] = (int32_t)t;
            if (local < 0)
                put_topk(s, &ranks[source], at, t, r, row);
            row++;
        }
        r->layout_range[part * (size_t)s->ranks + (size_t)source] = (int64_t)((uint64_t)begin << 32 | (row - begin));
        if (local < 0)
            r->count[source] = (int32_t)(row - begin);
    }
    if (local >= 0)
        r->count[local] = (int32_t)row;
}

epx_status_t epx__ref_ll_dispatch(const epx__ref_ll_shape_t *s, const epx__ref_ll_rank_t *ranks, int at,
                                  epx__ref_ll_received_t *out)
{
    EPX__TRY(received_init(s, at, out));
    if (s->order == EPX_LL_RANK_MAJOR)
        fill_part(s, ranks, at, -1, out);
    for (uint32_t e = 0; e < out->local_experts; e++) {
        if (s->order == EPX_LL_EXPERT_MAJOR)
            fill_part(s, ranks, at, (int32_t)e, out);
        for (int source = 0; source < s->ranks; source++)
            for (uint32_t t = 0; t < ranks[source].tokens; t++)
                out->expert_rows[e] += goes(s, ranks, source, t, at, (int32_t)e);
    }
    return EPX_OK;
}

/* ---- combine ---- */

/* Rank r's outputs of one token of `at`, added there in top-k order and rounded; false: nothing comes from r. */
static bool add_at_rank(const epx__ref_ll_shape_t *s, const epx__ref_ll_rank_t *ranks, int at, uint32_t token, int r,
                        const uint16_t *y, uint16_t *sum)
{
    size_t places = (size_t)s->ranks * s->tokens_max;
    if (!goes(s, ranks, at, token, r, -1))
        return false;
    if (s->order == EPX_LL_RANK_MAJOR) {
        int64_t row = epx__ref_ll_row(s, ranks, r, at, token, -1);
        memcpy(sum, y + (size_t)row * s->hidden, (size_t)s->hidden * 2);
        return true;
    }
    float *total = (float *)(void *)(sum + s->hidden); /* behind the row */
    memset(total, 0, s->hidden * sizeof *total);
    for (uint32_t k = 0; k < s->topk; k++) {
        int64_t e = choice(s, &ranks[at], token, k);
        if (e < 0 || epx__expert_rank(&s->map, e) != r)
            continue;
        int32_t local = epx__expert_local(&s->map, e);
        size_t row = (size_t)epx__ref_ll_row(s, ranks, r, at, token, local) + (size_t)local * places;
        float w = ranks[at].topk_weights[(size_t)token * s->topk + k];
        for (uint32_t h = 0; h < s->hidden; h++)
            total[h] = epx__f32_add(total[h], epx__f32_mul(w, epx__f32_of_bf16(y[row * s->hidden + h])));
    }
    for (uint32_t h = 0; h < s->hidden; h++)
        sum[h] = epx__bf16_of_f32(total[h]);
    return true;
}

static void add_ranks(const epx__ref_ll_shape_t *s, const epx__ref_ll_rank_t *ranks, int at, uint32_t token,
                      const uint16_t *const *y, float *total, uint16_t *sum)
{
    for (int r = 0; r < s->ranks; r++) {
        if (!add_at_rank(s, ranks, at, token, r, y[r], sum))
            continue;
        for (uint32_t h = 0; h < s->hidden; h++)
            total[h] = epx__f32_add(total[h], epx__f32_of_bf16(sum[h]));
    }
}

epx_status_t epx__ref_ll_combine(const epx__ref_ll_shape_t *s, const epx__ref_ll_rank_t *ranks, int at,
                                 const uint16_t *const *y, uint16_t *out, float *weight_left)
{
    size_t places = (size_t)s->ranks * s->tokens_max;
    bool by_rank = s->pre_reduced || s->order == EPX_LL_RANK_MAJOR;
    float *total = epx__calloc(s->hidden, sizeof *total);
    uint16_t *sum = epx__calloc(s->hidden, 3 * sizeof *sum);
    for (uint32_t t = 0; total && sum && t < ranks[at].tokens; t++) {
        memset(total, 0, s->hidden * sizeof *total);
        weight_left[t] = 0.0f;
        for (uint32_t k = 0; k < s->topk; k++) {
            int64_t e = choice(s, &ranks[at], t, k);
            int32_t r = e < 0 ? -1 : epx__expert_rank(&s->map, e), local = e < 0 ? -1 : epx__expert_local(&s->map, e);
            if (r < 0 || !goes(s, ranks, at, t, r, local))
                continue;
            float w = ranks[at].combine_weights ? ranks[at].combine_weights[(size_t)t * s->topk + k] : 1.0f;
            weight_left[t] = epx__f32_add(weight_left[t], w);
            if (by_rank)
                continue;
            size_t row = (size_t)epx__ref_ll_row(s, ranks, r, at, t, local) + (size_t)local * places;
            for (uint32_t h = 0; h < s->hidden; h++)
                total[h] = epx__f32_add(total[h], epx__f32_mul(w, epx__f32_of_bf16(y[r][row * s->hidden + h])));
        }
        if (by_rank)
            add_ranks(s, ranks, at, t, y, total, sum);
        for (uint32_t h = 0; h < s->hidden; h++)
            out[(size_t)t * s->hidden + h] = epx__bf16_of_f32(total[h]);
    }
    epx_status_t status = total && sum ? EPX_OK : epx__fail(EPX_E_NOMEM, "no memory for a row of %u", s->hidden);
    epx__free(total);
    epx__free(sum);
    return status;
}
