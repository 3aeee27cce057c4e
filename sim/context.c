/* SPDX-License-Identifier: MIT */
#include <stdlib.h>
#include <string.h>

#include "sim.h"

#define STACK_DEPTH 64

/*
 * Contexts are kept for ever once made, marked dead: another thread's stack may still name one, and must be answered
 * CUDA_ERROR_CONTEXT_IS_DESTROYED rather than be read out of freed memory.
 */
static __thread struct {
    struct sim_ctx *stack[STACK_DEPTH];
    unsigned depth;
} mine;

static bool known(const struct sim_ctx *ctx)
{
    for (struct sim_ctx *c = sim.contexts; c; c = c->next)
        if (c == ctx)
            return true;
    return false;
}

CUresult ctx_check(CUcontext handle, struct sim_ctx **out)
{
    struct sim_ctx *ctx = (struct sim_ctx *)handle;

    if (!ctx || !known(ctx))
        return CUDA_ERROR_INVALID_CONTEXT;
    if (!ctx->alive)
        return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    *out = ctx;
    return CUDA_SUCCESS;
}

CUresult ctx_current(struct sim_ctx **out)
{
    struct sim_ctx *ctx = mine.depth ? mine.stack[mine.depth - 1] : NULL;

    if (!ctx)
        return CUDA_ERROR_INVALID_CONTEXT;
    if (!ctx->alive)
        return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (ctx->sticky != CUDA_SUCCESS)
        return ctx->sticky;
    *out = ctx;
    return CUDA_SUCCESS;
}

static struct sim_ctx *ctx_new(int ordinal, unsigned flags, bool primary)
{
    struct sim_ctx *ctx = calloc(1, sizeof(*ctx));

    if (!ctx)
        return NULL;
    ctx->ordinal = ordinal;
    ctx->flags = flags;
    ctx->primary = primary;
    ctx->alive = true;
    ctx->id = sim.next_id++;
    ctx->null_stream = stream_new(ctx, CU_STREAM_DEFAULT, 0);
    ctx->thread_stream = stream_new(ctx, CU_STREAM_DEFAULT, 0);
    if (!ctx->null_stream || !ctx->thread_stream) {
        stream_close_ctx(ctx);
        free(ctx);
        return NULL;
    }
    ctx->next = sim.contexts;
    sim.contexts = ctx;
    return ctx;
}

static void ctx_end(struct sim_ctx *ctx)
{
    stream_wait_ctx(ctx);
    memory_drop_ctx(ctx);
    stream_close_ctx(ctx);
    for (struct sim_ctx *c = sim.contexts; c; c = c->next)
        if (c->ordinal != ctx->ordinal)
            c->peers &= ~(1u << ctx->ordinal);
    ctx->alive = false;
}

/* ---- Primary contexts ---- */

static struct {
    unsigned retained, flags;
} primary[SIM_MAX_DEVICES];

struct sim_ctx *ctx_primary(int ordinal)
{
    for (struct sim_ctx *c = sim.contexts; c; c = c->next)
        if (c->alive && c->primary && c->ordinal == ordinal)
            return c;
    return NULL;
}

SIM_FN(cuDevicePrimaryCtxRetain, 0, (CUcontext * out, CUdevice dev), (out, dev))
{
    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    if (!ordinal_valid(dev))
        return CUDA_ERROR_INVALID_DEVICE;
    SIM_LOCKED();
    struct sim_ctx *ctx = ctx_primary(dev);

    if (!ctx)
        ctx = ctx_new(dev, primary[dev].flags, true);
    if (!ctx)
        return CUDA_ERROR_OUT_OF_MEMORY;
    primary[dev].retained++;
    *out = (CUcontext)ctx;
    return CUDA_SUCCESS;
}

SIM_FN(cuDevicePrimaryCtxRelease, 0, (CUdevice dev), (dev))
{
    if (!ordinal_valid(dev))
        return CUDA_ERROR_INVALID_DEVICE;
    SIM_LOCKED();
    struct sim_ctx *ctx = ctx_primary(dev);

    if (!ctx || primary[dev].retained == 0)
        return CUDA_ERROR_INVALID_CONTEXT;
    if (--primary[dev].retained == 0)
        ctx_end(ctx);
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuDevicePrimaryCtxRelease_v2, cuDevicePrimaryCtxRelease);

