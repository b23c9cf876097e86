/* Channels of a few ranks that are threads of this process, without a group: one record gathered in memory. */
#ifndef EPX_TEST_CHANNELS_H
#define EPX_TEST_CHANNELS_H

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/fail.h"
#include "channel/channels.h"
#include "common/check.h"

#define NET_RANKS_MAX 16

typedef struct net_world net_world_t;
typedef struct net_rank {
    net_world_t *world;
    int rank;
    epx__channels_config_t config;
    epx__channels_t *channels;
    epx_status_t status;
    char words[1024];
    char *memory;
    void (*body)(struct net_rank *rank);
    void *argument;
} net_rank_t;

struct net_world {
    int ranks;
    pthread_barrier_t barrier;
    char *gathered;
    net_rank_t rank[NET_RANKS_MAX];
};

static inline epx_status_t net_world_gather(void *context, const void *mine, size_t bytes, void *all)
{
    net_rank_t *self = context;
    net_world_t *world = self->world;
    if (pthread_barrier_wait(&world->barrier) == PTHREAD_BARRIER_SERIAL_THREAD)
        world->gathered = realloc(world->gathered, bytes * (size_t)world->ranks);
    pthread_barrier_wait(&world->barrier);
    memcpy(world->gathered + (size_t)self->rank * bytes, mine, bytes);
    pthread_barrier_wait(&world->barrier);
    memcpy(all, world->gathered, bytes * (size_t)world->ranks);
    pthread_barrier_wait(&world->barrier);
    return EPX_OK;
}

static inline void *net_rank_main(void *argument)
{
    net_rank_t *self = argument;
    self->status = epx__channels_create(&self->config, &self->channels);
    strncpy(self->words, epx__detail(), sizeof self->words - 1);
    pthread_barrier_wait(&self->world->barrier); /* nor goes before all are connected */
    if (self->status == EPX_OK && self->body)
        self->body(self);
    pthread_barrier_wait(&self->world->barrier); /* nobody leaves before all have done */
    epx__channels_destroy(self->channels);
    self->channels = NULL;
    return NULL;
}

/* Run `body` as each rank: `base` is every rank's configuration but for who it is. Memory 0 is bytes zeroed bytes. */
static inline void net_world_run(int ranks, const epx__channels_config_t *base, size_t bytes,
                                 void (*body)(net_rank_t *rank), void *argument)
{
    static net_world_t world;
    pthread_t threads[NET_RANKS_MAX];
    epx_channel_memory_t memories[NET_RANKS_MAX];
    memset(&world, 0, sizeof world);
    world.ranks = ranks;
    pthread_barrier_init(&world.barrier, NULL, (unsigned)ranks);
    for (int r = 0; r < ranks; r++) {
        net_rank_t *self = &world.rank[r];
        self->world = &world;
        self->rank = r;
        self->memory = calloc(1, bytes);
        memories[r] = (epx_channel_memory_t){self->memory, bytes, 0};
        self->config = *base;
        self->config.rank = r;
        self->config.ranks = ranks;
        self->config.memories = &memories[r];
        self->config.memory_count = base->memory_count ? base->memory_count : 1;
        self->config.allgather = net_world_gather;
        self->config.allgather_context = self;
        self->body = body;
        self->argument = argument;
    }
    for (int r = 0; r < ranks; r++)
        pthread_create(&threads[r], NULL, net_rank_main, &world.rank[r]);
    for (int r = 0; r < ranks; r++)
        pthread_join(threads[r], NULL);
    for (int r = 0; r < ranks; r++) {
        CHECK(world.rank[r].status == EPX_OK, "rank %d: %s", r, world.rank[r].words);
        free(world.rank[r].memory);
    }
    free(world.gathered);
    pthread_barrier_destroy(&world.barrier);
}

static inline const epx_port_channel_t *net_port(const net_rank_t *self, int to, uint32_t channel)
{
    return &self->channels->port[(uint32_t)to * self->channels->channels + channel];
}

#endif
