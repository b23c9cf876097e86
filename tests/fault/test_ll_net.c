/*
 * Low latency between domains when a far rank does not do its part: every wait ends at its deadline and names that rank
 * and what was waited for; a rank that dies is named at once, whatever half it dies before; one that is masked holds
 * nobody up, and finds all it was told when it wakes.
 *
 *     fault_test_ll_net [part of a test's name]
 *
 * tests/emulate runs it on kernels too: there a half fails in the buffer's status, in words of its own.
 */
#include "common/slowness.h"
#include "common/stopped.h"
#include "common/world.h"
#include "common/nets.h"

#include <epx/ll.h>

#include "algo/ll/net.h"
#include "api/names.h"
#include "api/objects.h"
#include "base/alloc.h"
#include "base/clock.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TOKENS = 2, HIDDEN = 64, RANKS_MOST = 4, SLOTS_MOST = 40, PATIENT_MS = 8000, DEADLINE_MS = 300 };
enum { SEND, RECV, COMBINE_SEND, COMBINE_RECV, HALVES };
static const char *const half_name[] = {"ll_dispatch_send", "ll_dispatch_recv", "ll_combine_send", "ll_combine_recv"};

/* One expert a rank, every token chooses all. Rank r's expert gives 1 + r. */
static const char *part = "";

typedef struct trip {
    xt_rank_t *self;
    epx_buffer_t *buffer;
    epx_ll_handle_t *handle[SLOTS_MOST];
    uint32_t slots, hidden;
    uint64_t timeout_ms;
    int64_t ids[TOKENS * RANKS_MOST];
    _Alignas(16) uint16_t x[TOKENS][HIDDEN], y[RANKS_MOST * TOKENS][HIDDEN], out[TOKENS][HIDDEN];
    _Alignas(16) uint16_t recv[RANKS_MOST * TOKENS][HIDDEN];
    float left[TOKENS];
    int32_t count[1], source[RANKS_MOST * TOKENS];
} trip_t;

static uint16_t bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)(bits >> 16); /* small whole numbers: exact */
}

static bool kernels(void)
{
    return xt_memory()->backend != EPX_BACKEND_CPU;
}

/* Emulated kernels spin on every core there is: somebody may not run for seconds. */
static uint64_t patient_ms(void)
{
    return kernels() ? 60000 : PATIENT_MS;
}

static bool trip_open(xt_rank_t *self, trip_t *t, uint32_t slots, bool mask_on_timeout)
{
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 1u << 16, .reserve_bytes = 1u << 16, .tokens_max = 4};
    c.topk_max = RANKS_MOST;
    c.experts_max = RANKS_MOST;
    c.handles_max = 1;
    c.timeout_ms = patient_ms();
    c.ll_tokens_max = TOKENS;
    c.ll_hidden_max = HIDDEN;
    c.ll_slots = slots;
    c.ll_mask_on_timeout = mask_on_timeout;
    memset(t, 0, sizeof *t);
    t->self = self;
    t->slots = slots;
    t->hidden = HIDDEN;
    t->timeout_ms = patient_ms();
    for (int i = 0; i < TOKENS * self->ranks; i++)
        t->ids[i] = i % self->ranks;
    for (int i = 0; i < RANKS_MOST * TOKENS * HIDDEN; i++)
        t->y[i / HIDDEN][i % HIDDEN] = bf16((float)(1 + self->rank));
    return XT_OK(self, epx_buffer_create(self->group, &c, &t->buffer));
}

static const epx__ll_net_t *net_of(const trip_t *t)
{
    epx_buffer_t *inside = t->buffer; /* behind its name */
    if (epx__buffer_find(&inside, "test_ll_net") != EPX_OK)
        exit(1);
    return inside->x.ll_net;
}

/* Until all that this rank has pushed to the other has been applied there, and it knows. */
static void wait_applied(const trip_t *t)
{
    const epx_port_channel_t *channel = epx__ll_net_channel(net_of(t), 1 - t->self->rank);
    for (uint64_t ms = 0; ms < patient_ms() && !epx__channels_applied(channel); ms++)
        usleep(1000);
    XT_CHECK(t->self, epx__channels_applied(channel), "what was pushed is not applied");
}

