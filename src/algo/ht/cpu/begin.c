/*
 * Layout, and the first half of a dispatch: from top-k ids to every row's final place.
 *
 * The message to a peer carries my rows for every rank (so that everybody knows the whole matrix) and, for each of the
 * reader's experts, how many of my tokens chose it.
 */
#include <inttypes.h>
#include <string.h>

#include "algo/ht/cpu/ht_cpu.h"
#include "algo/ht/cpu/rail.h"
#include "base/fail.h"

static epx__routing_in_t routing_in(const epx__exchange_handle_t *handle)
{
    const epx_dispatch_t *args = &handle->args;
    return (epx__routing_in_t){.map = handle->map,
                               .tokens = args->tokens,
                               .topk = args->topk,
                               .bits = args->topk_idx_bits,
                               .topk_idx = args->topk_idx,
                               .in_rank = args->in_rank};
}

epx_status_t epx__ht_cpu_layout(epx__exchange_t *exchange, const epx_layout_t *layout, const epx__experts_t *map,
                                epx_stream_t stream)
{
    (void)stream;
    const epx__topology_t *topology = exchange->topology;
    if (layout->tokens_per_rank)
        memset(layout->tokens_per_rank, 0, sizeof(int32_t) * (size_t)topology->ranks);
    if (layout->tokens_per_domain)
        memset(layout->tokens_per_domain, 0, sizeof(int32_t) * (size_t)topology->domains);
    if (layout->tokens_per_expert)
        memset(layout->tokens_per_expert, 0, sizeof(int32_t) * layout->experts);
    if (layout->in_rank)
        memset(layout->in_rank, 0, (size_t)layout->tokens * (size_t)topology->ranks);
    uint32_t bad = 0;
    for (uint32_t t = 0; t < layout->tokens; t++) {
        int32_t ranks[EPX_TOPK_MAX];
        int n = epx__token_ranks(map, layout->topk_idx, layout->topk_idx_bits, t, layout->topk, ranks, &bad);
        for (int i = 0; i < n; i++) {
            if (layout->tokens_per_rank)
                layout->tokens_per_rank[ranks[i]]++;
            if (layout->in_rank)
                layout->in_rank[(size_t)t * (size_t)topology->ranks + (size_t)ranks[i]] = 1;
            bool again = false; /* has an earlier rank of this token the same domain? */
            for (int j = 0; j < i; j++)
                again |= topology->domain_of[ranks[j]] == topology->domain_of[ranks[i]];
            if (layout->tokens_per_domain && !again)
                layout->tokens_per_domain[topology->domain_of[ranks[i]]]++;
        }
        for (uint32_t k = 0; layout->tokens_per_expert && k < layout->topk; k++) {
            int64_t id = epx__topk_id(layout->topk_idx, layout->topk_idx_bits, (size_t)t * layout->topk + k);
            if (id >= 0 && id < (int64_t)layout->experts)
                layout->tokens_per_expert[id]++;
        }
    }
    atomic_fetch_add(&exchange->fault.bad_ids, bad);
    return EPX_OK;
}

/* ---- begin ---- */

typedef struct begin_job {
    epx__exchange_handle_t *handle;
    const int32_t *rank_count;   /* [ranks] mine */
    const int32_t *expert_count; /* [experts] mine, by global id */
    uint64_t *recv_max;          /* [ranks] */
} begin_job_t;

/* My counts for the experts of `rank`, in the order of their numbers there. */
static void counts_for_rank(const begin_job_t *job, int rank, int32_t *out)
{
    const epx__experts_t *map = &job->handle->map;
    if (!map->rank_of) {
        memcpy(out, job->expert_count + (size_t)rank * map->per_rank, sizeof(int32_t) * map->per_rank);
        return;
    }
    for (uint32_t e = 0; e < map->experts; e++)
        if (map->rank_of[e] == rank)
            out[map->local_of[e]] = job->expert_count[e];
}

static void fill(epx__half_t *half, epx__ht_peer_t *peer, epx__message_t *message, void *tail)
{
    const begin_job_t *job = half->job;
    int32_t *counts = tail;
    int ranks = half->ht->exchange->topology->ranks;
    message->tokens = job->handle->args.tokens;
    message->recv_max = job->handle->args.recv_tokens_max;
    memcpy(counts, job->rank_count, sizeof(int32_t) * (size_t)ranks);
    if (job->handle->args.topk)
        counts_for_rank(job, peer->rank, counts + ranks);
}

static void add_expert_rows(epx__exchange_handle_t *handle, const int32_t *from)
{
    for (uint32_t e = 0; handle->args.topk && e < handle->local_experts; e++)
        handle->expert_rows[e] += from[e];
}

static epx_status_t hear(epx__half_t *half, epx__ht_peer_t *peer, const void *tail)
{
    begin_job_t *job = half->job;
    const int32_t *counts = tail;
    int ranks = half->ht->exchange->topology->ranks;
    memcpy(job->handle->matrix + (size_t)peer->rank * (size_t)ranks, counts, sizeof(int32_t) * (size_t)ranks);
    job->handle->tokens_of[peer->rank] = (int32_t)peer->mail.tokens;
    job->recv_max[peer->rank] = peer->mail.recv_max;
    add_expert_rows(job->handle, counts + ranks);
    if (half->ht->rails)
        epx__ht_rails_hear_begin(half->ht->rails, job->handle, (int)(peer - half->ht->peers), half->sequence,
                                 job->recv_max);
    return EPX_OK;
}

