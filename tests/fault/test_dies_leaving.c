/*
 * A rank dies, and the others leave before anybody has heard of it, or while they leave: it is not waited for longer
 * than the news takes.
 */
#include "common/slowness.h"
#include "common/stopped.h"
#include "common/world.h"

#include <epx/channel.h>

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/clock.h"

enum { RANKS = 3, DYING = 2, AT_ONCE_MS = 500, LEAVING_MS = 2000, STOPPED_MS = 50 };

static void *kill_soon(void *pid)
{
    epx__sleep_ns(STOPPED_MS * 1000000ull); /* the others are leaving */
    kill(*(pid_t *)pid, SIGKILL);
    return NULL;
}

static double leave(xt_rank_t *self, bool buffers)
{
    epx_buffer_t *buffer = NULL;
    epx_channels_t *channels = NULL;
    epx_channel_memory_t memory = {calloc(1, 64), 64, 0};
    epx_channels_config_t of_channels = {.size = sizeof of_channels, .memories = &memory, .memory_count = 1};
    epx_buffer_config_t of_buffer = {.size = sizeof of_buffer, .lease_bytes = 1 << 20, .reserve_bytes = 1 << 22};
    of_buffer.ll_tokens_max = 8;
    of_buffer.ll_hidden_max = 64;
    of_buffer.tokens_max = 64;
    if (buffers)
        XT_OK(self, epx_buffer_create(self->group, &of_buffer, &buffer));
    else if (XT_OK(self, epx_channels_create(self->group, &of_channels, &channels)))
        XT_OK(self, epx_channels_barrier(channels));
    xt_mark(self, 0);
    xt_wait_mark(self, 0, self->ranks);
    if (self->rank == DYING) {
        atomic_store(&self->world->note[DYING], getpid());
        xt_mark(self, 1);
        raise(SIGSTOP); /* its sockets live on until it is killed */
    }
    XT_CHECK(self, xt_wait_mark(self, 1, 1), "no mark");
    pid_t dying = (pid_t)atomic_load(&self->world->note[DYING]);
    XT_CHECK(self, wait_stopped(dying), "rank %d has not stopped", DYING);
    xt_mark(self, 2);
    XT_CHECK(self, xt_wait_mark(self, 2, RANKS - 1), "no mark"); /* it stands still for all */
    pthread_t killer;
    bool kills = self->rank == 0 && pthread_create(&killer, NULL, kill_soon, &dying) == 0;
    uint64_t start = epx__now_ns();
    epx_channels_destroy(channels);
    epx_buffer_destroy(buffer);
    double ms = (double)(epx__now_ns() - start) / 1e6;
    if (kills)
        pthread_join(killer, NULL);
    free(memory.base);
    return ms;
}

static void body(xt_rank_t *self)
{
    double ms = leave(self, *(const bool *)self->context);
    XT_CHECK(self, ms < well_before(LEAVING_MS, AT_ONCE_MS), "left after %.0f ms", ms);
}

int main(void)
{
    static bool buffers[] = {false, true};
    for (int i = 0; i < 2; i++) {
        xt_run_t run = {.name = buffers[i] ? "dies, buffers" : "dies, channels", .ranks = RANKS, .processes = true};
        run.ranks_per_domain = 1;
        run.may_die = 1u << DYING;
        run.limit_ms = 60000;
        run.body = body;
        run.context = &buffers[i];
        xt_run(&run);
    }
    return xt_done();
}
