#include "cli/cli.h"

#include "base/cleanup.h"
#include "store/image_dir.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#define DEPTH_MAX 8

static int open_or_make(const char *path, struct cli_directory *d, struct bn_error *err)
{
    if (mkdir(path, 0700) == 0)
        d->created = true;
    else if (errno == ENOENT)
        return bn_error_set(err, ENOENT, "directory", "cannot make %s: its parent directory does not exist",
                            path);
    else if (errno != EEXIST)
        return bn_error_set(err, errno, "directory", "cannot make the directory %s: %m", path);
    d->fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (d->fd >= 0)
        return 0;
    if (errno == ENOTDIR)
        return bn_error_set(err, ENOTDIR, "directory", "%s is not a directory: name a new or an empty one",
                            path);
    return bn_error_set(err, errno, "directory", "cannot open the directory %s: %m", path);
}

static bool is_empty(int fd)
{
    int copy = openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = copy >= 0 ? fdopendir(copy) : NULL;
    if (!dir)
        return false;
    for (struct dirent *e = readdir(dir); e; e = readdir(dir)) {
        if (strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0)
            return false;
    }
    return true;
}

/* Root may write anywhere by the permission bits, but not to a read-only file system: so it is tried. */
static int try_to_write(int fd)
{
    static const char name[] = ".bennu-writable";
    bn_auto_fd file = openat(fd, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file < 0)
        return -errno;
    unlinkat(fd, name, 0);
    return 0;
}

int cli_directory_prepare(const char *path, struct cli_directory *d, struct bn_error *err)
{
    *d = (struct cli_directory){.fd = -1, .parent = -1, .lock = -1};
    int r = open_or_make(path, d, err);
    if (r == 0 && !is_empty(d->fd))
        r = bn_error_set(err, ENOTEMPTY, "directory",
                         "the directory %s is not empty: name a new or an empty one", path);
    if (r == 0) {
        struct bn_error busy = BN_ERROR_INIT;
        d->lock = bn_image_lock(d->fd, false, &busy);
        if (d->lock == -EBUSY) /* without locks it goes as well */
            r = bn_error_set(err, EBUSY, "directory", "%s: %s", path, busy.text);
    }
    if (r == 0) {
        r = try_to_write(d->fd);
        if (r < 0)
            bn_error_set(err, r, "directory", "cannot write to the directory %s: %s", path, strerror(-r));
    }
    if (r == 0) {
        d->path = realpath(path, NULL);
        d->parent = openat(d->fd, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (!d->path || d->parent < 0)
            r = bn_error_set(err, errno, "directory", "cannot find the place of %s: %m", path);
    }
    if (r < 0) {
        if (d->created)
            rmdir(path);
        cli_directory_close(d);
    }
    return r;
}

static void remove_content(int fd, int depth)
{
    int copy = openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = copy >= 0 ? fdopendir(copy) : NULL;
    if (!dir)
        return;
    for (struct dirent *e = readdir(dir); e; e = readdir(dir)) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0 || unlinkat(fd, e->d_name, 0) == 0)
            continue;
        bn_auto_fd sub = openat(fd, e->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (sub >= 0 && depth < DEPTH_MAX)
            remove_content(sub, depth + 1);
        unlinkat(fd, e->d_name, AT_REMOVEDIR);
    }
}

void cli_directory_discard(struct cli_directory *d)
{
    /* What makes a checkpoint of it goes first: killed in here, we still leave nothing that looks like one. */
    unlinkat(d->fd, CLI_INVENTORY, 0);
    remove_content(d->fd, 0);
    if (d->created)
        rmdir(d->path);
}

void cli_directory_close(struct cli_directory *d)
{
    d->fd = bn_close(d->fd);
    d->parent = bn_close(d->parent);
    d->lock = bn_close(d->lock);
    free(d->path);
    d->path = NULL;
}

uint64_t cli_free_space(int fd)
{
    struct statvfs vfs;
    return fstatvfs(fd, &vfs) == 0 ? (uint64_t)vfs.f_bavail * vfs.f_frsize : UINT64_MAX;
}
