/* Whole reads and writes, and small files. All retry on EINTR; 0 or negative errno. Any thread. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Exactly `len` bytes at `off`; -ENODATA when the file ends before. */
int bn_pread_full(int fd, void *buf, size_t len, uint64_t off);
int bn_pwrite_full(int fd, const void *buf, size_t len, uint64_t off);
int bn_write_full(int fd, const void *buf, size_t len);

/* Read a whole file of at most `max` bytes into *out (malloced, with a NUL after it; caller frees). -EFBIG when longer. */
int bn_read_file_at(int dirfd, const char *path, size_t max, void **out, size_t *len);

/* Write `name` in `dirfd` so that it is either whole or absent: temporary file, fsync, rename, fsync of the folder. */
int bn_write_file_atomic_at(int dirfd, const char *name, const void *data, size_t len);

/* Monotonic clock in nanoseconds. */
uint64_t bn_now_ns(void);
