/* Endpoints of one process: list, references, registrations, event ring. */
#include "net/local.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/fail.h"
#include "device/device.h"

static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
static epx__local_t *list;
static uint64_t last_id;

typedef struct local_name {
    uint64_t process, id;
} local_name_t;

epx_status_t epx__local_init(epx__local_t *self, const epx__net_ops_t *ops, const epx__net_config_t *config)
{
    self->net.ops = ops;
    self->net.put_bytes_max = SIZE_MAX / 2;
    self->net.why = self->why_text;
    self->any = (struct epx__net_memory){.bytes = SIZE_MAX};
    self->net.any = &self->any;
    self->peers_max = config->peers_max;
    self->puts_max = config->puts_max;
    self->notices_max = config->notices_max;
    self->events_max = config->puts_max + config->notices_max;
    self->next_key = 1;
    self->peers = epx__calloc(self->peers_max, sizeof *self->peers);
    self->events = epx__calloc(self->events_max, sizeof *self->events);
    self->fd = epx__alloc_fault() ? -1 : eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (!self->peers || !self->events || self->fd < 0) {
        epx_status_t status =
            self->fd < 0 && self->peers && self->events
                ? epx__fail(EPX_E_SYSTEM, "%s endpoint: eventfd: %s", ops->name, strerror(errno))
                : epx__fail(EPX_E_NOMEM, "%s endpoint: no memory for %u events", ops->name, self->events_max);
        if (self->fd >= 0)
            close(self->fd);
        epx__free(self->events);
        epx__free(self->peers);
        return status;
    }
    pthread_mutex_init(&self->lock, NULL);
    atomic_store(&self->refs, 1);
    pthread_mutex_lock(&list_lock);
    self->id = ++last_id;
    self->next = list;
    list = self;
    pthread_mutex_unlock(&list_lock);
    return EPX_OK;
}

void epx__local_keep(epx__local_t *self)
{
    atomic_fetch_add(&self->refs, 1);
}

void epx__local_drop(epx__local_t *self)
{
    if (atomic_fetch_sub(&self->refs, 1) != 1)
        return;
    pthread_mutex_destroy(&self->lock);
    close(self->fd);
    epx__free(self->events);
    epx__free(self->peers);
    epx__free(self);
}

void epx__local_close(epx__local_t *self)
{
    pthread_mutex_lock(&list_lock);
    epx__local_t **at = &list;
    while (*at && *at != self)
        at = &(*at)->next;
    if (*at)
        *at = self->next;
    pthread_mutex_unlock(&list_lock);
    pthread_mutex_lock(&self->lock);
    self->closed = true;
    pthread_mutex_unlock(&self->lock);
    for (uint32_t i = 0; i < self->peer_count; i++)
        epx__local_drop(self->peers[i]);
    self->peer_count = 0;
    epx__local_drop(self);
}

void epx__local_wake(epx__local_t *self)
{
    if (!self->armed)
        return;
    self->armed = false;
    uint64_t one = 1;
    ssize_t written = write(self->fd, &one, sizeof one);
    (void)written; /* a full eventfd is readable already */
}

void epx__local_push(epx__local_t *self, const epx__net_event_t *event)
{
    if (self->event_count == self->events_max)
        return; /* cannot be: puts and notices are bounded */
    self->events[(self->event_head + self->event_count++) % self->events_max] = *event;
    epx__local_wake(self);
}

uint32_t epx__local_take(epx__local_t *self, epx__net_event_t *events, uint32_t max)
{
    uint32_t n = 0;
    if (self->event_count == 0)
        return 0;
    while (n < max && self->event_count) {
        events[n] = self->events[self->event_head];
        self->event_head = (self->event_head + 1) % self->events_max;
        self->event_count--;
        if (events[n].kind == EPX__NET_NOTICE)
            self->notices--;
        else
            self->puts--;
        n++;
    }
    return n;
}

