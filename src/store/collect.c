#include "store/collect.h"

#include "base/cleanup.h"
#include "store/catalog.h"
#include "store/image_dir.h"
#include "store/pack.h"
#include "store/pack_file.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

struct collection {
    int dirfd;
    struct bn_catalog catalog;
    bn_collect_fn skipped;
    void *arg;
    struct bn_collected out;
    bool *given_up; /* entries of the catalog: something failed there, so nothing more is tried */
    uint32_t failures;
    struct bn_error failure; /* the first one */
};

/* A pack of an image; those of one file stand together once they are sorted. */
struct use {
    dev_t dev;
    ino_t ino;
    nlink_t links;
    uint64_t length;
    struct bn_entry *entry;
    uint32_t pack; /* its number in that image */
};

/* Bytes of a pack that some image needs, and where they go. */
struct piece {
    uint64_t offset, to;
    uint32_t length;
};

static void skip(struct collection *c, const char *name, const char *reason)
{
    struct bn_error why = BN_ERROR_INIT;
    bn_error_set(&why, EAGAIN, "store", "%s: %s", name, reason);
    c->out.skipped++;
    if (c->skipped)
        c->skipped(c->arg, &why);
}

static size_t number_of(const struct collection *c, const struct bn_entry *e)
{
    return (size_t)(e - c->catalog.entries);
}

/* The others are not to suffer for it. */
static void give_up(struct collection *c, const struct bn_entry *e, const struct bn_error *why)
{
    if (c->failures == 0)
        bn_error_set(&c->failure, why->code, "store", "%s: left alone: %s", e->name, why->text);
    c->given_up[number_of(c, e)] = true;
    c->failures++;
}

/* ---- what a crash left ---- */

/* Is the manifest still the one that was read before the folder was held? */
static bool is_unchanged(const struct bn_entry *e)
{
    bn_auto_manifest struct bn_manifest *now = NULL;
    bn_auto_free void *a = NULL, *b = NULL;
    size_t m, n;
    return bn_image_load(e->fd, &now, NULL) == 0 && bn_manifest_encode(now, &a, &m, NULL) == 0 &&
           bn_manifest_encode(e->m, &b, &n, NULL) == 0 && m == n && memcmp(a, b, m) == 0;
}

