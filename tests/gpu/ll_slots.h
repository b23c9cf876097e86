/*
 * What a low-latency slot goes through between ordinary calls, mixed at random, the same on all ranks: a rank that is
 * alone for some calls (it masks the others, they mask it) and comes back, a rank that is masked between dispatch and
 * combine, calls released half-way, two calls in flight, rows full of ones (the pattern that says that nothing has
 * come). Every other call is compared with the reference byte by byte.
 *
 *     PROGRAM [part of a run's name] [percent of the calls] [seed]
 *
 * In one domain, or in domains of EPX_TEST_PER_DOMAIN (as far as it divides).
 */
#include "common/ll_case.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct slots_plan {
    const char *name;
    int ranks;
    uint32_t calls, tokens_max, hidden_max, topk_max, experts, slots;
    uint64_t seed;
} slots_plan_t;

static const slots_plan_t slots_plans[] = {
    {"one slot", 2, 60, 6, 512, 4, 8, 1, 21},     {"two slots", 2, 90, 9, 1024, 6, 16, 2, 22},
    {"three ranks", 3, 90, 5, 640, 5, 12, 2, 23}, {"three slots", 3, 60, 6, 1536, 4, 9, 3, 24},
    {"four ranks", 4, 60, 5, 512, 8, 16, 2, 25},  {"five slots", 4, 60, 4, 256, 3, 8, 5, 26},
    {"seven ranks", 7, 30, 3, 256, 4, 14, 2, 27}, {"odd hidden", 2, 60, 5, 1000, 3, 6, 2, 28},
    {"wide top-k", 3, 40, 4, 256, 32, 48, 2, 29}, {"thirty-three ranks", 33, 8, 2, 256, 6, 66, 2, 30},
};

typedef struct slots_context {
    slots_plan_t plan;
    uint32_t percent;
} slots_context_t;

static uint64_t choice(const xl_world_t *w, uint32_t op, uint64_t what)
{
    return xt_mix(w->seed, op, 31, what);
}

static bool mask(xl_world_t *w, int rank, bool masked)
{
    w->masked[rank] = masked;
    return XT_OK(w->self, epx_ll_mask_set(w->buffer, rank, masked, w->self->memory->stream()));
}

/* Ranks are far apart: this one comes late, or at once. */
static void come_late(xl_world_t *w, uint32_t op)
{
    if (choice(w, op, 40 + (uint64_t)w->self->rank) % 4 == 0)
        usleep((useconds_t)(choice(w, op, 60 + (uint64_t)w->self->rank) % 3000));
}

/* The others mask this rank already, and it sends to them once more: nobody takes that. */
static bool send_then_mask(xl_world_t *w, uint32_t op)
{
    xl_call_t c;
    for (int r = 0; r < w->self->ranks; r++)
        w->masked[r] = r != w->self->rank; /* for the reference */
    xl_make(&c, w, op);
    c.whole = false;
    bool good = xl_dispatch_send(&c);
    for (int r = 0; good && r < w->self->ranks; r++)
        good = r == w->self->rank || mask(w, r, true);
    good = good && xl_dispatch_recv(&c) && xl_combine_send(&c) && xl_combine_recv(&c);
    xl_fini(&c);
    return good;
}

/* One rank is alone for some calls; then all are together again. */
static bool apart(xl_world_t *w, uint32_t op, uint32_t calls)
{
    int alone = (int)(choice(w, op, 1) % (uint64_t)w->self->ranks), me = w->self->rank;
    uint32_t first = 0;
    bool good = true;
    if (me == alone && choice(w, op, 4) % 2) {
        come_late(w, op);
        good = send_then_mask(w, op);
        first = 1;
    }
    for (int r = 0; r < w->self->ranks; r++)
        if (r != me && (me == alone || r == alone))
            good = good && mask(w, r, true);
    for (uint32_t i = first; good && i < calls; i++) {
        come_late(w, op + i);
        good = xl_run(w, op + i);
    }
    good = good && XT_OK(w->self, epx_ll_mask_clear(w->buffer, w->self->memory->stream()));
    memset(w->masked, 0, sizeof w->masked);
    return good;
}

/* What the reference is to think of a rank that is masked since dispatch: my choices there are nobody. The device's ids
 * stay as they are. */
static void forget(xl_call_t *c, int rank)
{
    const epx__ref_ll_rank_t *mine = &c->all[c->world->self->rank];
    for (size_t i = 0; i < (size_t)mine->tokens * c->shape.topk; i++) {
        int64_t *wide = (int64_t *)(uintptr_t)mine->topk_idx + i;
        int32_t *narrow = (int32_t *)(uintptr_t)mine->topk_idx + i;
        int64_t id = c->shape.bits == 32 ? *narrow : *wide;
        if (id < 0 || epx__expert_rank(&c->shape.map, id) != rank)
            continue;
        if (c->shape.bits == 32)
            *narrow = -1;
        else
            *wide = -1;
    }
}

