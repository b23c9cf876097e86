/*
 * The same layer in one process, with the same partition of tokens and experts: per token, each rank's share rounded to
 * bf16 as it would travel, the shares added in rank order in fp32 (per domain, and another domain's partial sum rounded
 * once), and rounded once more. Compared bit by bit with what the ranks gave.
 */
#include "demo.h"

#include "numbers.h"
#include "progress.h"

#include <stdlib.h>
#include <string.h>

typedef struct check {
    const demo_t *demo;
    uint64_t wrong, compared;
    int32_t *expert_tokens;
    uint32_t *rows;
} check_t;

/* Adds the shares of one token. share(r) is [hidden] of rank r, or NULL; home is the domain of the token's rank. */
static void add_shares(const check_t *check, uint16_t *const *share, int32_t home, uint16_t *out)
{
    const demo_t *demo = check->demo;
    const demo_result_t *result = demo->result;
    float sum[LAYER_HIDDEN_MAX], partial[LAYER_HIDDEN_MAX];
    uint32_t hidden = demo->layer.hidden;
    memset(sum, 0, hidden * sizeof *sum);
    for (int32_t domain = 0; domain < result->place.domains; domain++) {
        bool any = false;
        memset(partial, 0, hidden * sizeof *partial);
        for (long r = 0; r < demo->options.ranks; r++) {
            if (!share[r] || result->domain_of[r] != domain)
                continue;
            any = true;
            for (uint32_t i = 0; i < hidden; i++)
                partial[i] += number_from_bf16(share[r][i]);
        }
        for (uint32_t i = 0; i < hidden && any; i++)
            sum[i] += domain == home ? partial[i] : number_from_bf16(number_to_bf16(partial[i]));
    }
    for (uint32_t i = 0; i < hidden; i++)
        out[i] = number_to_bf16(sum[i]);
}

/* The ids of one token that live on rank r, others -1; false if there are none. */
static bool ids_at(const demo_t *demo, const int64_t *ids, long rank, int64_t *there)
{
    bool any = false;
    for (uint32_t k = 0; k < demo->layer.topk; k++) {
        there[k] = demo->expert_rank[ids[k]] == rank ? ids[k] : -1;
        any = any || there[k] >= 0;
    }
    return any;
}

static void compare(check_t *check, const void *a, const void *b, size_t elements, size_t bytes)
{
    for (size_t i = 0; i < elements; i++)
        check->wrong += memcmp((const char *)a + i * bytes, (const char *)b + i * bytes, bytes) != 0;
    check->compared += elements;
}

/* memory: room for ranks rows. */
static void check_token(check_t *check, size_t token, int rank, uint16_t *memory, uint16_t **share)
{
    const demo_t *demo = check->demo;
    const layer_t *layer = &demo->layer;
    uint16_t x[LAYER_HIDDEN_MAX], next[LAYER_HIDDEN_MAX], out[LAYER_HIDDEN_MAX], dout[LAYER_HIDDEN_MAX];
    int64_t ids[32], there[32];
    float weights[32], dweights[32] = {0}, part[32];
    int32_t home = demo->result->domain_of[rank];
    layer_embed(layer, demo->text, token, x);
    layer_gate(layer, x, ids, weights);
    for (long r = 0; r < demo->options.ranks; r++) {
        share[r] = ids_at(demo, ids, r, there) ? memory + (size_t)r * layer->hidden : NULL;
        if (!share[r])
            continue;
        check->rows[r]++;
        layer_forward(layer, x, there, weights, share[r]);
    }
    for (uint32_t k = 0; k < layer->topk; k++)
        check->expert_tokens[ids[k]]++;
    add_shares(check, share, home, out);
    compare(check, out, demo->out + token * layer->hidden, layer->hidden, sizeof *out);

    layer_embed(layer, demo->text, token + 1 < demo->tokens ? token + 1 : token, next);
    layer_loss_gradient(layer, out, next, dout);
    for (long r = 0; r < demo->options.ranks; r++) {
        if (!share[r])
            continue;
        ids_at(demo, ids, r, there);
        layer_backward(layer, x, dout, there, weights, share[r], part);
        for (uint32_t k = 0; k < layer->topk; k++)
            dweights[k] += part[k];
    }
    add_shares(check, share, home, out);
    compare(check, out, demo->dx + token * layer->hidden, layer->hidden, sizeof *out);
    compare(check, dweights, demo->dweights + token * layer->topk, layer->topk, sizeof *dweights);
}

int demo_check(const demo_t *demo, uint64_t *wrong, uint64_t *compared)
{
    size_t ranks = (size_t)demo->options.ranks;
    check_t check = {.demo = demo};
    uint16_t *memory = malloc(ranks * demo->layer.hidden * sizeof *memory);
    uint16_t **share = calloc(ranks, sizeof *share);
    check.expert_tokens = calloc(demo->layer.experts, sizeof *check.expert_tokens);
    check.rows = calloc(ranks, sizeof *check.rows);
    int failed = !memory || !share || !check.expert_tokens || !check.rows;
    progress_t progress;
    progress_begin(&progress);
    for (int r = 0; r < (int)ranks && !failed; r++)
        for (size_t t = demo_first(demo, r); t < demo_first(demo, r + 1); t++) {
            check_token(&check, t, r, memory, share);
            if (t % 64 == 0)
                progress_show(&progress, "the same layer in one process, token", (uint32_t)t, (uint32_t)demo->tokens);
        }
    progress_end(&progress);
    if (!failed) {
        compare(&check, check.rows, demo->result->rows, ranks, sizeof *check.rows);
        compare(&check, check.expert_tokens, demo->result->expert_tokens, demo->layer.experts,
                sizeof *check.expert_tokens);
    }
    free(memory);
    free(share);
    free(check.expert_tokens);
    free(check.rows);
    *wrong = check.wrong;
    *compared = check.compared;
    return failed;
}
