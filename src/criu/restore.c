/* The plugin's part of a restore. The daemon starts loading GPU memory in init(), before CRIU has forked anything. A process can
 * take its GPU state back only when it runs, which is after CRIU has let go of it; CRIU's own way out (exit) comes then, but
 * with a restore in the foreground only after the processes have ended. So a thread watches for the moment. */
#include "criu/plugin.h"

#include "base/cleanup.h"
#include "base/proc.h"
#include "criu/criu_abi.h"
#include "image/manifest.h"
#include "wire/control.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>

#define FAILED_END_SECONDS 5
#define COLLECT_MS 10000
#define LAZY_PAGES_SOCKET "lazy-pages.socket" /* CRIU's name for it */
#define STILL_RESTORING 1                     /* no value that CRIU hands to exit() */

struct task {
    pid_t pid;
    int pidfd;
};

static struct {
    int sock; /* -1: no session */
    struct task *tasks;
    size_t n, cap;
    bool watching;
    pthread_t watcher;
    atomic_bool given_up; /* CRIU is left to fail on its own */
    atomic_int criu_result;
    int result; /* of RESTORE_END, by the watcher */
    struct bn_error err;
} rst = {.sock = -1};

/* --- does this image need us? --- */

static bool has_file(int dir, const char *name)
{
    return dir >= 0 && faccessat(dir, name, F_OK, 0) == 0;
}

/* CRIU answers yes to any name for images of before 4.1, which have no list of plugins. */
static bool listed(const char *name)
{
    static const char nobody[] = "bennu: no such plugin";
    if (!check_and_remove_inventory_plugin || check_and_remove_inventory_plugin(nobody, sizeof(nobody) - 1))
        return false;
    return check_and_remove_inventory_plugin(name, strlen(name));
}

static bool stock_plugin_present(void)
{
    char path[4200];
    snprintf(path, sizeof(path), "%s/cuda_plugin.so", bnp_own_folder());
    return access(path, F_OK) == 0;
}

static int fail(const char *what, const struct bn_error *err)
{
    bnp_log(BNP_ERROR, "%s: %s: %s", what, err->stage, err->text);
    return err->code > 0 ? -err->code : -EIO;
}

/* bennu(1) runs CRIU with "lazy-pages": CRIU will connect to a socket of that name in its working directory, in which it is now. The
 * daemon is to take that. */
static int lazy_pages_socket(struct bn_error *err)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX, .sun_path = LAZY_PAGES_SOCKET};
    bn_auto_fd sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (sock < 0 || bind(sock, (struct sockaddr *)&name, sizeof(name)) < 0 || listen(sock, 1) < 0)
        return bn_error_set(err, errno, "host-memory", "cannot make " LAZY_PAGES_SOCKET ": %m");
    return BN_TAKE_FD(sock);
}

static int begin(int dir, unsigned flags)
{
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_fd sock = bnp_daemon_open(&err);
    if (sock < 0)
        return fail("this image holds GPU state", &err);
    bool lazy = getenv("BENNU_LAZY_PAGES") && !(flags & BN_CTL_F_STOCK_IMAGE);
    bn_auto_fd pages = lazy ? lazy_pages_socket(&err) : -1;
    if (lazy && pages < 0)
        return fail("cannot restore host memory", &err);
    unsigned processes = 0;
    if (bnp_call_fds(sock, BN_CTL_RESTORE_BEGIN, &flags, 1, (int[]){dir, pages}, lazy ? 2 : 1, &processes,
                     &err) < 0)
        return fail("cannot restore the GPU state", &err);
    /* An image of the stock plugin: nobody knows before the processes are there. */
    if (processes > 0 || flags & BN_CTL_F_STOCK_IMAGE)
        rst.sock = BN_TAKE_FD(sock);
    return 0;
}

int bnp_restore_init(void)
{
    atomic_store(&rst.criu_result, STILL_RESTORING);
    atomic_store(&rst.given_up, false);
    int dir = criu_get_image_dir ? criu_get_image_dir() : -1;
    bool ours = listed("bennu"), manifest = has_file(dir, BN_MANIFEST_NAME);
    if (manifest)
        return begin(dir, 0);
    if (ours) {
        bnp_log(BNP_ERROR, "the image was made with Bennu but has no " BN_MANIFEST_NAME
                           ": its dump failed, or not all of its files were copied");
        return -ENOENT;
    }
    if (stock_plugin_present() || !listed("cuda_plugin"))
        return 0;
    bnp_log(BNP_INFO, "the image was made with CRIU's own CUDA plugin; restoring it in its place");
    return begin(dir, BN_CTL_F_STOCK_IMAGE);
}

/* --- the restored processes --- */

static void kill_tasks(void)
{
    for (size_t i = 0; i < rst.n; i++)
        if (rst.tasks[i].pidfd >= 0)
            syscall(SYS_pidfd_send_signal, rst.tasks[i].pidfd, SIGKILL, NULL, 0);
}

/* For tasks that CRIU still traces, on its main thread. When it finds out it waits for the first process of a pid namespace, and
 * for that one alone; the kernel lets that process end only after all others of the namespace have been collected, and a
 * thread that is traced is for its tracer to collect. So it is done here; the first process itself is left to CRIU. */
