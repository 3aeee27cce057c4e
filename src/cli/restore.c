/* bennu restore: bring a checkpoint back to life. */
#include "cli/cli.h"
#include "cli/ports.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/proc.h"
#include "store/host_files.h"
#include "store/host_pages.h"
#include "store/image_dir.h"
#include "store/pack.h"

#include <criu/criu.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define LOG_FILE "restore.log"
#define COLLECT_MS 3000

/* Host memory: less is read by CRIU alone as fast. */
#define MUCH_MEMORY (UINT64_C(128) << 20)

static bool detach, json, quiet, criu_alone;
static const char *pidfile;

static const struct cli_option options[] = {
    {"detach", 'd', CLI_FLAG, NULL, &detach,
     "return as soon as the program runs again, and print its process id"},
    {"pidfile", 'p', CLI_STRING, "FILE", &pidfile, "write the process id to FILE"},
    {"criu-memory", 0, CLI_FLAG, NULL, &criu_alone,
     "let CRIU alone read host memory, not several threads of bennud's"},
    CLI_TRACE_OPTION,
    {"json", 'j', CLI_FLAG, NULL, &json, "print the result as one JSON object"},
    {"quiet", 'q', CLI_FLAG, NULL, &quiet, "print nothing but errors"},
    {0},
};

struct restore {
    const char *path;
    int dir, lock;
    bool have_record;
    struct cli_record record;
    struct bn_manifest *manifest;
    struct bn_host_pages pages;
    struct cli_criu criu;
    int work;
    char work_path[64];
    struct bn_phases phases;
    uint64_t took;
    int signal; /* that broke it off, or 0 */
};

