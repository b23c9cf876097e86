/* The first late failure of a buffer. */
#include "algo/exchange.h"

#include <sched.h>
#include <stdarg.h>
#include <stdio.h>

#include "base/fail.h"

epx_status_t epx__exchange_fault(epx__exchange_t *exchange, epx_status_t status, const char *format, ...)
{
    char words[sizeof exchange->fault.words];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(words, sizeof words, format, arguments);
    va_end(arguments);

    epx__fault_t *fault = &exchange->fault;
    int none = 0;
    if (atomic_compare_exchange_strong(&fault->status, &none, (int)status)) {
        snprintf(fault->words, sizeof fault->words, "%s", words);
        atomic_store(&fault->ready, 1);
    }
    /* Another thread was first and is still writing its words: nobody may find the buffer in order after this. */
    for (int i = 0; i < 1000000 && !atomic_load(&fault->ready); i++)
        sched_yield();
    return epx__fail(status, "%s", words);
}
