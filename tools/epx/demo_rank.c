/*
 * One rank of the demo: its stretch of the text through gate, dispatch, experts, combine, and the gradients back.
 * Rows go through host memory to the experts, which are plain C; so the same code serves CPU and GPU exchanges.
 */
#include "demo.h"

#include "mem.h"
#include "progress.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct self {
    rank_t *rank;
    const demo_t *demo;
    epx_group_info_t info;
    const mem_ops_t *mem;
    void *context;
    epx_stream_t stream;
    epx_buffer_t *buffer;
    epx_handle_t *handle;
    size_t first, row_bytes;
    uint32_t tokens, rows;
    int64_t *global; /* [local experts] expert numbers of this rank */
    /* Device. */
    void *x, *ids, *out, *y;
    float *weights, *dweights, *row_dweights;
    epx_lease_t y_lease;
    /* Host: this rank's tokens. */
    uint16_t *h_x, *h_out, *h_dout;
    int64_t *h_ids;
    float *h_weights;
    /* Host: the rows that came. */
    uint16_t *h_rows, *h_y, *h_back;
    int64_t *h_row_ids;
    float *h_row_weights, *h_row_dweights;
} self_t;

static int mem_failed(self_t *self, const char *what)
{
    return rank_fail(self->rank, "%s: %s", what, self->mem->words());
}

static int join(self_t *self)
{
    const demo_options_t *options = &self->demo->options;
    epx_group_config_t config = {.backend = (epx_backend_t)options->backend, .net = options->net};
    if (options->domains)
        config.ranks_per_domain = (int)(options->ranks / options->domains);
    if (rank_join(self->rank, &config))
        return 1;
    return place_enter(self->rank, &self->info, &self->mem, &self->context, &self->stream);
}

static void note_place(const self_t *self)
{
    demo_result_t *result = self->demo->result;
    if (self->rank->rank)
        return;
    place_note(&result->place, &self->info);
    memcpy(result->domain_of, self->info.domain_of, (size_t)self->rank->ranks * sizeof *result->domain_of);
}

static int make_buffer(self_t *self)
{
    const demo_t *demo = self->demo;
    size_t most_rows = demo->tokens, per_row = self->row_bytes + demo->layer.topk * 12u + 4u;
    epx_buffer_config_t config = {.size = sizeof config,
                                  .lease_bytes = 2 * most_rows * per_row + (1u << 20), /* what came, and the answers */
                                  .tokens_max = (uint32_t)(demo->tokens / (size_t)demo->options.ranks + 1),
                                  .topk_max = demo->layer.topk,
                                  .experts_max = demo->layer.experts};
    if (demo->mapped) {
        config.expert_rank = demo->expert_rank;
        config.experts = demo->layer.experts;
    }
    epx_status_t status = epx_buffer_create(self->rank->group, &config, &self->buffer);
    return status ? rank_fail_epx(self->rank, "epx_buffer_create", status) : 0;
}

static int get_memory(self_t *self)
{
    const layer_t *layer = &self->demo->layer;
    size_t tokens = self->tokens, choices = tokens * layer->topk, row = self->row_bytes, local = 0;
    self->x = self->mem->alloc(self->context, tokens * row);
    self->out = self->mem->alloc(self->context, tokens * row);
    self->ids = self->mem->alloc(self->context, choices * sizeof(int64_t));
    self->weights = self->mem->alloc(self->context, choices * sizeof(float));
    self->dweights = self->mem->alloc(self->context, choices * sizeof(float));
    if (!self->x || !self->out || !self->ids || !self->weights || !self->dweights)
        return mem_failed(self, "memory for this rank's tokens");
    self->h_x = malloc(tokens * row + 1);
    self->h_out = malloc(tokens * row + 1);
    self->h_dout = malloc(tokens * row + 1);
    self->h_ids = malloc(choices * sizeof *self->h_ids + 1);
    self->h_weights = malloc(choices * sizeof *self->h_weights + 1);
    self->global = malloc(layer->experts * sizeof *self->global);
    if (!self->h_x || !self->h_out || !self->h_dout || !self->h_ids || !self->h_weights || !self->global)
        return rank_fail(self->rank, "no memory for this rank's tokens");
    for (uint32_t e = 0; e < layer->experts; e++)
        if (self->demo->expert_rank[e] == self->rank->rank)
            self->global[local++] = e;
    return 0;
}

