/* Number formats of low latency: 8 or 16 elements a lane. */
#ifndef EPX_ALGO_LL_CUDA_LL_NUMBER_CUH
#define EPX_ALGO_LL_CUDA_LL_NUMBER_CUH

#include <epx/device/ptx.cuh>

#include "plan/format.h"

EPX__DEVICE uint32_t e4m3x4(const float *f, float inverse)
{
#if __CUDA_ARCH__ >= 890
    uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(f[1] * inverse), "f"(f[0] * inverse));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(f[3] * inverse), "f"(f[2] * inverse));
    return (uint32_t)low | (uint32_t)high << 16;
#else
    uint32_t v = 0;
    for (int i = 0; i < 4; i++)
        v |= (uint32_t)epx__fp8_quantise(f[i], inverse) << (8 * i);
    return v;
#endif
}

EPX__DEVICE void unpack8(uint4 v, float *f)
{
    uint32_t u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        f[2 * i] = __uint_as_float(u[i] << 16);
        f[2 * i + 1] = __uint_as_float(u[i] & 0xffff0000u);
    }
}

/* The lanes' 16 elements each, a scale for 8 lanes. */
EPX__DEVICE uint4 quantise16(uint4 a, uint4 b, int round_scale, float *scale)
{
    float f[16], amax = 0.0f;
    unpack8(a, f);
    unpack8(b, f + 8);
#pragma unroll
    for (int i = 0; i < 16; i++)
        amax = epx__fp8_amax(amax, f[i]);
    for (int d = 1; d < 8; d *= 2)
        amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, d));
    *scale = epx__fp8_scale(amax, round_scale);
    float inverse = epx__fp8_inverse(*scale);
    return make_uint4(e4m3x4(f, inverse), e4m3x4(f + 4, inverse), e4m3x4(f + 8, inverse), e4m3x4(f + 12, inverse));
}

/* acc += w * v, 8 elements; products and sums rounded one by one. */
EPX__DEVICE void add8(float *acc, uint4 v, float w, bool weighted)
{
    uint32_t u[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float low = __uint_as_float(u[i] << 16), high = __uint_as_float(u[i] & 0xffff0000u);
        acc[2 * i] = __fadd_rn(acc[2 * i], weighted ? __fmul_rn(w, low) : low);
        acc[2 * i + 1] = __fadd_rn(acc[2 * i + 1], weighted ? __fmul_rn(w, high) : high);
    }
}
/* NaNs as epx__bf16_of_f32 makes them. */
EPX__DEVICE uint32_t round2(float low, float high)
{
    return (uint32_t)epx__bf16_of_f32(low) | (uint32_t)epx__bf16_of_f32(high) << 16;
}
EPX__DEVICE uint4 round8(const float *acc)
{
    return make_uint4(round2(acc[0], acc[1]), round2(acc[2], acc[3]), round2(acc[4], acc[5]), round2(acc[6], acc[7]));
}

#endif
