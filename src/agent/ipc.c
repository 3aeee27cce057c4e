/* Legacy IPC (cuIpcGetMemHandle and its like). The driver refuses it for VMM memory, so for converted allocations it is done
 * here: the handle names a descriptor in the exporting process, and the opener fetches that with pidfd_getfd(2) and imports
 * it. A process that has memory of another one open cannot be checkpointed (the driver could not restore it): counted.
 *
 * Under Yama's restricted mode fetching a descriptor is for descendants' parents alone, unless the owner agrees; exporting
 * is taken as agreement, since the memory is meant for a process that the owner cannot name. */
#include "agent/agent.h"
#include "agent/gate.h"
#include "agent/track.h"

#include <fcntl.h>
#include <string.h>
#include <sys/prctl.h>

#ifndef PR_SET_PTRACER
#define PR_SET_PTRACER 0x59616d61
#define PR_SET_PTRACER_ANY ((unsigned long)-1)
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif

static const char magic[8] = "bennuip2"; /* the first had no offset, and must not be mistaken for this */

struct handle {
    char magic[8];
    uint32_t pid; /* in the exporter's pid namespace, which the opener must share */
    int32_t fd;
    uint8_t instance[16]; /* of the exporter's agent */
    uint64_t id;          /* of the allocation */
    uint64_t size, bytes; /* of the segment, and as asked for */
    uint64_t offset;      /* in the segment */
};
_Static_assert(sizeof(struct handle) == sizeof(CUipcMemHandle), "fills the driver's handle");

/* ---- the owner -------------------------------------------------------------------------------------- */

/* A descriptor for openers to fetch, kept until the memory is freed or evicted. Each allocation has one of its own, even where
 * several stand for the same segment: when one is freed, its handle is void. */
