/* One operation under test; see step.h. */
#include "common/step.h"

#include <stdlib.h>
#include <string.h>

enum { GUARD = 64, GUARD_BYTE = 0xa5, POISON = 0xee };

/* ---- memory ---- */

xt_area_t xt_area_make(xt_rank_t *self, size_t bytes)
{
    xt_area_t area = {self->memory->alloc(bytes + GUARD), bytes};
    if (!area.memory)
        exit(3);
    self->memory->fill(area.memory, POISON, bytes);
    self->memory->fill(area.memory + bytes, GUARD_BYTE, GUARD);
    return area;
}

void xt_area_free(xt_rank_t *self, xt_area_t *area, const char *what)
{
    uint8_t guard[GUARD];
    if (!area->memory)
        return;
    self->memory->get(guard, area->memory + area->bytes, GUARD);
    int touched = 0;
    for (int i = 0; i < GUARD; i++)
        touched += guard[i] != GUARD_BYTE;
    XT_CHECK(self, touched == 0, "%d bytes behind %s were written", touched, what);
    self->memory->free(area->memory);
    *area = (xt_area_t){NULL, 0};
}

/* Device memory in host memory, to look at; free() it. */
static void *fetch(xt_rank_t *self, const void *device, size_t bytes)
{
    void *host = malloc(bytes ? bytes : 1);
    if (!host)
        exit(3);
    if (bytes)
        self->memory->get(host, device, bytes);
    return host;
}

static void compare(xt_step_t *s, const void *got, const void *want, size_t rows, size_t row_bytes, const char *what)
{
    xt_rank_t *self = s->self;
    if (rows * row_bytes == 0)
        return;
    XT_CHECK(self, got != NULL, "%s is missing", what);
    if (!got)
        return;
    uint8_t *host = fetch(self, got, rows * row_bytes);
    size_t wrong = 0, first = 0;
    for (size_t i = rows * row_bytes; i-- > 0;) {
        if (host[i] != ((const uint8_t *)want)[i]) {
            wrong++;
            first = i;
        }
    }
    XT_CHECK(self, wrong == 0, "op %u: %s: %zu of %zu bytes wrong, first at row %zu byte %zu: %02x, should be %02x",
             s->shape.op, what, wrong, rows * row_bytes, first / row_bytes, first % row_bytes, host[first],
             ((const uint8_t *)want)[first]);
    free(host);
}

/* ---- what is sent ---- */

static xt_area_t put_packed(xt_rank_t *self, const void *host, size_t bytes)
{
    xt_area_t area = {NULL, 0};
    if (!host)
        return area;
    area = xt_area_make(self, bytes);
    self->memory->put(area.memory, host, bytes);
    return area;
}

static xt_area_t put_rows(xt_rank_t *self, const xt_inputs_t *in, size_t row_bytes, size_t stride)
{
    uint8_t *image = malloc(in->tokens * stride + 1);
    if (!image)
        exit(3);
    memset(image, 0xcc, in->tokens * stride);
    for (size_t t = 0; t < in->tokens; t++)
        memcpy(image + t * stride, in->x + t * row_bytes, row_bytes);
    xt_area_t area = put_packed(self, image, in->tokens * stride);
    free(image);
    return area;
}

/* Side data packed, with space between tokens, or element by element over all tokens (transposed). */
static xt_area_t put_side(xt_rank_t *self, const xt_inputs_t *in, const xt_shape_t *shape, epx_rows_t *rows)
{
    size_t elem = shape->side_elem_bytes, n = shape->side_elems, tokens = in->tokens;
    size_t token_stride = n * elem, elem_stride = elem;
    uint32_t kind = xt_random(self, 3);
    if (kind == 1)
        token_stride += 3 * elem;
    if (kind == 2) {
        token_stride = elem;
        elem_stride = (tokens + 2) * elem;
    }
    size_t bytes = tokens * token_stride + n * elem_stride;
    uint8_t *image = malloc(bytes + 1);
    if (!image)
        exit(3);
    memset(image, 0xcc, bytes);
    for (size_t t = 0; t < tokens; t++) {
        for (size_t e = 0; e < n; e++)
            memcpy(image + t * token_stride + e * elem_stride, in->side + (t * n + e) * elem, elem);
    }
    rows->side_token_stride_bytes = kind == 0 ? 0 : (int64_t)token_stride;
    rows->side_elem_stride_bytes = kind == 0 ? 0 : (int64_t)elem_stride;
    xt_area_t area = put_packed(self, image, bytes);
    free(image);
    return area;
}

