/*
 * The receiving side of a lane: what arrived is marked, what is next is carried out, what was carried out is told back.
 * All under the proxy's lock.
 */
#include "channel/channels.h"

#include <stdio.h>

#include "base/fail.h"
#include "base/mutate.h"

static uint64_t *counter(epx__proxy_t *proxy, const epx__lane_t *lane, size_t part)
{
    return epx__block_word(proxy->owner, part, lane->number);
}

static void grow(uint64_t *word, uint64_t by)
{
    __atomic_store_n(word, __atomic_load_n(word, __ATOMIC_RELAXED) + by, __ATOMIC_RELEASE);
}

/* The words of an add came with its notice. Anything wrong in them is the sender's fault, told in words. */
static epx_status_t carry_out_add(epx__proxy_t *proxy, epx__lane_t *lane, uint64_t sequence)
{
    epx__channels_t *self = proxy->owner;
    size_t at = (size_t)lane->number * self->window + sequence % self->window;
    const epx__add_slot_t *slot = (const epx__add_slot_t *)(void *)(self->block + self->layout.add_in) + at;
    uint64_t memory = slot->memory, offset = slot->offset;
    if (memory > self->memory_count)
        return epx__fail(EPX_E_INVALID, "atomic_add of rank %u: memory %llu of %u", lane->rank,
                         (unsigned long long)memory, self->memory_count);
    const epx_channel_memory_t *to = &self->memory[memory];
    if (to->device)
        return epx__fail(EPX_E_UNSUPPORTED,
                         "atomic_add of rank %u: memory %llu is GPU memory; the proxy adds to host memory only",
                         lane->rank, (unsigned long long)memory);
    if (offset % 8 || to->bytes < 8 || offset > to->bytes - 8)
        return epx__fail(EPX_E_INVALID, "atomic_add of rank %u: offset %llu of %zu bytes (a multiple of 8 is needed)",
                         lane->rank, (unsigned long long)offset, to->bytes);
    __atomic_fetch_add((int64_t *)(void *)((char *)to->base + offset), slot->value, __ATOMIC_RELEASE);
    return EPX_OK;
}

static epx_status_t carry_out(epx__proxy_t *proxy, epx__lane_t *lane, uint32_t kind, uint64_t sequence)
{
    if (kind == EPX__NOTICE_SIGNAL)
        grow(counter(proxy, lane, proxy->owner->layout.signals), 1);
    if (kind == EPX__NOTICE_ADD)
        return carry_out_add(proxy, lane, sequence);
    return EPX_OK;
}

static void owe(epx__proxy_t *proxy, epx__lane_t *lane)
{
    lane->owed++;
    if (lane->listed)
        return;
    lane->listed = true;
    uint32_t place = (proxy->owing_head + proxy->owing_count++) % proxy->lane_count;
    proxy->owing[place] = (uint32_t)(lane - proxy->lanes);
}

/* Everything that is next in sequence. */
static epx_status_t apply(epx__proxy_t *proxy, epx__lane_t *lane)
{
    uint32_t mask = 2 * proxy->owner->window - 1;
    while (lane->arrived[lane->next & mask]) {
        uint32_t kind = lane->arrived[lane->next & mask] - 1u;
        lane->arrived[lane->next & mask] = 0;
        EPX__TRY(carry_out(proxy, lane, kind, lane->next));
        lane->next++;
        owe(proxy, lane);
    }
    return EPX_OK;
}

/* A peer leaves: what it has applied of each channel is told, the rest never will be. */
static epx_status_t take_bye(epx__proxy_t *proxy, const epx__lane_t *lane)
{
    epx__channels_t *self = proxy->owner;
    const uint64_t *applied = (const uint64_t *)(void *)(self->block + self->layout.bye_in) + lane->number;
    for (uint32_t c = 0; c < self->channels; c++) {
        const epx__lane_t *each = &proxy->lanes[epx__channels_lane(self, lane->rank, c)];
        uint64_t *acked = counter(proxy, each, self->layout.acked), told = __atomic_load_n(acked, __ATOMIC_RELAXED);
        if (applied[c] > each->sent)
            return epx__fail(EPX_E_NET, "rank %u leaves and says that %llu requests of channel %u are applied of %llu",
                             lane->rank, (unsigned long long)applied[c], c, (unsigned long long)each->sent);
        if (applied[c] > told)
            grow(acked, applied[c] - told);
    }
    epx__lane_t *first = epx__proxy_first(proxy, lane->rank);
    proxy->answers += !first->heard && !first->said;
    first->heard = true;
    epx__channels_left(proxy, lane->rank);
    return EPX_OK;
}

