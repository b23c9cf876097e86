/* See ll_case.h. */
#include "common/ll_case.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "algo/ll/net.h"
#include "api/names.h"
#include "api/objects.h"

static void *take(size_t bytes)
{
    void *memory = calloc(1, bytes ? bytes : 1);
    if (!memory)
        exit(3);
    return memory;
}

bool xl_open(xl_world_t *w, xt_rank_t *self, const epx_buffer_config_t *config)
{
    epx_buffer_config_t c = *config;
    w->self = self;
    c.size = sizeof c;
    c.lease_bytes = 64u << 10;
    c.reserve_bytes = c.reserve_bytes ? c.reserve_bytes : 256u << 10;
    c.tokens_max = w->tokens_max;
    c.topk_max = w->topk_max;
    c.experts_max = w->experts;
    c.ll_tokens_max = w->tokens_max;
    c.ll_hidden_max = w->hidden_max;
    c.ll_zero_copy = w->zero_copy;
    c.expert_rank = w->expert_rank;
    c.experts = w->expert_rank ? w->experts : 0;
    if (epx__experts_make(w->experts, (uint32_t)self->ranks, w->expert_rank, w->local_of, &w->map) != EPX_OK)
        exit(3);
    return XT_OK(self, epx_buffer_create(self->group, &c, &w->buffer));
}

void xl_close(xl_world_t *w)
{
    epx_buffer_destroy(w->buffer);
}

/* ---- inputs ---- */

static uint64_t hash(const xl_call_t *c, uint64_t a, uint64_t b)
{
    return xt_mix(c->world->seed, c->op, a, b);
}

/* Of what a graph's replays change: the same shape and number of tokens, other ids and values. */
static uint64_t changing(const xl_call_t *c, uint64_t a, uint64_t b)
{
    return xt_mix(c->world->seed + (uint64_t)c->variant * 7919, c->op, a, b);
}

static uint16_t value_bits(uint64_t h)
{
    float v = (float)((int)(h % 4001) - 2000) * (h >> 20 & 7 ? 0.0078125f : 3.0f);
    return epx__bf16_of_f32(v);
}

static void choose_shape(xl_call_t *c)
{
    xl_world_t *w = c->world;
    uint64_t h = hash(c, 1, 1), g = hash(c, 1, 2);
    epx__ref_ll_shape_t *s = &c->shape;
    s->ranks = w->self->ranks;
    s->map = w->map;
    s->tokens_max = w->tokens_max;
    s->topk = 1 + (uint32_t)(h % w->topk_max);
    s->bits = h >> 20 & 1 ? 32 : 64;
    s->order = (h >> 21 & 3) == 0 ? EPX_LL_RANK_MAJOR : EPX_LL_EXPERT_MAJOR;
    s->format = h >> 23 & 1 ? EPX_LL_FP8 : EPX_LL_BF16;
    s->ue8m0 = s->format == EPX_LL_FP8 && w->hidden_max >= 512 && (h >> 24 & 3) == 0;
    s->round_scale = s->ue8m0 ? 0 : (int)(h >> 26 & 1);
    uint32_t unit = s->format == EPX_LL_BF16 ? 8 : s->ue8m0 ? 512 : 128;
    s->hidden = unit * (1 + (uint32_t)(g % (w->hidden_max / unit)));
    if (g >> 32 & 1)
        s->hidden = w->hidden_max / unit * unit;
    c->weights = h >> 27 & 1;
    c->combine_weights = (h >> 28 & 3) != 0;
    s->pre_reduced = c->weights && s->order == EPX_LL_EXPERT_MAJOR && (h >> 30 & 1);
    c->zero_copy = w->zero_copy && (h >> 31 & 1) && s->order == EPX_LL_EXPERT_MAJOR;
    c->whole = h >> 32 & 1;
}

static uint32_t tokens_of(const xl_call_t *c, int rank)
{
    uint64_t kind = hash(c, 2, 1) % 6, h = hash(c, 3, (uint64_t)rank);
    if (kind == 0)
        return c->world->tokens_max;
    if (kind == 1)
        return rank == (int)(hash(c, 2, 2) % (uint64_t)c->shape.ranks) ? c->world->tokens_max : 0;
    return (uint32_t)(h % (c->world->tokens_max + 1));
}

