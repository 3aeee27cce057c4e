/* bennu install: tie Bennu to what else is on this machine, so that `podman container checkpoint` works. */
#include "cli/setup.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "config.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>

static bool json, dry_run, no_start;
static const char *root, *containers;

static const struct cli_option options[] = {
    {"containers", 'c', CLI_STRING, "WHICH", &containers,
     "give the agent to all containers with a GPU, or to chosen ones"},
    {"root", 'r', CLI_STRING, "DIR", &root, "install into the system whose root folder is DIR"},
    {"dry-run", 'n', CLI_FLAG, NULL, &dry_run, "say what would be done and do nothing"},
    {"no-start", 'S', CLI_FLAG, NULL, &no_start, "do not tell systemd"},
    {"json", 'j', CLI_FLAG, NULL, &json, "print the result as one JSON object"},
    {0},
};

/* --- the programs, from a build folder ----------------------------------------------------------------------------------- */

/* Folders that will be made. */
static void note_folders(struct setup *s, const char *build)
{
    char plan[PATH_MAX];
    const char *from;
    json_t *to;
    snprintf(plan, sizeof(plan), "%.3800s/meson-info/intro-installed.json", build);
    json_t *installed = json_load_file(plan, 0, NULL);
    json_object_foreach(installed, from, to)
    {
        const char *path = json_string_value(to);
        char inside[PATH_MAX];
        struct stat st;
        if (!path || path[0] != '/')
            continue;
        bool folder = stat(from, &st) == 0 && S_ISDIR(st.st_mode); /* installed whole */
        snprintf(inside, sizeof(inside), "%.4000s%s", path, folder ? "/x" : "");
        setup_note_missing_parents(s, inside);
    }
    json_decref(installed);
}

/* What meson's log says lies there now: a line a file or new folder, files that were left alone as a remark. */
static size_t remember_programs(struct setup *s, const char *build)
{
    static const char preserved[] = "# Preserving old file ";
    char log[PATH_MAX], line[PATH_MAX + 64];
    struct stat st;
    snprintf(log, sizeof(log), "%.3800s/meson-logs/install-log.txt", build);
    bn_auto_file FILE *f = fopen(log, "re");
    size_t skip = strlen(s->root);
    json_array_clear(s->programs);
    while (f && fgets(line, sizeof(line), f)) {
        const char *path = line;
        line[strcspn(line, "\n")] = 0;
        if (strncmp(path, preserved, sizeof(preserved) - 1) == 0)
            path += sizeof(preserved) - 1;
        if (path[0] != '/' || strncmp(path, s->root, skip) != 0 || lstat(path, &st) < 0)
            continue;
        if (S_ISDIR(st.st_mode))
            setup_note_dir(s, path + skip);
        else
            json_array_append_new(s->programs, json_string(path + skip));
    }
    return json_array_size(s->programs);
}

static int install_programs(struct setup *s, const char *build, struct bn_error *err)
{
    char *argv[] = {"meson", "install", "-C", (char *)build, "--no-rebuild", "--only-changed", NULL};
    bn_auto_free char *out = NULL;
    if (s->dry_run) {
        setup_say(s, "installed", BENNU_PREFIX, "the programs, by 'meson install' from %s", build);
        return 0;
    }
    note_folders(s, build);
    if (setenv("DESTDIR", *s->root ? s->root : "/", 1) < 0)
        return -ENOMEM;
    int status = cli_capture(argv, 300000, &out);
    if (status < 0 || !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
        return bn_error_set(err, EIO, "install",
                            "'meson install -C %s' failed (%.200s): run 'make install', then this again",
                            build, out && *out ? cli_clean(out) : "is meson there?");
    }
    bool changed = false;
    for (const char *at = out; at && *at; at = strchr(at, '\n') ? strchr(at, '\n') + 1 : NULL)
        changed =
            changed || (strncmp(at, "Installing ", 11) == 0 && strncmp(at, "Installing symlink", 18) != 0 &&
                        strncmp(at, "Installing subdir", 17) != 0);
    size_t n = remember_programs(s, build);
    setup_say(s, changed ? "installed" : "unchanged", BENNU_PREFIX, "the programs, %zu files", n);
    return 0;
}

/* A file below the prefix, or, in a dry run from a build folder, where it will come from. */
static int read_part(struct setup *s, const char *installed, const char *in_build, void **data, size_t *len,
                     struct bn_error *err)
{
    char path[PATH_MAX];
    const char *build = cli_build_root();
    if (build && s->dry_run)
        snprintf(path, sizeof(path), "%.3800s/%s", build, in_build);
    else
        setup_path(s, installed, path);
    int r = bn_read_file_at(AT_FDCWD, path, SETUP_FILE_MAX, data, len);
    if (r < 0)
        return bn_error_set(err, r, "install",
                            "%s cannot be read (%s): install the package there, or run 'make install' first",
                            path, strerror(-r));
    return 0;
}

/* --- agent and templates ---------------------------------------------------------------------------------------------------- */

/* Copies of the agent that containers and checkpoints of earlier days have. */
static void say_old_agents(struct setup *s, const char *current)
{
    char dir[PATH_MAX], path[PATH_MAX];
    bn_auto_dir DIR *d = opendir(setup_path(s, BENNU_AGENTS_DIR, dir));
    for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d)) {
        if (e->d_name[0] == '.' || strcmp(e->d_name, current) == 0)
            continue;
        snprintf(path, sizeof(path), "%s/%s", BENNU_AGENTS_DIR, e->d_name);
        setup_say(s, "kept", path, "an older agent: containers and checkpoints made with it need it");
    }
}

