/*
 * The operations: each fills one parameter struct and launches one kernel on the caller's stream. Nothing is allocated
 * and nothing waited for, but in counts.
 *
 * SMs of a call: the caller's `sms`, else the buffer's, else of a GPU's S SMs
 *     dispatch into a lease S / 8, into the caller's memory S / 8 + S / 11, combine 2 S / 11
 * and at most S / (ranks on this GPU). Several domains: see rail_host.c.
 */
#include <string.h>

#include "algo/ht/cuda/host.h"
#include "base/clock.h"
#include "base/fail.h"
#include "plan/format.h"

#define BEGIN_BLOCKS_MAX 16u
#define SPIN_NS 2000000u /* the host polls that long for the counts before it sleeps in between */

/* ---- common to all ---- */

uint64_t epx__ht_cuda_mix(uint64_t hash, uint64_t value)
{
    hash = (hash ^ value) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 32;
}

ht_common_t epx__ht_cuda_common(ht_cuda_t *h, enum epx__kind kind, uint32_t generation, uint64_t shape,
                                uint64_t timeout_ms)
{
    epx__exchange_t *x = h->exchange;
    return (ht_common_t){.rank = x->rank,
                         .ranks = x->topology->ranks,
                         .window = x->window.base,
                         .peers = h->peers,
                         .layout = x->layout,
                         .state = h->state,
                         .host = h->host,
                         .produced = h->produced,
                         .consumed = h->consumed,
                         .taken = h->taken,
                         .rails = h->rails,
                         .timeout_ns = (timeout_ms ? timeout_ms : x->config.timeout_ms) * 1000000u,
                         .kind = (uint32_t)kind,
                         .generation = generation,
                         .shape = epx__ht_cuda_mix(shape, kind)};
}

epx_status_t epx__ht_cuda_open(epx__exchange_t *exchange, epx_stream_t stream, epx__ht_scope_t *s)
{
    ht_cuda_t *h = exchange->impl;
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    *s = (epx__ht_scope_t){.h = h, .stream = (cudaStream_t)stream};
    EPX__TRY(epx__cuda_enter(h->ordinal, &s->before));
    cudaError_t error = cudaStreamIsCapturing(s->stream, &capture);
    s->captured = error == cudaSuccess && capture != cudaStreamCaptureStatusNone;
    if (error == cudaSuccess && !s->captured && h->ordered && h->order_stream != s->stream)
        error = cudaStreamWaitEvent(s->stream, h->order, 0);
    if (error == cudaSuccess)
        return EPX_OK;
    epx__cuda_leave(h->ordinal, s->before);
    return epx__cuda_fail(error, "ordering the call after the one before");
}

/* `error`: of the launch. */
epx_status_t epx__ht_cuda_close(epx__ht_scope_t *s, int error, const char *what)
{
    ht_cuda_t *h = s->h;
    if (error == 0 && !s->captured) {
        error = (int)cudaEventRecord(h->order, s->stream);
        h->order_stream = s->stream;
        h->ordered = true;
    }
    epx__cuda_leave(h->ordinal, s->before);
    return error == 0 ? EPX_OK : epx__cuda_fail((cudaError_t)error, what);
}

uint32_t epx__ht_cuda_blocks(const ht_cuda_t *h, int asked, uint32_t otherwise)
{
    int sms = asked > 0 ? asked : h->exchange->config.sms;
    uint32_t blocks = sms > 0 ? (uint32_t)sms : otherwise;
    blocks = blocks < (uint32_t)h->sms ? blocks : (uint32_t)h->sms;
    return blocks ? blocks : 1;
}

static epx__experts_t device_map(const ht_cuda_t *h, const epx__experts_t *map)
{
    epx__experts_t m = *map;
    m.rank_of = map->rank_of ? h->rank_of : NULL;
    m.local_of = map->rank_of ? h->local_of : NULL;
    return m;
}

static uint32_t align_up(uint64_t value, uint32_t to)
{
    return (uint32_t)((value + to - 1) / to * to);
}

/* ---- layout ---- */