static int get_row_memory(self_t *self)
{
    size_t rows = self->rows, choices = rows * self->demo->layer.topk, row = self->row_bytes;
    self->h_rows = malloc(rows * row + 1);
    self->h_y = malloc(rows * row + 1);
    self->h_back = malloc(rows * row + 1);
    self->h_row_ids = malloc(choices * sizeof *self->h_row_ids + 1);
    self->h_row_weights = malloc(choices * sizeof *self->h_row_weights + 1);
    self->h_row_dweights = malloc(choices * sizeof *self->h_row_dweights + 1);
    if (!self->h_rows || !self->h_y || !self->h_back || !self->h_row_ids || !self->h_row_weights ||
        !self->h_row_dweights)
        return rank_fail(self->rank, "no memory for the rows that came");
    self->row_dweights = self->mem->alloc(self->context, choices * sizeof(float));
    return self->row_dweights ? 0 : mem_failed(self, "memory for the rows that came");
}

/* ---- steps ---- */

static int gate(self_t *self)
{
    const demo_t *demo = self->demo;
    const layer_t *layer = &demo->layer;
    for (uint32_t t = 0; t < self->tokens; t++) {
        uint16_t *x = self->h_x + (size_t)t * layer->hidden;
        layer_embed(layer, demo->text, self->first + t, x);
        layer_gate(layer, x, self->h_ids + (size_t)t * layer->topk, self->h_weights + (size_t)t * layer->topk);
        if (t % 1024 == 0)
            rank_step(self->rank);
    }
    size_t choices = self->tokens * (size_t)layer->topk;
    if (self->mem->copy_in(self->context, self->x, self->h_x, self->tokens * self->row_bytes) ||
        self->mem->copy_in(self->context, self->ids, self->h_ids, choices * sizeof *self->h_ids) ||
        self->mem->copy_in(self->context, self->weights, self->h_weights, choices * sizeof *self->h_weights))
        return mem_failed(self, "copying tokens in");
    return 0;
}

static int dispatch(self_t *self, epx_received_t *received)
{
    const layer_t *layer = &self->demo->layer;
    epx_dispatch_t dispatch = {.size = sizeof dispatch,
                               .rows = {.x = self->x, .row_bytes = self->row_bytes},
                               .tokens = self->tokens,
                               .topk_idx = self->ids,
                               .topk = layer->topk,
                               .experts = layer->experts,
                               .topk_weights = self->weights};
    *received = (epx_received_t){.size = sizeof *received};
    epx_status_t status = epx_dispatch(self->buffer, &dispatch, NULL, self->stream, &self->handle, received);
    if (status)
        return rank_fail_epx(self->rank, "epx_dispatch", status);
    return self->mem->sync(self->context) ? mem_failed(self, "dispatch") : 0;
}

static int dispatch_back(self_t *self, epx_received_t *received)
{
    epx_rows_t rows = {.x = self->x, .row_bytes = self->row_bytes};
    *received = (epx_received_t){.size = sizeof *received};
    epx_status_t status = epx_dispatch_again(self->handle, &rows, NULL, self->stream, received);
    if (status)
        return rank_fail_epx(self->rank, "epx_dispatch_again", status);
    return self->mem->sync(self->context) ? mem_failed(self, "cached dispatch") : 0;
}

static int combine(self_t *self, bool with_weights)
{
    epx_combine_t combine = {.size = sizeof combine,
                             .x = self->y,
                             .dtype = EPX_BF16,
                             .hidden = self->demo->layer.hidden,
                             .topk_weights = with_weights ? self->row_dweights : NULL,
                             .out = self->out,
                             .out_topk_weights = with_weights ? self->dweights : NULL};
    epx_status_t status = epx_combine(self->handle, &combine, self->stream);
    if (status)
        return rank_fail_epx(self->rank, "epx_combine", status);
    return self->mem->sync(self->context) ? mem_failed(self, "combine") : 0;
}

