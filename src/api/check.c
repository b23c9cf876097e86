/* Argument checks. See check.h. */
#include "api/check.h"

#include "base/fail.h"

static epx_status_t check_aligned(const char *call, const char *what, const void *pointer, size_t align)
{
    if ((uintptr_t)pointer % align)
        return epx__fail(EPX_E_INVALID, "%s: %s is at %p; it must be %zu-byte aligned", call, what, pointer, align);
    return EPX_OK;
}

/* Device memory of the buffer's device, aligned; NULL only when nothing will be read. */
epx_status_t epx__check_memory(epx_buffer_t *buffer, const char *call, const char *what, const void *pointer,
                               size_t align, bool needed)
{
    if (!pointer && needed)
        return epx__fail(EPX_E_INVALID, "%s: %s is NULL but there is something to read or write there", call, what);
    if (!pointer || !needed)
        return EPX_OK;
    EPX__TRY(check_aligned(call, what, pointer, align));
    return buffer->x.device->ops->check_pointer(buffer->x.device, pointer, what);
}

/* 49 days; more would not mean "for ever" but, in nanoseconds, overflow. */
epx_status_t epx__check_timeout(const char *call, uint64_t timeout_ms)
{
    if (timeout_ms > UINT32_MAX)
        return epx__fail(EPX_E_INVALID, "%s: timeout_ms is %llu; at most %u", call, (unsigned long long)timeout_ms,
                         UINT32_MAX);
    return EPX_OK;
}

epx_status_t epx__check_layout(epx_buffer_t *buffer, const epx_layout_t *l)
{
    const char *call = "epx_layout";
    EPX__TRY(epx__check_memory(buffer, call, "tokens_per_rank", l->tokens_per_rank, 4, l->tokens_per_rank != NULL));
    EPX__TRY(
        epx__check_memory(buffer, call, "tokens_per_domain", l->tokens_per_domain, 4, l->tokens_per_domain != NULL));
    EPX__TRY(
        epx__check_memory(buffer, call, "tokens_per_expert", l->tokens_per_expert, 4, l->tokens_per_expert != NULL));
    return epx__check_memory(buffer, call, "in_rank", l->in_rank, 1, l->in_rank != NULL);
}

/* The last of `count` steps of `stride` bytes still lies in one address space. */
static epx_status_t check_reach(const char *call, const char *what, int64_t stride, uint64_t count)
{
    int64_t reach;
    if (__builtin_mul_overflow(stride, count, &reach) || reach > PTRDIFF_MAX / 4 || reach < -(PTRDIFF_MAX / 4))
        return epx__fail(EPX_E_INVALID, "%s: %s is %lld; with %llu of them that is more than any memory", call, what,
                         (long long)stride, (unsigned long long)count);
    return EPX_OK;
}

static epx_status_t check_stride(const char *call, size_t stride, uint64_t rows)
{
    return check_reach(call, "x_stride_bytes", stride > INT64_MAX ? INT64_MAX : (int64_t)stride, rows < 1 ? 1 : rows);
}

epx_status_t epx__check_routing(epx_buffer_t *buffer, const char *call, const void *topk_idx, int *bits,
                                uint32_t tokens, uint32_t topk, uint32_t experts, epx__experts_t *map)
{
    const epx_buffer_config_t *c = &buffer->x.config;
    uint32_t ranks = (uint32_t)buffer->group->ranks;
    *bits = *bits ? *bits : 64;
    if (*bits != 64 && *bits != 32)
        return epx__fail(EPX_E_INVALID, "%s: topk_idx_bits is %d; 64 or 32", call, *bits);
    if (tokens > c->tokens_max)
        return epx__fail(EPX_E_INVALID, "%s: %u tokens; this buffer was created with tokens_max %u", call, tokens,
                         c->tokens_max);
    if (topk < 1 || topk > c->topk_max)
        return epx__fail(EPX_E_INVALID, "%s: topk is %u; 1 to this buffer's topk_max (%u)", call, topk, c->topk_max);
    if (experts < 1 || experts > c->experts_max)
        return epx__fail(EPX_E_INVALID, "%s: %u experts; 1 to this buffer's experts_max (%u)", call, experts,
                         c->experts_max);
    EPX__TRY(epx__check_memory(buffer, call, "topk_idx", topk_idx, (size_t)*bits / 8, tokens > 0));
    if (!c->expert_rank)
        return epx__experts_make(experts, ranks, NULL, NULL, map);
    if (experts != c->experts)
        return epx__fail(EPX_E_INVALID, "%s: %u experts, but the buffer's expert_rank maps %u", call, experts,
                         c->experts);
    *map = (epx__experts_t){
        .experts = experts, .ranks = ranks, .rank_of = buffer->expert_rank, .local_of = buffer->expert_local};
    return EPX_OK;
}

