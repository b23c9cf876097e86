/*
 * Runs N ranks on this host: processes forked from the command, or threads of it. Owns what they share (a barrier, an
 * all-gather, the words of whoever fails) and the wait for their end, with a progress line.
 *
 * Shared memory is made before the fork (mmap, MAP_SHARED | MAP_ANONYMOUS), so nothing is left behind in any file
 * system. Children die with their parent.
 */
#ifndef EPX_TOOL_RANKS_H
#define EPX_TOOL_RANKS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <epx/epx.h>

enum { RANKS_MAX = 1024, RANKS_WORDS = 768, RANKS_GATHER_BYTES = 512 };

typedef struct ranks_slot {
    int failed; /* 1 after it failed by itself; 2 when it stopped because another did */
    char words[RANKS_WORDS];
    unsigned char gather[RANKS_GATHER_BYTES];
} ranks_slot_t;

typedef struct ranks_shared {
    uint32_t arrived, generation; /* the barrier; generation is a futex */
    uint32_t aborted;             /* some rank failed */
    uint32_t spins;               /* polls before a barrier sleeps: 0 with more ranks than cores */
    uint32_t id_ready;
    epx_unique_id_t id;
    uint32_t done, total; /* progress of rank 0, for the line */
    char stage[64];
    ranks_slot_t slot[];
} ranks_shared_t;

/* What one rank of a run holds. */
typedef struct rank {
    int rank, ranks;
    ranks_shared_t *shared;
    void *user;         /* the run's argument */
    epx_group_t *group; /* made by rank_join */
} rank_t;

typedef int (*rank_body_t)(rank_t *rank); /* 0, or what rank_fail returned */

typedef struct ranks_config {
    const char *command; /* for the words: "bench" */
    int ranks;
    bool as_threads;
    rank_body_t body;
    void *user;
} ranks_config_t;

/* Memory that children see: made before ranks_run. NULL when there is none. */
void *ranks_share(size_t bytes);
void ranks_unshare(void *memory, size_t bytes);

/* Runs the body on every rank; 0 if all went well. Failures are printed with their rank. */
int ranks_run(const ranks_config_t *config);

/* Create the rank's group. `like` carries backend, threads, ranks_per_domain, net, timeout; id, rank and ranks are set
 * here. */
int rank_join(rank_t *rank, const epx_group_config_t *like);

/* All ranks have come here. Non-zero if one has failed. */
int rank_barrier(rank_t *rank);

/* At most RANKS_GATHER_BYTES of each rank into all[ranks][bytes]. The form of epx_allgather_fn; context is a rank_t. */
int rank_allgather(void *rank, const void *mine, size_t bytes, void *all);

/* Note the words of a failure and tell the others; returns 1. */
int rank_fail(rank_t *rank, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* The same with the library's words for a call that failed. */
int rank_fail_epx(rank_t *rank, const char *call, epx_status_t status);

/* Where the run is, for the progress line. Only rank 0's counts. */
void rank_stage(rank_t *rank, const char *stage, uint32_t total);
void rank_step(rank_t *rank);

#endif
