/*
 * What dispatch and combine mean, in one process, in the plainest way. It shares no code with the exchange's counting
 * and placing: whether a token goes to a rank is looked up anew each time.
 */
#include "algo/reference.h"

#include <string.h>

#include "base/alloc.h"
#include "base/fail.h"

/* The k-th choice of a token: an expert, or -1 (also for ids that are none). */
static int64_t choice(const epx__ref_shape_t *shape, const epx__ref_rank_t *source, uint32_t token, uint32_t k)
{
    int64_t id = epx__topk_id(source->topk_idx, shape->bits, (size_t)token * shape->topk + k);
    return id >= 0 && id < (int64_t)shape->map.experts ? id : -1;
}

static bool goes_to(const epx__ref_shape_t *shape, const epx__ref_rank_t *source, uint32_t token, int rank)
{
    if (shape->topk == 0)
        return source->in_rank[(size_t)token * (size_t)shape->ranks + (size_t)rank] != 0;
    for (uint32_t k = 0; k < shape->topk; k++) {
        int64_t expert = choice(shape, source, token, k);
        if (expert >= 0 && epx__expert_rank(&shape->map, expert) == rank)
            return true;
    }
    return false;
}

/* Tokens of one source that go to `rank`. */
static uint32_t count_to(const epx__ref_shape_t *shape, const epx__ref_rank_t *source, int rank)
{
    uint32_t n = 0;
    for (uint32_t t = 0; t < source->tokens; t++)
        n += goes_to(shape, source, t, rank);
    return n;
}

static epx_status_t received_init(const epx__ref_shape_t *shape, const epx__ref_rank_t *ranks, int at,
                                  epx__ref_received_t *r)
{
    size_t room = 1; /* one row more, so that no array is empty */
    bool weights = false, side = false;
    memset(r, 0, sizeof *r);
    for (int s = 0; s < shape->ranks; s++) {
        r->rows += count_to(shape, &ranks[s], at);
        weights = weights || ranks[s].topk_weights;
        side = side || ranks[s].side;
    }
    room += r->rows;
    r->local_experts = shape->topk ? epx__experts_at(&shape->map, (uint32_t)at) : 0;
    r->x = epx__calloc(room, shape->row_bytes ? shape->row_bytes : 1);
    r->side = side ? epx__calloc(room, shape->side_bytes ? shape->side_bytes : 1) : NULL;
    r->topk_idx = shape->topk ? epx__calloc(room * shape->topk, sizeof *r->topk_idx) : NULL;
    r->topk_weights = weights ? epx__calloc(room * shape->topk, sizeof *r->topk_weights) : NULL;
    r->src_rank = epx__calloc(room, sizeof *r->src_rank);
    r->src_token = epx__calloc(room, sizeof *r->src_token);
    r->rows_per_expert = epx__calloc((size_t)r->local_experts + 1, sizeof *r->rows_per_expert);
    if (r->x && (r->side || !side) && (r->topk_idx || !shape->topk) && (r->topk_weights || !weights) && r->src_rank &&
        r->src_token && r->rows_per_expert)
        return EPX_OK;
    epx__ref_received_fini(r);
    return epx__fail(EPX_E_NOMEM, "no memory for the reference's %zu rows", room);
}

/* The choices of one row as `at` sees them: its own experts by local number, all others -1 with weight 0. */
static void localise(const epx__ref_shape_t *shape, const epx__ref_rank_t *source, uint32_t token, int at, size_t row,
                     epx__ref_received_t *r)
{
    for (uint32_t k = 0; k < shape->topk; k++) {
        int64_t expert = choice(shape, source, token, k);
        bool here = expert >= 0 && epx__expert_rank(&shape->map, expert) == at;
        size_t to = row * shape->topk + k;
        r->topk_idx[to] = here ? epx__expert_local(&shape->map, expert) : -1;
        if (here)
            r->rows_per_expert[r->topk_idx[to]]++;
        if (r->topk_weights)
            r->topk_weights[to] =
                here && source->topk_weights ? source->topk_weights[(size_t)token * shape->topk + k] : 0.0f;
    }
}