static int open_image(struct restore *r, struct bn_error *err)
{
    r->dir = open(r->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (r->dir < 0)
        return bn_error_set(err, errno, "directory", "cannot open the checkpoint %s: %m", r->path);
    /* Until CRIU and the daemon have read it; without locks it goes as well. */
    struct bn_error busy = BN_ERROR_INIT;
    r->lock = bn_image_lock(r->dir, false, &busy);
    if (r->lock == -EBUSY)
        return bn_error_set(err, EBUSY, busy.stage, "%s: %s", r->path, busy.text);
    return 0;
}

/* Names and lengths; the bytes are compared when they are loaded. */
static int check_packs(const struct restore *r, struct bn_error *err)
{
    struct bn_pack_reader *reader = NULL;
    int rc = bn_pack_reader_open(r->dir, r->manifest, &reader, err);
    bn_pack_reader_free(reader);
    return rc == -ENOENT
               ? bn_error_replace(err, EBADMSG, "image",
                                  "the checkpoint %s is damaged: a bennu-pack file is missing", r->path)
               : rc;
}

/* Those that CRIU is about to read, before anybody else could tell; what processes had in memory is compared while it is restored. */
static int check_small_files(const struct restore *r, struct bn_error *err)
{
    return bn_host_files_check(r->dir, r->manifest, BN_HOST_FILES_SMALL, 0, NULL, NULL, err);
}

/* Is it a checkpoint, and a whole one? */
static int check_image(struct restore *r, struct bn_error *err)
{
    if (bn_image_has_criu(r->dir) != 1)
        return bn_error_set(err, EBADMSG, "image", "%s is not a checkpoint: it has no %s, which CRIU writes",
                            r->path, CLI_INVENTORY);
    int rc = cli_record_read(r->dir, &r->record);
    if (rc < 0 && rc != -ENOENT)
        return bn_error_set(err, EBADMSG, "image", "the checkpoint %s is damaged: %s makes no sense", r->path,
                            BN_IMAGE_RECORD_NAME);
    r->have_record = rc == 0;
    struct bn_error why = BN_ERROR_INIT;
    rc = bn_image_load(r->dir, &r->manifest, &why);
    if (rc == -ENOENT && r->have_record && r->record.gpu)
        return bn_error_set(err, EBADMSG, "image",
                            "the checkpoint %s is not complete: its dump was cut off before %s was written",
                            r->path, BN_MANIFEST_NAME);
    if (rc < 0 && rc != -ENOENT)
        return bn_error_set(err, rc, why.stage, "%s", why.text);
    /* Without a manifest it was made by CRIU alone, or by CRIU's own CUDA plugin. */
    if (rc == 0 && ((rc = check_packs(r, err)) < 0 || (rc = check_small_files(r, err)) < 0))
        return rc;
    why = BN_ERROR_INIT;
    rc = bn_host_pages_survey(r->dir, &r->pages, &why);
    return rc < 0 ? bn_error_set(err, why.code, why.stage, "the checkpoint %s cannot be used: %s", r->path,
                                 why.text)
                  : 0;
}

static int check_pid_free(const struct restore *r, pid_t pid, struct bn_error *err)
{
    char comm[16] = "", state = 0;
    if (kill(pid, 0) < 0 && errno == ESRCH)
        return 0;
    /* Right after a dump the ended processes may still wait for whoever inherited them to collect them. */
    for (int i = 0; i < COLLECT_MS && bn_proc_state(pid, &state) == 0 && (state == 'Z' || state == 'X'); i++)
        usleep(1000);
    if (kill(pid, 0) < 0 && errno == ESRCH)
        return 0;
    bn_proc_comm(pid, comm);
    return bn_error_set(
        err, EEXIST, "process",
        "the checkpoint %s needs process id %d, which %s has now: end it, or restore in a pid namespace of "
        "its own (unshare --pid --fork --mount-proc)",
        r->path, pid, *comm ? cli_clean(comm) : "another process");
}

static int check_pids_free(const struct restore *r, struct bn_error *err)
{
    for (size_t i = 0; r->have_record && i < r->record.npids; i++) {
        if (check_pid_free(r, r->record.pids[i], err) < 0)
            return -EEXIST;
    }
    for (uint32_t i = 0; !r->have_record && r->manifest && i < r->manifest->n_processes; i++) {
        if (check_pid_free(r, r->manifest->processes[i].pid, err) < 0)
            return -EEXIST;
    }
    return 0;
}

static int check_criu(struct restore *r, struct bn_error *err)
{
    if (cli_criu_find(&r->criu, err) < 0)
        return -ENOENT;
    if (r->have_record && r->record.criu / 100 > r->criu.version / 100) {
        char made[24], here[24];
        cli_version_text(r->record.criu, made);
        cli_version_text(r->criu.version, here);
        return bn_error_set(
            err, ENOEXEC, "criu",
            "the checkpoint %s was made by CRIU %s, and CRIU here (%s) is %s: install that version or newer",
            r->path, made, r->criu.path, here);
    }
    return 0;
}

static bool kernel_has_userfaultfd(void)
{
    bn_auto_fd fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    return fd >= 0;
}

/* Is there so much host memory that more than CRIU's one thread should read it? CRIU then cannot let processes share pages, as those
 * do that have forked, so there must be few that could be shared. */
static bool leave_memory(const struct restore *r)
{
    return r->manifest && !criu_alone && r->pages.bytes >= MUCH_MEMORY &&
           r->pages.common <= r->pages.bytes / 8 && kernel_has_userfaultfd();
}

/* CRIU's log and statistics of a restore do not belong into the checkpoint, which may be read-only. */
static int make_work(struct restore *r, struct bn_error *err)
{
    snprintf(r->work_path, sizeof(r->work_path), "/tmp/bennu-restore.XXXXXX");
    if (!mkdtemp(r->work_path)) {
        r->work_path[0] = 0;
        return bn_error_set(err, errno, "directory", "cannot make a directory for CRIU's log in /tmp: %m");
    }
    r->work = open(r->work_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return r->work < 0 ? bn_error_set(err, errno, "directory", "cannot open %s: %m", r->work_path) : 0;
}

static void remove_work(struct restore *r, bool keep_log)
{
    if (!r->work_path[0])
        return;
    static const char *const left[] = {"stats-restore", "lazy-pages.socket", LOG_FILE};
    for (size_t i = 0; i < BN_ARRAY_SIZE(left) - (keep_log ? 1 : 0); i++)
        unlinkat(r->work, left[i], 0);
    rmdir(r->work_path); /* fails, as it should, while something is left in it */
}

static const char *stdio_name(const struct restore *r, int fd)
{
    if (r->have_record)
        return r->record.stdio[fd];
    return r->manifest ? r->manifest->stdio[fd] : "";
}

/* Our own descriptors 0-2 take the place of the pipes that the program had there. The copies must not be O_CLOEXEC: CRIU
 * inherits them by their numbers. */
static int hand_over_stdio(const struct restore *r, struct bn_error *err)
{
    for (int fd = 0; fd < 3; fd++) {
        const char *name = stdio_name(r, fd);
        bool same = false;
        for (int i = 0; i < fd; i++)
            same = same || strcmp(stdio_name(r, i), name) == 0;
        if (strncmp(name, "pipe:[", 6) != 0 || same)
            continue;
        int copy = fcntl(fd, F_DUPFD, 64);
        if (copy < 0)
            copy = open("/dev/null", fd == 0 ? O_RDONLY : O_WRONLY);
        if (copy < 0 || criu_add_inherit_fd(copy, name) < 0)
            return bn_error_set(err, ENOMEM, "criu", "cannot hand descriptor %d over to CRIU", fd);
    }
    return 0;
}

static void describe_failure(struct restore *r, int result, const struct bn_error *session,
                             struct bn_error *err)
{
    char cause[240];
    /* All that the daemon knows is that CRIU failed: then CRIU's log knows more. */
    bool criu_only = session && session->code == ECANCELED && strcmp(session->stage, "criu") == 0;
    cli_criu_log_cause(r->work, LOG_FILE, cause, sizeof(cause));
    if (bn_error_is_set(session) && !(criu_only && *cause)) {
        bn_error_set(err, session->code, session->stage, "%s", session->text);
    } else if (*cause) {
        bn_error_set(err, EIO, "criu", "CRIU cannot restore %s: %s", r->path, cause);
    } else {
        bn_error_set(err, EIO, "criu", "CRIU (%s) failed and did not say why (error %d)", r->criu.path,
                     result);
    }
    size_t used = strlen(err->text);
    if (faccessat(r->work, LOG_FILE, F_OK, 0) == 0)
        snprintf(err->text + used, sizeof(err->text) - used, " (CRIU's log: %s/%s)", r->work_path, LOG_FILE);
}

static int write_pidfile(pid_t pid, struct bn_error *err)
{
    char text[16];
    if (!pidfile)
        return 0;
    int n = snprintf(text, sizeof(text), "%d\n", pid);
    bn_auto_fd fd = open(pidfile, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    int r = fd < 0 ? -errno : bn_write_full(fd, text, (size_t)n);
    return r < 0 ? bn_error_set(err, r, "pidfile",
                                "the program runs again as process %d, but %s cannot be written: %s", pid,
                                pidfile, strerror(-r))
                 : 0;
}

static sigset_t passed_signals(void)
{
    static const int passed[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGCONT, SIGWINCH};
    sigset_t set;
    sigemptyset(&set);
    for (size_t i = 0; i < BN_ARRAY_SIZE(passed); i++)
        sigaddset(&set, passed[i]);
    return set;
}

static void kill_restored(pid_t root)
{
    bn_auto_free pid_t *pids = NULL;
    size_t n = 0;
    bn_proc_tree(root, &pids, &n);
    kill(root, SIGKILL);
    for (size_t i = 0; i < n; i++)
        kill(pids[i], SIGKILL);
    if (!detach)
        waitpid(root, NULL, 0);
}

/* What was made is ended again. A signal that came after CRIU's last step is for the program, if it is ours. */
static pid_t interrupted(struct restore *r, int sig, pid_t pid, struct bn_error *err)
{
    if (pid > 0 && !detach) {
        kill(getpid(), sig); /* blocked: wait_for_program passes it on */
        return pid;
    }
    if (pid > 0)
        kill_restored(pid);
    r->signal = sig;
    *err = BN_ERROR_INIT;
    return bn_error_set(err, ECANCELED, "cancel",
                        "interrupted: what was restored has been ended, and the checkpoint %s is as before",
                        r->path);
}

/* Returns the root's pid, or what CRIU says. */
static int run_criu(struct restore *r, struct cli_watch *watch, int *watched, struct bn_error *session)
{
    uint64_t began = bn_now_ns();
    cli_hush_libcriu(true);
    int pid = detach ? criu_restore() : criu_restore_child();
    cli_hush_libcriu(false);
    uint64_t criu_took = bn_now_ns() - began;
    cli_trace_criu(began, criu_took, r->work, "stats-restore");
    *watched = cli_watch_finish(watch, pid > 0 && r->manifest, NULL, &r->phases, session);
    r->took = bn_now_ns() - began;
    cli_add_phase(&r->phases, "CRIU, all of it", 0, criu_took);
    return pid;
}

/* Returns the restored root's pid, or negative with *err set. */
static pid_t bring_back(struct restore *r, int *sock, struct bn_error *err)
{
    struct cli_watch *watch = NULL;
    struct bn_error session = BN_ERROR_INIT;
    r->criu.lazy_pages = leave_memory(r);
    if (make_work(r, err) < 0 || cli_criu_setup(&r->criu, r->dir, r->work, LOG_FILE, err) < 0 ||
        hand_over_stdio(r, err) < 0)
        return -EIO;
    /* The program may run, and be seen to run, before CRIU and the daemon have told us: a signal for it from then on must reach it
     * when we can pass it on. One that is blocked stays pending though it is ignored. */
    struct cli_cancel *cancel = cli_cancel_new();
    sigset_t held = passed_signals();
    if (!detach)
        sigprocmask(SIG_BLOCK, &held, NULL);
    cli_ignore_signals(true);
    cli_free_ports(r->dir);
    struct cli_progress *progress = cli_progress_new("restore");
    int watched = 0, pid = -EIO;
    if (*sock < 0 || cli_watch_start(BN_TAKE_FD(*sock), 0, r->dir, progress, &watch, err) == 0)
        pid = run_criu(r, watch, &watched, &session);
    cli_progress_free(progress);
    criu_free_opts();
    int sig = cli_cancel_free(cancel);
    if (sig)
        return interrupted(r, sig, pid, err);
    /* CRIU, with our plugin in it, has the last word: it does not succeed where the daemon failed, but a daemon may die right after
     * its work is done. */
    if (pid > 0 && (watched == 0 || cli_daemon_silent(&session)))
        return pid;
    if (!bn_error_is_set(err))
        describe_failure(r, pid, watched < 0 ? &session : NULL, err);
    if (pid > 0) /* without its GPU memory it must not go on */
        kill_restored(pid);
    return -err->code;
}

/* A program that led its own process group when it was saved does so again; to read from our terminal it must be in its
 * foreground. */
static void give_terminal(pid_t group)
{
    if (!isatty(STDIN_FILENO) || group == getpgrp() || tcgetpgrp(STDIN_FILENO) != getpgrp())
        return;
    sighandler_t before = signal(SIGTTOU, SIG_IGN);
    tcsetpgrp(STDIN_FILENO, group);
    signal(SIGTTOU, before);
}

static void take_terminal_back(void)
{
    if (!isatty(STDIN_FILENO))
        return;
    sighandler_t before = signal(SIGTTOU, SIG_IGN);
    tcsetpgrp(STDIN_FILENO, getpgrp());
    signal(SIGTTOU, before);
}

/* Opens the wait for the program: the signals that came meanwhile are pending now. */
static sigset_t hold_signals(void)
{
    sigset_t set = passed_signals();
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    cli_ignore_signals(false);
    return set;
}

/* Stand in for the program: pass signals on, end as it ends. */
static int wait_for_program(pid_t pid, const sigset_t *set)
{
    pid_t group = getpgid(pid);
    give_terminal(group);
    int status = 0;
    for (;;) {
        pid_t ended = waitpid(pid, &status, WNOHANG);
        if (ended == pid)
            break;
        if (ended < 0 && errno != EINTR)
            return CLI_FAILED;
        siginfo_t info;
        int sig = sigwaitinfo(set, &info);
        /* What the terminal sends, it sends to the whole group: not a second time. */
        if (sig > 0 && sig != SIGCHLD && !(info.si_code == SI_KERNEL && group == getpgrp()))
            kill(pid, sig);
    }
    take_terminal_back();
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* With the program's output on our standard output, what we say goes to standard error. */
static void report(const struct restore *r, pid_t pid)
{
    if (json) {
        json_t *o = cli_json_ok();
        json_object_set_new(o, "pid", json_integer(pid));
        json_object_set_new(o, "directory", json_string(r->path));
        json_object_set_new(o, "detached", json_boolean(detach));
        json_object_set_new(o, "gpu_bytes",
                            json_integer(r->manifest ? (json_int_t)bn_manifest_bytes(r->manifest) : 0));
        json_object_set_new(o, "duration_s", json_real((double)r->took / 1e9));
        json_object_set_new(o, "phases", cli_json_phases(&r->phases));
        cli_print_json(o);
    } else if (!quiet) {
        cli_print_phases(stderr, &r->phases, r->took);
        if (detach)
            printf("%d\n", pid);
    }
    fflush(stdout);
}

/* Returns an exit code. */
static int prepare(struct restore *r, int *sock, struct bn_error *err)
{
    if (open_image(r, err) < 0)
        return err->code == ENOTDIR ? CLI_BAD_IMAGE : CLI_FAILED;
    if (cli_need_root(err) < 0)
        return CLI_FAILED;
    if (check_image(r, err) < 0)
        return err->code == EBADMSG || err->code == EPROTONOSUPPORT ? CLI_BAD_IMAGE : CLI_FAILED;
    if (check_criu(r, err) < 0 || check_pids_free(r, err) < 0)
        return CLI_FAILED;
    *sock = cli_daemon_connect(err);
    if (*sock < 0 && r->have_record && !r->record.gpu)
        *err = BN_ERROR_INIT; /* nothing in it for the daemon to do */
    return *sock < 0 && bn_error_is_set(err) ? CLI_NO_DAEMON : CLI_OK;
}

static int restore(int argc, char **argv)
{
    struct bn_error err = BN_ERROR_INIT;
    struct restore r = {.path = argv[0], .dir = -1, .lock = -1, .work = -1};
    bn_auto_fd sock = -1;
    pid_t pid = -1;
    if (cli_trace_open("restore", &err) < 0)
        return cli_fail(CLI_FAILED, &err, json);
    int code = prepare(&r, &sock, &err);
    if (code == CLI_OK) {
        pid = bring_back(&r, &sock, &err);
        code = pid > 0 ? CLI_OK : r.signal ? 128 + r.signal : cli_daemon_exit_code(&err);
        remove_work(&r, pid <= 0 && !r.signal);
    }
    r.lock = bn_close(r.lock);
    code = cli_trace_end(code, &err);
    sigset_t held = {0};
    if (pid > 0) {
        held = hold_signals();
        if (write_pidfile(pid, &err) < 0)
            code = CLI_FAILED;
        report(&r, pid);
    }
    if (bn_error_is_set(&err))
        cli_fail(code, &err, json);
    bn_manifest_free(r.manifest);
    cli_record_free(&r.record);
    bn_close(r.dir);
    bn_close(r.work);
    return pid > 0 && !detach ? wait_for_program(pid, &held) : code;
}

const struct cli_command cli_restore = {
    .name = "restore",
    .operands = "DIR",
    .summary = "Bring a saved process and its children back, GPU memory included",
    .options = options,
    .min = 1,
    .max = 1,
    .needed = "one operand is needed: DIR",
    .run = restore,
};
