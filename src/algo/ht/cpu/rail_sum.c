/*
 * One token's sum at its owner: the domains' sums in domain order, the own domain's in fp32 as it is, the others as
 * they came; then the biases; one rounding.
 */
#include <string.h>

#include "algo/ht/cpu/rail.h"
#include "plan/format.h"

#define BLOCK 2048u /* elements added at a time: two blocks of fp32 stay in the nearest cache */

void epx__rail_sum_weights(const uint8_t *const *weights, int n, uint32_t topk, float *out)
{
    for (uint32_t k = 0; k < topk; k++) {
        float total = 0.0f, weight;
        for (int i = 0; i < n; i++) {
            memcpy(&weight, weights[i] + 4 * (size_t)k, sizeof weight);
            total += weight;
        }
        out[k] = total;
    }
}

static void add_f32(float *to, const float *from, size_t n)
{
    for (size_t i = 0; i < n; i++)
        to[i] += from[i];
}

/* Elements [from, from + n) of one token. */
static void add_block(const epx__rail_sum_t *sum, uint32_t token, size_t from, size_t n)
{
    const epx_combine_t *args = sum->args;
    size_t skip = from * epx__dtype_bytes(args->dtype);
    float acc[BLOCK], part[BLOCK];
    const void *rows[sum->members + 2];
    bool first = true;
    for (int d = 0; d < sum->domains; d++) {
        if (d == sum->home) {
            if (sum->own->count == 0)
                continue;
            for (int i = 0; i < sum->own->count; i++)
                rows[i] = (const uint8_t *)sum->own->rows[i] + skip;
            epx__sum_rows_f32(first ? acc : part, true, rows, sum->own->count, n, args->dtype);
            if (!first)
                add_f32(acc, part, n);
        } else {
            if (!sum->sums[d])
                continue;
            rows[0] = sum->sums[d] + skip;
            epx__sum_rows_f32(acc, first, rows, 1, n, args->dtype);
        }
        first = false;
    }
    int biases = 0;
    for (int b = 0; b < 2; b++)
        if (args->bias[b])
            rows[biases++] = (const uint8_t *)args->bias[b] + (size_t)token * sum->row_bytes + skip;
    if (first || biases)
        epx__sum_rows_f32(acc, first, rows, biases, n, args->dtype);
    epx__round_row((uint8_t *)args->out + (size_t)token * sum->row_bytes + skip, acc, n, args->dtype, false);
}

/*
 * All rows of a token one after the other, when that is the same sum: a domain's sum from +0 changes nothing when it is
 * the first, or of one row. One pass over the rows, by the fastest code there is.
 */
static bool add_plain(const epx__rail_sum_t *sum, uint32_t token)
{
    const epx_combine_t *args = sum->args;
    const void *rows[sum->members + sum->domains], *bias[2];
    int n = 0, biases = 0;
    for (int d = 0; d < sum->domains; d++) {
        if (d == sum->home) {
            if (n > 0 && sum->own->count > 1)
                return false;
            for (int i = 0; i < sum->own->count; i++)
                rows[n++] = sum->own->rows[i];
        } else if (sum->sums[d])
            rows[n++] = sum->sums[d];
    }
    for (int b = 0; b < 2; b++)
        if (args->bias[b])
            bias[biases++] = (const uint8_t *)args->bias[b] + (size_t)token * sum->row_bytes;
    epx__sum_rows((uint8_t *)args->out + (size_t)token * sum->row_bytes, rows, n, bias, biases, args->hidden,
                  args->dtype, sum->streaming);
    return true;
}

static void add_token_weights(const epx__rail_sum_t *sum, uint32_t token)
{
    float *out = sum->args->out_topk_weights + (size_t)token * sum->topk, home[EPX_TOPK_MAX];
    memset(out, 0, 4 * (size_t)sum->topk);
    for (int d = 0; d < sum->domains; d++) {
        if (sum->sums[d]) {
            add_f32(out, (const float *)(const void *)(sum->sums[d] + sum->row_bytes), sum->topk);
        } else if (d == sum->home && sum->own->count) {
            epx__rail_sum_weights(sum->own->weights, sum->own->count, sum->topk, home);
            add_f32(out, home, sum->topk);
        }
    }
}

void epx__rail_sum(const epx__rail_sum_t *sum, uint32_t token)
{
    size_t hidden = sum->args->hidden;
    bool whole = add_plain(sum, token);
    for (size_t from = 0; !whole && from < hidden; from += BLOCK)
        add_block(sum, token, from, hidden - from < BLOCK ? hidden - from : BLOCK);
    if (sum->weights)
        add_token_weights(sum, token);
}
