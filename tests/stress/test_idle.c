/*
 * Waiting must not burn the machine: a group whose ranks have nothing to do, or all wait for one that stays away, takes
 * under 2 % of a core, under 4 with several domains, whose proxies look at the network now and then (all ranks
 * together, threads of this process; the second half of each time is measured, when the waits have settled).
 */
#include "common/slowness.h"
#include "common/world.h"

#include "base/clock.h"

#include <epx/ll.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

enum { TOKENS = 4, HIDDEN = 64, SETTLE_MS = 300, WATCH_MS = 1000 };

static double cpu_seconds(void)
{
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
           (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
}

/* The share of a core that this process takes for a while. */
static double share_now(void)
{
    epx__sleep_ns(SETTLE_MS * 1000000ull);
    double start = cpu_seconds();
    uint64_t start_ns = epx__now_ns();
    epx__sleep_ns(WATCH_MS * 1000000ull);
    return (cpu_seconds() - start) / ((double)(epx__now_ns() - start_ns) * 1e-9);
}

static int domains_of(xt_rank_t *self)
{
    epx_group_info_t info = {.size = sizeof info};
    return XT_OK(self, epx_group_get_info(self->group, &info)) ? info.domains : 1;
}

static void watch(xt_rank_t *self, const char *what)
{
    /* A sanitizer makes every look dearer, and so does a machine with other things in its caches, for a while: the
     * least of three. A thread that spins shows as 100 %, always. */
    double most = (getenv("EPX_TEST_SANITIZER") ? 0.1 : domains_of(self) > 1 ? 0.04 : 0.02) * slowness(), share = 1.0;
    most = most < 0.3 ? most : 0.3;
    for (int tries = 0; tries < 3 && share >= most; tries++) {
        double now = share_now();
        share = now < share ? now : share;
        printf("%d ranks, %s: %.2f %% of a core\n", self->ranks, what, 100 * now);
    }
    XT_CHECK(self, share < most, "%s: %.2f %% of a core", what, 100 * share);
}

static void body(xt_rank_t *self)
{
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 1u << 20, .reserve_bytes = 1u << 20};
    c.tokens_max = TOKENS;
    c.topk_max = 2;
    c.experts_max = 64;
    c.handles_max = 1;
    c.ll_tokens_max = TOKENS;
    c.ll_hidden_max = HIDDEN;
    epx_buffer_t *buffer;
    if (!XT_OK(self, epx_buffer_create(self->group, &c, &buffer)))
        return;
    if (self->rank == 0)
        watch(self, "nobody in a call");
    else
        epx__sleep_ns((SETTLE_MS + WATCH_MS + 200) * 1000000ull);
    XT_OK(self, epx_buffer_barrier(buffer, NULL));
    if (self->rank == 0)
        watch(self, "all but one in a barrier");
    XT_OK(self, epx_buffer_barrier(buffer, NULL));
    if (c.ll_tokens_max) {
        static _Alignas(16) uint16_t x[TOKENS][HIDDEN];
        static _Alignas(16) uint16_t recv[XT_RANKS_MAX][64 * TOKENS][HIDDEN];
        int64_t ids[TOKENS] = {0, 1, -1, 0};
        int32_t count[64], source[64 * TOKENS];
        epx_ll_dispatch_t d = {.size = sizeof d, .x = x, .tokens = TOKENS, .hidden = HIDDEN, .topk_idx = ids};
        d.topk = 1;
        d.experts = (uint32_t)self->ranks;
        d.recv_x = recv[self->rank];
        d.recv_count = count;
        d.src_info = source;
        epx_ll_handle_t *handle = NULL;
        if (self->rank == 0)
            watch(self, "all but one in a low-latency dispatch");
        XT_OK(self, epx_ll_dispatch(buffer, &d, NULL, &handle));
        epx_ll_handle_release(handle, NULL);
    }
    epx_buffer_barrier(buffer, NULL);
    epx_buffer_destroy(buffer);
}

int main(void)
{
    xt_run_t runs[] = {{.name = "idle pair", .ranks = 2},
                       {.name = "idle sixteen", .ranks = 16},
                       {.name = "idle domains", .ranks = 4, .ranks_per_domain = 2}};
    if (xt_memory()->backend != EPX_BACKEND_CPU) {
        printf("skipped: about waiting on the CPU\n");
        return 77;
    }
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        runs[i].threads = 1;
        runs[i].body = body;
        runs[i].limit_ms = 60000;
        xt_run(&runs[i]);
    }
    return xt_done();
}
