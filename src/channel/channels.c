/* Making and unmaking channels: memory, network endpoints, the exchange of addresses and keys, the dense tables. */
#include "channel/channels.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/fail.h"

#define DRAIN_MS 2000 /* destroy waits for the peers at most that long */
#define PUTS_MAX 512  /* of a proxy under way at once, shared out among its peers */
#define PUTS_MIN 16   /* but at least so many to each */

/* What every rank must have chosen alike. */
typedef struct terms {
    uint32_t proxies, channels, window, fifo_slots, memory_count, rank;
} terms_t;

static bool wanted(const epx__channels_t *self, uint32_t rank)
{
    return rank != self->rank && (!self->config.wanted || self->config.wanted[rank]);
}

/* ---- one proxy ---- */

static epx_status_t make_lanes(epx__proxy_t *proxy, uint32_t *puts_max)
{
    epx__channels_t *self = proxy->owner;
    size_t space = (size_t)self->window * 2, used = 0;
    proxy->lane_count = (self->ranks + self->proxies - 1) / self->proxies * self->channels;
    proxy->lanes = epx__calloc(proxy->lane_count, sizeof *proxy->lanes);
    proxy->owing = epx__calloc(proxy->lane_count, sizeof *proxy->owing);
    proxy->waiting = epx__calloc((size_t)proxy->lane_count * self->window, sizeof *proxy->waiting);
    uint8_t *arrived = epx__calloc(proxy->lane_count, space);
    if (!proxy->lanes || !proxy->owing || !proxy->waiting || !arrived) {
        epx__free(arrived);
        return epx__fail(EPX_E_NOMEM, "proxy %u: no memory for %u lanes", proxy->index, proxy->lane_count);
    }
    for (uint32_t r = proxy->index; r < self->ranks; r += self->proxies)
        for (uint32_t c = 0; c < self->channels; c++) {
            uint32_t number = epx__channels_lane(self, r, c);
            epx__lane_t *lane = &proxy->lanes[number];
            lane->number = r * self->channels + c;
            lane->lane = number;
            lane->lane_there = epx__channels_lane(self, self->rank, c);
            lane->rank = r;
            lane->waiting = proxy->waiting + (size_t)number * self->window;
            if (wanted(self, r))
                lane->arrived = arrived + space * used++;
        }
    if (used == 0)
        epx__free(arrived);
    uint32_t peers = used ? (uint32_t)used / self->channels : 1;
    proxy->share = PUTS_MAX / peers > PUTS_MIN ? PUTS_MAX / peers : PUTS_MIN;
    *puts_max = peers * (proxy->share + EPX__CHANNELS_CREDITS);
    return EPX_OK;
}

/* The lanes' marks are one allocation: the first wanted lane's (in the order of make_lanes). */
static void free_lanes(epx__proxy_t *proxy)
{
    uint8_t *first = NULL;
    for (uint32_t i = 0; proxy->lanes && i < proxy->lane_count; i++)
        if (proxy->lanes[i].arrived && (!first || proxy->lanes[i].arrived < first))
            first = proxy->lanes[i].arrived;
    epx__free(first);
    epx__free(proxy->waiting);
    epx__free(proxy->owing);
    epx__free(proxy->lanes);
}

static epx_status_t proxy_init(epx__channels_t *self, uint32_t index, epx__net_address_t *address, epx__net_key_t *keys)
{
    epx__proxy_t *proxy = &self->proxy[index];
    proxy->owner = self;
    proxy->index = index;
    proxy->wake_fd = epx__alloc_fault() ? -1 : eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    pthread_mutex_init(&proxy->lock, NULL);
    if (proxy->wake_fd < 0)
        return epx__fail(EPX_E_SYSTEM, "proxy %u: eventfd: %s", index, strerror(errno));
    uint32_t puts_max = 0;
    EPX__TRY(make_lanes(proxy, &puts_max));
    uint32_t count = self->memory_count + 1;
    proxy->memory = epx__calloc(count, sizeof *proxy->memory);
    proxy->keys = epx__calloc((size_t)self->ranks * count, sizeof *proxy->keys);
    if (!proxy->memory || !proxy->keys)
        return epx__fail(EPX_E_NOMEM, "proxy %u: no memory for keys of %u ranks", index, self->ranks);
    epx__net_config_t config = {.address = self->config.address,
                                .nic = self->config.nic,
                                .turn = self->rank * self->proxies + index,
                                .peers_max = self->ranks,
                                .puts_max = puts_max,
                                .notices_max = proxy->lane_count * self->window * 2,
                                .lost_ms = self->config.timeout_ms};
    EPX__TRY(epx__net_open(self->config.net, &config, &proxy->net));
    EPX__TRY(proxy->net->ops->address(proxy->net, address));
    for (uint32_t m = 0; m < count; m++)
        EPX__TRY(proxy->net->ops->enroll(proxy->net, self->memory[m].base, self->memory[m].bytes,
                                         self->memory[m].device != 0, &proxy->memory[m], &keys[m]));
    return EPX_OK;
}

