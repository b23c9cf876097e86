/*
 * Rows of the kernels with flags: on their way out they are loaded by pieces, quantised, copied, summed. Near ranks' go
 * to their windows, far ranks' to what the network reads (ll_far.cuh).
 */
#ifndef EPX_ALGO_LL_CUDA_LL_ROW_CUH
#define EPX_ALGO_LL_CUDA_LL_ROW_CUH

#include "algo/ll/cuda/ll_number.cuh"
#include "algo/ll/cuda/ll_wait.cuh"

#define BATCH 4u /* rows that a thread has in flight */

/* Exclusive sum over a block of `warps` warps, *total the whole. `sums`: [warps], shared memory. */
template <uint32_t warps>
EPX__DEVICE uint32_t scan_block(uint32_t n, uint32_t *sums, uint32_t *total)
{
    uint32_t lane = threadIdx.x % 32, w = threadIdx.x / 32, up = n;
    for (int d = 1; d < 32; d *= 2) {
        uint32_t other = __shfl_up_sync(ALL_LANES, up, d);
        up += lane >= (uint32_t)d ? other : 0;
    }
    if (lane == 31)
        sums[w] = up;
    __syncthreads();
    uint32_t before = 0, all = 0;
    for (uint32_t i = 0; i < warps; i++) {
        before += i < w ? sums[i] : 0;
        all += sums[i];
    }
    __syncthreads();
    *total = all;
    return before + up - n;
}

/* A lane's two vectors of a piece of 512 elements. */
template <bool fp8>
EPX__DEVICE uint32_t second_of(uint32_t e)
{
    return fp8 ? e + 8 : e + 256;
}
template <bool fp8>
EPX__DEVICE void load_piece(const ll_dispatch_t &p, uint32_t token, uint32_t at, uint4 *a, uint4 *b)
{
    const ll_common_t &l = p.l;
    const char *x = p.x + (size_t)token * l.hidden * 2;
    uint32_t e = at + threadIdx.x % 32 * (fp8 ? 16 : 8), f = second_of<fp8>(e);
    uint4 zero = make_uint4(0, 0, 0, 0);
    *a = e < l.hidden ? ld_global_16(x + (size_t)e * 2) : zero;
    *b = f < l.hidden ? ld_global_16(x + (size_t)f * 2) : zero;
}
/* What is to travel of it, into the row at `row`: fp8 has its scales behind the elements. */
template <bool fp8>
EPX__DEVICE void store_piece(char *row, uint32_t hidden, uint32_t at, uint4 a, uint4 b, float scale)
{
    uint32_t lane = threadIdx.x % 32, e = at + lane * (fp8 ? 16 : 8), f = second_of<fp8>(e);
    if (fp8) {
        if (e < hidden)
            st_global_16(row + e, a);
        if (e < hidden && lane % 8 == 0)
            *(volatile float *)(row + hidden + e / 128 * 4) = scale;
    } else {
        if (e < hidden)
            st_global_16(row + (size_t)e * 2, a);
        if (f < hidden)
            st_global_16(row + (size_t)f * 2, b);
    }
}

/* Rank-major: the caller's row of a pair (source, token), the same for every choice. */
EPX__DEVICE int32_t ranked_row(const ll_combine_t &p, int32_t pair)
{
    int32_t row = -1;
    for (uint32_t k = 0; row < 0 && k < p.l.topk; k++)
        row = p.l.r.pos[(size_t)pair * p.l.topk + k];
    return row;
}

/* Warp `warp` of `warps` that share the row: the caller's `row` to `to`. */
EPX__DEVICE void push_plain(const ll_combine_t &p, uint32_t warp, uint32_t warps, int32_t row, char *to)
{
    uint32_t bytes = p.l.hidden * 2, lane = threadIdx.x % 32;
    const char *from = p.x + (size_t)row * bytes;
    for (uint32_t at = warp * 512 + lane * 16; at < bytes; at += 2 * warps * 512) {
        uint32_t second = at + warps * 512;
        uint4 a = ld_global_16(from + at), b;
        if (second < bytes)
            b = ld_global_16(from + second);
        st_global_16(to + at, a);
        if (second < bytes)
            st_global_16(to + second, b);
    }
}

/* The same with the weighted sum over my experts of a pair, in top-k order. */
EPX__DEVICE void push_sum(const ll_combine_t &p, uint32_t warp, uint32_t warps, int32_t pair, char *to)
{
    const ll_common_t &l = p.l;
    uint32_t lane = threadIdx.x % 32, bytes = l.hidden * 2;
    size_t at_pos = (size_t)pair * l.topk + lane;
    int32_t pos = lane < l.topk ? l.r.pos[at_pos] : -1;
    float weight = pos >= 0 ? l.r.weights[at_pos] : 0.0f;
    uint32_t mine = __ballot_sync(ALL_LANES, pos >= 0);
    for (uint32_t base = warp * 512; base < bytes; base += warps * 512) {
        uint32_t at = base + lane * 16;
        float acc[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (uint32_t m = mine; m;) {
            uint4 v[BATCH];
            float w[BATCH];
            uint32_t have = 0;
#pragma unroll
            for (uint32_t i = 0; i < BATCH; i++) {
                int k = m ? __ffs((int)m) - 1 : 0;
                size_t row = (size_t)__shfl_sync(ALL_LANES, pos, k);
                w[i] = __shfl_sync(ALL_LANES, weight, k);
                if (m) {
                    v[i] = at < bytes ? ld_global_16(p.x + row * bytes + at) : make_uint4(0, 0, 0, 0);
                    have = i + 1;
                }
                m &= m - 1;
            }
#pragma unroll
            for (uint32_t i = 0; i < BATCH; i++)
                if (i < have)
                    add8(acc, v[i], w[i], true);
        }
        if (at < bytes)
            st_global_16(to + at, round8(acc));
    }
}

#endif
