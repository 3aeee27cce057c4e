/* From an archive to a checkpoint. Whoever made the archive may be anybody. */
#include "cli/archiving.h"
#include "cli/cli.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "store/image_dir.h"
#include "store/pack.h"
#include "store/pack_file.h"

#include <archive.h>
#include <archive_entry.h>
#include <fcntl.h>
#include <string.h>

#define INVENTORY_MAX (1u << 20)
#define LIST_MAX ((size_t)CLI_ARCHIVE_FILES_MAX * 256)
#define READ_SIZE (1u << 18)

struct blob {
    void *data;
    size_t len;
};

struct unpack {
    struct cli_archive_io *io;
    int dir;
    struct archive *a;
    uint8_t *from; /* READ_SIZE, for libarchive */
    uint8_t *buf;  /* BN_CHUNK_SIZE */
    struct bn_manifest *m;
    struct cli_archive_list *list;
    /* What makes a checkpoint of a folder is kept here until the rest is there. */
    struct blob manifest, inventory;
    uint32_t files;
    struct cli_progress *progress;
    struct bn_progress now;
};

static ssize_t from_io(struct archive *a, void *arg, const void **data)
{
    struct unpack *u = arg;
    *data = u->from;
    ssize_t n = cli_archive_read(u->io, u->from, READ_SIZE);
    if (n < 0)
        archive_set_error(a, u->io->error, "%s", strerror(u->io->error));
    return n;
}

static int out_of_memory(struct bn_error *err)
{
    return bn_error_set(err, ENOMEM, "import", "out of memory");
}

/* libarchive has failed: because of us, the file, or what is in it? */
static int failed(const struct unpack *u, struct bn_error *err)
{
    if (u->io->error == EINTR)
        return bn_error_set(err, EINTR, "import", "broken off: nothing of %s was imported", u->io->name);
    if (u->io->error)
        return bn_error_set(err, u->io->error, "import", "cannot read %s: %s", u->io->name,
                            strerror(u->io->error));
    const char *why = archive_error_string(u->a);
    return bn_error_set(
        err, EBADMSG, "archive",
        "%s is damaged or no archive that \"bennu export\" made: copy or export it again (%s)", u->io->name,
        why ? why : "no reason given");
}

static int cut_off(const struct unpack *u, struct bn_error *err)
{
    return bn_error_set(err, EBADMSG, "archive", "the archive %s is cut off: copy or export it again",
                        u->io->name);
}

/* Up to BN_CHUNK_SIZE bytes of the file under way; fewer at its end alone. */
static ssize_t read_piece(struct unpack *u, struct bn_error *err)
{
    size_t n = 0;
    while (n < BN_CHUNK_SIZE) {
        ssize_t got = archive_read_data(u->a, u->buf + n, BN_CHUNK_SIZE - n);
        if (got < 0)
            return failed(u, err);
        if (got == 0)
            break;
        n += (size_t)got;
    }
    return (ssize_t)n;
}

/* A regular file of a plain name and a known size: everything else is refused, whatever it would do. */
static int check_entry(const struct unpack *u, struct archive_entry *e, struct bn_error *err)
{
    const char *name = archive_entry_pathname(e);
    char shown[64];
    snprintf(shown, sizeof(shown), "%s", name ? name : "(none)");
    if (!name || !cli_archive_name_ok(name))
        return bn_error_set(err, EBADMSG, "archive",
                            "%s holds a file of the name '%s', which no checkpoint has: do not trust it",
                            u->io->name, shown);
    if (archive_entry_filetype(e) != AE_IFREG || archive_entry_hardlink(e) || archive_entry_symlink(e) ||
        archive_entry_sparse_count(e) > 0 || !archive_entry_size_is_set(e) || archive_entry_size(e) < 0)
        return bn_error_set(err, EBADMSG, "archive",
                            "%s holds %s, which is no regular file, as everything in a checkpoint is: do not "
                            "trust it",
                            u->io->name, shown);
    return 0;
}

static int twice(const struct unpack *u, const char *name, struct bn_error *err)
{
    return bn_error_set(err, EBADMSG, "archive", "%s holds %s twice: do not trust it", u->io->name, name);
}

