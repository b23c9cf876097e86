/*
 * How a function says what went wrong: it returns a status and leaves words in a thread-local place.
 * Whoever decides that something is an error says the words; callers pass the status on in silence.
 */
#ifndef EPX_BASE_FAIL_H
#define EPX_BASE_FAIL_H

#include <epx/status.h>

#define EPX__DETAIL_BYTES 1024

/* Record the words for this thread, log them at level info, return `code`. */
epx_status_t epx__fail(epx_status_t code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The words of the last epx__fail of this thread ("" if none), and the means to forget or to replace them. */
const char *epx__detail(void);
void epx__detail_set(const char *words);

/* In a plug-in, whose copy of this is not libepx.so's: give the words to that one too, from now on. */
void epx__fail_mirror(void (*set)(const char *words));

const char *epx__status_name(epx_status_t code);
const char *epx__status_text(epx_status_t code);

/* Pass a failure on. */
#define EPX__TRY(call)                                                                                                 \
    do {                                                                                                               \
        epx_status_t epx__try_status = (call);                                                                         \
        if (epx__try_status != EPX_OK)                                                                                 \
            return epx__try_status;                                                                                    \
    } while (0)

#endif
