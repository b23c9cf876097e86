/* The emulation's twin of include/epx/device/order.h for kernels; host code has the real one. A turn of a wait is the
 * other fibers' turn: one that waited in its OS thread would keep them from what it waits for. */
#ifndef __cplusplus
#include_next <epx/device/order.h>
#elif !defined(EPX_DEVICE_ORDER_H)
#define EPX_DEVICE_ORDER_H

#include <epx/device/ptx.cuh>

#define EPX_DEVICE_FN static inline
#define EPX_API __attribute__((visibility("default"))) /* the same as in epx.h */

EPX_DEVICE_FN uint64_t epx_ld_acquire_sys_u64(const uint64_t *word)
{
    return ld_acquire_sys_u64(word);
}
EPX_DEVICE_FN uint64_t epx_ld_relaxed_sys_u64(const uint64_t *word)
{
    return ld_relaxed_sys_u64(word);
}
EPX_DEVICE_FN void epx_st_release_sys_u64(uint64_t *word, uint64_t value)
{
    st_release_sys_u64(word, value);
}
EPX_DEVICE_FN void epx_st_relaxed_sys_u64(uint64_t *word, uint64_t value)
{
    st_relaxed_sys_u64(word, value);
}
EPX_DEVICE_FN void epx_fence_sc_sys(void)
{
    emu_drain();
}
EPX_DEVICE_FN int epx_cas_u64(uint64_t *word, uint64_t expected, uint64_t desired)
{
    return atomicCAS(word, expected, desired) == expected;
}
EPX_DEVICE_FN void epx_sub_u64(uint64_t *word, uint64_t value)
{
    atomicAdd(word, 0 - value);
}
EPX_DEVICE_FN uint64_t epx_clock_ns(void)
{
    return globaltimer_ns();
}
EPX_DEVICE_FN void epx_wait_turn(uint32_t)
{
    emu_yield();
}

#endif
