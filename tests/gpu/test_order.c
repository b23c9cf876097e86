/*
 * Calls of one buffer, of both modes, on streams of the caller's choice: combine on one stream and low latency on
 * another run one after the other, so that no rank's kernels keep out what another rank waits for; and what is under
 * way when its buffer is destroyed ends as it should.
 *
 *     gpu_test_order [rounds]
 *
 * Every token goes to every rank, expert e is rank e's only one; outputs of rank r are 1 + r.
 */
#include "gpu/memory_cuda.h"

#include <epx/ll.h>

#include <unistd.h>

enum { TOKENS = 512, HIDDEN = 2048, LL_TOKENS = 16, SLOTS = 2, RANKS_MOST = 4 };

typedef struct side {
    xt_rank_t *self;
    epx_buffer_t *buffer;
    epx_handle_t *handle;
    cudaStream_t stream, other;
    void *ids, *x, *y, *out;              /* high throughput */
    void *ll_x, *ll_recv, *ll_y, *ll_out; /* low latency */
    int32_t *ll_count, *ll_source;
} side_t;

static uint16_t bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)(bits >> 16); /* small whole numbers: exact */
}

static void *filled(const side_t *s, size_t elements, float value)
{
    uint16_t *host = malloc(elements * 2);
    void *device = s->self->memory->alloc(elements * 2);
    if (!host || !device)
        exit(4);
    for (size_t i = 0; i < elements; i++)
        host[i] = bf16(value);
    s->self->memory->put(device, host, elements * 2);
    free(host);
    return device;
}

/* Element 0 and the last of each of `tokens` rows are the sum over all ranks. */
static void check_out(const side_t *s, const void *out, uint32_t tokens, const char *when)
{
    uint16_t *host = malloc((size_t)tokens * HIDDEN * 2);
    float sum = (float)(s->self->ranks * (s->self->ranks + 1) / 2);
    uint32_t wrong = 0;
    if (!host)
        exit(4);
    s->self->memory->get(host, out, (size_t)tokens * HIDDEN * 2);
    for (uint32_t t = 0; t < tokens; t++)
        wrong += host[(size_t)t * HIDDEN] != bf16(sum) || host[(size_t)t * HIDDEN + HIDDEN - 1] != bf16(sum);
    XT_CHECK(s->self, wrong == 0, "%s: %u of %u tokens", when, wrong, tokens);
    free(host);
}

static bool side_open(side_t *s, xt_rank_t *self)
{
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 64u << 20, .reserve_bytes = 8u << 20, .handles_max = 2};
    epx_dispatch_t d = {.size = sizeof d, .tokens = TOKENS};
    epx_received_t received = {.size = sizeof received};
    int64_t *ids = malloc(sizeof *ids * TOKENS * RANKS_MOST);
    c.tokens_max = TOKENS;
    c.topk_max = c.experts_max = (uint32_t)self->ranks;
    c.ll_tokens_max = LL_TOKENS;
    c.ll_hidden_max = HIDDEN;
    c.ll_slots = SLOTS;
    c.timeout_ms = 10000;
    s->self = self;
    s->stream = self->memory->stream();
    GPU_CHECK(cudaStreamCreateWithFlags(&s->other, cudaStreamNonBlocking));
    if (!ids || !XT_OK(self, epx_buffer_create(self->group, &c, &s->buffer)))
        exit(4);
    for (int i = 0; i < TOKENS * self->ranks; i++)
        ids[i] = i % self->ranks;
    s->ids = self->memory->alloc(sizeof *ids * (size_t)(TOKENS * self->ranks));
    self->memory->put(s->ids, ids, sizeof *ids * (size_t)(TOKENS * self->ranks));
    free(ids);
    uint32_t rows = TOKENS * (uint32_t)self->ranks, ll_rows = LL_TOKENS * (uint32_t)self->ranks;
    s->x = filled(s, (size_t)TOKENS * HIDDEN, 3);
    s->y = filled(s, (size_t)rows * HIDDEN, (float)(1 + self->rank));
    s->out = filled(s, (size_t)TOKENS * HIDDEN, 99);
    s->ll_x = filled(s, (size_t)LL_TOKENS * HIDDEN, 5);
    s->ll_recv = filled(s, (size_t)ll_rows * HIDDEN, 99);
    s->ll_y = filled(s, (size_t)ll_rows * HIDDEN, (float)(1 + self->rank));
    s->ll_out = filled(s, (size_t)LL_TOKENS * HIDDEN, 99);
    s->ll_count = self->memory->alloc(sizeof *s->ll_count);
    s->ll_source = self->memory->alloc(sizeof *s->ll_source * ll_rows);
    d.rows = (epx_rows_t){.x = s->x, .row_bytes = HIDDEN * 2};
    d.topk_idx = s->ids;
    d.topk = d.experts = (uint32_t)self->ranks;
    bool good = XT_OK(self, epx_dispatch(s->buffer, &d, NULL, s->stream, &s->handle, &received));
    if (good)
        XT_OK(self, epx_lease_release(s->buffer, received.lease, s->stream));
    XT_CHECK(self, !good || received.rows == rows, "%u rows, not %u", received.rows, rows);
    return good;
}

