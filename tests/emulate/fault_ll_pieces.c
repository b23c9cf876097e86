/* fault/test_ll_pieces.c on kernels: its memory is the host's, so it is not for a GPU. */
#include "gpu/memory_cuda.h"

#include "fault/test_ll_pieces.c"
