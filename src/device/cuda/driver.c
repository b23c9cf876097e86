/*
 * The driver, as far as cudart does not reach: found at run time, so that this plug-in loads on machines without one
 * and can say what is missing.
 */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "base/fail.h"
#include "device/cuda/cuda_device.h"

static epx__cuda_driver_t driver;
static bool usable;
static char why_text[256];

static bool take(const char *name, unsigned int version, void *slot)
{
    void *entry = NULL;
    enum cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, version, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || !entry) {
        snprintf(why_text, sizeof why_text, "the NVIDIA driver has no %s (%s); a driver for CUDA 12 or newer has", name,
                 cudaGetErrorString(error));
        return false;
    }
    memcpy(slot, &entry, sizeof entry);
    return true;
}

static bool take_all(void)
{
    return take("cuMemCreate", 10020, &driver.mem_create) && take("cuMemRelease", 10020, &driver.mem_release) &&
           take("cuMemGetAllocationGranularity", 10020, &driver.mem_granularity) &&
           take("cuMemExportToShareableHandle", 10020, &driver.mem_export) &&
           take("cuMemImportFromShareableHandle", 10020, &driver.mem_import) &&
           take("cuMemAddressReserve", 10020, &driver.address_reserve) &&
           take("cuMemAddressFree", 10020, &driver.address_free) && take("cuMemMap", 10020, &driver.mem_map) &&
           take("cuMemUnmap", 10020, &driver.mem_unmap) && take("cuMemSetAccess", 10020, &driver.mem_set_access) &&
           take("cuDeviceGetAttribute", 2000, &driver.device_attribute) &&
           take("cuGetErrorString", 6000, &driver.error_string);
}

static void look(void)
{
    int version = 0, runtime = 0, devices = 0;
    cudaError_t error = cudaDriverGetVersion(&version);
    cudaRuntimeGetVersion(&runtime);
    if (error != cudaSuccess || version == 0) {
        snprintf(why_text, sizeof why_text, "no NVIDIA driver (libcuda.so.1) was found");
        return;
    }
    error = cudaGetDeviceCount(&devices);
    if (error != cudaSuccess || devices == 0) {
        snprintf(why_text, sizeof why_text, "no usable GPU: %s (driver for CUDA %d.%d, this plug-in needs %d.x)",
                 error == cudaSuccess ? "none is visible" : cudaGetErrorString(error), version / 1000,
                 version / 10 % 100, runtime / 1000);
        (void)cudaGetLastError();
        return;
    }
    if (!take_all())
        return;
    snprintf(why_text, sizeof why_text, "%d GPU%s, driver for CUDA %d.%d", devices, devices == 1 ? "" : "s",
             version / 1000, version / 10 % 100);
    usable = true;
}

const epx__cuda_driver_t *epx__cuda_driver(const char **why)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, look);
    if (why)
        *why = why_text;
    return usable ? &driver : NULL;
}

epx_status_t epx__cuda_fail(cudaError_t error, const char *what)
{
    (void)cudaGetLastError(); /* ours: not the caller's to find */
    return epx__fail(error == cudaErrorMemoryAllocation ? EPX_E_NOMEM : EPX_E_DEVICE, "%s: %s", what,
                     cudaGetErrorString(error));
}

epx_status_t epx__cuda_driver_fail(CUresult result, const char *what)
{
    const char *text = NULL;
    if (!usable || driver.error_string(result, &text) != CUDA_SUCCESS || !text)
        text = "unknown error";
    return epx__fail(result == CUDA_ERROR_OUT_OF_MEMORY ? EPX_E_NOMEM : EPX_E_DEVICE, "%s: %s (%d)", what, text,
                     (int)result);
}

epx_status_t epx__cuda_enter(int ordinal, int *before)
{
    cudaError_t error = cudaGetDevice(before);
    if (error == cudaSuccess)
        error = cudaSetDevice(ordinal); /* also when it is already: a new thread has no context before */
    return error == cudaSuccess ? EPX_OK : epx__cuda_fail(error, "choosing the GPU");
}

void epx__cuda_leave(int ordinal, int before)
{
    if (before != ordinal)
        (void)cudaSetDevice(before);
}