void epx__proxy_close_net(epx__proxy_t *proxy)
{
    if (proxy->net && proxy->memory)
        for (uint32_t m = 0; m <= proxy->owner->memory_count; m++)
            proxy->net->ops->withdraw(proxy->net, proxy->memory[m]);
    epx__net_close(proxy->net);
    proxy->net = NULL;
}

static void proxy_fini(epx__proxy_t *proxy)
{
    if (!proxy->owner)
        return;
    epx__proxy_end(proxy);
    epx__proxy_close_net(proxy);
    if (proxy->wake_fd >= 0)
        close(proxy->wake_fd);
    free_lanes(proxy);
    epx__free(proxy->keys);
    epx__free(proxy->memory);
    pthread_mutex_destroy(&proxy->lock);
}

/* ---- exchange ---- */

static epx_status_t gather(epx__channels_t *self, const void *mine, size_t bytes, void *all)
{
    return self->config.allgather(self->config.allgather_context, mine, bytes, all);
}

static epx_status_t agree(epx__channels_t *self)
{
    terms_t mine = {self->proxies, self->channels, self->window, self->fifo_slots, self->memory_count, self->rank};
    terms_t *all = epx__calloc(self->ranks, sizeof *all);
    if (!all)
        return epx__fail(EPX_E_NOMEM, "channels: no memory for %u ranks", self->ranks);
    epx_status_t status = gather(self, &mine, sizeof mine, all);
    for (uint32_t r = 0; status == EPX_OK && r < self->ranks; r++)
        if (all[r].rank != r || memcmp(&all[r], &mine, sizeof mine - sizeof mine.rank) != 0)
            status =
                epx__fail(EPX_E_MISMATCH,
                          "channels: rank %u has %u proxies, %u channels, window %u, %u FIFO slots, %u memories; "
                          "rank %u has %u, %u, %u, %u, %u: give all ranks the same",
                          r, all[r].proxies, all[r].channels, all[r].window, all[r].fifo_slots, all[r].memory_count,
                          self->rank, mine.proxies, mine.channels, mine.window, mine.fifo_slots, mine.memory_count);
    epx__free(all);
    return status;
}

/* One rank's record: an error first, so that a rank that cannot go on still takes part. Then [proxies] addresses, and
 * [proxies][memories + 1] keys. */
static size_t record_bytes(const epx__channels_t *self)
{
    return sizeof(uint64_t) +
           self->proxies * (sizeof(epx__net_address_t) + (size_t)(self->memory_count + 1) * sizeof(epx__net_key_t));
}

static epx_status_t take_record(epx__channels_t *self, uint32_t rank, const char *record)
{
    uint32_t count = self->memory_count + 1, there = self->rank % self->proxies;
    epx__proxy_t *proxy = &self->proxy[rank % self->proxies];
    epx__net_address_t address;
    const char *addresses = record + sizeof(uint64_t);
    const char *keys = addresses + self->proxies * sizeof address + (size_t)there * count * sizeof(epx__net_key_t);
    memcpy(&address, addresses + there * sizeof address, sizeof address);
    memcpy(&proxy->keys[(size_t)rank * count], keys, count * sizeof(epx__net_key_t));
    uint32_t peer;
    EPX__TRY(proxy->net->ops->connect(proxy->net, &address, &peer));
    for (uint32_t c = 0; c < self->channels; c++)
        proxy->lanes[epx__channels_lane(self, rank, c)].net_peer = peer;
    for (uint32_t m = 0; m < count; m++)
        self->peer_bytes[(size_t)rank * count + m] = proxy->keys[(size_t)rank * count + m].bytes;
    return EPX_OK;
}

