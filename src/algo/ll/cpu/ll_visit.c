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

void epx__ll_each(epx__ll_cpu_t *ll, const epx__ll_call_t *call,
                  void (*visit)(void *context, const epx__ll_visit_t *visit), void *context)
{
    const epx__ll_kept_t *kept = epx__ll_kept_of(ll, call);
    size_t source_ids = (size_t)ll->layout.tokens_max * ll->layout.topk_max, topk = call->dispatch.topk;
    epx__ll_visit_t v;
    for (v.source = 0; v.source < ll->layout.ranks; v.source++)
        for (v.token = 0; v.token < kept->tokens[v.source]; v.token++) {
            size_t at = v.source * source_ids + v.token * topk;
            v.ids = kept->ids + at;
            v.weights = call->dispatch.topk_weights ? kept->weights + at : NULL;
            if (look_at(call, ll->exchange->rank, &v))
                visit(context, &v);
        }
}
