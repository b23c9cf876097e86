/*
 * Sums of rows: the entries of copy.h, the portable version, and how a row is cut for the vector versions (sum_x86.c).
 */
#include "device/cpu/sum.h"

#include <stdint.h>
#include <string.h>

#include "device/cpu/copy.h"
#include "device/cpu/simd.h"
#include "plan/format.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* ---- portable ---- */

/* dtype and count are constants at each call below, so that compilers can vectorise the loops. */
ALWAYS_INLINE void add_row(float *sum, const void *row, size_t at, size_t count, epx_dtype_t dtype)
{
    for (size_t i = 0; i < count; i++)
        sum[i] = sum[i] + epx__dtype_load(row, at + i, dtype);
}

ALWAYS_INLINE void add_any_row(float *sum, const void *row, size_t at, size_t count, epx_dtype_t dtype)
{
    if (dtype == EPX_FP32)
        add_row(sum, row, at, count, EPX_FP32);
    else if (dtype == EPX_FP16)
        add_row(sum, row, at, count, EPX_FP16);
    else
        add_row(sum, row, at, count, EPX_BF16);
}

ALWAYS_INLINE void round_any(void *out, const float *sum, size_t at, size_t count, epx_dtype_t dtype)
{
    if (dtype == EPX_FP32)
        memcpy((float *)out + at, sum, count * sizeof *sum);
    else if (dtype == EPX_FP16)
        for (size_t i = 0; i < count; i++)
            ((uint16_t *)out)[at + i] = epx__fp16_of_f32(sum[i]);
    else
        for (size_t i = 0; i < count; i++)
            ((uint16_t *)out)[at + i] = epx__bf16_of_f32(sum[i]);
}

ALWAYS_INLINE void sum_block(const epx__sum_t *sum, size_t at, size_t count)
{
    float part[EPX__SUM_BLOCK];
    for (size_t i = 0; i < count; i++)
        part[i] = sum->acc ? sum->acc[at + i] : 0.0f;
    for (int r = 0; r < sum->count; r++)
        add_any_row(part, sum->rows[r], at, count, sum->dtype);
    for (int b = 0; b < sum->biases; b++)
        add_any_row(part, sum->bias[b], at, count, sum->dtype);
    round_any(sum->out, part, at, count, sum->out_dtype);
}

void epx__sum_portable(const epx__sum_t *sum, size_t begin, size_t end)
{
    size_t at = begin;
    for (; at + EPX__SUM_BLOCK <= end; at += EPX__SUM_BLOCK)
        sum_block(sum, at, EPX__SUM_BLOCK);
    if (at < end)
        sum_block(sum, at, end - at);
}

/* ---- cutting a row: up to out's first whole line, whole blocks, the rest ---- */

static void run(const epx__sum_t *sum, size_t hidden, bool streaming)
{
#if defined(__x86_64__)
    epx__simd_t level = epx__simd_level();
    if (level >= EPX__SIMD_AVX2) {
        size_t element = epx__dtype_bytes(sum->out_dtype);
        uintptr_t past = (uintptr_t)sum->out & 63;
        streaming = streaming && past % element == 0;
        size_t head = streaming && past ? (64 - past) / element : 0;
        if (head > hidden)
            head = hidden;
        size_t blocks_end = hidden - (hidden - head) % EPX__SUM_BLOCK;
        epx__sum_portable(sum, 0, head);
        if (level >= EPX__SIMD_AVX512)
            epx__sum_avx512(sum, head, blocks_end, streaming);
        else
            epx__sum_avx2(sum, head, blocks_end, streaming);
        epx__sum_portable(sum, blocks_end, hidden);
        return;
    }
#endif
    (void)streaming;
    epx__sum_portable(sum, 0, hidden);
}

/* ---- entries ---- */

void epx__sum_rows(void *out, const void *const *rows, int count, const void *const *bias, int biases, size_t hidden,
                   epx_dtype_t dtype, bool streaming)
{
    epx__sum_t sum = {
        .out = out, .out_dtype = dtype, .rows = rows, .count = count, .bias = bias, .biases = biases, .dtype = dtype};
    run(&sum, hidden, streaming);
}

void epx__sum_rows_f32(float *acc, bool first, const void *const *rows, int count, size_t hidden, epx_dtype_t dtype)
{
    epx__sum_t sum = {
        .out = acc, .out_dtype = EPX_FP32, .acc = first ? NULL : acc, .rows = rows, .count = count, .dtype = dtype};
    run(&sum, hidden, false); /* it is read again soon */
}

void epx__round_row(void *out, const float *acc, size_t hidden, epx_dtype_t dtype, bool streaming)
{
    epx__sum_t sum = {.out = out, .out_dtype = dtype, .acc = acc, .dtype = dtype};
    run(&sum, hidden, streaming);
}
