/* Layout, dispatch and handles: arguments in, one call of the exchange each. Checks are in check.c. */
#include <string.h>

#include "api/check.h"
#include "base/fail.h"

/* ---- layout ---- */

epx_status_t epx_layout(epx_buffer_t *buffer, const epx_layout_t *layout, epx_stream_t stream)
{
    epx_layout_t l;
    epx__experts_t map;
    EPX__TRY(epx__buffer_find(&buffer, "epx_layout"));
    EPX__TRY(epx__config_copy(&l, sizeof l, layout, "epx_layout_t"));
    EPX__TRY(epx__check_routing(buffer, "epx_layout", l.topk_idx, &l.topk_idx_bits, l.tokens, l.topk, l.experts, &map));
    EPX__TRY(epx__check_layout(buffer, &l));
    EPX__TRY(epx__buffer_usable(buffer, "epx_layout"));
    return buffer->x.ops->layout(&buffer->x, &l, &map, stream);
}

/* ---- handles ---- */

static epx_handle_t *handle_take(epx_buffer_t *buffer)
{
    for (uint32_t i = 0; i < buffer->x.config.handles_max; i++)
        if (buffer->handles[i].h.state == EPX__HANDLE_FREE)
            return &buffer->handles[i];
    return NULL;
}

/* From the caller's name to the handle, of a buffer that can take a call. */
static epx_status_t handle_usable(epx_handle_t **handle, const char *call)
{
    EPX__TRY(epx__handle_find(handle, call));
    return epx__buffer_usable((*handle)->buffer, call);
}

void epx_handle_release(epx_handle_t *handle, epx_stream_t stream)
{
    if (!handle || epx__handle_find(&handle, "epx_handle_release") != EPX_OK)
        return;
    epx_buffer_t *buffer = handle->buffer;
    buffer->x.ops->mark(&buffer->x, buffer->x.config.leases_max + handle->h.index, stream);
    handle->stream = stream;
    handle->h.state = EPX__HANDLE_FREE;
}

/* ---- begin ---- */

epx_status_t epx_dispatch_begin(epx_buffer_t *buffer, const epx_dispatch_t *dispatch, epx_stream_t stream,
                                epx_handle_t **out)
{
    epx_dispatch_t d;
    epx__experts_t map;
    EPX__TRY(epx__buffer_find(&buffer, "epx_dispatch_begin"));
    if (!out)
        return epx__fail(EPX_E_INVALID, "epx_dispatch_begin: handle is NULL");
    EPX__TRY(epx__config_copy(&d, sizeof d, dispatch, "epx_dispatch_t"));
    EPX__TRY(epx__check_dispatch(buffer, &d, &map));
    EPX__TRY(epx__buffer_usable(buffer, "epx_dispatch_begin"));
    epx_handle_t *handle = handle_take(buffer);
    if (!handle)
        return epx__fail(EPX_E_BUSY,
                         "all %u handles are in use; release one, or create the buffer with more handles_max",
                         buffer->x.config.handles_max);
    if (handle->stream != stream)
        EPX__TRY(buffer->x.ops->wait_mark(&buffer->x, buffer->x.config.leases_max + handle->h.index, stream));
    epx__exchange_handle_t *h = &handle->h;
    h->generation = ++buffer->dispatches;
    h->args = d;
    h->map = map;
    h->slots = epx__routing_slots(d.topk, (uint32_t)buffer->group->ranks);
    h->local_experts = d.topk ? epx__experts_at(&map, (uint32_t)buffer->x.rank) : 0;
    h->worst_case = d.recv_tokens_max > 0;
    h->counted = false;
    h->rows = 0;
    EPX__TRY(epx__buffer_told(buffer, buffer->x.ops->begin(&buffer->x, h, stream)));
    h->state = EPX__HANDLE_BEGUN;
    handle->number = epx__buffer_number(buffer);
    handle->rows_done = false;
    handle->stream = stream;
    *out = epx__handle_name(handle);
    return EPX_OK;
}

static epx_status_t count(epx_handle_t *handle)
{
    if (handle->h.counted)
        return EPX_OK;
    return epx__buffer_told(handle->buffer, handle->buffer->x.ops->counts(&handle->buffer->x, &handle->h));
}

