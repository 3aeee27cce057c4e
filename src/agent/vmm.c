/* The application's own VMM memory. Its handles are tokens of ours: the driver's would change when a segment is taken away and
 * given back. A token is good for as long as the driver's handle would have been. */
#include "agent/agent.h"
#include "agent/gate.h"
#include "agent/need.h"
#include "agent/track.h"

#include <fcntl.h>

/* ---- handles --------------------------------------------------------------------------------------- */

static enum bn_seg_kind kind_of(const CUmemAllocationProp *prop)
{
    if (prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE)
        return BN_SEG_HOST;
    int dev = prop->location.id;
    if (prop->type != CU_MEM_ALLOCATION_TYPE_PINNED || prop->allocFlags.usage || dev < 0 ||
        dev >= (int)BN_GPUS_MAX || !bn_track.devices[dev].convertible)
        return BN_SEG_PLAIN;
    return BN_SEG_APP;
}

/* Give the application a token for `real`, which is released on failure. */
static CUresult hand_out_locked(struct bn_seg *seg, CUmemGenericAllocationHandle real,
                                CUmemGenericAllocationHandle *handle)
{
    if (!seg) {
        bn_release_locked(real);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    seg->real = real;
    seg->present = true;
    seg->refs = 1;
    *handle = bn_seg_token(seg);
    return CUDA_SUCCESS;
}

static CUresult create(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop,
                       unsigned long long flags)
{
    if (!handle || !prop || !bn_agent_converting())
        return bn_real.cuMemCreate(handle, size, prop, flags);
    BN_LOCKED();
    CUmemAllocationProp ours = *prop;
    CUmemGenericAllocationHandle real;
    enum bn_seg_kind kind = kind_of(prop);
    CUresult r = CUDA_ERROR_UNKNOWN;
    if (kind == BN_SEG_APP && size % BN_CONVERT_MIN)
        kind = BN_SEG_PLAIN;
    if (kind == BN_SEG_APP) {
        ours.requestedHandleTypes |= CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        r = bn_real.cuMemCreate(&real, size, &ours, flags);
        if (r != CUDA_SUCCESS && r != CUDA_ERROR_OUT_OF_MEMORY &&
            ours.requestedHandleTypes != prop->requestedHandleTypes) {
            kind = BN_SEG_PLAIN;
            r = bn_real.cuMemCreate(&real, size, prop, flags);
        }
    } else {
        r = bn_real.cuMemCreate(&real, size, prop, flags);
    }
    if (r != CUDA_SUCCESS)
        return r;
    struct bn_seg *seg = bn_seg_new_locked(kind, prop->location.id, size);
    if (seg) {
        seg->prop = *prop;
        seg->flags = (prop->allocFlags.gpuDirectRDMACapable ? BN_SEGMENT_RDMA : 0) |
                     (prop->allocFlags.compressionType ? BN_SEGMENT_COMPRESSED : 0);
    }
    return hand_out_locked(seg, real, handle);
}

CUresult bn_wrap_cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size,
                             const CUmemAllocationProp *prop, unsigned long long flags)
{
    BN_GATED();
    struct bn_need need = {0};
    CUresult r;
    do
        r = create(handle, size, prop, flags);
    while (prop && prop->location.type == CU_MEM_LOCATION_TYPE_DEVICE &&
           bn_need_again(&need, r, prop->location.id, size));
    return r;
}

CUresult bn_wrap_cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *osHandle,
                                                CUmemAllocationHandleType shHandleType)
{
    BN_GATED();
    CUmemGenericAllocationHandle real;
    CUresult r = bn_real.cuMemImportFromShareableHandle(handle ? &real : NULL, osHandle, shHandleType);
    if (r != CUDA_SUCCESS || !handle)
        return r;
    if (!bn_agent_converting()) {
        *handle = real;
        return r;
    }
    BN_LOCKED();
    return hand_out_locked(bn_seg_new_locked(BN_SEG_FOREIGN, 0, 0), real, handle);
}

CUresult bn_wrap_cuMulticastCreate(CUmemGenericAllocationHandle *mcHandle, const CUmulticastObjectProp *prop)
{
    BN_GATED();
    CUmemGenericAllocationHandle real;
    CUresult r = bn_real.cuMulticastCreate(mcHandle ? &real : NULL, prop);
    if (r != CUDA_SUCCESS || !mcHandle)
        return r;
    if (!bn_agent_converting()) {
        *mcHandle = real;
        return r;
    }
    BN_LOCKED();
    return hand_out_locked(bn_seg_new_locked(BN_SEG_MULTICAST, 0, prop->size), real, mcHandle);
}

