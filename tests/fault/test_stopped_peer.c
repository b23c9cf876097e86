/*
 * Channels to a rank that stands still (SIGSTOP): puts to the others go on, whether the network had a connection to it
 * before or not, and however much has been pushed to it.
 */
#include "common/check.h"
#include "common/nets.h"
#include "common/slowness.h"
#include "common/stopped.h"
#include "common/world.h"

#include <epx/channel.h>

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/clock.h"

enum { RANKS = 4, STOPPED = 2, DEADLINE_MS = 6000, AT_ONCE_MS = 1500, PIECE = 65536, CHANNELS = 4, WINDOW = 128 };
/* The barrier's signals may hold some of the window: who stopped need not have told credit. */
enum { MANY = WINDOW - 8 };

typedef struct plan {
    bool connected;  /* before it stops */
    uint32_t pushed; /* puts to those that have stopped, on each channel */
    bool leaves;     /* rank 0 goes while they stand still, and rank 1 is told */
} plan_t;

/* Once all are out of the barrier: who has come out has heard the others, but they need not have heard it. What its
 * proxy has not sent yet, for want of a connection say, stops with it. */
static void stand_still(xt_rank_t *self)
{
    XT_CHECK(self, xt_wait_mark(self, 2, self->ranks), "ranks do not come so far");
    atomic_store(&self->world->note[self->rank], getpid());
    xt_mark(self, 0);
    raise(SIGSTOP);
}

static void go_on_without(xt_rank_t *self, const plan_t *plan, epx_channels_t *channels)
{
    const epx_port_channel_t *port = epx_channels_port_table(channels);
    for (uint32_t c = STOPPED * CHANNELS; c < RANKS * CHANNELS && self->rank == 0; c++)
        for (uint32_t i = 0; i < plan->pushed; i++)
            XT_OK(self, epx_port_put(&port[c], 0, 0, 0, PIECE));
    uint64_t start = epx__now_ns();
    const epx_port_channel_t *other = &port[(1 - self->rank) * CHANNELS];
    XT_OK(self, epx_port_put_signal(other, 0, 0, 0, 64));
    XT_OK(self, epx_port_flush(other));
    XT_OK(self, epx_port_wait(other, 1));
    double ms = (double)(epx__now_ns() - start) / 1e6;
    XT_CHECK(self, ms < well_before(DEADLINE_MS, AT_ONCE_MS), "%.0f ms", ms);
}

/* To those that stand still much was pushed, and they take nothing: to the other it is said that we leave. */
static void leave(xt_rank_t *self, epx_channels_t **channels)
{
    if (self->rank == 0) {
        epx_channels_destroy(*channels);
        *channels = NULL;
        return;
    }
    const epx_port_channel_t *other = epx_channels_port_table(*channels);
    XT_CHECK(self, epx_port_wait(other, 2) == EPX_E_PEER, "rank 0 has left, but nothing says so");
    XT_OK(self, epx_channels_status(*channels)); /* in order */
}

static void body(xt_rank_t *self)
{
    const plan_t *plan = self->context;
    epx_channels_t *channels;
    epx_channel_memory_t memory = {calloc(1, PIECE), PIECE, 0};
    epx_channels_config_t config = {.size = sizeof config, .memories = &memory, .memory_count = 1};
    config.channels = CHANNELS;
    config.window = WINDOW;
    config.proxies = 1;
    config.timeout_ms = DEADLINE_MS;
    if (!XT_OK(self, epx_channels_create(self->group, &config, &channels)))
        return;
    if (plan->connected)
        XT_OK(self, epx_channels_barrier(channels));
    xt_mark(self, 2);
    if (self->rank >= STOPPED) {
        stand_still(self);
    } else {
        bool stopped = xt_wait_mark(self, 0, RANKS - STOPPED);
        for (int r = STOPPED; r < RANKS; r++)
            stopped = stopped && wait_stopped((pid_t)atomic_load(&self->world->note[r]));
        XT_CHECK(self, stopped, "ranks have not stopped");
        go_on_without(self, plan, channels);
        if (plan->leaves)
            leave(self, &channels);
        xt_mark(self, 1);
        XT_CHECK(self, xt_wait_mark(self, 1, STOPPED), "the other has not done");
        for (int r = STOPPED; r < RANKS && self->rank == 0; r++)
            kill((pid_t)atomic_load(&self->world->note[r]), SIGCONT);
    }
    epx_channels_destroy(channels);
    free(memory.base);
}

static void run(const char *name, plan_t plan)
{
    xt_run_t run = {.name = name, .ranks = RANKS, .processes = true, .limit_ms = 60000, .seed = 1, .body = body};
    run.context = &plan;
    xt_run(&run);
}

int main(void)
{
    if (!test_net_here("ofi"))
        SKIP("no libfabric in this build");
    run("few, connected", (plan_t){true, 1, false});
    run("few, not connected", (plan_t){false, 1, false});
    run("many, connected", (plan_t){true, MANY, false});
    run("many, and one leaves", (plan_t){true, MANY, true});
    return xt_done();
}