static int64_t id_of(const xl_call_t *c, int rank, uint32_t t, uint32_t k)
{
    uint64_t kind = changing(c, 4, 1) % 6, h = changing(c, 5, (uint64_t)rank << 40 | (uint64_t)t << 8 | k);
    uint32_t experts = c->world->experts;
    if (kind == 0 && h >> 50 & 1)
        return -1;
    if (kind == 1) /* ids repeat within a token */
        return (int64_t)(changing(c, 6, (uint64_t)rank << 40 | (uint64_t)t << 8 | (h & 1)) % experts);
    if (kind == 2) /* all to few experts */
        return (int64_t)(h % (experts < 3 ? experts : 3));
    if (kind == 3 && t % 2)
        return -1;
    return (int64_t)((changing(c, 7, (uint64_t)rank << 32 | t) + (uint64_t)k * 7) % experts);
}

static void make_rank(xl_call_t *c, int rank)
{
    epx__ref_ll_rank_t *r = &c->all[rank];
    uint32_t n = tokens_of(c, rank), topk = c->shape.topk, hidden = c->shape.hidden;
    if (c->world->masked[rank])
        n = 0;
    uint16_t *x = take((size_t)n * hidden * 2);
    int64_t *ids = take((size_t)n * topk * 8);
    float *w = take((size_t)n * topk * 4), *w2 = take((size_t)n * topk * 4);
    for (size_t i = 0; i < (size_t)n * hidden; i++)
        x[i] = value_bits(changing(c, 8 + (uint64_t)rank, i));
    for (uint32_t i = 0; i < n * topk; i++) {
        int64_t id = id_of(c, rank, i / topk, i % topk);
        if (c->shape.bits == 32)
            ((int32_t *)(void *)ids)[i] = (int32_t)id;
        else
            ids[i] = id;
        w[i] = (float)(changing(c, 100 + (uint64_t)rank, i) % 1000) * 0.00337f;
        w2[i] = (float)(changing(c, 200 + (uint64_t)rank, i) % 1000) * 0.00171f;
    }
    *r = (epx__ref_ll_rank_t){
        .tokens = n, .x = x, .topk_idx = ids, .topk_weights = w, .combine_weights = w2, .masked = c->world->masked};
}

/* Outputs of rank r's experts: any bits, but NaN where no row came. */
static uint16_t *make_outputs(const xl_call_t *c, int rank)
{
    size_t rows = (size_t)c->world->self->ranks * c->world->tokens_max, hidden = c->shape.hidden;
    epx__ref_ll_received_t got;
    if (epx__ref_ll_dispatch(&c->shape, c->all, rank, &got) != EPX_OK)
        exit(3);
    uint16_t *y = take((got.parts * rows + 1) * hidden * 2);
    memset(y, 0xff, got.parts * rows * hidden * 2);
    for (size_t p = 0; p < got.parts; p++) {
        size_t count = 0;
        for (int s = 0; s < c->shape.ranks; s++)
            count += (uint32_t)got.layout_range[p * (size_t)c->shape.ranks + (size_t)s];
        for (size_t i = 0; i < count * hidden; i++)
            y[p * rows * hidden + i] = value_bits(changing(c, 300 + (uint64_t)rank, p * rows * hidden + i));
    }
    epx__ref_ll_received_fini(&got);
    return y;
}

/* ---- device memory ---- */

#define PATTERN 0x5a

static void *room(xl_call_t *c, size_t bytes)
{
    const xt_memory_t *m = c->world->self->memory;
    void *memory = m->alloc(bytes + 64);
    if (!memory)
        exit(3);
    m->fill(memory, PATTERN, bytes + 64);
    return memory;
}

static void *room_with(xl_call_t *c, const void *host, size_t bytes)
{
    void *memory = room(c, bytes);
    c->world->self->memory->put(memory, host, bytes);
    return memory;
}

