/*
 * Low latency between domains of GPUs against the reference, byte for byte, and the bytes on the wire against the
 * CPU's: the worlds of differential/test_ll_net.c, and a long run of one without any barrier. Ranks share this
 * machine's GPUs (one is enough), as threads over loop and sim, as processes over ofi:tcp.
 *
 *     gpu_test_ll_net [network, or "all"] [iterations] [part of a world's name] [rounds of the long run]
 */
#include "gpu/memory_cuda.h"

__attribute__((unused)) static int cpu_main(int argc, char **argv);
#define main cpu_main
#include "differential/test_ll_net.c"
#undef main

/* Calls that are released after dispatch, with one slot: only the receiver's word keeps a sender from a record that has
 * not been taken out yet. */
static void released(xt_rank_t *self)
{
    const context_t *x = self->context;
    static __thread xl_world_t w;
    epx_buffer_config_t config = {.ll_slots = 1};
    memset(&w, 0, sizeof w);
    w.seed = x->seed;
    w.tokens_max = x->world->tokens_max;
    w.hidden_max = x->world->hidden_max;
    w.topk_max = x->world->topk_max;
    w.experts = x->world->experts;
    self->delay_ns_max = 3000000;
    self->delay_one_in = 2;
    bool good = xl_open(&w, self, &config);
    for (uint32_t op = 0; good && op < x->iterations; op++) {
        xl_call_t c;
        xl_make(&c, &w, op);
        good = xl_dispatch_send(&c) && xl_dispatch_recv(&c);
        if (good)
            epx_ll_handle_release(c.handle, self->memory->stream());
        xl_count_wire(&c, false);
        xl_fini(&c);
        good = good && xl_check_wire(&w, op);
    }
    if (good)
        XT_OK(self, epx_buffer_status(w.buffer));
    xt_mark(self, 0);
    xt_wait_mark(self, 0, self->ranks);
    xl_close(&w);
}

static void run(const char *spec, uint32_t iterations, uint32_t rounds, const char *part)
{
    static const world_t splits[] = {
        {"long: two of one", 2, 1, 4, 128, 4, 8, 2, false, false, true, -1},
        {"long: two of two", 2, 2, 3, 128, 3, 8, 3, false, false, true, -1},
    };
    bool processes = strncmp(spec, "ofi", 3) == 0;
    suite(spec, iterations, processes, part);
    for (size_t i = 0; i < sizeof splits / sizeof *splits && rounds; i++) {
        context_t x = {.world = &splits[i], .iterations = i ? rounds / 4 : rounds, .seed = 90 + i};
        xt_run_t r = {
            .name = splits[i].name, .ranks = splits[i].domains * splits[i].per_domain, .processes = processes};
        r.threads = 1;
        r.ranks_per_domain = splits[i].per_domain;
        r.seed = x.seed;
        r.body = body;
        r.context = &x;
        r.limit_ms = 300000;
        if (strstr(splits[i].name, part))
            xt_run(&r);
        r.name = i ? "released: two of two" : "released: two of one";
        r.body = released;
        x.iterations = rounds / 4;
        if (strstr(r.name, part))
            xt_run(&r);
    }
}

int main(int argc, char **argv)
{
    const char *spec = argc > 1 ? argv[1] : "all", *part = argc > 3 ? argv[3] : "";
    uint32_t iterations = argc > 2 ? (uint32_t)atoi(argv[2]) : 12, rounds = argc > 4 ? (uint32_t)atoi(argv[4]) : 0;
    if (strcmp(spec, "all")) {
        run(spec, iterations, rounds, part);
        return xt_done();
    }
    run("loop", iterations, rounds, part);
    run("sim:1", iterations, rounds, part);
    run("sim:2", iterations, 0, part);
    if (test_net_here("ofi:tcp"))
        run("ofi:tcp", iterations, rounds, part);
    return xt_done();
}
