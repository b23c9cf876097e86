/*
 * Loads and stores of words that another processor reads or writes, named for what they order. One set of names for
 * gcc (__atomic builtins) and for nvcc (PTX on the device side). "sys": visible to all GPUs and CPUs of the machine.
 */
#ifndef EPX_DEVICE_ORDER_H
#define EPX_DEVICE_ORDER_H

#include <stdint.h>

#if defined(__CUDACC__)
#define EPX_DEVICE_FN __host__ __device__ static inline
#else
#define EPX_DEVICE_FN static inline __attribute__((unused))
#endif

#if defined(__GNUC__) /* the same as in epx.h */
#define EPX_API __attribute__((visibility("default")))
#else
#define EPX_API
#endif

#ifdef __cplusplus
extern "C" {
#endif
/* In libepx.so: monotonic time, and one turn of a wait (spins, then yields, then sleeps a little). */
EPX_API uint64_t epx_host_clock_ns(void);
EPX_API void epx_host_wait_turn(uint32_t turn);
#ifdef __cplusplus
}
#endif

EPX_DEVICE_FN uint64_t epx_ld_acquire_sys_u64(const uint64_t *word)
{
#if defined(__CUDA_ARCH__)
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
#else
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
#endif
}

EPX_DEVICE_FN uint64_t epx_ld_relaxed_sys_u64(const uint64_t *word)
{
#if defined(__CUDA_ARCH__)
    uint64_t value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
#else
    return __atomic_load_n(word, __ATOMIC_RELAXED);
#endif
}

EPX_DEVICE_FN void epx_st_release_sys_u64(uint64_t *word, uint64_t value)
{
#if defined(__CUDA_ARCH__)
    asm volatile("st.release.sys.global.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
#else
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
#endif
}

EPX_DEVICE_FN void epx_st_relaxed_sys_u64(uint64_t *word, uint64_t value)
{
#if defined(__CUDA_ARCH__)
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
#else
    __atomic_store_n(word, value, __ATOMIC_RELAXED);
#endif
}

/* Orders this thread's earlier stores before its later loads, and the other way round. */
EPX_DEVICE_FN void epx_fence_sc_sys(void)
{
#if defined(__CUDA_ARCH__)
    __threadfence_system();
#elif defined(__SANITIZE_THREAD__)
    static uint64_t word;
    __atomic_fetch_add(&word, 0, __ATOMIC_SEQ_CST);
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

/* One more producer takes a number: *word from `expected` to `desired`. Among threads of one processor (all CPU
 * threads, or all threads of one GPU). 1 on success. */
EPX_DEVICE_FN int epx_cas_u64(uint64_t *word, uint64_t expected, uint64_t desired)
{
#if defined(__CUDA_ARCH__)
    return atomicCAS((unsigned long long *)word, (unsigned long long)expected, (unsigned long long)desired) == expected;
#else
    return __atomic_compare_exchange_n(word, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
#endif
}

EPX_DEVICE_FN void epx_sub_u64(uint64_t *word, uint64_t value)
{
#if defined(__CUDA_ARCH__)
    atomicAdd((unsigned long long *)word, (unsigned long long)(0 - value));
#else
    __atomic_fetch_sub(word, value, __ATOMIC_ACQ_REL);
#endif
}

EPX_DEVICE_FN uint64_t epx_clock_ns(void)
{
#if defined(__CUDA_ARCH__)
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
#else
    return epx_host_clock_ns();
#endif
}

/* One turn of a wait: `turn` counts them. */
EPX_DEVICE_FN void epx_wait_turn(uint32_t turn)
{
#if defined(__CUDA_ARCH__)
    if (turn > 16)
        __nanosleep(100);
#else
    epx_host_wait_turn(turn);
#endif
}

#endif