/* Rows and their tables to the host; local expert numbers become global ones, since the model is addressed by those. */
static int take_rows(self_t *self, const epx_received_t *received)
{
    size_t choices = self->rows * (size_t)self->demo->layer.topk;
    if (self->mem->copy_out(self->context, self->h_rows, received->x, self->rows * self->row_bytes) ||
        self->mem->copy_out(self->context, self->h_row_ids, received->topk_idx, choices * sizeof(int64_t)) ||
        self->mem->copy_out(self->context, self->h_row_weights, received->topk_weights, choices * sizeof(float)))
        return mem_failed(self, "copying rows out");
    for (size_t i = 0; i < choices; i++)
        if (self->h_row_ids[i] >= 0)
            self->h_row_ids[i] = self->global[self->h_row_ids[i]];
    return 0;
}

static int experts(self_t *self)
{
    const layer_t *layer = &self->demo->layer;
    for (size_t row = 0; row < self->rows; row++) {
        layer_forward(layer, self->h_rows + row * layer->hidden, self->h_row_ids + row * layer->topk,
                      self->h_row_weights + row * layer->topk, self->h_y + row * layer->hidden);
        if (row % 1024 == 0)
            rank_step(self->rank);
    }
    return self->mem->copy_in(self->context, self->y, self->h_y, self->rows * self->row_bytes)
               ? mem_failed(self, "copying answers in")
               : 0;
}

static int experts_back(self_t *self, const epx_received_t *received)
{
    const layer_t *layer = &self->demo->layer;
    if (self->mem->copy_out(self->context, self->h_back, received->x, self->rows * self->row_bytes))
        return mem_failed(self, "copying gradients out");
    for (size_t row = 0; row < self->rows; row++) {
        layer_backward(layer, self->h_rows + row * layer->hidden, self->h_back + row * layer->hidden,
                       self->h_row_ids + row * layer->topk, self->h_row_weights + row * layer->topk,
                       self->h_y + row * layer->hidden, self->h_row_dweights + row * layer->topk);
        if (row % 1024 == 0)
            rank_step(self->rank);
    }
    size_t choices = self->rows * (size_t)layer->topk;
    if (self->mem->copy_in(self->context, self->y, self->h_y, self->rows * self->row_bytes) ||
        self->mem->copy_in(self->context, self->row_dweights, self->h_row_dweights, choices * sizeof(float)))
        return mem_failed(self, "copying gradients in");
    return 0;
}

/* Output to the parent; the gradient that goes back is made from it and takes the place of x. */
static int loss(self_t *self)
{
    const demo_t *demo = self->demo;
    const layer_t *layer = &demo->layer;
    uint16_t next[LAYER_HIDDEN_MAX];
    if (self->mem->copy_out(self->context, self->h_out, self->out, self->tokens * self->row_bytes))
        return mem_failed(self, "copying the output");
    memcpy(demo->out + self->first * layer->hidden, self->h_out, self->tokens * self->row_bytes);
    for (uint32_t t = 0; t < self->tokens; t++) {
        size_t at = self->first + t, after = at + 1 < demo->tokens ? at + 1 : at;
        layer_embed(layer, demo->text, after, next);
        layer_loss_gradient(layer, self->h_out + (size_t)t * layer->hidden, next,
                            self->h_dout + (size_t)t * layer->hidden);
    }
    return self->mem->copy_in(self->context, self->x, self->h_dout, self->tokens * self->row_bytes)
               ? mem_failed(self, "copying the gradient")
               : 0;
}

static int note_counts(self_t *self)
{
    const demo_t *demo = self->demo;
    epx_counts_t counts = {.size = sizeof counts};
    epx_status_t status = epx_handle_counts(self->handle, &counts);
    if (status)
        return rank_fail_epx(self->rank, "epx_handle_counts", status);
    self->rows = counts.rows;
    demo->result->rows[self->rank->rank] = counts.rows;
    uint64_t own = (uint64_t)counts.rows_matrix[self->rank->rank * self->rank->ranks + self->rank->rank];
    __atomic_add_fetch(&demo->result->wire_rows, counts.rows - own, __ATOMIC_RELAXED);
    for (uint32_t e = 0; e < counts.local_experts; e++)
        demo->result->expert_tokens[self->global[e]] = counts.rows_per_expert[e];
    return 0;
}

static int begin_step(self_t *self, const char *stage, size_t items)
{
    rank_stage(self->rank, stage, (uint32_t)(items / 1024));
    return rank_barrier(self->rank);
}

static void end_step(self_t *self, demo_step_t step, uint64_t began_ns)
{
    self->demo->result->step_us[step][self->rank->rank] = (double)(now_ns() - began_ns) * 1e-3;
}

