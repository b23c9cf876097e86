/*
 * CUDA kernels on the CPU, for tests where there is no GPU: the same source, compiled by g++.
 *
 * A block is an OS thread, its threads are fibers in it, and a kernel is over when its launch returns. Lanes of a warp
 * meet at each warp operation, threads of a block at each barrier; who does not come, or comes to another one, ends the
 * program with words. Fibers run in a random order and give way at each look at memory that others write. Relaxed
 * stores of system scope wait in a buffer of the block and come out in a random order (of one address: in its own),
 * until a release, a fence or the end of the kernel: what leans on an order that nobody asked for, fails.
 *
 * Not here: the weakness of plain loads and stores, time as it is on a GPU, numbers of registers. x86-64 only.
 */
#ifndef EPX_EMULATE_H
#define EPX_EMULATE_H

#include <stdint.h>
#include <string.h>

#include "cuda_runtime_api.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local

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

struct emu_index {
    uint32_t x;
};
extern thread_local emu_index threadIdx, blockIdx, gridDim, blockDim;
extern thread_local char memory[]; /* dynamic shared memory */

/* ---- the emulator ---- */

enum emu_op {
    EMU_NONE,
    EMU_SHFL,
    EMU_BALLOT,
    EMU_MATCH,
    EMU_ADD,
    EMU_OR,
    EMU_SYNCWARP,
    EMU_BAR,
    EMU_BAR_OR,
    EMU_BAR_AND,
    EMU_BAR_NAMED
};

/* This thread's part in an operation of its warp or block. `lane`: of shfl, the source; of a
 * barrier with a name, which (and `value`, of how many threads). */
uint64_t emu_meet(emu_op op, uint64_t value, uint32_t lane);
/* Somebody else's turn. */
void emu_give_way(void);
/* A store that may take its time; all of this block's are done. */
void emu_store(void *to, const void *value, uint32_t bytes);
void emu_drain(void);
void emu_run(void (*body)(const void *p), const void *p, uint32_t blocks, uint32_t threads);

/* ---- warps ---- */

template <typename T>
static inline T __shfl_sync(uint32_t, T value, int lane)
{
    uint64_t in = 0, out;
    memcpy(&in, &value, sizeof value);
    out = emu_meet(EMU_SHFL, in, (uint32_t)lane % 32);
    memcpy(&value, &out, sizeof value);
    return value;
}
template <typename T>
static inline T __shfl_xor_sync(uint32_t mask, T value, int bits)
{
    return __shfl_sync(mask, value, (int)(threadIdx.x % 32) ^ bits);
}
template <typename T>
static inline T __shfl_up_sync(uint32_t mask, T value, int by)
{
    int lane = (int)(threadIdx.x % 32);
    return __shfl_sync(mask, value, lane < by ? lane : lane - by);
}
template <typename T>
static inline T __shfl_down_sync(uint32_t mask, T value, int by)
{
    int lane = (int)(threadIdx.x % 32);
    return __shfl_sync(mask, value, lane + by > 31 ? lane : lane + by);
}
static inline uint32_t __ballot_sync(uint32_t, bool is)
{
    return (uint32_t)emu_meet(EMU_BALLOT, is, 0);
}
static inline int __any_sync(uint32_t mask, bool is)
{
    return __ballot_sync(mask, is) != 0;
}
static inline int __all_sync(uint32_t mask, bool is)
{
    return __ballot_sync(mask, is) == 0xffffffffu;
}
template <typename T>
static inline uint32_t __match_any_sync(uint32_t, T value)
{
    uint64_t in = 0;
    memcpy(&in, &value, sizeof value);
    return (uint32_t)emu_meet(EMU_MATCH, in, 0);
}
static inline uint32_t __reduce_add_sync(uint32_t, uint32_t value)
{
    return (uint32_t)emu_meet(EMU_ADD, value, 0);
}
static inline uint32_t __reduce_or_sync(uint32_t, uint32_t value)
{
    return (uint32_t)emu_meet(EMU_OR, value, 0);
}
static inline void __syncwarp(void)
{
    emu_meet(EMU_SYNCWARP, 0, 0);
}
static inline void __syncthreads(void)
{
    emu_meet(EMU_BAR, 0, 0);
}
static inline int __syncthreads_or(int is)
{
    return (int)emu_meet(EMU_BAR_OR, is != 0, 0);
}
static inline int __syncthreads_and(int is)
{
    return (int)emu_meet(EMU_BAR_AND, is != 0, 0);
}

/* ---- numbers ---- */

static inline float __uint_as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline uint32_t __float_as_uint(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline float __fadd_rn(float a, float b)
{
    return a + b;
}
static inline float __fmul_rn(float a, float b)
{
    return a * b;
}
static inline float fmaxf(float a, float b)
{
    return __builtin_fmaxf(a, b);
}
static inline int __popc(uint32_t v)
{
    return __builtin_popcount(v);
}
static inline int __popcll(uint64_t v)
{
    return __builtin_popcountll(v);
}
static inline int __ffs(int v)
{
    return __builtin_ffs(v);
}

/* ---- atomics ---- */

template <typename T>
static inline T atomicAdd(T *p, int v)
{
    return __atomic_fetch_add(p, (T)v, __ATOMIC_RELAXED);
}
static inline uint32_t atomicAdd(uint32_t *p, uint32_t v)
{
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
static inline uint32_t atomicOr(uint32_t *p, uint32_t v)
{
    return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}
static inline uint32_t atomicCAS(uint32_t *p, uint32_t expected, uint32_t desired)
{
    __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

#endif
