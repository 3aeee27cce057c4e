#include "restore/host_fill.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/parallel.h"
#include "store/host_pages.h"
#include "wire/packet.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>

#define THREADS_MAX 16u
#define PIECE ((uint64_t)512 << 10) /* bytes: read and copied while it is in the processor's cache */
#define FINISHED 0x52535446         /* CRIU's word in the place of a pid: every process has been sent */
#define SEND_SECONDS 10             /* CRIU sends a pid and a descriptor one right after the other */
#define LOOK_NS 200000
#define PATIENCE_NS UINT64_C(10000000000) /* for a process to register its memory after CRIU has gone */

enum { AT_WAKE, AT_CRIU, AT_PROCESSES }; /* what the server waits for */

struct piece {
    struct process *p;
    uint64_t va, bytes, offset;
};

struct process {
    pid_t pid; /* in the image */
    int uffd, pages;
    struct bn_pagemap map;
    /* The rest with the lock held. What is left: from here on in the map, and what was given back. */
    size_t range;
    uint64_t offset;
    struct piece back[THREADS_MAX];
    unsigned nback;
    bool registers;      /* it has begun to */
    bool touches;        /* what is registered: CRIU's code in it does that only when all is */
    uint64_t not_before; /* ns: it had not registered what was tried */
};

struct bn_host_fill {
    struct bn_env *env;
    struct bn_report *report;
    int phase;
    int dir, listener, conn, wake;
    pthread_t server, workers[THREADS_MAX];
    unsigned nworkers;
    bool serving;

    pthread_mutex_t lock; /* of all below */
    pthread_cond_t changed;
    struct process **v; /* the server alone adds to it */
    struct pollfd *at;  /* the server's, for all of them */
    size_t n, cap;
    size_t turn;          /* the process to be looked at first */
    size_t busy;          /* pieces under way */
    bool all_sent;        /* by CRIU */
    bool hung_up;         /* before that */
    bool stop;            /* the server */
    uint64_t orphaned_ns; /* since when nobody waits for the end; 0: somebody does */
    uint64_t bytes;
    struct bn_error err;
};

static void wake_server(struct bn_host_fill *f)
{
    uint64_t one = 1;
    if (write(f->wake, &one, sizeof(one)) < 0) {
        /* Full: it is awake. */
    }
}

static void fail(struct bn_host_fill *f, const struct bn_error *err)
{
    pthread_mutex_lock(&f->lock);
    if (!bn_error_is_set(&f->err))
        f->err = *err;
    pthread_cond_broadcast(&f->changed);
    pthread_mutex_unlock(&f->lock);
    wake_server(f);
}

/* ---- what is left: all of it with the lock held ---- */

static bool has_some(const struct process *p)
{
    return p->nback > 0 || p->range < p->map.n;
}

static bool some_left(const struct bn_host_fill *f)
{
    for (size_t i = 0; i < f->n; i++)
        if (has_some(f->v[i]))
            return true;
    return false;
}

static bool nothing_left(const struct bn_host_fill *f)
{
    return (f->all_sent || f->hung_up) && !some_left(f);
}

/* A single page, until it is known that pages can be taken. */
static struct piece cut(struct process *p)
{
    if (p->nback > 0)
        return p->back[--p->nback];
    const struct bn_page_range *range = &p->map.ranges[p->range];
    uint64_t left = range->bytes - p->offset, most = p->registers ? PIECE : BN_PAGE;
    struct piece piece = {p, range->va + p->offset, left < most ? left : most, range->offset + p->offset};
    p->offset += piece.bytes;
    if (p->offset == range->bytes) {
        p->offset = 0;
        p->range++;
    }
    return piece;
}

/* The next process, in turn, that has something left and may be tried. */
static struct process *choose(struct bn_host_fill *f)
{
    uint64_t now = bn_now_ns();
    for (size_t i = 0; i < f->n; i++) {
        struct process *p = f->v[(f->turn + i) % f->n];
        if (has_some(p) && p->not_before <= now) {
            f->turn = (f->turn + i) % f->n;
            return p;
        }
    }
    return NULL;
}

/* ---- filling in: the workers ---- */

