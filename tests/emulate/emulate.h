/*
 * Kernels on a CPU, to test their logic where there is no GPU: every CUDA thread is a fiber; all fibers of a grid run
 * in the thread that launched it, turn by turn, each until it waits (a barrier, a warp's collective, a look at a word
 * that others write). A launch returns when the grid has ended. Ranks are threads, proxies are what they always are.
 *
 * What it shows: who waits for whom, indices, barriers that not all threads reach, alignment. What it does not: the
 * memory model, speed. The bulk copy engine is here as late as it may be, which shows waits that are missing.
 */
#ifndef EPX_TEST_EMULATE_H
#define EPX_TEST_EMULATE_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <type_traits>

struct emu_dim {
    uint32_t x, y, z;
};
struct uint4 {
    uint32_t x, y, z, w;
};
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    uint4 v = {x, y, z, w};
    return v;
}

/* What a fiber knows of itself. */
struct emu_place {
    emu_dim thread, block, block_dim, grid_dim;
};
extern thread_local const emu_place *emu_here;
#define threadIdx (emu_here->thread)
#define blockIdx (emu_here->block)
#define blockDim (emu_here->block_dim)
#define gridDim (emu_here->grid_dim)

[[noreturn]] void emu_die(const char *what, const char *file, int line);
void emu_yield(void);
void emu_look(void); /* yields now and then */
void emu_grid(uint32_t blocks, uint32_t threads, size_t shared_bytes, void (*run)(void *), void *context);
void *emu_shared(const char *file, int line, size_t bytes); /* this block's variable of that place; zeroed */
char *emu_dynamic(void);

/* The bulk copy engine. A barrier's word: parity of its phase, 2 when expect has come, bytes still to come << 32. */
void emu_expect(uint64_t *bar, uint32_t bytes);
bool emu_try_wait(uint64_t *bar, uint32_t parity);
void emu_bulk_load(void *shared, const void *global, uint32_t bytes, uint64_t *bar);
void emu_bulk_store(void *global, const void *shared, uint32_t bytes);
void emu_bulk_commit(void);
void emu_bulk_wait(size_t groups_left);

/* Collectives: all living threads of the block (warp) come to the same place. Returns how many hold `value`. */
uint32_t emu_block(uint32_t value, const char *file, int line);
typedef struct emu_warp_view {
    uint32_t live;
    uint64_t value[32];
} emu_warp_view;
const emu_warp_view *emu_warp(uint64_t value, const char *file, int line);
uint32_t emu_ballot(bool value, const char *file, int line);

/* Now, or into the graph that this thread captures. */
void emu_start(uint32_t blocks, uint32_t threads, size_t shared, std::function<void()> run);

template <typename F>
void emu_launch(uint32_t blocks, uint32_t threads, size_t shared, void *stream, F f)
{
    (void)stream;
    emu_start(blocks, threads, shared, f);
}
template <typename P>
int emu_launch_as(const void *kernel, uint32_t blocks, uint32_t threads, void **arguments, size_t shared, void *stream)
{
    P p = *(P *)arguments[0];
    emu_launch(blocks, threads, shared, stream, [=] { ((void (*)(const P))kernel)(p); });
    return 0;
}
#define dim3(n) (n)

#define __global__ static
#define __device__
#define __host__
#define __noinline__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n)

#define __syncthreads() ((void)emu_block(1, __FILE__, __LINE__))
#define __syncthreads_and(v) (emu_block(!(v), __FILE__, __LINE__) == 0)
#define __syncthreads_count(v) emu_block((v) ? 1 : 0, __FILE__, __LINE__)
#define __syncwarp(...) ((void)emu_warp(0, __FILE__, __LINE__))
#define __ballot_sync(m, v) emu_ballot(v, __FILE__, __LINE__)
#define __any_sync(m, v) (emu_ballot(v, __FILE__, __LINE__) != 0)
#define __all_sync(m, v) (emu_ballot(!(v), __FILE__, __LINE__) == 0)
template <typename T>
T emu_shfl(T value, uint32_t lane, const char *file, int line)
{
    uint64_t raw = 0;
    memcpy(&raw, &value, sizeof value);
    raw = emu_warp(raw, file, line)->value[lane % 32];
    memcpy(&value, &raw, sizeof value);
    return value;
}
#define __shfl_sync(m, v, lane) emu_shfl(v, (uint32_t)(lane), __FILE__, __LINE__)
#define __shfl_up_sync(m, v, d)                                                                                        \
    emu_shfl(v, threadIdx.x % 32 >= (d) ? threadIdx.x % 32 - (d) : threadIdx.x % 32, __FILE__, __LINE__)
#define __popc(v) __builtin_popcount(v)
#define __ffs(v) __builtin_ffs(v)
#define __ldg(p) (*(p))
#define __ldcg(p) (*(const volatile std::remove_cv_t<std::remove_pointer_t<decltype(p)>> *)(p))
#define __nanosleep(n) emu_yield()
#define __threadfence_block() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define __threadfence_system() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define __fadd_rn(a, b) ((a) + (b))

static inline float __uint_as_float(uint32_t v)
{
    float f;
    memcpy(&f, &v, sizeof f);
    return f;
}
static inline uint32_t __float_as_uint(float f)
{
    uint32_t v;
    memcpy(&v, &f, sizeof v);
    return v;
}
template <typename T, typename U>
T atomicAdd(T *p, U v)
{
    return __atomic_fetch_add(p, (T)v, __ATOMIC_RELAXED);
}
template <typename T, typename U>
T atomicOr(T *p, U v)
{
    emu_look();
    return __atomic_fetch_or(p, (T)v, __ATOMIC_RELAXED);
}
template <typename T, typename U>
T atomicExch(T *p, U v)
{
    return __atomic_exchange_n(p, (T)v, __ATOMIC_RELAXED);
}
template <typename T, typename U>
T atomicCAS(T *p, U expected, U desired)
{
    T was = expected;
    __atomic_compare_exchange_n(p, &was, (T)desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return was;
}

#endif
