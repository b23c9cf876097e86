/* Monotonic time, and deadlines that start at their first poll. */
#ifndef EPX_BASE_CLOCK_H
#define EPX_BASE_CLOCK_H

#include <stdbool.h>
#include <stdint.h>

uint64_t epx__now_ns(void);
void epx__sleep_ns(uint64_t ns);

typedef struct epx__deadline {
    uint64_t timeout_ns;
    uint64_t start_ns; /* 0 until the first poll */
} epx__deadline_t;

static inline epx__deadline_t epx__deadline_ms(uint64_t timeout_ms)
{
    return (epx__deadline_t){.timeout_ns = timeout_ms * 1000000u, .start_ns = 0};
}
bool epx__deadline_passed(epx__deadline_t *deadline);
uint64_t epx__deadline_waited_ns(const epx__deadline_t *deadline);
uint64_t epx__deadline_left_ms(epx__deadline_t *deadline); /* for poll(2); starts it */

#endif
