/* Packs: files `bennu-pack-%u.img` in an image folder that hold chunks, one behind the other, nothing else.
 *
 * Checkpoints share bytes by sharing whole packs: the same file has a name in several folders (hard links), so each folder is
 * complete, and the file system does the counting. Therefore a pack is never changed once its image is complete.
 *
 * Chunks are numbered as the manifest numbers them (bn_manifest_layout). Buffers are BN_CHUNK_SIZE bytes, aligned to
 * BN_PACK_ALIGN, so that the same path can go around the page cache later.
 */
#pragma once

#include "base/error.h"
#include "image/manifest.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BN_PACK_NAME "bennu-pack-%u.img"
#define BN_PACK_NAME_MAX 32u
#define BN_PACK_BATCH 8u                   /* chunks of one batch: 16 MiB */
#define BN_PACK_BYTES ((uint64_t)64 << 30) /* a pack that has reached this is followed by another */
#define BN_PACK_LANES 32u /* packs that are written at the same time, at most: by the threads of four GPUs */

/* ---- Writing ---- */

/* Writes go to as many packs as there are threads writing at one moment (at most BN_PACK_LANES), since the kernel lets one
 * thread at a time write into one file; a single writing thread makes a single pack. */
struct bn_pack_writer;

#define BN_PACK_NOSYNC 1u /* finish without fsync: for images that live in memory anyway */

/* Another checkpoint whose chunks may be referred to. Both are needed only until bn_pack_writer_open() returns: its packs are
 * held open, so that it may even be removed meanwhile. */
struct bn_pack_parent {
    int dirfd;
    const struct bn_manifest *m;
};

struct bn_pack_options {
    unsigned flags;      /* BN_PACK_… */
    uint64_t pack_bytes; /* 0 = BN_PACK_BYTES (tests: rounded up to a whole batch) */
    unsigned lanes;      /* 0 = BN_PACK_LANES */
    const struct bn_pack_parent *parents;
    size_t nparents;
};

/* For the `n_chunks` chunks of one manifest, hashed with its `key`. `dirfd` is duplicated. `options` may be NULL.
 * -EINVAL (also: a parent has another key), -ENOMEM, or the errno of dup; of a parent's packs what bn_pack_reader_open() says of
 * them. -EBUSY: somebody is removing the folder. The caller ends it with bn_pack_writer_close() or
 * bn_pack_writer_abort(). Until then bn_image_lock() finds the folder in use. */
int bn_pack_writer_open(int dirfd, const uint8_t key[BN_HASH_KEY_SIZE], uint32_t n_chunks,
                        const struct bn_pack_options *options, struct bn_pack_writer **out,
                        struct bn_error *err);

/* Write around the page cache from now on, at the disk's own rate: see store/disk.h, of which `disk_flags` are. `stable`: all data
 * that is added lies in few buffers, which stay mapped until the writer is ended. While no add is under way. -ENOMEM. */
int bn_pack_writer_direct(struct bn_pack_writer *w, unsigned disk_flags, bool stable, struct bn_error *err);

struct bn_pack_item {
    uint32_t chunk;
    const void *data; /* NULL: known to be all zero */
};

/* Hash one chunk and store it, unless it is zero or the image has the same bytes already. Any thread, several at once. The
 * buffer is free again on return. A chunk may be added again: the last one counts, the room of the first is lost; not
 * the same chunk by two threads at once. After a failure every later call fails with the same error.
 * -ENOSPC, -EIO … with the name of the file; -EEXIST: the folder already holds packs; -EINVAL: no such chunk. */
int bn_pack_writer_add(struct bn_pack_writer *w, uint32_t chunk, const void *data, struct bn_error *err);
/* The same for up to BN_PACK_BATCH chunks, written together: one call, one piece of the file. */
int bn_pack_writer_add_batch(struct bn_pack_writer *w, const struct bn_pack_item *items, size_t n,
                             struct bn_error *err);
/* The same for chunks first .. first + n - 1, one behind the other in `data`; any number, batch by batch. */
int bn_pack_writer_add_run(struct bn_pack_writer *w, uint32_t first, unsigned n, const void *data,
                           struct bn_error *err);

/* Note where a chunk with this hash (under the writer's key) is, without its bytes. 1: they are known: zero, stored in this image
 * (or just being stored by another thread), or in a parent; the chunk counts as added. 0: not known, nothing was
 * done, add them. -EINVAL: no such chunk, or after the end; after a failure its error. Any thread. That two chunks are alike
 * is believed because their hashes are: docs/image-format.md has the odds. */
int bn_pack_writer_place(struct bn_pack_writer *w, uint32_t chunk, const struct bn_hash *h);