char *epx__local_find(epx__local_t *self, const epx__net_key_t *key, size_t offset, size_t bytes)
{
    for (int i = 0; i < EPX__LOCAL_REGIONS; i++) {
        const struct epx__net_memory *region = &self->regions[i];
        if (region->key != key->key || key->key == 0)
            continue;
        if (offset > region->bytes || bytes > region->bytes - offset) {
            epx__fail(EPX_E_INVALID, "put: bytes [%zu, +%zu) leave the peer's registered %zu", offset, bytes,
                      region->bytes);
            return NULL;
        }
        return region->base + offset;
    }
    epx__fail(EPX_E_INVALID, "put: the peer has no registration with key %llu", (unsigned long long)key->key);
    return NULL;
}

epx_status_t epx__local_address(epx__net_t *net, epx__net_address_t *address)
{
    epx__local_t *self = (epx__local_t *)net;
    local_name_t name = {epx__process_id(), self->id};
    memset(address, 0, sizeof *address);
    address->bytes = sizeof name;
    strncpy(address->net, net->ops->name, sizeof address->net - 1);
    memcpy(address->data, &name, sizeof name);
    return EPX_OK;
}

epx_status_t epx__local_connect(epx__net_t *net, const epx__net_address_t *address, uint32_t *peer)
{
    epx__local_t *self = (epx__local_t *)net;
    local_name_t name;
    if (strncmp(address->net, net->ops->name, sizeof address->net) != 0 || address->bytes != sizeof name)
        return epx__fail(EPX_E_MISMATCH, "connect: this rank's network is %s, the peer's is %.28s", net->ops->name,
                         address->net);
    memcpy(&name, address->data, sizeof name);
    if (name.process != epx__process_id())
        return epx__fail(
            EPX_E_UNSUPPORTED,
            "network \"%s\" joins ranks that are threads of one process; the peer is another process: use ofi",
            net->ops->name);
    if (self->peer_count == self->peers_max)
        return epx__fail(EPX_E_INVALID, "connect: the endpoint was opened for %u peers", self->peers_max);
    pthread_mutex_lock(&list_lock);
    epx__local_t *found = list;
    while (found && found->id != name.id)
        found = found->next;
    if (found)
        epx__local_keep(found);
    pthread_mutex_unlock(&list_lock);
    if (!found)
        return epx__fail(EPX_E_PEER, "connect: the peer's %s endpoint is closed", net->ops->name);
    self->peers[self->peer_count] = found;
    *peer = self->peer_count++;
    return EPX_OK;
}

epx_status_t epx__local_enroll(epx__net_t *net, void *base, size_t bytes, bool device, epx__net_memory_t **memory,
                               epx__net_key_t *key)
{
    epx__local_t *self = (epx__local_t *)net;
    if (device)
        return epx__fail(EPX_E_UNSUPPORTED, "network %s copies with the CPU: GPU memory must be staged",
                         net->ops->name);
    if (!base || bytes == 0)
        return epx__fail(EPX_E_INVALID, "enroll: no memory given");
    pthread_mutex_lock(&self->lock);
    for (int i = 0; i < EPX__LOCAL_REGIONS; i++) {
        struct epx__net_memory *region = &self->regions[i];
        if (region->key)
            continue;
        *region = (struct epx__net_memory){self->next_key++, base, bytes};
        *memory = region;
        *key = (epx__net_key_t){0, region->key, bytes};
        pthread_mutex_unlock(&self->lock);
        return EPX_OK;
    }
    pthread_mutex_unlock(&self->lock);
    return epx__fail(EPX_E_INVALID, "enroll: a %s endpoint holds at most %d registrations", net->ops->name,
                     EPX__LOCAL_REGIONS);
}

void epx__local_withdraw(epx__net_t *net, epx__net_memory_t *memory)
{
    epx__local_t *self = (epx__local_t *)net;
    if (!memory)
        return;
    pthread_mutex_lock(&self->lock);
    memory->key = 0;
    pthread_mutex_unlock(&self->lock);
}

epx_status_t epx__local_flush(epx__net_t *net)
{
    epx__local_t *self = (epx__local_t *)net;
    pthread_mutex_lock(&self->lock);
    uint32_t puts = self->puts;
    pthread_mutex_unlock(&self->lock);
    return puts == 0 ? EPX_OK : EPX_E_BUSY;
}

int epx__local_wait_fd(epx__net_t *net)
{
    return ((epx__local_t *)net)->fd;
}