/* A file into memory. */
static int read_blob(struct unpack *u, struct archive_entry *e, size_t max, struct blob *out,
                     struct bn_error *err)
{
    const char *name = archive_entry_pathname(e);
    size_t size = (size_t)archive_entry_size(e);
    if (out->data)
        return twice(u, name, err);
    if (size > max)
        return bn_error_set(err, EBADMSG, "archive", "%s holds %s of %zu bytes, which is longer than any",
                            u->io->name, name, size);
    out->data = malloc(size + 1);
    if (!out->data)
        return out_of_memory(err);
    for (;;) {
        ssize_t n = read_piece(u, err);
        if (n < 0)
            return (int)n;
        if ((size_t)n > size - out->len)
            return failed(u, err);
        memcpy((char *)out->data + out->len, u->buf, (size_t)n);
        out->len += (size_t)n;
        if ((size_t)n < BN_CHUNK_SIZE)
            break;
    }
    return out->len == size ? 0 : cut_off(u, err);
}

static int list_blob(struct unpack *u, const char *name, const struct blob *b, struct bn_error *err)
{
    for (size_t at = 0; at < b->len; at += BN_CHUNK_SIZE) {
        size_t n = b->len - at < BN_CHUNK_SIZE ? b->len - at : BN_CHUNK_SIZE;
        if (cli_archive_list_add(u->list, (const char *)b->data + at, n) < 0)
            return out_of_memory(err);
    }
    return cli_archive_list_end(u->list, name) < 0 ? out_of_memory(err) : 0;
}

/* The first file: it says what else there may be. */
static int take_manifest(struct unpack *u, struct archive_entry *e, struct bn_error *err)
{
    if (strcmp(archive_entry_pathname(e), BN_MANIFEST_NAME) != 0)
        return bn_error_set(
            err, EBADMSG, "archive",
            "%s is no archive that \"bennu export\" made (%s does not come first): if it is of a "
            "checkpoint, unpack it with tar",
            u->io->name, BN_MANIFEST_NAME);
    int r = read_blob(u, e, BN_MANIFEST_BYTES_MAX, &u->manifest, err);
    if (r < 0)
        return r;
    struct bn_error why = BN_ERROR_INIT;
    r = bn_manifest_decode(u->manifest.data, u->manifest.len, &u->m, &why);
    if (r < 0)
        return bn_error_set(err, r, "archive", "%s: %s: %s", u->io->name, BN_MANIFEST_NAME, why.text);
    u->list = cli_archive_list_new(u->m->key);
    if (!u->list)
        return out_of_memory(err);
    for (uint32_t i = 0; i < u->m->n_packs; i++)
        if (__builtin_add_overflow(u->now.total, u->m->packs[i].length, &u->now.total))
            return bn_error_set(err, EBADMSG, "archive", "%s: its packs are longer than any", u->io->name);
    r = bn_store_check_space(u->dir, u->now.total, err);
    return r < 0 ? r : list_blob(u, BN_MANIFEST_NAME, &u->manifest, err);
}

static int check_size(struct unpack *u, const char *name, uint64_t size, struct bn_error *err)
{
    uint32_t index;
    if (!bn_is_pack_name(name, &index))
        return bn_store_check_space(u->dir, size, err);
    const struct bn_image_pack *p = bn_manifest_find_pack(u->m, index);
    if (p && p->length == size)
        return 0;
    return bn_error_set(err, EBADMSG, "archive", "%s holds %s of %llu bytes, which %s: do not trust it",
                        u->io->name, name, (unsigned long long)size,
                        p ? "has another length by its manifest" : "its manifest does not know");
}

static int cannot_write(const char *name, int r, struct bn_error *err)
{
    return bn_error_set(err, r, "import", "cannot write %s: %s%s", name, strerror(-r),
                        r == -ENOSPC || r == -EDQUOT ? ": make room or choose a folder on another file system"
                                                     : "");
}

