/*
 * Low latency in graphs: a whole call and halves of two calls captured once and replayed with other ids and values
 * each time, compared with the reference; and how long calls take in a replayed graph.
 *
 *     gpu_test_ll_graph [replays] [GPUs, to take times]
 *
 * Both ways that rows arrive; with EPX_LL_INBAND, one. In one domain, or, with EPX_NET, in domains of
 * EPX_TEST_PER_DOMAIN.
 */
#include "gpu/memory_cuda.h"

#include "common/ll_case.h"
#include "gpu/ll_both.h"

typedef struct plan {
    int replays;
    bool halves, processes;
} plan_t;

static bool finish(xt_rank_t *self, xl_world_t *w, cudaStream_t stream)
{
    cudaError_t error = cudaStreamSynchronize(stream);
    XT_CHECK(self, error == cudaSuccess, "%s", cudaGetErrorString(error));
    bool good = XT_OK(self, epx_buffer_status(w->buffer)) && error == cudaSuccess;
    if (!good)
        xl_say_channels(w);
    return good;
}

static bool record(xt_rank_t *self, xl_world_t *w, xl_call_t *a, xl_call_t *b, bool halves)
{
    epx_stream_t s = self->memory->stream();
    epx_ll_dispatch_t da = xl_dispatch_of(a), db = xl_dispatch_of(b);
    if (!halves) {
        bool good = XT_OK(self, epx_ll_dispatch(w->buffer, &da, s, &a->handle));
        epx_ll_combine_t ca = xl_combine_of(a);
        return good && XT_OK(self, epx_ll_combine(a->handle, &ca, s));
    }
    bool good = XT_OK(self, epx_ll_dispatch_send(w->buffer, &da, s, &a->handle)) &&
                XT_OK(self, epx_ll_dispatch_send(w->buffer, &db, s, &b->handle)) &&
                XT_OK(self, epx_ll_dispatch_recv(b->handle, s)) && XT_OK(self, epx_ll_dispatch_recv(a->handle, s));
    epx_ll_combine_t ca = xl_combine_of(a), cb = xl_combine_of(b);
    return good && XT_OK(self, epx_ll_combine_send(a->handle, &ca, s)) &&
           XT_OK(self, epx_ll_combine_send(b->handle, &cb, s)) && XT_OK(self, epx_ll_combine_recv(b->handle, s)) &&
           XT_OK(self, epx_ll_combine_recv(a->handle, s));
}

static bool capture(xt_rank_t *self, cudaStream_t stream, cudaGraphExec_t *exec, xl_world_t *w, xl_call_t *a,
                    xl_call_t *b, bool halves)
{
    cudaGraph_t graph;
    GPU_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    bool good = record(self, w, a, b, halves);
    GPU_CHECK(cudaStreamEndCapture(stream, &graph));
    GPU_CHECK(cudaGraphInstantiate(exec, graph, 0));
    GPU_CHECK(cudaGraphDestroy(graph));
    GPU_CHECK(cudaGraphUpload(*exec, stream));
    GPU_CHECK(cudaStreamSynchronize(stream));
    return good;
}

static void body(xt_rank_t *self)
{
    const plan_t *p = self->context;
    static __thread xl_world_t w;
    static __thread xl_call_t a[4], b[4];
    cudaGraphExec_t exec[4];
    cudaStream_t stream = (cudaStream_t)self->memory->stream();
    epx_buffer_config_t config = {.ll_slots = 2};
    memset(&w, 0, sizeof w);
    w.seed = 77;
    w.tokens_max = 9;
    w.hidden_max = 1536;
    w.topk_max = 6;
    w.experts = 30;
    bool good = xl_open(&w, self, &config);
    for (uint32_t g = 0; good && g < 4; g++) {
        xl_make(&a[g], &w, 2 * g);
        xl_make(&b[g], &w, 2 * g + 1);
        good = capture(self, stream, &exec[g], &w, &a[g], &b[g], p->halves);
    }
    xt_mark(self, 0); /* instantiating may wait for the whole device: nobody starts before all have */
    good = good && xt_wait_mark(self, 0, self->ranks);
    for (uint32_t i = 0; good && i < (uint32_t)p->replays; i++) {
        uint32_t g = i % 4;
        xl_remake(&a[g], i + 1);
        if (p->halves)
            xl_remake(&b[g], i + 1);
        GPU_CHECK(cudaGraphLaunch(exec[g], stream));
        good = finish(self, &w, stream);
        if (!good)
            break;
        xl_check_dispatch(&a[g]);
        xl_check_combine(&a[g]);
        if (p->halves) {
            xl_check_dispatch(&b[g]);
            xl_check_combine(&b[g]);
        }
    }
    epx_buffer_destroy(w.buffer);
}

/* ---- time ---- */

enum { M = 128, H = 7168, K = 8, E = 256, CALLS = 24, LAUNCHES = 9, SHAPES = 6 };
static const char *const shape_names[SHAPES] = {"fp8 dispatch",      "bf16 dispatch",         "fp8 dispatch, weights",
                                                "fp8 pair, combine", "fp8 pair, pre-reduced", "bf16 pair, combine"};