static void hold_proxies(const trip_t *t, bool hold)
{
    const epx__channels_t *channels = net_of(t)->channels;
    for (uint32_t p = 0; p < channels->proxies; p++)
        if (hold)
            pthread_mutex_lock(&channels->proxy[p].lock);
        else
            pthread_mutex_unlock(&channels->proxy[p].lock);
}

static bool is_process(void)
{
    return strncmp(getenv("EPX_NET"), "ofi", 3) == 0;
}

/* One half of call `n` (from 1), enqueued. */
static epx_status_t enqueue(trip_t *t, int which, uint32_t n)
{
    uint32_t ranks = (uint32_t)t->self->ranks;
    epx_ll_handle_t **handle = &t->handle[n % t->slots];
    epx_ll_dispatch_t d = {.size = sizeof d, .x = t->x, .tokens = TOKENS, .hidden = t->hidden, .topk_idx = t->ids};
    epx_ll_combine_t c = {.size = sizeof c, .x = t->y, .topk_idx = t->ids, .out = t->out, .weight_left = t->left};
    d.topk = d.experts = ranks;
    d.recv_x = t->recv;
    d.recv_count = t->count;
    d.src_info = t->source;
    d.timeout_ms = c.timeout_ms = t->timeout_ms;
    epx_status_t status = EPX_OK;
    switch (which) {
    case SEND: /* a rank that was given up says that it is done with the slot, but the word may be on its way */
        for (int i = 0; i < 2000 && (i == 0 || status == EPX_E_BUSY); i++) {
            usleep(i ? 1000 : 0);
            status = epx_ll_dispatch_send(t->buffer, &d, NULL, handle);
        }
        return status;
    case RECV:
        return epx_ll_dispatch_recv(*handle, NULL);
    case COMBINE_SEND:
        return epx_ll_combine_send(*handle, &c, NULL);
    default:
        return epx_ll_combine_recv(*handle, NULL);
    }
}

static epx_status_t half(trip_t *t, int which, uint32_t n)
{
    epx_status_t status = enqueue(t, which, n);
    return status == EPX_OK && kernels() ? epx_buffer_status(t->buffer) : status;
}

static bool halves(trip_t *t, int first, int last, uint32_t n)
{
    bool good = true;
    for (int which = first; good && which <= last; which++)
        good = XT_OK(t->self, half(t, which, n));
    return good;
}

static void check_out(trip_t *t, unsigned from, const char *when)
{
    float sum = 0, weight = 0;
    for (int r = 0; r < t->self->ranks; r++)
        if (from >> r & 1) {
            sum += (float)(1 + r);
            weight += 1;
        }
    for (int i = 0; i < TOKENS; i++)
        XT_CHECK(t->self, t->left[i] == weight && t->out[i][0] == bf16(sum) && t->out[i][HIDDEN - 1] == bf16(sum),
                 "%s: token %d: weight %g, not %g; %#x, not %#x", when, i, (double)t->left[i], (double)weight,
                 t->out[i][0], bf16(sum));
}

static bool names(const char *words, int rank)
{
    char name[16];
    snprintf(name, sizeof name, "rank %d", rank);
    return strstr(words, name) != NULL;
}

/* ---- deadlines ---- */

/* Where rank 0 waits for rank 1, which does `peer` calls' first halves and then only watches, or is stopped. */
typedef struct site {
    const char *stage, *of_kernels, *half;
    uint32_t slots, peer_sends; /* rank 1 dispatches so often */
    uint32_t sends, recvs, releases;
    bool combine; /* rank 0 then combines call 1 */
    bool stopped; /* rank 1's process: its proxy applies nothing */
} site_t;

static const site_t sites[] = {
    {"its tokens", "put its rows", "ll_dispatch_recv", 2, 0, 1, 1, 0, false, false},
    {"its slot to be free", "make room in its ring", "ll_dispatch_send", 1, 1, 2, 1, 1, false, false},
    {"its expert outputs", "put its rows", "ll_combine_recv", 2, 1, 1, 1, 0, true, false},
    {"room in the channel to it", "make room in the channel", "ll_combine_send", 2, 1, 1, 1, 0, true, true},
    {"room in the channel to it", "make room in the channel", "ll_dispatch_send", 40, 1, 31, 0, 0, false, true},
    {"room for words in the channel to it", "make room in the channel", "ll_dispatch_recv", 40, 8, 30, 5, 0, false,
     true},
};