epx_status_t epx__ht_cuda_layout(epx__exchange_t *exchange, const epx_layout_t *layout, const epx__experts_t *map,
                                 epx_stream_t stream)
{
    ht_cuda_t *h = exchange->impl;
    epx__ht_scope_t s;
    ht_layout_t p = {.map = device_map(h, map),
                     .domain_of = h->domain_of,
                     .topk_idx = layout->topk_idx,
                     .bits = layout->topk_idx_bits,
                     .tokens = layout->tokens,
                     .topk = layout->topk,
                     .ranks = (uint32_t)exchange->topology->ranks,
                     .tokens_per_rank = layout->tokens_per_rank,
                     .tokens_per_domain = layout->tokens_per_domain,
                     .tokens_per_expert = layout->tokens_per_expert,
                     .in_rank = layout->in_rank};
    EPX__TRY(epx__ht_cuda_open(exchange, stream, &s));
    cudaError_t error = cudaSuccess;
    if (p.tokens_per_rank)
        error = cudaMemsetAsync(p.tokens_per_rank, 0, 4ull * p.ranks, s.stream);
    if (error == cudaSuccess && p.tokens_per_domain)
        error = cudaMemsetAsync(p.tokens_per_domain, 0, 4ull * (uint32_t)exchange->topology->domains, s.stream);
    if (error == cudaSuccess && p.tokens_per_expert)
        error = cudaMemsetAsync(p.tokens_per_expert, 0, 4ull * layout->experts, s.stream);
    if (error == cudaSuccess)
        error = (cudaError_t)epx__ht_launch_layout(&p, stream);
    return epx__ht_cuda_close(&s, (int)error, "epx_layout");
}

/* ---- begin and counts ---- */

epx_status_t epx__ht_cuda_begin(epx__exchange_t *exchange, epx__exchange_handle_t *handle, epx_stream_t stream)
{
    ht_cuda_t *h = exchange->impl;
    const epx_dispatch_t *a = &handle->args;
    ht_record_t *record = &h->records[handle->index];
    uint64_t shape =
        epx__ht_cuda_mix(epx__ht_cuda_mix(epx__ht_cuda_mix(1, a->topk), a->experts), (uint64_t)a->topk_idx_bits);
    epx__ht_scope_t s;
    record->slots = handle->slots;
    ht_begin_t p = {.c = epx__ht_cuda_common(h, EPX__KIND_BEGIN, handle->generation, shape, a->timeout_ms),
                    .h = *record,
                    .map = device_map(h, &handle->map),
                    .expert_list = handle->map.rank_of ? h->expert_list : NULL,
                    .expert_start = h->expert_start,
                    .topk_idx = a->topk_idx,
                    .in_rank = a->in_rank,
                    .tokens = a->tokens,
                    .topk = a->topk,
                    .alignment = a->expert_alignment,
                    .groups_max = h->groups_max,
                    .bits = a->topk_idx_bits,
                    .recv_max = a->recv_tokens_max,
                    .ticket = ++h->ticket,
                    .bit = h->bit,
                    .before = h->before,
                    .expert_count = h->expert_count,
                    .recv_max_of = h->recv_max_of};
    h->tickets[handle->index] = p.ticket;
    uint32_t blocks = epx__ht_cuda_blocks(h, a->sms, BEGIN_BLOCKS_MAX), groups = (a->tokens + 31) / 32;
    blocks = blocks < BEGIN_BLOCKS_MAX ? blocks : BEGIN_BLOCKS_MAX;
    blocks = blocks < groups ? blocks : groups;
    EPX__TRY(epx__ht_cuda_open(exchange, stream, &s));
    return epx__ht_cuda_close(&s, epx__ht_launch_begin(&p, blocks ? blocks : 1, stream), "launching dispatch_begin");
}

