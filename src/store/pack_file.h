/* A pack as a file. Any thread. */
#pragma once

#include "base/error.h"
#include "image/manifest.h"

/* Open a pack for reading and check what can be checked without reading it: a regular file, no link, of exactly the length that the
 * manifest says. The descriptor, or -ENOENT: missing; -EBADMSG: another length, no regular file; others as open(2). */
int bn_pack_file_open(int dirfd, const struct bn_image_pack *p, struct bn_error *err);

/* Make a pack, which must not be there yet. The descriptor (for reading and writing), or the negative errno of open(2). */
int bn_pack_file_create(int dirfd, uint32_t pack);

/* Give the very file that `fd` is open on the name of pack `pack` in another folder. 0, or the negative errno of linkat(2):
 * see bn_pack_cannot_link(). */
int bn_pack_file_link(int fd, int dirfd, uint32_t pack);

/* Is this error no failure, but a file system (or two) that cannot do it, so that the bytes are to be copied? */
bool bn_pack_cannot_link(int error);

/* Copy bytes between files, inside the kernel if it can (which may share them instead). -ENODATA: the source ends
 * before; others as copy_file_range(2), read(2) and write(2). */
int bn_pack_file_copy(int from, uint64_t from_offset, int to, uint64_t to_offset, uint64_t bytes);

void bn_pack_file_unlink(int dirfd, uint32_t pack);

/* Is this the name of a pack? Then *index (may be NULL) is its number. */
bool bn_is_pack_name(const char *name, uint32_t *index);