static size_t rail_fill(epx__half_t *half, int domain, epx__rail_message_t *message)
{
    const begin_job_t *job = half->job;
    return epx__ht_rails_fill_begin(half->ht->rails, job->handle, domain, job->rank_count, job->expert_count, message);
}

static void rail_heard(epx__half_t *half)
{
    begin_job_t *job = half->job;
    epx__ht_rails_t *rails = half->ht->rails;
    epx__ht_rails_hear_begin(rails, job->handle, rails->index, half->sequence, job->recv_max);
}

/* Tokens by destination, and rows made final. */
static void finish_tables(epx__exchange_handle_t *handle, epx__ht_routing_t *routing, int ranks, int rank,
                          const int32_t *rank_count)
{
    routing->list_start[0] = 0;
    for (int p = 0; p < ranks; p++)
        routing->list_start[p + 1] = routing->list_start[p] + rank_count[p];
    epx__routing_firsts(handle->matrix, ranks, rank, routing->first);
    for (uint32_t t = 0; t < handle->args.tokens; t++)
        for (uint32_t s = 0; s < handle->slots; s++) {
            size_t at = (size_t)t * handle->slots + s;
            int32_t to = routing->dst_rank[at];
            if (to < 0)
                continue;
            routing->list[routing->list_start[to] + routing->dst_row[at]] = (int32_t)t;
            routing->dst_row[at] += routing->first[to];
        }
}

/* Every rank sees every total, so all agree on who is out of room. */
static epx_status_t check_totals(epx__half_t *half, const begin_job_t *job, int32_t *start)
{
    epx__exchange_t *exchange = half->ht->exchange;
    int ranks = exchange->topology->ranks;
    for (int p = 0; p < ranks; p++) {
        uint64_t rows = epx__routing_starts(job->handle->matrix, ranks, p, start);
        if (rows > INT32_MAX)
            return epx__half_fail(half, EPX_E_OVERFLOW, p,
                                  "rank %d would receive %" PRIu64 " rows; 2^31 - 1 is the most", p, rows);
        if (job->recv_max[p] && rows > job->recv_max[p])
            return epx__half_fail(half, EPX_E_OVERFLOW, p,
                                  "rank %d would receive %" PRIu64 " rows but gave recv_tokens_max %" PRIu64, p, rows,
                                  job->recv_max[p]);
    }
    job->handle->rows = (uint32_t)epx__routing_starts(job->handle->matrix, ranks, exchange->rank, start);
    return EPX_OK;
}

epx_status_t epx__ht_cpu_begin(epx__exchange_t *exchange, epx__exchange_handle_t *handle, epx_stream_t stream)
{
    (void)stream;
    epx__ht_cpu_t *ht = exchange->impl;
    epx__ht_routing_t *routing = &ht->routing[handle->index];
    const epx_dispatch_t *args = &handle->args;
    int ranks = exchange->topology->ranks;
    int32_t *rank_count = ht->counts, *expert_count = ht->counts + ranks;
    uint64_t recv_max[ranks];
    uint32_t bad = 0;

    epx__routing_in_t in = routing_in(handle);
    epx__routing_make(&in, handle->slots, rank_count, args->topk ? expert_count : NULL, routing->dst_rank,
                      routing->dst_row, &bad);
    atomic_fetch_add(&exchange->fault.bad_ids, bad);

    begin_job_t job = {handle, rank_count, expert_count, recv_max};
    memcpy(handle->matrix + (size_t)exchange->rank * (size_t)ranks, rank_count, sizeof(int32_t) * (size_t)ranks);
    handle->tokens_of[exchange->rank] = (int32_t)args->tokens;
    recv_max[exchange->rank] = args->recv_tokens_max;
    memset(handle->expert_rows, 0, sizeof(int32_t) * handle->local_experts);
    if (args->topk)
        counts_for_rank(&job, exchange->rank, handle->expert_rows);

    uint64_t shape = epx__shape_mix(0, args->topk);
    shape = epx__shape_mix(shape, args->topk ? args->experts : 0);
    shape = epx__shape_mix(shape, args->topk ? (uint64_t)args->topk_idx_bits : 0);
    shape = epx__shape_mix(shape, args->topk_weights != NULL);
    epx__half_t half = {.ht = ht,
                        .operation = "dispatch_begin",
                        .kind = EPX__KIND_BEGIN,
                        .generation = handle->generation,
                        .shape = shape,
                        .fill = fill,
                        .hear = hear,
                        .rail_fill = rail_fill,
                        .rail_heard = rail_heard,
                        .job = &job};
    if (ht->rails)
        epx__ht_rails_cross(ht, handle);
    EPX__TRY(epx__half_run(&half, args->timeout_ms));
    EPX__TRY(check_totals(&half, &job, routing->start));
    finish_tables(handle, routing, ranks, exchange->rank, rank_count);
    for (uint32_t e = 0; e < handle->local_experts; e++)
        handle->expert_rows[e] = epx__align_rows(handle->expert_rows[e], args->expert_alignment);
    handle->counted = true;
    return EPX_OK;
}