static void put_source(xt_step_t *s, const xt_shape_t *shape, epx_rows_t *rows)
{
    xt_rank_t *self = s->self;
    const xt_inputs_t *in = &s->expect.all[self->rank];
    size_t pad = 16 * (size_t)xt_random(self, 3);
    *rows = (epx_rows_t){.row_bytes = shape->row_bytes, .x_stride_bytes = pad ? shape->row_bytes + pad : 0};
    s->x = put_rows(self, in, shape->row_bytes, shape->row_bytes + pad);
    rows->x = s->x.memory;
    if (shape->side_elems) {
        rows->side_elems = shape->side_elems;
        rows->side_elem_bytes = shape->side_elem_bytes;
        s->side = put_side(self, in, shape, rows);
        rows->side = s->side.memory;
    }
    if (in->tokens == 0 && xt_random(self, 2))
        rows->x = NULL;
}

static void drop_source(xt_step_t *s)
{
    xt_area_t *areas[] = {&s->x, &s->side, &s->ids, &s->weights, &s->mask};
    for (int i = 0; i < 5; i++) {
        if (areas[i]->memory)
            s->self->memory->fill(areas[i]->memory, POISON, areas[i]->bytes);
        xt_area_free(s->self, areas[i], "an input");
    }
}

static uint32_t most_rows(const xt_expect_t *e)
{
    uint32_t most = 0;
    for (int r = 0; r < e->shape.ranks; r++)
        most = e->rows_at[r] > most ? e->rows_at[r] : most;
    return most;
}

bool xt_step_begin(xt_step_t *s, xt_rank_t *self, epx_buffer_t *buffer, const xt_shape_t *shape, bool worst_case)
{
    *s = (xt_step_t){.self = self, .buffer = buffer, .shape = *shape, .worst_case = worst_case};
    xt_expect_make(shape, self->rank, &s->expect);
    const xt_inputs_t *in = &s->expect.all[self->rank];
    size_t choices = (size_t)in->tokens * shape->topk;
    epx_dispatch_t d = {.size = sizeof d, .tokens = in->tokens, .topk = shape->topk};
    put_source(s, shape, &d.rows);
    s->ids = put_packed(self, in->ids, choices * (shape->bits == 32 ? 4 : 8));
    s->weights = put_packed(self, in->weights, choices * sizeof(float));
    s->mask = put_packed(self, in->in_rank, (size_t)in->tokens * (size_t)shape->ranks);
    d.topk_idx = s->ids.memory;
    d.topk_weights = (const float *)s->weights.memory;
    d.in_rank = s->mask.memory;
    d.topk_idx_bits = shape->bits == 64 && xt_random(self, 2) ? 0 : shape->bits;
    d.experts = shape->topk ? shape->experts : 0;
    d.expert_alignment = shape->alignment;
    if (worst_case) {
        uint64_t more = xt_mix(shape->seed, shape->op, 3, 31) % 6;
        d.recv_tokens_max = s->recv_max = most_rows(&s->expect) + (uint32_t)more + !most_rows(&s->expect);
    }
    xt_delay(self);
    bool good = XT_OK(self, epx_dispatch_begin(buffer, &d, self->memory->stream(), &s->handle));
    memset(&d, POISON, sizeof d); /* it was copied */
    return good;
}

/* ---- counts, tables, layout ---- */

