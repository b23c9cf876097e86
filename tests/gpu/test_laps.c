/*
 * Rows that pass a stuck one in a ring, by more batches than there are progress words: the words of the batches that
 * are ahead must not speak for those behind, which share them.
 *
 * S sends its first tokens to Y, as many as Y's ring holds; the next one to X and to Y; all others to X. Y is held up
 * before it takes anything, so a warp of S waits for room at Y with row 0 for X in its hands, while the others go on.
 * Nothing may reach X under a word that says that row 0 is there too. What is counted: every row by source and token.
 *
 * Held up is Y's thread, in which emulated kernels run (tests/emulate). On a GPU it holds up nothing but the host, so
 * there the test says only that such shapes arrive.
 */
#include "gpu/memory_cuda.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { S, X, Y, RANKS };
enum { HELD, OVER };

/*
 * Rings of 6 rows, a batch each; 4 of them are used: what divides 256. Row 0 for X holds up rows 6, 12, 18, ..., each
 * with the warp that has it; row 256 is none of them. A warp's first two tokens are its own: with 132 warps, a multiple
 * of 6 and of 4, all that a stuck warp has is among those rows. So it is with 132 warps of X that copy out, beside as
 * many for Y. (Emulated, a block has 11 warps; of three ranks' n blocks 27 n / 59 send.)
 */
#define ROW 1280u
#define RESERVE (5u * 4096u)
#define BEYOND 258u /* rows for X */
#define TOKENS_MAX 264u

static const int sms[RANKS] = {[S] = 27, [X] = 44, [Y] = 3};

typedef struct laps {
    const char *name;
    uint32_t ring; /* tokens that go to Y alone */
} laps_t;

static const laps_t all_laps[] = {{"a ring of 6 batches", 6}, {"a ring of 4 batches", 4}};

/* ---- holding Y up ---- */

#ifdef GPU_EMULATED
static xt_rank_t *held;                        /* all ranks are threads */
static const volatile uint32_t *volatile at_x; /* X's rows, host memory */
static const uint32_t nothing = 0xeeeeeeeeu;

