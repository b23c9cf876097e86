/* One rank of a bench: sets up, verifies each operation, then times it, its floor in turn with it. */
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HOST_BYTES = 8 << 20, BLOCK = 5 };

/* ---- set-up ---- */

static int join(bench_rank_t *self)
{
    const bench_options_t *options = &self->bench->options;
    epx_group_config_t config = {.backend = (epx_backend_t)options->backend,
                                 .net = options->net,
                                 .threads = (int)options->threads,
                                 .timeout_ms = (uint64_t)options->timeout_s * 1000};
    if (options->domains)
        config.ranks_per_domain = (int)(options->ranks / options->domains);
    if (rank_join(self->rank, &config))
        return 1;
    self->info.size = sizeof self->info;
    epx_status_t status = epx_group_get_info(self->rank->group, &self->info);
    if (status)
        return rank_fail_epx(self->rank, "epx_group_get_info", status);
    const char *why = "";
    self->mem = mem_ops_for(self->info.backend, &why);
    if (!self->mem)
        return rank_fail(self->rank, "%s", why);
    if (self->mem->open(self->info.device, &self->context))
        return rank_fail(self->rank, "the device's memory: %s", self->mem->words());
    self->stream = self->mem->stream(self->context);
    return 0;
}

static void note_info(const bench_rank_t *self)
{
    bench_result_t *result = self->bench->result;
    if (self->rank->rank)
        return;
    snprintf(result->backend, sizeof result->backend, "%s", self->info.backend == EPX_BACKEND_CUDA ? "cuda" : "cpu");
    snprintf(result->net, sizeof result->net, "%s", self->info.net ? self->info.net : "none");
#define NOTE(field) snprintf(result->field, sizeof result->field, "%s", self->info.field ? self->info.field : "")
    NOTE(backend_why);
    NOTE(domain_why);
    NOTE(threads_why);
    NOTE(net_why);
#undef NOTE
    result->domains = self->info.domains;
    result->threads = self->info.threads;
    result->device = self->info.device;
}

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

static void *get(bench_rank_t *self, size_t bytes)
{
    void *memory = self->mem->alloc(self->context, bytes ? bytes : 16);
    if (!memory)
        rank_fail(self->rank, "%zu bytes of memory: %s", bytes, self->mem->words());
    return memory;
}

static int get_memory(bench_rank_t *self)
{
    const bench_t *bench = self->bench;
    const bench_work_t *work = &bench->work;
    size_t tokens = self->tokens, rows = self->rows, topk = work->topk, ranks = (size_t)work->ranks;
    bool ok = (self->x = get(self, tokens * (bench->row_bytes + bench->side_bytes))) &&
              (self->side = get(self, tokens * bench->side_bytes)) && (self->ids = get(self, tokens * topk * 8)) &&
              (self->weights = get(self, tokens * topk * 4)) && (self->out = get(self, tokens * bench->row_bytes)) &&
              (self->layout_rank = get(self, ranks * 4)) && (self->layout_expert = get(self, work->experts * 4)) &&
              (self->layout_in_rank = get(self, tokens * ranks));
    if (ok && bench->options.own_memory)
        ok = (self->place.x = get(self, rows * bench->row_bytes)) &&
             (self->place.topk_idx = get(self, rows * topk * 8)) &&
             (self->place.topk_weights = get(self, rows * topk * 4)) && (self->place.src_token = get(self, rows * 4)) &&
             (!bench->side_bytes || (self->place.side = get(self, rows * bench->side_bytes)));
    if (!ok)
        return 1;
    self->host_bytes = HOST_BYTES > 4 * bench->row_bytes ? HOST_BYTES : 4 * bench->row_bytes;
    self->host = malloc(self->host_bytes);
    return self->host ? 0 : rank_fail(self->rank, "no memory for the check");
}

/* Rows made in self->host and copied to the device in pieces. What a row holds is the key's affair. */
static int fill_rows(bench_rank_t *self, void *device, size_t count, size_t row_bytes, pattern_format_t format,
                     uint64_t (*key)(void *context), void *context)
{
    size_t piece = self->host_bytes / row_bytes;
    for (size_t row = 0; row < count; row += piece) {
        size_t now = count - row < piece ? count - row : piece;
        for (size_t i = 0; i < now; i++)
            pattern_fill((uint8_t *)self->host + i * row_bytes, row_bytes, key(context), format);
        if (self->mem->copy_in(self->context, (uint8_t *)device + row * row_bytes, self->host, now * row_bytes))
            return rank_fail(self->rank, "rows could not be copied in: %s", self->mem->words());
    }
    return 0;
}

typedef struct cursor {
    const bench_rank_t *self;
    int source;
    uint32_t token, kind;
} cursor_t;

static uint64_t key_of_token(void *context)
{
    cursor_t *cursor = context;
    return pattern_key((uint64_t)cursor->self->bench->options.seed, cursor->kind, (uint32_t)cursor->self->rank->rank,
                       cursor->token++, cursor->self->generation);
}

