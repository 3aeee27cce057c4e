/* Finding, loading and starting the driver. */
#include "gpu/driver.h"

#include "base/cleanup.h"

#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define STAGE "driver"

/* Exported by Bennu's own stand-in (src/agent), and by the simulated driver (sim). */
#define AGENT_MARK "bn_agent_version"
#define SIM_MARK "cuda_sim_version"

/* Where distributions put it, for when the name alone leads to our own stand-in. */
static const char *const usual_places[] = {
#if defined(__x86_64__)
    "/usr/lib/x86_64-linux-gnu/libcuda.so.1",
#elif defined(__aarch64__)
    "/usr/lib/aarch64-linux-gnu/libcuda.so.1",
#endif
    "/usr/lib64/libcuda.so.1",
    "/usr/lib/libcuda.so.1",
    "/usr/local/nvidia/lib64/libcuda.so.1",
    "/usr/local/cuda/compat/libcuda.so.1",
    "/run/opengl-driver/lib/libcuda.so.1",
    "/usr/lib/wsl/lib/libcuda.so.1",
};

enum verdict { GOOD, ABSENT, OURS };

static enum verdict try_load(const char *name, void **lib, char reason[256])
{
    void *l = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!l) {
        const char *e = dlerror();
        snprintf(reason, 256, "%s", e ? e : "unknown reason");
        return ABSENT;
    }
    if (dlsym(l, AGENT_MARK)) {
        dlclose(l);
        return OURS;
    }
    *lib = l;
    return GOOD;
}

static int load(const char *path, void **lib, struct bn_error *err)
{
    char reason[256] = "";
    switch (try_load(path ? path : "libcuda.so.1", lib, reason)) {
    case GOOD: return 0;
    case ABSENT:
        if (path)
            return bn_error_set(err, ENOENT, STAGE, "The driver %s cannot be loaded: %s.", path, reason);
        return bn_error_set(err, ENOENT, STAGE,
                            "No NVIDIA driver here: libcuda.so.1 cannot be loaded (%s). Install the driver, "
                            "or name its file.",
                            reason);
    case OURS: break;
    }
    if (path)
        return bn_error_set(err, EINVAL, STAGE, "%s is Bennu's stand-in for applications, not a driver.",
                            path);
    for (size_t i = 0; i < BN_ARRAY_SIZE(usual_places); i++)
        if (try_load(usual_places[i], lib, reason) == GOOD)
            return 0;
    return bn_error_set(err, ENOENT, STAGE,
                        "libcuda.so.1 leads to Bennu's own stand-in (LD_PRELOAD or LD_LIBRARY_PATH is set), "
                        "and the driver is in "
                        "none of the usual places. Name its file.");
}

static int resolve(struct bn_gpu *gpu, struct bn_error *err)
{
    const char *missing = NULL;
#define NEED(name, symbol, params)                      \
    *(void **)&gpu->cu.name = dlsym(gpu->lib, #symbol); \
    if (!gpu->cu.name && !missing)                      \
        missing = #symbol;
    BN_DRIVER_NEED(NEED)
#undef NEED
#define WANT(name, symbol, params) *(void **)&gpu->cu.name = dlsym(gpu->lib, #symbol);
    BN_DRIVER_WANT(WANT)
#undef WANT
    if (missing)
        return bn_error_set(
            err, ENOSYS, STAGE,
            "The driver %s is too old for Bennu: it has no %s. Driver 570 or newer is needed.", gpu->path,
            missing);
    return 0;
}

static int start(struct bn_gpu *gpu, int *count, struct bn_error *err)
{
    CUresult r = gpu->cu.Init(0);
    if (r == CUDA_ERROR_NO_DEVICE)
        return bn_error_set(
            err, ENODEV, STAGE,
            "The driver finds no GPU (%s). Is CUDA_VISIBLE_DEVICES set, or are the device files "
            "/dev/nvidia* missing here?",
            gpu->path);
    if (r != CUDA_SUCCESS)
        return bn_cuda_fail(err, r, STAGE, "The driver %s does not start", gpu->path);
    int version = 0;
    if ((r = gpu->cu.DriverGetVersion(&version)) != CUDA_SUCCESS)
        return bn_cuda_fail(err, r, STAGE, "The driver %s does not tell its version", gpu->path);
    if ((r = gpu->cu.DeviceGetCount(count)) != CUDA_SUCCESS)
        return bn_cuda_fail(err, r, STAGE, "The driver %s does not tell its GPUs", gpu->path);
    if (*count <= 0)
        return bn_error_set(err, ENODEV, STAGE, "The driver finds no GPU (%s).", gpu->path);
    gpu->version = version > 0 ? (unsigned)version : 0;
    return 0;
}

static bool attribute(struct bn_gpu *gpu, CUdevice dev, CUdevice_attribute attr)
{
    int v = 0;
    return gpu->cu.DeviceGetAttribute(&v, attr, dev) == CUDA_SUCCESS && v != 0;
}

static CUresult read_device(struct bn_gpu *gpu, unsigned i)
{
    struct bn_gpu_device *d = &gpu->devices[i];
    struct bn_gpu_info *info = &d->info;
    CUuuid uuid;
    size_t total = 0;
    int major = 0, minor = 0;
    CUresult r;

    if ((r = gpu->cu.DeviceGet(&d->cu, (int)i)) != CUDA_SUCCESS ||
        (r = gpu->cu.DeviceGetUuid(&uuid, d->cu)) != CUDA_SUCCESS ||
        (r = gpu->cu.DeviceTotalMem(&total, d->cu)) != CUDA_SUCCESS ||
        (r = gpu->cu.DeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, d->cu)) !=
            CUDA_SUCCESS ||
        (r = gpu->cu.DeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, d->cu)) !=
            CUDA_SUCCESS ||
        (r = gpu->cu.DeviceGetName(info->name, (int)sizeof(info->name) - 1, d->cu)) != CUDA_SUCCESS ||
        (r = gpu->cu.DeviceGetPCIBusId(info->pci, (int)sizeof(info->pci) - 1, d->cu)) != CUDA_SUCCESS)
        return r;
    memcpy(info->uuid, uuid.bytes, sizeof(info->uuid));
    info->major = (unsigned)major;
    info->minor = (unsigned)minor;
    info->total = total;
    info->shareable = attribute(gpu, d->cu, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) &&
                      attribute(gpu, d->cu, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
    info->rdma = attribute(gpu, d->cu, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED);
    info->compression = attribute(gpu, d->cu, CU_DEVICE_ATTRIBUTE_GENERIC_COMPRESSION_SUPPORTED);
    return CUDA_SUCCESS;
}

