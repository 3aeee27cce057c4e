/* bennud: options, sockets, the event loop. */
#include "daemon/daemon.h"

#include "base/cleanup.h"
#include "base/parallel.h"
#include "base/proc.h"
#include "config.h"
#include "gpu/hash.h"
#include "wire/control.h"

#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <systemd/sd-daemon.h>
#include <systemd/sd-event.h>

#define TRIM_AFTER_S 60u
#define PAUSE_USEC 200000u

struct options {
    const char *rundir;
    const char *driver;
    const char *spool;
    uint64_t host_limit, host_keep, gpu_budget, disk_budget, trim_after;
    int private_fd;
    bool worker;
    int keeper_fd, listen_fd; /* a worker's */
    bool no_gpu_hash;
};

static const char usage_text[] =
    "Usage: bennud [OPTION...]\n"
    "Serve checkpoints of GPU processes on this machine.\n\n"
    "      --rundir DIR        folder of the socket (default " BENNU_RUNDIR ", or BENNU_RUNDIR)\n"
    "      --driver PATH       libcuda.so.1 to use (default: the system's, or BENNU_DRIVER)\n"
    "      --host-limit BYTES  most pinned host memory to use, with K, M, G or T (default: no limit)\n"
    "      --host-keep BYTES   pinned host memory to get at the start and never give back (default: none)\n"
    "      --trim-after SECONDS when the rest of it is given back after the last use (default: 60)\n"
    "      --gpu-budget BYTES  most suspended memory to leave on each GPU (default: no limit)\n"
    "      --disk-budget BYTES most suspended memory to have on the disk (default: no limit)\n"
    "      --spool DIR         folder for what is suspended to the disk (default /var/lib/bennu/spool; with "
    "another\n"
    "                          run folder: spool in that)\n"
    "      --no-gpu-hash       hash on the CPU alone: slower, and independent of GPU and driver\n"
    "      --private FD        serve the one connection on FD, then end (used by the CRIU plugin)\n"
    "      --help, --version\n";

/* ---- connections ---- */

struct served {
    struct daemon *d;
    int fd;
};

static void *serve_thread(void *arg)
{
    struct served *s = arg;
    bn_daemon_serve(s->d, s->fd);
    free(s);
    return NULL;
}

static bool peer_allowed(int fd)
{
    struct ucred cred;
    socklen_t len = sizeof(cred);
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) == 0 &&
           (cred.uid == 0 || cred.uid == geteuid());
}

static int listen_again(sd_event_source *source, uint64_t usec, void *arg)
{
    (void)usec;
    sd_event_source_set_enabled(arg, SD_EVENT_ON);
    sd_event_source_disable_unref(source);
    return 0;
}

/* The connection stays where it is, and would be told of again at once, for ever. */
static void pause_listening(sd_event_source *listening, int error)
{
    sd_event_source *timer;
    fprintf(stderr, "bennud: cannot take a connection now: %s\n", strerror(error));
    if (sd_event_add_time_relative(sd_event_source_get_event(listening), &timer, CLOCK_MONOTONIC, PAUSE_USEC,
                                   0, listen_again, listening) >= 0)
        sd_event_source_set_enabled(listening, SD_EVENT_OFF);
}

static int on_connection(sd_event_source *source, int fd, uint32_t revents, void *arg)
{
    (void)revents;
    struct daemon *d = arg;
    bn_auto_fd peer = accept4(fd, NULL, NULL, SOCK_CLOEXEC);
    if (peer < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM))
        pause_listening(source, errno);
    if (peer < 0)
        return 0; /* it went away again */
    if (!peer_allowed(peer)) {
        fprintf(stderr, "bennud: refused a connection by a user that is not root\n");
        return 0;
    }
    struct served *s = malloc(sizeof(*s));
    if (!s)
        return 0;
    *s = (struct served){d, peer};
    if (bn_daemon_thread(d, serve_thread, s) < 0)
        free(s);
    else
        (void)BN_TAKE_FD(peer);
    return 0;
}

