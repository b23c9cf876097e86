/* Dispatch's kernel and its launchers. See emulate.h. */
#include "algo/ll/cuda/ll_inband_dispatch.cu"

template <bool fp8>
static void body(const void *p)
{
    ll_inband_dispatch<fp8>(*(const ll_dispatch_t *)p);
}

extern "C" int epx__ll_launch_inband_dispatch(const ll_dispatch_t *p, uint32_t blocks, uint32_t shared, void *)
{
    if (shared > (160 << 10))
        return 1;
    emu_run(p->fp8 ? body<true> : body<false>, p, blocks, LL_INBAND_THREADS);
    return 0;
}

extern "C" int epx__ll_load_inband_dispatch(void *)
{
    return 0;
}
