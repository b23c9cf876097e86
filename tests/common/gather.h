/* Ranks as threads that join one bootstrap; for the tests of the bootstrap itself. */
#ifndef EPX_TEST_GATHER_H
#define EPX_TEST_GATHER_H

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#include "base/fail.h"
#include "bootstrap/bootstrap.h"

typedef struct gathered {
    int rank, ranks;
    epx__bootstrap_config_t config;
    epx__bootstrap_t *bootstrap;
    epx_status_t status;
    char detail[EPX__DETAIL_BYTES];
    void (*body)(struct gathered *);
    void *context;
    pthread_t thread;
} gathered_t;

static inline void *gathered_main(void *argument)
{
    gathered_t *one = argument;
    one->status = epx__bootstrap_open(&one->config, &one->bootstrap);
    if (one->status != EPX_OK)
        epx__detail_set(epx__detail());
    for (size_t i = 0; i < sizeof(one->detail); i++)
        if (!(one->detail[i] = epx__detail()[i]))
            break;
    if (one->body)
        one->body(one);
    epx__bootstrap_close(one->bootstrap);
    one->bootstrap = NULL;
    return NULL;
}

/* A config per rank, all with `id`; the caller may change some before gather_start. */
static inline gathered_t *gather_make(int ranks, const epx_unique_id_t *id, uint64_t timeout_ms,
                                      void (*body)(gathered_t *), void *context)
{
    gathered_t *all = calloc((size_t)ranks, sizeof(*all));
    for (int rank = 0; all && rank < ranks; rank++) {
        all[rank].rank = rank;
        all[rank].ranks = ranks;
        all[rank].body = body;
        all[rank].context = context;
        all[rank].config = (epx__bootstrap_config_t){.rank = rank,
                                                     .ranks = ranks,
                                                     .id = id,
                                                     .config_hash = 7,
                                                     .config_words = "as the test has it",
                                                     .timeout_ms = timeout_ms};
    }
    return all;
}

static inline void gather_start(gathered_t *one)
{
    pthread_create(&one->thread, NULL, gathered_main, one);
}

static inline void gather_wait(gathered_t *one)
{
    pthread_join(one->thread, NULL);
}

static inline void gather_run(gathered_t *all, int ranks)
{
    for (int rank = 0; rank < ranks; rank++)
        gather_start(&all[rank]);
    for (int rank = 0; rank < ranks; rank++)
        gather_wait(&all[rank]);
}

#endif