/* ---- ends of suspended processes ---- */

static int on_process_end(sd_event_source *source, int fd, uint32_t revents, void *arg)
{
    (void)fd, (void)revents;
    bn_reap_suspended(arg);
    sd_event_source_disable_unref(source);
    return 0;
}

/* ---- the end ---- */

/* Suspended processes have their memory here and nowhere else: it must be back with them before we may go. Returns how many it is
 * not. */
static unsigned try_to_end(struct daemon *d, sd_event_source *source)
{
    unsigned left = bn_resume_all(d);
    if (left == 0)
        sd_event_exit(sd_event_source_get_event(source), 0);
    return left;
}

static int on_signal(sd_event_source *source, const struct signalfd_siginfo *si, void *arg)
{
    (void)si;
    struct daemon *d = arg;
    d->ending = true;
    unsigned left = try_to_end(d, source);
    if (left > 0)
        fprintf(stderr,
                "bennud: staying: %u suspended processes could not be resumed and would lose their GPU "
                "memory; see 'bennu ps'\n",
                left);
    return 0;
}

static int on_keeper(sd_event_source *source, int fd, uint32_t revents, void *arg)
{
    (void)fd, (void)revents;
    struct daemon *d = arg;
    bn_guard_lost(d->env.guard);
    sd_event_source_disable_unref(source);
    return 0;
}

/* New entries: watch their processes. The pidfds are duplicated: the entry may be freed before the event is handled. */
static int on_wake(sd_event_source *source, int fd, uint32_t revents, void *arg)
{
    (void)revents;
    struct daemon *d = arg;
    eventfd_t n;
    eventfd_read(fd, &n);
    bn_watch_prepared(d, sd_event_source_get_event(source));
    bn_rest_later(d);
    bn_need_check(d);
    bn_reap_suspended(d); /* those that ended while somebody worked on their tree */
    pthread_mutex_lock(&d->lock);
    for (struct suspended_entry *e = d->suspended; e; e = e->next) {
        if (e->watched || !e->s)
            continue;
        const struct bn_targets *t = bn_suspended_targets(e->s);
        for (size_t i = 0; i < t->n; i++) {
            sd_event_source *end;
            int pidfd = fcntl(t->v[i].pidfd, F_DUPFD_CLOEXEC, 3);
            if (pidfd < 0)
                continue;
            if (sd_event_add_io(sd_event_source_get_event(source), &end, pidfd, EPOLLIN, on_process_end, d) <
                0)
                bn_close(pidfd);
            else
                sd_event_source_set_io_fd_own(end, true);
        }
        e->watched = true;
    }
    bool idle = true, ending = d->ending;
    for (struct suspended_entry *e = d->suspended; e; e = e->next)
        idle = idle && e->s;
    d->ending = ending && !idle;
    pthread_mutex_unlock(&d->lock);
    if (ending && idle) /* now it may go that could not while something was under way */
        try_to_end(d, source);
    return 0;
}

static void wait_for_clients(struct daemon *d)
{
    pthread_mutex_lock(&d->lock);
    while (d->clients > 0 && d->env.gpu) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_sec += 30;
        if (pthread_cond_timedwait(&d->clients_changed, &d->lock, &until) == ETIMEDOUT)
            break;
    }
    pthread_mutex_unlock(&d->lock);
}

/* ---- sockets ---- */

