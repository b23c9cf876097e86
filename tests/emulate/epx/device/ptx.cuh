/* The emulation's twin of include/epx/device/ptx.cuh: the same names by __atomic builtins, without the bulk copy
 * engine. A look at a word that others write is also where a fiber lets the others run. */
#ifndef EPX_DEVICE_PTX_CUH
#define EPX_DEVICE_PTX_CUH

#include <stdint.h>
#include <time.h>

#include "emulate.h"
#include "plan/format.h"

#define EPX__DEVICE static inline
#define EPX__BULK EMU_BULK /* 1: as sm_90, 0: as sm_80 */

EPX__DEVICE uint64_t ld_acquire_sys_u64(const uint64_t *p)
{
    emu_look();
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
EPX__DEVICE uint64_t ld_relaxed_sys_u64(const uint64_t *p)
{
    emu_look();
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
EPX__DEVICE uint32_t ld_relaxed_sys_u32(const uint32_t *p)
{
    if ((uintptr_t)p % 4)
        emu_die("a load of a word that is not aligned", __FILE__, __LINE__);
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
EPX__DEVICE void st_release_sys_u64(uint64_t *p, uint64_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
EPX__DEVICE void st_relaxed_sys_u64(uint64_t *p, uint64_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELAXED);
}
EPX__DEVICE uint32_t ld_acquire_gpu_u32(const uint32_t *p)
{
    emu_look();
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
EPX__DEVICE uint32_t add_acq_rel_gpu_u32(uint32_t *p, uint32_t v)
{
    return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
EPX__DEVICE uint32_t add_relaxed_gpu_u32(uint32_t *p, uint32_t v)
{
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
typedef struct epx__pair {
    uint64_t first, second;
} epx__pair_t;
/* The second word first: who sees the first sees it. */
EPX__DEVICE void st_relaxed_sys_pair(void *p, uint64_t first, uint64_t second)
{
    __atomic_store_n((uint64_t *)p + 1, second, __ATOMIC_RELAXED);
    __atomic_store_n((uint64_t *)p, first, __ATOMIC_RELEASE);
}
EPX__DEVICE epx__pair_t ld_relaxed_sys_pair(const void *p)
{
    emu_look();
    epx__pair_t v;
    v.first = __atomic_load_n((const uint64_t *)p, __ATOMIC_ACQUIRE);
    v.second = __atomic_load_n((const uint64_t *)p + 1, __ATOMIC_RELAXED);
    return v;
}
EPX__DEVICE void fence_acq_rel_sys(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
EPX__DEVICE void fence_acq_rel_gpu(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
EPX__DEVICE uint4 ld_global_16(const void *p)
{
    if ((uintptr_t)p % 16)
        emu_die("a load of 16 bytes that is not aligned", __FILE__, __LINE__);
    uint4 v;
    memcpy(&v, p, sizeof v);
    return v;
}
EPX__DEVICE void st_global_16(void *p, uint4 v)
{
    if ((uintptr_t)p % 16)
        emu_die("a store of 16 bytes that is not aligned", __FILE__, __LINE__);
    memcpy(p, &v, sizeof v);
}
EPX__DEVICE float ld_relaxed_sys_f32(const float *p)
{
    if ((uintptr_t)p % 4)
        emu_die("a load of a float that is not aligned", __FILE__, __LINE__);
    return *(const volatile float *)p;
}
EPX__DEVICE uint64_t globaltimer_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
EPX__DEVICE void fence_proxy_async(void)
{
}
/* The engine is as late as it may be: a load happens when its barrier is looked at, a store when its thread waits. */
EPX__DEVICE void mbarrier_init(uint64_t *bar)
{
    *bar = 0;
}
EPX__DEVICE void mbarrier_fence_init(void)
{
}
EPX__DEVICE void mbarrier_expect_bytes(uint64_t *bar, uint32_t bytes)
{
    emu_expect(bar, bytes);
}
EPX__DEVICE bool mbarrier_try_wait(uint64_t *bar, uint32_t parity)
{
    return emu_try_wait(bar, parity);
}
EPX__DEVICE void bulk_load(void *shared, const void *global, uint32_t bytes, uint64_t *bar)
{
    emu_bulk_load(shared, global, bytes, bar);
}
EPX__DEVICE void bulk_store(void *global, const void *shared, uint32_t bytes)
{
    emu_bulk_store(global, shared, bytes);
}
EPX__DEVICE void bulk_commit(void)
{
    emu_bulk_commit();
}
EPX__DEVICE void bulk_wait_read_all(void)
{
    emu_bulk_wait(0);
}
EPX__DEVICE void bulk_wait_read_but_1(void)
{
    emu_bulk_wait(1);
}
EPX__DEVICE void bulk_wait_done(void)
{
    emu_bulk_wait(0);
}
EPX__DEVICE void bulk_wait_done_but_1(void)
{
    emu_bulk_wait(1);
}
EPX__DEVICE uint32_t bf16x2_of_f32(float low, float high)
{
    return (uint32_t)epx__bf16_of_f32(low) | (uint32_t)epx__bf16_of_f32(high) << 16;
}
EPX__DEVICE uint32_t fp16x2_of_f32(float low, float high)
{
    return (uint32_t)epx__fp16_of_f32(low) | (uint32_t)epx__fp16_of_f32(high) << 16;
}
EPX__DEVICE float f32_of_fp16_bits(uint32_t low16)
{
    return epx__f32_of_fp16((uint16_t)low16);
}

#endif
