/*
 * Made-up routing: which experts each token of each rank chooses. The same (kind, seed, rank, token) gives the same
 * ids in every program, so that two programs can be compared on the same work. Header only: the MPI peer shares it.
 */
#ifndef EPX_TOOL_ROUTING_GEN_H
#define EPX_TOOL_ROUTING_GEN_H

#include <stdint.h>
#include <stdlib.h>

typedef enum routing_kind { ROUTING_UNIFORM = 0, ROUTING_ZIPF = 1 } routing_kind_t;

/* splitmix64: a step of a counter, well mixed. */
static inline uint64_t routing_mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

typedef struct routing_gen {
    routing_kind_t kind;
    uint32_t experts, topk;
    uint64_t seed;
    uint64_t *below;   /* zipf: [experts] cumulative weights, scaled to integers */
    uint32_t *popular; /* zipf: which expert is the i-th most popular, a seeded shuffle */
} routing_gen_t;

static inline void routing_gen_fini(routing_gen_t *gen)
{
    free(gen->below);
    free(gen->popular);
    gen->below = NULL;
    gen->popular = NULL;
}

/* 0, or -1 without memory. zipf: the i-th most popular expert has weight 1/(i+1). */
static inline int routing_gen_init(routing_gen_t *gen, routing_kind_t kind, uint32_t experts, uint32_t topk,
                                   uint64_t seed)
{
    *gen = (routing_gen_t){.kind = kind, .experts = experts, .topk = topk, .seed = seed};
    gen->below = malloc(experts * sizeof *gen->below);
    gen->popular = malloc(experts * sizeof *gen->popular);
    if (!gen->below || !gen->popular) {
        routing_gen_fini(gen);
        return -1;
    }
    uint64_t sum = 0;
    for (uint32_t i = 0; i < experts; i++) {
        sum += kind == ROUTING_ZIPF ? (UINT64_C(1) << 32) / (i + 1) : UINT64_C(1) << 32;
        gen->below[i] = sum;
        gen->popular[i] = i;
    }
    for (uint32_t i = experts - 1; i > 0 && kind == ROUTING_ZIPF; i--) {
        uint32_t j = (uint32_t)(routing_mix(seed * 31 + i) % (i + 1)), keep = gen->popular[i];
        gen->popular[i] = gen->popular[j];
        gen->popular[j] = keep;
    }
    return 0;
}

static inline uint32_t routing_gen_draw(const routing_gen_t *gen, uint64_t random)
{
    uint64_t target = random % gen->below[gen->experts - 1];
    uint32_t low = 0, high = gen->experts - 1;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (gen->below[middle] > target)
            high = middle;
        else
            low = middle + 1;
    }
    return gen->popular[low];
}

static inline int routing_gen_has(const int64_t *ids, uint32_t count, int64_t id)
{
    for (uint32_t i = 0; i < count; i++)
        if (ids[i] == id)
            return 1;
    return 0;
}

/* The topk different experts of one token; -1 where there are not that many. */
static inline void routing_gen_token(const routing_gen_t *gen, int rank, uint32_t token, int64_t *ids)
{
    uint64_t state = routing_mix(gen->seed ^ ((uint64_t)(uint32_t)rank << 40) ^ token);
    for (uint32_t k = 0; k < gen->topk; k++) {
        int64_t id = -1;
        for (int tries = 0; tries < 64 && id < 0; tries++) {
            state = routing_mix(state);
            int64_t drawn = routing_gen_draw(gen, state);
            id = routing_gen_has(ids, k, drawn) ? -1 : drawn;
        }
        for (uint32_t e = 0; e < gen->experts && id < 0; e++) /* nearly all are taken: the first that is free */
            id = routing_gen_has(ids, k, e) ? -1 : (int64_t)e;
        ids[k] = id;
    }
}

#endif