epx_status_t epx__check_rows(epx_buffer_t *buffer, const char *call, epx_rows_t *rows, uint32_t tokens)
{
    if (rows->row_bytes == 0 || rows->row_bytes % 16 || rows->row_bytes > 1u << 30)
        return epx__fail(EPX_E_INVALID, "%s: row_bytes is %zu; a multiple of 16 from 16 to 2^30", call,
                         rows->row_bytes);
    rows->x_stride_bytes = rows->x_stride_bytes ? rows->x_stride_bytes : rows->row_bytes;
    if (rows->x_stride_bytes % 16 || rows->x_stride_bytes < rows->row_bytes)
        return epx__fail(EPX_E_INVALID, "%s: x_stride_bytes is %zu; a multiple of 16, at least row_bytes (%zu)", call,
                         rows->x_stride_bytes, rows->row_bytes);
    EPX__TRY(check_stride(call, rows->x_stride_bytes, tokens));
    EPX__TRY(epx__check_memory(buffer, call, "x", rows->x, 16, tokens > 0));
    if (rows->side_elems == 0) {
        if (rows->side)
            return epx__fail(EPX_E_INVALID, "%s: side is given but side_elems is 0", call);
        rows->side_elem_bytes = 0;
        return EPX_OK;
    }
    size_t elem = rows->side_elem_bytes;
    if (elem != 1 && elem != 2 && elem != 4 && elem != 8)
        return epx__fail(EPX_E_INVALID, "%s: side_elem_bytes is %zu; 1, 2, 4 or 8", call, elem);
    if (elem * rows->side_elems % 4 || elem * rows->side_elems > 1u << 24)
        return epx__fail(EPX_E_INVALID, "%s: %u side elements of %zu bytes; together a multiple of 4, at most 2^24",
                         call, rows->side_elems, elem);
    if (!rows->side_elem_stride_bytes)
        rows->side_elem_stride_bytes = (int64_t)elem;
    if (!rows->side_token_stride_bytes)
        rows->side_token_stride_bytes = (int64_t)(elem * rows->side_elems);
    if (rows->side_elem_stride_bytes % (int64_t)elem || rows->side_token_stride_bytes % (int64_t)elem)
        return epx__fail(EPX_E_INVALID, "%s: side strides must be multiples of side_elem_bytes (%zu)", call, elem);
    EPX__TRY(check_reach(call, "side_token_stride_bytes", rows->side_token_stride_bytes, tokens));
    EPX__TRY(check_reach(call, "side_elem_stride_bytes", rows->side_elem_stride_bytes, rows->side_elems));
    return epx__check_memory(buffer, call, "side", rows->side, elem, tokens > 0);
}

epx_status_t epx__check_dispatch(epx_buffer_t *buffer, epx_dispatch_t *d, epx__experts_t *map)
{
    const char *call = "epx_dispatch_begin";
    if (d->topk > 0) {
        EPX__TRY(epx__check_routing(buffer, call, d->topk_idx, &d->topk_idx_bits, d->tokens, d->topk, d->experts, map));
        if (d->topk_weights)
            EPX__TRY(epx__check_memory(buffer, call, "topk_weights", d->topk_weights, 4, d->tokens > 0));
    } else {
        if (d->tokens > buffer->x.config.tokens_max)
            return epx__fail(EPX_E_INVALID, "%s: %u tokens; this buffer was created with tokens_max %u", call,
                             d->tokens, buffer->x.config.tokens_max);
        if (d->topk_idx || d->topk_weights)
            return epx__fail(EPX_E_INVALID, "%s: topk is 0 but topk_idx or topk_weights is given", call);
        EPX__TRY(epx__check_memory(buffer, call, "in_rank (topk is 0)", d->in_rank, 1, d->tokens > 0));
        d->topk_idx_bits = 64;
        *map = (epx__experts_t){.experts = 0, .ranks = (uint32_t)buffer->group->ranks, .per_rank = 1};
    }
    if (d->expert_alignment > 1u << 20 || d->recv_tokens_max > INT32_MAX)
        return epx__fail(EPX_E_INVALID, "%s: expert_alignment %u or recv_tokens_max %u is too large", call,
                         d->expert_alignment, d->recv_tokens_max);
    EPX__TRY(epx__check_timeout(call, d->timeout_ms));
    d->expert_alignment = d->expert_alignment ? d->expert_alignment : 1;
    if (d->sms < 0)
        return epx__fail(EPX_E_INVALID, "%s: sms is %d; it must not be negative", call, d->sms);
    return epx__check_rows(buffer, call, &d->rows, d->tokens);
}

