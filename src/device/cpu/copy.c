/*
 * Row copies that bypass the cache. A row is written for a peer to read later, or for an expert: pulling its lines into
 * this core's cache first (as plain stores do) costs a third of the memory's traffic. Where a function streams, its
 * stores are weakly ordered: epx__copy_fence before the release store that tells of them.
 */
#include "device/cpu/copy.h"

#include <string.h>

#include "base/env.h"
#include "device/cpu/simd.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

/* ---- which instructions ---- */

static int level_found = -1; /* epx__simd_t; every thread computes the same */
static int level_limit = EPX__SIMD_AVX512;

#if defined(__x86_64__)
static bool has_f16c(void) /* clang 14's __builtin_cpu_supports does not know it */
{
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}
#endif

static epx__simd_t look_at_cpu(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && has_f16c())
        return EPX__SIMD_AVX512;
    if (__builtin_cpu_supports("avx2") && has_f16c())
        return EPX__SIMD_AVX2;
    return EPX__SIMD_SSE2;
#else
    return EPX__SIMD_NONE;
#endif
}

epx__simd_t epx__simd_level(void)
{
    int found = __atomic_load_n(&level_found, __ATOMIC_RELAXED);
    if (found < 0) {
        found = (int)look_at_cpu();
        __atomic_store_n(&level_found, found, __ATOMIC_RELAXED);
    }
    int limit = __atomic_load_n(&level_limit, __ATOMIC_RELAXED);
    return (epx__simd_t)(found < limit ? found : limit);
}

void epx__simd_limit(epx__simd_t level)
{
    __atomic_store_n(&level_limit, (int)level, __ATOMIC_RELAXED);
}

const char *epx__simd_name(epx__simd_t level)
{
    static const char *const names[] = {"portable C", "SSE2", "AVX2", "AVX-512"};
    return level <= EPX__SIMD_AVX512 ? names[level] : "?";
}

void epx__copy_choose(bool *streaming, const char **why)
{
    static const char *const auto_why[] = {
        "off: this architecture has no streaming stores that epx knows",
        "on: streaming stores with SSE2 (auto)",
        "on: streaming stores with AVX2 (auto)",
        "on: streaming stores with AVX-512 (auto)",
    };
    const char *text = epx__env_text(EPX__ENV_STREAMING);
    epx__simd_t level = epx__simd_level();
    if (text && strcmp(text, "0") == 0) {
        *streaming = false;
        *why = "off: EPX_STREAMING=0";
    } else if (text && strcmp(text, "1") == 0 && level > EPX__SIMD_NONE) {
        *streaming = true;
        *why = "on: EPX_STREAMING=1";
    } else {
        *streaming = level > EPX__SIMD_NONE;
        *why = auto_why[level];
    }
}

/* ---- the copies ---- */

#if defined(__x86_64__)

static void stream_sse2(char *dst, const char *src, size_t bytes)
{
    size_t i = 0;
    for (; i + 64 <= bytes; i += 64) {
        __m128i a = _mm_loadu_si128((const __m128i *)(src + i));
        __m128i b = _mm_loadu_si128((const __m128i *)(src + i + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(src + i + 32));
        __m128i d = _mm_loadu_si128((const __m128i *)(src + i + 48));
        _mm_stream_si128((__m128i *)(dst + i), a);
        _mm_stream_si128((__m128i *)(dst + i + 16), b);
        _mm_stream_si128((__m128i *)(dst + i + 32), c);
        _mm_stream_si128((__m128i *)(dst + i + 48), d);
    }
    for (; i + 16 <= bytes; i += 16)
        _mm_stream_si128((__m128i *)(dst + i), _mm_loadu_si128((const __m128i *)(src + i)));
    if (i < bytes)
        memcpy(dst + i, src + i, bytes - i);
}

/* dst is 64-aligned in the two below. */
__attribute__((target("avx2"))) static void stream_avx2(char *dst, const char *src, size_t bytes)
{
    size_t i = 0;
    for (; i + 128 <= bytes; i += 128) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(src + i));
        __m256i b = _mm256_loadu_si256((const __m256i *)(src + i + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(src + i + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(src + i + 96));
        _mm256_stream_si256((__m256i *)(dst + i), a);
        _mm256_stream_si256((__m256i *)(dst + i + 32), b);
        _mm256_stream_si256((__m256i *)(dst + i + 64), c);
        _mm256_stream_si256((__m256i *)(dst + i + 96), d);
    }
    stream_sse2(dst + i, src + i, bytes - i);
}

__attribute__((target("avx512f"))) static void stream_avx512(char *dst, const char *src, size_t bytes)
{
    size_t i = 0;
    for (; i + 256 <= bytes; i += 256) {
        __m512i a = _mm512_loadu_si512(src + i);
        __m512i b = _mm512_loadu_si512(src + i + 64);
        __m512i c = _mm512_loadu_si512(src + i + 128);
        __m512i d = _mm512_loadu_si512(src + i + 192);
        _mm512_stream_si512((__m512i *)(dst + i), a);
        _mm512_stream_si512((__m512i *)(dst + i + 64), b);
        _mm512_stream_si512((__m512i *)(dst + i + 128), c);
        _mm512_stream_si512((__m512i *)(dst + i + 192), d);
    }
    stream_sse2(dst + i, src + i, bytes - i);
}

static void stream_row(char *dst, const char *src, size_t bytes, epx__simd_t level)
{
    size_t head = (64 - ((uintptr_t)dst & 63)) & 63;
    if (head > bytes)
        head = bytes;
    if (level >= EPX__SIMD_AVX2 && head > 0) { /* to a line's start; SSE2 needs none */
        stream_sse2(dst, src, head);
        dst += head;
        src += head;
        bytes -= head;
    }
    if (level >= EPX__SIMD_AVX512)
        stream_avx512(dst, src, bytes);
    else if (level == EPX__SIMD_AVX2)
        stream_avx2(dst, src, bytes);
    else
        stream_sse2(dst, src, bytes);
}

void epx__copy_row(void *dst, const void *src, size_t bytes, bool streaming)
{
    epx__simd_t level = streaming ? epx__simd_level() : EPX__SIMD_NONE;
    if (level == EPX__SIMD_NONE || ((uintptr_t)dst & 15) != 0)
        memcpy(dst, src, bytes);
    else
        stream_row(dst, src, bytes, level);
}

void epx__copy_fence(void)
{
    _mm_sfence();
}

#else

void epx__copy_row(void *dst, const void *src, size_t bytes, bool streaming)
{
    (void)streaming;
    memcpy(dst, src, bytes);
}

void epx__copy_fence(void)
{
}

#endif
