/*
 * Number formats: conversions that give the same bits on CPU and GPU (plain integer arithmetic and IEEE fp32).
 * Header only, for gcc and nvcc. bf16, fp16, e4m3 (the "fn" variant: no infinities, 0x7f is NaN), UE8M0 scales.
 */
#ifndef EPX_PLAN_FORMAT_H
#define EPX_PLAN_FORMAT_H

#include "plan/routing.h" /* EPX__INLINE */

#include <string.h>

EPX__INLINE size_t epx__dtype_bytes(epx_dtype_t dtype)
{
    return dtype == EPX_FP32 ? 4 : 2;
}
EPX__INLINE uint32_t epx__bits_of_f32(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
EPX__INLINE float epx__f32_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
EPX__INLINE float epx__f32_of_bf16(uint16_t value)
{
    return epx__f32_of_bits((uint32_t)value << 16);
}
/* Nearest even; NaN stays a (quiet) NaN. */
EPX__INLINE uint16_t epx__bf16_of_f32(float value)
{
    uint32_t bits = epx__bits_of_f32(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)((bits >> 16) | 0x0040u);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#endif