static size_t places(const xl_call_t *c)
{
    return (size_t)c->shape.ranks * c->world->tokens_max;
}
static size_t row_bytes(const xl_call_t *c)
{
    return c->shape.format == EPX_LL_FP8 ? c->shape.hidden : (size_t)c->shape.hidden * 2;
}
static size_t scales_of_row(const xl_call_t *c)
{
    return c->shape.format != EPX_LL_FP8 ? 0 : c->shape.hidden / (c->shape.ue8m0 ? 512 : 128);
}
static size_t counts(const xl_call_t *c)
{
    return c->shape.order == EPX_LL_RANK_MAJOR ? (size_t)c->shape.ranks : c->want.local_experts;
}

void xl_put_inputs(xl_call_t *c)
{
    const epx__ref_ll_rank_t *r = &c->all[c->world->self->rank];
    const xt_memory_t *m = c->world->self->memory;
    size_t n = (size_t)r->tokens * c->shape.topk;
    m->put(c->x, r->x, (size_t)r->tokens * c->shape.hidden * 2);
    m->put(c->ids, r->topk_idx, n * (size_t)c->shape.bits / 8);
    m->put(c->weight, r->topk_weights, n * 4);
    if (c->weight2)
        m->put(c->weight2, r->combine_weights, n * 4);
}

static void make_host(xl_call_t *c)
{
    int ranks = c->shape.ranks;
    for (int r = 0; r < ranks; r++)
        make_rank(c, r);
    for (int r = 0; r < ranks && !c->combine_weights; r++) {
        free((void *)(uintptr_t)c->all[r].combine_weights);
        c->all[r].combine_weights = NULL;
    }
    for (int r = 0; r < ranks; r++)
        c->y[r] = make_outputs(c, r);
    if (epx__ref_ll_dispatch(&c->shape, c->all, c->world->self->rank, &c->want) != EPX_OK)
        exit(3);
}

static void free_host(xl_call_t *c)
{
    for (int r = 0; r < c->shape.ranks; r++) {
        const void *host[] = {c->all[r].x, c->all[r].topk_idx, c->all[r].topk_weights, c->all[r].combine_weights,
                              c->y[r]};
        for (size_t i = 0; i < sizeof host / sizeof *host; i++)
            free((void *)(uintptr_t)host[i]);
    }
    epx__ref_ll_received_fini(&c->want);
}

void xl_remake(xl_call_t *c, uint32_t variant)
{
    const xt_memory_t *m = c->world->self->memory;
    free_host(c);
    c->variant = variant;
    make_host(c);
    size_t rows = c->want.parts * places(c);
    m->fill(c->recv_x, PATTERN, rows * row_bytes(c));
    m->fill(c->src, PATTERN, rows * 4);
    m->fill(c->stats, 0, c->want.local_experts * 4);
    if (c->scales)
        m->fill(c->scales, PATTERN, rows * scales_of_row(c) * 4);
    if (c->topk_idx)
        m->fill(c->topk_idx, PATTERN, rows * c->shape.topk * 4);
    if (c->topk_weights)
        m->fill(c->topk_weights, PATTERN, rows * c->shape.topk * 4);
    xl_put_inputs(c);
    xl_put_outputs(c);
}

void xl_make(xl_call_t *c, xl_world_t *w, uint32_t op)
{
    *c = (xl_call_t){.world = w, .op = op};
    choose_shape(c);
    make_host(c);
    int ranks = c->shape.ranks, me = w->self->rank;
    const epx__ref_ll_rank_t *r = &c->all[me];
    size_t n = (size_t)r->tokens * c->shape.topk, rows = c->want.parts * places(c);
    c->x = room_with(c, r->x, (size_t)r->tokens * c->shape.hidden * 2);
    c->ids = room_with(c, r->topk_idx, n * (size_t)c->shape.bits / 8);
    c->weight = room_with(c, r->topk_weights, n * 4);
    c->weight2 = r->combine_weights ? room_with(c, r->combine_weights, n * 4) : NULL;
    c->recv_x = room(c, rows * row_bytes(c));
    c->scales = scales_of_row(c) ? room(c, rows * scales_of_row(c) * 4) : NULL;
    c->count = room(c, counts(c) * 4);
    c->src = room(c, rows * 4);
    c->range = hash(c, 9, 1) & 1 ? room(c, c->want.parts * (size_t)ranks * 8) : NULL;
    c->stats = room(c, c->want.local_experts * 4);
    w->self->memory->fill(c->stats, 0, c->want.local_experts * 4);
    c->wait = room(c, (size_t)ranks * 8);
    w->self->memory->fill(c->wait, 0, (size_t)ranks * 8);
    if (c->shape.order == EPX_LL_RANK_MAJOR) {
        c->topk_idx = room(c, rows * c->shape.topk * 4);
        c->topk_weights = c->weights ? room(c, rows * c->shape.topk * 4) : NULL;
    }
    c->y_mine = room(c, rows * c->shape.hidden * 2);
    c->out = room(c, (size_t)r->tokens * c->shape.hidden * 2);
    c->left = room(c, (size_t)r->tokens * 4);
}

