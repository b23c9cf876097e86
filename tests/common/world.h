/*
 * A world for tests: R ranks as threads of one process or as forked processes, each with its own group made through the
 * public API. Ranks share nothing but a page of counters and the unique ids; no test needs a collective of its own.
 */
#ifndef EPX_TEST_WORLD_H
#define EPX_TEST_WORLD_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include <epx/epx.h>

#include "plan/topology.h"

enum { XT_RANKS_MAX = 64, XT_IDS_MAX = 16, XT_MARKS_MAX = 16 };

/* Shared by all ranks of a run (and, with processes, by the parent). */
typedef struct xt_world {
    atomic_long passed, failed;
    atomic_int id_ready[XT_IDS_MAX];
    epx_unique_id_t id[XT_IDS_MAX];
    atomic_int mark[XT_MARKS_MAX];  /* for tests that need to know how far others are */
    atomic_long note[XT_RANKS_MAX]; /* free for the test */
} xt_world_t;

/* Where "device" memory of the backend under test is. The CPU's is malloc and memcpy. */
typedef struct xt_memory {
    epx_backend_t backend;
    void *(*alloc)(size_t bytes);
    void (*free)(void *memory);
    void (*put)(void *device, const void *host, size_t bytes);
    void (*get)(void *host, const void *device, size_t bytes); /* after all work of the stream */
    void (*fill)(void *device, int byte, size_t bytes);
    epx_stream_t (*stream)(void); /* of the calling thread */
    void (*enter)(int rank);      /* the calling thread becomes that rank (chooses its GPU); may be NULL */
    void (*leave)(void); /* all ranks that were threads of this process have ended: what they left is given up; or NULL
                          */
    bool apart; /* the parent must not touch the device before a fork: ranks that are threads get a process of their
                   own, unless EPX_TEST_RUNS says that none will be forked */
} xt_memory_t;

/* From EPX_TEST_BACKEND: cpu (default), or cuda through the weak symbol xt_memory_cuda that a GPU test links. */
const xt_memory_t *xt_memory(void);
extern const xt_memory_t xt_memory_cuda __attribute__((weak));

typedef struct xt_rank {
    int rank, ranks;
    const char *name;
    xt_world_t *world;
    const xt_memory_t *memory;
    epx_group_t *group;       /* made by xt_run when run->group */
    epx__topology_t topology; /* as the group found it */
    uint64_t random;          /* state of this rank's own generator */
    uint64_t delay_ns_max;    /* xt_delay sleeps up to that long; 0 never */
    uint32_t delay_one_in;    /* once in so many calls */
    void *context;
} xt_rank_t;

typedef struct xt_run {
    const char *name;
    int ranks;
    bool processes;
    bool quiet;           /* say nothing unless something failed */
    bool no_group;        /* the body makes its groups itself */
    int threads;          /* CPU threads a rank copies with; 0 the default */
    int ranks_per_domain; /* 0 as found; EPX_TEST_PER_DOMAIN (as far as it divides) */
    uint64_t timeout_ms;  /* deadline of the library's waits; default EPX_TIMEOUT_MS, else 20 s */
    uint64_t limit_ms;    /* processes still alive then are killed and count as failures; default 100 s */
    uint64_t seed;
    uint64_t may_die; /* bit r: rank r is expected to be killed (processes) */
    void (*body)(xt_rank_t *self);
    void *context;
} xt_run_t;

/*
 * Run it; returns the number of failed checks (a crash is one). Totals over all runs: xt_done.
 *
 * EPX_TEST_RUNS=threads runs only cases whose ranks are threads, all in the test's own process, one after another: on
 * GPUs, where starting CUDA takes longer than most cases, it is then started once. Such a process has no limit_ms, and
 * a crash ends it. EPX_TEST_RUNS=processes runs only the others. Who left out some says how many at the end.
 */
long xt_run(const xt_run_t *run);
/* main's return value: 77, with the reason said, when EPX_TEST_RUNS left nothing to run. */
int xt_done(void);

/* Make a group from id number `index`: rank 0 makes the id. `config`: NULL, or what to add (rank, ranks, id, backend
 * and timeout are filled in when 0). */
epx_status_t xt_group(xt_rank_t *self, int index, const epx_group_config_t *config, epx_group_t **group);

/* Count, and say what failed (the first few of a run). */
void xt_check(xt_rank_t *self, bool good, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
#define XT_CHECK(self, condition, ...) xt_check(self, condition, __FILE__, __LINE__, #condition ": " __VA_ARGS__)
/* The call must succeed; its value is whether it did. */
#define XT_OK(self, call) xt_ok(self, call, __FILE__, __LINE__, #call)
bool xt_ok(xt_rank_t *self, epx_status_t status, const char *file, int line, const char *call);

/* splitmix64: a number from a key; and the next of a rank's own generator, in [0, below). */
uint64_t xt_hash(uint64_t key);
uint64_t xt_mix(uint64_t a, uint64_t b, uint64_t c, uint64_t d);
uint32_t xt_random(xt_rank_t *self, uint32_t below);
void xt_delay(xt_rank_t *self);

/* Marks: a rank says it has come somewhere; another waits for `count` of them (30 s at most; true when they came). */
void xt_mark(xt_rank_t *self, int mark);
bool xt_wait_mark(xt_rank_t *self, int mark, int count);

#endif
