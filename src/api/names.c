/* The names of buffers and handles: see names.h. */
#include "api/names.h"

#include <stdatomic.h>

#include "api/objects.h"
#include "base/fail.h"

_Static_assert(sizeof(void *) == 8, "a name needs 64 bits");

enum { KIND_BUFFER = 1, KIND_HANDLE = 3, KIND_LL_HANDLE = 5 };

/* `first` and `next` are written by the buffer's own caller only; others may look at any time. */
typedef struct place {
    atomic_bool taken;
    _Atomic(epx_buffer_t *) buffer; /* NULL: none, or not yet, or no more */
    atomic_uint_fast64_t first;     /* the buffer's own number */
    atomic_uint_fast64_t next;      /* the last number given */
} place_t;

static place_t places[EPX__BUFFERS_MAX];

static uint64_t make(unsigned kind, uint32_t slot, uint32_t place, uint64_t number)
{
    return (number & UINT32_MAX) << 32 | (uint64_t)place << 20 | (uint64_t)slot << 4 | kind;
}

static unsigned kind_of(const void *name)
{
    return (unsigned)(uintptr_t)name & 15;
}

static uint32_t slot_of(const void *name)
{
    return (uint32_t)((uintptr_t)name >> 4) & 0xffff;
}

static uint32_t number_of(const void *name)
{
    return (uint32_t)((uintptr_t)name >> 32);
}

static place_t *place_of(const void *name)
{
    return &places[(uintptr_t)name >> 20 & (EPX__BUFFERS_MAX - 1)];
}

epx_status_t epx__buffer_enter(epx_buffer_t *buffer)
{
    for (uint32_t i = 0; i < EPX__BUFFERS_MAX; i++) {
        place_t *place = &places[i];
        if (atomic_load(&place->taken) || atomic_exchange(&place->taken, true))
            continue;
        /* Places begin far apart: a name with a wrong bit is unlikely to be one of a neighbour's. */
        uint64_t last = atomic_load(&place->next), number = (last ? last : i * 0x9e3779b9ull) + 1;
        atomic_store(&place->next, number);
        atomic_store(&place->first, number);
        buffer->place = i;
        atomic_store_explicit(&place->buffer, buffer, memory_order_release);
        return EPX_OK;
    }
    return epx__fail(EPX_E_BUSY, "%d buffers are alive in this process; destroy one first", EPX__BUFFERS_MAX);
}

void epx__buffer_leave(epx_buffer_t *buffer)
{
    place_t *place = &places[buffer->place];
    atomic_store(&place->buffer, NULL);
    atomic_store(&place->taken, false);
}

uint64_t epx__buffer_number(const epx_buffer_t *buffer)
{
    place_t *place = &places[buffer->place];
    uint64_t number = atomic_load_explicit(&place->next, memory_order_relaxed) + 1;
    atomic_store_explicit(&place->next, number, memory_order_relaxed);
    return number;
}

epx_buffer_t *epx__buffer_name(const epx_buffer_t *buffer)
{
    return (epx_buffer_t *)(uintptr_t)make(KIND_BUFFER, 0, buffer->place, atomic_load(&places[buffer->place].first));
}

epx_handle_t *epx__handle_name(const epx_handle_t *handle)
{
    return (epx_handle_t *)(uintptr_t)make(KIND_HANDLE, handle->h.index, handle->buffer->place, handle->number);
}

epx_ll_handle_t *epx__ll_handle_name(const epx_ll_handle_t *handle)
{
    return (epx_ll_handle_t *)(uintptr_t)make(KIND_LL_HANDLE, handle->call.index, handle->buffer->place,
                                              handle->number);
}

/* The living buffer that gave the name's number, or NULL. Numbers are compared modulo 2^32; where a buffer has given
 * more than that, the slot alone decides. */
static epx_buffer_t *owner(const void *name)
{
    place_t *place = place_of(name);
    epx_buffer_t *buffer = atomic_load_explicit(&place->buffer, memory_order_acquire);
    if (!buffer)
        return NULL;
    uint64_t first = atomic_load_explicit(&place->first, memory_order_relaxed);
    uint64_t given = atomic_load_explicit(&place->next, memory_order_relaxed) - first;
    return number_of(name) - (uint32_t)first <= given ? buffer : NULL;
}

static epx_status_t not_here(const char *call, const char *what, const void *name)
{
    return epx__fail(EPX_E_INVALID, "%s: %p is no %s of this library", call, name, what);
}

epx_status_t epx__buffer_find(epx_buffer_t **pointer, const char *call)
{
    const void *name = *pointer;
    if (!name)
        return epx__fail(EPX_E_INVALID, "%s: buffer is NULL", call);
    if (kind_of(name) != KIND_BUFFER || slot_of(name))
        return not_here(call, "buffer", name);
    epx_buffer_t *buffer = owner(name);
    if (!buffer || number_of(name) != (uint32_t)atomic_load_explicit(&place_of(name)->first, memory_order_relaxed))
        return epx__fail(EPX_E_INVALID, "%s: the buffer has been destroyed", call);
    *pointer = buffer;
    return EPX_OK;
}

/* The living buffer of a handle's name. */
static epx_status_t find_owner(const void *name, unsigned kind, const char *call, epx_buffer_t **buffer)
{
    if (!name)
        return epx__fail(EPX_E_INVALID, "%s: handle is NULL", call);
    if (kind_of(name) != kind)
        return not_here(call, kind == KIND_HANDLE ? "handle" : "low-latency handle", name);
    *buffer = owner(name);
    if (!*buffer)
        return epx__fail(EPX_E_INVALID, "%s: the handle's buffer has been destroyed", call);
    return EPX_OK;
}

epx_status_t epx__handle_find(epx_handle_t **pointer, const char *call)
{
    epx_buffer_t *buffer;
    const void *name = *pointer;
    EPX__TRY(find_owner(name, KIND_HANDLE, call, &buffer));
    uint32_t slot = slot_of(name);
    if (slot >= buffer->x.config.handles_max || (uint32_t)buffer->handles[slot].number != number_of(name) ||
        buffer->handles[slot].h.state == EPX__HANDLE_FREE)
        return epx__fail(EPX_E_INVALID, "%s: the handle has been released", call);
    *pointer = &buffer->handles[slot];
    return EPX_OK;
}

epx_status_t epx__ll_handle_find(epx_ll_handle_t **pointer, const char *call)
{
    epx_buffer_t *buffer;
    const void *name = *pointer;
    EPX__TRY(find_owner(name, KIND_LL_HANDLE, call, &buffer));
    uint32_t slot = slot_of(name);
    if (!buffer->ll_handles || slot >= buffer->x.config.ll_slots ||
        (uint32_t)buffer->ll_handles[slot].number != number_of(name))
        return epx__fail(EPX_E_INVALID, "%s: the handle has been combined or released", call);
    *pointer = &buffer->ll_handles[slot];
    return EPX_OK;
}