static epx_status_t open_proxies(epx__channels_t *self, char *mine)
{
    uint32_t count = self->memory_count + 1;
    char *at = mine + sizeof(uint64_t), *keys_at = at + self->proxies * sizeof(epx__net_address_t);
    self->put_bytes_max = SIZE_MAX;
    self->any_sources = self->config.any_sources;
    for (uint32_t p = 0; p < self->proxies; p++) {
        epx__net_address_t address;
        epx__net_key_t keys[EPX__CHANNELS_MEMORIES + 1];
        EPX__TRY(proxy_init(self, p, &address, keys));
        memcpy(at + p * sizeof address, &address, sizeof address);
        memcpy(keys_at + p * count * sizeof *keys, keys, count * sizeof *keys);
        self->any_sources = self->any_sources && self->proxy[p].net->any;
        if (self->proxy[p].net->put_bytes_max < self->put_bytes_max)
            self->put_bytes_max = self->proxy[p].net->put_bytes_max;
    }
    return EPX_OK;
}

static epx_status_t connect_all(epx__channels_t *self)
{
    size_t bytes = record_bytes(self);
    char *records = epx__calloc(self->ranks, bytes), *mine = epx__calloc(1, bytes);
    if (!records || !mine) {
        epx__free(records);
        epx__free(mine);
        return epx__fail(EPX_E_NOMEM, "channels: no memory for the addresses of %u ranks", self->ranks);
    }
    epx_status_t own = open_proxies(self, mine), status = own;
    char words[EPX__DETAIL_BYTES];
    snprintf(words, sizeof words, "%s", epx__detail());
    uint64_t failed = (uint64_t)status;
    memcpy(mine, &failed, sizeof failed);
    epx_status_t gathered = gather(self, mine, bytes, records);
    for (uint32_t r = 0; status == EPX_OK && gathered == EPX_OK && r < self->ranks; r++) {
        memcpy(&failed, records + r * bytes, sizeof failed);
        if (failed)
            status = epx__fail(EPX_E_PEER, "channels: rank %u could not open its network (%s)", r,
                               epx__status_name((epx_status_t)failed));
        else if (wanted(self, r))
            status = take_record(self, r, records + r * bytes);
    }
    epx__free(records);
    epx__free(mine);
    if (gathered != EPX_OK && status == EPX_OK)
        return gathered;
    if (own != EPX_OK)
        epx__detail_set(words); /* our own failure, not what the exchange said since */
    return status;
}

/* ---- tables ---- */

static void fill_table(epx__channels_t *self)
{
    epx_port_request_t *slots = (epx_port_request_t *)(void *)(self->block + self->layout.slots);
    for (uint32_t r = 0; r < self->ranks; r++)
        for (uint32_t c = 0; c < self->channels; c++) {
            uint32_t number = r * self->channels + c, p = r % self->proxies;
            uint64_t *tickets = self->config.tickets;
            self->port[number] = (epx_port_channel_t){
                .slots = slots + (size_t)p * self->fifo_slots,
                .slot_count = self->fifo_slots,
                .fifo_head = tickets ? tickets + p : epx__block_word(self, self->layout.head, p),
                .fifo_tail = epx__block_word(self, self->layout.tail, p),
                .asleep = epx__block_word(self, self->layout.asleep, p),
                .issued =
                    tickets ? tickets + self->proxies + number : epx__block_word(self, self->layout.issued, number),
                .acked = epx__block_word(self, self->layout.acked, number),
                .signals = epx__block_word(self, self->layout.signals, number),
                .fault = epx__block_word(self, self->layout.fault, r),
                .window = wanted(self, r) ? self->window : 0,
                .put_bytes_max = self->put_bytes_max,
                .timeout_ns = self->config.timeout_ms * 1000000u,
                .owner = self,
                .number = number,
                .peer = (int32_t)r,
            };
        }
}

static epx_status_t make_memory(epx__channels_t *self)
{
    epx__block_layout_make(self);
    self->proxy = epx__calloc(self->proxies, sizeof *self->proxy);
    self->port = epx__calloc((size_t)self->ranks * self->channels, sizeof *self->port);
    self->peer_bytes = epx__calloc((size_t)self->ranks * (self->memory_count + 1), sizeof *self->peer_bytes);
    self->block_memory = epx__calloc(1, self->layout.total + 4096);
    if (!self->proxy || !self->port || !self->peer_bytes || !self->block_memory)
        return epx__fail(EPX_E_NOMEM, "channels: no memory for %u ranks of %u channels (%zu bytes)", self->ranks,
                         self->channels, self->layout.total);
    self->block = (char *)(((uintptr_t)self->block_memory + 4095) & ~(uintptr_t)4095);
    for (uint32_t m = 0; m < self->memory_count; m++) {
        self->memory[m] = self->config.memories[m];
        if (!self->memory[m].base || self->memory[m].bytes == 0)
            return epx__fail(EPX_E_INVALID, "channels: memory %u is empty", m);
    }
    self->memory[self->memory_count] = (epx_channel_memory_t){self->block, self->layout.total, 0};
    return EPX_OK;
}