static bool take(struct bn_host_fill *f, struct piece *piece)
{
    struct process *p = NULL;
    pthread_mutex_lock(&f->lock);
    while (!p && !bn_error_is_set(&f->err) && !nothing_left(f)) {
        p = choose(f);
        if (p) {
            *piece = cut(p);
            f->busy++;
        } else if (some_left(f)) { /* but none may be tried yet */
            pthread_mutex_unlock(&f->lock);
            nanosleep(&(struct timespec){.tv_nsec = LOOK_NS}, NULL);
            pthread_mutex_lock(&f->lock);
        } else {
            pthread_cond_wait(&f->changed, &f->lock);
        }
    }
    pthread_mutex_unlock(&f->lock);
    return p != NULL;
}

/* `bytes` of it are there; the rest is tried again. */
static void done(struct bn_host_fill *f, const struct piece *piece, uint64_t bytes)
{
    struct process *p = piece->p;
    pthread_mutex_lock(&f->lock);
    bool first = f->bytes == 0 && bytes > 0;
    f->busy--;
    f->bytes += bytes;
    if (bytes > 0)
        p->registers = true;
    if (bytes < piece->bytes) {
        p->back[p->nback++] =
            (struct piece){p, piece->va + bytes, piece->bytes - bytes, piece->offset + bytes};
        p->not_before = bn_now_ns() + LOOK_NS;
        f->turn++; /* CRIU may let it register only when another process has its memory */
    }
    pthread_cond_broadcast(&f->changed);
    pthread_mutex_unlock(&f->lock);
    if (first)
        bn_kill_point(f->env, "host-memory", "one");
}

static bool failed(struct bn_host_fill *f)
{
    pthread_mutex_lock(&f->lock);
    bool is = bn_error_is_set(&f->err);
    pthread_mutex_unlock(&f->lock);
    return is;
}

/* May memory still be registered? CRIU lets processes do that before it says that all have been sent. */
static bool may_come(struct bn_host_fill *f, const struct process *p)
{
    pthread_mutex_lock(&f->lock);
    bool may =
        !f->all_sent && !p->touches && (f->orphaned_ns == 0 || bn_now_ns() - f->orphaned_ns < PATIENCE_NS);
    pthread_mutex_unlock(&f->lock);
    return may;
}

/* *at: how much of it is there. The kernel takes what lies within one registered mapping, and a piece may lie in several; so less and
 * less is tried. -ENOENT: not a single page is registered, but may be later; -ECANCELED: the filling has failed. */
static int copy_in(struct bn_host_fill *f, const struct piece *piece, const uint8_t *data, uint64_t *at)
{
    uint64_t len = piece->bytes;
    while (*at < piece->bytes) {
        bool may = may_come(f, piece->p);
        struct uffdio_copy copy = {.dst = piece->va + *at, .src = (uintptr_t)data + *at, .len = len};
        if (ioctl(piece->p->uffd, UFFDIO_COPY, &copy) == 0 || copy.copy > 0) {
            *at += (uint64_t)copy.copy;
            len = piece->bytes - *at;
        } else if (errno == ENOENT && len > BN_PAGE) {
            len = len / 2 / BN_PAGE * BN_PAGE;
        } else if (errno != EAGAIN) {
            return errno == ENOENT && !may ? -EADDRNOTAVAIL : -errno;
        } else if (failed(f)) {
            /* Its mappings are just being changed, and the server reads of that only when we have ended. */
            return -ECANCELED;
        }
    }
    return 0;
}

static int fill_piece(struct bn_host_fill *f, const struct piece *piece, void *data, uint64_t *at,
                      struct bn_error *err)
{
    int r = bn_pread_full(piece->p->pages, data, piece->bytes, piece->offset);
    if (r < 0)
        return bn_error_set(err, r == -ENODATA ? EBADMSG : r, "host-memory",
                            "the memory of process %d cannot be read from the checkpoint: %s", piece->p->pid,
                            r == -ENODATA ? "a file is too short" : strerror(-r));
    r = copy_in(f, piece, data, at);
    if (r == -ENOENT || r == -ECANCELED)
        return 0;
    if (r == -ESRCH)
        return bn_error_set(err, ESRCH, "host-memory", "process %d ended while it was being restored",
                            piece->p->pid);
    return r < 0 ? bn_error_set(
                       err, r, "host-memory",
                       "cannot fill in the memory of process %d at %#llx: %s (restore it with --criu-memory)",
                       piece->p->pid, (unsigned long long)(piece->va + *at), strerror(-r))
                 : 0;
}

