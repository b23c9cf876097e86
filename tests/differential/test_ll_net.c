/*
 * Low latency between domains against the reference, byte for byte, over every network of the build: every format and
 * order, whole calls and halves, two calls in flight, maps, masks; and the bytes on the wire against the formula of
 * docs/PROTOCOL-LL.md, after every call.
 *
 *     differential_test_ll_net [network] [iterations] [part of a world's name]
 */
#include "common/ll_case.h"
#include "common/nets.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct world {
    const char *name;
    int domains, per_domain;
    uint32_t tokens_max, hidden_max, topk_max, experts, slots;
    bool map, zero_copy, pairs;
    int masked; /* a rank that the others mask, -1 none */
} world_t;

static const world_t worlds[] = {
    {"two", 2, 1, 9, 1024, 8, 16, 2, false, true, true, -1},
    {"one slot", 2, 1, 300, 128, 4, 8, 1, false, false, false, -1},
    {"two of two", 2, 2, 7, 512, 6, 12, 2, true, false, true, -1},
    {"four", 4, 1, 6, 256, 32, 32, 3, false, false, true, -1}, /* more choices than tokens */
    {"three of two", 3, 2, 5, 640, 8, 24, 2, false, false, true, -1},
    {"two of four", 2, 4, 5, 512, 8, 24, 2, true, true, true, -1},
    {"three of three", 3, 3, 4, 256, 4, 18, 2, false, false, true, -1},
    {"large", 2, 1, 128, 7168, 8, 4, 2, false, false, true, -1},
    {"masked", 2, 2, 6, 256, 4, 8, 2, false, false, true, 2},
    {"one domain", 1, 4, 6, 256, 4, 8, 2, false, false, true, -1},
};

typedef struct context {
    const world_t *world;
    uint32_t iterations;
    uint64_t seed;
} context_t;

/* An endpoint of shm that stays open (src/net/ofi) leaves its file, of 16 MB, for ever: take this process' away. */
static void forget_shm(void)
{
    char mine[16];
    DIR *dir = opendir("/dev/shm");
    snprintf(mine, sizeof mine, "%d:", (int)getpid());
    for (const struct dirent *entry; dir && (entry = readdir(dir)) != NULL;)
        if (strncmp(entry->d_name, mine, strlen(mine)) == 0)
            unlinkat(dirfd(dir), entry->d_name, 0);
    if (dir)
        closedir(dir);
}

static void body(xt_rank_t *self)
{
    const context_t *x = self->context;
    const world_t *p = x->world;
    static __thread xl_world_t w;
    int32_t map[512];
    epx_buffer_config_t config = {.ll_slots = p->slots};
    memset(&w, 0, sizeof w);
    for (uint32_t e = 0; e < p->experts; e++)
        map[e] = (int32_t)(xt_mix(x->seed, e, 5, 5) % (uint64_t)self->ranks);
    w.seed = x->seed;
    w.tokens_max = p->tokens_max;
    w.hidden_max = p->hidden_max;
    w.topk_max = p->topk_max;
    w.experts = p->experts;
    w.expert_rank = p->map ? map : NULL;
    w.zero_copy = p->zero_copy;
    self->delay_ns_max = 200000;
    self->delay_one_in = 20;
    XT_CHECK(self, self->topology.domains == p->domains, "%d domains", self->topology.domains);
    bool good = xl_open(&w, self, &config), there = self->rank != p->masked;
    if (good && p->masked >= 0 && there) {
        w.masked[p->masked] = 1;
        good = XT_OK(self, epx_ll_mask_set(w.buffer, p->masked, 1, self->memory->stream()));
    }
    for (uint32_t op = 0; good && there && op < x->iterations; op += 2) {
        good = p->pairs && xt_mix(x->seed, op, 12, 1) % 3 ? xl_run_pair(&w, op) : xl_run(&w, op) && xl_run(&w, op + 1);
        if (good && p->masked < 0 && op % 12 == 4) { /* high throughput in between, on channels of its own */
            uint8_t works[XT_RANKS_MAX];
            good = XT_OK(self, epx_buffer_check(w.buffer, works));
            epx_traffic_t traffic = {.size = sizeof traffic};
            XT_OK(self, epx_buffer_get_traffic(w.buffer, &traffic));
            w.wire = traffic.net_bytes;
        }
        XT_CHECK(self, good, "call %u", op);
        if (!good)
            xl_say_channels(&w);
    }
    if (good)
        XT_OK(self, epx_buffer_status(w.buffer));
    xt_mark(self, 0);
    xt_wait_mark(self, 0, self->ranks); /* the masked rank stays until the others are done */
    xl_close(&w);
    xt_mark(self, 1);
    xt_wait_mark(self, 1, self->ranks);
    if (strcmp(getenv("EPX_NET"), "ofi:shm") == 0)
        forget_shm();
}

static void suite(const char *spec, uint32_t iterations, bool processes, const char *part)
{
    const char *most = getenv("EPX_TEST_RANKS_MAX"); /* processes */
    setenv("EPX_NET", spec, 1);
    for (size_t i = 0; i < sizeof worlds / sizeof *worlds; i++) {
        const world_t *w = &worlds[i];
        char name[64];
        bool large = w->tokens_max * w->hidden_max > 500000;
        context_t x = {.world = w, .iterations = large ? iterations / 6 : iterations, .seed = 70 + i};
        if (!strstr(w->name, part))
            continue;
        snprintf(name, sizeof name, "%s: %d domains of %d, %s", w->name, w->domains, w->per_domain, spec);
        if (processes && most && w->domains * w->per_domain > atoi(most)) {
            printf("%s: left out: more than EPX_TEST_RANKS_MAX %s processes\n", name, most);
            continue;
        }
        xt_run_t run = {.name = name,
                        .ranks = w->domains * w->per_domain,
                        .processes = processes && !getenv("EPX_TEST_THREADS"),
                        .threads = 1,
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
    uint32_t iterations = argc > 2 ? (uint32_t)atoi(argv[2]) : slow ? 6 : 24;
    const char *part = argc > 3 ? argv[3] : "";
    if (argc > 1 && argv[1][0]) {
        suite(argv[1], iterations, strncmp(argv[1], "ofi", 3) == 0, part);
        return xt_done();
    }
    suite("loop", iterations * 2, false, part);
    for (int seed = 1; seed <= (slow ? 1 : 4); seed++) {
        char spec[32];
        snprintf(spec, sizeof spec, "sim:%d", seed);
        suite(spec, iterations, false, part);
    }
    /* Under TSan not: libfabric is not instrumented, and nine of its ranks on two cores outlast any deadline. */
    if (!getenv("EPX_TEST_THREADS") && test_net_here("ofi:tcp")) {
        suite("ofi:tcp", iterations, true, part);
        suite("ofi:tcp", iterations, false, "two");
    }
    if (!getenv("EPX_TEST_THREADS") && test_net_here("ofi:shm"))
        suite("ofi:shm", iterations, true, part[0] ? part : "two"); /* the larger worlds on request: memory */
    return xt_done();
}
