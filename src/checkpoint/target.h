/* The processes that a checkpoint, a suspend or a restore acts on, and the single steps in both directions.
 *
 * A target is one process with CUDA state. With an agent inside, its evictable memory goes through Bennu (hand over, evict, …,
 * give back); without one, or when the agent stepped aside, the driver saves everything as ever. Each step remembers in the
 * target what it did, so that undoing is: for every target, whatever its flags say, in the opposite order.
 *
 * One thread at a time per target; different targets in parallel. What is done to memory alone runs on all parts in parallel, so that
 * no GPU waits for another.
 */
#pragma once

#include "base/error.h"
#include "gpu/gpu.h"
#include "wire/agent_client.h"

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

struct bn_cold; /* cold.h */

/* Bytes in the host memory of a daemon that was killed: the keeper kept its file. */
struct bn_old_host {
    int fd;
    size_t n;
    struct {
        uint64_t at, bytes; /* in the file */
    } spans[];
};

/* A target's segments on one GPU: segs[first .. first + n), in the order of the blocks of `set`. */
struct bn_target_part {
    unsigned dev; /* our number of the GPU */
    size_t first, n;
    uint64_t bytes;
    uint64_t image_chunk;    /* index of its first chunk in the image's chunk table */
    struct bn_gpu_set *set;  /* the memory on the GPU, while we hold it */
    struct bn_mem *mem;      /* the bytes in the host tier, while they are there */
    struct bn_old_host *old; /* or there */
    struct bn_cold *cold; /* a reference to the folder of the disk tier that has them, from image_chunk on */
};

struct bn_target {
    pid_t pid;   /* in our pid namespace; 0: known from an image, not restored yet */
    pid_t inner; /* as the process sees itself */
    int pidfd;
    char comm[16];
    struct bn_agent *agent; /* NULL: driver path */
    uint8_t instance[16];   /* of the agent; zeros: driver path */

    struct bn_agent_segment *segs; /* sorted by GPU once handed over or loaded */
    size_t nsegs;
    struct bn_target_part *parts;
    size_t nparts;

    bool gated, evicted, locked, checkpointed; /* what has been done to it */
    bool lost;                                 /* the driver could not restore it */
    bool barred;     /* it cannot take memory from us, as it does not know its GPU: bn_target_move_in */
    uint64_t record; /* key of the keeper's record, or 0 */
};

struct bn_targets {
    struct bn_target *v;
    size_t n;
};

#define BN_FIND_DRIVER_PATH 1u /* leave the agents out */
/* The driver's checkpoint is left out: what it alone refuses is no reason to refuse. (2 to 0x80 are dump.h's.) */
#define BN_FIND_KEEP_CONTEXT 0x100u

/* The CUDA processes of the tree below `root` (n may be 0). Takes hold of their agents, touches nothing. */
int bn_targets_find(struct bn_gpu *gpu, pid_t root, unsigned flags, struct bn_targets *out,
                    struct bn_error *err);
void bn_targets_free(struct bn_targets *t);
void bn_target_clear(struct bn_target *t); /* one of them; its record stays */

/* 0: the process can have nothing to do with CUDA, or is gone; 1: it may; negative errno: it cannot be looked at. */
int bn_target_maps_driver(pid_t pid);

/* The page of its agent, also of one that is left out. 1; 0: it has none, or is gone; negative errno: it cannot be looked at. */
int bn_target_page(const struct bn_target *t, struct bn_agent_page *page);

/* -ENOTSUP with the reason when something in them could not be checkpointed or restored. */
int bn_targets_check(const struct bn_targets *t, unsigned flags, struct bn_error *err);
uint64_t bn_targets_evictable(const struct bn_targets *t); /* bytes, from the agents' pages */
size_t bn_targets_parts(const struct bn_targets *t);       /* of all of them together */
uint64_t bn_target_bytes(const struct bn_target *t);       /* of its parts */

/* Run `fn` on every part of every target, all at once (base/parallel.h). `i` counts the parts of all targets from 0 on. */
typedef int (*bn_part_fn)(void *ctx, struct bn_target *t, struct bn_target_part *part, size_t i,
                          struct bn_error *err);
int bn_targets_each_part(const struct bn_targets *targets, bn_part_fn fn, void *ctx, struct bn_error *err);

/* True once the process has ended: there is nothing left to undo. */
bool bn_target_gone(const struct bn_target *t);
bool bn_target_wait_gone(const struct bn_target *t, int timeout_ms);

/* The index of the target with this pid, or -1. */
ssize_t bn_targets_index(const struct bn_targets *t, pid_t pid);

/* Wait until the process can run: not traced, not frozen by a cgroup. Returns 0, -ESRCH when it is gone, -ETIMEDOUT. */
int bn_target_wait_runnable(const struct bn_target *t, unsigned timeout_ms);

/* Forwards. Gates of all agents close together or not at all: a call that waits for a peer whose gate is closed makes all reopen
 * and try again until timeout_ms is over. */
int bn_targets_close_gates(struct bn_targets *t, unsigned timeout_ms, struct bn_error *err);
int bn_target_hand_over(struct bn_target *t, struct bn_gpu *gpu,
                        struct bn_error *err); /* fills segs, parts, sets */
int bn_target_evict(struct bn_target *t, struct bn_error *err);
int bn_target_lock(struct bn_target *t, struct bn_gpu *gpu, unsigned timeout_ms, struct bn_error *err);
int bn_target_checkpoint(struct bn_target *t, struct bn_gpu *gpu, struct bn_error *err);

/* Backwards; each does nothing where its flag says so. */
int bn_target_restore(struct bn_target *t, struct bn_gpu *gpu, const struct bn_ckpt_pairs *pairs,
                      struct bn_error *err);
int bn_target_unlock(struct bn_target *t, struct bn_gpu *gpu, struct bn_error *err);
/* Anew, empty, where one is missing of a target that lives and is evicted. On failure some may have been created. */
int bn_targets_create_sets(struct bn_targets *targets, struct bn_gpu *gpu, struct bn_error *err);
int bn_target_give_back(struct bn_target *t, struct bn_error *err); /* needs the sets; may find it barred */
/* A barred one's memory, when nothing is copied into the sets any more: it is copied into memory that the process creates, some segments
 * at a time, which the sets then have in place of their own. `moved` is called when they have, each time: what else holds the old memory
 * lets go of it there. -ENOMEM: too little free GPU memory for that. */
typedef int (*bn_target_fn)(void *arg, struct bn_target *t, struct bn_error *err);
int bn_target_move_in(struct bn_target *t, bn_target_fn moved, void *arg, struct bn_error *err);
void bn_target_release(struct bn_target *t);     /* free the sets */
void bn_target_drop_saved(struct bn_target *t);  /* free the bytes in host memory and on disk */
void bn_target_keep_folder(struct bn_target *t); /* what is on disk outlives the target */
int bn_target_open_gate(struct bn_target *t, struct bn_error *err);
