/* Low latency on the CPU: what the files of this folder share. The protocol is in docs/PROTOCOL-LL.md. */
#ifndef EPX_ALGO_LL_CPU_H
#define EPX_ALGO_LL_CPU_H

#include "algo/ll/ll.h"
#include "algo/ll/net.h"
#include "base/clock.h"
#include "device/cpu/copy.h"
#include "device/cpu/wait.h"

/* A rank's rows of one slot's `back` begin at that row: with a row a choice, and with a row a token. */
typedef struct epx__ll_first {
    uint32_t each, by_rank;
} epx__ll_first_t;

/* What a call keeps between its halves. */
typedef struct epx__ll_kept {
    uint32_t *tokens;       /* [ranks] of each source; 0 of one that was not heard */
    int32_t *ids;           /* [ranks][tokens_max][topk_max], tightly [tokens][topk] of the call for each source */
    float *weights;         /* the same, when given */
    epx__ll_first_t *back;  /* [ranks] in each source's window: where my outputs for it begin */
    epx__ll_first_t *first; /* [ranks] in mine: where each rank's outputs for me begin */
    uint8_t *asked;         /* [ranks] 1: my dispatch went there, so its outputs are to be waited for */
    uint8_t *heard;         /* [ranks] 1: its dispatch came here, so it gets outputs */
    uint8_t *came;          /* [ranks] 1: its outputs for my tokens are here */
    uint8_t *owing;  /* [ranks] 1: given up in this call; it may still write into the slot until it says that it is done
                        with the call */
    bool unread;     /* its outputs were sent, and those for me not taken: a release would leave them under way */
    uint64_t last;   /* number of the call that used the slot last */
    void *zero_copy; /* expert outputs, when the buffer was made for it */
} epx__ll_kept_t;

/* What this rank has to say to a far rank in one slot, each by its place in epx__ll_words_t. */
enum { EPX__LL_DISPATCHED = 0, EPX__LL_COMBINED = 1, EPX__LL_TAKEN = 2, EPX__LL_LEFT_OUT = 3 };
typedef struct epx__ll_line {
    uint64_t want[EPX__LL_NET_WORDS]; /* what its words should be */
    uint64_t told[EPX__LL_NET_WORDS]; /* what they are once all that was pushed is applied */
    uint64_t put;                     /* requests issued to it when the last put from this piece of `out` was pushed */
} epx__ll_line_t;

typedef struct epx__ll_cpu {
    epx__exchange_t *exchange;
    epx__ll_layout_t layout;
    epx__ll_words_t **to;  /* [ranks] my line of slot 0 in each near rank's window; NULL: far */
    epx__ll_words_t *from; /* [slots][ranks] their lines in mine */
    epx__ll_kept_t *kept;  /* [slots] */
    uint8_t *masked;       /* [ranks] */
    uint8_t *done;         /* [ranks] scratch of a half */
    bool again;            /* set while a rank is served: it is to be served once more */
    uint32_t experts;      /* the most on this rank */
    int32_t *row_of;       /* [experts_max] scratch: next row of each local expert */
    int32_t *source_row; /* [ranks][experts] scratch of combine_send: the same for each source; then [ranks] by rank */
    uint32_t *next;      /* [ranks] scratch: token to go on with; next row of each rank's outputs */
    uint32_t *gone;      /* [ranks] scratch of combine_send: rows sent */
    uint8_t *rows;       /* [tokens_max][quantised_bytes] the tokens of a call, quantised */
    size_t quantised_bytes;
    uint64_t *quantised; /* [tokens_max] of which call rows[token] is */
    float *sum;          /* [hidden_max] scratch */
    /* Between domains. */
    epx__ll_net_t *net;    /* NULL: one domain */
    epx__ll_line_t *lines; /* [slots][far ranks] */
    uint8_t *pending;      /* [ranks] 1: some word of it is wanted and not told */
    uint64_t *died_ns;     /* [ranks] when its death was noticed; 0 it lives */
    uint64_t *left_ns;     /* [ranks] when a wait first saw that it is gone; 0 it is not */
} epx__ll_cpu_t;

static inline bool epx__ll_is_far(const epx__ll_cpu_t *ll, int rank)
{
    return ll->to[rank] == NULL;
}

/* The lines of the slot that call `number` uses: mine in a near rank's window, and any rank's in mine. */
static inline epx__ll_words_t *epx__ll_to(const epx__ll_cpu_t *ll, uint64_t number, int rank)
{
    return ll->to[rank] + number % ll->layout.slots * ll->layout.ranks;
}
static inline const epx__ll_words_t *epx__ll_from(const epx__ll_cpu_t *ll, uint64_t number, int rank)
{
    return ll->from + number % ll->layout.slots * ll->layout.ranks + rank;
}

/* The watcher's thread reads the masks when a rank dies. */
static inline void epx__ll_set_masked(epx__ll_cpu_t *ll, int rank, bool masked)
{
    __atomic_store_n(&ll->masked[rank], masked, __ATOMIC_RELAXED);
}

/* ---- waiting (ll_wait.c) ---- */

/* Serve the ranks one by one as they become ready: `ready` says whether rank's part can be done now, `serve` does it.
 * Ranks with done[rank] set are left out. A rank that misses the deadline, dies or destroys its buffer fails the call,
 * or is masked where the buffer says so. */
