/* CRIU as podman, runc and crun use it: which plugin it loads, and the options that they have no word for.
 *
 * CRIU loads every plugin of one folder and asks the first that answers: of Bennu's and CRIU's own cuda_plugin.so exactly one may be
 * there. Bennu's does all that the other does (a program without an agent takes the driver's path), so where both are
 * installed CRIU is told to use Bennu's folder, and nothing of the other is touched. */
#include "cli/setup.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "config.h"

#include <fcntl.h>
#include <string.h>

/* As `bennu dump` asks for: Python and most servers have deleted files open (semaphores above all). */
#define BLOCK_OPTIONS "link-remap\nghost-limit 64M\n"

/* --- default.conf ----------------------------------------------------------------------------------------------------- */

/* Copy of the configuration without Bennu's block; caller frees. NULL: no memory. */
static char *without_block(const char *text)
{
    char *out = strdup(text);
    char *begin = out ? strstr(out, SETUP_BLOCK_BEGIN) : NULL;
    char *end = begin ? strstr(begin, SETUP_BLOCK_END) : NULL;
    if (end)
        memmove(begin, end + strlen(SETUP_BLOCK_END), strlen(end + strlen(SETUP_BLOCK_END)) + 1);
    return out;
}

bool setup_criu_option(const char *text, const char *option, char *out, size_t cap)
{
    bn_auto_free char *copy = strdup(text);
    bool found = false;
    for (char *save = NULL, *line = copy ? strtok_r(copy, "\n", &save) : NULL; line;
         line = strtok_r(NULL, "\n", &save)) {
        char name[64], value[1024] = "";
        if (sscanf(line, " %63[^ \t=]%*1[ \t=]%1023s", name, value) >= 1 && strcmp(name, option) == 0) {
            snprintf(out, cap, "%s", value);
            found = true;
        }
    }
    return found;
}

/* The administrator's part of default.conf; caller frees. Never NULL unless there is no memory. */
static char *read_config(const struct setup *s, char **whole)
{
    void *text = NULL;
    size_t len;
    *whole = setup_read(s, SETUP_CRIU_CONFIG, &text, &len) == 0 ? text : NULL;
    return without_block(*whole ? *whole : "");
}

static void write_config(struct setup *s, const char *rest, const char *block)
{
    bn_auto_free char *text = NULL;
    size_t len = strlen(rest);
    const char *newline = len && rest[len - 1] != '\n' ? "\n" : "";
    if (asprintf(&text, "%s%s%s%s%s", rest, newline, SETUP_BLOCK_BEGIN, block, SETUP_BLOCK_END) < 0) {
        setup_fail(s, SETUP_CRIU_CONFIG, ENOMEM);
        return;
    }
    setup_put(s, SETUP_CRIU_CONFIG, text, strlen(text), 0644, SETUP_OURS);
}

static void remove_config(struct setup *s)
{
    bn_auto_free char *whole = NULL, *rest = read_config(s, &whole);
    char full[PATH_MAX];
    if (!whole || !rest || strcmp(whole, rest) == 0) {
        json_object_del(s->files, SETUP_CRIU_CONFIG);
        return;
    }
    if (!*rest) {
        setup_remove(s, SETUP_CRIU_CONFIG, SETUP_OURS);
        return;
    }
    FILE *f = s->dry_run ? NULL : fopen(setup_path(s, SETUP_CRIU_CONFIG, full), "we");
    bool written = f && fputs(rest, f) >= 0;
    if (f && (fclose(f) != 0 || !written))
        setup_fail(s, SETUP_CRIU_CONFIG, errno);
    else if (!s->dry_run && !f)
        setup_fail(s, SETUP_CRIU_CONFIG, errno);
    else
        setup_say(s, "updated", SETUP_CRIU_CONFIG, "Bennu's lines are gone, yours are as they were");
    json_object_del(s->files, SETUP_CRIU_CONFIG);
}

/* --- which folder ------------------------------------------------------------------------------------------------------- */

static bool has_file(const struct setup *s, const char *dir, const char *name)
{
    char path[PATH_MAX];
    snprintf(path, sizeof(path), "%.3800s/%s", dir, name);
    return setup_exists(s, path);
}

/* The folder that CRIU looks into when it is not told another one; compiled into it. */
static const char *default_dir(const struct setup *s)
{
    static const char *const usual[] = {"/usr/lib/criu", "/usr/lib64/criu", "/usr/local/lib/criu"};
    for (size_t i = 0; i < BN_ARRAY_SIZE(usual); i++) {
        if (setup_exists(s, usual[i]))
            return usual[i];
    }
    return usual[0];
}

