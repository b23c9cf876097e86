/*
 * The hand-over between domains: dispatch, combine, dispatch ... back to back without any barrier; 10,000 rounds on
 * sim, 1,000 on tcp; rings so small that they go round in every operation; ranks far apart in time; memory poisoned as
 * soon as it is given back (common/step.c). Everything is compared with the reference.
 *
 *     stress_test_ht_net_stress [part of a run's name] [factor in percent]
 */
#include "common/step.h"
#include "common/nets.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct stress {
    const char *name, *net;
    int domains, per_domain;
    bool processes;
    uint32_t rounds, tokens_max;
    size_t row_bytes, lease_bytes, reserve_bytes;
    uint64_t delay_ns;
    uint32_t delay_one_in;
} stress_t;

static const stress_t runs[] = {
    {"10,000 rounds on sim", "sim:11", 2, 2, false, 10000, 3, 32, 64u << 10, 16u << 10, 0, 0},
    {"rings go round, sim", "sim:12", 2, 2, false, 60, 300, 1024, 4096, 64u << 10, 2000000, 16},
    {"rings go round, 3 domains, sim", "sim:13", 3, 1, false, 60, 300, 1024, 4096, 64u << 10, 2000000, 16},
    {"straight to leases, 3 domains, sim", "sim:14", 3, 1, false, 100, 300, 1024, 4u << 20, 64u << 10, 1000000, 16},
    {"delays, loop", "loop", 2, 2, false, 200, 24, 128, 64u << 10, 64u << 10, 5000000, 16},
    {"1,000 rounds on tcp", "ofi:tcp", 2, 2, true, 1000, 6, 64, 256u << 10, 64u << 10, 0, 0},
    {"delays, tcp", "ofi:tcp", 2, 1, true, 60, 300, 1024, 4096, 64u << 10, 2000000, 16},
};

typedef struct context {
    const stress_t *stress;
    uint32_t rounds;
} context_t;

static xt_shape_t shape_of(const stress_t *s, uint32_t op)
{
    xt_shape_t shape = {.ranks = s->domains * s->per_domain, .seed = s->rounds, .op = op, .tokens_max = s->tokens_max};
    uint64_t h = xt_mix(s->rounds, op, 10, 101);
    shape.topk = 1 + (uint32_t)(h % 3);
    shape.experts = (uint32_t)shape.ranks * 2;
    shape.bits = 64;
    shape.weights = h >> 21 & 1;
    shape.alignment = 1;
    shape.format = h >> 24 & 1 ? XT_BF16 : XT_FP32;
    shape.row_bytes = h >> 25 & 1 ? s->row_bytes : 16;
    shape.side_elems = (uint32_t)(h >> 26 & 1);
    shape.side_elem_bytes = 4;
    return shape;
}

static void body(xt_rank_t *self)
{
    const context_t *x = self->context;
    const stress_t *s = x->stress;
    epx_buffer_t *buffer = NULL;
    epx_buffer_config_t config = {.size = sizeof config,
                                  .lease_bytes = s->lease_bytes,
                                  .reserve_bytes = s->reserve_bytes,
                                  .tokens_max = s->tokens_max,
                                  .topk_max = 3,
                                  .experts_max = (uint32_t)self->ranks * 2,
                                  .handles_max = 2,
                                  .leases_max = 4};
    self->delay_ns_max = s->delay_ns;
    self->delay_one_in = s->delay_one_in;
    bool good = XT_OK(self, epx_buffer_create(self->group, &config, &buffer));
    for (uint32_t i = 0; good && i < x->rounds; i++) {
        xt_shape_t shape = shape_of(s, i);
        good = xt_step_whole(self, buffer, &shape, false, XT_PLACE_ANY, XT_FROM_ANY);
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
        const stress_t *s = &runs[i];
        if (!strstr(s->name, part) || !test_net_here(s->net))
            continue;
        setenv("EPX_NET", s->net, 1);
        context_t x = {.stress = s, .rounds = (s->rounds * percent + 99) / 100};
        xt_run_t run = {.name = s->name,
                        .ranks = s->domains * s->per_domain,
                        .processes = s->processes && !getenv("EPX_TEST_THREADS"),
                        .threads = 1,
                        .ranks_per_domain = s->per_domain,
                        .seed = 70 + i,
                        .body = body,
                        .context = &x};
        if (xt_run(&run) > 0 && argc > 1)
            break;
    }
    return xt_done();
}