static int listen_at(const char *rundir, int *lock_fd, struct bn_error *err)
{
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    if (snprintf(sa.sun_path, sizeof(sa.sun_path), "%s/%s", rundir, BN_CTL_SOCKET) >=
        (int)sizeof(sa.sun_path))
        return bn_error_set(err, ENAMETOOLONG, "socket", "the name of the run folder is too long: %s",
                            rundir);
    if (mkdir(rundir, 0755) < 0 && errno != EEXIST)
        return bn_error_set(err, errno, "socket", "cannot make %s: %m", rundir);

    /* The lock, not the socket file, says whether a bennud runs: a killed one leaves its socket behind. Never closed. */
    char path[128];
    snprintf(path, sizeof(path), "%s/bennud.lock", rundir);
    int lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (lock < 0 || flock(lock, LOCK_EX | LOCK_NB) < 0) {
        int code = errno;
        bn_close(lock);
        return bn_error_set(err, code, "socket",
                            code == EWOULDBLOCK ? "a bennud runs already with the folder %s"
                                                : "cannot lock %s: %m",
                            code == EWOULDBLOCK ? rundir : path);
    }
    bn_auto_fd fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    unlink(sa.sun_path);
    mode_t mask = umask(0177);
    int r = fd < 0 || bind(fd, (struct sockaddr *)&sa, sizeof(sa)) < 0 || listen(fd, 64) < 0 ? -errno : 0;
    umask(mask);
    if (r < 0)
        return bn_error_set(err, r, "socket", "cannot listen at %s: %s", sa.sun_path, strerror(-r));
    *lock_fd = lock;
    return BN_TAKE_FD(fd);
}

static int get_socket(const char *rundir, int *lock_fd, struct bn_error *err)
{
    int n = sd_listen_fds(1);
    if (n == 1 && sd_is_socket_unix(SD_LISTEN_FDS_START, SOCK_SEQPACKET, 1, NULL, 0) > 0)
        return SD_LISTEN_FDS_START;
    if (n != 0)
        return bn_error_set(err, EINVAL, "socket",
                            "systemd passed %d sockets: one SOCK_SEQPACKET socket is wanted", n);
    return listen_at(rundir, lock_fd, err);
}

/* ---- main ---- */

static bool parse_bytes(const char *s, uint64_t *out)
{
    static const char units[] = "KMGT";
    char *end;
    errno = 0;
    unsigned long long v = strtoull(s, &end, 10);
    if (errno || end == s || *s == '-')
        return false;
    unsigned shift = 0;
    const char *u = *end ? strchr(units, *end) : NULL;
    if (u) {
        shift = 10 * (unsigned)(u - units + 1);
        end++;
    }
    if (*end || (shift && v > UINT64_MAX >> shift))
        return false;
    *out = (uint64_t)v << shift;
    return true;
}

/* A daemon with a run folder of its own stays out of the machine's. */
static const char *default_spool(const char *rundir)
{
    static char path[PATH_MAX];
    if (strcmp(rundir, BENNU_RUNDIR) == 0)
        return "/var/lib/bennu/spool";
    snprintf(path, sizeof(path), "%s/spool", rundir);
    return path;
}

