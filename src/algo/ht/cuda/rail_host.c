/*
 * Several domains on GPUs, the host's part: the device's table of rails, trying the channels, the blocks of a call, and
 * the thread that tells other domains when a kernel has failed.
 *
 * SMs of a call, where neither the call nor the buffer names a number, of a GPU's S: S / 4, for rows cross PCIe and a
 * network, which few SMs fill. Of T: one keeps the books; rows: T / 8 send (at most one a rail), T / 4 pull, the others
 * serve the domain; combine: T / 4 stage if there is need, T / 4 sum for rails (at most one a rail), the others add.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "algo/ht/cuda/host.h"
#include "algo/rails.h"
#include "base/clock.h"
#include "base/fail.h"
#include "plan/format.h"

#define ROWS_BLOCKS_MIN 5u /* two for the domain, send, pull, keeper */
#define COMBINE_BLOCKS_MIN 4u
#define WATCH_NS 3000000u

/* ---- making ---- */

static epx_status_t put(ht_cuda_t *h, void *to, const void *from, size_t bytes)
{
    return h->exchange->device->ops->copy_in(h->exchange->device, to, from, bytes);
}

epx_status_t epx__ht_cuda_rails_fill(ht_cuda_t *h)
{
    const epx__rails_t *rails = h->exchange->net;
    const epx__topology_t *t = h->exchange->topology;
    if (h->sms < (int)ROWS_BLOCKS_MIN)
        return epx__fail(EPX_E_UNSUPPORTED,
                         "several domains need %u SMs for each rank of a GPU; this rank's share is %d of %d",
                         ROWS_BLOCKS_MIN, h->sms, h->device->sms);
    ht_rails_t image = {.domains = t->domains,
                        .members = t->per_domain,
                        .home = rails->domain,
                        .index = rails->index,
                        .tokens_max = rails->tokens_max,
                        .layout = rails->layout,
                        .window = rails->window.base,
                        .member = h->rail_member,
                        .rank_of = h->rail_rank_of,
                        .domain_of = h->domain_of,
                        .index_of = h->rail_index_of,
                        .channels = h->rail_channels,
                        .state = h->rail_state,
                        .told = h->rail_told,
                        .come = h->rail_come,
                        .hands = h->rail_hands,
                        .before = h->rail_before};
    for (int d = 0; d < t->domains; d++) {
        const epx_port_channel_t *of_rail = epx__rails_channel(rails, d, 0); /* the own domain's have window 0 */
        EPX__TRY(put(h, h->rail_channels + d * EPX__RAIL_CHANNELS, of_rail, EPX__RAIL_CHANNELS * sizeof *of_rail));
    }
    EPX__TRY(put(h, h->rail_member, rails->member, sizeof *rails->member * (size_t)t->per_domain));
    EPX__TRY(put(h, h->rail_rank_of, t->member, sizeof(int32_t) * (size_t)t->ranks));
    EPX__TRY(put(h, h->rail_index_of, t->index_of, sizeof(int32_t) * (size_t)t->ranks));
    return put(h, h->rails, &image, sizeof image);
}

static epx_status_t try_rails(ht_cuda_t *h)
{
    const epx__rails_t *rails = h->exchange->net;
    epx__channels_t *channels = rails->channels;
    char words[EPX__CHANNELS_WORDS];
    ht_try_t p = {.rails = h->rails,
                  .memory = channels->memory_count,
                  .barrier = epx__block_word(channels, channels->layout.barrier, 0),
                  .barrier_offset = channels->layout.barrier,
                  .rank = h->exchange->rank,
                  .status = &h->try_result[0],
                  .peer = &h->try_result[1]};
    int error = epx__ht_launch_try(&p, h->device->stream);
    if (error == 0)
        error = (int)cudaStreamSynchronize(h->device->stream);
    if (error != 0)
        return epx__cuda_fail((cudaError_t)error, "trying the rails between domains");
    if (h->try_result[0] == EPX_OK)
        return EPX_OK;
    epx__channels_words(channels, words);
    return epx__fail((epx_status_t)h->try_result[0], "the channels to rank %d, in another domain: %s%s",
                     h->try_result[1], epx__status_text((epx_status_t)h->try_result[0]), words);
}

/* ---- telling other domains of failures ---- */

