/*
 * Low-latency dispatch on the CPU.
 *
 * send: to each rank whose slot is free for me (`taken` has reached number - slots): the ids of all my tokens, then
 * each wanted token's row at the row place of its own index, then `dispatched` = number. To nobody before all are done
 * with the slot's last call, when that was released after its send half, or somebody given up in it. To a far rank: the
 * same as one record, ids and then the rows that it wants without gaps, put as soon as there is room in the channel.
 * recv: when `dispatched` of every rank shows the number, positions follow from the ids alone; rows are spread, `taken`
 * posted.
 */
#include <inttypes.h>
#include <string.h>

#include "algo/alarm.h"
#include "algo/ll/cpu/ll_cpu.h"
#include "base/fail.h"
#include "base/mutate.h"
#include "device/cpu/bf16.h"
#include "plan/format.h"

uint64_t epx__ll_shape(const epx__ll_call_t *call)
{
    const epx_ll_dispatch_t *d = &call->dispatch;
    uint64_t parts[] = {d->hidden,
                        d->topk,
                        d->experts,
                        (uint64_t)d->format,
                        (uint64_t)(d->round_scale || d->ue8m0),
                        (uint64_t)(d->topk_weights != NULL)};
    uint64_t hash = 1469598103934665603ull;
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        hash = (hash ^ parts[i]) * 1099511628211ull;
    return hash;
}

/* Bytes of a row as it travels: bf16, or e4m3 and then its fp32 scales. */
static size_t wire_bytes(const epx_ll_dispatch_t *d)
{
    return d->format == EPX_LL_FP8 ? d->hidden + d->hidden / 128 * 4 : (size_t)d->hidden * 2;
}

/* From row to row of a record: the next is 16-byte aligned. */
static size_t record_stride(const epx_ll_dispatch_t *d)
{
    return (wire_bytes(d) + 15) / 16 * 16;
}

/* ---- send ---- */

typedef struct send_job {
    epx__ll_call_t *call;
    uint64_t slot;
} send_job_t;

static bool has_credit(const epx__ll_cpu_t *ll, int rank, uint64_t number)
{
    return EPX__MUTATE(ll_no_credit) ||
           epx__ll_load(&epx__ll_from(ll, number, rank)->taken) + ll->layout.slots >= number;
}

/* The most that one record of this call can take. */
static size_t record_bytes(const epx_ll_dispatch_t *d)
{
    return epx__ll_record_rows(d->tokens, d->topk, d->topk_weights != NULL) + d->tokens * record_stride(d);
}

static bool slot_free(epx__ll_cpu_t *ll, int rank, void *context)
{
    const send_job_t *job = context;
    const epx_ll_dispatch_t *d = &job->call->dispatch;
    return has_credit(ll, rank, job->call->number) &&
           (!epx__ll_is_far(ll, rank) || epx__ll_net_ready(ll, rank, job->call->number, record_bytes(d)));
}

static const char *slot_or_room(epx__ll_cpu_t *ll, int rank, void *context)
{
    const send_job_t *job = context;
    return has_credit(ll, rank, job->call->number) ? "room in the channel to it" : "its slot to be free";
}

static int32_t valid_id(const epx__ll_call_t *call, size_t index)
{
    int64_t id = epx__topk_id(call->dispatch.topk_idx, call->dispatch.topk_idx_bits, index);
    return id < 0 || id >= (int64_t)call->map.experts ? -1 : (int32_t)id;
}

static bool wants(const epx__ll_call_t *call, uint32_t token, int rank)
{
    for (uint32_t k = 0; k < call->dispatch.topk; k++) {
        int32_t id = valid_id(call, (size_t)token * call->dispatch.topk + k);
        if (id >= 0 && epx__expert_rank(&call->map, id) == rank)
            return true;
    }
    return false;
}

