/*
 * Low latency against the reference: every format, order, number of ranks, whole calls and halves, two calls in flight,
 * several buffers, expert maps, masks. Every byte is compared, also that nothing past the counts is touched.
 *
 *     differential_test_ll [part of a run's name] [percent of the iterations] [seed]
 */
#include "common/ll_case.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct plan {
    const char *name;
    int ranks;
    bool processes;
    uint32_t calls, tokens_max, hidden_max, topk_max, experts, slots;
    bool map, zero_copy, pairs; /* pairs: two calls in flight */
    int masked;                 /* a rank that the others mask, -1 none */
    int buffers;
    uint64_t seed;
} plan_t;

static const plan_t plans[] = {
    {"one rank", 1, false, 40, 7, 512, 4, 4, 2, false, false, false, -1, 1, 1},
    {"two ranks", 2, false, 60, 9, 1024, 8, 16, 2, false, true, false, -1, 1, 2},
    {"two processes", 2, true, 60, 9, 1024, 8, 16, 2, false, true, true, -1, 1, 3},
    {"three, map", 3, false, 40, 6, 640, 6, 13, 3, true, false, true, -1, 1, 4},
    {"four processes", 4, true, 40, 12, 512, 8, 32, 2, false, false, true, -1, 1, 5},
    {"wide top-k", 4, false, 24, 5, 256, 32, 64, 2, false, false, false, -1, 1, 6},
    {"one slot", 3, false, 30, 6, 256, 4, 6, 1, false, false, false, -1, 1, 7},
    {"five slots", 3, false, 30, 6, 256, 4, 6, 5, false, true, true, -1, 1, 8},
    {"odd hidden", 2, false, 30, 5, 1000, 3, 6, 2, false, false, false, -1, 1, 9},
    {"eight", 8, false, 16, 5, 512, 8, 24, 2, true, false, true, -1, 1, 10},
    {"eight processes", 8, true, 16, 5, 512, 8, 24, 2, false, false, false, -1, 1, 11},
    {"masked", 4, false, 30, 6, 256, 4, 8, 2, false, false, true, 2, 1, 12},
    {"buffers", 3, false, 24, 6, 256, 4, 6, 2, false, false, false, -1, 2, 13},
    {"many tokens", 2, false, 6, 300, 128, 4, 8, 2, false, false, false, -1, 1, 14},
};

typedef struct context {
    plan_t plan;
    uint32_t percent;
} context_t;

static void body(xt_rank_t *self)
{
    const context_t *x = self->context;
    const plan_t *p = &x->plan;
    static __thread xl_world_t w[2];
    int32_t map[512];
    epx_buffer_config_t config = {.ll_slots = p->slots};
    memset(w, 0, sizeof w);
    for (uint32_t e = 0; e < p->experts; e++)
        map[e] = (int32_t)(xt_mix(p->seed, e, 5, 5) % (uint64_t)p->ranks);
    bool good = true, there = self->rank != p->masked;
    for (int i = 0; i < p->buffers; i++) {
        w[i].seed = p->seed + (uint64_t)i * 1000;
        w[i].tokens_max = p->tokens_max;
        w[i].hidden_max = p->hidden_max;
        w[i].topk_max = p->topk_max;
        w[i].experts = p->experts;
        w[i].expert_rank = p->map ? map : NULL;
        w[i].zero_copy = p->zero_copy;
        good = good && xl_open(&w[i], self, &config);
        if (good && p->masked >= 0 && there) {
            w[i].masked[p->masked] = 1;
            good = XT_OK(self, epx_ll_mask_set(w[i].buffer, p->masked, 1, self->memory->stream()));
        }
    }
    uint32_t calls = (p->calls * x->percent + 99) / 100;
    for (uint32_t op = 0; good && there && op < calls; op += 2) {
        xl_world_t *at = &w[op / 2 % (uint32_t)p->buffers];
        good = p->pairs && xt_mix(p->seed, op, 12, 1) % 3 ? xl_run_pair(at, op) : xl_run(at, op) && xl_run(at, op + 1);
        XT_CHECK(self, good, "call %u", op);
    }
    for (int i = 0; good && i < p->buffers; i++)
        XT_OK(self, epx_buffer_status(w[i].buffer));
    xt_mark(self, 0);
    xt_wait_mark(self, 0, self->ranks); /* the masked rank stays until the others are done */
    for (int i = 0; i < p->buffers; i++)
        xl_close(&w[i]);
}

int main(int argc, char **argv)
{
    const char *part = argc > 1 ? argv[1] : "", *most = getenv("EPX_TEST_RANKS_MAX");
    for (size_t i = 0; i < sizeof plans / sizeof *plans; i++) {
        context_t x = {.plan = plans[i], .percent = argc > 2 ? (uint32_t)atoi(argv[2]) : 100};
        if (!strstr(x.plan.name, part) || (most && x.plan.ranks > atoi(most)))
            continue;
        if (argc > 3)
            x.plan.seed = (uint64_t)atoll(argv[3]);
        xt_run_t r = {.name = x.plan.name, .ranks = x.plan.ranks, .threads = 1, .body = body, .context = &x};
        r.seed = x.plan.seed;
        r.processes = x.plan.processes && !getenv("EPX_TEST_THREADS");
        r.ranks_per_domain = x.plan.ranks; /* one domain; several: test_ll_net.c */
        xt_run(&r);
    }
    return xt_done();
}
