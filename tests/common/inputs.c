/* Inputs and expectations; see inputs.h. */
#include "common/inputs.h"

#include <stdlib.h>
#include <string.h>

static void *take(size_t bytes)
{
    void *memory = calloc(1, bytes ? bytes : 1);
    if (!memory)
        exit(3); /* a test without memory has nothing to say */
    return memory;
}

static enum xt_tokens tokens_kind(const xt_shape_t *s)
{
    static const enum xt_tokens often[] = {XT_TOKENS_RANDOM, XT_TOKENS_RANDOM, XT_TOKENS_NONE,  XT_TOKENS_ONE_RANK,
                                           XT_TOKENS_FULL,   XT_TOKENS_UNEVEN, XT_TOKENS_RANDOM};
    return s->tokens != XT_TOKENS_MIXED ? s->tokens : often[xt_mix(s->seed, s->op, 0, 11) % 7];
}

static enum xt_routing routing_kind(const xt_shape_t *s)
{
    if (s->routing != XT_ROUTE_MIXED)
        return s->routing;
    return (enum xt_routing)(1 + xt_mix(s->seed, s->op, 0, 12) % (XT_ROUTE_KINDS - 1));
}

uint32_t xt_tokens_of(const xt_shape_t *s, int rank)
{
    uint64_t h = xt_mix(s->seed, s->op, (uint64_t)rank, 13);
    uint64_t chosen = xt_mix(s->seed, s->op, 0, 14) % (uint64_t)s->ranks;
    switch (tokens_kind(s)) {
    case XT_TOKENS_NONE:
        return 0;
    case XT_TOKENS_FULL:
        return s->tokens_max;
    case XT_TOKENS_ONE_RANK:
        return (uint64_t)rank == chosen ? s->tokens_max : 0;
    case XT_TOKENS_UNEVEN:
        return (uint64_t)rank == chosen ? s->tokens_max : (uint32_t)(h % 3 < s->tokens_max ? h % 3 : 0);
    default:
        return h % 8 == 0 ? 0 : (uint32_t)(h / 8 % (s->tokens_max + 1));
    }
}

static int rank_of(const xt_shape_t *s, uint32_t expert)
{
    return s->expert_rank ? s->expert_rank[expert] : (int)(expert / (s->experts / (uint32_t)s->ranks));
}

/* Some expert of `rank`, -1 when it has none. */
static int64_t expert_at(const xt_shape_t *s, int rank, uint64_t h)
{
    for (uint32_t i = 0; i < s->experts; i++) {
        uint32_t e = (uint32_t)((h + i) % s->experts);
        if (rank_of(s, e) == rank)
            return e;
    }
    return -1;
}

static int64_t choose(const xt_shape_t *s, int rank, uint32_t token, uint32_t k)
{
    uint64_t h = xt_mix(s->seed, (uint64_t)s->op << 32 | (uint32_t)rank, token, 100 + k);
    double u = (double)(h >> 11) * 0x1p-53;
    switch (routing_kind(s)) {
    case XT_ROUTE_SKEWED:
        return (int64_t)(u * u * u * s->experts);
    case XT_ROUTE_ONE_RANK:
        return expert_at(s, (int)(xt_mix(s->seed, s->op, 0, 15) % (uint64_t)s->ranks), h);
    case XT_ROUTE_HOLES:
        return h % 3 == 0 ? -1 : (int64_t)(h / 3 % s->experts);
    case XT_ROUTE_REPEATED:
        return (int64_t)(xt_mix(s->seed, s->op, (uint64_t)rank << 32 | token, 16 + k / 3) % s->experts);
    case XT_ROUTE_NOBODY:
        return -1;
    case XT_ROUTE_SELF:
        return expert_at(s, rank, h);
    case XT_ROUTE_ALL: /* as many ranks as there are choices */
        return expert_at(s, (int)((token + k) % (uint32_t)s->ranks), h);
    default:
        return (int64_t)(h % s->experts);
    }
}

static bool masked(const xt_shape_t *s, int rank, uint32_t token, int to)
{
    uint64_t h = xt_mix(s->seed, (uint64_t)s->op << 32 | (uint32_t)rank, token, 500 + (uint64_t)to);
    switch (routing_kind(s)) {
    case XT_ROUTE_NOBODY:
        return false;
    case XT_ROUTE_ALL:
        return true;
    case XT_ROUTE_SELF:
        return to == rank;
    case XT_ROUTE_ONE_RANK:
        return (uint64_t)to == xt_mix(s->seed, s->op, 0, 15) % (uint64_t)s->ranks;
    default:
        return h % 3 == 0;
    }
}

