/* SPDX-License-Identifier: MIT */
#include <stdio.h>
#include <string.h>

#include "sim.h"

bool ordinal_valid(int ordinal)
{
    return ordinal >= 0 && ordinal < sim.devices;
}

void device_uuid(int physical, CUuuid *out)
{
    /* Fixed, so that images and pairs of devices mean the same in every process; a machine name is part of it. */
    unsigned hash = 5381;

    for (const char *p = sim.machine; *p; p++)
        hash = hash * 33 + (unsigned char)*p;
    memset(out->bytes, 0, sizeof(out->bytes));
    memcpy(out->bytes, "SIMGPU", 6);
    memcpy(out->bytes + 8, &hash, 4);
    out->bytes[14] = 0x40;
    out->bytes[15] = (char)physical;
}

SIM_FN(cuDeviceGet, 0, (CUdevice * device, int ordinal), (device, ordinal))
{
    if (!device)
        return CUDA_ERROR_INVALID_VALUE;
    if (!ordinal_valid(ordinal))
        return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

SIM_FN(cuDeviceGetCount, 0, (int *count), (count))
{
    if (!count)
        return CUDA_ERROR_INVALID_VALUE;
    *count = sim.devices;
    return CUDA_SUCCESS;
}

SIM_FN(cuDeviceGetName, 0, (char *name, int len, CUdevice dev), (name, len, dev))
{
    if (!name || len <= 0)
        return CUDA_ERROR_INVALID_VALUE;
    if (!ordinal_valid(dev))
        return CUDA_ERROR_INVALID_DEVICE;
    snprintf(name, (size_t)len, "Simulated GPU");
    return CUDA_SUCCESS;
}

SIM_FN(cuDeviceGetUuid, 0, (CUuuid * uuid, CUdevice dev), (uuid, dev))
{
    if (!uuid)
        return CUDA_ERROR_INVALID_VALUE;
    if (!ordinal_valid(dev))
        return CUDA_ERROR_INVALID_DEVICE;
    device_uuid(sim.physical[dev], uuid);
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuDeviceGetUuid_v2, cuDeviceGetUuid);

SIM_FN(cuDeviceTotalMem, 0, (size_t * bytes, CUdevice dev), (bytes, dev))
{
    if (!bytes)
        return CUDA_ERROR_INVALID_VALUE;
    if (!ordinal_valid(dev))
        return CUDA_ERROR_INVALID_DEVICE;
    *bytes = sim.memory;
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuDeviceTotalMem_v2, cuDeviceTotalMem);

/* The bus id that this process saw at cuInit: the real one does not change it when devices are exchanged. */
SIM_FN(cuDeviceGetPCIBusId, 0, (char *id, int len, CUdevice dev), (id, len, dev))
{
    char text[16];

    if (!id || len <= 0)
        return CUDA_ERROR_INVALID_VALUE;
    if (!ordinal_valid(dev))
        return CUDA_ERROR_INVALID_DEVICE;
    if ((size_t)snprintf(text, sizeof(text), "0000:%02X:00.0", 0x10 + sim.shown[dev]) >= (size_t)len)
        return CUDA_ERROR_INVALID_VALUE;
    strcpy(id, text);
    return CUDA_SUCCESS;
}

SIM_FN(cuDeviceGetByPCIBusId, 0, (CUdevice * dev, const char *id), (dev, id))
{
    unsigned domain = 0, bus = 0;

    if (!dev || !id)
        return CUDA_ERROR_INVALID_VALUE;
    if (sscanf(id, "%x:%x:", &domain, &bus) != 2)
        return CUDA_ERROR_INVALID_VALUE;
    for (int i = 0; i < sim.devices; i++)
        if (domain == 0 && bus == 0x10u + (unsigned)sim.shown[i]) {
            *dev = i;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_DEVICE;
}

SIM_FN(cuDeviceComputeCapability, 0, (int *major, int *minor, CUdevice dev), (major, minor, dev))
{
    if (!major || !minor)
        return CUDA_ERROR_INVALID_VALUE;
    if (!ordinal_valid(dev))
        return CUDA_ERROR_INVALID_DEVICE;
    *major = 9;
    *minor = 0;
    return CUDA_SUCCESS;
}

static const struct {
    short attribute;
    int value;
} attributes[] = {
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 0x7fffffff},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49152},
    {CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY, 65536},
    {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
    {CU_DEVICE_ATTRIBUTE_MAX_PITCH, 0x7fffffff},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
    {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000},
    {CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT, 512},
    {CU_DEVICE_ATTRIBUTE_TEXTURE_PITCH_ALIGNMENT, 32},
    {CU_DEVICE_ATTRIBUTE_GPU_OVERLAP, 1},
    {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
    {CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 1},
    {CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS, 1},
    {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 2619000},
    {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 5120},
    {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 50 << 20},
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 2048},
    {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 3},
    {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
    {CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR, 65536},
    {CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY, 1},
    {CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS, 1},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_PREEMPTION_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, 1},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 232448},
    {CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR, 32},
    {CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK, 1024},
    {CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, 0},
    {CU_DEVICE_ATTRIBUTE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_UNIFIED_FUNCTION_POINTERS, 1},
};

