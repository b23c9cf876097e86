/* A rank lets go of its channels while another is putting to it: the other is told, and nobody crashes. */
#include "common/check.h"
#include "common/nets.h"
#include "common/world.h"

#include <epx/channel.h>

#include <stdlib.h>
#include <unistd.h>

enum { RANKS = 2, DEADLINE_MS = 6000, CHANNELS = 4 };

static void body(xt_rank_t *self)
{
    epx_channels_t *channels;
    size_t piece = *(const size_t *)self->context;
    epx_channel_memory_t memory = {calloc(1, piece), piece, 0};
    epx_channels_config_t config = {.size = sizeof config, .memories = &memory, .memory_count = 1};
    config.channels = CHANNELS;
    config.timeout_ms = DEADLINE_MS;
    if (!XT_OK(self, epx_channels_create(self->group, &config, &channels)))
        return;
    XT_OK(self, epx_channels_barrier(channels));
    const epx_port_channel_t *port = epx_channels_port_table(channels) + (1 - self->rank) * CHANNELS;
    epx_status_t status = EPX_OK;
    if (self->rank == 0) {
        for (int i = 0; status == EPX_OK && i < 100000; i++)
            status = epx_port_put_signal(&port[i % CHANNELS], 0, 0, 0, piece);
        XT_CHECK(self, status == EPX_E_PEER, "%s", epx_status_name(status));
    } else
        XT_OK(self, epx_port_wait(&port[1], 20));
    epx_channels_destroy(channels);
    free(memory.base);
}

int main(void)
{
    if (!test_net_here("ofi"))
        SKIP("no libfabric in this build");
    static size_t pieces[] = {4096, 1 << 20, 8 << 20}; /* of the last, more is under way than two seconds can bring */
    for (size_t i = 0; i < sizeof pieces / sizeof pieces[0]; i++) {
        xt_run_t run = {.name = "leaves early", .ranks = RANKS, .processes = true, .limit_ms = 60000, .body = body};
        run.context = &pieces[i];
        xt_run(&run);
    }
    return xt_done();
}
