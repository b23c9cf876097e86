/* High throughput on one rank of a bench: verifies each operation, then times it. */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

/* ---- set-up ---- */

static int make_buffer(bench_rank_t *self)
{
    const bench_t *bench = self->bench;
    const bench_work_t *work = &bench->work;
    size_t per_row = bench->row_bytes + bench->side_bytes + work->topk * 12 + 4;
    epx_buffer_config_t config = {.size = sizeof config,
                                  .lease_bytes = work->most_rows * per_row + (1u << 20),
                                  .tokens_max = work->most_tokens ? work->most_tokens : 1,
                                  .topk_max = work->topk,
                                  .experts_max = work->experts,
                                  .sms = (int)bench->options.sms};
    if (work->mapped) {
        config.expert_rank = work->expert_rank;
        config.experts = work->experts;
    }
    epx_status_t status = epx_buffer_create(self->rank->group, &config, &self->buffer);
    return status ? rank_fail_epx(self->rank, "epx_buffer_create", status) : 0;
}

static int get_memory(bench_rank_t *self)
{
    const bench_t *bench = self->bench;
    const bench_work_t *work = &bench->work;
    size_t tokens = self->tokens, rows = self->rows, topk = work->topk, ranks = (size_t)work->ranks;
    bool ok =
        (self->x = bench_get(self, tokens * (bench->row_bytes + bench->side_bytes))) &&
        (self->side = bench_get(self, tokens * bench->side_bytes)) &&
        (self->ids = bench_get(self, tokens * topk * 8)) && (self->weights = bench_get(self, tokens * topk * 4)) &&
        (self->out = bench_get(self, tokens * bench->row_bytes)) && (self->layout_rank = bench_get(self, ranks * 4)) &&
        (self->layout_expert = bench_get(self, work->experts * 4)) &&
        (self->layout_in_rank = bench_get(self, tokens * ranks));
    if (ok && bench->options.own_memory)
        ok = (self->place.x = bench_get(self, rows * bench->row_bytes)) &&
             (self->place.topk_idx = bench_get(self, rows * topk * 8)) &&
             (self->place.topk_weights = bench_get(self, rows * topk * 4)) &&
             (self->place.src_token = bench_get(self, rows * 4)) &&
             (!bench->side_bytes || (self->place.side = bench_get(self, rows * bench->side_bytes)));
    return ok ? 0 : 1;
}

static int open_floor(bench_rank_t *self)
{
    const bench_t *bench = self->bench;
    const bench_work_t *work = &bench->work;
    if (bench->options.no_floor)
        return 0;
    size_t at = self->first * (size_t)work->ranks;
    floor_plan_t plan = {.rank = self->rank->rank,
                         .ranks = work->ranks,
                         .threads = self->info.threads,
                         .tokens = self->tokens,
                         .dst_rank = work->dst_rank + at,
                         .dst_row = work->dst_row + at,
                         .recv_rows = work->recv_rows,
                         .row_bytes = bench->floor_row_bytes,
                         .hidden = (uint32_t)bench->options.hidden,
                         .format = (pattern_format_t)bench->options.dtype,
                         .x = self->x,
                         .area = bench->floor_area,
                         .allgather = rank_allgather,
                         .allgather_context = self->rank};
    if (self->info.domains > 1) /* a stream of puts besides; of networks that are not libfabric's there is none */
        return self->info.net && strncmp(self->info.net, "ofi:", 4) == 0 ? floor_net_open(self, &plan) : 0;
    self->floor_ops = (floor_ops_t){self->mem->floor_variants, self->mem->floor_variant_name, self->mem->floor_run,
                                    self->mem->floor_close, self->mem->words};
    if (self->mem->floor_open(self->context, &plan, &self->floor))
        return rank_fail(self->rank, "the floor: %s", self->mem->words());
    return 0;
}

/* ---- the calls ---- */

typedef struct call {
    bench_op_t op;
    epx_handle_t *base;   /* of the first dispatch; cached dispatch and combine use it */
    epx_handle_t *handle; /* dispatch's own */
    epx_received_t received;
} call_t;

static epx_rows_t rows_of(const bench_rank_t *self)
{
    const bench_t *bench = self->bench;
    epx_rows_t rows = {.x = self->x, .row_bytes = bench->row_bytes};
    if (bench->side_bytes) {
        rows.side = self->side;
        rows.side_elem_bytes = 4;
        rows.side_elems = (uint32_t)(bench->side_bytes / 4);
    }
    return rows;
}

static epx_status_t call_dispatch(bench_rank_t *self, call_t *call)
{
    const bench_t *bench = self->bench;
    epx_dispatch_t dispatch = {.size = sizeof dispatch,
                               .rows = rows_of(self),
                               .tokens = self->tokens,
                               .topk_idx = self->ids,
                               .topk = bench->work.topk,
                               .experts = bench->work.experts,
                               .topk_weights = self->weights,
                               .sms = (int)bench->options.sms};
    const epx_place_t *place = bench->options.own_memory ? &self->place : NULL;
    return epx_dispatch(self->buffer, &dispatch, place, self->stream, &call->handle, &call->received);
}

static epx_status_t call_cached(bench_rank_t *self, call_t *call)
{
    epx_rows_t rows = rows_of(self);
    epx_place_t place = self->place;
    place.topk_idx = NULL;
    place.topk_weights = NULL;
    return epx_dispatch_again(call->base, &rows, self->bench->options.own_memory ? &place : NULL, self->stream,
                              &call->received);
}

