/*
 * Low latency between domains: a rank is given up while outputs that do not fit one piece of `out` are on their way, by
 * who sends them, by whom they are for, or because who sends them dies. What has come of them by then is added by
 * nobody, other ranks get theirs, and calls that use the slot again are right.
 *
 *     fault_test_ll_pieces [part of a test's name]
 *
 * tests/emulate runs it on kernels too.
 */
#include "common/stopped.h"
#include "common/world.h"

#include <epx/ll.h>

#include "algo/ll/net.h"
#include "api/names.h"
#include "api/objects.h"
#include "base/clock.h"
#include "net/net.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RANKS_MOST = 3, TOKENS = 12, HIDDEN = 512, EACH = 7, LOCAL = EACH + 1, SLOTS = 2, PATIENT_MS = 60000 };
enum { TOPK_MOST = 1 + (RANKS_MOST - 1) * EACH, ROWS = RANKS_MOST * TOKENS };
enum { SEND, RECV, COMBINE_SEND, COMBINE_RECV };

/* Every token chooses one expert of its own rank and EACH of every other rank. Rank r's experts give 1 + r. */
typedef struct trip {
    xt_rank_t *self;
    epx_buffer_t *buffer;
    epx_ll_handle_t *handle[SLOTS];
    uint64_t timeout_ms;
    int64_t ids[TOKENS * TOPK_MOST];
    _Alignas(16) uint16_t x[TOKENS][HIDDEN], y[LOCAL * ROWS][HIDDEN], recv[LOCAL * ROWS][HIDDEN], out[TOKENS][HIDDEN];
    float left[TOKENS];
    int32_t count[LOCAL], source[LOCAL * ROWS];
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

/* Who is served must not miss it, however busy the machine is. */
static uint64_t deadline_ms(void)
{
    return kernels() ? 4000 : 2500;
}

static const epx__ll_net_t *net_of(const trip_t *t)
{
    epx_buffer_t *inside = t->buffer; /* behind its name */
    if (epx__buffer_find(&inside, "test_ll_pieces") != EPX_OK)
        exit(1);
    return inside->x.ll_net;
}

static bool trip_open(xt_rank_t *self, trip_t *t)
{
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 1u << 16, .reserve_bytes = 1u << 16, .tokens_max = 4};
    int topk = 0;
    c.experts_max = (uint32_t)(LOCAL * self->ranks);
    c.handles_max = 1;
    c.timeout_ms = t->timeout_ms = PATIENT_MS;
    c.ll_tokens_max = TOKENS;
    c.ll_hidden_max = HIDDEN;
    c.ll_slots = SLOTS;
    c.ll_mask_on_timeout = 1;
    t->self = self;
    for (int r = 0; r < self->ranks; r++)
        for (int e = 0; e < (r == self->rank ? 1 : EACH); e++)
            t->ids[topk++] = r * LOCAL + e;
    for (int i = topk; i < TOKENS * topk; i++)
        t->ids[i] = t->ids[i - topk];
    for (int row = 0; row < LOCAL * ROWS; row++)
        for (int h = 0; h < HIDDEN; h++)
            t->y[row][h] = bf16((float)(1 + self->rank));
    c.topk_max = (uint32_t)topk;
    if (!XT_OK(self, epx_buffer_create(self->group, &c, &t->buffer)))
        return false;
    XT_CHECK(self, net_of(t)->piece_bytes * 3 < sizeof(uint16_t[TOKENS * EACH][HIDDEN]), "few pieces");
    return true;
}

/* One half of call `n` (from 1). */
static epx_status_t half(trip_t *t, int which, uint32_t n)
{
    uint32_t ranks = (uint32_t)t->self->ranks;
    epx_ll_handle_t **handle = &t->handle[n % SLOTS];
    epx_ll_dispatch_t d = {.size = sizeof d, .x = t->x, .tokens = TOKENS, .hidden = HIDDEN, .topk_idx = t->ids};
    epx_ll_combine_t c = {.size = sizeof c, .x = t->y, .topk_idx = t->ids, .out = t->out, .weight_left = t->left};
    d.topk = 1 + (ranks - 1) * EACH;
    d.experts = LOCAL * ranks;
    d.recv_x = t->recv;
    d.recv_count = t->count;
    d.src_info = t->source;
    d.timeout_ms = c.timeout_ms = t->timeout_ms;
    epx_status_t status = EPX_OK;
    if (which == SEND) /* a rank that was given up says that it is done with the slot, but the word may be on its way */
        for (int i = 0; i < 5000 && (i == 0 || status == EPX_E_BUSY); i++) {
            usleep(i ? 1000 : 0);
            status = epx_ll_dispatch_send(t->buffer, &d, NULL, handle);
        }
    else if (which == RECV)
        status = epx_ll_dispatch_recv(*handle, NULL);
    else if (which == COMBINE_SEND)
        status = epx_ll_combine_send(*handle, &c, NULL);
    else
        status = epx_ll_combine_recv(*handle, NULL);
    return status == EPX_OK && kernels() ? epx_buffer_status(t->buffer) : status;
}

