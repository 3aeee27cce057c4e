/* Inside of the pack writer: what pack_writer.c, pack_sources.c and pack_move.c share. */
#pragma once

#include "store/disk.h"
#include "store/pack.h"
#include "store/pack_table.h"

#include <pthread.h>
#include <stdbool.h>
#include <sys/types.h>

/* A pack that is being written. Its lock is held for the whole of a write: the kernel would serialise writes to one file
 * anyway, and so the pack has no holes. */
struct bn_pack_lane {
    pthread_mutex_t lock;
    int fd;        /* as packs[pack] has it */
    uint32_t pack; /* BN_NO_PACK: none open */
    uint64_t length;
    struct bn_disk_file file;   /* of fd, while it is written around the page cache */
    struct bn_encoder *encoder; /* both NULL until the lane compresses its first chunk */
    uint8_t *encoded;           /* BN_PACK_BATCH times BN_ENCODED_MAX */
};

/* A pack in our folder; its number is its place in the list. */
struct bn_pack_own {
    int fd; /* kept open for the fsync at the end; -1: could not be made, or was taken away again: not ours to remove */
    uint64_t length;
    bool used;
};

/* A pack of another checkpoint. It is held open: whatever becomes of its names, its bytes stay within reach. */
struct bn_pack_source {
    int fd;
    uint64_t length;
    dev_t dev;
    ino_t ino;
    uint64_t used; /* bytes of it that this image needs, found out at the end */
    uint32_t pack; /* its number in our folder once it is linked, else BN_NO_PACK */
};

struct bn_pack_writer {
    int dirfd;
    int lock_fd; /* says that somebody is writing here; -1: the file system has no locks */
    unsigned flags, n_lanes, compress;
    uint64_t pack_bytes;
    struct bn_hash_key *key;
    struct bn_hash zero; /* of a zero chunk */
    bool finished;
    struct bn_disk *disk; /* NULL: through the page cache */
    bool stable;          /* data that is added stays mapped */
    bool tight;           /* (atomic) the disk is nearly full: no lane keeps what it does not need at once */

    struct bn_pack_lane lanes[BN_PACK_LANES];
    struct bn_pack_source *sources;
    uint32_t n_sources;

    pthread_mutex_t lock; /* everything below */
    struct bn_error failure;
    uint32_t n_chunks;
    uint32_t *chunks;           /* chunk -> 1 + record, BN_CHUNK_IS_ZERO, or 0 = not added */
    struct bn_pack_table table; /* a record's place is never changed once it has one, until the end */
    struct bn_pack_own *packs;
    uint32_t n_packs;
    struct bn_pack_stats stats;
};
#define BN_CHUNK_IS_ZERO UINT32_MAX

/* Note the first failure, which every later call then returns. `pack`: the file concerned, or BN_NO_PACK. */
int bn_pack_fail(struct bn_pack_writer *w, struct bn_error *err, int code, const char *what, uint32_t pack);

/* Make the next pack (w->lock is not held): its number, or what bn_pack_fail() returned. `link` >= 0: it is that very file, of
 * `length` bytes; -EXDEV without a failure when that is impossible. */
int64_t bn_pack_next(struct bn_pack_writer *w, int link, uint64_t length, struct bn_error *err);

/* Room for `bytes` in a pack that nobody else writes into: returns the lane, locked, with a pack open, or NULL. The bytes go to
 * lane->length. Call bn_pack_lane_done() with how many were written (0: none). */
struct bn_pack_lane *bn_pack_lane_take(struct bn_pack_writer *w, uint32_t hint, uint64_t bytes,
                                       struct bn_error *err);
void bn_pack_lane_done(struct bn_pack_writer *w, struct bn_pack_lane *l, uint64_t bytes);

/* Give every pack the length of what was written into it, before its descriptor or its length is used. No add is under way. */
int bn_pack_lanes_settle(struct bn_pack_writer *w, struct bn_error *err);

/* pack_sources.c: know what the parents have; at the end bring what is used into our folder; close. */
int bn_pack_sources_open(struct bn_pack_writer *w, const struct bn_pack_parent *parents, size_t n,
                         struct bn_error *err);
int bn_pack_sources_bring(struct bn_pack_writer *w, struct bn_error *err);
void bn_pack_sources_close(struct bn_pack_writer *w);