static int read_devices(struct bn_gpu *gpu, int count, struct bn_error *err)
{
    if ((unsigned)count > BN_GPU_DEVICES_MAX)
        count = (int)BN_GPU_DEVICES_MAX;
    gpu->devices = calloc((size_t)count, sizeof(*gpu->devices));
    if (!gpu->devices)
        return bn_error_set(err, ENOMEM, STAGE, "Out of memory.");
    for (unsigned i = 0; i < (unsigned)count; i++) {
        pthread_mutex_init(&gpu->devices[i].lock, NULL);
        gpu->count = i + 1;
        CUresult r = read_device(gpu, i);
        if (r != CUDA_SUCCESS)
            return bn_cuda_fail(err, r, STAGE, "GPU %u cannot be asked for its properties", i);
    }
    return 0;
}

int bn_gpu_open(const char *driver_path, struct bn_gpu **out, struct bn_error *err)
{
    struct bn_gpu *gpu = calloc(1, sizeof(*gpu));
    if (!gpu)
        return bn_error_set(err, ENOMEM, STAGE, "Out of memory.");

    int count = 0;
    int r = load(driver_path, &gpu->lib, err);
    if (r == 0) {
        Dl_info where;
        void *init = dlsym(gpu->lib, "cuInit");
        const char *path = init && dladdr(init, &where) && where.dli_fname ? where.dli_fname
                           : driver_path                                   ? driver_path
                                                                           : "libcuda.so.1";
        gpu->path = strdup(path);
        gpu->simulated = dlsym(gpu->lib, SIM_MARK) != NULL;
        r = gpu->path ? resolve(gpu, err) : bn_error_set(err, ENOMEM, STAGE, "Out of memory.");
    }
    if (r == 0)
        r = start(gpu, &count, err);
    if (r == 0)
        r = read_devices(gpu, count, err);
    if (r < 0) {
        bn_gpu_close(gpu);
        return r;
    }
    *out = gpu;
    return 0;
}

void bn_gpu_close(struct bn_gpu *gpu)
{
    if (!gpu)
        return;
    for (unsigned i = 0; i < gpu->count;
         i++) /* all of them first: their pinned memory belongs to every device */
        bn_gpu_hash_free(gpu, i);
    for (unsigned i = 0; i < gpu->count; i++) {
        if (gpu->devices[i].ctx) {
            bool entered = bn_gpu_enter(gpu, i, "close", NULL) == 0;
            bn_gpu_lanes_free(gpu, i);
            if (entered)
                bn_gpu_leave(gpu);
            gpu->cu.DevicePrimaryCtxRelease(gpu->devices[i].cu);
        }
        pthread_mutex_destroy(&gpu->devices[i].lock);
    }
    free(gpu->devices);
    free(gpu->path);
    free(gpu);
}

const char *bn_gpu_driver_path(const struct bn_gpu *gpu)
{
    return gpu->path;
}

unsigned bn_gpu_driver_version(const struct bn_gpu *gpu)
{
    return gpu->version;
}

bool bn_gpu_simulated(const struct bn_gpu *gpu)
{
    return gpu->simulated;
}

int bn_gpu_thread(pthread_t *thread, void *(*run)(void *), void *arg)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int r = pthread_create(thread, NULL, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -r;
}
