/*
 * Low latency with in-band arrival, its kernels on the CPU (emulate.h), against the reference: the differential suite
 * of tests/differential/test_ll.c as it is.
 */
#include "emulate_ll/world.h"

#define xl_open open_emulated
#include "differential/test_ll.c"
