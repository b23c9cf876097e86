/* Low latency: argument checks, the calls' states and slots; one call of the implementation each. */
#include <string.h>
#include <unistd.h>

#include "algo/ll/net.h"
#include "api/check.h"
#include "base/fail.h"

/* How many tokens low latency with that hidden could have in so many bytes of a rank. */
static uint32_t tokens_fit(const epx_buffer_t *buffer, uint32_t hidden, size_t bytes)
{
    const epx__topology_t *topology = &buffer->group->topology;
    epx__ll_layout_t shape = buffer->x.layout.ll;
    shape.hidden_max = hidden;
    return epx__ll_tokens_fit(&shape, (uint32_t)(topology->ranks - topology->per_domain), bytes);
}

static size_t memory_of(const epx_buffer_t *buffer)
{
    const epx__topology_t *topology = &buffer->group->topology;
    return epx__ll_bytes(&buffer->x.layout.ll, (uint32_t)(topology->ranks - topology->per_domain));
}

epx_status_t epx__ll_check_memory(const epx_buffer_t *buffer)
{
    const epx_group_t *group = buffer->group;
    const epx__ll_layout_t *l = &buffer->x.layout.ll;
    if (l->tokens_max == 0 || group->device->ops->backend != EPX_BACKEND_CPU)
        return EPX_OK;
    uint64_t host = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    size_t each = host / (uint64_t)group->host_ranks;
    size_t bytes = memory_of(buffer);
    if (bytes <= each)
        return EPX_OK;
    return epx__fail(
        EPX_E_INVALID,
        "epx_buffer_create: low latency for ll_tokens_max %u, ll_hidden_max %u, topk_max %u and %u slots on "
        "%d ranks takes %zu bytes of each; this host has %zu for each of its %d ranks. The largest "
        "ll_tokens_max that fits is %u",
        l->tokens_max, l->hidden_max, l->topk_max, l->slots, group->ranks, bytes, each, group->host_ranks,
        tokens_fit(buffer, l->hidden_max, each));
}

/* From the caller's name to a buffer with low latency that can take a call. */
static epx_status_t usable(epx_buffer_t **buffer, const char *call)
{
    EPX__TRY(epx__buffer_find(buffer, call));
    if (!(*buffer)->x.ll)
        return epx__fail(EPX_E_INVALID,
                         "%s: the buffer was made without low latency; set ll_tokens_max and ll_hidden_max", call);
    return epx__buffer_usable(*buffer, call);
}

/* From the caller's name to a handle in the state that the call needs. */
static epx_status_t handle_in(epx_ll_handle_t **handle, epx__ll_state_t state, const char *call, const char *before)
{
    EPX__TRY(epx__ll_handle_find(handle, call));
    EPX__TRY(epx__buffer_usable((*handle)->buffer, call));
    if ((*handle)->call.state == EPX__LL_FREE)
        return epx__fail(EPX_E_INVALID, "%s: the handle has been combined or released", call);
    if ((*handle)->call.state != state)
        return epx__fail(EPX_E_INVALID, "%s: out of order; it comes after %s, once", call, before);
    return EPX_OK;
}

/* ---- dispatch ---- */

