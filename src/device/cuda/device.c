/*
 * GPU memory as a device: windows from the driver's virtual memory API, handed to other processes as POSIX descriptors.
 *
 * A physical allocation has a handle; a descriptor made from it keeps it alive, and so does every mapping. An importer
 * maps it at an address of its own and gives its own GPU access. Inside one process the exporter's mapping serves all
 * ranks: an importer only adds its GPU to those that may access it.
 *
 * Across hosts a fabric handle would travel in epx__export_t.blob, for GPUs of one NVLink domain that spans them. The
 * seam is there (window_map with fd -1); it is not built: no such machine could be tried.
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
    CUmemGenericAllocationHandle handle;
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

/* ---- devices ---- */

static epx_status_t read_attributes(epx__cuda_device_t *d)
{
    struct {
        enum cudaDeviceAttr what;
        int *value;
    } const wanted[] = {{cudaDevAttrMultiProcessorCount, &d->sms},
                        {cudaDevAttrComputeCapabilityMajor, &d->major},
                        {cudaDevAttrComputeCapabilityMinor, &d->minor},
                        {cudaDevAttrMaxSharedMemoryPerBlockOptin, &d->shared_max}};
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        cudaError_t error = cudaDeviceGetAttribute(wanted[i].value, wanted[i].what, d->base.ordinal);
        if (error != cudaSuccess)
            return epx__cuda_fail(error, "asking the GPU for its attributes");
    }
    int vmm = 0, fds = 0;
    driver()->device_attribute(&vmm, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, d->base.ordinal);
    driver()->device_attribute(&fds, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, d->base.ordinal);
    if (!vmm || !fds || d->major < 8)
        return epx__fail(
            EPX_E_UNSUPPORTED,
            "GPU %d (compute capability %d.%d) cannot share memory by descriptors; 8.0 or newer with virtual "
            "memory management can",
            d->base.ordinal, d->major, d->minor);
    return EPX_OK;
}

static epx_status_t open_on(epx__cuda_device_t *d)
{
    int before;
    EPX__TRY(epx__cuda_enter(d->base.ordinal, &before));
    epx_status_t status = read_attributes(d);
    if (status == EPX_OK) {
        cudaError_t error = cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking);
        if (error != cudaSuccess)
            status = epx__cuda_fail(error, "making a stream");
    }
    epx__cuda_leave(d->base.ordinal, before);
    return status;
}

/* Negative: no wish; -1 - i is the i-th rank of this host, which takes GPU i modulo their number. */
static epx_status_t device_open(int ordinal, epx__device_t **device)
{
    const char *why;
    int devices = 0;
    if (!epx__cuda_driver(&why))
        return epx__fail(EPX_E_UNSUPPORTED, "%s", why);
    cudaError_t error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices < 1)
        return epx__cuda_fail(error, "counting GPUs");
    if (ordinal >= devices)
        return epx__fail(EPX_E_INVALID, "device %d: this process sees %d GPUs, 0 to %d", ordinal, devices, devices - 1);
    epx__cuda_device_t *d = epx__calloc(1, sizeof *d);
    if (!d)
        return epx__fail(EPX_E_NOMEM, "no memory for a device object");
    d->base.ops = &epx__device_cuda;
    d->base.ordinal = ordinal >= 0 ? ordinal : (-1 - ordinal) % devices;
    epx_status_t status = open_on(d);
    if (status != EPX_OK) {
        epx__free(d);
        return status;
    }
    *device = &d->base;
    return EPX_OK;
}

static void device_close(epx__device_t *device)
{
    epx__cuda_device_t *d = (epx__cuda_device_t *)device;
    int before;
    if (epx__cuda_enter(device->ordinal, &before) == EPX_OK) {
        (void)cudaStreamDestroy(d->stream);
        epx__cuda_leave(device->ordinal, before);
    }
    epx__free(d);
}

/* ---- windows ---- */