static int parse_options(int argc, char **argv, struct options *o)
{
    enum {
        RUNDIR = 256,
        DRIVER,
        SPOOL,
        HOST_LIMIT,
        HOST_KEEP,
        TRIM_AFTER,
        GPU_BUDGET,
        DISK_BUDGET,
        NO_GPU_HASH,
        PRIVATE,
        WORKER,
        HELP,
        VERSION
    };
    static const struct option longs[] = {{"rundir", required_argument, NULL, RUNDIR},
                                          {"driver", required_argument, NULL, DRIVER},
                                          {"spool", required_argument, NULL, SPOOL},
                                          {"host-limit", required_argument, NULL, HOST_LIMIT},
                                          {"host-keep", required_argument, NULL, HOST_KEEP},
                                          {"trim-after", required_argument, NULL, TRIM_AFTER},
                                          {"gpu-budget", required_argument, NULL, GPU_BUDGET},
                                          {"disk-budget", required_argument, NULL, DISK_BUDGET},
                                          {"no-gpu-hash", no_argument, NULL, NO_GPU_HASH},
                                          {"private", required_argument, NULL, PRIVATE},
                                          {"worker", required_argument, NULL, WORKER},
                                          {"help", no_argument, NULL, HELP},
                                          {"version", no_argument, NULL, VERSION},
                                          {0}};
    *o = (struct options){.rundir = secure_getenv("BENNU_RUNDIR"),
                          .driver = secure_getenv("BENNU_DRIVER"),
                          .private_fd = -1,
                          .trim_after = TRIM_AFTER_S};
    if (!o->rundir)
        o->rundir = BENNU_RUNDIR;
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        uint64_t *bytes = NULL;
        switch (c) {
        case RUNDIR: o->rundir = optarg; break;
        case DRIVER: o->driver = optarg; break;
        case SPOOL: o->spool = optarg; break;
        case NO_GPU_HASH: o->no_gpu_hash = true; break;
        case PRIVATE: o->private_fd = atoi(optarg); break;
        case WORKER: /* by the keeper, after all other options */
            o->worker = sscanf(optarg, "%d,%d,%d", &o->keeper_fd, &o->listen_fd, &o->private_fd) == 3;
            break;
        case HOST_LIMIT: bytes = &o->host_limit; break;
        case HOST_KEEP: bytes = &o->host_keep; break;
        case TRIM_AFTER:
            if (parse_bytes(optarg, &o->trim_after) && o->trim_after <= UINT32_MAX)
                break;
            fprintf(stderr, "bennud: '%s' is no number of seconds\n", optarg);
            return 2;
        case GPU_BUDGET: bytes = &o->gpu_budget; break;
        case DISK_BUDGET: bytes = &o->disk_budget; break;
        case HELP: fputs(usage_text, stdout); return 0;
        case VERSION: puts("bennud " BENNU_VERSION); return 0;
        default: fputs("Try 'bennud --help'.\n", stderr); return 2;
        }
        if (bytes && !parse_bytes(optarg, bytes)) {
            fprintf(stderr, "bennud: '%s' is no size: give bytes, or a number with K, M, G or T\n", optarg);
            return 2;
        }
    }
    if (optind < argc) {
        fprintf(stderr, "bennud: unexpected argument '%s'\n", argv[optind]);
        return 2;
    }
    if (!o->spool)
        o->spool = default_spool(o->rundir);
    return -1;
}

static int loop(struct daemon *d, int listen_fd, struct bn_error *err)
{
    sd_event *event = NULL;
    int r = sd_event_default(&event);
    if (r >= 0)
        r = sd_event_add_io(event, NULL, listen_fd, EPOLLIN, on_connection, d);
    if (r >= 0)
        r = sd_event_add_io(event, NULL, d->wake_fd, EPOLLIN, on_wake, d);
    if (r >= 0)
        r = sd_event_add_signal(event, NULL, SIGTERM, on_signal, d);
    if (r >= 0)
        r = sd_event_add_signal(event, NULL, SIGINT, on_signal, d);
    if (r >= 0)
        r = bn_rest_open(d, event);
    if (r >= 0)
        r = sd_event_add_io(event, NULL, bn_guard_fd(d->env.guard), 0, on_keeper, d); /* its end alone */
    if (r >= 0) {
        fprintf(stderr, "bennud %s: %s, %u GPUs%s\n", BENNU_VERSION, bn_gpu_driver_path(d->env.gpu),
                bn_gpu_count(d->env.gpu), bn_gpu_simulated(d->env.gpu) ? " (simulated)" : "");
        bn_guard_up(d->env.guard);
        r = sd_event_loop(event);
    }
    sd_event_unref(event);
    return r < 0 ? bn_error_set(err, r, "loop", "the event loop failed: %s", strerror(-r)) : 0;
}

static int warm_gpu(void *arg, size_t dev, struct bn_error *err)
{
    struct daemon *d = arg;
    int r = bn_gpu_warm(d->env.gpu, (unsigned)dev, err);
    if (r == 0)
        bn_gpu_hash_ready(d->env.gpu, (unsigned)dev, NULL); /* without it the CPU hashes */
    return r;
}

