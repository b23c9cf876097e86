/*
 * The life of an exchange on a GPU: memory, kernels, failures, stream order. Everything is allocated and every kernel
 * loaded when the buffer is made: a kernel that is loaded while another one spins would wait for it.
 */
#include <stdio.h>
#include <string.h>

#include "algo/ht/cuda/host.h"
#include "base/alloc.h"
#include "base/clock.h"
#include "base/fail.h"

/* ---- memory: two slabs, cut twice by the same function (once to measure) ---- */

typedef struct cutter {
    char *base;
    size_t at;
} cutter_t;

static void *cut(cutter_t *c, size_t count, size_t bytes)
{
    c->at = (c->at + 255) / 256 * 256;
    void *piece = c->base ? c->base + c->at : NULL;
    c->at += count * bytes;
    return piece;
}

/* Slots of a token at most: a mask may name every rank. */
static size_t slots_max(const ht_cuda_t *h)
{
    return (size_t)h->exchange->topology->ranks;
}

static void cut_rails(ht_cuda_t *h, cutter_t *c)
{
    const epx__topology_t *t = h->exchange->topology;
    size_t ranks = (size_t)t->ranks, domains = (size_t)t->domains;
    h->rails = cut(c, 1, sizeof *h->rails);
    h->rail_member = cut(c, (size_t)t->per_domain, sizeof *h->rail_member);
    h->rail_rank_of = cut(c, ranks, 4);
    h->rail_index_of = cut(c, ranks, 4);
    h->rail_channels = cut(c, domains * EPX__RAIL_CHANNELS, sizeof *h->rail_channels);
    h->rail_state = cut(c, domains, sizeof *h->rail_state);
    h->rail_told = cut(c, ranks, 8);
    h->rail_come = cut(c, ranks, 8);
    h->rail_hands = cut(c, ranks * HT_HANDS, 8);
    h->rail_before = cut(c, domains * h->groups_max, 4);
}

static void cut_rail_record(const ht_cuda_t *h, ht_record_t *r, cutter_t *c)
{
    const epx__topology_t *t = h->exchange->topology;
    size_t ranks = (size_t)t->ranks, domains = (size_t)t->domains, tokens = h->exchange->config.tokens_max;
    r->cross_count = cut(c, domains, 4);
    r->cross_token = cut(c, domains * tokens, 4);
    r->cross_at = cut(c, domains * tokens, 4);
    r->in_count = cut(c, ranks, 4);
    r->pull_row = cut(c, ranks * tokens, 4);
    r->pull_token = cut(c, ranks * tokens, 4);
    r->sum_row = cut(c, ranks * tokens, 4);
    r->sum_first = cut(c, ranks, 4);
}

static void cut_device(ht_cuda_t *h, cutter_t *c)
{
    const epx_buffer_config_t *config = &h->exchange->config;
    size_t ranks = (size_t)h->exchange->topology->ranks, tokens = config->tokens_max;
    h->groups_max = (config->tokens_max + 31) / 32;
    h->state = cut(c, 1, sizeof *h->state);
    h->produced = cut(c, ranks * HT_WORDS, 4);
    h->consumed = cut(c, ranks * HT_WORDS, 4);
    h->taken = cut(c, ranks, 4);
    h->expert_count = cut(c, config->experts_max, 4);
    h->peers = cut(c, ranks, sizeof(char *));
    h->domain_of = cut(c, ranks, 4);
    h->recv_max_of = cut(c, ranks, 8);
    h->bit = cut(c, ranks * h->groups_max, 4);
    h->before = cut(c, ranks * h->groups_max, 4);
    if (config->expert_rank) {
        h->rank_of = cut(c, config->experts, 4);
        h->local_of = cut(c, config->experts, 4);
        h->expert_list = cut(c, config->experts, 4);
        h->expert_start = cut(c, ranks + 1, 4);
    }
    for (uint32_t i = 0; i < config->handles_max; i++) {
        ht_record_t *r = &h->records[i];
        r->dst_rank = cut(c, tokens * slots_max(h), 4);
        r->dst_row = cut(c, tokens * slots_max(h), 4);
        r->matrix = cut(c, ranks * ranks, 4);
        r->tokens_of = cut(c, ranks, 4);
        r->first = cut(c, ranks, 4);
        r->start = cut(c, ranks, 4);
        r->src_rows = ranks * tokens;
        r->src_token = cut(c, r->src_rows, 4);
        if (h->exchange->topology->domains > 1)
            cut_rail_record(h, r, c);
    }
    if (h->exchange->topology->domains > 1)
        cut_rails(h, c);
}

