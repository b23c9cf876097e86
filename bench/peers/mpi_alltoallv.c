/*
 * A peer to beat: dispatch and combine as a competent user writes them with MPI_Alltoallv.
 *
 *   dispatch          pack each token's row once per destination rank, rows of one destination together; exchange them
 *                     straight into their final places, for Alltoallv already delivers in the order (source rank,
 * token): nothing is unpacked. dispatch with     before that, the counts: from the top-k ids to rows per destination
 * and the packing order, and counts            MPI_Alltoall of the counts. combine           the rows back by Alltoallv
 * (they lie by source already: nothing is packed), and a sum per token in rank order in fp32, rounded once to bf16, by
 * the same vector code that epx bench's floor uses.
 *
 * The same routing and the same rows as `epx bench` with the same options: the generators are shared headers. Every row
 * is verified before anything is timed. A barrier before each iteration, outside the timed stretch; an iteration counts
 * as its slowest rank's time. Prints one line each: "dispatch US", "dispatch_with_counts US", "combine US", medians.
 *
 *     mpirun -np 2 mpi_alltoallv [TOKENS HIDDEN TOPK EXPERTS ITERS WARMUP SEED uniform|zipf]
 */
#include <mpi.h>

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pattern.h"
#include "routing_gen.h"
#include "sumrows.h"

enum { KIND_X = 1, KIND_Y = 4, RANKS_MOST = 1024 };

typedef struct peer {
    int rank, ranks;
    long tokens, hidden, topk, experts, iters, warmup, seed;
    routing_kind_t kind;
    routing_gen_t gen;
    size_t row_bytes;
    MPI_Datatype row;
    int64_t *ids;                 /* [tokens][topk] of this rank */
    int *send_count, *send_first; /* [ranks] rows */
    int *recv_count, *recv_first;
    int32_t *packed; /* [tokens][ranks]: the row's place in the packed order, -1 where it does not go */
    int rows_out, rows_in;
    uint8_t *x, *packing, *received, *y, *back, *out;
} peer_t;

static void stop(const char *words)
{
    fprintf(stderr, "mpi_alltoallv: %s\n", words);
    MPI_Abort(MPI_COMM_WORLD, 1);
}

static void *get(size_t bytes)
{
    void *memory = aligned_alloc(256, (bytes + 511) / 256 * 256);
    if (!memory)
        stop("no memory");
    memset(memory, 0, bytes);
    return memory;
}

static int expert_rank(const peer_t *self, int64_t id)
{
    return (int)(id * self->ranks / self->experts);
}

/* ---- what is timed ---- */

/* Rows per destination and each row's place among the packed ones. */
static void count_rows(peer_t *self)
{
    memset(self->send_count, 0, (size_t)self->ranks * sizeof *self->send_count);
    for (long t = 0; t < self->tokens; t++) {
        int32_t *place = self->packed + t * self->ranks;
        for (int r = 0; r < self->ranks; r++)
            place[r] = -1;
        for (long k = 0; k < self->topk; k++) {
            int64_t id = self->ids[t * self->topk + k];
            if (id < 0)
                continue;
            int to = expert_rank(self, id);
            if (place[to] < 0)
                place[to] = self->send_count[to]++;
        }
    }
    self->rows_out = 0;
    for (int r = 0; r < self->ranks; r++) {
        self->send_first[r] = self->rows_out;
        self->rows_out += self->send_count[r];
    }
    for (long t = 0; t < self->tokens; t++)
        for (int r = 0; r < self->ranks; r++)
            if (self->packed[t * self->ranks + r] >= 0)
                self->packed[t * self->ranks + r] += self->send_first[r];
}

static void exchange_counts(peer_t *self)
{
    MPI_Alltoall(self->send_count, 1, MPI_INT, self->recv_count, 1, MPI_INT, MPI_COMM_WORLD);
    self->rows_in = 0;
    for (int r = 0; r < self->ranks; r++) {
        self->recv_first[r] = self->rows_in;
        self->rows_in += self->recv_count[r];
    }
}

static void dispatch(peer_t *self)
{
    for (long t = 0; t < self->tokens; t++)
        for (int r = 0; r < self->ranks; r++) {
            int32_t at = self->packed[t * self->ranks + r];
            if (at >= 0)
                memcpy(self->packing + (size_t)at * self->row_bytes, self->x + (size_t)t * self->row_bytes,
                       self->row_bytes);
        }
    MPI_Alltoallv(self->packing, self->send_count, self->send_first, self->row, self->received, self->recv_count,
                  self->recv_first, self->row, MPI_COMM_WORLD);
}

