/*
 * Failures on GPUs: a rank that stays away, ranks in different operations, a rank killed. Others learn whom it is
 * about, within the deadline (or at once), and the process's CUDA context goes on: a new buffer works.
 */
#include "gpu/memory_cuda.h"

#include "api/names.h"
#include "api/objects.h"
#include "common/slowness.h"

#include <signal.h>
#include <time.h>

enum { BEGIN, END, AGAIN, COMBINE, COMBINE_PUSHED, STAGES };
static const char *const stage_names[] = {"begin", "end", "again", "combine", "combine, x elsewhere"};

#define TOKENS 512u /* so that a warp has many rows to push */
#define TOPK 2u
#define ROWS_MOST (4u * TOKENS)
#define ROW 256u
#define DEADLINE_MS 2000u
#define PATIENT_MS 20000u

typedef struct trip {
    xt_rank_t *self;
    epx_buffer_t *buffer;
    epx_handle_t *handle;
    epx_received_t received;
    uint64_t timeout_ms;
    void *x, *y, *out, *ids; /* y: outputs in no lease */
} trip_t;

static uint64_t now_in_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000u + (uint64_t)t.tv_nsec / 1000000u;
}

static bool trip_open(xt_rank_t *self, trip_t *t)
{
    int64_t ids[TOKENS * TOPK];
    epx_buffer_config_t config = {.size = sizeof config, .lease_bytes = 4u << 20, .reserve_bytes = 1u << 20};
    config.tokens_max = TOKENS;
    config.handles_max = 4;
    config.leases_max = 8;
    config.timeout_ms = PATIENT_MS;
    *t = (trip_t){.self = self};
    if (!XT_OK(self, epx_buffer_create(self->group, &config, &t->buffer)))
        return false;
    for (uint32_t i = 0; i < TOKENS * TOPK; i++)
        ids[i] = (int64_t)((i * 5 + i / 3) % (4u * (uint32_t)self->ranks));
    t->x = self->memory->alloc(TOKENS * ROW);
    t->out = self->memory->alloc(TOKENS * ROW);
    t->y = self->memory->alloc(ROWS_MOST * ROW);
    self->memory->fill(t->y, 0, ROWS_MOST * ROW);
    t->ids = self->memory->alloc(sizeof ids);
    self->memory->fill(t->x, 0, TOKENS * ROW);
    self->memory->put(t->ids, ids, sizeof ids);
    return true;
}

/* From here on every call gives up soon; a handle keeps the deadline of its begin. */
static void trip_hurry(trip_t *t)
{
    epx_handle_t *handle = t->handle; /* behind its name */
    t->timeout_ms = DEADLINE_MS;
    if (handle && epx__handle_find(&handle, "test_fault") != EPX_OK)
        exit(3);
    if (handle)
        handle->h.args.timeout_ms = DEADLINE_MS;
}

static void trip_close(trip_t *t)
{
    epx_buffer_destroy(t->buffer);
    t->self->memory->free(t->x);
    t->self->memory->free(t->y);
    t->self->memory->free(t->out);
    t->self->memory->free(t->ids);
}

/* Make the call and wait for the stream: its own status, or the buffer's. */
static epx_status_t run_stage(trip_t *t, int stage)
{
    epx_stream_t stream = t->self->memory->stream();
    epx_rows_t rows = {.x = t->x, .row_bytes = ROW};
    epx_status_t status = EPX_OK;
    if (stage == BEGIN) {
        epx_dispatch_t d = {
            .size = sizeof d, .rows = rows, .tokens = TOKENS, .topk_idx = t->ids, .topk = TOPK, .sms = 2};
        epx_counts_t counts = {.size = sizeof counts};
        d.experts = 4u * (uint32_t)t->self->ranks;
        d.timeout_ms = t->timeout_ms;
        status = epx_dispatch_begin(t->buffer, &d, stream, &t->handle);
        if (status == EPX_OK)
            status = epx_handle_counts(t->handle, &counts);
    } else if (stage == END) {
        t->received = (epx_received_t){.size = sizeof t->received};
        status = epx_dispatch_end(t->handle, NULL, stream, &t->received);
    } else if (stage == AGAIN) {
        epx_received_t r = {.size = sizeof r};
        status = epx_dispatch_again(t->handle, &rows, NULL, stream, &r);
        if (status == EPX_OK)
            epx_lease_release(t->buffer, r.lease, stream);
    } else {
        epx_combine_t c = {.size = sizeof c, .hidden = ROW / 2, .out = t->out, .sms = 2};
        c.x = stage == COMBINE ? t->received.x : t->y;
        c.timeout_ms = t->timeout_ms;
        status = epx_combine(t->handle, &c, stream);
    }
    cudaError_t error = cudaStreamSynchronize((cudaStream_t)stream);
    XT_CHECK(t->self, error == cudaSuccess, "%s: %s", stage_names[stage], cudaGetErrorString(error));
    return status == EPX_OK ? epx_buffer_status(t->buffer) : status;
}