bool xt_step_counts(xt_step_t *s)
{
    xt_rank_t *self = s->self;
    const xt_expect_t *e = &s->expect;
    epx_counts_t c = {.size = sizeof c};
    size_t n = (size_t)e->shape.ranks;
    if (!XT_OK(self, epx_handle_counts(s->handle, &c)))
        return false;
    XT_CHECK(self, c.rows == e->got.rows, "op %u: %u rows, should be %u", s->shape.op, c.rows, e->got.rows);
    for (size_t i = 0; i < n; i++) {
        XT_CHECK(self, c.tokens[i] == (int32_t)e->all[i].tokens, "tokens of rank %zu", i);
        for (size_t j = 0; j < n; j++)
            XT_CHECK(self, c.rows_matrix[i * n + j] == e->matrix[i * n + j], "rows from %zu to %zu: %d, not %d", i, j,
                     c.rows_matrix[i * n + j], e->matrix[i * n + j]);
    }
    if (e->shape.topk == 0)
        return true;
    XT_CHECK(self, c.local_experts == e->got.local_experts, "%u local experts, not %u", c.local_experts,
             e->got.local_experts);
    for (uint32_t i = 0; i < e->got.local_experts && i < c.local_experts; i++)
        XT_CHECK(self, c.rows_per_expert[i] == e->got.rows_per_expert[i], "op %u: rows of local expert %u: %d, not %d",
                 s->shape.op, i, c.rows_per_expert[i], e->got.rows_per_expert[i]);
    return true;
}

static bool check_tables(xt_step_t *s)
{
    xt_rank_t *self = s->self;
    const xt_expect_t *e = &s->expect;
    const xt_inputs_t *in = &e->all[self->rank];
    epx_handle_tables_t t = {.size = sizeof t};
    int n = e->shape.ranks;
    if (!XT_OK(self, epx_handle_get_tables(s->handle, &t)))
        return false;
    XT_CHECK(self, t.tokens == in->tokens, "%u tokens", t.tokens);
    XT_CHECK(self, t.slots == epx__routing_slots(e->shape.topk, (uint32_t)n), "%u slots", t.slots);
    size_t entries = (size_t)t.tokens * t.slots;
    int32_t *rank = fetch(self, t.dst_rank, entries * 4), *row = fetch(self, t.dst_row, entries * 4);
    int32_t next[XT_RANKS_MAX] = {0};
    for (int i = 0; i < self->rank; i++) {
        for (int j = 0; j < n; j++)
            next[j] += e->matrix[i * n + j];
    }
    for (uint32_t token = 0; token < t.tokens; token++) {
        size_t at = (size_t)token * t.slots, end = at + t.slots;
        for (int j = 0; j < n; j++) {
            if (!xt_goes(e, self->rank, token, j))
                continue;
            XT_CHECK(self, at < end && rank[at] == j && row[at] == next[j],
                     "op %u: token %u: rank %d row %d, not %d %d", s->shape.op, token, rank[at], row[at], j, next[j]);
            next[j]++;
            at++;
        }
        for (; at < end; at++)
            XT_CHECK(self, rank[at] == -1, "padding of token %u is %d", token, rank[at]);
    }
    free(rank);
    free(row);
    compare(s, t.src_token, e->got.src_token, e->got.rows, 4, "src_token table");
    XT_CHECK(self, memcmp(t.rows_matrix, e->matrix, sizeof(int32_t) * (size_t)(n * n)) == 0, "matrix");
    for (int i = 0; i < n; i++)
        XT_CHECK(self, t.tokens_of[i] == (int32_t)e->all[i].tokens, "tokens of rank %d", i);
    return true;
}

