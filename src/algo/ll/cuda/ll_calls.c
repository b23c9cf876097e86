/*
 * Low latency on GPUs, the host's side: calls. One launch for each call or half; large shapes take up to three, and
 * several domains one more for each half.
 */
#include "algo/ll/cuda/ll_host.h"
#include "algo/ll/cuda/ll_inband.h"
#include "base/fail.h"

/* ---- launching ---- */

static uint32_t blocks_of(const ll_cuda_t *ll, int asked)
{
    int sms = asked > 0 ? asked : ll->exchange->config.sms, most = ll->ht->sms;
    if (most < ll->ht->device->sms) /* ranks share the GPU: our blocks fill an SM, and others' work must find one */
        most -= most / 8 + 1;
    uint32_t blocks = (uint32_t)(sms > 0 && sms < most ? sms : most);
    return blocks ? blocks : 1;
}

static ll_common_t common(const ll_cuda_t *ll, const epx__ll_call_t *call, uint32_t kind, uint64_t timeout_ms)
{
    const epx__exchange_t *x = ll->exchange;
    const epx_ll_dispatch_t *d = &call->dispatch;
    ll_common_t l = {.c = {.rank = x->rank,
                           .ranks = x->topology->ranks,
                           .window = x->window.base,
                           .peers = ll->ht->peers,
                           .layout = x->layout,
                           .state = ll->ht->state,
                           .host = ll->ht->host,
                           .rails = ll->ht->rails,
                           .timeout_ns = (timeout_ms ? timeout_ms : x->config.timeout_ms) * 1000000u,
                           .kind = kind},
                     .state = ll->state,
                     .r = ll->records[call->index],
                     .masked = ll->masked,
                     .gave_up = ll->gave_up,
                     .taken = ll->taken,
                     .combined = ll->combined,
                     .owed = ll->owed,
                     .spoilt = ll->spoilt,
                     .unread = ll->unread,
                     .map = call->map,
                     .hidden = d->hidden,
                     .topk = d->topk,
                     .tokens = d->tokens,
                     .local_experts = call->local_experts,
                     .slots = x->layout.ll.slots,
                     .mask_on_timeout = x->config.ll_mask_on_timeout != 0,
                     .ranked = d->order == EPX_LL_RANK_MAJOR,
                     .early = ll->early,
                     .bits = d->topk_idx_bits,
                     .topk_idx = d->topk_idx};
    if (ll->far) {
        l.place = ll->far->place;
        l.far = ll->far->far;
    }
    l.map.rank_of = call->map.rank_of ? ll->ht->rank_of : NULL;
    l.map.local_of = call->map.rank_of ? ll->ht->local_of : NULL;
    return l;
}

/* ---- dispatch ---- */

static uint32_t shape_hash(const epx_ll_dispatch_t *d)
{
    uint64_t parts[] = {d->hidden,
                        d->topk,
                        d->experts,
                        (uint64_t)d->format,
                        d->topk_weights != NULL,
                        (uint64_t)(d->round_scale || d->ue8m0)};
    uint64_t hash = 1469598103934665603u;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        hash = (hash ^ parts[i]) * 1099511628211u;
    return (uint32_t)(hash ^ hash >> 32);
}

static ll_dispatch_t dispatch_of(const ll_cuda_t *ll, const epx__ll_call_t *call)
{
    const epx_ll_dispatch_t *d = &call->dispatch;
    ll_dispatch_t p = {.l = common(ll, call, LL_KIND_DISPATCH, d->timeout_ms),
                       .ids_block = LL_NO_BLOCK,
                       .book_block = LL_NO_BLOCK,
                       .fp8 = d->format == EPX_LL_FP8,
                       .round_scale = d->round_scale != 0,
                       .ue8m0 = d->ue8m0 != 0,
                       .stamp_shape = shape_hash(d),
                       .x = d->x,
                       .topk_weights = d->topk_weights,
                       .recv_x = d->recv_x,
                       .recv_scales = d->recv_scales,
                       .recv_count = d->recv_count,
                       .src_info = d->src_info,
                       .recv_topk_idx = d->recv_topk_idx,
                       .expert_stats = d->expert_stats,
                       .layout_range = d->layout_range,
                       .recv_topk_weights = d->recv_topk_weights};
    p.l.wait_ns = d->wait_ns;
    p.parts = p.l.ranked ? 1 : call->local_experts;
    p.words = (p.l.c.layout.ll.ranks * p.l.c.layout.ll.tokens_max + 31) / 32;
    return p;
}