/* The driver's handle behind the application's; what is not a live token is passed on for the driver to judge. */
static CUmemGenericAllocationHandle real_of_locked(CUmemGenericAllocationHandle handle)
{
    struct bn_seg *seg = bn_seg_of_token_locked(handle);
    return seg ? seg->real : handle;
}

CUresult bn_wrap_cuMemRelease(CUmemGenericAllocationHandle handle)
{
    BN_GATED();
    BN_LOCKED();
    struct bn_seg *seg = bn_seg_of_token_locked(handle);
    if (!seg)
        return bn_is_token(handle) ? CUDA_ERROR_INVALID_VALUE : bn_real.cuMemRelease(handle);
    seg->refs--;
    bn_seg_settle_locked(seg);
    return CUDA_SUCCESS;
}

CUresult bn_wrap_cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *handle, void *addr)
{
    BN_GATED();
    if (!handle)
        return bn_real.cuMemRetainAllocationHandle(handle, addr);
    BN_LOCKED();
    struct bn_map *map = bn_map_at_locked((CUdeviceptr)(uintptr_t)addr);
    if (!map)
        return bn_real.cuMemRetainAllocationHandle(handle, addr);
    if (map->seg->reserved)
        return CUDA_ERROR_INVALID_VALUE; /* as for memory that cuMemAlloc made */
    map->seg->refs++;
    *handle = bn_seg_token(map->seg);
    return CUDA_SUCCESS;
}

CUresult bn_wrap_cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *prop,
                                                        CUmemGenericAllocationHandle handle)
{
    BN_GATED();
    BN_LOCKED();
    struct bn_seg *seg = bn_seg_of_token_locked(handle);
    if (seg && prop && (seg->kind == BN_SEG_APP || seg->kind == BN_SEG_PLAIN || seg->kind == BN_SEG_HOST)) {
        CUresult r = bn_real.cuMemGetAllocationPropertiesFromHandle(prop, seg->real);
        if (r == CUDA_SUCCESS)
            prop->requestedHandleTypes = seg->prop.requestedHandleTypes;
        return r;
    }
    return bn_real.cuMemGetAllocationPropertiesFromHandle(prop, real_of_locked(handle));
}

CUresult bn_wrap_cuMemExportToShareableHandle(void *shareableHandle, CUmemGenericAllocationHandle handle,
                                              CUmemAllocationHandleType handleType, unsigned long long flags)
{
    BN_GATED();
    BN_LOCKED();
    struct bn_seg *seg = bn_seg_of_token_locked(handle);
    unsigned way =
        handleType == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR ? BN_SHARED_VMM : BN_SHARED_ELSEWHERE;
    if (seg && seg->kind == BN_SEG_APP && !((unsigned)seg->prop.requestedHandleTypes & (unsigned)handleType))
        return CUDA_ERROR_INVALID_VALUE; /* only our own request would make it work */
    if (!seg || !seg->kept.fd || way != BN_SHARED_VMM) {
        CUresult r = bn_real.cuMemExportToShareableHandle(shareableHandle, seg ? seg->real : handle,
                                                          handleType, flags);
        if (r == CUDA_SUCCESS)
            bn_share_locked(seg ? &seg->shared : NULL, way);
        return r;
    }
    /* Imported when it came back from an eviction: the driver does not export those, we kept a descriptor. */
    if (!shareableHandle || flags)
        return CUDA_ERROR_INVALID_VALUE;
    if (!bn_kept_valid(&seg->kept))
        return CUDA_ERROR_NOT_SUPPORTED;
    int fd = fcntl(seg->kept.fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0)
        return CUDA_ERROR_OPERATING_SYSTEM;
    bn_share_locked(&seg->shared, BN_SHARED_VMM);
    *(int *)shareableHandle = fd;
    return CUDA_SUCCESS;
}

/* ---- addresses ------------------------------------------------------------------------------------- */

/* Part of [ptr, ptr + size) is ours: the application cannot know it as VMM memory. */
static bool touches_ours_locked(CUdeviceptr ptr, size_t size)
{
    struct bn_map *map = bn_map_at_locked(ptr);
    struct bn_node *n = map ? &map->by_va : bn_tree_ceil(&bn_track.maps, ptr);
    for (; n && (n->key <= ptr || n->key - ptr < size); n = bn_tree_ceil(&bn_track.maps, n->key + 1))
        if (BN_CONTAINER(n, struct bn_map, by_va)->seg->reserved)
            return true;
    return false;
}