/* Where each rank's outputs for my tokens will begin in `back`: the ranks one after the other. */
static void place_outputs(const epx__ll_call_t *call, epx__ll_first_t *first, uint32_t ranks)
{
    const epx_ll_dispatch_t *d = &call->dispatch;
    int32_t to[EPX_TOPK_MAX];
    uint32_t bad = 0;
    memset(first, 0, ranks * sizeof *first);
    for (uint32_t t = 0; t < d->tokens; t++) {
        int count = epx__token_ranks(&call->map, d->topk_idx, d->topk_idx_bits, t, d->topk, to, &bad);
        for (int i = 0; i < count; i++)
            first[to[i]].by_rank++;
        for (uint32_t k = 0; k < d->topk; k++) {
            int32_t id = valid_id(call, (size_t)t * d->topk + k);
            if (id >= 0)
                first[epx__expert_rank(&call->map, id)].each++;
        }
    }
    epx__ll_first_t at = {0, 0};
    for (uint32_t r = 0; r < ranks; r++) {
        epx__ll_first_t rows = first[r];
        first[r] = at;
        at.each += rows.each;
        at.by_rank += rows.by_rank;
    }
}

static void write_block(epx__ll_cpu_t *ll, const send_job_t *job, uint8_t *at, int rank)
{
    const epx_ll_dispatch_t *d = &job->call->dispatch;
    const epx__ll_first_t *first = &epx__ll_kept_of(ll, job->call)->first[rank];
    epx__ll_block_t *block = (epx__ll_block_t *)(void *)at;
    size_t count = (size_t)d->tokens * d->topk;
    int32_t *ids = (int32_t *)(void *)(block + 1);
    *block = (epx__ll_block_t){.number = job->call->number,
                               .shape = epx__ll_shape(job->call),
                               .tokens = d->tokens,
                               .weights = d->topk_weights != NULL,
                               .back_each = first->each,
                               .back_by_rank = first->by_rank};
    for (size_t i = 0; i < count; i++)
        ids[i] = valid_id(job->call, i);
    if (d->topk_weights && count)
        memcpy(ids + count, d->topk_weights, count * sizeof(float));
}

/* Quantised once, however many ranks want it. */
static const void *row_to_send(epx__ll_cpu_t *ll, const epx__ll_call_t *call, uint32_t token)
{
    const epx_ll_dispatch_t *d = &call->dispatch;
    const uint16_t *x = (const uint16_t *)d->x + (size_t)token * d->hidden;
    uint8_t *row = ll->rows + token * ll->quantised_bytes;
    if (d->format != EPX_LL_FP8)
        return x;
    if (ll->quantised[token] != call->number)
        epx__fp8_row_bf16(x, d->hidden, d->round_scale || d->ue8m0, row, (float *)(void *)(row + d->hidden));
    ll->quantised[token] = call->number;
    return row;
}

static epx_status_t send_near(epx__ll_cpu_t *ll, int rank, const send_job_t *job)
{
    const epx_ll_dispatch_t *d = &job->call->dispatch;
    epx__exchange_t *exchange = ll->exchange;
    uint8_t *window = exchange->peer[rank];
    uint32_t me = (uint32_t)exchange->rank;
    uint64_t rows = 0;
    if (EPX__MUTATE(ll_flag_first))
        epx__ll_tell(ll, rank, job->call->number, EPX__LL_DISPATCHED);
    write_block(ll, job, window + epx__ll_block_at(&ll->layout, job->slot, me), rank);
    for (uint32_t t = 0; t < d->tokens; t++) {
        if (!wants(job->call, t, rank))
            continue;
        memcpy(window + epx__ll_row_at(&ll->layout, job->slot, me, t), row_to_send(ll, job->call, t), wire_bytes(d));
        rows++;
    }
    *(rank == exchange->rank ? &exchange->traffic.local_bytes : &exchange->traffic.domain_bytes) +=
        rows * wire_bytes(d);
    return EPX_OK;
}

