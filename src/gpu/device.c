/* Devices and their contexts. */
#include "gpu/driver.h"

#include <errno.h>
#include <string.h>

unsigned bn_gpu_count(const struct bn_gpu *gpu)
{
    return gpu->count;
}

const struct bn_gpu_info *bn_gpu_info(const struct bn_gpu *gpu, unsigned dev)
{
    return dev < gpu->count ? &gpu->devices[dev].info : NULL;
}

int bn_gpu_find(const struct bn_gpu *gpu, const uint8_t uuid[16])
{
    for (unsigned i = 0; i < gpu->count; i++)
        if (memcmp(gpu->devices[i].info.uuid, uuid, 16) == 0)
            return (int)i;
    return -ENODEV;
}

static CUresult make_lanes(struct bn_gpu *gpu, unsigned dev, CUcontext ctx)
{
    CUresult r = gpu->cu.CtxPushCurrent(ctx);
    if (r != CUDA_SUCCESS)
        return r;
    r = bn_gpu_lanes_make(gpu, dev);
    gpu->cu.CtxPopCurrent(&ctx);
    return r;
}

/* The primary context is kept once made: making one costs more than anything else a suspend does on a
 * small process. */
static int context(struct bn_gpu *gpu, unsigned dev, CUcontext *out, const char *stage, struct bn_error *err)
{
    if (dev >= gpu->count)
        return bn_error_set(err, ENODEV, stage, "There is no GPU %u: the driver shows %u.", dev, gpu->count);

    struct bn_gpu_device *d = &gpu->devices[dev];
    CUresult r = CUDA_SUCCESS;
    pthread_mutex_lock(&d->lock);
    if (!d->ctx) {
        /* Threads that wait for a copy sleep instead of spinning. Refused where somebody else has made the
         * context already. */
        gpu->cu.DevicePrimaryCtxSetFlags(d->cu, CU_CTX_SCHED_BLOCKING_SYNC);
        CUcontext ctx;
        r = gpu->cu.DevicePrimaryCtxRetain(&ctx, d->cu);
        if (r == CUDA_SUCCESS && (r = make_lanes(gpu, dev, ctx)) != CUDA_SUCCESS)
            gpu->cu.DevicePrimaryCtxRelease(d->cu);
        if (r == CUDA_SUCCESS)
            __atomic_store_n(&d->ctx, ctx, __ATOMIC_RELEASE);
    }
    *out = d->ctx;
    pthread_mutex_unlock(&d->lock);
    if (r != CUDA_SUCCESS)
        return bn_cuda_fail(err, r, stage, "No context can be made on GPU %u (%s)", dev, d->info.name);
    return 0;
}

int bn_gpu_enter(struct bn_gpu *gpu, unsigned dev, const char *stage, struct bn_error *err)
{
    CUcontext ctx;
    int r = context(gpu, dev, &ctx, stage, err);
    if (r < 0)
        return r;
    CUresult c = gpu->cu.CtxPushCurrent(ctx);
    if (c != CUDA_SUCCESS)
        return bn_cuda_fail(err, c, stage, "The context of GPU %u (%s) cannot be used", dev,
                            gpu->devices[dev].info.name);
    return 0;
}

void bn_gpu_leave(struct bn_gpu *gpu)
{
    CUcontext ctx;
    gpu->cu.CtxPopCurrent(&ctx);
}

unsigned bn_gpu_any_warm(struct bn_gpu *gpu)
{
    for (unsigned i = 0; i < gpu->count; i++)
        if (__atomic_load_n(&gpu->devices[i].ctx, __ATOMIC_ACQUIRE))
            return i;
    return 0;
}

int bn_gpu_warm(struct bn_gpu *gpu, unsigned dev, struct bn_error *err)
{
    CUcontext ctx;
    int r = context(gpu, dev, &ctx, "context", err);
    if (r == 0)
        bn_gpu_lanes_use(gpu, dev);
    return r;
}

int bn_gpu_mem_info(struct bn_gpu *gpu, unsigned dev, uint64_t *free_bytes, uint64_t *total,
                    struct bn_error *err)
{
    int r = bn_gpu_enter(gpu, dev, "memory", err);
    if (r < 0)
        return r;
    size_t f = 0, t = 0;
    CUresult c = gpu->cu.MemGetInfo(&f, &t);
    bn_gpu_leave(gpu);
    if (c != CUDA_SUCCESS)
        return bn_cuda_fail(err, c, "memory", "The free memory of GPU %u cannot be read", dev);
    *free_bytes = f;
    *total = t;
    return 0;
}