/* One rank masks another between dispatch and combine: each leaves the other's share out, and both go on. */
static bool given_up(xl_world_t *w, uint32_t op)
{
    int ranks = w->self->ranks, me = w->self->rank, by = (int)(choice(w, op, 1) % (uint64_t)ranks);
    int other = (by + 1 + (int)(choice(w, op, 2) % (uint64_t)(ranks - 1))) % ranks;
    xl_call_t c;
    xl_make(&c, w, op);
    bool good = xl_dispatch_send(&c) && xl_dispatch_recv(&c);
    if (good && me == by)
        good = XT_OK(w->self, epx_ll_mask_set(w->buffer, other, 1, w->self->memory->stream()));
    if (me == by || me == other)
        forget(&c, me == by ? other : by);
    come_late(w, op);
    good = good && xl_combine_send(&c) && xl_combine_recv(&c);
    if (good && me == by)
        good = XT_OK(w->self, epx_ll_mask_set(w->buffer, other, 0, w->self->memory->stream()));
    xl_fini(&c);
    return good;
}

/* Released after dispatch, or after the send half of combine. */
static bool released(xl_world_t *w, uint32_t op, bool sent)
{
    xl_call_t c;
    xl_make(&c, w, op);
    c.whole = !sent;
    bool good = xl_dispatch_send(&c) && xl_dispatch_recv(&c) && (!sent || xl_combine_send(&c));
    if (good)
        epx_ll_handle_release(c.handle, w->self->memory->stream());
    good = good && XT_OK(w->self, epx_buffer_status(w->buffer));
    xl_fini(&c);
    return good;
}

static bool in_flight(xl_world_t *w, uint32_t op)
{
    xl_call_t a, b;
    xl_make(&a, w, op);
    xl_make(&b, w, op + 1);
    a.whole = b.whole = false;
    bool good = xl_dispatch_send(&a) && xl_dispatch_send(&b) && xl_dispatch_recv(&b) && xl_combine_send(&b) &&
                xl_dispatch_recv(&a) && xl_combine_send(&a) && xl_combine_recv(&a) && xl_combine_recv(&b);
    xl_fini(&a);
    xl_fini(&b);
    return good;
}

/* Words of eight bf16 NaNs that look like nothing: they come, seven of them as they were. */
static void fill_rows(xl_call_t *c, uint16_t *rows, uint32_t count)
{
    uint32_t hidden = c->shape.hidden;
    for (uint32_t t = 0; t < count; t += 2)
        memset(rows + (size_t)t * hidden, 0xff, (size_t)(t % 4 ? 16 : hidden * 2));
}

static bool full_of_ones(xl_world_t *w, uint32_t op)
{
    const xt_memory_t *m = w->self->memory;
    const char *inband = getenv("EPX_LL_INBAND");
    xl_call_t c;
    xl_make(&c, w, op);
    if (c.shape.format == EPX_LL_BF16) {
        size_t words = (size_t)c.want.parts * (size_t)c.shape.ranks * w->tokens_max * c.shape.hidden / 8;
        epx__ref_ll_received_fini(&c.want);
        for (int r = 0; r < c.shape.ranks; r++)
            fill_rows(&c, (uint16_t *)(uintptr_t)c.all[r].x, c.all[r].tokens);
        if (epx__ref_ll_dispatch(&c.shape, c.all, w->self->rank, &c.want) != EPX_OK)
            exit(3);
        uint16_t *x = (uint16_t *)(uintptr_t)c.want.x;
        for (size_t i = 0; inband && !strcmp(inband, "1") && i < words; i++) {
            uint64_t two[2];
            memcpy(two, x + i * 8, 16);
            if ((two[0] & two[1]) == UINT64_MAX)
                x[i * 8 + 7] = 0xfffe;
        }
        xl_put_inputs(&c);
    }
    bool good = xl_dispatch_send(&c) && xl_dispatch_recv(&c);
    epx_ll_combine_t b = xl_combine_of(&c);
    /* Outputs of ones too: what is added is no number, but it ends, and later calls are right. */
    if (good && !c.zero_copy)
        m->fill(c.y_mine, 0xff, c.want.parts * (size_t)c.shape.ranks * w->tokens_max * c.shape.hidden * 2);
    good = good && XT_OK(w->self, epx_ll_combine(c.handle, &b, m->stream()));
    good = good && XT_OK(w->self, epx_buffer_status(w->buffer));
    if (good) /* after all work of the stream */
        m->get(c.y[w->self->rank], c.out, 0);
    xl_fini(&c);
    return good;
}

