/*
 * High throughput between domains of GPUs against the reference, byte for byte: ranks share this machine's GPUs (one is
 * enough), as threads over loop and sim, as processes over ofi:tcp. Every format, weights, side data, worst case, own
 * memory and leases, cached dispatch, biases; then a rank that stays away, who must be named within the deadline on
 * both sides of the network.
 *
 *     gpu_test_domains [network, or "all"] [iterations] [part of a world's name]
 *
 * Many ranks on few GPUs: the library gives each its part of the SMs, at least the five that domains take (16 ranks on
 * one GPU of 132 have eight). As threads their kernels run beside each other; as processes the GPU runs one after the
 * other for some milliseconds each, so every step of the protocol takes that long. With EPX_TEST_THREADS ranks are
 * threads over ofi:tcp too.
 */
#include "gpu/memory_cuda.h"

#include <time.h>

#include "common/slowness.h"
#include "common/step.h"
#include "common/nets.h"

#define DEADLINE_MS 2000u

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
    {2, 2, 4096, 64u << 10, 200, 1024, XT_PLACE_OWN, XT_FROM_ANYWHERE}, /* staging rings too */
    {3, 1, 4u << 20, 1u << 20, 64, 96, XT_PLACE_ANY, XT_FROM_ANY},
    {3, 2, 2u << 20, 96u << 10, 100, 512, XT_PLACE_LEASE, XT_FROM_RECEIVED},
    {4, 1, 4u << 20, 1u << 20, 20, 64, XT_PLACE_ANY, XT_FROM_ANY},
    {2, 1, 16u << 20, 64u << 10, 40, 24576, XT_PLACE_LEASE, XT_FROM_RECEIVED}, /* two records fill a ring */
    {2, 8, 1u << 20, 1u << 20, 12, 128, XT_PLACE_ANY, XT_FROM_ANY},
    {2, 8, 64u << 10, 512u << 10, 40, 512, XT_PLACE_OWN, XT_FROM_ANYWHERE},
};
enum { UNNAMED_RANKS_MAX = 8 }; /* worlds of more ranks run when they are named, for they take long */

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
    s.format = (xt_format_t)(1 + (h >> 24) % 4);
    s.row_bytes = w->row_bytes;
    s.side_elems = (uint32_t)(h >> 30 & 3);
    s.side_elem_bytes = h >> 32 & 1 ? 4 : 1;
    s.side_elems *= s.side_elem_bytes == 1 ? 4 : 1; /* together a multiple of 4 */
    return s;
}

static bool run_one(xt_rank_t *self, epx_buffer_t *buffer, const context_t *x, uint32_t op)
{
    xt_shape_t shape = shape_of(x, op);
    xt_step_t s;
    bool worst = xt_mix(x->seed, op, 9, 91) % 4 == 0;
    bool good = xt_step_begin(&s, self, buffer, &shape, worst);
    if (good) {
        epx_dtype_t dtype = (epx_dtype_t)(1 + op % 3);
        uint32_t hidden = (uint32_t)(shape.row_bytes / (dtype == EPX_FP32 ? 4 : 2));
        good = xt_step_end(&s, x->world->place);
        good = good && xt_step_combine(&s, x->world->from, dtype, hidden, op % 2, (int)(op % 3));
        if (good && op % 4 == 1)
            good = xt_step_again(&s, x->world->place, XT_BYTES, shape.row_bytes / 2, 1, 4);
        if (good && op % 4 == 2)
            good = XT_OK(self, epx_buffer_barrier(buffer, self->memory->stream()));
    }
    xt_step_release(&s);
    return good;
}

static epx_buffer_config_t config_of(const xt_rank_t *self, const world_t *w)
{
    epx_buffer_config_t config = {
        .size = sizeof config, .lease_bytes = w->lease_bytes, .reserve_bytes = w->reserve_bytes};
    config.tokens_max = w->tokens_max;
    config.topk_max = 6;
    config.experts_max = (uint32_t)self->ranks * 2;
    config.handles_max = 4;
    config.leases_max = 8;
    return config;
}

static void body(xt_rank_t *self)
{
    const context_t *x = self->context;
    epx_buffer_t *buffer = NULL;
    epx_buffer_config_t config = config_of(self, x->world);
    self->delay_ns_max = 200000;
    self->delay_one_in = 20;
    epx_group_info_t info = {.size = sizeof info};
    XT_CHECK(self, self->topology.domains == x->world->domains, "%d domains", self->topology.domains);
    XT_CHECK(self, epx_group_get_info(self->group, &info) == EPX_OK && strstr(info.net_why, "pinned host memory"), "%s",
             info.net_why);
    bool good = XT_OK(self, epx_buffer_create(self->group, &config, &buffer));
    for (uint32_t i = 0; good && i < x->iterations; i++)
        good = run_one(self, buffer, x, i);
    if (good) {
        uint8_t works[XT_RANKS_MAX];
        XT_OK(self, epx_buffer_check(buffer, works));
        for (int r = 0; r < self->ranks; r++)
            XT_CHECK(self, works[r] == (self->topology.domain_of[r] == self->topology.domain_of[self->rank]), "rank %d",
                     r);
        XT_OK(self, epx_buffer_status(buffer));
    }
    epx_buffer_destroy(buffer);
}

/* ---- a rank stays away ---- */

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000u + (uint64_t)t.tv_nsec / 1000000u;
}

