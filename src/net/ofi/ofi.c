/*
 * ofi: libfabric. One endpoint is one fabric, domain, RDM endpoint, completion queue and address vector, so that each
 * proxy thread has its own of everything (FI_THREAD_DOMAIN) and takes no lock of libfabric's.
 *
 * A put is fi_writedata: the notice is its completion data, which the provider delivers at the target after the put's
 * bytes. A notice alone is 8 bytes written to the target's scratch word: some providers refuse empty writes. Order
 * among puts is not asked for. Progress is manual: nothing moves but inside ofi_progress.
 */
#include "net/ofi/ofi.h"

#include <stdio.h>
#include <string.h>

const epx__net_host_t *epx__ofi_host;

#define CQ_BATCH 32

epx_status_t epx__ofi_fail(long error, const char *doing)
{
    int code = (int)(error < 0 ? -error : error);
    return epx__ofi_host->fail(EPX_E_NET, "libfabric: %s: %s (%d)", doing, fi_strerror(code), code);
}

static void contexts_init(ofi_t *self)
{
    for (uint32_t i = 0; i < self->puts_max; i++) {
        self->contexts[i].next = self->idle;
        self->idle = &self->contexts[i];
    }
}

static epx_status_t open_parts(ofi_t *self, const epx__net_config_t *config)
{
    struct fi_cq_attr cq = {.format = FI_CQ_FORMAT_DATA, .wait_obj = FI_WAIT_FD};
    struct fi_av_attr av = {.type = FI_AV_TABLE, .count = config->peers_max};
    struct fi_info *info = self->info;
    long e;
    /* Room for every completion of ours; those of notices too, as far as the device allows (EPX_E_NET says so else). */
    size_t entries = (size_t)self->puts_max + (config->notices_max < 16384 ? config->notices_max : 16384);
    cq.size = entries < self->cq_most ? entries : self->cq_most;
    if ((e = fi_fabric(info->fabric_attr, &self->fabric, NULL)))
        return epx__ofi_fail(e, "fi_fabric");
    if ((e = fi_domain(self->fabric, info, &self->domain, NULL)))
        return epx__ofi_fail(e, "fi_domain");
    if ((e = fi_cq_open(self->domain, &cq, &self->cq, NULL))) {
        cq.wait_obj = FI_WAIT_NONE; /* shm has no descriptor: its proxies poll */
        if ((e = fi_cq_open(self->domain, &cq, &self->cq, NULL)))
            return epx__ofi_fail(e, "fi_cq_open");
    }
    self->fd = -1;
    if (cq.wait_obj == FI_WAIT_FD && fi_control(&self->cq->fid, FI_GETWAIT, &self->fd))
        self->fd = -1;
    if ((e = fi_av_open(self->domain, &av, &self->av, NULL)))
        return epx__ofi_fail(e, "fi_av_open");
    if ((e = fi_endpoint(self->domain, info, &self->ep, NULL)))
        return epx__ofi_fail(e, "fi_endpoint");
    if ((e = fi_ep_bind(self->ep, &self->cq->fid, FI_TRANSMIT | FI_RECV)) ||
        (e = fi_ep_bind(self->ep, &self->av->fid, 0)))
        return epx__ofi_fail(e, "fi_ep_bind");
    if ((e = fi_enable(self->ep)))
        return epx__ofi_fail(e, "fi_enable (FI_UNIVERSE_SIZE bounds the queues of some providers)");
    return EPX_OK;
}

static epx_status_t ofi_open(const epx__net_config_t *config, epx__net_t **net)
{
    ofi_t *self = epx__ofi_host->calloc(1, sizeof *self);
    if (!self)
        return epx__ofi_host->fail(EPX_E_NOMEM, "ofi endpoint: no memory");
    self->net.ops = &epx__net_ofi;
    self->net.why = self->why;
    self->puts_max = config->puts_max;
    self->peers_max = config->peers_max;
    self->lost_ms = config->lost_ms ? config->lost_ms : 30000;
    self->peers = epx__ofi_host->calloc(config->peers_max, sizeof *self->peers);
    self->contexts = epx__ofi_host->calloc(config->puts_max, sizeof *self->contexts);
    epx_status_t status =
        self->peers && self->contexts
            ? EPX_OK
            : epx__ofi_host->fail(EPX_E_NOMEM, "ofi endpoint: no memory for %u puts", config->puts_max);
    if (status == EPX_OK)
        status = epx__ofi_choose(self, config);
    if (status == EPX_OK) {
        if (self->puts_max > self->cq_most / 2)
            self->puts_max = (uint32_t)(self->cq_most / 2); /* room for their completions, and for notices */
        contexts_init(self);
        status = open_parts(self, config);
    }
    if (status == EPX_OK)
        status = epx__ofi_enroll(&self->net, self->scratch, sizeof self->scratch, false, &self->scratch_memory,
                                 &self->scratch_key);
    if (status == EPX_OK)
        status = epx__ofi_opened(self);
    if (status != EPX_OK) {
        epx__ofi_close(&self->net);
        return status;
    }
    *net = &self->net;
    return EPX_OK;
}