static epx_status_t send_far(epx__ll_cpu_t *ll, int rank, const send_job_t *job)
{
    const epx_ll_dispatch_t *d = &job->call->dispatch;
    uint8_t *record = epx__ll_net_out(ll, rank, job->call->number);
    size_t bytes = epx__ll_record_rows(d->tokens, d->topk, d->topk_weights != NULL);
    if (EPX__MUTATE(ll_net_word_first))
        epx__ll_tell(ll, rank, job->call->number, EPX__LL_DISPATCHED);
    write_block(ll, job, record, rank);
    for (uint32_t t = 0; t < d->tokens; t++) {
        if (!wants(job->call, t, rank))
            continue;
        memcpy(record + bytes, row_to_send(ll, job->call, t), wire_bytes(d));
        bytes += record_stride(d);
    }
    size_t to = epx__ll_block_at(&ll->layout, job->slot, (uint32_t)ll->exchange->rank);
    return epx__ll_net_put(ll, rank, job->call->number, to, bytes);
}

static epx_status_t send_to(epx__ll_cpu_t *ll, int rank, void *context)
{
    const send_job_t *job = context;
    EPX__TRY((epx__ll_is_far(ll, rank) ? send_far : send_near)(ll, rank, job));
    epx__ll_kept_of(ll, job->call)->asked[rank] = 1;
    epx__ll_tell(ll, rank, job->call->number, EPX__LL_DISPATCHED);
    return EPX_OK;
}

static void owes(epx__ll_cpu_t *ll, int rank, void *context)
{
    epx__ll_kept_t *kept = epx__ll_kept_of(ll, context);
    kept->owing[rank] = kept->asked[rank];
}

/* The slot's last call, at that rank. */
static bool ended_last(epx__ll_cpu_t *ll, int rank, void *context)
{
    bool came;
    return epx__ll_ended(ll, rank, epx__ll_kept_of(ll, context)->last, &came);
}

static epx_status_t nothing(epx__ll_cpu_t *ll, int rank, void *context)
{
    (void)ll, (void)rank, (void)context;
    return EPX_OK;
}

/* The slot's last call was released after its send half: outputs may be under way to places that are other ranks' in
 * this one. So long as they are, no ids permit new ones. Who is masked owes. */
static epx_status_t await_unread(epx__ll_cpu_t *ll, epx__ll_call_t *call)
{
    epx__ll_kept_t *kept = epx__ll_kept_of(ll, call);
    epx__ll_wait_t wait = {.operation = "ll_dispatch_send",
                           .stage = "its outputs of the slot's last call, which was released",
                           .number = call->number,
                           .timeout_ms = call->dispatch.timeout_ms,
                           .ready = ended_last,
                           .serve = nothing,
                           .give_up = owes,
                           .context = call};
    for (int r = 0; r < ll->exchange->topology->ranks; r++) {
        ll->done[r] = !kept->asked[r] || ll->masked[r];
        if (ll->masked[r])
            owes(ll, r, call);
    }
    EPX__TRY(epx__ll_serve_all(ll, &wait));
    kept->unread = false;
    return EPX_OK;
}

/* A rank given up in the slot's last call may still write there, until it says that it is done with it, has destroyed
 * its buffer, or is dead; and a little longer when its bytes come over the network. */
static epx_status_t slot_settled(epx__ll_cpu_t *ll, const epx__ll_kept_t *kept, uint64_t slot)
{
    bool came;
    for (int r = 0; r < ll->exchange->topology->ranks; r++) {
        if (!kept->owing[r] || epx__ll_ended(ll, r, kept->last, &came))
            continue;
        bool closed = epx__ll_is_far(ll, r) ? epx__ll_net_left(ll, r) : epx__alarm_closed(ll->exchange, r);
        if (!closed && !epx__bootstrap_dead(ll->exchange->bootstrap, r))
            return epx__fail(EPX_E_BUSY,
                             "ll_dispatch_send: slot %" PRIu64
                             " may still be written by rank %d, which was given up in call %" PRIu64
                             " but is alive; end its process, or make the buffer with more ll_slots",
                             slot, r, kept->last);
        uint64_t rest_ns = epx__ll_is_far(ll, r) ? epx__ll_net_rest_ns(ll, r) : 0;
        while (rest_ns && !epx__alarm_is_up(ll->exchange)) {
            epx__sleep_ns(rest_ns < 1000000 ? rest_ns : 1000000);
            rest_ns = epx__ll_net_rest_ns(ll, r);
        }
    }
    return EPX_OK;
}