static epx_status_t check_part(epx_buffer_t *buffer, const char *call, const char *what, const void *part, size_t align)
{
    return epx__check_memory(buffer, call, what, part, align, part != NULL);
}

epx_status_t epx__check_place(epx_buffer_t *buffer, const char *call, const epx_place_t *place, int topk_idx_bits,
                              const epx_received_t *received)
{
    if (!received || received->size != sizeof *received)
        return epx__fail(EPX_E_INVALID, "%s: received must not be NULL and received->size must be %zu", call,
                         sizeof *received);
    if (!place)
        return EPX_OK;
    if (!place->x && (place->side || place->topk_idx || place->topk_weights || place->src_token))
        return epx__fail(EPX_E_INVALID, "%s: place->x is NULL but other memory is given; give x too, or no place",
                         call);
    EPX__TRY(check_part(buffer, call, "place->x", place->x, 16));
    EPX__TRY(check_part(buffer, call, "place->side", place->side, 4));
    EPX__TRY(check_part(buffer, call, "place->topk_idx", place->topk_idx, topk_idx_bits == 32 ? 4 : 8));
    EPX__TRY(check_part(buffer, call, "place->topk_weights", place->topk_weights, 4));
    return check_part(buffer, call, "place->src_token", place->src_token, 4);
}

epx_status_t epx__check_combine(epx_buffer_t *buffer, const epx_handle_t *handle, epx_combine_t *c, uint32_t rows)
{
    const char *call = "epx_combine";
    uint32_t tokens = handle->h.args.tokens;
    c->dtype = c->dtype ? c->dtype : EPX_BF16;
    if (c->dtype != EPX_BF16 && c->dtype != EPX_FP16 && c->dtype != EPX_FP32)
        return epx__fail(EPX_E_INVALID, "%s: dtype %d cannot be added; EPX_BF16, EPX_FP16 or EPX_FP32", call,
                         (int)c->dtype);
    size_t row = (size_t)c->hidden * epx__dtype_bytes(c->dtype);
    if (row == 0 || row % 16 || row > 1u << 30)
        return epx__fail(EPX_E_INVALID, "%s: hidden %u makes rows of %zu bytes; a multiple of 16 from 16 to 2^30", call,
                         c->hidden, row);
    c->x_stride_bytes = c->x_stride_bytes ? c->x_stride_bytes : row;
    if (c->x_stride_bytes % 16 || c->x_stride_bytes < row)
        return epx__fail(EPX_E_INVALID, "%s: x_stride_bytes is %zu; a multiple of 16, at least the row (%zu)", call,
                         c->x_stride_bytes, row);
    EPX__TRY(check_stride(call, c->x_stride_bytes, rows));
    EPX__TRY(epx__check_timeout(call, c->timeout_ms));
    EPX__TRY(epx__check_memory(buffer, call, "x", c->x, 16, rows > 0));
    EPX__TRY(epx__check_memory(buffer, call, "out", c->out, 16, tokens > 0));
    EPX__TRY(epx__check_memory(buffer, call, "bias[0]", c->bias[0], 16, c->bias[0] != NULL));
    EPX__TRY(epx__check_memory(buffer, call, "bias[1]", c->bias[1], 16, c->bias[1] != NULL));
    if (!c->topk_weights != !c->out_topk_weights)
        return epx__fail(EPX_E_INVALID, "%s: topk_weights and out_topk_weights come together; one of them is NULL",
                         call);
    if (c->topk_weights && handle->h.args.topk == 0)
        return epx__fail(EPX_E_INVALID, "%s: topk_weights with a dispatch that had no top-k ids", call);
    if (c->sms < 0)
        return epx__fail(EPX_E_INVALID, "%s: sms is %d; it must not be negative", call, c->sms);
    if (c->topk_weights) {
        EPX__TRY(epx__check_memory(buffer, call, "topk_weights", c->topk_weights, 4, rows > 0));
        EPX__TRY(epx__check_memory(buffer, call, "out_topk_weights", c->out_topk_weights, 4, tokens > 0));
    }
    return EPX_OK;
}
