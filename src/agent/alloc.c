/* cuMemAlloc and its like on VMM memory that can be taken away and given back, and what an application may ask about such
 * memory: it is told what it would be told of the driver's own. */
#include "agent/agent.h"
#include "agent/capture.h"
#include "agent/gate.h"
#include "agent/idle.h"
#include "agent/need.h"
#include "agent/track.h"

/* ---- making ---------------------------------------------------------------------------------------- */

/* Devices whose contexts may use what is allocated in ctx. */
static uint64_t access_of_locked(CUcontext ctx, CUdevice dev)
{
    uint64_t mask = 1ULL << dev;
    for (struct bn_peer *p = bn_track.peers; p; p = p->next)
        if (p->to == ctx)
            mask |= 1ULL << p->from_dev;
    return mask;
}

static CUresult create(struct bn_seg *seg, const struct bn_device *d)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                .location = {CU_MEM_LOCATION_TYPE_DEVICE, seg->dev}};
    prop.allocFlags.gpuDirectRDMACapable = d->rdma;
    CUresult r = bn_real.cuMemCreate(&seg->real, seg->size, &prop, 0);
    if (r != CUDA_SUCCESS && r != CUDA_ERROR_OUT_OF_MEMORY && d->rdma) {
        prop.allocFlags.gpuDirectRDMACapable = 0;
        r = bn_real.cuMemCreate(&seg->real, seg->size, &prop, 0);
    }
    if (r == CUDA_SUCCESS) {
        seg->present = true;
        seg->flags = prop.allocFlags.gpuDirectRDMACapable ? BN_SEGMENT_RDMA : 0;
    }
    return r;
}

/* A segment of its own, mapped somewhere, for `bytes`. On error nothing is left; CUDA_ERROR_UNKNOWN where the driver should be
 * asked for memory of its own. */
static CUresult convert_locked(CUdevice dev, CUcontext ctx, size_t bytes, CUdeviceptr *out)
{
    const struct bn_device *d = &bn_track.devices[dev];
    uint64_t size = (bytes + d->granularity - 1) & ~(d->granularity - 1);
    CUdeviceptr va;
    CUresult r = bn_real.cuMemAddressReserve(&va, size, 0, 0, 0);
    if (r != CUDA_SUCCESS)
        return CUDA_ERROR_UNKNOWN;

    struct bn_alloc *a = bn_pool_get(&bn_track.alloc_pool);
    struct bn_seg *seg = bn_seg_new_locked(BN_SEG_ALLOC, dev, size);
    struct bn_map *map = seg ? bn_map_new_locked(seg, va, size, 0) : NULL;
    if (map)
        seg->reserved = true;
    if (!a || !map || bn_tree_find(&bn_track.allocs, va)) {
        r = CUDA_ERROR_UNKNOWN;
        goto fail;
    }
    r = create(seg, d);
    if (r != CUDA_SUCCESS)
        goto fail;
    r = bn_real.cuMemMap(va, size, 0, seg->real, 0);
    if (r != CUDA_SUCCESS)
        goto fail;
    map->mapped = true;
    map->rw = access_of_locked(ctx, dev);
    r = bn_map_apply_access_locked(map);
    if (r != CUDA_SUCCESS)
        goto fail;
    a->bytes = bytes;
    a->seg = seg;
    a->ctx = ctx;
    a->dev = dev;
    bn_tree_insert(&bn_track.allocs, &a->by_va, va);
    bn_page_add(&bn_agent_page()->allocations, 1);
    *out = va;
    return CUDA_SUCCESS;

fail:
    bn_pool_put(&bn_track.alloc_pool, a);
    if (seg)
        bn_seg_destroy_locked(seg);
    if (!map)
        bn_real.cuMemAddressFree(va, size);
    return r == CUDA_ERROR_OUT_OF_MEMORY ? r : CUDA_ERROR_UNKNOWN;
}

/* A primary context that was reset stays current and tells its device; the driver knows that it is dead. */
static bool is_dead(CUcontext ctx, CUdevice dev)
{
    {
        BN_LOCKED();
        for (const struct bn_ctx *c = bn_track.ctxs; c; c = c->next)
            if (c->ctx == ctx)
                return false;
    }
    return !bn_ctx_primary(dev);
}