static uint32_t index_bytes(const ll_dispatch_t *p)
{
    uint64_t pairs = (uint64_t)p->l.c.layout.ll.ranks * p->l.c.layout.ll.tokens_max * p->l.topk;
    uint64_t bytes = ll_index_bytes(pairs, p->parts, p->words);
    return bytes > LL_SHARED_MOST ? 0 : (uint32_t)bytes;
}

static int launch_inband(ll_dispatch_t p, uint32_t blocks, bool send, bool recv, cudaStream_t stream)
{
    if (send && recv && blocks < LL_WHOLE_BLOCKS_LEAST) {
        int error = launch_inband(p, blocks, true, false, stream);
        return error ? error : launch_inband(p, blocks, false, true, stream);
    }
    ll_roles_t r = ll_roles_of(blocks, send, recv, p.l.tokens);
    p.send = send;
    p.recv = recv;
    p.words = ll_bitmap_words((uint64_t)p.l.c.layout.ll.ranks * p.l.c.layout.ll.tokens_max);
    p.ids_block = r.ids;
    p.book_block = r.counts;
    p.list_block = r.lists;
    p.sum_block = p.topk_weights || p.l.ranked ? r.sums : LL_NO_BLOCK; /* else no combine asks for sums */
    p.place_block = r.places;
    p.send_first = r.send_first;
    p.send_blocks = r.send_blocks;
    p.recv_first = r.recv_first;
    p.recv_blocks = r.recv_blocks;
    uint64_t pairs = (uint64_t)p.l.c.layout.ll.ranks * p.l.c.layout.ll.tokens_max * p.l.topk;
    uint32_t shared = recv ? (uint32_t)ll_inband_index_bytes(pairs, p.parts, p.words) : 0;
    return epx__ll_launch_inband_dispatch(&p, blocks, shared, stream);
}

static int launch_send(ll_dispatch_t p, uint32_t blocks, cudaStream_t stream)
{
    p.send = 1;
    p.ids_block = 0;
    p.send_first = blocks > 1;
    p.send_blocks = blocks - p.send_first;
    return epx__ll_launch_dispatch(&p, blocks, 0, stream);
}

static int launch_recv(const ll_cuda_t *ll, ll_dispatch_t p, uint32_t blocks, cudaStream_t stream)
{
    uint32_t shared = index_bytes(&p);
    p.recv = 1;
    p.book_block = 0;
    if (shared) {
        p.recv_first = blocks > 1;
        p.recv_blocks = blocks - p.recv_first;
        return epx__ll_launch_dispatch(&p, blocks, shared, stream);
    }
    p.index = ll->index;
    int error = epx__ll_launch_dispatch(&p, 1, 0, stream);
    p.book_block = LL_NO_BLOCK;
    p.indexed = 1;
    p.recv_blocks = blocks;
    return error ? error : epx__ll_launch_dispatch(&p, blocks, 0, stream);
}

/* Both halves in one kernel: a block for the ids, one for the books, the others send or spread. */
static int launch_both(const ll_cuda_t *ll, ll_dispatch_t p, uint32_t blocks, cudaStream_t stream)
{
    uint32_t shared = index_bytes(&p);
    if (!shared || blocks < 4) {
        int error = launch_send(p, blocks, stream);
        return error ? error : launch_recv(ll, p, blocks, stream);
    }
    uint32_t senders = (blocks - 2) / 2, useful = (p.l.tokens + 1) / 2;
    senders = senders < useful ? senders : useful;
    p.send = p.recv = 1;
    p.ids_block = 0;
    p.book_block = 1;
    p.send_first = 2;
    p.send_blocks = senders;
    p.recv_first = 2 + senders;
    p.recv_blocks = blocks - p.recv_first;
    return epx__ll_launch_dispatch(&p, blocks, shared, stream);
}

/* Between domains: each half of the domain comes after that of the far ranks. */
static int launch_far(const ll_cuda_t *ll, const ll_dispatch_t *p, uint32_t blocks, bool send, bool recv,
                      cudaStream_t stream)
{
    int error = send ? epx__ll_far_send(ll->far, p, blocks, stream) : 0;
    if (error == 0 && send)
        error = launch_send(*p, blocks, stream);
    if (error == 0 && recv)
        error = epx__ll_far_take(ll->far, p, blocks, stream);
    return error == 0 && recv ? launch_recv(ll, *p, blocks, stream) : error;
}

