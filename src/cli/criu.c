/* Driving CRIU through libcriu: finding it, its options, its log. */
#include "cli/cli.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "config.h"

#include <criu/criu.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define GHOST_LIMIT \
    (64u << 20) /* bytes of a deleted file that is still open; CRIU's own 1 MiB is small for Python's */
#define LOG_MAX (64u << 20)

void cli_version_text(int version, char out[24])
{
    snprintf(out, 24, version % 100 ? "%d.%d.%d" : "%d.%d", version / 10000, version / 100 % 100,
             version % 100);
}

/* "Version: 4.1.1" */
static int read_version(const char *path, int *version, struct bn_error *err)
{
    char *argv[] = {(char *)path, "--version", NULL};
    bn_auto_free char *out = NULL;
    int status = cli_capture(argv, 20000, &out);
    if (status < 0 || !WIFEXITED(status) || WEXITSTATUS(status) != 0 || !out) {
        char *why = out ? cli_clean(out) : "no output";
        return bn_error_set(err, ENOEXEC, "criu", "CRIU at %s does not start (%.200s)", path, why);
    }
    int major, minor, sub = 0;
    const char *at = strstr(out, "Version:");
    if (!at || sscanf(at, "Version: %d.%d.%d", &major, &minor, &sub) < 2)
        return bn_error_set(err, ENOEXEC, "criu", "%s does not say CRIU's version: is it CRIU?", path);
    *version = major * 10000 + minor * 100 + sub;
    return 0;
}

static int try_program(const char *path, struct cli_criu *criu, struct bn_error *err)
{
    int version = 0;
    int r = read_version(path, &version, err);
    if (r < 0)
        return r;
    if (version < CLI_CRIU_MIN) {
        char text[24];
        cli_version_text(version, text);
        return bn_error_set(err, ENOEXEC, "criu",
                            "CRIU at %s is version %s; 4.0 or newer is needed: set BENNU_CRIU to one", path,
                            text);
    }
    snprintf(criu->path, sizeof(criu->path), "%s", path);
    criu->version = version;
    return 0;
}

static int try_search_path(struct cli_criu *criu, struct bn_error *err)
{
    const char *path = getenv("PATH");
    bn_auto_free char *list = NULL;
    /* The system folders are searched in any case: sudo and cron leave them out of PATH here and there. */
    if (asprintf(&list, "%s:/usr/local/sbin:/usr/sbin:/sbin", path ? path : "/usr/bin:/bin") < 0) {
        list = NULL;
        return -ENOMEM;
    }
    for (char *save = NULL, *dir = strtok_r(list, ":", &save); dir; dir = strtok_r(NULL, ":", &save)) {
        char file[PATH_MAX];
        if (snprintf(file, sizeof(file), "%s/criu", dir) < (int)sizeof(file) && access(file, X_OK) == 0 &&
            try_program(file, criu, err) == 0)
            return 0;
    }
    return -ENOENT;
}

int cli_criu_find_program(struct cli_criu *criu, struct bn_error *err)
{
    *criu = (struct cli_criu){0};
    const char *given = getenv("BENNU_CRIU");
    if (given && *given) {
        if (access(given, X_OK) < 0)
            return bn_error_set(err, errno, "criu", "cannot run CRIU at %s, which BENNU_CRIU names: %m",
                                given);
        return try_program(given, criu, err);
    }
    struct bn_error first = BN_ERROR_INIT;
    const char *root = cli_build_root();
    char file[PATH_MAX] = "";
    if (root)
        snprintf(file, sizeof(file), "%s/criu/bin/criu", root);
    if (*file && access(file, X_OK) == 0 && try_program(file, criu, &first) == 0)
        return 0;
    if (access(BENNU_PRIVATE_CRIU, X_OK) == 0 && try_program(BENNU_PRIVATE_CRIU, criu, &first) == 0)
        return 0;
    if (try_search_path(criu, &first) == 0)
        return 0;
    if (bn_error_is_set(&first))
        return bn_error_set(err, first.code, first.stage, "%s", first.text);
    return bn_error_set(
        err, ENOENT, "criu",
        "CRIU is not installed: install CRIU 4.0 or newer (package criu), or set BENNU_CRIU to its path");
}

int cli_criu_find_system(struct cli_criu *criu, struct bn_error *err)
{
    *criu = (struct cli_criu){0};
    return try_search_path(criu, err);
}

int cli_criu_plugin_present(const char *dir, struct bn_error *err)
{
    char file[PATH_MAX + 32];
    snprintf(file, sizeof(file), "%s/%s", dir, CLI_PLUGIN_FILE);
    if (access(file, R_OK) == 0)
        return 0;
    return bn_error_set(err, errno, "plugin",
                        "Bennu's CRIU plugin is not at %s (%m): install Bennu, or set BENNU_PLUGIN_DIR",
                        file);
}

int cli_criu_find(struct cli_criu *criu, struct bn_error *err)
{
    int r = cli_criu_find_program(criu, err);
    if (r < 0)
        return r;
    char dir[PATH_MAX];
    cli_plugin_dir(dir);
    if (!realpath(dir, criu->plugin_dir))
        return bn_error_set(
            err, errno, "plugin",
            "the folder of Bennu's CRIU plugin, %s, cannot be read (%m): install Bennu, or set "
            "BENNU_PLUGIN_DIR",
            dir);
    return cli_criu_plugin_present(criu->plugin_dir, err);
}

/* `libdir` in /etc/criu/default.conf goes before CRIU_LIBS_DIR, and then our plugin would silently be left out: a configuration
 * file of our own comes after that one. CRIU inherits the descriptor. */
