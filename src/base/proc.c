#include "base/proc.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <ctype.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>

#define PROC_TREE_MAX 65536u

static int read_proc(pid_t pid, const char *file, char **out)
{
    char path[64];
    size_t len;
    void *data;
    snprintf(path, sizeof(path), "/proc/%d/%s", pid, file);
    int r = bn_read_file_at(AT_FDCWD, path, 1 << 20, &data, &len);
    if (r < 0)
        return r == -ENOENT ? -ESRCH : r;
    *out = data;
    return 0;
}

/* /proc/PID/stat after the command name, which may hold spaces and brackets itself. */
static int read_stat(pid_t pid, char **buf, char **rest)
{
    int r = read_proc(pid, "stat", buf);
    if (r < 0)
        return r;
    char *close = strrchr(*buf, ')');
    if (!close || close[1] != ' ')
        return -EIO;
    *rest = close + 2;
    return 0;
}

int bn_proc_start_time(pid_t pid, uint64_t *ticks)
{
    bn_auto_free char *buf = NULL;
    char *rest;
    int r = read_stat(pid, &buf, &rest);
    if (r < 0)
        return r;
    /* field 22 of the whole line is field 20 after the name (proc(5)) */
    for (int i = 0; i < 19; i++) {
        rest = strchr(rest, ' ');
        if (!rest)
            return -EIO;
        rest++;
    }
    *ticks = strtoull(rest, NULL, 10);
    return 0;
}

int bn_proc_state(pid_t pid, char *state)
{
    bn_auto_free char *buf = NULL;
    char *rest;
    int r = read_stat(pid, &buf, &rest);
    if (r == 0)
        *state = rest[0];
    return r;
}

static int status_field(pid_t pid, const char *key, bool last, pid_t *out)
{
    bn_auto_free char *buf = NULL;
    int r = read_proc(pid, "status", &buf);
    if (r < 0)
        return r;
    char *at = strstr(buf, key);
    if (!at)
        return -EIO;
    at += strlen(key);
    char *eol = strchr(at, '\n');
    if (eol)
        *eol = 0;
    if (last) {
        char *tab = strrchr(at, '\t');
        if (tab)
            at = tab;
    }
    *out = (pid_t)strtol(at, NULL, 10);
    return 0;
}

int bn_proc_inner_pid(pid_t pid, pid_t *inner)
{
    return status_field(pid, "\nNSpid:", true, inner);
}
int bn_proc_tracer(pid_t pid, pid_t *tracer)
{
    return status_field(pid, "\nTracerPid:", false, tracer);
}

pid_t bn_proc_thread(pid_t pid, pid_t inner)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/task", pid);
    bn_auto_dir DIR *d = opendir(path);
    if (!d)
        return errno == ENOENT ? -ESRCH : -errno;
    for (struct dirent *e = readdir(d); e; e = readdir(d)) {
        /* Any thread has a folder of its own below /proc, unlisted. */
        pid_t tid = (pid_t)strtol(e->d_name, NULL, 10), seen;
        if (tid > 0 && bn_proc_inner_pid(tid, &seen) == 0 && seen == inner)
            return tid;
    }
    return -ESRCH;
}

int bn_proc_comm(pid_t pid, char out[16])
{
    bn_auto_free char *buf = NULL;
    int r = read_proc(pid, "comm", &buf);
    if (r < 0)
        return r;
    buf[strcspn(buf, "\n")] = 0;
    snprintf(out, 16, "%.15s", buf);
    return 0;
}

struct pid_list {
    pid_t *pids;
    size_t n, cap;
};

static int push(struct pid_list *l, pid_t pid)
{
    if (l->n >= PROC_TREE_MAX)
        return -E2BIG;
    if (l->n == l->cap) {
        size_t cap = l->cap ? l->cap * 2 : 64;
        pid_t *more = reallocarray(l->pids, cap, sizeof(pid_t));
        if (!more)
            return -ENOMEM;
        l->pids = more;
        l->cap = cap;
    }
    l->pids[l->n++] = pid;
    return 0;
}

