/* The demo's model; see demo_layer.h. */
#include "demo_layer.h"

#include "numbers.h"
#include "routing_gen.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef float lanes_t __attribute__((vector_size(16)));

/* to[j] = sum over i of from[i] * matrix[i][j], i ascending; columns is a multiple of 32. */
static void multiply(float *to, const float *from, size_t rows, const float *matrix, size_t columns)
{
    for (size_t j = 0; j < columns; j += LAYER_LANES) {
        lanes_t sum[LAYER_LANES / 4] = {{0}};
        for (size_t i = 0; i < rows; i++) {
            const float *row = matrix + i * columns + j;
            lanes_t scale = {from[i], from[i], from[i], from[i]};
            for (int v = 0; v < LAYER_LANES / 4; v++) {
                lanes_t part;
                memcpy(&part, row + 4 * v, sizeof part);
                sum[v] += scale * part;
            }
        }
        memcpy(to + j, sum, sizeof sum);
    }
}

static float *random_matrix(size_t count, float scale, uint64_t seed)
{
    float *matrix = aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64);
    for (size_t i = 0; i < count && matrix; i++)
        matrix[i] = ((float)(routing_mix(seed + i) >> 40) / 8388608.0f - 1.0f) * scale;
    return matrix;
}

/* Each of `count` matrices [rows][columns], turned. */
static float *transposed(const float *matrices, size_t count, size_t rows, size_t columns)
{
    float *turned = aligned_alloc(64, (count * rows * columns * sizeof(float) + 63) / 64 * 64);
    for (size_t m = 0; m < count && turned && matrices; m++)
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < columns; j++)
                turned[m * rows * columns + j * rows + i] = matrices[m * rows * columns + i * columns + j];
    return turned;
}

static size_t gate_columns(const layer_t *layer)
{
    return (layer->experts + LAYER_LANES - 1) / LAYER_LANES * LAYER_LANES;
}

int layer_init(layer_t *layer, uint32_t hidden, uint32_t topk, uint32_t experts, uint64_t seed)
{
    *layer = (layer_t){.hidden = hidden, .topk = topk, .experts = experts};
    size_t one = (size_t)hidden * LAYER_INNER;
    float wide = 1.7f / sqrtf((float)hidden), narrow = 1.7f / sqrtf((float)LAYER_INNER);
    layer->embed = random_matrix(256 * (size_t)hidden, 1.0f, seed << 40 | UINT64_C(1) << 36);
    layer->gate = random_matrix(hidden * gate_columns(layer), 2.0f * wide, seed << 40 | UINT64_C(2) << 36);
    layer->in = random_matrix(experts * one, wide, seed << 40 | UINT64_C(3) << 36);
    layer->out = random_matrix(experts * one, narrow, seed << 40 | UINT64_C(4) << 36);
    layer->in_t = transposed(layer->in, experts, hidden, LAYER_INNER);
    layer->out_t = transposed(layer->out, experts, LAYER_INNER, hidden);
    if (layer->embed && layer->gate && layer->in && layer->out && layer->in_t && layer->out_t)
        return 0;
    layer_fini(layer);
    return -1;
}

void layer_fini(layer_t *layer)
{
    float *const parts[] = {layer->embed, layer->gate, layer->in, layer->out, layer->in_t, layer->out_t};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        free(parts[i]);
    *layer = (layer_t){0};
}

void layer_embed(const layer_t *layer, const uint8_t *text, size_t position, uint16_t *x)
{
    float sum[LAYER_HIDDEN_MAX], share = 1.0f;
    memset(sum, 0, layer->hidden * sizeof *sum);
    for (size_t back = 0; back < 4 && back <= position; back++, share *= 0.5f) {
        const float *row = layer->embed + text[position - back] * (size_t)layer->hidden;
        for (uint32_t i = 0; i < layer->hidden; i++)
            sum[i] += share * row[i];
    }
    for (uint32_t i = 0; i < layer->hidden; i++)
        x[i] = number_to_bf16(sum[i]);
}

static void widen(float *to, const uint16_t *from, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        to[i] = number_from_bf16(from[i]);
}

