/* What a rank of a bench sends: rows with a number in every byte, ids, weights. */
#include "bench.h"

#include <stdlib.h>
#include <string.h>

/* Rows made in self->host and copied to the device in pieces. What a row holds is the key's affair. */
static int fill_rows(bench_rank_t *self, void *device, size_t count, size_t row_bytes, pattern_format_t format,
                     uint64_t (*key)(void *context), void *context)
{
    size_t piece = self->host_bytes / row_bytes;
    for (size_t row = 0; row < count; row += piece) {
        size_t now = count - row < piece ? count - row : piece;
        for (size_t i = 0; i < now; i++)
            pattern_fill((uint8_t *)self->host + i * row_bytes, row_bytes, key(context), format);
        if (self->mem->copy_in(self->context, (uint8_t *)device + row * row_bytes, self->host, now * row_bytes))
            return rank_fail(self->rank, "rows could not be copied in: %s", self->mem->words());
    }
    return 0;
}

typedef struct cursor {
    const bench_rank_t *self;
    int source;
    uint32_t token, kind;
} cursor_t;

static uint64_t key_of_token(void *context)
{
    cursor_t *cursor = context;
    return pattern_key((uint64_t)cursor->self->bench->options.seed, cursor->kind, (uint32_t)cursor->self->rank->rank,
                       cursor->token++, cursor->self->generation);
}

static uint64_t key_of_output(void *context)
{
    cursor_t *cursor = context;
    const bench_rank_t *self = cursor->self;
    bench_next_row(&self->bench->work, self->rank->rank, &cursor->source, &cursor->token);
    return pattern_key((uint64_t)self->bench->options.seed, BENCH_Y, (uint32_t)self->rank->rank,
                       (uint32_t)cursor->source, cursor->token++);
}

int bench_fill_x(bench_rank_t *self, uint32_t generation)
{
    const bench_t *bench = self->bench;
    self->generation = generation;
    cursor_t x = {self, 0, 0, BENCH_X}, side = {self, 0, 0, BENCH_SIDE};
    if (fill_rows(self, self->x, self->tokens, bench->row_bytes, bench->row_format, key_of_token, &x))
        return 1;
    return bench->side_bytes &&
           fill_rows(self, self->side, self->tokens, bench->side_bytes, PATTERN_FP32, key_of_token, &side);
}

float bench_weight(const bench_t *bench, int source, uint32_t token, uint32_t k)
{
    float weight;
    uint64_t key = pattern_key((uint64_t)bench->options.seed, BENCH_WEIGHT, (uint32_t)source, token, k);
    uint64_t word = pattern_word(key, 0, PATTERN_FP32);
    memcpy(&weight, &word, sizeof weight);
    return weight;
}

int bench_fill_routing(bench_rank_t *self)
{
    const bench_work_t *work = &self->bench->work;
    size_t count = self->tokens * (size_t)work->topk;
    float *weights = malloc(count * sizeof *weights + 1);
    if (!weights)
        return rank_fail(self->rank, "no memory for the weights");
    for (size_t i = 0; i < count; i++)
        weights[i] =
            bench_weight(self->bench, self->rank->rank, (uint32_t)(i / work->topk), (uint32_t)(i % work->topk));
    int failed = self->mem->copy_in(self->context, self->weights, weights, count * sizeof *weights) ||
                 self->mem->copy_in(self->context, self->ids, work->ids + self->first * work->topk, count * 8);
    free(weights);
    return failed ? rank_fail(self->rank, "the routing could not be copied in: %s", self->mem->words()) : 0;
}

int bench_fill_y(bench_rank_t *self)
{
    cursor_t cursor = {self, 0, 0, BENCH_Y};
    return fill_rows(self, self->y, self->rows, self->bench->row_bytes, self->bench->row_format, key_of_output,
                     &cursor);
}