epx_status_t epx__ref_dispatch(const epx__ref_shape_t *shape, const epx__ref_rank_t *ranks, int at,
                               epx__ref_received_t *out)
{
    EPX__TRY(received_init(shape, ranks, at, out));
    size_t row = 0;
    for (int s = 0; s < shape->ranks; s++) { /* the order of rows: source rank, then token */
        const epx__ref_rank_t *source = &ranks[s];
        for (uint32_t t = 0; t < source->tokens; t++) {
            if (!goes_to(shape, source, t, at))
                continue;
            memcpy(out->x + row * shape->row_bytes, (const uint8_t *)source->x + t * shape->row_bytes,
                   shape->row_bytes);
            if (source->side)
                memcpy(out->side + row * shape->side_bytes, (const uint8_t *)source->side + t * shape->side_bytes,
                       shape->side_bytes);
            localise(shape, source, t, at, row, out);
            out->src_rank[row] = s;
            out->src_token[row] = (int32_t)t;
            row++;
        }
    }
    for (uint32_t e = 0; e < out->local_experts; e++)
        out->rows_per_expert[e] = epx__align_rows(out->rows_per_expert[e], shape->expert_alignment);
    return EPX_OK;
}

void epx__ref_received_fini(epx__ref_received_t *received)
{
    epx__free(received->x);
    epx__free(received->side);
    epx__free(received->topk_idx);
    epx__free(received->topk_weights);
    epx__free(received->src_rank);
    epx__free(received->src_token);
    epx__free(received->rows_per_expert);
    memset(received, 0, sizeof *received);
}

/* One token on its way back: row[r] is its row at rank r, -1 where it did not go. */
typedef struct token_rows {
    const epx__topology_t *topology;
    int home; /* the domain of the token's rank */
    const int64_t *row;
} token_rows_t;

/* Sum of element `i` of the token's rows in one domain, in rank order from +0; false when it has none there. */
static bool domain_sum(const token_rows_t *token, int domain, const void *const *y, size_t stride, size_t i,
                       epx_dtype_t dtype, float *sum)
{
    bool any = false;
    *sum = 0.0f;
    for (int m = 0; m < token->topology->per_domain; m++) {
        int r = epx__topology_rank(token->topology, domain, m);
        if (token->row[r] < 0)
            continue;
        *sum += epx__dtype_load(y[r], (size_t)token->row[r] * stride + i, dtype);
        any = true;
    }
    return any;
}

/* Over all domains. What crosses the network is rounded to `wire`. */
static float total(const token_rows_t *token, const void *const *y, size_t stride, size_t i, epx_dtype_t dtype,
                   epx_dtype_t wire)
{
    float sum = 0.0f, part;
    for (int d = 0; d < token->topology->domains; d++) {
        if (domain_sum(token, d, y, stride, i, dtype, &part))
            sum += d == token->home ? part : epx__dtype_round(part, wire);
    }
    return sum;
}

epx_status_t epx__ref_combine(const epx__ref_shape_t *shape, const epx__topology_t *topology,
                              const epx__ref_rank_t *ranks, int at, const void *const *y, const float *const *weights,
                              const void *const *bias, int biases, uint32_t hidden, epx_dtype_t dtype, void *out,
                              float *out_weights)
{
    int64_t *next = epx__calloc((size_t)shape->ranks, sizeof *next); /* at each rank: the next row of `at` */
    int64_t *row = epx__calloc((size_t)shape->ranks, sizeof *row);
    if (!next || !row) {
        epx__free(next);
        epx__free(row);
        return epx__fail(EPX_E_NOMEM, "no memory for %d ranks", shape->ranks);
    }
    for (int s = 0; s < at; s++) {
        for (int r = 0; r < shape->ranks; r++)
            next[r] += count_to(shape, &ranks[s], r);
    }
    token_rows_t token = {.topology = topology, .home = topology->domain_of[at], .row = row};
    for (uint32_t t = 0; t < ranks[at].tokens; t++) {
        for (int r = 0; r < shape->ranks; r++)
            row[r] = goes_to(shape, &ranks[at], t, r) ? next[r]++ : -1;
        for (size_t i = 0; i < hidden; i++) {
            float sum = total(&token, y, hidden, i, dtype, dtype);
            for (int b = 0; b < biases; b++) {
                if (bias[b])
                    sum += epx__dtype_load(bias[b], (size_t)t * hidden + i, dtype);
            }
            epx__dtype_store(out, (size_t)t * hidden + i, dtype, sum);
        }
        for (uint32_t k = 0; weights && k < shape->topk; k++)
            out_weights[(size_t)t * shape->topk + k] =
                total(&token, (const void *const *)weights, shape->topk, k, EPX_FP32, EPX_FP32);
    }
    epx__free(next);
    epx__free(row);
    return EPX_OK;
}
