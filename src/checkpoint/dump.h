/* Dump: the GPU half of a checkpoint, beside CRIU's.
 *
 *   begin      stop the tree, take its memory out of CRIU's sight, start writing it to the image directory
 *   release    CRIU has done its half: wait until nothing is copied from the processes' memory any more
 *   commit     wait for the writing to end, write the manifest, last of all
 *   aftermath  CRIU lets the processes go: bring those back that live on, forget those that die
 *   abort      instead of commit: remove what was written, bring the processes back as soon as they can run
 *
 * Commit comes before the aftermath, or, after a release, also after it: then the processes do not wait for the writing.
 *
 * One thread at a time per object.
 */
#pragma once

#include "checkpoint/prepare.h"
#include "checkpoint/suspend.h"

struct bn_dump;

#define BN_DUMP_SYNC \
    2u /* beside BN_FIND_…: commit returns only when packs and CRIU's files are on the disk. Without it they are
                         * in the page cache, as CRIU leaves its own: a checkpoint that a power cut tore is found out by
                         * its hashes, not prevented. */

#define BN_DUMP_ASIDE \
    4u /* what has to be sent is set aside on the GPUs if they have room, so that the release is soon */

#define BN_DUMP_LEVEL_SHIFT 24 /* the 8 highest bits: a level for bn_pack_writer_compress() */

/* Descriptors are duplicated or no longer needed when bn_dump_begin() returns. */
struct bn_dump_options {
    unsigned flags; /* BN_FIND_…, BN_DUMP_… */
    int dirfd;      /* where the image goes */
    int parent;     /* folder of a checkpoint with which bytes are shared; -1: none */
    const bool *
        cancel; /* set by another thread: the copying ends soon, and the commit fails. Stays as long as the dump; may be NULL */
    uint64_t
        per_second; /* bytes at most of what was set aside, as the processes run meanwhile; 0: no limit */
    struct bn_prepared *
        prepared; /* what was copied ahead, or NULL; taken over, also on failure. A parent comes first: then it is
                                   * dropped, since packs of two families cannot be mixed. */
};

/* On failure everything is undone and nothing is left in the directory; *left as below. A tree without CUDA is no failure:
 * *out is then NULL. A checkpoint that the directory holds already is replaced. -ENOSPC: it has not room for the memory.
 * A parent that is damaged, or of another format, is refused before any process is touched, with the errors of
 * bn_image_load() and bn_pack_reader_open(). */
int bn_dump_begin(struct bn_env *env, pid_t root, const struct bn_dump_options *options,
                  struct bn_report *report, struct bn_dump **out, struct bn_suspended **left,
                  struct bn_error *err);

/* What it has set aside on GPUs, until the commit or an abort has ended. False: nothing. */
bool bn_dump_set_aside(const struct bn_dump *d, struct bn_usage *usage);

const struct bn_targets *bn_dump_targets(const struct bn_dump *d);

/* 1: part of the dump; 0: uses no CUDA; -EAGAIN with a text: it began to use CUDA after the dump had. */
int bn_dump_covers(const struct bn_dump *d, pid_t pid, struct bn_error *err);

/* The thread of pid's agent (0: none), and what it does when all others are stopped: bn_agent_purge. */
pid_t bn_dump_thread(const struct bn_dump *d, pid_t pid);
int bn_dump_purge(const struct bn_dump *d, pid_t pid, uint64_t *freed, struct bn_error *err);

/* When this has succeeded the processes may have their memory back, whatever becomes of the dump. On failure as bn_dump_commit. */
int bn_dump_release(struct bn_dump *d, const bool *cancel, struct bn_error *err);
/* Releases, too. On failure nothing is left in the directory that looks like a checkpoint; then call bn_dump_aftermath, unless that has
 * been. `cancel` may be NULL. */
int bn_dump_commit(struct bn_dump *d, const bool *cancel, struct bn_error *err);
/* Stop writing and remove what was written. */
void bn_dump_abort(struct bn_dump *d);
/* After a release: true once every process is either gone or free to run; false when they are held (a frozen cgroup, say) and all copies
 * have ended: then commit first. */
bool bn_dump_runs(struct bn_dump *d);
/* Waits, as long as it takes, until every process is either gone or free to run, and brings the latter back. On failure *left is
 * what could not be brought back, or NULL: bn_resume can try again. */
int bn_dump_aftermath(struct bn_dump *d, struct bn_suspended **left, struct bn_error *err);
/* After the aftermath, and the commit or abort. */
void bn_dump_free(struct bn_dump *d);
