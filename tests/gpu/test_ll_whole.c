/*
 * Rows that come while their rank is given up, on a buffer that masks by deadline: each is there in all its columns, or
 * in none, and weight_left says which. A row is added, or spread, in pieces by different warps, each of which looks for
 * itself whether it has come.
 *
 *     PROGRAM [rounds]
 *
 * A round is a call with a deadline of about the time that its rows take, then one with all the time in the world,
 * which must be right in the same slot. Weights are powers of two and outputs 1, so that a token's sum says whose
 * outputs are in it. How many were left out depends on the machine: a round is no proof, many rounds find it.
 */
#include "gpu/memory_cuda.h"

#include <epx/ll.h>

#include <unistd.h>

#ifdef GPU_EMULATED /* a call takes some 10 ms */
enum { RANKS = 3, TOKENS = 48, HIDDEN = 4096, DEADLINE_MS = 40, ROUNDS = 24 };
#else
enum { RANKS = 3, TOKENS = 128, HIDDEN = 7168, DEADLINE_MS = 2, ROUNDS = 200 };
#endif
enum { HERE = 2, TOPK = RANKS * HERE, ROWS = RANKS * TOKENS, SCALES = HIDDEN / 128, PATIENT_MS = 60000 };

/* What a round leaves impatient: combine, its outputs by choice or by rank, or dispatch, its rows bf16 or fp8. */
enum { BY_CHOICE, BY_RANK, BF16, FP8, KINDS };

typedef struct world {
    xt_rank_t *self;
    epx_buffer_t *buffer;
    epx_ll_handle_t *handle;
    void *ids, *weights, *x, *y, *recv, *scales, *count, *src, *out, *left; /* the device's */
    int64_t ids_host[TOKENS * TOPK];
    float weights_host[TOKENS * TOPK], left_host[TOKENS], scales_host[HERE][SCALES][ROWS];
    uint16_t rows[HERE * ROWS][HIDDEN]; /* host: inputs, then what came */
    int32_t count_host[HERE];
    long lost, came; /* in impatient halves */
} world_t;

static uint16_t bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)(bits >> 16); /* small whole numbers: exact */
}

static void *device(const world_t *w, const void *host, size_t bytes)
{
    void *memory = w->self->memory->alloc(bytes);
    if (!memory)
        exit(4);
    w->self->memory->put(memory, host, bytes);
    return memory;
}

static bool open(world_t *w)
{
    epx_buffer_config_t c = {.size = sizeof c, .lease_bytes = 1u << 16, .reserve_bytes = 1u << 16, .tokens_max = 4};
    c.topk_max = TOPK;
    c.experts_max = RANKS * HERE;
    c.handles_max = 1;
    c.timeout_ms = PATIENT_MS;
    c.ll_tokens_max = TOKENS;
    c.ll_hidden_max = HIDDEN;
    c.ll_slots = 1;
    c.ll_mask_on_timeout = 1;
    for (int i = 0; i < TOKENS * TOPK; i++) { /* every token chooses every expert */
        w->ids_host[i] = i % TOPK;
        w->weights_host[i] = (float)(1 << i % TOPK);
    }
    for (int row = 0; row < HERE * ROWS; row++)
        for (int h = 0; h < HIDDEN; h++)
            w->rows[row][h] = bf16(1);
    w->ids = device(w, w->ids_host, sizeof w->ids_host);
    w->weights = device(w, w->weights_host, sizeof w->weights_host);
    w->x = device(w, w->rows, TOKENS * sizeof *w->rows);
    w->y = device(w, w->rows, sizeof w->rows);
    w->recv = device(w, w->rows, sizeof w->rows);
    w->scales = device(w, w->scales_host, sizeof w->scales_host);
    w->count = device(w, w->count_host, sizeof w->count_host);
    w->src = device(w, w->rows, sizeof(int32_t) * HERE * ROWS);
    w->out = device(w, w->rows, TOKENS * sizeof *w->rows);
    w->left = device(w, w->left_host, sizeof w->left_host);
    return XT_OK(w->self, epx_buffer_create(w->self->group, &c, &w->buffer));
}

static void close_world(world_t *w)
{
    void *all[] = {w->ids, w->weights, w->x, w->y, w->recv, w->scales, w->count, w->src, w->out, w->left};
    epx_buffer_destroy(w->buffer);
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        w->self->memory->free(all[i]);
}

/* ---- what came ---- */

/* Received row `row` of local expert `e`: every token's elements are equal, and so are what they become. */
static void check_row(world_t *w, int kind, int e, int row)
{
    bool fp8 = kind == FP8, whole = true;
    size_t bytes = fp8 ? HIDDEN : 2 * HIDDEN;
    const char *at = (const char *)w->rows + (size_t)(e * ROWS + row) * bytes;
    float scale = w->scales_host[e][0][row];
    whole = memcmp(at, at + 2, bytes - 2) == 0;
    for (int b = 0; fp8 && b < SCALES; b++)
        whole = whole && w->scales_host[e][b][row] == scale;
    uint16_t first;
    memcpy(&first, at, 2);
    whole = whole && (!fp8 || (first != 0) == (scale != 0));
    XT_CHECK(w->self, whole, "kind %d: expert %d: row %d is there in part", kind, e, row);
    w->lost += first == 0;
    w->came += first != 0;
}

