/*
 * Number formats as the tool understands them, written apart from the library's, since the tool checks the library.
 * Round to nearest even.
 */
#ifndef EPX_TOOL_NUMBERS_H
#define EPX_TOOL_NUMBERS_H

#include <stdint.h>
#include <string.h>

static inline float number_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t number_to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float number_from_bf16(uint16_t half)
{
    return number_from_bits((uint32_t)half << 16);
}

static inline uint16_t number_to_bf16(float value)
{
    uint32_t bits = number_to_bits(value);
    if (value != value)
        return (uint16_t)(bits >> 16 | 0x40);
    uint32_t low = bits & 0xffff, high = bits >> 16;
    if (low > 0x8000 || (low == 0x8000 && (high & 1)))
        high++;
    return (uint16_t)high;
}

static inline float number_from_fp16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ff;
    if (exponent == 31)
        return number_from_bits(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) { /* subnormal: fraction * 2^-24, exact in fp32 */
        float value = (float)fraction * (1.0f / 16777216.0f);
        return sign ? -value : value;
    }
    return number_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

static inline uint16_t number_to_fp16(float value)
{
    uint32_t bits = number_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000u) /* 65520 and more round to infinity */
        return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000u) { /* below 2^-14: a multiple of 2^-24, rounded by the addition of 0.5 */
        float moved = number_from_bits(magnitude) + 0.5f; /* 0.5 has its last bit at 2^-24 */
        return (uint16_t)(sign | (number_to_bits(moved) - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | (rounded - 0x38000000u) >> 13);
}

/*
 * e4m3 (largest 448, what is beyond becomes 448). Finite numbers only. No branches and always inline, so that a loop
 * over it becomes vector code.
 */
static inline __attribute__((always_inline)) uint8_t number_to_e4m3(float value)
{
    uint32_t bits = number_to_bits(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffffu;
    uint32_t normal = (magnitude - (120u << 23) + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
    /* Below 2^-6: a multiple of 2^-9, rounded by the addition of 2^14, whose last bit that is. */
    uint32_t small = number_to_bits(number_from_bits(magnitude) + 16384.0f) - 0x46800000u;
    uint32_t rounded = magnitude < 0x3c800000u ? small : normal;
    return (uint8_t)(sign | (rounded > 0x7e ? 0x7e : rounded));
}

/* 128 bf16 numbers and their scale: max(largest, 1e-4) / 448; each is multiplied by the inverse of that. */
enum { NUMBER_FP8_BLOCK = 128 };
static inline __attribute__((always_inline)) void number_fp8_block(const uint16_t *x, uint8_t *e4m3, float *scale)
{
    uint16_t most = 0; /* without the sign, bits compare as numbers do */
    for (int i = 0; i < NUMBER_FP8_BLOCK; i++) {
        uint16_t magnitude = x[i] & 0x7fff;
        most = magnitude > most ? magnitude : most;
    }
    float largest = number_from_bf16(most);
    *scale = (largest > 1e-4f ? largest : 1e-4f) / 448.0f;
    float inverse = 1.0f / *scale;
    for (int i = 0; i < NUMBER_FP8_BLOCK; i++)
        e4m3[i] = number_to_e4m3(number_from_bf16(x[i]) * inverse);
}

#endif
