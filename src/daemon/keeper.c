/* The keeper: see keeper.h. Nothing here may fail for lack of something that a crash took away. */
#include "daemon/keeper.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <systemd/sd-daemon.h>

/* A worker that dies this often in this time is started more slowly: something is wrong that starting does not mend. */
#define DEATHS 5u
#define DEATHS_NS 60000000000ull
#define SLOW_NS 10000000000ull

struct kept {
    struct bn_record record;
    struct kept *next;
};

struct keeper {
    const struct keeper_options *o;
    struct kept *kept; /* newest first */
    struct keeper_inbox inbox;
    int private_fd; /* until the first worker has it */
    int signals;    /* signalfd */
    int sock;       /* to the worker; -1: it hung up */
    pid_t worker;   /* 0: none */
    unsigned starts, deaths;
    uint64_t death_ns[DEATHS];
    bool was_up;
    int ending; /* SIGTERM when somebody asked for the end */
};

/* ---- records ---- */

static void drop(struct keeper *k, uint64_t key)
{
    for (struct kept **at = &k->kept; *at; at = &(*at)->next)
        if ((*at)->record.key == key) {
            struct kept *gone = *at;
            *at = gone->next;
            bn_record_clear(&gone->record);
            free(gone);
            return;
        }
}

static void keep(struct keeper *k, uint32_t seq)
{
    struct kept *new = malloc(sizeof(*new));
    uint64_t key = k->inbox.record.key;
    if (!new) {
        keeper_inbox_clear(&k->inbox);
        keeper_send(k->sock, KEEPER_DONE, key, seq, ENOMEM);
        return;
    }
    drop(k, key);
    *new = (struct kept){k->inbox.record, k->kept};
    k->inbox = (struct keeper_inbox){0};
    k->kept = new;
    keeper_send(k->sock, KEEPER_DONE, key, seq, 0);
}

/* One packet from the worker. False when there will be no more. */
static bool listen_to_worker(struct keeper *k)
{
    struct keeper_head head = {0};
    bool whole;
    int r = keeper_recv(k->sock, &k->inbox, &head, &whole);
    if (r == -EMFILE || r == -ENOMEM)
        keeper_send(k->sock, KEEPER_DONE, head.key, head.seq, -r);
    else if (r < 0)
        return false;
    else if (head.type == KEEPER_DROP)
        drop(k, head.key);
    else if (head.type == KEEPER_UP) {
        k->was_up = true;
        sd_notify(0, "READY=1");
    } else if (whole)
        keep(k, head.seq);
    return true;
}

/* ---- workers ---- */

/* BENNUD_TEST_KILL is a list: one place for each worker. */
static void next_kill_point(unsigned starts)
{
    const char *list = getenv("BENNUD_TEST_KILL");
    for (unsigned i = 0; list && i < starts; i++) {
        list = strchr(list, ',');
        list = list ? list + 1 : NULL;
    }
    char one[64] = "";
    if (list)
        snprintf(one, sizeof(one), "%.*s", (int)strcspn(list, ","), list);
    setenv("BENNUD_TEST_KILL", one, 1);
}

__attribute__((noreturn)) static void become_worker(struct keeper *k, int sock)
{
    const int fds[] = {sock, k->o->listen_fd, k->o->lock_fd, k->private_fd};
    size_t argc = 0;
    char worker[96];
    for (size_t i = 0; i < BN_ARRAY_SIZE(fds); i++)
        if (fds[i] >= 0)
            fcntl(fds[i], F_SETFD, 0);
    while (k->o->argv[argc])
        argc++;
    char **argv = calloc(argc + 2, sizeof(*argv));
    if (!argv)
        _exit(1);
    memcpy(argv, k->o->argv, argc * sizeof(*argv));
    snprintf(worker, sizeof(worker), "--worker=%d,%d,%d", sock, k->o->listen_fd, k->private_fd);
    argv[argc] = worker;
    unsetenv("NOTIFY_SOCKET"); /* the keeper speaks for both */
    if (getenv("BENNUD_TEST_KILL"))
        next_kill_point(k->starts);
    /* The others stay blocked: a worker takes them when it is ready to. */
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_UNBLOCK, &set, NULL);
    execv("/proc/self/exe", argv);
    fprintf(stderr, "bennud: cannot start its own program again: %m\n");
    _exit(126);
}

/* The new worker reads before it does anything else, so this does not wait long. A worker that dies meanwhile is noticed by the
 * caller's loop. */
static void hand_over(struct keeper *k)
{
    int r = 0;
    for (struct kept *at = k->kept; at && r == 0; at = at->next)
        r = keeper_send_record(k->sock, &at->record, 0);
    if (r == 0)
        r = keeper_send(k->sock, KEEPER_LAST, 0, 0, 0);
    if (r < 0) /* it waits for the last: without it it ends, and another one is tried */
        k->sock = bn_close(k->sock);
}

