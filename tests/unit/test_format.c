/*
 * Number formats against a slow exact rounding: every value of a format is known as a double, the neighbours of a
 * number are found by search, and the nearer one wins (ties: even). All 65536 fp16 and bf16, all 256 e4m3, every
 * half-way point and its neighbours, and random fp32.
 */
#include "common/check.h"
#include "plan/format.h"

#include <math.h>
#include <stdint.h>

typedef struct format {
    const char *name;
    uint32_t values; /* non-negative finite ones: bits 0 .. values - 1, ascending */
    uint32_t sign;   /* its bit */
    uint32_t beyond; /* what rounds beyond the largest */
    double limit;    /* from here on `beyond` */
    double (*value)(uint32_t bits);
    uint32_t (*round)(float x);
    float (*load)(uint32_t bits);
    int (*is_nan)(uint32_t bits);
} format_t;

/* ---- the formats by definition ---- */

static double value_of(uint32_t bits, int mantissa_bits, int bias)
{
    uint32_t exponent = bits >> mantissa_bits, mantissa = bits & ((1u << mantissa_bits) - 1);
    if (exponent == 0)
        return ldexp((double)mantissa, 1 - bias - mantissa_bits);
    return ldexp((double)(mantissa | 1u << mantissa_bits), (int)exponent - bias - mantissa_bits);
}
static double fp16_value(uint32_t bits)
{
    return value_of(bits, 10, 15);
}
static double bf16_value(uint32_t bits)
{
    return value_of(bits, 7, 127);
}
static double e4m3_value(uint32_t bits)
{
    return value_of(bits, 3, 7);
}
static uint32_t fp16_round(float x)
{
    return epx__fp16_of_f32(x);
}
static uint32_t bf16_round(float x)
{
    return epx__bf16_of_f32(x);
}
static uint32_t e4m3_round(float x)
{
    return epx__e4m3_of_f32(x);
}
static float fp16_load(uint32_t bits)
{
    return epx__f32_of_fp16((uint16_t)bits);
}
static float bf16_load(uint32_t bits)
{
    return epx__f32_of_bf16((uint16_t)bits);
}
static float e4m3_load(uint32_t bits)
{
    return epx__f32_of_e4m3((uint8_t)bits);
}
static int fp16_nan(uint32_t bits)
{
    return (bits & 0x7fff) > 0x7c00;
}
static int bf16_nan(uint32_t bits)
{
    return (bits & 0x7fff) > 0x7f80;
}
static int e4m3_nan(uint32_t bits)
{
    return (bits & 0x7f) == 0x7f;
}

static const format_t formats[] = {
    {"fp16", 0x7c00, 0x8000, 0x7c00, 65520.0, fp16_value, fp16_round, fp16_load, fp16_nan},
    {"bf16", 0x7f80, 0x8000, 0x7f80, 0x1.ffp127, bf16_value, bf16_round, bf16_load, bf16_nan},
    {"e4m3", 0x7f, 0x80, 0x7e, 448.0, e4m3_value, e4m3_round, e4m3_load, e4m3_nan},
};

static uint32_t slow_round(const format_t *f, float x)
{
    double a = fabs((double)x);
    uint32_t sign = signbit(x) ? f->sign : 0, low = 0, high = f->values - 1;
    if (a >= f->limit)
        return sign | f->beyond;
    if (a >= f->value(high))
        return sign | high;  /* between the largest and the limit */
    while (high - low > 1) { /* value(low) <= a < value(high) */
        uint32_t middle = (low + high) / 2;
        if (f->value(middle) <= a)
            low = middle;
        else
            high = middle;
    }
    double down = a - f->value(low), up = f->value(high) - a; /* exact: a double has the bits */
    if (down != up)
        return sign | (down < up ? low : high);
    return sign | (low & 1 ? high : low);
}

static void check_round(const format_t *f, float x)
{
    uint32_t got = f->round(x);
    if (isnan(x)) {
        CHECK(f->is_nan(got), "%s of NaN %08x is %04x", f->name, epx__bits_of_f32(x), got);
        return;
    }
    uint32_t want = slow_round(f, x);
    CHECK(got == want, "%s of %a: %04x, should be %04x", f->name, (double)x, got, want);
}

/* ---- tests ---- */

static void every_value(const format_t *f)
{
    for (uint32_t bits = 0; bits < f->sign * 2; bits++) {
        float x = f->load(bits);
        uint32_t magnitude = bits & (f->sign - 1);
        if (f->is_nan(bits)) {
            CHECK(isnan(x), "%s %04x is %a", f->name, bits, (double)x);
            CHECK(f->is_nan(f->round(x)), "%s %04x does not stay NaN", f->name, bits);
        } else if (magnitude >= f->values) {
            CHECK(isinf(x) && !signbit(x) == !(bits & f->sign), "%s %04x is %a", f->name, bits, (double)x);
            CHECK(f->round(x) == bits, "%s infinity", f->name);
        } else {
            double want = f->value(magnitude) * (bits & f->sign ? -1.0 : 1.0);
            CHECK((double)x == want && !signbit(x) == !(bits & f->sign), "%s %04x is %a, should be %a", f->name, bits,
                  (double)x, want);
            CHECK(f->round(x) == bits, "%s %04x -> %a -> %04x", f->name, bits, (double)x, f->round(x));
        }
    }
}

