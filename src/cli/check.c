/* bennu check: is this machine fit? One line for each thing, with what to do. */
#include "cli/check.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/statvfs.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <sys/wait.h>

static bool json;

static const struct cli_option options[] = {
    {"json", 'j', CLI_FLAG, NULL, &json, "print the result as one JSON object"},
    {0},
};

static json_t *lines;
static enum check_level worst;
static const char *const level_name[] = {"ok", "warn", "fail"};

void check_add(enum check_level level, const char *name, const char *todo, const char *fmt, ...)
{
    char found[600];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(found, sizeof(found), fmt, ap);
    va_end(ap);
    cli_clean(found);
    if (level > worst)
        worst = level;
    json_t *text = json_string(found);
    json_array_append_new(lines, json_pack("{s:s, s:s, s:o, s:s}", "level", level_name[level], "name", name,
                                           "found", text ? text : json_string("?"), "todo", todo));
    if (json)
        return;
    printf("%-6s %-17s %s%s%s\n",
           level == CHECK_OK     ? "[ok]"
           : level == CHECK_WARN ? "[warn]"
                                 : "[fail]",
           name, found, *todo ? ": " : "", todo);
    fflush(stdout);
}

/* --- kernel -------------------------------------------------------------------------------------------------------- */

static const struct {
    const char *option;
    enum check_level without;
} kernel_options[] = {
    {"CHECKPOINT_RESTORE", CHECK_FAIL},
    {"NAMESPACES", CHECK_FAIL},
    {"PID_NS", CHECK_FAIL},
    {"FHANDLE", CHECK_FAIL},
    {"EVENTFD", CHECK_FAIL},
    {"EPOLL", CHECK_FAIL},
    {"MEMFD_CREATE", CHECK_FAIL},
    {"UNIX_DIAG", CHECK_WARN},
    {"INET_DIAG", CHECK_WARN},
    {"INET_UDP_DIAG", CHECK_WARN},
    {"PACKET_DIAG", CHECK_WARN},
    {"NETLINK_DIAG", CHECK_WARN},
    {"INOTIFY_USER", CHECK_WARN},
};

/* The running kernel's configuration; caller frees. NULL: it is nowhere. */
static char *kernel_config(const char *release)
{
    char path[160];
    void *text = NULL;
    size_t len;
    if (access("/proc/config.gz", R_OK) == 0) {
        char *argv[] = {"sh", "-c", "gzip -dc /proc/config.gz | grep =", NULL};
        char *out = NULL;
        /* Cut to what cli_capture keeps; the options sought would be lost beyond it, so only they are asked for. */
        argv[2] =
            "gzip -dc /proc/config.gz | grep -E "
            "'^CONFIG_(CHECKPOINT_RESTORE|NAMESPACES|PID_NS|FHANDLE|EVENTFD|EPOLL|MEMFD_CREATE|[A-Z_]*_DIAG|"
            "INOTIFY_USER)='";
        if (cli_capture(argv, 10000, &out) == 0)
            return out;
        free(out);
    }
    static const char *const places[] = {"/boot/config-%s", "/lib/modules/%s/config",
                                         "/usr/lib/modules/%s/config"};
    for (size_t i = 0; i < BN_ARRAY_SIZE(places); i++) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        snprintf(path, sizeof(path), places[i], release);
#pragma GCC diagnostic pop
        if (bn_read_file_at(AT_FDCWD, path, 4u << 20, &text, &len) == 0)
            return text;
    }
    return NULL;
}

static bool has_option(const char *config, const char *option)
{
    char line[64];
    snprintf(line, sizeof(line), "CONFIG_%s=", option);
    for (const char *at = strstr(config, line); at; at = strstr(at + 1, line)) {
        if (at == config || at[-1] == '\n')
            return true;
    }
    return false;
}

static void check_kernel_options(const char *release)
{
    bn_auto_free char *config = kernel_config(release);
    char missing[400] = "";
    enum check_level level = CHECK_OK;
    if (!config) {
        /* It exists if and only if the kernel has CHECKPOINT_RESTORE and PID_NS. */
        if (access("/proc/sys/kernel/ns_last_pid", F_OK) == 0)
            check_add(CHECK_OK, "kernel options", "",
                      "CHECKPOINT_RESTORE; the others are not told (no /proc/config.gz)");
        else
            check_add(CHECK_FAIL, "kernel options", "use a kernel with CONFIG_CHECKPOINT_RESTORE=y",
                      "CHECKPOINT_RESTORE is missing");
        return;
    }
    for (size_t i = 0; i < BN_ARRAY_SIZE(kernel_options); i++) {
        size_t used = strlen(missing);
        if (has_option(config, kernel_options[i].option))
            continue;
        snprintf(missing + used, sizeof(missing) - used, "%s%s", used ? " " : "", kernel_options[i].option);
        if (kernel_options[i].without > level)
            level = kernel_options[i].without;
    }
    if (level == CHECK_OK)
        check_add(CHECK_OK, "kernel options", "", "all that CRIU needs");
    else
        check_add(level, "kernel options",
                  level == CHECK_FAIL ? "use a kernel that has them"
                                      : "programs that use such sockets cannot be saved",
                  "missing: %s", missing);
}