/* The driver, what earlier workers left, and the way to keep what this one has. */
static int prepare(struct daemon *d, const struct options *o, struct bn_error *err)
{
    struct bn_guard *guard;
    struct bn_record *records = NULL;
    size_t n = 0;
    int r = bn_guard_open(o->keeper_fd, &guard, &records, &n, err);
    if (r < 0)
        return r;
    r = bn_daemon_open_gpu(d, err);
    d->env.guard = guard;
    if (r == 0 && bn_gpu_simulated(d->env.gpu))
        d->env.kill_at = secure_getenv("BENNUD_TEST_KILL");
    for (unsigned g = 0; r == 0 && o->no_gpu_hash && g < bn_gpu_count(d->env.gpu); g++)
        bn_gpu_hash_switch_off(d->env.gpu, g, "--no-gpu-hash");
    if (r == 0 && o->private_fd < 0)
        r = bn_parallel(bn_gpu_count(d->env.gpu), warm_gpu, d, err);
    bn_daemon_note_hashing(d);
    if (r == 0 && n > 0)
        bn_daemon_recover(d, records, n);
    free(records);
    if (r == 0 && o->listen_fd >= 0) /* a private one has nothing to do with what others left */
        bn_daemon_take_folders(d);
    return r;
}

static void finish(struct daemon *d)
{
    struct bn_guard *guard = d->env.guard;
    bn_drop_all_prepared(d);
    bn_daemon_close_gpu(d);
    bn_guard_free(guard);
}

/* For one connection; or, when its first worker was killed, to put that right. */
static int serve_private(struct daemon *d, const struct options *o)
{
    struct bn_error err = BN_ERROR_INIT;
    int r = prepare(d, o, &err);
    if (o->private_fd >= 0) {
        bn_daemon_serve(d, o->private_fd); /* a failure is told to the one who asks */
    } else if (r < 0) {
        fprintf(stderr, "bennud: %s\n", err.text);
        return 1;
    }
    pthread_mutex_lock(&d->lock);
    while (d->clients > 0)
        pthread_cond_wait(&d->clients_changed, &d->lock);
    pthread_mutex_unlock(&d->lock);
    bn_resume_all(d);
    finish(d);
    return 0;
}

static int serve_all(struct daemon *d, const struct options *o)
{
    struct bn_error err = BN_ERROR_INIT;
    int r = prepare(d, o, &err);
    if (r == 0)
        r = loop(d, o->listen_fd, &err);
    if (r < 0)
        fprintf(stderr, "bennud: %s\n", err.text);
    wait_for_clients(d);
    if (d->clients == 0)
        finish(d);
    return r < 0;
}

static int be_worker(const struct options *o)
{
    struct daemon d = {.driver = o->driver && *o->driver ? o->driver : NULL,
                       .spool = o->spool,
                       .host_limit = o->host_limit,
                       .host_keep = o->host_keep,
                       .trim_after = o->trim_after,
                       .gpu_budget = o->gpu_budget,
                       .disk_budget = o->disk_budget,
                       .lock = PTHREAD_MUTEX_INITIALIZER,
                       .wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&d.published_changed, &attr);
    pthread_cond_init(&d.clients_changed, &attr);
    if (d.wake_fd < 0) {
        fprintf(stderr, "bennud: cannot make an eventfd: %m\n");
        return 1;
    }
    prctl(PR_SET_NAME, "bennud-worker");
    fcntl(o->keeper_fd, F_SETFD, FD_CLOEXEC);
    return o->listen_fd < 0 ? serve_private(&d, o) : serve_all(&d, o);
}

static int be_keeper(const struct options *o, char **argv)
{
    struct keeper_options k = {.argv = argv, .listen_fd = -1, .lock_fd = -1, .private_fd = o->private_fd};
    struct bn_error err = BN_ERROR_INIT;
    if (o->private_fd < 0) {
        k.listen_fd = get_socket(o->rundir, &k.lock_fd, &err);
        if (k.listen_fd < 0) {
            fprintf(stderr, "bennud: %s\n", err.text);
            return 1;
        }
    }
    return bn_keeper_run(&k);
}

int main(int argc, char **argv)
{
    struct options o;
    int code = parse_options(argc, argv, &o);
    if (code >= 0)
        return code;
    signal(SIGPIPE, SIG_IGN);
    return o.worker ? be_worker(&o) : be_keeper(&o, argv);
}
