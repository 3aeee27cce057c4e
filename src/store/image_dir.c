#include "store/image_dir.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "store/pack_file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#define INVENTORY "inventory.img" /* CRIU's, written last of its files */

static int present(int dirfd, const char *name, bool not_empty)
{
    struct stat st;
    if (fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return errno == ENOENT ? 0 : -errno;
    return S_ISREG(st.st_mode) && (!not_empty || st.st_size > 0);
}

int bn_image_present(int dirfd)
{
    return present(dirfd, BN_MANIFEST_NAME, false);
}

int bn_image_has_criu(int dirfd)
{
    return present(dirfd, INVENTORY, true);
}

static int read_manifest(int dirfd, void **out, size_t *len, struct bn_error *err)
{
    static const char name[] = BN_MANIFEST_NAME;
    bn_auto_fd fd = openat(dirfd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    struct stat st;
    if (fd < 0 && errno == ENOENT) {
        if (present(dirfd, INVENTORY, false) == 1)
            return bn_error_set(
                err, ENOENT, "image",
                "not a Bennu checkpoint (no %s): this is one of CRIU alone, or a dump that did not finish",
                name);
        return bn_error_set(err, ENOENT, "image",
                            "not a Bennu checkpoint (no %s): name the folder that \"bennu dump\" wrote",
                            name);
    }
    if (fd < 0 && errno == ELOOP)
        return bn_error_set(err, EBADMSG, "image", "%s is a symbolic link: a checkpoint has none", name);
    if (fd < 0 || fstat(fd, &st) < 0)
        return bn_error_set(err, errno, "image", "cannot open %s: %s", name, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return bn_error_set(err, EBADMSG, "image", "%s is no regular file", name);
    if (st.st_size > (off_t)BN_MANIFEST_BYTES_MAX)
        return bn_error_set(err, EBADMSG, "image", "%s has %lld bytes: no manifest is that long", name,
                            (long long)st.st_size);
    bn_auto_free void *buf = malloc((size_t)st.st_size + 1);
    if (!buf)
        return bn_error_set(err, ENOMEM, "image", "out of memory for %s", name);
    int r = bn_pread_full(fd, buf, (size_t)st.st_size, 0);
    if (r < 0)
        return bn_error_set(err, r == -ENODATA ? EBADMSG : r, "image", "cannot read %s: %s", name,
                            r == -ENODATA ? "it became shorter" : strerror(-r));
    *out = BN_TAKE_PTR(buf);
    *len = (size_t)st.st_size;
    return 0;
}

int bn_image_load(int dirfd, struct bn_manifest **out, struct bn_error *err)
{
    bn_auto_free void *bytes = NULL;
    size_t len = 0;
    int r = read_manifest(dirfd, &bytes, &len, err);
    if (r < 0)
        return r;
    struct bn_error why = BN_ERROR_INIT;
    r = bn_manifest_decode(bytes, len, out, &why);
    if (r < 0)
        return bn_error_set(err, r, "image", "%s: %s", BN_MANIFEST_NAME, why.text);
    return 0;
}

int bn_image_save(int dirfd, const struct bn_manifest *m, struct bn_error *err)
{
    if (bn_image_present(dirfd) == 1)
        return bn_error_set(err, EEXIST, "image",
                            "the folder already holds a checkpoint: choose an empty folder");
    bn_auto_free void *bytes = NULL;
    size_t len = 0;
    int r = bn_manifest_encode(m, &bytes, &len, err);
    if (r < 0)
        return r;
    r = bn_write_file_atomic_at(dirfd, BN_MANIFEST_NAME, bytes, len);
    if (r < 0) {
        unlinkat(dirfd, BN_MANIFEST_NAME,
                 0); /* it may be there and yet not be safe: the folder's fsync failed */
        return bn_error_set(
            err, r, "image", "cannot write %s: %s%s", BN_MANIFEST_NAME, strerror(-r),
            r == -ENOSPC || r == -EDQUOT ? ": make room or choose a folder on another file system" : "");
    }
    return 0;
}

int bn_image_lock(int dirfd, bool exclusive, struct bn_error *err)
{
    /* An open of its own: a lock belongs to the open file, and `dirfd` may be shared with who knows whom. */
    bn_auto_fd fd = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return bn_error_set(err, errno, "image", "cannot open the image folder: %s", strerror(errno));
    if (flock(fd, (exclusive ? LOCK_EX : LOCK_SH) | LOCK_NB) == 0)
        return BN_TAKE_FD(fd);
    if (errno == EWOULDBLOCK)
        return bn_error_set(err, EBUSY, "image", "the folder is %s: try again later",
                            exclusive ? "being written or read" : "being removed or rewritten");
    return bn_error_set(err, ENOTSUP, "image", "the file system of the image folder has no locks: %s",
                        strerror(errno));
}

int bn_image_replace(int dirfd, const struct bn_manifest *m, struct bn_error *err)
{
    bn_auto_free void *bytes = NULL;
    size_t len = 0;
    int r = bn_manifest_encode(m, &bytes, &len, err);
    if (r < 0)
        return r;
    r = bn_write_file_atomic_at(dirfd, BN_MANIFEST_NAME, bytes, len);
    return r < 0 ? bn_error_set(err, r, "image", "cannot write %s: %s", BN_MANIFEST_NAME, strerror(-r)) : 0;
}

int bn_image_remove(int dirfd, struct bn_error *err)
{
    int first = 0;
    if (unlinkat(dirfd, BN_MANIFEST_NAME, 0) < 0 && errno != ENOENT)
        first = bn_error_set(err, errno, "image", "cannot remove %s: %s", BN_MANIFEST_NAME, strerror(errno));
    unlinkat(dirfd, "." BN_MANIFEST_NAME ".tmp", 0);
    bn_auto_fd fd = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
    if (!dir)
        return first ? first
                     : bn_error_set(err, errno, "image", "cannot read the image folder: %s", strerror(errno));
    fd = -1; /* it is the DIR's now */
    for (struct dirent *e; (e = readdir(dir));)
        if (bn_is_pack_name(e->d_name, NULL) && unlinkat(dirfd, e->d_name, 0) < 0 && errno != ENOENT &&
            first == 0)
            first = bn_error_set(err, errno, "image", "cannot remove %s: %s", e->d_name, strerror(errno));
    return first;
}

int bn_image_spoil(int dirfd, struct bn_error *err)
{
    int first = 0;
    if (unlinkat(dirfd, INVENTORY, 0) < 0 && errno != ENOENT)
        first = bn_error_set(err, errno, "image", "cannot remove %s: %s", INVENTORY, strerror(errno));
    int r = bn_image_remove(dirfd, first ? NULL : err);
    return first ? first : r;
}

/* Bytes that come free with the packs in the folder: a link elsewhere keeps them. */
static uint64_t replaceable(int dirfd)
{
    uint64_t bytes = 0;
    int fd = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
    if (!dir)
        bn_close(fd);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        struct stat st;
        if (bn_is_pack_name(e->d_name, NULL) && fstatat(dirfd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0 &&
            S_ISREG(st.st_mode) && st.st_nlink == 1)
            bytes += (uint64_t)st.st_blocks * 512;
    }
    return bytes;
}

int bn_store_check_space(int dirfd, uint64_t bytes, struct bn_error *err)
{
    struct statvfs fs;
    if (fstatvfs(dirfd, &fs) < 0)
        return bn_error_set(err, errno, "store", "cannot look at the file system of the image folder: %s",
                            strerror(errno));
    if (fs.f_blocks == 0)
        return 0;
    uint64_t blocks = geteuid() == 0 ? fs.f_bfree : fs.f_bavail, available;
    if (__builtin_mul_overflow(blocks, (uint64_t)fs.f_frsize, &available) || available >= bytes ||
        available + replaceable(dirfd) >= bytes)
        return 0;
    return bn_error_set(
        err, ENOSPC, "store",
        "the file system of the image folder has %.1f GiB free, the checkpoint needs %.1f GiB: make "
        "room or choose a folder on another file system",
        (double)available / (1 << 30), (double)bytes / (1 << 30));
}
