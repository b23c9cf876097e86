/*
 * Ends of endpoints, where libfabric 1.17 needs care.
 *
 * shm: endpoints of one process use each other's memory (a peer's mapping is the owner's own), so that a put to an
 * endpoint that has been closed is a crash, and a peer that leaves does not wait for those that still write to it. So
 * an endpoint counts who is connected to it in this process, and stays until the last of them has been given up too.
 */
#include "net/ofi/ofi.h"

#include <pthread.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static ofi_t *of_shm; /* open or waiting for its users; under `lock` */

/* Is a transfer under way, or a peer lost? Closing such an endpoint makes tcp;ofi_rxm of libfabric 1.17 crash; and
 * verbs;ofi_rxm of that version any that was ever connected, as soon as its peers close theirs. */
static bool unsafe_to_close(const ofi_t *self)
{
    if (self->peer_count && strstr(self->info->fabric_attr->prov_name, "verbs") && fi_version() <= FI_VERSION(1, 17))
        return true;
    bool lost = self->puts > 0 || self->net.unclean;
    for (uint32_t i = 0; i < self->peer_count; i++)
        lost |= self->peers[i].dead;
    return lost;
}

/* Then it stays open, and nobody polls it: a broken group's endpoint, once. Kept reachable, for leak checkers. */
static void leave_open(ofi_t *self)
{
    static ofi_t *left_open;
    epx__ofi_host->log(2, "libfabric: an endpoint with unfinished transfers is left open");
    ofi_t *before = __atomic_exchange_n(&left_open, self, __ATOMIC_ACQ_REL);
    self->left_before = before;
}

static void close_parts(ofi_t *self)
{
    if (self->ep)
        fi_close(&self->ep->fid);
    epx__ofi_withdraw(&self->net, self->scratch_memory);
    if (self->av)
        fi_close(&self->av->fid);
    if (self->cq)
        fi_close(&self->cq->fid);
    if (self->domain)
        fi_close(&self->domain->fid);
    if (self->fabric)
        fi_close(&self->fabric->fid);
    if (self->info)
        fi_freeinfo(self->info);
    epx__ofi_host->free(self->peers);
    epx__ofi_host->free(self->contexts);
    epx__ofi_host->free(self);
}

static void close_or_leave(ofi_t *self)
{
    if (self->ep && unsafe_to_close(self))
        leave_open(self);
    else
        close_parts(self);
}

/* ---- shm ---- */

epx_status_t epx__ofi_opened(ofi_t *self)
{
    if (!strstr(self->info->fabric_attr->prov_name, "shm"))
        return EPX_OK;
    size_t bytes = sizeof self->name;
    long e = fi_getname(&self->ep->fid, self->name, &bytes);
    if (e)
        return epx__ofi_fail(e, "fi_getname");
    pthread_mutex_lock(&lock);
    self->name_bytes = bytes; /* from here on it is counted */
    self->users = 1;          /* its owner */
    self->next_of_shm = of_shm;
    of_shm = self;
    pthread_mutex_unlock(&lock);
    return EPX_OK;
}

void epx__ofi_connected(const ofi_t *self, ofi_peer_t *to, const void *name, size_t bytes)
{
    if (!self->name_bytes)
        return;
    pthread_mutex_lock(&lock);
    for (ofi_t *other = of_shm; other && !to->here; other = other->next_of_shm)
        if (other != self && other->name_bytes == bytes && memcmp(other->name, name, bytes) == 0) {
            to->here = other;
            other->users++;
        }
    pthread_mutex_unlock(&lock);
}

/* Under `lock`: one user fewer; the last one closes. */
static void let_go(ofi_t *self)
{
    if (--self->users > 0)
        return;
    ofi_t **at = &of_shm;
    while (*at != self)
        at = &(*at)->next_of_shm;
    *at = self->next_of_shm;
    close_or_leave(self);
}

void epx__ofi_close(epx__net_t *net)
{
    ofi_t *self = (ofi_t *)net;
    if (!self->name_bytes) {
        close_or_leave(self);
        return;
    }
    pthread_mutex_lock(&lock);
    for (uint32_t i = 0; i < self->peer_count; i++)
        if (self->peers[i].here) {
            let_go(self->peers[i].here);
            self->peers[i].here = NULL;
        }
    let_go(self);
    pthread_mutex_unlock(&lock);
}
