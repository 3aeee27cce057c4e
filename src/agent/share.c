/* Memory that is shared with other processes, counted in the page. The daemon takes memory away and gives other memory back at the
 * same addresses; whoever else has it mapped keeps the old, and nobody would notice. So it has to know beforehand. */
#include "agent/agent.h"
#include "agent/gate.h"
#include "agent/track.h"

#include <string.h>

static struct bn_tree pools; /* exported; key: the pool */

static const struct way {
    unsigned bit;
    size_t counter; /* in the page */
} ways[] = {
    {BN_SHARED_IPC, offsetof(struct bn_agent_sharing, ipc)},
    {BN_SHARED_IPC_NATIVE, offsetof(struct bn_agent_sharing, ipc_native)},
    {BN_SHARED_VMM, offsetof(struct bn_agent_sharing, vmm)},
    {BN_SHARED_ELSEWHERE, offsetof(struct bn_agent_sharing, elsewhere)},
};

static void count(unsigned bits, int change)
{
    for (size_t i = 0; i < sizeof(ways) / sizeof(ways[0]); i++)
        if (bits & ways[i].bit)
            bn_page_add((uint64_t *)(void *)((char *)&bn_agent_page()->sharing + ways[i].counter), change);
}

void bn_share_locked(unsigned *shared, unsigned way)
{
    if (shared && *shared & way)
        return;
    if (shared)
        *shared |= way;
    count(way, 1);
}

void bn_unshare_locked(unsigned *shared)
{
    count(*shared, -1);
    *shared = 0;
}

/* Where the entries do not suffice the owner stays unknown, and the last entry counts. */
void bn_opened_locked(const uint8_t owner[16], int change)
{
    struct bn_agent_opened *list = bn_agent_page()->sharing.opened, *unused = NULL;
    struct bn_agent_opened *others = &list[BN_AGENT_OPENED_MAX - 1];
    for (unsigned i = 0; i < BN_AGENT_OPENED_MAX - 1; i++) {
        if (bn_load(&list[i].handles) == 0) {
            unused = unused ? unused : &list[i];
        } else if (memcmp(list[i].owner, owner, sizeof(list[i].owner)) == 0) {
            bn_page_add(&list[i].handles, change);
            return;
        }
    }
    if (unused && change > 0) {
        memcpy(unused->owner, owner, sizeof(unused->owner));
        bn_store_rel(&unused->handles, 1);
    } else if (change > 0 || bn_load(&others->handles)) {
        memset(others->owner, 0xff, sizeof(others->owner));
        bn_page_add(&others->handles, change);
    }
}

void bn_share_drop(void)
{
    pools = (struct bn_tree){0};
}

/* ---- calls that share and need nothing else ---------------------------------------------------------- */

/* What lies in [ptr, ptr + size). */
static void share_range_locked(CUdeviceptr ptr, size_t size, unsigned way)
{
    struct bn_alloc *a = bn_alloc_at_locked(ptr);
    struct bn_map *map = bn_map_at_locked(ptr);
    if (a || !map) {
        bn_share_locked(a ? &a->shared : NULL, way);
        return;
    }
    for (struct bn_node *n = &map->by_va; n && (n->key <= ptr || n->key - ptr < size);
         n = bn_tree_ceil(&bn_track.maps, n->key + 1))
        bn_share_locked(&BN_CONTAINER(n, struct bn_map, by_va)->seg->shared, way);
}

/* The driver would hand out memory beyond the end of an allocation of ours: what else is in the segment. */
static bool beyond_ours_locked(CUdeviceptr ptr, size_t size)
{
    const struct bn_alloc *a = bn_alloc_at_locked(ptr);
    if (!a || !a->seg)
        return bn_address_locked(ptr) != ptr;
    return size > a->by_va.key + bn_alloc_size(a) - ptr;
}

CUresult bn_wrap_cuMemGetHandleForAddressRange(void *handle, CUdeviceptr dptr, size_t size, int handleType,
                                               unsigned long long flags)
{
    BN_GATED();
    BN_LOCKED();
    if (beyond_ours_locked(dptr, size))
        return CUDA_ERROR_INVALID_VALUE;
    CUresult r = bn_real.cuMemGetHandleForAddressRange(handle, dptr, size, handleType, flags);
    if (r != CUDA_SUCCESS)
        return r;
    share_range_locked(dptr, size, BN_SHARED_ELSEWHERE);
    return r;
}

CUresult bn_wrap_cuMemPoolExportToShareableHandle(void *handle_out, CUmemoryPool pool,
                                                  CUmemAllocationHandleType handleType,
                                                  unsigned long long flags)
{
    BN_GATED();
    CUresult r = bn_real.cuMemPoolExportToShareableHandle(handle_out, pool, handleType, flags);
    if (r != CUDA_SUCCESS)
        return r;
    BN_LOCKED();
    if (bn_note_locked(&pools, (uint64_t)(uintptr_t)pool))
        bn_page_add(&bn_agent_page()->sharing.pools, 1);
    return r;
}

void bn_share_pool_gone_locked(CUmemoryPool pool)
{
    if (bn_unnote_locked(&pools, (uint64_t)(uintptr_t)pool))
        bn_page_add(&bn_agent_page()->sharing.pools, -1);
}