static bool run_all(trip_t *t, int until)
{
    for (int stage = BEGIN; stage < until; stage++) {
        if (!XT_OK(t->self, run_stage(t, stage)))
            return false;
    }
    return true;
}

/* The context goes on: another buffer of the same group does everything. */
static void check_alive(xt_rank_t *self)
{
    trip_t t;
    GPU_CHECK(cudaStreamSynchronize((cudaStream_t)self->memory->stream()));
    GPU_CHECK(cudaGetLastError());
    if (trip_open(self, &t)) {
        run_all(&t, STAGES);
        trip_close(&t);
    }
}

static void body_away(xt_rank_t *self)
{
    int away = *(const int *)self->context;
    trip_t t;
    if (!trip_open(self, &t) || !run_all(&t, away))
        return;
    trip_hurry(&t);
    uint64_t start = now_in_ms();
    if (self->rank != self->ranks - 1) {
        epx_status_t status = run_stage(&t, away);
        uint64_t took = now_in_ms() - start;
        const char *words = epx_error_detail();
        XT_CHECK(self, status == EPX_E_TIMEOUT || status == EPX_E_PEER, "%s: %s", epx_status_name(status), words);
        XT_CHECK(self, strstr(words, "rank"), "\"%s\" names nobody", words);
        XT_CHECK(self, (double)took < DEADLINE_MS + 1500 * slowness(), "%llu ms", (unsigned long long)took);
        XT_CHECK(self, epx_buffer_status(t.buffer) != EPX_OK, "forgotten");
        xt_mark(self, 1);
    }
    xt_wait_mark(self, 1, self->ranks - 1);
    if (self->rank == self->ranks - 1) {
        epx_status_t status = run_stage(&t, away);
        XT_CHECK(self, status == EPX_E_PEER, "the late rank: %s: %s", epx_status_name(status), epx_error_detail());
    }
    trip_close(&t);
    check_alive(self);
}

/* Rank 0 in combine while the others dispatch. */
static void body_mismatch(xt_rank_t *self)
{
    trip_t t;
    if (!trip_open(self, &t) || !run_all(&t, AGAIN))
        return;
    xt_mark(self, 7); /* who fails ends halves that others are still in */
    if (!xt_wait_mark(self, 7, self->ranks))
        return;
    epx_status_t status = run_stage(&t, self->rank == 0 ? COMBINE : BEGIN);
    const char *words = epx_error_detail();
    XT_CHECK(self, status == EPX_E_MISMATCH || status == EPX_E_PEER, "%s: %s", epx_status_name(status), words);
    XT_CHECK(self, strstr(words, "combine"), "\"%s\"", words);
    trip_close(&t);
    check_alive(self);
}

static void body_killed(xt_rank_t *self)
{
    trip_t t;
    if (!trip_open(self, &t) || !run_all(&t, STAGES))
        return;
    xt_mark(self, 7); /* who is through may be needed by others that are not: no death before that */
    if (!xt_wait_mark(self, 7, self->ranks))
        return;
    if (self->rank == 1) {
        usleep(20000);
        kill(getpid(), SIGKILL);
    }
    uint64_t start = now_in_ms();
    epx_status_t status = run_stage(&t, BEGIN);
    XT_CHECK(self, status == EPX_E_PEER, "%s: %s", epx_status_name(status), epx_error_detail());
    uint64_t took = now_in_ms() - start;
    XT_CHECK(self, (double)took < well_before(PATIENT_MS, 2000), "%llu ms", (unsigned long long)took);
    GPU_CHECK(cudaStreamSynchronize((cudaStream_t)self->memory->stream()));
    trip_close(&t);
}

static void body_check(xt_rank_t *self)
{
    trip_t t;
    uint8_t works[XT_RANKS_MAX] = {0};
    if (!trip_open(self, &t))
        return;
    for (int i = 0; i < 2; i++) {
        XT_OK(self, epx_buffer_check(t.buffer, works));
        for (int r = 0; r < self->ranks; r++)
            XT_CHECK(self, works[r] == 1, "rank %d", r);
        run_all(&t, STAGES);
        for (int b = 0; b < 5; b++)
            XT_OK(self, epx_buffer_barrier(t.buffer, self->memory->stream()));
    }
    GPU_CHECK(cudaStreamSynchronize((cudaStream_t)self->memory->stream()));
    XT_OK(self, epx_buffer_status(t.buffer));
    trip_close(&t);
}

static void run(const char *name, int ranks, bool processes, void (*body)(xt_rank_t *), void *context, uint64_t may_die)
{
    xt_run_t r = {.name = name, .ranks = ranks, .processes = processes, .body = body, .context = context};
    r.may_die = may_die;
    r.limit_ms = 40000;
    xt_run(&r);
}

int main(void)
{
    run("check and barriers", 3, false, body_check, NULL, 0);
    run("check and barriers", 2, true, body_check, NULL, 0);
    for (int stage = BEGIN; stage < STAGES; stage++)
        run(stage_names[stage], 3, false, body_away, &stage, 0);
    run("mismatch", 3, false, body_mismatch, NULL, 0);
    run("killed", 3, true, body_killed, NULL, 2);
    return xt_done();
}
