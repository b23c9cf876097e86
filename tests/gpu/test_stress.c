/* The stress suite on GPUs. */
#include "gpu/memory_cuda.h"

#include "stress/test_ht_stress.c"