/* A process is stopped; of a thread, its proxies are held. Either way nothing that comes is applied. Both channels are
 * empty then, and each rank knows that its own is. */
static void stop_until_told(xt_rank_t *self, const trip_t *t)
{
    wait_applied(t);
    XT_CHECK(self, xt_wait_mark(self, 6, 1), "rank 0 does not come so far");
    if (is_process()) {
        atomic_store(&self->world->note[1], getpid());
        xt_mark(self, 0);
        raise(SIGSTOP);
        return;
    }
    hold_proxies(t, true);
    xt_mark(self, 0);
    xt_wait_mark(self, 5, 1);
    hold_proxies(t, false);
}

static void wait_until_stopped(xt_rank_t *self, const trip_t *t)
{
    wait_applied(t);
    xt_mark(self, 6);
    XT_CHECK(self, xt_wait_mark(self, 0, 1), "rank 1 does not come so far");
    if (is_process()) /* it raises the signal after the mark */
        XT_CHECK(self, wait_stopped((pid_t)atomic_load(&self->world->note[1])), "rank 1 does not stop");
}

static void wake(xt_rank_t *self)
{
    if (is_process())
        kill((pid_t)atomic_load(&self->world->note[1]), SIGCONT);
    else
        xt_mark(self, 5);
}

static epx_status_t to_the_site(trip_t *t, const site_t *site)
{
    epx_status_t status = EPX_OK;
    uint32_t recv = 0, released = 0;
    for (uint32_t n = 1; status == EPX_OK && n <= site->sends; n++) {
        status = half(t, SEND, n);
        if (status != EPX_OK || site->slots > 2)
            continue;
        if (recv < site->recvs)
            status = half(t, RECV, ++recv);
        if (status == EPX_OK && released < site->releases)
            epx_ll_handle_release(t->handle[++released % t->slots], NULL);
    }
    while (status == EPX_OK && recv < site->recvs)
        status = half(t, RECV, ++recv);
    if (status == EPX_OK && site->combine)
        status = half(t, COMBINE_SEND, 1);
    return status == EPX_OK && site->combine ? half(t, COMBINE_RECV, 1) : status;
}

static void body_site(xt_rank_t *self)
{
    const site_t *site = self->context;
    trip_t t;
    if (!trip_open(self, &t, site->slots, false))
        return;
    if (self->rank == 1) {
        bool good = true;
        for (uint32_t n = 1; good && n <= site->peer_sends; n++)
            good = XT_OK(self, half(&t, SEND, n));
        if (site->stopped) {
            stop_until_told(self, &t);
        } else {
            wait_applied(&t);
            xt_mark(self, 0);
        }
        xt_wait_mark(self, 1, 1);
    } else {
        if (site->stopped)
            wait_until_stopped(self, &t);
        else
            XT_CHECK(self, xt_wait_mark(self, 0, 1), "rank 1 does not come so far");
        t.timeout_ms = DEADLINE_MS;
        uint64_t start = epx__now_ns();
        epx_status_t status = to_the_site(&t, site);
        double took = (double)(epx__now_ns() - start) * 1e-9;
        const char *words = epx_error_detail();
        bool right = kernels() ? strstr(words, site->of_kernels) != NULL
                               : strstr(words, site->stage) && strstr(words, site->half) && strstr(words, "call ");
        XT_CHECK(self, right && status == EPX_E_TIMEOUT && names(words, 1), "%s: %s", epx_status_name(status), words);
        XT_CHECK(self, took > 0.9 * DEADLINE_MS * 1e-3 && took < DEADLINE_MS * 1e-3 + 3.0 * slowness(), "%.3f s", took);
        status = half(&t, SEND, 40);
        XT_CHECK(self, status == EPX_E_BROKEN, "then %s: %s", epx_status_name(status), epx_error_detail());
        if (site->stopped)
            wake(self);
        xt_mark(self, 1);
    }
    epx_buffer_destroy(t.buffer);
}