static bool halves(trip_t *t, int first, int last, uint32_t n)
{
    bool good = true;
    for (int which = first; good && which <= last; which++)
        good = XT_OK(t->self, half(t, which, n));
    return good;
}

/* `from`: bit r set: the outputs of rank r are in the sums; one's own always are. */
static void check_out(trip_t *t, unsigned from, const char *when)
{
    float sum = 0, weight = 0;
    for (int r = 0; r < t->self->ranks; r++) {
        float outputs = r == t->self->rank ? 1 : from >> r & 1 ? EACH : 0;
        sum += outputs * (float)(1 + r);
        weight += outputs;
    }
    for (int i = 0; i < TOKENS; i++) {
        int bad = 0;
        for (int h = 0; h < HIDDEN; h++)
            bad += t->out[i][h] != bf16(sum);
        XT_CHECK(t->self, t->left[i] == weight && bad == 0, "%s: token %d: weight %g, not %g; %d columns are not %g",
                 when, i, (double)t->left[i], (double)weight, bad, (double)sum);
    }
}

static void check_masked(trip_t *t, int rank)
{
    int32_t masked[RANKS_MOST] = {0};
    bool good = XT_OK(t->self, epx_ll_mask_get(t->buffer, masked));
    for (int r = 0; good && r < t->self->ranks; r++)
        XT_CHECK(t->self, masked[r] == (r == rank), "rank %d: masked is %d", r, masked[r]);
}

/* ---- standing still ---- */

/* Until all that this rank has pushed has been applied, and it knows. */
static void wait_applied(const trip_t *t)
{
    const epx__ll_net_t *net = net_of(t);
    for (int r = 0; r < t->self->ranks; r++) {
        const epx_port_channel_t *channel = epx__ll_net_channel(net, r);
        for (uint64_t ms = 0; r != t->self->rank && ms < PATIENT_MS && !epx__channels_applied(channel); ms++)
            usleep(1000);
        XT_CHECK(t->self, r == t->self->rank || epx__channels_applied(channel), "what was pushed is not applied");
    }
}

