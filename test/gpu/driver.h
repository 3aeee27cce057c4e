/* SPDX-License-Identifier: MIT */
/* The driver as an ordinary program gets it: by dlopen of libcuda.so.1, function by function. These programs know nothing of
 * Bennu. */
#pragma once

#include "gpu/cuda_types.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#define DRIVER_FUNCTIONS(X)                                                                                 \
    X(cuInit, unsigned)                                                                                     \
    X(cuDeviceGet, CUdevice *, int)                                                                         \
    X(cuDeviceGetCount, int *)                                                                              \
    X(cuDeviceGetAttribute, int *, int, CUdevice)                                                           \
    X(cuDevicePrimaryCtxRetain, CUcontext *, CUdevice)                                                      \
    X(cuDevicePrimaryCtxRelease_v2, CUdevice)                                                               \
    X(cuDevicePrimaryCtxReset_v2, CUdevice)                                                                 \
    X(cuDevicePrimaryCtxGetState, CUdevice, unsigned *, int *)                                              \
    X(cuCtxCreate_v2, CUcontext *, unsigned, CUdevice)                                                      \
    X(cuCtxDestroy_v2, CUcontext)                                                                           \
    X(cuCtxSetCurrent, CUcontext)                                                                           \
    X(cuCtxGetCurrent, CUcontext *)                                                                         \
    X(cuCtxPushCurrent_v2, CUcontext)                                                                       \
    X(cuCtxPopCurrent_v2, CUcontext *)                                                                      \
    X(cuCtxSynchronize, void)                                                                               \
    X(cuCtxEnablePeerAccess, CUcontext, unsigned)                                                           \
    X(cuDeviceCanAccessPeer, int *, CUdevice, CUdevice)                                                     \
    X(cuMemAlloc_v2, CUdeviceptr *, size_t)                                                                 \
    X(cuMemAllocPitch_v2, CUdeviceptr *, size_t *, size_t, size_t, unsigned)                                \
    X(cuMemFree_v2, CUdeviceptr)                                                                            \
    X(cuMemGetInfo_v2, size_t *, size_t *)                                                                  \
    X(cuMemGetAddressRange_v2, CUdeviceptr *, size_t *, CUdeviceptr)                                        \
    X(cuMemAllocAsync, CUdeviceptr *, size_t, CUstream)                                                     \
    X(cuMemFreeAsync, CUdeviceptr, CUstream)                                                                \
    X(cuMemHostAlloc, void **, size_t, unsigned)                                                            \
    X(cuMemFreeHost, void *)                                                                                \
    X(cuMemcpyHtoD_v2, CUdeviceptr, const void *, size_t)                                                   \
    X(cuMemcpyDtoH_v2, void *, CUdeviceptr, size_t)                                                         \
    X(cuMemcpyDtoD_v2, CUdeviceptr, CUdeviceptr, size_t)                                                    \
    X(cuMemcpyHtoDAsync_v2, CUdeviceptr, const void *, size_t, CUstream)                                    \
    X(cuMemcpyDtoHAsync_v2, void *, CUdeviceptr, size_t, CUstream)                                          \
    X(cuMemsetD8_v2, CUdeviceptr, unsigned char, size_t)                                                    \
    X(cuMemsetD8Async, CUdeviceptr, unsigned char, size_t, CUstream)                                        \
    X(cuPointerGetAttribute, void *, int, CUdeviceptr)                                                      \
    X(cuPointerGetAttributes, unsigned, int *, void **, CUdeviceptr)                                        \
    X(cuPointerSetAttribute, const void *, int, CUdeviceptr)                                                \
    X(cuMemGetAllocationGranularity, size_t *, const CUmemAllocationProp *, int)                            \
    X(cuMemAddressReserve, CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long)                  \
    X(cuMemAddressFree, CUdeviceptr, size_t)                                                                \
    X(cuMemCreate, CUmemGenericAllocationHandle *, size_t, const CUmemAllocationProp *, unsigned long long) \
    X(cuMemRelease, CUmemGenericAllocationHandle)                                                           \
    X(cuMemMap, CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long)              \
    X(cuMemUnmap, CUdeviceptr, size_t)                                                                      \
    X(cuMemSetAccess, CUdeviceptr, size_t, const CUmemAccessDesc *, size_t)                                 \
    X(cuMemGetAccess, unsigned long long *, const CUmemLocation *, CUdeviceptr)                             \
    X(cuMemRetainAllocationHandle, CUmemGenericAllocationHandle *, void *)                                  \
    X(cuMemGetAllocationPropertiesFromHandle, CUmemAllocationProp *, CUmemGenericAllocationHandle)          \
    X(cuMemExportToShareableHandle, void *, CUmemGenericAllocationHandle, int, unsigned long long)          \
    X(cuIpcGetMemHandle, CUipcMemHandle *, CUdeviceptr)                                                     \
    X(cuStreamCreate, CUstream *, unsigned)                                                                 \
    X(cuStreamDestroy_v2, CUstream)                                                                         \
    X(cuStreamSynchronize, CUstream)                                                                        \
    X(cuStreamWaitEvent, CUstream, CUevent, unsigned)                                                       \
    X(cuStreamBeginCapture_v2, CUstream, int)                                                               \
    X(cuStreamEndCapture, CUstream, CUgraph *)                                                              \
    X(cuGraphInstantiateWithFlags, CUgraphExec *, CUgraph, unsigned long long)                              \
    X(cuGraphLaunch, CUgraphExec, CUstream)                                                                 \
    X(cuGraphExecDestroy, CUgraphExec)                                                                      \
    X(cuGraphDestroy, CUgraph)                                                                              \
    X(cuEventCreate, CUevent *, unsigned)                                                                   \
    X(cuEventDestroy_v2, CUevent)                                                                           \
    X(cuEventRecord, CUevent, CUstream)                                                                     \
    X(cuEventSynchronize, CUevent)                                                                          \
    X(cuEventElapsedTime, float *, CUevent, CUevent)                                                        \
    X(cuModuleLoadData, CUmodule *, const void *)                                                           \
    X(cuModuleUnload, CUmodule)                                                                             \
    X(cuModuleGetFunction, CUfunction *, CUmodule, const char *)                                            \
    X(cuModuleGetGlobal_v2, CUdeviceptr *, size_t *, CUmodule, const char *)                                \
    X(cuLaunchKernel, CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,     \
      CUstream, void **, void **)

#define DRIVER_POINTER(name, ...) static CUresult (*name)(__VA_ARGS__) __attribute__((unused));
DRIVER_FUNCTIONS(DRIVER_POINTER)
#undef DRIVER_POINTER

/* Fills the pointers above; one that the driver lacks stays NULL. Ends the program where there is no driver. */
static inline void driver_open(void)
{
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    if (!lib) {
        fprintf(stderr, "%s\n", dlerror());
        exit(2);
    }
#define DRIVER_LOOK_UP(name, ...) *(void **)&name = dlsym(lib, #name);
    DRIVER_FUNCTIONS(DRIVER_LOOK_UP)
#undef DRIVER_LOOK_UP
}

/* A text file as a C string; ends the program where it cannot be read. Never freed. */
static inline char *driver_read_text(const char *path)
{
    FILE *f = fopen(path, "re");
    char *text = f ? calloc(1, 1 << 20) : NULL;
    if (!text || fread(text, 1, (1 << 20) - 1, f) == 0) {
        fprintf(stderr, "cannot read %s\n", path);
        exit(2);
    }
    fclose(f);
    return text;
}
