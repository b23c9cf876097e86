/*
 * Which vector instructions the copies and sums use: what the CPU has, or less when a test says so.
 */
#ifndef EPX_DEVICE_CPU_SIMD_H
#define EPX_DEVICE_CPU_SIMD_H

typedef enum epx__simd {
    EPX__SIMD_NONE = 0,  /* portable C */
    EPX__SIMD_SSE2 = 1,  /* every x86-64 */
    EPX__SIMD_AVX2 = 2,  /* and F16C */
    EPX__SIMD_AVX512 = 3 /* F, BW, VL, DQ */
} epx__simd_t;

epx__simd_t epx__simd_level(void);
const char *epx__simd_name(epx__simd_t level);

/* For tests: use at most `level` from now on. */
void epx__simd_limit(epx__simd_t level);

#endif