static CUresult offer_locked(struct bn_alloc *a)
{
    struct bn_seg *seg = a->seg;
    int fd = -1;
    if (bn_kept_valid(&a->offered))
        return CUDA_SUCCESS;
    bn_ipc_forget_locked(a); /* the program closed it */
    if (seg->kept.fd) {
        fd = bn_kept_valid(&seg->kept) ? fcntl(seg->kept.fd, F_DUPFD_CLOEXEC, 0) : -1;
        if (fd < 0)
            return CUDA_ERROR_OPERATING_SYSTEM;
    } else {
        CUresult r =
            bn_real.cuMemExportToShareableHandle(&fd, seg->real, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
        if (r != CUDA_SUCCESS)
            return r;
    }
    if (bn_kept_take(&a->offered, fd) < 0) {
        close(fd);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    a->next = seg->offers;
    seg->offers = a;
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
    return CUDA_SUCCESS;
}

/* Make the offered numbers stand for the file of `from`. */
static void put_in_place(struct bn_seg *seg, int from)
{
    for (struct bn_alloc *a = seg->offers; a; a = a->next)
        if (bn_kept_valid(&a->offered) && from >= 0 && dup3(from, a->offered.fd, O_CLOEXEC) >= 0)
            bn_kept_moved(&a->offered);
}

void bn_ipc_withdraw_locked(struct bn_seg *seg)
{
    if (seg->offers)
        put_in_place(seg, bn_agent_placeholder());
}

void bn_ipc_offer_again_locked(struct bn_seg *seg)
{
    if (seg->offers && bn_kept_valid(&seg->kept))
        put_in_place(seg, seg->kept.fd);
}

void bn_ipc_forget_locked(struct bn_alloc *a)
{
    if (!a->offered.fd)
        return;
    struct bn_alloc **at = &a->seg->offers;
    while (*at != a)
        at = &(*at)->next;
    *at = a->next;
    bn_kept_close(&a->offered);
}

CUresult bn_wrap_cuIpcGetMemHandle(CUipcMemHandle *pHandle, CUdeviceptr dptr)
{
    BN_GATED();
    bn_lock(&bn_track.lock);
    struct bn_alloc *a = pHandle ? bn_alloc_at_locked(dptr) : NULL;
    if (!a || !a->seg) {
        CUresult r = bn_real.cuIpcGetMemHandle(pHandle, bn_address_locked(dptr));
        if (r == CUDA_SUCCESS)
            bn_share_locked(a ? &a->shared : NULL, BN_SHARED_IPC_NATIVE);
        bn_unlock(&bn_track.lock);
        return r;
    }
    CUresult r = a->seg->kind == BN_SEG_ALLOC ? offer_locked(a) : CUDA_ERROR_INVALID_VALUE;
    if (r == CUDA_SUCCESS) {
        struct handle h = {.pid = (uint32_t)getpid(),
                           .fd = a->offered.fd,
                           .id = a->id,
                           .size = a->seg->size,
                           .bytes = a->bytes,
                           .offset = a->by_va.key - a->seg->maps->by_va.key};
        memcpy(h.magic, magic, sizeof(h.magic));
        memcpy(h.instance, bn_agent_page()->instance, sizeof(h.instance));
        memcpy(pHandle, &h, sizeof(h));
        bn_share_locked(&a->shared, BN_SHARED_IPC);
    }
    bn_unlock(&bn_track.lock);
    return r;
}

/* ---- the opener ------------------------------------------------------------------------------------- */

static int fetch(const struct handle *h)
{
    int pidfd = (int)syscall(SYS_pidfd_open, (pid_t)h->pid, 0);
    if (pidfd < 0)
        return -1;
    int fd = (int)syscall(SYS_pidfd_getfd, pidfd, h->fd, 0);
    close(pidfd);
    return fd;
}

static struct bn_alloc *already_open_locked(const struct handle *h, CUcontext ctx)
{
    BN_TREE_EACH(&bn_track.allocs, n)
    {
        struct bn_alloc *a = BN_CONTAINER(n, struct bn_alloc, by_va);
        if (a->opens && a->ctx == ctx && a->origin_id == h->id &&
            memcmp(a->origin, h->instance, sizeof(a->origin)) == 0)
            return a;
    }
    return NULL;
}

/* Import and map what fd stands for, which is a whole segment: the driver maps no part of one. On error nothing is left. */
static CUresult map_foreign_locked(const struct handle *h, int fd, CUcontext ctx, CUdevice dev,
                                   CUdeviceptr *out)
{
    CUdeviceptr va;
    CUresult r = bn_real.cuMemAddressReserve(&va, h->size, 0, 0, 0);
    if (r != CUDA_SUCCESS)
        return r;
    struct bn_alloc *a = bn_pool_get(&bn_track.alloc_pool);
    struct bn_seg *seg = bn_seg_new_locked(BN_SEG_FOREIGN, dev, h->size);
    struct bn_map *map = seg ? bn_map_new_locked(seg, va, h->size, 0) : NULL;
    if (map) {
        seg->reserved = true;
        seg->ctx = ctx;
    }
    r = a && map && !bn_tree_find(&bn_track.allocs, va + h->offset) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
    if (r == CUDA_SUCCESS)
        r = bn_real.cuMemImportFromShareableHandle(&seg->real, (void *)(intptr_t)fd,
                                                   CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (r == CUDA_SUCCESS) {
        seg->present = true;
        r = bn_real.cuMemMap(va, h->size, 0, seg->real, 0);
    }
    if (r == CUDA_SUCCESS) {
        map->mapped = true;
        map->rw = 1ULL << dev;
        r = bn_map_apply_access_locked(map);
    }
    if (r != CUDA_SUCCESS) {
        bn_pool_put(&bn_track.alloc_pool, a);
        if (seg)
            bn_seg_destroy_locked(seg);
        if (!map)
            bn_real.cuMemAddressFree(va, h->size);
        return r;
    }
    a->bytes = h->bytes;
    a->seg = seg;
    a->ctx = ctx;
    a->dev = dev;
    a->id = ++bn_track.last_id;
    a->opens = 1;
    a->origin_id = h->id;
    memcpy(a->origin, h->instance, sizeof(a->origin));
    bn_opened_locked(a->origin, 1);
    bn_tree_insert(&bn_track.allocs, &a->by_va, va + h->offset);
    *out = va + h->offset;
    return CUDA_SUCCESS;
}

static CUresult open_ours(const struct handle *h, unsigned flags, CUdeviceptr *out)
{
    CUcontext ctx = NULL;
    CUdevice dev;
    CUresult r = bn_real.cuCtxGetDevice(&dev);
    if (r == CUDA_SUCCESS)
        r = bn_real.cuCtxGetCurrent(&ctx);
    if (r != CUDA_SUCCESS)
        return r;
    if (flags & ~(unsigned)CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS || h->offset > h->size ||
        h->bytes > h->size - h->offset || dev < 0 || dev >= (int)BN_GPUS_MAX)
        return CUDA_ERROR_INVALID_VALUE;
    if (memcmp(h->instance, bn_agent_page()->instance, sizeof(h->instance)) == 0)
        return CUDA_ERROR_INVALID_CONTEXT; /* the driver's answer in the process that made the handle */
    r = bn_ctx_of_memory(&ctx, dev);
    if (r != CUDA_SUCCESS)
        return r;
    BN_LOCKED();
    struct bn_alloc *open = already_open_locked(h, ctx);
    if (open) {
        open->opens++;
        *out = open->by_va.key;
        return CUDA_SUCCESS;
    }
    int fd = fetch(h);
    if (fd < 0)
        return CUDA_ERROR_INVALID_VALUE;
    r = map_foreign_locked(h, fd, ctx, dev, out);
    close(fd);
    return r;
}

static bool is_ours(const CUipcMemHandle *handle, struct handle *h)
{
    memcpy(h, handle, sizeof(*h));
    return memcmp(h->magic, magic, sizeof(h->magic)) == 0 && bn_agent_converting();
}

static CUresult count_native(CUresult r)
{
    if (r == CUDA_SUCCESS)
        bn_page_add(&bn_agent_page()->blockers.imported_handles, 1);
    return r;
}

CUresult bn_wrap_cuIpcOpenMemHandle(CUdeviceptr *pdptr, CUipcMemHandle handle, unsigned int Flags)
{
    BN_GATED();
    struct handle h;
    if (pdptr && is_ours(&handle, &h))
        return open_ours(&h, Flags, pdptr);
    return count_native(bn_real.cuIpcOpenMemHandle(pdptr, handle, Flags));
}

CUresult bn_wrap_cuIpcOpenMemHandle_v2(CUdeviceptr *pdptr, CUipcMemHandle handle, unsigned int Flags)
{
    BN_GATED();
    struct handle h;
    if (pdptr && is_ours(&handle, &h))
        return open_ours(&h, Flags, pdptr);
    return count_native(bn_real.cuIpcOpenMemHandle_v2(pdptr, handle, Flags));
}

/* 1: ours and open no more, its context is to be waited for and *out, out of the table, to be released; 0: ours, still open;
 * -1: not ours. */
static int close_ours_locked(CUdeviceptr dptr, struct bn_alloc **out)
{
    struct bn_alloc *a = BN_CONTAINER(bn_tree_find(&bn_track.allocs, dptr), struct bn_alloc, by_va);
    if (!a || !a->opens)
        return -1;
    if (a->opens > 1) {
        a->opens--;
        return 0;
    }
    bn_tree_remove(&bn_track.allocs, &a->by_va);
    *out = a;
    return 1;
}

CUresult bn_wrap_cuIpcCloseMemHandle(CUdeviceptr dptr)
{
    BN_GATED();
    struct bn_alloc *a = NULL;
    int closed;
    {
        BN_LOCKED();
        closed = close_ours_locked(dptr, &a);
    }
    if (closed < 0) {
        CUresult r = bn_real.cuIpcCloseMemHandle(dptr);
        if (r == CUDA_SUCCESS)
            bn_page_add(&bn_agent_page()->blockers.imported_handles, -1);
        return r;
    }
    if (closed == 0)
        return CUDA_SUCCESS;
    CUresult r = bn_ctx_synchronize(a->ctx);
    BN_LOCKED();
    if (r != CUDA_SUCCESS && a->seg->ctx) { /* something may still be at work on it: it stays open */
        bn_tree_insert(&bn_track.allocs, &a->by_va, a->by_va.key);
        return r;
    }
    bn_alloc_retire_locked(a);
    bn_alloc_release_locked(a);
    return r;
}

/* ---- memory pools of other processes: counted --------------------------------------------------------- */

CUresult bn_wrap_cuMemPoolImportFromShareableHandle(CUmemoryPool *pool_out, void *handle,
                                                    CUmemAllocationHandleType handleType,
                                                    unsigned long long flags)
{
    BN_GATED();
    CUresult r = bn_real.cuMemPoolImportFromShareableHandle(pool_out, handle, handleType, flags);
    if (r != CUDA_SUCCESS || !pool_out)
        return r;
    BN_LOCKED();
    if (bn_note_locked(&bn_track.imports, (uint64_t)(uintptr_t)*pool_out))
        bn_page_add(&bn_agent_page()->blockers.imported_handles, 1);
    return r;
}

CUresult bn_wrap_cuMemPoolDestroy(CUmemoryPool pool)
{
    BN_GATED();
    CUresult r = bn_real.cuMemPoolDestroy(pool);
    if (r != CUDA_SUCCESS)
        return r;
    BN_LOCKED();
    bn_share_pool_gone_locked(pool);
    if (bn_unnote_locked(&bn_track.imports, (uint64_t)(uintptr_t)pool))
        bn_page_add(&bn_agent_page()->blockers.imported_handles, -1);
    return r;
}