epx_status_t epx__ll_cpu_dispatch_send(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream)
{
    (void)stream;
    epx__ll_cpu_t *ll = exchange->ll;
    epx__ll_kept_t *kept = epx__ll_kept_of(ll, call);
    size_t ranks = (size_t)exchange->topology->ranks;
    uint32_t bad = 0;
    epx__ll_net_retry(ll);
    if (kept->unread && !EPX__MUTATE(ll_no_unread))
        EPX__TRY(await_unread(ll, call));
    EPX__TRY(slot_settled(ll, kept, call->number % ll->layout.slots));
    memset(kept->asked, 0, ranks);
    memset(kept->owing, 0, ranks);
    kept->last = call->number;
    for (size_t i = 0; i < (size_t)call->dispatch.tokens * call->dispatch.topk; i++)
        bad += valid_id(call, i) < 0 && epx__topk_id(call->dispatch.topk_idx, call->dispatch.topk_idx_bits, i) != -1;
    atomic_fetch_add(&exchange->fault.bad_ids, bad);
    place_outputs(call, kept->first, ll->layout.ranks);
    send_job_t job = {call, call->number % ll->layout.slots};
    epx__ll_wait_t wait = {.operation = "ll_dispatch_send",
                           .stage = "its slot to be free",
                           .number = call->number,
                           .timeout_ms = call->dispatch.timeout_ms,
                           .ready = slot_free,
                           .serve = send_to,
                           .stage_of = slot_or_room,
                           .context = &job};
    memcpy(ll->done, ll->masked, ranks);
    EPX__TRY(epx__ll_serve_all(ll, &wait));
    return epx__ll_net_settle(ll, &wait);
}

/* ---- recv ---- */

static bool dispatched(epx__ll_cpu_t *ll, int rank, void *context)
{
    const epx__ll_call_t *call = context;
    return epx__ll_load(&epx__ll_from(ll, call->number, rank)->dispatched) >= call->number;
}

static epx_status_t read_block(epx__ll_cpu_t *ll, int rank, void *context)
{
    const epx__ll_call_t *call = context;
    epx__ll_kept_t *kept = epx__ll_kept_of(ll, call);
    const uint8_t *at = (const uint8_t *)ll->exchange->window.base +
                        epx__ll_block_at(&ll->layout, call->number % ll->layout.slots, (uint32_t)rank);
    const epx__ll_block_t *block = (const epx__ll_block_t *)(const void *)at;
    if (block->number != call->number || block->shape != epx__ll_shape(call) || block->tokens > ll->layout.tokens_max)
        return epx__alarm_raise(ll->exchange, EPX_E_MISMATCH, call->number, rank,
                                "ll_dispatch (call %" PRIu64
                                "): ranks %d and %d disagree on the shape (hidden, topk, experts, "
                                "format, scales, or whether weights are given)",
                                call->number, ll->exchange->rank, rank);
    size_t count = (size_t)block->tokens * call->dispatch.topk;
    size_t to = (size_t)rank * ll->layout.tokens_max * ll->layout.topk_max;
    const int32_t *ids = (const int32_t *)(const void *)(block + 1);
    kept->tokens[rank] = block->tokens;
    kept->heard[rank] = 1;
    kept->back[rank] = (epx__ll_first_t){block->back_each, block->back_by_rank};
    memcpy(kept->ids + to, ids, count * sizeof(int32_t));
    if (block->weights)
        memcpy(kept->weights + to, ids + count, count * sizeof(float));
    return EPX_OK;
}

