/*
 * What goes wrong between ranks: one stays away, stalls, is killed, calls something else, fails, or destroys its
 * buffer, at every stage. The others must get an error that names it, in time, and be able to go on with a
 * new group.
 *
 *     fault_test_ht_fault [part of a test's name]
 */
#include "common/slowness.h"
#include "common/world.h"

#include "api/names.h"
#include "api/objects.h"
#include "base/clock.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Calls are patient but for those that must give up; what comes without a deadline comes AT_ONCE. */
enum { TOKENS = 6, TOPK = 2, ROW = 64, PATIENT_MS = 8000, DEADLINE_MS = 400, AT_ONCE_MS = 1000 };

/* The stages of an operation, in order: every kind of half, into a lease, through rings, in place and staged. */
typedef enum stage { BEGIN, END, AGAIN_OWN, COMBINE_STAGED, AGAIN, COMBINE_LEASE, BARRIER, STAGES } stage_t;
static const char *const stage_name[] = {"begin",          "end",    "again, own memory", "combine, staged", "again",
                                         "combine, lease", "barrier"};

typedef struct trip {
    epx_buffer_t *buffer;
    epx_handle_t *handle;
    epx_received_t received;
    size_t row_bytes;
    uint32_t topk, tokens, recv_max;
    uint64_t timeout_ms;
    uint8_t *x, *own, *out;
    int64_t ids[64][4];
} trip_t;

static bool trip_make(xt_rank_t *self, trip_t *t, size_t row_bytes, uint32_t tokens, uint64_t timeout_ms)
{
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 1u << 20, .reserve_bytes = 256u << 10};
    c.reserve_bytes += 4 * row_bytes * (size_t)self->ranks;
    c.lease_bytes += 4 * tokens * row_bytes * (size_t)self->ranks;
    c.tokens_max = tokens;
    c.topk_max = 4;
    c.experts_max = 256;
    c.handles_max = 4;
    c.timeout_ms = timeout_ms;
    memset(t, 0, sizeof *t);
    t->row_bytes = row_bytes;
    t->topk = TOPK;
    t->tokens = tokens;
    size_t rows = (size_t)tokens * (size_t)self->ranks;
    if (posix_memalign((void **)&t->x, 64, tokens * row_bytes + 64) ||
        posix_memalign((void **)&t->own, 64, rows * row_bytes + 64) ||
        posix_memalign((void **)&t->out, 64, tokens * row_bytes + 64))
        exit(3);
    memset(t->x, 1, tokens * row_bytes);
    memset(t->own, 0, rows * row_bytes + 64);
    for (uint32_t i = 0; i < tokens; i++) { /* every rank sends to every rank */
        for (uint32_t k = 0; k < 4; k++)
            t->ids[i][k] = (int64_t)((i + k) % (2 * (uint32_t)self->ranks));
    }
    return XT_OK(self, epx_buffer_create(self->group, &c, &t->buffer));
}

static bool trip_open(xt_rank_t *self, trip_t *t)
{
    return trip_make(self, t, ROW, TOKENS, PATIENT_MS);
}

static void trip_close(trip_t *t)
{
    epx_buffer_destroy(t->buffer);
    free(t->x);
    free(t->own);
    free(t->out);
    memset(t, 0, sizeof *t);
}

static epx_status_t begin(xt_rank_t *self, trip_t *t, uint32_t topk, epx_handle_t **handle)
{
    static __thread int64_t ids[64 * 8]; /* room for a top-k that is refused */
    for (uint32_t i = 0; i < t->tokens; i++) {
        for (uint32_t k = 0; k < topk; k++)
            ids[i * topk + k] = t->ids[i][k % 4];
    }
    epx_dispatch_t d = {.size = sizeof d, .tokens = t->tokens, .topk_idx = ids, .topk = topk};
    d.experts = 2 * (uint32_t)self->ranks;
    d.rows.x = t->x;
    d.rows.row_bytes = t->row_bytes;
    d.timeout_ms = t->timeout_ms;
    d.recv_tokens_max = t->recv_max;
    return epx_dispatch_begin(t->buffer, &d, NULL, handle);
}

static epx_status_t again(trip_t *t, size_t row_bytes, bool own)
{
    epx_rows_t rows = {.x = t->x, .row_bytes = row_bytes};
    epx_place_t place = {.x = own ? t->own : NULL};
    epx_received_t r = {.size = sizeof r};
    epx_status_t status = epx_dispatch_again(t->handle, &rows, &place, NULL, &r);
    if (status == EPX_OK)
        epx_lease_release(t->buffer, r.lease, NULL);
    return status;
}