static void dispatch_with_counts(peer_t *self)
{
    count_rows(self);
    exchange_counts(self);
    dispatch(self);
}

static void combine(peer_t *self)
{
    const void *rows[RANKS_MOST];
    MPI_Alltoallv(self->y, self->recv_count, self->recv_first, self->row, self->back, self->send_count,
                  self->send_first, self->row, MPI_COMM_WORLD);
    for (long t = 0; t < self->tokens; t++) {
        int count = 0;
        for (int r = 0; r < self->ranks; r++) {
            int32_t at = self->packed[t * self->ranks + r];
            if (at >= 0)
                rows[count++] = self->back + (size_t)at * self->row_bytes;
        }
        sumrows(self->out + (size_t)t * self->row_bytes, rows, count, (size_t)self->hidden, PATTERN_BF16, true);
    }
    sumrows_fence();
}

/* ---- check ---- */

static bool goes_to(const peer_t *self, int source, long token, int to)
{
    int64_t ids[64];
    routing_gen_token(&self->gen, source, (uint32_t)token, ids);
    for (long k = 0; k < self->topk; k++)
        if (ids[k] >= 0 && expert_rank(self, ids[k]) == to)
            return true;
    return false;
}

/* Checks the received rows, and makes the experts' outputs in the same walk. */
static long check_dispatch(peer_t *self)
{
    long wrong = 0, row = 0;
    uint8_t *expected = get(self->row_bytes);
    for (int s = 0; s < self->ranks; s++)
        for (long t = 0; t < self->tokens; t++) {
            if (!goes_to(self, s, t, self->rank))
                continue;
            size_t at = (size_t)row++ * self->row_bytes;
            pattern_fill(expected, self->row_bytes,
                         pattern_key((uint64_t)self->seed, KIND_X, (uint32_t)s, (uint32_t)t, 1), PATTERN_BF16);
            wrong += row > self->rows_in || memcmp(expected, self->received + at, self->row_bytes) != 0;
            if (row <= self->rows_in)
                pattern_fill(self->y + at, self->row_bytes,
                             pattern_key((uint64_t)self->seed, KIND_Y, (uint32_t)self->rank, (uint32_t)s, (uint32_t)t),
                             PATTERN_BF16);
        }
    free(expected);
    return wrong + (row != self->rows_in);
}

static long check_combine(peer_t *self)
{
    long wrong = 0;
    uint16_t *row = get(self->row_bytes);
    float *sum = get((size_t)self->hidden * sizeof *sum);
    for (long t = 0; t < self->tokens; t++) {
        const uint16_t *out = (const uint16_t *)(self->out + (size_t)t * self->row_bytes);
        bool differs = false;
        memset(sum, 0, (size_t)self->hidden * sizeof *sum);
        for (int r = 0; r < self->ranks; r++) {
            if (!goes_to(self, self->rank, t, r))
                continue;
            pattern_fill(row, self->row_bytes,
                         pattern_key((uint64_t)self->seed, KIND_Y, (uint32_t)r, (uint32_t)self->rank, (uint32_t)t),
                         PATTERN_BF16);
            for (long i = 0; i < self->hidden; i++)
                sum[i] += number_from_bf16(row[i]);
        }
        for (long i = 0; i < self->hidden; i++)
            differs = differs || out[i] != number_to_bf16(sum[i]);
        wrong += differs;
    }
    free(row);
    free(sum);
    return wrong;
}