typedef struct spread_job {
    epx__ll_cpu_t *ll;
    const epx__ll_call_t *call;
    uint64_t slot;
    size_t places;  /* rows of one expert's part of the output: R*M */
    int32_t ranked; /* rank-major: next row */
} spread_job_t;

/* Scales travel as fp32 after the row; the output has the row as its fastest index. `part`: expert, or 0. */
static void put_scales(const spread_job_t *job, const uint8_t *wire, size_t part, size_t row)
{
    const epx_ll_dispatch_t *d = &job->call->dispatch;
    const float *scales = (const float *)(const void *)(wire + d->hidden);
    size_t blocks = d->hidden / 128;
    if (!d->ue8m0) {
        float *out = (float *)d->recv_scales + part * blocks * job->places;
        for (size_t b = 0; b < blocks; b++)
            out[b * job->places + row] = scales[b];
        return;
    }
    int32_t *out = (int32_t *)d->recv_scales + part * (blocks / 4) * job->places;
    for (size_t b = 0; b < blocks / 4; b++) {
        uint8_t four[4];
        for (size_t i = 0; i < 4; i++)
            four[i] = epx__ue8m0_of_f32_up(scales[b * 4 + i]);
        out[b * job->places + row] = epx__ue8m0_pack(four);
    }
}

/* The row of a token as it came: at the place of its index, or among those of its source's record. */
static const uint8_t *row_that_came(const spread_job_t *job, const epx__ll_visit_t *v)
{
    const epx__ll_layout_t *layout = &job->ll->layout;
    const epx_ll_dispatch_t *d = &job->call->dispatch;
    const uint8_t *window = job->ll->exchange->window.base;
    if (!epx__ll_is_far(job->ll, (int)v->source))
        return window + epx__ll_row_at(layout, job->slot, v->source, v->token);
    uint32_t tokens = epx__ll_kept_of(job->ll, job->call)->tokens[v->source];
    return window + epx__ll_block_at(layout, job->slot, v->source) +
           epx__ll_record_rows(tokens, d->topk, d->topk_weights != NULL) + v->index * record_stride(d);
}

static void put_row(const spread_job_t *job, const epx__ll_visit_t *v, size_t part, size_t row)
{
    const epx_ll_dispatch_t *d = &job->call->dispatch;
    const uint8_t *wire = row_that_came(job, v);
    size_t bytes = d->format == EPX_LL_FP8 ? d->hidden : (size_t)d->hidden * 2;
    memcpy((uint8_t *)d->recv_x + (part * job->places + row) * bytes, wire, bytes);
    if (d->format == EPX_LL_FP8)
        put_scales(job, wire, part, row);
    d->src_info[part * job->places + row] = (int32_t)v->token;
}

static void spread_experts(void *context, const epx__ll_visit_t *v)
{
    spread_job_t *job = context;
    const epx_ll_dispatch_t *d = &job->call->dispatch;
    for (uint32_t c = 0; c < v->choices; c++) {
        if (!v->first[c])
            continue;
        size_t expert = (size_t)v->expert[c];
        put_row(job, v, expert, (size_t)job->ll->row_of[expert]++);
        if (d->layout_range)
            d->layout_range[expert * job->ll->layout.ranks + v->source]++;
    }
}

