/* What `bennu export` and `bennu import` share: docs/image-format.md, "Archives", is the specification. One thread. */
#pragma once

#include "base/error.h"
#include "image/hash.h"
#include "image/manifest.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define CLI_ARCHIVE_LIST \
    "bennu-archive.list" /* the last file of an archive, which is not of the checkpoint */
#define CLI_ARCHIVE_FILES_MAX 262144u
#define CLI_ARCHIVE_NAME_MAX 200u /* bytes of a file's name */

/* May a file of an archive have this name? One that is harmless on every file system and every terminal: letters, digits, dots,
 * hyphens and underscores, the first of them a letter or a digit. */
bool cli_archive_name_ok(const char *name);

/* The list of what is in an archive: for each file, in their order, hash, length and name. Written by the one side; made anew from what
 * arrives, and compared, by the other. */
struct cli_archive_list;
/* NULL: out of memory. The caller frees it; free takes NULL. */
struct cli_archive_list *cli_archive_list_new(const uint8_t key[BN_HASH_KEY_SIZE]);
void cli_archive_list_free(struct cli_archive_list *l);
/* The next bytes of the file under way: BN_HASH_LENGTH_MAX, but for the last ones. 0 or -ENOMEM. */
int cli_archive_list_add(struct cli_archive_list *l, const void *data, size_t len);
/* The file is at its end. 0 or -ENOMEM. */
int cli_archive_list_end(struct cli_archive_list *l, const char *name);
/* The text so far; the list's own, until it is changed or freed. */
const char *cli_archive_list_text(const struct cli_archive_list *l, size_t *len);
/* The first file of the list whose line is not the same in `other`, into `name`. False: every one of them is. */
bool cli_archive_list_differs(const struct cli_archive_list *l, const char *other, size_t len,
                              char name[CLI_ARCHIVE_NAME_MAX + 1]);

/* One end of an archive. A signal that ends a program ends reading and writing instead, if `signals` is a descriptor of
 * signalfd(2) rather than -1. */
struct cli_archive_io {
    const char *name; /* for messages */
    int fd, signals;
    int error;  /* positive errno of the read or write that failed, or 0 */
    int signal; /* that came, or 0 */
};

/* Has a signal come? Then it is in io->signal. */
bool cli_archive_interrupted(struct cli_archive_io *io);
/* As read(2) and a write(2) of everything; -1 on an error, or when a signal came, with io->error (EINTR). */
ssize_t cli_archive_read(struct cli_archive_io *io, void *buf, size_t cap);
ssize_t cli_archive_write(struct cli_archive_io *io, const void *buf, size_t len);

/* --- unpack.c ------------------------------------------------------------------------------------------------------------ */

struct cli_progress;

/* Unpack an archive into `dirfd`, an empty folder, and bring the manifest in place when all is there, as it was exported and, with
 * `verify`, with every chunk compared with its hash; *out is that manifest, which the caller frees. What the archive says is not
 * trusted: nothing is made but new regular files in that very folder. On an error the folder holds no checkpoint, but files
 * that the caller removes. -EBADMSG: no archive of ours, damaged or cut off; -EINTR: a signal; others as read(2) and write(2). */
int cli_unpack(struct cli_archive_io *io, int dirfd, bool verify, struct cli_progress *progress,
               struct bn_manifest **out, struct bn_error *err);