epx_status_t epx_handle_counts(epx_handle_t *handle, epx_counts_t *counts)
{
    EPX__TRY(handle_usable(&handle, "epx_handle_counts"));
    if (!counts || counts->size != sizeof *counts)
        return epx__fail(EPX_E_INVALID, "epx_handle_counts: counts must not be NULL and counts->size must be %zu",
                         sizeof *counts);
    EPX__TRY(count(handle));
    *counts = (epx_counts_t){.size = sizeof *counts,
                             .rows = handle->h.rows,
                             .local_experts = handle->h.local_experts,
                             .rows_per_expert = handle->h.expert_rows,
                             .rows_matrix = handle->h.matrix,
                             .tokens = handle->h.tokens_of};
    return EPX_OK;
}

epx_status_t epx_handle_get_tables(epx_handle_t *handle, epx_handle_tables_t *tables)
{
    EPX__TRY(handle_usable(&handle, "epx_handle_get_tables"));
    if (!tables || tables->size != sizeof *tables)
        return epx__fail(EPX_E_INVALID, "epx_handle_get_tables: tables must not be NULL and tables->size must be %zu",
                         sizeof *tables);
    EPX__TRY(count(handle));
    epx_handle_tables_t t = {.size = sizeof t,
                             .tokens = handle->h.args.tokens,
                             .rows = handle->h.rows,
                             .slots = handle->h.slots,
                             .rows_matrix = handle->h.matrix,
                             .tokens_of = handle->h.tokens_of};
    EPX__TRY(handle->buffer->x.ops->tables(&handle->buffer->x, &handle->h, &t));
    *tables = t;
    return EPX_OK;
}

/* ---- rows ---- */

static epx__row_shape_t shape_of(const epx_handle_t *handle, const epx_rows_t *rows, bool first)
{
    const epx_dispatch_t *args = &handle->h.args;
    return (epx__row_shape_t){.row_bytes = rows->row_bytes,
                              .side_bytes = rows->side_elem_bytes * rows->side_elems,
                              .topk = first ? args->topk : 0,
                              .idx_bytes = (uint32_t)args->topk_idx_bits / 8,
                              .weights = first && args->topk && args->topk_weights,
                              .src_token = 1};
}

/* Room for `rows` rows in a lease. */
static epx_status_t take_target(epx_handle_t *handle, const epx__row_shape_t *shape, uint32_t rows, epx_stream_t stream,
                                epx_lease_t *lease, epx__target_t *target)
{
    epx_buffer_t *buffer = handle->buffer;
    *lease = 0;
    *target = (epx__target_t){.capacity = rows};
    if (rows == 0) {
        target->lease_offset = buffer->x.layout.lease_offset; /* nobody writes there */
        return EPX_OK;
    }
    size_t bytes = epx__place_layout_make(shape, rows).total_bytes;
    EPX__TRY(epx__lease_take(buffer, bytes, stream, lease, &target->lease_offset));
    target->place = epx__place_at((uint8_t *)buffer->x.window.base + target->lease_offset, shape, rows);
    return EPX_OK;
}

static epx_status_t run_rows(epx_handle_t *handle, const epx_rows_t *rows, bool first, const epx_place_t *place,
                             epx_stream_t stream, epx_received_t *received)
{
    epx_buffer_t *buffer = handle->buffer;
    epx__target_t target;
    epx_lease_t lease = 0;
    if (!handle->h.worst_case)
        EPX__TRY(count(handle));
    uint32_t room = handle->h.worst_case ? handle->h.args.recv_tokens_max : handle->h.rows;
    epx__row_shape_t shape = shape_of(handle, rows, first);
    if (place && place->x)
        target = (epx__target_t){.own = true, .place = *place, .capacity = room};
    else
        EPX__TRY(take_target(handle, &shape, room, stream, &lease, &target));
    epx_status_t status =
        epx__buffer_told(buffer, buffer->x.ops->rows(&buffer->x, &handle->h, rows, first, &target, stream));
    if (status != EPX_OK) {
        /* A lease that peers may still be writing stays taken: the buffer is broken and goes as a whole. */
        if (!atomic_load(&buffer->x.fault.ready))
            epx__lease_give(buffer, lease, stream);
        return status;
    }
    if (first)
        handle->rows_done = true;
    handle->h.state = EPX__HANDLE_DONE;
    *received = (epx_received_t){.size = sizeof *received,
                                 .rows = room,
                                 .x = target.place.x,
                                 .side = shape.side_bytes ? target.place.side : NULL,
                                 .topk_idx = shape.topk ? target.place.topk_idx : NULL,
                                 .topk_weights = shape.weights ? target.place.topk_weights : NULL,
                                 .src_token = target.place.src_token,
                                 .lease = lease};
    return EPX_OK;
}