static epx_status_t check_dispatch(epx_buffer_t *buffer, epx_ll_dispatch_t *d, epx__experts_t *map)
{
    const char *call = "epx_ll_dispatch";
    const epx_buffer_config_t *c = &buffer->x.config;
    uint32_t unit = d->format != EPX_LL_FP8 ? 8 : d->ue8m0 ? 512 : 128;
    if (d->tokens > c->ll_tokens_max)
        return epx__fail(EPX_E_INVALID, "%s: %u tokens; this buffer was created with ll_tokens_max %u", call, d->tokens,
                         c->ll_tokens_max);
    if (d->format != EPX_LL_BF16 && d->format != EPX_LL_FP8)
        return epx__fail(EPX_E_INVALID, "%s: format %d; EPX_LL_BF16 or EPX_LL_FP8", call, (int)d->format);
    if (d->order != EPX_LL_EXPERT_MAJOR && d->order != EPX_LL_RANK_MAJOR)
        return epx__fail(EPX_E_INVALID, "%s: order %d; EPX_LL_EXPERT_MAJOR or EPX_LL_RANK_MAJOR", call, (int)d->order);
    if (d->hidden == 0 || d->hidden % unit)
        return epx__fail(EPX_E_INVALID, "%s: hidden is %u; a multiple of %u up to this buffer's ll_hidden_max (%u)",
                         call, d->hidden, unit, c->ll_hidden_max);
    if (d->hidden > c->ll_hidden_max)
        return epx__fail(EPX_E_INVALID,
                         "%s: hidden is %u; this buffer was created for ll_tokens_max %u and ll_hidden_max %u. As much "
                         "memory would hold rows of %u for ll_tokens_max %u at most",
                         call, d->hidden, c->ll_tokens_max, c->ll_hidden_max, d->hidden,
                         tokens_fit(buffer, d->hidden, memory_of(buffer)));
    uint32_t tokens = d->tokens > c->tokens_max ? c->tokens_max : d->tokens; /* LL has its own limit, checked above */
    EPX__TRY(epx__check_routing(buffer, call, d->topk_idx, &d->topk_idx_bits, tokens, d->topk, d->experts, map));
    EPX__TRY(epx__check_memory(buffer, call, "x", d->x, 16, d->tokens > 0));
    EPX__TRY(epx__check_memory(buffer, call, "topk_weights", d->topk_weights, 4, d->topk_weights && d->tokens > 0));
    EPX__TRY(epx__check_memory(buffer, call, "recv_x", d->recv_x, 16, true));
    EPX__TRY(epx__check_memory(buffer, call, "recv_scales", d->recv_scales, 4, d->format == EPX_LL_FP8));
    EPX__TRY(epx__check_memory(buffer, call, "recv_count", d->recv_count, 4, true));
    EPX__TRY(epx__check_memory(buffer, call, "src_info", d->src_info, 4, true));
    EPX__TRY(epx__check_memory(buffer, call, "layout_range", d->layout_range, 8, d->layout_range != NULL));
    if (d->order == EPX_LL_EXPERT_MAJOR && (d->recv_topk_idx || d->recv_topk_weights))
        return epx__fail(EPX_E_INVALID, "%s: recv_topk_idx and recv_topk_weights belong to EPX_LL_RANK_MAJOR", call);
    if (d->recv_topk_weights && !d->topk_weights)
        return epx__fail(EPX_E_INVALID, "%s: recv_topk_weights needs topk_weights", call);
    if (d->sms < 0)
        return epx__fail(EPX_E_INVALID, "%s: sms is %d; it must not be negative", call, d->sms);
    return EPX_OK;
}

static epx_status_t dispatch_begin(epx_buffer_t *buffer, const epx_ll_dispatch_t *dispatch, bool whole,
                                   epx_stream_t stream, epx_ll_handle_t **out)
{
    epx_ll_dispatch_t d;
    epx__experts_t map;
    EPX__TRY(usable(&buffer, "epx_ll_dispatch"));
    if (!out)
        return epx__fail(EPX_E_INVALID, "epx_ll_dispatch: handle is NULL");
    EPX__TRY(epx__config_copy(&d, sizeof d, dispatch, "epx_ll_dispatch_t"));
    EPX__TRY(check_dispatch(buffer, &d, &map));
    uint32_t slots = buffer->x.config.ll_slots;
    epx_ll_handle_t *handle = &buffer->ll_handles[(buffer->ll_calls + 1) % slots];
    if (handle->call.state != EPX__LL_FREE)
        return epx__fail(
            EPX_E_BUSY,
            "epx_ll_dispatch: the next of the %u slots is owned by call %llu, which has not been combined or "
            "released; finish it, or create the buffer with more ll_slots",
            slots, (unsigned long long)handle->call.number);
    handle->call.number = buffer->ll_calls + 1;
    handle->call.dispatch = d;
    handle->call.map = map;
    handle->call.local_experts = epx__experts_at(&map, (uint32_t)buffer->x.rank);
    const epx__ll_ops_t *ops = buffer->group->ll_ops;
    bool both = whole && ops->dispatch;
    EPX__TRY(epx__buffer_told(buffer, (both ? ops->dispatch : ops->dispatch_send)(&buffer->x, &handle->call, stream)));
    buffer->ll_calls++;
    handle->call.state = both ? EPX__LL_RECEIVED : EPX__LL_SENT;
    handle->number = epx__buffer_number(buffer);
    *out = handle;
    return EPX_OK;
}

epx_status_t epx_ll_dispatch_send(epx_buffer_t *buffer, const epx_ll_dispatch_t *dispatch, epx_stream_t stream,
                                  epx_ll_handle_t **out)
{
    epx_ll_handle_t *handle = NULL;
    EPX__TRY(dispatch_begin(buffer, dispatch, false, stream, out ? &handle : NULL));
    *out = epx__ll_handle_name(handle);
    return EPX_OK;
}

