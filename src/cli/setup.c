/* The files of a machine that `bennu install` writes, and the record of them. */
#include "cli/setup.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "config.h"

#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/stat.h>

/* FNV-1a: tells versions apart, guards against nobody. */
static uint64_t hash_of(const void *data, size_t len)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (const uint8_t *p = data, *end = p + len; p < end; p++)
        h = (h ^ *p) * 0x100000001b3u;
    return h;
}

void setup_agent_id(const void *data, size_t len, char out[64])
{
    snprintf(out, 64, "%s-%016llx", BENNU_VERSION, (unsigned long long)hash_of(data, len));
}

char *setup_path(const struct setup *s, const char *path, char *out)
{
    snprintf(out, PATH_MAX, "%s%s", s->root, path);
    return out;
}

int setup_read(const struct setup *s, const char *path, void **out, size_t *len)
{
    char full[PATH_MAX];
    return bn_read_file_at(AT_FDCWD, setup_path(s, path, full), SETUP_FILE_MAX, out, len);
}

bool setup_exists(const struct setup *s, const char *path)
{
    char full[PATH_MAX];
    struct stat st;
    return lstat(setup_path(s, path, full), &st) == 0;
}

/* --- saying what was done ------------------------------------------------------------------------------------------- */

void setup_say(struct setup *s, const char *action, const char *path, const char *fmt, ...)
{
    char note[400];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(note, sizeof(note), fmt, ap);
    va_end(ap);
    cli_clean(note);
    json_array_append_new(s->items,
                          json_pack("{s:s, s:s, s:s}", "action", action, "path", path, "note", note));
    if (s->json)
        return;
    printf("%-10s %s%s%s%s\n", action, path, *note ? " (" : "", note, *note ? ")" : "");
    fflush(stdout);
}

void setup_fail(struct setup *s, const char *path, int error)
{
    s->failed = true;
    setup_say(s, "failed", path, "%s", strerror(error < 0 ? -error : error));
}

/* --- record ----------------------------------------------------------------------------------------------------------- */

static json_t *take(json_t *record, const char *key, bool object)
{
    json_t *value = json_object_get(record, key);
    if (object ? json_is_object(value) : json_is_array(value))
        return json_incref(value);
    return object ? json_object() : json_array();
}

int setup_open(struct setup *s, const char *root, struct bn_error *err)
{
    static char absolute[PATH_MAX];
    signal(SIGPIPE, SIG_IGN); /* a reader of the output who leaves must not leave half of it done */
    bn_auto_free void *text = NULL;
    size_t len = 0;
    s->root = "";
    if (root && !realpath(root, absolute))
        return bn_error_set(err, errno, "install", "cannot use %s as root folder: %m", root);
    if (root && strcmp(absolute, "/") != 0)
        s->root = absolute;
    else if (!s->dry_run && cli_need_root(err) < 0)
        return -EPERM;
    int r = setup_read(s, SETUP_RECORD, &text, &len);
    if (r < 0 && r != -ENOENT && r != -ENOTDIR && r != -EACCES)
        return bn_error_set(err, r, "install", "cannot read %s: %s", SETUP_RECORD, strerror(-r));
    json_t *record = r == 0 ? json_loadb(text, len, 0, NULL) : NULL;
    s->files = take(record, "files", true);
    s->programs = take(record, "programs", false);
    s->dirs = take(record, "dirs", false);
    s->chosen = json_is_true(json_object_get(record, "chosen"));
    s->items = json_array();
    json_decref(record);
    return 0;
}

static int write_file(const char *full, const void *data, size_t len, mode_t mode)
{
    char tmp[PATH_MAX];
    if (snprintf(tmp, sizeof(tmp), "%s.bennu-new", full) >= (int)sizeof(tmp))
        return -ENAMETOOLONG;
    bn_auto_fd fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return -errno;
    int r = bn_write_full(fd, data, len);
    if (r == 0 && (fchmod(fd, mode) < 0 || fsync(fd) < 0 || rename(tmp, full) < 0))
        r = -errno;
    if (r < 0)
        unlink(tmp);
    return r;
}

static int write_record(struct setup *s)
{
    char full[PATH_MAX];
    setup_path(s, SETUP_RECORD, full);
    if (json_object_size(s->files) == 0 && json_array_size(s->programs) == 0) {
        int r = unlink(full) < 0 && errno != ENOENT ? -errno : 0;
        setup_remove_dirs(s);
        return r;
    }
    int r = setup_make_parents(s, SETUP_RECORD);
    json_t *record = json_pack("{s:i, s:b, s:O, s:O, s:O}", "version", 1, "chosen", s->chosen, "files",
                               s->files, "programs", s->programs, "dirs", s->dirs);
    bn_auto_free char *text = record ? json_dumps(record, JSON_INDENT(1) | JSON_SORT_KEYS) : NULL;
    json_decref(record);
    if (r == 0)
        r = text ? write_file(full, text, strlen(text), 0644) : -ENOMEM;
    return r;
}

int setup_save(struct setup *s, struct bn_error *err)
{
    int r = s->dry_run ? 0 : write_record(s);
    return r < 0 ? bn_error_set(err, r, "install", "cannot write %s: %s", SETUP_RECORD, strerror(-r)) : 0;
}

