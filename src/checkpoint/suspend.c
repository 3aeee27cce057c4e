#include "checkpoint/suspend.h"

#include "base/cleanup.h"
#include "checkpoint/copies.h"

#include <stdlib.h>

struct bn_suspended {
    struct bn_quiesce q;
    struct bn_copies copies;
};

static struct bn_suspended *of(struct bn_quiesce *q)
{
    return (struct bn_suspended *)((char *)q - offsetof(struct bn_suspended, q));
}

static int copy_to_host(struct bn_quiesce *q, struct bn_target *t, struct bn_target_part *part, void *arg,
                        struct bn_copy **job, struct bn_error *err)
{
    (void)t, (void)arg;
    int r = bn_mem_alloc(q->env->pool, part->bytes, &part->mem, err);
    if (r < 0)
        return r;
    struct bn_copy_spec spec = {.mode = BN_COPY_TO_HOST, .set = part->set, .mem = part->mem};
    return bn_copy_start(q->env->copier, &spec, job, err);
}

static void free_host(struct bn_targets *targets)
{
    for (size_t i = 0; i < targets->n; i++)
        for (size_t p = 0; p < targets->v[i].nparts; p++) {
            bn_mem_free(targets->v[i].parts[p].mem);
            targets->v[i].parts[p].mem = NULL;
        }
}

static int start_to_host(struct bn_quiesce *q, struct bn_error *err)
{
    int r = bn_copies_start(&of(q)->copies, q, "copy-out", copy_to_host, NULL, err);
    if (r < 0)
        free_host(&q->targets);
    return r;
}

static int drop_to_host(struct bn_quiesce *q, struct bn_error *err)
{
    (void)err;
    bn_copies_cancel(&of(q)->copies, q);
    free_host(&q->targets);
    return 0;
}

static int finish_from_host(struct bn_quiesce *q, struct bn_error *err)
{
    return bn_copies_finish(&of(q)->copies, q, NULL, err);
}

int bn_suspend(struct bn_env *env, pid_t root, unsigned flags, struct bn_report *report, const bool *cancel,
               struct bn_suspended **out, struct bn_error *err)
{
    struct bn_suspended *s = calloc(1, sizeof(*s));
    if (!s)
        return bn_error_set(err, ENOMEM, "suspend", "out of memory");
    s->q = (struct bn_quiesce){.env = env,
                               .report = report,
                               .root = root,
                               .flags = flags,
                               .copy_start = start_to_host,
                               .copy_end = drop_to_host};
    int r = bn_quiesce_down(&s->q, err);
    if (r == 0 && s->q.targets.n == 0)
        r = bn_error_set(err, ENODATA, "find", "process %d does not use CUDA: there is nothing to suspend",
                         root);
    else if (r == 0) {
        r = bn_copies_finish(&s->copies, &s->q, cancel, err);
        if (r < 0)
            bn_quiesce_up(&s->q, NULL);
    }
    if (r < 0) {
        bn_suspended_free(s);
        return r;
    }
    for (size_t i = 0; i < s->q.targets.n; i++)
        bn_target_release(&s->q.targets.v[i]);
    s->q.report = NULL;
    *out = s;
    return 0;
}

static int copy_from_host(struct bn_quiesce *q, struct bn_target *t, struct bn_target_part *part, void *arg,
                          struct bn_copy **job, struct bn_error *err)
{
    (void)t, (void)arg;
    if (!part->set) /* the process is gone */
        return 0;
    struct bn_copy_spec spec = {.mode = BN_COPY_FROM_HOST, .set = part->set, .mem = part->mem};
    return bn_copy_start(q->env->copier, &spec, job, err);
}

static int create_sets(struct bn_quiesce *q, struct bn_error *err)
{
    for (size_t i = 0; i < q->targets.n; i++) {
        int r =
            bn_target_gone(&q->targets.v[i]) ? 0 : bn_target_create_sets(&q->targets.v[i], q->env->gpu, err);
        if (r < 0)
            return r;
    }
    return 0;
}

int bn_resume(struct bn_suspended **sp, struct bn_report *report, struct bn_error *err)
{
    struct bn_suspended *s = *sp;
    struct bn_quiesce *q = &s->q;
    q->report = report;
    q->copy_end = finish_from_host;

    int phase = bn_report_begin(report, "allocate");
    int r = create_sets(q, err);
    bn_report_end(report, phase, 0);
    if (r == 0)
        r = bn_copies_start(&s->copies, q, "copy-in", copy_from_host, NULL, err);
    if (r < 0) {
        for (size_t i = 0; i < q->targets.n; i++)
            bn_target_release(&q->targets.v[i]);
        q->report = NULL;
        return r;
    }
    r = bn_quiesce_up(q, err);
    q->report = NULL;
    if (r < 0)
        return r;
    bn_suspended_free(s);
    *sp = NULL;
    return 0;
}

void bn_suspended_free(struct bn_suspended *s)
{
    if (!s)
        return;
    free_host(&s->q.targets);
    bn_targets_free(&s->q.targets);
    free(s);
}

const struct bn_targets *bn_suspended_targets(const struct bn_suspended *s)
{
    return &s->q.targets;
}

pid_t bn_suspended_root(const struct bn_suspended *s)
{
    return s->q.root;
}

bool bn_suspended_dead(const struct bn_suspended *s)
{
    for (size_t i = 0; i < s->q.targets.n; i++)
        if (!bn_target_gone(&s->q.targets.v[i]))
            return false;
    return true;
}