/* CUDA_ERROR_UNKNOWN: leave it to the driver. */
static CUresult try_convert(size_t bytes, CUdeviceptr *out)
{
    CUdevice dev;
    CUcontext ctx = NULL;
    if (bytes < BN_CONVERT_MIN || bytes > SIZE_MAX / 2 || !bn_agent_converting())
        return CUDA_ERROR_UNKNOWN;
    if (bn_real.cuCtxGetDevice(&dev) != CUDA_SUCCESS || dev < 0 || dev >= (int)BN_GPUS_MAX ||
        !bn_track.devices[dev].convertible || bn_real.cuCtxGetCurrent(&ctx) != CUDA_SUCCESS || !ctx)
        return CUDA_ERROR_UNKNOWN;
    if (bn_load(&bn_track.devices[dev].reset) && is_dead(ctx, dev))
        return CUDA_ERROR_UNKNOWN;
    if (bn_capture_any()) {
        CUresult r = bn_capture_probe();
        if (r != CUDA_SUCCESS)
            return r;
    }
    bn_free_later();
    BN_LOCKED();
    return convert_locked(dev, ctx, bytes, out);
}

/* Remember memory that is the driver's own: for the counters. */
static void note_native(CUdeviceptr p, size_t bytes, bool managed)
{
    if (!bn_agent_converting())
        return;
    CUcontext ctx = NULL;
    if (bn_real.cuCtxGetCurrent(&ctx) != CUDA_SUCCESS)
        return;
    BN_LOCKED();
    if (bn_tree_find(&bn_track.allocs, p))
        return;
    struct bn_alloc *a = bn_pool_get(&bn_track.alloc_pool);
    if (!a)
        return;
    a->bytes = bytes;
    a->ctx = ctx;
    a->managed = managed;
    bn_tree_insert(&bn_track.allocs, &a->by_va, p);
    struct bn_agent_page *page = bn_agent_page();
    bn_page_add(managed ? &page->blockers.managed_bytes : &page->native_bytes, (int64_t)bytes);
}

static CUresult allocate(CUdeviceptr *dptr, size_t bytesize)
{
    if (dptr) {
        CUdeviceptr p;
        CUresult r = try_convert(bytesize, &p);
        if (r == CUDA_SUCCESS)
            *dptr = p;
        if (r != CUDA_ERROR_UNKNOWN)
            return r;
    }
    CUresult r = bn_real.cuMemAlloc_v2(dptr, bytesize);
    if (r == CUDA_SUCCESS)
        note_native(*dptr, bytesize, false);
    return r;
}

CUresult bn_wrap_cuMemAlloc_v2(CUdeviceptr *dptr, size_t bytesize)
{
    BN_GATED();
    struct bn_need need = {0};
    CUresult r;
    do
        r = allocate(dptr, bytesize);
    while (bn_need_again(&need, r, -1, bytesize));
    return r;
}

/* The pitch is the driver's: it is asked with an allocation of one row. */
static CUresult native_pitch(size_t *pitch, size_t width, unsigned int element)
{
    CUdeviceptr row;
    CUresult r = bn_real.cuMemAllocPitch_v2(&row, pitch, width, 1, element);
    if (r == CUDA_SUCCESS)
        bn_real.cuMemFree_v2(row);
    return r;
}

static CUresult allocate_pitch(CUdeviceptr *dptr, size_t *pPitch, size_t WidthInBytes, size_t Height,
                               unsigned int ElementSizeBytes)
{
    size_t pitch, total;
    if (dptr && pPitch && Height > 1 && !__builtin_mul_overflow(WidthInBytes, Height, &total) &&
        total >= BN_CONVERT_MIN / 2 && bn_agent_converting() && !bn_capture_any() &&
        native_pitch(&pitch, WidthInBytes, ElementSizeBytes) == CUDA_SUCCESS &&
        !__builtin_mul_overflow(pitch, Height, &total)) {
        CUdeviceptr p;
        CUresult r = try_convert(total, &p);
        if (r == CUDA_SUCCESS) {
            *dptr = p;
            *pPitch = pitch;
        }
        if (r != CUDA_ERROR_UNKNOWN)
            return r;
    }
    CUresult r = bn_real.cuMemAllocPitch_v2(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes);
    if (r == CUDA_SUCCESS)
        note_native(*dptr, *pPitch * Height, false);
    return r;
}