epx_status_t epx_ll_dispatch_recv(epx_ll_handle_t *handle, epx_stream_t stream)
{
    EPX__TRY(handle_in(&handle, EPX__LL_SENT, "epx_ll_dispatch_recv", "epx_ll_dispatch_send"));
    epx_buffer_t *buffer = handle->buffer;
    EPX__TRY(epx__buffer_told(buffer, buffer->group->ll_ops->dispatch_recv(&buffer->x, &handle->call, stream)));
    handle->call.state = EPX__LL_RECEIVED;
    return EPX_OK;
}

epx_status_t epx_ll_dispatch(epx_buffer_t *buffer, const epx_ll_dispatch_t *dispatch, epx_stream_t stream,
                             epx_ll_handle_t **out)
{
    epx_ll_handle_t *handle = NULL;
    if (!out)
        return epx__fail(EPX_E_INVALID, "epx_ll_dispatch: handle is NULL");
    EPX__TRY(dispatch_begin(buffer, dispatch, true, stream, &handle));
    epx_status_t status = EPX_OK;
    if (handle->call.state == EPX__LL_SENT)
        status = epx_ll_dispatch_recv(epx__ll_handle_name(handle), stream);
    if (status != EPX_OK)
        handle->call.state = EPX__LL_FREE;
    else
        *out = epx__ll_handle_name(handle);
    return status;
}

/* ---- combine ---- */

static epx_status_t check_combine(epx_ll_handle_t *handle, epx_ll_combine_t *c)
{
    const char *call = "epx_ll_combine";
    epx_buffer_t *buffer = handle->buffer;
    const epx_ll_dispatch_t *d = &handle->call.dispatch;
    bool some = d->tokens > 0;
    if (!c->x && !buffer->x.config.ll_zero_copy)
        return epx__fail(EPX_E_INVALID, "%s: x is NULL, but the buffer was made without ll_zero_copy", call);
    if (c->pre_reduced && (!d->topk_weights || d->order != EPX_LL_EXPERT_MAJOR))
        return epx__fail(EPX_E_INVALID, "%s: pre_reduced needs topk_weights at dispatch and EPX_LL_EXPERT_MAJOR order",
                         call);
    EPX__TRY(epx__check_memory(buffer, call, "x", c->x, 16, c->x != NULL));
    EPX__TRY(epx__check_memory(buffer, call, "topk_idx", c->topk_idx, (size_t)d->topk_idx_bits / 8, some));
    EPX__TRY(epx__check_memory(buffer, call, "topk_weights", c->topk_weights, 4, some && c->topk_weights));
    EPX__TRY(epx__check_memory(buffer, call, "out", c->out, 16, some));
    EPX__TRY(epx__check_memory(buffer, call, "weight_left", c->weight_left, 4, some && c->weight_left));
    return EPX_OK;
}

static epx_status_t combine_begin(epx_ll_handle_t **found, const epx_ll_combine_t *combine, bool whole,
                                  epx_stream_t stream)
{
    epx_ll_combine_t c;
    EPX__TRY(handle_in(found, EPX__LL_RECEIVED, "epx_ll_combine_send", "epx_ll_dispatch_recv"));
    epx_ll_handle_t *handle = *found;
    EPX__TRY(epx__config_copy(&c, sizeof c, combine, "epx_ll_combine_t"));
    EPX__TRY(check_combine(handle, &c));
    epx_buffer_t *buffer = handle->buffer;
    handle->call.combine = c;
    const epx__ll_ops_t *ops = buffer->group->ll_ops;
    bool both = whole && ops->combine;
    EPX__TRY(epx__buffer_told(buffer, (both ? ops->combine : ops->combine_send)(&buffer->x, &handle->call, stream)));
    handle->call.state = both ? EPX__LL_FREE : EPX__LL_COMBINE_SENT;
    return EPX_OK;
}

epx_status_t epx_ll_combine_send(epx_ll_handle_t *handle, const epx_ll_combine_t *combine, epx_stream_t stream)
{
    return combine_begin(&handle, combine, false, stream);
}

epx_status_t epx_ll_combine_recv(epx_ll_handle_t *handle, epx_stream_t stream)
{
    EPX__TRY(handle_in(&handle, EPX__LL_COMBINE_SENT, "epx_ll_combine_recv", "epx_ll_combine_send"));
    epx_buffer_t *buffer = handle->buffer;
    EPX__TRY(epx__buffer_told(buffer, buffer->group->ll_ops->combine_recv(&buffer->x, &handle->call, stream)));
    handle->call.state = EPX__LL_FREE;
    return EPX_OK;
}

epx_status_t epx_ll_combine(epx_ll_handle_t *handle, const epx_ll_combine_t *combine, epx_stream_t stream)
{
    EPX__TRY(combine_begin(&handle, combine, true, stream));
    return handle->call.state == EPX__LL_FREE ? EPX_OK : epx_ll_combine_recv(epx__ll_handle_name(handle), stream);
}

