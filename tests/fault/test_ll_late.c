/* Outputs that come late (gpu/ll_late.h), on the CPU. */
#include "gpu/ll_late.h"

int main(int argc, char **argv)
{
    return late_main(argc, argv);
}
