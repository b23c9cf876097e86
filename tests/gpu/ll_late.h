/*
 * Outputs that come late: of a call that their owner has left behind, to a place that is another rank's in the slot's
 * next call. Rank 0 has all tokens. In call 1 they go to rank 2, in call 3, the same slot, to rank 1. Rank 2 is held up
 * before it sends its outputs of call 1, until those of call 3 are there, or it is clear that nobody lets them come.
 * Rank 0 must get those of call 3, every row with its own number.
 *
 *     PROGRAM [part of a row's name]
 */
#ifndef EPX_TEST_LL_LATE_H
#define EPX_TEST_LL_LATE_H

#include "common/nets.h"
#include "common/world.h"

#include <epx/ll.h>

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OWNER, EARLY, LATE, RANKS };
enum { TOKENS = 3, HIDDEN = 512, SLOTS = 2, DEADLINE_MS = 8000, HELD_UP_MS = 600 };

typedef struct late_row {
    const char *name;
    bool given_up; /* rank 0 masks rank 2 amid call 1; else it releases that call after its send half */
    const char *net;
    const char *inband; /* EPX_LL_INBAND */
} late_row_t;

typedef struct late {
    xt_rank_t *self;
    const late_row_t *row;
    epx_buffer_t *buffer;
    void *ids, *x, *y, *recv, *count, *src, *out, *left; /* the device's */
} late_t;

static uint16_t late_bf16(int value)
{
    float number = (float)value;
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return (uint16_t)(bits >> 16); /* small whole numbers: exact */
}

/* What rank r makes of rank 0's token t in call n. */
static int late_number(int n, int r, int t)
{
    return 64 * (n - 1) + 16 * r + t + 1;
}

static void *late_alloc(const late_t *l, size_t bytes)
{
    void *memory = l->self->memory->alloc(bytes);
    if (!memory)
        exit(4);
    l->self->memory->fill(memory, 0, bytes);
    return memory;
}

static bool late_open(late_t *l)
{
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 1u << 16, .reserve_bytes = 1u << 16, .tokens_max = 4};
    c.topk_max = 1;
    c.experts_max = RANKS; /* one a rank */
    c.handles_max = 1;
    c.timeout_ms = DEADLINE_MS;
    c.ll_tokens_max = TOKENS;
    c.ll_hidden_max = HIDDEN;
    c.ll_slots = SLOTS;
    c.ll_mask_on_timeout = l->row->given_up;
    l->ids = late_alloc(l, TOKENS * sizeof(int64_t));
    l->x = late_alloc(l, TOKENS * HIDDEN * 2);
    l->y = late_alloc(l, RANKS * TOKENS * HIDDEN * 2);
    l->recv = late_alloc(l, RANKS * TOKENS * HIDDEN * 2);
    l->count = late_alloc(l, sizeof(int32_t));
    l->src = late_alloc(l, RANKS * TOKENS * sizeof(int32_t));
    l->out = late_alloc(l, TOKENS * HIDDEN * 2);
    l->left = late_alloc(l, TOKENS * sizeof(float));
    return XT_OK(l->self, epx_buffer_create(l->self->group, &c, &l->buffer));
}

static void late_close(late_t *l)
{
    void *all[] = {l->ids, l->x, l->y, l->recv, l->count, l->src, l->out, l->left};
    epx_buffer_destroy(l->buffer);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        l->self->memory->free(all[i]);
}

static bool late_mask(const late_t *l, int rank)
{
    return XT_OK(l->self, epx_ll_mask_set(l->buffer, rank, 1, l->self->memory->stream()));
}

/* All tokens to the expert of rank `to`. A slot that is still written may be refused, which is right too. */
static bool late_dispatch(const late_t *l, int to, epx_ll_handle_t **handle)
{
    const xt_memory_t *m = l->self->memory;
    epx_ll_dispatch_t d = {.size = sizeof d, .x = l->x, .hidden = HIDDEN, .topk_idx = l->ids, .topk = 1};
    int64_t ids[TOKENS] = {to, to, to};
    m->put(l->ids, ids, sizeof ids);
    d.tokens = l->self->rank == OWNER ? TOKENS : 0;
    d.experts = RANKS;
    d.recv_x = l->recv;
    d.recv_count = l->count;
    d.src_info = l->src;
    epx_status_t status = epx_ll_dispatch(l->buffer, &d, m->stream(), handle);
    for (int ms = 0; status == EPX_E_BUSY && ms < DEADLINE_MS; ms++, usleep(1000))
        status = epx_ll_dispatch(l->buffer, &d, m->stream(), handle);
    return XT_OK(l->self, status);
}

