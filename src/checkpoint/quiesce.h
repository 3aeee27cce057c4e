/* The way down and the way up again: from a running tree to processes whose GPU memory is in our hands and whose remaining
 * state the driver has saved, and back. Dump and suspend go down; a failed dump, --leave-running, resume and restore go up. Both
 * ways are one table of steps with their undos (quiesce.c).
 */
#pragma once

#include "base/error.h"
#include "checkpoint/report.h"
#include "checkpoint/target.h"
#include "gpu/gpu.h"

struct bn_guard; /* record.h */

/* What sessions work with. Owned by the daemon, shared by all. */
struct bn_env {
    struct bn_gpu *gpu;
    struct bn_pool *pool;
    struct bn_copier *copier;
    unsigned gate_timeout_ms; /* for all gates to close together */
    unsigned lock_timeout_ms; /* for the driver's lock of one process */
    struct bn_guard *guard;   /* keeps what must outlive the daemon; NULL: nobody does */
    const char *spool;        /* folder of the disk tier's folders */
    /* Before `bytes` more are held in a tier (BN_TIER_…; on GPU `dev`): keep to its budget, by moving others down. 0: there is room,
     * or more than before; negative: there is none, with a text that says which budget and what to do. NULL: no budgets. In
     * the thread of the suspend. */
    int (*room)(struct bn_env *env, uint32_t tier, unsigned dev, uint64_t bytes, struct bn_error *err);
    const char *
        kill_at; /* tests: "STEP:begin", "STEP:one" or "STEP:end" at which to be killed, or with "@" before it stopped, or NULL */
};

struct bn_quiesce {
    struct bn_env *env;
    struct bn_report *report;
    pid_t root;
    unsigned flags; /* BN_FIND_… */
    struct bn_targets targets;
    uint64_t session; /* names it in records; 0: none yet */
    const char *step; /* under way */

    /* Going down: start copying out of the targets' sets; the copy goes on beside the steps that follow. Going up: end all copying,
     * in either direction. When that fails the memory is not what it should be: gates stay closed. Either may be NULL. */
    int (*copy_start)(struct bn_quiesce *q, struct bn_error *err);
    int (*copy_end)(struct bn_quiesce *q, struct bn_error *err);
    bool copy_failed;

    /* For the driver's restore on other GPUs than before; NULL: the same ones. */
    const struct bn_ckpt_pairs *pairs;
};

/* A place at which tests may have the daemon killed or stopped: `when` is begin, one (a first process is through) or end. */
void bn_kill_point(const struct bn_env *env, const char *step, const char *when);

/* All the way down. When a step fails everything is undone, the processes go on, and the error is returned. 0 targets is no error:
 * look at q->targets.n. */
int bn_quiesce_down(struct bn_quiesce *q, struct bn_error *err);

/* All the way up for every target that still lives, from wherever its flags say it is. Goes as far as it can; returns the first
 * failure. A process that could not get all of its state back keeps its gate closed or is marked lost: it never runs on wrong
 * bytes. The sets of processes that have their memory back are freed. */
int bn_quiesce_up(struct bn_quiesce *q, struct bn_error *err);

/* True when a process that lives has not got back all that was taken from it: q->targets must not be let go then. A closed gate is
 * not counted: the agent opens it by itself once we have let go. */
bool bn_quiesce_holds(const struct bn_quiesce *q);
