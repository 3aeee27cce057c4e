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
    uint32_t flags = d->rdma ? BN_SEGMENT_RDMA : 0;
    CUresult r = bn_seg_create_locked(seg, &flags);
    if (r == CUDA_SUCCESS) {
        seg->present = true;
        seg->flags = flags;
    }
    return r;
}

/* A new segment of ctx's, mapped somewhere. On error nothing is left; CUDA_ERROR_OUT_OF_MEMORY or CUDA_ERROR_UNKNOWN. */
static CUresult segment_locked(CUdevice dev, CUcontext ctx, uint64_t size, struct bn_seg **out)
{
    CUdeviceptr va;
    if (bn_real.cuMemAddressReserve(&va, size, 0, 0, 0) != CUDA_SUCCESS)
        return CUDA_ERROR_UNKNOWN;
    struct bn_seg *seg = bn_seg_new_locked(BN_SEG_ALLOC, dev, size);
    struct bn_map *map = seg ? bn_map_new_locked(seg, va, size, 0) : NULL;
    if (map)
        seg->reserved = true;
    CUresult r = map ? create(seg, &bn_track.devices[dev]) : CUDA_ERROR_UNKNOWN;
    if (r == CUDA_SUCCESS)
        r = bn_real.cuMemMap(va, size, 0, seg->real, 0);
    if (r == CUDA_SUCCESS) {
        map->mapped = true;
        map->rw = access_of_locked(ctx, dev);
        r = bn_map_apply_access_locked(map);
    }
    if (r == CUDA_SUCCESS) {
        seg->ctx = ctx;
        *out = seg;
        return CUDA_SUCCESS;
    }
    if (seg)
        bn_seg_destroy_locked(seg);
    if (!map)
        bn_real.cuMemAddressFree(va, size);
    return r == CUDA_ERROR_OUT_OF_MEMORY ? r : CUDA_ERROR_UNKNOWN;
}

#define SLAB_MAX (64u << 20)

/* `size` bytes, whole units, at *offset of a segment: of one that has room, of a new slab, or alone. Errors as above. */
static CUresult place_locked(CUdevice dev, CUcontext ctx, uint64_t size, struct bn_seg **seg,
                             uint64_t *offset)
{
    uint64_t unit = bn_track.devices[dev].granularity;
    uint64_t most = SLAB_MAX / unit < BN_SLAB_UNITS ? SLAB_MAX / unit : BN_SLAB_UNITS;
    struct bn_ctx *c = size / unit <= most / BN_SLAB_SHARE ? bn_ctx_find_locked(ctx) : NULL;
    *offset = 0;
    if (!c)
        return segment_locked(dev, ctx, size, seg);
    unsigned units = (unsigned)(size / unit), at;
    struct bn_slab *slab = bn_slab_take(&c->slabs, units, &at);
    if (slab) {
        *seg = (struct bn_seg *)(void *)((char *)slab - offsetof(struct bn_seg, slab));
        *offset = at * unit;
        return CUDA_SUCCESS;
    }
    c->dev = dev;
    CUresult r = CUDA_ERROR_OUT_OF_MEMORY;
    for (unsigned n = bn_slab_wish(&c->slabs, units, (unsigned)most); n && r == CUDA_ERROR_OUT_OF_MEMORY;
         n = bn_slab_wish_less(n, units)) {
        r = segment_locked(dev, ctx, n * unit, seg);
        if (r == CUDA_SUCCESS)
            bn_slab_add(&c->slabs, &(*seg)->slab, n, units);
    }
    return r;
}

/* What the driver put in a place and took away unseen: the place is ours now. */
static void drop_stale_locked(CUdeviceptr va)
{
    struct bn_alloc *a = BN_CONTAINER(bn_tree_find(&bn_track.allocs, va), struct bn_alloc, by_va);
    if (!a)
        return;
    bn_tree_remove(&bn_track.allocs, &a->by_va);
    bn_alloc_retire_locked(a);
    bn_pool_put(&bn_track.alloc_pool, a);
}

/* Memory that can be taken away. On error nothing is left; CUDA_ERROR_UNKNOWN where the driver should be asked for memory of its
 * own. */