static epx_status_t combine(trip_t *t, epx_handle_t *handle, uint32_t hidden, bool lease)
{
    epx_combine_t c = {.size = sizeof c, .hidden = hidden, .out = t->out, .timeout_ms = t->timeout_ms};
    c.x = lease ? t->received.x : t->own;
    return epx_combine(handle, &c, NULL);
}

static epx_status_t run_stage(xt_rank_t *self, trip_t *t, stage_t stage)
{
    switch (stage) {
    case BEGIN:
        return begin(self, t, t->topk, &t->handle);
    case END:
        t->received = (epx_received_t){.size = sizeof t->received};
        return epx_dispatch_end(t->handle, NULL, NULL, &t->received);
    case AGAIN_OWN:
        return again(t, t->row_bytes, true);
    case COMBINE_STAGED:
        return combine(t, t->handle, (uint32_t)t->row_bytes / 2, false);
    case AGAIN:
        return again(t, t->row_bytes, false);
    case COMBINE_LEASE:
        return combine(t, t->handle, (uint32_t)t->row_bytes / 2, true);
    default:
        return epx_buffer_barrier(t->buffer, NULL);
    }
}

/* From here on every call gives up soon; a handle keeps the deadline of its begin, and a barrier has the buffer's. */
static void trip_hurry(trip_t *t)
{
    epx_buffer_t *buffer = t->buffer; /* behind their names */
    epx_handle_t *handle = t->handle;
    t->timeout_ms = DEADLINE_MS;
    if (epx__buffer_find(&buffer, "test_ht_fault") != EPX_OK)
        exit(3);
    buffer->x.config.timeout_ms = DEADLINE_MS;
    if (!handle)
        return;
    if (epx__handle_find(&handle, "test_ht_fault") != EPX_OK)
        exit(3);
    handle->h.args.timeout_ms = DEADLINE_MS;
}

static void trip_release(trip_t *t)
{
    epx_lease_release(t->buffer, t->received.lease, NULL);
    epx_handle_release(t->handle, NULL);
    t->received.lease = 0;
    t->handle = NULL;
}

static bool run_all(xt_rank_t *self, trip_t *t)
{
    bool good = true;
    for (int s = BEGIN; good && s < STAGES; s++)
        good = XT_OK(self, run_stage(self, t, (stage_t)s));
    trip_release(t);
    return good;
}

static uint64_t now_ms(void)
{
    return epx__now_ns() / 1000000u;
}

static bool names(const char *words, int rank)
{
    static const char *const forms[] = {"rank %d", "ranks %d and", "and %d disagree"};
    for (int i = 0; i < 3; i++) {
        char text[32];
        snprintf(text, sizeof text, forms[i], rank);
        if (strstr(words, text))
            return true;
    }
    return false;
}

/* The buffer is broken: said once more by its status, and by every later call. */
static void check_broken(xt_rank_t *self, trip_t *t)
{
    epx_lease_t lease;
    void *memory;
    XT_CHECK(self, epx_buffer_status(t->buffer) != EPX_OK, "the status of a failed buffer");
    epx_status_t status = epx_lease(t->buffer, 64, NULL, &lease, &memory);
    XT_CHECK(self, status == EPX_E_BROKEN, "%s after a failure", epx_status_name(status));
    status = epx_buffer_barrier(t->buffer, NULL);
    XT_CHECK(self, status == EPX_E_BROKEN, "%s after a failure", epx_status_name(status));
}

/* ---- a rank that stays away ---- */

