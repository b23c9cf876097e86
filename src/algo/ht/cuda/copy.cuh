/*
 * Rows between pinned host memory and the GPU's own, copied by a warp with ordinary loads and stores. A load from the
 * host is a trip over PCIe, so four pieces of a lane, 2 KiB of a warp, are under way at a time.
 */
#ifndef EPX_ALGO_HT_CUDA_COPY_CUH
#define EPX_ALGO_HT_CUDA_COPY_CUH

#include <epx/device/ptx.cuh>

/* Warp: a row of whole 16-byte pieces. Reads past L1. */
EPX__DEVICE void copy_16(char *to, const char *from, uint64_t bytes)
{
    uint64_t at = threadIdx.x % 32 * 16;
    for (; at + 3 * 512 < bytes; at += 4 * 512) {
        uint4 v[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            v[i] = ld_global_16(from + at + i * 512);
#pragma unroll
        for (int i = 0; i < 4; i++)
            st_global_16(to + at + i * 512, v[i]);
    }
    for (; at < bytes; at += 512)
        st_global_16(to + at, ld_global_16(from + at));
}

#endif
