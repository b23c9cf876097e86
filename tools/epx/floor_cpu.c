/*
 * What the CPU needs at least: the same rows copied to the same places (dispatch), the same sums read from the same
 * rows (combine), by as many threads as the library uses, on all ranks at once, with nothing counted and nothing waited
 * for. Plain and streaming stores are both there; bench takes the faster.
 */
#include "floor.h"

#include "sumrows.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

typedef struct floor floor_t;
typedef struct floor_worker {
    floor_t *floor;
    int part;
    pthread_t thread;
} floor_worker_t;

struct floor {
    floor_plan_t plan;
    uint8_t *out; /* [tokens][hidden]: where combine's sums go */
    floor_worker_t *worker;
    int workers; /* started, the caller not counted */
    pthread_barrier_t barrier;
    bool has_barrier, stop;
    floor_kind_t kind;
    int variant;
};

static void copy_streaming(void *dst, const void *src, size_t bytes)
{
#if defined(__x86_64__)
    __m128i *to = dst;
    const __m128i *from = src;
    size_t words = bytes / 16, i = 0;
    for (; i + 4 <= words; i += 4) {
        __m128i a = _mm_loadu_si128(from + i), b = _mm_loadu_si128(from + i + 1);
        __m128i c = _mm_loadu_si128(from + i + 2), d = _mm_loadu_si128(from + i + 3);
        _mm_stream_si128(to + i, a);
        _mm_stream_si128(to + i + 1, b);
        _mm_stream_si128(to + i + 2, c);
        _mm_stream_si128(to + i + 3, d);
    }
    for (; i < words; i++)
        _mm_stream_si128(to + i, _mm_loadu_si128(from + i));
    memcpy((uint8_t *)dst + words * 16, (const uint8_t *)src + words * 16, bytes - words * 16);
#else
    memcpy(dst, src, bytes);
#endif
}

#if defined(__x86_64__)
enum { AHEAD = 1024, MIXED_BYTES_LEAST = 4096 }; /* bytes; how far reads are asked for beforehand */

__attribute__((target("avx512f"))) static void copy_streaming_wide(void *dst, const void *src, size_t bytes)
{
    size_t head = (64 - ((uintptr_t)dst & 63)) & 63;
    if (head > bytes)
        head = bytes;
    copy_streaming(dst, src, head);
    uint8_t *to = (uint8_t *)dst + head;
    const uint8_t *from = (const uint8_t *)src + head;
    size_t lines = (bytes - head) / 64;
    for (size_t i = 0; i < lines; i++) {
        _mm_prefetch((const char *)from + 64 * i + AHEAD, _MM_HINT_T0);
        _mm512_stream_si512((__m512i *)(to + 64 * i), _mm512_loadu_si512(from + 64 * i));
    }
    copy_streaming(to + 64 * lines, from + 64 * lines, bytes - head - 64 * lines);
}

/* The first half of a row by streaming stores and the second by plain ones, in turn: a core waits for the two kinds in
 * different queues. */
__attribute__((target("avx512f"))) static void copy_mixed(void *dst, const void *src, size_t bytes)
{
    size_t head = (64 - ((uintptr_t)dst & 63)) & 63, half = bytes > head ? (bytes - head) / 128 * 64 : 0;
    if (half < MIXED_BYTES_LEAST) {
        copy_streaming_wide(dst, src, bytes);
        return;
    }
    copy_streaming(dst, src, head);
    char *to = (char *)dst + head, *plain = to + half;
    const char *from = (const char *)src + head, *second = from + half;
    for (size_t i = 0; i < half; i += 64) {
        _mm_prefetch(from + i + AHEAD, _MM_HINT_T0);
        _mm_prefetch(second + i + AHEAD, _MM_HINT_T0);
        if (i + AHEAD < half)
            __builtin_prefetch(plain + i + AHEAD, 1);
        _mm512_stream_si512((__m512i *)(to + i), _mm512_loadu_si512(from + i));
        _mm512_store_si512((__m512i *)(plain + i), _mm512_loadu_si512(second + i));
    }
    copy_streaming(to + 2 * half, from + 2 * half, bytes - head - 2 * half);
}
#endif

static void copy_row(void *dst, const void *src, size_t bytes, int variant)
{
#if defined(__x86_64__)
    if (variant >= 2) {
        if (variant == 2)
            copy_streaming_wide(dst, src, bytes);
        else
            copy_mixed(dst, src, bytes);
        return;
    }
#endif
    if (variant == 1)
        copy_streaming(dst, src, bytes);
    else
        memcpy(dst, src, bytes);
}

static void dispatch_part(const floor_t *floor, uint32_t begin, uint32_t end)
{
    const floor_plan_t *plan = &floor->plan;
    const uint8_t *x = plan->x;
    for (uint32_t token = begin; token < end; token++)
        for (int slot = 0; slot < plan->ranks; slot++) {
            size_t at = (size_t)token * (size_t)plan->ranks + (size_t)slot;
            int32_t to = plan->dst_rank[at];
            if (to < 0)
                break;
            copy_row(plan->area[to] + (size_t)plan->dst_row[at] * plan->row_bytes, x + token * plan->row_bytes,
                     plan->row_bytes, floor->variant);
        }
}

