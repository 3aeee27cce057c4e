/* CUDA result codes as errors: the one place where they are told apart. Meanings: CUDA driver API
 * reference, section "Data types used by CUDA driver"; what the checkpoint calls answer is in
 * checkpoint.c. */
#include "gpu/driver.h"

#include <errno.h>
#include <stdio.h>

struct code {
    CUresult code;
    int err;
    const char *name, *words;
};

#define C(name, err, words)                                \
    {                                                      \
        CUDA_ERROR_##name, err, "CUDA_ERROR_" #name, words \
    }
static const struct code codes[] = {
    C(INVALID_VALUE, EINVAL, "the driver did not accept an argument"),
    C(OUT_OF_MEMORY, ENOMEM, "out of memory on the GPU, or of memory for the driver"),
    C(NOT_INITIALIZED, EIO, NULL),
    C(DEINITIALIZED, ESHUTDOWN, "the driver is shutting down"),
    C(STUB_LIBRARY, ENOSYS, "the library is a toolkit's stub, not the driver"),
    C(DEVICE_UNAVAILABLE, EBUSY,
      "the GPU is in exclusive or prohibited compute mode, or in use by somebody else"),
    C(NO_DEVICE, ENODEV, "no CUDA GPU"),
    C(INVALID_DEVICE, ENODEV, NULL),
    C(DEVICE_NOT_LICENSED, EPERM, "the GPU is not licensed for compute (vGPU)"),
    C(INVALID_CONTEXT, EIO, NULL),
    C(MAP_FAILED, EIO, NULL),
    C(UNMAP_FAILED, EIO, NULL),
    C(ALREADY_MAPPED, EEXIST, NULL),
    C(NOT_MAPPED, EINVAL, NULL),
    C(ECC_UNCORRECTABLE, EIO, "the GPU found an uncorrectable memory error: reset or replace it"),
    C(PEER_ACCESS_UNSUPPORTED, ENOTSUP, NULL),
    C(NVLINK_UNCORRECTABLE, EIO, "the GPU's NVLink failed: reset it"),
    C(CONTAINED, EIO, "the GPU contained a memory error: the process must be restarted"),
    C(OPERATING_SYSTEM, EIO, "a system call of the driver failed"),
    C(INVALID_HANDLE, EINVAL, NULL),
    C(ILLEGAL_STATE, EINVAL, "not possible in the present state"),
    C(NOT_FOUND, ENOENT, NULL),
    C(NOT_READY, EBUSY, NULL),
    C(ILLEGAL_ADDRESS, EFAULT, "an illegal address was used on the GPU: the context is lost"),
    C(LAUNCH_TIMEOUT, ETIMEDOUT, NULL),
    C(PRIMARY_CONTEXT_ACTIVE, EBUSY, NULL),
    C(CONTEXT_IS_DESTROYED, EIO, NULL),
    C(HOST_MEMORY_ALREADY_REGISTERED, EEXIST, NULL),
    C(HOST_MEMORY_NOT_REGISTERED, EINVAL, NULL),
    C(HARDWARE_STACK_ERROR, EIO, NULL),
    C(LAUNCH_FAILED, EIO, NULL),
    C(NOT_PERMITTED, EPERM, NULL),
    C(NOT_SUPPORTED, ENOTSUP, NULL),
    C(SYSTEM_NOT_READY, EAGAIN, "the system is not ready for CUDA: is nvidia-fabricmanager running?"),
    C(SYSTEM_DRIVER_MISMATCH, ELIBBAD,
      "the kernel module and libcuda.so.1 are of different versions: reboot, or reload it"),
    C(COMPAT_NOT_SUPPORTED_ON_DEVICE, ENOTSUP,
      "a forward-compatibility libcuda.so.1 does not support this GPU"),
    C(MPS_CONNECTION_FAILED, EIO, "the MPS control daemon does not answer"),
    C(MPS_RPC_FAILURE, EIO, NULL),
    C(MPS_SERVER_NOT_READY, EAGAIN, NULL),
    C(MPS_MAX_CLIENTS_REACHED, EUSERS, NULL),
    C(MPS_MAX_CONNECTIONS_REACHED, EUSERS, NULL),
    C(MPS_CLIENT_TERMINATED, EIO, NULL),
    C(TIMEOUT, ETIMEDOUT, NULL),
    C(EXTERNAL_DEVICE, EIO, NULL),
    C(UNKNOWN, EIO, "the driver gives no reason; the kernel log may (dmesg, look for NVRM or Xid)"),
};
#undef C

static const struct code *find(CUresult r)
{
    for (size_t i = 0; i < sizeof(codes) / sizeof(codes[0]); i++)
        if (codes[i].code == r)
            return &codes[i];
    return NULL;
}

int bn_cuda_errno(CUresult r)
{
    const struct code *c = find(r);
    return c ? c->err : EIO;
}

const char *bn_cuda_name(CUresult r, char buf[32])
{
    const struct code *c = find(r);
    if (c)
        return c->name;
    snprintf(buf, 32, "CUDA error %d", (int)r);
    return buf;
}

const char *bn_cuda_words(CUresult r)
{
    const struct code *c = find(r);
    return c ? c->words : NULL;
}

int bn_cuda_fail(struct bn_error *err, CUresult r, const char *stage, const char *fmt, ...)
{
    char text[BN_ERROR_TEXT_MAX], buf[32];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);

    const char *words = bn_cuda_words(r);
    return bn_error_set(err, bn_cuda_errno(r), stage, "%.300s: %s%s%s (%d)", text, words ? words : "",
                        words ? "; " : "", bn_cuda_name(r, buf), (int)r);
}