void xl_fini(xl_call_t *c)
{
    const xt_memory_t *m = c->world->self->memory;
    void *device[] = {c->x,     c->ids, c->weight, c->weight2,  c->recv_x,       c->scales, c->y_mine, c->out,
                      c->count, c->src, c->stats,  c->topk_idx, c->topk_weights, c->range,  c->wait,   c->left};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        if (device[i])
            m->free(device[i]);
    free_host(c);
}

/* ---- the calls ---- */

epx_ll_dispatch_t xl_dispatch_of(const xl_call_t *c)
{
    epx_ll_dispatch_t d = {.size = sizeof d, .x = c->x, .tokens = c->all[c->world->self->rank].tokens};
    d.hidden = c->shape.hidden;
    d.topk_idx = c->ids;
    d.topk_idx_bits = c->shape.bits;
    d.topk = c->shape.topk;
    d.experts = c->world->experts;
    d.topk_weights = c->weights ? c->weight : NULL;
    d.format = c->shape.format;
    d.round_scale = c->shape.round_scale;
    d.ue8m0 = c->shape.ue8m0;
    d.order = c->shape.order;
    d.recv_x = c->recv_x;
    d.recv_scales = c->scales;
    d.recv_count = c->count;
    d.src_info = c->src;
    d.layout_range = c->range;
    d.recv_topk_idx = c->topk_idx;
    d.recv_topk_weights = c->topk_weights;
    d.expert_stats = c->stats;
    d.wait_ns = c->wait;
    return d;
}

epx_ll_combine_t xl_combine_of(const xl_call_t *c)
{
    epx_ll_combine_t b = {.size = sizeof b, .x = c->zero_copy ? NULL : c->y_mine, .topk_idx = c->ids};
    b.pre_reduced = c->shape.pre_reduced;
    b.topk_weights = c->weight2;
    b.out = c->out;
    b.weight_left = c->left;
    b.wait_ns = c->wait;
    return b;
}

bool xl_dispatch_send(xl_call_t *c)
{
    epx_ll_dispatch_t d = xl_dispatch_of(c);
    xt_delay(c->world->self);
    if (c->whole)
        return true;
    return XT_OK(c->world->self,
                 epx_ll_dispatch_send(c->world->buffer, &d, c->world->self->memory->stream(), &c->handle));
}

static void compare(xl_call_t *c, const char *what, const void *device, const void *want, size_t bytes)
{
    xt_rank_t *self = c->world->self;
    uint8_t *got = take(bytes);
    self->memory->get(got, device, bytes);
    size_t at = 0;
    while (at < bytes && got[at] == ((const uint8_t *)want)[at])
        at++;
    XT_CHECK(self, at == bytes,
             "op %u: %s: byte %zu of %zu is %02x, not %02x (R %d M %u H %u k %u fmt %d order %d pre %d w %d whole %d)",
             c->op, what, at, bytes, at < bytes ? got[at] : 0, at < bytes ? ((const uint8_t *)want)[at] : 0,
             c->shape.ranks, c->world->tokens_max, c->shape.hidden, c->shape.topk, (int)c->shape.format,
             (int)c->shape.order, c->shape.pre_reduced, c->weights, c->whole);
    free(got);
}

