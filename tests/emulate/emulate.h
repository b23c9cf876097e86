/*
 * CUDA kernels on the CPU, for tests where there is no GPU: what a kernel sees. README.md says what it shows.
 *
 * Every CUDA thread is a fiber; all fibers of a grid run in the OS thread that launched it, in a random order, each
 * until it meets others (a warp's operation, a barrier) or looks at memory that others write. A launch returns when the
 * grid has ended. Lanes of a warp meet at each of its operations, threads of a block at each barrier; who does not
 * come, or comes to another one, ends the program with words.
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

#include "cuda_runtime_api.h"

#define __global__ static
#define __device__
#define __host__
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct emu_dim {
    uint32_t x, y, z;
};
struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
static inline uint2 make_uint2(uint32_t x, uint32_t y)
{
    return uint2{x, y};
}
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w)
{
    return uint4{x, y, z, w};
}

/* What a fiber knows of itself. */
struct emu_place {
    emu_dim thread, block, block_dim, grid_dim;
};
extern __thread const emu_place *emu_here;
#define threadIdx (emu_here->thread)
#define blockIdx (emu_here->block)
#define blockDim (emu_here->block_dim)
#define gridDim (emu_here->grid_dim)

/* ---- the emulator ---- */

enum emu_op {
    EMU_NONE,
    EMU_SHFL,
    EMU_BALLOT,
    EMU_MATCH,
    EMU_ADD,
    EMU_OR,
    EMU_SYNCWARP,
    EMU_BAR,  /* gives of how many threads `value` is not 0 */
    EMU_NAMED /* barrier number `lane`, of `value` threads */
};

[[noreturn]] void emu_die(const char *what);
/* This thread's part in an operation of its warp or block. `lane`: of a shuffle, the source. */
uint64_t emu_meet(emu_op op, uint64_t value, uint32_t lane, const char *file, int line);
void emu_yield(void);
void emu_look(void); /* yields now and then */

/* A relaxed store waits in a buffer of its block and comes out in a random order (at one address: in its own), until a
 * release or fence of the block, or the end of the grid: what leans on an order that nobody asked for, fails. */
void emu_store(void *to, const void *value, uint32_t bytes); /* 8 or 16 */
void emu_drain(void);                                        /* all of this block's */
void emu_settle(const void *p);                              /* those to the 16 bytes around p */

/* The bulk copy engine, as late as it may be: a load happens when its barrier is looked at, a store when its thread
 * waits. A barrier's word: parity of its phase, 2 when expect has come, bytes still to come << 32. */
void emu_expect(uint64_t *bar, uint32_t bytes);
bool emu_try_wait(uint64_t *bar, uint32_t parity);
void emu_bulk_load(void *shared, const void *global, uint32_t bytes, uint64_t *bar);
void emu_bulk_store(void *global, const void *shared, uint32_t bytes);
void emu_bulk_commit(void);
void emu_bulk_wait_read(size_t groups_left);
void emu_bulk_wait(size_t groups_left);

/* A variable in shared memory: each block's own, poisoned at first. One object for each declaration (kernels.sed). */
void *emu_shared_at(const void *variable, size_t bytes);
char *emu_dynamic(void);
template <typename T>
struct emu_shared {
    char unused; /* its address tells one variable from another */
    T &here()
    {
        return *(T *)emu_shared_at(this, sizeof(T));
    }
};

/* Now, or into the graph that this thread captures. */
void emu_start(uint32_t blocks, uint32_t threads, size_t shared, std::function<void()> run);

