/* The disk tier: a folder below the spool directory with the GPU memory of one suspended tree, as packs and a manifest. The folder
 * is locked (flock) by whoever holds its descriptor, the keeper included: one without a lock is left over from a daemon that died.
 * References from any thread; the rest one thread at a time, except where said.
 */
#pragma once

#include "base/error.h"
#include "image/manifest.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct bn_cold;

/* A new folder in `spool`, which is made (0700) where it is missing, and a writer for the chunks of `m`, which is taken over also on
 * failure. -ENOSPC: there is no room for all of it. */
int bn_cold_new(const char *spool, pid_t root, struct bn_manifest *m, struct bn_cold **out,
                struct bn_error *err);
/* One that an earlier daemon has written; dirfd is duplicated. -ENOENT, -EBADMSG: it is not whole. */
int bn_cold_open(int dirfd, struct bn_cold **out, struct bn_error *err);

struct bn_cold *bn_cold_ref(struct bn_cold *c);
/* The last reference removes the folder, unless it was to be kept: for the next daemon. */
void bn_cold_unref(struct bn_cold *c);
void bn_cold_keep(struct bn_cold *c);

/* Store `n` chunks from number `chunk` on; any thread, several at once. */
int bn_cold_write(struct bn_cold *c, uint64_t chunk, unsigned n, const void *data, struct bn_error *err);
/* When all are stored: the manifest, last of all. From here on it can be read. */
int bn_cold_finish(struct bn_cold *c, struct bn_error *err);
/* Read `n` chunks and compare their hashes; any thread, several at once. -EBADMSG: changed or missing. */
int bn_cold_read(struct bn_cold *c, uint64_t chunk, unsigned n, void *data, struct bn_error *err);

/* What the next daemon shall know of the tree, should it find nothing but the folder. NULL: nothing. Best effort. */
void bn_cold_note(struct bn_cold *c, const void *bytes, size_t len);
/* That, from any folder; *bytes is malloced. -ENOENT: there is none. */
int bn_cold_read_note(int dirfd, void **bytes, size_t *len);

int bn_cold_dirfd(const struct bn_cold *c); /* borrowed */
bool bn_cold_same(const struct bn_cold *c, int dirfd);
/* Of memory, zero chunks counted; and on the disk. */
uint64_t bn_cold_bytes(const struct bn_cold *c);
uint64_t bn_cold_stored(const struct bn_cold *c);

/* An empty folder in `spool`, which is made (0700) where it is missing, locked as long as the descriptor that is returned is open: one
 * that nobody holds is removed by the next daemon. Or negative errno. */
int bn_cold_folder(const char *spool, pid_t root);
/* Remove the folder behind this descriptor, with all that Bennu has put there. */
void bn_cold_remove(int dirfd);
/* Remove the folders in `spool` that nobody holds, but those that `take` (may be NULL) says true of: it may keep them locked by a duplicate
 * of the descriptor. Returns how many were removed. */
unsigned bn_cold_clean(const char *spool, bool (*take)(void *arg, int dirfd), void *arg);
