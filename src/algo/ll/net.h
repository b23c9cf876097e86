/*
 * What low latency has between domains: a port channel from every rank to every rank of the other domains (no rails: a
 * record or an output goes straight to whom it is for), and memory for what is on its way out.
 *
 * Memories of the channels: 0 is the low-latency part of the window (offsets from its first byte), 1 is `out`.
 *
 *   out  [slots][far ranks] pieces of `piece_bytes`, ordinary memory: the record of a dispatch, later the outputs that
 *        go back. A piece is filled again once the puts from it are applied there (`acked`)
 *
 * A far rank is one of another domain. Made by src/api, which knows the group; used by algo/ll/cpu.
 */
#ifndef EPX_ALGO_LL_NET_H
#define EPX_ALGO_LL_NET_H

#include "channel/channels.h"
#include "plan/ll.h"
#include "plan/topology.h"

enum { EPX__LL_NET_WINDOW = 0, EPX__LL_NET_OUT = 1, EPX__LL_NET_MEMORIES = 2 };
enum { EPX__LL_NET_WORDS = 4 }; /* adds that one serving may push: each word of a line */

typedef struct epx__ll_net {
    epx__channels_t *channels; /* one to each far rank */
    uint8_t *out;
    size_t piece_bytes;
    uint32_t far;    /* how many */
    uint8_t *wanted; /* [ranks] 1: far */
    int32_t *place;  /* [ranks] among the far ranks; -1 of one's own domain */
    bool help;       /* fewer cores than ranks and proxies: who waits steps the proxies itself */
} epx__ll_net_t;

static inline size_t epx__ll_net_out_at(const epx__ll_net_t *net, uint64_t slot, int rank)
{
    return (size_t)(slot * net->far + (uint32_t)net->place[rank]) * net->piece_bytes;
}

static inline const epx_port_channel_t *epx__ll_net_channel(const epx__ll_net_t *net, int rank)
{
    return &net->channels->port[(uint32_t)rank * net->channels->channels];
}

#endif