static void combine_part(const floor_t *floor, uint32_t begin, uint32_t end)
{
    const floor_plan_t *plan = &floor->plan;
    size_t row_bytes = (size_t)plan->hidden * (plan->format == PATTERN_FP32 ? 4 : 2);
    const void *rows[1024];
    for (uint32_t token = begin; token < end; token++) {
        int count = 0;
        for (int slot = 0; slot < plan->ranks && count < 1024; slot++) {
            size_t at = (size_t)token * (size_t)plan->ranks + (size_t)slot;
            int32_t from = plan->dst_rank[at];
            if (from < 0)
                break;
            rows[count++] = plan->area[from] + (size_t)plan->dst_row[at] * row_bytes;
        }
        sumrows(plan->out ? plan->out[token] : floor->out + token * row_bytes, rows, count, plan->hidden, plan->format,
                floor->variant > 0);
    }
}

static void run_part(const floor_t *floor, int part)
{
    uint64_t parts = (uint64_t)floor->workers + 1, tokens = floor->plan.tokens;
    uint32_t begin = (uint32_t)(tokens * (uint64_t)part / parts),
             end = (uint32_t)(tokens * ((uint64_t)part + 1) / parts);
    if (floor->kind == FLOOR_DISPATCH)
        dispatch_part(floor, begin, end);
    else
        combine_part(floor, begin, end);
    if (floor->variant > 0)
        sumrows_fence();
}

static void *worker_main(void *argument)
{
    floor_worker_t *worker = argument;
    for (;;) {
        pthread_barrier_wait(&worker->floor->barrier);
        if (worker->floor->stop)
            return NULL;
        run_part(worker->floor, worker->part);
        pthread_barrier_wait(&worker->floor->barrier);
    }
}

int floor_cpu_run(void *context, floor_kind_t kind, int variant)
{
    floor_t *floor = context;
    floor->kind = kind;
    floor->variant = variant;
    if (floor->workers)
        pthread_barrier_wait(&floor->barrier);
    run_part(floor, 0);
    if (floor->workers)
        pthread_barrier_wait(&floor->barrier);
    return 0;
}

/* All threads or none: a floor by fewer threads would flatter the library. */
static const char *start_workers(floor_t *floor, int threads)
{
    if (threads <= 1)
        return NULL;
    floor->worker = calloc((size_t)threads, sizeof *floor->worker);
    if (!floor->worker || pthread_barrier_init(&floor->barrier, NULL, (unsigned)threads))
        return "no memory for the floor's threads";
    floor->has_barrier = true;
    for (int i = 1; i < threads; i++) {
        floor->worker[i] = (floor_worker_t){floor, i, 0};
        if (pthread_create(&floor->worker[i].thread, NULL, worker_main, &floor->worker[i]))
            return "a thread of the floor could not be started";
        floor->workers++;
    }
    return NULL;
}

const char *floor_cpu_open(const floor_plan_t *plan, void **out)
{
    size_t out_bytes = (size_t)plan->tokens * plan->row_bytes;
    floor_t *floor = calloc(1, sizeof *floor);
    if (!floor)
        return "no memory for the floor";
    floor->plan = *plan;
    floor->out = aligned_alloc(256, (out_bytes + 511) / 256 * 256);
    const char *error = floor->out ? start_workers(floor, plan->threads) : "no memory for the floor's sums";
    if (error) { /* threads that did start wait for ever at their barrier; the command is about to end */
        if (!floor->workers) {
            free(floor->out);
            free(floor->worker);
            free(floor);
        }
        return error;
    }
    memset(floor->out, 0, out_bytes);
    *out = floor;
    return NULL;
}

void floor_cpu_close(void *context)
{
    floor_t *floor = context;
    if (!floor)
        return;
    floor->stop = true;
    if (floor->workers)
        pthread_barrier_wait(&floor->barrier);
    for (int i = 1; i <= floor->workers; i++)
        pthread_join(floor->worker[i].thread, NULL);
    if (floor->has_barrier)
        pthread_barrier_destroy(&floor->barrier);
    free(floor->worker);
    free(floor->out);
    free(floor);
}

int floor_cpu_variants(void *floor, floor_kind_t kind)
{
    (void)floor;
#if defined(__x86_64__)
    return kind == FLOOR_DISPATCH && __builtin_cpu_supports("avx512f") ? 4 : 2;
#else
    (void)kind;
    return 1;
#endif
}

const char *floor_cpu_variant_name(void *floor, floor_kind_t kind, int variant)
{
    static const char *const names[] = {"plain stores", "streaming stores", "streaming stores of 64 bytes",
                                        "half of each row by streaming stores, half by plain ones"};
    (void)floor;
    (void)kind;
    return names[variant];
}
