#include "agent/track.h"

#include "agent/agent.h"

#include <string.h>

struct bn_track bn_track = {
    .seg_pool = {.size = sizeof(struct bn_seg)},
    .map_pool = {.size = sizeof(struct bn_map)},
    .alloc_pool = {.size = sizeof(struct bn_alloc)},
    .node_pool = {.size = sizeof(struct bn_node)},
    .ctx_pool = {.size = sizeof(struct bn_ctx)},
    .peer_pool = {.size = sizeof(struct bn_peer)},
};

/* Handles that the driver did not release. */
#define STUCK_MAX 64
static CUmemGenericAllocationHandle stuck[STUCK_MAX];
static size_t stuck_count; /* above STUCK_MAX: some are not known any more */

static int attribute(CUdevice dev, CUdevice_attribute which)
{
    int value = 0;
    if (!bn_real.cuDeviceGetAttribute || bn_real.cuDeviceGetAttribute(&value, which, dev) != CUDA_SUCCESS)
        return 0;
    return value;
}

static bool vmm_calls_present(void)
{
    return bn_real.cuMemAddressReserve && bn_real.cuMemAddressFree && bn_real.cuMemCreate &&
           bn_real.cuMemRelease && bn_real.cuMemMap && bn_real.cuMemUnmap && bn_real.cuMemSetAccess &&
           bn_real.cuMemExportToShareableHandle && bn_real.cuMemImportFromShareableHandle &&
           bn_real.cuMemGetAllocationGranularity && bn_real.cuCtxGetDevice && bn_real.cuCtxGetCurrent &&
           bn_real.cuCtxSetCurrent && bn_real.cuCtxSynchronize && bn_real.cuCtxPushCurrent_v2 &&
           bn_real.cuCtxPopCurrent_v2;
}

static void look_at(CUdevice dev, struct bn_device *d)
{
    CUuuid uuid = {{0}};
    CUresult r = bn_real.cuDeviceGetUuid_v2 ? bn_real.cuDeviceGetUuid_v2(&uuid, dev) : CUDA_ERROR_NOT_FOUND;
    if (r != CUDA_SUCCESS && bn_real.cuDeviceGetUuid)
        r = bn_real.cuDeviceGetUuid(&uuid, dev);
    if (r != CUDA_SUCCESS)
        return;
    memcpy(d->uuid, uuid.bytes, sizeof(d->uuid));
    d->known = true;
    if (!vmm_calls_present() || !attribute(dev, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) ||
        !attribute(dev, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED))
        return;
    d->rdma = attribute(dev, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED);
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                .location = {CU_MEM_LOCATION_TYPE_DEVICE, dev}};
    prop.allocFlags.gpuDirectRDMACapable = d->rdma;
    size_t granularity = 0;
    r = bn_real.cuMemGetAllocationGranularity(&granularity, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
    if (r != CUDA_SUCCESS || granularity == 0 || granularity & (granularity - 1))
        return;
    /* The protocol's segments are multiples of 2 MiB. */
    d->granularity = granularity < BN_CONVERT_MIN ? BN_CONVERT_MIN : granularity;
    d->convertible = true;
}

/* Which processes are clients is settled when the driver starts in them, and told for each device. */
static enum bn_agent_mps mps_client(int count)
{
    enum bn_agent_mps answer = BN_AGENT_MPS_UNKNOWN;
    for (int i = 0; i < count; i++) {
        int value = 0;
        if (!bn_real.cuDeviceGetAttribute ||
            bn_real.cuDeviceGetAttribute(&value, CU_DEVICE_ATTRIBUTE_MPS_ENABLED, i) != CUDA_SUCCESS)
            continue; /* a driver that does not know the attribute yet */
        if (value)
            return BN_AGENT_MPS_CLIENT;
        answer = BN_AGENT_MPS_NO;
    }
    return answer;
}

