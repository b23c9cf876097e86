/*
 * A rank that never comes, on a buffer that masks by deadline: the others wait once, mask it, and are right without it
 * for as long as there are slots that it cannot have been sent into; then words, not corruption. EPX_LL_INBAND=1 makes
 * no difference to such a buffer.
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

int main(void)
{
    setenv("EPX_LL_INBAND", "1", 1);
    xt_run_t r = {.name = "deadline", .ranks = 3, .threads = 1, .body = body, .seed = 41, .ranks_per_domain = 3};
    if (getenv("EPX_TEST_PER_DOMAIN")) /* 3, or 1 */
        r.ranks_per_domain = atoi(getenv("EPX_TEST_PER_DOMAIN"));
    xt_run(&r);
    return xt_done();
}
