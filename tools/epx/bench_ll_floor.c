/*
 * The floor of low latency: the same rows moved to the same places, all places known, nothing announced or waited for.
 * Its parts are the memory's own floors (mem.h) on lists made here:
 *
 *   copies   each token's row once to every rank that wants it
 *   spread   the rows that came, each to its place with every local expert that wants it          CPU only
 *   push     each expert's output back to its owner; pre-reduced: the sum of a rank's outputs
 *   sum      each own token's sum of what came back                                                CPU only
 *
 * CPU, fp8: a token is quantised once before the copies; its scales are not copied. Weights are left out of the sums,
 * and of pre-reduced ones on GPUs the sums too: a floor may do less than the library, never more. On GPUs, where the
 * local copies and sums run beside the links, the links' part alone counts; rows are cut in pieces to keep all SMs
 * busy.
 *
 * On the CPU each rank's shared area holds, twice, the rows that are dispatched to it and then [token][k] rows that
 * come back. Runs use the two in turn: what a run spreads and adds came in the one before it, so nobody reads what
 * others are writing.
 */
#include "bench_ll_floor.h"

#include "numbers.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What moves in one run. */
typedef struct turn {
    uint8_t **rows_area, **back_area; /* [ranks] */
    ll_part_t copies, spread, push, sum;
} turn_t;

typedef struct ll_floor {
    bench_ll_t *ll;
    const mem_ops_t *mem;
    turn_t turn[2]; /* GPU: the first alone */
    uint64_t runs;
    uint8_t *one[2];    /* areas of a list with one place alone: recv_x, y */
    uint8_t *quantised; /* CPU, fp8: [tokens][hidden] */
    float *scales;
    bool cpu;
    char name[96];
} ll_floor_t;

static _Thread_local char words[256];

static const char *floor_words(void)
{
    return words;
}

static int fail(const char *text)
{
    snprintf(words, sizeof words, "%s", text);
    return 1;
}

static size_t back_bytes(const bench_t *bench, int rank)
{
    return (bench->work.tokens[rank] * (size_t)bench->work.topk * bench->row_bytes + 4095) / 4096 * 4096;
}

size_t bench_ll_floor_bytes(const bench_t *bench, int rank)
{
    return 2 * (bench_floor_rows_bytes(bench, rank) + back_bytes(bench, rank));
}

/* ---- opening ---- */

static int part_open(ll_floor_t *self, ll_part_t *part, const void *x, size_t row_bytes)
{
    bench_rank_t *rank = self->ll->self;
    floor_plan_t plan = {.rank = rank->rank->rank,
                         .ranks = (int)part->slots, /* of a list; on GPUs the ranks too, and the same */
                         .threads = 1,              /* low latency on the CPU is the calling thread */
                         .tokens = part->items,
                         .dst_rank = part->dst_rank,
                         .dst_row = part->dst_row,
                         .recv_rows = part->rows,
                         .row_bytes = row_bytes,
                         .hidden = (uint32_t)(row_bytes / 2),
                         .format = PATTERN_BF16,
                         .x = x,
                         .area = part->area,
                         .out = part->kind == FLOOR_COMBINE ? part->out : NULL,
                         .allgather = rank_allgather,
                         .allgather_context = rank->rank};
    if (self->cpu && part->items == 0)
        return 0;
    return self->mem->floor_open(rank->context, &plan, &part->floor) ? fail(self->mem->words()) : 0;
}

static int find_areas(ll_floor_t *self)
{
    const bench_t *bench = self->ll->self->bench;
    size_t ranks = (size_t)bench->work.ranks;
    for (size_t i = 0; i < 2; i++) {
        turn_t *turn = &self->turn[i];
        turn->rows_area = calloc(ranks, sizeof *turn->rows_area);
        turn->back_area = calloc(ranks, sizeof *turn->back_area);
        if (!turn->rows_area || !turn->back_area)
            return fail("no memory for the floor");
        for (size_t r = 0; r < ranks && bench->floor_area[r]; r++) {
            turn->rows_area[r] = bench->floor_area[r] + i * bench_ll_floor_bytes(bench, (int)r) / 2;
            turn->back_area[r] = turn->rows_area[r] + bench_floor_rows_bytes(bench, (int)r);
        }
    }
    return 0;
}

