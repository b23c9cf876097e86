/*
 * Low latency under stress, in one domain and between domains: 10,000 calls without a barrier anywhere, ranks far apart
 * in time, two calls in flight whose halves come in any order, memory poisoned before each call. Everything is compared
 * with the reference, and the bytes on the wire with the formula.
 *
 *     stress_test_ll_stress [part of a run's name] [factor in percent] [seed]
 */
#include "common/ll_case.h"
#include "common/nets.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct stress {
    const char *name;
    int ranks;
    bool processes, pairs, released; /* released: half of the calls are not combined */
    uint32_t calls, tokens_max, hidden_max, topk_max, experts, slots;
    uint64_t delay_ns;
    uint32_t delay_one_in;
    int last_rank; /* delays every call of its; -1 none */
    uint64_t seed;
    int per_domain; /* 0: all in one */
    const char *net;
} stress_t;

static const stress_t runs[] = {
    {"10,000 calls", 4, false, false, false, 10000, 3, 128, 2, 4, 2, 0, 0, -1, 1, 0, NULL},
    {"10,000 calls, pairs", 3, false, true, false, 4000, 3, 128, 2, 3, 2, 0, 0, -1, 2, 0, NULL},
    {"delays", 4, true, true, false, 160, 8, 256, 4, 8, 2, 4000000, 12, -1, 3, 0, NULL},
    {"delays, threads", 5, false, true, false, 160, 8, 256, 4, 10, 3, 4000000, 12, -1, 4, 0, NULL},
    {"rank 0 last", 4, true, false, false, 120, 8, 256, 4, 8, 2, 2000000, 1, 0, 5, 0, NULL},
    {"released", 4, false, false, true, 160, 40, 1024, 4, 8, 1, 0, 0, -1, 7, 0, NULL},
    {"rank 3 last, one slot", 4, false, false, false, 120, 8, 256, 4, 8, 1, 2000000, 1, 3, 6, 0, NULL},
    {"sim: 10,000 calls", 4, false, false, false, 10000, 3, 128, 2, 4, 2, 0, 0, -1, 8, 2, "sim:1"},
    {"sim: pairs, apart", 3, false, true, false, 3000, 3, 128, 2, 3, 2, 0, 0, -1, 9, 1, "sim:2"},
    {"sim: three slots", 6, false, true, false, 600, 5, 256, 4, 12, 3, 500000, 20, -1, 10, 2, "sim:3"},
    {"sim: released", 4, false, false, true, 400, 20, 512, 4, 8, 1, 0, 0, -1, 11, 1, "sim:4"},
    {"sim: rank 0 last", 4, false, false, false, 120, 8, 256, 4, 8, 2, 2000000, 1, 0, 12, 2, "sim:5"},
    {"sim: rank 3 last, one slot", 4, false, false, false, 120, 8, 256, 4, 8, 1, 2000000, 1, 3, 13, 1, "sim:6"},
    {"loop: pairs", 4, false, true, false, 2000, 3, 128, 2, 4, 2, 0, 0, -1, 14, 2, "loop"},
    {"tcp: 1,000 calls", 4, true, false, false, 1000, 3, 128, 2, 4, 2, 0, 0, -1, 15, 2, "ofi:tcp"},
    {"tcp: pairs", 2, true, true, false, 1000, 6, 1024, 4, 8, 2, 0, 0, -1, 16, 1, "ofi:tcp"},
    {"tcp: delays", 4, true, true, false, 160, 8, 256, 4, 8, 2, 4000000, 12, -1, 17, 2, "ofi:tcp"},
    {"tcp: rank 3 last", 4, true, false, false, 120, 8, 256, 4, 8, 2, 2000000, 1, 3, 18, 1, "ofi:tcp"},
};

typedef struct context {
    const stress_t *stress;
    uint32_t calls;
} context_t;

