/* What a slot goes through (ll_slots.h) on GPUs, both ways that rows arrive. */
#include "gpu/memory_cuda.h"

#include "gpu/ll_both.h"

#define main one_way
#include "gpu/ll_slots.h"
#undef main

int main(int argc, char **argv)
{
    return ll_both(argc, argv);
}