static int push_children_of_thread(pid_t pid, const char *tid, struct pid_list *l)
{
    char file[64];
    bn_auto_free char *buf = NULL;
    snprintf(file, sizeof(file), "task/%.20s/children", tid);
    int r = read_proc(pid, file, &buf);
    if (r < 0)
        return r == -ESRCH ? 0 : r; /* the thread ended meanwhile */
    for (char *save = NULL, *tok = strtok_r(buf, " ", &save); tok && r == 0; tok = strtok_r(NULL, " ", &save))
        r = push(l, (pid_t)strtol(tok, NULL, 10));
    return r;
}

static int push_children(pid_t pid, struct pid_list *l)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/task", pid);
    bn_auto_dir DIR *d = opendir(path);
    if (!d)
        return errno == ENOENT ? 0 : -errno;
    for (struct dirent *e = readdir(d); e; e = readdir(d)) {
        if (!isdigit((unsigned char)e->d_name[0]))
            continue;
        int r = push_children_of_thread(pid, e->d_name, l);
        if (r < 0)
            return r;
    }
    return 0;
}

int bn_proc_tree(pid_t root, pid_t **pids, size_t *n)
{
    char state;
    int r = bn_proc_state(root, &state);
    if (r < 0)
        return r;
    struct pid_list l = {0};
    r = push(&l, root);
    for (size_t i = 0; r == 0 && i < l.n; i++)
        r = push_children(l.pids[i], &l);
    if (r < 0) {
        free(l.pids);
        return r;
    }
    *pids = l.pids;
    *n = l.n;
    return 0;
}

int bn_proc_all(pid_t **pids, size_t *n)
{
    bn_auto_dir DIR *d = opendir("/proc");
    if (!d)
        return -errno;
    struct pid_list l = {0};
    for (struct dirent *e = readdir(d); e; e = readdir(d)) {
        if (!isdigit((unsigned char)e->d_name[0]))
            continue;
        int r = push(&l, (pid_t)strtol(e->d_name, NULL, 10));
        if (r < 0) {
            free(l.pids);
            return r;
        }
    }
    *pids = l.pids;
    *n = l.n;
    return 0;
}

int bn_proc_maps(pid_t pid, const char *const *texts, size_t n)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/maps", pid);
    bn_auto_file FILE *f = fopen(path, "re");
    if (!f)
        return errno == ENOENT ? -ESRCH : -errno;
    bn_auto_free char *line = NULL;
    size_t cap = 0;
    while (getline(&line, &cap, f) > 0)
        for (size_t i = 0; i < n; i++)
            if (strstr(line, texts[i]))
                return 1;
    return 0;
}

int bn_proc_open_memfd(pid_t pid, const char *name, bool (*accept)(int fd, void *arg), void *arg)
{
    char path[64], want[64], link[256];
    snprintf(path, sizeof(path), "/proc/%d/fd", pid);
    snprintf(want, sizeof(want), "/memfd:%s (deleted)", name);
    bn_auto_dir DIR *d = opendir(path);
    if (!d)
        return errno == ENOENT ? -ESRCH : -errno;
    int unknown = 0;
    for (struct dirent *e = readdir(d); e; e = readdir(d)) {
        ssize_t len = readlinkat(dirfd(d), e->d_name, link, sizeof(link) - 1);
        if (len < 0)
            continue;
        link[len] = 0;
        if (strcmp(link, want) != 0)
            continue;
        bn_auto_fd fd = openat(dirfd(d), e->d_name, O_RDWR | O_CLOEXEC);
        if (fd < 0 && errno != ENOENT && errno != ESRCH)
            unknown = -errno;
        if (fd >= 0 && (!accept || accept(fd, arg)))
            return BN_TAKE_FD(fd);
    }
    return unknown ? unknown : -ENOENT;
}

int bn_pidfd_open(pid_t pid)
{
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    return fd < 0 ? -errno : fd;
}

int bn_pidfd_getfd(int pidfd, int fd)
{
    int got = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0);
    return got < 0 ? -errno : got;
}

bool bn_pidfd_dead(int pidfd)
{
    struct pollfd p = {.fd = pidfd, .events = POLLIN};
    return poll(&p, 1, 0) > 0 && (p.revents & POLLIN);
}
