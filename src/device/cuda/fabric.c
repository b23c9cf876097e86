/*
 * Handles by which GPU memory leaves its process.
 *
 * A POSIX descriptor leads to the processes of this host. A fabric handle, 64 opaque bytes, leads to every GPU of the
 * same NVLink domain, on other hosts too where NVLink spans them, for processes that may use the same IMEX channel (a
 * device file in /dev/nvidia-caps-imex-channels that an administrator makes). What memory may be exported as is settled
 * when it is allocated. So a window asks for both, and for less where the driver refuses; nothing is lost by asking.
 * Why there is no fabric handle is kept: for epx info, and in the export, for a peer that would need it.
 *
 * Which of the two a peer takes is decided in src/device/window.c: a descriptor on one host, a fabric handle between
 * hosts, and always a fabric handle with EPX_CUDA_HANDLES=fabric, which is how one host tries this file. Between hosts
 * it has never run: there was no machine. What is known of it there:
 *
 *  - Inside one domain peers reach nothing but each other's GPU windows, so a domain may span hosts. Several domains
 *    may not: ranks of a domain share the rails' pinned host memory (src/api/rails.c). src/plan/topology.h cuts them.
 *  - Importing is a call into the driver, which asks another host; no deadline of ours bounds it. The others do not
 * wait longer than theirs.
 *  - On one host a mapping keeps the memory of a process that died. What reading and writing does when a host of the
 *    domain dies is the driver's to say: count on the survivors' GPU failing (EPX_E_DEVICE), not on masks.
 */
#include <stdio.h>
#include <string.h>

#include "base/fail.h"
#include "device/cuda/cuda_device.h"

/* Beside the driver's own numbers, which are positive, as reasons for no fabric handle. */
enum { NOT_WANTED = -1, NO_SUPPORT = -2 };

_Static_assert(sizeof(CUmemFabricHandle) == sizeof(((epx__export_t *)0)->blob), "a fabric handle fills the blob");

static const epx__cuda_driver_t *driver(void)
{
    return epx__cuda_driver(NULL);
}

static const char *error_text(CUresult result)
{
    const char *text = NULL;
    return driver()->error_string(result, &text) == CUDA_SUCCESS && text ? text : "unknown error";
}

static void reason(int32_t refused, char *words, size_t room)
{
    if (refused == NOT_WANTED)
        snprintf(words, room, "EPX_CUDA_HANDLES=fd there");
    else if (refused == NO_SUPPORT)
        snprintf(words, room, "the GPU or its driver has none");
    else
        snprintf(words, room, "the driver refused: %s (%d)%s", error_text((CUresult)refused), (int)refused,
                 refused == CUDA_ERROR_NOT_PERMITTED ? ", no IMEX channel?" : "");
}

static void say(epx__cuda_device_t *d)
{
    char why[128] = "";
    bool asked = d->base.handles == EPX__HANDLES_FABRIC;
    if (d->refused)
        reason(d->refused, why, sizeof why);
    if (d->base.handles == EPX__HANDLES_FD)
        snprintf(d->windows_why, sizeof d->windows_why, "by descriptor, as EPX_CUDA_HANDLES asks");
    else if (d->refused)
        snprintf(d->windows_why, sizeof d->windows_why, "no fabric handles%s: %s",
                 asked ? ", which EPX_CUDA_HANDLES asks for" : "", why);
    else
        snprintf(d->windows_why, sizeof d->windows_why, "%s",
                 asked ? "by fabric handle between processes, as EPX_CUDA_HANDLES asks"
                       : "by descriptor on one host, by fabric handle between hosts");
    d->base.windows_why = d->windows_why;
}

void epx__cuda_fabric_look(epx__cuda_device_t *d, epx__handles_t handles)
{
    int fabric = 0;
    driver()->device_attribute(&fabric, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED, d->base.ordinal);
    d->base.handles = handles;
    d->refused = handles == EPX__HANDLES_FD ? NOT_WANTED : fabric ? 0 : NO_SUPPORT;
    say(d);
}

/* From now on: it would be refused again. */
static void give_up(epx__cuda_device_t *d, int32_t refused)
{
    d->refused = refused;
    say(d);
}

/* ---- allocating ---- */

