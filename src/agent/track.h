/* What the agent knows of the process's GPU memory. One lock, taken by calls that allocate, free, map or ask about memory,
 * never by launches and copies.
 *
 * A segment is a physical VMM allocation (what travels in an eviction), a mapping is a place where one is mapped, an
 * allocation is what cuMemAlloc gave to the application. Small allocations of one context share segments (slab.h).
 *
 * Functions named ..._locked want the lock held. Unless said otherwise any thread may call, inside the gate or (the agent's own
 * thread) with the gate closed.
 */
#pragma once

#include "agent/api/api_table.h"
#include "agent/mem.h"
#include "agent/slab.h"
#include "agent/sync.h"
#include "wire/agent_proto.h"

#include <sys/stat.h>

#define BN_GPUS_MAX 64u /* access is kept as bit masks */
#define BN_CONVERT_MIN (2u << 20)
#define BN_TOKEN_BASE 0xbe77000000000000ULL /* the driver's own handles are small numbers or addresses */
#define BN_TOKEN_MASK 0xffff000000000000ULL
#define BN_BUFFER_BASE 0x00be770000000000ULL /* numbers of allocations; the driver's count from 1 */
/* What the driver is asked about in place of memory that is ours, but not the application's: nothing can be mapped there. */
#define BN_NOWHERE ((CUdeviceptr)0x1000)

enum bn_seg_kind {
    BN_SEG_ALLOC = 1, /* made by us for cuMemAlloc; the application has no handle */
    BN_SEG_APP,       /* cuMemCreate on a device, evictable */
    BN_SEG_PLAIN,     /* cuMemCreate that cannot be exported: left to the driver */
    BN_SEG_HOST,      /* cuMemCreate at a host location */
    BN_SEG_FOREIGN,   /* imported by the application */
    BN_SEG_MULTICAST,
};

/* A descriptor of an imported segment, kept to export it again. The identity is checked before use: programs close
 * descriptors that are not theirs. */
struct bn_kept {
    int fd; /* 0: none (numbers this low are never used for it) */
    int mark;
    dev_t dev, rdev;
    ino_t ino;
};

struct bn_map;
struct bn_alloc;
struct bn_seg {
    struct bn_node by_id; /* key: id; the application's handle is BN_TOKEN_BASE | id */
    enum bn_seg_kind kind;
    CUdevice dev;
    uint64_t size;
    CUmemGenericAllocationHandle real;
    bool present;             /* `real` is valid */
    bool unfilled;            /* `real` is memory that was created in its place and is not its content yet */
    uint32_t flags;           /* BN_SEGMENT_... */
    uint32_t refs;            /* the application's references to the handle */
    uint32_t array_maps;      /* bound to sparse arrays, which nobody can put back */
    CUmemAllocationProp prop; /* as the application asked */
    struct bn_map *maps;
    struct bn_kept kept;
    bool reserved;           /* the address ranges of its mappings are ours */
    bool doomed;             /* nobody has it any more, but the driver did not unmap it: to be tried again */
    unsigned shared;         /* BN_SHARED_...: given to others */
    CUcontext ctx;           /* of cuMemAlloc's and IPC handles': in which it was made; NULL: that is gone */
    struct bn_slab slab;     /* BN_SEG_ALLOC: if more than one allocation may be in it */
    struct bn_alloc *offers; /* those in it that have IPC handles */
};

struct bn_map {
    struct bn_node by_va; /* key: address */
    struct bn_map *next;  /* of the same segment */
    struct bn_seg *seg;
    uint64_t size, offset;
    uint64_t rw, ro;      /* devices that have access */
    CUmemAccessDesc host; /* access of a host location; flags 0: none */
    bool mapped;
    bool bare; /* mapped, but without the access that is recorded */
};

struct bn_alloc {
    struct bn_node by_va; /* key: address */
    uint64_t bytes;       /* as asked for */
    struct bn_seg *seg;   /* NULL: native */
    CUcontext ctx;
    CUdevice dev; /* of converted ones */
    bool managed;
    bool sync_memops;       /* as the application set it; the driver does not know */
    unsigned shared;        /* BN_SHARED_...: given to others */
    uint64_t id;            /* of converted ones: no other has had it */
    struct bn_kept offered; /* for openers of its IPC handle */
    struct bn_alloc *next;  /* of those that are offered in its segment, or of those to be freed later */
    uint32_t opens;         /* memory of another process: how often its IPC handle is open here */
    uint64_t origin_id;     /* and whose it is */
    uint8_t origin[16];
};

