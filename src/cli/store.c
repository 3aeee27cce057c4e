/* bennu store: look after a folder of checkpoints. */
#include "cli/cli.h"

#include "base/cleanup.h"
#include "store/catalog.h"
#include "store/collect.h"
#include "store/host_files.h"
#include "store/image_dir.h"
#include "store/verify.h"

#include <fcntl.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

static bool json;

static const struct cli_option options[] = {
    {"json", 'j', CLI_FLAG, NULL, &json, "print the result as one JSON object"},
    {0},
};

struct store {
    const char *path;
    int fd;
    struct bn_catalog catalog; /* of what is named, else of all */
};

/* Each checkpoint that is looked at costs a descriptor. */
static void lift_limit(void)
{
    struct rlimit l;
    if (getrlimit(RLIMIT_NOFILE, &l) == 0 && l.rlim_cur < l.rlim_max) {
        l.rlim_cur = l.rlim_max;
        setrlimit(RLIMIT_NOFILE, &l);
    }
}

static char *clean_name(const struct bn_entry *e, char out[NAME_MAX + 1])
{
    snprintf(out, NAME_MAX + 1, "%s", e->name);
    return cli_clean(out);
}

static int append(struct bn_catalog *to, struct bn_catalog *from)
{
    struct bn_entry *more = realloc(to->entries, (to->n + from->n) * sizeof(*more));
    if (!more)
        return -ENOMEM;
    memcpy(more + to->n, from->entries, from->n * sizeof(*more));
    to->entries = more;
    to->n += from->n;
    free(from->entries);
    *from = (struct bn_catalog){0};
    return 0;
}

static int read_catalog(struct store *s, int n, char **names, struct bn_error *err)
{
    if (n == 0)
        return bn_catalog_read(s->fd, &s->catalog, err);
    for (int i = 0; i < n; i++) {
        struct bn_catalog one;
        int r = bn_catalog_read_one(s->fd, names[i], &one, err);
        if (r < 0)
            return r;
        r = append(&s->catalog, &one);
        if (r < 0) {
            bn_catalog_free(&one);
            return bn_error_set(err, ENOMEM, "store", "out of memory");
        }
    }
    return 0;
}

/* ---- ls ---- */

static const char *state_name(const struct bn_entry *e)
{
    static const char *const names[] = {[BN_ENTRY_COMPLETE] = "complete",
                                        [BN_ENTRY_CRIU] = "no GPU memory",
                                        [BN_ENTRY_DAMAGED] = "damaged",
                                        [BN_ENTRY_WRITING] = "being written",
                                        [BN_ENTRY_INCOMPLETE] = "incomplete"};
    return names[e->state];
}

static void made_text(const struct bn_entry *e, char out[32])
{
    time_t t = e->m ? (time_t)(e->m->created_ns / 1000000000u) : 0;
    struct tm tm;
    if (!e->m || !gmtime_r(&t, &tm) || strftime(out, 32, "%Y-%m-%d %H:%M:%S UTC", &tm) == 0)
        snprintf(out, 32, "-");
}

static void list_text(const struct store *s)
{
    printf("%-24s %-23s %9s %9s %9s %9s  %s\n", "NAME", "MADE", "PROCESSES", "GPU", "OWN", "SHARED", "");
    for (size_t i = 0; i < s->catalog.n; i++) {
        const struct bn_entry *e = &s->catalog.entries[i];
        char name[NAME_MAX + 1], made[32], gpu[16], own[16], shared[16];
        made_text(e, made);
        printf("%-24s %-23s %9u %9s %9s %9s  %s\n", clean_name(e, name), made, e->m ? e->m->n_processes : 0,
               cli_bytes(e->m ? bn_manifest_bytes(e->m) : 0, gpu), cli_bytes(e->own, own),
               cli_bytes(e->shared, shared), e->state == BN_ENTRY_COMPLETE ? "" : state_name(e));
    }
}

static void list_json(const struct store *s)
{
    json_t *list = json_array();
    for (size_t i = 0; i < s->catalog.n; i++) {
        const struct bn_entry *e = &s->catalog.entries[i];
        json_t *o = json_object(), *name = json_string(e->name);
        char made[32];
        made_text(e, made);
        json_object_set_new(o, "name", name ? name : json_null()); /* null: not UTF-8 */
        json_object_set_new(o, "state", json_string(state_name(e)));
        json_object_set_new(o, "made", e->m ? json_string(made) : json_null());
        json_object_set_new(o, "processes", json_integer(e->m ? e->m->n_processes : 0));
        json_object_set_new(o, "gpu_bytes", json_integer(e->m ? (json_int_t)bn_manifest_bytes(e->m) : 0));
        json_object_set_new(o, "own_bytes", json_integer((json_int_t)e->own));
        json_object_set_new(o, "shared_bytes", json_integer((json_int_t)e->shared));
        json_array_append_new(list, o);
    }
    json_t *o = cli_json_ok();
    json_object_set_new(o, "checkpoints", list);
    cli_print_json(o);
}

