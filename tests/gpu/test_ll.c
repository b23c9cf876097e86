/* The low-latency differential suite on GPUs: the same calls, compared with the same reference, so CPU and GPU agree;
 * both ways that rows arrive. */
#include "gpu/memory_cuda.h"

#include "gpu/ll_both.h"

#define main one_way
#include "differential/test_ll.c"
#undef main

int main(int argc, char **argv)
{
    return ll_both(argc, argv);
}