/* The last call: rank 0 alone makes it. It ends by its deadline, with words, and the others hear of it. */
static void alone_at_last(xl_world_t *w, uint32_t op)
{
    xt_rank_t *self = w->self;
    epx_stream_t stream = self->memory->stream();
    xl_call_t c;
    xl_make(&c, w, op);
    epx_ll_dispatch_t d = xl_dispatch_of(&c);
    d.timeout_ms = 300;
    if (self->rank == 0 || xt_wait_mark(self, 1, 1)) {
        epx_status_t status = epx_ll_dispatch(w->buffer, &d, stream, &c.handle);
        self->memory->get(c.y[self->rank], c.x, 0); /* after all work of the stream */
        /* Another domain's failure comes by way of its host. */
        for (int ms = 0; status == EPX_OK && ms < 2000; ms++, usleep(1000))
            status = epx_buffer_status(w->buffer);
        bool right = self->rank ? status == EPX_E_PEER || status == EPX_E_BROKEN
                                : status == EPX_E_TIMEOUT || status == EPX_E_BUSY;
        XT_CHECK(self, right, "the last call: status %d: %s", (int)status, epx_error_detail());
    }
    xt_mark(self, 1);
    xt_wait_mark(self, 1, self->ranks);
    xl_fini(&c);
}

/* One or more calls; how many, in *calls. */
static bool move(xl_world_t *w, uint32_t op, uint32_t slots, uint32_t *calls)
{
    uint64_t kind = choice(w, op, 0) % 9;
    come_late(w, op);
    *calls = 1;
    if (kind == 0 && w->self->ranks > 1) {
        *calls = 1 + (uint32_t)(choice(w, op, 3) % 4);
        return apart(w, op, *calls);
    }
    if (kind == 1 && w->self->ranks > 1)
        return given_up(w, op);
    if (kind == 2 || kind == 3)
        return released(w, op, kind == 2);
    if (kind == 4 && slots > 1) {
        *calls = 2;
        return in_flight(w, op);
    }
    if (kind == 5)
        return full_of_ones(w, op);
    return xl_run(w, op);
}

static void slots_body(xt_rank_t *self)
{
    const slots_context_t *x = self->context;
    const slots_plan_t *p = &x->plan;
    static __thread xl_world_t w;
    epx_buffer_config_t config = {.ll_slots = p->slots};
    memset(&w, 0, sizeof w);
    w.seed = p->seed;
    w.tokens_max = p->tokens_max;
    w.hidden_max = p->hidden_max;
    w.topk_max = p->topk_max;
    w.experts = p->experts;
    w.zero_copy = p->seed % 2;
    w.wire_unknown = true;
    bool good = xl_open(&w, self, &config);
    uint32_t calls = 1;
    for (uint32_t op = 0; good && op < p->calls * x->percent / 100; op += calls) {
        good = move(&w, op, p->slots, &calls);
        XT_CHECK(self, good, "call %u, kind %d", op, (int)(choice(&w, op, 0) % 9));
    }
    if (good)
        XT_OK(self, epx_buffer_status(w.buffer));
    xt_mark(self, 0);
    if (xt_wait_mark(self, 0, self->ranks) && good && self->ranks > 1)
        alone_at_last(&w, p->calls + 10);
    xl_close(&w);
}

static int gcd(int a, int b)
{
    return b <= 0 ? a : gcd(b, a % b);
}

int main(int argc, char **argv)
{
    const char *part = argc > 1 ? argv[1] : "", *most = getenv("EPX_TEST_RANKS_MAX");
    const char *each = getenv("EPX_TEST_PER_DOMAIN");
    for (size_t i = 0; i < sizeof slots_plans / sizeof *slots_plans; i++) {
        slots_context_t x = {.plan = slots_plans[i], .percent = argc > 2 ? (uint32_t)atoi(argv[2]) : 100};
        if (!strstr(x.plan.name, part) || (most && x.plan.ranks > atoi(most)))
            continue;
        if (argc > 3)
            x.plan.seed += (uint64_t)atoll(argv[3]);
        xt_run_t r = {.name = x.plan.name, .ranks = x.plan.ranks, .threads = 1, .body = slots_body, .context = &x};
        r.seed = x.plan.seed;
        r.ranks_per_domain = each ? gcd(x.plan.ranks, atoi(each)) : x.plan.ranks;
        xt_run(&r);
    }
    return xt_done();
}
