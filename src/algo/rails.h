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

#include "channel/channels.h"
#include "device/device.h"
#include "plan/topology.h"

enum { EPX__RAIL_MESSAGES = 0, EPX__RAIL_DATA = 1, EPX__RAIL_CREDIT = 2, EPX__RAIL_CHANNELS = 3 };
enum {
    EPX__RAILS_MEMORY_RAILS = 0,
    EPX__RAILS_MEMORY_WINDOW = 1
};                            /* of the channels: the rails window, the buffer's */
enum { EPX__RAIL_INBOX = 4 }; /* messages deep: no rank is more than two halves ahead of its domain, nor of its rails */

/* What rank `domain index` i writes here about the stream of domain d, and what others write back. Rows, ever. */
typedef struct epx__rail_words {
    uint64_t arrived; /* dispatch: rows of (d, i) that lie in i's receive ring or did */
    uint64_t taken;   /* dispatch: rows of my receive ring d that i needs no more */
    uint64_t staged;  /* combine: rows that i has put up for me to sum, for domain d's token */
    uint64_t read;    /* combine: rows of mine that i has read, for domain d's tokens */
    uint64_t spare[4];
} epx__rail_words_t;

typedef struct epx__rails_layout {
    size_t words, inbox, outbox, receive, send, total;
    size_t message_bytes, ring_bytes;
    size_t mask_bytes; /* of one token's ranks in a domain */
} epx__rails_layout_t;

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
    return rails->layout.inbox +
           ((size_t)domain * EPX__RAIL_INBOX + sequence % EPX__RAIL_INBOX) * rails->layout.message_bytes;
}
static inline size_t epx__rails_outbox(const epx__rails_t *rails, int domain, uint64_t sequence)
{
    return epx__rails_inbox(rails, domain, sequence) - rails->layout.inbox + rails->layout.outbox;
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