static void take_counts(ht_cuda_t *h, epx__exchange_handle_t *handle)
{
    const uint64_t *words = h->records[handle->index].host_words;
    size_t ranks = (size_t)h->exchange->topology->ranks;
    for (size_t i = 0; i < ranks * ranks; i++)
        handle->matrix[i] = (int32_t)(uint32_t)words[i];
    for (size_t i = 0; i < ranks; i++)
        handle->tokens_of[i] = (int32_t)(uint32_t)words[HT_HOST_TOKENS(ranks) + i];
    for (size_t i = 0; i < handle->local_experts; i++)
        handle->expert_rows[i] = (int32_t)(uint32_t)words[HT_HOST_EXPERTS(ranks) + i];
    epx__ht_cuda_bad_ids(h, (uint32_t)words[HT_HOST_BAD(ranks)]);
    handle->rows = 0;
    for (size_t i = 0; i < ranks; i++)
        handle->rows += (uint32_t)handle->matrix[i * ranks + (size_t)h->exchange->rank];
    handle->counted = true;
}

/* The one wait on the host. The stream may have other work before begin, so the deadline here is a generous one:
 * kernels have their own. */
epx_status_t epx__ht_cuda_counts(epx__exchange_t *exchange, epx__exchange_handle_t *handle)
{
    ht_cuda_t *h = exchange->impl;
    uint64_t timeout_ms = handle->args.timeout_ms ? handle->args.timeout_ms : exchange->config.timeout_ms;
    epx__deadline_t deadline = epx__deadline_ms(4 * timeout_ms + 1000);
    const uint64_t *words = h->records[handle->index].host_words;
    size_t come = 0, all = HT_HOST_EXPERTS(exchange->topology->ranks) + handle->local_experts;
    uint32_t ticket = (uint32_t)h->tickets[handle->index];
    for (uint32_t polls = 1;; polls++) {
        while (come < all && __atomic_load_n(&words[come], __ATOMIC_ACQUIRE) >> 32 == ticket)
            come++;
        if (come < all && polls % 1024 != 0)
            continue;
        epx__ht_cuda_poll_fault(exchange);
        if (atomic_load(&exchange->fault.ready))
            return epx__fail((epx_status_t)atomic_load(&exchange->fault.status), "%s", exchange->fault.words);
        if (come == all)
            break;
        if (epx__deadline_passed(&deadline))
            return epx__exchange_fault(exchange, EPX_E_TIMEOUT,
                                       "the counts of dispatch_begin did not come in %.1f s: the stream is busy or was "
                                       "only captured (give recv_tokens_max in a graph)",
                                       (double)epx__deadline_waited_ns(&deadline) * 1e-9);
        if (epx__deadline_waited_ns(&deadline) > SPIN_NS)
            epx__sleep_ns(20000);
    }
    epx__ht_cuda_poll_fault(exchange);
    take_counts(h, handle);
    return EPX_OK;
}

/* ---- rows ---- */

/* Lay the stages, their barriers and the table out; false when it is too much. */
static bool lay_out(const ht_cuda_t *h, size_t table_bytes, ht_cut_t *cut)
{
    cut->bars_offset = cut->warps * cut->stages * cut->stage_bytes;
    cut->table_offset = align_up(cut->bars_offset + cut->warps * cut->stages * 8u, 16);
    size_t total = cut->table_offset + table_bytes;
    cut->total_bytes = (uint32_t)total;
    return total <= (size_t)h->shared_max;
}

static epx_status_t too_many_ranks(const ht_cuda_t *h)
{
    return epx__fail(EPX_E_UNSUPPORTED, "tables of %d ranks do not fit into a block's shared memory (%d bytes)",
                     h->exchange->topology->ranks, h->shared_max);
}

/* As many warps as fit, each with one stage of a whole row; larger rows go in equal chunks. */
static epx_status_t cut_rows(const ht_cuda_t *h, size_t row_bytes, uint32_t side_bulk, size_t table_bytes,
                             ht_cut_t *cut)
{
    const uint32_t stage_most = 16384;
    uint32_t chunks = (uint32_t)((row_bytes + side_bulk + stage_most - 1) / stage_most);
    uint32_t chunk = align_up((row_bytes + chunks - 1) / chunks, 16);
    *cut = (ht_cut_t){.stages = 1, .chunk_bytes = chunk, .chunks = (uint32_t)((row_bytes + chunk - 1) / chunk)};
    cut->stage_bytes = align_up((uint64_t)chunk + side_bulk, 128);
    cut->warps = HT_WARPS_MAX;
    while (cut->warps > 0 && !lay_out(h, table_bytes, cut))
        cut->warps--;
    return cut->warps ? EPX_OK : too_many_ranks(h);
}

