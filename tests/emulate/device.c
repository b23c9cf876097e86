/* The emulated GPU: CPU memory that says it is a GPU's, and the parts of src/device/cuda that the exchange calls. */
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/alloc.h"
#include "base/env.h"
#include "base/fail.h"
#include "device/cuda/cuda_device.h"

/*
 * Multiprocessors. One number: all ranks share a GPU with that many. A list: each rank has a GPU of its own, with one
 * of them, another one each time, so that every way of dealing out roles occurs.
 */
static int choose_sms(int rank, bool *own)
{
    static unsigned opened[64];
    const char *list = getenv("EPX_EMULATE_SMS");
    int sms[16], count = 0;
    for (char *end; list && *list && count < 16; list = *end == ',' ? end + 1 : end)
        sms[count++] = (int)strtol(list, &end, 10);
    *own = count > 1;
    if (count == 0)
        return 40;
    unsigned before = __atomic_fetch_add(&opened[rank % 64], 1, __ATOMIC_RELAXED);
    return sms[((unsigned)rank + before) % (unsigned)count];
}

/*
 * Fabric handles: the exporter's process and descriptor, opened under /proc. EPX_EMULATE_FABRIC=0: refused, as without
 * an IMEX channel. EPX_EMULATE_HOSTS: every rank's windows say that they are on a host of their own.
 */
typedef struct emulated {
    epx__cuda_device_t d;
    int rank;
} emulated_t;

typedef struct emulated_handle {
    int32_t zero, pid, fd;
} emulated_handle_t;

static bool says_0(const char *variable)
{
    const char *value = getenv(variable);
    return value && value[0] == '0';
}

static epx_status_t window_export(epx__device_t *device, const epx__window_t *window, epx__export_t *export_)
{
    const emulated_t *e = (const emulated_t *)device;
    emulated_handle_t handle = {.pid = (int32_t)getpid(), .fd = window->fd};
    memcpy(export_->blob, &handle, sizeof handle);
    export_->blob_refused = e->d.refused;
    export_->blob_kind = e->d.refused ? EPX__BLOB_NONE : EPX__BLOB_FABRIC;
    if (getenv("EPX_EMULATE_HOSTS"))
        export_->host += 1 + (uint64_t)e->rank;
    return EPX_OK;
}

static epx_status_t window_map(epx__device_t *device, const epx__export_t *export_, int fd, void **mapped)
{
    emulated_handle_t handle;
    char path[64];
    if (fd >= 0)
        return epx__device_cpu.window_map(device, export_, fd, mapped);
    if (export_->blob_kind != EPX__BLOB_FABRIC)
        return epx__fail(EPX_E_UNSUPPORTED, "the peer's GPU window has no fabric handle: emulated (%d)",
                         (int)export_->blob_refused);
    memcpy(&handle, export_->blob, sizeof handle);
    snprintf(path, sizeof path, "/proc/%d/fd/%d", (int)handle.pid, (int)handle.fd);
    fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return epx__fail(EPX_E_UNSUPPORTED, "the emulated fabric handle %s cannot be opened", path);
    epx_status_t status = epx__device_cpu.window_map(device, export_, fd, mapped);
    close(fd);
    return status;
}

static epx_status_t open_device(int ordinal, epx__device_t **device)
{
    static const char *const ways[] = {"auto", "fd", "fabric", NULL};
    int rank = ordinal < 0 ? -1 - ordinal : ordinal; /* of the domain */
    int handles = EPX__HANDLES_AUTO;
    bool own;
    EPX__TRY(epx__env_choice(EPX__ENV_CUDA_HANDLES, ways, &handles));
    emulated_t *made = epx__calloc(1, sizeof *made);
    if (!made)
        return epx__fail(EPX_E_NOMEM, "no memory for a device object");
    const char *shared = getenv("EPX_EMULATE_SHARED");
    epx__cuda_device_t *d = &made->d;
    made->rank = rank;
    d->base.ops = &epx__device_cuda;
    d->sms = choose_sms(rank, &own);
    d->base.ordinal = own ? rank : 0;
    d->major = EMU_BULK ? 9 : 8;
    d->shared_max = shared ? atoi(shared) : 16384; /* the less, the fewer warps a block */
    d->base.handles = (epx__handles_t)handles;
    d->refused = says_0("EPX_EMULATE_FABRIC") ? CUDA_ERROR_NOT_PERMITTED : 0;
    if (handles == EPX__HANDLES_FABRIC)
        d->base.windows_why =
            d->refused ? "no fabric handles: emulated" : "by fabric handle between processes, emulated";
    *device = &d->base;
    return EPX_OK;
}

static void close_device(epx__device_t *device)
{
    epx__free(device);
}

#define TO_CPU(result, name, arguments, values)                                                                        \
    static result name arguments                                                                                       \
    {                                                                                                                  \
        return epx__device_cpu.name values;                                                                            \
    }
TO_CPU(epx_status_t, window_alloc, (epx__device_t * d, size_t bytes, epx__window_t *w), (d, bytes, w))
TO_CPU(void, window_free, (epx__device_t * d, epx__window_t *w), (d, w))
TO_CPU(void, window_unmap, (epx__device_t * d, const epx__export_t *e, void *m), (d, e, m))
TO_CPU(epx_status_t, window_attach, (epx__device_t * d, const epx__export_t *e, void **m), (d, e, m))
TO_CPU(epx_status_t, copy_in, (epx__device_t * d, void *to, const void *from, size_t bytes), (d, to, from, bytes))
TO_CPU(epx_status_t, copy_out, (epx__device_t * d, void *to, const void *from, size_t bytes), (d, to, from, bytes))
TO_CPU(epx_status_t, check_pointer, (epx__device_t * d, const void *p, const char *what), (d, p, what))
TO_CPU(epx_status_t, host_pin, (epx__device_t * d, void *base, size_t bytes), (d, base, bytes))
TO_CPU(void, host_unpin, (epx__device_t * d, void *base), (d, base))
TO_CPU(epx_status_t, words_alloc, (epx__device_t * d, size_t count, uint64_t **words), (d, count, words))
TO_CPU(void, words_free, (epx__device_t * d, uint64_t *words), (d, words))

const epx__device_ops_t epx__device_cuda = {
    .name = "cuda",
    .backend = EPX_BACKEND_CUDA,
    .open = open_device,
    .close = close_device,
    .window_alloc = window_alloc,
    .window_free = window_free,
    .window_export = window_export,
    .window_map = window_map,
    .window_unmap = window_unmap,
    .window_attach = window_attach,
    .copy_in = copy_in,
    .copy_out = copy_out,
    .check_pointer = check_pointer,
    .host_pin = host_pin,
    .host_unpin = host_unpin,
    .words_alloc = words_alloc,
    .words_free = words_free,
};

const epx__cuda_driver_t *epx__cuda_driver(const char **why)
{
    static const epx__cuda_driver_t none;
    if (why)
        *why = "an emulated GPU";
    return &none;
}
epx_status_t epx__cuda_fail(cudaError_t error, const char *what)
{
    return epx__fail(EPX_E_DEVICE, "%s: %s", what, cudaGetErrorString(error));
}
epx_status_t epx__cuda_enter(int ordinal, int *before)
{
    *before = ordinal;
    return EPX_OK;
}
void epx__cuda_leave(int ordinal, int before)
{
    (void)ordinal;
    (void)before;
}
