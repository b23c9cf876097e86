/*
 * The check of every row, before anything is timed. What must come is worked out here from the routing alone, by the
 * tool's own code, and compared byte for byte.
 */
#include "bench.h"

#include "numbers.h"
#include "sumrows.h"

#include <stdlib.h>
#include <string.h>

const void *bench_look(bench_rank_t *self, const void *device, size_t bytes, void **keep)
{
    *keep = malloc(bytes ? bytes : 1);
    if (!*keep || self->mem->copy_out(self->context, *keep, device, bytes)) {
        rank_fail(self->rank, "%zu bytes could not be copied out for the check", bytes);
        return NULL;
    }
    return *keep;
}

static uint64_t wrong_ids(const bench_rank_t *self, const int64_t *ids, const float *weights, int source,
                          uint32_t token)
{
    const bench_work_t *work = &self->bench->work;
    const int64_t *sent = work->ids + (work->first[source] + token) * work->topk;
    for (uint32_t k = 0; k < work->topk; k++) {
        bool here = sent[k] >= 0 && work->expert_rank[sent[k]] == self->rank->rank;
        float weight = bench_weight(self->bench, source, token, k);
        if (ids[k] != (here ? work->expert_local[sent[k]] : -1) ||
            number_to_bits(weights[k]) != number_to_bits(here ? weight : 0.0f))
            return 1;
    }
    return 0;
}

/* Counts, source tokens, ids and weights: the small tables. */
static int verify_tables(bench_rank_t *self, const epx_received_t *received, bool cached, uint64_t *wrong)
{
    const bench_work_t *work = &self->bench->work;
    void *keep[3] = {NULL, NULL, NULL};
    size_t rows = self->rows, topk = work->topk;
    const int32_t *src = bench_look(self, received->src_token, rows * sizeof *src, &keep[0]);
    const int64_t *ids =
        cached || !src ? NULL : bench_look(self, received->topk_idx, rows * topk * sizeof *ids, &keep[1]);
    const float *weights =
        cached || !ids ? NULL : bench_look(self, received->topk_weights, rows * topk * sizeof *weights, &keep[2]);
    int failed = !src || (!cached && !weights);
    int source = 0;
    uint32_t token = 0;
    for (size_t row = 0; row < rows && !failed && bench_next_row(work, self->rank->rank, &source, &token);
         row++, token++)
        if (src[row] != (int32_t)token ||
            (!cached && wrong_ids(self, ids + row * topk, weights + row * topk, source, token)))
            ++*wrong;
    for (int i = 0; i < 3; i++)
        free(keep[i]);
    return failed;
}

static int verify_counts(bench_rank_t *self, epx_handle_t *handle, uint64_t *wrong)
{
    const bench_work_t *work = &self->bench->work;
    int me = self->rank->rank;
    epx_counts_t counts = {.size = sizeof counts};
    epx_status_t status = epx_handle_counts(handle, &counts);
    if (status)
        return rank_fail_epx(self->rank, "epx_handle_counts", status);
    *wrong += counts.rows != self->rows;
    if (counts.local_experts != work->local_experts[me]) {
        ++*wrong;
        return 0;
    }
    int32_t *expected = calloc(work->local_experts[me] + 1, sizeof *expected);
    if (!expected)
        return rank_fail(self->rank, "no memory for the check");
    for (uint64_t i = 0; i < work->total * work->topk; i++)
        if (work->ids[i] >= 0 && work->expert_rank[work->ids[i]] == me)
            expected[work->expert_local[work->ids[i]]]++;
    for (uint32_t e = 0; e < work->local_experts[me]; e++)
        *wrong += counts.rows_per_expert[e] != expected[e];
    free(expected);
    for (int i = 0; i < work->ranks; i++) {
        *wrong += counts.tokens[i] != (int32_t)work->tokens[i];
        for (int j = 0; j < work->ranks; j++)
            *wrong += counts.rows_matrix[i * work->ranks + j] != work->matrix[i * work->ranks + j];
    }
    return 0;
}

/* Payload, in pieces that fit self->host. side: the same for the side data. */
static int verify_rows(bench_rank_t *self, const void *device, size_t row_bytes, bool side, uint64_t *wrong)
{
    const bench_t *bench = self->bench;
    int source = 0;
    uint32_t token = 0;
    size_t piece = self->host_bytes / 2 / row_bytes;
    uint8_t *expected = (uint8_t *)self->host + self->host_bytes / 2;
    for (size_t row = 0; row < self->rows; row += piece) {
        size_t count = self->rows - row < piece ? self->rows - row : piece;
        if (self->mem->copy_out(self->context, self->host, (const uint8_t *)device + row * row_bytes,
                                count * row_bytes))
            return rank_fail(self->rank, "rows could not be copied out: %s", self->mem->words());
        for (size_t i = 0; i < count && bench_next_row(&bench->work, self->rank->rank, &source, &token); i++, token++) {
            uint64_t key = pattern_key((uint64_t)bench->options.seed, side ? BENCH_SIDE : BENCH_X, (uint32_t)source,
                                       token, self->generation);
            pattern_fill(expected, row_bytes, key, side ? PATTERN_FP32 : (pattern_format_t)bench->options.dtype);
            *wrong += memcmp(expected, (uint8_t *)self->host + i * row_bytes, row_bytes) != 0;
        }
    }
    return 0;
}