static int list(struct store *s, struct bn_error *err)
{
    (void)err;
    if (json)
        list_json(s);
    else
        list_text(s);
    return CLI_OK;
}

/* ---- rm ---- */

static int remove_named(struct store *s, struct bn_error *err)
{
    bn_auto_free int *locks = malloc((s->catalog.n ? s->catalog.n : 1) * sizeof(*locks));
    if (!locks) {
        bn_error_set(err, ENOMEM, "store", "out of memory");
        return CLI_FAILED;
    }
    /* All or none: what is in use is found before the first is gone. */
    int code = CLI_OK;
    size_t held = 0;
    for (; code == CLI_OK && held < s->catalog.n; held++) {
        const struct bn_entry *e = &s->catalog.entries[held];
        struct bn_error why = BN_ERROR_INIT;
        int r = locks[held] = bn_image_lock(e->fd, true, &why);
        if (r < 0 && r != -ENOTSUP && r != -EBUSY) /* without locks it goes as well */
            bn_error_set(err, r, "store", "%.255s: %.230s", e->name, why.text);
        else if (r == -EBUSY || e->state == BN_ENTRY_WRITING)
            bn_error_set(err, EBUSY, "store", "%s is in use: try again later", e->name);
        else
            continue;
        code = CLI_FAILED;
    }
    uint64_t freed = 0;
    for (size_t i = 0; code == CLI_OK && i < s->catalog.n; i++) {
        struct bn_entry *e = &s->catalog.entries[i];
        freed += e->own;
        if (bn_entry_remove(s->fd, e, err) < 0)
            code = CLI_FAILED;
    }
    for (size_t i = 0; i < held; i++)
        bn_close(locks[i]);
    if (code == CLI_OK && json) {
        json_t *o = cli_json_ok();
        json_object_set_new(o, "removed", json_integer((json_int_t)s->catalog.n));
        json_object_set_new(o, "freed_bytes", json_integer((json_int_t)freed));
        cli_print_json(o);
    }
    return code;
}

/* ---- gc ---- */

static void say_skipped(void *arg, const struct bn_error *why)
{
    (void)arg;
    char text[BN_ERROR_TEXT_MAX];
    snprintf(text, sizeof(text), "%s", why->text);
    fprintf(stderr, "%s: left alone: %s\n", cli_name, cli_clean(text));
}

static int collect(struct store *s, struct bn_error *err)
{
    struct bn_collected c = {0};
    char bytes[16];
    if (bn_collect(s->fd, say_skipped, NULL, &c, err) < 0)
        return CLI_FAILED;
    if (json) {
        json_t *o = cli_json_ok();
        json_object_set_new(o, "incomplete_removed", json_integer(c.folders));
        json_object_set_new(o, "leftover_packs_removed", json_integer(c.leftovers));
        json_object_set_new(o, "packs_rewritten", json_integer(c.rewritten));
        json_object_set_new(o, "freed_bytes", json_integer((json_int_t)c.bytes));
        json_object_set_new(o, "skipped", json_integer(c.skipped));
        cli_print_json(o);
    } else {
        printf("%u incomplete checkpoints and %u leftover packs removed, %u packs rewritten, %s freed\n",
               c.folders, c.leftovers, c.rewritten, cli_bytes(c.bytes, bytes));
    }
    return CLI_OK;
}

/* ---- verify ---- */

struct damage {
    json_t *list; /* with --json */
    const char *name;
    uint64_t count;
    struct bn_error first;
};

static void note_damage(void *arg, const struct bn_error *what)
{
    struct damage *d = arg;
    char text[BN_ERROR_TEXT_MAX + NAME_MAX + 4];
    snprintf(text, sizeof(text), "%s: %s", d->name, what->text);
    cli_clean(text);
    d->count++;
    if (!d->list) {
        printf("%s\n", text);
        return;
    }
    json_t *o = json_object(), *name = json_string(d->name), *s = json_string(text + strlen(d->name) + 2);
    json_object_set_new(o, "name", name ? name : json_null());
    json_object_set_new(o, "text", s ? s : json_null());
    json_array_append_new(d->list, o);
}

