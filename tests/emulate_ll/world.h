/* Include it before a test: its low latency is the GPU's with in-band arrival, emulated. Ranks have different numbers
 * of blocks, so that every way of dealing out roles occurs. */
#include <stdlib.h>

#include "common/ll_case.h"
#include "emulate_ll/host.h"

static bool open_emulated(xl_world_t *w, xt_rank_t *self, const epx_buffer_config_t *config)
{
    static const int blocks[] = {9, 1, 12, 5, 8, 3, 10, 2};
    emu_use(self->group, blocks[(self->rank + self->ranks) % 8]);
    return xl_open(w, self, config);
}

__attribute__((constructor)) static void choose(void)
{
    setenv("EPX_LL_INBAND", "1", 0); /* 0: with flags, 1024 threads a block, much slower */
    setenv("EPX_TEST_THREADS", "1", 1);
}
