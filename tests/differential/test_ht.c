/*
 * High-throughput dispatch and combine against the reference, byte for byte, in every shape; ranks as threads and as
 * processes; no collective but the calls under test. Each case is many iterations with changed routing on one buffer.
 *
 *     differential_test_ht [part of a case's name] [iterations' factor in percent]
 */
#include "common/step.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef enum order { WHOLE, ENDS_SWAPPED, ENDS_IN_ORDER, AGAIN, MANY_COMBINES, TWO_BUFFERS, TWO_GROUPS } order_t;

typedef struct ht_case {
    const char *name;
    int ranks;
    bool processes;
    uint32_t iterations;
    uint32_t tokens_max, topk, experts; /* topk 0: a mask */
    int bits;
    xt_format_t format;
    size_t row_bytes;
    uint32_t side_elems, side_elem_bytes;
    uint32_t alignment;
    bool weights, map, worst_case;
    xt_place_t place;
    xt_from_t from;
    size_t lease_bytes, reserve_bytes; /* 0: 4 MiB, 1 MiB */
    order_t order;
    int threads;
    enum xt_tokens tokens;
    enum xt_routing routing;
} ht_case_t;

/* One case a line. Columns as in ht_case_t: name, ranks, processes, iterations, tokens, top-k, experts,
 * id bits, format, row bytes, side elements and bytes of each, alignment, weights, map, worst case, place, from, lease
 * bytes, reserve bytes, order, threads, tokens' kind, routing's kind. */
