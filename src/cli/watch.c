/* bennu watch: checkpoints of a process at regular times, of which the newest are kept. */
#include "cli/cli.h"

#include "base/cleanup.h"
#include "base/proc.h"
#include "store/catalog.h"
#include "store/encoding.h"
#include "store/image_dir.h"
#include "store/pack.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>

/* Not a lock on DIR itself: that is how bennu store gc keeps a second one away. */
#define LOCK_FILE ".bennu-watch.lock"
#define SECONDS_MAX (366u * 86400u)

static const char *every = "10m", *bandwidth;
static unsigned keep = 3;
static bool json, quiet;
static struct cli_dump_options wanted = {.leave_running = true, .live = true, .drop_log = true};

static const struct cli_option options[] = {
    {"every", 'e', CLI_STRING, "TIME", &every, "begin one so often: a number and s, m or h (default 10m)"},
    {"keep", 'k', CLI_UINT, "N", &keep, "remove the oldest when there are more than N (default 3)"},
    {"bandwidth", 'b', CLI_STRING, "BYTES", &bandwidth,
     "copy at most so many bytes a second while the process runs, with K, M, G or T"},
    {"compress", 'z', CLI_UINT, "LEVEL", &wanted.level,
     "compress GPU memory with zstd, from 1 (fast) to 19 (small)"},
    {"no-space-check", 0, CLI_FLAG, NULL, &wanted.no_space_check, "begin even if the disk looks too small"},
    {"sync", 0, CLI_FLAG, NULL, &wanted.sync_disk, "have each on the disk before the process goes on"},
    {"timeout", 't', CLI_UINT, "SECONDS", &wanted.timeout,
     "how long CRIU may take to stop the processes (default 10)"},
    {"json", 'j', CLI_FLAG, NULL, &json, "print a line with a JSON object for each checkpoint"},
    {"quiet", 'q', CLI_FLAG, NULL, &quiet, "print nothing but errors"},
    {0},
};

struct watch {
    pid_t pid;
    int process;         /* pidfd */
    char path[PATH_MAX]; /* DIR */
    int dir, lock;
    int signals, timer;
};

/* ---- names: in UTC, so that the order of the alphabet is that of time ---- */

#define NAME_FORMAT "%Y%m%dT%H%M%SZ"
#define NAME_SIZE sizeof("20260101T000000Z")

typedef char watch_name[NAME_SIZE];

static bool is_ours(const char *name)
{
    static const char pattern[] = "dddddddd"
                                  "T"
                                  "dddddd"
                                  "Z";
    size_t i = 0;
    for (; pattern[i]; i++)
        if (pattern[i] == 'd' ? name[i] < '0' || name[i] > '9' : name[i] != pattern[i])
            return false;
    return name[i] == 0;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(b, a);
}

