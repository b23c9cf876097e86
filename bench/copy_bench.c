/*
 * How fast rows are copied and summed here: 2 processes at once (or N), each with its own memory, 117 MB of rows of
 * 14336 bytes. Median of several rounds, slowest process; the processes start a round together. Wall time, and the
 * process's own CPU time, which says more on a machine that has other work.
 *
 *     copy_bench [processes [rounds]]
 *
 * Not a test. Built by `ninja copy_bench`.
 */
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "device/cpu/copy.h"
#include "device/cpu/simd.h"
#include "device/device.h"

#define ROW ((size_t)14336)
#define ROWS ((size_t)8192) /* 117 MB */
#define TOKENS ((size_t)4096)
#define PROCESSES_MOST 16
#define ROUNDS_MOST 101

enum what { COPY_PLAIN, COPY_STREAM, SUM_PLAIN, SUM_STREAM, WHATS };
static const char *const names[] = {"copy, plain", "copy, streaming", "sum, plain stores", "sum, streaming"};

typedef struct shared {
    atomic_uint arrived;
    uint64_t wall_ns[WHATS][EPX__SIMD_AVX512 + 1][ROUNDS_MOST][PROCESSES_MOST];
    uint64_t cpu_ns[WHATS][EPX__SIMD_AVX512 + 1][ROUNDS_MOST][PROCESSES_MOST];
} shared_t;

static uint64_t cpu_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void meet(shared_t *shared, unsigned processes, unsigned *round)
{
    ++*round;
    atomic_fetch_add(&shared->arrived, 1);
    while (atomic_load(&shared->arrived) < *round * processes)
        usleep(50);
}

/* As a dispatch to two ranks: token i's rows go to place i of each half. */
static void make_order(uint32_t *order)
{
    for (size_t i = 0; i < ROWS; i++)
        order[i] = (uint32_t)(i / 2 + (i & 1) * TOKENS);
}

static void run_once(enum what what, char *to, const char *from, const uint32_t *order)
{
    bool streaming = what == COPY_STREAM || what == SUM_STREAM;
    if (what == COPY_PLAIN || what == COPY_STREAM) { /* each token to two places */
        for (size_t i = 0; i < ROWS; i++)
            epx__copy_row(to + order[i] * ROW, from + i / 2 * ROW, ROW, streaming);
    } else { /* two rows a token */
        for (size_t i = 0; i < TOKENS; i++) {
            const void *rows[2] = {from + order[2 * i] * ROW, from + order[2 * i + 1] * ROW};
            epx__sum_rows(to + i * ROW, rows, 2, NULL, 0, ROW / 2, EPX_BF16, streaming);
        }
    }
    epx__copy_fence();
}

static int process_main(shared_t *shared, unsigned me, unsigned processes, int rounds)
{
    epx__device_t *device;
    epx__window_t from, to;
    uint32_t *order = malloc(ROWS * sizeof *order);
    if (!order || epx__device_cpu.open(-1, &device) != EPX_OK ||
        device->ops->window_alloc(device, ROWS * ROW, &from) != EPX_OK ||
        device->ops->window_alloc(device, ROWS * ROW, &to) != EPX_OK)
        return 1;
    if (getenv("BENCH_NOHUGE")) {
        madvise(from.base, from.bytes, MADV_NOHUGEPAGE);
        madvise(to.base, to.bytes, MADV_NOHUGEPAGE);
    }
    make_order(order);
    uint16_t *fill = from.base;
    for (size_t i = 0; i < ROWS * ROW / 2; i++)
        fill[i] = (uint16_t)(0x3f80 + i % 64);
    memset(to.base, 1, to.bytes);
    unsigned meeting = 0;
    int best = (int)epx__simd_level();
    for (int what = 0; what < WHATS; what++)
        for (int level = what == COPY_PLAIN ? best : 0; level <= best; level++)
            for (int round = 0; round < rounds; round++) {
                epx__simd_limit((epx__simd_t)level);
                meet(shared, processes, &meeting);
                uint64_t start = epx__now_ns(), cpu = cpu_now_ns();
                run_once((enum what)what, to.base, from.base, order);
                shared->cpu_ns[what][level][round][me] = cpu_now_ns() - cpu;
                shared->wall_ns[what][level][round][me] = epx__now_ns() - start;
            }
    return 0;
}

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* Median over the rounds of the slowest process. */
static double median_ms(uint64_t (*ns)[PROCESSES_MOST], unsigned processes, int rounds)
{
    uint64_t slowest[ROUNDS_MOST] = {0};
    for (int round = 0; round < rounds; round++)
        for (unsigned p = 0; p < processes; p++)
            if (ns[round][p] > slowest[round])
                slowest[round] = ns[round][p];
    qsort(slowest, (size_t)rounds, sizeof slowest[0], compare);
    return (double)slowest[rounds / 2] / 1e6;
}

static void report(shared_t *shared, unsigned processes, int rounds)
{
    int best = (int)epx__simd_level();
    for (int what = 0; what < WHATS; what++)
        for (int level = what == COPY_PLAIN ? best : 0; level <= best; level++)
            printf("%-18s %-10s wall %6.2f ms, CPU %6.2f ms\n", names[what],
                   what == COPY_PLAIN ? "libc" : epx__simd_name((epx__simd_t)level),
                   median_ms(shared->wall_ns[what][level], processes, rounds),
                   median_ms(shared->cpu_ns[what][level], processes, rounds));
}

int main(int argc, char **argv)
{
    unsigned processes = argc > 1 ? (unsigned)atoi(argv[1]) : 2;
    int rounds = argc > 2 ? atoi(argv[2]) : 11;
    if (processes < 1 || processes > PROCESSES_MOST || rounds < 1 || rounds > ROUNDS_MOST) {
        fprintf(stderr, "copy_bench [processes 1 to %d [rounds 1 to %d]]\n", PROCESSES_MOST, ROUNDS_MOST);
        return 2;
    }
    shared_t *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED)
        return 1;
    for (unsigned p = 0; p < processes; p++)
        if (fork() == 0)
            _exit(process_main(shared, p, processes, rounds));
    int failed = 0, status;
    while (wait(&status) > 0)
        failed |= status;
    printf("%u processes, %zu rows of %zu bytes each, %d rounds\n", processes, ROWS, ROW, rounds);
    if (!failed)
        report(shared, processes, rounds);
    return failed != 0;
}
