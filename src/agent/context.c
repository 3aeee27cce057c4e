/* Contexts: which there are (the gate waits for each), what dies with them, and peer access, which the driver does not extend
 * to VMM memory by itself. */
#include "agent/agent.h"
#include "agent/gate.h"
#include "agent/idle.h"
#include "agent/track.h"

static void created(CUresult r, CUcontext *ctx, CUdevice dev, enum bn_ctx_kind kind, CUgreenCtx green)
{
    if (r != CUDA_SUCCESS || !ctx || !*ctx)
        return;
    if (kind == BN_CTX_GREEN)
        bn_store(&bn_track.green, true);
    BN_LOCKED();
    bn_ctx_add_locked(*ctx, dev, kind, green);
}

static void gone(CUresult r, CUcontext ctx, bool forget)
{
    if (r != CUDA_SUCCESS || !ctx)
        return;
    BN_LOCKED();
    bn_ctx_gone_locked(ctx, forget);
}

CUresult bn_wrap_cuCtxCreate(CUcontext *pctx, unsigned int flags, CUdevice dev)
{
    BN_GATED();
    CUresult r = bn_real.cuCtxCreate(pctx, flags, dev);
    created(r, pctx, dev, BN_CTX_OWN, NULL);
    return r;
}

CUresult bn_wrap_cuCtxCreate_v2(CUcontext *pctx, unsigned int flags, CUdevice dev)
{
    BN_GATED();
    CUresult r = bn_real.cuCtxCreate_v2(pctx, flags, dev);
    created(r, pctx, dev, BN_CTX_OWN, NULL);
    return r;
}

CUresult bn_wrap_cuCtxCreate_v3(CUcontext *pctx, CUexecAffinityParam *paramsArray, int numParams,
                                unsigned int flags, CUdevice dev)
{
    BN_GATED();
    CUresult r = bn_real.cuCtxCreate_v3(pctx, paramsArray, numParams, flags, dev);
    created(r, pctx, dev, BN_CTX_OWN, NULL);
    return r;
}

CUresult bn_wrap_cuCtxCreate_v4(CUcontext *pctx, CUctxCreateParams *ctxCreateParams, unsigned int flags,
                                CUdevice dev)
{
    BN_GATED();
    CUresult r = bn_real.cuCtxCreate_v4(pctx, ctxCreateParams, flags, dev);
    created(r, pctx, dev, BN_CTX_OWN, NULL);
    return r;
}

CUresult bn_wrap_cuCtxDestroy(CUcontext ctx)
{
    BN_GATED();
    CUresult r = bn_real.cuCtxDestroy(ctx);
    gone(r, ctx, true);
    return r;
}

CUresult bn_wrap_cuCtxDestroy_v2(CUcontext ctx)
{
    BN_GATED();
    CUresult r = bn_real.cuCtxDestroy_v2(ctx);
    gone(r, ctx, true);
    return r;
}

/* ---- primary contexts ------------------------------------------------------------------------------ */

static CUresult primary_state(CUdevice dev, int *active)
{
    unsigned flags;
    *active = 0;
    if (!bn_real.cuDevicePrimaryCtxGetState)
        return CUDA_ERROR_NOT_FOUND;
    return bn_real.cuDevicePrimaryCtxGetState(dev, &flags, active);
}

CUresult bn_ctx_primary(CUdevice dev, CUcontext *ctx)
{
    int active;
    *ctx = NULL;
    CUresult r = primary_state(dev, &active);
    if (r != CUDA_SUCCESS || !active)
        return r;
    if (!bn_real.cuDevicePrimaryCtxRetain)
        return CUDA_ERROR_NOT_FOUND;
    r = bn_real.cuDevicePrimaryCtxRetain(ctx, dev);
    if (r != CUDA_SUCCESS)
        return r;
    if (bn_real.cuDevicePrimaryCtxRelease_v2)
        bn_real.cuDevicePrimaryCtxRelease_v2(dev);
    else if (bn_real.cuDevicePrimaryCtxRelease)
        bn_real.cuDevicePrimaryCtxRelease(dev);
    return CUDA_SUCCESS;
}

/* `ctx` was the device's primary context before a call that may have ended it. One that cannot be asked about lives: what is
 * taken for gone would be freed. */
static void gone_unless_active(CUresult r, CUdevice dev, CUcontext ctx)
{
    int active;
    if (primary_state(dev, &active) == CUDA_SUCCESS && !active)
        gone(r, ctx, true);
}

CUresult bn_wrap_cuDevicePrimaryCtxRetain(CUcontext *pctx, CUdevice dev)
{
    BN_GATED();
    CUresult r = bn_real.cuDevicePrimaryCtxRetain(pctx, dev);
    created(r, pctx, dev, BN_CTX_PRIMARY, NULL);
    return r;
}

