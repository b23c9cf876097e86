/* Log lines: one write each, so that lines of several ranks do not mix. */
#include "base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include "base/env.h"

enum { LEVEL_UNKNOWN = -1, LINE_BYTES = 1280 };

static int level_now = LEVEL_UNKNOWN;
static _Thread_local int rank_of_thread = -1;

void epx__log_set_rank(int rank)
{
    rank_of_thread = rank;
}

/* EPX_LOG, read once: a bad value counts as the default, since nobody could be told otherwise. */
static int level(void)
{
    int known = __atomic_load_n(&level_now, __ATOMIC_RELAXED);
    if (known != LEVEL_UNKNOWN)
        return known;
    const char *text = epx__env_text(EPX__ENV_LOG);
    known = text && text[0] >= '0' && text[0] <= '3' && !text[1] ? text[0] - '0' : EPX__LOG_WARN;
    __atomic_store_n(&level_now, known, __ATOMIC_RELAXED);
    return known;
}

void epx__log(int line_level, const char *format, ...)
{
    static const char *const names[] = {"", "warning", "info", "debug"};
    if (line_level > level())
        return;
    int saved_errno = errno;
    char line[LINE_BYTES];
    const char *name = names[line_level >= 1 && line_level <= 3 ? line_level : 1];
    int used = rank_of_thread >= 0 ? snprintf(line, sizeof(line), "epx %s [rank %d] ", name, rank_of_thread)
                                   : snprintf(line, sizeof(line), "epx %s ", name);
    va_list arguments;
    va_start(arguments, format);
    int more = vsnprintf(line + used, sizeof(line) - (size_t)used - 1, format, arguments);
    va_end(arguments);
    size_t room = sizeof(line) - (size_t)used - 2;
    size_t length = (size_t)used + (more < 0 ? 0 : (size_t)more > room ? room : (size_t)more);
    line[length++] = '\n';
    ssize_t ignored = write(STDERR_FILENO, line, length);
    (void)ignored;
    errno = saved_errno;
}