static int compare_floats(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void time_body(xt_rank_t *self)
{
    const xt_memory_t *m = self->memory;
    cudaStream_t stream = (cudaStream_t)m->stream();
    epx_buffer_t *buffer;
    epx_buffer_config_t config = {.size = sizeof config, .lease_bytes = 1u << 20, .reserve_bytes = 1u << 20};
    config.tokens_max = M;
    config.topk_max = K;
    config.experts_max = E;
    config.ll_tokens_max = M;
    config.ll_hidden_max = H;
    if (!XT_OK(self, epx_buffer_create(self->group, &config, &buffer)))
        return;
    size_t rows = (size_t)E * M;
    static __thread int64_t ids[M * K];
    static __thread float weights[M * K];
    for (uint32_t t = 0; t < M; t++)
        for (uint32_t k = 0; k < K; k++) {
            bool again = true;
            while (again) {
                ids[t * K + k] = xt_random(self, E);
                again = false;
                for (uint32_t j = 0; j < k; j++)
                    again = again || ids[t * K + j] == ids[t * K + k];
            }
            weights[t * K + k] = 0.125f;
        }
    void *x = m->alloc((size_t)M * H * 2), *out = m->alloc((size_t)M * H * 2), *y, *recv, *scales,
         *id = m->alloc(sizeof ids);
    void *w = m->alloc(sizeof weights), *count = m->alloc(E * 4), *src = m->alloc(rows * 4);
    GPU_CHECK(cudaMalloc(&y, rows * H * 2));
    GPU_CHECK(cudaMalloc(&recv, rows * H * 2));
    GPU_CHECK(cudaMalloc(&scales, rows * (H / 128) * 4));
    m->fill(x, 0x3c, (size_t)M * H * 2);
    m->fill(y, 0x3c, rows * H * 2);
    m->put(id, ids, sizeof ids);
    m->put(w, weights, sizeof weights);
    cudaGraphExec_t exec[SHAPES];
    cudaEvent_t from, to;
    GPU_CHECK(cudaEventCreate(&from));
    GPU_CHECK(cudaEventCreate(&to));
    bool good = true;
    for (int g = 0; g < SHAPES; g++) {
        cudaGraph_t graph;
        epx_ll_dispatch_t d = {
            .size = sizeof d, .x = x, .tokens = M, .hidden = H, .topk_idx = id, .topk = K, .experts = E};
        d.format = g == 1 || g == 5 ? EPX_LL_BF16 : EPX_LL_FP8;
        d.topk_weights = g == 2 || g == 4 ? w : NULL;
        d.recv_x = recv;
        d.recv_scales = scales;
        d.recv_count = count;
        d.src_info = src;
        epx_ll_combine_t c = {.size = sizeof c, .x = y, .topk_idx = id, .topk_weights = w, .out = out};
        c.pre_reduced = g == 4;
        GPU_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        for (int i = 0; good && i < CALLS; i++) {
            epx_ll_handle_t *handle;
            good = XT_OK(self, epx_ll_dispatch(buffer, &d, stream, &handle));
            if (good && g >= 3)
                good = XT_OK(self, epx_ll_combine(handle, &c, stream));
            else if (good)
                epx_ll_handle_release(handle, stream);
        }
        GPU_CHECK(cudaStreamEndCapture(stream, &graph));
        GPU_CHECK(cudaGraphInstantiate(&exec[g], graph, 0));
        GPU_CHECK(cudaGraphUpload(exec[g], stream));
        GPU_CHECK(cudaStreamSynchronize(stream));
    }
    xt_mark(self, 1);
    good = xt_wait_mark(self, 1, self->ranks) && good;
    for (int g = 0; good && g < SHAPES; g++) {
        float took[LAUNCHES];
        for (int i = 0; good && i < LAUNCHES; i++) {
            GPU_CHECK(cudaGraphLaunch(exec[g], stream)); /* the ranks meet in its first call */
            GPU_CHECK(cudaEventRecord(from, stream));
            GPU_CHECK(cudaGraphLaunch(exec[g], stream));
            GPU_CHECK(cudaEventRecord(to, stream));
            GPU_CHECK(cudaStreamSynchronize(stream));
            good = XT_OK(self, epx_buffer_status(buffer));
            GPU_CHECK(cudaEventElapsedTime(&took[i], from, to));
        }
        qsort(took, LAUNCHES, sizeof *took, compare_floats);
        printf("rank %d of %d: %-24s %6.2f us (least %.2f)\n", self->rank, self->ranks, shape_names[g],
               (double)took[LAUNCHES / 2] * 1000.0 / CALLS, (double)took[0] * 1000.0 / CALLS);
        fflush(stdout);
    }
    epx_buffer_destroy(buffer);
    xt_mark(self, 2); /* freeing waits for the whole device */
    if (xt_wait_mark(self, 2, self->ranks)) {
        GPU_CHECK(cudaFree(y));
        GPU_CHECK(cudaFree(recv));
        GPU_CHECK(cudaFree(scales));
    }
}

static int one_way(int argc, char **argv)
{
    static const int sizes[] = {1, 2, 3, 5};
    const char *each = getenv("EPX_TEST_PER_DOMAIN");
    plan_t plan = {.replays = argc > 1 ? atoi(argv[1]) : 200};
    for (int i = 0; plan.replays && i < 8; i++) {
        plan.halves = i & 1;
        xt_run_t r = {.name = plan.halves ? "graphs of halves" : "graphs", .ranks = sizes[i / 2], .body = body};
        r.context = &plan;
        r.seed = 5;
        if (each && r.ranks == 5) /* divides */
            r.ranks = 6;
        r.ranks_per_domain = each && r.ranks % atoi(each) == 0 ? atoi(each) : each ? 1 : r.ranks;
        if (each)
            r.processes = strncmp(getenv("EPX_NET"), "ofi", 3) == 0;
        xt_run(&r);
    }
    if (argc > 2) { /* the number of GPUs */
        xt_run_t r = {.name = "time", .ranks = atoi(argv[2]), .body = time_body, .seed = 9};
        xt_run(&r);
    }
    return xt_done();
}

int main(int argc, char **argv)
{
    return ll_both(argc, argv);
}
