/*
 * Routing files: which experts the tokens of a real model chose. Text, so that any program can write one; the format
 * is in docs/PERFORMANCE.md.
 */
#ifndef EPX_TOOL_ROUTING_FILE_H
#define EPX_TOOL_ROUTING_FILE_H

#include <stdint.h>

typedef struct routing_file {
    uint32_t ranks, topk, experts;
    uint32_t *tokens; /* [ranks] */
    uint64_t total;   /* their sum */
    int64_t *ids;     /* [total][topk], rank by rank; -1 is nobody */
} routing_file_t;

/* NULL on success, else one line of what is wrong (static memory; with the line's number). */
const char *routing_file_read(const char *path, routing_file_t *file);
void routing_file_fini(routing_file_t *file);

#endif
