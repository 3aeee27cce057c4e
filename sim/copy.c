/* SPDX-License-Identifier: MIT */

/* Copies and fills: checked when they are asked for, and again when their turn comes. */

#include <stdlib.h>
#include <string.h>

#include "sim.h"

static void fill(uint64_t dst, uint32_t value, unsigned element, uint64_t count)
{
    if (element == 1) {
        memset((void *)dst, (int)value, count);
    } else if (element == 2) {
        for (uint64_t i = 0; i < count; i++)
            ((uint16_t *)dst)[i] = (uint16_t)value;
    } else {
        for (uint64_t i = 0; i < count; i++)
            ((uint32_t *)dst)[i] = value;
    }
}

static bool touchable(uint64_t addr, uint64_t size, bool write)
{
    return !memory_is_device(addr) || memory_usable(addr, size, NULL, write);
}

/* With sim.maps held for reading. */
static CUresult execute_memory(struct op *op)
{
    uint64_t span_dst, span_src;

    switch (op->kind) {
    case OP_COPY:
        if (!touchable(op->copy.dst, op->copy.size, true) || !touchable(op->copy.src, op->copy.size, false))
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        memmove((void *)op->copy.dst, (void *)op->copy.src, op->copy.size);
        return CUDA_SUCCESS;
    case OP_COPY2D:
        span_dst = (op->copy2d.height - 1) * op->copy2d.dst_pitch + op->copy2d.width;
        span_src = (op->copy2d.height - 1) * op->copy2d.src_pitch + op->copy2d.width;
        if (!touchable(op->copy2d.dst, span_dst, true) || !touchable(op->copy2d.src, span_src, false))
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        for (uint64_t y = 0; y < op->copy2d.height; y++)
            memmove((void *)(op->copy2d.dst + y * op->copy2d.dst_pitch),
                    (void *)(op->copy2d.src + y * op->copy2d.src_pitch), op->copy2d.width);
        return CUDA_SUCCESS;
    case OP_SET:
        span_dst = (op->set.height - 1) * op->set.pitch + op->set.width * op->set.element;
        if (!touchable(op->set.dst, span_dst, true))
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        for (uint64_t y = 0; y < op->set.height; y++)
            fill(op->set.dst + y * op->set.pitch, op->set.value, op->set.element, op->set.width);
        return CUDA_SUCCESS;
    default: return CUDA_SUCCESS;
    }
}

/* Runs one operation whose turn has come. No lock held. */
CUresult op_execute(struct op *op)
{
    CUresult rc;

    switch (op->kind) {
    case OP_KERNEL: return kernel_run(op);
    case OP_HOST: op->host.fn(op->host.data); return CUDA_SUCCESS;
    case OP_CALLBACK:
        op->callback.fn(op->callback.stream, CUDA_SUCCESS, op->callback.data);
        return CUDA_SUCCESS;
    default:
        pthread_rwlock_rdlock(&sim.maps);
        rc = execute_memory(op);
        pthread_rwlock_unlock(&sim.maps);
        return rc;
    }
}

/* ---- Asking for one ---- */

enum side { SIDE_HOST, SIDE_DEVICE, SIDE_ANY };

/* sim.lock held. Bounds are those of the allocation, as with the real driver, not of the memory behind it. */
static bool in_bounds(uint64_t addr, uint64_t size, enum side side, bool write)
{
    if (!memory_is_device(addr)) {
        struct alloc *alloc = (struct alloc *)range_find(&sim.allocs, addr);

        if (alloc) /* page-locked memory counts as either side */
            return addr + size <= alloc->r.start + alloc->r.size;
        return side != SIDE_DEVICE && addr;
    }
    if (side == SIDE_HOST)
        return false;

    struct alloc *alloc = (struct alloc *)range_find(&sim.allocs, addr);

    if (alloc)
        return addr + size <= alloc->r.start + alloc->r.size && !alloc->freed;
    return memory_usable(addr, size, NULL, write);
}

/* The context and stream a call means; takes what it waits for when it is to run at once. */
static CUresult begin(CUstream handle, bool sync, struct sim_ctx **ctx, struct sim_stream **stream)
{
    CUresult rc = ctx_current(ctx);

    if (rc == CUDA_SUCCESS)
        rc = stream_resolve(handle, *ctx, stream);
    if (rc == CUDA_SUCCESS && sync) {
        if ((*stream)->capture)
            return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        stream_wait_legacy(*ctx);
        rc = (*ctx)->sticky;
    }
    return rc;
}

