/*
 * sim: ranks of one process over a network that is as unpleasant as net.h allows, repeatably from a seed.
 *
 * Every put is cut into up to four pieces, each with its own landing time on the target's virtual clock; the notice
 * comes at a time of its own after the last piece. One put in sixteen is slow by a factor that lets a whole window
 * overtake it. Half of the puts read their source only as they land (SENT comes after that), half read it at once and
 * are SENT long before anything has landed (sources that do not wait for SENT, or take SENT for arrival, are caught).
 * The clock advances with the target's progress calls and jumps when nothing is due, so no put waits for ever.
 *
 * Puts under way live in the target's pool, under the target's lock.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/fail.h"
#include "net/local.h"

#define PIECES 4
#define LATE_MAX 64      /* SENT events told to sources in one progress */
#define COPY_MAX 1048576 /* larger puts always read their source late */

typedef struct sim_put {
    bool used;
    epx__local_t *from;
    epx__net_event_t done; /* SENT, told to `from` after landing; kind 0 when told already */
    uint32_t notice;
    bool with_notice;
    epx__net_key_t to;
    size_t to_offset;
    const char *source;
    char *copy; /* owned; NULL when the source is read late */
    size_t cut[PIECES + 1];
    uint64_t land[PIECES]; /* times; 0 landed */
    uint64_t notice_time;
    uint32_t next; /* in the list of used or of free ones, + 1; 0 ends it */
} sim_put_t;

typedef struct sim {
    epx__local_t local;
    uint64_t random;
    uint64_t now; /* virtual */
    sim_put_t *puts;
    uint32_t pool, used, idle; /* list heads, + 1 */
} sim_t;