bool xt_step_layout(xt_step_t *s)
{
    xt_rank_t *self = s->self;
    const xt_expect_t *e = &s->expect;
    const xt_inputs_t *in = &e->all[self->rank];
    int n = e->shape.ranks, domains = self->topology.domains;
    if (e->shape.topk == 0)
        return true;
    xt_area_t rank = xt_area_make(self, 4 * (size_t)n), domain = xt_area_make(self, 4 * (size_t)domains);
    xt_area_t expert = xt_area_make(self, 4 * (size_t)e->shape.experts);
    xt_area_t mask = xt_area_make(self, (size_t)in->tokens * (size_t)n);
    xt_area_t ids = put_packed(self, in->ids, (size_t)in->tokens * e->shape.topk * (e->shape.bits == 32 ? 4 : 8));
    epx_layout_t l = {.size = sizeof l, .topk_idx = ids.memory, .topk_idx_bits = e->shape.bits};
    l.tokens = in->tokens;
    l.topk = e->shape.topk;
    l.experts = e->shape.experts;
    l.tokens_per_rank = (int32_t *)rank.memory;
    l.tokens_per_domain = (int32_t *)domain.memory;
    l.tokens_per_expert = (int32_t *)expert.memory;
    l.in_rank = mask.memory;
    bool good = XT_OK(self, epx_layout(s->buffer, &l, self->memory->stream()));
    if (good) {
        int32_t *want_expert = calloc(e->shape.experts + 1, 4), want_domain[XT_RANKS_MAX] = {0};
        uint8_t *want_mask = calloc(1, (size_t)in->tokens * (size_t)n + 1);
        if (!want_expert || !want_mask)
            exit(3);
        for (uint32_t t = 0; t < in->tokens; t++) {
            bool seen[XT_RANKS_MAX] = {false};
            for (int j = 0; j < n; j++) {
                want_mask[t * (uint32_t)n + (uint32_t)j] = xt_goes(e, self->rank, t, j);
                seen[self->topology.domain_of[j]] |= xt_goes(e, self->rank, t, j);
            }
            for (int d = 0; d < domains; d++)
                want_domain[d] += seen[d];
            for (uint32_t k = 0; k < e->shape.topk; k++) {
                int64_t id = epx__topk_id(in->ids, e->shape.bits, (size_t)t * e->shape.topk + k);
                if (id >= 0)
                    want_expert[id]++;
            }
        }
        compare(s, rank.memory, e->matrix + self->rank * n, 1, 4 * (size_t)n, "layout: tokens per rank");
        compare(s, domain.memory, want_domain, 1, 4 * (size_t)domains, "layout: tokens per domain");
        compare(s, expert.memory, want_expert, 1, 4 * (size_t)e->shape.experts, "layout: tokens per expert");
        compare(s, mask.memory, want_mask, in->tokens, (size_t)n, "layout: in_rank");
        free(want_expert);
        free(want_mask);
    }
    xt_area_free(self, &rank, "tokens_per_rank");
    xt_area_free(self, &domain, "tokens_per_domain");
    xt_area_free(self, &expert, "tokens_per_expert");
    xt_area_free(self, &mask, "in_rank");
    xt_area_free(self, &ids, "layout ids");
    return good;
}

/* ---- what comes ---- */

typedef struct parts {
    bool lease, weights, ids;
    uint32_t rows; /* that there is room for */
    const xt_shape_t *shape;
    const epx__ref_received_t *want;
} parts_t;

/* The caller's memory for received rows; optional parts are left out now and then. */
static epx_place_t make_own(xt_step_t *s, const parts_t *p)
{
    xt_rank_t *self = s->self;
    size_t side = (size_t)p->shape->side_elems * p->shape->side_elem_bytes;
    size_t choices = (size_t)p->rows * p->shape->topk;
    s->own[0] = xt_area_make(self, p->rows * p->shape->row_bytes);
    if (side && xt_random(self, 4))
        s->own[1] = xt_area_make(self, p->rows * side);
    if (p->ids && xt_random(self, 4))
        s->own[2] = xt_area_make(self, choices * (p->shape->bits == 32 ? 4 : 8));
    if (p->ids && p->weights && xt_random(self, 4))
        s->own[3] = xt_area_make(self, choices * sizeof(float));
    if (xt_random(self, 4))
        s->own[4] = xt_area_make(self, 4 * (size_t)p->rows);
    return (epx_place_t){.x = s->own[0].memory,
                         .side = s->own[1].memory,
                         .topk_idx = s->own[2].memory,
                         .topk_weights = (float *)s->own[3].memory,
                         .src_token = (int32_t *)s->own[4].memory};
}