static epx_status_t take_credit(epx__proxy_t *proxy, epx__lane_t *lane, uint32_t n)
{
    uint64_t *acked = counter(proxy, lane, proxy->owner->layout.acked);
    uint64_t told = __atomic_load_n(acked, __ATOMIC_RELAXED);
    if (n == 0)
        return take_bye(proxy, lane);
    if (epx__proxy_first(proxy, lane->rank)->heard) /* it has left: its bye said more */
        return EPX_OK;
    if (n > lane->sent - told)
        return epx__fail(EPX_E_NET, "rank %u says that %u more requests are applied, but only %llu are under way",
                         lane->rank, n, (unsigned long long)(lane->sent - told));
    grow(acked, n);
    return EPX_OK;
}

epx_status_t epx__lane_notice(epx__proxy_t *proxy, uint32_t notice)
{
    epx__channels_t *self = proxy->owner;
    uint32_t kind = notice >> 30, low = notice & ((1u << self->sequence_bits) - 1);
    uint32_t number = (notice & 0x3fffffffu) >> self->sequence_bits;
    if (number >= proxy->lane_count || proxy->lanes[number].arrived == NULL)
        return epx__fail(EPX_E_NET, "a notice (%08x) for lane %u came, which nobody has here", notice, number);
    epx__lane_t *lane = &proxy->lanes[number];
    epx_status_t status;
    if (kind == EPX__NOTICE_CREDIT) {
        status = take_credit(proxy, lane, low);
    } else if (EPX__MUTATE(port_arrival_order)) {
        status = carry_out(proxy, lane, kind, lane->next++);
        owe(proxy, lane);
    } else {
        uint32_t ahead = (low - (uint32_t)lane->next) & (2 * self->window - 1);
        if (lane->arrived[low] || ahead >= self->window)
            status = epx__fail(EPX_E_NET, "rank %u sent sequence number %u %s; next is %llu, the window %u", lane->rank,
                               low, lane->arrived[low] ? "twice" : "outside of its window",
                               (unsigned long long)lane->next, self->window);
        else {
            lane->arrived[low] = (uint8_t)(kind + 1);
            status = apply(proxy, lane);
        }
    }
    if (status != EPX_OK) {
        lane->dead = true;
        epx__channels_fault(self, (int)lane->rank, status, epx__detail());
    }
    return status;
}

/* With the notice that we leave: what has been applied of all channels of this lane's peer. */
static void fill_bye(epx__proxy_t *proxy, const epx__lane_t *lane, epx__net_put_t *put)
{
    epx__channels_t *self = proxy->owner;
    size_t mine = (size_t)lane->rank * self->channels * sizeof(uint64_t);
    uint64_t *applied = (uint64_t *)(void *)(self->block + self->layout.bye_out + mine);
    for (uint32_t c = 0; c < self->channels; c++)
        applied[c] = proxy->lanes[epx__channels_lane(self, lane->rank, c)].next;
    put->memory = proxy->memory[self->memory_count];
    put->offset = self->layout.bye_out + mine;
    put->to = &proxy->keys[(size_t)lane->rank * (self->memory_count + 1) + self->memory_count];
    put->to_offset = self->layout.bye_in + (size_t)self->rank * self->channels * sizeof(uint64_t);
    put->bytes = self->channels * sizeof(uint64_t);
}

/* One credit notice (0: we leave). EPX_E_BUSY: later. */
static epx_status_t tell(epx__proxy_t *proxy, epx__lane_t *lane, uint32_t n)
{
    epx__net_put_t put = {.peer = lane->net_peer,
                          .notice = epx__notice(proxy->owner, EPX__NOTICE_CREDIT, lane->lane_there, n),
                          .with_notice = true,
                          .cookie = lane->rank};
    if (n == 0)
        fill_bye(proxy, lane, &put);
    epx_status_t status = epx__proxy_put(proxy, lane, &put, proxy->share + EPX__CHANNELS_CREDITS);
    if (status == EPX_OK) {
        lane->owed -= n;
        atomic_fetch_add(&proxy->owner->credits, 1);
    }
    return status;
}