int bench_verify_dispatch(bench_rank_t *self, epx_handle_t *handle, const epx_received_t *received, bool cached,
                          uint64_t *wrong)
{
    const bench_t *bench = self->bench;
    if (self->mem->sync(self->context))
        return rank_fail(self->rank, "the stream: %s", self->mem->words());
    if (received->rows != self->rows) {
        *wrong += self->rows > received->rows ? self->rows : received->rows;
        return 0;
    }
    if (!cached && verify_counts(self, handle, wrong))
        return 1;
    if (verify_tables(self, received, cached, wrong) || verify_rows(self, received->x, bench->row_bytes, false, wrong))
        return 1;
    return bench->side_bytes ? verify_rows(self, received->side, bench->side_bytes, true, wrong) : 0;
}

static float load(const void *row, size_t i, pattern_format_t format)
{
    return sumrows_load(row, i, format);
}

static void store(void *row, size_t i, float value, pattern_format_t format)
{
    if (format == PATTERN_FP32)
        ((float *)row)[i] = value;
    else
        ((uint16_t *)row)[i] = format == PATTERN_BF16 ? number_to_bf16(value) : number_to_fp16(value);
}

/*
 * What combine must give for one token: inside each domain the rows in rank order, in fp32; the partial sum of another
 * domain rounded once; the domains in their order; one rounding. partial and sum are [hidden]; row holds one row.
 */
static void expect_combine(const bench_rank_t *self, uint32_t token, void *row, float *partial, float *sum, void *out)
{
    const bench_t *bench = self->bench;
    const bench_work_t *work = &bench->work;
    pattern_format_t format = (pattern_format_t)bench->options.dtype;
    size_t hidden = (size_t)bench->options.hidden, at = (self->first + token) * (size_t)work->ranks;
    memset(sum, 0, hidden * sizeof *sum);
    for (int domain = 0; domain < self->info.domains; domain++) {
        bool any = false;
        for (int slot = 0; slot < work->ranks && work->dst_rank[at + (size_t)slot] >= 0; slot++) {
            int holder = work->dst_rank[at + (size_t)slot];
            if (self->info.domain_of[holder] != domain)
                continue;
            if (!any)
                memset(partial, 0, hidden * sizeof *partial);
            any = true;
            uint64_t key = pattern_key((uint64_t)bench->options.seed, BENCH_Y, (uint32_t)holder,
                                       (uint32_t)self->rank->rank, token);
            pattern_fill(row, bench->row_bytes, key, format);
            for (size_t i = 0; i < hidden; i++)
                partial[i] += load(row, i, format);
        }
        for (size_t i = 0; i < hidden && any; i++) {
            if (domain != self->info.domain && format != PATTERN_FP32) {
                store(row, 0, partial[i], format);
                partial[i] = load(row, 0, format);
            }
            sum[i] += partial[i];
        }
    }
    for (size_t i = 0; i < hidden; i++)
        store(out, i, sum[i], format);
}

int bench_verify_combine(bench_rank_t *self, uint64_t *wrong)
{
    size_t hidden = (size_t)self->bench->options.hidden, row_bytes = self->bench->row_bytes;
    float *partial = malloc(hidden * sizeof *partial), *sum = malloc(hidden * sizeof *sum);
    void *row = malloc(row_bytes), *expected = malloc(row_bytes);
    int failed = !partial || !sum || !row || !expected || self->mem->sync(self->context);
    size_t piece = self->host_bytes / row_bytes;
    for (uint32_t token = 0; token < self->tokens && !failed; token++) {
        size_t in_piece = token % piece, left = self->tokens - token;
        if (in_piece == 0)
            failed = self->mem->copy_out(self->context, self->host, (uint8_t *)self->out + token * row_bytes,
                                         (left < piece ? left : piece) * row_bytes);
        if (failed)
            break;
        expect_combine(self, token, row, partial, sum, expected);
        *wrong += memcmp(expected, (uint8_t *)self->host + in_piece * row_bytes, row_bytes) != 0;
    }
    free(partial);
    free(sum);
    free(row);
    free(expected);
    return failed ? rank_fail(self->rank, "combine's output could not be looked at") : 0;
}

int bench_verify_layout(bench_rank_t *self, uint64_t *wrong)
{
    const bench_work_t *work = &self->bench->work;
    size_t ranks = (size_t)work->ranks;
    void *keep[3] = {NULL, NULL, NULL};
    int32_t *expected = calloc(work->experts, sizeof *expected);
    if (!expected || self->mem->sync(self->context))
        return rank_fail(self->rank, "the layout could not be looked at");
    const int32_t *per_rank = bench_look(self, self->layout_rank, ranks * sizeof *per_rank, &keep[0]);
    const int32_t *per_expert = bench_look(self, self->layout_expert, work->experts * sizeof *per_expert, &keep[1]);
    const uint8_t *in_rank = bench_look(self, self->layout_in_rank, self->tokens * ranks, &keep[2]);
    int failed = !per_rank || !per_expert || !in_rank;
    for (uint64_t i = self->first * work->topk; i < (self->first + self->tokens) * work->topk && !failed; i++)
        if (work->ids[i] >= 0)
            expected[work->ids[i]]++;
    for (size_t r = 0; r < ranks && !failed; r++)
        *wrong += per_rank[r] != work->matrix[(size_t)self->rank->rank * ranks + r];
    for (uint32_t e = 0; e < work->experts && !failed; e++)
        *wrong += per_expert[e] != expected[e];
    for (uint32_t t = 0; t < self->tokens && !failed; t++)
        for (size_t r = 0; r < ranks; r++) {
            bool goes = false;
            for (size_t slot = 0; slot < ranks; slot++)
                goes = goes || work->dst_rank[(self->first + t) * ranks + slot] == (int32_t)r;
            *wrong += (in_rank[t * ranks + r] != 0) != goes;
        }
    for (int i = 0; i < 3; i++)
        free(keep[i]);
    free(expected);
    return failed;
}