void layer_gate(const layer_t *layer, const uint16_t *x, int64_t *ids, float *weights)
{
    float row[LAYER_HIDDEN_MAX], score[LAYER_EXPERTS_MAX], sum = 0.0f;
    widen(row, x, layer->hidden);
    multiply(score, row, layer->hidden, layer->gate, gate_columns(layer));
    for (uint32_t k = 0; k < layer->topk; k++) {
        int64_t best = -1;
        for (uint32_t e = 0; e < layer->experts; e++)
            if (!routing_gen_has(ids, k, e) && (best < 0 || score[e] > score[best]))
                best = e;
        ids[k] = best;
        weights[k] = expf(score[best] - score[ids[0]]);
        sum += weights[k];
    }
    for (uint32_t k = 0; k < layer->topk; k++)
        weights[k] /= sum;
}

/* The inner layer before and after its bend, x * sigmoid(x). */
static void inner(const layer_t *layer, int64_t expert, const float *x, float *before, float *after)
{
    multiply(before, x, layer->hidden, layer->in + (size_t)expert * layer->hidden * LAYER_INNER, LAYER_INNER);
    for (int f = 0; f < LAYER_INNER; f++)
        after[f] = before[f] / (1.0f + expf(-before[f]));
}

void layer_forward(const layer_t *layer, const uint16_t *x, const int64_t *ids, const float *weights, uint16_t *y)
{
    float row[LAYER_HIDDEN_MAX], sum[LAYER_HIDDEN_MAX], one[LAYER_HIDDEN_MAX];
    float before[LAYER_INNER], after[LAYER_INNER];
    widen(row, x, layer->hidden);
    memset(sum, 0, layer->hidden * sizeof *sum);
    for (uint32_t k = 0; k < layer->topk; k++) {
        if (ids[k] < 0)
            continue;
        inner(layer, ids[k], row, before, after);
        multiply(one, after, LAYER_INNER, layer->out + (size_t)ids[k] * layer->hidden * LAYER_INNER, layer->hidden);
        for (uint32_t i = 0; i < layer->hidden; i++)
            sum[i] += weights[k] * one[i];
    }
    for (uint32_t i = 0; i < layer->hidden; i++)
        y[i] = number_to_bf16(sum[i]);
}

void layer_backward(const layer_t *layer, const uint16_t *x, const uint16_t *dy, const int64_t *ids,
                    const float *weights, uint16_t *dx, float *dweights)
{
    float row[LAYER_HIDDEN_MAX], gradient[LAYER_HIDDEN_MAX], sum[LAYER_HIDDEN_MAX], one[LAYER_HIDDEN_MAX];
    float before[LAYER_INNER], after[LAYER_INNER], back[LAYER_INNER];
    size_t matrix = (size_t)layer->hidden * LAYER_INNER;
    widen(row, x, layer->hidden);
    widen(gradient, dy, layer->hidden);
    memset(sum, 0, layer->hidden * sizeof *sum);
    for (uint32_t k = 0; k < layer->topk; k++) {
        dweights[k] = 0.0f;
        if (ids[k] < 0)
            continue;
        inner(layer, ids[k], row, before, after);
        multiply(back, gradient, layer->hidden, layer->out_t + (size_t)ids[k] * matrix, LAYER_INNER);
        for (int f = 0; f < LAYER_INNER; f++) {
            float gate = 1.0f / (1.0f + expf(-before[f]));
            dweights[k] += back[f] * after[f];
            back[f] = weights[k] * back[f] * (gate * (1.0f + before[f] * (1.0f - gate)));
        }
        multiply(one, back, LAYER_INNER, layer->in_t + (size_t)ids[k] * matrix, layer->hidden);
        for (uint32_t i = 0; i < layer->hidden; i++)
            sum[i] += one[i];
    }
    for (uint32_t i = 0; i < layer->hidden; i++)
        dx[i] = number_to_bf16(sum[i]);
}

void layer_loss_gradient(const layer_t *layer, const uint16_t *out, const uint16_t *next_x, uint16_t *dout)
{
    for (uint32_t i = 0; i < layer->hidden; i++)
        dout[i] = number_to_bf16(number_from_bf16(out[i]) - number_from_bf16(next_x[i]));
}
