/*
 * Low-latency combine on the CPU.
 *
 * send: all expert outputs for a rank go to its slot one after the other, by (token, top-k place), or, when this rank
 * adds first (pre-reduced, or rank-major dispatch), one row a token, from the row on that its dispatch has named; then
 * `combined` = number. To a far rank they are gathered and put in pieces. To a rank that was not heard, or is masked,
 * nothing but `left_out` = number. recv: when every rank that has tokens of mine has said one of the two, add what
 * came.
 *
 * The slot's last use is over when I write: the owner has dispatched this call to me after it combined that one, or,
 * when it released it, after all had said that they are done with it.
 */
#include <string.h>

#include "algo/alarm.h"
#include "algo/ll/cpu/ll_cpu.h"
#include "base/fail.h"
#include "base/mutate.h"
#include "device/cpu/bf16.h"
#include "device/cpu/copy.h"
#include "plan/format.h"

/* ---- send ---- */

typedef struct back_job {
    epx__ll_cpu_t *ll;
    const epx__ll_call_t *call;
    const uint8_t *x;
    size_t places, row_bytes;
    /* Of the source that is served. */
    uint8_t *to;         /* the next row goes there */
    uint64_t used, most; /* rows gone there; there is room for */
    int32_t *row_of;     /* next row of each local expert */
    int32_t *ranked;     /* the same, rank-major */
} back_job_t;

static bool by_rank(const epx__ll_call_t *call)
{
    return call->combine.pre_reduced || call->dispatch.order == EPX_LL_RANK_MAJOR;
}

static uint8_t *next_place(back_job_t *job)
{
    return job->to + job->used++ * job->row_bytes;
}

static void next_rows(const back_job_t *job, const epx__ll_visit_t *v)
{
    for (uint32_t c = 0; c < v->choices; c++)
        job->row_of[v->expert[c]] += v->first[c];
}

static const uint8_t *row_of(const back_job_t *job, int32_t expert)
{
    return job->x + ((size_t)expert * job->places + (size_t)(job->row_of[expert] - 1)) * job->row_bytes;
}

/* One row for each choice; a repeated choice has its own place and the same contents. */
static bool push_each(void *context, const epx__ll_visit_t *v)
{
    back_job_t *job = context;
    if (job->used + v->choices > job->most)
        return false;
    next_rows(job, v);
    for (uint32_t c = 0; c < v->choices; c++)
        memcpy(next_place(job), row_of(job, v->expert[c]), job->row_bytes);
    return true;
}

/* Weighted sum over my experts of this token, in top-k order, rounded once. */
static bool push_reduced(void *context, const epx__ll_visit_t *v)
{
    back_job_t *job = context;
    uint32_t hidden = job->call->dispatch.hidden;
    float *sum = job->ll->sum;
    if (job->used == job->most)
        return false;
    next_rows(job, v);
    memset(sum, 0, hidden * sizeof *sum);
    for (uint32_t c = 0; c < v->choices; c++) {
        const uint16_t *y = (const uint16_t *)(const void *)row_of(job, v->expert[c]);
        float weight = v->weights[v->place[c]];
        epx__weigh_row_bf16(sum, y, weight, hidden);
    }
    epx__round_row(next_place(job), sum, hidden, EPX_BF16, false);
    return true;
}

/* Rank-major: the caller has added already. */
static bool push_ranked(void *context, const epx__ll_visit_t *v)
{
    back_job_t *job = context;
    (void)v;
    if (job->used == job->most)
        return false;
    memcpy(next_place(job), job->x + (size_t)(*job->ranked)++ * job->row_bytes, job->row_bytes);
    return true;
}

static void count_rows(void *context, const epx__ll_visit_t *v)
{
    epx__ll_cpu_t *ll = context;
    int32_t *rows = ll->source_row + (size_t)v->source * (ll->experts + 1);
    for (uint32_t c = 0; c < v->choices; c++)
        rows[v->expert[c]] += v->first[c];
    rows[ll->experts]++;
}

