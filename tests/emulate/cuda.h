/* The driver's types that cuda_device.h names; nothing calls the driver here. */
#ifndef EPX_TEST_CUDA_H
#define EPX_TEST_CUDA_H
typedef int CUresult, CUdevice_attribute, CUdevice, CUmemAllocationHandleType, CUmemAllocationGranularity_flags;
typedef unsigned long long CUmemGenericAllocationHandle, CUdeviceptr;
typedef struct CUmemAllocationProp CUmemAllocationProp;
typedef struct CUmemAccessDesc CUmemAccessDesc;
#endif
