/* Outputs that come late (ll_late.h), on GPUs. */
#include "gpu/memory_cuda.h"

#include "gpu/ll_late.h"

int main(int argc, char **argv)
{
    return late_main(argc, argv);
}
