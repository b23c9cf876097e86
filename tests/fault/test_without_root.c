/*
 * Low latency that outlives ranks goes on without rank 0, the middle of the bootstrap, which leaves or is killed; and
 * when another rank is killed after that, the rest learn of it at once and go on without that one, too.
 */
#include "common/slowness.h"
#include "common/world.h"

#include <epx/ll.h>

#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

enum { RANKS = 4, TOKENS = 2, HIDDEN = 8, CALLS = 6, DEADLINE_MS = 9000, AT_ONCE_MS = 1500, VICTIM = 2 };

typedef struct room {
    _Alignas(64) uint16_t x[TOKENS][HIDDEN], y[RANKS * TOKENS][HIDDEN], out[TOKENS][HIDDEN];
    int64_t ids[TOKENS * RANKS];
    int32_t count[1], source[RANKS * TOKENS];
    float left[TOKENS];
} room_t;

/* One call, one expert a rank, all chosen by all: how many took part, as the first token sees it; -1 on failure. */
static int call(xt_rank_t *self, epx_buffer_t *buffer, room_t *r)
{
    epx_ll_handle_t *handle;
    epx_ll_dispatch_t d = {.size = sizeof d, .x = r->x, .tokens = TOKENS, .hidden = HIDDEN, .topk_idx = r->ids};
    d.topk = d.experts = RANKS;
    d.recv_x = r->y;
    d.recv_count = r->count;
    d.src_info = r->source;
    epx_ll_combine_t c = {.size = sizeof c, .x = r->y, .topk_idx = r->ids, .out = r->out, .weight_left = r->left};
    uint64_t start = epx__now_ns();
    bool good =
        XT_OK(self, epx_ll_dispatch(buffer, &d, NULL, &handle)) && XT_OK(self, epx_ll_combine(handle, &c, NULL));
    double ms = (double)(epx__now_ns() - start) / 1e6;
    XT_CHECK(self, ms < well_before(DEADLINE_MS, AT_ONCE_MS), "a call took %.0f ms", ms);
    return good ? (int)r->left[0] : -1;
}

/* Calls until only `wanted` ranks take part. */
static bool call_until(xt_rank_t *self, epx_buffer_t *buffer, room_t *r, int wanted)
{
    int parts = RANKS;
    for (uint64_t start = epx__now_ns(); parts > wanted && epx__now_ns() - start < 5000000000u;)
        parts = call(self, buffer, r);
    XT_CHECK(self, parts == wanted, "%d ranks take part, not %d", parts, wanted);
    return parts == wanted;
}

static void body(xt_rank_t *self)
{
    const bool *killed = self->context;
    epx_buffer_t *buffer;
    room_t *r = aligned_alloc(64, sizeof *r);
    epx_buffer_config_t b = {.size = sizeof b, .lease_bytes = 4096, .reserve_bytes = 4096, .tokens_max = TOKENS};
    b.topk_max = b.experts_max = RANKS;
    b.handles_max = 1;
    b.ll_tokens_max = TOKENS;
    b.ll_hidden_max = HIDDEN;
    b.ll_mask_on_timeout = 1;
    b.timeout_ms = DEADLINE_MS;
    if (!r)
        exit(3);
    memset(r, 0, sizeof *r);
    for (int i = 0; i < TOKENS * RANKS; i++)
        r->ids[i] = i % RANKS;
    if (!XT_OK(self, epx_buffer_create(self->group, &b, &buffer)))
        return;
    for (int i = 0; i < CALLS; i++)
        XT_CHECK(self, call(self, buffer, r) == RANKS, "call %d", i);
    xt_mark(self, 0);
    xt_wait_mark(self, 0, RANKS);
    if (self->rank == 0 && *killed)
        raise(SIGKILL);
    if (self->rank == 0) {
        epx_buffer_destroy(buffer);
        free(r);
        return; /* and out of the group, and of the world */
    }
    bool good = call_until(self, buffer, r, RANKS - 1);
    xt_mark(self, 1);
    xt_wait_mark(self, 1, RANKS - 1);
    epx__sleep_ns(100000000);
    if (self->rank == VICTIM)
        raise(SIGKILL);
    good = good && call_until(self, buffer, r, RANKS - 2);
    XT_CHECK(self, good && call(self, buffer, r) == RANKS - 2, "and on");
    XT_OK(self, epx_buffer_status(buffer));
    xt_mark(self, 2);
    xt_wait_mark(self, 2, RANKS - 2);
    epx_buffer_destroy(buffer);
    free(r);
}

int main(void)
{
    static const bool killed[] = {false, true};
    setenv("EPX_LOG", "0", 0);
    for (int i = 0; i < 2; i++) {
        xt_run_t r = {.name = killed[i] ? "rank 0 is killed" : "rank 0 leaves", .ranks = RANKS, .processes = true};
        r.threads = 1;
        r.body = body;
        r.context = (void *)(uintptr_t)&killed[i];
        r.may_die = 1ull << VICTIM | (killed[i] ? 1 : 0);
        r.ranks_per_domain = RANKS;
        r.limit_ms = 60000;
        xt_run(&r);
    }
    return xt_done();
}