/* The same, but the buffer masks who misses a deadline: the call goes on without it. */
static void body_masked_site(xt_rank_t *self)
{
    trip_t t;
    if (!trip_open(self, &t, 2, true))
        return;
    if (self->rank == 1) {
        XT_OK(self, half(&t, SEND, 1));
        stop_until_told(self, &t);
        xt_wait_mark(self, 1, 1);
        /* It was left out, and is told so. */
        if (halves(&t, RECV, COMBINE_RECV, 1))
            check_out(&t, 2, "the rank that was stopped");
        xt_mark(self, 2);
    } else {
        wait_until_stopped(self, &t);
        t.timeout_ms = DEADLINE_MS;
        if (halves(&t, SEND, COMBINE_RECV, 1))
            check_out(&t, 1, "without the stopped rank");
        int32_t masked[RANKS_MOST] = {0};
        XT_CHECK(self, epx_ll_mask_get(t.buffer, masked) == EPX_OK && masked[1], "rank 1 is not masked");
        wake(self);
        xt_mark(self, 1);
        xt_wait_mark(self, 2, 1);
        if (halves(&t, SEND, COMBINE_RECV, 2) && halves(&t, SEND, COMBINE_RECV, 3)) /* slot 1 again: it has settled */
            check_out(&t, 1, "the slot again");
    }
    xt_mark(self, 3);
    xt_wait_mark(self, 3, 2);
    epx_buffer_destroy(t.buffer);
}

/* ---- words that find no room ---- */

/*
 * Rank 1 dispatches 40 calls and is stopped. Rank 0 fills its channel to it with 30 calls and takes out ten: the words
 * of the last six find no room. It masks rank 1, so it goes on. When rank 1 wakes, the next half tells it all: its
 * further calls need every slot's `taken`.
 */
static void body_words(xt_rank_t *self)
{
    enum { CALLS = 40, FIRST = 30, TAKEN = 10 };
    trip_t t;
    bool good = true;
    if (!trip_open(self, &t, CALLS, false))
        return;
    if (self->rank == 1) {
        for (uint32_t n = 1; good && n <= CALLS; n++)
            good = XT_OK(self, half(&t, SEND, n));
        stop_until_told(self, &t);
        for (uint32_t n = 1; good && n <= FIRST; n++) {
            good = XT_OK(self, half(&t, RECV, n));
            epx_ll_handle_release(t.handle[n % CALLS], NULL);
        }
        for (uint32_t n = CALLS + 1; good && n <= CALLS + TAKEN; n++)
            good = XT_OK(self, half(&t, SEND, n));
        xt_mark(self, 1);
    } else {
        wait_until_stopped(self, &t);
        for (uint32_t n = 1; good && n <= FIRST; n++)
            good = XT_OK(self, half(&t, SEND, n));
        for (uint32_t n = 1; good && n <= 4; n++)
            good = XT_OK(self, half(&t, RECV, n));
        XT_OK(self, epx_ll_mask_set(t.buffer, 1, 1, NULL));
        uint64_t start = epx__now_ns();
        for (uint32_t n = 5; good && n <= TAKEN; n++)
            good = XT_OK(self, half(&t, RECV, n));
        double took_ms = (double)(epx__now_ns() - start) * 1e-6;
        XT_CHECK(self, took_ms < well_before((double)patient_ms(), 1000), "words to a masked rank were waited for");
        wake(self);
        wait_applied(&t); /* there is room again */
        good = good && XT_OK(self, half(&t, RECV, TAKEN + 1));
        xt_wait_mark(self, 1, 1);
    }
    xt_mark(self, 2);
    xt_wait_mark(self, 2, 2);
    epx_buffer_destroy(t.buffer);
}

/* ---- leaving ---- */

/* Rank 1 needs nothing of rank 0: it leaves with its own outputs. Rank 0 has yet to send it some, and its channel is
 * full of what rank 1 will not take any more: that is no reason to wait. Its own outputs are there. */
static void body_gone(xt_rank_t *self)
{
    trip_t t;
    if (!trip_open(self, &t, 40, false))
        return;
    for (int i = 0; self->rank == 1 && i < TOKENS * 2; i++)
        t.ids[i] = 1;
    if (self->rank == 1) {
        halves(&t, SEND, COMBINE_RECV, 1);
        wait_applied(&t); /* or rank 0's proxy, which is held then, would have to tell it */
        xt_mark(self, 0);
        xt_wait_mark(self, 1, 1);
        epx_buffer_destroy(t.buffer);
        xt_mark(self, 2);
        return;
    }
    bool good = halves(&t, SEND, RECV, 1);
    xt_wait_mark(self, 0, 1);
    wait_applied(&t); /* the channel is empty */
    hold_proxies(&t, true);
    xt_mark(self, 1);
    xt_wait_mark(self, 2, 1);
    for (uint32_t n = 2; good && n <= 31; n++)
        good = XT_OK(self, half(&t, SEND, n));
    hold_proxies(&t, false);
    uint64_t start = epx__now_ns();
    if (good && halves(&t, COMBINE_SEND, COMBINE_RECV, 1))
        check_out(&t, 3, "after rank 1 has left");
    double took_ms = (double)(epx__now_ns() - start) * 1e-6;
    XT_CHECK(self, took_ms < well_before((double)patient_ms(), DEADLINE_MS * 4), "%.0f ms", took_ms);
    epx_buffer_destroy(t.buffer);
}

