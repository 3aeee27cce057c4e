/* SPDX-License-Identifier: MIT */

/* cuGetProcAddress: names without a version give the newest that the CUDA version asked for has. */

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "sim.h"

/* From which CUDA version on a suffix is what the plain name means, where it is not 4000. */
static const struct {
    const char *name;
    int version;
} since[] = {
    {"cuCtxCreate_v2", 3020},
    {"cuCtxCreate_v3", 11040},
    {"cuCtxCreate_v4", 12050},
    {"cuCtxGetDevice_v2", 13000},
    {"cuCtxSynchronize_v2", 13000},
    {"cuDeviceGetUuid_v2", 11040},
    {"cuDevicePrimaryCtxRelease_v2", 11000},
    {"cuDevicePrimaryCtxReset_v2", 11000},
    {"cuDevicePrimaryCtxSetFlags_v2", 11000},
    {"cuEventElapsedTime_v2", 12080},
    {"cuGetProcAddress_v2", 12000},
    {"cuGraphInstantiate_v2", 11000},
    {"cuIpcOpenMemHandle_v2", 11000},
    {"cuMemAdvise_v2", 13000},
    {"cuMemPrefetchAsync_v2", 13000},
    {"cuMemHostRegister_v2", 6050},
    {"cuStreamBeginCapture_v2", 10010},
    {"cuStreamGetCaptureInfo_v2", 11030},
    {"cuStreamGetCaptureInfo_v3", 12030},
    {"cuStreamGetCtx_v2", 12050},
    {"cuLaunchHostFunc_v2", 1000000}, /* newer than this driver */
};

static void *self;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void open_self(void)
{
    Dl_info info;

    /* This very file, whoever else is loaded under the name libcuda.so.1. */
    if (dladdr((void *)&sim, &info) && info.dli_fname)
        self = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
}

static void *find(const char *name, const char *suffix, const char *stream_suffix)
{
    char full[160];

    if ((size_t)snprintf(full, sizeof(full), "%s%s%s", name, suffix, stream_suffix) >= sizeof(full))
        return NULL;
    return dlsym(self, full);
}

static int version_of(const char *name, const char *suffix)
{
    char full[160];

    snprintf(full, sizeof(full), "%s%s", name, suffix);
    for (size_t i = 0; i < sizeof(since) / sizeof(since[0]); i++)
        if (strcmp(since[i].name, full) == 0)
            return since[i].version;
    return suffix[0] ? 4000 : 0;
}

static CUresult lookup(const char *name, void **out, int version, cuuint64_t flags,
                       CUdriverProcAddressQueryResult *status)
{
    static const char *const suffixes[] = {"_v4", "_v3", "_v2", ""};
    bool per_thread = flags & CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM, any = false;

    if (!name || !out || flags > 2)
        return CUDA_ERROR_INVALID_VALUE;
    *out = NULL;
    pthread_once(&once, open_self);
    /* Not the C library's names, which dlsym would find as well. */
    if (strcmp(name, "cuGraphInstantiate") == 0 && version >= 12000)
        name = "cuGraphInstantiateWithFlags"; /* what the plain name means since then */
    bool ours = self && strncmp(name, "cu", 2) == 0;

    for (size_t i = 0; ours && i < sizeof(suffixes) / sizeof(suffixes[0]) && !*out; i++) {
        void *plain = find(name, suffixes[i], "");

        any = any || plain;
        if (!plain || version_of(name, suffixes[i]) > version)
            continue;
        if (per_thread) {
            *out = find(name, suffixes[i], "_ptsz");
            if (!*out)
                *out = find(name, suffixes[i], "_ptds");
        }
        if (!*out)
            *out = plain;
    }
    if (status)
        *status = *out  ? CU_GET_PROC_ADDRESS_SUCCESS
                  : any ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
                        : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *out ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

SIM_EXPORT CUresult cuGetProcAddress(const char *name, void **out, int version, cuuint64_t flags);
SIM_EXPORT CUresult cuGetProcAddress(const char *name, void **out, int version, cuuint64_t flags)
{
    return lookup(name, out, version, flags, NULL);
}

SIM_EXPORT CUresult cuGetProcAddress_v2(const char *name, void **out, int version, cuuint64_t flags,
                                        CUdriverProcAddressQueryResult *status);
SIM_EXPORT CUresult cuGetProcAddress_v2(const char *name, void **out, int version, cuuint64_t flags,
                                        CUdriverProcAddressQueryResult *status)
{
    CUresult rc = lookup(name, out, version, flags, status);

    /* This form reports what was not found by the status alone, when there is one. */
    return status && rc == CUDA_ERROR_NOT_FOUND ? CUDA_SUCCESS : rc;
}
