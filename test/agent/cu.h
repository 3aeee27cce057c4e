/* CUDA driver functions taken from a library by path, with the types that the agent's table has. */
#pragma once

#include "agent/api/api_table.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CU_FUNCTIONS(X)                       \
    X(cuInit)                                 \
    X(cuDriverGetVersion)                     \
    X(cuDeviceGetCount)                       \
    X(cuCtxCreate_v2)                         \
    X(cuCtxDestroy_v2)                        \
    X(cuCtxSetCurrent)                        \
    X(cuCtxPopCurrent_v2)                     \
    X(cuCtxGetCurrent)                        \
    X(cuCtxGetDevice)                         \
    X(cuCtxSynchronize)                       \
    X(cuCtxEnablePeerAccess)                  \
    X(cuCtxDisablePeerAccess)                 \
    X(cuDevicePrimaryCtxRetain)               \
    X(cuDevicePrimaryCtxRelease_v2)           \
    X(cuDevicePrimaryCtxReset_v2)             \
    X(cuGreenCtxCreate)                       \
    X(cuGreenCtxDestroy)                      \
    X(cuCtxFromGreenCtx)                      \
    X(cuMemAlloc_v2)                          \
    X(cuMemFree_v2)                           \
    X(cuMemAllocAsync)                        \
    X(cuMemAllocPitch_v2)                     \
    X(cuMemAllocManaged)                      \
    X(cuMemGetInfo_v2)                        \
    X(cuMemGetAddressRange_v2)                \
    X(cuMemcpyHtoD_v2)                        \
    X(cuMemcpyDtoH_v2)                        \
    X(cuMemcpyDtoD_v2)                        \
    X(cuMemsetD8_v2)                          \
    X(cuMemsetD32_v2)                         \
    X(cuPointerGetAttribute)                  \
    X(cuPointerGetAttributes)                 \
    X(cuPointerSetAttribute)                  \
    X(cuMemGetHandleForAddressRange)          \
    X(cuMemAddressReserve)                    \
    X(cuMemAddressFree)                       \
    X(cuMemCreate)                            \
    X(cuMemRelease)                           \
    X(cuMemMap)                               \
    X(cuMemUnmap)                             \
    X(cuMemSetAccess)                         \
    X(cuMemGetAccess)                         \
    X(cuMemRetainAllocationHandle)            \
    X(cuMemExportToShareableHandle)           \
    X(cuMemImportFromShareableHandle)         \
    X(cuMemGetAllocationPropertiesFromHandle) \
    X(cuIpcGetMemHandle)                      \
    X(cuIpcOpenMemHandle_v2)                  \
    X(cuIpcCloseMemHandle)                    \
    X(cuStreamCreate)                         \
    X(cuStreamDestroy_v2)                     \
    X(cuStreamSynchronize)                    \
    X(cuLaunchHostFunc)                       \
    X(cuStreamBeginCapture_v2)                \
    X(cuStreamEndCapture)                     \
    X(cuGraphDestroy)                         \
    X(cuGetProcAddress_v2)

struct cu {
    void *library;
#define X(name) bn_pfn_##name name;
    CU_FUNCTIONS(X)
#undef X
};

/* Exits the program when the library cannot be opened; functions that it lacks are NULL. */
static inline void cu_load(struct cu *cu, const char *path, int flags)
{
    cu->library = dlopen(path, flags);
    if (!cu->library) {
        fprintf(stderr, "cannot open %s: %s\n", path, dlerror());
        exit(1);
    }
#define X(name) cu->name = (bn_pfn_##name)dlsym(cu->library, #name);
    CU_FUNCTIONS(X)
#undef X
}

static inline const char *need_env(const char *name)
{
    const char *value = getenv(name);
    if (!value || !value[0]) {
        fprintf(stderr, "%s is not set\n", name);
        exit(1);
    }
    return value;
}

/* The n-th 32-bit word that block `seed` must hold. */
static inline uint32_t pattern(uint32_t seed, size_t n)
{
    uint64_t x = (uint64_t)seed * 0x9e3779b97f4a7c15ULL + n * 0xbf58476d1ce4e5b9ULL;
    return (uint32_t)((x ^ (x >> 31)) * 0x94d049bb133111ebULL >> 32);
}
