/*
 * Bells and waiters (wait.h has the protocol): futex words that processes share, so FUTEX_PRIVATE_FLAG is not used.
 */
#include "device/cpu/wait.h"

#include <linux/futex.h>
#include <limits.h>
#include <sched.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "device/cpu/tsan.h"

#define YIELDS 8u               /* after the spins, before the first sleep */
#define SLEEP_LEAST_NS 1000000u /* 1 ms */
#define SLEEP_MOST_NS 20000000u /* 20 ms: what a lost wake costs, and 50 looks a second when idle */
#define NO_BELL_SLEEP_NS 50000u /* without a bell nobody wakes us: look often */

static uint32_t fence_then_sleepers(epx__bell_t *bell)
{
#if EPX__TSAN /* gcc refuses fences there; a read-modify-write of the same word orders as much */
    return __atomic_fetch_add(&bell->sleepers, 0, __ATOMIC_SEQ_CST);
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return __atomic_load_n(&bell->sleepers, __ATOMIC_RELAXED);
#endif
}

void epx__bell_ring(epx__bell_t *bell)
{
    if (fence_then_sleepers(bell) == 0)
        return;
    __atomic_fetch_add(&bell->value, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &bell->value, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void cpu_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

void epx__waiter_init(epx__waiter_t *waiter, epx__bell_t *bell, uint32_t spins)
{
    *waiter = (epx__waiter_t){.bell = bell, .spins = spins, .polls = 0, .sleep_ns = SLEEP_LEAST_NS};
}

void epx__waiter_progress(epx__waiter_t *waiter)
{
    waiter->polls = 0;
    waiter->sleep_ns = SLEEP_LEAST_NS;
}

/* Count in, look once more, sleep on what the bell read before that look, count out. */
static void sleep_on_bell(epx__waiter_t *waiter, bool (*ready)(void *context), void *context)
{
    epx__bell_t *bell = waiter->bell;
    __atomic_fetch_add(&bell->sleepers, 1, __ATOMIC_SEQ_CST);
    uint32_t value = __atomic_load_n(&bell->value, __ATOMIC_ACQUIRE);
    (void)fence_then_sleepers(bell);
    if (!ready(context)) {
        struct timespec bound = {.tv_sec = 0, .tv_nsec = (long)waiter->sleep_ns};
        syscall(SYS_futex, &bell->value, FUTEX_WAIT, value, &bound, NULL, 0);
        if (__atomic_load_n(&bell->value, __ATOMIC_RELAXED) != value)
            waiter->sleep_ns = SLEEP_LEAST_NS;
        else if (waiter->sleep_ns < SLEEP_MOST_NS)
            waiter->sleep_ns = waiter->sleep_ns * 2 > SLEEP_MOST_NS ? SLEEP_MOST_NS : waiter->sleep_ns * 2;
    }
    __atomic_fetch_sub(&bell->sleepers, 1, __ATOMIC_SEQ_CST);
}

void epx__waiter_pause(epx__waiter_t *waiter, bool (*ready)(void *context), void *context)
{
    if (waiter->polls < waiter->spins) {
        waiter->polls++;
        cpu_relax();
    } else if (waiter->polls - waiter->spins < YIELDS) {
        waiter->polls++;
        sched_yield();
    } else if (waiter->bell) {
        sleep_on_bell(waiter, ready, context);
    } else if (!ready(context)) {
        epx__sleep_ns(NO_BELL_SLEEP_NS);
    }
}
