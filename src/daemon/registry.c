#include "daemon/daemon.h"

#include "base/cleanup.h"

#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <time.h>

/* ---- reports of running sessions ---- */

static bool fits(const struct awaited *a, const struct published *p)
{
    return a->root > 0 ? a->root == p->root : p->root == 0 && a->dev == p->dev && a->ino == p->ino;
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
    pthread_mutex_unlock(&d->lock);
    if (found) {
        bn_report_unref(found->report);
        free(found);
    }
}

int bn_await(struct daemon *d, struct awaited *a, pid_t root, int dirfd)
{
    struct stat st = {0};
    if (root <= 0 && fstat(dirfd, &st) < 0)
        return -errno;
    *a = (struct awaited){.root = root, .dev = st.st_dev, .ino = st.st_ino};
    pthread_mutex_lock(&d->lock);
    for (struct published *p = d->published; p && !a->report; p = p->next)
        if (fits(a, p))
            a->report = bn_report_ref(p->report);
    a->next = d->awaited;
    d->awaited = a;
    pthread_mutex_unlock(&d->lock);
    return 0;
}

struct bn_report *bn_awaited(struct daemon *d, struct awaited *a, unsigned timeout_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += (long)timeout_ms * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;

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

/* ---- suspended trees ---- */

int bn_keep_suspended(struct daemon *d, struct bn_suspended *s)
{
    struct suspended_entry *e = calloc(1, sizeof(*e));
    if (!e)
        return -ENOMEM;
    e->s = s;
    e->root = bn_suspended_root(s);
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
    pthread_mutex_lock(&d->lock);
    for (struct suspended_entry *e = d->suspended; e; e = e->next) {
        if (e->root != pid && !(e->s && bn_targets_index(bn_suspended_targets(e->s), pid) >= 0))
            continue;
        r = e->s ? 0 : -EBUSY;
        *out = e;
        *s = e->s;
        e->s = NULL;
        break;
    }
    pthread_mutex_unlock(&d->lock);
    return r;
}

void bn_return_suspended(struct daemon *d, struct suspended_entry *e, struct bn_suspended *s)
{
    pthread_mutex_lock(&d->lock);
    e->s = s;
    if (!s) {
        for (struct suspended_entry **at = &d->suspended; *at; at = &(*at)->next)
            if (*at == e) {
                *at = e->next;
                break;
            }
        free(e);
    }
    pthread_mutex_unlock(&d->lock);
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
        free(dead);
    }
}

unsigned bn_resume_all(struct daemon *d)
{
    unsigned left = 0;
    bn_reap_suspended(d);
    pthread_mutex_lock(&d->lock);
    struct suspended_entry *e = d->suspended;
    pthread_mutex_unlock(&d->lock);
    while (e) {
        struct suspended_entry *next = e->next, *taken;
        struct bn_suspended *s;
        struct bn_error err = BN_ERROR_INIT;
        struct bn_report *report = bn_report_new();
        if (report && bn_take_suspended(d, e->root, &taken, &s) == 0) {
            if (bn_resume(&s, report, &err) < 0)
                fprintf(stderr, "bennud: cannot resume %d before ending: %s\n", taken->root, err.text);
            left += s != NULL;
            bn_return_suspended(d, taken, s);
        } else {
            left++;
        }
        bn_report_unref(report);
        e = next;
    }
    return left;
}