static epx_status_t ofi_address(epx__net_t *net, epx__net_address_t *address)
{
    ofi_t *self = (ofi_t *)net;
    size_t bytes = sizeof address->data - sizeof self->scratch_key;
    memset(address, 0, sizeof *address);
    long e = fi_getname(&self->ep->fid, address->data + sizeof self->scratch_key, &bytes);
    if (e)
        return epx__ofi_fail(e, "fi_getname");
    memcpy(address->data, &self->scratch_key, sizeof self->scratch_key);
    address->bytes = (uint32_t)(bytes + sizeof self->scratch_key);
    snprintf(address->net, sizeof address->net, "ofi:%.20s", self->info->fabric_attr->prov_name);
    return EPX_OK;
}

static epx_status_t ofi_connect(epx__net_t *net, const epx__net_address_t *address, uint32_t *peer)
{
    ofi_t *self = (ofi_t *)net;
    char mine[sizeof address->net];
    snprintf(mine, sizeof mine, "ofi:%.20s", self->info->fabric_attr->prov_name);
    if (strncmp(mine, address->net, sizeof mine) != 0)
        return epx__ofi_host->fail(EPX_E_MISMATCH, "connect: this rank's network is %s, the peer's is %.28s", mine,
                                   address->net);
    if (address->bytes > sizeof address->data || address->bytes < sizeof(epx__net_key_t))
        return epx__ofi_host->fail(EPX_E_MISMATCH, "connect: the peer's address has %u bytes", address->bytes);
    if (self->peer_count == self->peers_max)
        return epx__ofi_host->fail(EPX_E_INVALID, "connect: the endpoint was opened for %u peers", self->peers_max);
    ofi_peer_t *to = &self->peers[self->peer_count];
    memcpy(&to->scratch, address->data, sizeof to->scratch);
    long e = fi_av_insert(self->av, address->data + sizeof to->scratch, 1, &to->address, 0, NULL);
    if (e != 1)
        return epx__ofi_fail(e < 0 ? e : FI_EINVAL, "fi_av_insert");
    epx__ofi_connected(self, to, address->data + sizeof to->scratch, address->bytes - sizeof to->scratch);
    *peer = self->peer_count++;
    return EPX_OK;
}

/* ---- puts ---- */

/* No room, or no connection: ofi_rxm tries to connect for ever and says EAGAIN meanwhile, also to a peer that is gone.
 */
static epx_status_t refused(ofi_t *self, ofi_peer_t *to, uint32_t peer)
{
    if (to->puts)
        return EPX_E_BUSY;
    uint64_t now = epx__ofi_host->now_ns();
    if (to->refused_since_ns == 0)
        to->refused_since_ns = now;
    if (now - to->refused_since_ns < self->lost_ms * 1000000u)
        return EPX_E_BUSY;
    to->dead = true;
    return epx__ofi_host->fail(EPX_E_PEER, "peer %u has taken nothing for %llu ms: no connection to it", peer,
                               (unsigned long long)self->lost_ms);
}

static epx_status_t write_out(ofi_t *self, const epx__net_put_t *put, ofi_context_t *context)
{
    ofi_peer_t *to = &self->peers[put->peer];
    const void *from = put->bytes ? (const void *)epx__net_at(put->memory->base, put->offset) : self->scratch;
    void *desc = put->bytes ? put->memory->desc : self->scratch_memory->desc;
    const epx__net_key_t *key = put->bytes ? put->to : &to->scratch;
    uint64_t where = key->base + (put->bytes ? put->to_offset : 0);
    size_t bytes = put->bytes ? put->bytes : sizeof self->scratch[0];
    long e;
    if (put->with_notice)
        e = fi_writedata(self->ep, from, bytes, desc, put->notice, to->address, where, key->key, context);
    else
        e = fi_write(self->ep, from, bytes, desc, to->address, where, key->key, context);
    if (e == 0)
        return EPX_OK;
    if (e == -FI_EAGAIN)
        return refused(self, to, put->peer);
    to->dead = true;
    return epx__ofi_host->fail(EPX_E_PEER, "put of %zu bytes to peer %u: %s", put->bytes, put->peer,
                               fi_strerror((int)-e));
}