CUresult bn_wrap_cuMemAllocPitch_v2(CUdeviceptr *dptr, size_t *pPitch, size_t WidthInBytes, size_t Height,
                                    unsigned int ElementSizeBytes)
{
    BN_GATED();
    struct bn_need need = {0};
    size_t bytes;
    CUresult r;
    if (__builtin_mul_overflow(WidthInBytes, Height, &bytes))
        bytes = SIZE_MAX;
    do
        r = allocate_pitch(dptr, pPitch, WidthInBytes, Height, ElementSizeBytes);
    while (bn_need_again(&need, r, -1, bytes));
    return r;
}

CUresult bn_wrap_cuMemAllocManaged(CUdeviceptr *dptr, size_t bytesize, unsigned int flags)
{
    BN_GATED();
    CUresult r = bn_real.cuMemAllocManaged(dptr, bytesize, flags);
    if (r == CUDA_SUCCESS)
        note_native(*dptr, bytesize, true);
    return r;
}

/* ---- freeing --------------------------------------------------------------------------------------- */

/* Take the allocation that begins at p out of the table, so that nobody else frees it: a copy in *out. */
static bool claim(CUdeviceptr p, struct bn_alloc *out)
{
    BN_LOCKED();
    struct bn_alloc *a = BN_CONTAINER(bn_tree_find(&bn_track.allocs, p), struct bn_alloc, by_va);
    if (!a || a->opens) /* what an IPC handle opened is closed, not freed */
        return false;
    *out = *a;
    bn_tree_remove(&bn_track.allocs, &a->by_va);
    bn_pool_put(&bn_track.alloc_pool, a);
    return true;
}

static void unclaim(CUdeviceptr p, const struct bn_alloc *was)
{
    BN_LOCKED();
    struct bn_alloc *a = bn_pool_get(&bn_track.alloc_pool); /* one was just put back */
    if (!a)
        return;
    *a = *was;
    bn_tree_insert(&bn_track.allocs, &a->by_va, p);
}

/* The driver's cuMemFree waits for work that may use the memory; unmapping does not. */
static CUresult wait_for_users(CUcontext ctx)
{
    CUresult r = bn_ctx_synchronize(ctx);
    if (r != CUDA_SUCCESS || bn_load(&bn_track.peers) == NULL)
        return r;
    CUcontext users[64];
    unsigned n = 0;
    {
        BN_LOCKED();
        for (struct bn_peer *p = bn_track.peers; p && n < 64; p = p->next)
            if (p->to == ctx)
                users[n++] = p->from;
    }
    for (unsigned i = 0; i < n && r == CUDA_SUCCESS; i++)
        r = bn_ctx_synchronize(users[i]);
    return r;
}

static void free_later_locked(struct bn_seg *seg)
{
    seg->next = bn_track.later;
    bn_store(&bn_track.later, seg);
}

void bn_free_later(void)
{
    while (bn_load(&bn_track.later)) {
        struct bn_seg *seg;
        {
            BN_LOCKED();
            seg = bn_track.later;
            if (!seg || bn_track.captures.count)
                return;
            bn_store(&bn_track.later, seg->next);
        }
        CUresult r = seg->user ? wait_for_users(seg->user) : CUDA_SUCCESS;
        BN_LOCKED();
        if (r == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED) { /* one has just begun */
            free_later_locked(seg);
            return;
        }
        bn_seg_destroy_locked(seg);
    }
}

