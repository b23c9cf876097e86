/*
 * Row sums with AVX2 (and F16C) and AVX-512. A block of 32 elements stays in registers from the first row's add to the
 * rounding, so each row is read once and the output written once.
 *
 * bf16 becomes fp32 by a shift, fp16 by the CPU's exact conversion. Rounding to bf16 is format.h's integer formula in
 * vectors: the CPU's own bf16 instruction flushes denormals. Only adds here, so nothing can be fused.
 */
#include "device/cpu/sum.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <stdint.h>

#define AVX2 __attribute__((target("avx2,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,f16c")))
#define INLINE static inline __attribute__((always_inline))

/* A block's worth of a row, AHEAD bytes further on; past the row's end it does no harm. */
#define AHEAD 1024
INLINE void prefetch(const void *row, size_t i, epx_dtype_t dtype)
{
    const char *at = (const char *)row + i * (dtype == EPX_FP32 ? 4 : 2) + AHEAD;
    _mm_prefetch(at, _MM_HINT_T0);
    if (dtype == EPX_FP32)
        _mm_prefetch(at + 64, _MM_HINT_T0);
}

/* ---- AVX2: 8 elements a register, 4 registers a block ---- */

AVX2 INLINE __m256 load_avx2(const void *row, size_t i, epx_dtype_t dtype)
{
    if (dtype == EPX_FP32)
        return _mm256_loadu_ps((const float *)row + i);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)row + i));
    if (dtype == EPX_FP16)
        return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* fp32 -> bf16 in the low half of each 32-bit lane, the high half 0. */
AVX2 INLINE __m256i bf16_avx2(__m256 value)
{
    __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
    __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), quiet, nan);
}

AVX2 INLINE __m256i pack_avx2(__m256 low, __m256 high, epx_dtype_t dtype)
{
    if (dtype == EPX_FP16)
        return _mm256_set_m128i(_mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT),
                                _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(bf16_avx2(low), bf16_avx2(high)), 0xd8);
}

AVX2 INLINE void put_avx2(void *to, __m256i value, bool streaming)
{
    if (streaming)
        _mm256_stream_si256((__m256i *)to, value);
    else
        _mm256_storeu_si256((__m256i *)to, value);
}

AVX2 INLINE void store_avx2(void *out, size_t i, const __m256 v[4], epx_dtype_t dtype, bool streaming)
{
    if (dtype == EPX_FP32) {
        for (int k = 0; k < 4; k++)
            put_avx2((float *)out + i + 8 * k, _mm256_castps_si256(v[k]), streaming);
    } else {
        for (int k = 0; k < 2; k++)
            put_avx2((uint16_t *)out + i + 16 * k, pack_avx2(v[2 * k], v[2 * k + 1], dtype), streaming);
    }
}

AVX2 INLINE void add_avx2(__m256 v[4], const void *row, size_t i, epx_dtype_t dtype)
{
    for (int k = 0; k < 4; k++)
        v[k] = _mm256_add_ps(v[k], load_avx2(row, i + 8 * (size_t)k, dtype));
}

/* dtype, out_dtype and streaming are constants where it is called. */
AVX2 INLINE void blocks_avx2(const epx__sum_t *sum, size_t begin, size_t end, epx_dtype_t dtype, epx_dtype_t out_dtype,
                             bool streaming)
{
    const void *const *rows = sum->rows;
    int count = sum->count;
    for (size_t i = begin; i < end; i += EPX__SUM_BLOCK) {
        __m256 v[4];
        for (int k = 0; k < 4; k++)
            v[k] = sum->acc ? _mm256_loadu_ps(sum->acc + i + 8 * k) : _mm256_setzero_ps();
        for (int r = 0; r < count; r++) {
            prefetch(rows[r], i, dtype);
            add_avx2(v, rows[r], i, dtype);
        }
        for (int b = 0; b < sum->biases; b++)
            add_avx2(v, sum->bias[b], i, dtype);
        store_avx2(sum->out, i, v, out_dtype, streaming);
    }
}

/* ---- AVX-512: 16 elements a register, 2 registers a block ---- */