/* Rows of each part up to its count, then the pattern: what is past the counts is untouched. `unit` bytes a row. */
static void compare_rows(xl_call_t *c, const char *what, const void *device, const void *want, size_t unit)
{
    size_t rows = c->want.parts * places(c), bytes = rows * unit;
    uint8_t *full = take(bytes);
    memset(full, PATTERN, bytes);
    for (size_t p = 0; p < c->want.parts; p++) {
        size_t count = 0, at = p * places(c) * unit;
        for (int s = 0; s < c->shape.ranks; s++)
            count += (uint32_t)c->want.layout_range[p * (size_t)c->shape.ranks + (size_t)s];
        memcpy(full + at, (const uint8_t *)want + at, count * unit);
    }
    compare(c, what, device, full, bytes);
    free(full);
}

static void compare_scales(xl_call_t *c)
{
    size_t blocks = scales_of_row(c), n = c->want.parts * blocks * places(c);
    uint32_t *full = take(n * 4);
    memset(full, PATTERN, n * 4);
    for (size_t p = 0; p < c->want.parts; p++) {
        size_t count = 0;
        for (int s = 0; s < c->shape.ranks; s++)
            count += (uint32_t)c->want.layout_range[p * (size_t)c->shape.ranks + (size_t)s];
        for (size_t b = 0; b < blocks; b++)
            memcpy(full + (p * blocks + b) * places(c), c->want.scales + (p * blocks + b) * places(c), count * 4);
    }
    compare(c, "recv_scales", c->scales, full, n * 4);
    free(full);
}

void xl_check_dispatch(xl_call_t *c)
{
    compare(c, "recv_count", c->count, c->want.count, counts(c) * 4);
    compare_rows(c, "src_info", c->src, c->want.src_info, 4);
    if (c->range)
        compare(c, "layout_range", c->range, c->want.layout_range, c->want.parts * (size_t)c->shape.ranks * 8);
    compare_rows(c, "recv_x", c->recv_x, c->want.x, row_bytes(c));
    if (c->scales)
        compare_scales(c);
    if (c->topk_idx)
        compare_rows(c, "recv_topk_idx", c->topk_idx, c->want.topk_idx, c->shape.topk * 4);
    if (c->topk_weights)
        compare_rows(c, "recv_topk_weights", c->topk_weights, c->want.topk_weights, c->shape.topk * 4);
    compare(c, "expert_stats", c->stats, c->want.expert_rows, c->want.local_experts * 4);
}

bool xl_dispatch_recv(xl_call_t *c)
{
    xt_rank_t *self = c->world->self;
    epx_ll_dispatch_t d = xl_dispatch_of(c);
    xt_delay(self);
    bool good = c->whole ? XT_OK(self, epx_ll_dispatch(c->world->buffer, &d, self->memory->stream(), &c->handle))
                         : XT_OK(self, epx_ll_dispatch_recv(c->handle, self->memory->stream()));
    if (good)
        xl_check_dispatch(c);
    return good;
}

void xl_put_outputs(xl_call_t *c)
{
    xt_rank_t *self = c->world->self;
    size_t bytes = c->want.parts * places(c) * c->shape.hidden * 2;
    void *memory = c->y_mine;
    if (c->zero_copy && !XT_OK(self, epx_ll_combine_buffer(c->handle, &memory)))
        return;
    self->memory->put(memory, c->y[self->rank], bytes);
}

bool xl_combine_send(xl_call_t *c)
{
    xt_rank_t *self = c->world->self;
    epx_ll_combine_t b = xl_combine_of(c);
    xl_put_outputs(c);
    xt_delay(self);
    return c->whole || XT_OK(self, epx_ll_combine_send(c->handle, &b, self->memory->stream()));
}

void xl_check_combine(xl_call_t *c)
{
    int me = c->world->self->rank;
    uint32_t n = c->all[me].tokens;
    uint16_t *out = take((size_t)n * c->shape.hidden * 2);
    float *left = take((size_t)n * 4);
    if (epx__ref_ll_combine(&c->shape, c->all, me, (const uint16_t *const *)c->y, out, left) != EPX_OK)
        exit(3);
    compare(c, "out", c->out, out, (size_t)n * c->shape.hidden * 2);
    compare(c, "weight_left", c->left, left, (size_t)n * 4);
    free(out);
    free(left);
}

