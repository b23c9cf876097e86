/* Where things lie in a rails window. */
#include "algo/rails.h"

#include "base/fail.h"

static size_t part(size_t *at, size_t count, size_t bytes, bool *overflow)
{
    size_t start = (*at + 255) / 256 * 256, total;
    if (__builtin_mul_overflow(count, bytes, &total) || __builtin_add_overflow(start, total, at))
        *overflow = true;
    return start;
}

/* Rings hold a quarter of the reserve's bytes for each rail, at least 64 KiB, at most 8 MiB. */
static size_t ring_bytes(size_t reserve_bytes, size_t domains)
{
    size_t bytes = reserve_bytes / 4 / (domains > 1 ? domains - 1 : 1) / 4096 * 4096;
    return bytes < 65536 ? 65536 : bytes > 8u << 20 ? 8u << 20 : bytes;
}

epx_status_t epx__rails_layout_make(const epx__topology_t *topology, uint32_t tokens_max, uint32_t experts_max,
                                    size_t reserve_bytes, epx__rails_layout_t *layout)
{
    size_t domains = (size_t)topology->domains, members = (size_t)topology->per_domain, at = 0;
    bool overflow = false;
    epx__rails_layout_t l = {.mask_bytes = (members + 7) / 8, .ring_bytes = ring_bytes(reserve_bytes, domains)};
    size_t message = 256 + 4 * (size_t)topology->ranks + 4 * (size_t)experts_max;
    if (__builtin_add_overflow(message, (size_t)tokens_max * (4 + l.mask_bytes), &l.message_bytes))
        overflow = true;
    l.message_bytes = (l.message_bytes + 255) / 256 * 256;
    l.words = part(&at, members * domains, sizeof(epx__rail_words_t), &overflow);
    l.inbox = part(&at, domains * EPX__RAIL_INBOX, l.message_bytes, &overflow);
    l.outbox = part(&at, domains * EPX__RAIL_INBOX, l.message_bytes, &overflow);
    l.receive = part(&at, domains, l.ring_bytes, &overflow);
    l.send = part(&at, domains, l.ring_bytes, &overflow);
    l.total = (at + 4095) / 4096 * 4096;
    if (overflow)
        return epx__fail(EPX_E_INVALID, "the rails window of %zu domains for %u tokens does not fit 64 bits", domains,
                         tokens_max);
    *layout = l;
    return EPX_OK;
}
