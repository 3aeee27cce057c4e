/* CRIU's files of a checkpoint, host memory above all: the manifest has the hash of each 2 MiB of them, so that damage is found before CRIU lets
 * anything run. Those are the regular files `*.img` but packs and manifest, and the command line's record; logs and statistics are none of the image's. Any thread. */
#pragma once

#include "base/error.h"
#include "image/manifest.h"
#include "store/verify.h"

#include <stdbool.h>
#include <stdint.h>

/* Note in `m` what the files are, once CRIU has written all of them. *bytes: read. `cancel` may be NULL. -ECANCELED; -E2BIG: more than a
 * manifest can have; -EIO: one changed meanwhile; others as open(2) and read(2). */
int bn_host_files_note(int dirfd, struct bn_manifest *m, const bool *cancel, uint64_t *bytes,
                       struct bn_error *err);

#define BN_HOST_FILES_SMALL 1u /* of 2 MiB at most */
#define BN_HOST_FILES_LARGE 2u
#define BN_HOST_FILES_ALL 3u

/* Compare those of some sizes with what was noted, by at most so many threads (0: as many as note). `damaged` is called for each piece that differs, each file that is
 * missing or has another length, by one thread at a time. 0 also then; -ECANCELED; -ENOMEM. A manifest may know of no files. */
int bn_host_files_compare(int dirfd, const struct bn_manifest *m, unsigned which, unsigned threads,
                          const bool *cancel, bn_verify_fn damaged, void *arg, uint64_t *bytes,
                          struct bn_error *err);
/* The same, for who wants to know whether there is damage: 0, or the first that was found, with its code (-EBADMSG, -ENOENT, -EIO …).
 * `bytes` may be NULL. */
int bn_host_files_check(int dirfd, const struct bn_manifest *m, unsigned which, unsigned threads,
                        const bool *cancel, uint64_t *bytes, struct bn_error *err);