void epx_ll_handle_release(epx_ll_handle_t *handle, epx_stream_t stream)
{
    if (!handle || epx__ll_handle_find(&handle, "epx_ll_handle_release") != EPX_OK)
        return;
    /* What was sent to this rank must be taken out before its sender may use the slot again. */
    if (handle->call.state == EPX__LL_SENT && !atomic_load(&handle->buffer->x.fault.ready))
        (void)epx__buffer_told(handle->buffer,
                               handle->buffer->group->ll_ops->dispatch_recv(&handle->buffer->x, &handle->call, stream));
    handle->call.state = EPX__LL_FREE;
}

epx_status_t epx_ll_combine_buffer(epx_ll_handle_t *handle, void **memory)
{
    if (!memory)
        return epx__fail(EPX_E_INVALID, "epx_ll_combine_buffer: memory is NULL");
    EPX__TRY(epx__ll_handle_find(&handle, "epx_ll_combine_buffer"));
    EPX__TRY(epx__buffer_usable(handle->buffer, "epx_ll_combine_buffer"));
    if (handle->call.state == EPX__LL_FREE)
        return epx__fail(EPX_E_INVALID, "epx_ll_combine_buffer: the handle has been combined or released");
    if (!handle->buffer->x.config.ll_zero_copy)
        return epx__fail(EPX_E_INVALID, "epx_ll_combine_buffer: the buffer was made without ll_zero_copy");
    return handle->buffer->group->ll_ops->combine_buffer(&handle->buffer->x, &handle->call, memory);
}

/* ---- masks ---- */

epx_status_t epx_ll_mask_set(epx_buffer_t *buffer, int rank, int masked, epx_stream_t stream)
{
    EPX__TRY(usable(&buffer, "epx_ll_mask_set"));
    if (rank < 0 || rank >= buffer->group->ranks || rank == buffer->group->rank)
        return epx__fail(EPX_E_INVALID, "epx_ll_mask_set: rank %d; another rank than one's own, below %d", rank,
                         buffer->group->ranks);
    return buffer->group->ll_ops->mask_set(&buffer->x, rank, masked, stream);
}

epx_status_t epx_ll_mask_get(epx_buffer_t *buffer, int32_t *masked)
{
    EPX__TRY(usable(&buffer, "epx_ll_mask_get"));
    if (!masked)
        return epx__fail(EPX_E_INVALID, "epx_ll_mask_get: masked is NULL");
    return buffer->group->ll_ops->mask_get(&buffer->x, masked);
}

epx_status_t epx_ll_mask_clear(epx_buffer_t *buffer, epx_stream_t stream)
{
    EPX__TRY(usable(&buffer, "epx_ll_mask_clear"));
    for (int r = 0; r < buffer->group->ranks; r++)
        if (r != buffer->group->rank)
            EPX__TRY(buffer->group->ll_ops->mask_set(&buffer->x, r, 0, stream));
    return EPX_OK;
}

epx_status_t epx_ll_plan(epx_ll_plan_t *plan)
{
    if (!plan || plan->size != sizeof *plan)
        return epx__fail(EPX_E_INVALID, "epx_ll_plan: plan must not be NULL and plan->size must be %zu", sizeof *plan);
    if (!plan->ranks || !plan->tokens_max || !plan->hidden || !plan->topk)
        return epx__fail(EPX_E_INVALID, "epx_ll_plan: ranks, tokens_max, hidden and topk must be at least 1");
    epx__ll_layout_t l;
    uint32_t slots = plan->slots ? plan->slots : 2;
    EPX__TRY(epx__ll_layout_make(plan->ranks, plan->tokens_max, plan->hidden, plan->topk, slots, 0, &l));
    plan->slots = slots;
    plan->words_bytes = l.sources_offset - l.words_offset;
    plan->ids_bytes = (uint64_t)slots * plan->ranks * l.block_bytes;
    plan->dispatch_bytes = l.back_offset - l.sources_offset - plan->ids_bytes;
    plan->combine_bytes = l.row_flags_offset - l.back_offset;
    plan->words_bytes += l.total_bytes - l.row_flags_offset;
    plan->window_bytes = l.total_bytes;
    uint64_t local = (plan->experts + plan->ranks - 1) / plan->ranks;
    plan->zero_copy_bytes = local * plan->ranks * plan->tokens_max * plan->hidden * 2 * slots;
    plan->staging_bytes = epx__ll_net_staging_bytes(&l);
    return EPX_OK;
}