typedef struct epx__ll_wait {
    const char *operation, *stage;
    uint64_t number;
    uint64_t timeout_ms;
    int64_t *wait_ns; /* [ranks] or NULL */
    bool (*ready)(epx__ll_cpu_t *ll, int rank, void *context);
    epx_status_t (*serve)(epx__ll_cpu_t *ll, int rank, void *context); /* sets ll->again when there is more to do */
    /* What is waited for instead of `stage`, of a far rank; NULL: `stage`. */
    const char *(*stage_of)(epx__ll_cpu_t *ll, int rank, void *context);
    void (*give_up)(epx__ll_cpu_t *ll, int rank, void *context); /* a rank is masked now */
    void *context;
} epx__ll_wait_t;

epx_status_t epx__ll_serve_all(epx__ll_cpu_t *ll, const epx__ll_wait_t *wait);

static inline uint64_t epx__ll_load(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
/* That word of mine in rank's window becomes `number`, after everything this thread has written or put there. Never
 * waits: what a far rank has no room for now is told later (epx__ll_net_settle). */
void epx__ll_tell(epx__ll_cpu_t *ll, int rank, uint64_t number, int word);

/* ---- far ranks (ll_net.c) ---- */

epx_status_t epx__ll_net_open(epx__ll_cpu_t *ll);
void epx__ll_net_close(epx__ll_cpu_t *ll);
void epx__ll_net_tell(epx__ll_cpu_t *ll, int rank, uint64_t number, int word);
/* Room for `bytes` and the words of one serving, and the piece of `out` is free. */
bool epx__ll_net_ready(const epx__ll_cpu_t *ll, int rank, uint64_t number, size_t bytes);
uint8_t *epx__ll_net_out(const epx__ll_cpu_t *ll, int rank, uint64_t number);
/* Put the first `bytes` of the piece to `offset` of rank's window. Needs epx__ll_net_ready. */
epx_status_t epx__ll_net_put(epx__ll_cpu_t *ll, int rank, uint64_t number, size_t offset, size_t bytes);
/* At the end of a half: no word to a rank that is not masked stays untold. At its beginning: try the masked. */
epx_status_t epx__ll_net_settle(epx__ll_cpu_t *ll, const epx__ll_wait_t *half);
void epx__ll_net_retry(epx__ll_cpu_t *ll);
/* That rank takes nothing more: it has left, or cannot be reached. */
bool epx__ll_net_gone(const epx__ll_cpu_t *ll, int rank);
/* The same, and if it failed, its reason would be here by now. */
bool epx__ll_net_left(epx__ll_cpu_t *ll, int rank);
/* A rank has died (any thread). What it had put on the way may still land for a while. */
void epx__ll_net_died(epx__ll_cpu_t *ll, int rank);
/* How long until nothing of it lands any more, 0: now. */
uint64_t epx__ll_net_rest_ns(epx__ll_cpu_t *ll, int rank);
/* Around a wait: its thread steps the proxies itself where cores are few. */
void epx__ll_net_help_begin(epx__ll_cpu_t *ll);
bool epx__ll_net_help(epx__ll_cpu_t *ll);
void epx__ll_net_help_end(epx__ll_cpu_t *ll);

/* ---- who chose what (ll_visit.c) ---- */

/* One token that came to this rank. */
typedef struct epx__ll_visit {
    uint32_t source, token;
    uint32_t index;               /* of this token among the source's that came here, when all are visited */
    uint32_t rank_place;          /* place of this rank among the token's ranks, ascending */
    uint32_t choices;             /* chosen experts of this rank, in top-k order */
    uint32_t place[EPX_TOPK_MAX]; /* their top-k places */
    int32_t expert[EPX_TOPK_MAX]; /* their local numbers */
    bool first[EPX_TOPK_MAX];     /* not chosen by an earlier place of this token */
    const int32_t *ids;           /* [topk] */
    const float *weights;         /* [topk] or NULL */
} epx__ll_visit_t;

/* Every (source, token) that came here, in that order. */
void epx__ll_each(epx__ll_cpu_t *ll, const epx__ll_call_t *call,
                  void (*visit)(void *context, const epx__ll_visit_t *visit), void *context);
/* One source's tokens that came here, from `token` on, until `visit` says false. Returns the token to go on with. */
uint32_t epx__ll_each_of(epx__ll_cpu_t *ll, const epx__ll_call_t *call, uint32_t source, uint32_t token,
                         bool (*visit)(void *context, const epx__ll_visit_t *visit), void *context);

static inline epx__ll_kept_t *epx__ll_kept_of(epx__ll_cpu_t *ll, const epx__ll_call_t *call)
{
    return &ll->kept[call->number % ll->layout.slots];
}

/* The ids' hash: what all ranks must agree on. */
uint64_t epx__ll_shape(const epx__ll_call_t *call);

/* Has that rank ended its part in call `number` here: put its outputs, or left me out? If so nothing more of that call
 * will be written. *came: the outputs are there. */
static inline bool epx__ll_ended(const epx__ll_cpu_t *ll, int rank, uint64_t number, bool *came)
{
    /* In this order: what is said last is looked at first, so that outputs told before are not overlooked. */
    const epx__ll_words_t *words = epx__ll_from(ll, number, rank);
    uint64_t left_out = epx__ll_load(&words->left_out), combined = epx__ll_load(&words->combined);
    /* When it has left me out of the slot's next call already, only an exact `combined` says that this one was whole.
     */
    *came = combined == number || (combined > number && left_out < number);
    return combined >= number || left_out >= number;
}

epx_status_t epx__ll_cpu_dispatch_send(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
epx_status_t epx__ll_cpu_dispatch_recv(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
epx_status_t epx__ll_cpu_combine_send(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);
epx_status_t epx__ll_cpu_combine_recv(epx__exchange_t *exchange, epx__ll_call_t *call, epx_stream_t stream);

#endif