static const ht_case_t cases[] = {
    /* every rank count */
    {"one rank", 1, 0, 40, 20, 4, 8, 64, XT_BF16, 64, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"two ranks", 2, 1, 60, 24, 4, 8, 64, XT_BF16, 128, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"two ranks, threads", 2, 0, 60, 24, 8, 16, 64, XT_BF16, 128, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, WHOLE, 2, 0, 0},
    {"three ranks", 3, 1, 50, 16, 3, 9, 64, XT_FP32, 64, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"four ranks", 4, 1, 50, 16, 4, 16, 64, XT_BF16, 256, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, WHOLE, 2, 0, 0},
    {"four ranks, threads", 4, 0, 50, 16, 4, 16, 32, XT_FP16, 256, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, WHOLE, 2, 0, 0},
    {"five ranks", 5, 1, 40, 12, 5, 10, 32, XT_FP16, 80, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"eight ranks", 8, 1, 30, 12, 8, 32, 64, XT_BF16, 96, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"sixteen ranks", 16, 1, 16, 8, 8, 64, 64, XT_BF16, 64, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"64 threads", 64, 0, 6, 4, 6, 128, 64, XT_BF16, 32, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"64 threads, 33 wide", 64, 0, 4, 3, 32, 64, 32, XT_BF16, 32, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    /* formats and side data */
    {"fp32, odd hidden", 4, 0, 30, 16, 4, 16, 64, XT_FP32, 16 * 13, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"bf16, hidden 7 * 8", 3, 0, 30, 16, 4, 9, 64, XT_BF16, 112, 2, 8, 1, 0, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"fp8 and scales", 4, 1, 30, 16, 4, 16, 64, XT_BYTES, 384, 3, 4, 1, 1, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"least rows", 4, 0, 30, 30, 2, 16, 64, XT_BYTES, 16, 4, 1, 1, 0, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"opaque, side of 2s", 2, 0, 30, 30, 2, 16, 32, XT_BYTES, 48, 6, 2, 1, 0, 0, 0, 0, 0, 0, 0, WHOLE, 2, 0, 0},
    {"large rows", 2, 1, 4, 128, 8, 32, 64, XT_BF16, 14336, 56, 4, 1, 1, 0, 0, 0, 0, 16u << 20, 0, WHOLE, 1, 0, 0},
    /* top-k, maps, masks, alignment */
    {"top-1", 4, 0, 30, 20, 1, 8, 64, XT_BF16, 64, 0, 0, 4, 1, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"top-32", 4, 0, 20, 12, 32, 64, 64, XT_BF16, 64, 0, 0, 8, 1, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"map of 7 experts", 4, 0, 30, 16, 3, 7, 64, XT_BF16, 64, 0, 0, 16, 1, 1, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"map of 2 experts", 3, 1, 30, 16, 2, 2, 32, XT_FP32, 64, 1, 4, 1, 0, 1, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"mask", 4, 0, 30, 16, 0, 0, 64, XT_BF16, 64, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"mask, processes", 5, 1, 30, 16, 0, 0, 64, XT_FP32, 64, 2, 4, 1, 0, 0, 0, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"one expert for all", 4, 0, 20, 16, 4, 16, 64, XT_BF16, 64, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, WHOLE, 1, XT_TOKENS_FULL,
     XT_ROUTE_ONE_RANK},
    /* worst case */
    {"worst case", 4, 0, 30, 16, 4, 16, 64, XT_BF16, 64, 3, 4, 1, 1, 0, 1, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"worst case, mask", 3, 1, 30, 16, 0, 0, 64, XT_BF16, 64, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, WHOLE, 1, 0, 0},
    {"worst case, own", 4, 1,    30,        16,    4, 16, 32, XT_FP16, 64, 1, 8, 4, 1, 0, 1,
     XT_PLACE_OWN,      0, 4096, 64u << 10, WHOLE, 1, 0,  0},
    /* rounds: no lease fits, and the reserve holds few rows */
    {"rounds, own",    4,    1,         25,    40, 4, 16, 64, XT_BF16, 512, 4, 4, 1, 1, 0, 0, XT_PLACE_OWN,
     XT_FROM_ANYWHERE, 4096, 24u << 10, WHOLE, 1,  0, 0},
    {"rounds, threads", 4,    0,         25,    40, 4, 16, 32, XT_FP16, 512, 4, 4, 1, 1, 0, 0, XT_PLACE_OWN,
     XT_FROM_ANYWHERE,  4096, 24u << 10, WHOLE, 2,  0, 0},
    {"rounds, leases busy",
     3,
     0,
     25,
     40,
     4,
     12,
     64,
     XT_BF16,
     256,
     0,
     0,
     1,
     1,
     0,
     0,
     0,
     0,
     16u << 10,
     24u << 10,
     WHOLE,
     1,
     0,
     0},
    {"rounds, 16 ranks", 16,   1,         8,     16, 8, 32, 64, XT_BF16, 256, 0, 0, 1, 1, 0, 0, XT_PLACE_OWN,
     XT_FROM_ANYWHERE,   4096, 96u << 10, WHOLE, 1,  0, 0},
    /* tokens that go nowhere between rows that are told of, one warp's */
    {"holes, own",
     2,
     0,
     40,
     200,
     1,
     8,
     64,
     XT_BF16,
     256,
     0,
     0,
     1,
     1,
     0,
     0,
     XT_PLACE_OWN,
     XT_FROM_ANYWHERE,
     4096,
     96u << 10,
     WHOLE,
     1,
     XT_TOKENS_FULL,
     XT_ROUTE_HOLES},
    /* cached dispatch, several combines, halves in other orders, several buffers */
    {"again", 4, 1, 25, 16, 4, 16, 64, XT_BF16, 128, 2, 4, 1, 1, 0, 0, 0, 0, 0, 0, AGAIN, 1, 0, 0},
    {"again, threads", 4,         0,     25, 16, 4, 16, 64, XT_FP32, 128, 2, 4, 1, 1, 0, 0, 0, 0,
     64u << 10,        48u << 10, AGAIN, 2,  0,  0},
    {"again, worst case", 3, 0, 25, 16, 4, 9, 32, XT_FP16, 128, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, AGAIN, 1, 0, 0},
    {"many combines", 4, 0, 20, 16, 4, 16, 64, XT_BF16, 128, 0, 0, 1, 1, 0, 0, 0, 0, 0, 64u << 10,
     MANY_COMBINES,   1, 0, 0},
    {"ends in order", 4, 1, 20, 12, 4, 16, 64, XT_BF16, 64, 1, 4, 1, 1, 0, 0, 0, 0, 0, 0, ENDS_IN_ORDER, 1, 0, 0},
    {"ends swapped", 4, 1, 20, 12, 4, 16, 64, XT_BF16, 64, 1, 4, 1, 1, 0, 0, 0, 0, 0, 0, ENDS_SWAPPED, 1, 0, 0},
    {"ends swapped, rounds", 3, 0, 20, 24, 4, 12, 64, XT_FP32, 256, 0, 0, 1, 1, 0, 0, 0, 0, 8192, 24u << 10,
     ENDS_SWAPPED,           1, 0, 0},
    {"two buffers", 4, 0, 20, 12, 4, 16, 64, XT_BF16, 64, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, TWO_BUFFERS, 1, 0, 0},
    {"two buffers, processes",
     3,
     1,
     20,
     12,
     4,
     12,
     64,
     XT_BF16,
     64,
     0,
     0,
     1,
     1,
     0,
     0,
     0,
     0,
     0,
     0,
     TWO_BUFFERS,
     1,
     0,
     0},
    {"two groups", 3, 1, 20, 12, 4, 12, 64, XT_BF16, 64, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, TWO_GROUPS, 1, 0, 0},
};

typedef struct context {
    const ht_case_t *c;
    uint32_t iterations;
    uint64_t seed;
    int32_t map[64];
} context_t;

static xt_shape_t shape_of(const context_t *x, int ranks, uint32_t op)
{
    const ht_case_t *c = x->c;
    xt_shape_t s = {.ranks = ranks, .seed = x->seed, .op = op, .tokens_max = c->tokens_max, .topk = c->topk};
    s.experts = c->experts;
    s.expert_rank = c->map ? x->map : NULL;
    s.bits = c->bits;
    s.weights = c->weights && xt_mix(x->seed, op, 5, 51) % 4 != 0;
    s.alignment = c->alignment;
    s.tokens = c->tokens;
    s.routing = c->routing;
    s.format = c->format;
    s.row_bytes = c->row_bytes;
    s.side_elems = c->side_elems;
    s.side_elem_bytes = c->side_elem_bytes;
    return s;
}

static epx_dtype_t dtype_of(const ht_case_t *c)
{
    return c->format == XT_BYTES ? EPX_BF16 : (epx_dtype_t)c->format;
}

static uint32_t hidden_of(const ht_case_t *c)
{
    return (uint32_t)(c->row_bytes / epx__dtype_bytes(dtype_of(c)));
}

/* Same routing, other rows, other sizes: larger, smaller, another format; combine in between. */
static bool run_again(xt_rank_t *self, epx_buffer_t *buffer, const context_t *x, const xt_shape_t *shape)
{
    const ht_case_t *c = x->c;
    xt_step_t s;
    bool good = xt_step_begin(&s, self, buffer, shape, c->worst_case) && xt_step_end(&s, c->place);
    good = good && xt_step_again(&s, c->place, XT_BYTES, c->row_bytes * 2 + 16, 0, 0);
    good = good && xt_step_combine(&s, c->from, dtype_of(c), hidden_of(c), true, 1);
    if (good && xt_random(self, 2))
        xt_step_release_received(&s);
    good = good && xt_step_again(&s, c->place, XT_BYTES, 16, 5, 4);
    good = good && xt_step_again(&s, c->place, XT_FP32, c->row_bytes, 1, 8);
    good = good && xt_step_combine(&s, c->from, EPX_FP32, 8, false, 2);
    xt_step_release(&s);
    return good;
}

static bool run_combines(xt_rank_t *self, epx_buffer_t *buffer, const context_t *x, const xt_shape_t *shape)
{
    const ht_case_t *c = x->c;
    xt_step_t s;
    bool good = xt_step_begin(&s, self, buffer, shape, c->worst_case) && xt_step_layout(&s);
    good = good && xt_step_end(&s, c->place);
    for (int i = 0; good && i < 4; i++) {
        epx_dtype_t dtype = (epx_dtype_t)(EPX_BF16 + i % 3);
        good = xt_step_combine(&s, c->from, dtype, 8u << i, i % 2, i % 3);
    }
    xt_step_release(&s);
    return good;
}

/* Halves of three operations interleaved; the ends in order or not. */
static bool run_interleaved(xt_rank_t *self, epx_buffer_t *buffer, const context_t *x, uint32_t op)
{
    const ht_case_t *c = x->c;
    bool swapped = c->order == ENDS_SWAPPED, good;
    xt_step_t a = {.self = NULL}, b = {.self = NULL}, d = {.self = NULL};
    xt_shape_t sa = shape_of(x, self->ranks, op), sb = shape_of(x, self->ranks, op + 1);
    xt_shape_t sd = shape_of(x, self->ranks, op + 2);
    good = xt_step_begin(&a, self, buffer, &sa, c->worst_case);
    good = good && xt_step_begin(&b, self, buffer, &sb, c->worst_case);
    good = good && xt_step_end(swapped ? &b : &a, c->place);
    good = good && xt_step_begin(&d, self, buffer, &sd, c->worst_case);
    good = good && xt_step_combine(swapped ? &b : &a, c->from, dtype_of(c), hidden_of(c), true, 0);
    good = good && xt_step_end(swapped ? &d : &b, c->place);
    good = good && xt_step_end(swapped ? &a : &d, c->place);
    good = good && xt_step_combine(&d, c->from, dtype_of(c), hidden_of(c), false, 1);
    good = good && xt_step_combine(swapped ? &a : &b, c->from, dtype_of(c), hidden_of(c), true, 2);
    xt_step_release(&a);
    xt_step_release(&d);
    xt_step_release(&b);
    return good;
}

/* Halves over two buffers at once. */
static bool run_two(xt_rank_t *self, epx_buffer_t *one, epx_buffer_t *two, const context_t *x, uint32_t op)
{
    const ht_case_t *c = x->c;
    xt_step_t a = {.self = NULL}, b = {.self = NULL};
    xt_shape_t sa = shape_of(x, self->ranks, op), sb = shape_of(x, self->ranks, op + 1);
    bool good = xt_step_begin(&a, self, one, &sa, c->worst_case) && xt_step_begin(&b, self, two, &sb, c->worst_case);
    good = good && xt_step_end(&b, c->place) && xt_step_end(&a, c->place);
    good = good && xt_step_combine(&a, c->from, dtype_of(c), hidden_of(c), true, 0);
    good = good && xt_step_combine(&b, c->from, dtype_of(c), hidden_of(c), true, 0);
    xt_step_release(&a);
    xt_step_release(&b);
    return good && xt_step_whole(self, op / 2 % 2 ? one : two, &sa, c->worst_case, c->place, c->from);
}

static bool make_buffer(xt_rank_t *self, const context_t *x, epx_group_t *group, epx_buffer_t **buffer)
{
    const ht_case_t *c = x->c;
    epx_buffer_config_t config = {.size = sizeof config, .lease_bytes = c->lease_bytes ? c->lease_bytes : 4u << 20};
    config.reserve_bytes = c->reserve_bytes ? c->reserve_bytes : 1u << 20;
    config.tokens_max = c->tokens_max;
    config.topk_max = c->topk ? c->topk : 1;
    config.experts_max = c->experts ? c->experts : 1;
    config.handles_max = 4;
    config.leases_max = 8;
    config.expert_rank = c->map ? x->map : NULL;
    config.experts = c->map ? c->experts : 0;
    return XT_OK(self, epx_buffer_create(group, &config, buffer));
}

static void body(xt_rank_t *self)
{
    const context_t *x = self->context;
    const ht_case_t *c = x->c;
    epx_buffer_t *buffer = NULL, *second = NULL;
    epx_group_t *group = NULL;                           /* a second one, side by side with the first */
    self->delay_ns_max = self->ranks <= 16 ? 200000 : 0; /* ranks apart in time, now and then */
    self->delay_one_in = 20;
    bool good = make_buffer(self, x, self->group, &buffer);
    if (good && c->order == TWO_GROUPS)
        good = XT_OK(self, xt_group(self, 1, NULL, &group));
    if (good && (c->order == TWO_BUFFERS || c->order == TWO_GROUPS))
        good = make_buffer(self, x, group ? group : self->group, &second);
    for (uint32_t i = 0; good && i < x->iterations; i++) {
        uint32_t op = i * 4;
        xt_shape_t shape = shape_of(x, self->ranks, op);
        if (c->order == AGAIN)
            good = run_again(self, buffer, x, &shape);
        else if (c->order == MANY_COMBINES)
            good = run_combines(self, buffer, x, &shape);
        else if (c->order == ENDS_SWAPPED || c->order == ENDS_IN_ORDER)
            good = run_interleaved(self, buffer, x, op);
        else if (c->order == TWO_BUFFERS || c->order == TWO_GROUPS)
            good = run_two(self, buffer, second, x, op);
        else
            good = xt_step_whole(self, buffer, &shape, c->worst_case, c->place, c->from);
    }
    if (good)
        XT_OK(self, epx_buffer_status(buffer));
    epx_buffer_destroy(second);
    epx_group_destroy(group);
    epx_buffer_destroy(buffer);
}

int main(int argc, char **argv)
{
    const char *part = argc > 1 ? argv[1] : "";
    uint32_t percent = argc > 2 ? (uint32_t)atoi(argv[2]) : 100;
    int run = 0;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const ht_case_t *c = &cases[i];
        context_t x = {.c = c, .iterations = (c->iterations * percent + 99) / 100, .seed = 1000 + i};
        bool processes = c->processes && !getenv("EPX_TEST_THREADS"); /* one process, for the thread sanitizer */
        const char *ranks_max = getenv("EPX_TEST_RANKS_MAX");
        if (!strstr(c->name, part) || (ranks_max && c->ranks > atoi(ranks_max)))
            continue;
        for (uint32_t e = 0; e < c->experts && e < 64; e++) /* uneven: the last rank may hold none */
            x.map[e] = (int32_t)((e * e + e / 2) % (uint32_t)c->ranks);
        xt_run_t r = {.name = c->name, .ranks = c->ranks, .processes = processes, .threads = c->threads, .body = body};
        r.context = &x;
        r.seed = x.seed;
        run++;
        if (xt_run(&r) > 0 && argc > 1)
            break;
    }
    if (run == 0)
        printf("no case is named like \"%s\"\n", part);
    return xt_done();
}