/* Several domains: by place in the domain, the own one unused. */
static uint32_t rings_of(const ht_cuda_t *h)
{
    const epx__topology_t *t = h->exchange->topology;
    return h->rails ? (t->per_domain > 1 ? (uint32_t)t->per_domain : 0) : (uint32_t)t->ranks - 1;
}

_Static_assert((HT_WORDS & (HT_WORDS - 1)) == 0, "lap_of makes what divides it");

/* How many batches a ring has, of those that there is room for: a power of two, so that it divides HT_WORDS. Batch b
 * waits for no other than b - lap, and that one for b - 2 lap, so whatever is late in batch b holds up b + lap, b + 2
 * lap, ... alone. b + HT_WORDS, which has the same words and counter, must be one of these. */
static uint64_t lap_of(uint64_t batches)
{
    uint64_t lap = 1;
    while (2 * lap <= batches && lap < HT_WORDS)
        lap *= 2;
    return batches ? lap : 0;
}

/*
 * Rings for peers in the reserve: rows in one, and rows behind a progress word. Each word costs its writer a fence and
 * its reader a look, but many rows behind one are late: 16 words a ring, more where each has HT_BATCH_GOOD rows then.
 */
static epx_status_t cut_ring(const ht_cuda_t *h, const epx__row_shape_t *shape, uint64_t *ring_bytes, uint64_t *rows,
                             uint32_t *batch)
{
    const epx__exchange_t *x = h->exchange;
    uint64_t peers = rings_of(h);
    *ring_bytes = peers ? x->layout.reserve_bytes / peers / EPX__ROW_ALIGN * EPX__ROW_ALIGN : 0;
    *rows = epx__place_capacity(shape, *ring_bytes);
    uint64_t lap = lap_of(*rows / HT_BATCH_GOOD), behind = *rows / (lap > 16 ? lap : 16);
    if (behind < HT_BATCH_LEAST)
        behind = *rows / 4 < HT_BATCH_LEAST ? *rows / 4 : HT_BATCH_LEAST;
    *batch = behind ? (uint32_t)behind : 1;
    *rows = lap_of(*rows / *batch) * *batch;
    if (peers && *rows == 0)
        return epx__fail(
            EPX_E_INVALID,
            "reserve_bytes %zu is too small to pass rows of %zu bytes from %llu peers through it; at least "
            "%llu is needed",
            x->config.reserve_bytes, epx__row_shape_bytes(shape), (unsigned long long)peers,
            (unsigned long long)(peers * (epx__row_shape_bytes(shape) + 8 * EPX__ROW_ALIGN)));
    return EPX_OK;
}

/* Side data goes by bulk copies when it is packed and aligned like rows are. */
static uint32_t side_bulk(const ht_cuda_t *h, const epx_rows_t *r, const epx__target_t *target, size_t side_bytes)
{
    bool can = h->device->major >= 9 && side_bytes && side_bytes % 16 == 0 && side_bytes <= 4096 &&
               r->side_elem_stride_bytes == (int64_t)r->side_elem_bytes && (uintptr_t)r->side % 16 == 0 &&
               r->side_token_stride_bytes % 16 == 0 && (uintptr_t)target->place.side % 16 == 0;
    return can ? (uint32_t)side_bytes : 0;
}

static uint64_t rows_shape(const epx__row_shape_t *s)
{
    return epx__ht_cuda_mix(
        epx__ht_cuda_mix(epx__ht_cuda_mix(epx__ht_cuda_mix(epx__ht_cuda_mix(2, s->row_bytes), s->side_bytes), s->topk),
                         s->idx_bytes),
        s->weights);
}

