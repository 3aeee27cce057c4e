/* bennu export: a checkpoint as one file, for another machine or for the shelf. */
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
#include <libgen.h>
#include <string.h>
#include <sys/stat.h>

static bool json, compress;

static const struct cli_option options[] = {
    {"zstd", 'z', CLI_FLAG, NULL, &compress, "compress, as is done when FILE ends in .tar.zst or .tzst"},
    {"json", 'j', CLI_FLAG, NULL, &json, "print the result as one JSON object"},
    {0},
};

struct export
{
    const char *path, *file;
    int dir, lock;
    struct bn_manifest *m;
    char **names; /* but for the manifest */
    size_t n;
    struct archive *a;
    struct archive_entry *entry;
    struct cli_archive_list *list;
    struct cli_archive_io io;
    uint8_t *buf; /* BN_CHUNK_SIZE */
    struct cli_progress *progress;
    struct bn_progress now;
    uint64_t written;
    char folder[PATH_MAX], temporary[PATH_MAX]; /* of FILE; empty: standard output */
};

static int out_of_memory(struct bn_error *err)
{
    return bn_error_set(err, ENOMEM, "export", "out of memory");
}

/* ---- what is in it ---- */

/* 1: this file goes with the checkpoint; 0: it does not. */
static int judge(struct export *x, const char *name, struct bn_error *err)
{
    struct stat st;
    uint32_t index;
    /* Hidden files are half-written ones; a pack that the manifest does not name is what a crash left. */
    if (name[0] == '.' || strcmp(name, BN_MANIFEST_NAME) == 0 || strcmp(name, CLI_ARCHIVE_LIST) == 0 ||
        (bn_is_pack_name(name, &index) && !bn_manifest_find_pack(x->m, index)))
        return 0;
    if (fstatat(x->dir, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return bn_error_set(err, errno, "export", "cannot look at %s/%s: %s", x->path, name, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return bn_error_set(
            err, EINVAL, "export",
            "%s/%s is a %s, and an archive takes regular files alone: move it away if it is not the "
            "checkpoint's",
            x->path, name,
            S_ISDIR(st.st_mode)   ? "directory"
            : S_ISLNK(st.st_mode) ? "symbolic link"
                                  : "special file");
    if (!cli_archive_name_ok(name))
        return bn_error_set(
            err, EINVAL, "export",
            "%s/%s has a name that an archive does not take (letters, digits, '.', '-' and '_'): move "
            "it away if it is not the checkpoint's",
            x->path, name);
    x->now.total += (uint64_t)st.st_size;
    return 1;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static int find_files(struct export *x, struct bn_error *err)
{
    int copy = openat(x->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = copy >= 0 ? fdopendir(copy) : NULL;
    if (!dir)
        return bn_error_set(err, errno, "export", "cannot read %s: %s", x->path, strerror(errno));
    for (struct dirent *e; (e = readdir(dir));) {
        int r = judge(x, e->d_name, err);
        if (r < 0)
            return r;
        if (r == 0)
            continue;
        if (x->n + 3 > CLI_ARCHIVE_FILES_MAX) /* manifest and list come to it */
            return bn_error_set(err, E2BIG, "export", "%s has more than %u files", x->path,
                                CLI_ARCHIVE_FILES_MAX);
        char **more = realloc(x->names, (x->n + 1) * sizeof(*more)), *name = strdup(e->d_name);
        if (more)
            x->names = more;
        if (!more || !name) {
            free(name);
            return out_of_memory(err);
        }
        x->names[x->n++] = name;
    }
    if (x->n)
        qsort(x->names, x->n, sizeof(*x->names), by_name);
    return 0;
}

/* Is it a whole checkpoint, which nobody removes or rewrites meanwhile? */
static int open_checkpoint(struct export *x, struct bn_error *err)
{
    struct bn_error why = BN_ERROR_INIT;
    x->dir = open(x->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (x->dir < 0)
        return bn_error_set(err, errno == ENOTDIR ? EBADMSG : errno, "directory",
                            "cannot open the checkpoint %s: %m", x->path);
    x->lock = bn_image_lock(x->dir, false, &why);
    if (x->lock == -EBUSY) /* without locks it goes as well */
        return bn_error_set(err, EBUSY, "export", "%s: %s", x->path, why.text);
    why = BN_ERROR_INIT;
    int r = bn_image_load(x->dir, &x->m, &why);
    if (r == 0 && bn_image_has_criu(x->dir) != 1)
        r = bn_error_set(&why, EBADMSG, "image", "the checkpoint is damaged: CRIU's %s is missing",
                         CLI_INVENTORY);
    struct bn_pack_reader *reader = NULL;
    if (r == 0)
        r = bn_pack_reader_open(x->dir, x->m, &reader, &why);
    bn_pack_reader_free(reader);
    if (r < 0)
        return bn_error_set(err, r == -ENOENT ? EBADMSG : r, "image", "%s: %s", x->path, why.text);
    return find_files(x, err);
}

/* ---- writing it ---- */

static ssize_t to_io(struct archive *a, void *arg, const void *data, size_t len)
{
    struct export *x = arg;
    ssize_t n = cli_archive_write(&x->io, data, len);
    if (n < 0)
        archive_set_error(a, x->io.error, "%s", strerror(x->io.error));
    else
        x->written += len;
    return n;
}

static int failed(const struct export *x, struct bn_error *err)
{
    int e = x->io.error;
    if (e == EINTR)
        return bn_error_set(err, EINTR, "export", "broken off: %s was not written", x->io.name);
    if (e)
        return bn_error_set(err, e, "export", "cannot write %s: %s%s", x->io.name, strerror(e),
                            e == ENOSPC || e == EDQUOT ? ": make room or choose a file on another file system"
                                                       : "");
    const char *why = archive_error_string(x->a);
    return bn_error_set(err, EIO, "export", "cannot write %s: libarchive: %s", x->io.name, why ? why : "?");
}

static int begin_file(struct export *x, const char *name, uint64_t size, time_t mtime, struct bn_error *err)
{
    archive_entry_clear(x->entry);
    archive_entry_set_pathname(x->entry, name);
    archive_entry_set_size(x->entry, (la_int64_t)size);
    archive_entry_set_filetype(x->entry, AE_IFREG);
    archive_entry_set_perm(x->entry, 0600);
    archive_entry_set_mtime(x->entry, mtime, 0);
    return archive_write_header(x->a, x->entry) == ARCHIVE_OK ? 0 : failed(x, err);
}

static int put(struct export *x, const void *data, size_t len, struct bn_error *err)
{
    return len == 0 || archive_write_data(x->a, data, len) == (la_ssize_t)len ? 0 : failed(x, err);
}

static int write_file(struct export *x, const char *name, struct bn_error *err)
{
    struct stat st;
    bn_auto_fd fd = openat(x->dir, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) < 0)
        return bn_error_set(err, errno, "export", "cannot read %s/%s: %s", x->path, name, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return bn_error_set(err, EINVAL, "export", "%s/%s is no regular file any more", x->path, name);
    uint64_t size = (uint64_t)st.st_size;
    int r = begin_file(x, name, size, st.st_mtime, err);
    for (uint64_t at = 0; r == 0 && at < size; at += BN_CHUNK_SIZE) {
        size_t n = size - at < BN_CHUNK_SIZE ? (size_t)(size - at) : (size_t)BN_CHUNK_SIZE;
        r = bn_pread_full(fd, x->buf, n, at);
        if (r < 0)
            return bn_error_set(err, r, "export", "cannot read %s/%s: %s", x->path, name,
                                r == -ENODATA ? "it became shorter" : strerror(-r));
        if (cli_archive_list_add(x->list, x->buf, n) < 0)
            return out_of_memory(err);
        r = put(x, x->buf, n, err);
        x->now.done += n;
        cli_progress_update(x->progress, &x->now);
    }
    return r == 0 && cli_archive_list_end(x->list, name) < 0 ? out_of_memory(err) : r;
}

static int write_list(struct export *x, struct bn_error *err)
{
    size_t len;
    const char *text = cli_archive_list_text(x->list, &len);
    int r = begin_file(x, CLI_ARCHIVE_LIST, len, (time_t)(x->m->created_ns / 1000000000u), err);
    return r == 0 ? put(x, text, len, err) : r;
}

static int write_all(struct export *x, struct bn_error *err)
{
    x->buf = malloc(BN_CHUNK_SIZE);
    x->entry = archive_entry_new();
    x->a = archive_write_new();
    x->list = cli_archive_list_new(x->m->key);
    if (!x->buf || !x->entry || !x->a || !x->list)
        return out_of_memory(err);
    if (archive_write_set_format_pax_restricted(x->a) != ARCHIVE_OK ||
        (compress && (archive_write_add_filter_zstd(x->a) != ARCHIVE_OK ||
                      archive_write_set_filter_option(x->a, "zstd", "compression-level", "1") != ARCHIVE_OK)))
        return bn_error_set(err, ENOTSUP, "export", "libarchive here cannot write tar%s: install another",
                            compress ? " and zstd: leave --zstd out, or" : "");
    archive_write_set_bytes_in_last_block(x->a, 1);
    if (archive_write_open(x->a, x, NULL, to_io, NULL) != ARCHIVE_OK)
        return failed(x, err);
    int r = write_file(x, BN_MANIFEST_NAME, err);
    for (size_t i = 0; r == 0 && i < x->n; i++)
        r = write_file(x, x->names[i], err);
    if (r == 0)
        r = write_list(x, err);
    if (r == 0 && archive_write_close(x->a) != ARCHIVE_OK)
        r = failed(x, err);
    return r;
}

/* ---- where to ---- */

static bool ends_in(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);
    return n >= m && strcmp(s + n - m, end) == 0;
}

/* A file beside it, of which nobody thinks that it is an archive. */
static int make_temporary(struct export *x, struct bn_error *err)
{
    char copy[PATH_MAX], copy2[PATH_MAX];
    struct stat st, of;
    if (strlen(x->file) >= PATH_MAX - 32)
        return bn_error_set(err, ENAMETOOLONG, "export", "the name of the archive is too long");
    if (stat(x->file, &st) == 0 && !S_ISREG(st.st_mode))
        return bn_error_set(err, EEXIST, "export",
                            "%s is there and no regular file: name a new one, or - for standard output",
                            x->file);
    strcpy(copy, x->file);
    strcpy(copy2, x->file);
    snprintf(x->folder, sizeof(x->folder), "%s", dirname(copy));
    if (fstat(x->dir, &of) == 0 && stat(x->folder, &st) == 0 && st.st_dev == of.st_dev &&
        st.st_ino == of.st_ino)
        return bn_error_set(err, EINVAL, "export", "%s lies in the checkpoint itself: name a file elsewhere",
                            x->file);
    snprintf(x->temporary, sizeof(x->temporary), "%.*s/.%.200s.XXXXXX", PATH_MAX - 256, x->folder,
             basename(copy2));
    x->io.fd = mkostemp(x->temporary, O_CLOEXEC);
    if (x->io.fd >= 0)
        return 0;
    x->temporary[0] = 0;
    return bn_error_set(err, errno, "export", "cannot make a file in %s: %m", x->folder);
}

/* On the disk first, then under its name. */
static int put_in_place(struct export *x, struct bn_error *err)
{
    if (fsync(x->io.fd) < 0) {
        x->io.error = errno;
        return failed(x, err);
    }
    if (cli_archive_interrupted(&x->io)) {
        x->io.error = EINTR;
        return failed(x, err);
    }
    if (rename(x->temporary, x->file) < 0)
        return bn_error_set(err, errno, "export", "cannot write %s: %m", x->file);
    x->temporary[0] = 0;
    bn_auto_fd folder = open(x->folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder >= 0 && fsync(folder) < 0 && errno != EINVAL)
        return bn_error_set(err, errno, "export", "%s was written, but may be gone after a crash: %m",
                            x->file);
    return 0;
}

static int to_file(struct export *x, struct bn_error *err)
{
    bn_auto_fd signals = cli_signals_fd();
    x->io.signals = signals;
    if (signals < 0)
        return bn_error_set(err, signals, "export", "cannot watch for signals: %s", strerror(-signals));
    int r = make_temporary(x, err);
    if (r == 0)
        r = write_all(x, err);
    if (r == 0)
        r = put_in_place(x, err);
    if (x->temporary[0]) {
        unlink(x->temporary);
    }
    x->io.fd = bn_close(x->io.fd);
    x->io.signals = -1;
    return r;
}

static void print_result(const struct export *x)
{
    char a[16], b[16];
    if (json) {
        json_t *o = cli_json_ok(), *name = json_string(x->file);
        json_object_set_new(o, "file", name ? name : json_null()); /* null: not UTF-8 */
        json_object_set_new(o, "bytes", json_integer((json_int_t)x->written));
        json_object_set_new(o, "checkpoint_bytes", json_integer((json_int_t)x->now.done));
        cli_print_json(o);
    } else {
        printf("%s: %s, of a checkpoint of %s\n", x->file, cli_bytes(x->written, a),
               cli_bytes(x->now.done, b));
    }
}

static void release(struct export *x)
{
    for (size_t i = 0; i < x->n; i++)
        free(x->names[i]);
    free(x->names);
    free(x->buf);
    archive_write_free(x->a);
    archive_entry_free(x->entry);
    cli_archive_list_free(x->list);
    bn_manifest_free(x->m);
    bn_close(x->lock);
    bn_close(x->dir);
}

static int export(int argc, char **argv)
{
    (void)argc;
    struct bn_error err = BN_ERROR_INIT;
    struct export x = {.path = argv[0], .file = argv[1], .dir = -1, .lock = -1, .now = {.phase = "export"}};
    bool standard = strcmp(x.file, "-") == 0;
    x.io = (struct cli_archive_io){
        .name = standard ? "standard output" : x.file, .fd = standard ? STDOUT_FILENO : -1, .signals = -1};
    if (standard && json)
        return cli_usage("--json and - both want standard output");
    if (standard && isatty(STDOUT_FILENO))
        return cli_usage("standard output is a terminal: name a file, or a pipe behind it");
    compress = compress || ends_in(x.file, ".tar.zst") || ends_in(x.file, ".tzst");
    int r = open_checkpoint(&x, &err);
    if (r == 0) {
        x.progress = cli_progress_new("export");
        r = standard ? write_all(&x, &err) : to_file(&x, &err);
        cli_progress_free(x.progress);
    }
    if (r == 0 && !standard)
        print_result(&x);
    release(&x);
    if (r == 0)
        return CLI_OK;
    bool image = r == -EBADMSG || r == -EPROTONOSUPPORT;
    return cli_fail(x.io.signal ? 128 + x.io.signal : image ? CLI_BAD_IMAGE : CLI_FAILED, &err, json);
}

const struct cli_command cli_export = {
    .name = "export",
    .operands = "DIR FILE",
    .summary = "Write a checkpoint to one file",
    .options = options,
    .min = 2,
    .max = 2,
    .needed = "two operands are needed: DIR and FILE",
    .run = export,
};
