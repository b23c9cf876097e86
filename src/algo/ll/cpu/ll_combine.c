/*
 * Low-latency combine on the CPU.
 *
 * send: each expert output goes to its owner's slot, at (token, top-k place), or, when this rank adds first
 * (pre-reduced, or rank-major dispatch), one row at (token, place of this rank among the token's ranks); then
 * `combined` = number; to a rank that was not heard, or is masked, nothing but `left_out` = number. recv: when every
 * rank that has tokens of mine has said one of the two, add what came.
 *
 * The slot's last use has been read when I write: the owner has dispatched this call to me after it combined that one.
 */
#include <string.h>

#include "algo/ll/cpu/ll_cpu.h"
#include "base/fail.h"
#include "base/mutate.h"
#include "plan/format.h"

/* ---- send ---- */

typedef struct back_job {
    epx__ll_cpu_t *ll;
    const epx__ll_call_t *call;
    const uint8_t *x;
    uint64_t slot;
    size_t places, row_bytes;
    int32_t ranked;
} back_job_t;

/* Where a row goes back to; counted as moved. */
static uint8_t *back_row(const back_job_t *job, const epx__ll_visit_t *v, uint32_t place)
{
    epx__exchange_t *exchange = job->ll->exchange;
    bool own = v->source == (uint32_t)exchange->rank;
    *(own ? &exchange->traffic.local_bytes : &exchange->traffic.domain_bytes) += job->row_bytes;
    return (uint8_t *)exchange->peer[v->source] + epx__ll_back_at(&job->ll->layout, job->slot, v->token, place);
}

static void next_rows(const back_job_t *job, const epx__ll_visit_t *v)
{
    for (uint32_t c = 0; c < v->choices; c++)
        job->ll->row_of[v->expert[c]] += v->first[c];
}

static bool mine_to_send(const back_job_t *job, const epx__ll_visit_t *v)
{
    return !job->ll->masked[v->source]; /* who was not heard has no tokens here */
}

/* One row for each choice; a repeated choice has its own place and the same contents. */
static void push_each(void *context, const epx__ll_visit_t *v)
{
    back_job_t *job = context;
    next_rows(job, v);
    for (uint32_t c = 0; mine_to_send(job, v) && c < v->choices; c++) {
        size_t expert = (size_t)v->expert[c];
        size_t row = expert * job->places + (size_t)(job->ll->row_of[expert] - 1);
        memcpy(back_row(job, v, v->place[c]), job->x + row * job->row_bytes, job->row_bytes);
    }
}

/* Weighted sum over my experts of this token, in top-k order, rounded once. */
static void push_reduced(void *context, const epx__ll_visit_t *v)
{
    back_job_t *job = context;
    uint32_t hidden = job->call->dispatch.hidden;
    float *sum = job->ll->sum;
    next_rows(job, v);
    if (!mine_to_send(job, v))
        return;
    memset(sum, 0, hidden * sizeof *sum);
    for (uint32_t c = 0; c < v->choices; c++) {
        size_t expert = (size_t)v->expert[c];
        size_t row = expert * job->places + (size_t)(job->ll->row_of[expert] - 1);
        const uint16_t *y = (const uint16_t *)(const void *)(job->x + row * job->row_bytes);
        float weight = v->weights[v->place[c]];
        for (uint32_t h = 0; h < hidden; h++)
            sum[h] += weight * epx__f32_of_bf16(y[h]);
    }
    uint16_t *out = (uint16_t *)(void *)back_row(job, v, v->rank_place);
    for (uint32_t h = 0; h < hidden; h++)
        out[h] = epx__bf16_of_f32(sum[h]);
}

/* Rank-major: the caller has added already. */
static void push_ranked(void *context, const epx__ll_visit_t *v)
{
    back_job_t *job = context;
    size_t row = (size_t)job->ranked++;
    if (mine_to_send(job, v))
        memcpy(back_row(job, v, v->rank_place), job->x + row * job->row_bytes, job->row_bytes);
}

static bool by_rank(const epx__ll_call_t *call)
{
    return call->combine.pre_reduced || call->dispatch.order == EPX_LL_RANK_MAJOR;
}

epx_status_t epx__ll_cpu_combine_send(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream)
{
    (void)stream;
    epx__ll_cpu_t *ll = exchange->ll;
    const epx__ll_kept_t *kept = epx__ll_kept_of(ll, call);
    back_job_t job = {.ll = ll,
                      .call = call,
                      .x = call->combine.x ? call->combine.x : kept->zero_copy,
                      .slot = call->number % ll->layout.slots,
                      .places = (size_t)ll->layout.ranks * ll->layout.tokens_max,
                      .row_bytes = (size_t)call->dispatch.hidden * 2};
    memset(ll->row_of, 0, call->local_experts * sizeof *ll->row_of);
    for (int r = 0; EPX__MUTATE(ll_combined_first) && r < exchange->topology->ranks; r++)
        epx__ll_post(ll, r, &epx__ll_to(ll, call->number, r)->combined, call->number);
    epx__ll_each(ll, call,
                 call->dispatch.order == EPX_LL_RANK_MAJOR ? push_ranked
                 : call->combine.pre_reduced               ? push_reduced
                                                           : push_each,
                 &job);
    for (int r = 0; r < exchange->topology->ranks; r++)
        epx__ll_post(ll, r,
                     kept->heard[r] && !ll->masked[r] ? &epx__ll_to(ll, call->number, r)->combined
                                                      : &epx__ll_to(ll, call->number, r)->left_out,
                     call->number);
    return EPX_OK;
}

