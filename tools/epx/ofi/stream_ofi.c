/*
 * A raw stream of puts over one RDM endpoint a rank: fi_writedata in chunks, as many under way as there is room for, to
 * all peers in turn, while what comes is counted by its completions. Nothing is packed, no credit is waited for: what
 * the provider can do at best from one thread. See stream.h.
 */
#include "stream.h"

#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

enum { UNDER_WAY = 64, ADDRESS_BYTES = 256, LIMIT_S = 60 };

/* What a rank tells the others. */
typedef struct card {
    uint64_t failed, base, key, address_bytes;
    char address[ADDRESS_BYTES];
} card_t;

typedef struct peer {
    fi_addr_t address;
    uint64_t base, key; /* of its `into` */
    size_t sent;        /* bytes of this run */
} peer_t;

typedef struct stream {
    stream_plan_t plan;
    struct fi_info *info;
    struct fid_fabric *fabric;
    struct fid_domain *domain;
    struct fid_cq *cq;
    struct fid_av *av;
    struct fid_ep *ep;
    struct fid_mr *from, *into;
    peer_t *peer;
    size_t *at; /* [ranks] where in `from` a rank's bytes begin */
    struct fi_context2 context[UNDER_WAY];
    struct fi_context2 *idle[UNDER_WAY];
    int idle_count;
    size_t arrived; /* puts of this and later runs */
} stream_t;

static _Thread_local char words[256];

static int fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(words, sizeof words, format, args);
    va_end(args);
    return 1;
}

static const char *stream_words(void)
{
    return words;
}