enum bn_ctx_kind { BN_CTX_OWN, BN_CTX_PRIMARY, BN_CTX_GREEN };
struct bn_ctx {
    struct bn_ctx *next;
    CUcontext ctx;
    CUgreenCtx green;
    CUdevice dev;
    enum bn_ctx_kind kind;
    struct bn_slabs slabs; /* for what is allocated in it */
};

/* `from` may use what is allocated in `to`. */
struct bn_peer {
    struct bn_peer *next;
    CUcontext from, to;
    CUdevice from_dev;
};

struct bn_device {
    bool reset; /* its primary context was reset at some time */
    bool known, convertible, rdma;
    uint64_t granularity;
    uint8_t uuid[16];
};

struct bn_track {
    struct bn_lock lock;
    struct bn_tree segs, maps, allocs;
    struct bn_tree captures; /* key: stream */
    struct bn_tree imports;  /* key: memory pool of another process */
    struct bn_pool seg_pool, map_pool, alloc_pool, node_pool, ctx_pool, peer_pool;
    struct bn_ctx *ctxs;
    struct bn_peer *peers;
    struct bn_alloc *later; /* freed by the application during a stream capture: gone when it has ended */
    uint64_t last_id;       /* of segments and allocations */
    bool green;             /* there was a green context at some time */
    bool missed;        /* something that a checkpoint must know of could not be noted: there can be none */
    uint32_t doomed;    /* segments that are */
    uint32_t capturing; /* captures.count, to be read without the lock */
    struct bn_device devices[BN_GPUS_MAX];
    int device_count;
};
extern struct bn_track bn_track BN_API_LOCAL;

#define BN_LOCKED()          \
    bn_lock(&bn_track.lock); \
    __attribute__((cleanup(bn_track_unlock), unused)) int bn_locked_ = 0
static inline void bn_track_unlock(int *unused)
{
    bn_unlock(&bn_track.lock);
}

/* Ask the driver about every device; after cuInit. */
void bn_track_devices(void) BN_API_LOCAL;
/* A restore can bring the program to another GPU, which the driver does not announce: `dev` is this one from now on. */
void bn_track_moved_locked(CUdevice dev, const uint8_t uuid[16]) BN_API_LOCAL;
/* Forget everything, without a call to the driver: in a forked child. */
void bn_track_drop(void) BN_API_LOCAL;

/* NULL: no memory. The segment has an id and is in the tree; `present` is false. */
struct bn_seg *bn_seg_new_locked(enum bn_seg_kind kind, CUdevice dev, uint64_t size) BN_API_LOCAL;
/* Have the driver make its memory, which can be exported. *flags: BN_SEGMENT_... that are wanted; what the device cannot do is left out of
 * them. On error there is none. */
CUresult bn_seg_create_locked(struct bn_seg *seg, uint32_t *flags) BN_API_LOCAL;
struct bn_map *bn_map_new_locked(struct bn_seg *seg, CUdeviceptr va, uint64_t size,
                                 uint64_t offset) BN_API_LOCAL;
/* Out of tree and segment; no call to the driver. */
void bn_map_drop_locked(struct bn_map *map) BN_API_LOCAL;
/* When nothing refers to it any more: release the handle, close the kept descriptor, forget it. */
void bn_seg_settle_locked(struct bn_seg *seg) BN_API_LOCAL;
/* Unmap every mapping, give their addresses back if the segment is one of ours, and settle. What the driver does not unmap stays
 * known, with its segment, until bn_doomed_again_locked. */
void bn_seg_destroy_locked(struct bn_seg *seg) BN_API_LOCAL;
/* Try again. For the agent's thread with the gate closed, when nobody else has pointers to segments. */
void bn_doomed_again_locked(void) BN_API_LOCAL;
/* Release a handle of the driver's. One that it does not release is remembered: while it is held, a checkpoint of this process could
 * be made but never be restored. */
CUresult bn_release_locked(CUmemGenericAllocationHandle handle) BN_API_LOCAL;
/* Release those, or say why there still are some. */
CUresult bn_release_stuck_locked(void) BN_API_LOCAL;
/* Note something of the driver's by a key: a capture, a memory pool. False: it was noted already. Where there is no memory for it
 * `missed` is set, and it is never seen to go. */
