/* Suspend and resume: the GPU memory of a tree goes to one of the tiers (tier.h) and comes back; the processes stay. */
#pragma once

#include "checkpoint/quiesce.h"
#include "wire/control.h"

struct bn_suspended;

/* Stops the tree below `root` and takes its GPU memory: what an agent can evict to `tier` (BN_TIER_…), the rest into the processes by
 * the driver; with BN_FIND_KEEP_CONTEXT the driver is asked nothing, and contexts stay. On failure everything is as before; where that could not be, *out is set all the same, for bn_resume. Blocks; `cancel`
 * (may be NULL) may be set by another thread. -ENODATA: no process of the tree uses CUDA; -EINVAL: no such tier. */
int bn_suspend(struct bn_env *env, pid_t root, uint32_t tier, unsigned flags, struct bn_report *report,
               const bool *cancel, struct bn_suspended **out, struct bn_error *err);

/* Brings it back. When the GPU lacks memory nothing is changed and it can be tried again (-ENOMEM). On success *s is freed and set
 * NULL; on other failures what could be brought back runs, and the object is kept. */
int bn_resume(struct bn_suspended **s, struct bn_report *report, struct bn_error *err);

/* The bytes of a suspended tree to another tier. *cancel (may be NULL) set by another thread ends it. On failure they are where they
 * were. -EBUSY: it is on its way up. */
int bn_suspended_move(struct bn_suspended *s, uint32_t tier, const bool *cancel, struct bn_error *err);

/* For a way up that failed: takes q's targets over, for bn_resume to try again. NULL: there is nothing to try (or no memory). */
struct bn_suspended *bn_suspended_take(struct bn_quiesce *q);

/* Forget it: for trees that are gone. Frees what is held. A process that still lives stays stopped for good. */
void bn_suspended_free(struct bn_suspended *s);

const struct bn_targets *bn_suspended_targets(const struct bn_suspended *s);
pid_t bn_suspended_root(const struct bn_suspended *s);
/* True when all that keeps its living processes from running is that the driver has lost their state: there is nothing that a resume
 * could give back. */
bool bn_suspended_lost(const struct bn_suspended *s);
/* True when no process of it lives any more. */
bool bn_suspended_dead(const struct bn_suspended *s);

/* How many bytes of one of its processes are in a tier (BN_TIER_…). */
uint64_t bn_suspended_bytes(const struct bn_target *t, uint32_t tier);
/* What it takes in each tier; of GPUs beyond the last of these nothing is known. */
#define BN_USAGE_GPUS 64u
struct bn_usage {
    uint64_t gpu[BN_USAGE_GPUS];
    uint64_t host;
    uint64_t disk; /* as stored */
};
void bn_suspended_usage(const struct bn_suspended *s, struct bn_usage *usage);
/* May it be moved: is nothing of it given back yet? */
bool bn_suspended_movable(const struct bn_suspended *s);
/* When it was suspended, or a resume last tried (bn_now_ns). */
uint64_t bn_suspended_used(const struct bn_suspended *s);
/* The tier that it was suspended to, or moved to since. */
uint32_t bn_suspended_tier(const struct bn_suspended *s);