/* `other`: the turn whose rows this one spreads and adds. */
static int open_cpu(ll_floor_t *self, turn_t *turn, turn_t *other)
{
    bench_rank_t *rank = self->ll->self;
    size_t bytes = rank->bench->row_bytes, sent = self->ll->fp8 ? bytes / 2 : bytes;
    bool reduced = rank->bench->options.pre_reduced;
    if (ll_part_copies(&turn->copies, self->ll, 1) || ll_part_places(&turn->spread, self->ll, FLOOR_DISPATCH) ||
        (reduced ? ll_part_reduced_push(&turn->push, self->ll, turn->back_area)
                 : ll_part_push(&turn->push, self->ll, 1)) ||
        ll_part_sum(&turn->sum, self->ll))
        return fail("no memory for the floor's lists");
    turn->copies.area = turn->rows_area;
    turn->spread.area = &self->one[0];
    turn->push.area = reduced ? &self->one[1] : turn->back_area;
    turn->sum.area = other->back_area;
    return part_open(self, &turn->copies, self->ll->fp8 ? self->quantised : rank->x, sent) ||
           part_open(self, &turn->spread, other->rows_area[rank->rank->rank], sent) ||
           part_open(self, &turn->push, rank->y, bytes) || part_open(self, &turn->sum, rank->y, bytes);
}

static int get_quantised(ll_floor_t *self)
{
    const bench_rank_t *rank = self->ll->self;
    size_t hidden = (size_t)rank->bench->options.hidden;
    if (!self->ll->fp8 || !self->cpu)
        return 0;
    self->quantised = aligned_alloc(256, (rank->tokens * hidden + 511) / 256 * 256);
    self->scales = malloc((hidden / 128 + 1) * sizeof *self->scales);
    if (!self->quantised || !self->scales)
        return fail("no memory for the floor's rows");
    memset(self->quantised, 0, rank->tokens * hidden);
    return 0;
}

static int open_gpu(ll_floor_t *self)
{
    bench_rank_t *rank = self->ll->self;
    turn_t *turn = &self->turn[0];
    size_t sent = rank->bench->floor_row_bytes, back = rank->bench->row_bytes, pieces = 4;
    while (pieces > 1 && (sent % (16 * pieces) || back % (16 * pieces)))
        pieces /= 2;
    if (ll_part_copies(&turn->copies, self->ll, pieces) || ll_part_push(&turn->push, self->ll, pieces))
        return fail("no memory for the floor's lists");
    return part_open(self, &turn->copies, rank->x, sent / pieces) ||
           part_open(self, &turn->push, rank->y, back / pieces);
}

/* ---- the table ---- */

static void ll_floor_close(void *context)
{
    ll_floor_t *self = context;
    if (!self)
        return;
    for (size_t i = 0; i < 2; i++) {
        turn_t *turn = &self->turn[i];
        ll_part_t *const parts[] = {&turn->push, &turn->copies, &turn->spread, &turn->sum};
        for (size_t j = 0; j < sizeof parts / sizeof *parts; j++) {
            if (parts[j]->floor)
                self->mem->floor_close(parts[j]->floor);
            ll_part_fini(parts[j]);
        }
        free(turn->rows_area);
        free(turn->back_area);
    }
    free(self->quantised);
    free(self->scales);
    free(self);
}

/* How rows go to other ranks, times (CPU) how the rest goes. */
static int ways(const ll_floor_t *self)
{
    return self->mem->floor_variants(NULL, FLOOR_DISPATCH);
}

