/* What the agent in an application and the daemon say to each other.
 *
 * The agent owns a memfd named BN_AGENT_MEMFD that holds one `struct bn_agent_page`, and a SOCK_SEQPACKET socketpair. Both ends
 * of the pair stay in the application's descriptor table: `near` is read by the agent's thread, `far` is taken by the
 * daemon with pidfd_getfd(2) when it has something to say. CRIU saves page, pair and thread like anything else of the
 * process. The daemon holds flock(LOCK_EX) on its own open of the memfd while it talks: one controller at a time.
 *
 * Requests go from the daemon to the agent; the agent answers each with exactly one reply of the same `id` and `type` (replies
 * of an earlier controller that was killed are recognised by their id and dropped). Messages are packets: a header, then
 * `count` records; descriptors ride along with SCM_RIGHTS in the order of the records. Same machine, same byte order.
 *
 * One thing goes the other way, and through the page, since an application cannot ask: memory of the GPU that it failed to get
 * while the daemon holds memory there (struct bn_agent_need).
 *
 * Neither side trusts the other: the daemon is root and the application may be hostile; sizes and counts are checked on arrival.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define BN_AGENT_MEMFD "bennu-agent"
#define BN_AGENT_MAGIC 0x6e6e6562u /* "benn" */
#define BN_AGENT_VERSION 1u
#define BN_AGENT_PAGE_SIZE 16384u /* bytes, of page and memfd */
#define BN_AGENT_GPUS_MAX 64u
#define BN_AGENT_BATCH 64u      /* segments (and descriptors) in one message; the kernel's limit is 253 */
#define BN_AGENT_MSG_MAX 16384u /* bytes of one packet */

enum bn_agent_state {
    BN_AGENT_INACTIVE = 0, /* stepped aside; `reason` says why: the driver's own path serves this process */
    BN_AGENT_ACTIVE = 1,   /* gate open */
    BN_AGENT_CLOSED = 2,   /* gate closed, every context idle, memory mapped */
    BN_AGENT_EVICTED =
        3, /* gate closed, every segment unmapped and released, no descriptor of the driver's held */
};

/* A client of MPS can be evicted, but the driver refuses to lock it (801). */
enum bn_agent_mps {
    BN_AGENT_MPS_UNKNOWN = 0, /* an older agent or driver */
    BN_AGENT_MPS_NO = 1,
    BN_AGENT_MPS_CLIENT = 2,
};

/* Things in the process that the driver cannot checkpoint or restore (facts: driver 580). Any non-zero: refuse beforehand. */
struct bn_agent_blockers {
    uint64_t managed_bytes;  /* cuMemAllocManaged: checkpoint answers 801 */
    uint64_t host_vmm_bytes; /* VMM memory at a host location: restore answers 999 and the process is lost */
    uint64_t
        imported_handles; /* memory of another process imported by the application: restore answers 801, lost */
    uint64_t multicast_handles;
};

struct bn_agent_gpu {
    uint8_t uuid[16];
    uint64_t bytes; /* evictable memory on it */
    uint64_t segments;
};

/* GPU memory that the process shares with others. Live things are counted: what was freed counts no more. An importer keeps the
 * old memory when ours is taken away and given back, and only some importers can be known, so there are two halves: what was
 * given, and (in the importer's own page) what was taken. */
struct bn_agent_opened {
    uint8_t owner[16]; /* instance of the agent whose memory it is */
    uint64_t handles;  /* 0: an unused entry */
};
#define BN_AGENT_OPENED_MAX 32u
struct bn_agent_sharing {
    uint64_t ipc; /* given: converted allocations with an IPC handle; who opens one lists us in opened[] */
    uint64_t ipc_native; /* given: IPC handles of the driver's own */
    uint64_t vmm;        /* given: cuMemCreate handles that were exported as descriptors */
    uint64_t pools;      /* given: memory pools that were exported */
    uint64_t elsewhere;  /* given: dma-bufs and fabric handles, for devices and other machines */
    /* Taken, with the owner known. The rest of blockers.imported_handles is somebody's. Where the entries did not suffice the last one
     * counts what was left over, with an owner of ones: as long as that is not 0, anybody may be among them. */
    struct bn_agent_opened opened[BN_AGENT_OPENED_MAX];
};

