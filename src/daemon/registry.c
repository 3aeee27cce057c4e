#include "daemon/daemon.h"

#include "base/cleanup.h"
#include "base/proc.h"

#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <time.h>

/* ---- threads ---- */

struct start {
    struct daemon *d;
    void *(*fn)(void *);
    void *arg;
};

static void *run(void *arg)
{
    struct start s = *(struct start *)arg;
    free(arg);
    s.fn(s.arg);
    pthread_mutex_lock(&s.d->lock);
    s.d->clients--;
    pthread_cond_broadcast(&s.d->clients_changed);
    pthread_mutex_unlock(&s.d->lock);
    return NULL;
}

int bn_daemon_thread(struct daemon *d, void *(*fn)(void *), void *arg)
{
    struct start *s = malloc(sizeof(*s));
    if (!s)
        return -ENOMEM;
    *s = (struct start){d, fn, arg};
    pthread_t thread;
    pthread_mutex_lock(&d->lock);
    int r = pthread_create(&thread, NULL, run, s);
    d->clients += r == 0;
    pthread_mutex_unlock(&d->lock);
    if (r == 0)
        pthread_detach(thread);
    else
        free(s);
    return -r;
}

/* ---- reports of running sessions ---- */

static bool fits(const struct awaited *a, const struct published *p)
{
    if (p->ended || a->root != p->root)
        return false;
    return (a->root > 0 && !a->folder) || (a->dev == p->dev && a->ino == p->ino);
}

int bn_publish(struct daemon *d, struct bn_report *report, pid_t root, int dirfd)
{
    struct published *p = calloc(1, sizeof(*p));
    struct stat st = {0};
    if (!p)
        return -ENOMEM;
    if (dirfd >= 0 && fstat(dirfd, &st) < 0) {
        free(p);
        return -errno;
    }
    *p =
        (struct published){.report = bn_report_ref(report), .root = root, .dev = st.st_dev, .ino = st.st_ino};
    pthread_mutex_lock(&d->lock);
    p->next = d->published;
    d->published = p;
    for (struct awaited *a = d->awaited; a; a = a->next)
        if (!a->report && fits(a, p))
            a->report = bn_report_ref(report);
    pthread_cond_broadcast(&d->published_changed);
    pthread_mutex_unlock(&d->lock);
    return 0;
}

void bn_publish_ended(struct daemon *d, struct bn_report *report)
{
    pthread_mutex_lock(&d->lock);
    for (struct published *p = d->published; p; p = p->next)
        if (p->report == report)
            p->ended = true;
    pthread_mutex_unlock(&d->lock);
}

void bn_unpublish(struct daemon *d, struct bn_report *report)
{
    pthread_mutex_lock(&d->lock);
    struct published *found = NULL;
    for (struct published **at = &d->published; *at; at = &(*at)->next)
        if ((*at)->report == report) {
            found = *at;
            *at = found->next;
            break;
        }
    pthread_cond_broadcast(&d->published_changed);
    pthread_mutex_unlock(&d->lock);
    if (found) {
        bn_report_unref(found->report);
        free(found);
        eventfd_write(d->wake_fd, 1);
    }
}

int bn_await(struct daemon *d, struct awaited *a, pid_t root, int dirfd)
{
    struct stat st = {0};
    if ((root == 0 || dirfd >= 0) && fstat(dirfd, &st) < 0)
        return -errno;
    *a = (struct awaited){.root = root, .folder = dirfd >= 0, .dev = st.st_dev, .ino = st.st_ino};
    pthread_mutex_lock(&d->lock);
    for (struct published *p = d->published; p && !a->report; p = p->next)
        if (fits(a, p))
            a->report = bn_report_ref(p->report);
    a->next = d->awaited;
    d->awaited = a;
    pthread_mutex_unlock(&d->lock);
    return 0;
}

static struct timespec in_ms(unsigned timeout_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += (long)timeout_ms * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    return until;
}

void bn_wait_published(struct daemon *d, unsigned timeout_ms)
{
    struct timespec until = in_ms(timeout_ms);
    pthread_mutex_lock(&d->lock);
    pthread_cond_timedwait(&d->published_changed, &d->lock, &until);
    pthread_mutex_unlock(&d->lock);
}

struct bn_report *bn_awaited(struct daemon *d, struct awaited *a, unsigned timeout_ms)
{
    struct timespec until = in_ms(timeout_ms);
    pthread_mutex_lock(&d->lock);
    while (!a->report && pthread_cond_timedwait(&d->published_changed, &d->lock, &until) == 0)
        ;
    struct bn_report *r = a->report;
    pthread_mutex_unlock(&d->lock);
    return r;
}

