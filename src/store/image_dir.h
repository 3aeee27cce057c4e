/* An image folder: CRIU's files and Bennu's in one. Any thread. */
#pragma once

#include "base/error.h"
#include "image/manifest.h"

#include <stdbool.h>
#include <stdint.h>

/* Is there a manifest, so that the folder is a complete Bennu image? 0 or 1, or the negative errno of fstatat. */
int bn_image_present(int dirfd);

/* Read and decode the manifest; the caller frees it. -ENOENT: not a Bennu checkpoint; -EBADMSG: damaged; -EPROTONOSUPPORT:
 * of a newer Bennu; others as open(2) and read(2). */
int bn_image_load(int dirfd, struct bn_manifest **out, struct bn_error *err);

/* Encode and write the manifest: temporary file, fsync, rename, fsync of the folder. To be called last, when packs and CRIU's
 * own files are written. -EINVAL: the manifest is wrong; -EEXIST: there is one already; -ENOSPC, -EIO … */
int bn_image_save(int dirfd, const struct bn_manifest *m, struct bn_error *err);

/* Put another manifest in the place of the one that is there, at one moment: for images whose packs are rewritten. The old one is
 * there on every error. Errors as bn_image_save(). */
int bn_image_replace(int dirfd, const struct bn_manifest *m, struct bn_error *err);

/* Hold a folder that is being written or read (shared), or that is to be removed or rewritten (exclusive), as flock(2) does. Never
 * waits. A descriptor, which holds it until it is closed; -EBUSY: somebody else does; -ENOTSUP: the file system has no
 * locks; others as open(2). */
int bn_image_lock(int dirfd, bool exclusive, struct bn_error *err);

/* Remove manifest and packs, the manifest first, so that what is left is never taken for a checkpoint. Files that are not
 * Bennu's stay. 0, or the first errno met; goes on after errors. */
int bn_image_remove(int dirfd, struct bn_error *err);

/* The same for a dump that will not be finished: CRIU's inventory goes first, without which CRIU takes it for no image either. */
int bn_image_spoil(int dirfd, struct bn_error *err);

/* Has CRIU finished its half (inventory.img is there and not empty)? 0 or 1, or a negative errno. */
int bn_image_has_criu(int dirfd);

/* Room for `bytes` more, in place of the packs that are in the folder? -ENOSPC with what is free and what is needed. A file system that does not know (0 blocks) passes. */
int bn_store_check_space(int dirfd, uint64_t bytes, struct bn_error *err);