static void *work(void *arg)
{
    struct bn_host_fill *f = arg;
    struct piece piece;
    bn_auto_free void *data = NULL;
    struct bn_error err = BN_ERROR_INIT;
    if (posix_memalign(&data, BN_PAGE, PIECE) != 0) {
        data = NULL;
        bn_error_set(&err, ENOMEM, "host-memory", "out of memory");
        fail(f, &err);
    }
    while (data && take(f, &piece)) {
        uint64_t at = 0;
        if (fill_piece(f, &piece, data, &at, &err) < 0)
            fail(f, &err);
        done(f, &piece, at);
    }
    return NULL;
}

/* ---- what CRIU sends, and what its code in the processes touches: the server ---- */

static void free_process(struct process *p)
{
    if (!p)
        return;
    bn_close(p->uffd);
    bn_close(p->pages);
    bn_pagemap_free(&p->map);
    free(p);
}

/* For one more process. The server's thread. */
static int make_room(struct bn_host_fill *f)
{
    size_t cap = f->n < f->cap ? f->cap : 2 * f->cap + 16;
    struct pollfd *at = reallocarray(f->at, AT_PROCESSES + cap, sizeof(*at));
    f->at = at ? at : f->at;
    pthread_mutex_lock(&f->lock);
    struct process **v = reallocarray(f->v, cap, sizeof(struct process *));
    f->v = v ? v : f->v;
    f->cap = at && v ? cap : f->cap;
    pthread_mutex_unlock(&f->lock);
    return at && v ? 0 : -ENOMEM;
}

static int add_process(struct bn_host_fill *f, pid_t pid, int uffd, struct bn_error *err)
{
    struct process *p = make_room(f) == 0 ? calloc(1, sizeof(*p)) : NULL;
    if (!p) {
        bn_close(uffd);
        return bn_error_set(err, ENOMEM, "host-memory", "out of memory");
    }
    *p = (struct process){.pid = pid, .uffd = uffd};
    p->pages = bn_host_pages_open(f->dir, pid, &p->map, err);
    if (p->pages < 0) {
        free_process(p);
        return -err->code;
    }
    pthread_mutex_lock(&f->lock);
    f->v[f->n++] = p;
    pthread_cond_broadcast(&f->changed);
    pthread_mutex_unlock(&f->lock);
    return 0;
}

static void sent(struct bn_host_fill *f, bool all)
{
    pthread_mutex_lock(&f->lock);
    f->all_sent = all;
    f->hung_up = !all;
    pthread_cond_broadcast(&f->changed);
    pthread_mutex_unlock(&f->lock);
}

static int receive(struct bn_host_fill *f, struct bn_error *err)
{
    int32_t word;
    ssize_t n = recv(f->conn, &word, sizeof(word), MSG_WAITALL);
    if (n != sizeof(word) || word == FINISHED) {
        sent(f, n == sizeof(word));
        return 0;
    }
    if (word < 0) /* a process that had ended and was not collected: it has no memory */
        return 0;
    char byte;
    int uffd;
    size_t len, nfds;
    int r = bn_packet_recv(f->conn, &byte, 1, &len, &uffd, 1, &nfds);
    if (r < 0 || nfds == 0)
        return bn_error_set(err, r < 0 ? r : EBADMSG, "host-memory", "CRIU sent no descriptor for process %d",
                            word);
    if (f->phase < 0)
        f->phase = bn_report_begin(f->report, "host-memory");
    return add_process(f, word, uffd, err);
}

/* After a failure: CRIU must not be killed for writing into a closed socket. */
static int discard(struct bn_host_fill *f)
{
    char bytes[64];
    size_t len;
    if (bn_packet_recv(f->conn, bytes, sizeof(bytes), &len, NULL, 0, NULL) < 0)
        sent(f, false);
    return 0;
}

