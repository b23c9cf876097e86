/*
 * Low latency with ranks given up: by deadline, by the caller between two halves, and by death. What did not come is
 * left out of the sums and of weight_left, on both sides; nothing old is added in its place, no slot is used too early.
 *
 *     fault_test_ll_mask [part of a test's name]
 */
#include "common/slowness.h"
#include "common/world.h"
#include "common/nets.h"

#include <epx/ll.h>

#include "api/objects.h"
#include "base/clock.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TOKENS = 2, HIDDEN = 8, RANKS_MOST = 4, PATIENT_MS = 8000 };
static uint64_t impatient_ms; /* the same at all ranks: who gives up much later than another is given up itself */

typedef struct kill_plan {
    int victim;
    bool by_caller; /* masked by the caller before, else by the library */
} kill_plan_t;

/* One expert a rank; every token chooses all of them, so every rank has a share in every token. Expert r's output is
 * base + r in all its elements. */
typedef struct trip {
    xt_rank_t *self;
    epx_buffer_t *buffer;
    epx_ll_handle_t *handle;
    int64_t ids[TOKENS * RANKS_MOST]; /* [TOKENS][ranks] */
    _Alignas(16) uint16_t x[TOKENS][HIDDEN], y[RANKS_MOST * TOKENS][HIDDEN];
    _Alignas(16) uint16_t out[TOKENS][HIDDEN], recv[RANKS_MOST * TOKENS][HIDDEN];
    float left[TOKENS];
    int64_t wait_ns[RANKS_MOST];
    int32_t count[1], source[RANKS_MOST * TOKENS];
} trip_t;

static uint16_t bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)(bits >> 16); /* small whole numbers: exact */
}

static bool trip_open(xt_rank_t *self, trip_t *t, uint32_t slots, bool mask_on_timeout)
{
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 1u << 16, .reserve_bytes = 1u << 16, .tokens_max = 4};
    c.topk_max = RANKS_MOST;
    c.experts_max = RANKS_MOST;
    c.handles_max = 1;
    c.timeout_ms = PATIENT_MS;
    c.ll_tokens_max = TOKENS;
    c.ll_hidden_max = HIDDEN;
    c.ll_slots = slots;
    c.ll_mask_on_timeout = mask_on_timeout;
    memset(t, 0, sizeof *t);
    t->self = self;
    for (int i = 0; i < TOKENS * self->ranks; i++)
        t->ids[i] = i % self->ranks;
    return XT_OK(self, epx_buffer_create(self->group, &c, &t->buffer));
}

static epx_ll_dispatch_t dispatch_args(trip_t *t, uint64_t timeout_ms)
{
    epx_ll_dispatch_t d = {.size = sizeof d, .x = t->x, .tokens = TOKENS, .hidden = HIDDEN, .topk_idx = t->ids};
    d.topk = d.experts = (uint32_t)t->self->ranks;
    d.recv_x = t->recv;
    d.recv_count = t->count;
    d.src_info = t->source;
    d.wait_ns = t->wait_ns;
    d.timeout_ms = timeout_ms;
    return d;
}

static epx_ll_combine_t combine_args(trip_t *t, float base, uint64_t timeout_ms)
{
    epx_ll_combine_t c = {.size = sizeof c, .x = t->y, .topk_idx = t->ids, .out = t->out, .weight_left = t->left};
    for (int i = 0; i < RANKS_MOST * TOKENS; i++)
        for (int h = 0; h < HIDDEN; h++)
            t->y[i][h] = bf16(base + (float)t->self->rank);
    c.timeout_ms = timeout_ms;
    return c;
}

/* `from`: bit r set: rank r's share is in the sums. */
static void check_out(trip_t *t, float base, unsigned from, const char *when)
{
    float sum = 0, weight = 0;
    for (int r = 0; r < t->self->ranks; r++)
        if (from >> r & 1) {
            sum += base + (float)r;
            weight += 1;
        }
    for (int i = 0; i < TOKENS; i++) {
        XT_CHECK(t->self, t->left[i] == weight, "%s: token %d: weight %g is left, not %g", when, i, (double)t->left[i],
                 (double)weight);
        for (int h = 0; h < HIDDEN; h++)
            XT_CHECK(t->self, t->out[i][h] == bf16(sum), "%s: token %d element %d: %#x, not %#x (%g)", when, i, h,
                     t->out[i][h], bf16(sum), (double)sum);
    }
}