static int set_config(const struct cli_criu *criu, struct bn_error *err)
{
    const char *users = getenv("CRIU_CONFIG_FILE");
    bn_auto_free void *text = NULL;
    size_t len = 0;
    char path[64];
    if (users && *users && bn_read_file_at(AT_FDCWD, users, 1u << 20, &text, &len) < 0)
        return bn_error_set(err, errno, "criu", "cannot read %s, which CRIU_CONFIG_FILE names: %m", users);
    int fd = memfd_create("bennu-criu-config", 0);
    if (fd < 0 || bn_write_full(fd, text, len) < 0 ||
        dprintf(fd, "%slibdir %s\n%s", len ? "\n" : "", criu->plugin_dir,
                criu->lazy_pages ? "lazy-pages\n" : "") < 0) {
        bn_close(fd);
        return bn_error_set(err, errno, "criu", "cannot write CRIU's configuration: %m");
    }
    snprintf(path, sizeof(path), "/proc/%d/fd/%d", getpid(), fd);
    if (setenv("CRIU_LIBS_DIR", criu->plugin_dir, 1) < 0 || setenv("CRIU_CONFIG_FILE", path, 1) < 0 ||
        setenv("BENNU_RUNDIR", cli_rundir(), 1) < 0 || /* this and the next for the plugin */
        (criu->lazy_pages ? setenv("BENNU_LAZY_PAGES", "1", 1) : unsetenv("BENNU_LAZY_PAGES")) < 0)
        return bn_error_set(err, errno, "criu", "cannot set the environment: %m");
    return 0;
}

int cli_criu_setup(const struct cli_criu *criu, int images, int work, const char *log, struct bn_error *err)
{
    int r = set_config(criu, err);
    if (r < 0)
        return r;
    if (criu_init_opts() < 0 || criu_set_service_binary(criu->path) < 0 || criu_set_log_file(log) < 0)
        return bn_error_set(err, ENOMEM, "criu", "libcriu: out of memory");
    criu_set_images_dir_fd(images);
    criu_set_work_dir_fd(work);
    criu_set_log_level(CRIU_LOG_INFO);
    criu_set_tcp_established(true);
    criu_set_file_locks(true);
    criu_set_ext_unix_sk(true);
    criu_set_shell_job(true);
    criu_set_evasive_devices(true);
    criu_set_link_remap(true);
    criu_set_ghost_limit(GHOST_LIMIT);
    criu_set_manage_cgroups(true);
    criu_set_manage_cgroups_mode(CRIU_CG_MODE_IGNORE);
    return 0;
}

void cli_ignore_signals(bool ignore)
{
    static const int list[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGTSTP, SIGUSR1, SIGUSR2};
    for (size_t i = 0; i < BN_ARRAY_SIZE(list); i++)
        signal(list[i], ignore ? SIG_IGN : SIG_DFL);
}

void cli_hush_libcriu(bool hush)
{
    static FILE *ours, *nobody;
    if (hush) {
        ours = stderr;
        nobody = fopen("/dev/null", "we");
        if (nobody)
            stderr = nobody;
    } else if (nobody) {
        stderr = ours;
        fclose(nobody);
        nobody = NULL;
    }
}

static const struct {
    const char *in_log, *meaning;
} known[] = {
    {"anon_inode:[io_uring]",
     "it uses io_uring, which CRIU cannot save (for libuv programs set UV_USE_IO_URING=0)"},
    {"Can't dump half of stream unix connection", "it has a connected Unix socket to a process outside its "
                                                  "tree: close that connection, or dump both processes"},
    {"Can't dump ghost file", "it has a large deleted file open: CRIU's ghost-limit is too small for it"},
    {"stdin isn't a terminal", "it belongs to a terminal: restore it from one"},
    {"Don't have tty to inherit", "it belongs to a terminal: restore it from one"},
    {"has bad size",
     "a file that it has mapped (a library, say) is no longer the one that it was dumped with"},
    {"bad build-ID", "a library that it has mapped is no longer the one that it was dumped with"},
    {"No space left on device", "the disk is full"},
    {"which is not a session leader", "its session's leader is outside its tree"},
    {"connected TCP socket", "it has an open TCP connection, which CRIU cannot keep here"},
    {"iptables", "CRIU could not lock the network: install iptables or nftables"},
    {"File exists", "a process of it has a pid that is in use already"},
    {"Address already in use",
     "a port of it is in use: by another program, or by connections of its own that the kernel "
     "keeps for a minute after it was killed (TIME_WAIT): try again then"},
};

/* Lines that only say that something failed earlier. */
static bool is_summary(const char *line)
{
    return strstr(line, "FAILED") || strstr(line, "rlimit: Can't setup") || strstr(line, "failed with") ||
           strstr(line, "Restoring FAILED");
}

static const char *after_position(char *line)
{
    /* "(00.012345) Error (criu/sk-unix.c:868): unix: …" */
    char *at = strstr(line, "): ");
    return at ? at + 3 : line;
}

void cli_criu_log_cause(int dir, const char *log, char *out, size_t cap)
{
    bn_auto_free void *text = NULL;
    size_t len;
    out[0] = 0;
    if (bn_read_file_at(dir, log, LOG_MAX, &text, &len) < 0)
        return;
    size_t used = 0;
    unsigned found = 0;
    for (char *save = NULL, *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save)) {
        if (!strstr(line, "Error ("))
            continue;
        for (size_t i = 0; i < BN_ARRAY_SIZE(known); i++) {
            if (strstr(line, known[i].in_log)) {
                snprintf(out, cap, "%s", known[i].meaning);
                return;
            }
        }
        /* The first is the cause; what follows tells its consequences. */
        if (is_summary(line) || found >= 2 || used >= cap)
            continue;
        used += (size_t)snprintf(out + used, cap - used, "%s%s", found ? "; " : "", after_position(line));
        found++;
    }
    cli_clean(out);
}