static void check_rows(world_t *w, int kind, bool patient)
{
    xt_rank_t *self = w->self;
    self->memory->get(w->count_host, w->count, sizeof w->count_host);
    self->memory->get(w->rows, w->recv, sizeof w->rows);
    self->memory->get(w->scales_host, w->scales, sizeof w->scales_host);
    long lost = w->lost, came = w->came;
    for (int e = 0; e < HERE; e++) {
        XT_CHECK(self, w->count_host[e] >= TOKENS && w->count_host[e] <= ROWS, "%d rows", w->count_host[e]);
        for (int row = 0; row < w->count_host[e] && row < ROWS; row++)
            check_row(w, kind, e, row);
    }
    if (patient) {
        XT_CHECK(self, w->lost == lost && w->came - came == HERE * ROWS, "rows are missing");
        w->came = came;
    }
}

static void check_sums(world_t *w, int kind, bool patient)
{
    xt_rank_t *self = w->self;
    int all = (1 << TOPK) - 1, both = (1 << HERE) - 1, own = both << HERE * self->rank;
    self->memory->get(w->rows, w->out, TOKENS * sizeof *w->rows);
    self->memory->get(w->left_host, w->left, sizeof w->left_host);
    for (int t = 0; t < TOKENS; t++) {
        int from = (int)w->left_host[t], bad = 0;
        for (int h = 0; h < HIDDEN; h++)
            bad += w->rows[t][h] != bf16((float)from);
        XT_CHECK(self, bad == 0, "kind %d: token %d: %d columns are not the sum of %#x, as weight_left says", kind, t,
                 bad, from);
        XT_CHECK(self, (from & own) == own && from <= all && (!patient || from == all), "token %d: %#x", t, from);
        for (int r = 0; kind == BY_RANK && r < RANKS; r++) {
            int here = from >> HERE * r & both;
            XT_CHECK(self, here == 0 || here == both, "token %d: one row of rank %d, counted as %#x", t, r, here);
        }
        w->lost += !patient && from != all;
        w->came += !patient && from == all;
    }
}

/* ---- calls ---- */

static bool call(world_t *w, int kind, uint64_t dispatch_ms, uint64_t combine_ms, uint64_t delay_us)
{
    xt_rank_t *self = w->self;
    bool patient = dispatch_ms == PATIENT_MS && combine_ms == PATIENT_MS;
    epx_ll_dispatch_t d = {.size = sizeof d, .x = w->x, .tokens = TOKENS, .hidden = HIDDEN, .topk_idx = w->ids};
    epx_ll_combine_t c = {.size = sizeof c, .x = w->y, .topk_idx = w->ids, .out = w->out, .weight_left = w->left};
    d.topk = TOPK;
    d.experts = RANKS * HERE;
    d.topk_weights = c.topk_weights = w->weights;
    d.format = kind == FP8 ? EPX_LL_FP8 : EPX_LL_BF16;
    d.recv_x = w->recv;
    d.recv_scales = kind == FP8 ? w->scales : NULL;
    d.recv_count = w->count;
    d.src_info = w->src;
    d.timeout_ms = dispatch_ms;
    c.timeout_ms = combine_ms;
    c.pre_reduced = kind == BY_RANK;
    if (dispatch_ms != PATIENT_MS)
        usleep((useconds_t)delay_us);
    bool good = XT_OK(self, epx_ll_dispatch(w->buffer, &d, self->memory->stream(), &w->handle));
    if (!good)
        return false;
    if (patient || dispatch_ms != PATIENT_MS)
        check_rows(w, kind, patient);
    if (combine_ms != PATIENT_MS)
        usleep((useconds_t)delay_us);
    good = XT_OK(self, epx_ll_combine(w->handle, &c, self->memory->stream()));
    if (good)
        check_sums(w, kind, patient);
    return good && XT_OK(self, epx_buffer_status(w->buffer));
}

static bool meet(xt_rank_t *self, int *times)
{
    xt_mark(self, 0);
    bool all = xt_wait_mark(self, 0, ++*times * RANKS);
    XT_CHECK(self, all, "the others do not come");
    return all;
}

static int rounds = ROUNDS;

static void body(xt_rank_t *self)
{
    world_t *w = calloc(1, sizeof *w);
    int times = 0;
    if (!w)
        exit(4);
    w->self = self;
    bool good = open(w) && call(w, BY_CHOICE, PATIENT_MS, PATIENT_MS, 0);
    for (int i = 0; i < rounds && good; i++) {
        int kind = i % KINDS;
        uint64_t ms = 1 + xt_mix(self->world->note[0], (uint64_t)i, 1, 0) % DEADLINE_MS; /* alike at all ranks */
        bool in_dispatch = kind >= BF16, late = in_dispatch || i / KINDS % RANKS == self->rank;
        good = meet(self, &times) && call(w, kind, in_dispatch ? ms : PATIENT_MS, in_dispatch ? PATIENT_MS : ms,
                                          late ? xt_random(self, (uint32_t)(2000 * ms)) : 0);
        good = meet(self, &times) && good;
        for (int r = 0; good && r < RANKS; r++)
            good = r == self->rank || XT_OK(self, epx_ll_mask_set(w->buffer, r, 0, self->memory->stream()));
        good = good && call(w, kind, PATIENT_MS, PATIENT_MS, 0);
    }
    printf("rank %d: of rows and tokens %ld came whole, %ld not\n", self->rank, w->came, w->lost);
    meet(self, &times);
    close_world(w);
    free(w);
}

int main(int argc, char **argv)
{
    rounds = argc > 1 ? atoi(argv[1]) : ROUNDS;
    xt_run_t r = {.name = "whole", .ranks = RANKS, .threads = 1, .body = body, .seed = 47};
    xt_run(&r);
    return xt_done();
}