static bool in_image(const struct process *p, uint64_t va)
{
    uint32_t low = 0, high = p->map.n;
    while (low < high) {
        uint32_t mid = low + (high - low) / 2;
        if (p->map.ranges[mid].va + p->map.ranges[mid].bytes <= va)
            low = mid + 1;
        else
            high = mid;
    }
    return low < p->map.n && p->map.ranges[low].va <= va;
}

/* What the image has comes anyway. Anything else was never touched before the dump. */
static void serve_faults(struct bn_host_fill *f, struct process *p)
{
    struct uffd_msg m;
    while (read(p->uffd, &m, sizeof(m)) == sizeof(m)) {
        if (m.event == UFFD_EVENT_FORK)
            bn_close((int)m.arg.fork.ufd);
        uint64_t va = m.arg.pagefault.address & ~(uint64_t)(BN_PAGE - 1);
        if (m.event != UFFD_EVENT_PAGEFAULT)
            continue;
        pthread_mutex_lock(&f->lock);
        p->touches = true;
        pthread_mutex_unlock(&f->lock);
        if (in_image(p, va))
            continue;
        struct uffdio_zeropage zero = {.range = {va, BN_PAGE}};
        if (ioctl(p->uffd, UFFDIO_ZEROPAGE, &zero) < 0)
            ioctl(p->uffd, UFFDIO_WAKE, &zero.range);
    }
}

