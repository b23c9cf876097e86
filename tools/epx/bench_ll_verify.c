/*
 * The check of low latency: every row, scale, count, source index and range that came, and every sum, worked out again
 * from the routing by the tool's own code, and compared bit for bit.
 */
#include "bench_ll.h"

#include "numbers.h"

#include <stdlib.h>
#include <string.h>

/* ---- dispatch ---- */

typedef struct look {
    bench_ll_t *ll;
    const int32_t *count, *src;
    const int64_t *range;
    void *keep[3];
    uint8_t *row;    /* as it came, then */
    uint16_t *sent;  /* bf16, then */
    uint8_t *expect; /* as it should have come */
    float *scale;    /* [hidden / 128] that the row should have */
    float *scales;   /* of one expert as they came, [hidden / 128][places] */
} look_t;

static int look_init(look_t *look, bench_ll_t *ll)
{
    bench_rank_t *self = ll->self;
    size_t hidden = (size_t)self->bench->options.hidden, rows = ll->local_experts * ll->places;
    *look = (look_t){.ll = ll};
    look->row = malloc(hidden * 2);
    look->sent = malloc(hidden * 2);
    look->expect = malloc(hidden * 2);
    look->scale = malloc((hidden / 128 + 1) * sizeof *look->scale);
    look->scales = malloc((hidden / 128 + 1) * ll->places * sizeof *look->scales);
    if (!look->row || !look->sent || !look->expect || !look->scale || !look->scales)
        return rank_fail(self->rank, "no memory for the check");
    look->count = bench_look(self, ll->recv_count, ll->local_experts * sizeof *look->count, &look->keep[0]);
    look->src = look->count ? bench_look(self, ll->src_info, rows * sizeof *look->src, &look->keep[1]) : NULL;
    size_t ranges = ll->local_experts * (size_t)self->bench->work.ranks;
    look->range = look->src ? bench_look(self, ll->layout_range, ranges * sizeof *look->range, &look->keep[2]) : NULL;
    return look->range ? 0 : 1;
}

static void look_fini(look_t *look)
{
    void *const parts[] = {look->row,    look->sent,    look->expect,  look->scale,
                           look->scales, look->keep[0], look->keep[1], look->keep[2]};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        free(parts[i]);
}

static void expect_row(look_t *look, int source, uint32_t token)
{
    const bench_rank_t *self = look->ll->self;
    size_t bytes = self->bench->row_bytes, hidden = (size_t)self->bench->options.hidden;
    uint64_t key = pattern_key((uint64_t)self->bench->options.seed, BENCH_X, (uint32_t)source, token, self->generation);
    pattern_fill(look->sent, bytes, key, PATTERN_BF16);
    if (!look->ll->fp8)
        memcpy(look->expect, look->sent, bytes);
    for (size_t b = 0; b < hidden / NUMBER_FP8_BLOCK && look->ll->fp8; b++)
        number_fp8_block(look->sent + b * NUMBER_FP8_BLOCK, look->expect + b * NUMBER_FP8_BLOCK, &look->scale[b]);
}

/* The row at `place` of local expert e. Payload, scales and source index together count as one. */
static int verify_row(look_t *look, uint32_t e, size_t place, const bench_ll_cursor_t *at, uint64_t *wrong)
{
    bench_ll_t *ll = look->ll;
    bench_rank_t *self = ll->self;
    size_t hidden = (size_t)self->bench->options.hidden, bytes = hidden * (ll->fp8 ? 1 : 2);
    size_t row = e * ll->places + place;
    if (self->mem->copy_out(self->context, look->row, (const uint8_t *)ll->recv_x + row * bytes, bytes))
        return rank_fail(self->rank, "rows could not be copied out: %s", self->mem->words());
    expect_row(look, at->source, at->token);
    bool good = memcmp(look->row, look->expect, bytes) == 0 && look->src[row] == (int32_t)at->token;
    for (size_t b = 0; b < hidden / 128 && ll->fp8; b++)
        good = good && memcmp(&look->scales[b * ll->places + place], &look->scale[b], sizeof(float)) == 0;
    *wrong += !good;
    return 0;
}

