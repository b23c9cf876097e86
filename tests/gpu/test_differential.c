/* The differential suite of the high-throughput exchange on GPUs: the same cases, compared with the same reference. */
#include "gpu/memory_cuda.h"

#include "differential/test_ht.c"