static CUresult free_converted(CUdeviceptr p, struct bn_alloc *a)
{
    bool capturing = bn_capture_any();
    CUresult r = capturing ? bn_capture_probe() : wait_for_users(a->ctx);
    if (r != CUDA_SUCCESS) {
        unclaim(p, a);
        return r;
    }
    bn_page_add(&bn_agent_page()->allocations, -1);
    BN_LOCKED();
    if (capturing) {
        /* A context with a capture in it cannot be waited for: the memory goes when the capture has ended. */
        a->seg->user = a->ctx;
        free_later_locked(a->seg);
    } else {
        bn_seg_destroy_locked(a->seg);
    }
    return CUDA_SUCCESS;
}

static void uncount_native(struct bn_alloc *a)
{
    struct bn_agent_page *page = bn_agent_page();
    bn_unshare_locked(&a->shared);
    bn_page_add(a->managed ? &page->blockers.managed_bytes : &page->native_bytes, -(int64_t)a->bytes);
}

CUresult bn_wrap_cuMemFree_v2(CUdeviceptr dptr)
{
    BN_GATED();
    struct bn_alloc a;
    if (!claim(dptr, &a))
        return bn_real.cuMemFree_v2(dptr);
    if (a.seg)
        return free_converted(dptr, &a);
    CUresult r = bn_real.cuMemFree_v2(dptr);
    if (r == CUDA_SUCCESS)
        uncount_native(&a);
    else
        unclaim(dptr, &a);
    return r;
}

/* Memory of cuMemAlloc may be freed in the order of a stream. Ours is freed when the stream has come that far: later than asked
 * for is always right. */
static CUresult free_async(CUdeviceptr dptr, CUstream stream, CUresult (*wait)(CUstream),
                           CUresult (*real)(CUdeviceptr, CUstream))
{
    struct bn_alloc a;
    if (!claim(dptr, &a))
        return real(dptr, stream);
    CUresult r = a.seg ? wait(stream) : real(dptr, stream);
    if (r != CUDA_SUCCESS)
        unclaim(dptr, &a);
    else if (a.seg)
        r = free_converted(dptr, &a);
    else
        uncount_native(&a);
    return r;
}

CUresult bn_wrap_cuMemFreeAsync(CUdeviceptr dptr, CUstream hStream)
{
    BN_GATED();
    return free_async(dptr, hStream, bn_real.cuStreamSynchronize, bn_real.cuMemFreeAsync);
}

CUresult bn_wrap_cuMemFreeAsync_ptsz(CUdeviceptr dptr, CUstream hStream)
{
    BN_GATED();
    return free_async(dptr, hStream, bn_real.cuStreamSynchronize_ptsz, bn_real.cuMemFreeAsync_ptsz);
}

/* ---- asking ---------------------------------------------------------------------------------------- */

/* The converted allocation that holds p, copied; its address in *base. */
static bool converted_at(CUdeviceptr p, struct bn_alloc *out, CUdeviceptr *base)
{
    BN_LOCKED();
    struct bn_alloc *a = bn_alloc_at_locked(p);
    if (!a || !a->seg)
        return false;
    *out = *a;
    *base = a->by_va.key;
    return true;
}

CUresult bn_wrap_cuMemGetAddressRange_v2(CUdeviceptr *pbase, size_t *psize, CUdeviceptr dptr)
{
    BN_GATED();
    struct bn_alloc a;
    CUdeviceptr base;
    if (!converted_at(dptr, &a, &base))
        return bn_real.cuMemGetAddressRange_v2(pbase, psize, dptr);
    /* The driver is asked all the same, for what it says of the thread; of the memory it knows another size, if any. */
    CUresult r = bn_real.cuMemGetAddressRange_v2(pbase, psize, dptr);
    if (r != CUDA_SUCCESS && r != CUDA_ERROR_NOT_FOUND && r != CUDA_ERROR_INVALID_VALUE)
        return r;
    if (!pbase && !psize)
        return r;
    if (pbase)
        *pbase = base;
    if (psize)
        *psize = a.bytes;
    return CUDA_SUCCESS;
}

