/* tests/gpu/ll_slots.h with in-band arrival, its kernels on the CPU (emulate.h). */
#include "emulate_ll/world.h"

#define xl_open open_emulated
#include "gpu/ll_slots.h"