/* ---- payload ---- */

static uint8_t digit(const xt_shape_t *s, int rank, uint32_t version, uint32_t token, size_t column)
{
    switch (column % 4) {
    case 0:
        return (uint8_t)token;
    case 1:
        return (uint8_t)((uint32_t)rank | (token >> 8) << 6);
    case 2:
        return (uint8_t)(column / 4);
    default:
        return (uint8_t)xt_mix(s->seed, (uint64_t)s->op << 32 | version, (uint64_t)rank << 32 | token, column);
    }
}

static void fill_rows(const xt_shape_t *s, int rank, uint32_t version, xt_inputs_t *in)
{
    size_t elem = s->format == XT_BYTES ? 1 : epx__dtype_bytes((epx_dtype_t)s->format);
    size_t columns = s->row_bytes / elem, side = (size_t)s->side_elems * s->side_elem_bytes;
    in->x = take(in->tokens * s->row_bytes);
    in->side = side ? take(in->tokens * side) : NULL;
    for (uint32_t t = 0; t < in->tokens; t++) {
        for (size_t c = 0; c < columns; c++) {
            uint8_t d = digit(s, rank, version, t, c);
            if (s->format == XT_BYTES)
                in->x[t * s->row_bytes + c] = d;
            else
                epx__dtype_store(in->x, t * columns + c, (epx_dtype_t)s->format, (float)d);
        }
        for (size_t b = 0; b < side; b++)
            in->side[t * side + b] = (uint8_t)xt_mix(s->seed ^ s->op, version, (uint64_t)rank << 32 | t, 700 + b);
    }
}

void xt_inputs_make(const xt_shape_t *s, int rank, xt_inputs_t *in)
{
    *in = (xt_inputs_t){.tokens = xt_tokens_of(s, rank)};
    size_t choices = (size_t)in->tokens * s->topk;
    if (s->topk) {
        in->ids = take(choices * (s->bits == 32 ? 4 : 8));
        in->weights = s->weights ? take(choices * sizeof(float)) : NULL;
    } else {
        in->in_rank = take((size_t)in->tokens * (size_t)s->ranks);
    }
    for (uint32_t t = 0; t < in->tokens; t++) {
        for (uint32_t k = 0; k < s->topk; k++) {
            size_t at = (size_t)t * s->topk + k;
            int64_t id = choose(s, rank, t, k);
            if (s->bits == 32)
                ((int32_t *)in->ids)[at] = (int32_t)id;
            else
                ((int64_t *)in->ids)[at] = id;
            if (in->weights)
                in->weights[at] =
                    (float)(1 + xt_mix(s->seed, s->op, (uint64_t)rank << 32 | t, 900 + k) % 65535) / 65536.0f;
        }
        for (int r = 0; in->in_rank && r < s->ranks; r++)
            in->in_rank[(size_t)t * (size_t)s->ranks + (size_t)r] = masked(s, rank, t, r);
    }
    fill_rows(s, rank, 0, in);
}

void xt_inputs_rows(const xt_shape_t *s, int rank, uint32_t version, xt_inputs_t *in)
{
    free(in->x);
    free(in->side);
    fill_rows(s, rank, version, in);
}

void xt_inputs_fini(xt_inputs_t *in)
{
    free(in->x);
    free(in->side);
    free(in->ids);
    free(in->weights);
    free(in->in_rank);
    memset(in, 0, sizeof *in);
}

/* ---- expectations ---- */

bool xt_goes(const xt_expect_t *e, int source, uint32_t token, int to)
{
    const xt_shape_t *s = &e->shape;
    const xt_inputs_t *in = &e->all[source];
    if (s->topk == 0)
        return in->in_rank[(size_t)token * (size_t)s->ranks + (size_t)to];
    for (uint32_t k = 0; k < s->topk; k++) {
        int64_t id = epx__topk_id(in->ids, s->bits, (size_t)token * s->topk + k);
        if (id >= 0 && rank_of(s, (uint32_t)id) == to)
            return true;
    }
    return false;
}

static void ref_ranks(const xt_expect_t *e, epx__ref_rank_t *ranks)
{
    for (int r = 0; r < e->shape.ranks; r++) {
        const xt_inputs_t *in = &e->all[r];
        ranks[r] = (epx__ref_rank_t){in->tokens, in->x, in->side, in->ids, in->weights, in->in_rank};
    }
}

static void count_rows(xt_expect_t *e)
{
    size_t n = (size_t)e->shape.ranks;
    for (size_t i = 0; i < n; i++) {
        for (uint32_t t = 0; t < e->all[i].tokens; t++) {
            for (size_t j = 0; j < n; j++) {
                bool goes = xt_goes(e, (int)i, t, (int)j);
                e->matrix[i * n + j] += goes;
                e->rows_at[j] += goes;
            }
        }
    }
}