static int start_worker(struct keeper *k)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return -errno;
    k->worker = fork();
    if (k->worker == 0)
        become_worker(k, pair[1]);
    int r = k->worker < 0 ? -errno : 0;
    bn_close(pair[1]);
    if (r < 0) {
        bn_close(pair[0]);
        k->worker = 0;
        return r;
    }
    k->starts++;
    k->sock = pair[0];
    hand_over(k);
    if (k->ending)
        kill(k->worker, k->ending);
    return 0;
}

/* What it still said before its end counts. */
static void listen_to_the_end(struct keeper *k)
{
    while (k->sock >= 0 && listen_to_worker(k))
        ;
    k->sock = bn_close(k->sock);
    keeper_inbox_clear(&k->inbox);
}

/* Has the worker ended? Then true and its wait status. */
static bool reap(struct keeper *k, int *status)
{
    if (k->worker == 0 || waitpid(k->worker, status, WNOHANG) != k->worker)
        return false;
    k->worker = 0;
    listen_to_the_end(k);
    return true;
}

static size_t count(const struct keeper *k)
{
    size_t n = 0;
    for (const struct kept *at = k->kept; at; at = at->next)
        n++;
    return n;
}

static bool private(const struct keeper *k)
{
    return k->o->listen_fd < 0;
}

/* Is another worker needed after one that ended so? */
static bool needs_another(const struct keeper *k, int status)
{
    if (k->kept)
        return true;
    return WIFSIGNALED(status) && k->was_up && !k->ending && !private(k);
}

static void say(const struct keeper *k, int status)
{
    char how[64];
    if (WIFSIGNALED(status))
        snprintf(how, sizeof(how), "was killed by signal %d", WTERMSIG(status));
    else
        snprintf(how, sizeof(how), "ended with status %d", WEXITSTATUS(status));
    fprintf(stderr, "bennud: the worker %s; starting another, which brings %zu records back\n", how,
            count(k));
}

/* Nanoseconds to wait before the next start. */
static uint64_t note_death(struct keeper *k)
{
    uint64_t now = bn_now_ns(), *oldest = &k->death_ns[k->deaths++ % DEATHS];
    bool often = *oldest && now - *oldest < DEATHS_NS && !getenv("BENNUD_TEST_KILL");
    *oldest = now;
    return often ? SLOW_NS : 0;
}

/* ---- the loop ---- */

static void on_signal(struct keeper *k)
{
    struct signalfd_siginfo si;
    if (read(k->signals, &si, sizeof(si)) != sizeof(si) || si.ssi_signo == SIGCHLD)
        return;
    if (private(k))
        return; /* it ends with its session, which must not be left in the middle */
    k->ending = SIGTERM;
    if (k->worker > 0)
        kill(k->worker, k->ending);
}

static void wait_for_something(struct keeper *k, uint64_t start_ns)
{
    struct pollfd p[2] = {{.fd = k->signals, .events = POLLIN}, {.fd = k->sock, .events = POLLIN}};
    uint64_t now = bn_now_ns();
    int timeout = k->worker ? -1 : start_ns > now ? (int)((start_ns - now) / 1000000) + 1 : 0;
    if (poll(p, 2, timeout) <= 0)
        return;
    if (p[1].revents && !listen_to_worker(k))
        k->sock = bn_close(k->sock);
    if (p[0].revents)
        on_signal(k);
}

static int loop(struct keeper *k)
{
    uint64_t start_ns = 0;
    for (;;) {
        int status;
        if (k->worker == 0 && bn_now_ns() >= start_ns && start_worker(k) < 0)
            start_ns = bn_now_ns() + SLOW_NS;
        if (k->worker)
            k->private_fd = bn_close(k->private_fd); /* its peer must see the worker's end */
        wait_for_something(k, start_ns);
        if (!reap(k, &status))
            continue;
        if (!needs_another(k, status))
            return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
        say(k, status);
        start_ns = bn_now_ns() + note_death(k);
    }
}

/* Every piece of GPU memory is a descriptor, here and in the worker. */
static void lift_limit(void)
{
    struct rlimit want = {KEEPER_FDS_MAX, KEEPER_FDS_MAX}, have;
    if (getrlimit(RLIMIT_NOFILE, &have) < 0 ||
        (have.rlim_max >= want.rlim_max ? 0 : setrlimit(RLIMIT_NOFILE, &want)) == 0) {
        want.rlim_max = have.rlim_max > want.rlim_max ? have.rlim_max : want.rlim_max;
        setrlimit(RLIMIT_NOFILE, &want);
        return;
    }
    have.rlim_cur = have.rlim_max;
    setrlimit(RLIMIT_NOFILE, &have);
}

int bn_keeper_run(const struct keeper_options *o)
{
    struct keeper k = {.o = o, .sock = -1, .private_fd = o->private_fd};
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigprocmask(SIG_BLOCK, &set, NULL);
    k.signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (k.signals < 0) {
        fprintf(stderr, "bennud: cannot watch for signals: %m\n");
        return 1;
    }
    lift_limit();
    int code = loop(&k);
    while (k.kept)
        drop(&k, k.kept->record.key);
    return code;
}
