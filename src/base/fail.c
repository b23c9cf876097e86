/* The words of the last failure of each thread, and the names of the status codes. */
#include "base/fail.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"

static _Thread_local char detail[EPX__DETAIL_BYTES];
static void (*mirror)(const char *words); /* set once, before any other thread */

void epx__fail_mirror(void (*set)(const char *words))
{
    __atomic_store_n(&mirror, set, __ATOMIC_RELEASE);
}

epx_status_t epx__fail(epx_status_t code, const char *format, ...)
{
    /* Formatted beside `detail`, so that the arguments may point into it. */
    char words[EPX__DETAIL_BYTES];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(words, sizeof(words), format, arguments);
    va_end(arguments);
    memcpy(detail, words, sizeof(detail));
    void (*set)(const char *) = __atomic_load_n(&mirror, __ATOMIC_ACQUIRE);
    if (set)
        set(words);
    epx__log(EPX__LOG_INFO, "%s: %s", epx__status_name(code), detail);
    return code;
}

const char *epx__detail(void)
{
    return detail;
}

void epx__detail_set(const char *words)
{
    if (words == detail)
        return;
    size_t length = words ? strnlen(words, sizeof(detail) - 1) : 0;
    if (length)
        memmove(detail, words, length);
    detail[length] = '\0';
}

const char *epx__status_name(epx_status_t code)
{
    switch (code) {
#define NAME(name, value, text)                                                                                        \
    case name:                                                                                                         \
        return #name;
        EPX_STATUS_MAP(NAME)
#undef NAME
    }
    return "EPX_E_?";
}

const char *epx__status_text(epx_status_t code)
{
    switch (code) {
#define TEXT(name, value, text)                                                                                        \
    case name:                                                                                                         \
        return text;
        EPX_STATUS_MAP(TEXT)
#undef TEXT
    }
    return "not a status of this library";
}
