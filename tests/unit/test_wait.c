/*
 * Bells and waiters, between threads and between processes: no ring is lost, a wait without news is cheap, and a lost
 * wake costs 20 ms, never a hang.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "common/check.h"
#include "common/slowness.h"
#include "device/cpu/wait.h"

typedef struct shared {
    epx__bell_t bells[2];
    uint64_t words[2]; /* words[i]: what side i waits for */
} shared_t;

typedef struct want {
    uint64_t *word;
    uint64_t value;
} want_t;

static bool reached(void *context)
{
    want_t *want = context;
    return __atomic_load_n(want->word, __ATOMIC_ACQUIRE) >= want->value;
}

static bool never(void *context)
{
    (void)context;
    return false;
}

/* Until the word is there; false after 5 s. */
static bool await(epx__waiter_t *waiter, uint64_t *word, uint64_t value)
{
    want_t want = {.word = word, .value = value};
    uint64_t start = epx__now_ns();
    while (!reached(&want)) {
        if (epx__now_ns() - start > 5000000000u)
            return false;
        epx__waiter_pause(waiter, reached, &want);
    }
    epx__waiter_progress(waiter);
    return true;
}

static void tell(shared_t *shared, int side, uint64_t value)
{
    __atomic_store_n(&shared->words[side], value, __ATOMIC_RELEASE);
    epx__bell_ring(&shared->bells[side]);
}

/* Side 1 echoes what side 0 says. */
static bool echo(shared_t *shared, uint64_t rounds, uint32_t spins)
{
    epx__waiter_t waiter;
    epx__waiter_init(&waiter, &shared->bells[1], spins);
    for (uint64_t i = 1; i <= rounds; i++) {
        if (!await(&waiter, &shared->words[1], i))
            return false;
        tell(shared, 0, i);
    }
    return true;
}

static bool call(shared_t *shared, uint64_t rounds, uint32_t spins, uint64_t *ns)
{
    epx__waiter_t waiter;
    epx__waiter_init(&waiter, &shared->bells[0], spins);
    uint64_t start = epx__now_ns();
    for (uint64_t i = 1; i <= rounds; i++) {
        tell(shared, 1, i);
        if (!await(&waiter, &shared->words[0], i))
            return false;
    }
    *ns = (epx__now_ns() - start) / rounds;
    return true;
}

typedef struct echo_args {
    shared_t *shared;
    uint64_t rounds;
    uint32_t spins;
    bool ok;
} echo_args_t;

static void *echo_main(void *context)
{
    echo_args_t *args = context;
    args->ok = echo(args->shared, args->rounds, args->spins);
    return NULL;
}

static void test_threads(uint32_t spins, uint64_t rounds)
{
    shared_t shared;
    memset(&shared, 0, sizeof shared);
    echo_args_t args = {.shared = &shared, .rounds = rounds, .spins = spins};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, echo_main, &args) == 0, "thread");
    uint64_t ns = 0;
    CHECK(call(&shared, rounds, spins, &ns), "a ring was lost, spins %u", spins);
    pthread_join(thread, NULL);
    CHECK(args.ok, "a ring was lost at the other side, spins %u", spins);
    printf("threads, spins %u: %llu ns a round trip\n", spins, (unsigned long long)ns);
}

static void test_processes(uint32_t spins, uint64_t rounds)
{
    shared_t *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED, "mmap");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0)
        _exit(echo(shared, rounds, spins) ? 0 : 1);
    uint64_t ns = 0;
    CHECK(call(shared, rounds, spins, &ns), "a ring was lost, spins %u", spins);
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0, "the other process: %d", status);
    printf("processes, spins %u: %llu ns a round trip\n", spins, (unsigned long long)ns);
    munmap(shared, sizeof *shared);
}

enum { RINGS = 16 };