static CUmemAllocationProp properties(int ordinal, unsigned types, bool rdma)
{
    CUmemAllocationProp p;
    memset(&p, 0, sizeof p);
    p.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    p.requestedHandleTypes = (CUmemAllocationHandleType)types;
    p.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    p.location.id = ordinal;
    p.allocFlags.gpuDirectRDMACapable = rdma;
    return p;
}

/* Sizes are in units that depend on the properties, the kinds of handles among them. */
static CUresult create(const epx__cuda_device_t *d, unsigned types, bool rdma, size_t bytes, epx__cuda_memory_t *memory)
{
    CUmemAllocationProp p = properties(d->base.ordinal, types, rdma);
    size_t grain = 0;
    CUresult result = driver()->mem_granularity(&grain, &p, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
    if (result == CUDA_SUCCESS && grain == 0)
        result = CUDA_ERROR_INVALID_VALUE;
    if (result != CUDA_SUCCESS)
        return result;
    memory->bytes = (bytes + grain - 1) / grain * grain;
    return driver()->mem_create(&memory->handle, memory->bytes, &p, 0);
}

/* So that a network may register it, where that is possible. */
static CUresult create_for_rdma(const epx__cuda_device_t *d, unsigned types, size_t bytes, epx__cuda_memory_t *memory)
{
    int rdma = 0;
    driver()->device_attribute(&rdma, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED, d->base.ordinal);
    CUresult result = rdma ? create(d, types, true, bytes, memory) : CUDA_ERROR_NOT_SUPPORTED;
    return result == CUDA_SUCCESS ? result : create(d, types, false, bytes, memory);
}

epx_status_t epx__cuda_memory_create(epx__cuda_device_t *d, size_t bytes, epx__cuda_memory_t *memory)
{
    const unsigned descriptor = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    memory->refused = d->refused;
    if (!d->refused) {
        CUresult result = create_for_rdma(d, descriptor | CU_MEM_HANDLE_TYPE_FABRIC, bytes, memory);
        if (result == CUDA_SUCCESS)
            return EPX_OK;
        memory->refused = (int32_t)result;
    }
    CUresult result = create_for_rdma(d, descriptor, bytes, memory);
    if (result != CUDA_SUCCESS)
        return epx__cuda_driver_fail(result, "GPU memory for a window (lease_bytes and reserve_bytes say how much)");
    if (!d->refused && memory->refused != (int32_t)CUDA_ERROR_OUT_OF_MEMORY)
        give_up(d, memory->refused);
    return EPX_OK;
}

/* ---- to and from a peer ---- */

void epx__cuda_fabric_export(epx__cuda_device_t *d, epx__cuda_memory_t *memory, epx__export_t *export_)
{
    CUmemFabricHandle fabric;
    memset(&fabric, 0, sizeof fabric);
    if (!memory->refused) {
        CUresult result = driver()->mem_export(&fabric, memory->handle, CU_MEM_HANDLE_TYPE_FABRIC, 0);
        if (result != CUDA_SUCCESS) {
            memory->refused = (int32_t)result;
            give_up(d, memory->refused);
        }
    }
    export_->blob_kind = memory->refused ? EPX__BLOB_NONE : EPX__BLOB_FABRIC;
    export_->blob_refused = memory->refused;
    if (!memory->refused)
        memcpy(export_->blob, &fabric, sizeof fabric);
}

epx_status_t epx__cuda_fabric_import(const epx__export_t *export_, CUmemGenericAllocationHandle *handle)
{
    CUmemFabricHandle fabric;
    if (export_->blob_kind != EPX__BLOB_FABRIC) {
        char why[128];
        reason(export_->blob_refused, why, sizeof why);
        return epx__fail(EPX_E_UNSUPPORTED, "the peer's GPU window has no fabric handle: %s", why);
    }
    memcpy(&fabric, export_->blob, sizeof fabric);
    CUresult result = driver()->mem_import(handle, &fabric, CU_MEM_HANDLE_TYPE_FABRIC);
    if (result == CUDA_SUCCESS)
        return EPX_OK;
    return epx__fail(result == CUDA_ERROR_OUT_OF_MEMORY ? EPX_E_NOMEM : EPX_E_UNSUPPORTED,
                     "the fabric handle of the peer's window cannot be imported: %s (%d)%s", error_text(result),
                     (int)result,
                     result == CUDA_ERROR_NOT_PERMITTED ? "; both processes need access to one IMEX channel" : "");
}
