/*
 * Rows of bf16, quantised or weighed: plan/format.h's arithmetic, bit for bit, without branches on the data, so that
 * compilers turn the loops into vector code. One version for each set of instructions.
 *
 * The rounding to e4m3, on the magnitude's bits a: above 2^-6, nearest even by adding half and the lowest bit kept;
 * below, adding 2^14, whose last place is worth 2^-9, leaves the multiple of 2^-9 in the low bits, rounded by the adder
 * itself.
 */
#include "device/cpu/bf16.h"

#include <string.h>

#include "device/cpu/simd.h"
#include "plan/format.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

ALWAYS_INLINE float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Magnitudes of bf16 compare as integers; NaNs are left out. */
ALWAYS_INLINE float amax_of(const uint16_t *x)
{
    int32_t most = 0;
    for (int i = 0; i < EPX__FP8_BLOCK; i++) {
        int32_t a = x[i] & 0x7fff;
        a &= -(int32_t)(a <= 0x7f80);
        most = a > most ? a : most;
    }
    return float_of((uint32_t)most << 16);
}

/* By masks: where a choice is a branch, loops stay scalar. */
ALWAYS_INLINE uint32_t pick(bool which, uint32_t yes, uint32_t no)
{
    uint32_t mask = 0u - (uint32_t)which;
    return (yes & mask) | (no & ~mask);
}

ALWAYS_INLINE uint8_t quantise(uint16_t x, float inverse)
{
    uint32_t bits = bits_of(float_of((uint32_t)x << 16) * inverse), a = bits & 0x7fffffffu;
    uint32_t normal = (a - (120u << 23) + 0x7ffffu + (a >> 20 & 1u)) >> 20;
    uint32_t small = bits_of(float_of(a) + 16384.0f) - 0x46800000u;
    uint32_t q = pick(a >= 0x3c800000u, normal, small);
    q = pick(a >= 0x43e00000u, 0x7eu, q) | (bits >> 24 & 0x80u);
    return (uint8_t)pick(a > 0x7f800000u, 0x7fu, q);
}

ALWAYS_INLINE void row(const uint16_t *restrict x, size_t hidden, bool round_scale, uint8_t *restrict e4m3,
                       float *restrict scales)
{
    for (size_t b = 0; b < hidden / EPX__FP8_BLOCK; b++) {
        const uint16_t *from = x + b * EPX__FP8_BLOCK;
        uint8_t *to = e4m3 + b * EPX__FP8_BLOCK;
        float scale = epx__fp8_scale(amax_of(from), round_scale), inverse = epx__fp8_inverse(scale);
        for (int i = 0; i < EPX__FP8_BLOCK; i++)
            to[i] = quantise(from[i], inverse);
        scales[b] = scale;
    }
}

/* Two roundings an element: nothing is fused (-ffp-contract=off). */
ALWAYS_INLINE void weigh(float *restrict sum, const uint16_t *restrict x, float weight, size_t hidden)
{
    for (size_t i = 0; i < hidden; i++)
        sum[i] += weight * float_of((uint32_t)x[i] << 16);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void row_avx2(const uint16_t *x, size_t hidden, bool round_scale, uint8_t *e4m3,
                                                     float *scales)
{
    row(x, hidden, round_scale, e4m3, scales);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) static void
row_avx512(const uint16_t *x, size_t hidden, bool round_scale, uint8_t *e4m3, float *scales)
{
    row(x, hidden, round_scale, e4m3, scales);
}

__attribute__((target("avx2"))) static void weigh_avx2(float *sum, const uint16_t *x, float weight, size_t hidden)
{
    weigh(sum, x, weight, hidden);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) static void weigh_avx512(float *sum, const uint16_t *x,
                                                                                       float weight, size_t hidden)
{
    weigh(sum, x, weight, hidden);
}
#endif

void epx__fp8_row_bf16(const uint16_t *x, size_t hidden, bool round_scale, uint8_t *e4m3, float *scales)
{
#if defined(__x86_64__)
    if (epx__simd_level() >= EPX__SIMD_AVX512) {
        row_avx512(x, hidden, round_scale, e4m3, scales);
        return;
    }
    if (epx__simd_level() >= EPX__SIMD_AVX2) {
        row_avx2(x, hidden, round_scale, e4m3, scales);
        return;
    }
#endif
    row(x, hidden, round_scale, e4m3, scales);
}

void epx__weigh_row_bf16(float *sum, const uint16_t *x, float weight, size_t hidden)
{
#if defined(__x86_64__)
    if (epx__simd_level() >= EPX__SIMD_AVX512) {
        weigh_avx512(sum, x, weight, hidden);
        return;
    }
    if (epx__simd_level() >= EPX__SIMD_AVX2) {
        weigh_avx2(sum, x, weight, hidden);
        return;
    }
#endif
    weigh(sum, x, weight, hidden);
}
