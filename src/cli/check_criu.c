/* bennu check: CRIU and the folder of its plugins. */
#include "cli/check.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "cli/setup.h"

#include <ctype.h>
#include <fcntl.h>
#include <string.h>
#include <sys/utsname.h>
#include <sys/wait.h>

#define SOCKETS_VERSION 40200 /* 4.2 */

/* The last line that says something, in place. */
static char *last_line(char *text)
{
    size_t len = strlen(text);
    while (len > 0 && isspace((unsigned char)text[len - 1]))
        text[--len] = 0;
    char *at = strrchr(text, '\n');
    return at ? at + 1 : text;
}

/* Lines of errors, one after the other, at most `cap` bytes. */
static void error_lines(const char *text, char *out, size_t cap)
{
    size_t used = 0;
    out[0] = 0;
    for (const char *at = strstr(text, "Error ("); at && used < cap; at = strstr(at + 1, "Error (")) {
        const char *from = strstr(at, "): ");
        size_t len = strcspn(from ? from + 3 : at, "\n");
        used += (size_t)snprintf(out + used, cap - used, "%s%.*s", used ? "; " : "", (int)len,
                                 from ? from + 3 : at);
    }
}

static void check_criu_itself(const struct cli_criu *criu)
{
    char *argv[] = {(char *)criu->path, "check", NULL};
    bn_auto_free char *out = NULL;
    char why[300] = "";
    if (geteuid() != 0) {
        check_add(CHECK_WARN, "criu check", "run bennu check as root", "not tried");
        return;
    }
    int status = cli_capture(argv, 60000, &out);
    if (status >= 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0) {
        check_add(CHECK_OK, "criu check", "", "%s", out ? last_line(out) : "passed");
        return;
    }
    if (out)
        error_lines(out, why, sizeof(why));
    check_add(CHECK_FAIL, "criu check", "mend what CRIU names", "%s",
              *why          ? why
              : out && *out ? last_line(out)
                            : "failed");
}

/* `libdir` of CRIU's system-wide configuration; false: none. */
static bool configured_libdir(char *out, size_t cap)
{
    bn_auto_free void *text = NULL;
    size_t len;
    if (bn_read_file_at(AT_FDCWD, SETUP_CRIU_CONFIG, 1u << 20, &text, &len) < 0)
        return false;
    return setup_criu_option(text, "libdir", out, cap);
}

static void check_plugin_folder(void)
{
    struct bn_error err = BN_ERROR_INIT;
    char dir[PATH_MAX];
    cli_plugin_dir(dir);
    if (cli_criu_plugin_present(dir, &err) < 0) {
        check_add(CHECK_FAIL, "plugin", "install Bennu, or set BENNU_PLUGIN_DIR", "%s is not in %s",
                  CLI_PLUGIN_FILE, dir);
        return;
    }
    bn_auto_dir DIR *d = opendir(dir);
    char others[200] = "";
    for (struct dirent *e = d ? readdir(d) : NULL; e; e = readdir(d)) {
        size_t len = strlen(e->d_name), used = strlen(others);
        if (len > 3 && strcmp(e->d_name + len - 3, ".so") == 0 && strcmp(e->d_name, CLI_PLUGIN_FILE) != 0)
            snprintf(others + used, sizeof(others) - used, "%s%s", used ? " " : "", e->d_name);
    }
    if (strstr(others, "cuda_plugin"))
        check_add(CHECK_FAIL, "plugin",
                  "take it away: CRIU asks one plugin only, and which is a matter of chance",
                  "%s has CRIU's own cuda_plugin.so beside Bennu's", dir);
    else if (*others)
        check_add(CHECK_WARN, "plugin", "a folder of its own is safer", "%s also holds %s", dir, others);
    else
        check_add(CHECK_OK, "plugin", "", "%s/%s", dir, CLI_PLUGIN_FILE);
}