CUresult bn_wrap_cuMemAddressFree(CUdeviceptr ptr, size_t size)
{
    BN_GATED();
    BN_LOCKED();
    if (touches_ours_locked(ptr, size))
        return CUDA_ERROR_INVALID_VALUE;
    return bn_real.cuMemAddressFree(ptr, size);
}

/* The driver's part of a mapping. That of a multicast object may wait for other threads to join the team, which take the lock:
 * it is given up meanwhile, and a reference keeps the segment. */
static CUresult map_real_locked(CUdeviceptr ptr, size_t size, size_t offset, struct bn_seg *seg,
                                unsigned long long flags)
{
    if (bn_seg_evictable(seg))
        return bn_real.cuMemMap(ptr, size, offset, seg->real, flags);
    seg->refs++;
    bn_unlock(&bn_track.lock);
    CUresult r = bn_real.cuMemMap(ptr, size, offset, seg->real, flags);
    bn_lock(&bn_track.lock);
    seg->refs--;
    return r;
}

CUresult bn_wrap_cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                          unsigned long long flags)
{
    BN_GATED();
    BN_LOCKED();
    struct bn_seg *seg = bn_seg_of_token_locked(handle);
    if (touches_ours_locked(ptr, size))
        return CUDA_ERROR_INVALID_VALUE;
    if (!seg)
        return bn_real.cuMemMap(ptr, size, offset, handle, flags);
    CUresult r = map_real_locked(ptr, size, offset, seg, flags);
    struct bn_map *map = r == CUDA_SUCCESS ? bn_map_new_locked(seg, ptr, size, offset) : NULL;
    if (map) {
        map->mapped = true;
        return CUDA_SUCCESS;
    }
    if (r == CUDA_SUCCESS) {
        if (bn_real.cuMemUnmap(ptr, size) != CUDA_SUCCESS)
            bn_store(&bn_track.missed, true);
        r = CUDA_ERROR_OUT_OF_MEMORY;
    }
    bn_seg_settle_locked(seg);
    return r;
}

CUresult bn_wrap_cuMemUnmap(CUdeviceptr ptr, size_t size)
{
    BN_GATED();
    BN_LOCKED();
    if (touches_ours_locked(ptr, size))
        return CUDA_ERROR_INVALID_VALUE;
    CUresult r = bn_real.cuMemUnmap(ptr, size);
    if (r != CUDA_SUCCESS)
        return r;
    for (struct bn_node *n = bn_tree_ceil(&bn_track.maps, ptr), *next; n && n->key - ptr < size; n = next) {
        next = bn_tree_ceil(&bn_track.maps, n->key + 1);
        struct bn_map *map = BN_CONTAINER(n, struct bn_map, by_va);
        struct bn_seg *seg = map->seg;
        bn_map_drop_locked(map);
        bn_seg_settle_locked(seg);
    }
    return CUDA_SUCCESS;
}

static void merge_access(struct bn_map *map, const CUmemAccessDesc *d)
{
    if (d->location.type != CU_MEM_LOCATION_TYPE_DEVICE) {
        map->host = *d;
        return;
    }
    if (d->location.id < 0 || d->location.id >= (int)BN_GPUS_MAX)
        return;
    uint64_t bit = 1ULL << d->location.id;
    map->rw &= ~bit;
    map->ro &= ~bit;
    if (d->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        map->rw |= bit;
    else if (d->flags == CU_MEM_ACCESS_FLAGS_PROT_READ)
        map->ro |= bit;
}

CUresult bn_wrap_cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc *desc, size_t count)
{
    BN_GATED();
    BN_LOCKED();
    if (touches_ours_locked(ptr, size))
        return CUDA_ERROR_INVALID_VALUE;
    CUresult r = bn_real.cuMemSetAccess(ptr, size, desc, count);
    if (r != CUDA_SUCCESS)
        return r;
    for (struct bn_node *n = bn_tree_ceil(&bn_track.maps, ptr); n && n->key - ptr < size;
         n = bn_tree_ceil(&bn_track.maps, n->key + 1))
        for (size_t i = 0; i < count; i++)
            merge_access(BN_CONTAINER(n, struct bn_map, by_va), &desc[i]);
    return CUDA_SUCCESS;
}

/* ---- sparse arrays --------------------------------------------------------------------------------- */

