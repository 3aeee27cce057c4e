/* Reaching the daemon from within CRIU, and starting a private one where none runs. */
#include "criu/plugin.h"

#include "base/cleanup.h"
#include "config.h"
#include "criu/criu_abi.h"
#include "wire/control.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>

/* Out of the way of the numbers that CRIU's callers name (--inherit-fd) and of standard streams that were closed. */
#define SOCKET_NUMBER_MIN 128
#define FIRST_FREE_IN_DAEMON 5

const char *bnp_own_folder(void)
{
    static char folder[PATH_MAX];
    Dl_info info;
    if (dladdr(&folder, &info) == 0 || !info.dli_fname || !realpath(info.dli_fname, folder))
        return "";
    char *slash = strrchr(folder, '/');
    if (slash)
        *slash = 0;
    return folder;
}

static const char *daemon_path(void)
{
    const char *path = secure_getenv("BENNU_BENNUD");
    if (path && *path)
        return path;
    const char *folder = bnp_own_folder();
    size_t len = strlen(BENNU_BUILDDIR);
    if (strncmp(folder, BENNU_BUILDDIR, len) == 0 && folder[len] == '/')
        return BENNU_BUILDDIR "/src/daemon/bennud";
    return BENNU_DAEMON_PATH;
}

static void close_from(unsigned first)
{
#ifdef SYS_close_range
    if (syscall(SYS_close_range, first, ~0u, 0) == 0)
        return;
#endif
    for (unsigned fd = first; fd < 65536; fd++)
        close((int)fd);
}

/* In the daemon-to-be: standard streams, the connection as 3, the pipe that tells of a failed exec as 4; nothing else of CRIU's,
 * whose descriptors keep images, sockets and namespaces alive. */
static void arrange_descriptors(int sock, int report)
{
    int log = log_get_fd ? log_get_fd() : STDERR_FILENO;
    int null = open("/dev/null", O_RDWR);
    int from[5] = {null, log >= 0 ? log : null, log >= 0 ? log : null, sock, report};
    for (int i = 0; i < 5; i++)
        from[i] = fcntl(from[i], F_DUPFD_CLOEXEC, 16);
    for (int i = 0; i < 5; i++) {
        if (from[i] < 0)
            close(i);
        else
            dup3(from[i], i, i == 4 ? O_CLOEXEC : 0);
    }
    close_from(FIRST_FREE_IN_DAEMON);
}

