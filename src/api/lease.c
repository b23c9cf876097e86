/*
 * Leases: pieces of the window in the caller's hands.
 *
 * A lease id is generation << 32 | (place in the table + 1). What is given back keeps its range and stream in the
 * table; whoever takes memory that overlaps it, on another stream, first waits (on the stream) for the mark made at the
 * release.
 */
#include "api/objects.h"
#include "base/fail.h"

static epx__lease_t *lease_of(epx_buffer_t *buffer, epx_lease_t id, uint32_t *index)
{
    *index = (uint32_t)id - 1;
    if ((uint32_t)id == 0 || *index >= buffer->x.config.leases_max)
        return NULL;
    epx__lease_t *lease = &buffer->leases[*index];
    return lease->state == EPX__LEASE_HELD && lease->generation == (uint32_t)(id >> 32) ? lease : NULL;
}

/* A place in the table: a fresh one, else one whose release has the least to say. */
static uint32_t free_place(const epx_buffer_t *buffer)
{
    uint32_t released = UINT32_MAX;
    for (uint32_t i = 0; i < buffer->x.config.leases_max; i++) {
        if (buffer->leases[i].state == EPX__LEASE_NEVER)
            return i;
        if (buffer->leases[i].state == EPX__LEASE_RELEASED && released == UINT32_MAX)
            released = i;
    }
    return released;
}

static bool overlap(const epx__lease_t *lease, size_t offset, size_t bytes)
{
    return lease->offset < offset + bytes && offset < lease->offset + lease->bytes;
}

/* Order this stream after every release of memory in the range, and after the place's own old release. */
static epx_status_t wait_releases(epx_buffer_t *buffer, uint32_t place, size_t offset, size_t bytes,
                                  epx_stream_t stream)
{
    for (uint32_t i = 0; i < buffer->x.config.leases_max; i++) {
        const epx__lease_t *lease = &buffer->leases[i];
        if (lease->state != EPX__LEASE_RELEASED || lease->stream == stream)
            continue;
        if (i == place || overlap(lease, offset, bytes))
            EPX__TRY(buffer->x.ops->wait_mark(&buffer->x, i, stream));
    }
    return EPX_OK;
}

epx_status_t epx__lease_take(epx_buffer_t *buffer, size_t bytes, epx_stream_t stream, epx_lease_t *id,
                             size_t *window_offset)
{
    size_t offset;
    uint32_t place = free_place(buffer);
    if (place == UINT32_MAX)
        return epx__fail(EPX_E_BUSY, "all %u leases are held; release one, or create the buffer with more leases_max",
                         buffer->x.config.leases_max);
    if (epx__arena_take(&buffer->arena, bytes, &offset) != EPX_OK)
        return epx__fail(
            EPX_E_BUSY,
            "a lease of %zu bytes: the largest free piece of the %zu has %zu; release leases, bring memory "
            "instead, or create the buffer with more lease_bytes (EPX_LEASE_BYTES)",
            bytes, buffer->x.layout.lease_bytes, epx__arena_largest(&buffer->arena));
    epx_status_t status = wait_releases(buffer, place, offset, bytes, stream);
    if (status != EPX_OK) {
        epx__arena_give(&buffer->arena, offset);
        return status;
    }
    epx__lease_t *lease = &buffer->leases[place];
    *lease = (epx__lease_t){.state = EPX__LEASE_HELD,
                            .generation = lease->generation + 1,
                            .offset = offset,
                            .bytes = bytes,
                            .stream = stream};
    *id = (uint64_t)lease->generation << 32 | (place + 1);
    *window_offset = buffer->x.layout.lease_offset + offset;
    return EPX_OK;
}

size_t epx__lease_find(const epx_buffer_t *buffer, const void *memory, size_t bytes)
{
    const uint8_t *base = (const uint8_t *)buffer->x.window.base + buffer->x.layout.lease_offset;
    const uint8_t *at = memory;
    if (!memory || at < base || at >= base + buffer->x.layout.lease_bytes)
        return SIZE_MAX;
    size_t offset = (size_t)(at - base);
    return epx__arena_find(&buffer->arena, offset, bytes) ? buffer->x.layout.lease_offset + offset : SIZE_MAX;
}

epx_status_t epx_lease(epx_buffer_t *buffer, size_t bytes, epx_stream_t stream, epx_lease_t *lease, void **memory)
{
    EPX__TRY(epx__buffer_find(&buffer, "epx_lease"));
    if (!lease || !memory)
        return epx__fail(EPX_E_INVALID, "epx_lease: lease and memory must not be NULL");
    if (bytes == 0)
        return epx__fail(EPX_E_INVALID, "epx_lease: bytes is 0; ask for at least 1");
    EPX__TRY(epx__buffer_usable(buffer, "epx_lease"));
    size_t offset;
    EPX__TRY(epx__lease_take(buffer, bytes, stream, lease, &offset));
    *memory = (uint8_t *)buffer->x.window.base + offset;
    return EPX_OK;
}

epx_status_t epx__lease_give(epx_buffer_t *buffer, epx_lease_t id, epx_stream_t stream)
{
    uint32_t index;
    if (id == 0)
        return EPX_OK;
    epx__lease_t *lease = lease_of(buffer, id, &index);
    if (!lease)
        return epx__fail(
            EPX_E_INVALID,
            "epx_lease_release: lease %#llx is not held on this buffer (released before, or of another buffer)",
            (unsigned long long)id);
    EPX__TRY(buffer->x.ops->mark(&buffer->x, index, stream));
    lease->state = EPX__LEASE_RELEASED;
    lease->stream = stream;
    epx__arena_give(&buffer->arena, lease->offset);
    return EPX_OK;
}

epx_status_t epx_lease_release(epx_buffer_t *buffer, epx_lease_t id, epx_stream_t stream)
{
    EPX__TRY(epx__buffer_find(&buffer, "epx_lease_release"));
    return epx__lease_give(buffer, id, stream);
}