/* Runs op now, in the calling thread. sim.lock held; let go meanwhile, as the copy may take long. */
static CUresult run_now(struct op *op)
{
    CUresult rc;

    pthread_mutex_unlock(&sim.lock);
    rc = op_execute(op);
    pthread_mutex_lock(&sim.lock);
    op_free(op);
    return rc;
}

struct copy_request {
    uint64_t dst, src, size;
    enum side dst_side, src_side;
    bool sync;
    CUstream stream;
};

static CUresult copy(const struct copy_request *req)
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;
    struct op *op;

    SIM_LOCKED();
    CUresult rc = begin(req->stream, req->sync, &ctx, &stream);

    if (rc != CUDA_SUCCESS || req->size == 0)
        return rc;
    if (!in_bounds(req->dst, req->size, req->dst_side, true) ||
        !in_bounds(req->src, req->size, req->src_side, false))
        return CUDA_ERROR_INVALID_VALUE;
    op = op_new(OP_COPY, ctx);
    if (!op)
        return CUDA_ERROR_OUT_OF_MEMORY;
    op->copy.dst = req->dst;
    op->copy.src = req->src;
    op->copy.size = req->size;
    if (req->sync)
        return run_now(op);
    /* Pageable memory may be used again as soon as the call returns. */
    if (!stream->capture && !memory_is_device(req->src) && !memory_is_pinned(req->src)) {
        op->stage = malloc(req->size);
        if (!op->stage) {
            op_free(op);
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        memcpy(op->stage, (const void *)req->src, req->size);
        op->copy.src = (uint64_t)op->stage;
    }

    bool wait = !stream->capture && !memory_is_device(req->dst) && !memory_is_pinned(req->dst);

    rc = stream_enqueue(stream, op);
    if (rc == CUDA_SUCCESS && wait) {
        stream_wait(stream, stream->queued);
        rc = ctx->sticky;
    }
    return rc;
}