/*
 * Who of the domain's blocks sends. With rings, what is sent to others is copied out there. More sending blocks than
 * fill the links only make their own rows wait, and so all who wait to hear of these, and so do more warps than have
 * two dozen rows for others under way. Four ranks, 28 blocks, of which send 12: 590 us, 16 650, 20 777; 12 with 8 warps
 * each 540 (H200).
 */
static void share_blocks(const ht_cuda_t *h, bool rings, ht_rows_t *p)
{
    p->send_blocks = p->near_blocks;
    p->send_warps = p->cut.warps;
    if (!rings)
        return;
    uint32_t others = h->rails ? rings_of(h) - 1 : rings_of(h), all = others + 1;
    p->near_blocks = p->near_blocks < 2 ? 2 : p->near_blocks;
    p->send_blocks = p->near_blocks * 9 * all / (9 * all + 16 * others);
    p->send_blocks = p->send_blocks ? p->send_blocks : 1;
    uint32_t warps = 24 / others < 5 ? 5 : 24 / others;
    p->send_warps = warps < p->cut.warps ? warps : p->cut.warps;
}

epx_status_t epx__ht_cuda_rows(epx__exchange_t *exchange, epx__exchange_handle_t *handle, const epx_rows_t *rows,
                               bool first, const epx__target_t *target, epx_stream_t stream)
{
    ht_cuda_t *h = exchange->impl;
    const epx_dispatch_t *a = &handle->args;
    uint32_t peers = (uint32_t)exchange->topology->ranks - 1, sms = (uint32_t)h->device->sms;
    epx__row_shape_t shape = {.row_bytes = rows->row_bytes,
                              .side_bytes = rows->side_elem_bytes * rows->side_elems,
                              .topk = first ? a->topk : 0,
                              .idx_bytes = (uint32_t)a->topk_idx_bits / 8,
                              .weights = first && a->topk && a->topk_weights,
                              .src_token = 1};
    ht_rows_t p = {.c = epx__ht_cuda_common(h, EPX__KIND_ROWS, handle->generation, rows_shape(&shape), a->timeout_ms),
                   .h = h->records[handle->index],
                   .map = device_map(h, &handle->map),
                   .tokens = a->tokens,
                   .topk = shape.topk,
                   .bits = a->topk_idx_bits,
                   .first = first,
                   .own = target->own,
                   .x = rows->x,
                   .side = rows->side,
                   .row_bytes = rows->row_bytes,
                   .x_stride = rows->x_stride_bytes,
                   .side_bytes = (uint32_t)shape.side_bytes,
                   .side_elems = rows->side_elems,
                   .side_elem_bytes = (uint32_t)rows->side_elem_bytes,
                   .side_token_stride = rows->side_token_stride_bytes,
                   .side_elem_stride = rows->side_elem_stride_bytes,
                   .topk_idx = a->topk_idx,
                   .topk_weights = a->topk_weights,
                   .row_shape = shape,
                   .direct = !target->own,
                   .place_offset = target->lease_offset,
                   .capacity = target->capacity,
                   .place = target->place,
                   .tail_to = handle->worst_case ? target->capacity : 0};
    p.side_bulk = side_bulk(h, rows, target, shape.side_bytes);
    if (target->own) {
        p.place_offset = exchange->layout.reserve_offset;
        EPX__TRY(cut_ring(h, &shape, &p.ring_bytes, &p.capacity, &p.batch));
    }
    EPX__TRY(cut_rows(h, rows->row_bytes, p.side_bulk, HT_DEST_BYTES * (size_t)(peers + 1), &p.cut));
    uint32_t blocks = epx__ht_cuda_blocks(h, a->sms, target->own ? sms / 8 + sms / 11 : sms / 8);
    if (h->rails)
        EPX__TRY(epx__ht_cuda_rail_rows(h, a->sms, &shape, &p, &blocks));
    p.near_blocks = blocks - p.rail_send - p.rail_pull - (h->rails ? 1 : 0);
    share_blocks(h, target->own && rings_of(h), &p);
    blocks = p.near_blocks + p.rail_send + p.rail_pull + (h->rails ? 1 : 0);
    epx__ht_scope_t s;
    EPX__TRY(epx__ht_cuda_open(exchange, stream, &s));
    return epx__ht_cuda_close(&s, epx__ht_launch_rows(&p, blocks, stream), "launching dispatch_end");
}

