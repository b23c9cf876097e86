/* Low latency on one rank of a bench: buffer, memory, the calls, whole, in halves or in a graph. */
#include "bench_ll.h"

#include <stdlib.h>

enum { UNTOUCHED = 0xee };

/* ---- set-up ---- */

static int make_buffer(bench_rank_t *self)
{
    const bench_t *bench = self->bench;
    const bench_work_t *work = &bench->work;
    uint32_t tokens_max = work->most_tokens ? work->most_tokens : 1;
    epx_buffer_config_t config = {.size = sizeof config,
                                  .lease_bytes = 1u << 20, /* high throughput is not used */
                                  .reserve_bytes = 1u << 20,
                                  .tokens_max = tokens_max,
                                  .topk_max = work->topk,
                                  .experts_max = work->experts,
                                  .ll_tokens_max = tokens_max,
                                  .ll_hidden_max = (uint32_t)bench->options.hidden,
                                  .sms = (int)bench->options.sms};
    if (work->mapped) {
        config.expert_rank = work->expert_rank;
        config.experts = work->experts;
    }
    epx_status_t status = epx_buffer_create(self->rank->group, &config, &self->buffer);
    return status ? rank_fail_epx(self->rank, "epx_buffer_create", status) : 0;
}

static int get_memory(bench_ll_t *ll)
{
    bench_rank_t *self = ll->self;
    const bench_t *bench = self->bench;
    const bench_work_t *work = &bench->work;
    size_t tokens = self->tokens, choices = tokens * work->topk, rows = ll->local_experts * ll->places;
    size_t hidden = (size_t)bench->options.hidden;
    bool ok = (self->x = bench_get(self, tokens * bench->row_bytes)) && (self->ids = bench_get(self, choices * 8)) &&
              (self->weights = bench_get(self, choices * 4)) &&
              (self->out = bench_get(self, tokens * bench->row_bytes)) &&
              (self->y = bench_get(self, rows * bench->row_bytes)) &&
              (ll->recv_x = bench_get(self, rows * hidden * (ll->fp8 ? 1 : 2))) &&
              (!ll->fp8 || (ll->recv_scales = bench_get(self, rows * (hidden / 128) * 4))) &&
              (ll->recv_count = bench_get(self, ll->local_experts * 4)) && (ll->src_info = bench_get(self, rows * 4)) &&
              (ll->layout_range = bench_get(self, ll->local_experts * (size_t)work->ranks * 8));
    return ok ? 0 : 1;
}

static void describe_calls(bench_ll_t *ll)
{
    const bench_rank_t *self = ll->self;
    const bench_options_t *options = &self->bench->options;
    ll->dispatch = (epx_ll_dispatch_t){.size = sizeof ll->dispatch,
                                       .x = self->x,
                                       .tokens = self->tokens,
                                       .hidden = (uint32_t)options->hidden,
                                       .topk_idx = self->ids,
                                       .topk = self->bench->work.topk,
                                       .experts = self->bench->work.experts,
                                       .topk_weights = options->pre_reduced ? self->weights : NULL,
                                       .format = ll->fp8 ? EPX_LL_FP8 : EPX_LL_BF16,
                                       .recv_x = ll->recv_x,
                                       .recv_scales = ll->recv_scales,
                                       .recv_count = ll->recv_count,
                                       .src_info = ll->src_info,
                                       .layout_range = ll->layout_range,
                                       .sms = (int)options->sms};
    ll->combine = (epx_ll_combine_t){.size = sizeof ll->combine,
                                     .x = self->y,
                                     .pre_reduced = options->pre_reduced,
                                     .topk_idx = self->ids,
                                     .topk_weights = self->weights,
                                     .out = self->out,
                                     .sms = (int)options->sms};
}

static int list_experts(bench_ll_t *ll)
{
    const bench_work_t *work = &ll->self->bench->work;
    int me = ll->self->rank->rank;
    ll->local_experts = work->local_experts[me];
    ll->experts = calloc(ll->local_experts + 1, sizeof *ll->experts);
    if (!ll->experts)
        return rank_fail(ll->self->rank, "no memory for the experts' numbers");
    for (uint32_t e = 0; e < work->experts; e++)
        if (work->expert_rank[e] == me)
            ll->experts[work->expert_local[e]] = e;
    return 0;
}

uint64_t bench_ll_output_key(const bench_rank_t *self, int64_t expert, int source, uint32_t token)
{
    return pattern_key((uint64_t)self->bench->options.seed, BENCH_Y + (self->generation << 8), (uint32_t)expert,
                       (uint32_t)source, token);
}

