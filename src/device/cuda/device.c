/*
 * GPU memory as a device: opening a GPU, copies, pointers, and host memory that kernels see. Its windows are in
 * windows.c.
 */
#include <pthread.h>

#include "base/alloc.h"
#include "base/env.h"
#include "base/fail.h"
#include "device/cuda/cuda_device.h"

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
    static const char *const ways[] = {"auto", "fd", "fabric", NULL}; /* as epx__handles_t has them */
    const char *why;
    int devices = 0, handles = EPX__HANDLES_AUTO;
    EPX__TRY(epx__env_choice(EPX__ENV_CUDA_HANDLES, ways, &handles));
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
    epx__cuda_fabric_look(d, (epx__handles_t)handles);
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

static pthread_mutex_t pinned_lock = PTHREAD_MUTEX_INITIALIZER;
static pinned_t *pinned_all; /* under pinned_lock */

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
    pthread_mutex_lock(&pinned_lock);
    pinned_t *there = *pinned_find(base);
    if (there)
        there->users++;
    else
        status = pin_first(base, bytes, entry);
    pthread_mutex_unlock(&pinned_lock);
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
    pthread_mutex_lock(&pinned_lock);
    pinned_t **at = pinned_find(base), *entry = *at;
    if (entry && --entry->users == 0) {
        *at = entry->next;
        (void)cudaHostUnregister(base);
        epx__free(entry);
    }
    pthread_mutex_unlock(&pinned_lock);
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
    .window_alloc = epx__cuda_window_alloc,
    .window_free = epx__cuda_window_free,
    .window_export = epx__cuda_window_export,
    .window_map = epx__cuda_window_map,
    .window_unmap = epx__cuda_window_unmap,
    .window_attach = epx__cuda_window_attach,
    .copy_in = copy,
    .copy_out = copy,
    .check_pointer = check_pointer,
    .host_pin = host_pin,
    .host_unpin = host_unpin,
    .words_alloc = words_alloc,
    .words_free = words_free,
};
