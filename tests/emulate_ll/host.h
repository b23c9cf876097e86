/* Low latency of the CUDA plug-in on CPU memory, its kernels emulated, in place of the CPU's own. */
#ifndef EPX_EMULATE_HOST_H
#define EPX_EMULATE_HOST_H

#include "api/objects.h"

/* The group's buffers made from now on use it. `sms`: blocks that a kernel has. */
void emu_use(epx_group_t *group, int sms);

#endif