static void drop_own(xt_step_t *s)
{
    static const char *const what[] = {"own x", "own side", "own topk_idx", "own topk_weights", "own src_token"};
    for (int i = 0; i < 5; i++)
        xt_area_free(s->self, &s->own[i], what[i]);
}

static void check_ids(xt_step_t *s, const parts_t *p, const epx_received_t *r)
{
    uint32_t topk = p->shape->topk;
    size_t width = p->shape->bits == 32 ? 4 : 8, n = (size_t)r->rows * topk;
    uint8_t *want = malloc(n * width + 1);
    float *weights = calloc(n + 1, sizeof *weights);
    if (!want || !weights)
        exit(3);
    for (size_t i = 0; i < n; i++) { /* tail rows: -1, weight 0 */
        int64_t id = i < (size_t)p->want->rows * topk ? p->want->topk_idx[i] : -1;
        int32_t narrow = (int32_t)id;
        memcpy(want + i * width, width == 4 ? (void *)&narrow : (void *)&id, width);
        if (p->want->topk_weights && i < (size_t)p->want->rows * topk)
            weights[i] = p->want->topk_weights[i];
    }
    if (p->lease || s->own[2].memory)
        compare(s, r->topk_idx, want, r->rows, topk * width, "topk_idx");
    else
        XT_CHECK(s->self, r->topk_idx == NULL, "topk_idx was not asked for");
    if (p->weights && (p->lease || s->own[3].memory))
        compare(s, r->topk_weights, weights, r->rows, topk * 4, "topk_weights");
    else
        XT_CHECK(s->self, r->topk_weights == NULL, "topk_weights were not asked for");
    free(want);
    free(weights);
}

static void check_received(xt_step_t *s, const parts_t *p, const epx_received_t *r, uint32_t rows)
{
    xt_rank_t *self = s->self;
    size_t side = (size_t)p->shape->side_elems * p->shape->side_elem_bytes;
    XT_CHECK(self, r->rows == rows, "op %u: %u rows received, should be %u", s->shape.op, r->rows, rows);
    if (r->rows != rows)
        return;
    XT_CHECK(self, p->lease || r->lease == 0, "a lease with own memory");
    XT_CHECK(self, !p->lease || rows == 0 || r->lease != 0, "no lease");
    XT_CHECK(self, p->lease || r->x == s->own[0].memory, "own x is another");
    compare(s, r->x, p->want->x, p->want->rows, p->shape->row_bytes, "x");
    if (side && (p->lease || s->own[1].memory))
        compare(s, r->side, p->want->side, p->want->rows, side, "side");
    else if (rows)
        XT_CHECK(self, r->side == NULL, "side data was not asked for");
    if (p->ids)
        check_ids(s, p, r);
    else if (rows)
        XT_CHECK(self, r->topk_idx == NULL && r->topk_weights == NULL, "ids or weights from nowhere");
    if (!p->lease && !s->own[4].memory)
        return;
    int32_t *want = malloc(4 * (size_t)rows + 1);
    if (!want)
        exit(3);
    for (uint32_t i = 0; i < rows; i++)
        want[i] = i < p->want->rows ? p->want->src_token[i] : -1;
    compare(s, r->src_token, want, rows, 4, "src_token");
    free(want);
}

static xt_place_t choose_place(xt_rank_t *self, xt_place_t place)
{
    return place != XT_PLACE_ANY ? place : xt_random(self, 2) ? XT_PLACE_LEASE : XT_PLACE_OWN;
}

