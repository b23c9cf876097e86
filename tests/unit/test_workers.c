/*
 * The pool of copy threads: every part runs exactly once a job, results are visible when run() returns, no wake is lost
 * whether the workers spin or sleep, and an idle pool costs nothing.
 */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/alloc.h"
#include "base/clock.h"
#include "base/fail.h"
#include "common/check.h"
#include "common/slowness.h"
#include "device/cpu/copy.h"

#define PARTS_MOST 8

typedef struct job {
    long ran[PARTS_MOST]; /* plain: TSan says whether run() orders them */
    int parts;
    int slow_part; /* -1: none */
} job_t;

static void count_part(void *context, int part, int parts)
{
    job_t *job = context;
    if (part == job->slow_part)
        epx__sleep_ns(2000000);
    job->ran[part]++;
    if (part == 0)
        job->parts = parts;
}

static void check_ran(const job_t *job, int threads, long jobs)
{
    CHECK(job->parts == threads, "%d parts, %d threads", job->parts, threads);
    for (int part = 0; part < PARTS_MOST; part++)
        CHECK(job->ran[part] == (part < threads ? jobs : 0), "part %d of %d ran %ld times in %ld jobs", part, threads,
              job->ran[part], jobs);
}

static void test_counts(int threads)
{
    epx__workers_t *workers = NULL;
    CHECK(epx__workers_create(threads, &workers) == EPX_OK, "%s", epx__detail());
    CHECK(epx__workers_count(workers) == threads, "%d", threads);
    job_t job = {.slow_part = -1};
    for (int i = 0; i < 2000; i++)
        epx__workers_run(workers, count_part, &job); /* back to back */
    check_ran(&job, threads, 2000);
    for (int i = 0; i < 20; i++) {
        job.slow_part = i % 2 ? 0 : threads - 1; /* the caller sleeps, or the workers do */
        epx__sleep_ns((uint64_t)i % 3 * 1000000);
        epx__workers_run(workers, count_part, &job);
    }
    check_ran(&job, threads, 2020);
    epx__workers_destroy(workers);
}

static uint64_t cpu_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void test_idle(int threads)
{
    epx__workers_t *workers = NULL;
    CHECK(epx__workers_create(threads, &workers) == EPX_OK, "%s", epx__detail());
    epx__sleep_ns(50000000);
    uint64_t before = cpu_ns();
    epx__sleep_ns(200000000);
    uint64_t used = cpu_ns() - before;
    CHECK((double)used < 4e6 * slowness(), "%d idle threads used %llu us in 200 ms", threads,
          (unsigned long long)used / 1000);
    epx__workers_destroy(workers);
}

static void test_failures(void)
{
    epx__workers_t *workers = NULL;
    CHECK(epx__workers_create(0, &workers) == EPX_E_INVALID && !workers, "0 threads");
    CHECK(epx__workers_create(100000, &workers) == EPX_E_INVALID && !workers, "too many threads");
    int64_t live = epx__alloc_live();
    for (uint64_t n = 1; n <= 4; n++) { /* the pool, then each of 3 threads */
        epx__alloc_fail_at(n, 0);
        epx_status_t status = epx__workers_create(4, &workers);
        epx__alloc_fail_at(0, 0);
        CHECK(status == (n == 1 ? EPX_E_NOMEM : EPX_E_SYSTEM) && !workers, "failure %d", (int)n);
        CHECK(epx__alloc_live() == live, "failure %d leaves memory behind", (int)n);
    }
    epx__workers_destroy(NULL);
}

int main(void)
{
    for (int threads = 1; threads <= 5; threads += threads == 3 ? 2 : 1)
        test_counts(threads);
    test_idle(2); /* spins before it sleeps, where there are 2 cores */
    test_idle(4);
    test_failures();
    return check_done();
}
