/*
 * CUDA graphs: worst-case dispatch and combine, cached dispatch, and a dispatch alone, captured once and replayed a
 * thousand times with other routing in the captured buffers. Every row tells its source, token and replay.
 */
#include "gpu/memory_cuda.h"

#define TOKENS 48u
#define TOPK 4u
#define EXPERTS 24u
#define HIDDEN 64u
#define ROW (HIDDEN * 4u) /* fp32 */

typedef struct plan {
    int replays;
} plan_t;

static int64_t id_of(int ranks, int rank, uint32_t replay, uint32_t token, uint32_t k)
{
    uint64_t h = xt_mix((uint64_t)ranks << 32 | (uint32_t)rank, replay, token, k);
    return h % 9 == 0 ? -1 : (int64_t)(h / 9 % EXPERTS);
}
static bool goes(int ranks, int rank, uint32_t replay, uint32_t token, int to)
{
    bool yes = false;
    for (uint32_t k = 0; k < TOPK; k++) {
        int64_t id = id_of(ranks, rank, replay, token, k);
        yes = yes || (id >= 0 && (int)(id / (EXPERTS / (uint32_t)ranks)) == to);
    }
    return yes;
}
static float value_of(int rank, uint32_t replay, uint32_t token, uint32_t column)
{
    return (float)((uint32_t)rank * 65536u + token * 1024u + (replay * 7u + column) % 1024u);
}

/* One rank's device buffers, and what it captured. */
typedef struct side {
    xt_rank_t *self;
    epx_buffer_t *buffer;
    cudaStream_t stream;
    int64_t *ids;
    float *x, *out, *own;
    int32_t *own_src;
    epx_handle_t *handle, *alone;
    epx_received_t received, again;
    cudaGraphExec_t pair, single;
} side_t;

static bool capture(side_t *s, cudaGraphExec_t *exec, bool (*record)(side_t *))
{
    cudaGraph_t graph;
    GPU_CHECK(cudaStreamBeginCapture(s->stream, cudaStreamCaptureModeThreadLocal));
    bool good = record(s);
    GPU_CHECK(cudaStreamEndCapture(s->stream, &graph));
    GPU_CHECK(cudaGraphInstantiate(exec, graph, 0));
    GPU_CHECK(cudaGraphDestroy(graph));
    GPU_CHECK(cudaGraphUpload(*exec, s->stream));
    GPU_CHECK(cudaStreamSynchronize(s->stream));
    return good;
}

static epx_dispatch_t dispatch_of(const side_t *s)
{
    epx_dispatch_t d = {.size = sizeof d, .rows = {.x = s->x, .row_bytes = ROW}, .tokens = TOKENS, .topk_idx = s->ids};
    d.topk = TOPK;
    d.experts = EXPERTS;
    d.recv_tokens_max = TOKENS * (uint32_t)s->self->ranks;
    d.sms = 4;
    return d;
}

/* Dispatch into a lease, the same rows once more by the cached way, combine of what came. */
static bool record_pair(side_t *s)
{
    epx_dispatch_t d = dispatch_of(s);
    s->received.size = s->again.size = sizeof s->received;
    bool good = XT_OK(s->self, epx_dispatch(s->buffer, &d, NULL, s->stream, &s->handle, &s->received));
    good = good && XT_OK(s->self, epx_dispatch_again(s->handle, &d.rows, NULL, s->stream, &s->again));
    epx_combine_t c = {.size = sizeof c, .x = s->again.x, .dtype = EPX_FP32, .hidden = HIDDEN, .out = s->out, .sms = 4};
    return good && XT_OK(s->self, epx_combine(s->handle, &c, s->stream));
}

/* A graph that holds one dispatch only, into the caller's memory. */
static bool record_single(side_t *s)
{
    epx_dispatch_t d = dispatch_of(s);
    epx_place_t place = {.x = s->own, .src_token = s->own_src};
    epx_received_t r = {.size = sizeof r};
    return XT_OK(s->self, epx_dispatch(s->buffer, &d, &place, s->stream, &s->alone, &r));
}

static void put_inputs(side_t *s, uint32_t replay)
{
    static __thread int64_t ids[TOKENS * TOPK];
    static __thread float x[TOKENS * HIDDEN];
    for (uint32_t i = 0; i < TOKENS * TOPK; i++)
        ids[i] = id_of(s->self->ranks, s->self->rank, replay, i / TOPK, i % TOPK);
    for (uint32_t i = 0; i < TOKENS * HIDDEN; i++)
        x[i] = value_of(s->self->rank, replay, i / HIDDEN, i % HIDDEN);
    s->self->memory->put(s->ids, ids, sizeof ids);
    s->self->memory->put(s->x, x, sizeof x);
}

