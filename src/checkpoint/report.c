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
    struct bn_trace_part *parts; /* made with the first of them */
    uint32_t nparts;
    uint64_t criu_ns; /* since when CRIU works; 0: it does not */
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
    free(r->parts);
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

/* With the lock; `end` is counted from the report's beginning. */
static void add_span(struct bn_report *r, const char *first, uint64_t end, const char *name)
{
    const struct bn_phase *a = find(&r->phases, first);
    if (!a || r->phases.n == BN_PHASES_MAX)
        return;
    struct bn_phase *p = &r->phases.phase[r->phases.n++];
    *p = (struct bn_phase){.start_ns = a->start_ns, .duration_ns = end - a->start_ns};
    snprintf(p->name, sizeof(p->name), "%s", name);
}

void bn_report_span(struct bn_report *r, const char *first, const char *last, const char *name)
{
    pthread_mutex_lock(&r->lock);
    const struct bn_phase *b = find(&r->phases, last);
    if (b)
        add_span(r, first, b->start_ns + b->duration_ns, name);
    pthread_mutex_unlock(&r->lock);
}

void bn_report_span_to(struct bn_report *r, const char *first, uint64_t end_ns, const char *name)
{
    pthread_mutex_lock(&r->lock);
    add_span(r, first, end_ns - r->began_ns, name);
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

static void add_part(struct bn_report *r, const char *name, pid_t pid, unsigned gpu, uint64_t start_ns,
                     uint64_t end_ns, uint64_t bytes)
{
    if (!r->parts)
        r->parts = calloc(BN_TRACE_PARTS_MAX, sizeof(*r->parts));
    if (!r->parts || r->nparts == BN_TRACE_PARTS_MAX)
        return;
    struct bn_trace_part *p = &r->parts[r->nparts++];
    start_ns = start_ns > r->began_ns ? start_ns : r->began_ns;
    *p = (struct bn_trace_part){.pid = (uint32_t)pid,
                                .gpu = gpu,
                                .start_ns = start_ns - r->began_ns,
                                .duration_ns = end_ns > start_ns ? end_ns - start_ns : 0,
                                .bytes = bytes};
    snprintf(p->name, sizeof(p->name), "%s", name);
}

void bn_report_part(struct bn_report *r, const char *name, pid_t pid, unsigned gpu, uint64_t start_ns,
                    uint64_t end_ns, uint64_t bytes)
{
    pthread_mutex_lock(&r->lock);
    add_part(r, name, pid, gpu, start_ns, end_ns, bytes);
    pthread_mutex_unlock(&r->lock);
}

void bn_report_criu(struct bn_report *r, bool works)
{
    uint64_t now = bn_now_ns();
    pthread_mutex_lock(&r->lock);
    if (!works && r->criu_ns)
        add_part(r, "criu", 0, 0, r->criu_ns, now, 0);
    r->criu_ns = works ? now : 0;
    pthread_mutex_unlock(&r->lock);
}

void bn_report_trace(struct bn_report *r, struct bn_trace *out)
{
    uint64_t now = bn_now_ns();
    pthread_mutex_lock(&r->lock);
    out->began_ns = r->began_ns;
    out->phases = r->phases;
    for (uint32_t i = 0; i < out->phases.n; i++)
        if (out->phases.phase[i].duration_ns == 0)
            out->phases.phase[i].duration_ns = now - r->began_ns - out->phases.phase[i].start_ns;
    out->n = r->nparts;
    for (uint32_t i = 0; i < r->nparts; i++)
        out->parts[i] = r->parts[i];
    if (r->criu_ns && out->n < BN_TRACE_PARTS_MAX)
        out->parts[out->n++] = (struct bn_trace_part){
            .name = "criu", .start_ns = r->criu_ns - r->began_ns, .duration_ns = now - r->criu_ns};
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