/* In a folder that CRIU is not told to use. */
static const char *idle_stock_plugin(const char *used)
{
    static const char *const places[] = {"/usr/lib/criu", "/usr/local/lib/criu", "/usr/lib64/criu"};
    char file[64];
    for (size_t i = 0; i < BN_ARRAY_SIZE(places); i++) {
        snprintf(file, sizeof(file), "%s/cuda_plugin.so", places[i]);
        if (strcmp(places[i], used) != 0 && access(file, F_OK) == 0)
            return places[i];
    }
    return NULL;
}

/* Where podman, runc and a plain `criu` look: which plugin acts there is another question than in bennu's own commands. */
static void check_system_folder(void)
{
    static const char *const usual[] = {"/usr/lib/criu", "/usr/local/lib/criu", "/usr/lib64/criu"};
    char dir[PATH_MAX] = "", file[PATH_MAX + 32];
    bool configured = configured_libdir(dir, sizeof(dir));
    for (size_t i = 0; !configured && i < BN_ARRAY_SIZE(usual) && !*dir; i++) {
        if (access(usual[i], F_OK) == 0)
            snprintf(dir, sizeof(dir), "%s", usual[i]);
    }
    snprintf(file, sizeof(file), "%s/%s", dir, CLI_PLUGIN_FILE);
    bool ours = *dir && access(file, F_OK) == 0;
    snprintf(file, sizeof(file), "%s/cuda_plugin.so", dir);
    bool stock = *dir && access(file, F_OK) == 0;
    struct cli_criu criu;
    struct bn_error err = BN_ERROR_INIT;
    bool too_old = ours && cli_criu_find_system(&criu, &err) < 0 && bn_error_is_set(&err);
    const char *from = configured ? " (/etc/criu/default.conf)" : "";
    if (too_old)
        check_add(CHECK_FAIL, "system plugins",
                  "with Bennu's plugin it fails at every checkpoint: run 'bennu install' again", "%s%s: %s",
                  dir, from, err.text);
    else if (ours && stock)
        check_add(CHECK_FAIL, "system plugins",
                  "run 'bennu install', which chooses one: cuda_plugin.so hides Bennu's from podman and criu",
                  "%s%s holds both plugins", dir, from);
    else if (stock)
        check_add(
            CHECK_WARN, "system plugins",
            "podman and plain criu use that one, bennu's own commands do not; 'bennu install' changes that",
            "%s%s holds CRIU's own cuda_plugin.so", dir, from);
    else if (ours && idle_stock_plugin(dir))
        check_add(
            CHECK_OK, "system plugins", "",
            "%s%s: podman and plain criu use Bennu's, too; CRIU's own cuda_plugin.so in %s does not act", dir,
            from, idle_stock_plugin(dir));
    else if (ours)
        check_add(CHECK_OK, "system plugins", "", "%s%s: podman and plain criu use Bennu's, too", dir, from);
    else
        check_add(
            CHECK_OK, "system plugins", "",
            "none: podman and plain criu save no GPU memory, bennu's own commands do; 'bennu install' puts "
            "Bennu's there");
}

/* Since 6.16 the kernel tells SO_PASSCRED and SO_PASSSEC of Unix sockets only; CRIU before 4.2 takes that for a failure
 * ("Can't get 1:16 opt: Operation not supported"). */
static bool kernel_hides_passcred(void)
{
    struct utsname name;
    unsigned major = 0, minor = 0;
    return uname(&name) == 0 && sscanf(name.release, "%u.%u", &major, &minor) == 2 &&
           (major > 6 || (major == 6 && minor >= 16));
}

void check_criu(void)
{
    struct cli_criu criu;
    struct bn_error err = BN_ERROR_INIT;
    if (cli_criu_find_program(&criu, &err) < 0) {
        check_add(CHECK_FAIL, "criu", "", "%s", err.text);
    } else {
        char version[24];
        cli_version_text(criu.version, version);
        if (criu.version < SOCKETS_VERSION && kernel_hides_passcred())
            check_add(CHECK_WARN, "criu", "install CRIU 4.2 or newer",
                      "%s at %s cannot dump programs with network sockets on this kernel", version,
                      criu.path);
        else
            check_add(CHECK_OK, "criu", "", "%s at %s", version, criu.path);
        check_criu_itself(&criu);
    }
    check_plugin_folder();
    check_system_folder();
}
