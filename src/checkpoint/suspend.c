#include "checkpoint/suspend.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "checkpoint/copies.h"
#include "checkpoint/record.h"
#include "checkpoint/suspend_internal.h"

#include <stdlib.h>
#include <string.h>

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
        bn_target_drop_host(&targets->v[i]);
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
        bn_kill_point(env, "suspended", "begin");
        if (r == 0)
            r = bn_records_put(&s->q, BN_RECORD_SUSPENDED | BN_RECORD_HOST, err);
        bn_kill_point(env, "suspended", "one");
        if (r < 0) {
            bn_records_put(&s->q, BN_RECORD_GPU, NULL);
            bn_quiesce_up(&s->q, NULL);
        }
    }
    if (r < 0) {
        struct bn_suspended *left = bn_suspended_take(&s->q);
        bn_suspended_free(s);
        if (left)
            *out = left;
        return r;
    }
    for (size_t i = 0; i < s->q.targets.n; i++)
        bn_target_release(&s->q.targets.v[i]);
    s->q.report = NULL;
    *out = s;
    bn_kill_point(env, "suspended", "end");
    return 0;
}

struct bn_suspended *bn_suspended_take(struct bn_quiesce *q)
{
    struct bn_suspended *s = bn_quiesce_holds(q) ? calloc(1, sizeof(*s)) : NULL;
    if (!s)
        return NULL;
    s->q = (struct bn_quiesce){.env = q->env, .root = q->root, .targets = q->targets, .session = q->session};
    s->giving = true; /* the bytes are on the GPU, in sets that the processes shall have */
    s->look = true;
    q->targets = (struct bn_targets){0};
    return s;
}

/* From the host memory of an earlier daemon. Chunks come in any order. */
static int produce_old(void *arg, uint64_t chunk, unsigned nchunks, void *data, struct bn_error *err)
{
    const struct bn_old_host *old = arg;
    uint64_t at = chunk * BN_GPU_CHUNK, left = nchunks * BN_GPU_CHUNK;
    uint8_t *to = data;
    for (size_t i = 0; i < old->n && left > 0; i++) {
        if (at >= old->spans[i].bytes) {
            at -= old->spans[i].bytes;
            continue;
        }
        uint64_t n = old->spans[i].bytes - at;
        n = n < left ? n : left;
        int r = bn_pread_full(old->fd, to, n, old->spans[i].at + at);
        if (r < 0)
            return bn_error_set(err, r, "copy-in", "cannot read the host memory of the earlier bennud: %s",
                                strerror(-r));
        to += n;
        left -= n;
        at = 0;
    }
    return left == 0 ? 0
                     : bn_error_set(err, EBADMSG, "copy-in", "host memory of the earlier bennud is missing");
}

static int copy_from_host(struct bn_quiesce *q, struct bn_target *t, struct bn_target_part *part, void *arg,
                          struct bn_copy **job, struct bn_error *err)
{
    (void)arg;
    if (!t->gated || !part->set) /* it runs on that memory already; it is gone */
        return 0;
    if (!part->mem && !part->old) /* the bytes never left the GPU */
        return 0;
    struct bn_copy_spec spec = {.mode = BN_COPY_FROM_HOST, .set = part->set, .mem = part->mem};
    if (part->old)
        spec = (struct bn_copy_spec){
            .mode = BN_COPY_IN, .set = part->set, .produce = produce_old, .arg = part->old};
    return bn_copy_start(q->env->copier, &spec, job, err);
}

/* A target that was given its memory at an earlier try needs none. */
static int create_sets(struct bn_quiesce *q, struct bn_error *err)
{
    for (size_t i = 0; i < q->targets.n; i++) {
        struct bn_target *t = &q->targets.v[i];
        int r = bn_target_gone(t) || !t->evicted ? 0 : bn_target_create_sets(t, q->env->gpu, err);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Free the GPU again. Records first: what they hold is what counts if we die. */
static void back_to_host(struct bn_quiesce *q)
{
    if (bn_records_put(q, BN_RECORD_SUSPENDED | BN_RECORD_HOST, NULL) < 0)
        return;
    for (size_t i = 0; i < q->targets.n; i++)
        bn_target_release(&q->targets.v[i]);
}

int bn_resume(struct bn_suspended **sp, struct bn_report *report, struct bn_error *err)
{
    struct bn_suspended *s = *sp;
    struct bn_quiesce *q = &s->q;
    if (s->look) {
        int r = bn_recover_look(s, err);
        if (r < 0)
            return r;
    }
    q->report = report;
    q->copy_end = finish_from_host;

    int phase = bn_report_begin(report, "allocate");
    bn_kill_point(q->env, "allocate", "begin");
    int r = create_sets(q, err);
    bn_report_end(report, phase, 0);
    bn_kill_point(q->env, "allocate", "end");
    if (r == 0)
        r = bn_records_put(q, BN_RECORD_HOST | BN_RECORD_GPU, err);
    bn_kill_point(q->env, "copy-in", "begin");
    if (r == 0)
        r = bn_copies_start(&s->copies, q, "copy-in", copy_from_host, NULL, err);
    bn_kill_point(q->env, "copy-in", "one");
    if (r < 0) {
        if (!s->giving)
            back_to_host(q);
        q->report = NULL;
        return r;
    }
    s->giving = true;
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
    bn_records_drop(&s->q, true);
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