static uint64_t draw(sim_t *self)
{
    self->random += 0x9e3779b97f4a7c15u;
    uint64_t z = self->random;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static epx_status_t sim_open(const epx__net_config_t *config, epx__net_t **net)
{
    sim_t *self = epx__calloc(1, sizeof *self);
    if (!self)
        return epx__fail(EPX_E_NOMEM, "sim endpoint: no memory");
    uint64_t seed = config->argument ? strtoull(config->argument, NULL, 10) : 1;
    snprintf(self->local.why_text, sizeof self->local.why_text,
             "sim: seeded unordered network between threads of one process, seed %llu (asked for)",
             (unsigned long long)seed);
    self->pool = config->notices_max + config->puts_max;
    self->puts = epx__calloc(self->pool, sizeof *self->puts);
    if (!self->puts) {
        epx__free(self);
        return epx__fail(EPX_E_NOMEM, "sim endpoint: no memory for %u puts", config->notices_max);
    }
    for (uint32_t i = self->pool; i > 0; i--) {
        self->puts[i - 1].next = self->idle;
        self->idle = i;
    }
    epx_status_t status = epx__local_init(&self->local, &epx__net_sim, config);
    if (status != EPX_OK) {
        epx__free(self->puts);
        epx__free(self);
        return status;
    }
    self->random = seed * 0xd1342543de82ef95u + config->peers_max; /* the same for every endpoint of a seed ... */
    self->random += self->local.id * 0x2545f4914f6cdd1du;          /* ... but for its number */
    self->now = 1;
    *net = &self->local.net;
    return EPX_OK;
}

/* Under self's lock: put `at` (+ 1) goes back to the pool. */
static void retire(sim_t *self, uint32_t at)
{
    sim_put_t *put = &self->puts[at - 1];
    uint32_t *link = &self->used;
    while (*link != at)
        link = &self->puts[*link - 1].next;
    *link = put->next;
    epx__free(put->copy);
    put->copy = NULL;
    put->used = false;
    put->next = self->idle;
    self->idle = at;
}

static void tell(epx__local_t *from, const epx__net_event_t *event)
{
    pthread_mutex_lock(&from->lock);
    epx__local_push(from, event);
    pthread_mutex_unlock(&from->lock);
    epx__local_drop(from);
}

/* All puts at `self` end here and their sources are told LOST; with `from`, only those that would still read that
 * source's memory, and nobody is told. (What has been SENT arrives though its source has gone.) */
static void cancel(sim_t *self, epx__local_t *from)
{
    for (;;) {
        epx__local_t *source = NULL;
        epx__net_event_t event = {0, 0, 0, 0};
        pthread_mutex_lock(&self->local.lock);
        uint32_t at = self->used;
        while (at && from && (self->puts[at - 1].from != from || self->puts[at - 1].done.kind == 0))
            at = self->puts[at - 1].next;
        if (at) {
            source = self->puts[at - 1].from;
            event = self->puts[at - 1].done;
            if (self->puts[at - 1].with_notice)
                self->local.notices--;
            retire(self, at);
        }
        pthread_mutex_unlock(&self->local.lock);
        if (!at)
            return;
        if (!from && event.kind) { /* not told SENT yet */
            event.kind = EPX__NET_LOST;
            tell(source, &event);
        } else {
            epx__local_drop(source);
        }
    }
}

static void sim_close(epx__net_t *net)
{
    sim_t *self = (sim_t *)net;
    for (uint32_t i = 0; i < self->local.peer_count; i++)
        cancel((sim_t *)self->local.peers[i], &self->local); /* our memory may be gone soon */
    pthread_mutex_lock(&self->local.lock);
    self->local.closed = true;
    pthread_mutex_unlock(&self->local.lock);
    cancel(self, NULL);
    epx__free(self->puts); /* nobody looks after `closed` */
    self->puts = NULL;
    epx__local_close(&self->local);
}

/* Draw when the pieces land and when the notice comes. */
static void schedule(sim_t *to, sim_put_t *put, size_t bytes)
{
    uint64_t slow = draw(to) % 16 == 0 ? 64 : 1;
    uint64_t last = to->now;
    for (int i = 1; i < PIECES; i++)
        put->cut[i] = bytes > 1 ? draw(to) % bytes : 0;
    put->cut[0] = 0;
    put->cut[PIECES] = bytes;
    for (int i = 1; i < PIECES; i++) /* sort three cuts */
        for (int j = i; j > 1 && put->cut[j] < put->cut[j - 1]; j--) {
            size_t swap = put->cut[j];
            put->cut[j] = put->cut[j - 1];
            put->cut[j - 1] = swap;
        }
    for (int i = 0; i < PIECES; i++) {
        put->land[i] = to->now + 1 + draw(to) % (16 * slow);
        last = put->land[i] > last ? put->land[i] : last;
    }
    put->notice_time = last + draw(to) % (16 * slow);
}

/* Under the target's lock. */
static epx_status_t accept_put(sim_t *to, sim_t *self, const epx__net_put_t *put, bool *early)
{
    if (to->local.closed)
        return epx__fail(EPX_E_PEER, "put: peer %u of this sim endpoint is closed", put->peer);
    if (put->bytes && !epx__local_find(&to->local, put->to, put->to_offset, put->bytes))
        return EPX_E_INVALID;
    if (!to->idle || (put->with_notice && to->local.notices == to->local.notices_max))
        return EPX_E_BUSY;
    uint32_t at = to->idle;
    sim_put_t *under_way = &to->puts[at - 1];
    to->idle = under_way->next;
    *under_way =
        (sim_put_t){.used = true, .from = &self->local, .notice = put->notice, .with_notice = put->with_notice};
    under_way->done = (epx__net_event_t){EPX__NET_SENT, 0, put->peer, put->cookie};
    if (put->bytes) {
        under_way->to = *put->to;
        under_way->to_offset = put->to_offset;
        under_way->source = epx__net_at(put->memory->base, put->offset);
        if (put->bytes <= COPY_MAX && draw(to) % 2)
            under_way->copy = epx__calloc(1, put->bytes); /* none: read it late */
        if (under_way->copy)
            memcpy(under_way->copy, under_way->source, put->bytes);
    }
    *early = under_way->copy != NULL || put->bytes == 0;
    if (*early)
        under_way->done.kind = 0;
    schedule(to, under_way, put->bytes);
    under_way->next = to->used;
    to->used = at;
    if (put->with_notice)
        to->local.notices++;
    epx__local_keep(&self->local);
    epx__local_wake(&to->local);
    return EPX_OK;
}

static epx_status_t sim_put_(epx__net_t *net, const epx__net_put_t *put)
{
    sim_t *self = (sim_t *)net;
    EPX__TRY(epx__net_put_check(put, put->memory ? put->memory->bytes : 0));
    if (put->peer >= self->local.peer_count)
        return epx__fail(EPX_E_INVALID, "put: peer %u of %u", put->peer, self->local.peer_count);
    pthread_mutex_lock(&self->local.lock);
    bool room = self->local.puts < self->local.puts_max;
    self->local.puts += room;
    pthread_mutex_unlock(&self->local.lock);
    if (!room)
        return EPX_E_BUSY;
    sim_t *to = (sim_t *)self->local.peers[put->peer];
    bool early = false;
    pthread_mutex_lock(&to->local.lock);
    epx_status_t status = accept_put(to, self, put, &early);
    pthread_mutex_unlock(&to->local.lock);
    pthread_mutex_lock(&self->local.lock);
    if (status != EPX_OK)
        self->local.puts--;
    else if (early)
        epx__local_push(&self->local, &(epx__net_event_t){EPX__NET_SENT, 0, put->peer, put->cookie});
    pthread_mutex_unlock(&self->local.lock);
    return status;
}

/* Land what is due of one put. Returns its next time, 0 when it is finished. */
static uint64_t land(sim_t *self, sim_put_t *put)
{
    uint64_t next = UINT64_MAX;
    for (int i = 0; i < PIECES; i++) {
        size_t bytes = put->cut[i + 1] - put->cut[i];
        if (put->land[i] == 0)
            continue;
        if (put->land[i] > self->now) {
            next = put->land[i] < next ? put->land[i] : next;
            continue;
        }
        put->land[i] = 0;
        if (bytes == 0)
            continue;
        char *to = epx__local_find(&self->local, &put->to, put->to_offset + put->cut[i], bytes);
        if (to) /* else withdrawn meanwhile: the bytes are lost, as they would be */
            memcpy(to, (put->copy ? put->copy : put->source) + put->cut[i], bytes);
    }
    if (next != UINT64_MAX)
        return next;
    return put->notice_time > self->now ? put->notice_time : 0;
}

/* One pass over the puts under way. Returns the earliest time ahead; *ended counts those told to sources. */
static uint64_t pass(sim_t *self, epx__local_t **from, epx__net_event_t *done, uint32_t *ended)
{
    uint64_t earliest = UINT64_MAX;
    for (uint32_t at = self->used, next; at && *ended < LATE_MAX; at = next) {
        sim_put_t *put = &self->puts[at - 1];
        next = put->next;
        uint64_t time = land(self, put);
        if (time) {
            earliest = time < earliest ? time : earliest;
            continue;
        }
        if (put->with_notice)
            epx__local_push(&self->local, &(epx__net_event_t){EPX__NET_NOTICE, put->notice, 0, 0});
        from[*ended] = put->from;
        done[(*ended)++] = put->done;
        retire(self, at);
    }
    return earliest;
}

static epx_status_t sim_progress(epx__net_t *net, epx__net_event_t *events, uint32_t max, uint32_t *count)
{
    sim_t *self = (sim_t *)net;
    epx__local_t *from[LATE_MAX];
    epx__net_event_t done[LATE_MAX];
    uint32_t ended = 0;
    pthread_mutex_lock(&self->local.lock);
    self->now += 1 + draw(self) % 3;
    uint64_t earliest = pass(self, from, done, &ended);
    if (ended == 0 && self->local.event_count == 0 && earliest != UINT64_MAX && draw(self) % 2)
        self->now = earliest; /* nothing else to do: let time jump */
    *count = epx__local_take(&self->local, events, max);
    pthread_mutex_unlock(&self->local.lock);
    for (uint32_t i = 0; i < ended; i++) {
        if (done[i].kind)
            tell(from[i], &done[i]);
        else
            epx__local_drop(from[i]);
    }
    return EPX_OK;
}

/* Time must pass for puts under way: no sleep before they have landed. */
static bool sim_arm(epx__net_t *net)
{
    sim_t *self = (sim_t *)net;
    uint64_t drained;
    ssize_t n = read(self->local.fd, &drained, sizeof drained);
    (void)n; /* nothing there is fine */
    pthread_mutex_lock(&self->local.lock);
    self->local.armed = self->local.event_count == 0 && self->used == 0;
    bool sleep = self->local.armed;
    pthread_mutex_unlock(&self->local.lock);
    return sleep;
}

const epx__net_ops_t epx__net_sim = {
    .name = "sim",
    .open = sim_open,
    .close = sim_close,
    .address = epx__local_address,
    .connect = epx__local_connect,
    .enroll = epx__local_enroll,
    .withdraw = epx__local_withdraw,
    .put = sim_put_,
    .progress = sim_progress,
    .flush = epx__local_flush,
    .wait_fd = epx__local_wait_fd,
    .arm = sim_arm,
};