static void body_away(xt_rank_t *self)
{
    stage_t stage = *(const stage_t *)self->context;
    int away = self->ranks - 1;
    trip_t t;
    if (!trip_open(self, &t))
        return;
    for (int s = BEGIN; s < (int)stage; s++)
        XT_OK(self, run_stage(self, &t, (stage_t)s));
    if (self->rank == away)
        XT_CHECK(self, xt_wait_mark(self, 0, self->ranks - 1), "the others do not end");
    else
        trip_hurry(&t);
    uint64_t start = now_ms();
    epx_status_t status = run_stage(self, &t, stage);
    uint64_t took = now_ms() - start;
    if (self->rank != away) {
        XT_CHECK(self, status == EPX_E_TIMEOUT || status == EPX_E_PEER, "%s", epx_status_name(status));
        XT_CHECK(self, names(epx_error_detail(), away), "\"%s\" does not name rank %d", epx_error_detail(), away);
        XT_CHECK(self, (double)took < well_before(PATIENT_MS, DEADLINE_MS + 1600), "%lu ms", (unsigned long)took);
        if (status == EPX_E_TIMEOUT)
            xt_mark(self, 1);
        xt_mark(self, 0);
    } else { /* it comes at last, and learns at once that it was given up */
        XT_CHECK(self, status == EPX_E_PEER, "%s: %s", epx_status_name(status), epx_error_detail());
        XT_CHECK(self, (double)took < well_before(PATIENT_MS, AT_ONCE_MS), "%lu ms", (unsigned long)took);
        XT_CHECK(self, atomic_load(&self->world->mark[1]) > 0, "nobody's deadline fired");
    }
    check_broken(self, &t);
    trip_close(&t);
}

/* ---- one in dispatch, another in combine ---- */

typedef struct mismatch {
    const char *name, *words;
    epx_status_t (*most)(xt_rank_t *self, trip_t *t);
    epx_status_t (*one)(xt_rank_t *self, trip_t *t);
} mismatch_t;

static epx_status_t call_begin(xt_rank_t *self, trip_t *t)
{
    epx_handle_t *handle;
    return begin(self, t, TOPK, &handle);
}
static epx_status_t call_begin_wide(xt_rank_t *self, trip_t *t)
{
    epx_handle_t *handle;
    return begin(self, t, TOPK + 1, &handle);
}
static epx_status_t call_combine(xt_rank_t *self, trip_t *t)
{
    return run_stage(self, t, COMBINE_LEASE);
}
static epx_status_t call_combine_narrow(xt_rank_t *self, trip_t *t)
{
    (void)self;
    return combine(t, t->handle, 8, true);
}
static epx_status_t call_combine_other(xt_rank_t *self, trip_t *t)
{
    (void)self;
    epx_combine_t c = {.size = sizeof c, .hidden = ROW / 4, .dtype = EPX_FP32, .out = t->out, .x = t->received.x};
    return epx_combine(t->handle, &c, NULL);
}
static epx_status_t call_again(xt_rank_t *self, trip_t *t)
{
    (void)self;
    return again(t, ROW, false);
}
static epx_status_t call_again_wide(xt_rank_t *self, trip_t *t)
{
    (void)self;
    return again(t, ROW * 2 <= 64 ? ROW * 2 : 32, true);
}
static epx_status_t call_barrier(xt_rank_t *self, trip_t *t)
{
    (void)self;
    return epx_buffer_barrier(t->buffer, NULL);
}

static const mismatch_t mismatches[] = {
    {"begin and combine", "combine", call_begin, call_combine},
    {"combine and again", "combine", call_combine, call_again},
    {"barrier and begin", "barrier", call_barrier, call_begin},
    {"top-k of 2 and 3", "shape", call_begin, call_begin_wide},
    {"hidden of 32 and 8", "shape", call_combine, call_combine_narrow},
    {"bf16 and fp32", "shape", call_combine, call_combine_other},
    {"rows of 64 and 32 bytes", "shape", call_again, call_again_wide},
};

static void body_mismatch(xt_rank_t *self)
{
    const mismatch_t *m = self->context;
    trip_t t;
    if (!trip_open(self, &t))
        return;
    if (!XT_OK(self, run_stage(self, &t, BEGIN)) || !XT_OK(self, run_stage(self, &t, END)))
        return;
    xt_mark(self, 4); /* a rank still in an earlier call would rightly fail there */
    xt_wait_mark(self, 4, self->ranks);
    uint64_t start = now_ms();
    epx_status_t status = self->rank == 1 ? m->one(self, &t) : m->most(self, &t);
    uint64_t took = now_ms() - start;
    const char *words = epx_error_detail();
    XT_CHECK(self, status == EPX_E_MISMATCH || (status == EPX_E_PEER && strstr(words, "EPX_E_MISMATCH")), "%s: %s",
             epx_status_name(status), words);
    XT_CHECK(self, strstr(words, m->words) && names(words, 1), "\"%s\" says not who and what", words);
    XT_CHECK(self, (double)took < well_before(PATIENT_MS, AT_ONCE_MS), "%lu ms: it was waited out",
             (unsigned long)took);
    if (status == EPX_E_MISMATCH)
        xt_mark(self, 2);
    xt_mark(self, 0);
    xt_wait_mark(self, 0, self->ranks);
    XT_CHECK(self, atomic_load(&self->world->mark[2]) > 0, "nobody says EPX_E_MISMATCH");
    check_broken(self, &t);
    trip_close(&t);
}

