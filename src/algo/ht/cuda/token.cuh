/* Which ranks a token goes to, for begin and for the local layout. */
#ifndef EPX_ALGO_HT_CUDA_TOKEN_CUH
#define EPX_ALGO_HT_CUDA_TOKEN_CUH

#include "plan/routing.h"
#include <epx/device/ptx.cuh>

/*
 * Thread: which of the ranks r0 .. r0 + 31 a token's choices are on. The loads of several ids are under way together.
 * `counts`: each choice of an expert adds one there, and what is neither an expert nor -1 adds one to *bad; NULL: not.
 */
EPX__DEVICE uint32_t token_bits(const epx__experts_t &map, const void *ids, int width, uint32_t token, uint32_t topk,
                                uint32_t r0, uint32_t *counts, uint32_t *bad)
{
    uint32_t bits = 0;
    for (uint32_t k0 = 0; k0 < topk; k0 += 8) {
        int64_t id[8];
#pragma unroll
        for (uint32_t i = 0; i < 8; i++)
            id[i] = k0 + i < topk ? epx__topk_id(ids, width, (size_t)token * topk + k0 + i) : -1;
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            if (id[i] < 0 || id[i] >= (int64_t)map.experts) {
                *bad += counts && id[i] != -1;
                continue;
            }
            uint32_t rank = (uint32_t)epx__expert_rank(&map, id[i]) - r0;
            bits |= rank < 32 ? 1u << rank : 0;
            if (counts)
                atomicAdd(&counts[id[i]], 1u);
        }
    }
    return bits;
}

#endif