static bool whole(trip_t *t, float base, uint64_t timeout_ms, unsigned from, const char *when)
{
    epx_ll_dispatch_t d = dispatch_args(t, timeout_ms);
    epx_ll_combine_t c = combine_args(t, base, timeout_ms);
    epx_status_t status = epx_ll_dispatch(t->buffer, &d, NULL, &t->handle);
    /* A rank that was given up has said that it is done with the slot, but over a network the word may be on its way.
     */
    for (int i = 0; i < 1000 && status == EPX_E_BUSY && t->self->topology.domains > 1; i++) {
        usleep(1000);
        status = epx_ll_dispatch(t->buffer, &d, NULL, &t->handle);
    }
    if (!XT_OK(t->self, status) || !XT_OK(t->self, epx_ll_combine(t->handle, &c, NULL)))
        return false;
    check_out(t, base, from, when);
    return true;
}

/* The last rank comes after the others have given it up. Its tokens were never taken, so nothing came back for them:
 * what lies in the slot is of an earlier call. */
static void body_late(xt_rank_t *self)
{
    trip_t t;
    int late = self->ranks - 1;
    unsigned all = (1u << self->ranks) - 1, mine = 1u << self->rank;
    if (!trip_open(self, &t, 2, true))
        return;
    bool good = whole(&t, 1, PATIENT_MS, all, "call 1") && whole(&t, 8, PATIENT_MS, all, "call 2");
    if (good && self->rank == late) {
        xt_wait_mark(self, 0, late);
        good = whole(&t, 16, PATIENT_MS, mine, "late call");
    } else if (good) {
        xt_mark(self, 4);
        xt_wait_mark(self, 4, late); /* the others are no later than they must be */
        good = whole(&t, 16, impatient_ms, all & ~(1u << late), "call without the late rank");
        XT_CHECK(self, t.wait_ns[late] >= (int64_t)impatient_ms * 900000, "%lld ns waited for the late rank",
                 (long long)t.wait_ns[late]);
        int32_t masked[RANKS_MOST] = {0};
        XT_CHECK(self, epx_ll_mask_get(t.buffer, masked) == EPX_OK && masked[late], "the late rank is not masked");
        xt_mark(self, 0);
        /* The slot of the call without it: nothing more comes once the late rank has said so. */
        xt_wait_mark(self, 1, 1);
        good = good && whole(&t, 32, PATIENT_MS, all & ~(1u << late), "call 4") &&
               whole(&t, 64, PATIENT_MS, all & ~(1u << late), "call 5, the same slot");
    }
    if (self->rank == late)
        xt_mark(self, 1);
    xt_mark(self, 2);
    xt_wait_mark(self, 2, self->ranks); /* or the others would wait for one that has gone */
    epx_buffer_destroy(t.buffer);
}

/* The caller masks a rank after it was sent to: it may still write into that slot, which must not be used again. */
static void body_masked_between(xt_rank_t *self)
{
    trip_t t;
    if (!trip_open(self, &t, 1, false))
        return;
    epx_ll_dispatch_t d = dispatch_args(&t, PATIENT_MS);
    epx_ll_combine_t c = combine_args(&t, 4, PATIENT_MS);
    if (self->rank == 1)
        xt_wait_mark(self, 0, 1);
    XT_OK(self, epx_ll_dispatch_send(t.buffer, &d, NULL, &t.handle));
    if (self->rank == 0)
        XT_OK(self, epx_ll_mask_set(t.buffer, 1, 1, NULL));
    XT_OK(self, epx_ll_dispatch_recv(t.handle, NULL));
    if (self->rank == 1)
        xt_wait_mark(self, 1, 1);
    XT_OK(self, epx_ll_combine(t.handle, &c, NULL));
    if (self->rank == 0) {
        check_out(&t, 4, 1, "masked between the halves");
        xt_mark(self, 0);
        epx_status_t status = epx_ll_dispatch_send(t.buffer, &d, NULL, &t.handle);
        XT_CHECK(self, status == EPX_E_BUSY && strstr(epx_error_detail(), "rank 1"), "%s: %s", epx_status_name(status),
                 epx_error_detail());
        xt_mark(self, 1);
        xt_wait_mark(self, 2, 1);
        whole(&t, 4, PATIENT_MS, 1, "the slot again");
    } else {
        check_out(&t, 4, 2, "at the masked rank");
        xt_mark(self, 2);
    }
    xt_mark(self, 3);
    xt_wait_mark(self, 3, 2);
    epx_buffer_destroy(t.buffer);
}

/* The bootstrap has heard that `victim` is dead; true when it has. */
static bool wait_for_death(const xt_rank_t *self, int victim)
{
    for (int i = 0; i < PATIENT_MS && !epx__bootstrap_dead(self->group->bootstrap, victim); i++)
        usleep(1000);
    return epx__bootstrap_dead(self->group->bootstrap, victim);
}