static CUresult convert_locked(CUdevice dev, CUcontext ctx, size_t bytes, CUdeviceptr *out)
{
    uint64_t unit = bn_track.devices[dev].granularity, offset;
    struct bn_alloc *a = bn_pool_get(&bn_track.alloc_pool);
    if (!a)
        return CUDA_ERROR_UNKNOWN;
    CUresult r = place_locked(dev, ctx, (bytes + unit - 1) & ~(unit - 1), &a->seg, &offset);
    if (r != CUDA_SUCCESS) {
        bn_pool_put(&bn_track.alloc_pool, a);
        return r;
    }
    CUdeviceptr va = a->seg->maps->by_va.key + offset;
    a->bytes = bytes;
    a->ctx = ctx;
    a->dev = dev;
    a->id = ++bn_track.last_id;
    drop_stale_locked(va);
    bn_tree_insert(&bn_track.allocs, &a->by_va, va);
    bn_page_add(&bn_agent_page()->allocations, 1);
    *out = va;
    return CUDA_SUCCESS;
}

/* A primary context that was reset stays current and tells its device; the driver knows that it is dead. */
static bool is_dead(CUcontext ctx, CUdevice dev)
{
    {
        BN_LOCKED();
        if (bn_ctx_find_locked(ctx))
            return false;
    }
    CUcontext primary;
    return bn_ctx_primary(dev, &primary) != CUDA_SUCCESS || !primary;
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
    if (bn_ctx_of_memory(&ctx, dev) != CUDA_SUCCESS)
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
    CUdevice dev;
    if (bn_real.cuCtxGetCurrent(&ctx) != CUDA_SUCCESS || bn_real.cuCtxGetDevice(&dev) != CUDA_SUCCESS ||
        bn_ctx_of_memory(&ctx, dev) != CUDA_SUCCESS)
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

/* Take the allocation that begins at p out of the table, so that nobody else frees it. NULL: there is none. */
static struct bn_alloc *claim(CUdeviceptr p)
{
    BN_LOCKED();
    struct bn_alloc *a = BN_CONTAINER(bn_tree_find(&bn_track.allocs, p), struct bn_alloc, by_va);
    if (!a || a->opens) /* what an IPC handle opened is closed, not freed */
        return NULL;
    bn_tree_remove(&bn_track.allocs, &a->by_va);
    return a;
}

static void unclaim(struct bn_alloc *a)
{
    BN_LOCKED();
    bn_tree_insert(&bn_track.allocs, &a->by_va, a->by_va.key);
}

/* Of the contexts that may use what is allocated in ctx, the one after `last` (NULL: the first). NULL: there are no more. Their
 * order is that of their addresses, so that none is left out when others come and go meanwhile. */
static CUcontext next_user(CUcontext ctx, CUcontext last)
{
    BN_LOCKED();
    CUcontext next = NULL;
    for (const struct bn_peer *p = bn_track.peers; p; p = p->next)
        if (p->to == ctx && (uintptr_t)p->from > (uintptr_t)last &&
            (!next || (uintptr_t)p->from < (uintptr_t)next))
            next = p->from;
    return next;
}

/* The driver's cuMemFree waits for work that may use the memory; unmapping does not. */
static CUresult wait_for_users(CUcontext ctx)
{
    CUresult r = bn_ctx_synchronize(ctx);
    if (r != CUDA_SUCCESS || bn_load(&bn_track.peers) == NULL)
        return r;
    for (CUcontext user = next_user(ctx, NULL); user && r == CUDA_SUCCESS; user = next_user(ctx, user))
        r = bn_ctx_synchronize(user);
    return r;
}

static void free_later_locked(struct bn_alloc *a)
{
    a->next = bn_track.later;
    bn_store(&bn_track.later, a);
}

/* One of those to be freed later, out of the list, if they may be; *ctx: to be waited for, NULL: gone. */
static struct bn_alloc *take_later(CUcontext *ctx)
{
    if (!bn_load(&bn_track.later))
        return NULL;
    BN_LOCKED();
    struct bn_alloc *a = bn_track.later;
    if (!a || bn_track.captures.count)
        return NULL;
    bn_store(&bn_track.later, a->next);
    *ctx = a->seg->ctx;
    return a;
}

/* Each is tried once. Where the waiting fails something may still be at work on it (a capture may have just begun): it stays until
 * another try, or until its context is gone. */
void bn_free_later(void)
{
    struct bn_alloc *stay = NULL, *a;
    CUcontext ctx;
    while ((a = take_later(&ctx))) {
        CUresult r = ctx ? wait_for_users(ctx) : CUDA_SUCCESS;
        BN_LOCKED();
        if (r == CUDA_SUCCESS || !a->seg->ctx) {
            bn_alloc_release_locked(a);
            continue;
        }
        a->next = stay;
        stay = a;
    }
    while ((a = stay)) {
        stay = a->next;
        BN_LOCKED();
        free_later_locked(a);
    }
}

/* Room in a slab is given to others only after the waiting, too. */
static CUresult free_converted(struct bn_alloc *a)
{
    bool capturing = bn_capture_any();
    CUresult r = capturing ? bn_capture_probe() : wait_for_users(a->ctx);
    if (r != CUDA_SUCCESS) {
        unclaim(a);
        return r;
    }
    BN_LOCKED();
    bn_alloc_retire_locked(a);
    if (capturing) /* a context with a capture in it cannot be waited for: the memory goes when the capture has ended */
        free_later_locked(a);
    else
        bn_alloc_release_locked(a);
    return CUDA_SUCCESS;
}

static void free_native(struct bn_alloc *a)
{
    BN_LOCKED();
    bn_alloc_retire_locked(a);
    bn_alloc_release_locked(a);
}

CUresult bn_wrap_cuMemFree_v2(CUdeviceptr dptr)
{
    BN_GATED();
    struct bn_alloc *a = claim(dptr);
    if (!a)
        return bn_real.cuMemFree_v2(dptr);
    if (a->seg)
        return free_converted(a);
    CUresult r = bn_real.cuMemFree_v2(dptr);
    if (r == CUDA_SUCCESS)
        free_native(a);
    else
        unclaim(a);
    return r;
}

/* Memory of cuMemAlloc may be freed in the order of a stream. Ours is freed when the stream has come that far: later than asked
 * for is always right. */
static CUresult free_async(CUdeviceptr dptr, CUstream stream, CUresult (*wait)(CUstream),
                           CUresult (*real)(CUdeviceptr, CUstream))
{
    struct bn_alloc *a = claim(dptr);
    if (!a)
        return real(dptr, stream);
    CUresult r = a->seg ? wait(stream) : real(dptr, stream);
    if (r != CUDA_SUCCESS)
        unclaim(a);
    else if (a->seg)
        r = free_converted(a);
    else
        free_native(a);
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

/* The converted allocation that holds *p, copied. If there is none *p becomes what the driver may be asked about. */
static bool converted_at(CUdeviceptr *p, struct bn_alloc *out)
{
    BN_LOCKED();
    struct bn_alloc *a = bn_alloc_at_locked(*p);
    if (a && a->seg) {
        *out = *a;
        return true;
    }
    *p = bn_address_locked(*p);
    return false;
}

CUresult bn_wrap_cuMemGetAddressRange_v2(CUdeviceptr *pbase, size_t *psize, CUdeviceptr dptr)
{
    BN_GATED();
    struct bn_alloc a;
    if (!converted_at(&dptr, &a))
        return bn_real.cuMemGetAddressRange_v2(pbase, psize, dptr);
    /* The driver is asked all the same, for what it says of the thread; of the memory it knows another size, if any. */
    CUresult r = bn_real.cuMemGetAddressRange_v2(pbase, psize, dptr);
    if (r != CUDA_SUCCESS && r != CUDA_ERROR_NOT_FOUND && r != CUDA_ERROR_INVALID_VALUE)
        return r;
    if (!pbase && !psize)
        return r;
    if (pbase)
        *pbase = a.by_va.key;
    if (psize)
        *psize = a.bytes;
    return CUDA_SUCCESS;
}

/* Attributes in which VMM memory, or a part of a slab, differs from cuMemAlloc's, as cuMemAlloc's would be. Nothing is done where
 * the driver's answer holds. */
static void attribute_of(const struct bn_alloc *a, CUpointer_attribute attribute, void *data)
{
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)data = a->ctx; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
    case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR: *(CUdeviceptr *)data = a->by_va.key; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)data = a->bytes; break;
    case CU_POINTER_ATTRIBUTE_MAPPING_SIZE: *(size_t *)data = bn_alloc_size(a); break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
    case CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID: *(uint64_t *)data = BN_BUFFER_BASE | a->id; break;
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES: *(uint64_t *)data = 0; break;
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE: *(CUmemoryPool *)data = NULL; break;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS: *(uint8_t *)data = a->sync_memops; break;
    /* The driver wrote 0, in as many bytes as it likes. */
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE: *(uint8_t *)data = !a->opens; break;
    default: break;
    }
}