int setup_close(struct setup *s)
{
    int r = s->dry_run ? 0 : write_record(s);
    if (r < 0)
        setup_fail(s, SETUP_RECORD, r);
    if (s->json)
        cli_print_json(
            json_pack("{s:b, s:b, s:O}", "ok", !s->failed, "dry_run", s->dry_run, "actions", s->items));
    json_decref(s->items);
    json_decref(s->files);
    json_decref(s->programs);
    json_decref(s->dirs);
    return s->failed ? CLI_FAILED : CLI_OK;
}

/* --- folders ------------------------------------------------------------------------------------------------------------ */

void setup_note_dir(struct setup *s, const char *path)
{
    size_t i;
    json_t *known;
    json_array_foreach(s->dirs, i, known)
    {
        if (strcmp(json_string_value(known) ?: "", path) == 0)
            return;
    }
    json_array_append_new(s->dirs, json_string(path));
}

void setup_note_missing_parents(struct setup *s, const char *path)
{
    char part[PATH_MAX];
    for (const char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        snprintf(part, sizeof(part), "%.*s", (int)(slash - path), path);
        if (!setup_exists(s, part))
            setup_note_dir(s, part);
    }
}

int setup_make_parents(struct setup *s, const char *path)
{
    char part[PATH_MAX], full[PATH_MAX];
    setup_note_missing_parents(s, path);
    for (const char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        snprintf(part, sizeof(part), "%.*s", (int)(slash - path), path);
        /* The umask is the caller's, and programs of other users look into these. */
        if (mkdir(setup_path(s, part, full), 0755) == 0 ? chmod(full, 0755) < 0 : errno != EEXIST)
            return -errno;
    }
    return 0;
}

void setup_remove_dirs(struct setup *s)
{
    char full[PATH_MAX];
    for (size_t i = json_array_size(s->dirs); i-- > 0;) {
        const char *path = json_string_value(json_array_get(s->dirs, i));
        if (!path || path[0] != '/' || rmdir(setup_path(s, path, full)) == 0 || errno == ENOENT)
            json_array_remove(s->dirs, i);
    }
}

/* --- files -------------------------------------------------------------------------------------------------------------- */

static void remember(struct setup *s, const char *path, const void *data, size_t len)
{
    char text[20];
    snprintf(text, sizeof(text), "%016llx", (unsigned long long)hash_of(data, len));
    json_object_set_new(s->files, path, json_string(text));
}

/* Is this what was written there last time? */
static bool is_remembered(const struct setup *s, const char *path, const void *data, size_t len)
{
    char text[20];
    const char *known = json_string_value(json_object_get(s->files, path));
    snprintf(text, sizeof(text), "%016llx", (unsigned long long)hash_of(data, len));
    return known && strcmp(known, text) == 0;
}

static void put_beside(struct setup *s, const char *path, const void *data, size_t len)
{
    char full[PATH_MAX], beside[PATH_MAX];
    int r = 0;
    snprintf(beside, sizeof(beside), "%s.new", path);
    if (!s->dry_run)
        r = write_file(setup_path(s, beside, full), data, len, 0644);
    if (r < 0) {
        setup_fail(s, beside, r);
        return;
    }
    if (!s->dry_run)
        remember(s, beside, data, len);
    setup_say(s, "kept", path, "somebody changed it; what Bennu would write is in %s", beside);
}

void setup_put(struct setup *s, const char *path, const void *data, size_t len, mode_t mode,
               enum setup_kind kind)
{
    char full[PATH_MAX];
    bn_auto_free void *old = NULL;
    size_t old_len = 0;
    bool there = setup_read(s, path, &old, &old_len) == 0;
    bool same = there && old_len == len && memcmp(old, data, len) == 0;
    if (there && !same && kind == SETUP_TEXT && !is_remembered(s, path, old, old_len)) {
        put_beside(s, path, data, len);
        return;
    }
    int r = 0;
    if (!same && !s->dry_run) {
        r = setup_make_parents(s, path);
        if (r == 0)
            r = write_file(setup_path(s, path, full), data, len, mode);
    }
    if (r < 0) {
        setup_fail(s, path, r);
        return;
    }
    remember(s, path, data, len);
    setup_say(s, same ? "unchanged" : there ? "updated" : "installed", path, "%s", "");
}

void setup_remove(struct setup *s, const char *path, enum setup_kind kind)
{
    char full[PATH_MAX], saved[PATH_MAX + 8];
    bn_auto_free void *old = NULL;
    size_t len = 0;
    int r = setup_read(s, path, &old, &len);
    bool edited = r == 0 && kind == SETUP_TEXT && !is_remembered(s, path, old, len);
    if (r == -ENOENT || r == -ENOTDIR) {
        json_object_del(s->files, path);
        return;
    }
    setup_path(s, path, full);
    snprintf(saved, sizeof(saved), "%s.saved", full);
    if (!s->dry_run && (edited ? rename(full, saved) : unlink(full)) < 0) {
        setup_fail(s, path, errno);
        return;
    }
    json_object_del(s->files, path);
    if (edited)
        setup_say(s, "removed", path, "somebody had changed it: kept as %s.saved", path);
    else
        setup_say(s, "removed", path, "%s", "");
}
