/*
 * Row copies and sums on the CPU. Every function is exact in what it computes, whatever instructions it picks.
 */
#ifndef EPX_DEVICE_CPU_COPY_H
#define EPX_DEVICE_CPU_COPY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <epx/epx.h>

/* Chosen once (EPX_STREAMING, CPU features); `why` for epx info. */
void epx__copy_choose(bool *streaming, const char **why);

/* In this process, with AVX-512: half of each row by plain stores. choose calls it; tests too. */
void epx__copy_halves(bool halves);

/* Copy with stores that bypass the cache (streaming) or plain ones. Any alignment of src; dst 16-aligned to stream. */
void epx__copy_row(void *dst, const void *src, size_t bytes, bool streaming);

/* Order this thread's streaming stores before its next release store. */
void epx__copy_fence(void);

/*
 * out[i] = round(((0.0f + rows[0][i]) + rows[1][i]) + ... + bias[0][i] + bias[1][i]) over `hidden` elements: fp32 adds
 * in the order given, no fused multiply-add, one rounding to nearest even. count may be 0. Rows 16-byte aligned, all of
 * `dtype`. out as dtype; streaming as above.
 */
void epx__sum_rows(void *out, const void *const *rows, int count, const void *const *bias, int biases, size_t hidden,
                   epx_dtype_t dtype, bool streaming);

/* The same into fp32 partial sums: acc[i] = (first ? 0.0f : acc[i]) + rows..., no rounding; and its end: round to
 * dtype. */
void epx__sum_rows_f32(float *acc, bool first, const void *const *rows, int count, size_t hidden, epx_dtype_t dtype);
void epx__round_row(void *out, const float *acc, size_t hidden, epx_dtype_t dtype, bool streaming);

/* A pool of threads that run one job in parts. threads counts the caller. */
typedef struct epx__workers epx__workers_t;
epx_status_t epx__workers_create(int threads, epx__workers_t **workers);
void epx__workers_destroy(epx__workers_t *workers);
int epx__workers_count(const epx__workers_t *workers);
/* Run part 0 .. threads-1 of the job, part 0 on the caller; returns when all have ended. Idle workers sleep. */
void epx__workers_run(epx__workers_t *workers, void (*job)(void *context, int part, int parts), void *context);

#endif
