#include "checkpoint/copies.h"

#include "base/io.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>

#define LOOK_MS 50 /* between two looks at the progress and at the cancel flag */

int bn_copies_start(struct bn_copies *c, struct bn_quiesce *q, const char *name, bn_copies_make_fn make,
                    void *arg, struct bn_error *err)
{
    size_t parts = bn_targets_parts(&q->targets);
    *c = (struct bn_copies){.jobs = calloc(parts ? parts : 1, sizeof(*c->jobs)),
                            .whose = calloc(parts ? parts : 1, sizeof(*c->whose)),
                            .phase = -1,
                            .name = name};
    if (!c->jobs || !c->whose) {
        free(c->jobs);
        free(c->whose);
        *c = (struct bn_copies){.phase = -1};
        return bn_error_set(err, ENOMEM, name, "out of memory");
    }
    c->phase = bn_report_begin(q->report, name);
    for (size_t i = 0; i < q->targets.n; i++) {
        struct bn_target *t = &q->targets.v[i];
        for (size_t p = 0; p < t->nparts; p++) {
            struct bn_copy *job = NULL;
            c->whose[c->n] = (struct bn_copy_whose){
                .pid = t->pid ? t->pid : t->inner, .dev = t->parts[p].dev, .start_ns = bn_now_ns()};
            int r = make(q, t, &t->parts[p], arg, &job, err);
            if (r < 0) {
                bn_copies_cancel(c, q);
                return r;
            }
            c->whose[c->n].apart = r > 0;
            if (job)
                c->jobs[c->n++] = job;
        }
    }
    return 0;
}

static void end(struct bn_copies *c, struct bn_quiesce *q, uint64_t bytes)
{
    uint64_t last = 0;
    for (size_t i = 0; i < c->n; i++) {
        uint64_t ended = bn_copy_end_ns(c->jobs[i]);
        last = ended > last ? ended : last;
        bn_report_part(q->report, c->name, c->whose[i].pid, c->whose[i].dev, c->whose[i].start_ns,
                       ended ? ended : bn_now_ns(), bn_copy_done(c->jobs[i]));
        bn_copy_free(c->jobs[i]);
    }
    free(c->jobs);
    free(c->whose);
    bn_report_end_at(q->report, c->phase, last ? last : bn_now_ns(), bytes);
    *c = (struct bn_copies){.phase = -1};
}

/* Until all have ended, or one has failed; without `apart` only those that need the targets. *bytes: copied. */
static int wait_for(struct bn_copies *c, struct bn_quiesce *q, bool apart, const bool *cancel,
                    uint64_t *bytes, struct bn_error *err)
{
    int result = 0;
    for (;;) {
        uint64_t done = 0, total = 0;
        struct bn_copy *running = NULL;
        for (size_t i = 0; i < c->n; i++) {
            done += bn_copy_done(c->jobs[i]);
            total += bn_copy_total(c->jobs[i]);
            if (!bn_copy_ended(c->jobs[i])) {
                running = apart || !c->whose[i].apart ? c->jobs[i] : running;
            } else if (result == 0) {
                result = bn_copy_wait(c->jobs[i], NULL, NULL, 0, err);
            }
        }
        bn_report_progress(q->report, c->name, done, total);
        if (result == 0 && cancel && __atomic_load_n(cancel, __ATOMIC_RELAXED))
            result = bn_error_set(err, ECANCELED, c->name, "cancelled");
        *bytes = done;
        if (!running || result < 0)
            return result;
        struct pollfd p = {.fd = bn_copy_fd(running), .events = POLLIN};
        poll(&p, 1, LOOK_MS);
    }
}

int bn_copies_finish(struct bn_copies *c, struct bn_quiesce *q, const bool *cancel, struct bn_error *err)
{
    uint64_t bytes = 0;
    if (!c->jobs)
        return 0;
    int r = wait_for(c, q, true, cancel, &bytes, err);
    end(c, q, bytes);
    return r;
}

int bn_copies_finish_targets(struct bn_copies *c, struct bn_quiesce *q, const bool *cancel, uint64_t *end_ns,
                             struct bn_error *err)
{
    uint64_t bytes = 0, last = 0;
    int r = c->jobs ? wait_for(c, q, false, cancel, &bytes, err) : 0;
    if (r < 0) {
        end(c, q, bytes);
        return r;
    }
    for (size_t i = 0; i < c->n; i++) {
        uint64_t ended = c->whose[i].apart ? 0 : bn_copy_end_ns(c->jobs[i]);
        last = ended > last ? ended : last;
    }
    *end_ns = last;
    return 0;
}

bool bn_copies_ended(const struct bn_copies *c)
{
    for (size_t i = 0; i < c->n; i++)
        if (!bn_copy_ended(c->jobs[i]))
            return false;
    return true;
}

void bn_copies_cancel(struct bn_copies *c, struct bn_quiesce *q)
{
    if (c->jobs)
        end(c, q, 0);
}