/* Of these the driver need not be asked. Of the others it may know more: what there is in its version, how many bytes it writes. */
static bool answered_alone(CUpointer_attribute attribute)
{
    return attribute == CU_POINTER_ATTRIBUTE_CONTEXT || attribute == CU_POINTER_ATTRIBUTE_RANGE_START_ADDR ||
           attribute == CU_POINTER_ATTRIBUTE_RANGE_SIZE ||
           attribute == CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES ||
           attribute == CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE || attribute == CU_POINTER_ATTRIBUTE_SYNC_MEMOPS;
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
    bool ours = converted_at(&ptr, &a) && data;
    CUresult r = CUDA_SUCCESS;
    if (!ours || !answered_alone(attribute))
        r = bn_real.cuPointerGetAttribute(data, attribute, ptr);
    if (r == CUDA_SUCCESS && ours)
        attribute_of(&a, attribute, data);
    else if (r == CUDA_SUCCESS)
        correct_own_vmm(ptr, attribute, data);
    return r;
}

CUresult bn_wrap_cuPointerGetAttributes(unsigned int numAttributes, CUpointer_attribute *attributes,
                                        void **data, CUdeviceptr ptr)
{
    BN_GATED();
    struct bn_alloc a;
    bool ours = converted_at(&ptr, &a);
    CUresult r = bn_real.cuPointerGetAttributes(numAttributes, attributes, data, ptr);
    if (r != CUDA_SUCCESS || !attributes || !data)
        return r;
    for (unsigned i = 0; i < numAttributes; i++)
        if (ours && data[i])
            attribute_of(&a, attributes[i], data[i]);
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
    bool ours = converted_at(&ptr, &a);
    CUresult r = bn_real.cuPointerSetAttribute(value, attribute, ptr);
    if (r != CUDA_ERROR_NOT_SUPPORTED || attribute != CU_POINTER_ATTRIBUTE_SYNC_MEMOPS || !value || !ours)
        return r;
    BN_LOCKED();
    struct bn_alloc *live = bn_alloc_at_locked(ptr);
    if (live)
        live->sync_memops = *(const unsigned *)value != 0;
    return CUDA_SUCCESS;
}

CUresult bn_wrap_cuMemGetAccess(unsigned long long *flags, const CUmemLocation *location, CUdeviceptr ptr)
{
    BN_GATED();
    struct bn_alloc a;
    converted_at(&ptr, &a);
    return bn_real.cuMemGetAccess(flags, location, ptr);
}

/* Free room in slabs is free for a program that asks about itself. */
CUresult bn_wrap_cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
    BN_GATED();
    CUdevice dev;
    CUresult r = bn_real.cuMemGetInfo_v2(free_bytes, total);
    if (r != CUDA_SUCCESS || !free_bytes || !total || bn_real.cuCtxGetDevice(&dev) != CUDA_SUCCESS)
        return r;
    BN_LOCKED();
    uint64_t room = 0;
    for (const struct bn_ctx *c = bn_track.ctxs; c; c = c->next)
        if (c->dev == dev && dev >= 0 && dev < (int)BN_GPUS_MAX)
            room += c->slabs.room * bn_track.devices[dev].granularity;
    *free_bytes = *free_bytes + room < *total ? *free_bytes + room : *total;
    return r;
}
