/* The low-latency differential suite on GPUs: the same calls, compared with the same reference, so CPU and GPU agree.
 */
#include "gpu/memory_cuda.h"

#include "differential/test_ll.c"
