/* What is not emulated: low latency. */
#include "algo/ll/ll.h"

const epx__ll_ops_t epx__ll_cuda = {.create = 0};
