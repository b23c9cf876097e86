/*
 * A rank is killed while groups and buffers are made and destroyed, at many moments: the others get an error that names
 * it within a second of its death, and can make a new group among themselves.
 */
#include "common/slowness.h"
#include "common/world.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"

enum { RANKS = 4, ROUNDS = 24, DEADLINE_MS = 6000 };
#ifdef __SANITIZE_THREAD__
enum { LIMIT_MS = 3000 };
#else
enum { LIMIT_MS = 1000 };
#endif

typedef struct plan {
    int victim;
    uint64_t after_us; /* of the start of its work */
} plan_t;

static xt_rank_t *victim_rank;

static void *shoot(void *context)
{
    const plan_t *plan = context;
    epx__sleep_ns(plan->after_us * 1000u);
    atomic_store(&victim_rank->world->note[0], (long)epx__now_ns()); /* one clock for all processes of a host */
    raise(SIGKILL);
    return NULL;
}

static bool names(const char *words, int rank)
{
    char name[16];
    snprintf(name, sizeof name, "rank %d", rank);
    return strstr(words, name) != NULL;
}

static epx_status_t make_and_drop(xt_rank_t *self, epx_group_t *group)
{
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 1u << 20, .reserve_bytes = 1u << 16, .tokens_max = 64};
    epx_buffer_t *buffer = NULL;
    c.handles_max = 2;
    c.ll_tokens_max = 4;
    c.ll_hidden_max = 64;
    epx_status_t status = epx_buffer_create(group, &c, &buffer);
    XT_CHECK(self, status == EPX_OK || !buffer, "an output was written");
    if (status == EPX_OK)
        status = epx_buffer_barrier(buffer, NULL);
    epx_buffer_destroy(buffer);
    return status;
}

/* Ranks without the victim, numbered anew. */
static void start_anew(xt_rank_t *self, const plan_t *plan)
{
    xt_rank_t other = *self;
    epx_group_t *group = NULL;
    other.rank = self->rank - (self->rank > plan->victim);
    other.ranks = self->ranks - 1;
    if (XT_OK(self, xt_group(&other, 1, NULL, &group)))
        XT_OK(self, make_and_drop(self, group));
    epx_group_destroy(group);
}

static void body(xt_rank_t *self)
{
    plan_t *plan = self->context;
    epx_group_t *group = NULL;
    epx_group_config_t g = {.timeout_ms = DEADLINE_MS, .threads = 1};
    pthread_t thread;
    if (self->rank == 0) {
        int made = epx_unique_id_create(NULL, &self->world->id[0]) == EPX_OK ? 1 : -1;
        atomic_store(&self->world->id_ready[0], made);
    }
    xt_mark(self, 0);
    xt_wait_mark(self, 0, self->ranks);
    victim_rank = self;
    if (self->rank == plan->victim && pthread_create(&thread, NULL, shoot, plan))
        exit(3);
    epx_status_t status = xt_group(self, 0, &g, &group);
    while (status == EPX_OK)
        status = make_and_drop(self, group);
    char words[512];
    snprintf(words, sizeof words, "%s", epx_error_detail());
    if (self->rank == plan->victim)
        pause();
    double ms = (double)((long)epx__now_ns() - atomic_load(&self->world->note[0])) / 1e6;
    bool never_came = strstr(words, "missing after") != NULL; /* then only the deadline can tell */
    XT_CHECK(self, ms < well_before(DEADLINE_MS, LIMIT_MS) || never_came,
             "rank %d, killed after %lu us: %.0f ms, %s: %s", plan->victim, (unsigned long)plan->after_us, ms,
             epx_status_name(status), words);
    XT_CHECK(self, names(words, plan->victim), "rank %d, killed after %lu us: %s: %s", plan->victim,
             (unsigned long)plan->after_us, epx_status_name(status), words);
    epx_group_destroy(group);
    start_anew(self, plan);
}

int main(void)
{
    setenv("EPX_LOG", "0", 0);
    for (int i = 0; i < ROUNDS; i++) {
        plan_t plan = {.victim = i % RANKS, .after_us = (uint64_t)i * i * 60};
        char name[64];
        snprintf(name, sizeof name, "rank %d is killed after %lu us", plan.victim, (unsigned long)plan.after_us);
        xt_run_t r = {.name = name, .ranks = RANKS, .processes = true, .no_group = true, .threads = 1, .body = body};
        r.context = &plan;
        r.may_die = 1ull << plan.victim;
        r.limit_ms = 30000;
        xt_run(&r);
    }
    return xt_done();
}