/* ---- combine ---- */

/*
 * Each warp has two stages with a buffer for every row of a token. The copy engine takes about 80 ns for a load,
 * however small, so pieces should be large: with 12 warps or more, of `chunk_good` bytes and more, else 8 or 4 warps.
 */
static epx_status_t cut_combine(const ht_cuda_t *h, size_t row_bytes, uint32_t slots, uint32_t chunk_good,
                                size_t table_bytes, ht_cut_t *cut, uint32_t *slots_bulk)
{
    const uint32_t chunk_most = 8192, stages = 2;
    if (table_bytes + 65536 > (size_t)h->shared_max)
        return too_many_ranks(h);
    size_t left = (size_t)h->shared_max - table_bytes - HT_WARPS_MAX * stages * 8u - 16u;
    *slots_bulk = h->device->major >= 9 && slots <= HT_SLOTS_BULK ? slots : 0;
    uint32_t buffers = stages * (*slots_bulk ? *slots_bulk : 1), warps = HT_WARPS_MAX;
    while (warps > 4 && left / ((size_t)warps * buffers) < chunk_good)
        warps -= 4;
    uint32_t chunk = (uint32_t)(left / ((size_t)warps * buffers)) / 128 * 128;
    chunk = chunk < chunk_most ? chunk : chunk_most;
    uint32_t chunks = (uint32_t)((row_bytes + chunk - 1) / chunk);
    chunk = align_up((row_bytes + chunks - 1) / chunks, 16);
    *cut = (ht_cut_t){.stages = stages,
                      .stage_bytes = align_up((uint64_t)chunk * (buffers / stages), 128),
                      .chunk_bytes = chunk,
                      .chunks = (uint32_t)((row_bytes + chunk - 1) / chunk)};
    cut->warps = HT_WARPS_MAX;
    while (cut->warps > 0 && !lay_out(h, table_bytes, cut))
        cut->warps--;
    return cut->warps ? EPX_OK : too_many_ranks(h);
}

/* The offset of memory in the window's lease part, 0 elsewhere. */
uint64_t epx__ht_cuda_in_window(const epx__exchange_t *x, const void *memory, size_t bytes)
{
    uint64_t at = (uint64_t)((uintptr_t)memory - (uintptr_t)x->window.base),
             end = x->layout.lease_offset + x->layout.lease_bytes;
    return at >= x->layout.lease_offset && at < end && bytes <= end - at ? at : 0;
}