static uint64_t key_of_output(void *context)
{
    cursor_t *cursor = context;
    const bench_rank_t *self = cursor->self;
    bench_next_row(&self->bench->work, self->rank->rank, &cursor->source, &cursor->token);
    return pattern_key((uint64_t)self->bench->options.seed, BENCH_Y, (uint32_t)self->rank->rank,
                       (uint32_t)cursor->source, cursor->token++);
}

static int fill_x(bench_rank_t *self, uint32_t generation)
{
    const bench_t *bench = self->bench;
    self->generation = generation;
    cursor_t x = {self, 0, 0, BENCH_X}, side = {self, 0, 0, BENCH_SIDE};
    if (fill_rows(self, self->x, self->tokens, bench->row_bytes, (pattern_format_t)bench->options.dtype, key_of_token,
                  &x))
        return 1;
    return bench->side_bytes &&
           fill_rows(self, self->side, self->tokens, bench->side_bytes, PATTERN_FP32, key_of_token, &side);
}

static int fill_routing(bench_rank_t *self)
{
    const bench_work_t *work = &self->bench->work;
    size_t count = self->tokens * (size_t)work->topk;
    float *weights = malloc(count * sizeof *weights + 1);
    if (!weights)
        return rank_fail(self->rank, "no memory for the weights");
    for (size_t i = 0; i < count; i++) {
        uint64_t word =
            pattern_word(pattern_key((uint64_t)self->bench->options.seed, BENCH_WEIGHT, (uint32_t)self->rank->rank,
                                     (uint32_t)(i / work->topk), (uint32_t)(i % work->topk)),
                         0, PATTERN_FP32);
        memcpy(&weights[i], &word, sizeof weights[i]);
    }
    int failed = self->mem->copy_in(self->context, self->weights, weights, count * sizeof *weights) ||
                 self->mem->copy_in(self->context, self->ids, work->ids + self->first * work->topk, count * 8);
    free(weights);
    return failed ? rank_fail(self->rank, "the routing could not be copied in: %s", self->mem->words()) : 0;
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

static int call_run(bench_rank_t *self, call_t *call)
{
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
static void call_end(bench_rank_t *self, call_t *call)
{
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
        self->y = get(self, bytes);
    } else {
        epx_status_t status = epx_lease(self->buffer, bytes ? bytes : 16, self->stream, &self->y_lease, &self->y);
        if (status)
            return rank_fail_epx(self->rank, "epx_lease", status);
    }
    cursor_t cursor = {self, 0, 0, BENCH_Y};
    return !self->y || fill_rows(self, self->y, self->rows, self->bench->row_bytes,
                                 (pattern_format_t)self->bench->options.dtype, key_of_output, &cursor);
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
    if (call->op <= BENCH_DISPATCH_CACHED && fill_x(self, self->generation + 1))
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

static int time_call(bench_rank_t *self, call_t *call, double *us)
{
    if (self->mem->chill(self->context) || self->mem->sync(self->context))
        return rank_fail(self->rank, "%s", self->mem->words());
    if (rank_barrier(self->rank) || self->mem->time_start(self->context))
        return 1;
    if (call_run(self, call))
        return 1;
    if (self->mem->time_stop(self->context, us))
        return rank_fail(self->rank, "%s", self->mem->words());
    call_end(self, call);
    rank_step(self->rank);
    return 0;
}

static int time_floor(bench_rank_t *self, floor_kind_t kind, int variant, double *us)
{
    if (self->mem->chill(self->context) || self->mem->sync(self->context))
        return rank_fail(self->rank, "%s", self->mem->words());
    if (rank_barrier(self->rank) || self->mem->time_start(self->context))
        return 1;
    if (self->floor_ops.run(self->floor, kind, variant) || self->mem->time_stop(self->context, us))
        return rank_fail(self->rank, "the floor: %s", self->floor_ops.words());
    return 0;
}

/* The variant whose median over some passes of the slowest rank is least; all ranks find the same. */
static int best_variant(bench_rank_t *self, bench_op_t op, floor_kind_t kind, int *best)
{
    double least = 0;
    for (int variant = 0; variant < self->floor_ops.variants(self->floor, kind); variant++) {
        double slowest[BLOCK], all[RANKS_MAX];
        for (int pass = -1; pass < BLOCK; pass++) { /* one to warm up */
            double us;
            if (time_floor(self, kind, variant, &us) || rank_allgather(self->rank, &us, sizeof us, all))
                return 1;
            double most = 0;
            for (int r = 0; r < self->rank->ranks; r++)
                most = all[r] > most ? all[r] : most;
            int at = pass;
            for (; at > 0 && slowest[at - 1] > most; at--)
                slowest[at] = slowest[at - 1];
            if (at >= 0)
                slowest[at] = most;
        }
        if (variant == 0 || slowest[BLOCK / 2] < least) {
            least = slowest[BLOCK / 2];
            *best = variant;
        }
    }
    if (!self->rank->rank)
        snprintf(self->bench->result->floor_name[op], sizeof self->bench->result->floor_name[op], "%s",
                 self->floor_ops.variant_name(self->floor, kind, *best));
    return 0;
}

/* The operation and its floor in turn, a few passes each, so that both see the same machine. */
static int time_op(bench_rank_t *self, call_t *call)
{
    const bench_t *bench = self->bench;
    int iters = (int)bench->options.iters, me = self->rank->rank, best = 0;
    floor_kind_t kind = call->op == BENCH_COMBINE ? FLOOR_COMBINE : FLOOR_DISPATCH;
    bool with_floor = self->floor && call->op != BENCH_LAYOUT;
    double unused;
    char stage[64];
    snprintf(stage, sizeof stage, "timing %s", bench_op_names[call->op]);
    rank_stage(self->rank, stage, (uint32_t)(bench->options.iters + bench->options.warmup));
    if (with_floor && best_variant(self, call->op, kind, &best))
        return 1;
    for (int i = 0; i < bench->options.warmup; i++)
        if (time_call(self, call, &unused))
            return 1;
    for (int i = 0; i < iters; i += BLOCK) {
        for (int j = i; j < iters && j < i + BLOCK; j++)
            if (time_call(self, call, &bench_times(bench, (int)call->op, j)[me]))
                return 1;
        for (int j = i; j < iters && j < i + BLOCK && with_floor; j++)
            if (time_floor(self, kind, best, &bench_times(bench, BENCH_OPS + (int)call->op, j)[me]))
                return 1;
    }
    if (!me && with_floor)
        bench->result->has_floor[call->op] = true;
    return 0;
}

static int run_op(bench_rank_t *self, call_t *call)
{
    uint64_t wrong = 0;
    rank_stage(self->rank, bench_op_names[call->op], 0);
    int failed = (call->op == BENCH_COMBINE && take_y(self)) || verify(self, call, &wrong);
    if (!failed) {
        __atomic_add_fetch(&self->bench->result->wrong[call->op], wrong, __ATOMIC_RELAXED);
        failed = time_op(self, call);
    }
    if (call->op == BENCH_COMBINE)
        give_y(self);
    return failed;
}

/* Between domains the floor is a stream of puts besides; on GPUs, and on networks that are not libfabric's, there is
 * none yet. */
static int open_net_floor(bench_rank_t *self, const floor_plan_t *plan)
{
    const char *net = self->info.net ? self->info.net : "";
    if (self->info.backend != EPX_BACKEND_CPU || strncmp(net, "ofi:", 4))
        return 0;
    self->floor_ops = floor_net_ops;
    if (floor_net_open(plan, &self->bench->work, self->info.domain_of, net, &self->floor))
        return rank_fail(self->rank, "the floor: %s", self->floor_ops.words());
    return 0;
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
    if (self->info.domains > 1)
        return open_net_floor(self, &plan);
    self->floor_ops = (floor_ops_t){self->mem->floor_variants, self->mem->floor_variant_name, self->mem->floor_run,
                                    self->mem->floor_close, self->mem->words};
    if (self->mem->floor_open(self->context, &plan, &self->floor))
        return rank_fail(self->rank, "the floor: %s", self->mem->words());
    return 0;
}

static int run(bench_rank_t *self)
{
    const bench_options_t *options = &self->bench->options;
    rank_stage(self->rank, "joining", 0);
    if (join(self))
        return 1;
    note_info(self);
    rank_stage(self->rank, "making the buffer", 0);
    if (make_buffer(self) || get_memory(self) || fill_routing(self) || fill_x(self, 1) || open_floor(self))
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
    epx_status_t status = epx_buffer_status(self->buffer);
    return status ? rank_fail_epx(self->rank, "epx_buffer_status", status) : rank_barrier(self->rank);
}

int bench_rank_body(rank_t *rank)
{
    const bench_t *bench = rank->user;
    bench_rank_t self = {.rank = rank,
                         .bench = bench,
                         .tokens = bench->work.tokens[rank->rank],
                         .rows = bench->work.recv_rows[rank->rank],
                         .first = bench->work.first[rank->rank]};
    int failed = run(&self);
    if (self.floor && !failed)
        self.floor_ops.close(self.floor);
    epx_buffer_destroy(self.buffer);
    if (self.mem && self.context) {
        void *const parts[] = {self.x,
                               self.side,
                               self.ids,
                               self.weights,
                               self.out,
                               self.layout_rank,
                               self.layout_expert,
                               self.layout_in_rank,
                               self.place.x,
                               self.place.side,
                               self.place.topk_idx,
                               self.place.topk_weights,
                               self.place.src_token};
        for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
            if (parts[i])
                self.mem->free(self.context, parts[i]);
        self.mem->close(self.context);
    }
    free(self.host);
    return failed;
}