/* The first failure of this rank's kernels, once. What a peer of the domain told us, that peer tells the others. */
static bool tell(ht_cuda_t *h)
{
    epx__exchange_t *x = h->exchange;
    char words[640];
    if (!__atomic_load_n(&h->host->ready, __ATOMIC_ACQUIRE))
        return false;
    epx__ht_cuda_poll_fault(x);
    if (h->host->stage == HT_STAGE_TOLD || !atomic_load(&x->fault.ready))
        return true;
    snprintf(words, sizeof words, "(%s, half %" PRIu64 "): %s", epx__status_name((epx_status_t)h->host->status),
             h->host->sequence, x->fault.words);
    epx__bootstrap_notify(x->bootstrap, x->notice_tag, words, strlen(words));
    return true;
}

static void *watch(void *context)
{
    ht_cuda_t *h = context;
    while (!atomic_load(&h->watch_stop) && !tell(h))
        epx__sleep_ns(WATCH_NS);
    return NULL;
}

epx_status_t epx__ht_cuda_rails_start(ht_cuda_t *h, epx_status_t made)
{
    epx__exchange_t *x = h->exchange;
    int64_t mine = made, all[x->topology->ranks];
    /* Nobody's kernel waits for a rank that is still loading its own. */
    epx_status_t status = epx__bootstrap_allgather(x->bootstrap, &mine, sizeof mine, all, 0);
    if (made != EPX_OK)
        return made;
    EPX__TRY(status);
    for (int r = 0; r < x->topology->ranks; r++)
        if (all[r] != EPX_OK)
            return epx__fail(EPX_E_PEER, "rank %d could not make its exchange: %s", r,
                             epx__status_name((epx_status_t)all[r]));
    EPX__TRY(try_rails(h));
    int error = pthread_create(&h->watcher, NULL, watch, h);
    if (error)
        return epx__fail(EPX_E_SYSTEM, "no thread to tell other domains of failures: %s", strerror(error));
    h->watching = true;
    return EPX_OK;
}

void epx__ht_cuda_rails_stop(ht_cuda_t *h)
{
    if (!h->watching)
        return;
    atomic_store(&h->watch_stop, true);
    pthread_join(h->watcher, NULL);
    h->watching = false;
}

/* ---- blocks and rings ---- */

static uint32_t at_least_1(uint32_t value)
{
    return value ? value : 1;
}
static uint32_t at_most(uint32_t value, uint32_t most)
{
    return value < most ? value : most;
}

static uint32_t blocks_in_all(const ht_cuda_t *h, int asked, uint32_t least)
{
    uint32_t blocks = epx__ht_cuda_blocks(h, asked, (uint32_t)h->device->sms / 4);
    return blocks < least ? least : blocks;
}

static epx_status_t cut_rail(const ht_cuda_t *h, size_t bytes, epx__rail_cut_t *cut)
{
    const epx__rails_t *rails = h->exchange->net;
    size_t stride = (bytes + 15) / 16 * 16;
    if (epx__rail_cut_make(rails->layout.ring_bytes, stride, cut))
        return EPX_OK;
    return epx__fail(EPX_E_INVALID,
                     "a row of %zu bytes does not fit the ring between two domains (%zu bytes); create the buffer with "
                     "more reserve_bytes: at least %zu",
                     stride, rails->layout.ring_bytes, stride * 4 * (size_t)(h->exchange->topology->domains - 1));
}

epx_status_t epx__ht_cuda_rail_rows(const ht_cuda_t *h, int asked, const epx__row_shape_t *shape, ht_rows_t *p,
                                    uint32_t *blocks)
{
    uint32_t others = (uint32_t)h->exchange->topology->domains - 1;
    size_t record = shape->row_bytes + shape->side_bytes + (size_t)shape->topk * shape->idx_bytes;
    EPX__TRY(cut_rail(h, record + (shape->weights ? 4 * (size_t)shape->topk : 0), &p->rail_cut));
    uint32_t all = blocks_in_all(h, asked, ROWS_BLOCKS_MIN);
    p->rail_send = at_most(at_least_1(all / 8), others);
    p->rail_pull = at_most(at_least_1(all / 4), HT_HANDS);
    *blocks = all;
    return EPX_OK;
}

/* ---- combine ---- */

static bool stages(const ht_rail_combine_t *p)
{
    return p->x_offset == 0 || (p->weights && p->weights_offset == 0);
}