epx_status_t epx__ht_cuda_combine(epx__exchange_t *exchange, epx__exchange_handle_t *handle, const epx_combine_t *c,
                                  size_t x_offset, epx_stream_t stream)
{
    ht_cuda_t *h = exchange->impl;
    const epx_dispatch_t *a = &handle->args;
    if (h->rails)
        return epx__ht_cuda_rail_combine(exchange, handle, c, x_offset, stream);
    uint32_t peers = (uint32_t)exchange->topology->ranks - 1, sms = (uint32_t)h->device->sms;
    uint32_t room = handle->worst_case ? a->recv_tokens_max : handle->rows, topk = c->topk_weights ? a->topk : 0;
    epx__row_shape_t ring = {.row_bytes = c->hidden * epx__dtype_bytes(c->dtype), .topk = topk, .weights = topk != 0};
    uint64_t shape = epx__ht_cuda_mix(epx__ht_cuda_mix(epx__ht_cuda_mix(3, ring.row_bytes), (uint64_t)c->dtype), topk);
    ht_combine_t p = {.c = epx__ht_cuda_common(h, EPX__KIND_COMBINE, handle->generation, shape, c->timeout_ms),
                      .h = h->records[handle->index],
                      .tokens = a->tokens,
                      .topk = topk,
                      .dtype = (int)c->dtype,
                      .row_bytes = ring.row_bytes,
                      .x_stride = c->x_stride_bytes,
                      .x = c->x,
                      .x_offset = x_offset == SIZE_MAX ? 0 : x_offset,
                      .weights = c->topk_weights,
                      .bias = {c->bias[0], c->bias[1]},
                      .out = c->out,
                      .out_weights = c->out_topk_weights,
                      .ring_offset = exchange->layout.reserve_offset};
    if (topk)
        p.weights_offset = epx__ht_cuda_in_window(exchange, c->topk_weights, 4ull * topk * room);
    EPX__TRY(cut_ring(h, &ring, &p.ring_bytes, &p.ring_rows, &p.batch));
    p.ring_weights = epx__place_layout_make(&ring, p.ring_rows).topk_weights;
    bool push_x = p.x_offset == 0, push_weights = topk && p.weights_offset == 0;
    /* Rows in a ring are near: more of them under way count for more than large pieces do. */
    EPX__TRY(cut_combine(h, ring.row_bytes, p.h.slots, push_x ? 2048 : 3072, HT_SOURCE_BYTES * (size_t)(peers + 1),
                         &p.cut, &p.slots_bulk));
    p.threads = 32 * p.cut.warps + 32;
    uint32_t blocks = epx__ht_cuda_blocks(h, c->sms, 2 * sms / 11);
    if (peers && (push_x || push_weights)) {
        p.threads = 32 * HT_WARPS_MAX + 32;
        blocks = blocks < 2 ? 2 : blocks;
        /* An SM pushes 28 GB/s, so that 12 fill the links (340), and who has pushed adds. With 6, 8, 10, 12 of 24: two
         * ranks 357, 287, 243, 222 us, four ranks 908, 705, 578, 519, with 14 578 (H200). */
        p.push_blocks = push_x ? blocks / 2 : 1;
    }
    epx__ht_scope_t s;
    EPX__TRY(epx__ht_cuda_open(exchange, stream, &s));
    return epx__ht_cuda_close(&s, epx__ht_launch_combine(&p, blocks, stream), "launching combine");
}

/* ---- barrier and check ---- */

epx_status_t epx__ht_cuda_barrier(epx__exchange_t *exchange, epx_stream_t stream)
{
    ht_cuda_t *h = exchange->impl;
    ht_common_t c = epx__ht_cuda_common(h, EPX__KIND_BARRIER, 0, 0, 0);
    epx__ht_scope_t s;
    EPX__TRY(epx__ht_cuda_open(exchange, stream, &s));
    return epx__ht_cuda_close(&s, epx__ht_launch_barrier(&c, stream), "launching a barrier");
}

/* Two halves: each slot of every mailbox. Waits on the host. */
epx_status_t epx__ht_cuda_check(epx__exchange_t *exchange, uint8_t *works)
{
    ht_cuda_t *h = exchange->impl;
    int ranks = exchange->topology->ranks;
    ht_check_t p = {.c = epx__ht_cuda_common(h, EPX__KIND_CHECK, 0, 0, 0), .works = h->works};
    epx__ht_scope_t s;
    memset(h->works, 0, sizeof *h->works * (size_t)ranks);
    EPX__TRY(epx__ht_cuda_open(exchange, h->device->stream, &s));
    int error = epx__ht_launch_check(&p, h->device->stream);
    if (error == 0)
        error = epx__ht_launch_check(&p, h->device->stream);
    EPX__TRY(epx__ht_cuda_close(&s, error, "launching a check"));
    cudaError_t waited = cudaStreamSynchronize(h->device->stream);
    if (waited != cudaSuccess)
        return epx__cuda_fail(waited, "epx_buffer_check");
    epx__ht_cuda_poll_fault(exchange);
    for (int r = 0; r < ranks; r++)
        works[r] = r == exchange->rank || h->works[r] == 2;
    if (atomic_load(&exchange->fault.ready))
        return epx__fail((epx_status_t)atomic_load(&exchange->fault.status), "%s", exchange->fault.words);
    return EPX_OK;
}
