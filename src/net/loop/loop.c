/*
 * loop: ranks that are threads of one process. A put is a memcpy by the caller, its notice an entry in the target's
 * queue. In order and at once; sim is the one that is as unpleasant as the promise allows.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/fail.h"
#include "net/local.h"

static epx_status_t loop_open(const epx__net_config_t *config, epx__net_t **net)
{
    epx__local_t *self = epx__calloc(1, sizeof *self);
    if (!self)
        return epx__fail(EPX_E_NOMEM, "loop endpoint: no memory");
    snprintf(self->why_text, sizeof self->why_text, "loop: ranks are threads of one process (asked for)");
    epx_status_t status = epx__local_init(self, &epx__net_loop, config);
    if (status != EPX_OK) {
        epx__free(self);
        return status;
    }
    *net = &self->net;
    return EPX_OK;
}

static void loop_close(epx__net_t *net)
{
    epx__local_close((epx__local_t *)net);
}

/* Under the target's lock: the whole put. */
static epx_status_t loop_deliver(epx__local_t *to, const epx__net_put_t *put, uint32_t peer)
{
    if (to->closed)
        return epx__fail(EPX_E_PEER, "put: peer %u of this loop endpoint is closed", peer);
    if (put->with_notice && to->notices == to->notices_max)
        return EPX_E_BUSY;
    if (put->bytes) {
        char *memory = epx__local_find(to, put->to, put->to_offset, put->bytes);
        if (!memory)
            return EPX_E_INVALID;
        memcpy(memory, epx__net_at(put->memory->base, put->offset), put->bytes);
    }
    if (put->with_notice) {
        to->notices++;
        epx__local_push(to, &(epx__net_event_t){EPX__NET_NOTICE, put->notice, 0, 0});
    }
    return EPX_OK;
}

static epx_status_t loop_put(epx__net_t *net, const epx__net_put_t *put)
{
    epx__local_t *self = (epx__local_t *)net;
    EPX__TRY(epx__net_put_check(put, put->memory ? put->memory->bytes : 0));
    if (put->peer >= self->peer_count)
        return epx__fail(EPX_E_INVALID, "put: peer %u of %u", put->peer, self->peer_count);
    pthread_mutex_lock(&self->lock);
    bool room = self->puts < self->puts_max;
    self->puts += room;
    pthread_mutex_unlock(&self->lock);
    if (!room)
        return EPX_E_BUSY;
    epx__local_t *to = self->peers[put->peer];
    pthread_mutex_lock(&to->lock);
    epx_status_t status = loop_deliver(to, put, put->peer);
    pthread_mutex_unlock(&to->lock);
    pthread_mutex_lock(&self->lock);
    if (status == EPX_OK)
        epx__local_push(self, &(epx__net_event_t){EPX__NET_SENT, 0, put->peer, put->cookie});
    else
        self->puts--;
    pthread_mutex_unlock(&self->lock);
    return status;
}

static epx_status_t loop_progress(epx__net_t *net, epx__net_event_t *events, uint32_t max, uint32_t *count)
{
    epx__local_t *self = (epx__local_t *)net;
    pthread_mutex_lock(&self->lock);
    *count = epx__local_take(self, events, max);
    pthread_mutex_unlock(&self->lock);
    return EPX_OK;
}

static bool loop_arm(epx__net_t *net)
{
    epx__local_t *self = (epx__local_t *)net;
    uint64_t drained;
    ssize_t n = read(self->fd, &drained, sizeof drained);
    (void)n; /* nothing there is fine */
    pthread_mutex_lock(&self->lock);
    self->armed = self->event_count == 0;
    bool sleep = self->armed;
    pthread_mutex_unlock(&self->lock);
    return sleep;
}

const epx__net_ops_t epx__net_loop = {
    .name = "loop",
    .open = loop_open,
    .close = loop_close,
    .address = epx__local_address,
    .connect = epx__local_connect,
    .enroll = epx__local_enroll,
    .withdraw = epx__local_withdraw,
    .put = loop_put,
    .progress = loop_progress,
    .flush = epx__local_flush,
    .wait_fd = epx__local_wait_fd,
    .arm = loop_arm,
};