bool xl_combine_recv(xl_call_t *c)
{
    xt_rank_t *self = c->world->self;
    epx_ll_combine_t b = xl_combine_of(c);
    xt_delay(self);
    bool good = c->whole ? XT_OK(self, epx_ll_combine(c->handle, &b, self->memory->stream()))
                         : XT_OK(self, epx_ll_combine_recv(c->handle, self->memory->stream()));
    if (good)
        xl_check_combine(c);
    return good;
}

/* ---- the wire ---- */

static bool far_from_me(const xl_call_t *c, int rank)
{
    const epx__topology_t *topology = &c->world->self->topology;
    return topology->domain_of[rank] != topology->domain_of[c->world->self->rank];
}

static int64_t id_at(const xl_call_t *c, int source, uint32_t i)
{
    int64_t id = epx__topk_id(c->all[source].topk_idx, c->shape.bits, i);
    return id >= 0 && id < (int64_t)c->shape.map.experts ? id : -1;
}

/* Of the source's tokens at that rank: how many, and how many choices. */
static void count_at(const xl_call_t *c, int source, int rank, uint64_t *tokens, uint64_t *choices)
{
    uint32_t topk = c->shape.topk;
    *tokens = *choices = 0;
    for (uint32_t t = 0; t < c->all[source].tokens; t++) {
        uint64_t here = 0;
        for (uint32_t k = 0; k < topk; k++) {
            int64_t id = id_at(c, source, t * topk + k);
            here += id >= 0 && epx__expert_rank(&c->shape.map, id) == rank;
        }
        *tokens += here > 0;
        *choices += here;
    }
}

static uint64_t round16(uint64_t bytes)
{
    return (bytes + 15) / 16 * 16;
}

void xl_count_wire(const xl_call_t *c, bool combined)
{
    enum { HEADER = 64, WORD = 32 };
    const epx__ref_ll_shape_t *s = &c->shape;
    xl_world_t *w = c->world;
    int me = w->self->rank;
    uint64_t row = s->format == EPX_LL_FP8 ? s->hidden + s->hidden / 128 * 4 : s->hidden * 2u;
    uint64_t ids = (uint64_t)c->all[me].tokens * s->topk * (c->weights ? 8 : 4), tokens, choices;
    for (int r = 0; r < s->ranks; r++) {
        if (!far_from_me(c, r))
            continue;
        count_at(c, me, r, &tokens, &choices);
        if (!w->masked[r])
            w->wire += round16(HEADER + ids) + tokens * round16(row) + WORD; /* record, dispatched */
        w->wire += WORD;                                                     /* taken */
        if (!combined)
            continue;
        count_at(c, r, me, &tokens, &choices);
        bool by_rank = s->pre_reduced || s->order == EPX_LL_RANK_MAJOR;
        w->wire += (by_rank ? tokens : choices) * s->hidden * 2u + WORD; /* outputs, combined or left_out */
    }
}

bool xl_check_wire(xl_world_t *w, uint32_t op)
{
    epx_traffic_t traffic = {.size = sizeof traffic};
    if (w->wire_unknown)
        return true;
    bool loose = w->loose_from && op + 1 >= w->loose_from;
    bool good = XT_OK(w->self, epx_buffer_get_traffic(w->buffer, &traffic)) &&
                (loose ? traffic.net_bytes <= w->wire : traffic.net_bytes == w->wire);
    XT_CHECK(w->self, good, "up to op %u: %llu bytes went to the network, not %llu", op,
             (unsigned long long)traffic.net_bytes, (unsigned long long)w->wire);
    return good;
}

/* ---- whole calls ---- */

bool xl_run(xl_world_t *w, uint32_t op)
{
    xl_call_t c;
    xl_make(&c, w, op);
    bool good = xl_dispatch_send(&c) && xl_dispatch_recv(&c) && xl_combine_send(&c) && xl_combine_recv(&c);
    xl_count_wire(&c, true);
    xl_fini(&c);
    return good && xl_check_wire(w, op);
}