bool xt_step_end(xt_step_t *s, xt_place_t place)
{
    xt_rank_t *self = s->self;
    uint32_t rows = s->worst_case ? s->recv_max : s->expect.got.rows;
    parts_t p = {.ids = s->shape.topk > 0, .weights = s->shape.weights, .rows = rows, .shape = &s->shape};
    p.want = &s->expect.got;
    p.lease = choose_place(self, place) == XT_PLACE_LEASE;
    s->received = (epx_received_t){.size = sizeof s->received};
    xt_delay(self);
    epx_status_t status = EPX_E_BUSY;
    if (p.lease)
        status = epx_dispatch_end(s->handle, NULL, self->memory->stream(), &s->received);
    if (status == EPX_E_BUSY) { /* no room, or not wanted: bring memory */
        s->busy += p.lease;
        p.lease = false;
        epx_place_t own = make_own(s, &p);
        status = epx_dispatch_end(s->handle, &own, self->memory->stream(), &s->received);
    }
    if (!XT_OK(self, status))
        return false;
    drop_source(s);
    check_received(s, &p, &s->received, rows);
    return xt_random(self, 2) ? check_tables(s) : true;
}

bool xt_step_again(xt_step_t *s, xt_place_t place, xt_format_t format, size_t row_bytes, uint32_t side_elems,
                   uint32_t side_elem_bytes)
{
    xt_rank_t *self = s->self;
    xt_shape_t shape = s->shape;
    epx__ref_received_t want;
    epx_rows_t rows;
    shape.format = format;
    shape.row_bytes = row_bytes;
    shape.side_elems = side_elems;
    shape.side_elem_bytes = side_elem_bytes;
    xt_expect_again(&s->expect, &shape, ++s->version, &want);
    put_source(s, &shape, &rows);
    uint32_t room = s->worst_case ? s->recv_max : want.rows;
    parts_t p = {.rows = room, .shape = &shape, .want = &want};
    p.lease = choose_place(self, place) == XT_PLACE_LEASE;
    epx_received_t r = {.size = sizeof r};
    xt_area_t kept[5];
    memcpy(kept, s->own, sizeof kept); /* dispatch_end's, still the caller's */
    memset(s->own, 0, sizeof s->own);
    xt_delay(self);
    epx_status_t status = EPX_E_BUSY;
    if (p.lease)
        status = epx_dispatch_again(s->handle, &rows, NULL, self->memory->stream(), &r);
    if (status == EPX_E_BUSY) {
        s->busy += p.lease;
        p.lease = false;
        epx_place_t own = make_own(s, &p);
        status = epx_dispatch_again(s->handle, &rows, &own, self->memory->stream(), &r);
    }
    bool good = XT_OK(self, status);
    drop_source(s);
    if (good) {
        check_received(s, &p, &r, room);
        if (r.lease) {
            self->memory->fill(r.x, POISON, (size_t)r.rows * row_bytes);
            XT_OK(self, epx_lease_release(s->buffer, r.lease, self->memory->stream()));
        }
    }
    drop_own(s);
    memcpy(s->own, kept, sizeof kept);
    epx__ref_received_fini(&want);
    return good;
}

/* ---- combine ---- */

typedef struct outputs {
    uint8_t *x; /* device */
    size_t stride;
    epx_lease_t lease;
    xt_area_t area;
    xt_area_t weights, bias[2], out, out_weights;
} outputs_t;