static int accept_criu(struct bn_host_fill *f, struct bn_error *err)
{
    f->conn = accept4(f->listener, NULL, NULL, SOCK_CLOEXEC);
    if (f->conn < 0) {
        int code = errno;
        sent(f, false);
        return bn_error_set(err, code, "host-memory", "cannot take CRIU's connection: %s", strerror(code));
    }
    struct timeval patience = {.tv_sec = SEND_SECONDS};
    setsockopt(f->conn, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    return 0;
}

static bool is_orphaned(struct bn_host_fill *f)
{
    pthread_mutex_lock(&f->lock);
    bool is = f->orphaned_ns != 0;
    pthread_mutex_unlock(&f->lock);
    return is;
}

/* CRIU must come to its end, where it learns of the failure: its code in the processes may wait for memory that nobody will fill in. */
static void let_processes_go(struct bn_host_fill *f)
{
    pthread_mutex_lock(&f->lock);
    while (f->busy > 0)
        pthread_cond_wait(&f->changed, &f->lock);
    pthread_mutex_unlock(&f->lock);
    for (size_t i = 0; i < f->n; i++)
        f->v[i]->uffd = bn_close(f->v[i]->uffd);
}

/* CRIU is gone: what it has sent is still to be read. */
static void orphaned(struct bn_host_fill *f)
{
    if (f->conn >= 0)
        shutdown(f->conn, SHUT_RD);
    else
        sent(f, false);
}

static int serve_once(struct bn_host_fill *f, struct bn_error *err)
{
    struct pollfd *at = f->at;
    bool listens = !f->all_sent && !f->hung_up; /* written by this thread alone */
    at[AT_WAKE] = (struct pollfd){.fd = f->wake, .events = POLLIN};
    at[AT_CRIU] = (struct pollfd){.fd = !listens       ? -1
                                        : f->conn >= 0 ? f->conn
                                                       : f->listener,
                                  .events = POLLIN};
    for (size_t i = 0; i < f->n; i++)
        at[AT_PROCESSES + i] = (struct pollfd){.fd = f->v[i]->uffd, .events = POLLIN};
    size_t n = f->n;
    if (poll(at, AT_PROCESSES + n, -1) < 0)
        return errno == EINTR ? 0 : bn_error_set(err, errno, "host-memory", "cannot wait for events: %m");
    uint64_t told;
    if (at[AT_WAKE].revents && read(f->wake, &told, sizeof(told)) > 0 && is_orphaned(f))
        orphaned(f);
    for (size_t i = 0; i < n; i++)
        if (at[AT_PROCESSES + i].revents)
            serve_faults(f, f->v[i]);
    if (!at[AT_CRIU].revents)
        return 0;
    return f->conn < 0 ? accept_criu(f, err) : failed(f) ? discard(f) : receive(f, err);
}

static void *serve(void *arg)
{
    struct bn_host_fill *f = arg;
    for (bool stop = false; !stop;) {
        struct bn_error err = BN_ERROR_INIT;
        serve_once(f, &err);
        if (bn_error_is_set(&err))
            fail(f, &err);
        if (failed(f))
            let_processes_go(f);
        pthread_mutex_lock(&f->lock);
        stop = f->stop;
        pthread_mutex_unlock(&f->lock);
    }
    return NULL;
}

/* ---- life ---- */

/* Joins all threads and lets go of every process: what is missing in one from then on reads as zero. */
static void end(struct bn_host_fill *f)
{
    for (unsigned i = 0; i < f->nworkers; i++)
        pthread_join(f->workers[i], NULL);
    f->nworkers = 0;
    pthread_mutex_lock(&f->lock);
    f->stop = true;
    pthread_mutex_unlock(&f->lock);
    wake_server(f);
    if (f->serving)
        pthread_join(f->server, NULL);
    f->serving = false;
    for (size_t i = 0; i < f->n; i++)
        free_process(f->v[i]);
    f->n = 0;
    f->conn = bn_close(f->conn);
    f->listener = bn_close(f->listener);
}

int bn_host_fill_start(struct bn_env *env, int dirfd, int listener, struct bn_report *report,
                       struct bn_host_fill **out, struct bn_error *err)
{
    struct bn_host_fill *f = calloc(1, sizeof(*f));
    if (!f)
        return bn_error_set(err, ENOMEM, "host-memory", "out of memory");
    *f = (struct bn_host_fill){.env = env,
                               .report = bn_report_ref(report),
                               .phase = -1,
                               .dir = fcntl(dirfd, F_DUPFD_CLOEXEC, 0),
                               .listener = fcntl(listener, F_DUPFD_CLOEXEC, 0),
                               .conn = -1,
                               .wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK),
                               .lock = PTHREAD_MUTEX_INITIALIZER,
                               .changed = PTHREAD_COND_INITIALIZER};
    if (f->dir < 0 || f->listener < 0 || f->wake < 0) {
        bn_error_set(err, errno, "host-memory", "no descriptors are left: %m");
    } else if (make_room(f) < 0) {
        bn_error_set(err, ENOMEM, "host-memory", "out of memory");
    } else {
        int r = -pthread_create(&f->server, NULL, serve, f);
        f->serving = r == 0;
        unsigned n = bn_cores(THREADS_MAX);
        while (r == 0 && f->nworkers < n && pthread_create(&f->workers[f->nworkers], NULL, work, f) == 0)
            f->nworkers++;
        if (f->nworkers == 0)
            bn_error_set(err, EAGAIN, "host-memory", "cannot start a thread");
    }
    if (bn_error_is_set(err)) {
        bn_host_fill_free(f);
        return -err->code;
    }
    *out = f;
    return 0;
}

int bn_host_fill_finish(struct bn_host_fill *f, struct bn_error *err)
{
    pthread_mutex_lock(&f->lock);
    while (!bn_error_is_set(&f->err) && !(nothing_left(f) && f->busy == 0))
        pthread_cond_wait(&f->changed, &f->lock);
    if (!bn_error_is_set(&f->err) && !f->all_sent)
        bn_error_set(&f->err, EPIPE, "host-memory", "CRIU ended before it had restored all processes");
    bool failed = bn_error_is_set(&f->err);
    pthread_mutex_unlock(&f->lock);
    if (failed)
        return bn_error_set(err, f->err.code, f->err.stage, "%s", f->err.text);
    end(f);
    bn_report_end(f->report, f->phase, f->bytes);
    f->phase = -1;
    return 0;
}

void bn_host_fill_free(struct bn_host_fill *f)
{
    if (!f)
        return;
    pthread_mutex_lock(&f->lock);
    f->orphaned_ns = bn_now_ns();
    pthread_mutex_unlock(&f->lock);
    wake_server(f);
    end(f);
    bn_report_unref(f->report);
    bn_close(f->dir);
    bn_close(f->wake);
    pthread_mutex_destroy(&f->lock);
    pthread_cond_destroy(&f->changed);
    free(f->v);
    free(f->at);
    free(f);
}