/* ---- one rank's handle is of another dispatch ---- */

static void body_handles(xt_rank_t *self)
{
    trip_t t;
    epx_handle_t *second = NULL;
    if (!trip_open(self, &t))
        return;
    XT_OK(self, run_stage(self, &t, BEGIN));
    XT_OK(self, begin(self, &t, TOPK, &second));
    xt_mark(self, 4);
    xt_wait_mark(self, 4, self->ranks);
    epx_received_t r = {.size = sizeof r};
    epx_status_t status = epx_dispatch_end(self->rank == 0 ? second : t.handle, NULL, NULL, &r);
    const char *words = epx_error_detail();
    XT_CHECK(self, status == EPX_E_MISMATCH || (status == EPX_E_PEER && strstr(words, "EPX_E_MISMATCH")), "%s: %s",
             epx_status_name(status), words);
    trip_close(&t);
}

/* ---- SIGKILL ---- */

typedef struct kill_plan {
    int victim;
    int stage;         /* kills itself before it */
    uint64_t after_us; /* or so long after the start, wherever it is; SIGSTOP when `stop` */
    bool stop;
} kill_plan_t;

/* A thread of the victim's process, which nobody joins: what it looks at is no rank's. */
static struct {
    kill_plan_t plan;
    xt_world_t *world;
} killing;

static void *killer(void *unused)
{
    (void)unused;
    usleep((useconds_t)killing.plan.after_us);
    atomic_store(&killing.world->note[1], getpid());
    atomic_store(&killing.world->note[0], (long)now_ms());
    raise(killing.plan.stop ? SIGSTOP : SIGKILL);
    return NULL;
}

static void kill_later(const xt_rank_t *self, const kill_plan_t *plan)
{
    pthread_t thread;
    killing.plan = *plan;
    killing.world = self->world;
    if (pthread_create(&thread, NULL, killer, NULL) == 0)
        pthread_detach(thread);
}

/* The survivors make a new group of their own and use it. */
static void start_anew(xt_rank_t *self, int victim)
{
    xt_rank_t next = *self;
    trip_t t;
    next.ranks--;
    next.rank -= next.rank > victim;
    next.group = NULL;
    if (!XT_OK(self, xt_group(&next, 1, NULL, &next.group)))
        return;
    if (trip_open(&next, &t)) {
        run_all(&next, &t);
        trip_close(&t);
    }
    epx_group_destroy(next.group);
}

static void body_killed(xt_rank_t *self)
{
    const kill_plan_t *plan = self->context;
    bool timed = plan->after_us > 0;
    trip_t t;
    /* That a rank is stopped nobody is told: its calls have to give up, and not before. */
    uint64_t deadline_ms = plan->stop ? (uint64_t)well_before(PATIENT_MS / 2, 1000) : PATIENT_MS;
    /* Timed: large rows, so that the rank dies in the middle of them. */
    if (!trip_make(self, &t, timed ? 64u << 10 : ROW, timed ? 24 : TOKENS, deadline_ms))
        return;
    if (self->rank == plan->victim && timed)
        kill_later(self, plan);
    epx_status_t status = EPX_OK;
    for (int round = 0; round < 2000 && status == EPX_OK; round++) {
        for (int s = BEGIN; s < STAGES && status == EPX_OK; s++) {
            if (self->rank == plan->victim && !timed && round == 1 && s == plan->stage) {
                atomic_store(&self->world->note[0], (long)now_ms());
                raise(SIGKILL);
            }
            status = run_stage(self, &t, (stage_t)s);
        }
        if (status == EPX_OK)
            trip_release(&t);
    }
    long since = (long)now_ms() - atomic_load(&self->world->note[0]);
    char words[1024];
    snprintf(words, sizeof words, "%s", epx_error_detail());
    if (self->rank == plan->victim) /* only a stopped one comes here: it goes on, and is told that it was given up */
        goto out;
    XT_CHECK(self, status == EPX_E_PEER || (plan->stop && status == EPX_E_TIMEOUT), "%s: %s", epx_status_name(status),
             words);
    XT_CHECK(self, names(words, plan->victim), "\"%s\" does not name rank %d", words, plan->victim);
    double most = well_before(PATIENT_MS, AT_ONCE_MS) + (double)(plan->stop ? deadline_ms : 0);
    XT_CHECK(self, (double)since < most, "%ld ms after it happened", since);
    check_broken(self, &t);
    xt_mark(self, 3);
    if (plan->stop && xt_wait_mark(self, 3, self->ranks - 1))
        kill((pid_t)atomic_load(&self->world->note[1]), SIGCONT);
out:
    if (self->rank == plan->victim)
        XT_CHECK(self, status != EPX_OK, "the stalled rank saw nothing");
    trip_close(&t);
    if (!plan->stop)
        start_anew(self, plan->victim);
}