void bn_await_end(struct daemon *d, struct awaited *a)
{
    pthread_mutex_lock(&d->lock);
    for (struct awaited **at = &d->awaited; *at; at = &(*at)->next)
        if (*at == a) {
            *at = a->next;
            break;
        }
    pthread_mutex_unlock(&d->lock);
    bn_report_unref(a->report);
}

bool bn_is_awaited(struct daemon *d, struct bn_report *report, bool *cancel)
{
    bool awaited = false;
    pthread_mutex_lock(&d->lock);
    for (struct awaited *a = d->awaited; a; a = a->next)
        awaited = awaited || (a->report == report && a->folder && a->root > 0);
    for (struct published *p = d->published; p && awaited; p = p->next)
        if (p->report == report)
            p->cancel = cancel;
    pthread_mutex_unlock(&d->lock);
    return awaited;
}

bool bn_await_cancel(struct daemon *d, struct awaited *a)
{
    bool found = false;
    pthread_mutex_lock(&d->lock);
    for (struct published *p = d->published; p && a->folder; p = p->next)
        if (p->report == a->report && p->cancel) {
            __atomic_store_n(p->cancel, true, __ATOMIC_RELEASE);
            found = true;
        }
    pthread_mutex_unlock(&d->lock);
    return found;
}

/* ---- suspended trees ---- */

static void entry_free(struct suspended_entry *e)
{
    free(e->held);
    free(e);
}

/* Note what the tree has: for those who ask while somebody works on it. */
static int note(struct suspended_entry *e, const struct bn_suspended *s)
{
    const struct bn_targets *t = bn_suspended_targets(s);
    struct held *held = calloc(t->n ? t->n : 1, sizeof(*held));
    if (!held)
        return -ENOMEM;
    for (size_t i = 0; i < t->n; i++) {
        held[i].pid = t->v[i].pid;
        for (uint32_t tier = 1; tier < BN_TIERS; tier++)
            held[i].bytes[tier] = bn_suspended_bytes(&t->v[i], tier);
    }
    free(e->held);
    e->held = held;
    e->nheld = t->n;
    e->root = bn_suspended_root(s);
    e->tier = bn_suspended_tier(s);
    bn_suspended_usage(s, &e->usage);
    return 0;
}

const struct held *bn_held(const struct suspended_entry *e, pid_t pid)
{
    for (size_t i = 0; i < e->nheld; i++)
        if (e->held[i].pid == pid)
            return &e->held[i];
    return NULL;
}

int bn_keep_suspended(struct daemon *d, struct bn_suspended *s)
{
    struct suspended_entry *e = calloc(1, sizeof(*e));
    if (!e || note(e, s) < 0) {
        free(e);
        return -ENOMEM;
    }
    e->s = s;
    pthread_mutex_lock(&d->lock);
    e->next = d->suspended;
    d->suspended = e;
    pthread_mutex_unlock(&d->lock);
    eventfd_write(d->wake_fd, 1);
    return 0;
}

int bn_take_suspended(struct daemon *d, pid_t pid, struct suspended_entry **out, struct bn_suspended **s)
{
    int r = -ENOENT;
    struct suspended_entry *e;
    pthread_mutex_lock(&d->lock);
    for (;;) { /* the entry may be gone, or another request's, when a move has ended */
        for (e = d->suspended; e && e->root != pid && !bn_held(e, pid);)
            e = e->next;
        if (!e || !e->moving)
            break;
        __atomic_store_n(&e->stop, true, __ATOMIC_RELAXED);
        pthread_cond_wait(&d->published_changed, &d->lock);
    }
    if (e) {
        r = e->s ? 0 : -EBUSY;
        *out = e;
        *s = e->s;
        e->s = NULL;
    }
    pthread_mutex_unlock(&d->lock);
    return r;
}

struct suspended_entry *bn_enter_recovering(struct daemon *d, const struct bn_suspended *s)
{
    struct suspended_entry *e = calloc(1, sizeof(*e));
    if (!e || note(e, s) < 0) {
        free(e);
        return NULL;
    }
    e->recovering = true;
    pthread_mutex_lock(&d->lock);
    e->next = d->suspended;
    d->suspended = e;
    pthread_mutex_unlock(&d->lock);
    return e;
}

bool bn_is_recovering(struct daemon *d, pid_t pid)
{
    bool found = false;
    pthread_mutex_lock(&d->lock);
    for (struct suspended_entry *e = d->suspended; e && !found; e = e->next)
        found = e->recovering && bn_held(e, pid);
    pthread_mutex_unlock(&d->lock);
    return found;
}

