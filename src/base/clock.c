/* Monotonic time and deadlines. */
#include "base/clock.h"

#include <errno.h>
#include <time.h>

uint64_t epx__now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void epx__sleep_ns(uint64_t ns)
{
    struct timespec left = {.tv_sec = (time_t)(ns / 1000000000u), .tv_nsec = (long)(ns % 1000000000u)};
    while (nanosleep(&left, &left) != 0 && errno == EINTR)
        ;
}

bool epx__deadline_passed(epx__deadline_t *deadline)
{
    uint64_t now = epx__now_ns();
    if (!deadline->start_ns)
        deadline->start_ns = now;
    return now - deadline->start_ns >= deadline->timeout_ns;
}

uint64_t epx__deadline_waited_ns(const epx__deadline_t *deadline)
{
    return deadline->start_ns ? epx__now_ns() - deadline->start_ns : 0;
}

uint64_t epx__deadline_left_ms(epx__deadline_t *deadline)
{
    if (epx__deadline_passed(deadline))
        return 0;
    uint64_t waited = epx__deadline_waited_ns(deadline);
    /* Rounded up: a poll that returns early would only be repeated. */
    return waited >= deadline->timeout_ns ? 0 : (deadline->timeout_ns - waited + 999999u) / 1000000u;
}