/* Halves of two calls, each call's own in order, otherwise as every rank likes. */
static bool run_pair(xl_world_t *w, uint32_t op)
{
    xl_call_t c[2];
    int done[2] = {0, 0};
    bool good = true;
    xl_make(&c[0], w, op);
    xl_make(&c[1], w, op + 1);
    c[0].whole = false;
    c[1].whole = false;
    good = xl_dispatch_send(&c[0]) && xl_dispatch_send(&c[1]);
    while (good && (done[0] < 3 || done[1] < 3)) {
        /* A call is not received whole before the other has been received and sent back: peers may wait for it. */
        int i = (int)xt_random(w->self, 2);
        if (done[i] == 3 || (done[i] == 2 && done[1 - i] < 2))
            i = 1 - i;
        good = done[i] == 0 ? xl_dispatch_recv(&c[i]) : done[i] == 1 ? xl_combine_send(&c[i]) : xl_combine_recv(&c[i]);
        done[i]++;
    }
    xl_count_wire(&c[0], true);
    xl_count_wire(&c[1], true);
    xl_fini(&c[0]);
    xl_fini(&c[1]);
    return good && xl_check_wire(w, op);
}

/* Dispatch only: nothing but 'taken' tells the next call's senders that the slot is free. */
static bool run_released(xl_world_t *w, uint32_t op)
{
    xl_call_t c;
    xl_make(&c, w, op);
    bool good = xl_dispatch_send(&c) && xl_dispatch_recv(&c);
    if (good)
        epx_ll_handle_release(c.handle, w->self->memory->stream());
    xl_count_wire(&c, false);
    xl_fini(&c);
    return good && xl_check_wire(w, op);
}

static void body(xt_rank_t *self)
{
    const context_t *x = self->context;
    const stress_t *s = x->stress;
    static __thread xl_world_t w;
    epx_buffer_config_t config = {.ll_slots = s->slots};
    memset(&w, 0, sizeof w);
    w.seed = s->seed;
    w.tokens_max = s->tokens_max;
    w.hidden_max = s->hidden_max;
    w.topk_max = s->topk_max;
    w.experts = s->experts;
    w.loose_from = x->calls > s->slots + 3 ? x->calls - s->slots - 2 : 1; /* nobody waits for the others at the end */
    self->delay_ns_max = s->last_rank < 0 || s->last_rank == self->rank ? s->delay_ns : 0;
    self->delay_one_in = s->delay_one_in;
    bool good = xl_open(&w, self, &config);
    for (uint32_t op = 0; good && op < x->calls; op += 2) {
        if (s->released && op / 2 % 2)
            good = run_released(&w, op) && run_released(&w, op + 1);
        else
            good = s->pairs ? run_pair(&w, op) : xl_run(&w, op) && xl_run(&w, op + 1);
        XT_CHECK(self, good, "call %u", op);
    }
    if (good)
        XT_OK(self, epx_buffer_status(w.buffer));
    xl_close(&w);
}

/* The network must be there; under TSan libfabric is left out: it is not instrumented. */
static bool here(const char *spec)
{
    if (!spec)
        return true;
    return !(strncmp(spec, "ofi", 3) == 0 && getenv("EPX_TEST_THREADS")) && test_net_here(spec);
}

int main(int argc, char **argv)
{
    const char *part = argc > 1 ? argv[1] : "";
    uint32_t percent = argc > 2 ? (uint32_t)atoi(argv[2]) : 100;
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        stress_t s = runs[i];
        if (!strstr(s.name, part) || !here(s.net))
            continue;
        if (argc > 3)
            s.seed = (uint64_t)atoll(argv[3]);
        context_t x = {.stress = &s, .calls = (s.calls * percent + 99) / 100};
        xt_run_t r = {.name = s.name, .ranks = s.ranks, .threads = 1, .body = body, .context = &x, .seed = s.seed};
        r.processes = s.processes && !getenv("EPX_TEST_THREADS");
        r.ranks_per_domain = s.per_domain ? s.per_domain : s.ranks;
        setenv("EPX_NET", s.net ? s.net : "", 1);
        xt_run(&r);
    }
    return xt_done();
}