bool bn_note_locked(struct bn_tree *noted, uint64_t key) BN_API_LOCAL;
/* It is gone. False: it was not noted. */
bool bn_unnote_locked(struct bn_tree *noted, uint64_t key) BN_API_LOCAL;
struct bn_seg *bn_seg_of_token_locked(CUmemGenericAllocationHandle handle) BN_API_LOCAL;
static inline CUmemGenericAllocationHandle bn_seg_token(const struct bn_seg *seg)
{
    return BN_TOKEN_BASE | seg->by_id.key;
}
static inline bool bn_is_token(CUmemGenericAllocationHandle h)
{
    return (h & BN_TOKEN_MASK) == BN_TOKEN_BASE;
}
static inline bool bn_seg_evictable(const struct bn_seg *seg)
{
    return seg->kind == BN_SEG_ALLOC || seg->kind == BN_SEG_APP;
}
/* The mapping or allocation that holds address `p`, or NULL. Mappings by their whole size, allocations by what was asked for. */
struct bn_map *bn_map_at_locked(CUdeviceptr p) BN_API_LOCAL;
struct bn_alloc *bn_alloc_at_locked(CUdeviceptr p) BN_API_LOCAL;
/* What the driver may be asked about p: BN_NOWHERE if p lies in memory of ours that the application does not have. */
CUdeviceptr bn_address_locked(CUdeviceptr p) BN_API_LOCAL;
/* What a converted allocation has of its segment: whole units. */
uint64_t bn_alloc_size(const struct bn_alloc *a) BN_API_LOCAL;
/* The application has the allocation, which is out of the tree, no more: it does not count, its IPC handle is void. */
void bn_alloc_retire_locked(struct bn_alloc *a) BN_API_LOCAL;
/* After that, and when nothing uses it any more: its memory is room again, or given back to the driver. Takes over `a`. */
void bn_alloc_release_locked(struct bn_alloc *a) BN_API_LOCAL;
/* Set the recorded access of a mapping in the driver. */
CUresult bn_map_apply_access_locked(const struct bn_map *map) BN_API_LOCAL;

/* Add to a counter of the page. */
void bn_page_add(uint64_t *counter, int64_t delta) BN_API_LOCAL;

/* Contexts. */
struct bn_ctx *bn_ctx_find_locked(CUcontext ctx) BN_API_LOCAL; /* NULL: not known */
void bn_ctx_add_locked(CUcontext ctx, CUdevice dev, enum bn_ctx_kind kind, CUgreenCtx green) BN_API_LOCAL;
/* The context was destroyed or reset: what was allocated in it is gone. */
void bn_ctx_gone_locked(CUcontext ctx, bool forget) BN_API_LOCAL;
/* Wait for everything in `ctx`, whatever is current. */
CUresult bn_ctx_synchronize(CUcontext ctx) BN_API_LOCAL;
/* Whose memory is allocated while *ctx, of device `dev`, is current: a green context has none of its own, it shares the primary
 * one's (the driver's documentation of cuCtxFromGreenCtx). An error is the driver's: *ctx is as it was. */
CUresult bn_ctx_of_memory(CUcontext *ctx, CUdevice dev) BN_API_LOCAL;
/* Make some live context current to the calling thread (the agent's own). */
void bn_ctx_borrow(void) BN_API_LOCAL;
void bn_ctx_unborrow(void) BN_API_LOCAL;

/* ipc.c: IPC handles that are about name a descriptor's number: an eviction puts a file of no meaning there, and after it the
 * handles become good again. */
void bn_ipc_withdraw_locked(struct bn_seg *seg) BN_API_LOCAL;
void bn_ipc_offer_again_locked(struct bn_seg *seg) BN_API_LOCAL;
/* The handle of an allocation is void from now on. */
void bn_ipc_forget_locked(struct bn_alloc *a) BN_API_LOCAL;

/* share.c: memory given to others, and taken from them, is counted in the page. */
#define BN_SHARED_IPC 1u
#define BN_SHARED_IPC_NATIVE 2u
#define BN_SHARED_VMM 4u
#define BN_SHARED_ELSEWHERE 8u
/* Given to others in one more way; `shared` is the segment's or allocation's, or NULL for what is never seen to be freed. */
void bn_share_locked(unsigned *shared, unsigned way) BN_API_LOCAL;
void bn_unshare_locked(unsigned *shared) BN_API_LOCAL; /* freed */
/* Memory of the agent `owner` was opened (+1) or closed (-1). */
void bn_opened_locked(const uint8_t owner[16], int change) BN_API_LOCAL;
void bn_share_pool_gone_locked(CUmemoryPool pool) BN_API_LOCAL;
void bn_share_drop(void) BN_API_LOCAL; /* in a forked child */

/* Free what the application freed during captures that have ended since. Waits for work that may use it; the second one is for
 * whoever has waited already. */
void bn_free_later(void) BN_API_LOCAL;
void bn_free_later_locked(void) BN_API_LOCAL;