/* Idle: all that is owed. Else only lanes that owe a quarter of the window. Looks at each listed lane once. */
bool epx__lane_tell(epx__proxy_t *proxy, bool idle)
{
    epx__channels_t *self = proxy->owner;
    bool told = false;
    uint32_t least = idle ? 1 : self->window / 4 > 1 ? self->window / 4 : 1;
    if (idle && EPX__MUTATE(port_credit_batch))
        least = 2; /* never the last one at idle */
    for (uint32_t i = proxy->owing_count; i > 0; i--) {
        epx__lane_t *lane = &proxy->lanes[proxy->owing[proxy->owing_head]];
        epx_status_t status = EPX_OK;
        const epx__lane_t *first = epx__proxy_first(proxy, lane->rank);
        if (first->said || first->heard || first->lost)
            lane->owed = 0;
        if (lane->owed >= least) {
            status = tell(proxy, lane, lane->owed);
            told |= status != EPX_E_BUSY; /* busy: this peer later, others now */
        }
        if (status != EPX_OK && status != EPX_E_BUSY) { /* the peer has left: it wants no credit any more */
            lane->owed = 0;
            lane->dead = true;
            epx__channels_fault(self, (int)lane->rank, status, epx__detail());
        }
        uint32_t which = proxy->owing[proxy->owing_head];
        proxy->owing_head = (proxy->owing_head + 1) % proxy->lane_count;
        proxy->owing_count--;
        lane->listed = lane->owed > 0;
        if (lane->listed)
            proxy->owing[(proxy->owing_head + proxy->owing_count++) % proxy->lane_count] = which;
    }
    return told;
}

/* ---- leaving ---- */

/* A peer that is lost, or that nobody wanted a channel to, is told nothing. */
static bool is_told(const epx__proxy_t *proxy, const epx__lane_t *first)
{
    return first->arrived && first->number % proxy->owner->channels == 0 && !first->lost;
}

/* All that was pushed to that peer is applied there, and the network has let go of it. */
static bool all_done(epx__proxy_t *proxy, const epx__lane_t *first)
{
    bool done = first->under_way == 0;
    for (uint32_t c = 0; c < proxy->owner->channels; c++) {
        const epx__lane_t *lane = first + c;
        uint64_t acked = __atomic_load_n(counter(proxy, lane, proxy->owner->layout.acked), __ATOMIC_RELAXED);
        done = done && lane->waiting_count == 0 && (lane->dead || lane->sent == acked);
    }
    return done;
}

/* After it we put nothing more to that peer. False: later. */
static bool say_bye(epx__proxy_t *proxy, epx__lane_t *first)
{
    epx_status_t status = tell(proxy, first, 0);
    if (status == EPX_E_BUSY)
        return false;
    proxy->answers -= first->heard;
    first->said = true;
    for (uint32_t c = 0; c < proxy->owner->channels; c++)
        first[c].dead = true;
    return true;
}

bool epx__lane_bye(epx__proxy_t *proxy)
{
    bool all = true;
    for (uint32_t i = 0; i < proxy->lane_count; i++) {
        epx__lane_t *first = &proxy->lanes[i];
        if (is_told(proxy, first) && !first->said)
            all = all_done(proxy, first) && say_bye(proxy, first) && all;
    }
    return all;
}

bool epx__lane_parted(const epx__proxy_t *proxy)
{
    bool all = true;
    for (uint32_t i = 0; i < proxy->lane_count; i++)
        if (is_told(proxy, &proxy->lanes[i]))
            all = all && proxy->lanes[i].said && proxy->lanes[i].heard;
    return all;
}

void epx__lane_answer(epx__proxy_t *proxy)
{
    for (uint32_t i = 0; proxy->answers && i < proxy->lane_count; i++) {
        epx__lane_t *first = &proxy->lanes[i];
        if (first->heard && !first->said && first->under_way == 0)
            say_bye(proxy, first);
    }
}
