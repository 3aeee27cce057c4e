/* Restore: from a checkpoint directory to processes that go on. CRIU brings the CPU half back; this brings the GPU half, and begins
 * with it before CRIU forks anything.
 *
 *   begin   read and check the image, choose GPUs, allocate, start loading
 *   claim   CRIU has a process ready (it may still be stopped): whose is it? Host memory that was left to us is complete then
 *   finish  the processes can run: driver restore + unlock, give the memory back when it is loaded and verified, open the gates
 *
 * One thread at a time per object.
 */
#pragma once

#include "checkpoint/quiesce.h"

struct bn_restore;

#define BN_RESTORE_STOCK \
    1u /* no manifest: an image of CRIU's own CUDA plugin; every claimed process goes the driver's way */

/* Takes nothing of dirfd but its content (it may be closed afterwards). `lazy_pages` >= 0: the listening socket of host_fill.h, as CRIU
 * leaves host memory to us; likewise. Errors: -ENOENT no manifest (not a Bennu checkpoint),
 * -EBADMSG damaged, -ENODEV no fitting GPU, -ENOMEM not enough GPU memory, -EPROTONOSUPPORT made by a newer Bennu or driver. */
int bn_restore_begin(struct bn_env *env, int dirfd, int lazy_pages, unsigned flags, struct bn_report *report,
                     struct bn_restore **out, struct bn_error *err);
/* CUDA processes in the image; 0 for stock images. */
size_t bn_restore_count(const struct bn_restore *r);
/* 1: pid is one of the image's, now noted; 0: it has no CUDA state; negative: error. */
int bn_restore_claim(struct bn_restore *r, pid_t pid, struct bn_error *err);
/* On failure the caller kills the processes: they must not run without their GPU state. */
int bn_restore_finish(struct bn_restore *r, const bool *cancel, struct bn_error *err);
/* Stops loading, frees everything. */
void bn_restore_free(struct bn_restore *r);
