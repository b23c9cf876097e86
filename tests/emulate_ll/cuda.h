/* The driver's types that src/device/cuda/cuda_device.h names; nothing of it is called. See emulate.h. */
#ifndef EPX_EMULATE_CUDA_H
#define EPX_EMULATE_CUDA_H
typedef int CUresult, CUdevice, CUdevice_attribute, CUmemAllocationHandleType, CUmemAllocationGranularity_flags;
typedef unsigned long long CUmemGenericAllocationHandle, CUdeviceptr;
typedef struct CUmemAllocationProp CUmemAllocationProp;
typedef struct CUmemAccessDesc CUmemAccessDesc;
#endif
