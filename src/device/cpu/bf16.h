/* Rows of bf16 on the CPU, with the vector instructions it has (simd.h). */
#ifndef EPX_DEVICE_CPU_BF16_H
#define EPX_DEVICE_CPU_BF16_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* epx__fp8_row, the same bits: e4m3 [hidden], scales [hidden / 128]. hidden is a multiple of 128. */
void epx__fp8_row_bf16(const uint16_t *x, size_t hidden, bool round_scale, uint8_t *e4m3, float *scales);

/* sum[i] += weight * x[i]: the product is rounded, then the sum. */
void epx__weigh_row_bf16(float *sum, const uint16_t *x, float weight, size_t hidden);

#endif