/* A place for the expert outputs: the received rows, a lease of its own, or anywhere. */
static void place_outputs(xt_step_t *s, xt_from_t from, size_t bytes, uint32_t rows, outputs_t *o)
{
    xt_rank_t *self = s->self;
    if (from == XT_FROM_ANY)
        from = (xt_from_t)(1 + xt_random(self, 3));
    if (from == XT_FROM_RECEIVED && s->received.x && bytes <= s->shape.row_bytes) {
        o->x = s->received.x;
        o->stride = s->shape.row_bytes;
        return;
    }
    o->stride = bytes + 16 * (size_t)xt_random(self, 2);
    size_t room = rows * o->stride;
    void *memory;
    if (from != XT_FROM_ANYWHERE && room > 0) {
        epx_status_t status = epx_lease(s->buffer, room, self->memory->stream(), &o->lease, &memory);
        if (status == EPX_OK) {
            XT_CHECK(self, (uintptr_t)memory / 256 * 256 == (uintptr_t)memory, "lease at %p", memory);
            o->x = memory;
            return;
        }
        s->busy++;
        XT_CHECK(self, status == EPX_E_BUSY, "%s: %s", epx_status_name(status), epx_error_detail());
        o->lease = 0;
    }
    o->area = xt_area_make(self, room);
    o->x = o->area.memory;
}

/* Expert outputs into place, rows that never came as NaN. */
static void write_outputs(xt_step_t *s, const outputs_t *o, const void *y, size_t bytes, uint32_t rows)
{
    uint8_t *image = malloc(rows * o->stride + 1);
    if (!image)
        exit(3);
    memset(image, 0xff, rows * o->stride);
    for (size_t r = 0; r < s->expect.got.rows; r++)
        memcpy(image + r * o->stride, (const uint8_t *)y + r * bytes, bytes);
    s->self->memory->put(o->x, image, rows * o->stride);
    free(image);
}

static void expect_combine(xt_step_t *s, void *const *y, float *const *w, void *const *bias, uint32_t hidden,
                           epx_dtype_t dtype, const outputs_t *o)
{
    const xt_expect_t *e = &s->expect;
    epx__ref_rank_t ranks[XT_RANKS_MAX];
    uint32_t tokens = e->all[e->at].tokens;
    size_t bytes = hidden * epx__dtype_bytes(dtype);
    uint8_t *out = malloc(tokens * bytes + 1);
    float *out_weights = malloc((size_t)tokens * e->shape.topk * 4 + 1);
    if (!out || !out_weights)
        exit(3);
    for (int r = 0; r < e->shape.ranks; r++)
        ranks[r] =
            (epx__ref_rank_t){.tokens = e->all[r].tokens, .topk_idx = e->all[r].ids, .in_rank = e->all[r].in_rank};
    if (epx__ref_combine(&e->ref, &s->self->topology, ranks, e->at, (const void *const *)y,
                         w ? (const float *const *)w : NULL, (const void *const *)bias, 2, hidden, dtype, out,
                         out_weights) != EPX_OK)
        exit(3);
    compare(s, o->out.memory, out, tokens, bytes, "combined");
    if (w)
        compare(s, o->out_weights.memory, out_weights, tokens, e->shape.topk * 4, "combined weights");
    free(out);
    free(out_weights);
}