/* ---- death ---- */

/* Rank `victim` of four in two domains is killed before a half of call 3; nobody masks. */
typedef struct death {
    int victim, half;
} death_t;

static void body_death(xt_rank_t *self)
{
    const death_t *death = self->context;
    trip_t t;
    epx_status_t status = EPX_OK;
    if (!trip_open(self, &t, 2, false))
        return;
    for (uint32_t n = 1; status == EPX_OK && n < 2000; n++)
        for (int which = SEND; status == EPX_OK && which < HALVES; which++) {
            if (self->rank == death->victim && n == 3 && which == death->half) {
                atomic_store(&self->world->note[0], (long)(epx__now_ns() / 1000000));
                raise(SIGKILL);
            }
            status = half(&t, which, n);
        }
    long since = (long)(epx__now_ns() / 1000000) - atomic_load(&self->world->note[0]);
    const char *words = epx_error_detail();
    XT_CHECK(self, status == EPX_E_PEER && names(words, death->victim), "%s: %s", epx_status_name(status), words);
    /* Emulated kernels of four processes spin in each other's way: before their patience ends. */
    double most = kernels() ? (double)patient_ms() : well_before(PATIENT_MS, 1500);
    XT_CHECK(self, (double)since < most, "%ld ms after the death", since);
    uint64_t start = epx__now_ns();
    epx_buffer_destroy(t.buffer);
    double took = (double)(epx__now_ns() - start) * 1e-9;
    XT_CHECK(self, took < (kernels() ? 60 : 6 * slowness()), "destroy took %.1f s", took);
}

/* ---- memory runs out ---- */

static bool left_over;
static atomic_ulong made; /* allocations of a buffer's creation, both ranks together, when none failed */

/* The n-th allocation from here on fails, of whichever rank: both ranks get words, and nothing is left over. */
static void body_oom(xt_rank_t *self)
{
    const uint64_t *at = self->context;
    epx_buffer_t *buffer = NULL;
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 1u << 16, .reserve_bytes = 1u << 16, .tokens_max = 4};
    c.topk_max = c.experts_max = 4;
    c.handles_max = c.leases_max = 2;
    c.timeout_ms = (uint64_t)well_before(8000, 2000);
    c.ll_tokens_max = TOKENS;
    c.ll_hidden_max = HIDDEN;
    c.ll_zero_copy = 1;
    xt_mark(self, 0);
    xt_wait_mark(self, 0, 2);
    uint64_t before = epx__alloc_count();
    xt_mark(self, 1);
    xt_wait_mark(self, 1, 2);
    if (self->rank == 0)
        epx__alloc_fail_at(*at, 0);
    xt_mark(self, 2);
    xt_wait_mark(self, 2, 2);
    epx_status_t status = epx_buffer_create(self->group, &c, &buffer);
    XT_CHECK(self, status == EPX_OK ? buffer != NULL : !buffer && epx_error_detail()[0], "%s", epx_status_name(status));
    xt_mark(self, 3);
    xt_wait_mark(self, 3, 2);
    if (self->rank == 0) {
        if (epx__alloc_count() - before < *at)
            atomic_store(&made, epx__alloc_count() - before);
        epx__alloc_fail_at(0, 0);
    }
    xt_mark(self, 4);
    xt_wait_mark(self, 4, 2);
    epx_buffer_destroy(buffer);
}

