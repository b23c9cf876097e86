/*
 * Row copies that bypass the cache. A row is written for a peer to read later, or for an expert: pulling its lines into
 * this core's cache first (as plain stores do) costs a third of the memory's traffic. Where a function streams, its
 * stores are weakly ordered: epx__copy_fence before the release store that tells of them.
 */
#include "device/cpu/copy.h"

#include <string.h>

#include "base/env.h"
#include "device/cpu/simd.h"
#include "device/cpu/tsan.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

/* ---- which instructions ---- */

static int level_found = -1; /* epx__simd_t; every thread computes the same */
static int level_limit = EPX__SIMD_AVX512;
static int halves_asked; /* EPX_STREAMING=halves */

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

void epx__copy_halves(bool halves)
{
    __atomic_store_n(&halves_asked, (int)halves, __ATOMIC_RELAXED);
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
        "on: streaming stores with SSE2 for copies, AVX2 for sums (auto)",
        "on: streaming stores with AVX-512 (auto)",
    };
    const char *text = epx__env_text(EPX__ENV_STREAMING);
    epx__simd_t level = epx__simd_level();
    bool halves = text && strcmp(text, "halves") == 0;
    epx__copy_halves(halves);
    if (text && strcmp(text, "0") == 0) {
        *streaming = false;
        *why = "off: EPX_STREAMING=0";
    } else if (text && (halves || strcmp(text, "1") == 0) && level > EPX__SIMD_NONE) {
        *streaming = true;
        *why = halves ? "on: EPX_STREAMING=halves" : "on: EPX_STREAMING=1";
    } else if (EPX__TSAN) {
        *streaming = false;
        *why = "off: ThreadSanitizer does not see streaming stores (auto)";
    } else {
        *streaming = level > EPX__SIMD_NONE;
        *why = auto_why[level];
    }
}

/* ---- the copies ---- */

#if defined(__x86_64__)

/*
 * Two ways. Lines: all of a row by streaming stores of a whole line each, the least traffic there is. Halves: the first
 * half of a row by streaming stores, the second by plain ones whose lines are asked for ahead; a core waits on
 * different buffers for the two kinds, which hides latency, for half the traffic that plain stores add. Where cores
 * share the memory's bandwidth the traffic decides: cached dispatch of 2 ranks, 117 MB each, took 7.6 ms by lines
 * and 10.8 by halves (Sapphire Rapids, 2 cores, the raw copies 6.5); 1 rank alone 1.88 and 1.99. Without stores of
 * whole lines (SSE2) halves are taken: one core of Cascade Lake, memcpy 22 to 24 ms, 16-byte streaming stores only 21,
 * halves 17.2.
 *
 * dst is 64-aligned and `half` a multiple of 128 below: dst[0, half) and dst[half, 2 * half) are written.
 */
#define AHEAD 1024 /* bytes; 512 to 2048 make no difference */

static void stream_halves_sse2(char *dst, const char *src, size_t half)
{
    for (size_t i = 0; i < half; i += 64) {
        const char *a = src + i, *b = src + half + i;
        __m128i *to = (__m128i *)(dst + i), *plain = (__m128i *)(dst + half + i);
        _mm_prefetch(a + AHEAD, _MM_HINT_T0);
        _mm_prefetch(b + AHEAD, _MM_HINT_T0);
        if (i + AHEAD < half)
            __builtin_prefetch((const char *)plain + AHEAD, 1);
        for (int k = 0; k < 4; k++)
            _mm_stream_si128(to + k, _mm_loadu_si128((const __m128i *)a + k));
        for (int k = 0; k < 4; k++)
            _mm_store_si128(plain + k, _mm_loadu_si128((const __m128i *)b + k));
    }
}

__attribute__((target("avx512f"))) static void stream_lines_avx512(char *dst, const char *src, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 128) {
        _mm_prefetch(src + i + AHEAD, _MM_HINT_T0);
        _mm_prefetch(src + i + AHEAD + 64, _MM_HINT_T0);
        __m512i a = _mm512_loadu_si512(src + i), b = _mm512_loadu_si512(src + i + 64);
        _mm512_stream_si512((__m512i *)(dst + i), a);
        _mm512_stream_si512((__m512i *)(dst + i + 64), b);
    }
}

__attribute__((target("avx512f,prfchw"))) static void stream_halves_avx512(char *dst, const char *src, size_t half)
{
    for (size_t i = 0; i < half; i += 128) {
        const char *a = src + i, *b = src + half + i;
        char *to = dst + i, *plain = dst + half + i;
        _mm_prefetch(a + AHEAD, _MM_HINT_T0);
        _mm_prefetch(a + AHEAD + 64, _MM_HINT_T0);
        _mm_prefetch(b + AHEAD, _MM_HINT_T0);
        _mm_prefetch(b + AHEAD + 64, _MM_HINT_T0);
        if (i + AHEAD < half) { /* never past the row: the next lines may be a peer's to write */
            __builtin_prefetch(plain + AHEAD, 1);
            __builtin_prefetch(plain + AHEAD + 64, 1);
        }
        __m512i a0 = _mm512_loadu_si512(a), a1 = _mm512_loadu_si512(a + 64);
        __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64);
        _mm512_stream_si512((__m512i *)to, a0);
        _mm512_stream_si512((__m512i *)(to + 64), a1);
        _mm512_store_si512(plain, b0);
        _mm512_store_si512(plain + 64, b1);
    }
}

static void stream_row(char *dst, const char *src, size_t bytes, epx__simd_t level)
{
    size_t head = (64 - ((uintptr_t)dst & 63)) & 63; /* to a line's start */
    if (head >= bytes) {
        memcpy(dst, src, bytes);
        return;
    }
    memcpy(dst, src, head);
    dst += head;
    src += head;
    bytes -= head;
    size_t half = bytes / 256 * 128;
    bool halves = __atomic_load_n(&halves_asked, __ATOMIC_RELAXED);
    if (level >= EPX__SIMD_AVX512 && !halves)
        stream_lines_avx512(dst, src, half * 2);
    else if (level >= EPX__SIMD_AVX512)
        stream_halves_avx512(dst, src, half);
    else /* AVX2's 32-byte streaming stores are slower than 16-byte ones: 25 ms beside 21 */
        stream_halves_sse2(dst, src, half);
    memcpy(dst + 2 * half, src + 2 * half, bytes - 2 * half);
}

void epx__copy_row(void *dst, const void *src, size_t bytes, bool streaming)
{
    epx__simd_t level = streaming ? epx__simd_level() : EPX__SIMD_NONE;
    if (level == EPX__SIMD_NONE)
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
