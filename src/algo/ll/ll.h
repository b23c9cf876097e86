/*
 * The seam between the API and an implementation of low latency. docs/PROTOCOL-LL.md is the protocol.
 *
 * The API checks arguments and keeps the calls' states: a call owns slot `number % slots` from its send half until it
 * has been combined or released. An implementation owns numbers on the device, words and rows.
 */
#ifndef EPX_ALGO_LL_H
#define EPX_ALGO_LL_H

#include "algo/exchange.h"
#include "plan/ll.h"

typedef enum epx__ll_state {
    EPX__LL_FREE,
    EPX__LL_SENT,         /* dispatch_send */
    EPX__LL_RECEIVED,     /* dispatch_recv */
    EPX__LL_COMBINE_SENT, /* combine_send */
} epx__ll_state_t;

/* One call, from dispatch_send to the end of combine. There are `slots` of them. */
typedef struct epx__ll_call {
    uint32_t index;  /* place in the pool */
    uint64_t number; /* as the host counts; a captured call has its number on the device */
    epx__ll_state_t state;
    epx_ll_dispatch_t dispatch; /* defaults filled in */
    epx_ll_combine_t combine;
    epx__experts_t map;
    uint32_t local_experts;
} epx__ll_call_t;

typedef struct epx__ll_ops {
    const char *name;
    epx_status_t (*create)(epx__exchange_t *exchange); /* fills exchange->ll; window and imports are there */
    void (*destroy)(epx__exchange_t *exchange);
    /* Several domains: all ranks have made theirs; tries the channels. Collective. NULL: they have been tried. */
    epx_status_t (*start)(epx__exchange_t *exchange);
    epx_status_t (*dispatch_send)(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
    epx_status_t (*dispatch_recv)(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
    epx_status_t (*combine_send)(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
    epx_status_t (*combine_recv)(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
    /* Both halves at once; NULL: one after the other. */
    epx_status_t (*dispatch)(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
    epx_status_t (*combine)(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
    epx_status_t (*combine_buffer)(epx__exchange_t *exchange, epx__ll_call_t *call, void **memory);
    epx_status_t (*mask_set)(epx__exchange_t *exchange, int rank, int masked, epx_stream_t stream);
    epx_status_t (*mask_get)(epx__exchange_t *exchange, int32_t *masked);
    /* From the watcher's thread: that rank is dead. True when calls go on without it, for it is masked or will be; else
     * the buffer fails. NULL: it always fails. */
    bool (*outlives)(epx__exchange_t *exchange, int rank);
    /* Bring exchange->traffic up to date; does not wait. NULL: it always is. */
    void (*count_traffic)(epx__exchange_t *exchange);
} epx__ll_ops_t;

extern const epx__ll_ops_t epx__ll_cpu;

#endif
