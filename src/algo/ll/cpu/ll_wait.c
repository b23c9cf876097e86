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

void epx__ll_tell(epx__ll_cpu_t *ll, int rank, uint64_t number, int word)
{
    if (epx__ll_is_far(ll, rank)) {
        epx__ll_net_tell(ll, rank, number, word);
        return;
    }
    __atomic_store_n((uint64_t *)epx__ll_to(ll, number, rank) + word, number, __ATOMIC_RELEASE);
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
        bool far = epx__ll_is_far(ll, r), dead = epx__bootstrap_dead(exchange->bootstrap, r);
        bool closed = far ? epx__ll_net_left(ll, r) : epx__alarm_closed(exchange, r);
        const char *stage = far && wait->stage_of ? wait->stage_of(ll, r, wait->context) : wait->stage;
        /* Looked at after those: it may have done its part first. */
        if (wait->ready(ll, r, wait->context) || !(late || closed || dead))
            continue;
        if (exchange->config.ll_mask_on_timeout)
            give_up(ll, wait, r, start_ns);
        else if (dead || closed)
            return epx__alarm_raise(exchange, EPX_E_PEER, wait->number, r,
                                    "%s on rank %d waits for %s of rank %d, which %s", wait->operation, exchange->rank,
                                    stage, r,
                                    dead  ? "is gone"
                                    : far ? "has left or cannot be reached"
                                          : "has destroyed its buffer");
        else
            return epx__alarm_raise(exchange, EPX_E_TIMEOUT, wait->number, r,
                                    "%s (call %" PRIu64 ") on rank %d waited %.1f s for rank %d: %s", wait->operation,
                                    wait->number, exchange->rank, (double)epx__deadline_waited_ns(deadline) * 1e-9, r,
                                    stage);
    }
    return EPX_OK;
}

/* One look at every rank. *left: how many are not done yet. */
static epx_status_t serve_ready(epx__ll_cpu_t *ll, const epx__ll_wait_t *wait, uint64_t start_ns, int *left,
                                bool *moved)
{
    *left = 0;
    *moved = false;
    for (int r = 0; r < ll->exchange->topology->ranks; r++) {
        if (ll->done[r])
            continue;
        if (!wait->ready(ll, r, wait->context)) {
            ++*left;
            continue;
        }
        ll->again = false;
        note_wait(wait, r, start_ns);
        EPX__TRY(wait->serve(ll, r, wait->context));
        *moved = true;
        if (ll->again) {
            ++*left;
            continue;
        }
        ll->done[r] = 1;
    }
    return EPX_OK;
}

/* Nothing moved: let the network move, or sleep. */
static void pause_once(epx__ll_cpu_t *ll, epx__waiter_t *waiter, loop_t *loop)
{
    if (epx__ll_net_help(ll))
        return;
    bool deep = waiter->polls > waiter->spins; /* it will sleep, not only look again */
    if (deep)
        epx__ll_net_help_end(ll);
    epx__waiter_pause(waiter, somebody_ready, loop);
    if (deep)
        epx__ll_net_help_begin(ll);
}

static epx_status_t serve_all(epx__ll_cpu_t *ll, const epx__ll_wait_t *wait)
{
    epx__exchange_t *exchange = ll->exchange;
    uint64_t start_ns = epx__now_ns();
    epx__deadline_t deadline = epx__deadline_ms(wait->timeout_ms ? wait->timeout_ms : exchange->config.timeout_ms);
    epx__waiter_t waiter;
    loop_t loop = {ll, wait};
    epx__waiter_init(&waiter, bell_of(exchange, exchange->rank), exchange->spins);
    for (;;) {
        int left;
        bool moved;
        if (epx__alarm_is_up(exchange))
            EPX__TRY(epx__alarm_read(exchange, wait->number));
        EPX__TRY(serve_ready(ll, wait, start_ns, &left, &moved));
        if (left == 0)
            return epx__alarm_is_up(exchange) ? epx__alarm_read(exchange, wait->number) : EPX_OK;
        if (moved) {
            epx__waiter_progress(&waiter);
            epx__ll_net_help(ll);
            continue;
        }
        EPX__TRY(check_late(ll, wait, start_ns, &deadline));
        pause_once(ll, &waiter, &loop);
    }
}

epx_status_t epx__ll_serve_all(epx__ll_cpu_t *ll, const epx__ll_wait_t *wait)
{
    epx__ll_net_help_begin(ll);
    epx_status_t status = serve_all(ll, wait);
    epx__ll_net_help_end(ll);
    return status;
}
