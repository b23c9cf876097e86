/* In place of include/epx/device/ptx.cuh, what low latency uses of it. See emulate.h. */
#ifndef EPX_EMULATE_PTX_CUH
#define EPX_EMULATE_PTX_CUH

#include <emmintrin.h>
#include <time.h>

#include "emulate.h"

#define EPX__DEVICE static inline

typedef struct epx__pair {
    uint64_t first, second;
} epx__pair_t;

EPX__DEVICE uint64_t ld_acquire_sys_u64(const uint64_t *p)
{
    emu_give_way();
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
EPX__DEVICE uint64_t ld_relaxed_sys_u64(const uint64_t *p)
{
    emu_give_way();
    return __atomic_load_n(p, __ATOMIC_RELAXED);
}
EPX__DEVICE uint32_t ld_relaxed_sys_u32(const uint32_t *p)
{
    return __atomic_load_n(p, __ATOMIC_RELAXED);
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
EPX__DEVICE epx__pair_t ld_relaxed_sys_pair(const void *p)
{
    epx__pair_t v;
    emu_give_way();
    __m128i word =
        _mm_load_si128((const __m128i *)p); /* whole, on every x86-64 with AVX; faults if it is not aligned */
    __asm__ volatile("" : "+x"(word) : : "memory");
    memcpy(&v, &word, sizeof v);
    return v;
}
EPX__DEVICE void st_relaxed_sys_pair(void *p, uint64_t first, uint64_t second)
{
    uint64_t v[2] = {first, second};
    emu_store(p, v, sizeof v);
}
EPX__DEVICE uint4 ld_relaxed_sys_16(const void *p)
{
    epx__pair_t v = ld_relaxed_sys_pair(p);
    return make_uint4((uint32_t)v.first, (uint32_t)(v.first >> 32), (uint32_t)v.second, (uint32_t)(v.second >> 32));
}
EPX__DEVICE void st_relaxed_sys_16(void *p, uint4 v)
{
    st_relaxed_sys_pair(p, (uint64_t)v.y << 32 | v.x, (uint64_t)v.w << 32 | v.z);
}
EPX__DEVICE void fence_acq_rel_sys(void)
{
    emu_drain();
    __atomic_thread_fence(__ATOMIC_ACQ_REL);
}
EPX__DEVICE uint4 ld_global_16(const void *p)
{
    return ld_relaxed_sys_16(p);
}
EPX__DEVICE void st_global_16(void *p, uint4 v)
{
    _mm_store_si128((__m128i *)p, _mm_set_epi32((int)v.w, (int)v.z, (int)v.y, (int)v.x));
}
EPX__DEVICE void st_release_cta_u32(uint32_t *p, uint32_t v)
{
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
EPX__DEVICE uint32_t ld_acquire_cta_u32(const uint32_t *p)
{
    emu_give_way();
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
EPX__DEVICE void bar_sync(uint32_t barrier, uint32_t threads)
{
    emu_meet(EMU_BAR_NAMED, threads, barrier);
}
EPX__DEVICE uint64_t globaltimer_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Of algo/ht/cuda/wait.cuh, and not used here. */
EPX__DEVICE uint32_t add_relaxed_gpu_u32(uint32_t *p, uint32_t v)
{
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
EPX__DEVICE void fence_acq_rel_gpu(void)
{
    fence_acq_rel_sys();
}

#endif
