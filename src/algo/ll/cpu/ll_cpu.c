/* Low latency on the CPU: making and ending it, masks. */
#include "algo/ll/cpu/ll_cpu.h"

#include <string.h>

#include "base/alloc.h"
#include "base/fail.h"

/* The most experts that a call can find on this rank. */
static size_t experts_here(const epx__exchange_t *exchange)
{
    const epx_buffer_config_t *config = &exchange->config;
    size_t ranks = (size_t)exchange->topology->ranks, count = 0;
    if (!config->expert_rank)
        return (config->experts_max + ranks - 1) / ranks;
    for (uint32_t e = 0; e < config->experts; e++)
        count += config->expert_rank[e] == exchange->rank;
    return count;
}

static epx_status_t kept_init(epx__ll_cpu_t *ll, epx__ll_kept_t *kept)
{
    size_t ranks = ll->layout.ranks, each = (size_t)ll->layout.tokens_max * ll->layout.topk_max;
    const epx_buffer_config_t *config = &ll->exchange->config;
    kept->tokens = epx__calloc(ranks, sizeof *kept->tokens);
    kept->ids = epx__calloc(ranks * each, sizeof *kept->ids);
    kept->weights = epx__calloc(ranks * each, sizeof *kept->weights);
    kept->back = epx__calloc(ranks, sizeof *kept->back);
    kept->first = epx__calloc(ranks, sizeof *kept->first);
    kept->asked = epx__calloc(ranks, 1);
    kept->heard = epx__calloc(ranks, 1);
    kept->came = epx__calloc(ranks, 1);
    kept->owing = epx__calloc(ranks, 1);
    if (config->ll_zero_copy) {
        size_t experts = ll->experts ? ll->experts : 1;
        kept->zero_copy = epx__calloc(experts * ranks * ll->layout.tokens_max, (size_t)ll->layout.hidden_max * 2);
    }
    if (!kept->tokens || !kept->ids || !kept->weights || !kept->asked || !kept->heard || !kept->came || !kept->owing ||
        !kept->back || !kept->first || (config->ll_zero_copy && !kept->zero_copy))
        return epx__fail(EPX_E_NOMEM, "no memory for a low-latency slot of %zu ranks and %u tokens", ranks,
                         ll->layout.tokens_max);
    return EPX_OK;
}

static void kept_fini(epx__ll_kept_t *kept)
{
    epx__free(kept->tokens);
    epx__free(kept->ids);
    epx__free(kept->weights);
    epx__free(kept->back);
    epx__free(kept->first);
    epx__free(kept->asked);
    epx__free(kept->heard);
    epx__free(kept->came);
    epx__free(kept->owing);
    epx__free(kept->zero_copy);
}

static void destroy(epx__exchange_t *exchange)
{
    epx__ll_cpu_t *ll = exchange->ll;
    if (!ll)
        return;
    for (uint32_t s = 0; ll->kept && s < ll->layout.slots; s++)
        kept_fini(&ll->kept[s]);
    epx__ll_net_close(ll);
    epx__free(ll->kept);
    epx__free(ll->source_row);
    epx__free(ll->next);
    epx__free(ll->gone);
    epx__free(ll->to);
    epx__free(ll->masked);
    epx__free(ll->done);
    epx__free(ll->row_of);
    epx__free(ll->row);
    epx__free(ll->sum);
    epx__free(ll);
    exchange->ll = NULL;
}

static epx_status_t scratch_init(epx__ll_cpu_t *ll)
{
    size_t ranks = ll->layout.ranks;
    ll->masked = epx__calloc(ranks, 1);
    ll->done = epx__calloc(ranks, 1);
    ll->row_of = epx__calloc(ll->exchange->config.experts_max, sizeof *ll->row_of);
    ll->source_row = epx__calloc(ranks, ((size_t)ll->experts + 1) * sizeof *ll->source_row);
    ll->next = epx__calloc(ranks, sizeof *ll->next);
    ll->gone = epx__calloc(ranks, sizeof *ll->gone);
    ll->row = epx__calloc(ll->layout.row_bytes, 1);
    ll->sum = epx__calloc(ll->layout.hidden_max, sizeof *ll->sum);
    if (!ll->masked || !ll->done || !ll->row_of || !ll->source_row || !ll->next || !ll->gone || !ll->row || !ll->sum)
        return epx__fail(EPX_E_NOMEM, "no memory for low latency among %zu ranks", ranks);
    return EPX_OK;
}

