#include "store/catalog.h"

#include "base/cleanup.h"
#include "store/image_dir.h"
#include "store/pack_file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define DEPTH_MAX 8
#define NAMES_MAX 1000u /* checkpoints of one name that were being removed when that was killed */
#define MANIFEST_TMP "." BN_MANIFEST_NAME ".tmp"
#define RECORDS "bennu-*.json"
#define RECORD_TMP "." BN_IMAGE_RECORD_NAME ".tmp"

bool bn_is_image_file_name(const char *name)
{
    static const char *const patterns[] = {"*.img", "*.log",      "stats-dump", "stats-restore",
                                           RECORDS, MANIFEST_TMP, RECORD_TMP};
    for (size_t i = 0; i < BN_ARRAY_SIZE(patterns); i++)
        if (fnmatch(patterns[i], name, FNM_PERIOD) == 0)
            return true;
    return false;
}

/* ---- one folder ---- */

static bool is_removed(const char *name)
{
    return strncmp(name, BN_ENTRY_REMOVED, strlen(BN_ENTRY_REMOVED)) == 0;
}

struct content {
    bool packs, record; /* packs or half a manifest; what the command bennu wrote before anything else */
};

static int look(struct bn_entry *e, struct content *c)
{
    int copy = openat(e->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = copy >= 0 ? fdopendir(copy) : NULL;
    if (!dir)
        return -errno;
    for (struct dirent *d; (d = readdir(dir));) {
        struct stat st;
        if (bn_is_pack_name(d->d_name, NULL)) {
            c->packs = true;
            if (fstatat(e->fd, d->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0)
                *(st.st_nlink > 1 ? &e->shared : &e->own) += (uint64_t)st.st_size;
        } else if (strcmp(d->d_name, MANIFEST_TMP) == 0)
            c->packs = true;
        else if (fnmatch(RECORDS, d->d_name, FNM_PERIOD) == 0 || strcmp(d->d_name, RECORD_TMP) == 0)
            c->record = true;
    }
    return 0;
}

/* What a folder without a manifest is. False: no checkpoint. */
static bool judge(struct bn_entry *e, const struct content *c)
{
    /* Files of CRIU's alone tell nothing before its inventory is there: others name theirs *.img and *.log, too. */
    if (!c->packs && !c->record && bn_image_has_criu(e->fd) != 1)
        return false;
    /* Only tried where something lies that nobody will want: a dump that just begins must not find its folder locked. */
    int lock = bn_image_lock(e->fd, true, NULL);
    if (lock < 0)
        e->state = BN_ENTRY_WRITING;
    else if (!c->packs && bn_image_has_criu(e->fd) == 1)
        e->state = BN_ENTRY_CRIU;
    else
        e->state = bn_image_present(e->fd) == 0 ? BN_ENTRY_INCOMPLETE : BN_ENTRY_WRITING;
    bn_close(lock);
    return true;
}

static void entry_free(struct bn_entry *e)
{
    bn_close(e->fd);
    bn_manifest_free(e->m);
    free(e->name);
}

/* 1: it is one; 0: no checkpoint, or gone again. */
static int read_entry(int dirfd, const char *name, struct bn_entry *e, struct bn_error *err)
{
    *e = (struct bn_entry){.fd = openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)};
    if (e->fd < 0 && (errno == ENOTDIR || errno == ELOOP || errno == ENOENT))
        return 0;
    if (e->fd < 0)
        return bn_error_set(err, errno, "store", "cannot open %s: %s", name, strerror(errno));
    e->name = strdup(name);
    struct content c = {0};
    int r = e->name ? look(e, &c) : -ENOMEM, loaded = 0;
    if (r == 0 && is_removed(name)) {
        e->state = BN_ENTRY_INCOMPLETE;
        r = 1;
    } else if (r == 0) {
        loaded = bn_image_load(e->fd, &e->m, &e->why);
        r = loaded == 0 ? 1 : loaded != -ENOENT ? (loaded == -ENOMEM ? -ENOMEM : 1) : judge(e, &c);
    }
    if (r > 0 && loaded < 0 && loaded != -ENOENT)
        e->state = BN_ENTRY_DAMAGED;
    if (r < 0)
        bn_error_set(err, r, "store", "cannot look into %s: %s", name, strerror(-r));
    if (r <= 0) {
        entry_free(e);
        *e = (struct bn_entry){.fd = -1};
    }
    return r;
}

/* ---- all of them ---- */

static int append(struct bn_catalog *c, const struct bn_entry *e)
{
    struct bn_entry *more = realloc(c->entries, (c->n + 1) * sizeof(*more));
    if (!more)
        return -ENOMEM;
    c->entries = more;
    more[c->n++] = *e;
    return 0;
}

static int compare(const void *a, const void *b)
{
    const struct bn_entry *x = a, *y = b;
    uint64_t s = x->m ? x->m->created_ns : UINT64_MAX, t = y->m ? y->m->created_ns : UINT64_MAX;
    return s < t ? -1 : s > t ? 1 : strcmp(x->name, y->name);
}

static int add(int dirfd, const char *name, struct bn_catalog *c, struct bn_error *err)
{
    struct bn_entry e;
    int r = read_entry(dirfd, name, &e, err);
    if (r > 0 && append(c, &e) < 0) {
        entry_free(&e);
        r = bn_error_set(err, ENOMEM, "store", "out of memory");
    }
    return r;
}

int bn_catalog_read(int dirfd, struct bn_catalog *out, struct bn_error *err)
{
    struct bn_catalog c = {0};
    int copy = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), r = 0;
    bn_auto_dir DIR *dir = copy >= 0 ? fdopendir(copy) : NULL;
    if (!dir)
        return bn_error_set(err, errno, "store", "cannot read the store's folder: %s", strerror(errno));
    for (struct dirent *d; r >= 0 && (d = readdir(dir));)
        if (strcmp(d->d_name, ".") != 0 && strcmp(d->d_name, "..") != 0)
            r = add(dirfd, d->d_name, &c, err);
    if (r < 0) {
        bn_catalog_free(&c);
        return r;
    }
    if (c.n)
        qsort(c.entries, c.n, sizeof(*c.entries), compare);
    *out = c;
    return 0;
}

