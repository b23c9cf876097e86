/*
 * Sums of 16-byte pieces of rows in fp32: 4 elements of fp32, or 8 of a 16-bit format. No multiply-add is fused, and
 * each sum is rounded once, to nearest even: the CPU's bits.
 */
#ifndef EPX_ALGO_HT_CUDA_SUM_CUH
#define EPX_ALGO_HT_CUDA_SUM_CUH

#include <epx/device/ptx.cuh>
#include <epx/epx.h>

template <int dtype>
EPX__DEVICE void add_16(float *sum, uint4 v)
{
    uint32_t u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (dtype == EPX_FP32) {
            sum[i] = __fadd_rn(sum[i], __uint_as_float(u[i]));
        } else if (dtype == EPX_BF16) {
            sum[2 * i] = __fadd_rn(sum[2 * i], __uint_as_float(u[i] << 16));
            sum[2 * i + 1] = __fadd_rn(sum[2 * i + 1], __uint_as_float(u[i] & 0xffff0000u));
        } else {
            sum[2 * i] = __fadd_rn(sum[2 * i], f32_of_fp16_bits(u[i] & 0xffffu));
            sum[2 * i + 1] = __fadd_rn(sum[2 * i + 1], f32_of_fp16_bits(u[i] >> 16));
        }
    }
}
template <int dtype>
EPX__DEVICE uint4 round_16(const float *sum)
{
    uint32_t u[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (dtype == EPX_FP32)
            u[i] = __float_as_uint(sum[i]);
        else if (dtype == EPX_BF16)
            u[i] = bf16x2_of_f32(sum[2 * i], sum[2 * i + 1]);
        else
            u[i] = fp16x2_of_f32(sum[2 * i], sum[2 * i + 1]);
    }
    return make_uint4(u[0], u[1], u[2], u[3]);
}

/* ---- a row by a warp: lane l has the pieces at 16 * l + 512 * i ---- */

/* Pieces that a lane loads before it adds the first: rows may lie across PCIe, a trip of more than a microsecond. */
#define SUM_PIECES 4

/* Lane: `pieces` of a row, from `from` on. */
template <int dtype, int pieces>
EPX__DEVICE void add_pieces(float (*sum)[8], const char *from)
{
    uint4 v[pieces];
#pragma unroll
    for (int i = 0; i < pieces; i++)
        v[i] = ld_global_16(from + i * 512);
#pragma unroll
    for (int i = 0; i < pieces; i++)
        add_16<dtype>(sum[i], v[i]);
}
template <int dtype, int pieces>
EPX__DEVICE void store_pieces(char *to, float (*sum)[8])
{
#pragma unroll
    for (int i = 0; i < pieces; i++)
        st_global_16(to + i * 512, round_16<dtype>(sum[i]));
}

#endif