/* Negative: not damaged, but rewritten now. */
static int verify_one(struct bn_verify *v, const struct bn_entry *e, struct damage *d,
                      struct bn_verify_result *sum, struct bn_error *err)
{
    struct bn_verify_result result = {0};
    struct bn_error why = BN_ERROR_INIT;
    d->name = e->name;
    if (e->state == BN_ENTRY_DAMAGED || e->state == BN_ENTRY_INCOMPLETE) {
        bn_error_set(&why, EBADMSG, "verify", "%s",
                     e->state == BN_ENTRY_DAMAGED ? e->why.text : "not complete");
        note_damage(d, &why);
        return 0;
    }
    if (!e->m)
        return 0;
    /* A collection may have moved its chunks since the manifest was read, and may do so until we have the lock. */
    struct bn_manifest *m = NULL;
    bn_auto_fd lock = bn_image_lock(e->fd, false, &why);
    if (lock == -EBUSY)
        return bn_error_set(err, EBUSY, why.stage, "%.255s: %.230s", e->name, why.text);
    why = (struct bn_error)BN_ERROR_INIT;
    int r = bn_image_load(e->fd, &m, &why);
    if (r < 0) {
        if (r != -ENOENT) /* removed meanwhile */
            note_damage(d, &why);
        return 0;
    }
    if (bn_image_has_criu(e->fd) != 1) {
        bn_error_set(&why, EBADMSG, "verify", "CRIU's %s is missing", CLI_INVENTORY);
        note_damage(d, &why);
    }
    why = BN_ERROR_INIT;
    if (bn_verify_image(v, e->fd, m, note_damage, d, &result, &why) < 0)
        note_damage(d, &why);
    uint64_t host_bytes = 0;
    why = BN_ERROR_INIT;
    if (bn_host_files_compare(e->fd, m, BN_HOST_FILES_ALL, 0, NULL, note_damage, d, &host_bytes, &why) < 0)
        note_damage(d, &why);
    bn_manifest_free(m);
    sum->chunks += result.chunks;
    sum->bytes += result.bytes + host_bytes;
    return 0;
}

static int verify(struct store *s, struct bn_error *err)
{
    struct bn_verify *v = bn_verify_new();
    if (!v) {
        bn_error_set(err, ENOMEM, "verify", "out of memory");
        return CLI_FAILED;
    }
    struct damage d = {.list = json ? json_array() : NULL};
    struct bn_verify_result sum = {0};
    char bytes[16];
    int r = 0;
    for (size_t i = 0; i < s->catalog.n && r == 0; i++)
        r = verify_one(v, &s->catalog.entries[i], &d, &sum, err);
    bn_verify_free(v);
    if (r < 0) {
        json_decref(d.list);
        return CLI_FAILED;
    }
    if (json) {
        json_t *o = d.count ? json_pack("{s:b}", "ok", 0) : cli_json_ok();
        json_object_set_new(o, "checkpoints", json_integer((json_int_t)s->catalog.n));
        json_object_set_new(o, "chunks", json_integer((json_int_t)sum.chunks));
        json_object_set_new(o, "bytes_read", json_integer((json_int_t)sum.bytes));
        json_object_set_new(o, "damage", d.list);
        cli_print_json(o);
    } else if (d.count == 0) {
        printf("%zu checkpoints, %llu stored chunks, and CRIU's files: all as they were written (%s read)\n",
               s->catalog.n, (unsigned long long)sum.chunks, cli_bytes(sum.bytes, bytes));
    }
    if (d.count == 0)
        return CLI_OK;
    fprintf(stderr, "%s: %llu times damage in %s: see above, and dump those again\n", cli_name,
            (unsigned long long)d.count, s->path);
    return CLI_BAD_IMAGE;
}

/* ---- which ---- */

static const struct {
    const char *name;
    int (*run)(struct store *s, struct bn_error *err);
    int min, max; /* names */
} verbs[] = {{"ls", list, 0, 0},
             {"rm", remove_named, 1, INT_MAX},
             {"gc", collect, 0, 0},
             {"verify", verify, 0, INT_MAX}};

static int store(int argc, char **argv)
{
    size_t verb = 0;
    while (verb < BN_ARRAY_SIZE(verbs) && strcmp(verbs[verb].name, argv[0]) != 0)
        verb++;
    if (verb == BN_ARRAY_SIZE(verbs))
        return cli_usage("'%s' is none of ls, rm, gc and verify", argv[0]);
    if (argc - 2 < verbs[verb].min)
        return cli_usage("%s needs the names of checkpoints in %s", argv[0], argv[1]);
    if (argc - 2 > verbs[verb].max)
        return cli_usage("%s takes no names", argv[0]);
    lift_limit();
    struct bn_error err = BN_ERROR_INIT;
    struct store s = {.path = argv[1], .fd = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
    if (s.fd < 0) {
        bn_error_set(&err, errno, "store", "cannot open the store %s: %m", argv[1]);
        return cli_fail(CLI_FAILED, &err, json);
    }
    int code = CLI_FAILED;
    if (verbs[verb].run == collect || read_catalog(&s, argc - 2, argv + 2, &err) == 0)
        code = verbs[verb].run(&s, &err);
    if (bn_error_is_set(&err))
        cli_fail(code, &err, json);
    bn_catalog_free(&s.catalog);
    bn_close(s.fd);
    return code;
}

const struct cli_command cli_store = {
    .name = "store",
    .operands = "ls|rm|gc|verify DIR [NAME]...",
    .summary = "Look after a directory of checkpoints",
    .options = options,
    .min = 2,
    .max = 4096,
    .needed = "operands are needed: what to do and DIR",
    .run = store,
};