CUresult bn_wrap_cuDevicePrimaryCtxRelease(CUdevice dev)
{
    BN_GATED();
    CUcontext ctx;
    bn_ctx_primary(dev, &ctx);
    CUresult r = bn_real.cuDevicePrimaryCtxRelease(dev);
    gone_unless_active(r, dev, ctx);
    return r;
}

CUresult bn_wrap_cuDevicePrimaryCtxRelease_v2(CUdevice dev)
{
    BN_GATED();
    CUcontext ctx;
    bn_ctx_primary(dev, &ctx);
    CUresult r = bn_real.cuDevicePrimaryCtxRelease_v2(dev);
    gone_unless_active(r, dev, ctx);
    return r;
}

static void was_reset(CUresult r, CUdevice dev, CUcontext ctx)
{
    gone(r, ctx, true);
    if (r == CUDA_SUCCESS && dev >= 0 && dev < (int)BN_GPUS_MAX)
        bn_store(&bn_track.devices[dev].reset, true);
}

CUresult bn_wrap_cuDevicePrimaryCtxReset(CUdevice dev)
{
    BN_GATED();
    CUcontext ctx;
    bn_ctx_primary(dev, &ctx);
    CUresult r = bn_real.cuDevicePrimaryCtxReset(dev);
    was_reset(r, dev, ctx);
    return r;
}

CUresult bn_wrap_cuDevicePrimaryCtxReset_v2(CUdevice dev)
{
    BN_GATED();
    CUcontext ctx;
    bn_ctx_primary(dev, &ctx);
    CUresult r = bn_real.cuDevicePrimaryCtxReset_v2(dev);
    was_reset(r, dev, ctx);
    return r;
}

/* ---- green contexts -------------------------------------------------------------------------------- */

CUresult bn_wrap_cuGreenCtxCreate(CUgreenCtx *phCtx, CUdevResourceDesc desc, CUdevice dev, unsigned int flags)
{
    BN_GATED();
    CUresult r = bn_real.cuGreenCtxCreate(phCtx, desc, dev, flags);
    CUcontext ctx = NULL;
    if (r != CUDA_SUCCESS || !phCtx)
        return r;
    if (bn_real.cuCtxFromGreenCtx && bn_real.cuCtxFromGreenCtx(&ctx, *phCtx) == CUDA_SUCCESS)
        created(r, &ctx, dev, BN_CTX_GREEN, *phCtx);
    else
        bn_store(&bn_track.missed, true);
    return r;
}

CUresult bn_ctx_of_memory(CUcontext *ctx, CUdevice dev)
{
    if (!bn_load(&bn_track.green))
        return CUDA_SUCCESS;
    {
        BN_LOCKED();
        const struct bn_ctx *c = bn_ctx_find_locked(*ctx);
        if (!c || c->kind != BN_CTX_GREEN)
            return CUDA_SUCCESS;
    }
    CUcontext primary;
    CUresult r = bn_ctx_primary(dev, &primary);
    if (r != CUDA_SUCCESS || !primary)
        return r;
    created(CUDA_SUCCESS, &primary, dev, BN_CTX_PRIMARY, NULL); /* only the green one may have retained it */
    *ctx = primary;
    return CUDA_SUCCESS;
}

static bool find_green(CUgreenCtx green, CUcontext *ctx, CUdevice *dev)
{
    BN_LOCKED();
    for (const struct bn_ctx *c = bn_track.ctxs; c; c = c->next)
        if (c->green && c->green == green) {
            *ctx = c->ctx;
            *dev = c->dev;
            return true;
        }
    return false;
}

/* It lets go of the primary context, too, and may be the last to do so. */
CUresult bn_wrap_cuGreenCtxDestroy(CUgreenCtx hCtx)
{
    BN_GATED();
    CUcontext ctx = NULL, primary = NULL;
    CUdevice dev = 0;
    bool known = find_green(hCtx, &ctx, &dev);
    if (known)
        bn_ctx_primary(dev, &primary);
    CUresult r = bn_real.cuGreenCtxDestroy(hCtx);
    gone(r, ctx, true);
    if (known)
        gone_unless_active(r, dev, primary);
    return r;
}

CUresult bn_wrap_cuCtxFromGreenCtx(CUcontext *pContext, CUgreenCtx hCtx)
{
    BN_GATED();
    CUresult r = bn_real.cuCtxFromGreenCtx(pContext, hCtx);
    created(r, pContext, 0, BN_CTX_GREEN, hCtx);
    return r;
}

/* ---- peer access ----------------------------------------------------------------------------------- */

static bool other_peer_of_device_locked(const struct bn_peer *except, CUcontext to, CUdevice dev)
{
    for (struct bn_peer *p = bn_track.peers; p; p = p->next)
        if (p != except && p->to == to && p->from_dev == dev)
            return true;
    return false;
}

static bool is_of(const struct bn_seg *seg, CUcontext ctx)
{
    return seg->kind == BN_SEG_ALLOC && seg->ctx == ctx;
}