static void check_rows(side_t *s, uint32_t replay, const void *x, const int32_t *src, const char *what)
{
    xt_rank_t *self = s->self;
    uint32_t room = TOKENS * (uint32_t)self->ranks, row = 0;
    float *rows = malloc((size_t)room * ROW);
    int32_t *from = malloc((size_t)room * 4);
    self->memory->get(rows, x, (size_t)room * ROW);
    self->memory->get(from, src, (size_t)room * 4);
    uint32_t wrong = 0;
    for (int r = 0; r < self->ranks; r++) {
        for (uint32_t t = 0; t < TOKENS; t++) {
            if (!goes(self->ranks, r, replay, t, self->rank))
                continue;
            wrong += from[row] != (int32_t)t;
            for (uint32_t i = 0; i < HIDDEN; i++)
                wrong += rows[row * HIDDEN + i] != value_of(r, replay, t, i);
            row++;
        }
    }
    for (; row < room; row++)
        wrong += from[row] != -1;
    XT_CHECK(self, wrong == 0, "replay %u, %s: %u values wrong", replay, what, wrong);
    free(rows);
    free(from);
}

static void check_out(side_t *s, uint32_t replay)
{
    xt_rank_t *self = s->self;
    static __thread float out[TOKENS * HIDDEN];
    uint32_t wrong = 0;
    self->memory->get(out, s->out, sizeof out);
    for (uint32_t i = 0; i < TOKENS * HIDDEN; i++) {
        float want = 0.0f;
        for (int r = 0; r < self->ranks; r++) {
            if (goes(self->ranks, self->rank, replay, i / HIDDEN, r))
                want += value_of(self->rank, replay, i / HIDDEN, i % HIDDEN);
        }
        wrong += out[i] != want;
    }
    XT_CHECK(self, wrong == 0, "replay %u, combine: %u values wrong", replay, wrong);
}

static void body(xt_rank_t *self)
{
    const plan_t *plan = self->context;
    side_t s = {.self = self, .stream = (cudaStream_t)self->memory->stream()};
    uint32_t room = TOKENS * (uint32_t)self->ranks;
    epx_buffer_config_t config = {.size = sizeof config, .lease_bytes = 8u << 20, .reserve_bytes = 1u << 20};
    config.tokens_max = TOKENS;
    config.topk_max = TOPK;
    config.experts_max = EXPERTS;
    config.handles_max = 4;
    config.leases_max = 8;
    if (!XT_OK(self, epx_buffer_create(self->group, &config, &s.buffer)))
        return;
    s.ids = self->memory->alloc(TOKENS * TOPK * 8);
    s.x = self->memory->alloc(TOKENS * ROW);
    s.out = self->memory->alloc(TOKENS * ROW);
    s.own = self->memory->alloc((size_t)room * ROW);
    s.own_src = self->memory->alloc((size_t)room * 4);
    bool good = capture(&s, &s.pair, record_pair) && capture(&s, &s.single, record_single);
    xt_mark(self, 0); /* instantiating may wait for the whole device: nobody starts before all have */
    good = good && xt_wait_mark(self, 0, self->ranks);
    for (uint32_t i = 0; good && i < (uint32_t)plan->replays; i++) {
        put_inputs(&s, i);
        GPU_CHECK(cudaGraphLaunch(s.pair, s.stream));
        if (i % 3 == 0)
            GPU_CHECK(cudaGraphLaunch(s.single, s.stream));
        GPU_CHECK(cudaStreamSynchronize(s.stream));
        good = XT_OK(self, epx_buffer_status(s.buffer));
        check_rows(&s, i, s.received.x, s.received.src_token, "dispatch");
        check_rows(&s, i, s.again.x, s.again.src_token, "cached dispatch");
        if (i % 3 == 0)
            check_rows(&s, i, s.own, s.own_src, "dispatch alone");
        check_out(&s, i);
    }
    epx_buffer_destroy(s.buffer);
}

int main(int argc, char **argv)
{
    plan_t plan = {.replays = argc > 1 ? atoi(argv[1]) : 1000};
    for (int ranks = 1; ranks <= 4; ranks++) {
        xt_run_t r = {.name = "graphs", .ranks = ranks, .body = body, .context = &plan, .seed = 5};
        xt_run(&r);
    }
    plan.replays = plan.replays / 20 + 1;
    xt_run_t r = {.name = "graphs", .ranks = 2, .processes = true, .body = body, .context = &plan, .seed = 5};
    xt_run(&r);
    return xt_done();
}
