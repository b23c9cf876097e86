/* A forked child that destroys what is its parent's (as an exit handler may) does not touch its parent's exchange. */
#include "common/check.h"
#include "common/nets.h"
#include "common/world.h"

#include <epx/channel.h>

#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void child(xt_rank_t *self, epx_buffer_t *buffer, epx_channels_t *channels)
{
    int ended = -1;
    pid_t pid = fork();
    if (pid == 0) {
        alarm(10);
        epx_channels_destroy(channels);
        epx_buffer_destroy(buffer);
        epx_group_destroy(self->group);
        _exit(0);
    }
    XT_CHECK(self, pid > 0 && waitpid(pid, &ended, 0) == pid && ended == 0, "the child ended with %d", ended);
}

static void body(xt_rank_t *self)
{
    epx_buffer_t *buffer;
    epx_channels_t *channels;
    epx_channel_memory_t memory = {calloc(1, 4096), 4096, 0};
    epx_channels_config_t config = {.size = sizeof config, .memories = &memory, .memory_count = 1, .timeout_ms = 8000};
    epx_buffer_config_t b = {.size = sizeof b, .lease_bytes = 65536, .reserve_bytes = 65536, .tokens_max = 16};
    b.timeout_ms = 8000;
    if (!XT_OK(self, epx_buffer_create(self->group, &b, &buffer)) ||
        !XT_OK(self, epx_channels_create(self->group, &config, &channels)))
        return;
    XT_OK(self, epx_channels_barrier(channels));
    child(self, buffer, channels);
    XT_OK(self, epx_channels_barrier(channels));
    XT_OK(self, epx_buffer_barrier(buffer, NULL));
    XT_OK(self, epx_group_barrier(self->group, 0));
    epx_channels_destroy(channels);
    epx_buffer_destroy(buffer);
    free(memory.base);
}

int main(void)
{
    if (!test_net_here("ofi"))
        SKIP("no libfabric in this build");
    for (int per_domain = 1; per_domain <= 2; per_domain++) {
        xt_run_t run = {.name = "forked", .ranks = 2, .processes = true, .threads = 2, .limit_ms = 60000, .body = body};
        run.ranks_per_domain = per_domain;
        xt_run(&run);
    }
    return xt_done();
}