void check_kernel(void)
{
    struct utsname u;
    unsigned major = 0, minor = 0;
    uname(&u);
    bool known = sscanf(u.release, "%u.%u", &major, &minor) == 2;
    /* pidfd_getfd(2) came with 5.6, CAP_CHECKPOINT_RESTORE and what CRIU 4 wants with 5.9. */
    if (known && (major > 5 || (major == 5 && minor >= 9)))
        check_add(CHECK_OK, "kernel", "", "%s", u.release);
    else
        check_add(CHECK_FAIL, "kernel", "use Linux 5.9 or newer", "%s", u.release);
    check_kernel_options(u.release);
}

/* --- permissions --------------------------------------------------------------------------------------------------- */

/* What CRIU uses as root (capabilities(7), numbers of linux/capability.h). */
static const struct {
    unsigned number;
    const char *name;
    bool vital;
} capabilities[] = {
    {0, "chown"},
    {1, "dac_override"},
    {3, "fowner"},
    {5, "kill"},
    {6, "setgid"},
    {7, "setuid"},
    {8, "setpcap"},
    {12, "net_admin"},
    {18, "sys_chroot"},
    {19, "sys_ptrace", true},
    {21, "sys_admin", true},
    {24, "sys_resource"},
    {27, "mknod"},
    {40, "checkpoint_restore", true},
};

static void check_permissions(void)
{
    bn_auto_free void *text = NULL;
    size_t len;
    unsigned long long effective = 0;
    char missing[200] = "";
    bool vital = false;
    if (bn_read_file_at(AT_FDCWD, "/proc/self/status", 65536, &text, &len) == 0) {
        const char *at = strstr(text, "CapEff:");
        effective = at ? strtoull(at + strlen("CapEff:"), NULL, 16) : 0;
    }
    for (size_t i = 0; i < BN_ARRAY_SIZE(capabilities); i++) {
        size_t used = strlen(missing);
        if (effective >> capabilities[i].number & 1)
            continue;
        snprintf(missing + used, sizeof(missing) - used, "%s%s", used ? " " : "", capabilities[i].name);
        vital = vital || capabilities[i].vital;
    }
    if (geteuid() != 0)
        check_add(CHECK_FAIL, "permissions", "run bennu as root", "not root");
    else if (*missing)
        check_add(vital ? CHECK_FAIL : CHECK_WARN, "permissions",
                  vital ? "give them to this container or service"
                        : "some programs cannot be restored without",
                  "root without the capabilities: %s", missing);
    else
        check_add(CHECK_OK, "permissions", "", "root with every capability needed");
}

static void check_ptrace_scope(void)
{
    bn_auto_free void *text = NULL;
    size_t len;
    if (bn_read_file_at(AT_FDCWD, "/proc/sys/kernel/yama/ptrace_scope", 64, &text, &len) < 0)
        check_add(CHECK_OK, "ptrace", "", "not restricted by Yama");
    else if (atoi(text) >= 3)
        check_add(CHECK_FAIL, "ptrace", "set kernel.yama.ptrace_scope to 2 or less and restart the machine",
                  "kernel.yama.ptrace_scope is %d: no process may be traced, not even by root", atoi(text));
    else
        check_add(CHECK_OK, "ptrace", "", "kernel.yama.ptrace_scope is %d", atoi(text));
}

static void check_room(void)
{
    struct sysinfo s;
    struct statvfs vfs;
    char a[16], b[16];
    if (sysinfo(&s) == 0) {
        uint64_t is_free = ((uint64_t)s.freeram + s.bufferram) * s.mem_unit,
                 all = (uint64_t)s.totalram * s.mem_unit;
        bn_auto_free void *text = NULL;
        size_t len;
        const char *at = NULL;
        if (bn_read_file_at(AT_FDCWD, "/proc/meminfo", 65536, &text, &len) == 0)
            at = strstr(text, "MemAvailable:");
        if (at)
            is_free = strtoull(at + strlen("MemAvailable:"), NULL, 10) * 1024;
        bool low = is_free < all / 20;
        check_add(low ? CHECK_WARN : CHECK_OK, "memory",
                  low ? "suspended GPU memory goes to the host: free some" : "", "%s of %s available",
                  cli_bytes(is_free, a), cli_bytes(all, b));
    }
    if (statvfs(".", &vfs) == 0) {
        uint64_t is_free = (uint64_t)vfs.f_bavail * vfs.f_frsize;
        bool low = is_free < 1000000000;
        check_add(low ? CHECK_WARN : CHECK_OK, "disk", low ? "name another place for checkpoints" : "",
                  "%s free in the working directory", cli_bytes(is_free, a));
    }
}

static int check(int argc, char **argv)
{
    lines = json_array();
    if (!lines)
        return CLI_FAILED;
    check_kernel();
    check_permissions();
    check_ptrace_scope();
    check_criu();
    check_container();
    check_gpu();
    check_room();
    if (json)
        cli_print_json(json_pack("{s:b, s:s, s:O}", "ok", worst < CHECK_FAIL, "worst", level_name[worst],
                                 "checks", lines));
    json_decref(lines);
    return worst < CHECK_FAIL ? CLI_OK : CLI_FAILED;
}

const struct cli_command cli_check = {
    .name = "check",
    .operands = "",
    .summary = "Say whether this machine is fit, and what to do if it is not",
    .options = options,
    .min = 0,
    .max = 0,
    .needed = "it takes none",
    .run = check,
};