/* All ranks have done their part so far, and nothing is under way. */
static bool all_quiet(trip_t *t, int mark)
{
    wait_applied(t);
    xt_mark(t->self, mark);
    return xt_wait_mark(t->self, mark, t->self->ranks);
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

static bool wait_stands(const xt_rank_t *self, int rank)
{
    return atomic_load(&self->world->note[rank]) == 0 || wait_stopped((pid_t)atomic_load(&self->world->note[rank]));
}

static void finish(trip_t *t, int mark, int ranks)
{
    xt_mark(t->self, mark);
    xt_wait_mark(t->self, mark, ranks); /* or the others would wait for one that has gone */
    epx_buffer_destroy(t->buffer);
    free(t);
}

static trip_t *make(void)
{
    trip_t *t = aligned_alloc(64, (sizeof *t + 63) / 64 * 64);
    if (!t)
        exit(4);
    memset(t, 0, sizeof *t);
    return t;
}

/* ---- given up by who sends ---- */

/* Nothing is applied at rank 0: the others send it a piece, wait for it to be applied, and give it up. They get each
 * other's outputs all the same. */
static void body_sender(xt_rank_t *self)
{
    trip_t *t = make();
    unsigned others = (1u << self->ranks) - 2;
    bool good = trip_open(self, t) && halves(t, SEND, RECV, 1) && all_quiet(t, 0);
    if (self->rank == 0) {
        if (strncmp(getenv("EPX_NET"), "ofi", 3) == 0) {
            atomic_store(&self->world->note[0], getpid());
            xt_mark(self, 1);
            raise(SIGSTOP);
        } else {
            hold_proxies(t, true);
            xt_mark(self, 1);
            XT_CHECK(self, xt_wait_mark(self, 2, self->ranks - 1), "nobody gives it up");
            hold_proxies(t, false);
        }
        if (good && halves(t, COMBINE_SEND, COMBINE_RECV, 1))
            check_out(t, 0, "of whom it is given up");
        xt_mark(self, 3);
    } else {
        XT_CHECK(self, xt_wait_mark(self, 1, 1) && wait_stands(self, 0), "rank 0 does not stand still");
        t->timeout_ms = deadline_ms();
        uint64_t start = epx__now_ns();
        good = good && halves(t, COMBINE_SEND, COMBINE_SEND, 1);
        XT_CHECK(self, epx__now_ns() - start > deadline_ms() * 900000, "it was not waited for");
        check_masked(t, 0);
        if (good && halves(t, COMBINE_RECV, COMBINE_RECV, 1))
            check_out(t, others, "of those who give it up");
        xt_mark(self, 2);
        if (self->rank == 1 && atomic_load(&self->world->note[0]) && xt_wait_mark(self, 2, self->ranks - 1))
            kill((pid_t)atomic_load(&self->world->note[0]), SIGCONT);
        xt_wait_mark(self, 3, 1);
        t->timeout_ms = PATIENT_MS;
        for (uint32_t n = 2; good && n <= 2 * SLOTS + 1; n++)
            if ((good = halves(t, SEND, COMBINE_RECV, n)))
                check_out(t, others, "later");
    }
    finish(t, 4, self->ranks);
}

/* ---- given up by whom they are for ---- */

/* Rank 0 stands in the way of its own outputs: a piece has come, and rank 1 waits with the next. It gives up rank 1,
 * then lets the rest come: before it uses the slot again. */
static void body_owner(xt_rank_t *self)
{
    trip_t *t = make();
    bool good = trip_open(self, t) && halves(t, SEND, RECV, 1);
    if (self->rank == 0) {
        t->timeout_ms = deadline_ms(); /* of both halves */
        good = good && halves(t, COMBINE_SEND, COMBINE_SEND, 1) && all_quiet(t, 0);
        hold_proxies(t, true);
        xt_mark(self, 1);
        if (good && halves(t, COMBINE_RECV, COMBINE_RECV, 1))
            check_out(t, 0, "who gives up");
        check_masked(t, 1);
        t->timeout_ms = PATIENT_MS;
        hold_proxies(t, false);
        for (uint32_t n = 2; good && n <= 2 * SLOTS + 1; n++)
            if ((good = halves(t, SEND, COMBINE_RECV, n)))
                check_out(t, 0, "later");
    } else {
        good = good && all_quiet(t, 0);
        XT_CHECK(self, xt_wait_mark(self, 1, 1), "rank 0 does not come so far");
        if (good && halves(t, COMBINE_SEND, COMBINE_RECV, 1))
            check_out(t, 1, "who is given up");
    }
    finish(t, 2, self->ranks);
}

/* ---- death ---- */

/* As above, but rank 1 is killed while it waits. */
static void body_killed(xt_rank_t *self)
{
    trip_t *t = make();
    bool good = trip_open(self, t) && halves(t, SEND, RECV, 1);
    if (self->rank == 1) {
        atomic_store(&self->world->note[1], getpid());
        good = good && all_quiet(t, 0);
        xt_wait_mark(self, 1, 1);
        xt_mark(self, 2);
        halves(t, COMBINE_SEND, COMBINE_SEND, 1);
        XT_CHECK(self, false, "it has not been killed");
        return;
    }
    good = good && halves(t, COMBINE_SEND, COMBINE_SEND, 1) && all_quiet(t, 0);
    hold_proxies(t, true);
    xt_mark(self, 1);
    XT_CHECK(self, xt_wait_mark(self, 2, 1), "rank 1 does not come so far");
    usleep(200000); /* it has put a piece by now */
    kill((pid_t)atomic_load(&self->world->note[1]), SIGKILL);
    hold_proxies(t, false);
    if (good && halves(t, COMBINE_RECV, COMBINE_RECV, 1))
        check_out(t, 0, "after the death");
    for (uint32_t n = 2; good && n <= 2 * SLOTS + 1; n++)
        if ((good = halves(t, SEND, COMBINE_RECV, n)))
            check_out(t, 0, "later");
    check_masked(t, 1);
    finish(t, 3, 1);
}

/* ---- main ---- */

static bool here(const char *spec)
{
    epx__net_config_t config = {.address = "127.0.0.1", .peers_max = 1, .puts_max = 16, .notices_max = 16};
    epx__net_t *net = NULL;
    bool there = !getenv("EPX_TEST_THREADS") && epx__net_open(spec, &config, &net) == EPX_OK;
    if (!there)
        printf("%s: not here\n", spec);
    epx__net_close(net);
    return there;
}

static const char *part = "";

static void run(const char *name, const char *net, int ranks, void (*body)(xt_rank_t *), uint64_t may_die)
{
    char text[128];
    snprintf(text, sizeof text, "%s, %s", name, net);
    if (!strstr(text, part))
        return;
    setenv("EPX_NET", net, 1);
    xt_run_t r = {.name = text, .ranks = ranks, .processes = strncmp(net, "ofi", 3) == 0, .threads = 1, .body = body};
    r.ranks_per_domain = 1;
    r.may_die = may_die;
    xt_run(&r);
}

int main(int argc, char **argv)
{
    static const char *const nets[] = {"loop", "sim:3", "ofi:tcp"};
    part = argc > 1 ? argv[1] : "";
    for (size_t i = 0; i < sizeof nets / sizeof *nets; i++) {
        bool processes = strncmp(nets[i], "ofi", 3) == 0;
        if (processes && !here(nets[i]))
            continue;
        run("two give up the third", nets[i], 3, body_sender, 0);
        run("who waits gives up", nets[i], 2, body_owner, 0);
        if (processes && !kernels()) /* kernels do not outlive a death: the buffer fails */
            run("killed", nets[i], 2, body_killed, 2);
    }
    return xt_done();
}