static void spread_ranks(void *context, const epx__ll_visit_t *v)
{
    spread_job_t *job = context;
    const epx_ll_dispatch_t *d = &job->call->dispatch;
    size_t row = (size_t)job->ranked++, topk = d->topk;
    put_row(job, v, 0, row);
    d->recv_count[v->source]++;
    for (uint32_t c = 0; c < v->choices; c++)
        if (v->first[c])
            job->ll->row_of[v->expert[c]]++; /* for the statistics */
    for (size_t k = 0; k < topk; k++) {
        if (d->recv_topk_idx)
            d->recv_topk_idx[row * topk + k] = -1;
        if (d->recv_topk_weights)
            d->recv_topk_weights[row * topk + k] = 0.0f;
    }
    for (uint32_t c = 0; c < v->choices; c++) {
        size_t at = row * topk + v->place[c];
        if (d->recv_topk_idx)
            d->recv_topk_idx[at] = v->expert[c];
        if (d->recv_topk_weights && v->weights)
            d->recv_topk_weights[at] = v->weights[v->place[c]];
    }
}

/* Counts so far become (begin << 32 | count), in source order. */
static void finish_ranges(int64_t *ranges, size_t ranks)
{
    int64_t begin = 0;
    for (size_t r = 0; r < ranks; r++) {
        int64_t count = ranges[r];
        ranges[r] = (int64_t)((uint64_t)begin << 32 | (uint64_t)count);
        begin += count;
    }
}

static void spread(epx__ll_cpu_t *ll, const epx__ll_call_t *call)
{
    const epx_ll_dispatch_t *d = &call->dispatch;
    size_t ranks = ll->layout.ranks, local = call->local_experts;
    bool ranked = d->order == EPX_LL_RANK_MAJOR;
    spread_job_t job = {ll, call, call->number % ll->layout.slots, ranks * ll->layout.tokens_max, 0};
    memset(ll->row_of, 0, local * sizeof *ll->row_of);
    if (ranked)
        memset(d->recv_count, 0, ranks * sizeof(int32_t));
    else if (d->layout_range)
        memset(d->layout_range, 0, local * ranks * sizeof(int64_t));
    epx__ll_each(ll, call, ranked ? spread_ranks : spread_experts, &job);
    for (size_t e = 0; e < local; e++) {
        if (!ranked)
            d->recv_count[e] = ll->row_of[e];
        if (!ranked && d->layout_range)
            finish_ranges(d->layout_range + e * ranks, ranks);
        if (d->expert_stats)
            d->expert_stats[e] += ll->row_of[e];
    }
    for (size_t r = 0; ranked && d->layout_range && r < ranks; r++)
        d->layout_range[r] = d->recv_count[r];
    if (ranked && d->layout_range)
        finish_ranges(d->layout_range, ranks);
}

/* Masked ranks hear it too: they may send on, nobody looks. */
static void tell_taken(epx__ll_cpu_t *ll, const epx__ll_call_t *call)
{
    for (int r = 0; r < ll->exchange->topology->ranks; r++)
        epx__ll_tell(ll, r, call->number, EPX__LL_TAKEN);
}

epx_status_t epx__ll_cpu_dispatch_recv(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream)
{
    (void)stream;
    epx__ll_cpu_t *ll = exchange->ll;
    epx__ll_kept_t *kept = epx__ll_kept_of(ll, call);
    size_t ranks = (size_t)exchange->topology->ranks;
    memset(kept->tokens, 0, ranks * sizeof *kept->tokens);
    memset(kept->heard, 0, ranks);
    epx__ll_wait_t wait = {.operation = "ll_dispatch_recv",
                           .stage = "its tokens",
                           .number = call->number,
                           .timeout_ms = call->dispatch.timeout_ms,
                           .wait_ns = call->dispatch.wait_ns,
                           .ready = dispatched,
                           .serve = read_block,
                           .give_up = owes,
                           .context = call};
    memcpy(ll->done, ll->masked, ranks);
    epx__ll_net_retry(ll);
    EPX__TRY(epx__ll_serve_all(ll, &wait));
    if (EPX__MUTATE(ll_taken_first)) {
        tell_taken(ll, call);
        epx__sleep_ns(300000);
    }
    spread(ll, call);
    tell_taken(ll, call);
    return epx__ll_net_settle(ll, &wait);
}
