/*
 * The inside of row sums: one shape of work that every entry of copy.h reduces to, and its versions.
 *
 *     v = acc ? acc[i] : +0.0f;  v += rows[0][i], rows[1][i] ...;  v += bias[0][i] ...;  out[i] = round(v)
 *
 * for i in [begin, end). All adds in fp32, in this order; every version gives the same bits (NaN payloads aside).
 */
#ifndef EPX_DEVICE_CPU_SUM_H
#define EPX_DEVICE_CPU_SUM_H

#include <stdbool.h>
#include <stddef.h>

#include <epx/epx.h>

typedef struct epx__sum {
    void *out;
    epx_dtype_t out_dtype;
    const float *acc; /* NULL: start from +0.0f. May be `out` */
    const void *const *rows;
    int count;
    const void *const *bias;
    int biases;
    epx_dtype_t dtype; /* of rows and bias */
} epx__sum_t;

/* Elements that the vector versions do at once: a cache line of 16-bit output. */
#define EPX__SUM_BLOCK 32

void epx__sum_portable(const epx__sum_t *sum, size_t begin, size_t end);

#if defined(__x86_64__)
/* end - begin is a multiple of EPX__SUM_BLOCK. Streaming: &out[begin] is 64-aligned. */
void epx__sum_avx2(const epx__sum_t *sum, size_t begin, size_t end, bool streaming);
void epx__sum_avx512(const epx__sum_t *sum, size_t begin, size_t end, bool streaming);
#endif

#endif