static void run_oom(void)
{
    long failed = 0;
    uint64_t at = 1, step = getenv("EPX_TEST_SANITIZER") ? 11 : 3, runs = 0; /* every one takes minutes */
    if (!strstr("memory runs out", part))
        return;
    setenv("EPX_NET", "loop", 1);
    for (; atomic_load(&made) == 0 && failed < 5 && at < 2000; at += step) {
        char name[64];
        snprintf(name, sizeof name, "memory runs out at %llu", (unsigned long long)at);
        xt_run_t r = {.name = name, .ranks = 2, .ranks_per_domain = 1, .quiet = true, .threads = 1, .body = body_oom};
        r.context = &at;
        /* A rank whose bootstrap fails leaves, and the other waits for it. */
        r.timeout_ms = (uint64_t)well_before(6000, 1500);
        int64_t live = epx__alloc_live();
        runs++;
        failed += xt_run(&r);
        if (epx__alloc_live() != live) /* groups and all */
            printf("allocation %llu: %lld blocks are left\n", (unsigned long long)at,
                   (long long)(epx__alloc_live() - live));
        left_over = left_over || epx__alloc_live() != live;
    }
    printf("%llu allocations failed, one by one\n", (unsigned long long)runs - 1);
}

/* ---- shapes ---- */

static void body_mismatch(xt_rank_t *self)
{
    trip_t t;
    if (!trip_open(self, &t, 2, false))
        return;
    if (self->rank == 1)
        t.hidden = HIDDEN / 2;
    epx_status_t status = half(&t, SEND, 1);
    if (status == EPX_OK)
        status = half(&t, RECV, 1);
    const char *words = epx_error_detail();
    XT_CHECK(self, status == EPX_E_MISMATCH || status == EPX_E_PEER, "%s: %s", epx_status_name(status), words);
    XT_CHECK(self, strstr(words, kernels() ? "other sizes or formats" : "disagree on the shape"), "%s", words);
    xt_mark(self, 0);
    xt_wait_mark(self, 0, 2);
    epx_buffer_destroy(t.buffer);
}

/* ---- main ---- */

static bool here(const char *spec)
{
    return !getenv("EPX_TEST_THREADS") && test_net_here(spec);
}

static void run(const char *name, const char *net, int ranks, int per_domain, void (*body)(xt_rank_t *),
                const void *context, uint64_t may_die)
{
    char text[128];
    snprintf(text, sizeof text, "%s, %s", name, net);
    if (!strstr(text, part))
        return;
    setenv("EPX_NET", net, 1);
    xt_run_t r = {.name = text, .ranks = ranks, .processes = strncmp(net, "ofi", 3) == 0, .threads = 1, .body = body};
    r.ranks_per_domain = per_domain;
    r.context = (void *)context;
    r.may_die = may_die;
    /* The ranks' deadline comes before the limit, so that its words say who waited for whom. */
    r.limit_ms = kernels() ? 2 * patient_ms() + 30000 : 30000;
    xt_run(&r);
}

static void run_all(const char *net)
{
    bool processes = strncmp(net, "ofi", 3) == 0;
    char name[64];
    for (size_t i = 0; i < sizeof sites / sizeof *sites; i++)
        if (sites[i].stopped || !processes)
            run(sites[i].stage, net, 2, 1, body_site, &sites[i], 0);
    run("a stopped rank is masked", net, 2, 1, body_masked_site, NULL, 0);
    run("words without room", net, 2, 1, body_words, NULL, 0);
    /* Not over shm: who dies in the middle of a put leaves libfabric's lock in shared memory taken, and the others
     * spin. */
    for (int which = SEND; strcmp(net, "ofi:tcp") == 0 && which < HALVES; which++) {
        death_t death = {.victim = which, .half = which};
        snprintf(name, sizeof name, "killed before %s", half_name[which]);
        run(name, net, 4, 2, body_death, &death, 1ull << death.victim);
    }
    if (!processes)
        run("has left", net, 2, 1, body_gone, NULL, 0);
    if (!processes)
        run("mismatch", net, 2, 1, body_mismatch, NULL, 0);
}

/* Not over shm: who dies in the middle of a put leaves libfabric's lock in shared memory taken, and the others spin;
 * and an endpoint that has lost a peer stays open (src/net/ofi), which leaves its file in /dev/shm. */
int main(int argc, char **argv)
{
    part = argc > 1 ? argv[1] : "";
    if (!kernels())
        run_oom();
    run_all("loop");
    run_all("sim:3");
    if (here("ofi:tcp"))
        run_all("ofi:tcp");
    return xt_done() || left_over;
}
