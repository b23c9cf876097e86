/*
 * Waiting in shared memory: spin a little, then yield, then sleep on the rank's bell.
 *
 * The bell is a futex word in a rank's window. Whoever writes a word there that the rank may be waiting for rings
 * afterwards: store the word (release), seq_cst fence, look for sleepers, wake if there are any. The sleeper: count
 * itself, seq_cst fence, look at its condition once more, sleep on the bell's value read before that look. Sleeps are
 * bounded (1 ms growing to 20 ms), so a lost wake costs time, never a hang.
 */
#ifndef EPX_DEVICE_CPU_WAIT_H
#define EPX_DEVICE_CPU_WAIT_H

#include <stdbool.h>
#include <stdint.h>

typedef struct epx__bell {
    uint32_t value;    /* any writer, grows by one a ring with sleepers */
    uint32_t sleepers; /* the owner's threads asleep */
    uint8_t pad[56];
} epx__bell_t;

void epx__bell_ring(epx__bell_t *bell);

typedef struct epx__waiter {
    epx__bell_t *bell;
    uint32_t spins; /* polls before yielding (EPX_SPIN) */
    uint32_t polls; /* so far */
    uint64_t sleep_ns;
} epx__waiter_t;

/* `ready(context)` is looked at; true ends the wait. One pause of whatever kind is due; the caller loops, checking
 * deadline and errors in between. */
void epx__waiter_init(epx__waiter_t *waiter, epx__bell_t *bell, uint32_t spins);
void epx__waiter_pause(epx__waiter_t *waiter, bool (*ready)(void *context), void *context);
void epx__waiter_progress(epx__waiter_t *waiter); /* something moved: spin anew */

#endif