SIM_FN(cuDevicePrimaryCtxReset, 0, (CUdevice dev), (dev))
{
    if (!ordinal_valid(dev))
        return CUDA_ERROR_INVALID_DEVICE;
    SIM_LOCKED();
    struct sim_ctx *ctx = ctx_primary(dev);

    if (ctx)
        ctx_end(ctx);
    primary[dev].retained = 0;
    primary[dev].flags = 0;
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuDevicePrimaryCtxReset_v2, cuDevicePrimaryCtxReset);

SIM_FN(cuDevicePrimaryCtxSetFlags, 0, (CUdevice dev, unsigned flags), (dev, flags))
{
    if (!ordinal_valid(dev))
        return CUDA_ERROR_INVALID_DEVICE;
    SIM_LOCKED();
    primary[dev].flags = flags;
    if (ctx_primary(dev))
        ctx_primary(dev)->flags = flags;
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuDevicePrimaryCtxSetFlags_v2, cuDevicePrimaryCtxSetFlags);

SIM_FN(cuDevicePrimaryCtxGetState, 0, (CUdevice dev, unsigned *flags, int *active), (dev, flags, active))
{
    if (!ordinal_valid(dev))
        return CUDA_ERROR_INVALID_DEVICE;
    SIM_LOCKED();
    if (flags)
        *flags = primary[dev].flags;
    if (active)
        *active = ctx_primary(dev) != NULL;
    return CUDA_SUCCESS;
}

/* ---- Other contexts ---- */

SIM_FN(cuCtxCreate, 0, (CUcontext * out, unsigned flags, CUdevice dev), (out, flags, dev))
{
    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    if (!ordinal_valid(dev))
        return CUDA_ERROR_INVALID_DEVICE;
    SIM_LOCKED();
    if (mine.depth == STACK_DEPTH)
        return CUDA_ERROR_OUT_OF_MEMORY;
    struct sim_ctx *ctx = ctx_new(dev, flags, false);

    if (!ctx)
        return CUDA_ERROR_OUT_OF_MEMORY;
    mine.stack[mine.depth++] = ctx;
    *out = (CUcontext)ctx;
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuCtxCreate_v2, cuCtxCreate);

SIM_EXPORT CUresult cuCtxCreate_v3(CUcontext *out, void *params, int count, unsigned flags, CUdevice dev);
SIM_EXPORT CUresult cuCtxCreate_v3(CUcontext *out, void *params, int count, unsigned flags, CUdevice dev)
{
    if (params || count)
        return CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY;

    CUresult rc = sim_enter("cuCtxCreate", 0);

    return rc ? rc : sim_leave("cuCtxCreate", 0, body_cuCtxCreate(out, flags, dev));
}

SIM_EXPORT CUresult cuCtxCreate_v4(CUcontext *out, CUctxCreateParams *params, unsigned flags, CUdevice dev);
SIM_EXPORT CUresult cuCtxCreate_v4(CUcontext *out, CUctxCreateParams *params, unsigned flags, CUdevice dev)
{
    if (params)
        return CUDA_ERROR_NOT_SUPPORTED;

    CUresult rc = sim_enter("cuCtxCreate", 0);

    return rc ? rc : sim_leave("cuCtxCreate", 0, body_cuCtxCreate(out, flags, dev));
}

