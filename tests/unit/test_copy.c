/*
 * Row copies and row sums: every instruction set this CPU has against plain C, for all sizes and alignments around the
 * vector widths, with guard bytes around what is written, and for every kind of number.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "device/cpu/copy.h"
#include "device/cpu/simd.h"
#include "device/cpu/tsan.h"
#include "plan/format.h"

static uint64_t random_state = 88172645463325252u;

static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

/* ---- copies ---- */

#define COPY_MOST 1600
#define GUARD 256

static bool copied_exactly(const uint8_t *area, size_t area_bytes, size_t at, const uint8_t *src, size_t bytes)
{
    for (size_t i = 0; i < area_bytes; i++) {
        uint8_t want = i >= at && i < at + bytes ? src[i - at] : 0xa5;
        if (area[i] != want)
            return false;
    }
    return true;
}

static void test_copies(epx__simd_t level, bool halves)
{
    static _Alignas(64) uint8_t area[COPY_MOST + 2 * GUARD], source[COPY_MOST + 64];
    static const size_t sizes[] = {0,   1,   2,   15,  16,  17,  31,  32,  33,  48,  63,  64,   65,   80,   112,
                                   127, 128, 129, 255, 256, 257, 272, 511, 512, 528, 777, 1024, 1040, 1599, 1600};
    for (size_t i = 0; i < sizeof source; i++)
        source[i] = (uint8_t)(i * 37 + (i >> 8));
    epx__simd_limit(level);
    epx__copy_halves(halves);
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
        for (size_t dst = 0; dst < 64; dst += dst % 16 == 0 ? 1 : 15)
            for (size_t src = 0; src < 64; src += 7)
                for (int streaming = 0; streaming < 2; streaming++) {
                    memset(area, 0xa5, sizeof area);
                    epx__copy_row(area + GUARD + dst, source + src, sizes[s], streaming);
                    epx__copy_fence();
                    CHECK(copied_exactly(area, sizeof area, GUARD + dst, source + src, sizes[s]),
                          "%s, %zu bytes, dst +%zu, src +%zu, streaming %d, halves %d", epx__simd_name(level), sizes[s],
                          dst, src, streaming, halves);
                }
}

/* ---- sums ---- */

#define ROWS_MOST 9
#define HIDDEN_MOST 400

static _Alignas(64) uint8_t inputs[ROWS_MOST + 2][HIDDEN_MOST * 4 + 64];
static _Alignas(64) uint8_t sum_area[HIDDEN_MOST * 4 + 2 * GUARD];
static float partial[HIDDEN_MOST + 32];

static bool is_nan_at(const void *array, size_t i, epx_dtype_t dtype)
{
    float value = epx__dtype_load(array, i, dtype);
    return value != value;
}

/* Are the two the same bits, or NaNs both? */
static bool same_element(const void *a, const void *b, size_t i, epx_dtype_t dtype)
{
    size_t element = epx__dtype_bytes(dtype);
    if (is_nan_at(a, i, dtype) || is_nan_at(b, i, dtype))
        return is_nan_at(a, i, dtype) && is_nan_at(b, i, dtype);
    return memcmp((const uint8_t *)a + i * element, (const uint8_t *)b + i * element, element) == 0;
}

/* Zeros of both signs, infinities, NaNs, denormals, the largest, ties; else any bits, mostly of near exponents. */
static void put_any(void *array, size_t i, epx_dtype_t dtype)
{
    static const uint32_t special[] = {0,          0x80000000, 0x7f800000, 0xff800000, 0x7fc00000, 0xffc12345,
                                       0x7f800001, 0x00000001, 0x80000001, 0x007fffff, 0x00800000, 0x7f7fffff,
                                       0xff7fffff, 0x3f808000, 0x3f818000, 0x33000000, 0x33000001, 0x477ff000,
                                       0x477fefff, 0x38800000, 0x387fe000, 0x7f7f8000, 0x00008000, 0x00018000};
    uint64_t random = next_random();
    uint32_t bits = (uint32_t)(random >> 32);
    if (random % 8 == 0)
        bits = special[(random >> 8) % (sizeof special / sizeof *special)];
    else if (random % 8 < 5)
        bits = (bits & 0x807fffffu) | (uint32_t)(120 + (random >> 8) % 16) << 23;
    if (dtype == EPX_FP32)
        memcpy((uint8_t *)array + 4 * i, &bits, 4);
    else if (random % 8 == 1 || random % 8 == 6)
        memcpy((uint8_t *)array + 2 * i, &bits, 2); /* any 16 bits */
    else
        epx__dtype_store(array, i, dtype, epx__f32_of_bits(bits));
}

