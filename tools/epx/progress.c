/* The progress line; see progress.h. */
#include "progress.h"

#include <stdio.h>
#include <time.h>
#include <unistd.h>

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void progress_begin(progress_t *progress)
{
    *progress = (progress_t){.began_ns = now_ns(), .terminal = isatty(2)};
}

void progress_show(progress_t *progress, const char *stage, uint32_t done, uint32_t total)
{
    uint64_t now = now_ns(), every = progress->terminal ? 100u * 1000000u : 1000u * 1000000u;
    if (now - progress->began_ns < 1000000000u || now - progress->shown_ns < every)
        return;
    progress->shown_ns = now;
    progress->showing = true;
    fprintf(stderr, "%s... %s", progress->terminal ? "\r\033[K" : "", stage[0] ? stage : "starting");
    if (total)
        fprintf(stderr, " %u of %u", done < total ? done : total, total);
    fprintf(stderr, ", %.0f s%s", (double)(now - progress->began_ns) * 1e-9, progress->terminal ? "" : "\n");
    fflush(stderr);
}

void progress_end(progress_t *progress)
{
    if (progress->showing && progress->terminal)
        fputs("\r\033[K", stderr);
    progress->showing = false;
}
