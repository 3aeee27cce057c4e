/* bennu uninstall: take away what `bennu install` has put in place. */
#include "cli/setup.h"

#include "base/cleanup.h"
#include "config.h"

#include <string.h>

static bool json, dry_run, no_stop, all_versions;
static const char *root;

static const struct cli_option options[] = {
    {"root", 'r', CLI_STRING, "DIR", &root, "uninstall from the system whose root folder is DIR"},
    {"all-versions", 'a', CLI_FLAG, NULL, &all_versions,
     "remove the agents, too: containers and checkpoints made with them are lost"},
    {"dry-run", 'n', CLI_FLAG, NULL, &dry_run, "say what would be done and do nothing"},
    {"no-stop", 'S', CLI_FLAG, NULL, &no_stop, "do not tell systemd"},
    {"json", 'j', CLI_FLAG, NULL, &json, "print the result as one JSON object"},
    {0},
};

static void stop(struct setup *s)
{
    char *disable[] = {"systemctl", "disable", "--now", "bennud.socket", "bennud.service", NULL};
    bn_auto_free char *out = NULL;
    if (no_stop || *s->root || access("/run/systemd/system", F_OK) < 0)
        return;
    /* On its way out the daemon gives suspended processes their memory back: that may take minutes. */
    int status = s->dry_run ? 0 : cli_capture(disable, 600000, &out);
    if (status != 0 && !(out && (strstr(out, "not exist") || strstr(out, "not found")))) {
        s->failed = true;
        setup_say(s, "failed", "bennud.socket", "%.300s", out ? out : "systemctl cannot be run");
        return;
    }
    setup_say(s, "disabled", "bennud.socket", "%s", "");
}

static void remove_agents(struct setup *s)
{
    char dir[PATH_MAX], path[PATH_MAX];
    bn_auto_dir DIR *d = opendir(setup_path(s, BENNU_AGENTS_DIR, dir));
    for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d)) {
        if (e->d_name[0] == '.')
            continue;
        snprintf(path, sizeof(path), "%s/%s/libbennu.so", BENNU_AGENTS_DIR, e->d_name);
        if (!all_versions) {
            setup_say(s, "kept", path,
                      "containers and checkpoints made with it need it; --all-versions removes it");
            continue;
        }
        setup_remove(s, path, SETUP_OURS);
        snprintf(path, sizeof(path), "%s/%s", BENNU_AGENTS_DIR, e->d_name);
        if (!s->dry_run && rmdir(setup_path(s, path, dir)) < 0 && errno != ENOENT)
            setup_fail(s, path, errno);
    }
}

/* Agents that are kept are found again by looking: the record need not stay for them. */
static void forget_agents(struct setup *s)
{
    const char *path;
    json_t *hash;
    void *next;
    char full[PATH_MAX];
    json_object_foreach_safe(s->files, next, path, hash)
    {
        if (strncmp(path, BENNU_AGENTS_DIR "/", sizeof(BENNU_AGENTS_DIR)) == 0)
            json_object_del(s->files, path);
    }
    if (rmdir(setup_path(s, BENNU_AGENTS_DIR, full)) == 0) {
        *strrchr(full, '/') = 0;
        rmdir(full);
    }
}

static void remove_programs(struct setup *s)
{
    size_t i, n = 0;
    json_t *item;
    char full[PATH_MAX];
    if (json_array_size(s->programs) == 0) {
        setup_say(s, "kept", BENNU_PREFIX,
                  "the programs: their package, or 'make uninstall', takes them away");
        return;
    }
    json_array_foreach(s->programs, i, item)
    {
        const char *path = json_string_value(item);
        if (!path || path[0] != '/' || s->dry_run)
            continue;
        if (unlink(setup_path(s, path, full)) == 0)
            n++;
        else if (errno != ENOENT)
            setup_fail(s, path, errno);
    }
    if (s->dry_run)
        n = json_array_size(s->programs);
    else
        json_array_clear(s->programs);
    setup_say(s, "removed", BENNU_PREFIX, "the programs, %zu files", n);
}

static int uninstall(int argc, char **argv)
{
    struct setup s = {.dry_run = dry_run, .json = json};
    struct bn_error err = BN_ERROR_INIT;
    if (setup_open(&s, root, &err) < 0)
        return cli_fail(CLI_FAILED, &err, json);
    /* First: a hook without its program would keep every container from starting. */
    setup_remove(&s, SETUP_HOOK, SETUP_TEXT);
    setup_remove(&s, SETUP_HOOK ".new", SETUP_OURS);
    if (s.failed)
        return setup_close(&s);
    stop(&s);
    setup_remove(&s, SETUP_CDI, SETUP_TEXT);
    setup_remove(&s, SETUP_CDI ".new", SETUP_OURS);
    setup_criu_uninstall(&s);
    remove_agents(&s);
    remove_programs(&s);
    if (!dry_run)
        forget_agents(&s);
    return setup_close(&s);
}

const struct cli_command cli_uninstall = {
    .name = "uninstall",
    .operands = "",
    .summary = "Take away what 'bennu install' has put in place",
    .options = options,
    .min = 0,
    .max = 0,
    .needed = "it takes none",
    .run = uninstall,
};
