/*
 * A pool of threads that run one job in parts; the caller of run() is part 0.
 *
 *   round     grows by one a job: run() writes it after job, context and left; workers take a job when it changes.
 *   left      parts not yet ended: workers count down, the last one wakes the caller. run() leaves at 0, so the next
 *             job cannot overtake this one.
 *   sleepers  workers asleep on `round`; asleep: the caller is asleep on `left`.
 *
 * No wake is lost: a sleeper counts itself in and then hands the kernel the word's old value; a waker changes the word
 * and then looks at the count. All four are seq_cst, so one of the two sees the other.
 */
#include "device/cpu/copy.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/fail.h"

#define THREADS_MAX 1024
#define SPINS 2000 /* about 50 us, where each thread has a core of its own */

typedef struct worker {
    struct epx__workers *pool;
    pthread_t thread;
    int part;
} worker_t;

struct epx__workers {
    int threads; /* with the caller */
    int spins;
    int started; /* of workers[] */
    void (*job)(void *context, int part, int parts);
    void *context;
    uint32_t stop;
    char apart[64]; /* what follows changes; cache lines apart */
    uint32_t round;
    uint32_t sleepers;
    char further[64];
    uint32_t left;
    uint32_t asleep;
    worker_t workers[];
};

static void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void futex_sleep(uint32_t *word, uint32_t value)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* Until *word is no longer `value`: spin, then sleep, counted in `count`. Returns what it is then. */
static uint32_t await_change(uint32_t *word, uint32_t value, uint32_t *count, int spins)
{
    uint32_t now = __atomic_load_n(word, __ATOMIC_ACQUIRE);
    for (int i = 0; i < spins && now == value; i++) {
        cpu_relax();
        now = __atomic_load_n(word, __ATOMIC_ACQUIRE);
    }
    if (now != value)
        return now;
    __atomic_fetch_add(count, 1, __ATOMIC_SEQ_CST);
    while ((now = __atomic_load_n(word, __ATOMIC_SEQ_CST)) == value)
        futex_sleep(word, value);
    __atomic_fetch_sub(count, 1, __ATOMIC_SEQ_CST);
    return now;
}

static void *worker_main(void *context)
{
    worker_t *worker = context;
    epx__workers_t *pool = worker->pool;
    for (uint32_t round = 0;;) { /* rounds start at 0 and none passes without this worker's part in it */
        round = await_change(&pool->round, round, &pool->sleepers, pool->spins);
        if (__atomic_load_n(&pool->stop, __ATOMIC_RELAXED))
            return NULL;
        pool->job(pool->context, worker->part, pool->threads);
        if (__atomic_sub_fetch(&pool->left, 1, __ATOMIC_SEQ_CST) == 0 &&
            __atomic_load_n(&pool->asleep, __ATOMIC_SEQ_CST) != 0)
            futex_wake(&pool->left);
    }
}

static void next_round(epx__workers_t *pool)
{
    __atomic_fetch_add(&pool->round, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&pool->sleepers, __ATOMIC_SEQ_CST) != 0)
        futex_wake(&pool->round);
}

void epx__workers_run(epx__workers_t *workers, void (*job)(void *context, int part, int parts), void *context)
{
    if (workers->threads > 1) {
        workers->job = job;
        workers->context = context;
        __atomic_store_n(&workers->left, (uint32_t)(workers->threads - 1), __ATOMIC_RELAXED);
        next_round(workers);
    }
    job(context, 0, workers->threads);
    if (workers->threads > 1) {
        uint32_t left;
        while ((left = __atomic_load_n(&workers->left, __ATOMIC_ACQUIRE)) != 0)
            await_change(&workers->left, left, &workers->asleep, workers->spins);
    }
}

static epx_status_t start_worker(epx__workers_t *pool, int index)
{
    worker_t *worker = &pool->workers[index];
    *worker = (worker_t){.pool = pool, .part = index + 1};
    sigset_t all, before; /* the application's signals are not for these threads */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = epx__alloc_fault() ? EAGAIN : pthread_create(&worker->thread, NULL, worker_main, worker);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0)
        return epx__fail(EPX_E_SYSTEM, "starting copy thread %d of %d: %s", index + 1, pool->threads - 1,
                         strerror(error));
    pool->started++;
    return EPX_OK;
}

epx_status_t epx__workers_create(int threads, epx__workers_t **workers)
{
    if (threads < 1 || threads > THREADS_MAX)
        return epx__fail(EPX_E_INVALID, "%d copy threads: must be 1 to %d", threads, THREADS_MAX);
    epx__workers_t *made = epx__calloc(1, sizeof *made + (size_t)(threads - 1) * sizeof made->workers[0]);
    if (!made)
        return epx__fail(EPX_E_NOMEM, "no memory for %d copy threads", threads);
    made->threads = threads;
    made->spins = sysconf(_SC_NPROCESSORS_ONLN) >= threads ? SPINS : 0;
    for (int i = 0; i < threads - 1; i++) {
        epx_status_t status = start_worker(made, i);
        if (status != EPX_OK) {
            epx__workers_destroy(made);
            return status;
        }
    }
    *workers = made;
    return EPX_OK;
}

void epx__workers_destroy(epx__workers_t *workers)
{
    if (!workers)
        return;
    __atomic_store_n(&workers->stop, 1, __ATOMIC_RELAXED);
    next_round(workers);
    for (int i = 0; i < workers->started; i++)
        pthread_join(workers->workers[i].thread, NULL);
    epx__free(workers);
}

int epx__workers_count(const epx__workers_t *workers)
{
    return workers->threads;
}
