/*
 * GPU windows, from the driver's virtual memory API.
 *
 * A physical allocation has a handle; a descriptor made from it keeps it alive, and so does every mapping. An importer
 * maps it at an address of its own and gives its own GPU access. Inside one process the exporter's mapping serves all
 * ranks: an importer only adds its GPU to those that may access it.
 *
 * What it may be exported as, and fabric handles, are in fabric.c.
 */
#include <pthread.h>
#include <string.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/fail.h"
#include "device/cuda/cuda_device.h"

/* What a window keeps beside its address. All of this process are in a list. */
typedef struct backing {
    struct backing *next;
    epx__cuda_memory_t memory;
    CUdeviceptr base;
    int ordinal;
    uint64_t access; /* bit d: GPU d may use it */
} backing_t;

static pthread_mutex_t backings_lock = PTHREAD_MUTEX_INITIALIZER;
static backing_t *backings;

static const epx__cuda_driver_t *driver(void)
{
    return epx__cuda_driver(NULL);
}

static CUresult give_access(CUdeviceptr base, size_t bytes, int ordinal)
{
    CUmemAccessDesc access;
    memset(&access, 0, sizeof access);
    access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access.location.id = ordinal;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    return driver()->mem_set_access(base, bytes, &access, 1);
}

/* Map the whole handle somewhere and let GPU `ordinal` use it. */
static CUresult map_handle(CUmemGenericAllocationHandle handle, size_t bytes, int ordinal, CUdeviceptr *base)
{
    CUdeviceptr at = 0;
    CUresult result = driver()->address_reserve(&at, bytes, 0, 0, 0);
    if (result != CUDA_SUCCESS)
        return result;
    result = driver()->mem_map(at, bytes, 0, handle, 0);
    if (result == CUDA_SUCCESS) {
        result = give_access(at, bytes, ordinal);
        if (result == CUDA_SUCCESS) {
            *base = at;
            return result;
        }
        driver()->mem_unmap(at, bytes);
    }
    driver()->address_free(at, bytes);
    return result;
}

static void unmap_handle(CUdeviceptr base, size_t bytes)
{
    driver()->mem_unmap(base, bytes);
    driver()->address_free(base, bytes);
}

