/* Inside src/gpu only: the opened driver, its functions, contexts, and CUDA codes as errors. */
#pragma once

#include "gpu/cuda_types.h"
#include "gpu/gpu.h"

#include <pthread.h>

#define BN_GPU_DEVICES_MAX 64u

/* name of the field, name of the symbol, parameters. The versioned symbols are the ones a program compiled
 * against cuda.h 12 binds to; all of those under NEED exist since CUDA 11.2. */
#define BN_DRIVER_NEED(F)                                                                               \
    F(Init, cuInit, (unsigned flags))                                                                   \
    F(DriverGetVersion, cuDriverGetVersion, (int *version))                                             \
    F(DeviceGetCount, cuDeviceGetCount, (int *count))                                                   \
    F(DeviceGet, cuDeviceGet, (CUdevice * dev, int ordinal))                                            \
    F(DeviceGetName, cuDeviceGetName, (char *name, int len, CUdevice dev))                              \
    F(DeviceGetUuid, cuDeviceGetUuid, (CUuuid * uuid, CUdevice dev))                                    \
    F(DeviceTotalMem, cuDeviceTotalMem_v2, (size_t * bytes, CUdevice dev))                              \
    F(DeviceGetAttribute, cuDeviceGetAttribute, (int *value, CUdevice_attribute attr, CUdevice dev))    \
    F(DeviceGetPCIBusId, cuDeviceGetPCIBusId, (char *id, int len, CUdevice dev))                        \
    F(DevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain, (CUcontext * ctx, CUdevice dev))                \
    F(DevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2, (CUdevice dev))                            \
    F(DevicePrimaryCtxSetFlags, cuDevicePrimaryCtxSetFlags_v2, (CUdevice dev, unsigned flags))          \
    F(CtxPushCurrent, cuCtxPushCurrent_v2, (CUcontext ctx))                                             \
    F(CtxPopCurrent, cuCtxPopCurrent_v2, (CUcontext * ctx))                                             \
    F(MemGetInfo, cuMemGetInfo_v2, (size_t * free_bytes, size_t * total))                               \
    F(MemCreate, cuMemCreate,                                                                           \
      (CUmemGenericAllocationHandle * handle, size_t size, const CUmemAllocationProp *prop,             \
       unsigned long long flags))                                                                       \
    F(MemRelease, cuMemRelease, (CUmemGenericAllocationHandle handle))                                  \
    F(MemExport, cuMemExportToShareableHandle,                                                          \
      (void *out, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType type,                  \
       unsigned long long flags))                                                                       \
    F(MemImport, cuMemImportFromShareableHandle,                                                        \
      (CUmemGenericAllocationHandle * handle, void *os_handle, CUmemAllocationHandleType type))         \
    F(MemAddressReserve, cuMemAddressReserve,                                                           \
      (CUdeviceptr * ptr, size_t size, size_t alignment, CUdeviceptr addr, unsigned long long flags))   \
    F(MemAddressFree, cuMemAddressFree, (CUdeviceptr ptr, size_t size))                                 \
    F(MemMap, cuMemMap,                                                                                 \
      (CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle handle,                \
       unsigned long long flags))                                                                       \
    F(MemUnmap, cuMemUnmap, (CUdeviceptr ptr, size_t size))                                             \
    F(MemSetAccess, cuMemSetAccess,                                                                     \
      (CUdeviceptr ptr, size_t size, const CUmemAccessDesc *desc, size_t count))                        \
    F(MemHostRegister, cuMemHostRegister_v2, (void *ptr, size_t size, unsigned flags))                  \
    F(MemHostUnregister, cuMemHostUnregister, (void *ptr))                                              \
    F(MemcpyDtoHAsync, cuMemcpyDtoHAsync_v2, (void *dst, CUdeviceptr src, size_t len, CUstream stream)) \
    F(MemcpyHtoDAsync, cuMemcpyHtoDAsync_v2,                                                            \
      (CUdeviceptr dst, const void *src, size_t len, CUstream stream))                                  \
    F(MemcpyDtoDAsync, cuMemcpyDtoDAsync_v2,                                                            \
      (CUdeviceptr dst, CUdeviceptr src, size_t len, CUstream stream))                                  \
    F(StreamCreate, cuStreamCreate, (CUstream * stream, unsigned flags))                                \
    F(StreamDestroy, cuStreamDestroy_v2, (CUstream stream))                                             \
    F(StreamSynchronize, cuStreamSynchronize, (CUstream stream))                                        \
    F(EventCreate, cuEventCreate, (CUevent * event, unsigned flags))                                    \
    F(EventDestroy, cuEventDestroy_v2, (CUevent event))                                                 \
    F(EventRecord, cuEventRecord, (CUevent event, CUstream stream))                                     \
    F(EventSynchronize, cuEventSynchronize, (CUevent event))