void bn_track_devices(void)
{
    int count = 0;
    if (!bn_real.cuDeviceGetCount || bn_real.cuDeviceGetCount(&count) != CUDA_SUCCESS ||
        count > (int)BN_GPUS_MAX)
        bn_store(&bn_track.missed, true); /* work on those that are not known would not be waited for */
    count = count > (int)BN_GPUS_MAX ? (int)BN_GPUS_MAX : count;
    for (int i = 0; i < count; i++) {
        CUdevice dev;
        /* The agent indexes by device; the driver's devices have been their ordinals since there are any. */
        if (bn_real.cuDeviceGet && bn_real.cuDeviceGet(&dev, i) == CUDA_SUCCESS && dev == i)
            look_at(dev, &bn_track.devices[i]);
    }
    bn_track.device_count = count;
    struct bn_agent_page *page = bn_agent_page();
    for (int i = 0; i < count; i++)
        memcpy(page->gpu[i].uuid, bn_track.devices[i].uuid, 16);
    bn_store(&page->gpu_count, (uint32_t)count);
    bn_store(&page->mps, (uint32_t)mps_client(count));
}

void bn_track_moved_locked(CUdevice dev, const uint8_t uuid[16])
{
    memcpy(bn_track.devices[dev].uuid, uuid, 16);
    memcpy(bn_agent_page()->gpu[dev].uuid, uuid, 16);
}

void bn_track_drop(void)
{
    struct bn_track *t = &bn_track;
    BN_TREE_EACH(&t->segs, n)
    {
        struct bn_seg *seg = BN_CONTAINER(n, struct bn_seg, by_id);
        bn_kept_close(&seg->kept);
        for (struct bn_alloc *a = seg->offers; a; a = a->next)
            bn_kept_close(&a->offered);
    }
    bn_pool_drop(&t->seg_pool);
    bn_pool_drop(&t->map_pool);
    bn_pool_drop(&t->alloc_pool);
    bn_pool_drop(&t->node_pool);
    bn_pool_drop(&t->ctx_pool);
    bn_pool_drop(&t->peer_pool);
    t->lock.word = 0;
    t->segs = t->maps = t->allocs = t->captures = t->imports = (struct bn_tree){0};
    t->ctxs = NULL;
    t->peers = NULL;
    t->later = NULL;
    t->capturing = 0;
    t->green = t->missed = false;
    t->doomed = 0;
    stuck_count = 0;
    t->device_count = 0;
    bn_share_drop();
    memset(t->devices, 0, sizeof(t->devices));
}

/* ---- the page ------------------------------------------------------------------------------------ */

void bn_page_add(uint64_t *counter, int64_t delta)
{
    __atomic_fetch_add(counter, (uint64_t)delta, __ATOMIC_RELAXED);
}

/* Count a segment in (+1) or out (-1). */
static void account(const struct bn_seg *seg, int sign)
{
    struct bn_agent_page *page = bn_agent_page();
    int64_t bytes = (int64_t)seg->size * sign;
    switch (seg->kind) {
    case BN_SEG_ALLOC:
    case BN_SEG_APP:
        if (seg->dev >= 0 && seg->dev < (int)BN_GPUS_MAX) {
            bn_page_add(&page->gpu[seg->dev].bytes, bytes);
            bn_page_add(&page->gpu[seg->dev].segments, sign);
        }
        break;
    case BN_SEG_PLAIN: bn_page_add(&page->native_bytes, bytes); break;
    case BN_SEG_HOST: bn_page_add(&page->blockers.host_vmm_bytes, bytes); break;
    case BN_SEG_FOREIGN: bn_page_add(&page->blockers.imported_handles, sign); break;
    case BN_SEG_MULTICAST: bn_page_add(&page->blockers.multicast_handles, sign); break;
    }
}

/* ---- notes ----------------------------------------------------------------------------------------- */

bool bn_note_locked(struct bn_tree *noted, uint64_t key)
{
    if (bn_tree_find(noted, key))
        return false;
    struct bn_node *n = bn_pool_get(&bn_track.node_pool);
    if (n)
        bn_tree_insert(noted, n, key);
    else
        bn_store(&bn_track.missed, true);
    return true;
}

