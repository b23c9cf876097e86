/*
 * out = round(((0 + row 0) + row 1) + ...), element by element in fp32, for rows of bf16, fp16 or fp32. The sum that
 * the floor of combine and the MPI peer use; vectors where the processor has them. Header only.
 */
#ifndef EPX_TOOL_SUMROWS_H
#define EPX_TOOL_SUMROWS_H

#include "numbers.h"
#include "pattern.h"

#include <stdbool.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static inline float sumrows_load(const void *row, size_t index, pattern_format_t format)
{
    if (format == PATTERN_FP32)
        return ((const float *)row)[index];
    uint16_t half = ((const uint16_t *)row)[index];
    return format == PATTERN_BF16 ? number_from_bf16(half) : number_from_fp16(half);
}

static inline void sumrows_plain(void *out, const void *const *rows, int count, size_t begin, size_t hidden,
                                 pattern_format_t format)
{
    for (size_t i = begin; i < hidden; i++) {
        float sum = 0.0f;
        for (int r = 0; r < count; r++)
            sum += sumrows_load(rows[r], i, format);
        if (format == PATTERN_FP32)
            ((float *)out)[i] = sum;
        else
            ((uint16_t *)out)[i] = format == PATTERN_BF16 ? number_to_bf16(sum) : number_to_fp16(sum);
    }
}

#if defined(__x86_64__)
enum { SUMROWS_AHEAD = 1024 }; /* bytes: how far reads are asked for beforehand */

/* Each handles whole blocks and returns where it stopped. NaN is not looked for: the rows hold none. */
__attribute__((target("avx512f,avx512bw"))) static size_t sumrows_bf16_512(uint16_t *out, const void *const *rows,
                                                                           int count, size_t hidden, bool streaming)
{
    size_t i = 0;
    const __m512i bias = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
    for (; i + 32 <= hidden; i += 32) {
        __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
        for (int r = 0; r < count; r++) {
            const uint16_t *row = (const uint16_t *)rows[r] + i;
            _mm_prefetch((const char *)row + SUMROWS_AHEAD, _MM_HINT_T0);
            __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)row));
            __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(row + 16)));
            low = _mm512_add_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)));
            high = _mm512_add_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)));
        }
        __m512i a = _mm512_castps_si512(low), b = _mm512_castps_si512(high);
        a = _mm512_add_epi32(a, _mm512_add_epi32(bias, _mm512_and_si512(_mm512_srli_epi32(a, 16), one)));
        b = _mm512_add_epi32(b, _mm512_add_epi32(bias, _mm512_and_si512(_mm512_srli_epi32(b, 16), one)));
        __m256i c = _mm512_cvtepi32_epi16(_mm512_srli_epi32(a, 16));
        __m256i d = _mm512_cvtepi32_epi16(_mm512_srli_epi32(b, 16));
        __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(c), d, 1);
        if (streaming && ((uintptr_t)(out + i) & 63) == 0) {
            _mm512_stream_si512((__m512i *)(out + i), both);
        } else if (streaming) {
            _mm_stream_si128((__m128i *)(out + i), _mm256_castsi256_si128(c));
            _mm_stream_si128((__m128i *)(out + i + 8), _mm256_extracti128_si256(c, 1));
            _mm_stream_si128((__m128i *)(out + i + 16), _mm256_castsi256_si128(d));
            _mm_stream_si128((__m128i *)(out + i + 24), _mm256_extracti128_si256(d, 1));
        } else {
            _mm512_storeu_si512(out + i, both);
        }
    }
    return i;
}

__attribute__((target("avx2"))) static size_t sumrows_bf16_256(uint16_t *out, const void *const *rows, int count,
                                                               size_t hidden, bool streaming)
{
    size_t i = 0;
    const __m256i bias = _mm256_set1_epi32(0x7fff), one = _mm256_set1_epi32(1);
    for (; i + 16 <= hidden; i += 16) {
        __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
        for (int r = 0; r < count; r++) {
            const uint16_t *row = (const uint16_t *)rows[r] + i;
            _mm_prefetch((const char *)row + SUMROWS_AHEAD, _MM_HINT_T0);
            __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)row));
            __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(row + 8)));
            low = _mm256_add_ps(low, _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)));
            high = _mm256_add_ps(high, _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)));
        }
        __m256i a = _mm256_castps_si256(low), b = _mm256_castps_si256(high);
        a = _mm256_add_epi32(a, _mm256_add_epi32(bias, _mm256_and_si256(_mm256_srli_epi32(a, 16), one)));
        b = _mm256_add_epi32(b, _mm256_add_epi32(bias, _mm256_and_si256(_mm256_srli_epi32(b, 16), one)));
        __m256i both = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
        both = _mm256_permute4x64_epi64(both, 0xd8);
        if (streaming) {
            _mm_stream_si128((__m128i *)(out + i), _mm256_castsi256_si128(both));
            _mm_stream_si128((__m128i *)(out + i + 8), _mm256_extracti128_si256(both, 1));
        } else {
            _mm256_storeu_si256((__m256i *)(out + i), both);
        }
    }
    return i;
}

__attribute__((target("avx2,f16c"))) static size_t sumrows_fp16_256(uint16_t *out, const void *const *rows, int count,
                                                                    size_t hidden, bool streaming)
{
    size_t i = 0;
    for (; i + 8 <= hidden; i += 8) {
        __m256 sum = _mm256_setzero_ps();
        for (int r = 0; r < count; r++)
            sum =
                _mm256_add_ps(sum, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)rows[r] + i))));
        __m128i half = _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT);
        if (streaming)
            _mm_stream_si128((__m128i *)(out + i), half);
        else
            _mm_storeu_si128((__m128i *)(out + i), half);
    }
    return i;
}

static inline size_t sumrows_fp32_128(float *out, const void *const *rows, int count, size_t hidden, bool streaming)
{
    size_t i = 0;
    for (; i + 8 <= hidden; i += 8) {
        __m128 a = _mm_setzero_ps(), b = _mm_setzero_ps();
        for (int r = 0; r < count; r++) {
            a = _mm_add_ps(a, _mm_loadu_ps((const float *)rows[r] + i));
            b = _mm_add_ps(b, _mm_loadu_ps((const float *)rows[r] + i + 4));
        }
        if (streaming) {
            _mm_stream_ps(out + i, a);
            _mm_stream_ps(out + i + 4, b);
        } else {
            _mm_storeu_ps(out + i, a);
            _mm_storeu_ps(out + i + 4, b);
        }
    }
    return i;
}
#endif

/* streaming needs out 16-byte aligned; follow the last row by sumrows_fence(). */
static inline void sumrows(void *out, const void *const *rows, int count, size_t hidden, pattern_format_t format,
                           bool streaming)
{
    size_t done = 0;
#if defined(__x86_64__)
    if (format == PATTERN_BF16 && __builtin_cpu_supports("avx512bw"))
        done = sumrows_bf16_512(out, rows, count, hidden, streaming);
    else if (format == PATTERN_BF16 && __builtin_cpu_supports("avx2"))
        done = sumrows_bf16_256(out, rows, count, hidden, streaming);
    else if (format == PATTERN_FP16 && __builtin_cpu_supports("avx2"))
        done = sumrows_fp16_256(out, rows, count, hidden, streaming);
    else if (format == PATTERN_FP32)
        done = sumrows_fp32_128(out, rows, count, hidden, streaming);
#else
    (void)streaming;
#endif
    sumrows_plain(out, rows, count, done, hidden, format);
}

static inline void sumrows_fence(void)
{
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

#endif