#define FI_TRY(call)                                                                                                   \
    do {                                                                                                               \
        long error_ = (call);                                                                                          \
        if (error_)                                                                                                    \
            return fail("%s: %s", #call, fi_strerror((int)-error_));                                                   \
    } while (0)

static int choose(stream_t *self)
{
    const char *provider = self->plan.provider, *address = getenv("EPX_ADDRESS");
    bool by_ip = strstr(provider, "tcp") || strstr(provider, "verbs") || strstr(provider, "net");
    const char *node = by_ip ? (address ? address : "127.0.0.1") : NULL;
    struct fi_info *hints = fi_allocinfo();
    if (!hints)
        return fail("no memory");
    hints->caps = FI_RMA | FI_WRITE | FI_REMOTE_WRITE | FI_MSG;
    hints->mode = FI_CONTEXT | FI_CONTEXT2;
    hints->ep_attr->type = FI_EP_RDM;
    hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY;
    hints->domain_attr->threading = FI_THREAD_DOMAIN;
    hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
    hints->domain_attr->resource_mgmt = FI_RM_ENABLED;
    hints->fabric_attr->prov_name = strdup(provider);
    long error = fi_getinfo(FI_VERSION(1, 17), node, NULL, node ? FI_SOURCE : 0, hints, &self->info);
    fi_freeinfo(hints);
    return error ? fail("provider %s: %s", provider, fi_strerror((int)-error)) : 0;
}

static int open_parts(stream_t *self)
{
    struct fi_cq_attr cq = {.format = FI_CQ_FORMAT_DATA, .wait_obj = FI_WAIT_NONE, .size = 4096};
    struct fi_av_attr av = {.type = FI_AV_TABLE, .count = (size_t)self->plan.ranks};
    size_t from = self->plan.from_total ? self->plan.from_total : 1;
    size_t into = self->plan.into_total ? self->plan.into_total : 1;
    FI_TRY(fi_fabric(self->info->fabric_attr, &self->fabric, NULL));
    FI_TRY(fi_domain(self->fabric, self->info, &self->domain, NULL));
    FI_TRY(fi_cq_open(self->domain, &cq, &self->cq, NULL));
    FI_TRY(fi_av_open(self->domain, &av, &self->av, NULL));
    FI_TRY(fi_endpoint(self->domain, self->info, &self->ep, NULL));
    FI_TRY(fi_ep_bind(self->ep, &self->cq->fid, FI_TRANSMIT | FI_RECV));
    FI_TRY(fi_ep_bind(self->ep, &self->av->fid, 0));
    FI_TRY(fi_enable(self->ep));
    FI_TRY(fi_mr_reg(self->domain, self->plan.from, from, FI_WRITE, 0, 1, 0, &self->from, NULL));
    FI_TRY(fi_mr_reg(self->domain, self->plan.into, into, FI_REMOTE_WRITE, 0, 2, 0, &self->into, NULL));
    return 0;
}

static int make_card(stream_t *self, card_t *card)
{
    size_t bytes = sizeof card->address;
    if (choose(self) || open_parts(self))
        return 1;
    FI_TRY(fi_getname(&self->ep->fid, card->address, &bytes));
    card->address_bytes = bytes;
    card->key = fi_mr_key(self->into);
    card->base = self->info->domain_attr->mr_mode & FI_MR_VIRT_ADDR ? (uint64_t)(uintptr_t)self->plan.into : 0;
    return 0;
}

static int connect_all(stream_t *self)
{
    int ranks = self->plan.ranks;
    card_t mine = {0}, *all = calloc((size_t)ranks, sizeof *all);
    int failed = make_card(self, &mine);
    mine.failed = (uint64_t)failed;
    if (!all)
        return fail("no memory");
    if (self->plan.allgather(self->plan.allgather_context, &mine, sizeof mine, all)) {
        free(all);
        return fail("another rank failed");
    }
    for (int r = 0; r < ranks && !failed; r++) {
        if (all[r].failed)
            failed = fail("rank %d could not open its stream", r);
        else if (fi_av_insert(self->av, all[r].address, 1, &self->peer[r].address, 0, NULL) != 1)
            failed = fail("the address of rank %d was not taken", r);
        self->peer[r].base = all[r].base;
        self->peer[r].key = all[r].key;
    }
    free(all);
    return failed;
}

static void stream_close(void *stream)
{
    stream_t *self = stream;
    if (!self)
        return;
    struct fid *fids[] = {self->ep ? &self->ep->fid : NULL,        self->from ? &self->from->fid : NULL,
                          self->into ? &self->into->fid : NULL,    self->av ? &self->av->fid : NULL,
                          self->cq ? &self->cq->fid : NULL,        self->domain ? &self->domain->fid : NULL,
                          self->fabric ? &self->fabric->fid : NULL};
    for (size_t i = 0; i < sizeof fids / sizeof *fids; i++)
        if (fids[i])
            fi_close(fids[i]);
    if (self->info)
        fi_freeinfo(self->info);
    free(self->peer);
    free(self->at);
    free(self);
}

static int stream_open(const stream_plan_t *plan, void **stream)
{
    stream_t *self = calloc(1, sizeof *self);
    if (!self)
        return fail("no memory");
    self->plan = *plan;
    self->peer = calloc((size_t)plan->ranks, sizeof *self->peer);
    self->at = calloc((size_t)plan->ranks, sizeof *self->at);
    for (int i = 0; i < UNDER_WAY; i++)
        self->idle[self->idle_count++] = &self->context[i];
    int failed = !self->peer || !self->at ? fail("no memory") : connect_all(self);
    for (int r = 1; r < plan->ranks && !failed; r++)
        self->at[r] = self->at[r - 1] + plan->to_bytes[r - 1];
    if (failed) {
        stream_close(self);
        return 1;
    }
    *stream = self;
    return 0;
}

/* ---- one run ---- */

static int drain(stream_t *self, bool *moved)
{
    struct fi_cq_data_entry entry[32];
    long got = fi_cq_read(self->cq, entry, 32);
    if (got == -FI_EAGAIN)
        return 0;
    if (got < 0) {
        struct fi_cq_err_entry error = {0};
        fi_cq_readerr(self->cq, &error, 0);
        return fail("the stream broke: %s", fi_strerror(error.err ? error.err : (int)-got));
    }
    for (long i = 0; i < got; i++) {
        if (entry[i].flags & FI_REMOTE_CQ_DATA)
            self->arrived++;
        else if (entry[i].op_context)
            self->idle[self->idle_count++] = entry[i].op_context;
    }
    *moved = *moved || got > 0;
    return 0;
}

/* The next chunk to rank `to`; *moved when the provider took it. */
static int send_chunk(stream_t *self, int to, size_t chunk, bool *moved)
{
    peer_t *peer = &self->peer[to];
    size_t left = self->plan.to_bytes[to] - peer->sent, bytes = left < chunk ? left : chunk;
    uint64_t there = peer->base + self->plan.to_at[to] + peer->sent;
    long error = fi_writedata(self->ep, self->plan.from + self->at[to] + peer->sent, bytes, fi_mr_desc(self->from), 1,
                              peer->address, there, peer->key, self->idle[self->idle_count - 1]);
    if (error == -FI_EAGAIN)
        return 0;
    if (error)
        return fail("fi_writedata: %s", fi_strerror((int)-error));
    self->idle_count--;
    peer->sent += bytes;
    *moved = true;
    return 0;
}

/* Chunks to all peers in turn, as far as what they hold is there; *open counts the peers that lack some. */
static int send_turn(stream_t *self, size_t chunk, size_t ready, int *open, bool *moved)
{
    for (int step = 1; step < self->plan.ranks; step++) {
        int to = (self->plan.rank + step) % self->plan.ranks;
        size_t sent = self->peer[to].sent, left = self->plan.to_bytes[to] - sent;
        if (self->idle_count == 0 || left == 0 || self->at[to] + sent + (left < chunk ? left : chunk) > ready)
            continue;
        if (send_chunk(self, to, chunk, moved))
            return 1;
        *open -= self->peer[to].sent == self->plan.to_bytes[to];
    }
    return 0;
}

/* The copies on both sides of the stream: what can be sent by now; what came is handed on. Each peer's last put is a
 * smaller one, so that all bytes are known to be there only when all puts are. */
static int carry(stream_t *self, size_t chunk, size_t expected, size_t *ready)
{
    size_t came = self->arrived * chunk;
    const char *error = NULL;
    if (*ready < self->plan.from_total)
        error = self->plan.ready(self->plan.carry, ready);
    if (self->arrived >= expected)
        came = self->plan.into_total;
    else if (came >= self->plan.into_total)
        came = self->plan.into_total - 1;
    if (!error && came)
        error = self->plan.landed(self->plan.carry, came);
    return error ? fail("%s", error) : 0;
}

static int stream_run(void *stream, size_t chunk)
{
    stream_t *self = stream;
    size_t expected = 0, ready = self->plan.ready ? 0 : self->plan.from_total;
    int open = 0;
    time_t began = time(NULL);
    for (int r = 0; r < self->plan.ranks; r++) {
        self->peer[r].sent = 0;
        open += self->plan.to_bytes[r] > 0;
        expected += (self->plan.from_bytes[r] + chunk - 1) / chunk;
    }
    while (open || self->idle_count < UNDER_WAY || self->arrived < expected) {
        bool moved = false;
        if (send_turn(self, chunk, ready, &open, &moved) || drain(self, &moved))
            return 1;
        if (self->plan.ready && carry(self, chunk, expected, &ready))
            return 1;
        if (!moved) {
            sched_yield(); /* there may be fewer cores than ranks */
            if (time(NULL) - began > LIMIT_S)
                return fail("the stream did not end in %d s", LIMIT_S);
        }
    }
    self->arrived -= expected;
    return 0;
}

__attribute__((visibility("default"))) const stream_ops_t *epx_bench_stream(void);

const stream_ops_t *epx_bench_stream(void)
{
    static const stream_ops_t ops = {STREAM_ABI, stream_open, stream_run, stream_close, stream_words};
    return &ops;
}