bool bench_ll_next(const bench_work_t *work, int64_t expert, bench_ll_cursor_t *at)
{
    for (; at->source < work->ranks; at->source++, at->token = 0)
        for (; at->token < work->tokens[at->source]; at->token++) {
            const int64_t *ids = work->ids + (work->first[at->source] + at->token) * work->topk;
            for (uint32_t k = 0; k < work->topk; k++)
                if (ids[k] == expert)
                    return true;
        }
    return false;
}

/* The outputs of this generation, each where the row lies that it answers. */
static int fill_outputs(bench_ll_t *ll)
{
    bench_rank_t *self = ll->self;
    size_t row_bytes = self->bench->row_bytes;
    for (uint32_t e = 0; e < ll->local_experts; e++) {
        bench_ll_cursor_t at = {0, 0};
        uint8_t *row = (uint8_t *)self->y + e * ll->places * row_bytes;
        for (; bench_ll_next(&self->bench->work, ll->experts[e], &at); at.token++, row += row_bytes) {
            uint64_t key = bench_ll_output_key(self, ll->experts[e], at.source, at.token);
            pattern_fill(self->host, row_bytes, key, PATTERN_BF16);
            if (self->mem->copy_in(self->context, row, self->host, row_bytes))
                return rank_fail(self->rank, "outputs could not be copied in: %s", self->mem->words());
        }
    }
    return 0;
}

/* ---- the calls ---- */

typedef struct ll_call {
    bench_ll_t *ll;
    bench_op_t op;
    void *before, *graph; /* --graph: of the dispatch that a combine needs; of the operation */
} ll_call_t;

static epx_status_t dispatch(bench_ll_t *ll)
{
    const bench_rank_t *self = ll->self;
    if (!self->bench->options.halves)
        return epx_ll_dispatch(self->buffer, &ll->dispatch, self->stream, &ll->handle);
    epx_status_t status = epx_ll_dispatch_send(self->buffer, &ll->dispatch, self->stream, &ll->handle);
    return status ? status : epx_ll_dispatch_recv(ll->handle, self->stream);
}

static epx_status_t combine(bench_ll_t *ll)
{
    const bench_rank_t *self = ll->self;
    if (!self->bench->options.halves)
        return epx_ll_combine(ll->handle, &ll->combine, self->stream);
    epx_status_t status = epx_ll_combine_send(ll->handle, &ll->combine, self->stream);
    return status ? status : epx_ll_combine_recv(ll->handle, self->stream);
}

static int call_dispatch(bench_ll_t *ll)
{
    epx_status_t status = dispatch(ll);
    return status ? rank_fail_epx(ll->self->rank, "epx_ll_dispatch", status) : 0;
}

static int call_combine(bench_ll_t *ll)
{
    epx_status_t status = combine(ll);
    return status ? rank_fail_epx(ll->self->rank, "epx_ll_combine", status) : 0;
}

static int call_op(bench_ll_t *ll, bench_op_t op)
{
    if (op != BENCH_LL_COMBINE && call_dispatch(ll))
        return 1;
    return op != BENCH_LL_DISPATCH && call_combine(ll);
}

static int launch(bench_rank_t *self, void *graph)
{
    return self->mem->graph_launch(self->context, graph) ? rank_fail(self->rank, "%s", self->mem->words()) : 0;
}

static int ready(bench_rank_t *self, void *context)
{
    ll_call_t *call = context;
    if (call->op != BENCH_LL_COMBINE)
        return 0;
    return call->before ? launch(self, call->before) : call_dispatch(call->ll);
}

static int run(bench_rank_t *self, void *context)
{
    ll_call_t *call = context;
    return call->graph ? launch(self, call->graph) : call_op(call->ll, call->op);
}

/* A dispatch that is not combined gives its slot back. */
static void end(bench_rank_t *self, void *context)
{
    ll_call_t *call = context;
    if (call->op == BENCH_LL_DISPATCH && !call->graph)
        epx_ll_handle_release(call->ll->handle, self->stream);
}

/* ---- graphs ---- */

/* `calls` of the operation into one graph. */
static int record(bench_ll_t *ll, bench_op_t op, int calls, bool keep_handle, void **graph)
{
    bench_rank_t *self = ll->self;
    if (self->mem->graph_begin(self->context))
        return rank_fail(self->rank, "--graph: %s", self->mem->words());
    int failed = 0;
    for (int i = 0; i < calls && !failed; i++) {
        failed = call_op(ll, op);
        if (!failed && op == BENCH_LL_DISPATCH && !keep_handle)
            epx_ll_handle_release(ll->handle, self->stream);
    }
    if (self->mem->graph_end(self->context, graph) && !failed)
        failed = rank_fail(self->rank, "--graph: %s", self->mem->words());
    return failed;
}