bool bn_unnote_locked(struct bn_tree *noted, uint64_t key)
{
    struct bn_node *n = bn_tree_find(noted, key);
    if (!n)
        return false;
    bn_tree_remove(noted, n);
    bn_pool_put(&bn_track.node_pool, n);
    return true;
}

/* ---- handles --------------------------------------------------------------------------------------- */

CUresult bn_release_locked(CUmemGenericAllocationHandle handle)
{
    CUresult r = bn_real.cuMemRelease(handle);
    if (r == CUDA_SUCCESS)
        return r;
    if (stuck_count < STUCK_MAX)
        stuck[stuck_count] = handle;
    stuck_count++;
    return r;
}

CUresult bn_release_stuck_locked(void)
{
    if (stuck_count > STUCK_MAX)
        return CUDA_ERROR_UNKNOWN;
    for (; stuck_count > 0; stuck_count--) {
        CUresult r = bn_real.cuMemRelease(stuck[stuck_count - 1]);
        if (r != CUDA_SUCCESS)
            return r;
    }
    return CUDA_SUCCESS;
}

/* ---- segments and mappings ----------------------------------------------------------------------- */

struct bn_seg *bn_seg_new_locked(enum bn_seg_kind kind, CUdevice dev, uint64_t size)
{
    struct bn_seg *seg = bn_pool_get(&bn_track.seg_pool);
    if (!seg)
        return NULL;
    seg->kind = kind;
    seg->dev = dev;
    seg->size = size;
    bn_tree_insert(&bn_track.segs, &seg->by_id, ++bn_track.last_id);
    account(seg, 1);
    return seg;
}

CUresult bn_seg_create_locked(struct bn_seg *seg, uint32_t *flags)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                .location = {CU_MEM_LOCATION_TYPE_DEVICE, seg->dev}};
    prop.allocFlags.gpuDirectRDMACapable = !!(*flags & BN_SEGMENT_RDMA);
    prop.allocFlags.compressionType = *flags & BN_SEGMENT_COMPRESSED ? CU_MEM_ALLOCATION_COMP_GENERIC : 0;
    CUresult r = bn_real.cuMemCreate(&seg->real, seg->size, &prop, 0);
    if (r != CUDA_SUCCESS && r != CUDA_ERROR_OUT_OF_MEMORY && *flags) {
        memset(&prop.allocFlags, 0, sizeof(prop.allocFlags));
        *flags = 0;
        r = bn_real.cuMemCreate(&seg->real, seg->size, &prop, 0);
    }
    if (r != CUDA_SUCCESS)
        seg->real = 0;
    return r;
}

struct bn_map *bn_map_new_locked(struct bn_seg *seg, CUdeviceptr va, uint64_t size, uint64_t offset)
{
    if (bn_tree_find(&bn_track.maps, va))
        return NULL;
    struct bn_map *map = bn_pool_get(&bn_track.map_pool);
    if (!map)
        return NULL;
    map->seg = seg;
    map->size = size;
    map->offset = offset;
    map->next = seg->maps;
    seg->maps = map;
    bn_tree_insert(&bn_track.maps, &map->by_va, va);
    return map;
}

void bn_map_drop_locked(struct bn_map *map)
{
    struct bn_map **at = &map->seg->maps;
    while (*at != map)
        at = &(*at)->next;
    *at = map->next;
    bn_tree_remove(&bn_track.maps, &map->by_va);
    bn_pool_put(&bn_track.map_pool, map);
}

void bn_seg_settle_locked(struct bn_seg *seg)
{
    if (seg->refs || seg->maps || seg->array_maps)
        return;
    if (seg->present)
        bn_release_locked(seg->real);
    bn_kept_close(&seg->kept);
    bn_unshare_locked(&seg->shared);
    account(seg, -1);
    bn_tree_remove(&bn_track.segs, &seg->by_id);
    bn_pool_put(&bn_track.seg_pool, seg);
}