static epx_status_t zero(epx__cuda_device_t *d, CUdeviceptr base, size_t bytes)
{
    cudaError_t error = cudaMemsetAsync((void *)base, 0, bytes, d->stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(d->stream);
    return error == cudaSuccess ? EPX_OK : epx__cuda_fail(error, "zeroing a window");
}

static epx_status_t alloc_on(epx__cuda_device_t *d, size_t bytes, backing_t *backing, epx__window_t *window)
{
    epx__cuda_memory_t *memory = &backing->memory;
    CUdeviceptr base = 0;
    int fd = -1;
    EPX__TRY(epx__cuda_memory_create(d, bytes, memory));
    epx_status_t status = EPX_OK;
    CUresult result = map_handle(memory->handle, memory->bytes, d->base.ordinal, &base);
    if (result != CUDA_SUCCESS)
        status = epx__cuda_driver_fail(result, "mapping a window");
    if (status == EPX_OK) {
        result = driver()->mem_export(&fd, memory->handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
        if (result != CUDA_SUCCESS)
            status = epx__cuda_driver_fail(result, "a descriptor for a window");
    }
    if (status == EPX_OK)
        status = zero(d, base, memory->bytes);
    if (status != EPX_OK) {
        if (fd >= 0)
            close(fd);
        if (base)
            unmap_handle(base, memory->bytes);
        driver()->mem_release(memory->handle);
        return status;
    }
    *window = (epx__window_t){.base = (void *)base, .bytes = memory->bytes, .fd = fd, .backend = backing};
    return EPX_OK;
}

epx_status_t epx__cuda_window_alloc(epx__device_t *device, size_t bytes, epx__window_t *window)
{
    int before;
    if (bytes == 0 || bytes > SIZE_MAX / 2)
        return epx__fail(EPX_E_INVALID, "window of %zu bytes: must be 1 to %zu", bytes, SIZE_MAX / 2);
    backing_t *backing = epx__calloc(1, sizeof *backing);
    if (!backing)
        return epx__fail(EPX_E_NOMEM, "no memory for a window's description");
    backing->ordinal = device->ordinal;
    epx_status_t status = epx__cuda_enter(device->ordinal, &before);
    if (status == EPX_OK) {
        status = alloc_on((epx__cuda_device_t *)device, bytes, backing, window);
        epx__cuda_leave(device->ordinal, before);
    }
    if (status != EPX_OK) {
        epx__free(backing);
        return status;
    }
    backing->base = (CUdeviceptr)window->base;
    backing->access = 1ull << (device->ordinal & 63);
    pthread_mutex_lock(&backings_lock);
    backing->next = backings;
    backings = backing;
    pthread_mutex_unlock(&backings_lock);
    return EPX_OK;
}

static void forget(const backing_t *backing)
{
    pthread_mutex_lock(&backings_lock);
    backing_t **at = &backings;
    while (*at && *at != backing)
        at = &(*at)->next;
    if (*at)
        *at = backing->next;
    pthread_mutex_unlock(&backings_lock);
}

/* `device` may be another rank's of this process: what is needed is in the window. */
void epx__cuda_window_free(epx__device_t *device, epx__window_t *window)
{
    backing_t *backing = window->backend;
    int before;
    (void)device;
    if (!window->base || epx__cuda_enter(backing->ordinal, &before) != EPX_OK)
        return;
    forget(backing);
    unmap_handle((CUdeviceptr)window->base, window->bytes);
    driver()->mem_release(backing->memory.handle);
    epx__cuda_leave(backing->ordinal, before);
    if (window->fd >= 0)
        close(window->fd);
    epx__free(backing);
    *window = (epx__window_t){.fd = -1};
}

epx_status_t epx__cuda_window_export(epx__device_t *device, const epx__window_t *window, epx__export_t *export_)
{
    backing_t *backing = window->backend;
    int before;
    EPX__TRY(epx__cuda_enter(device->ordinal, &before));
    epx__cuda_fabric_export((epx__cuda_device_t *)device, &backing->memory, export_);
    epx__cuda_leave(device->ordinal, before);
    return EPX_OK;
}

static epx_status_t out_of_reach(CUresult result, int ordinal)
{
    const char *text = NULL;
    driver()->error_string(result, &text);
    return epx__fail(EPX_E_UNSUPPORTED,
                     "GPU %d cannot access the peer's GPU memory (no NVLink or PCIe peer access): %s", ordinal,
                     text ? text : "refused");
}

static epx_status_t import_descriptor(int fd, CUmemGenericAllocationHandle *handle)
{
    CUresult result = driver()->mem_import(handle, (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    return result == CUDA_SUCCESS ? EPX_OK : epx__cuda_driver_fail(result, "importing a peer's window");
}

epx_status_t epx__cuda_window_map(epx__device_t *device, const epx__export_t *export_, int fd, void **mapped)
{
    int before;
    EPX__TRY(epx__cuda_enter(device->ordinal, &before));
    CUmemGenericAllocationHandle handle = 0;
    CUdeviceptr base = 0;
    epx_status_t status = fd >= 0 ? import_descriptor(fd, &handle) : epx__cuda_fabric_import(export_, &handle);
    if (status == EPX_OK) {
        CUresult result = map_handle(handle, (size_t)export_->bytes, device->ordinal, &base);
        if (result != CUDA_SUCCESS)
            status = out_of_reach(result, device->ordinal);
        driver()->mem_release(handle); /* the mapping holds it */
    }
    epx__cuda_leave(device->ordinal, before);
    if (status == EPX_OK)
        *mapped = (void *)base;
    return status;
}

void epx__cuda_window_unmap(epx__device_t *device, const epx__export_t *export_, void *mapped)
{
    int before;
    if (epx__cuda_enter(device->ordinal, &before) != EPX_OK)
        return;
    unmap_handle((CUdeviceptr)mapped, (size_t)export_->bytes);
    epx__cuda_leave(device->ordinal, before);
}

/* Let this GPU use a window of this process. Once each: changing the mapping again while others use it makes them fail.
 */
static CUresult share_inside(const epx__export_t *export_, int ordinal)
{
    CUresult result = CUDA_ERROR_INVALID_VALUE;
    uint64_t bit = 1ull << (ordinal & 63);
    pthread_mutex_lock(&backings_lock);
    backing_t *backing = backings;
    while (backing && backing->base != (CUdeviceptr)export_->pointer)
        backing = backing->next;
    if (backing && backing->access & bit) {
        result = CUDA_SUCCESS;
    } else if (backing) {
        result = give_access(backing->base, (size_t)export_->bytes, ordinal);
        backing->access |= result == CUDA_SUCCESS ? bit : 0;
    }
    pthread_mutex_unlock(&backings_lock);
    return result;
}

/* The exporter's pointer, once this GPU may access it. */
epx_status_t epx__cuda_window_attach(epx__device_t *device, const epx__export_t *export_, void **mapped)
{
    int before;
    EPX__TRY(epx__cuda_enter(device->ordinal, &before));
    CUresult result = share_inside(export_, device->ordinal);
    epx_status_t status = result == CUDA_SUCCESS ? EPX_OK : out_of_reach(result, device->ordinal);
    epx__cuda_leave(device->ordinal, before);
    if (status == EPX_OK)
        *mapped = (void *)(uintptr_t)export_->pointer;
    return status;
}