#define STEP(step, stage, items, call)                                                                                 \
    do {                                                                                                               \
        if (begin_step(self, stage, items))                                                                            \
            return 1;                                                                                                  \
        uint64_t began_ns = now_ns();                                                                                  \
        if (call)                                                                                                      \
            return 1;                                                                                                  \
        end_step(self, step, began_ns);                                                                                \
    } while (0)

/* A first exchange that is not timed, so that fresh memory is paid for before; it also tells how many rows come. */
static int warm_up(self_t *self)
{
    epx_received_t received;
    if (dispatch(self, &received) || note_counts(self) || get_row_memory(self))
        return 1;
    size_t bytes = self->rows * self->row_bytes;
    epx_status_t status = epx_lease(self->buffer, bytes ? bytes : 16, self->stream, &self->y_lease, &self->y);
    if (status)
        return rank_fail_epx(self->rank, "epx_lease", status);
    if (self->mem->fill(self->context, self->y, 0, bytes) || combine(self, false))
        return mem_failed(self, "a first exchange");
    epx_lease_release(self->buffer, received.lease, self->stream);
    epx_handle_release(self->handle, self->stream);
    self->handle = NULL;
    return 0;
}

static int run_layer(self_t *self)
{
    epx_received_t received;
    STEP(DEMO_GATE, "embedding and gate", self->tokens, gate(self));
    rank_stage(self->rank, "a first exchange", 0);
    if (warm_up(self))
        return 1;
    STEP(DEMO_DISPATCH, "dispatch", 0, dispatch(self, &received));
    STEP(DEMO_EXPERTS, "experts", self->rows, take_rows(self, &received) || experts(self));
    STEP(DEMO_COMBINE, "combine", 0, combine(self, false));
    epx_lease_release(self->buffer, received.lease, self->stream);
    if (loss(self))
        return 1;
    STEP(DEMO_DISPATCH_BACK, "dispatch of gradients", 0, dispatch_back(self, &received));
    STEP(DEMO_EXPERTS_BACK, "experts, backward", self->rows, experts_back(self, &received));
    STEP(DEMO_COMBINE_BACK, "combine of gradients", 0, combine(self, true));
    epx_lease_release(self->buffer, received.lease, self->stream);
    epx_lease_release(self->buffer, self->y_lease, self->stream);
    epx_handle_release(self->handle, self->stream);
    size_t hidden = self->demo->layer.hidden, topk = self->demo->layer.topk;
    if (self->mem->copy_out(self->context, self->demo->dx + self->first * hidden, self->out,
                            self->tokens * self->row_bytes) ||
        self->mem->copy_out(self->context, self->demo->dweights + self->first * topk, self->dweights,
                            self->tokens * topk * sizeof(float)))
        return mem_failed(self, "copying the gradients");
    epx_status_t status = epx_buffer_status(self->buffer);
    return status ? rank_fail_epx(self->rank, "epx_buffer_status", status) : rank_barrier(self->rank);
}

static void clean(self_t *self)
{
    void *const device[] = {self->x, self->out, self->ids, self->weights, self->dweights, self->row_dweights};
    void *const host[] = {
        self->h_x, self->h_out,  self->h_dout,    self->h_ids,         self->h_weights,      self->h_rows,
        self->h_y, self->h_back, self->h_row_ids, self->h_row_weights, self->h_row_dweights, self->global};
    epx_buffer_destroy(self->buffer);
    for (size_t i = 0; i < sizeof device / sizeof *device && self->context; i++)
        if (device[i])
            self->mem->free(self->context, device[i]);
    if (self->context)
        self->mem->close(self->context);
    for (size_t i = 0; i < sizeof host / sizeof *host; i++)
        free(host[i]);
}

int demo_rank_body(rank_t *rank)
{
    const demo_t *demo = rank->user;
    self_t self = {.rank = rank,
                   .demo = demo,
                   .first = demo_first(demo, rank->rank),
                   .tokens = (uint32_t)(demo_first(demo, rank->rank + 1) - demo_first(demo, rank->rank)),
                   .row_bytes = demo->layer.hidden * sizeof(uint16_t)};
    int failed = join(&self);
    if (!failed) {
        note_place(&self);
        failed = make_buffer(&self) || get_memory(&self) || run_layer(&self);
    }
    clean(&self);
    return failed;
}
