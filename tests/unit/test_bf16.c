/*
 * Weighing rows of bf16, and quantising them of bf16 with vector instructions against plan/format.h's plain loop, bit
 * for bit: every bf16 number under many scales, NaNs and infinities among them, by every set of instructions that this
 * CPU has.
 */
#include <stdlib.h>
#include <string.h>

#include "common/check.h"
#include "device/cpu/bf16.h"
#include "device/cpu/simd.h"
#include "plan/format.h"

enum { BLOCK = EPX__FP8_BLOCK, HIDDEN = 8 * BLOCK };

static uint64_t state = 88172645463325252ull;

static uint32_t draw(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32);
}

static void compare(const uint16_t *x, size_t hidden, bool round_scale, const char *what)
{
    uint8_t want[HIDDEN], got[HIDDEN];
    float want_scale[HIDDEN / BLOCK], got_scale[HIDDEN / BLOCK];
    epx__fp8_row(x, EPX_BF16, hidden, round_scale, want, want_scale, NULL);
    epx__fp8_row_bf16(x, hidden, round_scale, got, got_scale);
    CHECK(memcmp(want_scale, got_scale, hidden / BLOCK * sizeof(float)) == 0, "%s: scales", what);
    for (size_t i = 0; i < hidden; i++)
        if (want[i] != got[i]) {
            CHECK(false, "%s: element %zu, bf16 %04x, is %02x, not %02x", what, i, x[i], got[i], want[i]);
            return;
        }
    CHECK(true, "%s", what);
}

/* Every number once, with a largest one beside it that sets the scale. */
static void every_number(bool round_scale)
{
    static const uint16_t largest[] = {0x3f80, 0x43e0, 0x0001, 0x7f7f, 0x3803, 0x4300, 0x7f80, 0x0000};
    uint16_t x[HIDDEN];
    for (size_t l = 0; l < sizeof largest / sizeof *largest; l++)
        for (uint32_t first = 0; first < 65536; first += HIDDEN) {
            for (uint32_t i = 0; i < HIDDEN; i++)
                x[i] = i % BLOCK == 0 ? largest[l] : (uint16_t)(first + i);
            compare(x, HIDDEN, round_scale, "every number");
        }
}

/* Numbers of about one size, as activations are: then all the roundings near the scale's steps come up. */
static void alike(bool round_scale)
{
    uint16_t x[HIDDEN];
    for (int turn = 0; turn < 2000; turn++) {
        uint32_t exponent = draw() % 250, spread = 1 + draw() % 14;
        size_t hidden = BLOCK * (1 + draw() % (HIDDEN / BLOCK));
        for (size_t i = 0; i < hidden; i++)
            x[i] = (uint16_t)((draw() & 0x8000u) | (exponent + draw() % spread) % 255 << 7 | (draw() & 127u));
        compare(x, hidden, round_scale, "alike");
    }
}

static void weighed(void)
{
    static const float weights[] = {1.0f, 0.1f, -3.7f, 1e-30f, 0.0f};
    uint16_t x[HIDDEN];
    float want[HIDDEN], got[HIDDEN];
    for (size_t w = 0; w < sizeof weights / sizeof *weights; w++) {
        size_t hidden = HIDDEN - draw() % 40;
        for (size_t i = 0; i < hidden; i++) {
            x[i] = (uint16_t)((draw() & 0x8000u) | (100 + draw() % 40) << 7 | (draw() & 127u));
            want[i] = got[i] = (float)(int32_t)draw() * 1e-9f;
        }
        epx__weigh_row_bf16(got, x, weights[w], hidden);
        for (size_t i = 0; i < hidden; i++)
            want[i] = epx__f32_add(want[i], epx__f32_mul(weights[w], epx__f32_of_bf16(x[i])));
        CHECK(memcmp(want, got, hidden * sizeof *got) == 0, "weight %g, %zu elements", (double)weights[w], hidden);
    }
}

int main(void)
{
    epx__simd_t best = epx__simd_level();
    for (int level = EPX__SIMD_NONE; level <= (int)best; level++) {
        epx__simd_limit((epx__simd_t)level);
        weighed();
        for (int round_scale = 0; round_scale < 2; round_scale++) {
            every_number(round_scale);
            alike(round_scale);
        }
    }
    return check_done();
}
