/*
 * Windows and their imports, for any device: the device knows memory, the fd server passes descriptors, and here is
 * decided which way leads to a peer's window.
 */
#include "device/device.h"

#include <string.h>
#include <unistd.h>

#include "base/fail.h"

epx_status_t epx__window_create(epx__device_t *device, epx__fdserver_t *server, size_t bytes, epx__window_t *window,
                                epx__export_t *export_)
{
    epx__window_t made;
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
    device->ops->window_free(device, window);
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

epx_status_t epx__window_import(epx__device_t *device, const epx__export_t *export_, uint64_t timeout_ms, void **mapped)
{
    bool same_host = export_->host == epx__host_id();
    if (same_host && export_->process == epx__process_id())
        return device->ops->window_attach(device, export_, mapped);
    if (same_host && export_->key != 0) {
        epx_status_t status = import_by_descriptor(device, export_, timeout_ms, mapped);
        if (status != EPX_E_UNSUPPORTED || export_->blob[0] == 0)
            return status;
    }
    if (export_->blob[0] != 0)
        return device->ops->window_map(device, export_, -1, mapped);
    return epx__fail(EPX_E_UNSUPPORTED,
                     same_host ? "the peer's window has neither a descriptor nor a handle to map it by"
                               : "the peer's window is on another host and this backend maps only its own host's");
}

void epx__window_unimport(epx__device_t *device, const epx__export_t *export_, void *mapped)
{
    if (!mapped)
        return;
    if (export_->host == epx__host_id() && export_->process == epx__process_id())
        return; /* the exporter's own pointer */
    device->ops->window_unmap(device, export_, mapped);
}
