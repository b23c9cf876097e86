/* The waiting loop of low latency on the CPU: serve whichever rank is ready; look at alarm, closed peers and deadline.
 */
#include <inttypes.h>
#include <string.h>

#include "algo/alarm.h"
#include "algo/ll/cpu/ll_cpu.h"
#include "base/fail.h"

static epx__bell_t *bell_of(const epx__exchange_t *exchange, int rank)
{
    return (epx__bell_t *)((epx__control_t *)exchange->peer[rank])->bell;
}

void epx__ll_post(epx__ll_cpu_t *ll, int rank, uint64_t *word, uint64_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    epx__bell_ring(bell_of(ll->exchange, rank));
}

typedef struct loop {
    epx__ll_cpu_t *ll;
    const epx__ll_wait_t *wait;
} loop_t;

/* The waiter's last look before it sleeps. */
static bool somebody_ready(void *context)
{
    const loop_t *loop = context;
    for (int r = 0; r < loop->ll->exchange->topology->ranks; r++)
        if (!loop->ll->done[r] && loop->wait->ready(loop->ll, r, loop->wait->context))
            return true;
    return epx__alarm_is_up(loop->ll->exchange);
}

static void note_wait(const epx__ll_wait_t *wait, int rank, uint64_t start_ns)
{
    if (wait->wait_ns)
        wait->wait_ns[rank] += (int64_t)(epx__now_ns() - start_ns);
}

static void give_up(epx__ll_cpu_t *ll, const epx__ll_wait_t *wait, int rank, uint64_t start_ns)
{
    note_wait(wait, rank, start_ns);
    epx__ll_set_masked(ll, rank, true);
    ll->done[rank] = 1;
    if (wait->give_up)
        wait->give_up(ll, rank, wait->context);
}

/* Nobody was ready: is somebody gone, or the time over? */
static epx_status_t check_late(epx__ll_cpu_t *ll, const epx__ll_wait_t *wait, uint64_t start_ns,
                               epx__deadline_t *deadline)
{
    epx__exchange_t *exchange = ll->exchange;
    bool late = epx__deadline_passed(deadline);
    for (int r = 0; r < exchange->topology->ranks; r++) {
        if (ll->done[r])
            continue;
        bool closed = epx__alarm_closed(exchange, r), dead = epx__bootstrap_dead(exchange->bootstrap, r);
        /* Looked at after those: it may have done its part first. */
        if (wait->ready(ll, r, wait->context) || !(late || closed || dead))
            continue;
        if (exchange->config.ll_mask_on_timeout)
            give_up(ll, wait, r, start_ns);
        else if (dead || closed)
            return epx__alarm_raise(exchange, EPX_E_PEER, wait->number, r,
                                    "%s on rank %d waits for %s of rank %d, which %s", wait->operation, exchange->rank,
                                    wait->stage, r, dead ? "is gone" : "has destroyed its buffer");
        else
            return epx__alarm_raise(exchange, EPX_E_TIMEOUT, wait->number, r,
                                    "%s (call %" PRIu64 ") on rank %d waited %.1f s for rank %d: %s", wait->operation,
                                    wait->number, exchange->rank, (double)epx__deadline_waited_ns(deadline) * 1e-9, r,
                                    wait->stage);
    }
    return EPX_OK;
}

epx_status_t epx__ll_serve_all(epx__ll_cpu_t *ll, const epx__ll_wait_t *wait)
{
    epx__exchange_t *exchange = ll->exchange;
    uint64_t start_ns = epx__now_ns();
    epx__deadline_t deadline = epx__deadline_ms(wait->timeout_ms ? wait->timeout_ms : exchange->config.timeout_ms);
    epx__waiter_t waiter;
    loop_t loop = {ll, wait};
    epx__waiter_init(&waiter, bell_of(exchange, exchange->rank), exchange->spins);
    for (;;) {
        if (epx__alarm_is_up(exchange))
            EPX__TRY(epx__alarm_read(exchange, wait->number));
        int left = 0;
        bool moved = false;
        for (int r = 0; r < exchange->topology->ranks; r++) {
            if (ll->done[r])
                continue;
            if (!wait->ready(ll, r, wait->context)) {
                left++;
                continue;
            }
            note_wait(wait, r, start_ns);
            EPX__TRY(wait->serve(ll, r, wait->context));
            ll->done[r] = 1;
            moved = true;
        }
        if (left == 0)
            return epx__alarm_is_up(exchange) ? epx__alarm_read(exchange, wait->number) : EPX_OK;
        if (moved) {
            epx__waiter_progress(&waiter);
            continue;
        }
        EPX__TRY(check_late(ll, wait, start_ns, &deadline));
        epx__waiter_pause(&waiter, somebody_ready, &loop);
    }
}
