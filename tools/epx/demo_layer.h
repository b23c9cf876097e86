/*
 * The demo's model: embeddings of bytes, a linear gate with top-k, experts of two layers. Both the ranks and the one
 * process that checks them call these functions, row by row, so that a difference between the two can only come from
 * the exchange. Sums are in fp32 in a fixed order; rows travel in bf16.
 */
#ifndef EPX_TOOL_DEMO_LAYER_H
#define EPX_TOOL_DEMO_LAYER_H

#include <stddef.h>
#include <stdint.h>

enum { LAYER_INNER = 32, LAYER_LANES = 32, LAYER_HIDDEN_MAX = 4096, LAYER_EXPERTS_MAX = 1024 };

typedef struct layer {
    uint32_t hidden, topk, experts; /* hidden is a multiple of 32 */
    float *embed;                   /* [256][hidden] */
    float *gate;                    /* [hidden][experts rounded up to 32] */
    /* Per expert: in [hidden][inner], out [inner][hidden], and both transposed for the way back. */
    float *in, *out, *in_t, *out_t;
} layer_t;

int layer_init(layer_t *layer, uint32_t hidden, uint32_t topk, uint32_t experts, uint64_t seed); /* -1: no memory */
void layer_fini(layer_t *layer);

/* The row of the token at `position`: its byte and, weaker, the three before it. */
void layer_embed(const layer_t *layer, const uint8_t *text, size_t position, uint16_t *x);

/* The topk best experts of a row, best first, and the softmax of their scores. */
void layer_gate(const layer_t *layer, const uint16_t *x, int64_t *ids, float *weights);

/* What one rank makes of a row: the weighted sum over those of ids[topk] that are not -1, rounded once. */
void layer_forward(const layer_t *layer, const uint16_t *x, const int64_t *ids, const float *weights, uint16_t *y);

/* The way back: from the gradient of the layer's output to that rank's share of the gradients of x and of the weights
 * (0 where ids is -1). */
void layer_backward(const layer_t *layer, const uint16_t *x, const uint16_t *dy, const int64_t *ids,
                    const float *weights, uint16_t *dx, float *dweights);

/* The gradient that the demo sends back: output minus the next token's row, as if that were to be foretold. */
void layer_loss_gradient(const layer_t *layer, const uint16_t *out, const uint16_t *next_x, uint16_t *dout);

#endif