static epx_status_t make(epx__exchange_t *exchange, epx__ll_cpu_t *ll)
{
    size_t ranks = (size_t)exchange->topology->ranks;
    ll->exchange = exchange;
    ll->layout = exchange->layout.ll;
    ll->net = exchange->ll_net;
    ll->experts = (uint32_t)experts_here(exchange);
    ll->to = epx__calloc(ranks, sizeof *ll->to);
    ll->kept = epx__calloc(ll->layout.slots, sizeof *ll->kept);
    if (!ll->to || !ll->kept)
        return epx__fail(EPX_E_NOMEM, "no memory for low latency among %zu ranks", ranks);
    EPX__TRY(scratch_init(ll));
    for (uint32_t s = 0; s < ll->layout.slots; s++)
        EPX__TRY(kept_init(ll, &ll->kept[s]));
    ll->from = (epx__ll_words_t *)(void *)((uint8_t *)exchange->window.base + ll->layout.words_offset);
    for (size_t r = 0; r < ranks; r++)
        if (exchange->peer[r])
            ll->to[r] =
                (epx__ll_words_t *)(void *)((uint8_t *)exchange->peer[r] + ll->layout.words_offset) + exchange->rank;
    return ll->net ? epx__ll_net_open(ll) : EPX_OK;
}

static epx_status_t create(epx__exchange_t *exchange)
{
    epx__ll_cpu_t *ll = epx__calloc(1, sizeof *ll);
    if (!ll)
        return epx__fail(EPX_E_NOMEM, "no memory for low latency");
    exchange->ll = ll;
    epx_status_t status = make(exchange, ll);
    if (status != EPX_OK)
        destroy(exchange);
    return status;
}

static epx_status_t combine_buffer(epx__exchange_t *exchange, epx__ll_call_t *call, void **memory)
{
    epx__ll_cpu_t *ll = exchange->ll;
    *memory = epx__ll_kept_of(ll, call)->zero_copy;
    return EPX_OK;
}

static epx_status_t mask_set(epx__exchange_t *exchange, int rank, int masked, epx_stream_t stream)
{
    (void)stream;
    epx__ll_cpu_t *ll = exchange->ll;
    epx__ll_set_masked(ll, rank, masked != 0);
    return EPX_OK;
}

static epx_status_t mask_get(epx__exchange_t *exchange, int32_t *masked)
{
    const epx__ll_cpu_t *ll = exchange->ll;
    for (uint32_t r = 0; r < ll->layout.ranks; r++)
        masked[r] = ll->masked[r];
    return EPX_OK;
}

static bool outlives(epx__exchange_t *exchange, int rank)
{
    epx__ll_cpu_t *ll = exchange->ll;
    if (epx__ll_is_far(ll, rank))
        epx__ll_net_died(ll, rank);
    if (!exchange->config.ll_mask_on_timeout && !__atomic_load_n(&ll->masked[rank], __ATOMIC_RELAXED))
        return false;
    epx__bell_ring((epx__bell_t *)((epx__control_t *)exchange->window.base)->bell); /* who waits for it looks */
    return true;
}

const epx__ll_ops_t epx__ll_cpu = {
    .name = "cpu",
    .create = create,
    .destroy = destroy,
    .dispatch_send = epx__ll_cpu_dispatch_send,
    .dispatch_recv = epx__ll_cpu_dispatch_recv,
    .combine_send = epx__ll_cpu_combine_send,
    .combine_recv = epx__ll_cpu_combine_recv,
    .combine_buffer = combine_buffer,
    .mask_set = mask_set,
    .mask_get = mask_get,
    .outlives = outlives,
};
