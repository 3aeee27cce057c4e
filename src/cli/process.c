#include "cli/cli.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/proc.h"

#include <ctype.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define CAPTURE_MAX 65536u

/* Read until the end of the stream or `deadline`. */
static int read_output(int fd, uint64_t deadline, char *buf)
{
    size_t len = 0;
    for (;;) {
        uint64_t now = bn_now_ns();
        struct pollfd p = {.fd = fd, .events = POLLIN};
        int r = now >= deadline ? 0 : poll(&p, 1, (int)((deadline - now) / 1000000) + 1);
        if (r < 0 && errno == EINTR)
            continue;
        if (r <= 0)
            return -ETIMEDOUT;
        char spill[4096];
        bool full = len + 1 >= CAPTURE_MAX;
        ssize_t n = read(fd, full ? spill : buf + len, full ? sizeof(spill) : CAPTURE_MAX - 1 - len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return 0;
        if (!full)
            len += (size_t)n;
        buf[len] = 0;
    }
}

static int wait_for(pid_t child)
{
    int status;
    while (waitpid(child, &status, 0) < 0) {
        if (errno != EINTR)
            return -errno;
    }
    return status;
}

/* Fork with both outputs to a pipe. In the child returns 0; in the parent the child's pid. */
static pid_t fork_captured(int *out)
{
    int ends[2];
    fflush(NULL);
    if (pipe2(ends, O_CLOEXEC) < 0)
        return -errno;
    pid_t child = fork();
    if (child == 0) {
        int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
        dup2(null, STDIN_FILENO);
        dup2(ends[1], STDOUT_FILENO);
        dup2(ends[1], STDERR_FILENO);
        return 0;
    }
    int saved = errno;
    close(ends[1]);
    if (child < 0) {
        close(ends[0]);
        return -saved;
    }
    *out = ends[0];
    return child;
}

static int collect(pid_t child, int fd, unsigned timeout_ms, char **out)
{
    bn_auto_free char *buf = calloc(1, CAPTURE_MAX);
    int r = buf ? read_output(fd, bn_now_ns() + timeout_ms * 1000000ull, buf) : -ENOMEM;
    close(fd);
    if (r < 0)
        kill(child, SIGKILL);
    int status = wait_for(child);
    if (r < 0)
        return r;
    if (out)
        *out = BN_TAKE_PTR(buf);
    return status;
}

int cli_capture(char *const argv[], unsigned timeout_ms, char **out)
{
    int fd = -1;
    pid_t child = fork_captured(&fd);
    if (child < 0)
        return child;
    if (child == 0) {
        execvp(argv[0], argv);
        _exit(errno == ENOENT ? CLI_NOT_FOUND : CLI_CANNOT_EXEC);
    }
    return collect(child, fd, timeout_ms, out);
}

int cli_in_child(int (*fn)(void *arg), void *arg, char **out)
{
    int fd = -1;
    pid_t child = fork_captured(&fd);
    if (child < 0)
        return child;
    if (child == 0) {
        int code = fn(arg);
        fflush(NULL);
        _exit(code);
    }
    int status = collect(child, fd, 30000, out);
    if (status < 0)
        return status;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -ECHILD;
}

static int load_driver(void *arg)
{
    const char *given = getenv("BENNU_DRIVER");
    return dlopen(given && *given ? given : "libcuda.so.1", RTLD_LAZY | RTLD_LOCAL) ? 0 : 1;
}

bool cli_have_driver(void)
{
    return cli_in_child(load_driver, NULL, NULL) == 0;
}

int cli_parse_pid(const char *text, pid_t *pid)
{
    char *end;
    errno = 0;
    long v = strtol(text, &end, 10);
    if (errno || *end || !isdigit((unsigned char)text[0]) || v < 1 || v > INT_MAX)
        return -EINVAL;
    *pid = (pid_t)v;
    return 0;
}

int cli_need_root(struct bn_error *err)
{
    return geteuid() == 0 ? 0 : bn_error_set(err, EPERM, "permission", "this needs root: run it with sudo");
}

static int check_owner(pid_t pid, struct bn_error *err)
{
    char path[32];
    struct stat st;
    snprintf(path, sizeof(path), "/proc/%d", pid);
    if (stat(path, &st) < 0)
        return bn_error_set(err, ESRCH, "process", "there is no process %d", pid);
    if (geteuid() != 0 && st.st_uid != geteuid()) {
        struct passwd *owner = getpwuid(st.st_uid);
        return bn_error_set(err, EPERM, "permission",
                            "process %d belongs to %s, not to you: run this with sudo", pid,
                            owner ? owner->pw_name : "another user");
    }
    return cli_need_root(err);
}

/* CRIU stops every process below `pid`; if we were among them nobody would wake them. */
static int check_not_ourselves(pid_t pid, struct bn_error *err)
{
    if (pid == getpid())
        return bn_error_set(err, EINVAL, "process", "process %d is this command itself", pid);
    bn_auto_free pid_t *tree = NULL;
    size_t n;
    int r = bn_proc_tree(pid, &tree, &n);
    for (size_t i = 0; r == 0 && i < n; i++) {
        if (tree[i] == getpid())
            return bn_error_set(
                err, EINVAL, "process",
                "this command itself runs below process %d, which would be stopped with all its children: "
                "run it from another shell",
                pid);
    }
    return 0;
}

static pid_t thread_group(pid_t pid)
{
    char path[32];
    bn_auto_free void *text = NULL;
    size_t len;
    snprintf(path, sizeof(path), "/proc/%d/status", pid);
    if (bn_read_file_at(AT_FDCWD, path, 65536, &text, &len) < 0)
        return -1;
    const char *at = strstr(text, "\nTgid:");
    return at ? (pid_t)strtol(at + strlen("\nTgid:"), NULL, 10) : -1;
}

int cli_check_process(pid_t pid, bool stops, struct bn_error *err)
{
    char state;
    if (bn_proc_state(pid, &state) < 0)
        return bn_error_set(err, ESRCH, "process", "there is no process %d", pid);
    int r = check_owner(pid, err);
    if (r == 0 && stops)
        r = check_not_ourselves(pid, err);
    if (r < 0)
        return r;
    pid_t group = thread_group(pid), tracer = 0;
    if (group > 0 && group != pid)
        return bn_error_set(err, EINVAL, "process", "%d is a thread of process %d: name the process", pid,
                            group);
    if (state == 'Z' || state == 'X')
        return bn_error_set(err, ESRCH, "process",
                            "process %d has ended already; its parent has not collected it yet", pid);
    if (pid == 1)
        return bn_error_set(err, EINVAL, "process", "process 1 is the system itself");
    if (stops && bn_proc_tracer(pid, &tracer) == 0 && tracer != 0)
        return bn_error_set(err, EBUSY, "process",
                            "process %d is traced by process %d: detach that debugger first", pid, tracer);
    return 0;
}

static uint64_t status_kb(const char *text, const char *key)
{
    const char *at = strstr(text, key);
    return at ? strtoull(at + strlen(key), NULL, 10) : 0;
}

uint64_t cli_tree_memory(pid_t root)
{
    bn_auto_free pid_t *tree = NULL;
    size_t n = 0;
    uint64_t kb = 0;
    if (bn_proc_tree(root, &tree, &n) < 0)
        return 0;
    for (size_t i = 0; i < n; i++) {
        char path[32];
        bn_auto_free void *text = NULL;
        size_t len;
        snprintf(path, sizeof(path), "/proc/%d/status", tree[i]);
        if (bn_read_file_at(AT_FDCWD, path, 65536, &text, &len) == 0)
            kb += status_kb(text, "\nRssAnon:") + status_kb(text, "\nVmSwap:");
    }
    return kb * 1024;
}