static void away(xt_rank_t *self)
{
    epx_buffer_t *buffer = NULL;
    xt_step_t s;
    const context_t *x = self->context;
    epx_buffer_config_t config = config_of(self, x->world);
    config.timeout_ms = DEADLINE_MS;
    xt_shape_t shape = {
        .ranks = self->ranks, .seed = 5, .op = 1, .tokens_max = 8, .topk = 2, .bits = 64, .alignment = 1};
    shape.experts = (uint32_t)self->ranks;
    shape.format = XT_BF16;
    shape.row_bytes = 64;
    shape.tokens = XT_TOKENS_FULL;
    if (!XT_OK(self, epx_buffer_create(self->group, &config, &buffer)))
        return;
    uint64_t start = now_ms();
    epx_status_t status = EPX_OK;
    memset(&s, 0, sizeof s);
    if (self->rank == 0) { /* its own checks would count the failure */
        int64_t ids[16] = {0};
        void *device = self->memory->alloc(sizeof ids), *rows = self->memory->alloc(8 * 64);
        self->memory->put(device, ids, sizeof ids);
        epx_dispatch_t d = {.size = sizeof d, .rows = {.x = rows, .row_bytes = 64}, .tokens = 8, .topk_idx = device};
        epx_counts_t counts = {.size = sizeof counts};
        epx_handle_t *handle = NULL;
        d.topk = 2;
        d.experts = shape.experts;
        status = epx_dispatch_begin(buffer, &d, self->memory->stream(), &handle);
        status = status == EPX_OK ? epx_handle_counts(handle, &counts) : status;
        XT_CHECK(self, status == EPX_E_TIMEOUT && strstr(epx_error_detail(), "rank 1"), "%s: %s",
                 epx_status_name(status), epx_error_detail());
        uint64_t took = now_ms() - start;
        XT_CHECK(self, (double)took < DEADLINE_MS + DEADLINE_MS * slowness(), "%llu ms", (unsigned long long)took);
    } else { /* it hears of it, though it made no call */
        while (epx_buffer_status(buffer) == EPX_OK && now_ms() - start < 4 * DEADLINE_MS)
            usleep(1000); /* who is to tell may want the core */
        XT_CHECK(self, epx_buffer_status(buffer) == EPX_E_PEER && strstr(epx_error_detail(), "rank 0"), "%s",
                 epx_error_detail());
    }
    xt_mark(self, 0);
    xt_wait_mark(self, 0, self->ranks);
    epx_buffer_destroy(buffer);
}

/* ---- who is done first leaves, while others still wait for its last words ---- */

static void leaves(xt_rank_t *self)
{
    enum { ROUNDS = 40 };
    const context_t *x = self->context;
    epx_buffer_config_t config = config_of(self, x->world);
    self->delay_ns_max = 5000000;
    self->delay_one_in = 2;
    bool good = true;
    for (uint32_t i = 0; good && i < ROUNDS; i++) {
        epx_buffer_t *buffer = NULL;
        uint8_t works[XT_RANKS_MAX];
        good = XT_OK(self, epx_buffer_create(self->group, &config, &buffer));
        xt_delay(self);
        good = good && XT_OK(self, epx_buffer_check(buffer, works)) && XT_OK(self, epx_buffer_status(buffer));
        epx_buffer_destroy(buffer);
    }
}

/* ---- running ---- */

static void run(const char *spec, const world_t *w, uint32_t iterations, const char *part, void (*what)(xt_rank_t *))
{
    char name[64];
    context_t x = {.world = w, .iterations = iterations, .seed = 40 + (uint64_t)(w - worlds)};
    snprintf(name, sizeof name, "%s%d domains of %d ranks, rows of %u, %s",
             what == away     ? "away: "
             : what == leaves ? "leaves: "
                              : "",
             w->domains, w->per_domain, w->row_bytes, spec);
    xt_run_t r = {.name = name, .ranks = w->domains * w->per_domain, .seed = x.seed};
    if (!strstr(name, part) || (r.ranks > UNNAMED_RANKS_MAX && !part[0]))
        return;
    r.processes = strncmp(spec, "ofi", 3) == 0 && !getenv("EPX_TEST_THREADS");
    r.ranks_per_domain = w->per_domain;
    r.body = what;
    r.context = &x;
    r.limit_ms = 60000;
    xt_run(&r);
}

static void suite(const char *spec, uint32_t iterations, const char *part)
{
    setenv("EPX_NET", spec, 1);
    for (size_t i = 0; i < sizeof worlds / sizeof *worlds; i++)
        run(spec, &worlds[i], iterations, part, body);
    run(spec, &worlds[0], 1, part, away);
    run(spec, &worlds[6], 1, part, leaves);
}

int main(int argc, char **argv)
{
    const char *spec = argc > 1 ? argv[1] : "all", *part = argc > 3 ? argv[3] : "";
    uint32_t iterations = argc > 2 ? (uint32_t)atoi(argv[2]) : 12;
    if (strcmp(spec, "all")) {
        suite(spec, iterations, part);
        return xt_done();
    }
    suite("loop", iterations, part);
    suite("sim:1", iterations, part);
    suite("sim:2", iterations, part);
    if (test_net_here("ofi:tcp"))
        suite("ofi:tcp", iterations, part);
    return xt_done();
}