/* An application's want of GPU memory, while the daemon holds memory of suspended programs on a GPU and could let go of it.
 *
 * The daemon writes `hot`: 0 while it holds none, else a number that it changes about once a second, so that the number of a
 * daemon that was killed is known by not changing. An allocation that fails for want of memory while `hot` is not 0 becomes a
 * want: bytes and GPU are written, then `wanted_seq` is raised. The daemon looks into the pages now and then (some tens of
 * milliseconds), lets go of what it can, and writes `answered_more`, then `answered_seq` = the `wanted_seq` that it acted on.
 * The agent leaves its gate, waits for that, and tries again: once after each answer, and asks again if there was more.
 * It waits no longer than BN_AGENT_NEED_MS in all, and not when `hot` has not changed for BN_AGENT_HOT_DEAD_MS; then it
 * writes `wanted_bytes` = 0, and the application gets the driver's answer. One want at a time: further threads that want
 * take their turn. Either side takes nonsense of the other's for "nothing". */
struct bn_agent_need {
    uint32_t hot;           /* the daemon's */
    uint32_t answered_more; /* the daemon's: 1 something was let go of, 0 there is nothing more */
    uint32_t answered_seq;  /* the daemon's */
    uint32_t wanted_seq;    /* the agent's; wants so far */
    uint64_t wanted_bytes;  /* the agent's; 0: not waiting */
    uint8_t wanted_uuid[16];
};
#define BN_AGENT_NEED_MS 10000u
#define BN_AGENT_HOT_DEAD_MS 3000u

/* Lives in shared memory that any process with the descriptor can write: copy first, then check. Counters are written with
 * relaxed atomics by the agent and may be a moment apart from each other. */
struct bn_agent_page {
    uint32_t magic, version;
    uint32_t
        pid; /* getpid() of the owner, in its own pid namespace: a forked child's inherited page is not its own */
    uint32_t tid;      /* of the agent's thread, in the owner's pid namespace */
    int32_t far_fd;    /* number of the far end in the owner's descriptor table */
    uint32_t state;    /* enum bn_agent_state */
    uint32_t captures; /* stream captures under way: the gate cannot close meanwhile */
    uint8_t instance
        [16]; /* random, made at start; travels with the process through a checkpoint and names it there */
    uint64_t epoch;               /* evictions so far */
    uint64_t allocations;         /* live converted allocations, as the application sees them */
    uint64_t native_bytes;        /* small cuMemAlloc memory left to the driver, for information */
    uint64_t gated_calls_unknown; /* functions asked for by name that the table does not know */
    struct bn_agent_blockers blockers;
    uint32_t gpu_count;     /* entries of gpu[], indexed by the application's device ordinal */
    uint32_t unknown_count; /* entries of unknown[] */
    struct bn_agent_gpu gpu[BN_AGENT_GPUS_MAX];
    char agent_version[32];
    char driver_path[256]; /* the real libcuda.so.1 in use */
    char reason[256];      /* why INACTIVE */
    char unknown[64][64];  /* names of functions newer than the agent's table */

    /* Checkpoints hold pages of older agents, in which all that follows is zero: add at the end, and let zero say "not known" or
     * "none". */
    uint32_t knows;                  /* BN_AGENT_KNOWS_…: what of the following the agent fills */
    uint32_t mps;                    /* enum bn_agent_mps */
    struct bn_agent_need need;       /* BN_AGENT_KNOWS_NEED */
    struct bn_agent_sharing sharing; /* BN_AGENT_KNOWS_SHARING */
};
#define BN_AGENT_KNOWS_NEED 1u
#define BN_AGENT_KNOWS_SHARING 2u