void xt_expect_make(const xt_shape_t *shape, int at, xt_expect_t *e)
{
    *e = (xt_expect_t){.shape = *shape, .at = at};
    size_t n = (size_t)shape->ranks;
    e->all = take(n * sizeof *e->all);
    e->local_of = take((shape->experts + 1) * sizeof *e->local_of);
    e->matrix = take(n * n * sizeof *e->matrix);
    e->rows_at = take(n * sizeof *e->rows_at);
    for (int r = 0; r < shape->ranks; r++)
        xt_inputs_make(shape, r, &e->all[r]);
    count_rows(e);
    e->ref = (epx__ref_shape_t){.ranks = shape->ranks,
                                .topk = shape->topk,
                                .bits = shape->bits,
                                .row_bytes = shape->row_bytes,
                                .side_bytes = (size_t)shape->side_elems * shape->side_elem_bytes,
                                .expert_alignment = shape->alignment};
    epx__ref_rank_t ranks[XT_RANKS_MAX];
    ref_ranks(e, ranks);
    if (epx__experts_make(shape->topk ? shape->experts : 0, (uint32_t)n, shape->topk ? shape->expert_rank : NULL,
                          e->local_of, &e->ref.map) != EPX_OK ||
        epx__ref_dispatch(&e->ref, ranks, at, &e->got) != EPX_OK)
        exit(3);
}

void xt_expect_again(xt_expect_t *e, const xt_shape_t *again, uint32_t version, epx__ref_received_t *got)
{
    epx__ref_rank_t ranks[XT_RANKS_MAX];
    for (int r = 0; r < again->ranks; r++)
        xt_inputs_rows(again, r, version, &e->all[r]);
    e->ref.row_bytes = again->row_bytes;
    e->ref.side_bytes = (size_t)again->side_elems * again->side_elem_bytes;
    ref_ranks(e, ranks);
    if (epx__ref_dispatch(&e->ref, ranks, e->at, got) != EPX_OK)
        exit(3);
}

void xt_expect_fini(xt_expect_t *e)
{
    for (int r = 0; e->all && r < e->shape.ranks; r++)
        xt_inputs_fini(&e->all[r]);
    epx__ref_received_fini(&e->got);
    free(e->all);
    free(e->local_of);
    free(e->matrix);
    free(e->rows_at);
    memset(e, 0, sizeof *e);
}

/* A value of either sign and varying size, so that fp32 sums depend on the order (30 bits lie between the least and the
 * largest); all formats hold it; sometimes -0. */
static float value(uint64_t h)
{
    static const float scale[] = {0x1p-12f, 0.25f, 1.0f, 4.0f, 0x1p-17f, 16.0f, 1.0f, 0.5f};
    return ((float)(h & 255) - 128.0f) * scale[h >> 8 & 7] * (h >> 11 & 1 ? 1.0f : -1.0f);
}

void *xt_outputs_make(const xt_expect_t *e, int rank, uint32_t version, epx_dtype_t dtype, uint32_t hidden)
{
    size_t n = (size_t)e->rows_at[rank] * hidden;
    void *y = take(n * epx__dtype_bytes(dtype));
    uint64_t key = xt_mix(e->shape.seed, e->shape.op, (uint64_t)rank << 32 | version, 21);
    for (size_t i = 0; i < n; i++)
        epx__dtype_store(y, i, dtype, value(xt_hash(key + i)));
    return y;
}

float *xt_out_weights_make(const xt_expect_t *e, int rank, uint32_t version)
{
    size_t n = (size_t)e->rows_at[rank] * e->shape.topk;
    float *w = take(n * sizeof *w);
    uint64_t key = xt_mix(e->shape.seed, e->shape.op, (uint64_t)rank << 32 | version, 22);
    for (size_t i = 0; i < n; i++)
        w[i] = (float)(xt_hash(key + i) >> 40) * 0x1p-20f - 8.0f;
    return w;
}

void *xt_bias_make(const xt_expect_t *e, int rank, uint32_t which, epx_dtype_t dtype, uint32_t hidden)
{
    size_t n = (size_t)e->all[rank].tokens * hidden;
    void *b = take(n * epx__dtype_bytes(dtype));
    uint64_t key = xt_mix(e->shape.seed, e->shape.op, (uint64_t)rank << 32 | which, 23);
    for (size_t i = 0; i < n; i++)
        epx__dtype_store(b, i, dtype, value(xt_hash(key + i)));
    return b;
}
