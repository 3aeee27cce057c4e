/* Bytes between memory and files at the rate of the disk: io_uring with O_DIRECT, everything of a call in flight at once.
 *
 * All of it falls back by itself, call by call: without io_uring (an old kernel, a seccomp filter) to pread and pwrite with
 * O_DIRECT; where a file system has no O_DIRECT, or a piece does not lie on BN_DISK_ALIGN, to the page cache. The bytes are
 * the same in any case.
 *
 * Any thread, several at once, but for what is said. 0 or negative errno.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BN_DISK_ALIGN 4096u /* of offset, address and length */
#define BN_DISK_STEP ((uint64_t)128 << 20)
#define BN_DISK_PLENTY \
    (32 * BN_DISK_STEP)    /* with less than this free, nothing is taken that may not be needed */
#define BN_DISK_PIECES 32u /* in flight at most in one call */

/* Leave a way out, as if it were missing here: for tests and comparison. */
#define BN_DISK_NO_RING 1u
#define BN_DISK_NO_DIRECT 2u
#define BN_DISK_NO_CACHESTAT 4u

/* The rings, one for each thread that is in a call, made when they are needed. */
struct bn_disk;

/* NULL: out of memory. `flags`: BN_DISK_… */
struct bn_disk *bn_disk_new(unsigned flags);
/* When no call is under way. Takes NULL. */
void bn_disk_free(struct bn_disk *d);

struct bn_disk_file {
    int fd;            /* borrowed */
    int direct;        /* the same file, opened with O_DIRECT; -1: only through the page cache */
    bool stacked;      /* of overlayfs, whose pages are another file's */
    uint64_t reserved; /* bytes that bn_disk_reserve() got */
};

/* `fd` is borrowed: it must be open until the file is closed. `write`: for reading and writing. Cannot fail. */
void bn_disk_file_open(const struct bn_disk *d, int fd, bool write, struct bn_disk_file *out);
/* May be called again, and on a file that was set to BN_DISK_FILE_NONE. */
void bn_disk_file_close(struct bn_disk_file *f);
#define BN_DISK_FILE_NONE ((struct bn_disk_file){.fd = -1, .direct = -1})

struct bn_disk_piece {
    const struct bn_disk_file *file;
    uint64_t offset;
    void *data;
    size_t bytes;
    bool
        stable; /* this memory stays what it is until bn_disk_free(): it is registered with the kernel, once */
};

/* Called in the thread of bn_disk_read() when the piece `i` has been read, in any order, while others are under way. A negative
 * result ends the call with it. */
typedef int (*bn_disk_done_fn)(void *arg, size_t i);

/* Read up to BN_DISK_PIECES pieces. What the page cache has comes from there, the rest from the disk around it (and so it does
 * not push out what is there). Returns when nothing is under way any more, also after an error; then *failed is the piece
 * that it was about. -ENODATA: the file ends before; -EINVAL: too many; others as read(2). */
int bn_disk_read(struct bn_disk *d, const struct bn_disk_piece *pieces, size_t n, bn_disk_done_fn done,
                 void *arg, size_t *failed);

/* Write up to BN_DISK_PIECES pieces around the page cache. What could not go that way lies in the page cache afterwards:
 * the caller syncs. Errors as write(2). */
int bn_disk_write(struct bn_disk *d, const struct bn_disk_piece *pieces, size_t n);

/* Have room for a file of `bytes`, in steps of BN_DISK_STEP, so that writes find blocks and need not extend it one by one. The file is longer
 * than what was written then: see bn_disk_trim(). One thread at a time for a file. A file system that cannot do it, or is
 * full, is no error here. False: it is nearly full, so this was for no more than `bytes`, and what other files have beyond their need should be
 * given back. */
bool bn_disk_reserve(struct bn_disk_file *f, uint64_t bytes);
/* Cut off what was reserved beyond `bytes`. Errors as ftruncate(2). */
int bn_disk_trim(struct bn_disk_file *f, uint64_t bytes);

/* Bytes that the page cache can take without pushing out what programs use; UINT64_MAX: not known. */
uint64_t bn_disk_cache_room(void);

/* Does the page cache have all of these bytes? Also true where nobody can say: reading them is right either way. */
bool bn_disk_is_cached(const struct bn_disk *d, const struct bn_disk_file *f, uint64_t offset, size_t bytes);
