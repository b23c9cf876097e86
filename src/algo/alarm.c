/* Failures told between windows. See alarm.h. */
#include "algo/alarm.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/fail.h"
#include "device/cpu/wait.h"

static epx__control_t *control_of(void *window, const epx__exchange_t *exchange)
{
    return (epx__control_t *)(void *)((uint8_t *)window + exchange->layout.control_offset);
}

static epx__error_slot_t *error_slot(void *window, const epx__exchange_t *exchange, int from)
{
    return (epx__error_slot_t *)(void *)((uint8_t *)window + exchange->layout.errors_offset) + from;
}

bool epx__alarm_is_up(const epx__exchange_t *exchange)
{
    return __atomic_load_n(&control_of(exchange->window.base, exchange)->alarm[0], __ATOMIC_ACQUIRE) != 0;
}

static void tell(epx__exchange_t *exchange, int rank, epx_status_t status, uint64_t sequence, int about,
                 const char *words)
{
    epx__error_slot_t *slot = error_slot(exchange->peer[rank], exchange, exchange->rank);
    if (__atomic_load_n(&slot->word, __ATOMIC_ACQUIRE) != 0)
        return; /* told before */
    slot->sequence = sequence;
    slot->peer = about;
    slot->status = (int32_t)status;
    snprintf(slot->words, sizeof slot->words, "%.*s", (int)sizeof slot->words - 1, words);
    __atomic_store_n(&slot->word, (uint64_t)status, __ATOMIC_RELEASE);
    epx__control_t *control = control_of(exchange->peer[rank], exchange);
    __atomic_store_n(&control->alarm[0], 1, __ATOMIC_RELEASE);
    epx__bell_ring((epx__bell_t *)control->bell);
}

epx_status_t epx__alarm_raise(epx__exchange_t *exchange, epx_status_t status, uint64_t sequence, int about,
                              const char *format, ...)
{
    char words[448];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(words, sizeof words, format, arguments);
    va_end(arguments);
    for (int r = 0; r < exchange->topology->ranks; r++)
        if (r != exchange->rank && exchange->peer[r])
            tell(exchange, r, status, sequence, about, words);
    if (exchange->net) {
        char all[512];
        snprintf(all, sizeof all, "(%s, half %" PRIu64 "): %s", epx__status_name(status), sequence, words);
        epx__bootstrap_notify(exchange->bootstrap, exchange->notice_tag, all, strlen(all));
    }
    return epx__exchange_fault(exchange, status, "%s", words);
}

epx_status_t epx__alarm_read(epx__exchange_t *exchange, uint64_t sequence)
{
    if (atomic_load(&exchange->fault.ready))
        return epx__alarm_raise(exchange, (epx_status_t)atomic_load(&exchange->fault.status), sequence, -1, "%s",
                                exchange->fault.words);
    for (int r = 0; r < exchange->topology->ranks; r++) {
        if (r == exchange->rank || !exchange->peer[r])
            continue;
        epx__error_slot_t *slot = error_slot(exchange->window.base, exchange, r);
        if (__atomic_load_n(&slot->word, __ATOMIC_ACQUIRE) == 0)
            continue;
        char words[sizeof slot->words];
        snprintf(words, sizeof words, "%.*s", (int)sizeof words - 1, slot->words);
        return epx__alarm_raise(exchange, EPX_E_PEER, sequence, r, "rank %d failed (%s, half %" PRIu64 "): %s", r,
                                epx__status_name((epx_status_t)slot->status), slot->sequence, words);
    }
    return EPX_OK;
}

bool epx__alarm_closed(const epx__exchange_t *exchange, int rank)
{
    const epx__words_t *words =
        (const epx__words_t *)(void *)((uint8_t *)exchange->window.base + exchange->layout.words_offset) + rank;
    return __atomic_load_n(&words->closed, __ATOMIC_ACQUIRE) != 0;
}
