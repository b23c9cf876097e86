/* The loop that times an operation and its floor, in turn, by the slowest rank. */
#include "bench.h"

#include <stdio.h>

enum { BLOCK = 5 };

static int time_call(bench_rank_t *self, const bench_timed_t *timed, double *us)
{
    if (timed->ready && timed->ready(self, timed->call))
        return 1;
    if (self->mem->chill(self->context) || self->mem->sync(self->context))
        return rank_fail(self->rank, "%s", self->mem->words());
    if (rank_barrier(self->rank) || self->mem->time_start(self->context))
        return 1;
    if (timed->run(self, timed->call))
        return 1;
    if (self->mem->time_stop(self->context, us))
        return rank_fail(self->rank, "%s", self->mem->words());
    *us /= timed->calls;
    timed->end(self, timed->call);
    rank_step(self->rank);
    return 0;
}

/* As often in a row as one run of the operation has calls. */
static int time_floor(bench_rank_t *self, const bench_timed_t *timed, int variant, double *us)
{
    if (self->mem->chill(self->context) || self->mem->sync(self->context))
        return rank_fail(self->rank, "%s", self->mem->words());
    if (rank_barrier(self->rank) || self->mem->time_start(self->context))
        return 1;
    int failed = 0;
    for (int i = 0; i < timed->calls && !failed; i++)
        failed = self->floor_ops.run(self->floor, timed->floor_kind, variant);
    if (failed || self->mem->time_stop(self->context, us))
        return rank_fail(self->rank, "the floor: %s", self->floor_ops.words());
    *us /= timed->calls;
    return 0;
}

/* The variant whose median over some passes of the slowest rank is least; all ranks find the same. */
static int best_variant(bench_rank_t *self, const bench_timed_t *timed, int *best)
{
    floor_kind_t kind = timed->floor_kind;
    char *name = self->bench->result->floor_name[timed->op];
    double least = 0;
    for (int variant = 0; variant < self->floor_ops.variants(self->floor, kind); variant++) {
        double slowest[BLOCK], all[RANKS_MAX];
        for (int pass = -1; pass < BLOCK; pass++) { /* one to warm up */
            double us;
            if (time_floor(self, timed, variant, &us) || rank_allgather(self->rank, &us, sizeof us, all))
                return 1;
            double most = 0;
            for (int r = 0; r < self->rank->ranks; r++)
                most = all[r] > most ? all[r] : most;
            int at = pass;
            for (; at > 0 && slowest[at - 1] > most; at--)
                slowest[at] = slowest[at - 1];
            if (at >= 0)
                slowest[at] = most;
        }
        if (variant == 0 || slowest[BLOCK / 2] < least) {
            least = slowest[BLOCK / 2];
            *best = variant;
        }
    }
    if (!self->rank->rank)
        snprintf(name, sizeof self->bench->result->floor_name[0], "%s",
                 self->floor_ops.variant_name(self->floor, kind, *best));
    return 0;
}

int bench_time(bench_rank_t *self, const bench_timed_t *timed)
{
    const bench_t *bench = self->bench;
    int iters = (int)bench->options.iters, me = self->rank->rank, best = 0;
    bool with_floor = self->floor && timed->op != BENCH_LAYOUT;
    double unused;
    char stage[64];
    snprintf(stage, sizeof stage, "timing %s", bench_op_names[timed->op]);
    rank_stage(self->rank, stage, (uint32_t)(bench->options.iters + bench->options.warmup));
    if (with_floor && best_variant(self, timed, &best))
        return 1;
    for (int i = 0; i < bench->options.warmup; i++)
        if (time_call(self, timed, &unused))
            return 1;
    for (int i = 0; i < iters; i += BLOCK) {
        for (int j = i; j < iters && j < i + BLOCK; j++)
            if (time_call(self, timed, &bench_times(bench, (int)timed->op, j)[me]))
                return 1;
        for (int j = i; j < iters && j < i + BLOCK && with_floor; j++)
            if (time_floor(self, timed, best, &bench_times(bench, BENCH_OPS + (int)timed->op, j)[me]))
                return 1;
    }
    if (!me && with_floor)
        bench->result->has_floor[timed->op] = true;
    return 0;
}