/* The definition in copy.h, element by element. */
static void sum_plainly(void *out, const void *const *rows, int count, const void *const *bias, int biases,
                        size_t hidden, epx_dtype_t dtype)
{
    for (size_t i = 0; i < hidden; i++) {
        volatile float sum = 0.0f; /* volatile: each add is rounded to fp32, none fused or reordered */
        for (int r = 0; r < count; r++)
            sum = sum + epx__dtype_load(rows[r], i, dtype);
        for (int b = 0; b < biases; b++)
            sum = sum + epx__dtype_load(bias[b], i, dtype);
        epx__dtype_store(out, i, dtype, sum);
    }
}

static void fill_inputs(epx_dtype_t dtype)
{
    for (int r = 0; r < ROWS_MOST + 2; r++)
        for (size_t i = 0; i < sizeof inputs[r] / epx__dtype_bytes(dtype); i++)
            put_any(inputs[r], i, dtype);
}

static bool guards_whole(size_t at, size_t bytes)
{
    for (size_t i = 0; i < sizeof sum_area; i++)
        if ((i < at || i >= at + bytes) && sum_area[i] != 0xa5)
            return false;
    return true;
}

static void check_row(const char *what, epx__simd_t level, const void *want, size_t at, size_t hidden, int count,
                      epx_dtype_t dtype)
{
    CHECK(guards_whole(at, hidden * epx__dtype_bytes(dtype)), "%s, %s wrote beside its row, hidden %zu", what,
          epx__simd_name(level), hidden);
    for (size_t i = 0; i < hidden; i++)
        CHECK(same_element(sum_area + at, want, i, dtype), "%s, %s, element %zu of %zu, %d rows, dtype %d", what,
              epx__simd_name(level), i, hidden, count, dtype);
}

static void test_sum(epx__simd_t level, epx_dtype_t dtype, size_t hidden, int count, int biases, size_t offset,
                     bool streaming)
{
    static _Alignas(64) uint8_t want[HIDDEN_MOST * 4];
    const void *rows[ROWS_MOST], *bias[2] = {inputs[ROWS_MOST] + 16, inputs[ROWS_MOST + 1]};
    for (int r = 0; r < count; r++)
        rows[r] = inputs[r] + 16 * (size_t)(r % 4);
    sum_plainly(want, rows, count, bias, biases, hidden, dtype);
    epx__simd_limit(level);
    memset(sum_area, 0xa5, sizeof sum_area);
    epx__sum_rows(sum_area + GUARD + offset, rows, count, biases ? bias : NULL, biases, hidden, dtype, streaming);
    epx__copy_fence();
    check_row("sum", level, want, GUARD + offset, hidden, count + biases, dtype);

    /* In two halves, through fp32 partial sums: the same. */
    int half = count / 2;
    epx__sum_rows_f32(partial, true, rows, half, hidden, dtype);
    epx__sum_rows_f32(partial, false, rows + half, count - half, hidden, dtype);
    epx__sum_rows_f32(partial, false, bias, biases, hidden, dtype);
    memset(sum_area, 0xa5, sizeof sum_area);
    epx__round_row(sum_area + GUARD + offset, partial, hidden, dtype, streaming);
    epx__copy_fence();
    check_row("partial sums", level, want, GUARD + offset, hidden, count + biases, dtype);
}

static void test_sums(epx__simd_t level)
{
    static const size_t sizes[] = {0, 8, 16, 24, 32, 40, 64, 72, 96, 128, 136, 264, 400};
    for (int d = EPX_BF16; d <= EPX_FP32; d++) {
        fill_inputs((epx_dtype_t)d);
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
            for (int count = 0; count <= ROWS_MOST; count++)
                test_sum(level, (epx_dtype_t)d, sizes[s], count, count % 3, 16 * (next_random() % 4),
                         next_random() % 2);
    }
}