static int put_agent(struct setup *s, char agent[PATH_MAX], struct bn_error *err)
{
    bn_auto_free void *data = NULL;
    size_t len;
    char id[64];
    int r = read_part(s, BENNU_AGENT_PATH, "src/agent/libbennu.so", &data, &len, err);
    if (r < 0)
        return r;
    setup_agent_id(data, len, id);
    snprintf(agent, PATH_MAX, "%s/%s/libbennu.so", BENNU_AGENTS_DIR, id);
    setup_put(s, agent, data, len, 0644, SETUP_OURS);
    say_old_agents(s, id);
    return 0;
}

/* `text` with `value` in place of `mark`; caller frees. */
static char *fill_in(const char *text, const char *mark, const char *value)
{
    char *out = NULL;
    size_t len;
    FILE *f = open_memstream(&out, &len);
    if (!f)
        return NULL;
    for (const char *at; (at = strstr(text, mark)); text = at + strlen(mark))
        fprintf(f, "%.*s%s", (int)(at - text), text, value);
    fputs(text, f);
    if (fclose(f) != 0) {
        free(out);
        return NULL;
    }
    return out;
}

/* When Podman runs the hook. */
static const char *when(const struct setup *s)
{
    return s->chosen ? "{\"annotations\": {\"^dev\\\\.bennu\\\\.agent$\": \"^(on|preload)$\"}}"
                     : "{\"always\": true}";
}

static int put_template(struct setup *s, const char *name, const char *agent, const char *path,
                        struct bn_error *err)
{
    bn_auto_free void *data = NULL;
    size_t len;
    char installed[PATH_MAX], in_build[64];
    snprintf(installed, sizeof(installed), "%s/%s", BENNU_SHAREDIR, name);
    snprintf(in_build, sizeof(in_build), "packaging/%s", name);
    int r = read_part(s, installed, in_build, &data, &len, err);
    if (r < 0)
        return r;
    bn_auto_free char *part = fill_in(data, "@AGENT@", agent);
    bn_auto_free char *text = part ? fill_in(part, "@WHEN@", when(s)) : NULL;
    if (!text)
        return bn_error_set(err, ENOMEM, "install", "no memory");
    setup_put(s, path, text, strlen(text), 0644, SETUP_TEXT);
    return 0;
}

/* --- systemd ------------------------------------------------------------------------------------------------------------------- */

static void start(struct setup *s)
{
    char *reload[] = {"systemctl", "daemon-reload", NULL};
    char *enable[] = {"systemctl", "enable", "--now", "bennud.socket", NULL};
    bn_auto_free char *out = NULL, *more = NULL;
    if (no_start || *s->root || access("/run/systemd/system", F_OK) < 0) {
        setup_say(s, "skipped", "bennud.socket", "%s",
                  no_start   ? "not asked for: 'systemctl enable --now bennud.socket' starts it"
                  : *s->root ? "another root folder: 'systemctl enable --now bennud.socket' there starts it"
                             : "systemd does not run here: start " BENNU_DAEMON_PATH " by other means");
        return;
    }
    int failed = s->dry_run ? 0 : cli_capture(reload, 60000, &out);
    if (failed == 0 && !s->dry_run)
        failed = cli_capture(enable, 60000, &more);
    if (failed != 0) {
        s->failed = true;
        setup_say(s, "failed", "bennud.socket", "%.300s",
                  more  ? more
                  : out ? out
                        : "systemctl cannot be run");
        return;
    }
    setup_say(s, "enabled", "bennud.socket", "the daemon starts with the first request");
}

static int install(int argc, char **argv)
{
    struct setup s = {.dry_run = dry_run, .json = json};
    struct bn_error err = BN_ERROR_INIT;
    const char *build = cli_build_root();
    char agent[PATH_MAX], plugin[PATH_MAX];
    if (containers && strcmp(containers, "all") != 0 && strcmp(containers, "chosen") != 0)
        return cli_usage("--containers is 'all' or 'chosen'");
    int r = setup_open(&s, root, &err);
    if (r < 0)
        return cli_fail(CLI_FAILED, &err, json);
    if (containers)
        s.chosen = strcmp(containers, "chosen") == 0;
    if (build) {
        r = install_programs(&s, build, &err);
        if (r == 0)
            r = setup_save(&s, &err); /* whatever ends this early: they can be taken away again */
    }
    if (!build)
        setup_say(&s, "unchanged", BENNU_PREFIX, "the programs, as their package or 'make install' put them");
    if (r == 0)
        r = put_agent(&s, agent, &err);
    if (r == 0)
        r = put_template(&s, "bennu.json.in", agent, SETUP_CDI, &err);
    if (r == 0) {
        if (build && dry_run)
            snprintf(plugin, sizeof(plugin), "%.3800s/src/criu/%s", build, CLI_PLUGIN_FILE);
        else
            setup_path(&s, BENNU_PLUGIN_DIR "/" CLI_PLUGIN_FILE, plugin);
        setup_criu_install(&s, plugin);
        /* Last: from here on every container that is started runs it. */
        r = s.failed ? 0 : put_template(&s, "50-bennu.json.in", agent, SETUP_HOOK, &err);
    }
    if (r == 0 && !s.failed)
        start(&s);
    if (r < 0) {
        bool as_json = s.json;
        s.json = false;
        setup_close(&s);
        return cli_fail(CLI_FAILED, &err, as_json);
    }
    return setup_close(&s);
}

const struct cli_command cli_install = {
    .name = "install",
    .operands = "",
    .summary = "Put agent, CRIU plugin and container hook in place for the whole machine",
    .options = options,
    .min = 0,
    .max = 0,
    .needed = "it takes none",
    .run = install,
};