static void kill_traced_tasks(void)
{
    pid_t root = rst.n > 0 ? rst.tasks[0].pid : 0, inner = 0;
    bool first = root > 0 && bn_proc_inner_pid(root, &inner) == 0 && inner == 1;
    kill_tasks();
    for (int i = 0; first && i < COLLECT_MS; i++) {
        siginfo_t ended = {0};
        while (waitid(P_ALL, 0, &ended, WEXITED | WNOHANG | WNOWAIT | __WALL) == 0 && ended.si_pid > 0) {
            if (ended.si_pid == root)
                return;
            waitpid(ended.si_pid, NULL, __WALL);
            ended.si_pid = 0;
        }
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

static int remember(pid_t pid)
{
    if (rst.n == rst.cap) {
        size_t cap = rst.cap ? 2 * rst.cap : 16;
        struct task *grown = realloc(rst.tasks, cap * sizeof(*grown));
        if (!grown)
            return -ENOMEM;
        rst.tasks = grown;
        rst.cap = cap;
    }
    int pidfd = bn_pidfd_open(pid);
    if (pidfd < 0)
        return pidfd;
    rst.tasks[rst.n++] = (struct task){pid, pidfd};
    return 0;
}

/* Each thread has a tracer of its own; CRIU lets go of the first one first. */
static bool task_held_by_criu(pid_t pid)
{
    char folder[64];
    snprintf(folder, sizeof(folder), "/proc/%d/task", pid);
    bn_auto_dir DIR *d = opendir(folder);
    bool held = false;
    for (struct dirent *e; d && !held && (e = readdir(d)) != NULL;) {
        pid_t tracer = 0;
        held = bn_proc_tracer(atoi(e->d_name), &tracer) == 0 && tracer == getpid();
    }
    return held;
}

/* CRIU lets the processes go one by one, after RESUME_DEVICES_LATE has been called for every one. */
static bool held_by_criu(void)
{
    for (size_t i = 0; i < rst.n; i++)
        if (task_held_by_criu(rst.tasks[i].pid))
            return true;
    return false;
}

static int end_session(int criu_result)
{
    unsigned arg = (unsigned)criu_result;
    if (criu_result != 0)
        bnp_set_deadline(rst.sock, FAILED_END_SECONDS);
    return bnp_call(rst.sock, BN_CTL_RESTORE_END, &arg, 1, -1, NULL, &rst.err);
}

/* Touches rst.tasks and the socket only once CRIU's main thread has finished with them: it lets go of the first process after the
 * last call of RESUME_DEVICES_LATE, or says through criu_result that it will not. */
static void *watch(void *arg)
{
    pid_t first = (pid_t)(intptr_t)arg, tracer = 0;
    bool let_go = false;
    while (atomic_load(&rst.criu_result) == STILL_RESTORING && !(let_go && !held_by_criu())) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        if (!let_go && !atomic_load(&rst.given_up))
            let_go = bn_proc_tracer(first, &tracer) < 0 || tracer != getpid();
    }
    int criu_result = atomic_load(&rst.criu_result);
    rst.result = end_session(criu_result == STILL_RESTORING ? 0 : criu_result);
    if (rst.result < 0)
        kill_tasks();
    return NULL;
}

static int start_watcher(pid_t first)
{
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    int r = pthread_create(&rst.watcher, NULL, watch, (void *)(intptr_t)first);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    rst.watching = r == 0;
    return -r;
}

/* What this returns CRIU ignores: a process that must not run without its GPU state is killed here, which CRIU notices when it
 * lets go of it; it then kills the rest and fails. */
int bnp_restore_resume(int pid)
{
    bool cancelled = bnp_cancelled();
    if (rst.sock < 0 && !cancelled)
        return -ENOTSUP;
    struct bn_error err = BN_ERROR_INIT;
    unsigned handled = 0, arg = (unsigned)pid;
    int r = remember(pid);
    if (cancelled)
        r = bn_error_set(&err, ECANCELED, "cancel", "bennu was told to stop");
    else if (r < 0)
        bn_error_set(&err, r, "resume", "cannot get hold of the restored process %d: %s", pid, strerror(-r));
    else
        r = bnp_call(rst.sock, BN_CTL_RESTORE_PROCESS, &arg, 1, -1, &handled, &err);
    if (r == 0 && handled && !rst.watching) {
        r = start_watcher(rst.tasks[0].pid);
        if (r < 0)
            bn_error_set(&err, r, "resume", "cannot start a thread: %s", strerror(-r));
    }
    if (r < 0) {
        fail("cannot restore the GPU state", &err);
        atomic_store(&rst.given_up, true);
        kill(pid, SIGKILL);
        kill_traced_tasks();
        return r;
    }
    return handled ? 0 : -ENOTSUP;
}

static void forget(void)
{
    for (size_t i = 0; i < rst.n; i++)
        bn_close(rst.tasks[i].pidfd);
    free(rst.tasks);
    rst.tasks = NULL;
    rst.n = rst.cap = 0;
    rst.watching = false;
    rst.sock = bn_close(rst.sock);
}

void bnp_restore_exit(int ret)
{
    if (rst.sock < 0)
        return;
    if (rst.watching) {
        atomic_store(&rst.criu_result, ret);
        pthread_join(rst.watcher, NULL);
    } else {
        rst.result = end_session(ret);
    }
    if (ret == 0 && rst.result < 0) {
        fail("cannot restore the GPU state", &rst.err);
        kill_tasks();
        bnp_log(BNP_ERROR, "Restoring FAILED. The restored processes have been killed");
        _exit(1);
    }
    forget();
}
