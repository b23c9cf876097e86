/* Dispatch's kernel with flags, and its launchers. See emulate.h. */
#include "algo/ll/cuda/ll_dispatch.cu"

template <bool fp8, bool large>
static void body(const void *p)
{
    ll_dispatch_kernel<fp8, large>(*(const ll_dispatch_t *)p);
}

extern "C" int epx__ll_launch_dispatch(const ll_dispatch_t *p, uint32_t blocks, uint32_t shared, void *)
{
    if (shared > (160 << 10))
        return 1;
    if (p->fp8)
        emu_run(p->index ? body<true, true> : body<true, false>, p, blocks, LL_THREADS);
    else
        emu_run(p->index ? body<false, true> : body<false, false>, p, blocks, LL_THREADS);
    return 0;
}

extern "C" int epx__ll_load_dispatch(void *)
{
    return 0;
}