static void side_close(side_t *s)
{
    void *all[] = {s->ids, s->x, s->y, s->out, s->ll_x, s->ll_recv, s->ll_y, s->ll_out, s->ll_count, s->ll_source};
    epx_buffer_destroy(s->buffer);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        s->self->memory->free(all[i]);
    GPU_CHECK(cudaStreamDestroy(s->other));
}

static bool combine(side_t *s, cudaStream_t stream)
{
    epx_combine_t c = {.size = sizeof c, .x = s->y, .hidden = HIDDEN, .out = s->out};
    return XT_OK(s->self, epx_combine(s->handle, &c, stream));
}

static bool low_latency(side_t *s, cudaStream_t stream)
{
    epx_ll_dispatch_t d = {.size = sizeof d, .x = s->ll_x, .tokens = LL_TOKENS, .hidden = HIDDEN, .topk_idx = s->ids};
    epx_ll_combine_t c = {.size = sizeof c, .x = s->ll_y, .topk_idx = s->ids, .out = s->ll_out};
    epx_ll_handle_t *handle = NULL;
    d.topk = d.experts = (uint32_t)s->self->ranks;
    d.recv_x = s->ll_recv;
    d.recv_count = s->ll_count;
    d.src_info = s->ll_source;
    return XT_OK(s->self, epx_ll_dispatch(s->buffer, &d, stream, &handle)) &&
           XT_OK(s->self, epx_ll_combine(handle, &c, stream));
}

/* ---- two streams, and nobody waits in between ---- */

static void body_streams(xt_rank_t *self)
{
    const uint32_t *rounds = self->context;
    side_t s = {0};
    bool good = side_open(&s, self);
    self->delay_ns_max = 300000;
    self->delay_one_in = 3;
    for (uint32_t i = 0; good && i < *rounds; i++) {
        cudaStream_t one = i % 2 ? s.stream : s.other, two = i % 2 ? s.other : s.stream;
        good = combine(&s, one);
        xt_delay(self);
        good = good && low_latency(&s, two);
        xt_delay(self);
    }
    GPU_CHECK(cudaStreamSynchronize(s.stream));
    GPU_CHECK(cudaStreamSynchronize(s.other));
    if (good && XT_OK(self, epx_buffer_status(s.buffer))) {
        check_out(&s, s.out, TOKENS, "combine");
        check_out(&s, s.ll_out, LL_TOKENS, "low latency");
    }
    side_close(&s);
}

/* ---- destroyed under way ---- */

/* Rank 0 enqueues a combine and destroys its buffer; the others come to that combine when it waits for them. */
static void body_destroyed(xt_rank_t *self)
{
    side_t s = {0};
    bool good = side_open(&s, self);
    if (self->rank == 0) {
        xt_mark(self, 0);
        good = good && combine(&s, s.stream);
        epx_buffer_destroy(s.buffer);
        s.buffer = NULL;
    } else {
        xt_wait_mark(self, 0, 1);
        usleep(50000);
        good = good && combine(&s, s.stream);
    }
    GPU_CHECK(cudaStreamSynchronize(s.stream));
    if (good && (self->rank == 0 || XT_OK(self, epx_buffer_status(s.buffer))))
        check_out(&s, s.out, TOKENS, "the combine that was under way");
    side_close(&s);
}

static void run(const char *name, int ranks, void (*body)(xt_rank_t *), void *context)
{
    for (int processes = 0; processes < 2; processes++) {
        xt_run_t r = {.name = name, .ranks = ranks, .processes = processes, .body = body, .context = context};
        xt_run(&r);
    }
}

int main(int argc, char **argv)
{
    uint32_t rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 40;
    for (int ranks = 2; ranks <= RANKS_MOST; ranks += 2) {
        run("two streams", ranks, body_streams, &rounds);
        run("destroyed under way", ranks, body_destroyed, &rounds);
    }
    return xt_done();
}
