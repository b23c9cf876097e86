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

/* ---- fp16 ---- */

EPX__INLINE float epx__f32_of_fp16(uint16_t value)
{
    uint32_t sign = (uint32_t)(value & 0x8000u) << 16, exponent = (value >> 10) & 31u, mantissa = value & 0x3ffu;
    if (exponent == 0) /* zero or denormal: mantissa * 2^-24, exact */
        return epx__f32_of_bits(sign | epx__bits_of_f32((float)mantissa * 5.9604644775390625e-8f));
    if (exponent == 31)
        return epx__f32_of_bits(sign | 0x7f800000u | mantissa << 13);
    return epx__f32_of_bits(sign | (exponent + 112u) << 23 | mantissa << 13);
}
/* Nearest even, denormals kept, 65520 and more become infinity; NaN stays a (quiet) NaN. */
EPX__INLINE uint16_t epx__fp16_of_f32(float value)
{
    uint32_t bits = epx__bits_of_f32(value), sign = bits >> 16 & 0x8000u, a = bits & 0x7fffffffu;
    if (a > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | (a >> 13 & 0x3ffu));
    if (a >= 0x477ff000u) /* half way between the largest number and the next */
        return (uint16_t)(sign | 0x7c00u);
    if (a >= 0x38800000u) /* 2^-14, the least normal number */
        return (uint16_t)(sign | ((a - (112u << 23) + 0xfffu + (a >> 13 & 1u)) >> 13));
    if (a <= 0x33000000u) /* 2^-25: half of the least denormal; the tie goes to 0 */
        return (uint16_t)sign;
    uint32_t shift = 126u - (a >> 23), m = (a & 0x7fffffu) | 0x800000u; /* in units of 2^-24; shift 14 .. 24 */
    return (uint16_t)(sign | ((m + (1u << (shift - 1)) - 1u + (m >> shift & 1u)) >> shift));
}

/* ---- e4m3 (fn): bias 7, largest 448, 0x7f and 0xff NaN ---- */

EPX__INLINE float epx__f32_of_e4m3(uint8_t value)
{
    uint32_t sign = (uint32_t)(value & 0x80u) << 24, exponent = (value >> 3) & 15u, mantissa = value & 7u;
    if ((value & 0x7fu) == 0x7fu)
        return epx__f32_of_bits(sign | 0x7fc00000u);
    if (exponent == 0) /* mantissa * 2^-9, exact */
        return epx__f32_of_bits(sign | epx__bits_of_f32((float)mantissa * 0.001953125f));
    return epx__f32_of_bits(sign | (exponent + 120u) << 23 | mantissa << 20);
}
/* Nearest even; what is beyond 448, infinities too, becomes 448; every NaN becomes 0x7f (so 0xff never comes out). */
EPX__INLINE uint8_t epx__e4m3_of_f32(float value)
{
    uint32_t bits = epx__bits_of_f32(value), sign = bits >> 24 & 0x80u, a = bits & 0x7fffffffu;
    if (a > 0x7f800000u)
        return 0x7f;
    if (a >= 0x43e00000u) /* 448 */
        return (uint8_t)(sign | 0x7eu);
    if (a >= 0x3c800000u) /* 2^-6, the least normal number */
        return (uint8_t)(sign | ((a - (120u << 23) + 0x7ffffu + (a >> 20 & 1u)) >> 20));
    if (a <= 0x3a800000u) /* 2^-10: half of the least denormal; the tie goes to 0 */
        return (uint8_t)sign;
    uint32_t shift = 141u - (a >> 23), m = (a & 0x7fffffu) | 0x800000u; /* in units of 2^-9; shift 21 .. 24 */
    return (uint8_t)(sign | ((m + (1u << (shift - 1)) - 1u + (m >> shift & 1u)) >> shift));
}

/* ---- UE8M0: a power of two, 2^(value - 127); 255 is NaN ---- */

EPX__INLINE float epx__f32_of_ue8m0(uint8_t value)
{
    if (value == 255)
        return epx__f32_of_bits(0x7fc00000u);
    return epx__f32_of_bits(value == 0 ? 0x00400000u : (uint32_t)value << 23);
}
/* The least power of two that is not below a positive normal number. An infinity gives 255. */
EPX__INLINE uint8_t epx__ue8m0_of_f32_up(float value)
{
    uint32_t bits = epx__bits_of_f32(value);
    return (uint8_t)((bits >> 23 & 255u) + ((bits & 0x7fffffu) != 0 && (bits >> 23 & 255u) < 255u));
}
/* Exponents of four neighbouring blocks, the first in the lowest byte. */
EPX__INLINE int32_t epx__ue8m0_pack(const uint8_t *four)
{
    return (int32_t)((uint32_t)four[0] | (uint32_t)four[1] << 8 | (uint32_t)four[2] << 16 | (uint32_t)four[3] << 24);
}
EPX__INLINE uint8_t epx__ue8m0_unpack(int32_t packed, int which)
{
    return (uint8_t)((uint32_t)packed >> (8 * which));
}