/* Does anything lie in the folder that neither CRIU nor we have made? */
static bool has_foreign_files(int fd)
{
    int copy = openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = copy >= 0 ? fdopendir(copy) : NULL;
    if (!dir)
        return true;
    for (struct dirent *d; (d = readdir(dir));) {
        struct stat st;
        if (strcmp(d->d_name, ".") == 0 || strcmp(d->d_name, "..") == 0)
            continue;
        if (!bn_is_image_file_name(d->d_name) || fstatat(fd, d->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0 ||
            !S_ISREG(st.st_mode))
            return true;
    }
    return false;
}

static void remove_incomplete(struct collection *c, const struct bn_entry *e)
{
    struct bn_error why = BN_ERROR_INIT;
    bn_auto_fd lock = bn_image_lock(e->fd, true, &why);
    bool removed = strncmp(e->name, BN_ENTRY_REMOVED, strlen(BN_ENTRY_REMOVED)) == 0;
    if (lock < 0 || (!removed && bn_image_present(e->fd) != 0)) {
        skip(c, e->name, "not complete, but in use");
        return;
    }
    if (!removed && has_foreign_files(e->fd)) {
        skip(c, e->name, "not complete, but holds files that are no checkpoint's: remove it yourself");
        return;
    }
    if (bn_entry_remove(c->dirfd, e, &why) < 0) {
        skip(c, e->name, why.text);
        return;
    }
    c->out.folders++;
    c->out.bytes += e->own;
}

/* Packs beside a manifest that does not name them: an earlier collection was killed. */
static void remove_leftovers(struct collection *c, const struct bn_entry *e)
{
    bn_auto_fd lock = -1;
    int copy = openat(e->fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = copy >= 0 ? fdopendir(copy) : NULL;
    if (!dir)
        return;
    for (struct dirent *d; (d = readdir(dir));) {
        uint32_t index;
        struct stat st;
        if (!bn_is_pack_name(d->d_name, &index) || bn_manifest_find_pack(e->m, index))
            continue;
        if (lock < 0 && (lock = bn_image_lock(e->fd, true, NULL)) < 0) {
            skip(c, e->name, "holds packs that it does not need, but is in use");
            return;
        }
        if (!is_unchanged(e))
            return;
        if (fstatat(e->fd, d->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0 || unlinkat(e->fd, d->d_name, 0) < 0)
            continue;
        c->out.leftovers++;
        c->out.bytes += st.st_nlink == 1 ? (uint64_t)st.st_size : 0;
    }
}

/* ---- which packs are used little ---- */

static int compare_uses(const void *a, const void *b)
{
    const struct use *x = a, *y = b;
    if (x->dev != y->dev)
        return x->dev < y->dev ? -1 : 1;
    return x->ino < y->ino ? -1 : x->ino > y->ino;
}

static int list_uses(struct collection *c, struct use **out, size_t *n)
{
    size_t total = 0;
    for (size_t i = 0; i < c->catalog.n; i++)
        total += c->catalog.entries[i].m ? c->catalog.entries[i].m->n_packs : 0;
    struct use *uses = calloc(total ? total : 1, sizeof(*uses));
    if (!uses)
        return -ENOMEM;
    *n = 0;
    for (size_t i = 0; i < c->catalog.n; i++) {
        struct bn_entry *e = &c->catalog.entries[i];
        for (uint32_t p = 0; e->m && p < e->m->n_packs; p++) {
            char name[BN_PACK_NAME_MAX];
            struct stat st;
            snprintf(name, sizeof(name), BN_PACK_NAME, e->m->packs[p].index);
            if (fstatat(e->fd, name, &st, AT_SYMLINK_NOFOLLOW) < 0 || !S_ISREG(st.st_mode) ||
                (uint64_t)st.st_size != e->m->packs[p].length)
                continue; /* damaged: verify says so */
            uses[(*n)++] = (struct use){st.st_dev, st.st_ino,           st.st_nlink, (uint64_t)st.st_size,
                                        e,         e->m->packs[p].index};
        }
    }
    qsort(uses, *n, sizeof(*uses), compare_uses);
    *out = uses;
    return 0;
}

static int compare_pieces(const void *a, const void *b)
{
    const struct piece *x = a, *y = b;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return x->length < y->length ? -1 : x->length > y->length;
}

/* What the `n` uses of one file need of it, each once, and where it goes in a file without the rest. */
static int list_pieces(const struct use *u, size_t n, struct piece **out, size_t *n_pieces, uint64_t *bytes)
{
    size_t cap = 0, kept = 0;
    for (size_t i = 0; i < n; i++)
        for (uint32_t k = 0; k < u[i].entry->m->n_chunks; k++)
            cap += !(u[i].entry->m->chunks[k].flags & BN_CHUNK_ZERO) &&
                   u[i].entry->m->chunks[k].pack == u[i].pack;
    struct piece *pieces = calloc(cap ? cap : 1, sizeof(*pieces));
    if (!pieces)
        return -ENOMEM;
    size_t at = 0;
    for (size_t i = 0; i < n; i++)
        for (uint32_t k = 0; k < u[i].entry->m->n_chunks; k++) {
            const struct bn_image_chunk *c = &u[i].entry->m->chunks[k];
            if (!(c->flags & BN_CHUNK_ZERO) && c->pack == u[i].pack)
                pieces[at++] = (struct piece){.offset = c->offset, .length = c->length};
        }
    qsort(pieces, cap, sizeof(*pieces), compare_pieces);
    *bytes = 0;
    for (size_t i = 0; i < cap; i++)
        if (kept == 0 || compare_pieces(&pieces[i], &pieces[kept - 1]) != 0) {
            pieces[kept] = pieces[i];
            pieces[kept++].to = *bytes;
            *bytes += (pieces[i].length + BN_PACK_ALIGN - 1) / BN_PACK_ALIGN * BN_PACK_ALIGN;
        }
    *out = pieces;
    *n_pieces = kept;
    return 0;
}

/* ---- rewriting one ---- */

/* Only what is right is carried on: bytes that are read anew get no new life with a wrong hash. */
static int check_chunks(const struct use *u, struct bn_error *err)
{
    struct bn_pack_reader *reader = NULL;
    bn_auto_free void *buffer = aligned_alloc(BN_PACK_ALIGN, BN_CHUNK_SIZE);
    if (!buffer)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    int r = bn_pack_reader_open(u->entry->fd, u->entry->m, &reader, err);
    for (uint32_t k = 0; r == 0 && k < u->entry->m->n_chunks; k++) {
        const struct bn_image_chunk *c = &u->entry->m->chunks[k];
        if (!(c->flags & BN_CHUNK_ZERO) && c->pack == u->pack)
            r = bn_pack_reader_read(reader, k, buffer, err);
    }
    bn_pack_reader_free(reader);
    return r;
}

static int copy_pieces(const struct use *u, const struct piece *pieces, size_t n, uint64_t bytes, int to,
                       struct bn_error *err)
{
    struct bn_image_pack pack = {u->pack, u->length};
    bn_auto_fd from = bn_pack_file_open(u->entry->fd, &pack, err);
    if (from < 0)
        return from;
    int r = 0;
    for (size_t i = 0; r == 0 && i < n; i++)
        r = bn_pack_file_copy(from, pieces[i].offset, to, pieces[i].to, pieces[i].length);
    if (r == 0 && (ftruncate(to, (off_t)bytes) < 0 || fsync(to) < 0))
        r = -errno;
    return r < 0 ? bn_error_set(err, r, "store", "cannot write a pack anew in %s: %s", u->entry->name,
                                strerror(-r))
                 : 0;
}

/* A number that neither the image nor any file in its folder uses. */
static uint32_t free_number(const struct bn_entry *e)
{
    char name[BN_PACK_NAME_MAX];
    uint32_t number = e->m->n_packs ? e->m->packs[e->m->n_packs - 1].index : 0;
    do
        snprintf(name, sizeof(name), BN_PACK_NAME, ++number);
    while (faccessat(e->fd, name, F_OK, AT_SYMLINK_NOFOLLOW) == 0);
    return number;
}

/* Let the manifest name the new pack (`to` >= 0) in the place of the old one. */
static int switch_manifest(const struct use *u, uint32_t to, uint64_t length, const struct piece *pieces,
                           size_t n, struct bn_error *err)
{
    struct bn_manifest *m = u->entry->m;
    struct bn_image_chunk *old_chunks = m->chunks;
    struct bn_image_pack *old_packs = m->packs;
    uint32_t old_n = m->n_packs;
    struct bn_image_chunk *chunks = malloc((m->n_chunks ? m->n_chunks : 1) * sizeof(*chunks));
    struct bn_image_pack *packs = malloc((size_t)(old_n + 1) * sizeof(*packs));
    if (!chunks || !packs) {
        free(chunks);
        free(packs);
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    }
    memcpy(chunks, m->chunks, m->n_chunks * sizeof(*chunks));
    for (uint32_t k = 0; k < m->n_chunks; k++) {
        if (chunks[k].flags & BN_CHUNK_ZERO || chunks[k].pack != u->pack)
            continue;
        struct piece key = {.offset = chunks[k].offset, .length = chunks[k].length};
        const struct piece *p = bsearch(&key, pieces, n, sizeof(*pieces), compare_pieces);
        chunks[k].pack = to;
        chunks[k].offset = p->to;
    }
    uint32_t n_packs = 0;
    for (uint32_t p = 0; p < old_n; p++)
        if (m->packs[p].index != u->pack)
            packs[n_packs++] = m->packs[p];
    if (n > 0)
        packs[n_packs++] = (struct bn_image_pack){to, length};
    m->chunks = chunks;
    m->packs = packs;
    m->n_packs = n_packs;
    int r = bn_image_replace(u->entry->fd, m, err);
    if (r < 0) {
        m->chunks = old_chunks;
        m->packs = old_packs;
        m->n_packs = old_n;
        free(chunks);
        free(packs);
        return r;
    }
    free(old_chunks);
    free(old_packs);
    return 0;
}

/* One image goes over to the new pack: it gets it, then its manifest is replaced. `fd`: the new pack. */
static int move_image(const struct use *u, int fd, uint32_t to, bool there, uint64_t bytes,
                      const struct piece *pieces, size_t n, struct bn_error *err)
{
    int r = there ? 0 : bn_pack_file_link(fd, u->entry->fd, to);
    if (r < 0)
        return bn_error_set(err, r, "store", "cannot link a pack into %s: %s", u->entry->name, strerror(-r));
    if (fsync(u->entry->fd) < 0 && errno != EINVAL)
        return bn_error_set(err, errno, "store", "cannot write %s: %s", u->entry->name, strerror(errno));
    return switch_manifest(u, to, bytes, pieces, n, err);
}

/* *failed: the use whose image is to blame. */
static int rewrite(const struct use *u, size_t n, const struct piece *pieces, size_t n_pieces, uint64_t bytes,
                   size_t *failed, struct bn_error *err)
{
    *failed = 0;
    uint32_t number = free_number(u->entry);
    bn_auto_fd fd = -1;
    int r = 0;
    if (n_pieces > 0) {
        fd = bn_pack_file_create(u->entry->fd, number);
        if (fd < 0)
            return bn_error_set(err, fd, "store", "cannot make a pack in %s: %s", u->entry->name,
                                strerror(-fd));
        r = copy_pieces(u, pieces, n_pieces, bytes, fd, err);
    }
    size_t moved = 0;
    for (; r == 0 && moved < n; moved++)
        r = move_image(&u[moved], fd, moved ? free_number(u[moved].entry) : number,
                       moved == 0 || n_pieces == 0, bytes, pieces, n_pieces, err);
    /* Nobody went over to it. Unless the manifest was replaced and only the sync behind it failed: then it names this pack. */
    if (r < 0 && n_pieces > 0 && moved <= 1 && !bn_manifest_find_pack(u->entry->m, number) &&
        is_unchanged(u->entry))
        bn_pack_file_unlink(u->entry->fd, number);
    moved -= r < 0 && moved > 0;
    *failed = moved;
    for (size_t i = 0; i < moved; i++) /* the old ones, last of all */
        bn_pack_file_unlink(u[i].entry->fd, u[i].pack);
    return r;
}

/* Held, and as they were read, and right. Otherwise what is wrong was said. */
static bool may_rewrite(struct collection *c, const struct use *u, size_t n, int *locks, size_t *held)
{
    for (*held = 0; *held < n; ++*held) {
        locks[*held] = bn_image_lock(u[*held].entry->fd, true, NULL);
        if (locks[*held] < 0) {
            skip(c, u[*held].entry->name, "shares a pack of which little is used, but is in use");
            return false;
        }
    }
    for (size_t i = 0; i < n; i++) {
        struct bn_error why = BN_ERROR_INIT;
        if ((is_unchanged(u[i].entry) ? check_chunks(&u[i], &why)
                                      : bn_error_set(&why, EAGAIN, "store", "it changed meanwhile")) < 0) {
            skip(c, u[i].entry->name, why.text);
            return false;
        }
    }
    return true;
}

/* `n` uses of one file. */
static int consider(struct collection *c, const struct use *u, size_t n, struct bn_error *err)
{
    bn_auto_free struct piece *pieces = NULL;
    size_t n_pieces;
    uint64_t bytes;
    if (list_pieces(u, n, &pieces, &n_pieces, &bytes) < 0)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    if (bytes >= u->length / 2)
        return 0;
    if (u->links != n) {
        skip(c, u->entry->name, "shares a pack of which little is used with one elsewhere, or damaged");
        return 0;
    }
    for (size_t i = 0; i < n; i++)
        if (c->given_up[number_of(c, u[i].entry)])
            return 0;
    bn_auto_free int *locks = malloc(n * sizeof(*locks));
    if (!locks)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    size_t held, failed;
    struct bn_error why = BN_ERROR_INIT;
    if (may_rewrite(c, u, n, locks, &held)) {
        if (rewrite(u, n, pieces, n_pieces, bytes, &failed, &why) < 0) {
            give_up(c, u[failed].entry, &why);
        } else {
            c->out.rewritten++;
            c->out.bytes += u->length - bytes;
        }
    }
    for (size_t i = 0; i < held; i++)
        bn_close(locks[i]);
    return 0;
}

static int compact(struct collection *c, struct bn_error *err)
{
    bn_auto_free struct use *uses = NULL;
    size_t n, next;
    c->given_up = calloc(c->catalog.n ? c->catalog.n : 1, sizeof(*c->given_up));
    if (!c->given_up || list_uses(c, &uses, &n) < 0)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    int r = 0;
    for (size_t i = 0; r == 0 && i < n; i = next) {
        for (next = i + 1; next < n && compare_uses(&uses[i], &uses[next]) == 0; next++)
            ;
        r = consider(c, &uses[i], next - i, err);
    }
    if (r < 0 || c->failures == 0)
        return r;
    char more[40] = "";
    if (c->failures > 1)
        snprintf(more, sizeof(more), " (and %u more checkpoints)", c->failures - 1);
    return bn_error_set(err, c->failure.code, c->failure.stage, "%s%s", c->failure.text, more);
}

int bn_collect(int dirfd, bn_collect_fn skipped, void *arg, struct bn_collected *out, struct bn_error *err)
{
    struct collection c = {.dirfd = dirfd, .skipped = skipped, .arg = arg};
    bn_auto_fd lock = bn_image_lock(dirfd, true, NULL);
    if (lock == -EBUSY)
        return bn_error_set(err, EBUSY, "store", "another collection is under way in this store");
    int r = bn_catalog_read(dirfd, &c.catalog, err);
    if (r < 0)
        return r;
    for (size_t i = 0; i < c.catalog.n; i++) {
        struct bn_entry *e = &c.catalog.entries[i];
        if (e->state == BN_ENTRY_INCOMPLETE)
            remove_incomplete(&c, e);
        else if (e->state == BN_ENTRY_COMPLETE)
            remove_leftovers(&c, e);
    }
    r = compact(&c, err);
    free(c.given_up);
    bn_catalog_free(&c.catalog);
    *out = c.out;
    return r;
}