/* Rows of one expert, then its count, its ranges, and the places past the count, which nobody may have written. */
static int verify_expert(look_t *look, uint32_t e, uint64_t *wrong)
{
    bench_ll_t *ll = look->ll;
    bench_rank_t *self = ll->self;
    const bench_work_t *work = &self->bench->work;
    bench_ll_cursor_t at = {0, 0};
    size_t blocks = (size_t)self->bench->options.hidden / 128, place = 0, begin = 0;
    const float *device = ll->fp8 ? ll->recv_scales + e * blocks * ll->places : NULL;
    if (ll->fp8 && self->mem->copy_out(self->context, look->scales, device, blocks * ll->places * sizeof(float)))
        return rank_fail(self->rank, "scales could not be copied out: %s", self->mem->words());
    bool more = bench_ll_next(work, ll->experts[e], &at);
    for (int source = 0; source < work->ranks; source++, begin = place) {
        for (; more && at.source == source; more = bench_ll_next(work, ll->experts[e], &at)) {
            if (verify_row(look, e, place++, &at, wrong))
                return 1;
            at.token++;
        }
        int64_t range = (int64_t)((uint64_t)begin << 32 | (uint64_t)(place - begin));
        *wrong += look->range[e * (size_t)work->ranks + (size_t)source] != range;
    }
    *wrong += look->count[e] != (int32_t)place;
    for (; place < ll->places; place++)
        *wrong += (uint32_t)look->src[e * ll->places + place] != 0xeeeeeeeeu;
    return 0;
}

int bench_ll_verify_dispatch(bench_ll_t *ll, uint64_t *wrong)
{
    look_t look;
    int failed = look_init(&look, ll);
    for (uint32_t e = 0; e < ll->local_experts && !failed; e++)
        failed = verify_expert(&look, e, wrong);
    look_fini(&look);
    return failed;
}

/* ---- combine ---- */

typedef struct sums {
    uint16_t *row, *expect, *came;
    float *part, *sum;
} sums_t;

/* += weight * what the token's k-th expert put out: a product, then a sum, in fp32. */
static void add_choice(const bench_rank_t *self, uint32_t token, uint32_t k, uint16_t *row, float *sum)
{
    const bench_t *bench = self->bench;
    int me = self->rank->rank;
    int64_t id = bench->work.ids[(self->first + token) * bench->work.topk + k];
    float weight = bench_weight(bench, me, token, k);
    pattern_fill(row, bench->row_bytes, bench_ll_output_key(self, id, me, token), PATTERN_BF16);
    for (long h = 0; h < bench->options.hidden; h++) {
        float product = weight * number_from_bf16(row[h]);
        sum[h] += product;
    }
}

/*
 * All choices in top-k order; pre-reduced: those of each rank in top-k order, rounded to bf16, and these sums in rank
 * order. Everything starts from +0 and is rounded once at the end.
 */
static void expect_sum(const bench_rank_t *self, uint32_t token, sums_t *s)
{
    const bench_work_t *work = &self->bench->work;
    size_t hidden = (size_t)self->bench->options.hidden;
    const int64_t *ids = work->ids + (self->first + token) * work->topk;
    memset(s->sum, 0, hidden * sizeof *s->sum);
    for (uint32_t k = 0; k < work->topk && !self->bench->options.pre_reduced; k++)
        if (ids[k] >= 0)
            add_choice(self, token, k, s->row, s->sum);
    for (int rank = 0; rank < work->ranks && self->bench->options.pre_reduced; rank++) {
        bool any = false;
        memset(s->part, 0, hidden * sizeof *s->part);
        for (uint32_t k = 0; k < work->topk; k++)
            if (ids[k] >= 0 && work->expert_rank[ids[k]] == rank) {
                add_choice(self, token, k, s->row, s->part);
                any = true;
            }
        for (size_t h = 0; h < hidden && any; h++)
            s->sum[h] += number_from_bf16(number_to_bf16(s->part[h]));
    }
    for (size_t h = 0; h < hidden; h++)
        s->expect[h] = number_to_bf16(s->sum[h]);
}

int bench_ll_verify_combine(bench_ll_t *ll, uint64_t *wrong)
{
    bench_rank_t *self = ll->self;
    size_t hidden = (size_t)self->bench->options.hidden, bytes = hidden * 2;
    sums_t s = {malloc(bytes), malloc(bytes), malloc(bytes), malloc(hidden * 4), malloc(hidden * 4)};
    int failed = !s.row || !s.expect || !s.came || !s.part || !s.sum;
    for (uint32_t token = 0; token < self->tokens && !failed; token++) {
        failed = self->mem->copy_out(self->context, s.came, (const uint8_t *)self->out + token * bytes, bytes);
        expect_sum(self, token, &s);
        *wrong += !failed && memcmp(s.came, s.expect, bytes) != 0;
    }
    free(s.row);
    free(s.expect);
    free(s.came);
    free(s.part);
    free(s.sum);
    return failed ? rank_fail(self->rank, "combine's output could not be looked at") : 0;
}