#define COPY_SYNC(name, params, args, dst_, src_, n_, dst_side_, src_side_) \
    SIM_FN(name, 0, params, args)                                           \
    {                                                                       \
        return copy(&(struct copy_request){.dst = (uint64_t)(dst_),         \
                                           .src = (uint64_t)(src_),         \
                                           .size = n_,                      \
                                           .dst_side = dst_side_,           \
                                           .src_side = src_side_,           \
                                           .sync = true});                  \
    }                                                                       \
    SIM_ALIAS(name##_ptds, name)

#define COPY_ASYNC(name, params, args, dst_, src_, n_, dst_side_, src_side_) \
    SIM_FN_STREAM(name, 0, params, args)                                     \
    {                                                                        \
        return copy(&(struct copy_request){.dst = (uint64_t)(dst_),          \
                                           .src = (uint64_t)(src_),          \
                                           .size = n_,                       \
                                           .dst_side = dst_side_,            \
                                           .src_side = src_side_,            \
                                           .stream = hStream});              \
    }                                                                        \
    _Static_assert(1, "")

COPY_SYNC(cuMemcpy, (CUdeviceptr dst, CUdeviceptr src, size_t n), (dst, src, n), dst, src, n, SIDE_ANY,
          SIDE_ANY);
COPY_SYNC(cuMemcpyHtoD, (CUdeviceptr dst, const void *src, size_t n), (dst, src, n), dst, src, n, SIDE_DEVICE,
          SIDE_HOST);
COPY_SYNC(cuMemcpyDtoH, (void *dst, CUdeviceptr src, size_t n), (dst, src, n), dst, src, n, SIDE_HOST,
          SIDE_DEVICE);
COPY_SYNC(cuMemcpyDtoD, (CUdeviceptr dst, CUdeviceptr src, size_t n), (dst, src, n), dst, src, n, SIDE_DEVICE,
          SIDE_DEVICE);
SIM_ALIAS(cuMemcpyHtoD_v2, cuMemcpyHtoD);
SIM_ALIAS(cuMemcpyHtoD_v2_ptds, cuMemcpyHtoD);
SIM_ALIAS(cuMemcpyDtoH_v2, cuMemcpyDtoH);
SIM_ALIAS(cuMemcpyDtoH_v2_ptds, cuMemcpyDtoH);
SIM_ALIAS(cuMemcpyDtoD_v2, cuMemcpyDtoD);
SIM_ALIAS(cuMemcpyDtoD_v2_ptds, cuMemcpyDtoD);

COPY_ASYNC(cuMemcpyAsync, (CUdeviceptr dst, CUdeviceptr src, size_t n, CUstream hStream),
           (dst, src, n, hStream), dst, src, n, SIDE_ANY, SIDE_ANY);
COPY_ASYNC(cuMemcpyHtoDAsync, (CUdeviceptr dst, const void *src, size_t n, CUstream hStream),
           (dst, src, n, hStream), dst, src, n, SIDE_DEVICE, SIDE_HOST);
COPY_ASYNC(cuMemcpyDtoHAsync, (void *dst, CUdeviceptr src, size_t n, CUstream hStream),
           (dst, src, n, hStream), dst, src, n, SIDE_HOST, SIDE_DEVICE);
COPY_ASYNC(cuMemcpyDtoDAsync, (CUdeviceptr dst, CUdeviceptr src, size_t n, CUstream hStream),
           (dst, src, n, hStream), dst, src, n, SIDE_DEVICE, SIDE_DEVICE);

COPY_SYNC(cuMemcpyPeer, (CUdeviceptr dst, CUcontext dctx, CUdeviceptr src, CUcontext sctx, size_t n),
          (dst, dctx, src, sctx, n), ((void)dctx, dst), ((void)sctx, src), n, SIDE_DEVICE, SIDE_DEVICE);
COPY_ASYNC(cuMemcpyPeerAsync,
           (CUdeviceptr dst, CUcontext dctx, CUdeviceptr src, CUcontext sctx, size_t n, CUstream hStream),
           (dst, dctx, src, sctx, n, hStream), ((void)dctx, dst), ((void)sctx, src), n, SIDE_DEVICE,
           SIDE_DEVICE);

SIM_ALIAS(cuMemcpyHtoDAsync_v2, cuMemcpyHtoDAsync);
SIM_ALIAS(cuMemcpyHtoDAsync_v2_ptsz, cuMemcpyHtoDAsync_ptsz);
SIM_ALIAS(cuMemcpyDtoHAsync_v2, cuMemcpyDtoHAsync);
SIM_ALIAS(cuMemcpyDtoHAsync_v2_ptsz, cuMemcpyDtoHAsync_ptsz);
SIM_ALIAS(cuMemcpyDtoDAsync_v2, cuMemcpyDtoDAsync);
SIM_ALIAS(cuMemcpyDtoDAsync_v2_ptsz, cuMemcpyDtoDAsync_ptsz);

static CUresult copy_2d(const CUDA_MEMCPY2D *c, CUstream handle, bool sync)
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;

    if (!c)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = begin(handle, sync, &ctx, &stream);

    if (rc != CUDA_SUCCESS || c->Height == 0 || c->WidthInBytes == 0)
        return rc;
    if (c->dstMemoryType == CU_MEMORYTYPE_ARRAY || c->srcMemoryType == CU_MEMORYTYPE_ARRAY)
        return CUDA_ERROR_NOT_SUPPORTED;

    uint64_t dst_pitch = c->dstPitch ? c->dstPitch : c->WidthInBytes;
    uint64_t src_pitch = c->srcPitch ? c->srcPitch : c->WidthInBytes;
    uint64_t dst = c->dstMemoryType == CU_MEMORYTYPE_HOST ? (uint64_t)c->dstHost : c->dstDevice;
    uint64_t src = c->srcMemoryType == CU_MEMORYTYPE_HOST ? (uint64_t)c->srcHost : c->srcDevice;
    enum side dst_side = c->dstMemoryType == CU_MEMORYTYPE_HOST     ? SIDE_HOST
                         : c->dstMemoryType == CU_MEMORYTYPE_DEVICE ? SIDE_DEVICE
                                                                    : SIDE_ANY;
    enum side src_side = c->srcMemoryType == CU_MEMORYTYPE_HOST     ? SIDE_HOST
                         : c->srcMemoryType == CU_MEMORYTYPE_DEVICE ? SIDE_DEVICE
                                                                    : SIDE_ANY;

    if (dst_pitch < c->WidthInBytes || src_pitch < c->WidthInBytes)
        return CUDA_ERROR_INVALID_VALUE;
    dst += c->dstY * dst_pitch + c->dstXInBytes;
    src += c->srcY * src_pitch + c->srcXInBytes;
    if (!in_bounds(dst, (c->Height - 1) * dst_pitch + c->WidthInBytes, dst_side, true) ||
        !in_bounds(src, (c->Height - 1) * src_pitch + c->WidthInBytes, src_side, false))
        return CUDA_ERROR_INVALID_VALUE;

    struct op *op = op_new(OP_COPY2D, ctx);

    if (!op)
        return CUDA_ERROR_OUT_OF_MEMORY;
    op->copy2d.dst = dst;
    op->copy2d.src = src;
    op->copy2d.dst_pitch = dst_pitch;
    op->copy2d.src_pitch = src_pitch;
    op->copy2d.width = c->WidthInBytes;
    op->copy2d.height = c->Height;
    if (sync)
        return run_now(op);
    rc = stream_enqueue(stream, op);
    /* Host memory of a rectangle is not copied away first: waiting is always correct. */
    if (rc == CUDA_SUCCESS && !stream->capture &&
        ((!memory_is_device(dst) && !memory_is_pinned(dst)) ||
         (!memory_is_device(src) && !memory_is_pinned(src))))
        stream_wait(stream, stream->queued);
    return rc;
}