/* Give device `dev` access, or take it, to every converted allocation of context `to`: what shares a segment is of one context.
 * On error all is as it was. */
static CUresult mirror_locked(CUcontext to, CUdevice dev, bool on)
{
    CUmemAccessDesc desc = {{CU_MEM_LOCATION_TYPE_DEVICE, dev},
                            on ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_NONE};
    uint64_t bit = 1ULL << dev, failed_at = 0;
    CUresult r = CUDA_SUCCESS;
    BN_TREE_EACH(&bn_track.segs, n)
    {
        struct bn_seg *seg = BN_CONTAINER(n, struct bn_seg, by_id);
        if (!is_of(seg, to) || seg->dev == dev)
            continue;
        r = bn_real.cuMemSetAccess(seg->maps->by_va.key, seg->size, &desc, 1);
        if (r != CUDA_SUCCESS) {
            failed_at = n->key;
            break;
        }
        if (on)
            seg->maps->rw |= bit;
        else
            seg->maps->rw &= ~bit;
    }
    if (r == CUDA_SUCCESS || !on)
        return r;
    desc.flags = CU_MEM_ACCESS_FLAGS_PROT_NONE;
    BN_TREE_EACH(&bn_track.segs, n)
    {
        struct bn_seg *seg = BN_CONTAINER(n, struct bn_seg, by_id);
        if (n->key >= failed_at)
            break;
        if (!is_of(seg, to) || seg->dev == dev)
            continue;
        bn_real.cuMemSetAccess(seg->maps->by_va.key, seg->size, &desc, 1);
        seg->maps->rw &= ~bit;
    }
    return r;
}

static CUresult memory_of_peer(CUcontext *ctx)
{
    CUdevice dev = -1;
    {
        BN_LOCKED();
        const struct bn_ctx *c = bn_ctx_find_locked(*ctx);
        if (c)
            dev = c->dev;
    }
    return dev < 0 ? CUDA_SUCCESS : bn_ctx_of_memory(ctx, dev);
}

CUresult bn_wrap_cuCtxEnablePeerAccess(CUcontext peerContext, unsigned int Flags)
{
    BN_GATED();
    CUcontext from = NULL;
    CUdevice dev = -1;
    bool converting = bn_agent_converting();
    CUresult r = converting ? bn_real.cuCtxGetCurrent(&from) : CUDA_SUCCESS;
    if (r == CUDA_SUCCESS && converting) /* before anything is enabled that could not be mirrored */
        r = bn_real.cuCtxGetDevice(&dev);
    if (r == CUDA_SUCCESS)
        r = bn_real.cuCtxEnablePeerAccess(peerContext, Flags);
    if (r != CUDA_SUCCESS || !converting || dev < 0 || dev >= (int)BN_GPUS_MAX)
        return r;
    CUcontext to = peerContext;
    r = bn_ctx_of_memory(&from, dev);
    if (r == CUDA_SUCCESS)
        r = memory_of_peer(&to);
    if (r == CUDA_SUCCESS) {
        BN_LOCKED();
        struct bn_peer *p = bn_pool_get(&bn_track.peer_pool);
        r = p ? mirror_locked(to, dev, true) : CUDA_ERROR_OUT_OF_MEMORY;
        if (r == CUDA_SUCCESS) {
            *p = (struct bn_peer){bn_track.peers, from, to, dev};
            bn_track.peers = p;
            return CUDA_SUCCESS;
        }
        bn_pool_put(&bn_track.peer_pool, p);
    }
    if (bn_real.cuCtxDisablePeerAccess)
        bn_real.cuCtxDisablePeerAccess(peerContext);
    return r;
}

CUresult bn_wrap_cuCtxDisablePeerAccess(CUcontext peerContext)
{
    BN_GATED();
    CUcontext from = NULL;
    CUdevice dev;
    CUresult r = bn_real.cuCtxDisablePeerAccess(peerContext);
    if (r != CUDA_SUCCESS || bn_real.cuCtxGetCurrent(&from) != CUDA_SUCCESS ||
        bn_real.cuCtxGetDevice(&dev) != CUDA_SUCCESS)
        return r;
    CUcontext to = peerContext;
    if (bn_ctx_of_memory(&from, dev) != CUDA_SUCCESS || memory_of_peer(&to) != CUDA_SUCCESS)
        return r; /* it keeps its access to what Bennu holds */
    BN_LOCKED();
    for (struct bn_peer **at = &bn_track.peers; *at; at = &(*at)->next) {
        struct bn_peer *p = *at;
        if (p->from != from || p->to != to)
            continue;
        if (!other_peer_of_device_locked(p, p->to, p->from_dev))
            mirror_locked(p->to, p->from_dev, false);
        *at = p->next;
        bn_pool_put(&bn_track.peer_pool, p);
        break;
    }
    return r;
}