struct bn_pack_stats {
    uint64_t chunks;        /* added or placed */
    uint64_t zero_chunks;   /* of these: zero */
    uint64_t same_chunks;   /* of these: found in the image already */
    uint64_t parent_chunks; /* of these: found in a parent */
    uint64_t stored_bytes;  /* written, copies from parents not counted */
    uint64_t
        linked_bytes; /* of parents' packs that are linked: what this image uses of them; known after finish */
    uint64_t copied_bytes; /* copied from parents' packs; grows in finish */
};
/* At any time, from any thread: for progress. */
void bn_pack_writer_stats(const struct bn_pack_writer *w, struct bn_pack_stats *out);

/* From now on chunks are compressed with zstd where that saves an eighth or more. `level`: 1 to BN_COMPRESS_MAX (store/encoding.h),
 * or 0 for none. When no other call is under way. -EINVAL: no such level. */
int bn_pack_writer_compress(struct bn_pack_writer *w, unsigned level, struct bn_error *err);

/* Begin anew with `n_chunks` chunks, none of them added; all bytes that were stored stay known. When no other call is under
 * way: a pre-dump's packs serve a dump whose segments are others by then. -EINVAL: too many, or after finish; -ENOMEM: nothing
 * was done. */
int bn_pack_writer_relayout(struct bn_pack_writer *w, uint32_t n_chunks, struct bn_error *err);

/* Move what was written into another folder, which becomes the writer's: by link, or by copying where that is impossible. When no
 * other call is under way, and not after finish (-EINVAL). All or nothing: after an error everything is where it was and
 * the writer can be used on. -EEXIST: that folder has packs; -EBUSY; others as add. `dirfd` is duplicated. */
int bn_pack_writer_retarget(struct bn_pack_writer *w, int dirfd, struct bn_error *err);

/* When every add has returned: bring what is used of the parents into the folder, fsync the packs and the folder, fill `chunks` and
 * `packs` of the manifest that the numbers come from (bn_manifest_layout was called on it). Packs that no chunk refers to are removed.
 * A pack of a parent is linked if half of it is used or more, else what is used is copied, so that a folder never
 * carries mostly foreign bytes when it is archived. -EINVAL: a chunk was never added. Other errors as add. On an error the
 * manifest is as before. */
int bn_pack_writer_finish(struct bn_pack_writer *w, struct bn_manifest *m, struct bn_error *err);

/* End without an image: removes every pack that it made, also after finish: keep the writer until bn_image_save() has
 * succeeded. Takes NULL. */
void bn_pack_writer_abort(struct bn_pack_writer *w);
/* End: keeps the packs if finish succeeded, else removes them as abort does. Takes NULL. */
void bn_pack_writer_close(struct bn_pack_writer *w);

/* ---- Reading ---- */

struct bn_pack_reader;

/* Open every pack of `m` (which must outlive the reader and not change), relative to `dirfd` (not kept). Packs must be regular
 * files, no symbolic links, of exactly the length that the manifest says.
 * -ENOENT: a pack is missing; -EBADMSG: it has another length or is no regular file; others as open(2). */
int bn_pack_reader_open(int dirfd, const struct bn_manifest *m, struct bn_pack_reader **out,
                        struct bn_error *err);
void bn_pack_reader_free(struct bn_pack_reader *r);

/* Leave ways of reading out: BN_DISK_… of store/disk.h. Before the first read, by one thread. -ENOMEM: nothing changed. */
int bn_pack_reader_tune(struct bn_pack_reader *r, unsigned disk_flags, struct bn_error *err);

#define BN_PACK_VERIFY 1u /* compare the hashes */
#define BN_PACK_STABLE 2u /* `dst` lies in one of few buffers, which stay mapped until the reader is freed */

/* Read the `n` chunks from `first` on into `dst`, one behind the other. All of them are asked for at once, and hashed as they come;
 * what the page cache does not have is read around it if `dst` is aligned to BN_PACK_ALIGN. `flags`: BN_PACK_VERIFY,
 * BN_PACK_STABLE. Any thread, several at once; errors as bn_pack_reader_read(). */
int bn_pack_reader_read_batch(struct bn_pack_reader *r, uint32_t first, unsigned n, void *dst, unsigned flags,
                              struct bn_error *err);
/* Read a chunk into `dst` (BN_CHUNK_SIZE bytes) and compare its hash. Any thread, several at once. On an error `dst` holds
 * rubbish. -EBADMSG: truncated or changed, with the process, segment and file that are concerned; -EIO …; -EINVAL: no
 * such chunk. */
int bn_pack_reader_read(struct bn_pack_reader *r, uint32_t chunk, void *dst, struct bn_error *err);
/* The same without comparing the hash: for callers that hash on the GPU afterwards. */
int bn_pack_reader_read_unverified(struct bn_pack_reader *r, uint32_t chunk, void *dst, struct bn_error *err);
/* Compare the hash of a chunk that lies in memory already. 0 or -EBADMSG. */
int bn_pack_reader_verify(struct bn_pack_reader *r, uint32_t chunk, const void *data, struct bn_error *err);
