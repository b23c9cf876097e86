/* The CUDA device: what the plug-in's host files share. */
#ifndef EPX_DEVICE_CUDA_CUDA_DEVICE_H
#define EPX_DEVICE_CUDA_CUDA_DEVICE_H

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "device/device.h"

/* The driver's functions that cudart does not have, taken once by cudaGetDriverEntryPointByVersion. */
typedef struct epx__cuda_driver {
    CUresult (*mem_create)(CUmemGenericAllocationHandle *, size_t, const CUmemAllocationProp *, unsigned long long);
    CUresult (*mem_release)(CUmemGenericAllocationHandle);
    CUresult (*mem_granularity)(size_t *, const CUmemAllocationProp *, CUmemAllocationGranularity_flags);
    CUresult (*mem_export)(void *, CUmemGenericAllocationHandle, CUmemAllocationHandleType, unsigned long long);
    CUresult (*mem_import)(CUmemGenericAllocationHandle *, void *, CUmemAllocationHandleType);
    CUresult (*address_reserve)(CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long);
    CUresult (*address_free)(CUdeviceptr, size_t);
    CUresult (*mem_map)(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long);
    CUresult (*mem_unmap)(CUdeviceptr, size_t);
    CUresult (*mem_set_access)(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t);
    CUresult (*device_attribute)(int *, CUdevice_attribute, CUdevice);
    CUresult (*error_string)(CUresult, const char **);
} epx__cuda_driver_t;

typedef struct epx__cuda_device {
    epx__device_t base;
    int sms, major, minor;
    int shared_max;      /* bytes a block may ask for */
    cudaStream_t stream; /* for set-up copies; never waits for the caller's streams */
    int32_t refused;     /* why its windows have no fabric handles; 0: they have, so far */
    char windows_why[224];
} epx__cuda_device_t;

/* NULL, in words, when there is no driver, it is too old, or no GPU. The answer is kept. */
const epx__cuda_driver_t *epx__cuda_driver(const char **why);

/* Fail with the runtime's or the driver's text: "what: text". */
epx_status_t epx__cuda_fail(cudaError_t error, const char *what);
epx_status_t epx__cuda_driver_fail(CUresult result, const char *what);

/* Make `ordinal` this thread's device, and put back what was. */
epx_status_t epx__cuda_enter(int ordinal, int *before);
void epx__cuda_leave(int ordinal, int before);

extern const epx__device_ops_t epx__device_cuda;

/* Physical memory of a GPU, under a handle of this process. */
typedef struct epx__cuda_memory {
    CUmemGenericAllocationHandle handle;
    size_t bytes;    /* as the driver deals it out */
    int32_t refused; /* why it has no fabric handle; 0: it has one */
} epx__cuda_memory_t;

/* Handles to other processes (fabric.c): what this GPU has of them, and the words in base.windows_why. */
void epx__cuda_fabric_look(epx__cuda_device_t *d, epx__handles_t handles);
/* At least `bytes`, to be exported as a descriptor, and as a fabric handle if the driver lets it. */
epx_status_t epx__cuda_memory_create(epx__cuda_device_t *d, size_t bytes, epx__cuda_memory_t *memory);
/* Fill the blob, or say there why not. */
void epx__cuda_fabric_export(epx__cuda_device_t *d, epx__cuda_memory_t *memory, epx__export_t *export_);
/* The caller releases the handle. EPX_E_UNSUPPORTED in words: there is none, or not for this process. */
epx_status_t epx__cuda_fabric_import(const epx__export_t *export_, CUmemGenericAllocationHandle *handle);

/* Windows (windows.c), as device.h says of them. */
epx_status_t epx__cuda_window_alloc(epx__device_t *device, size_t bytes, epx__window_t *window);
void epx__cuda_window_free(epx__device_t *device, epx__window_t *window);
epx_status_t epx__cuda_window_export(epx__device_t *device, const epx__window_t *window, epx__export_t *export_);
epx_status_t epx__cuda_window_map(epx__device_t *device, const epx__export_t *export_, int fd, void **mapped);
void epx__cuda_window_unmap(epx__device_t *device, const epx__export_t *export_, void *mapped);
epx_status_t epx__cuda_window_attach(epx__device_t *device, const epx__export_t *export_, void **mapped);

#endif
