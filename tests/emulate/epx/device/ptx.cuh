/* The emulation's twin of include/epx/device/ptx.cuh: the same names. A look at a word that others write is also where
 * a fiber lets the others run. */
#ifndef EPX_DEVICE_PTX_CUH
#define EPX_DEVICE_PTX_CUH

#include <emmintrin.h>
#include <stdint.h>
#include <time.h>

#include "emulate.h"
#include "plan/format.h"

#define EPX__DEVICE static inline
#define EPX__BULK EMU_BULK /* 1: as sm_90, 0: as sm_80 */

EPX__DEVICE void emu_aligned(const void *p, size_t bytes)
{
    if ((uintptr_t)p % bytes)
        emu_die("a load or store that is not aligned");
}
EPX__DEVICE uint64_t ld_acquire_sys_u64(const uint64_t *p)
{
    emu_look();
    emu_settle(p);
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
EPX__DEVICE uint64_t ld_relaxed_sys_u64(const uint64_t *p)
{
    emu_look();
    emu_settle(p);
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
EPX__DEVICE uint32_t ld_relaxed_sys_u32(const uint32_t *p)
{
    emu_aligned(p, 4);
    emu_settle(p);
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
EPX__DEVICE float ld_relaxed_sys_f32(const float *p)
{
    return __uint_as_float(ld_relaxed_sys_u32((const uint32_t *)p));
}
EPX__DEVICE void st_release_sys_u64(uint64_t *p, uint64_t v)
{
    emu_drain();
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
EPX__DEVICE void st_relaxed_sys_u64(uint64_t *p, uint64_t v)
{
    emu_store(p, &v, sizeof v);
}
EPX__DEVICE void st_release_cta_u32(uint32_t *p, uint32_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
EPX__DEVICE uint32_t ld_acquire_cta_u32(const uint32_t *p)
{
    emu_look();
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
EPX__DEVICE void bar_sync(uint32_t barrier, uint32_t threads, EMU_WHERE)
{
    emu_meet(EMU_NAMED, threads, barrier, file, line);
}
EPX__DEVICE uint32_t ld_acquire_gpu_u32(const uint32_t *p)
{
    emu_look();
    emu_settle(p);
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
EPX__DEVICE uint32_t add_acq_rel_gpu_u32(uint32_t *p, uint32_t v)
{
    emu_drain();
    return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
EPX__DEVICE uint32_t add_relaxed_gpu_u32(uint32_t *p, uint32_t v)
{
    emu_settle(p);
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
EPX__DEVICE void fence_acq_rel_sys(void)
{
    emu_drain();
}
EPX__DEVICE void fence_acq_rel_gpu(void)
{
    emu_drain();
}
EPX__DEVICE uint4 ld_global_16(const void *p)
{
    uint4 v;
    emu_aligned(p, 16);
    emu_settle(p);
    __m128i word = _mm_load_si128((const __m128i *)p); /* whole, on every x86-64 with AVX */
    __asm__ volatile("" : "+x"(word) : : "memory");
    memcpy(&v, &word, sizeof v);
    return v;
}
EPX__DEVICE void st_global_16(void *p, uint4 v)
{
    emu_aligned(p, 16);
    emu_settle(p);
    _mm_store_si128((__m128i *)p, _mm_set_epi32((int)v.w, (int)v.z, (int)v.y, (int)v.x));
}
EPX__DEVICE uint4 ld_relaxed_sys_16(const void *p)
{
    emu_look();
    return ld_global_16(p);
}
EPX__DEVICE void st_relaxed_sys_16(void *p, uint4 v)
{
    emu_store(p, &v, sizeof v);
}
typedef struct epx__pair {
    uint64_t first, second;
} epx__pair_t;
EPX__DEVICE void st_relaxed_sys_pair(void *p, uint64_t first, uint64_t second)
{
    epx__pair_t v = {first, second};
    emu_store(p, &v, sizeof v);
}
EPX__DEVICE epx__pair_t ld_relaxed_sys_pair(const void *p)
{
    uint4 v = ld_relaxed_sys_16(p);
    return epx__pair_t{(uint64_t)v.y << 32 | v.x, (uint64_t)v.w << 32 | v.z};
}
EPX__DEVICE uint64_t globaltimer_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
EPX__DEVICE void await_kernel_before(void)
{
}
EPX__DEVICE void fence_proxy_async(void)
{
}
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
    emu_bulk_wait_read(0);
}
EPX__DEVICE void bulk_wait_read_but_1(void)
{
    emu_bulk_wait_read(1);
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
