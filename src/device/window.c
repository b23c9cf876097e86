/*
 * Windows and their imports, for any device: the device knows memory, the fd server passes descriptors, and here is
 * decided which way leads to a peer's window: its pointer, its descriptor, or the backend's own handle (blob).
 */
#include "device/device.h"

#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/fail.h"

/*
 * Ranks that are threads of one process use the exporter's own pointer. Between processes the operating system counts
 * who has a window mapped; inside one it is counted here, so that a window outlives its owner's destroy while a peer
 * still writes its words there. The last to let go frees it.
 */
typedef struct shared_window {
    struct shared_window *next;
    epx__window_t window;
    uint32_t importers;
    bool orphan; /* its owner is done with it */
} shared_window_t;

static pthread_mutex_t shared_lock = PTHREAD_MUTEX_INITIALIZER;
static shared_window_t *shared_windows;

static shared_window_t **shared_find(const void *base)
{
    shared_window_t **at = &shared_windows;
    while (*at && (*at)->window.base != base)
        at = &(*at)->next;
    return at;
}

static epx_status_t shared_add(const epx__window_t *window)
{
    shared_window_t *entry = epx__calloc(1, sizeof *entry);
    if (!entry)
        return epx__fail(EPX_E_NOMEM, "no memory to share a window inside the process");
    entry->window = *window;
    pthread_mutex_lock(&shared_lock);
    entry->next = shared_windows;
    shared_windows = entry;
    pthread_mutex_unlock(&shared_lock);
    return EPX_OK;
}

static bool shared_hold(const void *base)
{
    pthread_mutex_lock(&shared_lock);
    shared_window_t *entry = *shared_find(base);
    bool there = entry && !entry->orphan;
    if (there)
        entry->importers++;
    pthread_mutex_unlock(&shared_lock);
    return there;
}

/* One importer less, or the owner gone; frees with whichever device of the same kind was last. */
static void shared_release(epx__device_t *device, const void *base, bool owner)
{
    pthread_mutex_lock(&shared_lock);
    shared_window_t **at = shared_find(base), *entry = *at;
    bool last = false;
    if (entry) {
        entry->orphan |= owner;
        entry->importers -= !owner;
        last = entry->orphan && entry->importers == 0;
        if (last)
            *at = entry->next;
    }
    pthread_mutex_unlock(&shared_lock);
    if (last) {
        device->ops->window_free(device, &entry->window);
        epx__free(entry);
    }
}

epx_status_t epx__window_create(epx__device_t *device, epx__fdserver_t *server, size_t bytes, epx__window_t *window,
                                epx__export_t *export_)
{
    epx__window_t made;
    EPX__TRY(epx__host_id_find());
    EPX__TRY(device->ops->window_alloc(device, bytes, &made));
    epx__export_t out;
    memset(&out, 0, sizeof out); /* it travels: no stray bytes */
    out.host = epx__host_id();
    out.process = epx__process_id();
    out.pointer = (uint64_t)(uintptr_t)made.base;
    out.bytes = made.bytes;
    epx_status_t status = device->ops->window_export(device, &made, &out);
    if (status == EPX_OK && made.fd >= 0 && server)
        status = epx__fdserver_offer(server, made.fd, &out);
    if (status == EPX_OK) {
        status = shared_add(&made);
        if (status != EPX_OK && server && out.key != 0)
            epx__fdserver_withdraw(server, out.key);
    }
    if (status != EPX_OK) {
        device->ops->window_free(device, &made);
        return status;
    }
    *window = made;
    *export_ = out;
    return EPX_OK;
}

void epx__window_destroy(epx__device_t *device, epx__fdserver_t *server, epx__window_t *window,
                         const epx__export_t *export_)
{
    if (!window->base)
        return;
    if (server && export_->key != 0)
        epx__fdserver_withdraw(server, export_->key);
    shared_release(device, window->base, true);
    window->base = NULL;
}

static epx_status_t import_by_descriptor(epx__device_t *device, const epx__export_t *export_, uint64_t timeout_ms,
                                         void **mapped)
{
    int fd = -1;
    EPX__TRY(epx__fd_fetch(export_, timeout_ms, &fd));
    epx_status_t status = device->ops->window_map(device, export_, fd, mapped);
    close(fd);
    return status;
}

/* What no descriptor leads to. The call into the driver is not ours to bound; a rank that it keeps is late for what the
 * others wait for next, with a deadline. */
static epx_status_t import_by_blob(epx__device_t *device, const epx__export_t *export_, bool same_host, void **mapped)
{
    if (export_->blob_kind == EPX__BLOB_NONE && export_->blob_refused == 0)
        return epx__fail(EPX_E_UNSUPPORTED,
                         same_host ? "the peer's window has neither a descriptor nor a handle to map it by"
                                   : "the peer's window is on another host and its backend maps only its own host's");
    if (device->handles == EPX__HANDLES_FD)
        return epx__fail(EPX_E_UNSUPPORTED, "the peer's window is out of reach of descriptors, and EPX_CUDA_HANDLES=fd "
                                            "allows no other way");
    return device->ops->window_map(device, export_, -1, mapped);
}

epx_status_t epx__window_import(epx__device_t *device, const epx__export_t *export_, uint64_t timeout_ms, void **mapped)
{
    bool same_host = export_->host == epx__host_id();
    if (same_host && export_->process == epx__process_id()) {
        const void *base = (const void *)(uintptr_t)export_->pointer;
        if (!shared_hold(base))
            return epx__fail(EPX_E_PEER, "the peer's window has been destroyed");
        epx_status_t status = device->ops->window_attach(device, export_, mapped);
        if (status != EPX_OK)
            shared_release(device, base, false);
        return status;
    }
    if (same_host && export_->key != 0 && device->handles != EPX__HANDLES_FABRIC) {
        epx_status_t status = import_by_descriptor(device, export_, timeout_ms, mapped);
        /* A handle may lead out of a network namespace, which the exporter's socket does not. */
        if (status != EPX_E_UNSUPPORTED || export_->blob_kind == EPX__BLOB_NONE || device->handles == EPX__HANDLES_FD)
            return status;
    }
    return import_by_blob(device, export_, same_host, mapped);
}

bool epx__window_shares_host(const epx__export_t *export_, uint64_t timeout_ms)
{
    int fd = -1;
    if (export_->host != epx__host_id())
        return false;
    if (export_->process == epx__process_id() || export_->blob_kind == EPX__BLOB_NONE || export_->key == 0)
        return true;
    if (epx__fd_fetch(export_, timeout_ms, &fd) != EPX_OK)
        return false;
    close(fd);
    return true;
}

void epx__window_unimport(epx__device_t *device, const epx__export_t *export_, void *mapped)
{
    if (!mapped)
        return;
    if (export_->host == epx__host_id() && export_->process == epx__process_id()) {
        shared_release(device, (const void *)(uintptr_t)export_->pointer, false);
        return;
    }
    device->ops->window_unmap(device, export_, mapped);
}