bool xl_run_pair(xl_world_t *w, uint32_t op)
{
    xl_call_t a, b;
    xl_make(&a, w, op);
    xl_make(&b, w, op + 1);
    uint64_t h = xt_mix(w->seed, op, 11, 1);
    a.whole = false;
    b.whole = false;
    xl_call_t *first = h & 1 ? &b : &a, *second = h & 1 ? &a : &b;
    bool good = xl_dispatch_send(&a) && xl_dispatch_send(&b) && xl_dispatch_recv(first);
    good = good && (h & 2 ? xl_dispatch_recv(second) && xl_combine_send(first)
                          : xl_combine_send(first) && xl_dispatch_recv(second));
    if (h & 4)
        good = good && xl_combine_send(second) && xl_combine_recv(second) && xl_combine_recv(first);
    else
        good = good && xl_combine_recv(first) && xl_combine_send(second) && xl_combine_recv(second);
    xl_count_wire(&a, true);
    xl_count_wire(&b, true);
    xl_fini(&a);
    xl_fini(&b);
    return good && xl_check_wire(w, op);
}

/* ---- what a wait that did not end leaves ---- */

/* In device memory when its threads push. */
static unsigned long long pushed(const xl_world_t *w, const uint64_t *word)
{
    uint64_t value = 0;
    w->self->memory->get(&value, word, sizeof value);
    return value;
}

/* Read without locks: nothing moves any more, or nearly. */
static void say_lane(const xl_world_t *w, const epx__channels_t *channels, const epx__lane_t *lane)
{
    const epx_port_channel_t *port = &channels->port[lane->number];
    printf("    rank %u: pushed %llu, put %llu, applied there %llu; applied here %llu, the next %s, untold %u%s\n",
           lane->rank, pushed(w, port->issued), (unsigned long long)lane->sent,
           (unsigned long long)epx_ld_relaxed_sys_u64(port->acked), (unsigned long long)lane->next,
           lane->arrived[lane->next & (2 * channels->window - 1)] ? "has come" : "has not come", lane->owed,
           lane->dead ? ", dead" : "");
}

static void say_words(const epx__ll_net_t *net, const epx__ll_layout_t *layout, uint32_t rank)
{
    const char *base = net->channels->memory[EPX__LL_NET_WINDOW].base;
    for (uint64_t slot = 0; slot < layout->slots; slot++) {
        const epx__ll_words_t *words =
            (const void *)(base + epx__ll_words_at(layout, slot, rank) - layout->words_offset);
        printf("      slot %llu: dispatched %llu, combined %llu, taken %llu, left out %llu\n", (unsigned long long)slot,
               (unsigned long long)words->dispatched, (unsigned long long)words->combined,
               (unsigned long long)words->taken, (unsigned long long)words->left_out);
    }
}

void xl_say_channels(const xl_world_t *w)
{
    epx_buffer_t *inside = w->buffer; /* behind its name */
    const epx__ll_net_t *net = epx__buffer_find(&inside, "xl_say_channels") == EPX_OK ? inside->x.ll_net : NULL;
    for (uint32_t p = 0; net && p < net->channels->proxies; p++) {
        const epx__proxy_t *proxy = &net->channels->proxy[p];
        unsigned long long head = 0;
        for (uint32_t i = 0; i < proxy->lane_count; i++)
            if (proxy->lanes[i].arrived)
                head = pushed(w, net->channels->port[proxy->lanes[i].number].fifo_head);
        printf("  rank %d, proxy %u: %llu requests taken of %llu pushed\n", w->self->rank, p,
               (unsigned long long)proxy->tail, head);
        for (uint32_t i = 0; i < proxy->lane_count; i++) {
            if (!proxy->lanes[i].arrived)
                continue;
            say_lane(w, net->channels, &proxy->lanes[i]);
            say_words(net, &inside->x.layout.ll, proxy->lanes[i].rank);
        }
    }
    fflush(stdout);
}