void bn_seg_destroy_locked(struct bn_seg *seg)
{
    bool ours = seg->reserved;
    for (struct bn_map *map = seg->maps, *next; map; map = next) {
        CUdeviceptr va = map->by_va.key;
        uint64_t size = map->size;
        next = map->next;
        if (map->mapped && bn_real.cuMemUnmap(va, size) != CUDA_SUCCESS)
            continue;
        bn_map_drop_locked(map);
        if (ours)
            bn_real.cuMemAddressFree(va, size);
    }
    bool doomed = seg->maps != NULL;
    bn_store(&bn_track.doomed, bn_track.doomed + doomed - seg->doomed);
    seg->doomed = doomed;
    seg->ctx = NULL;
    seg->refs = 0;
    bn_seg_settle_locked(seg);
}

void bn_doomed_again_locked(void)
{
    BN_TREE_EACH(&bn_track.segs, n)
    {
        struct bn_seg *seg = BN_CONTAINER(n, struct bn_seg, by_id);
        if (seg->doomed)
            bn_seg_destroy_locked(seg);
    }
}

struct bn_seg *bn_seg_of_token_locked(CUmemGenericAllocationHandle handle)
{
    if (!bn_is_token(handle))
        return NULL;
    struct bn_seg *seg =
        BN_CONTAINER(bn_tree_find(&bn_track.segs, handle & ~BN_TOKEN_MASK), struct bn_seg, by_id);
    return seg && seg->refs ? seg : NULL;
}

struct bn_map *bn_map_at_locked(CUdeviceptr p)
{
    struct bn_map *map = BN_CONTAINER(bn_tree_floor(&bn_track.maps, p), struct bn_map, by_va);
    return map && p - map->by_va.key < map->size ? map : NULL;
}

struct bn_alloc *bn_alloc_at_locked(CUdeviceptr p)
{
    struct bn_alloc *a = BN_CONTAINER(bn_tree_floor(&bn_track.allocs, p), struct bn_alloc, by_va);
    return a && p - a->by_va.key < a->bytes ? a : NULL;
}

CUdeviceptr bn_address_locked(CUdeviceptr p)
{
    const struct bn_map *map = bn_map_at_locked(p);
    return map && map->seg->reserved && !bn_alloc_at_locked(p) ? BN_NOWHERE : p;
}

CUresult bn_map_apply_access_locked(const struct bn_map *map)
{
    CUmemAccessDesc desc[BN_GPUS_MAX + 1];
    size_t n = 0;
    for (int dev = 0; dev < (int)BN_GPUS_MAX; dev++) {
        uint64_t bit = 1ULL << dev;
        if ((map->rw | map->ro) & bit)
            desc[n++] = (CUmemAccessDesc){{CU_MEM_LOCATION_TYPE_DEVICE, dev},
                                          map->rw & bit ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE
                                                        : CU_MEM_ACCESS_FLAGS_PROT_READ};
    }
    if (map->host.flags)
        desc[n++] = map->host;
    return n ? bn_real.cuMemSetAccess(map->by_va.key, map->size, desc, n) : CUDA_SUCCESS;
}

/* ---- allocations ----------------------------------------------------------------------------------- */

uint64_t bn_alloc_size(const struct bn_alloc *a)
{
    uint64_t unit = bn_track.devices[a->seg->dev].granularity;
    return (a->bytes + unit - 1) & ~(unit - 1);
}

void bn_alloc_retire_locked(struct bn_alloc *a)
{
    struct bn_agent_page *page = bn_agent_page();
    bn_unshare_locked(&a->shared);
    if (!a->seg) {
        bn_page_add(a->managed ? &page->blockers.managed_bytes : &page->native_bytes, -(int64_t)a->bytes);
        return;
    }
    bn_ipc_forget_locked(a);
    if (a->seg->kind == BN_SEG_FOREIGN)
        bn_opened_locked(a->origin, -1);
    else
        bn_page_add(&page->allocations, -1);
}

