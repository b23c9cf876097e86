/*
 * Ranks that never come, on a buffer that masks by deadline: the others wait once, mask them, and are right without
 * them for as long as there are slots that they cannot have been sent into; then words, not corruption.
 * EPX_LL_INBAND=1 makes no difference to such a buffer.
 *
 * One that was never there; and all but one, lost at once before they have said that they took the slot's last call.
 * Then those who send give them up, for want of credit, while those who receive come to them one by one: they must not
 * do so some with and some without a block's other threads. What comes of that call is not compared: this rank's own
 * ids wait for the credit of all, so whether it has heard itself in time is a matter of chance.
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

/* ---- all but one at once ---- */

static void body_all(xt_rank_t *self)
{
    static __thread xl_world_t w;
    xl_call_t c;
    epx_buffer_config_t config = {.ll_slots = 1, .ll_mask_on_timeout = 1};
    memset(&w, 0, sizeof w);
    w.seed = 41;
    w.tokens_max = 6;
    w.hidden_max = 512;
    w.topk_max = 4;
    w.experts = 16;
    w.wire_unknown = true;
    bool good = xl_open(&w, self, &config);
    for (uint32_t op = 0; good && op < 2; op++) { /* neither is combined */
        xt_mark(self, (int)op);
        good = xt_wait_mark(self, (int)op, self->ranks);
        if (op == 1 && self->rank != 0)
            break;
        xl_make(&c, &w, op);
        epx_ll_dispatch_t d = xl_dispatch_of(&c);
        d.timeout_ms = op ? 400 : 0;
        good = good && XT_OK(self, epx_ll_dispatch(w.buffer, &d, self->memory->stream(), &c.handle));
        self->memory->get(c.y[self->rank], c.x, 0); /* after all work of the stream */
        if (good)
            epx_ll_handle_release(c.handle, self->memory->stream());
        good = good && XT_OK(self, epx_buffer_status(w.buffer));
        xl_fini(&c);
    }
    xt_mark(self, 2);
    xt_wait_mark(self, 2, self->ranks);
    xl_close(&w);
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
    for (int rounds = argc > 1 ? atoi(argv[1]) : 2; !each && rounds > 0; rounds--)
        run("all but one lost", 8, 8, body_all);
    return xt_done();
}