__attribute__((noreturn)) static void become_daemon(const char *path, int sock, int report)
{
    arrange_descriptors(sock, report);
    for (int sig = 1; sig < NSIG; sig++)
        signal(sig, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (chdir("/") < 0) {
        /* It then keeps CRIU's folder busy, which is no reason to fail a dump. */
    }
    execl(path, "bennud", "--private", "3", (char *)NULL);
    int code = errno;
    ssize_t n = write(4, &code, sizeof(code));
    _exit(n == sizeof(code) ? 127 : 126);
}

/* Twice forked, so that it is a child of init and not of CRIU: CRIU waits for children that it does not know. SIGCHLD is held
 * back and swallowed, so that CRIU's handler never hears of the one in between. */
static int spawn(const char *path, int sock, int report)
{
    sigset_t chld, old, pending;
    sigemptyset(&chld);
    sigaddset(&chld, SIGCHLD);
    sigprocmask(SIG_BLOCK, &chld, &old);
    sigpending(&pending);
    bool was_pending = sigismember(&pending, SIGCHLD) == 1;
    int r = 0;
    pid_t pid = fork();
    if (pid < 0)
        r = -errno;
    if (pid == 0) {
        setsid();
        pid_t daemon = fork();
        if (daemon == 0)
            become_daemon(path, sock, report);
        _exit(daemon < 0 ? 1 : 0);
    }
    if (pid > 0) {
        int status = 0;
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
            continue;
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
            r = -EAGAIN;
        struct timespec now = {0, 0};
        if (!was_pending)
            sigtimedwait(&chld, NULL, &now);
    }
    sigprocmask(SIG_SETMASK, &old, NULL);
    return r;
}

static int start_private(struct bn_error *err)
{
    const char *path = daemon_path();
    int pair[2], pipes[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return bn_error_set(err, errno, "daemon", "cannot make a socket: %m");
    bn_auto_fd ours = pair[0], theirs = pair[1];
    if (pipe2(pipes, O_CLOEXEC) < 0)
        return bn_error_set(err, errno, "daemon", "cannot make a pipe: %m");
    bn_auto_fd report = pipes[0], report_end = pipes[1];

    int r = spawn(path, theirs, report_end);
    report_end = bn_close(report_end);
    theirs = bn_close(theirs);
    if (r < 0)
        return bn_error_set(err, r, "daemon", "cannot start %s: %s", path, strerror(-r));
    int code = 0;
    ssize_t n;
    do
        n = read(report, &code, sizeof(code));
    while (n < 0 && errno == EINTR);
    if (n == sizeof(code) && code > 0)
        return bn_error_set(
            err, code, "daemon",
            "bennud does not run and %s cannot be started (%s): start bennud, or name its program in "
            "the environment variable BENNU_BENNUD",
            path, strerror(code));
    bnp_log(BNP_INFO, "started a private %s", path);
    return BN_TAKE_FD(ours);
}

int bnp_daemon_open(struct bn_error *err)
{
    struct bn_error refused = BN_ERROR_INIT;
    int fd = bn_ctl_connect(NULL, &refused);
    if (fd == -ENOENT || fd == -ECONNREFUSED) {
        fd = start_private(err);
    } else if (fd < 0) {
        *err = refused;
    }
    if (fd < 0)
        return fd;
    int high = fcntl(fd, F_DUPFD_CLOEXEC, SOCKET_NUMBER_MIN);
    if (high < 0)
        return fd;
    bn_close(fd);
    return high;
}

void bnp_set_deadline(int sock, int seconds)
{
    struct timeval tv = {.tv_sec = seconds};
    setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv));
}

int bnp_call_fds(int sock, unsigned type, const unsigned *args, int nargs, const int *fds, size_t nfds,
                 unsigned *out, struct bn_error *err)
{
    bn_auto_free void *buf = malloc(BN_CTL_MSG_MAX);
    bn_auto_writer body = {0};
    if (!buf)
        return bn_error_set(err, ENOMEM, "daemon", "out of memory");
    for (int i = 0; i < nargs; i++)
        bn_write_u32(&body, args[i]);
    struct bn_reader reply;
    /* An agent that gives back zero pages while its process is stopped must come to its end first. */
    bool may_stop = type != BN_CTL_DUMP_PURGE && type != BN_CTL_DUMP_THREAD;
    if (may_stop && bnp_cancelled())
        return bn_error_set(err, ECANCELED, "cancel", "bennu was told to stop");
    int r = bn_ctl_send(sock, (uint16_t)type, false, NULL, &body, fds, nfds);
    if (r < 0)
        return bn_error_set(err, r, "daemon", "cannot send to bennud: %s", strerror(-r));
    if (may_stop && bnp_cancelled_before_answer(sock)) {
        /* Cancels it in the daemon. Unless its answer is here already: then it counts, since the daemon goes by having sent it. */
        shutdown(sock, SHUT_RDWR);
        if (bn_ctl_answer(sock, (uint16_t)type, NULL, NULL, buf, &reply, NULL) < 0)
            return bn_error_set(err, ECANCELED, "cancel", "bennu was told to stop");
    } else if ((r = bn_ctl_answer(sock, (uint16_t)type, NULL, NULL, buf, &reply, err)) < 0) {
        return r;
    }
    if (!out)
        return 0;
    uint32_t value = bn_read_u32(&reply);
    if (reply.failed)
        return bn_error_set(err, EBADMSG, "daemon",
                            "bennud's answer is too short: are plugin and daemon of one version?");
    *out = value;
    return 0;
}

int bnp_call(int sock, unsigned type, const unsigned *args, int nargs, int fd, unsigned *out,
             struct bn_error *err)
{
    return bnp_call_fds(sock, type, args, nargs, &fd, fd >= 0 ? 1 : 0, out, err);
}
