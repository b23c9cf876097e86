/*
 * Rails: the way between domains. Rank i of one domain and rank i of another are each other's rail; all that crosses
 * the network between the two domains for rank i's tokens goes between these two.
 *
 * A rank's rails window is memory that its rails write through the network and that the ranks of its domain read:
 *
 *   [ words | inbox | outbox | receive rings | send rings ]
 *
 * words     one line each, [ranks of the domain][domains]. `arrived` and `staged` lie at the one who waits for them
 *           and are written by that rank of the domain; so do `taken` and `read`. docs/PROTOCOL-NET.md has the table
 * inbox     [domains][4] messages, one a half, written by the rail of that domain; slot = sequence & 3
 * outbox    the same, messages on their way out
 * rings     [domains] pieces of ring_bytes, cut into slots by each half's shape
 *
 * Made by src/api, which knows how windows are shared; used by algo/ht. NULL with one domain.
 */
#ifndef EPX_ALGO_RAILS_H
#define EPX_ALGO_RAILS_H

#include "algo/rail_wire.h"
#include "channel/channels.h"
#include "device/device.h"
#include "plan/topology.h"

typedef struct epx__rails {
    const epx__topology_t *topology;
    int domain, index; /* mine */
    uint32_t tokens_max, experts_max;
    epx__rails_layout_t layout;
    epx__window_t window;
    uint8_t **member; /* [per_domain] rails windows of my domain as mapped here */
    epx__channels_t *channels;
    bool help; /* fewer cores than ranks and proxies: who waits steps the proxies itself */
    void *api; /* src/api's */
} epx__rails_t;

/* Pure. Refuses in words what does not fit. */
epx_status_t epx__rails_layout_make(const epx__topology_t *topology, uint32_t tokens_max, uint32_t experts_max,
                                    size_t reserve_bytes, epx__rails_layout_t *layout);

static inline int epx__rails_peer(const epx__rails_t *rails, int domain)
{
    return epx__topology_rank(rails->topology, domain, rails->index);
}
static inline const epx_port_channel_t *epx__rails_channel(const epx__rails_t *rails, int domain, int which)
{
    return &rails->channels
                ->port[(uint32_t)epx__rails_peer(rails, domain) * rails->channels->channels + (uint32_t)which];
}
/* In the window of member `at`: the line that member `by` writes about domain d. */
static inline epx__rail_words_t *epx__rails_words(const epx__rails_t *rails, int at, int by, int domain)
{
    return (epx__rail_words_t *)(void *)(rails->member[at] + rails->layout.words) +
           (by * rails->topology->domains + domain);
}
static inline size_t epx__rails_inbox(const epx__rails_t *rails, int domain, uint64_t sequence)
{
    return rails->layout.inbox + epx__rail_slot(&rails->layout, domain, sequence);
}
static inline size_t epx__rails_outbox(const epx__rails_t *rails, int domain, uint64_t sequence)
{
    return rails->layout.outbox + epx__rail_slot(&rails->layout, domain, sequence);
}
static inline size_t epx__rails_receive(const epx__rails_t *rails, int domain)
{
    return rails->layout.receive + (size_t)domain * rails->layout.ring_bytes;
}
static inline size_t epx__rails_send(const epx__rails_t *rails, int domain)
{
    return rails->layout.send + (size_t)domain * rails->layout.ring_bytes;
}

#endif
