/* SPDX-License-Identifier: MIT */
/* The driver API for programs that are checkpointed: libcuda.so.1 opened at run time, as CUDA's own runtime does, so that each
 * of them runs on the simulated and on a real driver, with the agent and without. */
#pragma once

#include "agent/api/api_table.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CR_FUNCTIONS(X)               \
    X(cuInit)                         \
    X(cuDeviceGet)                    \
    X(cuDevicePrimaryCtxRetain)       \
    X(cuCtxSetCurrent)                \
    X(cuMemAlloc_v2)                  \
    X(cuMemAllocPitch_v2)             \
    X(cuMemAllocManaged)              \
    X(cuMemFree_v2)                   \
    X(cuMemHostAlloc)                 \
    X(cuMemcpyHtoD_v2)                \
    X(cuMemcpyDtoH_v2)                \
    X(cuMemcpyHtoDAsync_v2)           \
    X(cuMemAddressReserve)            \
    X(cuMemCreate)                    \
    X(cuMemMap)                       \
    X(cuMemSetAccess)                 \
    X(cuMemRelease)                   \
    X(cuMemExportToShareableHandle)   \
    X(cuMemImportFromShareableHandle) \
    X(cuIpcCloseMemHandle)            \
    X(cuIpcGetMemHandle)              \
    X(cuIpcOpenMemHandle_v2)          \
    X(cuModuleLoadData)               \
    X(cuModuleGetFunction)            \
    X(cuModuleGetGlobal_v2)           \
    X(cuLaunchKernel)                 \
    X(cuStreamCreate)                 \
    X(cuStreamQuery)                  \
    X(cuStreamSynchronize)            \
    X(cuStreamWaitEvent)              \
    X(cuStreamBeginCapture_v2)        \
    X(cuStreamEndCapture)             \
    X(cuGraphInstantiateWithFlags)    \
    X(cuGraphLaunch)                  \
    X(cuEventCreate)                  \
    X(cuEventRecord)                  \
    X(cuEventQuery)

struct cr_cuda {
#define X(name) bn_pfn_##name name;
    CR_FUNCTIONS(X)
#undef X
    CUmodule module;
};

static struct cr_cuda cu;

__attribute__((format(printf, 1, 2), noreturn)) static void cr_die(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fprintf(stderr, "%s[%d]: ", program_invocation_short_name, (int)getpid());
    vfprintf(stderr, fmt, ap);
    fputc('\n', stderr);
    va_end(ap);
    exit(1);
}

static inline void cr_must(CUresult r, const char *what)
{
    if (r != CUDA_SUCCESS)
        cr_die("%s: CUDA error %d", what, (int)r);
}

#define MUST(call) cr_must(cu.call, #call)

/* A context on `device` and the test kernels. CR_KERNELS in the environment names them where the build folder is elsewhere. */
static inline void cr_open(int device)
{
    static char text[65536];
    const char *path = getenv("CR_KERNELS");
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver)
        cr_die("%s", dlerror());
#define X(name)                                    \
    cu.name = (bn_pfn_##name)dlsym(driver, #name); \
    if (!cu.name)                                  \
        cr_die("the driver has no " #name);
    CR_FUNCTIONS(X)
#undef X
    if (!path)
        path = CR_KERNELS;
    FILE *f = fopen(path, "re");
    if (!f || fread(text, 1, sizeof(text) - 1, f) == 0)
        cr_die("cannot read %s", path);
    fclose(f);
    CUdevice dev;
    CUcontext ctx;
    MUST(cuInit(0));
    MUST(cuDeviceGet(&dev, device));
    MUST(cuDevicePrimaryCtxRetain(&ctx, dev));
    MUST(cuCtxSetCurrent(ctx));
    MUST(cuModuleLoadData(&cu.module, text));
}

static inline CUfunction cr_kernel(const char *name)
{
    CUfunction f;
    cr_must(cu.cuModuleGetFunction(&f, cu.module, name), name);
    return f;
}

static inline uint64_t cr_mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}
