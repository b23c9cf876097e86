/* Combine's kernel and its launchers. See emulate.h. */
#include "algo/ll/cuda/ll_inband_combine.cu"

template <bool by_rank>
static void body(const void *p)
{
    ll_inband_combine<by_rank>(*(const ll_combine_t *)p);
}

extern "C" int epx__ll_launch_inband_combine(const ll_combine_t *p, uint32_t blocks, void *)
{
    emu_run(p->by_rank ? body<true> : body<false>, p, blocks, WARPS(p->by_rank) * 32);
    return 0;
}

extern "C" int epx__ll_load_inband_combine(void *)
{
    return 0;
}
