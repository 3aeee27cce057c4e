/* SPDX-License-Identifier: MIT */
/* The driver as an ordinary program gets it, by dlopen of libcuda.so.1, and what the benchmark's programs share: sizes, times, and
 * commands that come line by line through a FIFO. */
#pragma once

#include "gpu/cuda_types.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define DRIVER_FUNCTIONS(X)                                                                             \
    X(cuInit, unsigned)                                                                                 \
    X(cuDeviceGet, CUdevice *, int)                                                                     \
    X(cuDevicePrimaryCtxRetain, CUcontext *, CUdevice)                                                  \
    X(cuCtxSetCurrent, CUcontext)                                                                       \
    X(cuCtxSynchronize, void)                                                                           \
    X(cuMemAlloc_v2, CUdeviceptr *, size_t)                                                             \
    X(cuMemFree_v2, CUdeviceptr)                                                                        \
    X(cuMemcpyDtoH_v2, void *, CUdeviceptr, size_t)                                                     \
    X(cuMemcpyDtoDAsync_v2, CUdeviceptr, CUdeviceptr, size_t, CUstream)                                 \
    X(cuMemsetD8_v2, CUdeviceptr, unsigned char, size_t)                                                \
    X(cuModuleLoadData, CUmodule *, const void *)                                                       \
    X(cuModuleGetFunction, CUfunction *, CUmodule, const char *)                                        \
    X(cuLaunchKernel, CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, \
      CUstream, void **, void **)                                                                       \
    X(cuCheckpointProcessLock, int, CUcheckpointLockArgs *)                                             \
    X(cuCheckpointProcessCheckpoint, int, CUcheckpointCheckpointArgs *)                                 \
    X(cuCheckpointProcessRestore, int, CUcheckpointRestoreArgs *)                                       \
    X(cuCheckpointProcessUnlock, int, CUcheckpointUnlockArgs *)

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

static inline void must_(CUresult result, const char *what)
{
    if (result == CUDA_SUCCESS)
        return;
    fprintf(stderr, "%s: CUDA error %d\n", what, (int)result);
    exit(1);
}
#define MUST(call) must_(call, #call)

/* The primary context of device 0, current. */
static inline void driver_context(void)
{
    CUdevice device;
    CUcontext ctx;
    MUST(cuInit(0));
    MUST(cuDeviceGet(&device, 0));
    MUST(cuDevicePrimaryCtxRetain(&ctx, device));
    MUST(cuCtxSetCurrent(ctx));
}

/* A module of a PTX file. */
static inline CUmodule driver_module(const char *path)
{
    static char text[1 << 20];
    CUmodule module;
    FILE *f = fopen(path, "re");
    if (!f || fread(text, 1, sizeof(text) - 1, f) == 0) {
        fprintf(stderr, "cannot read %s\n", path);
        exit(2);
    }
    fclose(f);
    MUST(cuModuleLoadData(&module, text));
    return module;
}

static inline double seconds(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

/* 16M, 1G, … in powers of 1024. */
static inline uint64_t parse_size(const char *s)
{
    char *end;
    uint64_t v = strtoull(s, &end, 10);
    switch (*end) {
    case 'K': return v << 10;
    case 'M': return v << 20;
    case 'G': return v << 30;
    default: return v;
    }
}

/* The next line of the FIFO, without its end; false when nobody can write it any more. Opened for both directions, so that
 * a writer that closes it ends nothing. */
static inline bool next_command(const char *fifo, char *line, int size)
{
    static FILE *f;
    if (!f && !(f = fopen(fifo, "r+e"))) {
        perror(fifo);
        exit(2);
    }
    if (!fgets(line, size, f))
        return false;
    line[strcspn(line, "\n")] = 0;
    return true;
}