SIM_FN(cuDeviceGetAttribute, 0, (int *value, CUdevice_attribute attribute, CUdevice dev),
       (value, attribute, dev))
{
    if (!value)
        return CUDA_ERROR_INVALID_VALUE;
    if (!ordinal_valid(dev))
        return CUDA_ERROR_INVALID_DEVICE;
    if ((int)attribute < 1 || (int)attribute > 1000)
        return CUDA_ERROR_INVALID_VALUE;
    *value = 0;
    if (attribute == CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)
        *value = 0x10 + sim.shown[dev];
    if (attribute == CU_DEVICE_ATTRIBUTE_MPS_ENABLED)
        *value = sim.mps;
    for (size_t i = 0; i < sizeof(attributes) / sizeof(attributes[0]); i++)
        if (attributes[i].attribute == (int)attribute)
            *value = attributes[i].value;
    return CUDA_SUCCESS;
}

SIM_FN(cuDeviceCanAccessPeer, 0, (int *can, CUdevice dev, CUdevice peer), (can, dev, peer))
{
    if (!can)
        return CUDA_ERROR_INVALID_VALUE;
    if (!ordinal_valid(dev) || !ordinal_valid(peer))
        return CUDA_ERROR_INVALID_DEVICE;
    *can = dev != peer;
    return CUDA_SUCCESS;
}

SIM_FN(cuDeviceGetP2PAttribute, 0, (int *value, CUdevice_P2PAttribute attribute, CUdevice a, CUdevice b),
       (value, attribute, a, b))
{
    if (!value)
        return CUDA_ERROR_INVALID_VALUE;
    if (!ordinal_valid(a) || !ordinal_valid(b) || a == b)
        return CUDA_ERROR_INVALID_DEVICE;
    *value = attribute != CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK;
    return CUDA_SUCCESS;
}

/* ---- Names of errors ---- */

#define ERRORS(X)                                                                                         \
    X(CUDA_SUCCESS, "no error")                                                                           \
    X(CUDA_ERROR_INVALID_VALUE, "invalid argument")                                                       \
    X(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")                                                          \
    X(CUDA_ERROR_NOT_INITIALIZED, "initialization error")                                                 \
    X(CUDA_ERROR_DEINITIALIZED, "driver shutting down")                                                   \
    X(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected")                                         \
    X(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal")                                                \
    X(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid")                                         \
    X(CUDA_ERROR_INVALID_CONTEXT, "invalid device context")                                               \
    X(CUDA_ERROR_MAP_FAILED, "mapping of buffer object failed")                                           \
    X(CUDA_ERROR_ALREADY_MAPPED, "resource already mapped")                                               \
    X(CUDA_ERROR_NOT_MAPPED, "resource not mapped")                                                       \
    X(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, "peer access is not supported between these two devices")       \
    X(CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed")                                             \
    X(CUDA_ERROR_OPERATING_SYSTEM, "OS call failed or operation not supported on this OS")                \
    X(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle")                                               \
    X(CUDA_ERROR_ILLEGAL_STATE, "the operation cannot be performed in the present state")                 \
    X(CUDA_ERROR_NOT_FOUND, "named symbol not found")                                                     \
    X(CUDA_ERROR_NOT_READY, "device not ready")                                                           \
    X(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered")                             \
    X(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, "peer access is already enabled")                           \
    X(CUDA_ERROR_PEER_ACCESS_NOT_ENABLED, "peer access has not been enabled")                             \
    X(CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE, "cannot set while device is active in this process")             \
    X(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed")                                            \
    X(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,                                                          \
      "part or all of the requested memory range is already mapped")                                      \
    X(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "pointer does not correspond to a registered memory region") \
    X(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure")                                             \
    X(CUDA_ERROR_NOT_PERMITTED, "operation not permitted")                                                \
    X(CUDA_ERROR_NOT_SUPPORTED, "operation not supported")                                                \
    X(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing")          \
    X(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture")   \
    X(CUDA_ERROR_TIMEOUT, "wait operation timed out")                                                     \
    X(CUDA_ERROR_UNKNOWN, "unknown error")

static bool error_texts(CUresult code, const char **name, const char **text)
{
    switch (code) {
#define X(error, words) \
    case error:         \
        *name = #error; \
        *text = words;  \
        return true;
        ERRORS(X)
#undef X
    default: return false;
    }
}

SIM_FN(cuGetErrorName, CALL_EARLY | CALL_UNGATED, (CUresult error, const char **out), (error, out))
{
    const char *text;

    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    *out = NULL;
    return error_texts(error, out, &text) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

SIM_FN(cuGetErrorString, CALL_EARLY | CALL_UNGATED, (CUresult error, const char **out), (error, out))
{
    const char *name;

    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    *out = NULL;
    return error_texts(error, &name, out) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