static int take_file(struct unpack *u, struct archive_entry *e, struct bn_error *err)
{
    const char *name = archive_entry_pathname(e);
    uint64_t size = (uint64_t)archive_entry_size(e), left = size;
    int r = check_size(u, name, size, err);
    if (r < 0)
        return r;
    bn_auto_fd fd = openat(u->dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return errno == EEXIST ? twice(u, name, err) : cannot_write(name, -errno, err);
    for (ssize_t n = BN_CHUNK_SIZE; n == BN_CHUNK_SIZE;) {
        n = read_piece(u, err);
        if (n < 0)
            return (int)n;
        if ((uint64_t)n > left)
            return failed(u, err);
        left -= (uint64_t)n;
        r = bn_write_full(fd, u->buf, (size_t)n);
        if (r < 0)
            return cannot_write(name, r, err);
        if (n > 0 && cli_archive_list_add(u->list, u->buf, (size_t)n) < 0)
            return out_of_memory(err);
        u->now.done += (uint64_t)n;
        cli_progress_update(u->progress, &u->now);
    }
    if (left > 0)
        return cut_off(u, err);
    return cli_archive_list_end(u->list, name) < 0 ? out_of_memory(err) : 0;
}

/* The last file: does it say the same as what has arrived? */
static int compare_list(struct unpack *u, struct archive_entry *e, struct bn_error *err)
{
    struct blob b = {0};
    int r = read_blob(u, e, LIST_MAX, &b, err);
    bn_auto_free char *text = b.data;
    if (r < 0)
        return r;
    char name[CLI_ARCHIVE_NAME_MAX + 1];
    size_t len;
    cli_archive_list_text(u->list, &len);
    if (cli_archive_list_differs(u->list, text, b.len, name))
        return bn_error_set(err, EBADMSG, "archive",
                            "%s is damaged: %s is not as it was exported: copy or export it again",
                            u->io->name, *name ? name : CLI_ARCHIVE_LIST);
    if (len != b.len)
        return bn_error_set(err, EBADMSG, "archive",
                            "%s is damaged: files are missing that its list names: copy or export it again",
                            u->io->name);
    struct archive_entry *more;
    r = archive_read_next_header(u->a, &more);
    if (r == ARCHIVE_EOF)
        return 0;
    return u->io->error ? failed(u, err)
                        : bn_error_set(err, EBADMSG, "archive",
                                       "%s goes on after its list of files: do not trust it", u->io->name);
}

/* 1: that was the last file. */
static int take_entry(struct unpack *u, struct archive_entry *e, struct bn_error *err)
{
    int r = check_entry(u, e, err);
    if (r < 0)
        return r;
    if (++u->files > CLI_ARCHIVE_FILES_MAX)
        return bn_error_set(err, EBADMSG, "archive", "%s holds more files than any checkpoint", u->io->name);
    if (!u->m)
        return take_manifest(u, e, err);
    const char *name = archive_entry_pathname(e);
    if (strcmp(name, CLI_ARCHIVE_LIST) == 0) {
        r = compare_list(u, e, err);
        return r < 0 ? r : 1;
    }
    if (strcmp(name, BN_MANIFEST_NAME) == 0)
        return twice(u, name, err);
    if (strcmp(name, CLI_INVENTORY) != 0)
        return take_file(u, e, err);
    r = read_blob(u, e, INVENTORY_MAX, &u->inventory, err);
    return r < 0 ? r : list_blob(u, name, &u->inventory, err);
}

static int take_all(struct unpack *u, struct bn_error *err)
{
    int r = 0;
    while (r == 0) {
        struct archive_entry *e;
        r = archive_read_next_header(u->a, &e);
        if (r == ARCHIVE_EOF)
            return u->m ? cut_off(u, err) : failed(u, err);
        r = r == ARCHIVE_OK ? take_entry(u, e, err) : failed(u, err);
    }
    return r < 0 ? r : 0;
}

static int verify_chunks(struct unpack *u, struct bn_pack_reader *reader, struct bn_error *err)
{
    int r = 0;
    u->now = (struct bn_progress){.phase = "verify", .total = (uint64_t)u->m->n_chunks * BN_CHUNK_SIZE};
    for (uint32_t i = 0; r == 0 && i < u->m->n_chunks; i++) {
        struct bn_error why = BN_ERROR_INIT;
        if (cli_archive_interrupted(u->io)) {
            u->io->error = EINTR;
            return failed(u, err);
        }
        if (!(u->m->chunks[i].flags & BN_CHUNK_ZERO))
            r = bn_pack_reader_read(reader, i, u->buf, &why);
        if (r == -EBADMSG)
            bn_error_set(
                err, r, "verify",
                "%s: %s; it was exported like that: export another, or see with --no-verify what is left",
                u->io->name, why.text);
        else if (r < 0)
            bn_error_set(err, r, why.stage, "%s", why.text);
        u->now.done += BN_CHUNK_SIZE;
        cli_progress_update(u->progress, &u->now);
    }
    return r;
}

static int check_whole(struct unpack *u, bool verify, struct bn_error *err)
{
    struct bn_pack_reader *reader = NULL;
    struct bn_error why = BN_ERROR_INIT;
    if (u->inventory.len == 0)
        return bn_error_set(err, EBADMSG, "archive", "%s holds no %s, which CRIU writes: do not trust it",
                            u->io->name, CLI_INVENTORY);
    int r = bn_pack_reader_open(u->dir, u->m, &reader, &why);
    if (r < 0)
        return bn_error_set(err, r == -ENOENT ? EBADMSG : r, "archive", "%s: %s", u->io->name, why.text);
    if (verify)
        r = verify_chunks(u, reader, err);
    bn_pack_reader_free(reader);
    return r;
}

/* What is refused need not have been on the disk, so this waits for the end. */
static int sync_files(const struct unpack *u, struct bn_error *err)
{
    int copy = openat(u->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = copy >= 0 ? fdopendir(copy) : NULL;
    if (!dir)
        return bn_error_set(err, errno, "import", "cannot read the new folder: %s", strerror(errno));
    for (struct dirent *e; (e = readdir(dir));) {
        if (e->d_name[0] == '.')
            continue;
        bn_auto_fd fd = openat(u->dir, e->d_name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
        if (fd < 0 || fsync(fd) < 0)
            return cannot_write(e->d_name, -errno, err);
    }
    return 0;
}

/* From here on it is a checkpoint. */
static int complete(struct unpack *u, struct bn_error *err)
{
    int r = bn_write_file_atomic_at(u->dir, CLI_INVENTORY, u->inventory.data, u->inventory.len);
    if (r < 0)
        return cannot_write(CLI_INVENTORY, r, err);
    r = bn_write_file_atomic_at(u->dir, BN_MANIFEST_NAME, u->manifest.data, u->manifest.len);
    return r < 0 ? cannot_write(BN_MANIFEST_NAME, r, err) : 0;
}

static int open_archive(struct unpack *u, struct bn_error *err)
{
    u->buf = aligned_alloc(BN_PACK_ALIGN, BN_CHUNK_SIZE);
    u->from = malloc(READ_SIZE);
    u->a = archive_read_new();
    if (!u->buf || !u->from || !u->a)
        return out_of_memory(err);
    /* Nothing but what we write: each further format is code that meets hostile bytes. */
    if (archive_read_support_format_tar(u->a) != ARCHIVE_OK ||
        archive_read_support_filter_zstd(u->a) != ARCHIVE_OK)
        return bn_error_set(err, ENOTSUP, "import",
                            "libarchive here cannot read tar and zstd: install another");
    return archive_read_open(u->a, u, NULL, from_io, NULL) == ARCHIVE_OK ? 0 : failed(u, err);
}

int cli_unpack(struct cli_archive_io *io, int dirfd, bool verify, struct cli_progress *progress,
               struct bn_manifest **out, struct bn_error *err)
{
    struct unpack u = {.io = io, .dir = dirfd, .progress = progress, .now = {.phase = "import"}};
    int r = open_archive(&u, err);
    if (r == 0)
        r = take_all(&u, err);
    if (r == 0)
        r = check_whole(&u, verify, err);
    if (r == 0)
        r = sync_files(&u, err);
    if (r == 0)
        r = complete(&u, err);
    archive_read_free(u.a);
    cli_archive_list_free(u.list);
    free(u.manifest.data);
    free(u.inventory.data);
    free(u.from);
    free(u.buf);
    if (r == 0)
        *out = BN_TAKE_PTR(u.m);
    bn_manifest_free(u.m);
    return r;
}