/* Making a graph may wait for the whole GPU: no rank starts before all have made theirs. */
static int record_op(ll_call_t *call)
{
    bench_ll_t *ll = call->ll;
    if (!ll->self->bench->options.graph)
        return 0;
    bool alone = call->op == BENCH_LL_COMBINE;
    if (alone && record(ll, BENCH_LL_DISPATCH, 1, true, &call->before))
        return 1;
    return record(ll, call->op, alone ? 1 : BENCH_GRAPH_CALLS, false, &call->graph) || rank_barrier(ll->self->rank);
}

/* ---- verify, then time ---- */

/* Other rows than the last time, and nothing left of what came then. */
static int renew(bench_ll_t *ll)
{
    bench_rank_t *self = ll->self;
    const mem_ops_t *mem = self->mem;
    size_t rows = ll->local_experts * ll->places, hidden = (size_t)self->bench->options.hidden;
    if (bench_fill_x(self, self->generation + 1) || fill_outputs(ll))
        return 1;
    if (mem->fill(self->context, ll->recv_x, UNTOUCHED, rows * hidden * (ll->fp8 ? 1 : 2)) ||
        (ll->fp8 && mem->fill(self->context, ll->recv_scales, UNTOUCHED, rows * (hidden / 128) * 4)) ||
        mem->fill(self->context, ll->recv_count, UNTOUCHED, ll->local_experts * 4) ||
        mem->fill(self->context, ll->src_info, UNTOUCHED, rows * 4) ||
        mem->fill(self->context, ll->layout_range, UNTOUCHED,
                  ll->local_experts * (size_t)self->bench->work.ranks * 8) ||
        mem->fill(self->context, self->out, UNTOUCHED, self->tokens * self->bench->row_bytes))
        return rank_fail(self->rank, "%s", mem->words());
    return 0;
}

static int verify(ll_call_t *call, uint64_t *wrong)
{
    bench_rank_t *self = call->ll->self;
    if (renew(call->ll) || ready(self, call) || run(self, call))
        return 1;
    if (self->mem->sync(self->context))
        return rank_fail(self->rank, "the stream: %s", self->mem->words());
    if (call->op != BENCH_LL_COMBINE && bench_ll_verify_dispatch(call->ll, wrong))
        return 1;
    if (call->op != BENCH_LL_DISPATCH && bench_ll_verify_combine(call->ll, wrong))
        return 1;
    end(self, call);
    return 0;
}

static int run_op(bench_ll_t *ll, bench_op_t op)
{
    static const floor_kind_t kinds[] = {FLOOR_DISPATCH, FLOOR_COMBINE, FLOOR_PAIR};
    bench_rank_t *self = ll->self;
    ll_call_t call = {.ll = ll, .op = op};
    bench_timed_t timed = {.op = op,
                           .floor_kind = kinds[op - BENCH_LL_DISPATCH],
                           .calls = 1,
                           .ready = ready,
                           .run = run,
                           .end = end,
                           .call = &call};
    uint64_t wrong = 0;
    rank_stage(self->rank, bench_op_names[op], 0);
    int failed = record_op(&call);
    if (call.graph && op != BENCH_LL_COMBINE)
        timed.calls = BENCH_GRAPH_CALLS;
    failed = failed || verify(&call, &wrong);
    if (!failed) {
        __atomic_add_fetch(&self->bench->result->wrong[op], wrong, __ATOMIC_RELAXED);
        failed = bench_time(self, &timed);
    }
    self->mem->graph_free(self->context, call.before);
    self->mem->graph_free(self->context, call.graph);
    return failed;
}

static int run_all(bench_ll_t *ll)
{
    bench_rank_t *self = ll->self;
    const bench_options_t *options = &self->bench->options;
    if (list_experts(ll) || make_buffer(self) || get_memory(ll) || bench_fill_routing(self) || bench_fill_x(self, 1))
        return 1;
    describe_calls(ll);
    if (bench_ll_floor_open(ll))
        return 1;
    for (int i = 0; i < options->ops.count; i++)
        if (run_op(ll, (bench_op_t)options->ops.item[i]))
            return 1;
    return 0;
}

int bench_ll(bench_rank_t *self)
{
    const bench_work_t *work = &self->bench->work;
    bench_ll_t *ll = calloc(1, sizeof *ll);
    if (!ll)
        return rank_fail(self->rank, "no memory for the run");
    ll->self = self;
    ll->places = (size_t)work->ranks * (work->most_tokens ? work->most_tokens : 1);
    ll->fp8 = self->bench->options.dtype == PATTERN_BYTES;
    int failed = run_all(ll);
    free(ll->experts);
    free(ll); /* calls have ended: every timed one was waited for */
    return failed;
}