static void put_plugin(struct setup *s, const char *dir, const char *source)
{
    char path[PATH_MAX];
    bn_auto_free void *data = NULL;
    size_t len;
    int r = bn_read_file_at(AT_FDCWD, source, SETUP_FILE_MAX, &data, &len);
    if (r < 0) {
        setup_fail(s, source, r);
        return;
    }
    snprintf(path, sizeof(path), "%.3800s/%s", dir, CLI_PLUGIN_FILE);
    setup_put(s, path, data, len, 0644, SETUP_OURS);
}

/* Every plugin that was put anywhere, but not in `keep`. */
static void remove_plugins(struct setup *s, const char *keep)
{
    const char *path;
    json_t *hash;
    void *next;
    char kept[PATH_MAX];
    snprintf(kept, sizeof(kept), "%.3800s/%s", keep, CLI_PLUGIN_FILE);
    json_object_foreach_safe(s->files, next, path, hash)
    {
        const char *name = strrchr(path, '/');
        if (name && strcmp(name + 1, CLI_PLUGIN_FILE) == 0 && strcmp(path, kept) != 0) {
            bn_auto_free char *copy = strdup(path);
            if (copy)
                setup_remove(s, copy, SETUP_OURS);
        }
    }
}

/* Other plugins of a folder that CRIU will no longer look into. */
static void other_plugins(const struct setup *s, const char *dir, char *out, size_t cap)
{
    char full[PATH_MAX];
    bn_auto_dir DIR *d = opendir(setup_path(s, dir, full));
    out[0] = 0;
    for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d)) {
        size_t len = strlen(e->d_name), used = strlen(out);
        if (len > 3 && strcmp(e->d_name + len - 3, ".so") == 0 && strcmp(e->d_name, CLI_PLUGIN_FILE) != 0 &&
            strcmp(e->d_name, SETUP_STOCK_PLUGIN) != 0)
            snprintf(out + used, cap - used, "%s%s", used ? ", " : "; CRIU no longer loads ", e->d_name);
    }
}

/* The machine's own CRIU, which podman calls; Bennu's private copy is nothing to it. */
static bool system_criu_fits(struct setup *s)
{
    struct cli_criu criu = {0};
    struct bn_error err = BN_ERROR_INIT;
    if (*s->root)
        return true; /* not to be run from here */
    if (cli_criu_find_system(&criu, &err) == 0)
        return true;
    setup_say(
        s, "skipped", SETUP_CRIU_CONFIG,
        "%s; an older CRIU fails with a plugin that it does not know, so none is put there. Install CRIU "
        "4.0 or newer and run 'bennu install' again to checkpoint containers",
        bn_error_is_set(&err) ? err.text : "this machine has no CRIU");
    return false;
}

void setup_criu_install(struct setup *s, const char *plugin_source)
{
    char users[1024], limit[64], others[300], block[1400];
    if (!system_criu_fits(s)) {
        setup_criu_uninstall(s);
        return;
    }
    bn_auto_free char *whole = NULL, *rest = read_config(s, &whole);
    if (!rest) {
        setup_fail(s, SETUP_CRIU_CONFIG, ENOMEM);
        return;
    }
    bool named = setup_criu_option(rest, "libdir", users, sizeof(users));
    const char *dir = named ? users : default_dir(s);
    bool stock = has_file(s, dir, SETUP_STOCK_PLUGIN);
    bool limited = setup_criu_option(rest, "ghost-limit", limit, sizeof(limit));
    snprintf(block, sizeof(block), "%s", limited ? "link-remap\n" : BLOCK_OPTIONS);
    if (named && stock) {
        remove_plugins(s, "");
        setup_say(s, "skipped", dir,
                  "your libdir in " SETUP_CRIU_CONFIG " has CRIU's own " SETUP_STOCK_PLUGIN
                  ", which acts for podman and criu; take either away for Bennu's to act");
    } else if (stock) {
        size_t used = strlen(block);
        other_plugins(s, dir, others, sizeof(others));
        snprintf(block + used, sizeof(block) - used, "libdir %s\n", BENNU_PLUGIN_DIR);
        remove_plugins(s, "");
        setup_say(s, "kept", dir,
                  "CRIU's own " SETUP_STOCK_PLUGIN
                  " is there and does not act: CRIU is told to use %s, whose "
                  "plugin acts for podman and criu%s",
                  BENNU_PLUGIN_DIR, others);
    } else {
        remove_plugins(s, dir);
        if (!named || strcmp(users, BENNU_PLUGIN_DIR) != 0)
            put_plugin(s, dir, plugin_source);
    }
    write_config(s, rest, block);
}

void setup_criu_uninstall(struct setup *s)
{
    remove_config(s);
    remove_plugins(s, "");
}
