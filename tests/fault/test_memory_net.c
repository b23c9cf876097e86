/*
 * Memory cannot be had while ranks of different domains make a group, a buffer with its rails, and channels: all ranks
 * fail, in words, or none does; nothing is left over. Ranks are threads of one process, so that the network can be the
 * one inside a process; the failing allocation is the n-th of them all.
 */
#include "common/world.h"

#include <epx/channel.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/alloc.h"

enum { RANKS = 2, POINTS_MOST = 1500 };

typedef struct plan {
    uint64_t at, before;
    atomic_int status[3][RANKS]; /* of each step */
} plan_t;

static const char *const step_name[] = {"group", "buffer", "channels"};

/* Everybody comes to the same step, or nobody. */
static bool all_or_none(xt_rank_t *self, plan_t *plan, int step, epx_status_t status)
{
    int failed = 0;
    XT_CHECK(self, status == EPX_OK || epx_error_detail()[0], "%s without words", epx_status_name(status));
    atomic_store(&plan->status[step][self->rank], (int)status);
    xt_mark(self, step);
    xt_wait_mark(self, step, RANKS);
    for (int r = 0; r < RANKS; r++)
        failed += atomic_load(&plan->status[step][r]) != EPX_OK;
    XT_CHECK(self, failed == 0 || failed == RANKS, "allocation %lu: %d of %d ranks failed to make the %s: %s",
             (unsigned long)plan->at, failed, RANKS, step_name[step], epx_error_detail());
    return failed == 0;
}

static void body(xt_rank_t *self)
{
    plan_t *plan = self->context;
    epx_group_t *group = NULL;
    epx_buffer_t *buffer = NULL;
    epx_channels_t *channels = NULL;
    epx_group_config_t g = {.timeout_ms = 10000, .threads = 1, .ranks_per_domain = 1, .net = "loop"};
    epx_buffer_config_t b = {.size = sizeof b, .lease_bytes = 8192, .reserve_bytes = 8192, .tokens_max = 4};
    epx_channel_memory_t memory = {.bytes = 4096};
    epx_channels_config_t c = {.size = sizeof c, .memories = &memory, .memory_count = 1, .channels = 1};
    b.handles_max = 1;
    b.experts_max = 4;
    b.leases_max = 2;
    if (self->rank == 0) { /* an id is made before a group is, and fails on its own */
        epx__alloc_fail_at(0, 0);
        int made = epx_unique_id_create(NULL, &self->world->id[0]) == EPX_OK ? 1 : -1;
        plan->before = epx__alloc_count();
        epx__alloc_fail_at(plan->at, 0);
        atomic_store(&self->world->id_ready[0], made);
    }
    if (all_or_none(self, plan, 0, xt_group(self, 0, &g, &group)) &&
        all_or_none(self, plan, 1, epx_buffer_create(group, &b, &buffer)))
        all_or_none(self, plan, 2, epx_channels_create(group, &c, &channels));
    epx_channels_destroy(channels);
    epx_buffer_destroy(buffer);
    epx_group_destroy(group);
}

int main(void)
{
    setenv("EPX_LOG", "0", 0);
    long wrong = 0;
    uint64_t n = 1;
    bool reached = true;
    for (; reached && wrong < 5 && n < POINTS_MOST; n++) {
        char name[64];
        plan_t plan = {.at = n};
        int64_t live = epx__alloc_live();
        snprintf(name, sizeof name, "allocation %lu", (unsigned long)n);
        xt_run_t r = {.name = name, .ranks = RANKS, .no_group = true, .quiet = true, .body = body, .context = &plan};
        r.limit_ms = 20000;
        wrong += xt_run(&r);
        epx__alloc_fail_at(0, 0);
        reached = epx__alloc_count() - plan.before >= n;
        if (epx__alloc_live() != live) {
            printf("allocation %lu: %ld blocks left\n", (unsigned long)n, (long)(epx__alloc_live() - live));
            wrong++;
        }
    }
    printf("%lu allocations failed, one by one\n", (unsigned long)n - 2);
    return wrong ? 1 : xt_done();
}
