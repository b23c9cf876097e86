/*
 * Ranks that never come, on a buffer that masks by deadline: the others wait once, mask them, and are right without
 * them for as long as there are slots that they cannot have been sent into; then words, not corruption.
 * EPX_LL_INBAND=1 makes no difference to such a buffer.
 *
 * One that was never there; one, or all but one, lost before they have said that they took the slot's last call. Those
 * who send to them wait for credit until the deadline, which must not keep from the others what is theirs, or they
 * would be given up too. Those who receive come to them one by one, while they are being given up: they must not do so
 * some with and some without a block's other threads.
 *
 *     PROGRAM [rounds of the latter, which wants one domain]
 */
#include <stdlib.h>
#include <string.h>

#include "common/ll_case.h"

enum { SLOTS = 4, ABSENT = 2 };

static void body(xt_rank_t *self)
{
    static __thread xl_world_t w;
    epx_buffer_config_t config = {.ll_slots = SLOTS, .ll_mask_on_timeout = 1, .timeout_ms = 3000};
    memset(&w, 0, sizeof w);
    w.seed = 41;
    w.tokens_max = 6;
    w.hidden_max = 512;
    w.topk_max = 4;
    w.experts = 12;
    w.wire_unknown = true; /* what waited for room is told later */
    bool good = xl_open(&w, self, &config);
    xt_mark(self, 0);
    good = xt_wait_mark(self, 0, self->ranks) && good;
    if (good && self->rank != ABSENT) {
        int32_t masked[XT_RANKS_MAX] = {0};
        w.masked[ABSENT] = 1; /* for the reference */
        for (uint32_t op = 0; good && op < SLOTS; op++)
            good = xl_run(&w, op);
        XT_CHECK(self, good, "calls without rank %d", ABSENT);
        good = good && XT_OK(self, epx_ll_mask_get(w.buffer, masked));
        for (int r = 0; good && r < self->ranks; r++)
            XT_CHECK(self, masked[r] == (r == ABSENT), "rank %d: masked is %d", r, masked[r]);
    }
    xt_mark(self, 1);
    xt_wait_mark(self, 1, self->ranks);
    xl_close(&w);
}

/* ---- lost without giving credit ---- */

/* A call that is compared, and released instead of combined. */
static bool dispatch_alone(xl_world_t *w, uint32_t op, uint64_t timeout_ms)
{
    xt_rank_t *self = w->self;
    xl_call_t c;
    xl_make(&c, w, op);
    epx_ll_dispatch_t d = xl_dispatch_of(&c);
    d.timeout_ms = timeout_ms;
    bool good = XT_OK(self, epx_ll_dispatch(w->buffer, &d, self->memory->stream(), &c.handle));
    self->memory->get(c.y[self->rank], c.x, 0); /* after all work of the stream */
    if (good) {
        xl_check_dispatch(&c);
        epx_ll_handle_release(c.handle, self->memory->stream());
    }
    good = good && XT_OK(self, epx_buffer_status(w->buffer));
    xl_fini(&c);
    return good;
}

/* The ranks `from` to the last are lost after call 0, whose slot is that of all calls. */
static void lose(xt_rank_t *self, xl_world_t *w, int from, uint32_t calls, uint64_t timeout_ms)
{
    epx_buffer_config_t config = {.ll_slots = 1, .ll_mask_on_timeout = 1, .timeout_ms = timeout_ms};
    int32_t masked[XT_RANKS_MAX] = {0};
    memset(w, 0, sizeof *w);
    w->seed = 43;
    w->tokens_max = 6;
    w->hidden_max = 512;
    w->topk_max = 4;
    w->experts = 2 * (uint32_t)self->ranks;
    w->wire_unknown = true;
    bool good = xl_open(w, self, &config) && dispatch_alone(w, 0, 60000);
    xt_mark(self, 0);
    good = xt_wait_mark(self, 0, self->ranks) && good;
    for (int r = from; r < self->ranks; r++)
        w->masked[r] = 1; /* for the reference */
    for (uint32_t op = 1; good && op <= calls && self->rank < from; op++)
        good = calls == 1 ? dispatch_alone(w, op, timeout_ms) : xl_run(w, op);
    if (self->rank < from && XT_OK(self, epx_ll_mask_get(w->buffer, masked)))
        for (int r = 0; r < self->ranks; r++)
            XT_CHECK(self, masked[r] == (r >= from), "rank %d: masked is %d", r, masked[r]);
    xt_mark(self, 1);
    xt_wait_mark(self, 1, self->ranks);
    xl_close(w);
}

static void body_one(xt_rank_t *self)
{
    static __thread xl_world_t w;
    lose(self, &w, self->ranks - 1, 3, 3000);
}

static void body_others(xt_rank_t *self)
{
    static __thread xl_world_t w;
    lose(self, &w, 1, 1, 400);
}

static void run(const char *name, int ranks, int ranks_per_domain, void (*what)(xt_rank_t *))
{
    xt_run_t r = {.name = name, .ranks = ranks, .threads = 1, .body = what, .seed = 41};
    r.ranks_per_domain = ranks_per_domain;
    xt_run(&r);
}

int main(int argc, char **argv)
{
    const char *each = getenv("EPX_TEST_PER_DOMAIN"); /* 3, or 1 */
    setenv("EPX_LL_INBAND", "1", 1);
    run("deadline", 3, each ? atoi(each) : 3, body);
    if (!each)
        run("one lost", 4, 4, body_one);
    for (int rounds = argc > 1 ? atoi(argv[1]) : 2; !each && rounds > 0; rounds--)
        run("all but one lost", 8, 8, body_others);
    return xt_done();
}