/* Woken out of a real sleep: well under the sleep's own 20 ms. */
static void *ring_later(void *context)
{
    shared_t *shared = context;
    for (uint64_t i = 1; i <= RINGS; i++) {
        epx__sleep_ns(60000000); /* the sleeper has grown to 20 ms by then */
        __atomic_store_n(&shared->words[1], epx__now_ns(), __ATOMIC_RELEASE);
        tell(shared, 0, i);
    }
    return NULL;
}

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* The median. */
static uint64_t wake_latency_ns(void)
{
    shared_t shared;
    memset(&shared, 0, sizeof shared);
    epx__waiter_t waiter;
    epx__waiter_init(&waiter, &shared.bells[0], 100);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, ring_later, &shared) == 0, "thread");
    uint64_t late[RINGS];
    for (int i = 0; i < RINGS; i++) {
        CHECK(await(&waiter, &shared.words[0], (uint64_t)i + 1), "ring %d was lost", i);
        late[i] = epx__now_ns() - __atomic_load_n(&shared.words[1], __ATOMIC_ACQUIRE);
    }
    pthread_join(thread, NULL);
    qsort(late, RINGS, sizeof late[0], compare_u64);
    printf("wake out of sleep: median %llu us\n", (unsigned long long)late[RINGS / 2] / 1000);
    CHECK(shared.bells[0].sleepers == 0, "a sleeper was left counted");
    return late[RINGS / 2];
}

static void test_wake_latency(void)
{
    uint64_t median = UINT64_MAX;
    for (int turn = 0; turn < 3 && median >= 5000000; turn++) /* others may have had the core */
        median = wake_latency_ns();
    CHECK((double)median < well_before(1e7, 5e6), "median wake took %llu us: rings do not wake",
          (unsigned long long)median / 1000);
}

static uint64_t thread_cpu_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void test_idle(uint32_t spins)
{
    epx__bell_t bell;
    memset(&bell, 0, sizeof bell);
    epx__waiter_t waiter;
    epx__waiter_init(&waiter, &bell, spins);
    uint64_t start = epx__now_ns(), cpu = thread_cpu_ns();
    uint64_t pauses = 0;
    while (epx__now_ns() - start < 500000000u) {
        epx__waiter_pause(&waiter, never, NULL);
        pauses++;
    }
    double share = (double)(thread_cpu_ns() - cpu) / (double)(epx__now_ns() - start);
    printf("idle, spins %u: %.2f %% of a core, %llu pauses\n", spins, 100 * share, (unsigned long long)pauses);
    CHECK(share < 0.02 * slowness(), "an idle waiter takes %.1f %% of a core", 100 * share);
    CHECK((double)pauses > spins + 12 / slowness(), "sleeps are much longer than 20 ms: %llu pauses",
          (unsigned long long)pauses);
    CHECK(bell.sleepers == 0, "a sleeper was left counted");
}

/* A writer that forgets to ring costs one sleep. */
static void *store_silently(void *context)
{
    shared_t *shared = context;
    epx__sleep_ns(100000000);
    __atomic_store_n(&shared->words[0], 1, __ATOMIC_RELEASE);
    return NULL;
}

static void test_without_ring(void)
{
    shared_t shared;
    memset(&shared, 0, sizeof shared);
    epx__waiter_t waiter;
    epx__waiter_init(&waiter, &shared.bells[0], 0);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, store_silently, &shared) == 0, "thread");
    uint64_t start = epx__now_ns();
    CHECK(await(&waiter, &shared.words[0], 1), "hung without a ring");
    CHECK((double)(epx__now_ns() - start) < well_before(5e9, 1e9), "sleeps are not bounded");
    pthread_join(thread, NULL);
    epx__waiter_init(&waiter, NULL, 0); /* no bell at all */
    CHECK(await(&waiter, &shared.words[0], 1), "no bell");
    start = epx__now_ns();
    for (int i = 0; i < 20; i++)
        epx__waiter_pause(&waiter, never, NULL);
    CHECK((double)(epx__now_ns() - start) < 5e8 * slowness(), "pauses without a bell are short");
}

int main(void)
{
    test_threads(0, 5000);
    test_threads(2000, 5000);
    test_processes(0, 5000);
    test_processes(2000, 5000);
    test_wake_latency();
    test_idle(0);
    test_idle(2000);
    test_without_ring();
    return check_done();
}
