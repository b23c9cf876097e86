/* A progress line on stderr, once something takes longer than a second. */
#ifndef EPX_TOOL_PROGRESS_H
#define EPX_TOOL_PROGRESS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct progress {
    uint64_t began_ns, shown_ns;
    bool terminal; /* rewrite one line; else a line a second at most */
    bool showing;
} progress_t;

uint64_t now_ns(void);

void progress_begin(progress_t *progress);
/* total 0 shows no fraction. Cheap; call as often as is handy. */
void progress_show(progress_t *progress, const char *stage, uint32_t done, uint32_t total);
void progress_end(progress_t *progress);

#endif
