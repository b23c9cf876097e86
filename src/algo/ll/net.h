/*
 * What low latency has between domains: a port channel from every rank to every rank of the other domains (no rails: a
 * record or an output goes straight to whom it is for), and memory for what is on its way out.
 *
 * Memories of the channels: 0 is the low-latency part of the window (offsets from its first byte), 1 is `out`.
 *
 *   out  [slots][far ranks] pieces of `piece_bytes`, ordinary memory: the record of a dispatch, later the outputs that
 *        go back. A piece is filled again once the puts from it are applied there (`acked`)
 *
 * With GPUs both are one piece of pinned host memory, which kernels and the network reach: what far ranks put for the
 * window comes to `staging`, laid out as the window's low-latency part (without the flags), and kernels bring it on.
 *
 * A far rank is one of another domain. Made by src/api, which knows the group; used by algo/ll/cpu and algo/ll/cuda.
 */
#ifndef EPX_ALGO_LL_NET_H
#define EPX_ALGO_LL_NET_H

#include "channel/channels.h"
#include "plan/ll.h"
#include "plan/topology.h"

typedef struct epx__ll_net {
    epx__channels_t *channels; /* one to each far rank */
    uint8_t *out;
    uint8_t *staging; /* NULL on the CPU: far ranks put into the window itself */
    size_t piece_bytes;
    uint32_t far;    /* how many */
    uint8_t *wanted; /* [ranks] 1: far */
    int32_t *place;  /* [ranks] among the far ranks; -1 of one's own domain */
    bool help;       /* CPU: fewer cores than ranks and proxies: who waits steps the proxies itself */
    /* src/api's own */
    uint8_t *memory;         /* what `out` and `staging` are cut from */
    uint64_t *tickets;       /* of GPU producers */
    bool pinned, pinned_too; /* that memory; the channels' block */
} epx__ll_net_t;

/* Bytes of the window's low-latency part that far ranks put to: words, records, outputs. */
static inline size_t epx__ll_net_staging_bytes(const epx__ll_layout_t *layout)
{
    return layout->row_flags_offset - layout->words_offset;
}

static inline size_t epx__ll_net_out_at(const epx__ll_net_t *net, uint64_t slot, int rank)
{
    return (size_t)(slot * net->far + (uint32_t)net->place[rank]) * net->piece_bytes;
}

static inline const epx_port_channel_t *epx__ll_net_channel(const epx__ll_net_t *net, int rank)
{
    return &net->channels->port[(uint32_t)rank * net->channels->channels];
}

#endif