static CUmemAllocationProp properties(int ordinal)
{
    CUmemAllocationProp p;
    memset(&p, 0, sizeof p);
    p.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    p.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    p.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    p.location.id = ordinal;
    int rdma = 0; /* so that a network may register it */
    driver()->device_attribute(&rdma, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED, ordinal);
    p.allocFlags.gpuDirectRDMACapable = rdma ? 1 : 0;
    return p;
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
    CUmemAllocationProp p = properties(d->base.ordinal);
    size_t grain = 0;
    CUdeviceptr base = 0;
    int fd = -1;
    CUresult result = driver()->mem_granularity(&grain, &p, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
    if (result != CUDA_SUCCESS || grain == 0)
        return epx__cuda_driver_fail(result, "asking for the granularity of GPU memory");
    size_t rounded = (bytes + grain - 1) / grain * grain;
    result = driver()->mem_create(&backing->handle, rounded, &p, 0);
    if (result != CUDA_SUCCESS && p.allocFlags.gpuDirectRDMACapable) {
        p.allocFlags.gpuDirectRDMACapable = 0;
        result = driver()->mem_create(&backing->handle, rounded, &p, 0);
    }
    if (result != CUDA_SUCCESS)
        return epx__cuda_driver_fail(result, "GPU memory for a window (lease_bytes and reserve_bytes say how much)");
    epx_status_t status = EPX_OK;
    result = map_handle(backing->handle, rounded, d->base.ordinal, &base);
    if (result != CUDA_SUCCESS)
        status = epx__cuda_driver_fail(result, "mapping a window");
    if (status == EPX_OK) {
        result = driver()->mem_export(&fd, backing->handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
        if (result != CUDA_SUCCESS)
            status = epx__cuda_driver_fail(result, "a descriptor for a window");
    }
    if (status == EPX_OK)
        status = zero(d, base, rounded);
    if (status != EPX_OK) {
        if (fd >= 0)
            close(fd);
        if (base)
            unmap_handle(base, rounded);
        driver()->mem_release(backing->handle);
        return status;
    }
    *window = (epx__window_t){.base = (void *)base, .bytes = rounded, .fd = fd, .backend = backing};
    return EPX_OK;
}

static epx_status_t window_alloc(epx__device_t *device, size_t bytes, epx__window_t *window)
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
static void window_free(epx__device_t *device, epx__window_t *window)
{
    backing_t *backing = window->backend;
    int before;
    (void)device;
    if (!window->base || epx__cuda_enter(backing->ordinal, &before) != EPX_OK)
        return;
    forget(backing);
    unmap_handle((CUdeviceptr)window->base, window->bytes);
    driver()->mem_release(backing->handle);
    epx__cuda_leave(backing->ordinal, before);
    if (window->fd >= 0)
        close(window->fd);
    epx__free(backing);
    *window = (epx__window_t){.fd = -1};
}

static epx_status_t window_export(epx__device_t *device, const epx__window_t *window, epx__export_t *export_)
{
    (void)device;
    (void)window;
    memset(export_->blob, 0, sizeof export_->blob);
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

static epx_status_t window_map(epx__device_t *device, const epx__export_t *export_, int fd, void **mapped)
{
    int before;
    if (fd < 0)
        return epx__fail(EPX_E_UNSUPPORTED,
                         "a GPU window on another host needs a fabric handle, which this build does not make");
    EPX__TRY(epx__cuda_enter(device->ordinal, &before));
    CUmemGenericAllocationHandle handle = 0;
    CUdeviceptr base = 0;
    epx_status_t status = EPX_OK;
    CUresult result = driver()->mem_import(&handle, (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (result != CUDA_SUCCESS)
        status = epx__cuda_driver_fail(result, "importing a peer's window");
    if (status == EPX_OK) {
        result = map_handle(handle, (size_t)export_->bytes, device->ordinal, &base);
        if (result != CUDA_SUCCESS)
            status = out_of_reach(result, device->ordinal);
        driver()->mem_release(handle); /* the mapping holds it */
    }
    epx__cuda_leave(device->ordinal, before);
    if (status == EPX_OK)
        *mapped = (void *)base;
    return status;
}

static void window_unmap(epx__device_t *device, const epx__export_t *export_, void *mapped)
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
static epx_status_t window_attach(epx__device_t *device, const epx__export_t *export_, void **mapped)
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

/* ---- copies and pointers ---- */

static epx_status_t copy(epx__device_t *device, void *to, const void *from, size_t bytes)
{
    epx__cuda_device_t *d = (epx__cuda_device_t *)device;
    int before;
    if (bytes == 0)
        return EPX_OK;
    EPX__TRY(epx__cuda_enter(device->ordinal, &before));
    cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, d->stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(d->stream);
    epx__cuda_leave(device->ordinal, before);
    return error == cudaSuccess ? EPX_OK : epx__cuda_fail(error, "copying between host and GPU");
}

static epx_status_t check_pointer(epx__device_t *device, const void *pointer, const char *what)
{
    struct cudaPointerAttributes a;
    if (!pointer)
        return epx__fail(EPX_E_INVALID, "%s is NULL: memory of GPU %d is needed", what, device->ordinal);
    cudaError_t error = cudaPointerGetAttributes(&a, pointer);
    if (error != cudaSuccess)
        return epx__cuda_fail(error, what);
    if (a.type == cudaMemoryTypeUnregistered)
        return epx__fail(EPX_E_INVALID, "%s (%p) is ordinary host memory; memory of GPU %d is needed", what, pointer,
                         device->ordinal);
    if (a.type == cudaMemoryTypeDevice && a.device != device->ordinal)
        return epx__fail(EPX_E_INVALID, "%s (%p) is memory of GPU %d; memory of GPU %d is needed", what, pointer,
                         a.device, device->ordinal);
    return EPX_OK;
}

/* ---- host memory for kernels ---- */

/* Pinned memory of this process, by address: ranks that are threads use the same rails windows. */
typedef struct pinned {
    struct pinned *next;
    void *base;
    uint32_t users;
} pinned_t;

static pinned_t *pinned_all; /* under backings_lock */

static pinned_t **pinned_find(const void *base)
{
    pinned_t **at = &pinned_all;
    while (*at && (*at)->base != base)
        at = &(*at)->next;
    return at;
}

/* Kernels take the host's own pointers, which travel in tables: the device must see them at the same address. */
static epx_status_t same_address(void *base)
{
    void *seen = NULL;
    cudaError_t error = cudaHostGetDevicePointer(&seen, base, 0);
    if (error != cudaSuccess)
        return epx__cuda_fail(error, "mapping pinned host memory");
    if (seen != base)
        return epx__fail(EPX_E_UNSUPPORTED, "this GPU sees pinned host memory at other addresses than the host");
    return EPX_OK;
}

static epx_status_t pin_first(void *base, size_t bytes, pinned_t *entry)
{
    cudaError_t error = cudaHostRegister(base, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
    if (error != cudaSuccess)
        return epx__cuda_fail(error, "pinning host memory for the network");
    entry->base = base;
    entry->users = 1;
    entry->next = pinned_all;
    pinned_all = entry;
    return EPX_OK;
}

static epx_status_t host_pin(epx__device_t *device, void *base, size_t bytes)
{
    int before;
    pinned_t *entry = epx__calloc(1, sizeof *entry);
    if (!entry)
        return epx__fail(EPX_E_NOMEM, "no memory to note pinned memory");
    epx_status_t status = epx__cuda_enter(device->ordinal, &before);
    if (status != EPX_OK) {
        epx__free(entry);
        return status;
    }
    pthread_mutex_lock(&backings_lock);
    pinned_t *there = *pinned_find(base);
    if (there)
        there->users++;
    else
        status = pin_first(base, bytes, entry);
    pthread_mutex_unlock(&backings_lock);
    if (there || status != EPX_OK)
        epx__free(entry);
    if (status == EPX_OK) {
        status = same_address(base);
        if (status != EPX_OK)
            device->ops->host_unpin(device, base);
    }
    epx__cuda_leave(device->ordinal, before);
    return status;
}

static void host_unpin(epx__device_t *device, void *base)
{
    int before;
    if (epx__cuda_enter(device->ordinal, &before) != EPX_OK)
        return;
    pthread_mutex_lock(&backings_lock);
    pinned_t **at = pinned_find(base), *entry = *at;
    if (entry && --entry->users == 0) {
        *at = entry->next;
        (void)cudaHostUnregister(base);
        epx__free(entry);
    }
    pthread_mutex_unlock(&backings_lock);
    epx__cuda_leave(device->ordinal, before);
}

static epx_status_t words_alloc(epx__device_t *device, size_t count, uint64_t **words)
{
    epx__cuda_device_t *d = (epx__cuda_device_t *)device;
    int before;
    void *memory = NULL;
    EPX__TRY(epx__cuda_enter(device->ordinal, &before));
    cudaError_t error = cudaMalloc(&memory, count * sizeof **words);
    if (error == cudaSuccess)
        error = cudaMemsetAsync(memory, 0, count * sizeof **words, d->stream);
    if (error == cudaSuccess)
        error = cudaStreamSynchronize(d->stream);
    if (error != cudaSuccess)
        (void)cudaFree(memory);
    epx__cuda_leave(device->ordinal, before);
    if (error != cudaSuccess)
        return epx__cuda_fail(error, "GPU memory for tickets");
    *words = memory;
    return EPX_OK;
}

static void words_free(epx__device_t *device, uint64_t *words)
{
    int before;
    if (!words || epx__cuda_enter(device->ordinal, &before) != EPX_OK)
        return;
    (void)cudaFree(words);
    epx__cuda_leave(device->ordinal, before);
}

const epx__device_ops_t epx__device_cuda = {
    .name = "cuda",
    .backend = EPX_BACKEND_CUDA,
    .open = device_open,
    .close = device_close,
    .window_alloc = window_alloc,
    .window_free = window_free,
    .window_export = window_export,
    .window_map = window_map,
    .window_unmap = window_unmap,
    .window_attach = window_attach,
    .copy_in = copy,
    .copy_out = copy,
    .check_pointer = check_pointer,
    .host_pin = host_pin,
    .host_unpin = host_unpin,
    .words_alloc = words_alloc,
    .words_free = words_free,
};