/* Where each source's rows begin in each local expert's part, and (the last) rank-major. So the sources can be served
 * in any order. */
static void find_rows(epx__ll_cpu_t *ll, const epx__ll_call_t *call)
{
    size_t each = (size_t)ll->experts + 1, ranks = ll->layout.ranks;
    memset(ll->source_row, 0, ranks * each * sizeof *ll->source_row);
    epx__ll_each(ll, call, count_rows, ll);
    for (size_t e = 0; e < each; e++) {
        int32_t at = 0;
        for (size_t s = 0; s < ranks; s++) {
            int32_t rows = ll->source_row[s * each + e];
            ll->source_row[s * each + e] = at;
            at += rows;
        }
    }
}

/* As many rows for `source` as `most`, from token next[source] on, one after the other to `to`. */
static void push_rows(back_job_t *job, int source, uint8_t *to, uint64_t most)
{
    epx__ll_cpu_t *ll = job->ll;
    const epx__ll_call_t *call = job->call;
    job->to = to;
    job->used = 0;
    job->most = most;
    job->row_of = ll->source_row + (size_t)source * ((size_t)ll->experts + 1);
    job->ranked = job->row_of + ll->experts;
    ll->next[source] = epx__ll_each_of(ll, call, (uint32_t)source, ll->next[source],
                                       call->dispatch.order == EPX_LL_RANK_MAJOR ? push_ranked
                                       : call->combine.pre_reduced               ? push_reduced
                                                                                 : push_each,
                                       job);
    ll->gone[source] += (uint32_t)job->used;
    ll->again = ll->next[source] < epx__ll_kept_of(ll, call)->tokens[source];
}

/* Rows that the source has room for, from where it says that mine begin. */
static uint64_t rows_there(const epx__ll_cpu_t *ll, const epx__ll_call_t *call, const epx__ll_kept_t *kept, int source,
                           uint64_t *first)
{
    uint64_t all = (uint64_t)ll->layout.tokens_max * call->dispatch.topk;
    *first = (by_rank(call) ? kept->back[source].by_rank : kept->back[source].each) + (uint64_t)ll->gone[source];
    return *first < all ? all - *first : 0;
}

static epx_status_t send_back(epx__ll_cpu_t *ll, int source, void *context)
{
    back_job_t *job = context;
    epx__exchange_t *exchange = ll->exchange;
    uint64_t number = job->call->number, slot = number % ll->layout.slots, first;
    bool far = epx__ll_is_far(ll, source);
    uint64_t most = rows_there(ll, job->call, epx__ll_kept_of(ll, job->call), source, &first);
    size_t at = epx__ll_back_row_at(&ll->layout, slot, first, job->row_bytes);
    if (EPX__MUTATE(ll_combined_first) || (far && EPX__MUTATE(ll_net_word_first)))
        epx__ll_tell(ll, source, number, EPX__LL_COMBINED);
    if (far) {
        uint64_t piece = ll->net->piece_bytes / job->row_bytes;
        push_rows(job, source, epx__ll_net_out(ll, source, number), most < piece ? most : piece);
        if (job->used)
            EPX__TRY(epx__ll_net_put(ll, source, number, at, job->used * job->row_bytes));
    } else {
        push_rows(job, source, (uint8_t *)exchange->peer[source] + at, most);
        *(source == exchange->rank ? &exchange->traffic.local_bytes : &exchange->traffic.domain_bytes) +=
            job->used * job->row_bytes;
    }
    if (ll->again && job->used == 0)
        return epx__alarm_raise(
            exchange, EPX_E_MISMATCH, number, source,
            "ll_combine (call %llu): rank %d says that the rows of rank %d begin at row %llu, where "
            "there is no room for them",
            (unsigned long long)number, source, exchange->rank, (unsigned long long)first);
    if (!ll->again)
        epx__ll_tell(ll, source, number, EPX__LL_COMBINED);
    return EPX_OK;
}

