/*
 * High throughput between domains against the reference, byte for byte, over every network of the build; and the bytes
 * on the wire against what the routing predicts, to the byte.
 *
 *     differential_test_ht_net [network] [iterations]
 */
#include "common/step.h"
#include "common/nets.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "algo/ht/cpu/rail.h"

typedef struct world {
    int domains, per_domain;
    size_t lease_bytes, reserve_bytes;
    uint32_t tokens_max, row_bytes;
    xt_place_t place;
    xt_from_t from;
} world_t;

static const world_t worlds[] = {
    {2, 1, 4u << 20, 1u << 20, 40, 256, XT_PLACE_ANY, XT_FROM_ANY},
    {2, 1, 4096, 64u << 10, 500, 1024, XT_PLACE_OWN, XT_FROM_ANYWHERE}, /* rings go round several times */
    {2, 2, 4u << 20, 1u << 20, 24, 128, XT_PLACE_ANY, XT_FROM_ANY},
    {2, 2, 4096, 64u << 10, 200, 1024, XT_PLACE_OWN, XT_FROM_ANYWHERE},
    {3, 3, 4u << 20, 1u << 20, 12, 96, XT_PLACE_ANY, XT_FROM_ANY},
    {4, 1, 4u << 20, 1u << 20, 20, 64, XT_PLACE_ANY, XT_FROM_ANY},
    {2, 8, 4u << 20, 1u << 20, 10, 64, XT_PLACE_ANY, XT_FROM_ANY},
    {1, 3, 4u << 20, 1u << 20, 10, 64, XT_PLACE_ANY, XT_FROM_ANY}, /* no network at all */
};

typedef struct context {
    const world_t *world;
    uint32_t iterations;
    uint64_t seed;
} context_t;

static xt_shape_t shape_of(const context_t *x, uint32_t op)
{
    const world_t *w = x->world;
    int ranks = w->domains * w->per_domain;
    uint64_t h = xt_mix(x->seed, op, 8, 81);
    xt_shape_t s = {.ranks = ranks, .seed = x->seed, .op = op, .tokens_max = w->tokens_max};
    s.topk = h % 8 == 0 ? 0 : 1 + (uint32_t)(h / 8 % 6);
    s.experts = (uint32_t)ranks * 2;
    s.bits = h >> 20 & 1 ? 32 : 64;
    s.weights = h >> 21 & 1;
    s.alignment = 1 + (uint32_t)(h >> 22 & 3);
    s.format = (xt_format_t)(1 + (h >> 24) % 3);
    s.row_bytes = w->row_bytes;
    s.side_elems = (uint32_t)(h >> 30 & 3);
    s.side_elem_bytes = 4;
    return s;
}

static uint64_t net_bytes(xt_rank_t *self, epx_buffer_t *buffer)
{
    epx_traffic_t traffic = {.size = sizeof traffic};
    XT_OK(self, epx_buffer_get_traffic(buffer, &traffic));
    return traffic.net_bytes;
}

/* Tokens of `source` that go to some rank of domain d. */
static uint64_t crossing(xt_rank_t *self, const xt_step_t *s, int source, int d)
{
    uint64_t n = 0;
    for (uint32_t t = 0; t < s->expect.all[source].tokens; t++) {
        bool any = false;
        for (int i = 0; i < self->topology.per_domain; i++)
            any = any || xt_goes(&s->expect, source, t, epx__topology_rank(&self->topology, d, i));
        n += any;
    }
    return n;
}

/* My own tokens that go to other domains; with `back`, those of my rails that come to mine. */
static uint64_t all_crossing(xt_rank_t *self, const xt_step_t *s, bool back)
{
    int home = self->topology.domain_of[self->rank], index = self->topology.index_of[self->rank];
    uint64_t n = 0;
    for (int d = 0; d < self->topology.domains; d++)
        if (d != home)
            n += back ? crossing(self, s, epx__topology_rank(&self->topology, d, index), home)
                      : crossing(self, s, self->rank, d);
    return n;
}

static uint64_t round16(uint64_t bytes)
{
    return (bytes + 15) / 16 * 16;
}