/* ---- failures inside ---- */

/* Rank 1 alone has little patience; rank 0 comes after that, but in time for its own deadline. */
static void body_impatient(xt_rank_t *self)
{
    trip_t t;
    if (!trip_open(self, &t))
        return;
    t.timeout_ms = self->rank == 1 ? 150 : 0;
    if (self->rank == 0)
        XT_CHECK(self, xt_wait_mark(self, 0, 1), "rank 1 does not end");
    uint64_t start = now_ms();
    epx_status_t status = run_stage(self, &t, BEGIN);
    uint64_t took = now_ms() - start;
    const char *words = epx_error_detail();
    if (self->rank == 1)
        XT_CHECK(self, status == EPX_E_TIMEOUT && names(words, 0), "%s: %s", epx_status_name(status), words);
    else
        XT_CHECK(self, status == EPX_E_PEER && names(words, 1), "%s: %s", epx_status_name(status), words);
    if (self->rank == 1)
        xt_mark(self, 0);
    XT_CHECK(self, (double)took < well_before(PATIENT_MS, AT_ONCE_MS), "%lu ms", (unsigned long)took);
    trip_close(&t);
}

/* More rows than the worst-case mode has room for, at one rank: all know at once. */
static void body_overflow(xt_rank_t *self)
{
    trip_t t;
    if (!trip_open(self, &t))
        return;
    t.recv_max = self->rank == 2 ? 1 : 1000;
    uint64_t start = now_ms();
    epx_status_t status = run_stage(self, &t, BEGIN);
    if (status == EPX_OK)
        status = run_stage(self, &t, END);
    const char *words = epx_error_detail();
    XT_CHECK(self, status == EPX_E_OVERFLOW || (status == EPX_E_PEER && strstr(words, "EPX_E_OVERFLOW")), "%s: %s",
             epx_status_name(status), words);
    XT_CHECK(self, names(words, 2) && strstr(words, "recv_tokens_max"), "\"%s\" says not who and what", words);
    uint64_t took = now_ms() - start;
    XT_CHECK(self, (double)took < well_before(PATIENT_MS, AT_ONCE_MS), "%lu ms", (unsigned long)took);
    trip_close(&t);
}

/* A call that is refused has done nothing: the right call after it still meets the others'. */
static void body_refused(xt_rank_t *self)
{
    trip_t t;
    if (!trip_open(self, &t))
        return;
    if (self->rank == 1) {
        epx_handle_t *handle = (epx_handle_t *)&t;
        XT_CHECK(self, begin(self, &t, 5, &handle) == EPX_E_INVALID, "a top-k of 5, where 4 is the most");
        XT_CHECK(self, handle == (epx_handle_t *)&t, "the output was written");
    }
    XT_OK(self, run_stage(self, &t, BEGIN));
    if (self->rank == 0) {
        epx_place_t place = {.x = t.own + 4};
        epx_received_t r = {.size = sizeof r};
        XT_CHECK(self, epx_dispatch_end(t.handle, &place, NULL, &r) == EPX_E_INVALID, "a crooked place");
        XT_CHECK(self, combine(&t, t.handle, 32, false) == EPX_E_INVALID, "combine before end");
        XT_CHECK(self, again(&t, ROW, false) == EPX_E_INVALID, "again before end");
    }
    XT_OK(self, run_stage(self, &t, END));
    if (self->rank == 2)
        XT_CHECK(self, combine(&t, t.handle, 3, false) == EPX_E_INVALID, "rows of 6 bytes");
    XT_OK(self, run_stage(self, &t, COMBINE_LEASE));
    trip_release(&t);
    run_all(self, &t);
    XT_OK(self, epx_buffer_status(t.buffer));
    trip_close(&t);
}

