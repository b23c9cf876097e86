/*
 * epx demo, in parts: options and the text (demo.c), the model (demo_layer.c), one rank's run (demo_rank.c), the same
 * layer in one process and the comparison (demo_check.c), what is printed (demo_show.c).
 */
#ifndef EPX_TOOL_DEMO_H
#define EPX_TOOL_DEMO_H

#include "demo_layer.h"
#include "place.h"
#include "ranks.h"

typedef enum demo_step {
    DEMO_GATE,
    DEMO_DISPATCH,
    DEMO_EXPERTS,
    DEMO_COMBINE,
    DEMO_DISPATCH_BACK,
    DEMO_EXPERTS_BACK,
    DEMO_COMBINE_BACK,
    DEMO_STEPS
} demo_step_t;

typedef struct demo_options {
    const char *text;
    long ranks, domains, tokens, hidden, topk, experts, seed;
    int backend;
    bool as_threads;
    const char *net;
} demo_options_t;

/* Written by the ranks, read by the parent. */
typedef struct demo_result {
    place_t place;
    int32_t domain_of[RANKS_MAX];
    uint32_t rows[RANKS_MAX];                 /* that each rank received */
    uint64_t wire_rows;                       /* of those, from other ranks */
    int32_t expert_tokens[LAYER_EXPERTS_MAX]; /* by global expert number */
    double step_us[DEMO_STEPS][RANKS_MAX];
} demo_result_t;

typedef struct demo {
    demo_options_t options;
    uint8_t *text;
    size_t tokens; /* bytes of the text that take part */
    layer_t layer;
    int32_t *expert_rank;  /* [experts] */
    bool mapped;           /* experts are not a multiple of the ranks */
    demo_result_t *result; /* shared */
    /* What the layer gave, shared: */
    uint16_t *out, *dx; /* [tokens][hidden] */
    float *dweights;    /* [tokens][topk] */
} demo_t;

/* Tokens are dealt to the ranks in equal stretches. */
static inline size_t demo_first(const demo_t *demo, int rank)
{
    return demo->tokens * (size_t)rank / (size_t)demo->options.ranks;
}

int demo_rank_body(rank_t *rank); /* rank->user is a demo_t */

/* The same layer in this process; counts what differs. Non-zero without memory. */
int demo_check(const demo_t *demo, uint64_t *wrong, uint64_t *compared);

void demo_show(const demo_t *demo);

#endif