static void cut_pinned(ht_cuda_t *h, cutter_t *c)
{
    const epx_buffer_config_t *config = &h->exchange->config;
    size_t ranks = (size_t)h->exchange->topology->ranks;
    h->host = cut(c, 1, sizeof *h->host);
    h->works = cut(c, ranks, 4);
    h->try_result = cut(c, 2, 4);
    for (uint32_t i = 0; i < config->handles_max; i++) {
        ht_record_t *r = &h->records[i];
        r->host_words = cut(c, HT_HOST_EXPERTS(ranks) + config->experts_max, 8);
    }
}

static epx_status_t allocate(ht_cuda_t *h)
{
    const epx_buffer_config_t *config = &h->exchange->config;
    cutter_t measure = {0}, measure_pinned = {0};
    h->marks_count = config->leases_max + config->handles_max;
    h->records = epx__calloc(config->handles_max, sizeof *h->records);
    h->tickets = epx__calloc(config->handles_max, sizeof *h->tickets);
    h->marks = epx__calloc(h->marks_count, sizeof(cudaEvent_t));
    h->marked = epx__calloc(h->marks_count, sizeof *h->marked);
    if (!h->records || !h->tickets || !h->marks || !h->marked)
        return epx__fail(EPX_E_NOMEM, "no memory for %u handles", config->handles_max);
    cut_device(h, &measure);
    cut_pinned(h, &measure_pinned);
    cudaError_t error = cudaMalloc((void **)&h->slab, measure.at);
    if (error != cudaSuccess)
        return epx__fail(
            EPX_E_NOMEM,
            "GPU memory for %u handles of %u tokens (%zu bytes): %s; handles_max and tokens_max say how much",
            config->handles_max, config->tokens_max, measure.at, cudaGetErrorString(error));
    error = cudaHostAlloc((void **)&h->pinned, measure_pinned.at, cudaHostAllocMapped | cudaHostAllocPortable);
    if (error != cudaSuccess)
        return epx__fail(EPX_E_NOMEM, "pinned host memory for %u handles (%zu bytes): %s", config->handles_max,
                         measure_pinned.at, cudaGetErrorString(error));
    memset(h->pinned, 0, measure_pinned.at);
    cutter_t device = {.base = h->slab}, pinned = {.base = h->pinned};
    cut_device(h, &device);
    cut_pinned(h, &pinned);
    error = cudaMemsetAsync(h->slab, 0, measure.at, h->device->stream);
    if (error == cudaSuccess) /* as epx_layout does: the driver loads what fills when it is first used */
        error = cudaMemsetAsync(h->slab, 0, 4, h->device->stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(h->device->stream);
    return error == cudaSuccess ? EPX_OK : epx__cuda_fail(error, "zeroing the exchange's memory");
}

static epx_status_t make_events(ht_cuda_t *h)
{
    cudaError_t error = cudaEventCreateWithFlags(&h->order, cudaEventDisableTiming);
    for (uint32_t i = 0; error == cudaSuccess && i < h->marks_count; i++)
        error = cudaEventCreateWithFlags(&h->marks[i], cudaEventDisableTiming);
    return error == cudaSuccess ? EPX_OK : epx__cuda_fail(error, "making events");
}

/* ---- tables on the device ---- */

static epx_status_t put(ht_cuda_t *h, void *to, const void *from, size_t bytes)
{
    return h->exchange->device->ops->copy_in(h->exchange->device, to, from, bytes);
}

/* The configured map, and its inverse: experts by (rank, local number). */
static epx_status_t put_map(ht_cuda_t *h)
{
    const epx_buffer_config_t *config = &h->exchange->config;
    uint32_t experts = config->experts, ranks = (uint32_t)h->exchange->topology->ranks, at = 0;
    if (!config->expert_rank)
        return EPX_OK;
    int32_t *tables = epx__calloc(2ull * experts + ranks + 1, sizeof *tables);
    if (!tables)
        return epx__fail(EPX_E_NOMEM, "no memory for a map of %u experts", experts);
    int32_t *local = tables, *list = local + experts, *start = list + experts;
    for (uint32_t r = 0; r < ranks; r++) {
        start[r] = (int32_t)at;
        for (uint32_t e = 0; e < experts; e++) {
            if (config->expert_rank[e] != (int32_t)r)
                continue;
            local[e] = (int32_t)at - start[r];
            list[at++] = (int32_t)e;
        }
    }
    start[ranks] = (int32_t)at;
    epx_status_t status = put(h, h->rank_of, config->expert_rank, sizeof *local * experts);
    if (status == EPX_OK)
        status = put(h, h->local_of, local, sizeof *local * experts);
    if (status == EPX_OK)
        status = put(h, h->expert_list, list, sizeof *list * experts);
    if (status == EPX_OK)
        status = put(h, h->expert_start, start, sizeof *start * (ranks + 1));
    epx__free(tables);
    return status;
}

static epx_status_t put_tables(ht_cuda_t *h)
{
    size_t ranks = (size_t)h->exchange->topology->ranks;
    EPX__TRY(put(h, h->peers, h->exchange->peer, sizeof(char *) * ranks));
    EPX__TRY(put(h, h->domain_of, h->exchange->topology->domain_of, sizeof(int32_t) * ranks));
    return put_map(h);
}

/* ---- create, destroy ---- */

/* Which GPU a rank has, for all to know. */
typedef struct card {
    uint64_t host;
    char bus[32];
} card_t;

/* Collective: ranks on one GPU share its SMs, so that the kernels of all can be resident. */
static epx_status_t share_sms(ht_cuda_t *h)
{
    epx__exchange_t *x = h->exchange;
    int ranks = x->topology->ranks, sharing = 0;
    card_t mine = {.host = epx__host_id()}, *all = epx__calloc((size_t)ranks, sizeof *all);
    cudaError_t error = cudaDeviceGetPCIBusId(mine.bus, (int)sizeof mine.bus, h->ordinal);
    if (error != cudaSuccess)
        snprintf(mine.bus, sizeof mine.bus, "GPU %d", h->ordinal);
    epx_status_t status = all ? epx__bootstrap_allgather(x->bootstrap, &mine, sizeof mine, all, 0)
                              : epx__fail(EPX_E_NOMEM, "no memory for %d cards", ranks);
    for (int r = 0; status == EPX_OK && r < ranks; r++)
        sharing += memcmp(&mine, &all[r], sizeof mine) == 0;
    epx__free(all);
    h->sms = sharing > 1 ? h->device->sms / sharing : h->device->sms;
    h->sms = h->sms < 1 ? 1 : h->sms;
    return status;
}

static epx_status_t load_kernels(ht_cuda_t *h)
{
    h->shared_max = h->device->shared_max - (int)HT_SHARED_OWN;
    int error = epx__ht_load_begin(h->device->stream);
    if (error == 0)
        error = epx__ht_load_small(h->device->stream);
    if (error == 0)
        error = epx__ht_load_rows((uint32_t)h->shared_max, h->device->stream);
    if (error == 0)
        error = epx__ht_load_combine((uint32_t)h->shared_max, h->device->stream);
    if (error == 0 && h->rails)
        error = epx__ht_load_rail_combine((uint32_t)h->shared_max, h->device->stream);
    if (error == 0 && h->rails)
        error = epx__ht_load_try(h->device->stream);
    if (error == 0)
        error = (int)cudaStreamSynchronize(h->device->stream);
    return error == 0 ? EPX_OK : epx__cuda_fail((cudaError_t)error, "loading the kernels for this GPU");
}

static epx_status_t create_on(ht_cuda_t *h)
{
    epx__exchange_t *x = h->exchange;
    if (x->layout.chunk_words != 2 * HT_WORDS)
        return epx__fail(EPX_E_MISMATCH, "the window has %u progress words a peer; the CUDA exchange needs %u",
                         x->layout.chunk_words, 2 * HT_WORDS);
    if (x->config.tokens_max >> HT_WORD_SHIFT)
        return epx__fail(EPX_E_INVALID, "tokens_max is %u; at most %u with CUDA", x->config.tokens_max,
                         (1u << HT_WORD_SHIFT) - 1);
    if (x->topology->domains > 1 && !x->net)
        return epx__fail(EPX_E_UNSUPPORTED, "%d domains of GPUs without a network between them", x->topology->domains);
    EPX__TRY(allocate(h));
    EPX__TRY(make_events(h));
    EPX__TRY(put_tables(h));
    if (h->rails)
        EPX__TRY(epx__ht_cuda_rails_fill(h));
    return load_kernels(h);
}

static void release(ht_cuda_t *h)
{
    for (uint32_t i = 0; h->marks && i < h->marks_count; i++) {
        if (h->marks[i])
            (void)cudaEventDestroy(h->marks[i]);
    }
    if (h->order)
        (void)cudaEventDestroy(h->order);
    (void)cudaFree(h->slab);
    (void)cudaFreeHost(h->pinned);
    epx__free(h->records);
    epx__free(h->tickets);
    epx__free(h->marks);
    epx__free(h->marked);
    epx__free(h);
}

static epx_status_t create(epx__exchange_t *exchange)
{
    int before;
    ht_cuda_t *h = epx__calloc(1, sizeof *h);
    if (!h)
        return epx__fail(EPX_E_NOMEM, "no memory for an exchange");
    h->exchange = exchange;
    h->device = (const epx__cuda_device_t *)exchange->device;
    h->ordinal = exchange->device->ordinal;
    epx_status_t agreed = share_sms(h), status = epx__cuda_enter(h->ordinal, &before);
    if (status == EPX_OK) {
        status = agreed == EPX_OK ? create_on(h) : agreed;
        exchange->impl = h; /* before the rails' thread, which looks there */
        if (exchange->topology->domains > 1)
            status = epx__ht_cuda_rails_start(h, status);
        if (status != EPX_OK) {
            exchange->impl = NULL;
            release(h);
        }
        epx__cuda_leave(exchange->device->ordinal, before);
    } else {
        epx__free(h);
    }
    return status;
}

void epx__ht_cuda_stop(ht_cuda_t *h)
{
    epx__deadline_t deadline = epx__deadline_ms(2 * h->exchange->config.timeout_ms + 1000);
    while (h->ordered && cudaEventQuery(h->order) == cudaErrorNotReady && !epx__deadline_passed(&deadline))
        epx__sleep_ns(50000);
    __atomic_store_n(&h->host->abort, 1, __ATOMIC_RELEASE);
}

/* Local and bounded. */
static void destroy(epx__exchange_t *exchange)
{
    ht_cuda_t *h = exchange->impl;
    int before;
    if (!h || epx__cuda_enter(h->ordinal, &before) != EPX_OK)
        return;
    epx__ht_cuda_stop(h);
    epx__ht_cuda_rails_stop(h);
    release(h);
    (void)cudaGetLastError();
    epx__cuda_leave(h->ordinal, before);
    exchange->impl = NULL;
}

/* ---- failures ---- */

static const char *const kind_names[] = {"?",           "dispatch_begin", "dispatch_end or dispatch_again",
                                         "combine",     "barrier",        "check",
                                         "ll_dispatch", "ll_combine"};

static const char *kind_name(uint64_t kind)
{
    return kind_names[kind < sizeof kind_names / sizeof *kind_names ? kind : 0];
}

/* A peer raised the alarm: which one, and about what? */
static void fault_told(ht_cuda_t *h, const ht_host_t *r)
{
    epx__exchange_t *x = h->exchange;
    epx__error_slot_t slot;
    for (int p = 0; p < x->topology->ranks; p++) {
        const char *at = (const char *)x->window.base + x->layout.errors_offset + sizeof slot * (size_t)p;
        if (p == x->rank || x->device->ops->copy_out(x->device, &slot, at, sizeof slot) != EPX_OK || slot.word == 0)
            continue;
        slot.words[sizeof slot.words - 1] = 0;
        epx__exchange_fault(
            x, EPX_E_PEER, "rank %d failed in half %llu, %s (%s%s%s), while this rank was in half %llu, %s", p,
            (unsigned long long)slot.sequence, kind_name(slot.word >> 8), epx__status_name((epx_status_t)slot.status),
            slot.words[0] ? ": " : "", slot.words, (unsigned long long)r->sequence, kind_name(r->kind));
        return;
    }
    epx__exchange_fault(x, EPX_E_PEER, "a rank failed while this one was in half %llu, %s",
                        (unsigned long long)r->sequence, kind_name(r->kind));
}

static void fault_own(ht_cuda_t *h, const ht_host_t *r)
{
    static const char *const stages[] = {[HT_STAGE_MAILBOX] = "to have read the last message but one",
                                         [HT_STAGE_MESSAGE] = "to take part",
                                         [HT_STAGE_CREDIT] = "to make room in its ring",
                                         [HT_STAGE_ARRIVAL] = "to put its rows",
                                         [HT_STAGE_END] = "to end the half",
                                         [HT_STAGE_BARRIER] = "(this rank's other blocks)",
                                         [HT_STAGE_RAIL] = "to send its message from another domain",
                                         [HT_STAGE_COME] = "to send what comes from another domain",
                                         [HT_STAGE_ROOM] = "to make room in its receive ring in another domain",
                                         [HT_STAGE_CHANNEL] = "to make room in the channel to it",
                                         [HT_STAGE_STAGED] = "to put up its expert outputs"};
    epx_status_t status = (epx_status_t)r->status;
    unsigned long long half = (unsigned long long)r->sequence, expected = (unsigned long long)r->expected,
                       seen = (unsigned long long)r->seen;
    const char *kind = kind_name(r->kind);
    if (r->stage == HT_STAGE_KIND)
        epx__exchange_fault(h->exchange, status, "half %llu: this rank is in %s, rank %d in %s", half, kind, r->peer,
                            kind_name(r->seen));
    else if (r->stage == HT_STAGE_HANDLE)
        epx__exchange_fault(h->exchange, status,
                            "half %llu, %s: this rank uses the handle of dispatch %llu, rank %d that of dispatch %llu",
                            half, kind, expected, r->peer, seen);
    else if (r->stage == HT_STAGE_SHAPE)
        epx__exchange_fault(h->exchange, status, "half %llu, %s: rank %d passes other sizes or formats than this rank",
                            half, kind, r->peer);
    else if (r->stage == HT_STAGE_OWED)
        epx__exchange_fault(h->exchange, status,
                            "call %llu, %s: its slot may still be written by rank %d, which has not ended call %llu "
                            "(it was given up there, or the call was released after its send half) but is alive; end "
                            "its process, or make the buffer with more ll_slots",
                            half, kind, r->peer, expected);
    else if (r->stage == HT_STAGE_GONE)
        epx__exchange_fault(h->exchange, status,
                            "half %llu, %s: rank %d, in another domain, has left or cannot be reached (%s)", half, kind,
                            r->peer, epx__status_name((epx_status_t)r->seen));
    else if (r->stage == HT_STAGE_OVERFLOW)
        epx__exchange_fault(h->exchange, status, "half %llu, %s: rank %d would receive %llu rows but has room for %llu",
                            half, kind, r->peer, seen, expected);
    else
        epx__exchange_fault(
            h->exchange, status, "half %llu, %s: waited %.3f s for rank %d %s (expected %llu, seen %llu)", half, kind,
            (double)r->waited_ns * 1e-9, r->peer,
            r->stage < sizeof stages / sizeof *stages && stages[r->stage] ? stages[r->stage] : "", expected, seen);
}

void epx__ht_cuda_bad_ids(ht_cuda_t *h, uint32_t bad)
{
    uint32_t seen = atomic_load(&h->bad_seen);
    while ((int32_t)(bad - seen) > 0) {
        if (atomic_compare_exchange_weak(&h->bad_seen, &seen, bad)) {
            atomic_fetch_add(&h->exchange->fault.bad_ids, bad - seen);
            return;
        }
    }
}

void epx__ht_cuda_poll_fault(epx__exchange_t *exchange)
{
    ht_cuda_t *h = exchange->impl;
    if (!h)
        return;
    epx__ht_cuda_bad_ids(h, __atomic_load_n(&h->host->bad_ids, __ATOMIC_RELAXED));
    if (!__atomic_load_n(&h->host->ready, __ATOMIC_ACQUIRE) || atomic_load(&exchange->fault.ready))
        return;
    if (h->host->stage == HT_STAGE_TOLD)
        fault_told(h, h->host);
    else
        fault_own(h, h->host);
}

static void interrupt(epx__exchange_t *exchange)
{
    ht_cuda_t *h = exchange->impl;
    if (h)
        __atomic_store_n(&h->host->abort, 1, __ATOMIC_RELEASE);
}

/* ---- stream order of leases and handles ---- */

static bool capturing(epx_stream_t stream)
{
    enum cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing((cudaStream_t)stream, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

/* In a capture there is nothing to mark: the graph's own order holds, and who replays it keeps its leases and handles.
 */
static epx_status_t mark(epx__exchange_t *exchange, uint32_t index, epx_stream_t stream)
{
    ht_cuda_t *h = exchange->impl;
    int before;
    if (index >= h->marks_count)
        return EPX_OK;
    h->marked[index] = false;
    if (capturing(stream))
        return EPX_OK;
    EPX__TRY(epx__cuda_enter(h->ordinal, &before));
    cudaError_t error = cudaEventRecord(h->marks[index], (cudaStream_t)stream);
    epx__cuda_leave(h->ordinal, before);
    h->marked[index] = error == cudaSuccess;
    return error == cudaSuccess ? EPX_OK : epx__cuda_fail(error, "marking a stream");
}

static epx_status_t wait_mark(epx__exchange_t *exchange, uint32_t index, epx_stream_t stream)
{
    ht_cuda_t *h = exchange->impl;
    int before;
    if (index >= h->marks_count || !h->marked[index] || capturing(stream))
        return EPX_OK;
    EPX__TRY(epx__cuda_enter(h->ordinal, &before));
    cudaError_t error = cudaStreamWaitEvent((cudaStream_t)stream, h->marks[index], 0);
    epx__cuda_leave(h->ordinal, before);
    return error == cudaSuccess ? EPX_OK : epx__cuda_fail(error, "making a stream wait");
}

static epx_status_t tables(epx__exchange_t *exchange, epx__exchange_handle_t *handle, epx_handle_tables_t *out)
{
    const ht_cuda_t *h = exchange->impl;
    const ht_record_t *r = &h->records[handle->index];
    out->dst_rank = r->dst_rank;
    out->dst_row = r->dst_row;
    out->src_token = r->src_token;
    return EPX_OK;
}

const epx__exchange_ops_t epx__exchange_cuda = {
    .name = "cuda",
    .create = create,
    .destroy = destroy,
    .layout = epx__ht_cuda_layout,
    .begin = epx__ht_cuda_begin,
    .counts = epx__ht_cuda_counts,
    .rows = epx__ht_cuda_rows,
    .combine = epx__ht_cuda_combine,
    .barrier = epx__ht_cuda_barrier,
    .check = epx__ht_cuda_check,
    .tables = tables,
    .mark = mark,
    .wait_mark = wait_mark,
    .poll_fault = epx__ht_cuda_poll_fault,
    .interrupt = interrupt,
};
