/* One rank of a bench: joins, has its operations verified and timed (bench_ht.c, bench_ll.c), leaves. */
#include "bench.h"

#include <stdio.h>
#include <stdlib.h>

enum { HOST_BYTES = 8 << 20 };

static int join(bench_rank_t *self)
{
    const bench_options_t *options = &self->bench->options;
    epx_group_config_t config = {.backend = (epx_backend_t)options->backend,
                                 .net = options->net,
                                 .threads = (int)options->threads,
                                 .timeout_ms = (uint64_t)options->timeout_s * 1000};
    if (options->domains)
        config.ranks_per_domain = (int)(options->ranks / options->domains);
    if (rank_join(self->rank, &config))
        return 1;
    return place_enter(self->rank, &self->info, &self->mem, &self->context, &self->stream);
}

void *bench_get(bench_rank_t *self, size_t bytes)
{
    void *memory = NULL;
    if (self->memories < BENCH_MEMORY_MOST)
        memory = self->mem->alloc(self->context, bytes ? bytes : 16);
    if (memory)
        self->memory[self->memories++] = memory;
    else
        rank_fail(self->rank, "%zu bytes of memory: %s", bytes, self->mem->words());
    return memory;
}

static int run(bench_rank_t *self)
{
    rank_stage(self->rank, "joining", 0);
    if (join(self))
        return 1;
    if (!self->rank->rank)
        place_note(&self->bench->result->place, &self->info);
    rank_stage(self->rank, "making the buffer", 0);
    self->host_bytes = HOST_BYTES > 4 * self->bench->row_bytes ? HOST_BYTES : 4 * self->bench->row_bytes;
    self->host = malloc(self->host_bytes);
    if (!self->host)
        return rank_fail(self->rank, "no memory for the check");
    if (self->bench->ll ? bench_ll(self) : bench_ht(self))
        return 1;
    epx_status_t status = epx_buffer_status(self->buffer);
    return status ? rank_fail_epx(self->rank, "epx_buffer_status", status) : rank_barrier(self->rank);
}

int bench_rank_body(rank_t *rank)
{
    const bench_t *bench = rank->user;
    bench_rank_t self = {.rank = rank,
                         .bench = bench,
                         .tokens = bench->work.tokens[rank->rank],
                         .rows = bench->work.recv_rows[rank->rank],
                         .first = bench->work.first[rank->rank]};
    int failed = run(&self);
    if (self.floor && !failed)
        self.floor_ops.close(self.floor);
    epx_buffer_destroy(self.buffer);
    if (self.mem && self.context) {
        for (int i = 0; i < self.memories; i++)
            self.mem->free(self.context, self.memory[i]);
        self.mem->close(self.context);
    }
    free(self.host);
    return failed;
}