static epx_status_t run_dispatch(epx__exchange_t *exchange, const epx__ll_call_t *call, epx_stream_t stream, bool send,
                                 bool recv)
{
    ll_cuda_t *ll = exchange->ll;
    epx__ht_scope_t s;
    EPX__TRY(epx__ht_cuda_open(exchange, stream, &s));
    ll_dispatch_t p = dispatch_of(ll, call);
    uint32_t blocks = blocks_of(ll, call->dispatch.sms);
    int error;
    if (ll->far)
        error = launch_far(ll, &p, blocks, send, recv, s.stream);
    else if (ll->inband)
        error = launch_inband(p, blocks, send, recv, s.stream);
    else if (send && recv)
        error = launch_both(ll, p, blocks, s.stream);
    else
        error = send ? launch_send(p, blocks, s.stream) : launch_recv(ll, p, blocks, s.stream);
    return epx__ht_cuda_close(&s, error, recv ? "launching ll_dispatch" : "launching ll_dispatch_send");
}

epx_status_t epx__ll_cuda_dispatch_send(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream)
{
    return run_dispatch(exchange, call, stream, true, false);
}
epx_status_t epx__ll_cuda_dispatch_recv(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream)
{
    return run_dispatch(exchange, call, stream, false, true);
}
epx_status_t epx__ll_cuda_dispatch(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream)
{
    return run_dispatch(exchange, call, stream, true, true);
}

/* ---- combine ---- */

static int launch_combine_far(const ll_cuda_t *ll, ll_combine_t p, uint32_t blocks, cudaStream_t stream)
{
    bool send = p.send, recv = p.recv;
    int error = 0;
    if (send) {
        p.recv = 0;
        error = epx__ll_far_home(ll->far, &p, blocks, stream);
        error = error ? error : epx__ll_launch_combine(&p, blocks, stream);
    }
    if (error == 0 && recv) {
        p.send = 0;
        p.recv = 1;
        error = epx__ll_far_back(ll->far, &p, blocks, stream);
        error = error ? error : epx__ll_launch_combine(&p, blocks, stream);
    }
    return error;
}

static epx_status_t run_combine(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream, uint32_t send,
                                uint32_t recv)
{
    ll_cuda_t *ll = exchange->ll;
    const epx_ll_combine_t *c = &call->combine;
    epx__ht_scope_t s;
    ll_combine_t p = {.l = common(ll, call, LL_KIND_COMBINE, c->timeout_ms),
                      .send = send,
                      .recv = recv,
                      .pre_reduced = c->pre_reduced != 0,
                      .x = c->x ? c->x : ll->zero_copy[call->index],
                      .topk_weights = c->topk_weights,
                      .out = c->out,
                      .weight_left = c->weight_left};
    p.by_rank = p.pre_reduced || p.l.ranked;
    p.l.topk_idx = c->topk_idx;
    EPX__TRY(epx__ht_cuda_open(exchange, stream, &s));
    uint32_t blocks = blocks_of(ll, c->sms);
    int error;
    if (ll->far)
        error = launch_combine_far(ll, p, blocks, s.stream);
    else
        error = (ll->inband ? epx__ll_launch_inband_combine : epx__ll_launch_combine)(&p, blocks, s.stream);
    return epx__ht_cuda_close(&s, error, "launching ll_combine");
}

epx_status_t epx__ll_cuda_combine_send(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream)
{
    return run_combine(exchange, call, stream, 1, 0);
}
epx_status_t epx__ll_cuda_combine_recv(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream)
{
    return run_combine(exchange, call, stream, 0, 1);
}
epx_status_t epx__ll_cuda_combine(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream)
{
    return run_combine(exchange, call, stream, 1, 1);
}

/* ---- masks ---- */

epx_status_t epx__ll_cuda_mask_set(epx__exchange_t *exchange, int rank, int masked, epx_stream_t stream)
{
    ll_cuda_t *ll = exchange->ll;
    epx__ht_scope_t s;
    EPX__TRY(epx__ht_cuda_open(exchange, stream, &s));
    cudaError_t error = cudaMemsetAsync(&ll->masked[rank], masked != 0, 4, s.stream);
    ll->masked_by_caller[rank] = masked != 0;
    if (!masked)
        __atomic_store_n(&ll->gave_up[rank], 0, __ATOMIC_RELAXED);
    return epx__ht_cuda_close(&s, (int)error, "masking a rank");
}
