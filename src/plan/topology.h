/*
 * From "who can touch whose memory" to domains. Pure.
 *
 * A domain is a set of ranks that all reach each other, in ascending rank order; domains are numbered by their lowest
 * rank. All have the same number of ranks; rank i of one domain and rank i of another are each other's rail.
 */
#ifndef EPX_PLAN_TOPOLOGY_H
#define EPX_PLAN_TOPOLOGY_H

#include <stdbool.h>
#include <stdint.h>

#include <epx/status.h>

typedef struct epx__topology {
    int ranks, domains, per_domain;
    int32_t *domain_of; /* [ranks] */
    int32_t *index_of;  /* [ranks] place in the domain */
    int32_t *member;    /* [domains][per_domain] ranks */
} epx__topology_t;

/* reach: [ranks][ranks], [i][j] 1 when i has mapped j's memory and moved a word. Reach that is not mutual and complete
 * within a set, or sets of unequal sizes, are refused in words with what to do (ranks_per_domain). `split` > 0 cuts
 * each found set into pieces of that many ranks, in rank order; it must divide them. */
epx_status_t epx__topology_make(int ranks, const uint8_t *reach, int split, epx__topology_t *topology);
void epx__topology_fini(epx__topology_t *topology);

/* One domain that is the whole group may span hosts. Of several none may: ranks of a domain share host memory then (on
 * GPUs: src/api/rails.c). Unless `reach` is complete and `split` leaves it whole, take out what reaches further; true
 * when there was any. near: [ranks][ranks], 1 where host memory can be shared; symmetric. */
bool epx__topology_end_at_hosts(int ranks, const uint8_t *near, int split, uint8_t *reach);

static inline int epx__topology_rank(const epx__topology_t *topology, int domain, int index)
{
    return topology->member[domain * topology->per_domain + index];
}

#endif