/* ---- fp32 arithmetic that no compiler flag changes ---- */

EPX__INLINE float epx__f32_div(float a, float b)
{
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}
EPX__INLINE float epx__f32_mul(float a, float b)
{
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}
EPX__INLINE float epx__f32_add(float a, float b)
{
#if defined(__CUDA_ARCH__)
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

/* ---- fp8 with a scale per block ---- */

/*
 * A block of EPX__FP8_BLOCK elements has one scale s, and value = e4m3 * s:
 *     amax = largest |x|, NaNs left out; s = max(amax, 1e-4) / 448, IEEE division; rounded up to a power of two if
 * asked inverse = 1 / s, IEEE division, once a block;  e4m3 = round(x * inverse) Multiplied by the inverse, not divided
 * element by element: that is what a GPU can afford, and with powers of two it is the same. An infinity makes the scale
 * infinite, itself NaN and its block's other elements 0.
 */
#define EPX__FP8_BLOCK 128

EPX__INLINE float epx__fp8_amax(float amax, float x)
{
    float a = epx__f32_of_bits(epx__bits_of_f32(x) & 0x7fffffffu);
    return a > amax ? a : amax; /* false for NaN; start with 0, any order */
}
EPX__INLINE float epx__fp8_scale(float amax, int round_scale)
{
    float scale = epx__f32_div(amax > 1e-4f ? amax : 1e-4f, 448.0f);
    if (round_scale && scale < epx__f32_of_bits(0x7f800000u))
        scale = epx__f32_of_ue8m0(epx__ue8m0_of_f32_up(scale));
    return scale;
}
EPX__INLINE float epx__fp8_inverse(float scale)
{
    return epx__f32_div(1.0f, scale);
}
EPX__INLINE uint8_t epx__fp8_quantise(float x, float inverse)
{
    return epx__e4m3_of_f32(epx__f32_mul(x, inverse));
}
EPX__INLINE float epx__fp8_value(uint8_t quantised, float scale)
{
    return epx__f32_mul(epx__f32_of_e4m3(quantised), scale);
}

/* ---- elements of an array ---- */

EPX__INLINE float epx__dtype_load(const void *array, size_t index, epx_dtype_t dtype)
{
    if (dtype == EPX_FP32)
        return ((const float *)array)[index];
    uint16_t bits = ((const uint16_t *)array)[index];
    return dtype == EPX_FP16 ? epx__f32_of_fp16(bits) : epx__f32_of_bf16(bits);
}
EPX__INLINE void epx__dtype_store(void *array, size_t index, epx_dtype_t dtype, float value)
{
    if (dtype == EPX_FP32)
        ((float *)array)[index] = value;
    else
        ((uint16_t *)array)[index] = dtype == EPX_FP16 ? epx__fp16_of_f32(value) : epx__bf16_of_f32(value);
}
/* `value` rounded once to dtype. */
EPX__INLINE float epx__dtype_round(float value, epx_dtype_t dtype)
{
    if (dtype == EPX_FP32)
        return value;
    return dtype == EPX_FP16 ? epx__f32_of_fp16(epx__fp16_of_f32(value)) : epx__f32_of_bf16(epx__bf16_of_f32(value));
}

/*
 * One row, plainly: x [hidden] of dtype (hidden a multiple of EPX__FP8_BLOCK) into e4m3 [hidden] and its scales: fp32
 * [blocks] in `scales`, or, with round_scale, UE8M0 in `packed` [ceil(blocks / 4)] (unused bytes 0); either NULL.
 */
EPX__INLINE void epx__fp8_row(const void *x, epx_dtype_t dtype, size_t hidden, int round_scale, uint8_t *e4m3,
                              float *scales, int32_t *packed)
{
    size_t blocks = hidden / EPX__FP8_BLOCK;
    uint8_t four[4] = {0, 0, 0, 0};
    for (size_t b = 0; b < blocks; b++) {
        float amax = 0.0f;
        for (size_t i = b * EPX__FP8_BLOCK; i < (b + 1) * EPX__FP8_BLOCK; i++)
            amax = epx__fp8_amax(amax, epx__dtype_load(x, i, dtype));
        float scale = epx__fp8_scale(amax, round_scale), inverse = epx__fp8_inverse(scale);
        for (size_t i = b * EPX__FP8_BLOCK; i < (b + 1) * EPX__FP8_BLOCK; i++)
            e4m3[i] = epx__fp8_quantise(epx__dtype_load(x, i, dtype), inverse);
        if (scales)
            scales[b] = scale;
        four[b % 4] = epx__ue8m0_of_f32_up(scale);
        if (packed && (b % 4 == 3 || b + 1 == blocks)) {
            packed[b / 4] = epx__ue8m0_pack(four);
            four[0] = four[1] = four[2] = four[3] = 0;
        }
    }
}

#endif
