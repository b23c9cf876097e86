/* Who chose which expert of this rank: every half that needs positions walks the same order. */
#include "algo/ll/cpu/ll_cpu.h"

/* Fill in the visit of one token; false when it did not come here. */
static bool look_at(const epx__ll_call_t *call, int rank, epx__ll_visit_t *visit)
{
    int32_t ranks[EPX_TOPK_MAX];
    uint32_t bad = 0;
    visit->choices = 0;
    for (uint32_t k = 0; k < call->dispatch.topk; k++) {
        int32_t id = visit->ids[k];
        if (id < 0 || epx__expert_rank(&call->map, id) != rank)
            continue;
        int32_t local = epx__expert_local(&call->map, id);
        uint32_t n = visit->choices++;
        visit->place[n] = k;
        visit->expert[n] = local;
        visit->first[n] = true;
        for (uint32_t i = 0; i < n; i++)
            visit->first[n] &= visit->expert[i] != local;
    }
    if (visit->choices == 0)
        return false;
    int count = epx__token_ranks(&call->map, visit->ids, 32, 0, call->dispatch.topk, ranks, &bad);
    for (int i = 0; i < count; i++)
        if (ranks[i] == rank)
            visit->rank_place = (uint32_t)i;
    return true;
}

uint32_t epx__ll_each_of(epx__ll_cpu_t *ll, const epx__ll_call_t *call, uint32_t source, uint32_t token,
                         bool (*visit)(void *context, const epx__ll_visit_t *visit), void *context)
{
    const epx__ll_kept_t *kept = epx__ll_kept_of(ll, call);
    size_t topk = call->dispatch.topk, first = (size_t)source * ll->layout.tokens_max * ll->layout.topk_max;
    epx__ll_visit_t v = {.source = source};
    for (v.token = token; v.token < kept->tokens[source]; v.token++) {
        v.ids = kept->ids + first + v.token * topk;
        v.weights = call->dispatch.topk_weights ? kept->weights + first + v.token * topk : NULL;
        if (!look_at(call, ll->exchange->rank, &v))
            continue;
        if (!visit(context, &v))
            break;
        v.index++;
    }
    return v.token;
}

typedef struct every {
    void (*visit)(void *context, const epx__ll_visit_t *visit);
    void *context;
} every_t;

static bool visit_every(void *context, const epx__ll_visit_t *v)
{
    const every_t *every = context;
    every->visit(every->context, v);
    return true;
}

void epx__ll_each(epx__ll_cpu_t *ll, const epx__ll_call_t *call,
                  void (*visit)(void *context, const epx__ll_visit_t *visit), void *context)
{
    every_t every = {visit, context};
    for (uint32_t s = 0; s < ll->layout.ranks; s++)
        epx__ll_each_of(ll, call, s, 0, visit_every, &every);
}
