/*
 * How a failure inside an operation travels between the ranks of a domain, in host-accessible windows.
 *
 * Who fails writes its error slot in every peer's window, then `alarm` there, then rings. Every wait looks at the alarm
 * of its own window. The first failure a rank tells stays.
 */
#ifndef EPX_ALGO_ALARM_H
#define EPX_ALGO_ALARM_H

#include "algo/exchange.h"

/* Record the failure here and tell every rank of the domain. `sequence` is the operation's number, `about` the rank
 * that the failure is about (-1 nobody). Returns `status`. */
epx_status_t epx__alarm_raise(epx__exchange_t *exchange, epx_status_t status, uint64_t sequence, int about,
                              const char *format, ...) __attribute__((format(printf, 5, 6)));

bool epx__alarm_is_up(const epx__exchange_t *exchange);

/* The alarm is up: record what it is about and pass it on. EPX_OK when its words are not there yet: look again. */
epx_status_t epx__alarm_read(epx__exchange_t *exchange, uint64_t sequence);

/* Has that rank of the domain destroyed its buffer? */
bool epx__alarm_closed(const epx__exchange_t *exchange, int rank);

#endif
