/*
 * All inline PTX, each function named for what it does and what it orders. Scope "sys" is every GPU and the host, "gpu"
 * this GPU. A host compiler never sees this file: src/device/cpu has the twins by __atomic builtins.
 *
 * Two proxies touch memory: ordinary loads and stores (generic), and the bulk copy engine (async). Between what one
 * wrote and what the other reads stands fence_proxy_async. A bulk store is finished, and may be announced, after
 * bulk_wait_done + fence_proxy_async; a consumer fences once more between the announcement and its own bulk load.
 */
#ifndef EPX_DEVICE_PTX_CUH
#define EPX_DEVICE_PTX_CUH

#include <stdint.h>

#define EPX__DEVICE __device__ __forceinline__

/* The bulk copy engine is there from sm_90 on. Older code takes plain loads and stores. */
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define EPX__BULK 1
#else
#define EPX__BULK 0
#endif

/* ---- words that others write or read ---- */

EPX__DEVICE uint64_t ld_acquire_sys_u64(const uint64_t *p)
{
    uint64_t v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
EPX__DEVICE uint64_t ld_relaxed_sys_u64(const uint64_t *p)
{
    uint64_t v;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
EPX__DEVICE uint32_t ld_relaxed_sys_u32(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
EPX__DEVICE void st_release_sys_u64(uint64_t *p, uint64_t v)
{
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
EPX__DEVICE void st_relaxed_sys_u64(uint64_t *p, uint64_t v)
{
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
/* Words in shared memory, among warps of a block that do not meet at a barrier. */
EPX__DEVICE void st_release_cta_u32(uint32_t *p, uint32_t v)
{
    asm volatile("st.release.cta.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
EPX__DEVICE uint32_t ld_acquire_cta_u32(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.acquire.cta.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
/* A barrier of `threads` of the block, whole warps; 0 is that of __syncthreads. */
EPX__DEVICE void bar_sync(uint32_t barrier, uint32_t threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
EPX__DEVICE uint32_t ld_acquire_gpu_u32(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
/* Add and order both ways: what this thread saw before is seen by who reads the sum. */
EPX__DEVICE uint32_t add_acq_rel_gpu_u32(uint32_t *p, uint32_t v)
{
    uint32_t old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}
/* Add, and order nothing: fences stand around it. */
EPX__DEVICE uint32_t add_relaxed_gpu_u32(uint32_t *p, uint32_t v)
{
    uint32_t old;
    asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}
/* Two words that travel as one: who sees the first sees the second. 16-byte aligned. */
typedef struct epx__pair {
    uint64_t first, second;
} epx__pair_t;

EPX__DEVICE void st_relaxed_sys_pair(void *p, uint64_t first, uint64_t second)
{
    asm volatile("{ .reg .b128 v; mov.b128 v, {%1, %2}; st.relaxed.sys.global.b128 [%0], v; }" ::"l"(p), "l"(first),
                 "l"(second)
                 : "memory");
}
EPX__DEVICE epx__pair_t ld_relaxed_sys_pair(const void *p)
{
    epx__pair_t v;
    asm volatile("{ .reg .b128 v; ld.relaxed.sys.global.b128 v, [%2]; mov.b128 {%0, %1}, v; }"
                 : "=l"(v.first), "=l"(v.second)
                 : "l"(p)
                 : "memory");
    return v;
}
/* 16 bytes of payload that travel as one: who sees any of them sees all. */
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
    asm volatile("fence.acq_rel.sys;" ::: "memory");
}
EPX__DEVICE void fence_acq_rel_gpu(void)
{
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

/* A kernel that was launched while the one before it ended: all that one wrote is seen. sm_90; else nothing to wait
 * for. */
EPX__DEVICE void await_kernel_before(void)
{
#if EPX__BULK
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* ---- payload by ordinary accesses: past L1, which sees no writes of others ---- */

EPX__DEVICE uint4 ld_global_16(const void *p)
{
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
EPX__DEVICE void st_global_16(void *p, uint4 v)
{
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
EPX__DEVICE float ld_relaxed_sys_f32(const float *p)
{
    float v;
    asm volatile("ld.relaxed.sys.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}

/* ---- time ---- */

EPX__DEVICE uint64_t globaltimer_ns(void)
{
    uint64_t v;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(v)::"memory");
    return v;
}

/* ---- bulk copies between global memory (also a peer's) and this block's shared memory; 16-byte aligned ---- */

EPX__DEVICE uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}
EPX__DEVICE void fence_proxy_async(void)
{
#if EPX__BULK
    asm volatile("fence.proxy.async;" ::: "memory");
#endif
}
/* One arrival (expect_bytes) completes a phase together with that many bytes. */
EPX__DEVICE void mbarrier_init(uint64_t *bar)
{
#if EPX__BULK
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(bar)) : "memory");
#endif
}
EPX__DEVICE void mbarrier_fence_init(void)
{
#if EPX__BULK
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
EPX__DEVICE void mbarrier_expect_bytes(uint64_t *bar, uint32_t bytes)
{
#if EPX__BULK
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)), "r"(bytes)
                 : "memory");
#endif
}
/* The phase of that parity has ended: its bytes are visible to this thread. */
EPX__DEVICE bool mbarrier_try_wait(uint64_t *bar, uint32_t parity)
{
    uint32_t done = 1;
#if EPX__BULK
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(bar)), "r"(parity)
                 : "memory");
#endif
    return done != 0;
}
EPX__DEVICE void bulk_load(void *shared, const void *global, uint32_t bytes, uint64_t *bar)
{
#if EPX__BULK
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(bar))
                 : "memory");
#endif
}
EPX__DEVICE void bulk_store(void *global, const void *shared, uint32_t bytes)
{
#if EPX__BULK
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
#endif
}
/* Groups are this thread's own: close one; wait until shared memory was read; until all is written. */
EPX__DEVICE void bulk_commit(void)
{
#if EPX__BULK
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
EPX__DEVICE void bulk_wait_read_all(void)
{
#if EPX__BULK
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}
EPX__DEVICE void bulk_wait_read_but_1(void)
{
#if EPX__BULK
    asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
#endif
}
EPX__DEVICE void bulk_wait_done(void)
{
#if EPX__BULK
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}
EPX__DEVICE void bulk_wait_done_but_1(void)
{
#if EPX__BULK
    asm volatile("cp.async.bulk.wait_group 1;" ::: "memory");
#endif
}

/* ---- rounding to nearest even, two at a time; the lower half is `low` ---- */

EPX__DEVICE uint32_t bf16x2_of_f32(float low, float high)
{
    uint32_t v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
EPX__DEVICE uint32_t fp16x2_of_f32(float low, float high)
{
    uint32_t v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
EPX__DEVICE float f32_of_fp16_bits(uint32_t low16)
{
    float v;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(v) : "r"(low16));
    return v;
}

#endif
