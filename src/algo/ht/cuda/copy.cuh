/*
 * Rows copied by a warp with ordinary loads and stores. What is read may be a trip over PCIe away, or lie in memory
 * rather than in a cache, so several pieces of a lane are under way at a time.
 */
#ifndef EPX_ALGO_HT_CUDA_COPY_CUH
#define EPX_ALGO_HT_CUDA_COPY_CUH

#include <epx/device/ptx.cuh>

/* Warp: a row of whole 16-byte pieces, so many of a lane's together, 512 bytes apart. Reads past L1. */
template <int pieces = 4>
EPX__DEVICE void copy_16(char *to, const char *from, uint64_t bytes)
{
    for (uint64_t at = threadIdx.x % 32 * 16; at < bytes; at += pieces * 512) {
        uint4 v[pieces];
#pragma unroll
        for (int i = 0; i < pieces; i++)
            v[i] = at + i * 512 < bytes ? ld_global_16(from + at + i * 512) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < pieces; i++) {
            if (at + i * 512 < bytes)
                st_global_16(to + at + i * 512, v[i]);
        }
    }
}

#endif
