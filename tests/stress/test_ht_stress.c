/*
 * High throughput under stress: ranks far apart in time, no barrier anywhere, memory poisoned the moment it is given
 * back (common/step.c does that), places too small so that rows pass in rounds. Everything is compared with the
 * reference.
 *
 *     stress_test_ht_stress [part of a run's name] [factor in percent] [seed]
 */
#include "common/step.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct stress {
    const char *name;
    int ranks;
    bool processes;
    uint32_t rounds;
    uint32_t tokens_max, topk, experts;
    size_t row_bytes, lease_bytes, reserve_bytes;
    uint64_t delay_ns; /* about 100 times a call of that size */
    uint32_t delay_one_in;
    int last_rank;   /* delays every one of its calls; -1 none */
    bool interleave; /* two operations at once, ends in either order */
    uint64_t seed;
} stress_t;

/* Columns as in stress_t. */
static const stress_t runs[] = {
    {"10,000 rounds", 4, false, 10000, 3, 2, 4, 32, 16u << 10, 8u << 10, 0, 0, -1, false, 1},
    {"10,000 rounds, interleaved", 4, false, 2500, 3, 2, 4, 32, 16u << 10, 8u << 10, 0, 0, -1, true, 2},
    {"delays", 4, true, 150, 12, 3, 8, 64, 64u << 10, 16u << 10, 5000000, 12, -1, false, 3},
    {"delays, threads", 5, false, 150, 12, 3, 10, 64, 64u << 10, 16u << 10, 5000000, 12, -1, true, 4},
    {"rank 0 last", 4, true, 120, 12, 4, 8, 64, 64u << 10, 16u << 10, 3000000, 0, 0, false, 5},
    {"rank 3 last, rounds", 4, false, 80, 40, 4, 8, 256, 4096, 16u << 10, 3000000, 0, 3, true, 6},
    {"delays in rounds", 4, true, 80, 60, 4, 8, 512, 4096, 20u << 10, 8000000, 10, -1, true, 7},
    {"8 ranks, rounds", 8, false, 60, 20, 4, 16, 128, 4096, 32u << 10, 4000000, 16, 5, false, 8},
    {"leases run out", 4, false, 250, 16, 4, 8, 128, 8192, 16u << 10, 1000000, 16, -1, true, 9},
};

typedef struct context {
    const stress_t *stress;
    uint32_t rounds;
} context_t;

static xt_shape_t shape_of(const stress_t *s, uint32_t op)
{
    xt_shape_t shape = {.ranks = s->ranks, .seed = s->seed, .op = op, .tokens_max = s->tokens_max};
    uint64_t h = xt_mix(s->seed, op, 6, 61);
    shape.topk = h % 7 == 0 ? 0 : 1 + (uint32_t)(h / 7 % s->topk);
    shape.experts = s->experts;
    shape.bits = h >> 20 & 1 ? 32 : 64;
    shape.weights = h >> 21 & 1;
    shape.alignment = 1 + (uint32_t)(h >> 22 & 3);
    shape.format = h >> 24 & 1 ? XT_BF16 : XT_FP32;
    shape.row_bytes = h >> 25 & 1 ? s->row_bytes : 16;
    shape.side_elems = (uint32_t)(h >> 26 & 3);
    shape.side_elem_bytes = 4;
    return shape;
}

/* One rank always comes last: it waits before every call. Others now and then. */
static void set_delays(xt_rank_t *self, const stress_t *s)
{
    if (s->last_rank >= 0) {
        self->delay_ns_max = self->rank == s->last_rank ? s->delay_ns : 0;
        self->delay_one_in = 1;
    } else {
        self->delay_ns_max = s->delay_ns;
        self->delay_one_in = s->delay_one_in;
    }
}

/* Two operations in flight, with worst-case mode and cached dispatch now and then. What all ranks must do alike follows
 * from the hash; the place of the rows is each rank's own choice. */
static bool run_pair(xt_rank_t *self, epx_buffer_t *buffer, const stress_t *s, uint32_t op)
{
    xt_step_t a = {.self = NULL}, b = {.self = NULL};
    xt_shape_t sa = shape_of(s, op), sb = shape_of(s, op + 1);
    uint64_t h = xt_mix(s->seed, op, 7, 62);
    bool swap = h & 1, again = h >> 1 & 1;
    bool good = xt_step_begin(&a, self, buffer, &sa, h >> 2 & 1) && xt_step_begin(&b, self, buffer, &sb, h >> 3 & 1);
    good = good && xt_step_end(swap ? &b : &a, XT_PLACE_ANY) && xt_step_end(swap ? &a : &b, XT_PLACE_ANY);
    if (good && again)
        good = xt_step_again(&a, XT_PLACE_ANY, XT_BYTES, 48, 1, 4);
    good = good && xt_step_combine(&b, XT_FROM_ANY, EPX_BF16, 8, h >> 4 & 1, (int)xt_random(self, 3));
    good = good && xt_step_combine(&a, XT_FROM_ANY, EPX_FP32, 4, h >> 5 & 1, (int)xt_random(self, 3));
    xt_step_release(xt_random(self, 2) ? &a : &b);
    xt_step_release(&a);
    xt_step_release(&b);
    return good;
}

static void body(xt_rank_t *self)
{
    const context_t *x = self->context;
    const stress_t *s = x->stress;
    epx_buffer_t *buffer = NULL;
    epx_buffer_config_t config = {.size = sizeof config, .lease_bytes = s->lease_bytes};
    config.reserve_bytes = s->reserve_bytes;
    config.tokens_max = s->tokens_max;
    config.topk_max = s->topk;
    config.experts_max = s->experts;
    config.handles_max = 2;
    config.leases_max = 4;
    set_delays(self, s);
    bool good = XT_OK(self, epx_buffer_create(self->group, &config, &buffer));
    for (uint32_t i = 0; good && i < x->rounds; i++) {
        xt_shape_t shape = shape_of(s, i * 2);
        good = s->interleave
                   ? run_pair(self, buffer, s, i * 2)
                   : xt_step_whole(self, buffer, &shape, xt_mix(s->seed, i, 8, 63) % 4 == 0, XT_PLACE_ANY, XT_FROM_ANY);
        XT_CHECK(self, good, "round %u", i);
    }
    if (good)
        XT_OK(self, epx_buffer_status(buffer));
    epx_buffer_destroy(buffer);
}

int main(int argc, char **argv)
{
    const char *part = argc > 1 ? argv[1] : "";
    uint32_t percent = argc > 2 ? (uint32_t)atoi(argv[2]) : 100;
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        stress_t s = runs[i];
        if (!strstr(s.name, part))
            continue;
        if (argc > 3)
            s.seed = (uint64_t)atoll(argv[3]);
        context_t x = {.stress = &s, .rounds = (s.rounds * percent + 99) / 100};
        xt_run_t r = {.name = s.name, .ranks = s.ranks, .threads = 1, .body = body, .context = &x, .seed = s.seed};
        r.processes = s.processes && !getenv("EPX_TEST_THREADS");
        xt_run(&r);
    }
    return xt_done();
}