void bn_return_suspended(struct daemon *d, struct suspended_entry *e, struct bn_suspended *s)
{
    pthread_mutex_lock(&d->lock);
    e->s = s;
    e->recovering = e->moving = false;
    if (s)
        (void)!note(e, s); /* at worst what is said of it is old */
    pthread_cond_broadcast(&d->published_changed);
    if (!s) {
        for (struct suspended_entry **at = &d->suspended; *at; at = &(*at)->next)
            if (*at == e) {
                *at = e->next;
                break;
            }
        entry_free(e);
    }
    pthread_mutex_unlock(&d->lock);
    eventfd_write(d->wake_fd, 1);
}

void bn_reap_suspended(struct daemon *d)
{
    for (;;) {
        struct suspended_entry *dead = NULL;
        pthread_mutex_lock(&d->lock);
        for (struct suspended_entry **at = &d->suspended; *at; at = &(*at)->next)
            if ((*at)->s && bn_suspended_dead((*at)->s)) {
                dead = *at;
                *at = dead->next;
                break;
            }
        pthread_mutex_unlock(&d->lock);
        if (!dead)
            return;
        bn_suspended_free(dead->s);
        entry_free(dead);
    }
}

static bool contains(const pid_t *pids, size_t n, pid_t pid)
{
    for (size_t i = 0; i < n; i++)
        if (pids[i] == pid)
            return true;
    return false;
}

static bool below(pid_t root, pid_t pid)
{
    bn_auto_free pid_t *pids = NULL;
    size_t n = 0;
    return bn_proc_tree(root, &pids, &n) == 0 && contains(pids, n, pid);
}

static bool touches(const struct suspended_entry *e, const pid_t *tree, size_t n)
{
    if (contains(tree, n, e->root))
        return true;
    for (size_t i = 0; i < n; i++)
        if (bn_held(e, tree[i]))
            return true;
    return false;
}

int bn_tree_is_free(struct daemon *d, const struct bn_report *own, const pid_t *tree, size_t n,
                    struct bn_error *err)
{
    int r = 0;
    pthread_mutex_lock(&d->lock);
    for (struct suspended_entry *e = d->suspended; e && r == 0; e = e->next)
        if (touches(e, tree, n))
            r = e->s || e->moving
                    ? bn_error_set(err, EALREADY, "session",
                                   "process %d is suspended already: 'bennu resume %d' first", e->root,
                                   e->root)
                    : bn_error_set(err, EBUSY, "session",
                                   "process %d is being brought back: try again when it runs", e->root);
    struct published *p = d->published; /* the latest first */
    while (own && p && p->report != own)
        p = p->next;
    for (p = own && p ? p->next : p; p && r == 0; p = p->next) {
        if (p->root <= 0 || !(contains(tree, n, p->root) || below(p->root, tree[0])))
            continue;
        if (p->ended)
            r = bn_error_set(
                err, EAGAIN, "session",
                "the last dump of process %d is done, but the process is not free to run yet: is "
                "it held by a debugger or a frozen cgroup?",
                p->root);
        else
            r = bn_error_set(
                err, EBUSY, "session",
                "bennud is at work on process %d already (a dump, suspend or resume): try again when it "
                "is done",
                p->root);
    }
    pthread_mutex_unlock(&d->lock);
    return r;
}

/* True unless it stays suspended. What the driver has lost holds nothing that could be given back, and nobody up. */
static bool resume_one(struct daemon *d, pid_t root)
{
    struct suspended_entry *e;
    struct bn_suspended *s;
    struct bn_error err = BN_ERROR_INIT;
    int r = bn_take_suspended(d, root, &e, &s);
    if (r < 0)
        return r == -ENOENT;
    struct bn_report *report = bn_report_new();
    r = report ? bn_resume(&s, report, &err) : -ENOMEM;
    if (r < 0 && s && bn_suspended_lost(s)) {
        fprintf(stderr,
                "bennud: the driver has lost the GPU state of process %d or its children: they can only be "
                "killed\n",
                root);
        bn_suspended_free(s);
        s = NULL;
    } else if (r < 0)
        fprintf(stderr, "bennud: cannot resume %d before ending: %s\n", root, err.text);
    bn_return_suspended(d, e, s);
    bn_report_unref(report);
    return s == NULL;
}

unsigned bn_resume_all(struct daemon *d)
{
    unsigned left = 0, n = 0;
    bn_reap_suspended(d);
    pthread_mutex_lock(&d->lock);
    for (struct suspended_entry *e = d->suspended; e; e = e->next)
        n++;
    pid_t *roots = calloc(n ? n : 1, sizeof(*roots));
    n = 0;
    for (struct suspended_entry *e = d->suspended; e && roots; e = e->next)
        roots[n++] = e->root;
    left = roots ? 0 : 1;
    pthread_mutex_unlock(&d->lock);
    for (unsigned i = 0; i < n; i++)
        left += !resume_one(d, roots[i]);
    free(roots);
    return left;
}
