/*
 * Shows that the check of `epx bench` can fail: preloaded before libepx.so, it lets every call through and then spoils
 * one thing that the call gave; EPX_SPOIL names it, the words are below. CPU memory only, ranks as processes.
 */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include <epx/ll.h>

/* The library's own function of the same name and type. */
#define REAL(name) ((__typeof__(&name))(uintptr_t)dlsym(RTLD_NEXT, #name))

static int asked(const char *what)
{
    const char *word = getenv("EPX_SPOIL");
    return word && strcmp(word, what) == 0;
}

/* The last bit of the byte. */
static void flip(const char *what, const void *memory, size_t byte)
{
    if (asked(what) && memory)
        ((uint8_t *)(uintptr_t)memory)[byte] ^= 1;
}

/* ---- high throughput ---- */

static epx_status_t received(epx_status_t status, const epx_received_t *got)
{
    if (status == EPX_OK && got->rows) {
        flip("row", got->x, 21);
        flip("side", got->side, 1);
        flip("source", got->src_token, 0);
        flip("ids", got->topk_idx, 0);
        flip("weights", got->topk_weights, 0);
    }
    return status;
}

epx_status_t epx_dispatch(epx_buffer_t *buffer, const epx_dispatch_t *dispatch, const epx_place_t *place,
                          epx_stream_t stream, epx_handle_t **handle, epx_received_t *got)
{
    return received(REAL(epx_dispatch)(buffer, dispatch, place, stream, handle, got), got);
}

epx_status_t epx_dispatch_again(epx_handle_t *handle, const epx_rows_t *rows, const epx_place_t *place,
                                epx_stream_t stream, epx_received_t *got)
{
    return received(REAL(epx_dispatch_again)(handle, rows, place, stream, got), got);
}

epx_status_t epx_combine(epx_handle_t *handle, const epx_combine_t *combine, epx_stream_t stream)
{
    epx_status_t status = REAL(epx_combine)(handle, combine, stream);
    flip("sum", combine->out, 100);
    return status;
}

epx_status_t epx_layout(epx_buffer_t *buffer, const epx_layout_t *layout, epx_stream_t stream)
{
    epx_status_t status = REAL(epx_layout)(buffer, layout, stream);
    flip("layout", layout->tokens_per_expert, 0);
    return status;
}

/* ---- low latency ---- */

/* Of the half that comes before. NULL inside a whole call: the library makes it of halves, which come here too. */
static const epx_ll_dispatch_t *sent;
static const epx_ll_combine_t *sums;

/* Expert 0 has rows in every test that comes here. */
static epx_status_t ll_received(epx_status_t status, const epx_ll_dispatch_t *d)
{
    if (status != EPX_OK || !d)
        return status;
    flip("past", d->src_info, (size_t)d->recv_count[0] * 4);
    flip("row", d->recv_x, 21);
    flip("scale", d->recv_scales, 0);
    flip("source", d->src_info, 0);
    flip("count", d->recv_count, 0);
    flip("range", d->layout_range, 0);
    return status;
}

epx_status_t epx_ll_dispatch(epx_buffer_t *buffer, const epx_ll_dispatch_t *dispatch, epx_stream_t stream,
                             epx_ll_handle_t **handle)
{
    sent = NULL;
    return ll_received(REAL(epx_ll_dispatch)(buffer, dispatch, stream, handle), dispatch);
}

epx_status_t epx_ll_dispatch_send(epx_buffer_t *buffer, const epx_ll_dispatch_t *dispatch, epx_stream_t stream,
                                  epx_ll_handle_t **handle)
{
    sent = dispatch;
    return REAL(epx_ll_dispatch_send)(buffer, dispatch, stream, handle);
}

epx_status_t epx_ll_dispatch_recv(epx_ll_handle_t *handle, epx_stream_t stream)
{
    return ll_received(REAL(epx_ll_dispatch_recv)(handle, stream), sent);
}

epx_status_t epx_ll_combine(epx_ll_handle_t *handle, const epx_ll_combine_t *combine, epx_stream_t stream)
{
    sums = NULL;
    epx_status_t status = REAL(epx_ll_combine)(handle, combine, stream);
    flip("sum", combine->out, 100);
    return status;
}

epx_status_t epx_ll_combine_send(epx_ll_handle_t *handle, const epx_ll_combine_t *combine, epx_stream_t stream)
{
    sums = combine;
    return REAL(epx_ll_combine_send)(handle, combine, stream);
}

epx_status_t epx_ll_combine_recv(epx_ll_handle_t *handle, epx_stream_t stream)
{
    epx_status_t status = REAL(epx_ll_combine_recv)(handle, stream);
    if (sums)
        flip("sum", sums->out, 100);
    return status;
}