static bool can_go_back(epx__ll_cpu_t *ll, int rank, void *context)
{
    const back_job_t *job = context;
    return !epx__ll_is_far(ll, rank) || epx__ll_net_ready(ll, rank, job->call->number, ll->net->piece_bytes);
}

static void leave_out(epx__ll_cpu_t *ll, int rank, void *context)
{
    const back_job_t *job = context;
    epx__ll_tell(ll, rank, job->call->number, EPX__LL_LEFT_OUT);
}

epx_status_t epx__ll_cpu_combine_send(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream)
{
    (void)stream;
    epx__ll_cpu_t *ll = exchange->ll;
    epx__ll_kept_t *kept = epx__ll_kept_of(ll, call);
    back_job_t job = {.ll = ll,
                      .call = call,
                      .x = call->combine.x ? call->combine.x : kept->zero_copy,
                      .places = (size_t)ll->layout.ranks * ll->layout.tokens_max,
                      .row_bytes = (size_t)call->dispatch.hidden * 2};
    epx__ll_wait_t wait = {.operation = "ll_combine_send",
                           .stage = "room in the channel to it",
                           .number = call->number,
                           .timeout_ms = call->combine.timeout_ms,
                           .ready = can_go_back,
                           .serve = send_back,
                           .give_up = leave_out,
                           .context = &job};
    kept->unread = true;
    epx__ll_net_retry(ll);
    find_rows(ll, call);
    memset(ll->next, 0, ll->layout.ranks * sizeof *ll->next);
    memset(ll->gone, 0, ll->layout.ranks * sizeof *ll->gone);
    for (int r = 0; r < exchange->topology->ranks; r++) {
        ll->done[r] = !kept->heard[r] || ll->masked[r]; /* who was not heard has no tokens here */
        if (ll->done[r])
            leave_out(ll, r, &job);
    }
    EPX__TRY(epx__ll_serve_all(ll, &wait));
    return epx__ll_net_settle(ll, &wait);
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

/* The next row that `rank` has sent, or would have, had it come. */
static const uint16_t *next_row(epx__ll_cpu_t *ll, const epx__ll_call_t *call, int32_t rank)
{
    size_t at = epx__ll_back_row_at(&ll->layout, call->number % ll->layout.slots, ll->next[rank]++,
                                    (size_t)call->dispatch.hidden * 2);
    return (const uint16_t *)(const void *)((const uint8_t *)ll->exchange->window.base + at);
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
        if (id < 0 || id >= (int64_t)call->map.experts)
            continue;
        int32_t rank = epx__expert_rank(&call->map, id);
        const uint16_t *row = by_rank(call) ? NULL : next_row(ll, call, rank);
        if (!kept->came[rank])
            continue;
        float weight = c->topk_weights ? c->topk_weights[(size_t)token * topk + k] : 1.0f;
        left += weight;
        if (row)
            epx__weigh_row_bf16(ll->sum, row, weight, hidden);
    }
    int32_t ranks[EPX_TOPK_MAX];
    int count = by_rank(call) ? epx__token_ranks(&call->map, c->topk_idx, bits, token, topk, ranks, &bad) : 0;
    for (int i = 0; i < count; i++) {
        const void *row = next_row(ll, call, ranks[i]);
        if (kept->came[ranks[i]])
            epx__sum_rows_f32(ll->sum, false, &row, 1, hidden, EPX_BF16);
    }
    epx__round_row((uint16_t *)c->out + (size_t)token * hidden, ll->sum, hidden, EPX_BF16, false);
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
    epx__ll_kept_of(ll, call)->unread = false; /* who is not waited for owes */
    whom_to_wait_for(ll, call);
    epx__ll_net_retry(ll);
    EPX__TRY(epx__ll_serve_all(ll, &wait));
    const epx__ll_first_t *first = epx__ll_kept_of(ll, call)->first;
    for (uint32_t r = 0; r < ll->layout.ranks; r++)
        ll->next[r] = by_rank(call) ? first[r].by_rank : first[r].each;
    for (uint32_t t = 0; t < call->dispatch.tokens; t++)
        add_token(ll, call, t);
    return EPX_OK;
}