/* A rank is killed. Who masks on a deadline need not wait for one, and who has masked it need not hear of it; but high
 * throughput cannot do without it. */
static void body_killed(xt_rank_t *self)
{
    const kill_plan_t *plan = self->context;
    trip_t t;
    unsigned all = (1u << self->ranks) - 1, others = all & ~(1u << plan->victim);
    if (!trip_open(self, &t, 2, !plan->by_caller) || !whole(&t, 1, PATIENT_MS, all, "before"))
        return;
    if (self->rank != plan->victim && plan->by_caller)
        XT_OK(self, epx_ll_mask_set(t.buffer, plan->victim, 1, NULL));
    xt_mark(self, 0);
    xt_wait_mark(self, 0, self->ranks);
    if (self->rank == plan->victim)
        raise(SIGKILL);
    uint64_t start = epx__now_ns();
    for (int i = 0; i < 5; i++)
        if (!whole(&t, (float)(2 << i), PATIENT_MS, others, "after"))
            break;
    if (plan->by_caller)
        XT_CHECK(self, wait_for_death(self, plan->victim), "nobody hears of the death");
    whole(&t, 1, PATIENT_MS, others, "last");
    double took_ms = (double)(epx__now_ns() - start) * 1e-6;
    XT_CHECK(self, took_ms < well_before(PATIENT_MS, 2000), "%.0f ms", took_ms);
    xt_mark(self, 1);
    xt_wait_mark(self, 1, self->ranks - 1); /* the barrier's failure is told to all */
    epx_status_t status = epx_buffer_barrier(t.buffer, NULL);
    char name[16];
    snprintf(name, sizeof name, "rank %d", plan->victim);
    XT_CHECK(self, status == EPX_E_PEER && strstr(epx_error_detail(), name), "%s: %s", epx_status_name(status),
             epx_error_detail());
    took_ms = (double)(epx__now_ns() - start) * 1e-6;
    XT_CHECK(self, took_ms < well_before(PATIENT_MS, 3000), "%.0f ms", took_ms);
    epx_buffer_destroy(t.buffer);
}

/* The network must be there; under TSan libfabric is left out: it is not instrumented. */
static bool here(const char *spec, bool processes)
{
    if (!spec)
        return true;
    bool ofi = strncmp(spec, "ofi", 3) == 0;
    if (ofi != processes || (ofi && getenv("EPX_TEST_THREADS")))
        return false; /* loop and sim are of one process */
    return test_net_here(spec);
}

/* All ranks in one domain; and all apart, over each network. */
static void run_everywhere(const xt_run_t *run)
{
    /* Not shm: who dies in the middle of a put leaves libfabric's lock in shared memory taken, and the others spin. */
    static const char *const nets[] = {NULL, "loop", "sim:5", "ofi:tcp"};
    for (size_t i = 0; i < sizeof nets / sizeof *nets; i++) {
        xt_run_t r = *run;
        char name[64];
        if (!here(nets[i], run->processes))
            continue;
        snprintf(name, sizeof name, "%s%s%s", run->name, nets[i] ? ", " : "", nets[i] ? nets[i] : "");
        setenv("EPX_NET", nets[i] ? nets[i] : "", 1);
        r.name = name;
        r.ranks_per_domain = nets[i] ? 1 : r.ranks;
        xt_run(&r);
    }
}

int main(int argc, char **argv)
{
    const char *part = argc > 1 ? argv[1] : "";
    impatient_ms = (uint64_t)well_before(PATIENT_MS / 2, 1000);
    kill_plan_t plans[] = {{.victim = 1}, {.victim = 0}, {.victim = 1, .by_caller = true}};
    xt_run_t runs[] = {
        {.name = "late rank", .ranks = 3, .body = body_late},
        {.name = "masked between halves", .ranks = 2, .body = body_masked_between},
        {.name = "killed", .ranks = 3, .body = body_killed, .context = &plans[0], .may_die = 2, .processes = true},
        {.name = "killed, rank 0",
         .ranks = 3,
         .body = body_killed,
         .context = &plans[1],
         .may_die = 1,
         .processes = true},
        {.name = "killed, masked",
         .ranks = 3,
         .body = body_killed,
         .context = &plans[2],
         .may_die = 2,
         .processes = true},
    };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        runs[i].threads = 1;
        runs[i].limit_ms = 30000;
        if (strstr(runs[i].name, part))
            run_everywhere(&runs[i]);
    }
    return xt_done();
}