/* ---- recv ---- */

static bool combined(epx__ll_cpu_t *ll, int rank, void *context)
{
    const epx__ll_call_t *call = context;
    bool came;
    if (EPX__MUTATE(ll_no_combined))
        return true;
    return epx__ll_ended(ll, rank, call->number, &came);
}

static epx_status_t note_came(epx__ll_cpu_t *ll, int rank, void *context)
{
    const epx__ll_call_t *call = context;
    bool came;
    (void)epx__ll_ended(ll, rank, call->number, &came);
    if (EPX__MUTATE(ll_no_combined))
        came = true;
    epx__ll_kept_of(ll, call)->came[rank] = came;
    return EPX_OK;
}

static void owes(epx__ll_cpu_t *ll, int rank, void *context)
{
    epx__ll_kept_of(ll, context)->owing[rank] = 1;
}

/* Ranks that hold an expert of one of my tokens and were asked; the others have nothing for me. Who was masked since
 * then may still write. */
static void whom_to_wait_for(epx__ll_cpu_t *ll, const epx__ll_call_t *call)
{
    epx__ll_kept_t *kept = epx__ll_kept_of(ll, call);
    const epx_ll_combine_t *c = &call->combine;
    size_t count = (size_t)call->dispatch.tokens * call->dispatch.topk;
    memset(kept->came, 0, ll->layout.ranks);
    memset(ll->done, 1, ll->layout.ranks);
    for (size_t i = 0; i < count; i++) {
        int64_t id = epx__topk_id(c->topk_idx, call->dispatch.topk_idx_bits, i);
        if (id < 0 || id >= (int64_t)call->map.experts)
            continue;
        int32_t rank = epx__expert_rank(&call->map, id);
        if (kept->asked[rank] && !ll->masked[rank])
            ll->done[rank] = 0;
        else if (kept->asked[rank])
            kept->owing[rank] = 1;
    }
}

static const uint16_t *came_row(const epx__ll_cpu_t *ll, const epx__ll_call_t *call, uint32_t token, uint32_t place)
{
    return (
        const uint16_t *)(const void *)((const uint8_t *)ll->exchange->window.base +
                                        epx__ll_back_at(&ll->layout, call->number % ll->layout.slots, token, place));
}

static void add_row(float *sum, const uint16_t *row, float weight, bool weighted, uint32_t hidden)
{
    for (uint32_t h = 0; h < hidden; h++)
        sum[h] += weighted ? weight * epx__f32_of_bf16(row[h]) : epx__f32_of_bf16(row[h]);
}

static void add_token(epx__ll_cpu_t *ll, const epx__ll_call_t *call, uint32_t token)
{
    const epx__ll_kept_t *kept = epx__ll_kept_of(ll, call);
    const epx_ll_combine_t *c = &call->combine;
    uint32_t topk = call->dispatch.topk, hidden = call->dispatch.hidden, bad = 0;
    int bits = call->dispatch.topk_idx_bits;
    float left = 0.0f;
    memset(ll->sum, 0, hidden * sizeof *ll->sum);
    for (uint32_t k = 0; k < topk; k++) {
        int64_t id = epx__topk_id(c->topk_idx, bits, (size_t)token * topk + k);
        if (id < 0 || id >= (int64_t)call->map.experts || !kept->came[epx__expert_rank(&call->map, id)])
            continue;
        float weight = c->topk_weights ? c->topk_weights[(size_t)token * topk + k] : 1.0f;
        left += weight;
        if (!by_rank(call))
            add_row(ll->sum, came_row(ll, call, token, k), weight, true, hidden);
    }
    int32_t ranks[EPX_TOPK_MAX];
    int count = by_rank(call) ? epx__token_ranks(&call->map, c->topk_idx, bits, token, topk, ranks, &bad) : 0;
    for (int i = 0; i < count; i++)
        if (kept->came[ranks[i]])
            add_row(ll->sum, came_row(ll, call, token, (uint32_t)i), 1.0f, false, hidden);
    uint16_t *out = (uint16_t *)c->out + (size_t)token * hidden;
    for (uint32_t h = 0; h < hidden; h++)
        out[h] = epx__bf16_of_f32(ll->sum[h]);
    if (c->weight_left)
        c->weight_left[token] = left;
}

epx_status_t epx__ll_cpu_combine_recv(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream)
{
    (void)stream;
    epx__ll_cpu_t *ll = exchange->ll;
    epx__ll_wait_t wait = {.operation = "ll_combine_recv",
                           .stage = "its expert outputs",
                           .number = call->number,
                           .timeout_ms = call->combine.timeout_ms,
                           .wait_ns = call->combine.wait_ns,
                           .ready = combined,
                           .serve = note_came,
                           .give_up = owes,
                           .context = call};
    whom_to_wait_for(ll, call);
    EPX__TRY(epx__ll_serve_all(ll, &wait));
    for (uint32_t t = 0; t < call->dispatch.tokens; t++)
        add_token(ll, call, t);
    return EPX_OK;
}