static void nap(long ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

/* In Y's thread, so that nothing of Y's runs: until nothing more comes to X, but 10 s at most. */
static void hold(int signal)
{
    uint32_t before = 0, still = 0;
    (void)signal;
    xt_mark(held, HELD);
    for (uint32_t naps = 0; naps < 250 && still < 60; naps++) {
        uint32_t rows = 0;
        nap(40);
        for (uint32_t i = 0; at_x && i < TOKENS_MAX; i++)
            rows += at_x[i * (ROW / 4)] != nothing;
        still = rows && rows == before ? still + 1 : 0;
        before = rows;
    }
    printf("held up until X had %u rows\n", before);
}

/* When Y's kernel has said where its rows go, and waits for them. */
static void *hold_soon(void *thread)
{
    nap(300);
    pthread_kill(*(const pthread_t *)thread, SIGUSR1);
    return NULL;
}
#endif

/* Rank Y, just before its rows. */
static void be_held(xt_rank_t *self)
{
#ifdef GPU_EMULATED
    static pthread_t me;
    pthread_t other;
    struct sigaction action = {.sa_handler = hold, .sa_flags = SA_RESTART};
    me = pthread_self();
    held = self;
    if (sigaction(SIGUSR1, &action, NULL) != 0 || pthread_create(&other, NULL, hold_soon, &me) != 0)
        exit(3);
    pthread_detach(other);
#else
    xt_mark(self, HELD);
#endif
}

/* ---- rows ---- */

static uint32_t goes_to(const laps_t *l, uint32_t token)
{
    return token < l->ring ? 1u << Y : token == l->ring ? 1u << X | 1u << Y : 1u << X;
}

static void fill_row(uint32_t *row, uint32_t source, uint32_t token)
{
    for (uint32_t i = 0; i < ROW / 4; i++)
        row[i] = (uint32_t)xt_mix(source, token, i, 5);
}

/* Device memory: what S sends, and where. */
static void make_tokens(xt_rank_t *self, const laps_t *l, uint32_t tokens, void *x, void *ids)
{
    uint32_t *rows = malloc((size_t)tokens * ROW + 4);
    int32_t(*choices)[2] = malloc(tokens * sizeof *choices + 4);
    if (!rows || !choices)
        exit(3);
    for (uint32_t t = 0; t < tokens; t++) {
        uint32_t to = goes_to(l, t);
        fill_row(rows + (size_t)t * (ROW / 4), S, t);
        choices[t][0] = to >> X & 1 ? X : Y;
        choices[t][1] = to == (1u << X | 1u << Y) ? Y : -1;
    }
    self->memory->put(x, rows, (size_t)tokens * ROW);
    self->memory->put(ids, choices, tokens * sizeof *choices);
    free(rows);
    free(choices);
}

/* All rows are of S, those of its tokens that go here, in order. */
static void check_rows(xt_rank_t *self, const laps_t *l, uint32_t tokens, const epx_received_t *r, uint32_t rows)
{
    uint32_t *x = malloc((size_t)rows * ROW + 4), want[ROW / 4], at = 0, wrong = 0, astray = 0, first = 0;
    int32_t *source = malloc(4ull * rows + 4);
    if (!x || !source)
        exit(3);
    self->memory->get(x, r->x, (size_t)rows * ROW);
    self->memory->get(source, r->src_token, 4ull * rows);
    for (uint32_t t = 0; t < tokens; t++) {
        if (!(goes_to(l, t) >> self->rank & 1) || at == rows)
            continue;
        fill_row(want, S, t);
        bool same = memcmp(x + (size_t)at * (ROW / 4), want, ROW) == 0;
        first = wrong || same ? first : at;
        wrong += !same;
        astray += source[at] != (int32_t)t;
        at++;
    }
    XT_CHECK(self, at == rows && wrong == 0, "%u of %u rows are wrong, the first is row %u", wrong, rows, first);
    XT_CHECK(self, astray == 0, "the tokens of %u of %u rows are wrong", astray, rows);
    free(x);
    free(source);
}

/* ---- a rank ---- */

static void exchange(xt_rank_t *self, const laps_t *l, epx_buffer_t *buffer)
{
    const xt_memory_t *m = self->memory;
    uint32_t tokens = self->rank == S ? l->ring + BEYOND : 0;
    void *x = m->alloc((size_t)TOKENS_MAX * ROW), *ids = m->alloc(TOKENS_MAX * 8);
    epx_dispatch_t d = {.size = sizeof d, .rows = {.x = x, .row_bytes = ROW}, .tokens = tokens, .topk_idx = ids};
    epx_place_t place = {.x = m->alloc((size_t)TOKENS_MAX * ROW), .src_token = m->alloc(4ull * TOKENS_MAX)};
    epx_counts_t counts = {.size = sizeof counts};
    epx_received_t received = {.size = sizeof received};
    epx_handle_t *handle = NULL;
    d.topk_idx_bits = 32;
    d.topk = 2;
    d.experts = RANKS;
    d.sms = sms[self->rank];
    make_tokens(self, l, tokens, x, ids);
    m->fill(place.x, 0xee, (size_t)TOKENS_MAX * ROW);
    bool good = XT_OK(self, epx_dispatch_begin(buffer, &d, m->stream(), &handle)) &&
                XT_OK(self, epx_handle_counts(handle, &counts));
#ifdef GPU_EMULATED
    if (self->rank == X)
        at_x = place.x;
#endif
    if (self->rank == Y)
        be_held(self);
    if (good && self->rank == S)
        good = xt_wait_mark(self, HELD, 1);
    good = good && XT_OK(self, epx_dispatch_end(handle, &place, m->stream(), &received));
    if (good)
        check_rows(self, l, l->ring + BEYOND, &received, counts.rows);
    XT_OK(self, epx_buffer_status(buffer));
    epx_handle_release(handle, m->stream());
#ifdef GPU_EMULATED
    if (self->rank == X)
        at_x = NULL;
#endif
    m->free(x);
    m->free(ids);
    m->free(place.x);
    m->free(place.src_token);
}

static void body(xt_rank_t *self)
{
    const laps_t *l = self->context;
    epx_buffer_t *buffer = NULL;
    epx_buffer_config_t config = {.size = sizeof config, .lease_bytes = 1u << 20, .handles_max = 2, .leases_max = 4};
    config.reserve_bytes = RESERVE;
    config.tokens_max = TOKENS_MAX;
    config.timeout_ms = 60000; /* longer than Y is held up */
    config.topk_max = 2;
    config.experts_max = RANKS;
    if (XT_OK(self, epx_buffer_create(self->group, &config, &buffer)))
        exchange(self, l, buffer);
    xt_mark(self, OVER);
    xt_wait_mark(self, OVER, RANKS);
    epx_buffer_destroy(buffer);
}

int main(void)
{
    for (size_t i = 0; i < sizeof all_laps / sizeof *all_laps; i++) {
        laps_t l = all_laps[i];
        xt_run_t r = {.name = l.name, .ranks = RANKS, .threads = 1, .body = body, .context = &l, .seed = 51};
        r.ranks_per_domain = RANKS;
        xt_run(&r);
    }
    return xt_done();
}