static int ll_variants(void *context, floor_kind_t kind)
{
    const ll_floor_t *self = context;
    (void)kind;
    return ways(self) * (self->cpu ? self->mem->floor_variants(NULL, FLOOR_COMBINE) : 1);
}

static const char *ll_variant_name(void *context, floor_kind_t kind, int variant)
{
    ll_floor_t *self = context;
    int way = variant % ways(self);
    const char *first = self->mem->floor_variant_name(NULL, FLOOR_DISPATCH, way);
    (void)kind;
    if (self->cpu)
        snprintf(self->name, sizeof self->name, "%s, then %s", first,
                 self->mem->floor_variant_name(NULL, FLOOR_DISPATCH, variant / ways(self)));
    else
        snprintf(self->name, sizeof self->name, "%s", first);
    return self->name;
}

static int run_part(const ll_floor_t *self, const ll_part_t *part, int way)
{
    int most = self->cpu ? self->mem->floor_variants(NULL, part->kind) - 1 : way;
    if (!part->floor)
        return 0;
    return self->mem->floor_run(part->floor, part->kind, way < most ? way : most) ? fail(self->mem->words()) : 0;
}

static inline __attribute__((always_inline)) void quantise_all(const ll_floor_t *self)
{
    const bench_rank_t *rank = self->ll->self;
    size_t hidden = (size_t)rank->bench->options.hidden;
    for (uint32_t t = 0; t < rank->tokens; t++)
        for (size_t b = 0; b < hidden / NUMBER_FP8_BLOCK; b++)
            number_fp8_block((const uint16_t *)rank->x + t * hidden + b * NUMBER_FP8_BLOCK,
                             self->quantised + t * hidden + b * NUMBER_FP8_BLOCK, &self->scales[b]);
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bw,avx512vl"))) static void quantise_512(const ll_floor_t *self)
{
    quantise_all(self);
}

__attribute__((target("avx2"))) static void quantise_256(const ll_floor_t *self)
{
    quantise_all(self);
}
#endif

static void quantise(const ll_floor_t *self)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        quantise_512(self);
        return;
    }
    if (__builtin_cpu_supports("avx2")) {
        quantise_256(self);
        return;
    }
#endif
    quantise_all(self);
}

static int ll_run(void *context, floor_kind_t kind, int variant)
{
    ll_floor_t *self = context;
    const turn_t *turn = &self->turn[self->cpu ? self->runs++ % 2 : 0];
    int way = variant % ways(self), rest = variant / ways(self);
    if (kind != FLOOR_COMBINE && self->quantised)
        quantise(self);
    if (kind != FLOOR_COMBINE && (run_part(self, &turn->copies, way) || run_part(self, &turn->spread, rest)))
        return 1;
    return kind != FLOOR_DISPATCH && (run_part(self, &turn->push, way) || run_part(self, &turn->sum, rest));
}

static const floor_ops_t ll_floor_ops = {ll_variants, ll_variant_name, ll_run, ll_floor_close, floor_words};

int bench_ll_floor_open(bench_ll_t *ll)
{
    bench_rank_t *rank = ll->self;
    if (rank->bench->options.no_floor || rank->info.domains > 1)
        return 0;
    ll_floor_t *self = calloc(1, sizeof *self);
    if (!self)
        return rank_fail(rank->rank, "no memory for the floor");
    *self = (ll_floor_t){.ll = ll, .mem = rank->mem, .cpu = rank->info.backend == EPX_BACKEND_CPU};
    self->one[0] = ll->recv_x;
    self->one[1] = rank->y;
    int failed = find_areas(self) || get_quantised(self);
    for (int i = 0; i < 2 && self->cpu && !failed; i++)
        failed = open_cpu(self, &self->turn[i], &self->turn[1 - i]);
    if (!self->cpu && !failed)
        failed = open_gpu(self);
    if (failed) {
        ll_floor_close(self);
        return rank_fail(rank->rank, "the floor: %s", words);
    }
    rank->floor_ops = ll_floor_ops;
    rank->floor = self;
    return 0;
}