bool xt_step_combine(xt_step_t *s, xt_from_t from, epx_dtype_t dtype, uint32_t hidden, bool weights, int biases)
{
    xt_rank_t *self = s->self;
    const xt_expect_t *e = &s->expect;
    outputs_t o = {.x = NULL};
    void *y[XT_RANKS_MAX], *bias[2] = {NULL, NULL};
    float *w[XT_RANKS_MAX];
    size_t bytes = hidden * epx__dtype_bytes(dtype);
    uint32_t rows = s->worst_case ? s->recv_max : e->got.rows, tokens = e->all[self->rank].tokens;
    s->version++;
    weights = weights && e->shape.topk > 0;
    for (int r = 0; r < e->shape.ranks; r++) {
        y[r] = xt_outputs_make(e, r, s->version, dtype, hidden);
        w[r] = weights ? xt_out_weights_make(e, r, s->version) : NULL;
    }
    place_outputs(s, from, bytes, rows, &o);
    write_outputs(s, &o, y[self->rank], bytes, rows);
    o.out = xt_area_make(self, tokens * bytes);
    epx_combine_t c = {.size = sizeof c, .x = o.x, .hidden = hidden, .out = o.out.memory};
    c.dtype = dtype == EPX_BF16 && xt_random(self, 2) ? EPX_DTYPE_DEFAULT : dtype;
    c.x_stride_bytes = o.stride == bytes && xt_random(self, 2) ? 0 : o.stride;
    if (weights) {
        o.weights = xt_area_make(self, (size_t)rows * e->shape.topk * 4);
        self->memory->fill(o.weights.memory, 0xff, o.weights.bytes);
        self->memory->put(o.weights.memory, w[self->rank], (size_t)e->got.rows * e->shape.topk * 4);
        o.out_weights = xt_area_make(self, (size_t)tokens * e->shape.topk * 4);
        c.topk_weights = (float *)o.weights.memory;
        c.out_topk_weights = (float *)o.out_weights.memory;
    }
    for (int b = 0; b < biases; b++) {
        int at = biases == 1 ? (int)xt_random(self, 2) : b; /* a lone bias in either place */
        bias[at] = xt_bias_make(e, self->rank, (uint32_t)at, dtype, hidden);
        o.bias[at] = put_packed(self, bias[at], tokens * bytes);
        c.bias[at] = o.bias[at].memory;
    }
    xt_delay(self);
    bool good = XT_OK(self, epx_combine(s->handle, &c, self->memory->stream()));
    if (good) {
        self->memory->fill(o.x, POISON, rows * o.stride); /* the library is done with it */
        expect_combine(s, y, weights ? w : NULL, bias, hidden, dtype, &o);
    }
    XT_OK(self, epx_lease_release(s->buffer, o.lease, self->memory->stream()));
    xt_area_free(self, &o.area, "combine's x");
    xt_area_free(self, &o.weights, "combine's weights");
    xt_area_free(self, &o.bias[0], "bias 0");
    xt_area_free(self, &o.bias[1], "bias 1");
    xt_area_free(self, &o.out, "out");
    xt_area_free(self, &o.out_weights, "out_topk_weights");
    free(bias[0]);
    free(bias[1]);
    for (int r = 0; r < e->shape.ranks; r++) {
        free(y[r]);
        free(w[r]);
    }
    return good;
}

/* ---- the end ---- */

void xt_step_release_received(xt_step_t *s)
{
    xt_rank_t *self = s->self;
    if (!s->received.lease)
        return;
    self->memory->fill(s->received.x, POISON, (size_t)s->received.rows * s->shape.row_bytes);
    XT_OK(self, epx_lease_release(s->buffer, s->received.lease, self->memory->stream()));
    s->received.lease = 0;
    s->received.x = NULL;
}

void xt_step_release(xt_step_t *s)
{
    if (!s->self)
        return;
    xt_step_release_received(s);
    epx_handle_release(s->handle, s->self->memory->stream());
    s->handle = NULL;
    drop_source(s);
    drop_own(s);
    xt_expect_fini(&s->expect);
    s->self = NULL;
}

bool xt_step_whole(xt_rank_t *self, epx_buffer_t *buffer, const xt_shape_t *shape, bool worst_case, xt_place_t place,
                   xt_from_t from)
{
    xt_step_t s;
    uint64_t h = xt_mix(shape->seed, shape->op, 4, 41); /* equal on all ranks */
    bool good = xt_step_begin(&s, self, buffer, shape, worst_case);
    if (good && xt_random(self, 2))
        good = xt_step_counts(&s);
    good = good && xt_step_end(&s, place);
    epx_dtype_t dtype = shape->format == XT_BYTES ? EPX_BF16 : (epx_dtype_t)shape->format;
    uint32_t hidden = (uint32_t)(shape->row_bytes / epx__dtype_bytes(dtype));
    if (h % 4 == 0 && hidden >= 16)
        hidden = hidden / 16 * 8; /* narrower than what was received */
    bool weights = h / 4 % 2;
    good = good && xt_step_combine(&s, from, dtype, hidden, weights, (int)xt_random(self, 3));
    xt_step_release(&s);
    return good;
}