_Static_assert(offsetof(struct bn_agent_page, knows) == 6808, "what the first agents have stays where it is");
_Static_assert(sizeof(struct bn_agent_page) <= BN_AGENT_PAGE_SIZE, "page fits its memfd");

enum bn_agent_msg_type {
    BN_AGENT_HELLO = 1, /* -> nothing; reply: count = 0. Proves that the agent's thread answers. */
    BN_AGENT_CLOSE =
        2, /* arg = milliseconds. Close the gate, wait for calls inside, synchronise every context.
                            Errors: EBUSY (a call inside, or work on the GPU, did not end in time), EAGAIN (a stream
                            capture is under way), ENOTSUP (blockers; text says which). On error the gate is open. */
    BN_AGENT_OPEN = 3, /* Open the gate. EINVAL unless CLOSED with every segment in place. */
    BN_AGENT_LIST =
        4, /* arg = index of the first segment; reply: count records from there on (<= BN_AGENT_BATCH),
                            arg = segments in all. Only while CLOSED or EVICTED; the order is stable until OPEN. */
    BN_AGENT_EXPORT =
        5, /* arg = index of the first segment; reply: count records, one descriptor each. Only CLOSED. */
    BN_AGENT_EVICT = 6, /* Unmap and release every segment, close the kept descriptors. CLOSED -> EVICTED. */
    BN_AGENT_IMPORT =
        7, /* count records (id, size, uuid) with one descriptor each: import, map at every old address with the
                            old access. EVICTED; after the last one the state is CLOSED. Idempotent per segment. ENODEV: the
                            process cannot import memory of this GPU, as the driver did not show it that one at cuInit: a
                            restore has brought it here. It can create its own: CREATE. */
    BN_AGENT_PURGE =
        8, /* Give the zero pages back that the driver's checkpoint has left; reply: arg = bytes. EVICTED, and
                            every thread of the process but the agent's is stopped: nothing else may write meanwhile. */
    BN_AGENT_CREATE =
        9, /* count records (id, size): new memory for each; reply: count records, one descriptor each. For processes that
                            cannot import (IMPORT fails with ENODEV): nothing is mapped before MAP. EVICTED. What was created
                            for a segment before, and not mapped, is given up; of one that is in place the descriptor is its
                            own. ENOMEM: nothing of this request is left. */
    BN_AGENT_MAP =
        10, /* count records (id, size, uuid): what CREATE made for them holds what it should: map it at every
                            old address with the old access. As IMPORT otherwise. */
};

struct bn_agent_msg {
    uint32_t magic;
    uint16_t type, reply; /* reply: 1 in answers */
    uint32_t id;
    int32_t error;       /* replies: 0 or positive errno */
    uint32_t cuda_error; /* replies: the CUresult behind the error, or 0 */
    uint32_t count;      /* records that follow */
    uint64_t arg;
    char text[160]; /* replies: what is wrong, for a person; NUL-terminated */
};

struct bn_agent_segment {
    uint64_t id;      /* of the agent's own; unique in the life of the process */
    uint64_t size;    /* bytes, multiple of the granularity (2 MiB) */
    uint64_t va;      /* lowest address it is mapped at; 0 = held but not mapped */
    uint8_t uuid[16]; /* GPU that holds it; in an import, that is to hold this device's memory from now on */
    uint32_t flags;   /* BN_SEGMENT_… */
    uint32_t reserved;
};
#define BN_SEGMENT_RDMA 1u       /* created with gpuDirectRDMACapable: recreate it so */
#define BN_SEGMENT_COMPRESSED 2u /* created with compression: recreate it so */

_Static_assert(sizeof(struct bn_agent_msg) + BN_AGENT_BATCH * sizeof(struct bn_agent_segment) <=
                   BN_AGENT_MSG_MAX,
               "a full batch fits one packet");