/* A ring for each (reader, domain) in the reserve. */
static epx_status_t cut_stage(const ht_cuda_t *h, ht_rail_combine_t *p)
{
    const epx__exchange_t *x = h->exchange;
    uint64_t pieces = (uint64_t)x->topology->ranks; /* members * domains */
    epx__row_shape_t shape = {.row_bytes = p->x_offset ? 0 : p->row_bytes,
                              .topk = p->weights && !p->weights_offset ? p->topk : 0,
                              .weights = 1};
    p->ring_bytes = x->layout.reserve_bytes / pieces / EPX__ROW_ALIGN * EPX__ROW_ALIGN;
    if (x->topology->per_domain == 1 || !stages(p))
        return EPX_OK;
    uint64_t room = p->ring_bytes < 1u << 30 ? p->ring_bytes : 1u << 30; /* offsets in it travel in 32 bits */
    p->ring_rows = epx__place_capacity(&shape, room);
    p->ring_rows = p->ring_rows < 1u << 30 ? p->ring_rows : 1u << 30;
    p->ring_weights = epx__place_layout_make(&shape, p->ring_rows).topk_weights;
    if (p->ring_rows == 0)
        return epx__fail(EPX_E_INVALID,
                         "reserve_bytes %zu is too small to stage rows of %zu bytes for %" PRIu64
                         " ranks: at least %" PRIu64 " is needed, or put x into a lease",
                         x->config.reserve_bytes, epx__row_shape_bytes(&shape), pieces,
                         pieces * (epx__row_shape_bytes(&shape) + 2u * EPX__PAGE));
    return EPX_OK;
}

epx_status_t epx__ht_cuda_rail_combine(epx__exchange_t *exchange, epx__exchange_handle_t *handle,
                                       const epx_combine_t *c, size_t x_offset, epx_stream_t stream)
{
    ht_cuda_t *h = exchange->impl;
    const epx_dispatch_t *a = &handle->args;
    uint32_t room = handle->worst_case ? a->recv_tokens_max : handle->rows, topk = c->topk_weights ? a->topk : 0;
    uint64_t row_bytes = c->hidden * epx__dtype_bytes(c->dtype);
    uint64_t shape = epx__ht_cuda_mix(epx__ht_cuda_mix(epx__ht_cuda_mix(3, row_bytes), (uint64_t)c->dtype), topk);
    ht_rail_combine_t p = {.c = epx__ht_cuda_common(h, EPX__KIND_COMBINE, handle->generation, shape, c->timeout_ms),
                           .h = h->records[handle->index],
                           .tokens = a->tokens,
                           .topk = topk,
                           .shared_bytes = HT_LENDER_BYTES * (uint32_t)exchange->topology->per_domain,
                           .dtype = (int)c->dtype,
                           .row_bytes = row_bytes,
                           .x_stride = c->x_stride_bytes,
                           .x = c->x,
                           .x_offset = x_offset == SIZE_MAX ? 0 : x_offset,
                           .weights = topk ? c->topk_weights : NULL,
                           .bias = {c->bias[0], c->bias[1]},
                           .out = c->out,
                           .out_weights = c->out_topk_weights,
                           .ring_offset = exchange->layout.reserve_offset};
    if (topk)
        p.weights_offset = epx__ht_cuda_in_window(exchange, c->topk_weights, 4ull * topk * room);
    EPX__TRY(cut_stage(h, &p));
    EPX__TRY(cut_rail(h, row_bytes + 4 * (size_t)topk, &p.cut));
    if (p.shared_bytes > (uint32_t)h->shared_max)
        return epx__fail(EPX_E_UNSUPPORTED, "tables of %d ranks do not fit into a block's shared memory (%d bytes)",
                         exchange->topology->per_domain, h->shared_max);
    uint32_t blocks = blocks_in_all(h, c->sms, COMBINE_BLOCKS_MIN), others = (uint32_t)exchange->topology->domains - 1;
    p.stage_blocks = p.ring_rows ? at_least_1(blocks / 4) : 0;
    p.rail_blocks = at_most(at_least_1(blocks / 4), others);
    p.owner_blocks = at_most(blocks - 1 - p.stage_blocks - p.rail_blocks, HT_HANDS);
    blocks = p.stage_blocks + p.rail_blocks + p.owner_blocks + 1;
    epx__ht_scope_t s;
    EPX__TRY(epx__ht_cuda_open(exchange, stream, &s));
    return epx__ht_cuda_close(&s, epx__ht_launch_rail_combine(&p, blocks, stream), "launching combine");
}