static void channels_free(epx__channels_t *self)
{
    for (uint32_t p = 0; self->proxy && p < self->proxies; p++)
        proxy_fini(&self->proxy[p]);
    pthread_mutex_destroy(&self->words_lock);
    epx__free(self->mapped);
    epx__free(self->port);
    epx__free(self->peer_bytes);
    epx__free(self->proxy);
    epx__free(self->block_memory);
    epx__free(self);
}

static epx_status_t create(epx__channels_t *self)
{
    EPX__TRY(agree(self));
    EPX__TRY(make_memory(self));
    EPX__TRY(connect_all(self));
    fill_table(self);
    snprintf(self->why, sizeof self->why, "%s; %u proxies, %u channels to each peer, %u requests under way on each",
             self->proxy[0].net->why, self->proxies, self->channels, self->window);
    for (uint32_t p = 0; p < self->proxies && !self->config.no_threads; p++)
        EPX__TRY(epx__proxy_start(&self->proxy[p]));
    return EPX_OK;
}

epx_status_t epx__channels_create(const epx__channels_config_t *config, epx__channels_t **channels)
{
    epx__channels_t *self = epx__calloc(1, sizeof *self);
    if (!self)
        return epx__fail(EPX_E_NOMEM, "channels: no memory");
    pthread_mutex_init(&self->words_lock, NULL);
    self->config = *config;
    if (self->config.timeout_ms == 0)
        self->config.timeout_ms = 30000;
    self->rank = (uint32_t)config->rank;
    self->ranks = (uint32_t)config->ranks;
    self->memory_count = config->memory_count;
    epx_status_t status = epx__channels_sizes(self);
    if (status == EPX_OK)
        status = create(self);
    if (status != EPX_OK) {
        channels_free(self);
        return status;
    }
    *channels = self;
    return EPX_OK;
}

/* To each living peer: drain, say bye, hear its own, which says that nothing more of it is on its way here (libfabric
 * 1.17 crashes when an endpoint is closed in the middle of a put to it). False: not yet. */
static bool part(epx__proxy_t *proxy)
{
    bool parted = true;
    pthread_mutex_lock(&proxy->lock);
    if (!proxy->halted) {
        epx__proxy_step(proxy);
        parted = epx__proxy_taken(proxy) && epx__lane_bye(proxy) && epx__lane_parted(proxy) &&
                 proxy->net->ops->flush(proxy->net) == EPX_OK;
    }
    pthread_mutex_unlock(&proxy->lock);
    return parted;
}

static void judge(epx__proxy_t *proxy)
{
    bool unclean = !part(proxy);
    pthread_mutex_lock(&proxy->lock); /* its thread still steps it */
    for (uint32_t i = 0; i < proxy->lane_count; i++)
        unclean |= proxy->lanes[i].lost;
    if (!proxy->halted)
        proxy->net->unclean = unclean;
    pthread_mutex_unlock(&proxy->lock);
}

/* All proxies in turn, for the peers may be waiting for any of them. */
static bool part_all(epx__channels_t *self)
{
    bool parted = true;
    for (uint32_t p = 0; p < self->proxies; p++)
        parted = part(&self->proxy[p]) && parted;
    return parted;
}

void epx__channels_leave(epx__channels_t *self)
{
    if (!self || self->left)
        return;
    self->left = true;
    uint64_t limit = self->config.timeout_ms < DRAIN_MS ? self->config.timeout_ms : DRAIN_MS;
    epx__deadline_t deadline = epx__deadline_ms(limit);
    epx__channels_help_begin(self);
    for (uint32_t turn = 0; !part_all(self) && !epx__deadline_passed(&deadline); turn++)
        epx_host_wait_turn(turn);
    for (uint32_t p = 0; p < self->proxies; p++)
        judge(&self->proxy[p]);
    epx__channels_help_end(self);
}

void epx__channels_destroy(epx__channels_t *self)
{
    if (!self)
        return;
    epx__channels_leave(self);
    channels_free(self);
}