/* What order and start mean: known answers. */
static void test_known_sums(epx__simd_t level)
{
    enum { HIDDEN = 32 };
    _Alignas(64) uint16_t big[HIDDEN], minus[HIDDEN], one[HIDDEN], negative_zero[HIDDEN], out[HIDDEN];
    for (int i = 0; i < HIDDEN; i++) {
        big[i] = epx__bf16_of_f32(33554432.0f); /* 2^25: 1 is lost beside it */
        minus[i] = epx__bf16_of_f32(-33554432.0f);
        one[i] = epx__bf16_of_f32(1.0f);
        negative_zero[i] = 0x8000;
    }
    epx__simd_limit(level);
    epx__sum_rows(out, (const void *[]){big, one, minus}, 3, NULL, 0, HIDDEN, EPX_BF16, false);
    CHECK(out[0] == 0 && out[31] == 0, "%s: (big + 1) - big is 0 in fp32", epx__simd_name(level));
    epx__sum_rows(out, (const void *[]){big, minus, one}, 3, NULL, 0, HIDDEN, EPX_BF16, false);
    CHECK(out[0] == 0x3f80 && out[31] == 0x3f80, "%s: (big - big) + 1 is 1", epx__simd_name(level));
    epx__sum_rows(out, (const void *[]){negative_zero}, 1, NULL, 0, HIDDEN, EPX_BF16, false);
    CHECK(out[0] == 0, "%s: +0 + -0 is +0", epx__simd_name(level));
    epx__sum_rows(out, NULL, 0, NULL, 0, HIDDEN, EPX_BF16, false);
    CHECK(out[0] == 0 && out[31] == 0, "%s: no rows make zeros", epx__simd_name(level));
    /* 1 + 2^-8 + 2^-8 is 1 + 2^-7 when rounded once, 1 when rounded to bf16 after each add. */
    uint16_t small[HIDDEN];
    for (int i = 0; i < HIDDEN; i++)
        small[i] = epx__bf16_of_f32(0.00390625f);
    epx__sum_rows(out, (const void *[]){one, small, small}, 3, NULL, 0, HIDDEN, EPX_BF16, false);
    CHECK(out[0] == 0x3f81 && out[31] == 0x3f81, "%s: rounds once (%#x)", epx__simd_name(level), out[0]);
}

/* fp32 sums whose every bit pattern of 16-bit rounding is met: a sweep over the high bits with all kinds of low bits.
 */
static void test_rounding_sweep(epx__simd_t level, epx_dtype_t dtype)
{
    static const uint32_t low[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0xfff, 0x1000, 0x1001, 0x1fff, 0x3000, 0x2fff};
    static _Alignas(64) float values[65536];
    static _Alignas(64) uint16_t out[65536];
    epx__simd_limit(level);
    for (size_t l = 0; l < sizeof low / sizeof *low; l++) {
        for (uint32_t high = 0; high < 65536; high++)
            values[high] = epx__f32_of_bits(high << 16 | low[l]);
        epx__round_row(out, values, 65536, dtype, false);
        long wrong = 0;
        for (uint32_t high = 0; high < 65536; high++) {
            uint16_t want;
            epx__dtype_store(&want, 0, dtype, values[high]);
            wrong += !(out[high] == want || (is_nan_at(&want, 0, dtype) && is_nan_at(out, high, dtype)));
        }
        CHECK(wrong == 0, "%s, dtype %d, low bits %#x: %ld of 65536 rounded wrongly", epx__simd_name(level), dtype,
              low[l], wrong);
    }
}

static void test_choose(void)
{
    bool streaming;
    const char *why = NULL;
    epx__simd_limit(EPX__SIMD_AVX512);
    setenv("EPX_STREAMING", "0", 1);
    epx__copy_choose(&streaming, &why);
    CHECK(!streaming && why && strstr(why, "EPX_STREAMING=0"), "%s", why);
    setenv("EPX_STREAMING", "halves", 1);
    epx__copy_choose(&streaming, &why);
    CHECK(streaming == (epx__simd_level() > EPX__SIMD_NONE) && (!streaming || strstr(why, "halves")), "%s", why);
    unsetenv("EPX_STREAMING");
    epx__copy_choose(&streaming, &why);
    CHECK(streaming == (epx__simd_level() > EPX__SIMD_NONE && !EPX__TSAN) && why, "%s", why);
    setenv("EPX_STREAMING", "1", 1);
    epx__simd_limit(EPX__SIMD_NONE);
    epx__copy_choose(&streaming, &why);
    CHECK(!streaming, "cannot stream in portable C: %s", why);
    unsetenv("EPX_STREAMING");
    epx__simd_limit(EPX__SIMD_AVX512);
}

int main(void)
{
    epx__simd_t best = epx__simd_level();
    printf("this CPU: up to %s\n", epx__simd_name(best));
    for (int level = EPX__SIMD_NONE; level <= (int)best; level++) {
        test_copies((epx__simd_t)level, true);
        test_copies((epx__simd_t)level, false);
        test_sums((epx__simd_t)level);
        test_known_sums((epx__simd_t)level);
        test_rounding_sweep((epx__simd_t)level, EPX_BF16);
        test_rounding_sweep((epx__simd_t)level, EPX_FP16);
    }
    test_choose();
    return check_done();
}