static epx_status_t call_combine(bench_rank_t *self, call_t *call)
{
    static const epx_dtype_t dtypes[] = {EPX_BF16, EPX_FP16, EPX_FP32};
    epx_combine_t combine = {.size = sizeof combine,
                             .x = self->y,
                             .dtype = dtypes[self->bench->options.dtype],
                             .hidden = (uint32_t)self->bench->options.hidden,
                             .out = self->out,
                             .sms = (int)self->bench->options.sms};
    return epx_combine(call->base, &combine, self->stream);
}

static epx_status_t call_layout(bench_rank_t *self)
{
    epx_layout_t layout = {.size = sizeof layout,
                           .topk_idx = self->ids,
                           .tokens = self->tokens,
                           .topk = self->bench->work.topk,
                           .experts = self->bench->work.experts,
                           .tokens_per_rank = self->layout_rank,
                           .tokens_per_expert = self->layout_expert,
                           .in_rank = self->layout_in_rank};
    return epx_layout(self->buffer, &layout, self->stream);
}

static int call_run(bench_rank_t *self, void *context)
{
    call_t *call = context;
    epx_status_t status = EPX_OK;
    call->received = (epx_received_t){.size = sizeof call->received};
    switch (call->op) {
    case BENCH_DISPATCH:
        status = call_dispatch(self, call);
        break;
    case BENCH_DISPATCH_CACHED:
        status = call_cached(self, call);
        break;
    case BENCH_COMBINE:
        status = call_combine(self, call);
        break;
    default:
        status = call_layout(self);
    }
    return status ? rank_fail_epx(self->rank, bench_op_names[call->op], status) : 0;
}

/* Gives back what one call took; outside the timed stretch. */
static void call_end(bench_rank_t *self, void *context)
{
    call_t *call = context;
    if (call->received.lease)
        epx_lease_release(self->buffer, call->received.lease, self->stream);
    call->received.lease = 0;
    if (call->op == BENCH_DISPATCH) {
        epx_handle_release(call->handle, self->stream);
        call->handle = NULL;
    }
}

/* ---- verify, then time ---- */

/* Expert outputs, in a lease or in the caller's memory. */
static int take_y(bench_rank_t *self)
{
    size_t bytes = self->rows * self->bench->row_bytes;
    if (self->bench->options.own_memory) {
        self->y = self->mem->alloc(self->context, bytes ? bytes : 16);
        if (!self->y)
            return rank_fail(self->rank, "%zu bytes of memory: %s", bytes, self->mem->words());
    } else {
        epx_status_t status = epx_lease(self->buffer, bytes ? bytes : 16, self->stream, &self->y_lease, &self->y);
        if (status)
            return rank_fail_epx(self->rank, "epx_lease", status);
    }
    return bench_fill_y(self);
}

static void give_y(bench_rank_t *self)
{
    if (self->y_lease)
        epx_lease_release(self->buffer, self->y_lease, self->stream);
    else if (self->y)
        self->mem->free(self->context, self->y);
    self->y_lease = 0;
    self->y = NULL;
}

static int verify(bench_rank_t *self, call_t *call, uint64_t *wrong)
{
    bool cached = call->op == BENCH_DISPATCH_CACHED;
    /* Other rows than the last time, so that a row which stayed behind from then is seen. */
    if (call->op <= BENCH_DISPATCH_CACHED && bench_fill_x(self, self->generation + 1))
        return 1;
    if (call->op <= BENCH_DISPATCH_CACHED && self->bench->options.own_memory &&
        self->mem->fill(self->context, self->place.x, 0xee, self->rows * self->bench->row_bytes))
        return rank_fail(self->rank, "%s", self->mem->words());
    if (call->op == BENCH_COMBINE &&
        self->mem->fill(self->context, self->out, 0xee, self->tokens * self->bench->row_bytes))
        return rank_fail(self->rank, "%s", self->mem->words());
    int failed = call_run(self, call);
    if (!failed && call->op == BENCH_COMBINE)
        failed = bench_verify_combine(self, wrong);
    else if (!failed && call->op == BENCH_LAYOUT)
        failed = bench_verify_layout(self, wrong);
    else if (!failed)
        failed = bench_verify_dispatch(self, cached ? call->base : call->handle, &call->received, cached, wrong);
    call_end(self, call);
    return failed;
}

static int run_op(bench_rank_t *self, call_t *call)
{
    uint64_t wrong = 0;
    rank_stage(self->rank, bench_op_names[call->op], 0);
    int failed = (call->op == BENCH_COMBINE && take_y(self)) || verify(self, call, &wrong);
    if (!failed) {
        __atomic_add_fetch(&self->bench->result->wrong[call->op], wrong, __ATOMIC_RELAXED);
        bench_timed_t timed = {.op = call->op,
                               .floor_kind = call->op == BENCH_COMBINE ? FLOOR_COMBINE : FLOOR_DISPATCH,
                               .calls = 1,
                               .run = call_run,
                               .end = call_end,
                               .call = call};
        failed = bench_time(self, &timed);
    }
    if (call->op == BENCH_COMBINE)
        give_y(self);
    return failed;
}

int bench_ht(bench_rank_t *self)
{
    const bench_options_t *options = &self->bench->options;
    if (make_buffer(self) || get_memory(self) || bench_fill_routing(self) || bench_fill_x(self, 1) || open_floor(self))
        return 1;
    /* The handle that cached dispatch and combine use. */
    call_t base = {.op = BENCH_DISPATCH};
    if (call_run(self, &base))
        return 1;
    if (base.received.lease)
        epx_lease_release(self->buffer, base.received.lease, self->stream);
    for (int i = 0; i < options->ops.count; i++) {
        call_t call = {.op = (bench_op_t)options->ops.item[i], .base = base.handle};
        if (run_op(self, &call))
            return 1;
    }
    epx_handle_release(base.handle, self->stream);
    return 0;
}
