/*
 * The command's number formats (tools/epx/numbers.h) and the library's (plan/format.h) were written apart. They must
 * agree on every bf16, fp16 and e4m3 value and on many fp32 values, those halfway between two neighbours among them,
 * and on the scales of fp8 blocks. The command's vector sums must agree with its plain ones.
 */
#include "common/check.h"
#include "plan/format.h"

#include "../../tools/epx/numbers.h"
#include "../../tools/epx/pattern.h"
#include "../../tools/epx/sumrows.h"

#include <string.h>

static uint64_t state = 1;

static uint32_t next(void)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}

static int is_nan(float value)
{
    return value != value;
}

static void narrow(uint32_t bits)
{
    float value = number_from_bits(bits);
    if (is_nan(value)) {
        CHECK(is_nan(number_from_bf16(number_to_bf16(value))), "bits %08x", bits);
        CHECK(is_nan(number_from_fp16(number_to_fp16(value))), "bits %08x", bits);
        return;
    }
    CHECK(number_to_bf16(value) == epx__bf16_of_f32(value), "bits %08x", bits);
    CHECK(number_to_fp16(value) == epx__fp16_of_f32(value), "bits %08x", bits);
}

static void test_formats(void)
{
    for (uint32_t half = 0; half < 65536; half++) {
        float a = number_from_bf16((uint16_t)half), b = epx__f32_of_bf16((uint16_t)half);
        CHECK(number_to_bits(a) == number_to_bits(b), "bf16 %04x", half);
        a = number_from_fp16((uint16_t)half);
        b = epx__f32_of_fp16((uint16_t)half);
        CHECK(number_to_bits(a) == number_to_bits(b) || (is_nan(a) && is_nan(b)), "fp16 %04x", half);
        narrow(half << 16);
        narrow(half << 16 | 0x8000); /* halfway between two bf16 */
        narrow(half << 16 | 0x7fff);
        narrow(half << 16 | 0x8001);
        uint32_t wide = number_to_bits(a);
        narrow(wide);
        narrow(wide | 0x1000); /* halfway between two normal fp16 */
        narrow(wide | 0x1001);
        narrow(wide | 0x0fff);
    }
    for (int i = 0; i < 500000; i++)
        narrow(next());
    for (int i = 0; i < 200000; i++) /* around fp16's subnormal numbers */
        narrow((next() & 0x80ffffffu) | 0x32000000u);
}

static void test_sums(void)
{
    enum { WIDE = 500 };
    static uint8_t memory[8][WIDE * 4] __attribute__((aligned(64))), out[2][WIDE * 4] __attribute__((aligned(64)));
    for (int format = PATTERN_BF16; format <= PATTERN_FP32; format++)
        for (int hidden = 0; hidden < WIDE; hidden += 1 + hidden / 9)
            for (int count = 0; count <= 8; count += 1 + count / 2) {
                size_t elem = format == PATTERN_FP32 ? 4 : 2;
                const void *rows[8];
                for (int r = 0; r < 8; r++) {
                    pattern_fill(memory[r], sizeof memory[r], pattern_key(7, 1, (uint32_t)r, (uint32_t)hidden, 0),
                                 (pattern_format_t)format);
                    rows[r] = memory[r];
                }
                memset(out, 0xaa, sizeof out);
                sumrows_plain(out[0], rows, count, 0, (size_t)hidden, (pattern_format_t)format);
                for (int streaming = 0; streaming < 2; streaming++) {
                    sumrows(out[1], rows, count, (size_t)hidden, (pattern_format_t)format, streaming);
                    sumrows_fence();
                    CHECK(memcmp(out[0], out[1], sizeof out[0]) == 0,
                          "format %d, hidden %d, %d rows, element bytes %zu", format, hidden, count, elem);
                }
            }
}

static void same_e4m3(uint32_t bits)
{
    float value = number_from_bits(bits);
    if (!is_nan(value) && !is_nan(value - value)) /* finite */
        CHECK(number_to_e4m3(value) == epx__e4m3_of_f32(value), "bits %08x", bits);
}

static void test_e4m3(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) { /* all values, those halfway to the next, and around both */
        uint32_t bits = epx__bits_of_f32(epx__f32_of_e4m3((uint8_t)byte));
        for (uint32_t near = 0; near < 3; near++) {
            same_e4m3(bits - 1 + near);
            same_e4m3((bits | 0x80000) - 1 + near);
        }
    }
    for (int i = 0; i < 300000; i++)
        same_e4m3(next());
    for (int i = 0; i < 300000; i++) /* where the subnormal numbers are */
        same_e4m3((next() & 0x83ffffffu) | 0x38000000u);
}

static void test_fp8_blocks(void)
{
    uint16_t x[NUMBER_FP8_BLOCK];
    uint8_t mine[NUMBER_FP8_BLOCK], theirs[NUMBER_FP8_BLOCK];
    for (int round = 0; round < 5000; round++) {
        uint16_t around = (uint16_t)(next() % 200 << 7); /* exponents up to this one's neighbours, none infinite */
        for (int i = 0; i < NUMBER_FP8_BLOCK; i++)
            x[i] = (uint16_t)((around + (next() & 0x3ff)) | (next() & 0x8000));
        x[round % NUMBER_FP8_BLOCK] = (uint16_t)(round % 3 ? 0 : x[0]);
        float scale, expect;
        number_fp8_block(x, mine, &scale);
        epx__fp8_row(x, EPX_BF16, NUMBER_FP8_BLOCK, 0, theirs, &expect, NULL);
        CHECK(number_to_bits(scale) == number_to_bits(expect), "round %d", round);
        CHECK(memcmp(mine, theirs, sizeof mine) == 0, "round %d", round);
    }
}

int main(void)
{
    test_formats();
    test_e4m3();
    test_fp8_blocks();
    test_sums();
    return check_done();
}