static void every_half_way(const format_t *f)
{
    for (uint32_t bits = 0; bits < f->values; bits++) {
        double next = bits + 1 < f->values ? f->value(bits + 1) : f->limit;
        float half = (float)((f->value(bits) + next) / 2);
        for (int sign = 0; sign < 2; sign++) {
            check_round(f, sign ? -half : half);
            check_round(f, sign ? -nextafterf(half, INFINITY) : nextafterf(half, INFINITY));
            check_round(f, sign ? -nextafterf(half, 0.0f) : nextafterf(half, 0.0f));
        }
    }
}

static uint32_t random_bits(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 32);
}

static void random_values(const format_t *f)
{
    uint64_t state = 1;
    for (int i = 0; i < 1000000; i++) {
        uint32_t bits = random_bits(&state);
        if (i % 2) /* half of them in the formats' own range */
            bits = (bits & 0x807fffffu) | ((90 + random_bits(&state) % 60) << 23);
        check_round(f, epx__f32_of_bits(bits));
    }
}

static void scales(void)
{
    for (int v = 0; v < 255; v++) {
        float x = epx__f32_of_ue8m0((uint8_t)v);
        CHECK((double)x == ldexp(1.0, v - 127), "ue8m0 %d is %a", v, (double)x);
        if (v > 0) {
            CHECK(epx__ue8m0_of_f32_up(x) == v, "ue8m0 of %a", (double)x);
            CHECK(v == 254 || epx__ue8m0_of_f32_up(nextafterf(x, INFINITY)) == v + 1, "ue8m0 above %a", (double)x);
        }
    }
    CHECK(isnan(epx__f32_of_ue8m0(255)));
    uint8_t four[4] = {1, 127, 200, 254};
    int32_t packed = epx__ue8m0_pack(four);
    CHECK((uint32_t)packed == 0xfec87f01u, "%08x", (uint32_t)packed);
    for (int i = 0; i < 4; i++)
        CHECK(epx__ue8m0_unpack(packed, i) == four[i]);
    CHECK(epx__fp8_scale(0.0f, 0) == 1e-4f / 448.0f);
    CHECK(epx__fp8_scale(448.0f, 0) == 1.0f && epx__fp8_scale(448.0f, 1) == 1.0f);
    CHECK(epx__fp8_scale(449.0f, 1) == 2.0f);
    CHECK(epx__fp8_amax(3.0f, -4.0f) == 4.0f && epx__fp8_amax(3.0f, NAN) == 3.0f);
    CHECK(epx__fp8_quantise(NAN, 1.0f) == 0x7f && epx__fp8_quantise(-INFINITY, 1.0f) == 0xfe);
}

/* Each element comes back within half a step: 2^-4 of itself, or half the least denormal. */
static void rows(int round_scale)
{
    enum { HIDDEN = 640 };
    static float x[HIDDEN];
    static uint8_t q[HIDDEN];
    float scale[5];
    int32_t packed[2];
    uint64_t state = 7;
    for (int pass = 0; pass < 200; pass++) {
        for (int i = 0; i < HIDDEN; i++)
            x[i] = ldexpf((float)(int32_t)random_bits(&state), (int)(random_bits(&state) % 20) - 40 + pass % 30);
        epx__fp8_row(x, EPX_FP32, HIDDEN, round_scale, q, scale, packed);
        for (int i = 0; i < HIDDEN; i++) {
            double s = scale[i / 128], got = (double)epx__fp8_value(q[i], scale[i / 128]);
            double bound = fabs((double)x[i]) * (0x1p-4 + 0x1p-20) + s * 0x1p-10;
            CHECK(fabs(got - (double)x[i]) <= bound, "%a came back as %a, scale %a", (double)x[i], got, s);
        }
        for (int b = 0; b < 5; b++) {
            float amax = 0.0f;
            for (int i = b * 128; i < b * 128 + 128; i++)
                amax = fmaxf(amax, fabsf(x[i]));
            float exact = fmaxf(amax, 1e-4f) / 448.0f;
            CHECK(round_scale ? scale[b] >= exact && scale[b] < 2 * exact : scale[b] == exact);
            CHECK(!round_scale || epx__f32_of_ue8m0(epx__ue8m0_unpack(packed[b / 4], b % 4)) == scale[b]);
        }
        CHECK(((uint32_t)packed[1] & 0xffffff00u) == 0, "unused bytes %08x", (uint32_t)packed[1]);
    }
}

int main(void)
{
    for (size_t f = 0; f < sizeof formats / sizeof *formats; f++) {
        every_value(&formats[f]);
        every_half_way(&formats[f]);
        random_values(&formats[f]);
    }
    scales();
    rows(0);
    rows(1);
    return check_done();
}