typedef CUresult (*map_arrays_fn)(CUarrayMapInfo *, unsigned int, CUstream);

/* Handles bound to arrays are of tile pools, which are left to the driver; a segment of another kind that gets bound all the
 * same cannot be taken away any more. */
static CUresult map_arrays(map_arrays_fn real, CUarrayMapInfo *list, unsigned int count, CUstream stream)
{
    CUarrayMapInfo some[16];
    BN_LOCKED();
    bool tokens = false;
    for (unsigned i = 0; list && i < count; i++)
        tokens = tokens || bn_is_token(list[i].memHandle.memHandle);
    if (!tokens)
        return real(list, count, stream);
    for (unsigned at = 0; at < count;) {
        unsigned n = count - at < 16 ? count - at : 16;
        for (unsigned i = 0; i < n; i++) {
            some[i] = list[at + i];
            some[i].memHandle.memHandle = real_of_locked(some[i].memHandle.memHandle);
        }
        CUresult r = real(some, n, stream);
        if (r != CUDA_SUCCESS)
            return r;
        for (unsigned i = 0; i < n; i++) {
            struct bn_seg *seg = bn_seg_of_token_locked(list[at + i].memHandle.memHandle);
            if (seg && bn_seg_evictable(seg))
                seg->array_maps = 1;
        }
        at += n;
    }
    return CUDA_SUCCESS;
}

CUresult bn_wrap_cuMemMapArrayAsync(CUarrayMapInfo *mapInfoList, unsigned int count, CUstream hStream)
{
    BN_GATED();
    return map_arrays(bn_real.cuMemMapArrayAsync, mapInfoList, count, hStream);
}

CUresult bn_wrap_cuMemMapArrayAsync_ptsz(CUarrayMapInfo *mapInfoList, unsigned int count, CUstream hStream)
{
    BN_GATED();
    return map_arrays(bn_real.cuMemMapArrayAsync_ptsz, mapInfoList, count, hStream);
}

/* ---- multicast: counted, never evicted ------------------------------------------------------------- */

/* A call that takes handles: translated under the lock, made without it, since binding waits for other processes. */
static CUmemGenericAllocationHandle translate(CUmemGenericAllocationHandle handle)
{
    BN_LOCKED();
    return real_of_locked(handle);
}

CUresult bn_wrap_cuMulticastAddDevice(CUmemGenericAllocationHandle mcHandle, CUdevice dev)
{
    BN_GATED();
    return bn_real.cuMulticastAddDevice(translate(mcHandle), dev);
}

CUresult bn_wrap_cuMulticastBindMem(CUmemGenericAllocationHandle mcHandle, size_t mcOffset,
                                    CUmemGenericAllocationHandle memHandle, size_t memOffset, size_t size,
                                    unsigned long long flags)
{
    BN_GATED();
    return bn_real.cuMulticastBindMem(translate(mcHandle), mcOffset, translate(memHandle), memOffset, size,
                                      flags);
}

CUresult bn_wrap_cuMulticastBindMem_v2(CUmemGenericAllocationHandle mcHandle, CUdevice dev, size_t mcOffset,
                                       CUmemGenericAllocationHandle memHandle, size_t memOffset, size_t size,
                                       unsigned long long flags)
{
    BN_GATED();
    return bn_real.cuMulticastBindMem_v2(translate(mcHandle), dev, mcOffset, translate(memHandle), memOffset,
                                         size, flags);
}

CUresult bn_wrap_cuMulticastBindAddr(CUmemGenericAllocationHandle mcHandle, size_t mcOffset,
                                     CUdeviceptr memptr, size_t size, unsigned long long flags)
{
    BN_GATED();
    return bn_real.cuMulticastBindAddr(translate(mcHandle), mcOffset, memptr, size, flags);
}

CUresult bn_wrap_cuMulticastBindAddr_v2(CUmemGenericAllocationHandle mcHandle, CUdevice dev, size_t mcOffset,
                                        CUdeviceptr memptr, size_t size, unsigned long long flags)
{
    BN_GATED();
    return bn_real.cuMulticastBindAddr_v2(translate(mcHandle), dev, mcOffset, memptr, size, flags);
}

CUresult bn_wrap_cuMulticastUnbind(CUmemGenericAllocationHandle mcHandle, CUdevice dev, size_t mcOffset,
                                   size_t size)
{
    BN_GATED();
    return bn_real.cuMulticastUnbind(translate(mcHandle), dev, mcOffset, size);
}