static epx_status_t ofi_put(epx__net_t *net, const epx__net_put_t *put)
{
    ofi_t *self = (ofi_t *)net;
    epx_status_t status = epx__ofi_host->put_check(put, put->memory ? put->memory->bytes : 0);
    if (status != EPX_OK)
        return status;
    if (put->peer >= self->peer_count)
        return epx__ofi_host->fail(EPX_E_INVALID, "put: peer %u of %u", put->peer, self->peer_count);
    if (self->peers[put->peer].dead)
        return epx__ofi_host->fail(EPX_E_PEER, "put: peer %u was lost before", put->peer);
    ofi_context_t *context = self->idle;
    if (!context)
        return EPX_E_BUSY;
    context->cookie = put->cookie;
    context->peer = put->peer;
    status = write_out(self, put, context);
    if (status == EPX_OK) {
        self->idle = context->next;
        self->puts++;
        self->peers[put->peer].puts++;
        self->peers[put->peer].refused_since_ns = 0;
    }
    return status;
}

static void give_back(ofi_t *self, ofi_context_t *context)
{
    context->next = self->idle;
    self->idle = context;
    self->puts--;
    self->peers[context->peer].puts--;
}

/* A put that failed: its peer is lost. Failures without a put (a connection that ended) are only logged: who is gone is
 * found out by the next put, or by the bootstrap. */
static uint32_t take_error(ofi_t *self, epx__net_event_t *event)
{
    struct fi_cq_err_entry entry;
    memset(&entry, 0, sizeof entry);
    if (fi_cq_readerr(self->cq, &entry, 0) < 1)
        return 0;
    ofi_context_t *context = entry.op_context;
    if (!context || context < self->contexts || context >= self->contexts + self->puts_max) {
        epx__ofi_host->log(2, "libfabric: %s (%d) outside of any put", fi_strerror(entry.err), entry.err);
        return 0;
    }
    self->peers[context->peer].dead = true;
    epx__ofi_host->fail(EPX_E_PEER, "put to peer %u: %s (%d)", context->peer, fi_strerror(entry.err), entry.err);
    *event = (epx__net_event_t){EPX__NET_LOST, 0, context->peer, context->cookie};
    give_back(self, context);
    return 1;
}

static epx_status_t ofi_progress(epx__net_t *net, epx__net_event_t *events, uint32_t max, uint32_t *count)
{
    ofi_t *self = (ofi_t *)net;
    struct fi_cq_data_entry entries[CQ_BATCH];
    uint32_t n = 0;
    *count = 0;
    while (n < max) {
        long got = fi_cq_read(self->cq, entries, max - n < CQ_BATCH ? max - n : CQ_BATCH);
        if (got == -FI_EAVAIL) {
            n += take_error(self, &events[n]);
            break;
        }
        if (got == -FI_EAGAIN || got == 0)
            break;
        if (got < 0)
            return epx__ofi_fail(got, "fi_cq_read");
        for (long i = 0; i < got; i++) {
            if (entries[i].flags & FI_REMOTE_CQ_DATA) {
                events[n++] = (epx__net_event_t){EPX__NET_NOTICE, (uint32_t)entries[i].data, 0, 0};
            } else if (entries[i].op_context) {
                ofi_context_t *context = entries[i].op_context;
                events[n++] = (epx__net_event_t){EPX__NET_SENT, 0, context->peer, context->cookie};
                give_back(self, context);
            }
        }
        if (got < CQ_BATCH)
            break;
    }
    *count = n;
    return EPX_OK;
}

static epx_status_t ofi_flush(epx__net_t *net)
{
    return ((ofi_t *)net)->puts == 0 ? EPX_OK : EPX_E_BUSY;
}

static int ofi_wait_fd(epx__net_t *net)
{
    return ((ofi_t *)net)->fd;
}

static bool ofi_arm(epx__net_t *net)
{
    ofi_t *self = (ofi_t *)net;
    struct fid *fids[1] = {&self->cq->fid};
    return self->fd >= 0 && fi_trywait(self->fabric, fids, 1) == 0;
}

const epx__net_ops_t epx__net_ofi = {
    .name = "ofi",
    .open = ofi_open,
    .close = epx__ofi_close,
    .address = ofi_address,
    .connect = ofi_connect,
    .enroll = epx__ofi_enroll,
    .withdraw = epx__ofi_withdraw,
    .put = ofi_put,
    .progress = ofi_progress,
    .flush = ofi_flush,
    .wait_fd = ofi_wait_fd,
    .arm = ofi_arm,
};

__attribute__((visibility("default"))) const epx__net_ops_t *epx_ofi_plugin(const epx__net_host_t *host);

const epx__net_ops_t *epx_ofi_plugin(const epx__net_host_t *host)
{
    if (host->abi != EPX__NET_ABI)
        return NULL;
    epx__ofi_host = host;
    return &epx__net_ofi;
}