SIM_FN(cuCtxDestroy, 0, (CUcontext handle), (handle))
{
    struct sim_ctx *ctx;

    SIM_LOCKED();
    CUresult rc = ctx_check(handle, &ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (ctx->primary)
        return CUDA_ERROR_INVALID_CONTEXT;
    ctx_end(ctx);
    if (mine.depth && mine.stack[mine.depth - 1] == ctx)
        mine.depth--;
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuCtxDestroy_v2, cuCtxDestroy);

/* ---- Green contexts: they share the primary context's memory, and keep it ---- */

SIM_FN(cuGreenCtxCreate, 0, (CUgreenCtx * out, CUdevResourceDesc desc, CUdevice dev, unsigned flags),
       (out, desc, dev, flags))
{
    CUcontext primary_handle;

    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult rc = body_cuDevicePrimaryCtxRetain(&primary_handle, dev);

    if (rc != CUDA_SUCCESS)
        return rc;
    SIM_LOCKED();
    struct sim_ctx *ctx = ctx_new(dev, flags, false);

    if (!ctx) {
        primary[dev].retained--;
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    ctx->home = (struct sim_ctx *)primary_handle;
    *out = (CUgreenCtx)ctx;
    return CUDA_SUCCESS;
}

SIM_FN(cuCtxFromGreenCtx, 0, (CUcontext * out, CUgreenCtx green), (out, green))
{
    struct sim_ctx *ctx;

    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = ctx_check((CUcontext)green, &ctx);

    if (rc == CUDA_SUCCESS)
        *out = (CUcontext)ctx;
    return rc;
}

SIM_FN(cuGreenCtxDestroy, 0, (CUgreenCtx green), (green))
{
    struct sim_ctx *ctx;
    int dev;

    {
        SIM_LOCKED();
        CUresult rc = ctx_check((CUcontext)green, &ctx);

        if (rc != CUDA_SUCCESS)
            return rc;
        stream_wait_ctx(ctx);
        stream_close_ctx(ctx);
        ctx->alive = false;
        dev = ctx->ordinal;
    }
    return body_cuDevicePrimaryCtxRelease(dev);
}

/* ---- Which is current ---- */

SIM_FN(cuCtxPushCurrent, 0, (CUcontext handle), (handle))
{
    struct sim_ctx *ctx;

    SIM_LOCKED();
    CUresult rc = ctx_check(handle, &ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (mine.depth == STACK_DEPTH)
        return CUDA_ERROR_OUT_OF_MEMORY;
    mine.stack[mine.depth++] = ctx;
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuCtxPushCurrent_v2, cuCtxPushCurrent);

SIM_FN(cuCtxPopCurrent, 0, (CUcontext * out), (out))
{
    SIM_LOCKED();
    if (mine.depth == 0)
        return CUDA_ERROR_INVALID_CONTEXT;
    mine.depth--;
    if (out)
        *out = (CUcontext)mine.stack[mine.depth];
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuCtxPopCurrent_v2, cuCtxPopCurrent);

SIM_FN(cuCtxSetCurrent, 0, (CUcontext handle), (handle))
{
    struct sim_ctx *ctx = NULL;

    SIM_LOCKED();
    if (!handle) {
        if (mine.depth)
            mine.depth--;
        return CUDA_SUCCESS;
    }

    CUresult rc = ctx_check(handle, &ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (mine.depth == 0)
        mine.depth = 1;
    mine.stack[mine.depth - 1] = ctx;
    return CUDA_SUCCESS;
}

SIM_FN(cuCtxGetCurrent, 0, (CUcontext * out), (out))
{
    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    *out = mine.depth ? (CUcontext)mine.stack[mine.depth - 1] : NULL;
    return CUDA_SUCCESS;
}

SIM_FN(cuCtxGetDevice, 0, (CUdevice * out), (out))
{
    struct sim_ctx *ctx;

    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc == CUDA_SUCCESS)
        *out = ctx->ordinal;
    return rc;
}

SIM_EXPORT CUresult cuCtxGetDevice_v2(CUdevice *out, CUcontext handle);
SIM_EXPORT CUresult cuCtxGetDevice_v2(CUdevice *out, CUcontext handle)
{
    struct sim_ctx *ctx;

    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult rc = sim_enter("cuCtxGetDevice", 0);

    if (rc != CUDA_SUCCESS)
        return rc;
    SIM_LOCKED();
    rc = handle ? ctx_check(handle, &ctx) : ctx_current(&ctx);
    if (rc == CUDA_SUCCESS)
        *out = ctx->ordinal;
    return sim_leave("cuCtxGetDevice", 0, rc);
}

SIM_FN(cuCtxGetFlags, 0, (unsigned *flags), (flags))
{
    struct sim_ctx *ctx;

    if (!flags)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc == CUDA_SUCCESS)
        *flags = ctx->flags;
    return rc;
}

SIM_FN(cuCtxGetId, 0, (CUcontext handle, unsigned long long *id), (handle, id))
{
    struct sim_ctx *ctx;

    if (!id)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = handle ? ctx_check(handle, &ctx) : ctx_current(&ctx);

    if (rc == CUDA_SUCCESS)
        *id = ctx->id;
    return rc;
}

SIM_FN(cuCtxGetApiVersion, 0, (CUcontext handle, unsigned *version), (handle, version))
{
    struct sim_ctx *ctx;

    if (!version)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = handle ? ctx_check(handle, &ctx) : ctx_current(&ctx);

    if (rc == CUDA_SUCCESS)
        *version = 3020;
    return rc;
}

SIM_FN(cuCtxGetStreamPriorityRange, 0, (int *least, int *greatest), (least, greatest))
{
    struct sim_ctx *ctx;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc == CUDA_SUCCESS && least)
        *least = 0;
    if (rc == CUDA_SUCCESS && greatest)
        *greatest = -5;
    return rc;
}

SIM_FN(cuCtxSynchronize, 0, (void), ())
{
    struct sim_ctx *ctx;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (streams_capturing(ctx))
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    stream_wait_ctx(ctx);
    return ctx->sticky;
}

SIM_EXPORT CUresult cuCtxSynchronize_v2(CUcontext handle);
SIM_EXPORT CUresult cuCtxSynchronize_v2(CUcontext handle)
{
    struct sim_ctx *ctx;
    CUresult rc = sim_enter("cuCtxSynchronize", 0);

    if (rc != CUDA_SUCCESS)
        return rc;
    SIM_LOCKED();
    rc = handle ? ctx_check(handle, &ctx) : ctx_current(&ctx);
    if (rc == CUDA_SUCCESS) {
        stream_wait_ctx(ctx);
        rc = ctx->sticky;
    }
    return sim_leave("cuCtxSynchronize", 0, rc);
}

/* Limits and cache preferences have no effect here; programs only expect to set them and read them back. */
static size_t limits[16];

SIM_FN(cuCtxSetLimit, 0, (int limit, size_t value), (limit, value))
{
    if (limit < 0 || limit >= 16)
        return CUDA_ERROR_UNSUPPORTED_LIMIT;
    limits[limit] = value;
    return CUDA_SUCCESS;
}

SIM_FN(cuCtxGetLimit, 0, (size_t * value, int limit), (value, limit))
{
    if (!value)
        return CUDA_ERROR_INVALID_VALUE;
    if (limit < 0 || limit >= 16)
        return CUDA_ERROR_UNSUPPORTED_LIMIT;
    *value = limits[limit];
    return CUDA_SUCCESS;
}

SIM_FN(cuCtxSetCacheConfig, 0, (int config), (config))
{
    (void)config;
    return CUDA_SUCCESS;
}

SIM_FN(cuCtxGetCacheConfig, 0, (int *config), (config))
{
    if (!config)
        return CUDA_ERROR_INVALID_VALUE;
    *config = 0;
    return CUDA_SUCCESS;
}

/* ---- Peers ---- */

SIM_FN(cuCtxEnablePeerAccess, 0, (CUcontext handle, unsigned flags), (handle, flags))
{
    struct sim_ctx *ctx, *peer;

    if (flags)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc == CUDA_SUCCESS)
        rc = ctx_check(handle, &peer);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (peer == ctx)
        return CUDA_ERROR_INVALID_CONTEXT;
    if (peer->ordinal == ctx->ordinal)
        return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
    if (ctx->peers & 1u << peer->ordinal)
        return CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
    ctx->peers |= 1u << peer->ordinal;
    return CUDA_SUCCESS;
}

SIM_FN(cuCtxDisablePeerAccess, 0, (CUcontext handle), (handle))
{
    struct sim_ctx *ctx, *peer;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc == CUDA_SUCCESS)
        rc = ctx_check(handle, &peer);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (!(ctx->peers & 1u << peer->ordinal))
        return CUDA_ERROR_PEER_ACCESS_NOT_ENABLED;
    ctx->peers &= ~(1u << peer->ordinal);
    return CUDA_SUCCESS;
}