template <typename F>
void emu_launch(uint32_t blocks, uint32_t threads, size_t shared, void *, F f)
{
    emu_start(blocks, threads, shared, f);
}
template <typename P>
int emu_launch_as(const void *kernel, uint32_t blocks, uint32_t threads, void **arguments, size_t shared, void *stream)
{
    P p = *(P *)arguments[0];
    emu_launch(blocks, threads, shared, stream, [=] { ((void (*)(const P))kernel)(p); });
    return 0;
}
#define cudaLaunchKernel(...) emu_launch_as<ht_combine_t>(__VA_ARGS__) /* one kernel is launched so */
#define dim3(n) (n)
struct cudaLaunchAttribute {
    int id;
    struct {
        int programmaticStreamSerializationAllowed; /* kernels here run one after the other */
    } val;
};
enum { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchConfig_t {
    uint32_t blocks, threads;
    size_t shared;
    void *stream;
    cudaLaunchAttribute *attributes;
    unsigned count;
};
template <typename P>
int cudaLaunchKernelEx(const cudaLaunchConfig_t *c, void (*kernel)(const P), const P &p)
{
    emu_launch(c->blocks, c->threads, c->shared, c->stream, [=] { kernel(p); });
    return 0;
}

/* ---- barriers and warps ---- */

#define EMU_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncthreads(EMU_WHERE)
{
    emu_meet(EMU_BAR, 1, 0, file, line);
}
static inline int __syncthreads_count(bool is, EMU_WHERE)
{
    return (int)emu_meet(EMU_BAR, is, 0, file, line);
}
static inline int __syncthreads_or(bool is, EMU_WHERE)
{
    return emu_meet(EMU_BAR, is, 0, file, line) != 0;
}
static inline int __syncthreads_and(bool is, EMU_WHERE)
{
    return emu_meet(EMU_BAR, !is, 0, file, line) == 0;
}
static inline void __syncwarp(uint32_t = 0xffffffffu, EMU_WHERE)
{
    emu_meet(EMU_SYNCWARP, 0, 0, file, line);
}
static inline uint32_t __ballot_sync(uint32_t, bool is, EMU_WHERE)
{
    return (uint32_t)emu_meet(EMU_BALLOT, is, 0, file, line);
}
static inline int __any_sync(uint32_t, bool is, EMU_WHERE)
{
    return emu_meet(EMU_BALLOT, is, 0, file, line) != 0;
}
static inline int __all_sync(uint32_t, bool is, EMU_WHERE)
{
    return emu_meet(EMU_BALLOT, is, 0, file, line) == 0xffffffffu;
}
template <typename T>
static inline uint64_t emu_raw(T value)
{
    uint64_t raw = 0;
    memcpy(&raw, &value, sizeof value);
    return raw;
}
template <typename T>
static inline T emu_shuffle(T value, uint32_t lane, const char *file, int line)
{
    uint64_t raw = emu_meet(EMU_SHFL, emu_raw(value), lane % 32, file, line);
    memcpy(&value, &raw, sizeof value);
    return value;
}
template <typename T>
static inline T __shfl_sync(uint32_t, T value, int lane, EMU_WHERE)
{
    return emu_shuffle(value, (uint32_t)lane, file, line);
}
template <typename T>
static inline T __shfl_xor_sync(uint32_t, T value, int bits, EMU_WHERE)
{
    return emu_shuffle(value, threadIdx.x % 32 ^ (uint32_t)bits, file, line);
}
template <typename T>
static inline T __shfl_up_sync(uint32_t, T value, uint32_t by, EMU_WHERE)
{
    uint32_t lane = threadIdx.x % 32;
    return emu_shuffle(value, lane < by ? lane : lane - by, file, line);
}
template <typename T>
static inline T __shfl_down_sync(uint32_t, T value, uint32_t by, EMU_WHERE)
{
    uint32_t lane = threadIdx.x % 32;
    return emu_shuffle(value, lane + by > 31 ? lane : lane + by, file, line);
}
template <typename T>
static inline uint32_t __match_any_sync(uint32_t, T value, EMU_WHERE)
{
    return (uint32_t)emu_meet(EMU_MATCH, emu_raw(value), 0, file, line);
}
static inline uint32_t __reduce_add_sync(uint32_t, uint32_t value, EMU_WHERE)
{
    return (uint32_t)emu_meet(EMU_ADD, value, 0, file, line);
}
static inline uint32_t __reduce_or_sync(uint32_t, uint32_t value, EMU_WHERE)
{
    return (uint32_t)emu_meet(EMU_OR, value, 0, file, line);
}
#define __nanosleep(n) emu_yield()
#define __threadfence_block() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define __threadfence_system() emu_drain()

/* ---- numbers, memory ---- */

#define __popc(v) __builtin_popcount(v)
#define __popcll(v) __builtin_popcountll(v)
#define __ffs(v) __builtin_ffs(v)
#define __fadd_rn(a, b) ((a) + (b))
#define __fmul_rn(a, b) ((a) * (b))
#define __ldg(p) (*(p))
#define __ldcg(p) (*(const volatile std::remove_cv_t<std::remove_pointer_t<decltype(p)>> *)(p))

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

/* ---- atomics ---- */

template <typename T, typename U>
static inline T atomicAdd(T *p, U v)
{
    emu_settle(p);
    return __atomic_fetch_add(p, (T)v, __ATOMIC_RELAXED);
}
template <typename T, typename U>
static inline T atomicOr(T *p, U v)
{
    emu_look();
    emu_settle(p);
    return __atomic_fetch_or(p, (T)v, __ATOMIC_RELAXED);
}
template <typename T, typename U>
static inline T atomicExch(T *p, U v)
{
    emu_settle(p);
    return __atomic_exchange_n(p, (T)v, __ATOMIC_RELAXED);
}
template <typename T, typename U>
static inline T atomicCAS(T *p, U expected, U desired)
{
    T was = expected;
    emu_settle(p);
    __atomic_compare_exchange_n(p, &was, (T)desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return was;
}

#endif