epx_status_t epx_dispatch_end(epx_handle_t *handle, const epx_place_t *place, epx_stream_t stream,
                              epx_received_t *received)
{
    EPX__TRY(handle_usable(&handle, "epx_dispatch_end"));
    EPX__TRY(epx__check_place(handle->buffer, "epx_dispatch_end", place, handle->h.args.topk_idx_bits, received));
    if (handle->rows_done)
        return epx__fail(EPX_E_INVALID,
                         "epx_dispatch_end: this handle's rows have been dispatched; use epx_dispatch_again");
    return run_rows(handle, &handle->h.args.rows, true, place, stream, received);
}

epx_status_t epx_dispatch(epx_buffer_t *buffer, const epx_dispatch_t *dispatch, const epx_place_t *place,
                          epx_stream_t stream, epx_handle_t **out, epx_received_t *received)
{
    epx_handle_t *handle;
    epx_buffer_t *own = buffer;
    EPX__TRY(epx__buffer_find(&own, "epx_dispatch"));
    if (!out)
        return epx__fail(EPX_E_INVALID, "epx_dispatch: handle is NULL");
    EPX__TRY(epx__check_place(own, "epx_dispatch", place, dispatch ? dispatch->topk_idx_bits : 0, received));
    EPX__TRY(epx_dispatch_begin(buffer, dispatch, stream, &handle));
    epx_status_t status = epx_dispatch_end(handle, place, stream, received);
    /* The peers are in the second half already: when it was only refused here, the caller must be able to do it. */
    if (status == EPX_OK || !atomic_load(&own->x.fault.ready))
        *out = handle;
    else
        epx_handle_release(handle, stream);
    return status;
}

epx_status_t epx_dispatch_again(epx_handle_t *handle, const epx_rows_t *rows, const epx_place_t *place,
                                epx_stream_t stream, epx_received_t *received)
{
    epx_rows_t r;
    EPX__TRY(handle_usable(&handle, "epx_dispatch_again"));
    EPX__TRY(epx__check_place(handle->buffer, "epx_dispatch_again", place, 0, received));
    if (!rows)
        return epx__fail(EPX_E_INVALID, "epx_dispatch_again: rows is NULL");
    if (!handle->rows_done)
        return epx__fail(EPX_E_INVALID, "epx_dispatch_again: call epx_dispatch_end on this handle first");
    r = *rows;
    EPX__TRY(epx__check_rows(handle->buffer, "epx_dispatch_again", &r, handle->h.args.tokens));
    return run_rows(handle, &r, false, place, stream, received);
}

/* ---- combine ---- */

epx_status_t epx_combine(epx_handle_t *handle, const epx_combine_t *combine, epx_stream_t stream)
{
    epx_combine_t c;
    EPX__TRY(handle_usable(&handle, "epx_combine"));
    epx_buffer_t *buffer = handle->buffer;
    EPX__TRY(epx__config_copy(&c, sizeof c, combine, "epx_combine_t"));
    if (!handle->rows_done)
        return epx__fail(EPX_E_INVALID, "epx_combine: call epx_dispatch_end on this handle first");
    if (!handle->h.worst_case)
        EPX__TRY(count(handle));
    uint32_t rows = handle->h.worst_case ? handle->h.args.recv_tokens_max : handle->h.rows;
    EPX__TRY(epx__check_combine(buffer, handle, &c, rows));
    size_t bytes = rows ? (rows - 1) * c.x_stride_bytes + c.hidden * epx__dtype_bytes(c.dtype) : 0;
    size_t offset = rows ? epx__lease_find(buffer, c.x, bytes) : buffer->x.layout.lease_offset;
    return epx__buffer_told(buffer, buffer->x.ops->combine(&buffer->x, &handle->h, &c, offset, stream));
}
