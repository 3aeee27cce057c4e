/* Ahead of a dump: GPU memory goes into packs while the application runs, so that the dump has little left to send.
 *
 * It is done in passes. The gates are closed for the moment that it takes to hand the memory over (descriptors, no bytes), and
 * opened again. Then everything is hashed in place, and what the packs do not have is copied out, while the application
 * writes to it. Nothing has to be consistent: a chunk that is being written gives some hash or other, which nobody knows, and what is
 * stored is hashed by the writer as it arrived, so it is stored under its own name, torn or not. The next pass sends what
 * changed meanwhile, as long as that is clearly less than the time before. The memory is let go at the end of each pass, so what
 * the application frees meanwhile is not held for longer than that.
 *
 * The dump then hashes everything once more, behind closed gates, and finds most of it known. Hashes are all that connects the
 * two: memory that was freed, made anew or moved in between needs no care.
 *
 * Where the GPU does not hash there is one pass, which saves the dump the writing and not the copying.
 *
 * One thread at a time per object.
 */
#pragma once

#include "checkpoint/quiesce.h"
#include "image/hash.h"

struct bn_prepared;
struct bn_pack_writer;

struct bn_prepare_options {
    int dirfd;           /* where the packs go; -1: a folder of its own in the spool */
    int parent;          /* folder of a checkpoint with which bytes are shared; -1: none */
    uint64_t per_second; /* bytes to copy, at most; 0: no limit */
    unsigned level;      /* of compression, as bn_pack_writer_compress() takes it */
};

struct bn_prepare_stats {
    uint32_t passes;
    uint64_t gpu_bytes;  /* at the last pass */
    uint64_t sent_bytes; /* in all passes */
    uint64_t last_bytes; /* of these, in the last one */
    uint64_t gate_ns;    /* the longest time that gates were closed */
};

/* *p is what an earlier call made, to go on with (options' folders are ignored then), or NULL. On failure nothing is left, also of
 * an earlier call, and *p is NULL; the application goes on in any case. -ENODATA: the tree uses no CUDA; -ECANCELED; others
 * as bn_targets_check, the steps, and the store's. */
int bn_prepare(struct bn_env *env, pid_t root, const struct bn_prepare_options *options,
               struct bn_report *report, const bool *cancel, struct bn_prepared **p,
               struct bn_prepare_stats *stats, struct bn_error *err);

pid_t bn_prepared_root(const struct bn_prepared *p);
int bn_prepared_pidfd(const struct bn_prepared *p); /* of the root; borrowed */
/* True if it was made for the process that has the pid `root` now. */
bool bn_prepared_for(const struct bn_prepared *p, pid_t root);

/* For a dump into `dirfd`: what was written is moved there, unless it is there already. *writer is the caller's then. After a
 * failure there is nothing of it in `dirfd`. */
int bn_prepared_use(struct bn_prepared *p, int dirfd, struct bn_pack_writer **writer,
                    uint8_t key[BN_HASH_KEY_SIZE], struct bn_error *err);
/* With all that was written, unless it is in use. */
void bn_prepared_free(struct bn_prepared *p);
