/* A rank that never comes (ll_deadline.h), on GPUs. */
#include "gpu/memory_cuda.h"

#include "gpu/ll_deadline.h"
