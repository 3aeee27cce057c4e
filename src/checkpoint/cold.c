#include "checkpoint/cold.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "store/image_dir.h"
#include "store/pack.h"

#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>

#define NOTE "bennu-suspended"
#define NOTE_MAX ((size_t)64 << 20)

struct bn_cold {
    unsigned references;
    int dirfd;
    bool keep;
    struct bn_manifest *manifest;
    struct bn_pack_writer *writer; /* until it is finished */
    struct bn_pack_reader *reader; /* from then on */
};

/* ---- folders ---- */

/* The spool itself, locked: nobody cleans up while another makes a folder and has not locked it yet. */
static int lock_spool(const char *spool, bool make)
{
    char parent[PATH_MAX];
    snprintf(parent, sizeof(parent), "%s", spool);
    char *slash = strrchr(parent, '/');
    if (make && slash && slash != parent) {
        *slash = 0;
        if (mkdir(parent, 0755) < 0 && errno != EEXIST)
            return -errno;
    }
    if (make && mkdir(spool, 0700) < 0 && errno != EEXIST)
        return -errno;
    bn_auto_fd fd = open(spool, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    while (fd >= 0 && flock(fd, LOCK_EX) < 0)
        if (errno != EINTR)
            return -errno;
    return fd < 0 ? -errno : BN_TAKE_FD(fd);
}

int bn_cold_folder(const char *spool, pid_t root)
{
    char path[PATH_MAX];
    bn_auto_fd lock = lock_spool(spool, true);
    if (lock < 0)
        return lock;
    if (snprintf(path, sizeof(path), "%s/%d-XXXXXX", spool, root) >= (int)sizeof(path))
        return -ENAMETOOLONG;
    if (!mkdtemp(path))
        return -errno;
    bn_auto_fd fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0 || flock(fd, LOCK_SH) < 0) {
        int r = -errno;
        rmdir(path);
        return r;
    }
    return BN_TAKE_FD(fd);
}

