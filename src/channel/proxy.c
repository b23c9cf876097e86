/*
 * The proxy: takes requests from its FIFO in order, carries them out on its network endpoint, hands notices to the
 * lanes, tells credit. One pass does a bounded amount of each and waits for none: a full network, an absent peer and an
 * empty FIFO all just mean "nothing this time". Requests hold credit before they are pushed, so none waits here for
 * window; those for a peer to which the network can put nothing now leave the FIFO and wait in their lane.
 *
 * Its thread sleeps when passes have found nothing for a while: it sets *asleep, looks once more at everything, and
 * polls the network's descriptor and its own eventfd. A producer commits, then fences, then looks at *asleep. With GPU
 * producers nobody could wake it, so it naps instead.
 */
#include "channel/channels.h"

#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/fail.h"
#include "base/log.h"
#include "base/mutate.h"

#define REQUESTS_A_PASS 32
#define EVENTS_A_PASS 64
#define IDLE_PASSES 64 /* before sleeping */
#define SLEEP_MS 20    /* at most: a missed wake costs this */
#define NAP_MS 1       /* when only time will tell */

void epx__channels_fault(epx__channels_t *self, int rank, epx_status_t status, const char *words)
{
    pthread_mutex_lock(&self->words_lock);
    if (self->fault_status == 0) {
        self->fault_status = (int)status;
        snprintf(self->words, sizeof self->words, "%s", words);
    }
    pthread_mutex_unlock(&self->words_lock);
    for (uint32_t r = 0; r < self->ranks; r++) {
        uint64_t *word = epx__block_word(self, self->layout.fault, r);
        uint64_t none = 0;
        if (rank < 0 || r == (uint32_t)rank)
            __atomic_compare_exchange_n(word, &none, (uint64_t)status, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
    }
    if (self->config.changed)
        self->config.changed(self->config.changed_context);
}

epx__lane_t *epx__proxy_first(epx__proxy_t *proxy, uint32_t rank)
{
    return &proxy->lanes[epx__channels_lane(proxy->owner, rank, 0)];
}

static void lost(epx__proxy_t *proxy, uint32_t rank, const char *words)
{
    epx__lane_t *first = epx__proxy_first(proxy, rank);
    bool news = false;
    first->lost |= first->arrived && (!first->said || !first->heard);
    for (uint32_t i = 0; i < proxy->lane_count; i++)
        if (proxy->lanes[i].arrived && proxy->lanes[i].rank == rank) {
            news = news || !proxy->lanes[i].dead;
            proxy->lanes[i].dead = true;
        }
    if (first->heard && !first->said) { /* it wants no answer any more */
        first->said = true;
        proxy->answers--;
    }
    if (news)
        epx__channels_fault(proxy->owner, (int)rank, EPX_E_PEER, words);
}

void epx__channels_left(epx__proxy_t *proxy, uint32_t rank)
{
    epx__channels_t *self = proxy->owner;
    uint64_t none = 0;
    for (uint32_t i = 0; i < proxy->lane_count; i++)
        if (proxy->lanes[i].arrived && proxy->lanes[i].rank == rank)
            proxy->lanes[i].dead = true;
    pthread_mutex_lock(&self->words_lock);
    if (self->fault_status == 0)
        snprintf(self->words, sizeof self->words, "port channels: rank %u has left", rank);
    pthread_mutex_unlock(&self->words_lock);
    __atomic_compare_exchange_n(epx__block_word(self, self->layout.fault, rank), &none, EPX_E_PEER, false,
                                __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

void epx__channels_lost(epx__channels_t *self, int rank)
{
    char words[96];
    if (rank < 0 || (uint32_t)rank >= self->ranks || (uint32_t)rank == self->rank)
        return;
    snprintf(words, sizeof words, "port channels: rank %d is gone", rank);
    epx__proxy_t *proxy = &self->proxy[(uint32_t)rank % self->proxies];
    pthread_mutex_lock(&proxy->lock);
    lost(proxy, (uint32_t)rank, words);
    pthread_mutex_unlock(&proxy->lock);
}

/* ---- requests ---- */

static epx_port_request_t *slot_at(epx__proxy_t *proxy, uint64_t ticket)
{
    epx__channels_t *self = proxy->owner;
    epx_port_request_t *slots = (epx_port_request_t *)(void *)(self->block + self->layout.slots);
    return &slots[(size_t)proxy->index * self->fifo_slots + (ticket & (self->fifo_slots - 1))];
}

/* The commit word of the next request; 0 when there is none (a kind is never 0). */
static uint64_t committed(epx__proxy_t *proxy)
{
    const epx_port_request_t *slot = slot_at(proxy, proxy->tail);
    uint64_t commit = __atomic_load_n(&slot->commit, __ATOMIC_ACQUIRE);
    uint64_t parity = (proxy->tail / proxy->owner->fifo_slots + 1) & 1;
    if (EPX__MUTATE(port_zero_empty)) /* "an empty slot is a zero word" */
        return commit && __atomic_load_n(&slot->bytes, __ATOMIC_RELAXED) ? commit : 0;
    return commit >> 8 && (commit & 1) == parity ? commit : 0;
}

static epx__lane_t *lane_of(epx__proxy_t *proxy, uint32_t number)
{
    epx__channels_t *self = proxy->owner;
    uint32_t rank = number / self->channels;
    if (rank >= self->ranks || rank % self->proxies != proxy->index)
        return NULL;
    epx__lane_t *lane = &proxy->lanes[epx__channels_lane(self, rank, number % self->channels)];
    return lane->arrived ? lane : NULL;
}

static uint64_t field(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED); /* after the commit word's acquire */
}

/* An add's words go to the slot of its sequence number at the peer. */
static void fill_add(epx__proxy_t *proxy, const epx__lane_t *lane, const epx_port_request_t *request,
                     epx__net_put_t *put)
{
    epx__channels_t *self = proxy->owner;
    uint64_t place = lane->sent % self->window;
    size_t mine = (size_t)lane->number * self->window + place;
    uint32_t channel = lane->number % self->channels;
    size_t there = ((size_t)self->rank * self->channels + channel) * self->window + place;
    epx__add_slot_t *slot = (epx__add_slot_t *)(void *)(self->block + self->layout.add_out) + mine;
    *slot = (epx__add_slot_t){.memory = field(&request->memories) >> 32,
                              .offset = field(&request->destination_offset),
                              .value = (int64_t)field(&request->bytes)};
    put->memory = proxy->memory[self->memory_count];
    put->offset = self->layout.add_out + mine * sizeof *slot;
    put->to = &proxy->keys[(size_t)lane->rank * (self->memory_count + 1) + self->memory_count];
    put->to_offset = self->layout.add_in + there * sizeof *slot;
    put->bytes = sizeof *slot;
}

static epx_status_t fill_put(epx__proxy_t *proxy, const epx__lane_t *lane, const epx_port_request_t *request,
                             epx__net_put_t *put)
{
    epx__channels_t *self = proxy->owner;
    uint64_t memories = field(&request->memories);
    uint32_t source = (uint32_t)memories, destination = (uint32_t)(memories >> 32);
    put->bytes = field(&request->bytes);
    if (put->bytes == 0)
        return EPX_OK;
    bool any = source == EPX__MEMORY_ANY && epx__channels_any(self);
    if ((source >= self->memory_count && !any) || destination >= self->memory_count)
        return epx__fail(EPX_E_INVALID, "put: source memory %u, destination memory %u of %u", source, destination,
                         self->memory_count);
    put->memory = any ? proxy->net->any : proxy->memory[source];
    put->offset = field(&request->source_offset);
    put->to = &proxy->keys[(size_t)lane->rank * (self->memory_count + 1) + destination];
    put->to_offset = field(&request->destination_offset);
    return EPX_OK;
}

epx_status_t epx__proxy_put(epx__proxy_t *proxy, const epx__lane_t *lane, const epx__net_put_t *put, uint32_t most)
{
    epx__lane_t *first = epx__proxy_first(proxy, lane->rank);
    if (first->under_way >= most)
        return EPX_E_BUSY;
    epx_status_t status = proxy->net->ops->put(proxy->net, put);
    first->under_way += status == EPX_OK;
    first->lost |= status == EPX_E_PEER;
    return status;
}

/* EPX_OK: sent, or refused for good (the channel has its fault). EPX_E_BUSY: not now. */
static epx_status_t send(epx__proxy_t *proxy, uint64_t commit, const epx_port_request_t *request)
{
    epx__channels_t *self = proxy->owner;
    uint32_t kind = commit >> 8 & 0xff, number = (uint32_t)(commit >> 32);
    epx__lane_t *lane = lane_of(proxy, number);
    if (!lane) {
        epx__fail(EPX_E_INVALID, "a request for channel %u came to proxy %u, which does not serve it", number,
                  proxy->index);
        epx__channels_fault(self, -1, EPX_E_INVALID, epx__detail());
        return EPX_OK;
    }
    if (lane->dead)
        return EPX_OK;
    uint32_t notice_kind = kind == EPX_PORT_PUT   ? EPX__NOTICE_PUT
                           : kind == EPX_PORT_ADD ? EPX__NOTICE_ADD
                                                  : EPX__NOTICE_SIGNAL;
    epx__net_put_t put = {.peer = lane->net_peer, .with_notice = true, .cookie = lane->rank};
    put.notice = epx__notice(self, notice_kind, lane->lane_there, (uint32_t)lane->sent);
    epx_status_t status = EPX_OK;
    if (kind == EPX_PORT_ADD)
        fill_add(proxy, lane, request, &put);
    else
        status = fill_put(proxy, lane, request, &put);
    if (status == EPX_OK)
        status = epx__proxy_put(proxy, lane, &put, proxy->share);
    if (status == EPX_E_BUSY)
        return status;
    if (status != EPX_OK) {
        lane->dead = true;
        epx__fail(status, "channel %u to rank %u: %s", number % self->channels, lane->rank, epx__detail());
        epx__channels_fault(self, (int)lane->rank, status, epx__detail());
        return EPX_OK;
    }
    lane->sent++;
    if (put.bytes && kind != EPX_PORT_ADD) {
        atomic_fetch_add_explicit(&self->net_bytes, put.bytes, memory_order_relaxed);
        atomic_fetch_add_explicit(&self->net_puts, 1, memory_order_relaxed);
    }
    return EPX_OK;
}

/* A peer that takes nothing now must not hold up the others: its requests leave the FIFO. There is room for a window of
 * them, and more cannot be. */
static bool set_aside(epx__proxy_t *proxy, epx__lane_t *lane, const epx_port_request_t *request)
{
    uint32_t window = proxy->owner->window;
    if (lane->waiting_count == window)
        return false;
    lane->waiting[(lane->waiting_head + lane->waiting_count++) & (window - 1)] = *request;
    proxy->waiting_count++;
    return true;
}

static uint32_t take_waiting(epx__proxy_t *proxy)
{
    uint32_t n = 0, mask = proxy->owner->window - 1;
    for (uint32_t i = 0; i < proxy->lane_count && proxy->waiting_count; i++) {
        epx__lane_t *lane = &proxy->lanes[i];
        while (lane->waiting_count) {
            const epx_port_request_t *request = &lane->waiting[lane->waiting_head & mask];
            if (send(proxy, request->commit, request) == EPX_E_BUSY)
                break;
            lane->waiting_head++;
            lane->waiting_count--;
            proxy->waiting_count--;
            n++;
        }
    }
    return n;
}

static uint32_t take_requests(epx__proxy_t *proxy)
{
    uint32_t n = 0;
    for (; n < REQUESTS_A_PASS; n++) {
        uint64_t commit = committed(proxy);
        epx_port_request_t *request = slot_at(proxy, proxy->tail);
        if (!commit)
            break;
        epx__lane_t *lane = lane_of(proxy, (uint32_t)(commit >> 32));
        bool behind = lane && lane->waiting_count;
        if ((behind || send(proxy, commit, request) == EPX_E_BUSY) && !set_aside(proxy, lane, request))
            break;
        if (EPX__MUTATE(port_zero_empty))
            __atomic_store_n(&request->bytes, 0, __ATOMIC_RELAXED);
        proxy->tail++;
        __atomic_store_n(epx__block_word(proxy->owner, proxy->owner->layout.tail, proxy->index), proxy->tail,
                         __ATOMIC_RELEASE);
    }
    return n;
}

/* ---- network ---- */

static void take_event(epx__proxy_t *proxy, const epx__net_event_t *event)
{
    if (event->kind != EPX__NET_NOTICE)
        epx__proxy_first(proxy, (uint32_t)event->cookie)->under_way--;
    if (event->kind == EPX__NET_NOTICE)
        epx__lane_notice(proxy, event->value);
    else if (event->kind == EPX__NET_LOST) {
        char words[256];
        uint32_t rank = UINT32_MAX;
        for (uint32_t i = 0; i < proxy->lane_count; i++)
            if (proxy->lanes[i].arrived && proxy->lanes[i].net_peer == event->peer)
                rank = proxy->lanes[i].rank;
        if (rank == UINT32_MAX)
            return;
        snprintf(words, sizeof words, "port channels: rank %u cannot be reached any more: %.150s", rank, epx__detail());
        lost(proxy, rank, words);
    }
}

bool epx__proxy_step(epx__proxy_t *proxy)
{
    epx__net_event_t events[EVENTS_A_PASS];
    uint32_t count = 0;
    if (proxy->halted)
        return false;
    uint32_t requests = take_waiting(proxy);
    requests += take_requests(proxy);
    epx_status_t status = proxy->net->ops->progress(proxy->net, events, EVENTS_A_PASS, &count);
    if (status != EPX_OK)
        epx__channels_fault(proxy->owner, -1, status, epx__detail());
    for (uint32_t i = 0; i < count; i++)
        take_event(proxy, &events[i]);
    bool moved = requests + count > 0;
    bool told = epx__lane_tell(proxy, !moved);
    epx__lane_answer(proxy);
    if (moved && proxy->owner->config.changed)
        proxy->owner->config.changed(proxy->owner->config.changed_context);
    return moved || told;
}

bool epx__proxy_taken(epx__proxy_t *proxy)
{
    return !committed(proxy);
}

bool epx__proxy_idle(epx__proxy_t *proxy)
{
    return proxy->halted || (epx__proxy_taken(proxy) && proxy->owing_count == 0);
}

/* ---- the thread ---- */

void epx__proxy_wake(epx__proxy_t *proxy)
{
    uint64_t one = 1;
    ssize_t n = write(proxy->wake_fd, &one, sizeof one);
    (void)n; /* a full eventfd wakes as well */
}

static void wait_on(epx__proxy_t *proxy, int net_fd, int timeout_ms)
{
    struct pollfd fds[2] = {{.fd = proxy->wake_fd, .events = POLLIN}, {.fd = net_fd, .events = POLLIN}};
    uint64_t drained;
    poll(fds, net_fd >= 0 ? 2 : 1, timeout_ms);
    ssize_t n = read(proxy->wake_fd, &drained, sizeof drained);
    (void)n; /* nothing there is fine */
}

static void sleep_until_called(epx__proxy_t *proxy)
{
    uint64_t *asleep = epx__block_word(proxy->owner, proxy->owner->layout.asleep, proxy->index);
    if (proxy->owner->config.device_producers) {
        epx__sleep_ns(20000);
        return;
    }
    __atomic_store_n(asleep, 1, __ATOMIC_RELAXED);
    epx_fence_sc_sys();
    pthread_mutex_lock(&proxy->lock);
    int fd = proxy->halted ? -1 : proxy->net->ops->wait_fd(proxy->net);
    bool sleep = epx__proxy_idle(proxy) && (fd < 0 || proxy->net->ops->arm(proxy->net));
    bool nap = fd < 0 || proxy->waiting_count;
    pthread_mutex_unlock(&proxy->lock);
    if (sleep && !atomic_load(&proxy->stop))
        wait_on(proxy, fd, nap ? NAP_MS : SLEEP_MS);
    __atomic_store_n(asleep, 0, __ATOMIC_RELAXED);
}

static void *proxy_main(void *argument)
{
    epx__proxy_t *proxy = argument;
    uint32_t idle = 0;
    epx__log_set_rank((int)proxy->owner->rank);
    while (!atomic_load(&proxy->stop)) {
        if (atomic_load(&proxy->helpers)) { /* somebody who waits anyway steps us */
            wait_on(proxy, -1, SLEEP_MS);
            continue;
        }
        pthread_mutex_lock(&proxy->lock);
        bool moved = epx__proxy_step(proxy);
        pthread_mutex_unlock(&proxy->lock);
        idle = moved ? 0 : idle + 1;
        if (idle > IDLE_PASSES)
            sleep_until_called(proxy);
        else if (idle > 4)
            sched_yield();
    }
    return NULL;
}

epx_status_t epx__proxy_start(epx__proxy_t *proxy)
{
    sigset_t all, before; /* the application's signals are not for this thread */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = epx__alloc_fault() ? EAGAIN : pthread_create(&proxy->thread, NULL, proxy_main, proxy);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error)
        return epx__fail(EPX_E_SYSTEM, "proxy %u: no thread: %s", proxy->index, strerror(error));
    proxy->started = true;
    return EPX_OK;
}

void epx__proxy_end(epx__proxy_t *proxy)
{
    if (!proxy->started)
        return;
    atomic_store(&proxy->stop, true);
    epx__proxy_wake(proxy);
    pthread_join(proxy->thread, NULL);
    proxy->started = false;
}

bool epx__channels_any(const epx__channels_t *self)
{
    return self->any_sources;
}

void epx__channels_halt(epx__channels_t *self)
{
    for (uint32_t i = 0; i < self->proxies; i++) {
        pthread_mutex_lock(&self->proxy[i].lock);
        if (!self->proxy[i].halted) {
            self->proxy[i].halted = true;
            self->proxy[i].net->unclean = true;
            epx__proxy_close_net(&self->proxy[i]);
        }
        pthread_mutex_unlock(&self->proxy[i].lock);
    }
    epx__channels_fault(self, -1, EPX_E_BROKEN, "port channels: halted after an operation that failed");
}

bool epx__channels_room(const epx_port_channel_t *channel, uint64_t n)
{
    uint64_t under_way = epx_ld_relaxed_sys_u64(channel->issued) - epx_ld_acquire_sys_u64(channel->acked);
    uint64_t queued = epx_ld_relaxed_sys_u64(channel->fifo_head) - epx_ld_acquire_sys_u64(channel->fifo_tail);
    return under_way + n <= channel->window && queued + n <= channel->slot_count;
}

bool epx__channels_applied(const epx_port_channel_t *channel)
{
    return epx_ld_acquire_sys_u64(channel->acked) >= epx_ld_relaxed_sys_u64(channel->issued);
}

void epx__channels_help_begin(epx__channels_t *self)
{
    for (uint32_t i = 0; i < self->proxies; i++)
        atomic_fetch_add(&self->proxy[i].helpers, 1);
}

bool epx__channels_help(epx__channels_t *self)
{
    bool moved = false;
    for (uint32_t i = 0; i < self->proxies; i++) {
        if (pthread_mutex_trylock(&self->proxy[i].lock))
            continue;
        moved = epx__proxy_step(&self->proxy[i]) || moved;
        pthread_mutex_unlock(&self->proxy[i].lock);
    }
    return moved;
}

void epx__channels_help_end(epx__channels_t *self)
{
    for (uint32_t i = 0; i < self->proxies; i++) {
        atomic_fetch_sub(&self->proxy[i].helpers, 1);
        if (self->proxy[i].started)
            epx__proxy_wake(&self->proxy[i]);
    }
}