/* Bad ids count as -1, are told once, and harm nothing. */
static void body_bad_ids(xt_rank_t *self)
{
    trip_t t;
    if (!trip_open(self, &t))
        return;
    if (self->rank == 1) {
        t.ids[0][0] = 99;
        t.ids[1][1] = -7;
    }
    bool good = true;
    epx_status_t told = EPX_OK;
    for (int s = BEGIN; good && s < STAGES; s++) {
        epx_status_t status = run_stage(self, &t, (stage_t)s);
        XT_CHECK(self, status == EPX_OK, "%s: %s", stage_name[s], epx_error_detail());
        good = status == EPX_OK;
    }
    told = epx_buffer_status(t.buffer);
    XT_CHECK(self, told == (self->rank == 1 ? EPX_E_DATA : EPX_OK), "%s", epx_status_name(told));
    XT_CHECK(self, self->rank != 1 || strstr(epx_error_detail(), "2 top-k ids"), "%s", epx_error_detail());
    XT_OK(self, epx_buffer_status(t.buffer)); /* once */
    trip_release(&t);
    run_all(self, &t);
    trip_close(&t);
}

/* A rank destroys its buffer while others wait for it: they need no deadline to know. */
static void body_destroyed(xt_rank_t *self)
{
    trip_t t;
    if (!trip_open(self, &t))
        return;
    if (self->rank == 2)
        usleep(50000);
    uint64_t start = now_ms();
    if (self->rank != 2) {
        epx_status_t status = run_stage(self, &t, BEGIN);
        XT_CHECK(self, status == EPX_E_PEER && names(epx_error_detail(), 2), "%s: %s", epx_status_name(status),
                 epx_error_detail());
        uint64_t took = now_ms() - start;
        XT_CHECK(self, (double)took < well_before(PATIENT_MS, AT_ONCE_MS), "%lu ms", (unsigned long)took);
    }
    trip_close(&t);
}

/* ---- main ---- */

static const char *part = "";

static void run_one(const char *name, const char *detail, int ranks, bool processes, void (*body)(xt_rank_t *),
                    const void *context, uint64_t may_die)
{
    char text[96];
    snprintf(text, sizeof text, "%s%s%s", name, detail[0] ? ": " : "", detail);
    if (!strstr(text, part))
        return;
    xt_run_t r = {.name = text, .ranks = ranks, .processes = processes, .threads = 1, .body = body};
    r.context = (void *)context;
    r.may_die = may_die;
    r.limit_ms = 60000;
    xt_run(&r);
}

int main(int argc, char **argv)
{
    part = argc > 1 ? argv[1] : "";
    for (stage_t s = BEGIN; s < STAGES; s++)
        run_one("stays away", stage_name[s], 3, false, body_away, &s, 0);
    for (size_t i = 0; i < sizeof mismatches / sizeof *mismatches; i++)
        run_one("mismatch", mismatches[i].name, 3, false, body_mismatch, &mismatches[i], 0);
    run_one("handle of another dispatch", "", 3, false, body_handles, NULL, 0);
    run_one("impatient rank", "", 3, false, body_impatient, NULL, 0);
    run_one("overflow", "", 3, false, body_overflow, NULL, 0);
    run_one("refused calls", "", 3, false, body_refused, NULL, 0);
    run_one("bad ids", "", 3, false, body_bad_ids, NULL, 0);
    run_one("destroyed buffer", "", 3, false, body_destroyed, NULL, 0);
    for (int s = BEGIN; s < STAGES; s++) {
        for (int victim = 0; victim < 4; victim += 3 - s % 2) { /* the rendezvous' rank too */
            kill_plan_t plan = {.victim = victim, .stage = s};
            run_one("killed before", stage_name[s], 4, true, body_killed, &plan, 1ull << victim);
        }
    }
    for (int i = 0; i < 12; i++) {
        kill_plan_t plan = {.victim = i % 4, .after_us = 1000 + (uint64_t)i * 3700, .stop = i % 3 == 2};
        run_one(plan.stop ? "stopped in the middle" : "killed in the middle", "", 4, true, body_killed, &plan,
                1ull << plan.victim);
    }
    return xt_done();
}