void bn_cold_remove(int dirfd)
{
    char link[64], path[PATH_MAX];
    struct stat there, ours;
    unlinkat(dirfd, NOTE, 0);
    unlinkat(dirfd, "." NOTE ".tmp", 0); /* of bn_write_file_atomic_at, if it was killed */
    bn_image_remove(dirfd, NULL);
    snprintf(link, sizeof(link), "/proc/self/fd/%d", dirfd);
    ssize_t n = readlink(link, path, sizeof(path) - 1);
    bn_auto_fd parent = openat(dirfd, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (n <= 0 || parent < 0)
        return;
    path[n] = 0;
    const char *name = strrchr(path, '/');
    if (name && fstatat(parent, name + 1, &there, AT_SYMLINK_NOFOLLOW) == 0 && fstat(dirfd, &ours) == 0 &&
        there.st_dev == ours.st_dev && there.st_ino == ours.st_ino)
        unlinkat(parent, name + 1, AT_REMOVEDIR);
}

static bool is_ours(const char *name)
{
    int pid, end = -1;
    return sscanf(name, "%d-%*6[A-Za-z0-9]%n", &pid, &end) == 1 && end > 0 && name[end] == 0;
}

unsigned bn_cold_clean(const char *spool, bool (*take)(void *arg, int dirfd), void *arg)
{
    unsigned removed = 0;
    bn_auto_fd lock = lock_spool(spool, false);
    int fd = lock < 0 ? -1 : openat(lock, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = fd >= 0 ? fdopendir(fd) : NULL;
    if (!dir && fd >= 0)
        bn_close(fd);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        bn_auto_fd folder = -1;
        if (is_ours(e->d_name))
            folder = openat(lock, e->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (folder < 0 || flock(folder, LOCK_EX | LOCK_NB) < 0)
            continue;
        if (take && (flock(folder, LOCK_SH | LOCK_NB) < 0 || take(arg, folder)))
            continue;
        bn_cold_remove(folder);
        removed++;
    }
    return removed;
}

/* ---- life ---- */

static struct bn_cold *cold_new(int dirfd)
{
    struct bn_cold *c = calloc(1, sizeof(*c));
    if (c)
        *c = (struct bn_cold){.references = 1, .dirfd = dirfd};
    return c;
}

struct bn_cold *bn_cold_ref(struct bn_cold *c)
{
    __atomic_add_fetch(&c->references, 1, __ATOMIC_RELAXED);
    return c;
}

void bn_cold_unref(struct bn_cold *c)
{
    if (!c || __atomic_sub_fetch(&c->references, 1, __ATOMIC_ACQ_REL) > 0)
        return;
    bn_pack_writer_abort(c->writer);
    bn_pack_reader_free(c->reader);
    bn_manifest_free(c->manifest);
    if (!c->keep)
        bn_cold_remove(c->dirfd);
    bn_close(c->dirfd);
    free(c);
}

void bn_cold_keep(struct bn_cold *c)
{
    c->keep = true;
}

int bn_cold_new(const char *spool, pid_t root, struct bn_manifest *m, struct bn_cold **out,
                struct bn_error *err)
{
    int fd = bn_cold_folder(spool, root);
    struct bn_cold *c = fd < 0 ? NULL : cold_new(fd);
    if (!c) {
        bn_manifest_free(m);
        if (fd < 0)
            return bn_error_set(err, fd, "spool", "cannot make a folder in %s: %s", spool, strerror(-fd));
        bn_cold_remove(fd);
        bn_close(fd);
        return bn_error_set(err, ENOMEM, "spool", "out of memory");
    }
    c->manifest = m;
    struct bn_error why = BN_ERROR_INIT;
    struct bn_pack_options options = {.flags = BN_PACK_NOSYNC};
    int r = bn_store_check_space(c->dirfd, bn_manifest_bytes(m), &why);
    if (r == 0)
        r = bn_pack_writer_open(c->dirfd, m->key, m->n_chunks, &options, &c->writer, &why);
    if (r < 0) {
        bn_cold_unref(c);
        return bn_error_set(err, r, "spool", "%.200s: %.280s", spool, why.text);
    }
    *out = c;
    return 0;
}

int bn_cold_open(int dirfd, struct bn_cold **out, struct bn_error *err)
{
    int fd = fcntl(dirfd, F_DUPFD_CLOEXEC, 3);
    struct bn_cold *c = fd < 0 ? NULL : cold_new(fd);
    if (!c) {
        bn_close(fd);
        return bn_error_set(err, ENOMEM, "spool", "out of memory");
    }
    int r = bn_image_load(fd, &c->manifest, err);
    if (r == 0)
        r = bn_pack_reader_open(fd, c->manifest, &c->reader, err);
    if (r < 0) {
        bn_cold_keep(c);
        bn_cold_unref(c);
        return r;
    }
    *out = c;
    return 0;
}

/* ---- content ---- */

int bn_cold_write(struct bn_cold *c, uint64_t chunk, unsigned n, const void *data, struct bn_error *err)
{
    return bn_pack_writer_add_run(c->writer, (uint32_t)chunk, n, data, err);
}

int bn_cold_finish(struct bn_cold *c, struct bn_error *err)
{
    int r = bn_pack_writer_finish(c->writer, c->manifest, err);
    if (r == 0)
        r = bn_image_save(c->dirfd, c->manifest, err);
    if (r == 0)
        r = bn_pack_reader_open(c->dirfd, c->manifest, &c->reader, err);
    if (r < 0)
        return r;
    bn_pack_writer_close(c->writer);
    c->writer = NULL;
    return 0;
}

int bn_cold_read(struct bn_cold *c, uint64_t chunk, unsigned n, void *data, struct bn_error *err)
{
    return bn_pack_reader_read_batch(c->reader, (uint32_t)chunk, n, data, BN_PACK_VERIFY, err);
}

void bn_cold_note(struct bn_cold *c, const void *bytes, size_t len)
{
    if (bytes ? bn_write_file_atomic_at(c->dirfd, NOTE, bytes, len) < 0 : true)
        unlinkat(c->dirfd, NOTE, 0);
}

int bn_cold_read_note(int dirfd, void **bytes, size_t *len)
{
    return bn_read_file_at(dirfd, NOTE, NOTE_MAX, bytes, len);
}

int bn_cold_dirfd(const struct bn_cold *c)
{
    return c->dirfd;
}

bool bn_cold_same(const struct bn_cold *c, int dirfd)
{
    struct stat a, b;
    return fstat(c->dirfd, &a) == 0 && fstat(dirfd, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

uint64_t bn_cold_bytes(const struct bn_cold *c)
{
    return bn_manifest_bytes(c->manifest);
}

uint64_t bn_cold_stored(const struct bn_cold *c)
{
    return bn_manifest_stored_bytes(c->manifest);
}