void bn_alloc_release_locked(struct bn_alloc *a)
{
    struct bn_seg *seg = a->seg;
    bool last = seg != NULL;
    if (seg && seg->slab.units) {
        uint64_t unit = bn_track.devices[seg->dev].granularity;
        uint64_t at = a->by_va.key - seg->maps->by_va.key;
        last = bn_slab_put(&seg->slab, (unsigned)(at / unit), (unsigned)(bn_alloc_size(a) / unit));
    }
    if (last)
        bn_seg_destroy_locked(seg);
    bn_pool_put(&bn_track.alloc_pool, a);
}

void bn_free_later_locked(void)
{
    while (bn_track.later && bn_track.captures.count == 0) {
        struct bn_alloc *a = bn_track.later;
        bn_track.later = a->next;
        bn_alloc_release_locked(a);
    }
}

/* ---- contexts ------------------------------------------------------------------------------------ */

struct bn_ctx *bn_ctx_find_locked(CUcontext ctx)
{
    struct bn_ctx *c = bn_track.ctxs;
    while (c && c->ctx != ctx)
        c = c->next;
    return c;
}

void bn_ctx_add_locked(CUcontext ctx, CUdevice dev, enum bn_ctx_kind kind, CUgreenCtx green)
{
    if (bn_ctx_find_locked(ctx))
        return;
    struct bn_ctx *c = bn_pool_get(&bn_track.ctx_pool);
    if (!c) {
        bn_store(&bn_track.missed, true);
        return;
    }
    *c = (struct bn_ctx){.next = bn_track.ctxs, .ctx = ctx, .green = green, .dev = dev, .kind = kind};
    bn_track.ctxs = c;
}

static void forget_ctx(CUcontext ctx)
{
    for (struct bn_ctx **at = &bn_track.ctxs; *at;) {
        struct bn_ctx *c = *at;
        if (c->ctx == ctx) {
            bn_slab_orphan(&c->slabs);
            *at = c->next;
            bn_pool_put(&bn_track.ctx_pool, c);
        } else {
            at = &c->next;
        }
    }
    for (struct bn_peer **at = &bn_track.peers; *at;) {
        struct bn_peer *p = *at;
        if (p->from == ctx || p->to == ctx) {
            *at = p->next;
            bn_pool_put(&bn_track.peer_pool, p);
        } else {
            at = &p->next;
        }
    }
}

void bn_ctx_gone_locked(CUcontext ctx, bool forget)
{
    BN_TREE_EACH(&bn_track.allocs, n)
    {
        struct bn_alloc *a = BN_CONTAINER(n, struct bn_alloc, by_va);
        if (a->ctx != ctx)
            continue;
        bn_tree_remove(&bn_track.allocs, &a->by_va);
        bn_alloc_retire_locked(a);
        bn_alloc_release_locked(a);
    }
    /* What is left of it: freed during a capture, or just being freed by another thread. */
    BN_TREE_EACH(&bn_track.segs, n)
    {
        struct bn_seg *seg = BN_CONTAINER(n, struct bn_seg, by_id);
        if (seg->ctx == ctx)
            seg->ctx = NULL;
    }
    if (forget)
        forget_ctx(ctx);
}

CUresult bn_ctx_synchronize(CUcontext ctx)
{
    CUcontext current = NULL;
    CUresult r = bn_real.cuCtxGetCurrent(&current);
    if (r != CUDA_SUCCESS)
        return r;
    if (current == ctx)
        return bn_real.cuCtxSynchronize();
    r = bn_real.cuCtxPushCurrent_v2(ctx);
    if (r != CUDA_SUCCESS)
        return r;
    r = bn_real.cuCtxSynchronize();
    bn_real.cuCtxPopCurrent_v2(&current);
    return r;
}

void bn_ctx_borrow(void)
{
    if (bn_track.ctxs)
        bn_real.cuCtxSetCurrent(bn_track.ctxs->ctx);
}

void bn_ctx_unborrow(void)
{
    bn_real.cuCtxSetCurrent(NULL);
}