/* The parts of one operation, and the wire after each. */
static bool run_one(xt_rank_t *self, epx_buffer_t *buffer, const context_t *x, uint32_t op)
{
    xt_shape_t shape = shape_of(x, op);
    xt_step_t s;
    uint64_t rails = (uint64_t)self->topology.domains - 1, header = rails * sizeof(epx__rail_message_t);
    uint64_t masks = ((uint64_t)self->topology.per_domain + 7) / 8, before = net_bytes(self, buffer);
    bool worst = xt_mix(x->seed, op, 9, 91) % 4 == 0;
    bool good = xt_step_begin(&s, self, buffer, &shape, worst);
    if (good) {
        uint64_t own = all_crossing(self, &s, false), there = all_crossing(self, &s, true);
        uint64_t counts = rails * 4 * ((uint64_t)self->ranks + (shape.topk ? shape.experts : 0));
        uint64_t want = header + counts + own * (4 + masks), now = net_bytes(self, buffer);
        XT_CHECK(self, now - before == want, "begin put %llu bytes on the network, not %llu",
                 (unsigned long long)(now - before), (unsigned long long)want);
        before = now;
        good = xt_step_end(&s, x->world->place);
        uint64_t row = shape.row_bytes + (uint64_t)shape.side_elems * shape.side_elem_bytes;
        row += (uint64_t)shape.topk * (uint32_t)(shape.bits / 8) + (shape.weights ? 4ull * shape.topk : 0);
        now = net_bytes(self, buffer);
        want = header + own * round16(row);
        XT_CHECK(self, !good || now - before == want, "rows put %llu bytes on the network, not %llu",
                 (unsigned long long)(now - before), (unsigned long long)want);
        before = now;
        epx_dtype_t dtype = (epx_dtype_t)(1 + op % 3);
        uint32_t hidden = (uint32_t)(shape.row_bytes / epx__dtype_bytes(dtype));
        bool weights = op % 2;
        good = good && xt_step_combine(&s, x->world->from, dtype, hidden, weights, (int)(op % 3));
        now = net_bytes(self, buffer);
        want = header + there * round16(shape.row_bytes + (weights ? 4ull * shape.topk : 0));
        XT_CHECK(self, !good || now - before == want || (weights && !shape.topk), "combine put %llu bytes, not %llu",
                 (unsigned long long)(now - before), (unsigned long long)want);
        if (good && op % 4 == 1)
            good = xt_step_again(&s, x->world->place, XT_BYTES, shape.row_bytes * 2, 1, 4);
        if (good && op % 4 == 2)
            good = XT_OK(self, epx_buffer_barrier(buffer, NULL));
    }
    xt_step_release(&s);
    return good;
}

static void body(xt_rank_t *self)
{
    const context_t *x = self->context;
    const world_t *w = x->world;
    epx_buffer_t *buffer = NULL;
    epx_buffer_config_t config = {.size = sizeof config,
                                  .lease_bytes = w->lease_bytes,
                                  .reserve_bytes = w->reserve_bytes,
                                  .tokens_max = w->tokens_max,
                                  .topk_max = 6,
                                  .experts_max = (uint32_t)self->ranks * 2,
                                  .handles_max = 4,
                                  .leases_max = 8};
    self->delay_ns_max = 200000;
    self->delay_one_in = 20;
    XT_CHECK(self, self->topology.domains == w->domains, "%d domains", self->topology.domains);
    bool good = XT_OK(self, epx_buffer_create(self->group, &config, &buffer));
    for (uint32_t i = 0; good && i < x->iterations; i++)
        good = run_one(self, buffer, x, i);
    if (good) {
        uint8_t works[XT_RANKS_MAX];
        XT_OK(self, epx_buffer_check(buffer, works));
        XT_OK(self, epx_buffer_status(buffer));
    }
    epx_buffer_destroy(buffer);
}

static void suite(const char *spec, uint32_t iterations, bool processes)
{
    setenv("EPX_NET", spec, 1);
    for (size_t i = 0; i < sizeof worlds / sizeof *worlds; i++) {
        const world_t *w = &worlds[i];
        char name[64];
        context_t x = {.world = w, .iterations = iterations, .seed = 40 + i};
        snprintf(name, sizeof name, "%d domains of %d, %s", w->domains, w->per_domain, spec);
        xt_run_t run = {.name = name,
                        .ranks = w->domains * w->per_domain,
                        .processes = processes && !getenv("EPX_TEST_THREADS"),
                        .threads = 1 + (int)(i % 2),
                        .ranks_per_domain = w->per_domain,
                        .seed = x.seed,
                        .body = body,
                        .context = &x};
        xt_run(&run);
    }
}

int main(int argc, char **argv)
{
    bool slow = getenv("EPX_TEST_SANITIZER") != NULL; /* some ten times slower: fewer of the same */
    uint32_t iterations = argc > 2 ? (uint32_t)atoi(argv[2]) : slow ? 3 : 12;
    if (argc > 1) {
        suite(argv[1], iterations, strncmp(argv[1], "ofi", 3) == 0);
        return xt_done();
    }
    suite("loop", iterations * 2, false);
    for (int seed = 1; seed <= (slow ? 1 : 4); seed++) {
        char spec[32];
        snprintf(spec, sizeof spec, "sim:%d", seed);
        suite(spec, iterations, false);
    }
    /* Under TSan not: libfabric is not instrumented, and nine of its ranks on two cores outlast any deadline. */
    if (!getenv("EPX_TEST_THREADS") && test_net_here("ofi:tcp"))
        suite("ofi:tcp", iterations, true);
    return xt_done();
}
