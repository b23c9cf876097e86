/* Begin between domains: what of mine crosses, telling the rails, and what the rails' messages say. */
#include <string.h>

#include "algo/ht/cpu/rail.h"

static uint8_t *mask_at(const epx__ht_rails_t *rails, uint8_t *masks, int domain, size_t k)
{
    size_t bytes = rails->rails->layout.mask_bytes;
    return masks + ((size_t)domain * rails->rails->tokens_max + k) * bytes;
}

void epx__ht_rails_cross(epx__ht_cpu_t *ht, const epx__exchange_handle_t *handle)
{
    epx__ht_rails_t *rails = ht->rails;
    const epx__topology_t *topology = ht->exchange->topology;
    epx__rail_routing_t *routing = &rails->routing[handle->index];
    const int32_t *dst = ht->routing[handle->index].dst_rank;
    int32_t last[rails->domains]; /* the last token counted for that domain */
    for (int d = 0; d < rails->domains; d++) {
        routing->cross_count[d] = 0;
        last[d] = -1;
    }
    for (uint32_t t = 0; t < handle->args.tokens; t++)
        for (uint32_t s = 0; s < handle->slots && dst[(size_t)t * handle->slots + s] >= 0; s++) {
            int32_t rank = dst[(size_t)t * handle->slots + s];
            int d = topology->domain_of[rank], i = topology->index_of[rank];
            if (d == rails->home)
                continue;
            if (last[d] != (int32_t)t) {
                last[d] = (int32_t)t;
                int32_t k = routing->cross_count[d]++;
                routing->cross_token[(size_t)d * rails->rails->tokens_max + (size_t)k] = (int32_t)t;
                memset(mask_at(rails, routing->cross_mask, d, (size_t)k), 0, rails->rails->layout.mask_bytes);
            }
            mask_at(rails, routing->cross_mask, d, (size_t)routing->cross_count[d] - 1)[i / 8] |=
                (uint8_t)(1u << (i % 8));
        }
}

size_t epx__ht_rails_fill_begin(const epx__ht_rails_t *rails, const epx__exchange_handle_t *handle, int domain,
                                const int32_t *rank_count, const int32_t *expert_count, epx__rail_message_t *message)
{
    const epx__rail_routing_t *routing = &rails->routing[handle->index];
    size_t ranks = (size_t)rails->domains * (size_t)rails->members, tokens_max = rails->rails->tokens_max;
    size_t crossing = (size_t)routing->cross_count[domain], mask_bytes = rails->rails->layout.mask_bytes;
    message->tokens = handle->args.tokens;
    message->recv_max = handle->args.recv_tokens_max;
    message->crossing = (uint32_t)crossing;
    message->experts = handle->args.topk ? handle->args.experts : 0;
    int32_t *at = (int32_t *)(void *)(message + 1);
    memcpy(at, rank_count, 4 * ranks);
    at += ranks;
    memcpy(at, expert_count, 4 * (size_t)message->experts);
    at += message->experts;
    memcpy(at, routing->cross_token + (size_t)domain * tokens_max, 4 * crossing);
    at += crossing;
    memcpy(at, routing->cross_mask + (size_t)domain * tokens_max * mask_bytes, crossing * mask_bytes);
    return (size_t)((uint8_t *)at - (uint8_t *)message) + crossing * mask_bytes;
}

/* My rows of one source elsewhere. */
static void note_pulls(epx__ht_rails_t *rails, epx__rail_routing_t *routing, int source, const int32_t *token,
                       const uint8_t *mask, size_t crossing)
{
    size_t bytes = rails->rails->layout.mask_bytes, tokens_max = rails->rails->tokens_max, n = 0;
    int32_t *row = routing->pull_row + (size_t)source * tokens_max;
    int32_t *from = routing->pull_token + (size_t)source * tokens_max;
    for (size_t k = 0; k < crossing; k++) {
        if (!(mask[k * bytes + (size_t)rails->index / 8] >> (rails->index % 8) & 1))
            continue;
        row[n] = (int32_t)k;
        from[n++] = token[k];
    }
}

void epx__ht_rails_hear_begin(epx__ht_rails_t *rails, epx__exchange_handle_t *handle, int member, uint64_t sequence,
                              uint64_t *recv_max)
{
    epx__rail_routing_t *routing = &rails->routing[handle->index];
    const epx__topology_t *topology = rails->rails->topology;
    size_t ranks = (size_t)topology->ranks, bytes = rails->rails->layout.mask_bytes;
    int me = rails->ht->exchange->rank;
    for (int d = 0; d < rails->domains; d++) {
        if (d == rails->home)
            continue;
        const uint8_t *inbox = rails->rails->member[member] + epx__rails_inbox(rails->rails, d, sequence);
        const epx__rail_message_t *message = (const epx__rail_message_t *)(const void *)inbox;
        int source = epx__topology_rank(topology, d, member);
        const int32_t *counts = (const int32_t *)(const void *)(message + 1), *experts = counts + ranks;
        const int32_t *token = experts + message->experts;
        const uint8_t *mask = (const uint8_t *)(token + message->crossing);
        memcpy(handle->matrix + (size_t)source * ranks, counts, 4 * ranks);
        handle->tokens_of[source] = (int32_t)message->tokens;
        recv_max[source] = message->recv_max;
        for (uint32_t e = 0; e < message->experts; e++)
            if (epx__expert_rank(&handle->map, e) == me)
                handle->expert_rows[epx__expert_local(&handle->map, e)] += experts[e];
        routing->in_count[member * rails->domains + d] = (int32_t)message->crossing;
        note_pulls(rails, routing, source, token, mask, message->crossing);
        if (member == rails->index)
            memcpy(routing->in_mask + (size_t)d * rails->rails->tokens_max * bytes, mask, message->crossing * bytes);
    }
}