SIM_FN(cuMemcpy2D, 0, (const CUDA_MEMCPY2D *c), (c))
{
    return copy_2d(c, NULL, true);
}
SIM_ALIAS(cuMemcpy2D_v2, cuMemcpy2D);
SIM_ALIAS(cuMemcpy2D_v2_ptds, cuMemcpy2D);

SIM_FN(cuMemcpy2DUnaligned, 0, (const CUDA_MEMCPY2D *c), (c))
{
    return copy_2d(c, NULL, true);
}
SIM_ALIAS(cuMemcpy2DUnaligned_v2, cuMemcpy2DUnaligned);
SIM_ALIAS(cuMemcpy2DUnaligned_v2_ptds, cuMemcpy2DUnaligned);

SIM_FN_STREAM(cuMemcpy2DAsync, 0, (const CUDA_MEMCPY2D *c, CUstream hStream), (c, hStream))
{
    return copy_2d(c, hStream, false);
}
SIM_ALIAS(cuMemcpy2DAsync_v2, cuMemcpy2DAsync);
SIM_ALIAS(cuMemcpy2DAsync_v2_ptsz, cuMemcpy2DAsync_ptsz);

/* ---- Fills ---- */

static CUresult set(uint64_t dst, uint64_t pitch, unsigned element, uint32_t value, uint64_t width,
                    uint64_t height, CUstream handle, bool sync)
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;

    SIM_LOCKED();
    CUresult rc = begin(handle, sync, &ctx, &stream);

    if (rc != CUDA_SUCCESS || width == 0 || height == 0)
        return rc;
    if (dst % element || pitch % element || width > UINT64_MAX / 8 ||
        (height > 1 && pitch < width * element) ||
        !in_bounds(dst, (height - 1) * pitch + width * element, SIDE_DEVICE, true))
        return CUDA_ERROR_INVALID_VALUE;

    struct op *op = op_new(OP_SET, ctx);

    if (!op)
        return CUDA_ERROR_OUT_OF_MEMORY;
    op->set.dst = dst;
    op->set.pitch = pitch;
    op->set.element = element;
    op->set.value = value;
    op->set.width = width;
    op->set.height = height;
    return sync ? run_now(op) : stream_enqueue(stream, op);
}

#define SETS(bits, type, element)                                                                       \
    SIM_FN(cuMemsetD##bits, 0, (CUdeviceptr dst, type value, size_t n), (dst, value, n))                \
    {                                                                                                   \
        return set(dst, 0, element, value, n, 1, NULL, true);                                           \
    }                                                                                                   \
    SIM_ALIAS(cuMemsetD##bits##_v2, cuMemsetD##bits);                                                   \
    SIM_ALIAS(cuMemsetD##bits##_v2_ptds, cuMemsetD##bits);                                              \
    SIM_FN_STREAM(cuMemsetD##bits##Async, 0, (CUdeviceptr dst, type value, size_t n, CUstream hStream), \
                  (dst, value, n, hStream))                                                             \
    {                                                                                                   \
        return set(dst, 0, element, value, n, 1, hStream, false);                                       \
    }                                                                                                   \
    SIM_FN(cuMemsetD2D##bits, 0, (CUdeviceptr dst, size_t pitch, type value, size_t w, size_t h),       \
           (dst, pitch, value, w, h))                                                                   \
    {                                                                                                   \
        return set(dst, pitch, element, value, w, h, NULL, true);                                       \
    }                                                                                                   \
    SIM_ALIAS(cuMemsetD2D##bits##_v2, cuMemsetD2D##bits);                                               \
    SIM_ALIAS(cuMemsetD2D##bits##_v2_ptds, cuMemsetD2D##bits);                                          \
    SIM_FN_STREAM(cuMemsetD2D##bits##Async, 0,                                                          \
                  (CUdeviceptr dst, size_t pitch, type value, size_t w, size_t h, CUstream hStream),    \
                  (dst, pitch, value, w, h, hStream))                                                   \
    {                                                                                                   \
        return set(dst, pitch, element, value, w, h, hStream, false);                                   \
    }

SETS(8, unsigned char, 1)
SETS(16, unsigned short, 2)
SETS(32, unsigned, 4)