AVX512 INLINE __m512 load_avx512(const void *row, size_t i, epx_dtype_t dtype)
{
    if (dtype == EPX_FP32)
        return _mm512_loadu_ps((const float *)row + i);
    __m256i half = _mm256_loadu_si256((const __m256i *)((const uint16_t *)row + i));
    if (dtype == EPX_FP16)
        return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

AVX512 INLINE __m256i pack_avx512(__m512 value, epx_dtype_t dtype)
{
    if (dtype == EPX_FP16)
        return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    __m512i bits = _mm512_castps_si512(value), high = _mm512_srli_epi32(bits, 16);
    __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, _mm512_srli_epi32(rounded, 16), quiet));
}

AVX512 INLINE void put_avx512(void *to, __m512i value, bool streaming)
{
    if (streaming)
        _mm512_stream_si512((__m512i *)to, value);
    else
        _mm512_storeu_si512(to, value);
}

AVX512 INLINE void store_avx512(void *out, size_t i, __m512 low, __m512 high, epx_dtype_t dtype, bool streaming)
{
    if (dtype == EPX_FP32) {
        put_avx512((float *)out + i, _mm512_castps_si512(low), streaming);
        put_avx512((float *)out + i + 16, _mm512_castps_si512(high), streaming);
    } else {
        __m512i packed = _mm512_castsi256_si512(pack_avx512(low, dtype));
        put_avx512((uint16_t *)out + i, _mm512_inserti64x4(packed, pack_avx512(high, dtype), 1), streaming);
    }
}

AVX512 INLINE void blocks_avx512(const epx__sum_t *sum, size_t begin, size_t end, epx_dtype_t dtype,
                                 epx_dtype_t out_dtype, bool streaming)
{
    const void *const *rows = sum->rows;
    int count = sum->count;
    for (size_t i = begin; i < end; i += EPX__SUM_BLOCK) {
        __m512 low = sum->acc ? _mm512_loadu_ps(sum->acc + i) : _mm512_setzero_ps();
        __m512 high = sum->acc ? _mm512_loadu_ps(sum->acc + i + 16) : _mm512_setzero_ps();
        for (int r = 0; r < count; r++) {
            prefetch(rows[r], i, dtype);
            low = _mm512_add_ps(low, load_avx512(rows[r], i, dtype));
            high = _mm512_add_ps(high, load_avx512(rows[r], i + 16, dtype));
        }
        for (int b = 0; b < sum->biases; b++) {
            low = _mm512_add_ps(low, load_avx512(sum->bias[b], i, dtype));
            high = _mm512_add_ps(high, load_avx512(sum->bias[b], i + 16, dtype));
        }
        store_avx512(sum->out, i, low, high, out_dtype, streaming);
    }
}

/* ---- one version a (row format, output format, kind of store) ---- */

#define EACH_FORMAT(VERSION)                                                                                           \
    do {                                                                                                               \
        epx_dtype_t from = sum->dtype, to = sum->out_dtype;                                                            \
        if (from == EPX_FP32 && streaming)                                                                             \
            VERSION(sum, begin, end, EPX_FP32, EPX_FP32, true);                                                        \
        else if (from == EPX_FP32)                                                                                     \
            VERSION(sum, begin, end, EPX_FP32, EPX_FP32, false);                                                       \
        else if (to == EPX_FP32 && from == EPX_FP16)                                                                   \
            VERSION(sum, begin, end, EPX_FP16, EPX_FP32, false);                                                       \
        else if (to == EPX_FP32)                                                                                       \
            VERSION(sum, begin, end, EPX_BF16, EPX_FP32, false);                                                       \
        else if (from == EPX_FP16 && streaming)                                                                        \
            VERSION(sum, begin, end, EPX_FP16, EPX_FP16, true);                                                        \
        else if (from == EPX_FP16)                                                                                     \
            VERSION(sum, begin, end, EPX_FP16, EPX_FP16, false);                                                       \
        else if (streaming)                                                                                            \
            VERSION(sum, begin, end, EPX_BF16, EPX_BF16, true);                                                        \
        else                                                                                                           \
            VERSION(sum, begin, end, EPX_BF16, EPX_BF16, false);                                                       \
    } while (0)

AVX2 void epx__sum_avx2(const epx__sum_t *sum, size_t begin, size_t end, bool streaming)
{
    EACH_FORMAT(blocks_avx2);
}

AVX512 void epx__sum_avx512(const epx__sum_t *sum, size_t begin, size_t end, bool streaming)
{
    EACH_FORMAT(blocks_avx512);
}

#endif
