/* GPU memory on its way into packs: which chunks have to cross the link, and their copying.
 *
 * Where the GPU hashes, every chunk is hashed in place first and the writer is asked what it knows: zero chunks, chunks that are
 * stored already (by a pre-dump, in a parent) and all but one of equal chunks are not sent. Elsewhere all of it is
 * sent, and the writer finds out what it knows when it has the bytes.
 *
 * What arrives is hashed by the CPU in any case, as the writer does with everything it stores: that is 128 bits of what
 * is in the file, computed off the critical path, and bn_sending_settle() compares it with what the GPU computed of what was
 * in its memory. So an error of the link or of a copy is found when the checkpoint is made, not when it is needed.
 *
 * Chunks can be set aside: copied, on the GPU, to memory of ours, which takes a hundredth of the time that the link takes. The processes
 * can then have theirs back while the bytes are still on their way.
 *
 * One thread at a time per object; different objects in parallel.
 */
#pragma once

#include "checkpoint/rate.h"
#include "checkpoint/target.h"
#include "gpu/hash.h"
#include "store/pack.h"

struct bn_sending;

struct bn_send_env {
    struct bn_gpu *gpu;
    struct bn_copier *copier;
    struct bn_pack_writer *writer;
    const struct bn_hash_key *key; /* the writer's */
    const bool *cancel;         /* set by another thread: end soon, even in a slow compression; may be NULL */
    bool slow;                  /* the writer compresses */
    struct bn_rate *rate;       /* of a copy beside a running application; NULL: as fast as it goes */
    struct bn_rate *aside_rate; /* the same, of what was set aside: the application was let go before */
};

/* A writer into the folder, for no chunks yet (bn_pack_writer_relayout), and its key: that of the checkpoint in `parent`, with which
 * bytes are shared, or (parent -1) a new one. Everything that can be wrong with the parent is found out here; its packs are
 * held from now on. Errors of bn_image_load() and bn_pack_writer_open(). */
int bn_send_open(int dirfd, int parent, uint8_t key[BN_HASH_KEY_SIZE], struct bn_pack_writer **out,
                 struct bn_error *err);

/* Hash and choose, on all GPUs at once: out[i] of the i-th part of all targets (bn_targets_parts). The parts have their sets, and image_chunk is
 * the writer's number of their first chunk. `env` and the sets must stay. -ENOMEM, and the writer's errors; then nothing is left. A GPU
 * that cannot hash is none. */
int bn_sending_new(const struct bn_send_env *env, const struct bn_targets *targets, struct bn_sending **out,
                   struct bn_error *err);
unsigned bn_sending_dev(const struct bn_sending *s);
bool bn_sending_hashed(const struct bn_sending *s);    /* by the GPU */
uint64_t bn_sending_total(const struct bn_sending *s); /* bytes of the part */
uint64_t bn_sending_bytes(const struct bn_sending *s); /* to be sent */
/* Before the start, of memory that nobody can write to: set all of it aside, if it is more than a little and the GPU has room for it,
 * and some to spare. False: it was not; then it is copied from where it is. One thread at a time for a GPU, as that room is looked at. */
bool bn_sending_set_aside(struct bn_sending *s);
/* Free what was set aside. After the copy has been freed. */
void bn_sending_drop_aside(struct bn_sending *s);
/* Start the copy. To be freed (bn_copy_free) before `s`. 1: of what was set aside; it does not need the part's memory any more, nor
 * does anything below need the part. */
int bn_sending_start(struct bn_sending *s, struct bn_copy **job, struct bn_error *err);
/* After a copy of memory that nobody could write to: each chunk is now known to the writer under the hash that it had on the GPU,
 * or -EIO: what arrived is not what was there. */
int bn_sending_settle(struct bn_sending *s, struct bn_error *err);
void bn_sending_free(struct bn_sending *s);
