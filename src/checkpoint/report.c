#include "checkpoint/report.h"

#include "base/io.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct bn_report {
    pthread_mutex_t lock;
    pthread_cond_t ended;
    unsigned refs;
    uint64_t began_ns;
    struct bn_phases phases;
    struct bn_progress progress;
    bool finished;
    unsigned woken; /* calls of bn_report_wake */
    struct bn_error err;
};

struct bn_report *bn_report_new(void)
{
    struct bn_report *r = calloc(1, sizeof(*r));
    if (!r)
        return NULL;
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&r->ended, &attr);
    pthread_condattr_destroy(&attr);
    pthread_mutex_init(&r->lock, NULL);
    r->refs = 1;
    r->began_ns = bn_now_ns();
    return r;
}

struct bn_report *bn_report_ref(struct bn_report *r)
{
    pthread_mutex_lock(&r->lock);
    r->refs++;
    pthread_mutex_unlock(&r->lock);
    return r;
}

void bn_report_unref(struct bn_report *r)
{
    if (!r)
        return;
    pthread_mutex_lock(&r->lock);
    unsigned left = --r->refs;
    pthread_mutex_unlock(&r->lock);
    if (left > 0)
        return;
    pthread_cond_destroy(&r->ended);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

int bn_report_begin(struct bn_report *r, const char *name)
{
    pthread_mutex_lock(&r->lock);
    int i = -1;
    if (r->phases.n < BN_PHASES_MAX) {
        i = (int)r->phases.n++;
        struct bn_phase *p = &r->phases.phase[i];
        snprintf(p->name, sizeof(p->name), "%s", name);
        p->start_ns = bn_now_ns() - r->began_ns;
    }
    snprintf(r->progress.phase, sizeof(r->progress.phase), "%s", name);
    r->progress.done = r->progress.total = 0;
    pthread_mutex_unlock(&r->lock);
    return i;
}

void bn_report_end(struct bn_report *r, int phase, uint64_t bytes)
{
    bn_report_end_at(r, phase, bn_now_ns(), bytes);
}

void bn_report_end_at(struct bn_report *r, int phase, uint64_t end_ns, uint64_t bytes)
{
    if (phase < 0)
        return;
    pthread_mutex_lock(&r->lock);
    struct bn_phase *p = &r->phases.phase[phase];
    p->duration_ns = end_ns - r->began_ns - p->start_ns;
    p->bytes = bytes;
    pthread_mutex_unlock(&r->lock);
}

static const struct bn_phase *find(const struct bn_phases *all, const char *name)
{
    for (uint32_t i = 0; i < all->n; i++)
        if (strcmp(all->phase[i].name, name) == 0)
            return &all->phase[i];
    return NULL;
}

void bn_report_span(struct bn_report *r, const char *first, const char *last, const char *name)
{
    pthread_mutex_lock(&r->lock);
    const struct bn_phase *a = find(&r->phases, first), *b = find(&r->phases, last);
    if (a && b && r->phases.n < BN_PHASES_MAX) {
        struct bn_phase *p = &r->phases.phase[r->phases.n++];
        *p = (struct bn_phase){.start_ns = a->start_ns,
                               .duration_ns = b->start_ns + b->duration_ns - a->start_ns};
        snprintf(p->name, sizeof(p->name), "%s", name);
    }
    pthread_mutex_unlock(&r->lock);
}

void bn_report_progress(struct bn_report *r, const char *phase, uint64_t done, uint64_t total)
{
    pthread_mutex_lock(&r->lock);
    snprintf(r->progress.phase, sizeof(r->progress.phase), "%s", phase);
    r->progress.done = done;
    r->progress.total = total;
    pthread_mutex_unlock(&r->lock);
}

void bn_report_finish(struct bn_report *r, const struct bn_error *err)
{
    pthread_mutex_lock(&r->lock);
    if (!r->finished) {
        r->finished = true;
        if (err)
            r->err = *err;
        pthread_cond_broadcast(&r->ended);
    }
    pthread_mutex_unlock(&r->lock);
}

void bn_report_phases(struct bn_report *r, struct bn_phases *out)
{
    pthread_mutex_lock(&r->lock);
    *out = r->phases;
    pthread_mutex_unlock(&r->lock);
}

bool bn_report_wait(struct bn_report *r, unsigned timeout_ms, struct bn_progress *progress,
                    struct bn_error *err)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&r->lock);
    unsigned woken = r->woken;
    while (!r->finished && woken == r->woken && pthread_cond_timedwait(&r->ended, &r->lock, &until) == 0)
        ;
    bool finished = r->finished;
    if (progress)
        *progress = r->progress;
    if (finished && err)
        *err = r->err;
    pthread_mutex_unlock(&r->lock);
    return finished;
}

void bn_report_wake(struct bn_report *r)
{
    pthread_mutex_lock(&r->lock);
    r->woken++;
    pthread_cond_broadcast(&r->ended);
    pthread_mutex_unlock(&r->lock);
}
