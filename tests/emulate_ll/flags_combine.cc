/* Combine's kernel with flags, and its launchers. See emulate.h. */
#include "algo/ll/cuda/ll_combine.cu"

static void body(const void *p)
{
    ll_combine_kernel(*(const ll_combine_t *)p);
}

extern "C" int epx__ll_launch_combine(const ll_combine_t *p, uint32_t blocks, void *)
{
    emu_run(body, p, blocks, LL_THREADS);
    return 0;
}

extern "C" int epx__ll_load_combine(void *)
{
    return 0;
}