/* Everything in DIR that bears such a name, the newest first. The caller frees *out. */
static int list_names(int dirfd, watch_name **out, size_t *n)
{
    int copy = openat(dirfd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_dir DIR *dir = copy >= 0 ? fdopendir(copy) : NULL;
    bn_auto_free watch_name *names = NULL;
    *n = 0;
    if (!dir)
        return -errno;
    for (struct dirent *d; (d = readdir(dir));) {
        if (!is_ours(d->d_name))
            continue;
        watch_name *more = realloc(names, (*n + 1) * sizeof(*more));
        if (!more)
            return -ENOMEM;
        names = more;
        memcpy(names[(*n)++], d->d_name, NAME_SIZE);
    }
    if (*n)
        qsort(names, *n, sizeof(*names), compare_names);
    *out = BN_TAKE_PTR(names);
    return 0;
}

/* Later than every other, also after the clock was set back: else the newest would look old, and be removed. */
static void new_name(const watch_name *names, size_t n, watch_name out)
{
    time_t now = time(NULL);
    struct tm tm = {0};
    for (size_t i = 0; i < n; i++, tm = (struct tm){0})
        if (strptime(names[i], NAME_FORMAT, &tm) && tm.tm_year < 9000 - 1900) {
            time_t last = timegm(&tm);
            now = now > last ? now : last + 1;
        }
    if (!gmtime_r(&now, &tm) || strftime(out, NAME_SIZE, NAME_FORMAT, &tm) == 0)
        out[0] = 0;
}

/* ---- what is there ---- */

static bool is_complete(const struct bn_entry *e)
{
    return e->state == BN_ENTRY_COMPLETE && bn_image_has_criu(e->fd) == 1;
}

/* A parent with a missing or truncated pack would fail every dump from now on. */
static bool can_be_parent(const struct bn_entry *e)
{
    struct bn_pack_reader *reader = NULL;
    bool good = is_complete(e) && bn_pack_reader_open(e->fd, e->m, &reader, NULL) == 0;
    bn_pack_reader_free(reader);
    return good;
}

/* The newest of ours. Before there is one, the newest that anybody has put into DIR: its GPU memory may be the same. */
static bool find_parent(const struct watch *w, const watch_name *names, size_t n, char out[NAME_MAX + 1])
{
    struct bn_catalog c;
    bool found = false;
    for (size_t i = 0; !found && i < n; i++) {
        if (bn_catalog_read_one(w->dir, names[i], &c, NULL) < 0)
            continue;
        found = can_be_parent(&c.entries[0]);
        bn_catalog_free(&c);
        if (found)
            snprintf(out, NAME_MAX + 1, "%s", names[i]);
    }
    if (found || bn_catalog_read(w->dir, &c, NULL) < 0)
        return found;
    for (size_t i = c.n; !found && i-- > 0;) {
        found = can_be_parent(&c.entries[i]);
        if (found)
            snprintf(out, NAME_MAX + 1, "%s", c.entries[i].name);
    }
    bn_catalog_free(&c);
    return found;
}

/* As bennu store rm. Who restores from it, holds it: then it goes after the next checkpoint. */
static void remove_one(const struct watch *w, const struct bn_entry *e)
{
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_fd lock = bn_image_lock(e->fd, true, &err);
    int r = lock < 0 ? lock : 0;
    if (r == 0 || r == -ENOTSUP) /* without locks it goes as well */
        r = bn_entry_remove(w->dir, e, &err);
    if (r < 0 && r != -EBUSY)
        cli_fail(CLI_FAILED, &err, false);
}

static void remove_oldest(const struct watch *w)
{
    bn_auto_free watch_name *names = NULL;
    size_t n, kept = 0;
    if (list_names(w->dir, &names, &n) < 0)
        return;
    for (size_t i = 0; i < n; i++) {
        struct bn_catalog c;
        if (bn_catalog_read_one(w->dir, names[i], &c, NULL) < 0)
            continue;
        if (is_complete(&c.entries[0]) && ++kept > keep)
            remove_one(w, &c.entries[0]);
        bn_catalog_free(&c);
    }
}

/* ---- one checkpoint ---- */

static void report(const struct watch *w, const struct cli_dumped *d)
{
    struct bn_catalog c;
    uint64_t own = 0, shared = 0;
    const char *name = strrchr(d->path, '/') + 1;
    if (bn_catalog_read_one(w->dir, name, &c, NULL) == 0) {
        own = c.entries[0].own;
        shared = c.entries[0].shared;
        bn_catalog_free(&c);
    }
    if (json) {
        json_t *o = cli_json_dumped(w->pid, &wanted, d);
        json_object_set_new(o, "own_bytes", json_integer((json_int_t)own));
        json_object_set_new(o, "shared_bytes", json_integer((json_int_t)shared));
        cli_print_json(o);
    } else if (!quiet) {
        char gpu[16], new[16];
        printf("%s: %s on the GPU, %s new, in %.1f s\n", d->path, cli_bytes(d->gpu_bytes, gpu),
               cli_bytes(own, new), (double)d->took / 1e9);
    }
}

static int checkpoint(const struct watch *w)
{
    char parent[PATH_MAX + NAME_MAX + 2], path[PATH_MAX + NAME_SIZE + 1], from[NAME_MAX + 1];
    bn_auto_free watch_name *names = NULL;
    watch_name name;
    size_t n;
    struct cli_dumped dumped;
    struct bn_error err = BN_ERROR_INIT, why = BN_ERROR_INIT;
    int code = CLI_FAILED, r = list_names(w->dir, &names, &n);
    if (r < 0) {
        bn_error_set(&err, r, "directory", "cannot read %s: %s", w->path, strerror(-r));
        return cli_fail(code, &err, json);
    }
    new_name(names, n, name);
    snprintf(path, sizeof(path), "%s/%s", w->path, name);
    if (find_parent(w, names, n, from)) {
        snprintf(parent, sizeof(parent), "%s/%s", w->path, from);
        wanted.parent = parent;
    }
    code = cli_dump_process(w->pid, path, &wanted, &dumped, &why);
    if (code == CLI_OK) {
        report(w, &dumped);
    } else if (code < 128 && !bn_pidfd_dead(w->process)) {
        bn_error_set(&err, why.code, why.stage, "no checkpoint %s: %s", name, why.text);
        cli_fail(code, &err, json);
    }
    return code;
}

/* In a child, since a process can dump once (cli_dump_process): what libcriu leaves behind ends with it, and a crash there does not
 * end us. It shares our lock, so that nobody else begins before it has ended, too. */
static pid_t start_checkpoint(const struct watch *w)
{
    pid_t ours = getpid();
    fflush(NULL);
    pid_t child = fork();
    if (child != 0)
        return child < 0 ? -errno : child;
    prctl(PR_SET_PDEATHSIG, SIGTERM); /* without us it undoes itself */
    if (getppid() != ours)
        _exit(CLI_FAILED);
    int code = checkpoint(w);
    fflush(NULL);
    _exit(code);
}

/* The signal that has come, or 0. */
static int take_signal(const struct watch *w)
{
    struct signalfd_siginfo info;
    return read(w->signals, &info, sizeof(info)) == sizeof(info) ? (int)info.ssi_signo : 0;
}

/* Make a checkpoint, wait for its end, and remove what is too old. False: a signal has come; it was passed on. */
static bool make_checkpoint(const struct watch *w)
{
    bool go_on = true;
    struct bn_error err = BN_ERROR_INIT;
    pid_t child = start_checkpoint(w);
    bn_auto_fd ended = child > 0 ? bn_pidfd_open(child) : -1;
    if (child < 0) {
        bn_error_set(&err, child, "watch", "cannot start a checkpoint: %s", strerror(-child));
        cli_fail(CLI_FAILED, &err, json);
        return true;
    }
    struct pollfd p[2] = {{.fd = ended, .events = POLLIN}, {.fd = w->signals, .events = POLLIN}};
    while (ended >= 0 && p[0].revents == 0 && (poll(p, 2, -1) >= 0 || errno == EINTR)) {
        int sig = p[1].revents ? take_signal(w) : 0;
        if (sig) {
            kill(child, sig);
            go_on = false;
        }
    }
    int status;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    if (WIFSIGNALED(status)) {
        bn_error_set(&err, ECHILD, "watch",
                     "a dump was ended by signal %d: 'bennu store gc %s' removes what is left of it",
                     WTERMSIG(status), w->path);
        cli_fail(CLI_FAILED, &err, json);
    }
    remove_oldest(w); /* if one has failed there are none, but for one that was in use the last time */
    return go_on;
}

/* ---- the times ---- */

static int parse_time(const char *text, unsigned *seconds)
{
    static const struct {
        char letter;
        unsigned seconds;
    } units[] = {{'s', 1}, {'m', 60}, {'h', 3600}};
    char *end;
    errno = 0;
    unsigned long n = *text >= '0' && *text <= '9' ? strtoul(text, &end, 10) : 0;
    for (size_t i = 0; n && errno == 0 && i < BN_ARRAY_SIZE(units); i++)
        if (end[0] == units[i].letter && !end[1] && n <= SECONDS_MAX / units[i].seconds) {
            *seconds = (unsigned)n * units[i].seconds;
            return 0;
        }
    return -EINVAL;
}

static bool timer_passed(const struct watch *w)
{
    uint64_t times;
    return read(w->timer, &times, sizeof(times)) > 0;
}

/* True: it is time for the next one. False: the process has ended, or a signal has come. Times that passed while the last one was made
 * are skipped. */
static bool wait_for_time(const struct watch *w)
{
    struct pollfd p[3] = {{.fd = w->process, .events = POLLIN},
                          {.fd = w->signals, .events = POLLIN},
                          {.fd = w->timer, .events = POLLIN}};
    timer_passed(w);
    for (;;) {
        if (poll(p, 3, -1) < 0)
            continue;
        if (p[0].revents || (p[1].revents && take_signal(w)))
            return false;
        if (p[2].revents && timer_passed(w))
            return true;
    }
}

static int start_timer(struct watch *w, unsigned seconds, struct bn_error *err)
{
    struct itimerspec t = {.it_interval.tv_sec = seconds, .it_value.tv_sec = seconds};
    w->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (w->timer < 0 || timerfd_settime(w->timer, 0, &t, NULL) < 0)
        return bn_error_set(err, errno, "watch", "cannot make a timer: %m");
    return 0;
}

/* ---- begin and end ---- */

static int open_directory(struct watch *w, const char *path, struct bn_error *err)
{
    if (mkdir(path, 0700) < 0 && errno != EEXIST)
        return bn_error_set(err, errno, "directory", "cannot make the directory %s: %m", path);
    w->dir = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (w->dir < 0 || !realpath(path, w->path))
        return bn_error_set(err, errno, "directory", "cannot open the directory %s: %m", path);
    w->lock = openat(w->dir, LOCK_FILE, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (w->lock < 0)
        return bn_error_set(err, errno, "directory", "cannot write to the directory %s: %m", path);
    if (flock(w->lock, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK)
        return bn_error_set(err, EBUSY, "directory",
                            "another bennu watch writes to %s: name another directory, or end that one",
                            path);
    return 0;
}

/* What would fail every time. */
static int begin(struct watch *w, const char *path, unsigned seconds, struct bn_error *err)
{
    struct cli_criu criu;
    int r = cli_check_process(w->pid, true, err);
    if (r == 0 && (w->process = bn_pidfd_open(w->pid)) < 0)
        r = bn_error_set(err, w->process, "process", "cannot watch process %d: %s", w->pid,
                         strerror(-w->process));
    if (r == 0)
        r = cli_criu_find(&criu, err);
    if (r == 0)
        r = open_directory(w, path, err);
    if (r == 0 && (w->signals = cli_signals_fd()) < 0)
        r = bn_error_set(err, w->signals, "watch", "cannot wait for signals: %s", strerror(-w->signals));
    return r < 0 ? r : start_timer(w, seconds, err);
}

static int watch(int argc, char **argv)
{
    (void)argc;
    unsigned seconds;
    struct bn_error err = BN_ERROR_INIT;
    struct watch w = {.process = -1, .dir = -1, .lock = -1, .signals = -1, .timer = -1};
    if (cli_parse_pid(argv[0], &w.pid) < 0)
        return cli_usage("'%s' is not a process id", argv[0]);
    if (parse_time(every, &seconds) < 0)
        return cli_usage("--every takes a number and s, m or h, as in 10m, not '%s'", every);
    if (keep == 0)
        return cli_usage("--keep takes a number from 1 on");
    if (wanted.level > BN_COMPRESS_MAX)
        return cli_usage("--compress takes a level from 1 to %u, not %u", BN_COMPRESS_MAX, wanted.level);
    if (cli_parse_bandwidth(bandwidth, &wanted.per_second) < 0)
        return cli_usage("'%s' is no number of bytes a second", bandwidth);
    int code = CLI_OK;
    if (begin(&w, argv[1], seconds, &err) < 0)
        code = cli_fail(CLI_FAILED, &err, json);
    while (code == CLI_OK && make_checkpoint(&w) && wait_for_time(&w))
        ;
    bn_close(w.timer);
    bn_close(w.signals);
    bn_close(w.lock);
    bn_close(w.dir);
    bn_close(w.process);
    return code;
}

const struct cli_command cli_watch_process = {
    .name = "watch",
    .operands = "PID DIR",
    .summary = "Save a process again and again while it runs, and keep the newest checkpoints",
    .options = options,
    .min = 2,
    .max = 2,
    .needed = "two operands are needed: PID and DIR",
    .run = watch,
};