int bn_catalog_read_one(int dirfd, const char *name, struct bn_catalog *out, struct bn_error *err)
{
    struct bn_catalog c = {0};
    struct stat st;
    int r;
    if (strchr(name, '/') || strcmp(name, "..") == 0)
        return bn_error_set(err, EINVAL, "store", "%s is not the name of a checkpoint in the store", name);
    if (fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return bn_error_set(err, errno, "store", "%s: %s", name, strerror(errno));
    r = add(dirfd, name, &c, err);
    if (r == 0)
        r = bn_error_set(err, EINVAL, "store", "%s is no checkpoint", name);
    if (r < 0) {
        bn_catalog_free(&c);
        return r;
    }
    *out = c;
    return 0;
}

void bn_catalog_free(struct bn_catalog *c)
{
    for (size_t i = 0; i < c->n; i++)
        entry_free(&c->entries[i]);
    free(c->entries);
    *c = (struct bn_catalog){0};
}

/* ---- removing ---- */

static void remove_content(int fd, int depth)
{
    int copy = openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = copy >= 0 ? fdopendir(copy) : NULL;
    if (!dir)
        return;
    for (struct dirent *d; (d = readdir(dir));) {
        if (strcmp(d->d_name, ".") == 0 || strcmp(d->d_name, "..") == 0 || unlinkat(fd, d->d_name, 0) == 0)
            continue;
        bn_auto_fd sub = openat(fd, d->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (sub >= 0 && depth < DEPTH_MAX)
            remove_content(sub, depth + 1);
        unlinkat(fd, d->d_name, AT_REMOVEDIR);
    }
}

/* Give it a name of its own among those that are being removed. */
static int hide(int dirfd, const char *name, char hidden[NAME_MAX + 1])
{
    for (unsigned i = 0; i < NAMES_MAX; i++) {
        int n = i ? snprintf(hidden, NAME_MAX + 1, BN_ENTRY_REMOVED "%u-%s", i, name)
                  : snprintf(hidden, NAME_MAX + 1, BN_ENTRY_REMOVED "%s", name);
        if (n > NAME_MAX)
            return -ENAMETOOLONG;
        if (renameat(dirfd, name, dirfd, hidden) == 0)
            return 0;
        if (errno != ENOTEMPTY && errno != EEXIST)
            return -errno;
    }
    return -EEXIST;
}

int bn_entry_remove(int dirfd, const struct bn_entry *e, struct bn_error *err)
{
    char hidden[NAME_MAX + 1];
    const char *name = e->name;
    if (!is_removed(name)) {
        int r = hide(dirfd, name, hidden);
        if (r < 0 && r != -ENAMETOOLONG)
            return bn_error_set(err, r, "store", "cannot remove %s: %s", name, strerror(-r));
        if (r == 0)
            name = hidden;
    }
    unlinkat(e->fd, BN_MANIFEST_NAME, 0); /* first, should the name have been too long to hide it */
    remove_content(e->fd, 0);
    if (unlinkat(dirfd, name, AT_REMOVEDIR) < 0 && errno != ENOENT)
        return bn_error_set(err, errno, "store", "cannot remove all of %s: %s", e->name, strerror(errno));
    return 0;
}
