#include "store/pack_file.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "store/pack.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

#define COPY_BUFFER ((size_t)1 << 20)

int bn_pack_file_open(int dirfd, const struct bn_image_pack *p, struct bn_error *err)
{
    char name[BN_PACK_NAME_MAX];
    snprintf(name, sizeof(name), BN_PACK_NAME, p->index);
    /* O_NONBLOCK: a FIFO of that name would hang us. */
    bn_auto_fd fd = openat(dirfd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT)
        return bn_error_set(err, ENOENT, "store", "%s is missing: the checkpoint is incomplete", name);
    if (fd < 0 && errno == ELOOP)
        return bn_error_set(err, EBADMSG, "store", "%s is a symbolic link: a checkpoint has none", name);
    if (fd < 0)
        return bn_error_set(err, errno, "store", "cannot open %s: %s", name, strerror(errno));
    struct stat st;
    if (fstat(fd, &st) < 0)
        return bn_error_set(err, errno, "store", "cannot look at %s: %s", name, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return bn_error_set(err, EBADMSG, "store", "%s is no regular file", name);
    if ((uint64_t)st.st_size != p->length)
        return bn_error_set(err, EBADMSG, "store", "%s is %s: it has %llu bytes, the manifest says %llu",
                            name, (uint64_t)st.st_size < p->length ? "truncated" : "too long",
                            (unsigned long long)st.st_size, (unsigned long long)p->length);
    return BN_TAKE_FD(fd);
}

int bn_pack_file_create(int dirfd, uint32_t pack)
{
    char name[BN_PACK_NAME_MAX];
    snprintf(name, sizeof(name), BN_PACK_NAME, pack);
    int fd = openat(dirfd, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    return fd < 0 ? -errno : fd;
}

int bn_pack_file_link(int fd, int dirfd, uint32_t pack)
{
    char name[BN_PACK_NAME_MAX], self[64];
    snprintf(name, sizeof(name), BN_PACK_NAME, pack);
    /* By descriptor, not by name: the name may be another file's by now. AT_EMPTY_PATH would ask for a capability. */
    snprintf(self, sizeof(self), "/proc/self/fd/%d", fd);
    return linkat(AT_FDCWD, self, dirfd, name, AT_SYMLINK_FOLLOW) < 0 ? -errno : 0;
}

bool bn_pack_cannot_link(int error)
{
    switch (abs(error)) {
    case EXDEV:      /* another file system, or another mount of it */
    case EPERM:      /* a file system without links, or somebody else's file */
    case EMLINK:     /* as many as it can have */
    case ENOENT:     /* its last name is gone; and without /proc */
    case EOPNOTSUPP: /* what some network file systems say */
    case ENOSYS: return true;
    default: return false;
    }
}

static int copy_through_memory(int from, uint64_t from_offset, int to, uint64_t to_offset, uint64_t bytes)
{
    bn_auto_free void *buffer = malloc(COPY_BUFFER);
    if (!buffer)
        return -ENOMEM;
    int r = 0;
    for (uint64_t at = 0; r == 0 && at < bytes; at += COPY_BUFFER) {
        size_t n = bytes - at < COPY_BUFFER ? (size_t)(bytes - at) : COPY_BUFFER;
        r = bn_pread_full(from, buffer, n, from_offset + at);
        if (r == 0)
            r = bn_pwrite_full(to, buffer, n, to_offset + at);
    }
    return r;
}

int bn_pack_file_copy(int from, uint64_t from_offset, int to, uint64_t to_offset, uint64_t bytes)
{
    off_t in = (off_t)from_offset, out = (off_t)to_offset;
    while (bytes > 0) {
        ssize_t n =
            copy_file_range(from, &in, to, &out, bytes < 1u << 30 ? (size_t)bytes : (size_t)1 << 30, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && (errno == ENOSPC || errno == EDQUOT || errno == EIO || errno == EFBIG))
            return -errno;
        if (n <= 0) /* not between these two: some file systems say so with an error, some with 0 */
            return copy_through_memory(from, (uint64_t)in, to, (uint64_t)out, bytes);
        bytes -= (uint64_t)n;
    }
    return 0;
}

void bn_pack_file_unlink(int dirfd, uint32_t pack)
{
    char name[BN_PACK_NAME_MAX];
    snprintf(name, sizeof(name), BN_PACK_NAME, pack);
    unlinkat(dirfd, name, 0);
}

bool bn_is_pack_name(const char *name, uint32_t *index)
{
    unsigned number;
    int end = -1;
    char again[BN_PACK_NAME_MAX];
    if (sscanf(name, BN_PACK_NAME "%n", &number, &end) != 1 || end < 0)
        return false;
    snprintf(again, sizeof(again), BN_PACK_NAME, number);
    if (strcmp(again, name) != 0)
        return false;
    if (index)
        *index = number;
    return true;
}