/* Attributes in which VMM memory differs from cuMemAlloc's, as cuMemAlloc's would be. False: the driver's answer holds. */
static bool attribute_of(const struct bn_alloc *a, CUdeviceptr base, CUpointer_attribute attribute,
                         void *data)
{
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)data = a->ctx; return true;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(CUdeviceptr *)data = base; return true;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)data = a->bytes; return true;
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES: *(uint64_t *)data = 0; return true;
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE: *(CUmemoryPool *)data = NULL; return true;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS: *(uint8_t *)data = a->sync_memops; return true;
    /* The driver wrote 0, in as many bytes as it likes. */
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE: *(uint8_t *)data = !a->opens; return true;
    default: return false;
    }
}

static bool attribute_differs(CUpointer_attribute attribute)
{
    return attribute == CU_POINTER_ATTRIBUTE_CONTEXT || attribute == CU_POINTER_ATTRIBUTE_RANGE_START_ADDR ||
           attribute == CU_POINTER_ATTRIBUTE_RANGE_SIZE ||
           attribute == CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES ||
           attribute == CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE ||
           attribute == CU_POINTER_ATTRIBUTE_SYNC_MEMOPS ||
           attribute == CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE;
}

/* Memory of the application's own cuMemCreate can be exported because we made it so; it is told what it asked for. */
static void correct_own_vmm(CUdeviceptr p, CUpointer_attribute attribute, void *data)
{
    if (attribute != CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES || !data)
        return;
    BN_LOCKED();
    const struct bn_map *map = bn_map_at_locked(p);
    if (map && map->seg->kind == BN_SEG_APP)
        *(uint64_t *)data = map->seg->prop.requestedHandleTypes;
}

CUresult bn_wrap_cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr ptr)
{
    BN_GATED();
    struct bn_alloc a;
    CUdeviceptr base;
    bool ours = data && attribute_differs(attribute) && converted_at(ptr, &a, &base);
    if (ours && attribute != CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE &&
        attribute_of(&a, base, attribute, data))
        return CUDA_SUCCESS;
    CUresult r = bn_real.cuPointerGetAttribute(data, attribute, ptr);
    if (r == CUDA_SUCCESS && ours)
        attribute_of(&a, base, attribute, data);
    else if (r == CUDA_SUCCESS)
        correct_own_vmm(ptr, attribute, data);
    return r;
}

CUresult bn_wrap_cuPointerGetAttributes(unsigned int numAttributes, CUpointer_attribute *attributes,
                                        void **data, CUdeviceptr ptr)
{
    BN_GATED();
    CUresult r = bn_real.cuPointerGetAttributes(numAttributes, attributes, data, ptr);
    if (r != CUDA_SUCCESS || !attributes || !data)
        return r;
    struct bn_alloc a;
    CUdeviceptr base;
    bool differs = false;
    for (unsigned i = 0; i < numAttributes; i++)
        differs = differs || attribute_differs(attributes[i]);
    if (!differs)
        return r;
    bool ours = converted_at(ptr, &a, &base);
    for (unsigned i = 0; i < numAttributes; i++)
        if (ours && data[i])
            attribute_of(&a, base, attributes[i], data[i]);
        else
            correct_own_vmm(ptr, attributes[i], data[i]);
    return r;
}

/* The driver refuses the one attribute that can be set for VMM memory. It makes copies of that memory synchronous, for the sake of
 * devices that read it behind the driver's back; a program that is told no gives up on such a device altogether. */
CUresult bn_wrap_cuPointerSetAttribute(const void *value, CUpointer_attribute attribute, CUdeviceptr ptr)
{
    BN_GATED();
    struct bn_alloc a;
    CUdeviceptr base;
    CUresult r = bn_real.cuPointerSetAttribute(value, attribute, ptr);
    if (r != CUDA_ERROR_NOT_SUPPORTED || attribute != CU_POINTER_ATTRIBUTE_SYNC_MEMOPS || !value ||
        !converted_at(ptr, &a, &base))
        return r;
    BN_LOCKED();
    struct bn_alloc *live = bn_alloc_at_locked(ptr);
    if (live)
        live->sync_memops = *(const unsigned *)value != 0;
    return CUDA_SUCCESS;
}