/* The first four, for kernels, are in every driver; the checkpoint calls in 570 and newer. */
#define BN_DRIVER_WANT(F)                                                                               \
    F(ModuleLoadData, cuModuleLoadData, (CUmodule * module, const void *image))                         \
    F(ModuleUnload, cuModuleUnload, (CUmodule module))                                                  \
    F(ModuleGetFunction, cuModuleGetFunction, (CUfunction * f, CUmodule module, const char *name))      \
    F(LaunchKernel, cuLaunchKernel,                                                                     \
      (CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,      \
       unsigned shared, CUstream stream, void **params, void **extra))                                  \
    F(CheckpointGetState, cuCheckpointProcessGetState, (int pid, CUprocessState *state))                \
    F(CheckpointGetThread, cuCheckpointProcessGetRestoreThreadId, (int pid, int *tid))                  \
    F(CheckpointLock, cuCheckpointProcessLock, (int pid, CUcheckpointLockArgs *args))                   \
    F(CheckpointCheckpoint, cuCheckpointProcessCheckpoint, (int pid, CUcheckpointCheckpointArgs *args)) \
    F(CheckpointRestore, cuCheckpointProcessRestore, (int pid, CUcheckpointRestoreArgs *args))          \
    F(CheckpointUnlock, cuCheckpointProcessUnlock, (int pid, CUcheckpointUnlockArgs *args))

struct bn_driver {
#define BN_FIELD(name, symbol, params) CUresult(*name) params;
    BN_DRIVER_NEED(BN_FIELD)
    BN_DRIVER_WANT(BN_FIELD)
#undef BN_FIELD
};

struct bn_gpu_device {
    struct bn_gpu_info info;
    CUdevice cu;
    pthread_mutex_t lock;           /* of ctx, hashing, and making lanes */
    CUcontext ctx;                  /* primary, retained; NULL until first needed */
    struct bn_gpu_lanes *lanes;     /* lanes.c; made with the context */
    struct bn_gpu_hashing *hashing; /* hash.c; NULL until first needed */
};

struct bn_gpu {
    void *lib;
    char *path;
    struct bn_driver cu;
    unsigned version;
    bool simulated;
    unsigned count;
    struct bn_gpu_device *devices;
};

/* Make the device's context current for this thread, until bn_gpu_leave. */
int bn_gpu_enter(struct bn_gpu *gpu, unsigned dev, const char *stage, struct bn_error *err);
void bn_gpu_leave(struct bn_gpu *gpu);

/* A device that has its context already, or 0. For what is the same on every device. */
unsigned bn_gpu_any_warm(struct bn_gpu *gpu);

/* ---- What threads that copy work with (lanes.c) --------------------------------------------------------- */

struct bn_gpu_lanes;

struct bn_gpu_lane {
    CUstream stream; /* others may use it at the same time */
    CUevent events[2];
    unsigned *users;
    struct bn_gpu_lane *next;
};

/* With the context current. `in`: it is to copy from the host to the device. Neither waits nor takes device memory. */
CUresult bn_gpu_lane_take(struct bn_gpu *gpu, unsigned dev, bool in, struct bn_gpu_lane **out);
/* Nothing of what was put into the stream may be under way. NULL is allowed. */
void bn_gpu_lane_return(struct bn_gpu *gpu, unsigned dev, struct bn_gpu_lane *lane);

/* With the context current, by the one who makes it. */
CUresult bn_gpu_lanes_make(struct bn_gpu *gpu, unsigned dev);
void bn_gpu_lanes_free(struct bn_gpu *gpu, unsigned dev);
/* Copy a little through each stream, once: what the driver makes at the first use is there afterwards. A failure does not matter. */
void bn_gpu_lanes_use(struct bn_gpu *gpu, unsigned dev);

/* Free what hash.c holds on the device; before its context goes. */
void bn_gpu_hash_free(struct bn_gpu *gpu, unsigned dev);

/* pthread_create with every signal blocked, as a library's threads should be. 0 or negative errno. */
int bn_gpu_thread(pthread_t *thread, void *(*run)(void *), void *arg);

/* ---- CUDA codes (cuda_error.c) ------------------------------------------------------------------------- */

/* Positive errno for a code; never 0. */
int bn_cuda_errno(CUresult r);
/* "CUDA_ERROR_OUT_OF_MEMORY", or "CUDA error 1234" for one we have no name for. */
const char *bn_cuda_name(CUresult r, char buf[32]);
/* What the code means, in words; NULL when the name says it all. */
const char *bn_cuda_words(CUresult r);
/* Fills err: the formatted text, then what the code means and its name. Returns a negative errno. */
int bn_cuda_fail(struct bn_error *err, CUresult r, const char *stage, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));

/* ---- What copies need of the pool ---------------------------------------------------------------------- */

/* As bn_mem_piece, but *len also stops where one registration ends: the driver refuses a copy across two. */
void *bn_mem_dma_piece(const struct bn_mem *mem, uint64_t off, uint64_t *len);
