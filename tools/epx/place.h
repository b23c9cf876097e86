/* Where a run takes place: what its group chose and why, for a report, and the memory that a rank works in. */
#ifndef EPX_TOOL_PLACE_H
#define EPX_TOOL_PLACE_H

#include "mem.h"
#include "ranks.h"

/* Rank 0 writes it, into memory that the parent sees. */
typedef struct place {
    char backend[16], net[64];
    char backend_why[512], domain_why[512], threads_why[512], net_why[512];
    int domains, ranks_per_domain, threads;
} place_t;

void place_note(place_t *place, const epx_group_info_t *info);

/* What a rank that has joined works with, by the backend that its group chose: what the group says, and memory opened
 * on that device. 0, or what rank_fail returned; mem and context are set as far as it came. */
int place_enter(rank_t *rank, epx_group_info_t *info, const mem_ops_t **mem, void **context, epx_stream_t *stream);

#endif