/* ---- time ---- */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void measure(peer_t *self, const char *name, void (*step)(peer_t *))
{
    double *times = get((size_t)self->iters * sizeof *times), *slowest = get((size_t)self->iters * sizeof *slowest);
    for (long i = -self->warmup; i < self->iters; i++) {
        MPI_Barrier(MPI_COMM_WORLD);
        double began = MPI_Wtime();
        step(self);
        if (i >= 0)
            times[i] = MPI_Wtime() - began;
    }
    MPI_Reduce(times, slowest, (int)self->iters, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
    if (self->rank == 0) {
        qsort(slowest, (size_t)self->iters, sizeof *slowest, by_value);
        double low = slowest[(self->iters - 1) / 2], high = slowest[self->iters / 2];
        printf("%s %.1f\n", name, (low + high) / 2 * 1e6);
    }
    free(times);
    free(slowest);
}

/* ---- */

static void set_up(peer_t *self)
{
    size_t ranks = (size_t)self->ranks, tokens = (size_t)self->tokens;
    self->row_bytes = (size_t)self->hidden * 2;
    MPI_Type_contiguous((int)self->row_bytes, MPI_BYTE, &self->row);
    MPI_Type_commit(&self->row);
    if (routing_gen_init(&self->gen, self->kind, (uint32_t)self->experts, (uint32_t)self->topk, (uint64_t)self->seed))
        stop("no memory");
    self->ids = get(tokens * (size_t)self->topk * sizeof *self->ids);
    self->packed = get(tokens * ranks * sizeof *self->packed);
    self->send_count = get(ranks * sizeof(int));
    self->send_first = get(ranks * sizeof(int));
    self->recv_count = get(ranks * sizeof(int));
    self->recv_first = get(ranks * sizeof(int));
    self->x = get(tokens * self->row_bytes);
    self->out = get(tokens * self->row_bytes);
    for (size_t t = 0; t < tokens; t++) {
        routing_gen_token(&self->gen, self->rank, (uint32_t)t, self->ids + t * (size_t)self->topk);
        pattern_fill(self->x + t * self->row_bytes, self->row_bytes,
                     pattern_key((uint64_t)self->seed, KIND_X, (uint32_t)self->rank, (uint32_t)t, 1), PATTERN_BF16);
    }
    count_rows(self);
    exchange_counts(self);
    self->packing = get((size_t)self->rows_out * self->row_bytes);
    self->back = get((size_t)self->rows_out * self->row_bytes);
    self->received = get((size_t)self->rows_in * self->row_bytes);
    self->y = get((size_t)self->rows_in * self->row_bytes);
}

static void read_arguments(peer_t *self, int argc, char **argv)
{
    static const struct {
        const char *name;
        long least, most;
    } bounds[] = {{"TOKENS", 0, 1 << 22}, {"HIDDEN", 8, 1 << 20}, {"TOPK", 1, 32},      {"EXPERTS", 1, 1 << 16},
                  {"ITERS", 1, 100000},   {"WARMUP", 0, 100000},  {"SEED", 0, 1L << 40}};
    long *const to[] = {&self->tokens, &self->hidden, &self->topk, &self->experts,
                        &self->iters,  &self->warmup, &self->seed};
    for (int i = 0; i < 7 && i + 1 < argc; i++) {
        *to[i] = atol(argv[i + 1]);
        if (*to[i] < bounds[i].least || *to[i] > bounds[i].most) {
            fprintf(stderr, "mpi_alltoallv: %s is %s: %ld to %ld is needed\n", bounds[i].name, argv[i + 1],
                    bounds[i].least, bounds[i].most);
            MPI_Abort(MPI_COMM_WORLD, 2);
        }
    }
    if (argc > 8)
        self->kind = strcmp(argv[8], "zipf") == 0 ? ROUTING_ZIPF : ROUTING_UNIFORM;
    if (self->hidden % 8 || self->topk > self->experts || self->ranks > RANKS_MOST)
        stop("HIDDEN must be a multiple of 8, TOPK at most EXPERTS");
}

int main(int argc, char **argv)
{
    peer_t self = {.tokens = 4096, .hidden = 7168, .topk = 8, .experts = 256, .iters = 20, .warmup = 5, .seed = 1};
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &self.rank);
    MPI_Comm_size(MPI_COMM_WORLD, &self.ranks);
    read_arguments(&self, argc, argv);
    set_up(&self);
    dispatch_with_counts(&self);
    long wrong = check_dispatch(&self), all = 0;
    combine(&self);
    wrong += check_combine(&self);
    MPI_Allreduce(&wrong, &all, 1, MPI_LONG, MPI_SUM, MPI_COMM_WORLD);
    if (self.rank == 0)
        printf("wrong %ld\n", all);
    measure(&self, "dispatch", dispatch);
    measure(&self, "dispatch_with_counts", dispatch_with_counts);
    measure(&self, "combine", combine);
    MPI_Finalize();
    return all != 0;
}