static epx_ll_combine_t late_combine(const late_t *l, int n)
{
    epx_ll_combine_t c = {.size = sizeof c, .x = l->y, .topk_idx = l->ids, .out = l->out, .weight_left = l->left};
    uint16_t rows[TOKENS][HIDDEN]; /* rank 0's tokens are the first that come */
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        rows[i / HIDDEN][i % HIDDEN] = late_bf16(late_number(n, l->self->rank, i / HIDDEN));
    l->self->memory->put(l->y, rows, sizeof rows);
    return c;
}

/* Rank 0: outputs of `from` alone, or (-1) nobody's. */
static void late_check(const late_t *l, int n, int from)
{
    uint16_t out[TOKENS][HIDDEN];
    float left[TOKENS];
    l->self->memory->get(out, l->out, sizeof out);
    l->self->memory->get(left, l->left, sizeof left);
    for (int t = 0; t < TOKENS; t++) {
        uint16_t want = from < 0 ? 0 : late_bf16(late_number(n, from, t));
        int bad = 0;
        for (int h = 0; h < HIDDEN; h++)
            bad += out[t][h] != want;
        XT_CHECK(l->self, bad == 0, "call %d, token %d: %d elements are not %#x; the first is %#x", n, t, bad, want,
                 out[t][0]);
        XT_CHECK(l->self, left[t] == (from < 0 ? 0 : 1), "call %d, token %d: weight %g is left", n, t, (double)left[t]);
    }
}

static bool late_whole(const late_t *l, epx_ll_handle_t *handle, int n)
{
    epx_ll_combine_t c = late_combine(l, n);
    return XT_OK(l->self, epx_ll_combine(handle, &c, l->self->memory->stream()));
}

/* Call 1 at its owner, until it is over there. */
static bool late_leave(const late_t *l, epx_ll_handle_t *handle)
{
    epx_stream_t stream = l->self->memory->stream();
    if (l->row->given_up) {
        bool good = late_mask(l, LATE) && late_whole(l, handle, 1);
        late_check(l, 1, -1);
        return good;
    }
    epx_ll_combine_t c = late_combine(l, 1);
    bool good = XT_OK(l->self, epx_ll_combine_send(handle, &c, stream));
    epx_ll_handle_release(handle, stream);
    return good;
}

/* Call 1 where its outputs come from. */
static bool late_return(const late_t *l, epx_ll_handle_t *handle)
{
    const xt_rank_t *self = l->self;
    for (int ms = 0; self->rank == LATE && ms < HELD_UP_MS && atomic_load(&self->world->mark[0]) == 0; ms++)
        usleep(1000);
    bool good = late_whole(l, handle, 1);
    /* From now on without each other, so that rank 1 need not wait for rank 2. */
    good = good && late_mask(l, self->rank == LATE ? EARLY : LATE);
    return good && (self->rank == EARLY || !l->row->given_up || late_mask(l, OWNER));
}

static void late_body(xt_rank_t *self)
{
    late_t l = {.self = self, .row = self->context};
    epx_ll_handle_t *first, *other;
    bool good = late_open(&l) && late_dispatch(&l, LATE, &first);
    /* In between, so that rank 2 says that it has taken what call 1 brought. */
    good = good && late_dispatch(&l, LATE, &other);
    if (good)
        epx_ll_handle_release(other, self->memory->stream());
    good = good && (self->rank == OWNER ? late_leave : late_return)(&l, first);
    good = good && late_dispatch(&l, EARLY, &first) && late_whole(&l, first, 3);
    self->memory->get(&(int32_t){0}, l.count, sizeof(int32_t)); /* after all work of the stream */
    if (good && self->rank == EARLY)
        xt_mark(self, 0);
    if (good && self->rank == OWNER)
        late_check(&l, 3, EARLY);
    good = good && XT_OK(self, epx_buffer_status(l.buffer));
    xt_mark(self, 1);
    xt_wait_mark(self, 1, self->ranks);
    late_close(&l);
}

static int late_main(int argc, char **argv)
{
    static const late_row_t rows[] = {
        {"1 released", false, NULL, "0"},
        {"2 released, in-band", false, NULL, "1"},
        {"3 released, domains", false, "loop", "0"},
        {"4 given up", true, NULL, "0"},
        {"5 given up, domains", true, "loop", "0"},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if ((argc > 1 && !strstr(rows[i].name, argv[1])) || (rows[i].net && !test_net_here(rows[i].net)))
            continue;
        if (rows[i].inband[0] == '1' && xt_memory()->backend == EPX_BACKEND_CPU)
            continue; /* no such thing */
        xt_run_t r = {.name = rows[i].name, .ranks = RANKS, .threads = 1, .body = late_body, .seed = 53};
        setenv("EPX_NET", rows[i].net ? rows[i].net : "", 1);
        setenv("EPX_LL_INBAND", rows[i].inband, 1);
        r.ranks_per_domain = rows[i].net ? 1 : RANKS;
        r.context = (void *)(uintptr_t)&rows[i];
        xt_run(&r);
    }
    return xt_done();
}

#endif
