#include "checkpoint/quiesce.h"

#include "base/cleanup.h"
#include "base/parallel.h"
#include "checkpoint/record.h"
#include "checkpoint/sharing.h"

#include <signal.h>
#include <string.h>

/* A process that was just killed fails every step for a moment before it is gone. */
#define GRACE_MS 500

typedef int (*step_fn)(struct bn_quiesce *q, struct bn_error *err);
typedef int (*target_fn)(struct bn_quiesce *q, struct bn_target *t, struct bn_error *err);

void bn_kill_point(const struct bn_env *env, const char *step, const char *when)
{
    size_t len = strlen(step);
    bool stop = env->kill_at && env->kill_at[0] == '@';
    const char *at = env->kill_at ? env->kill_at + stop : "";
    if (strncmp(at, step, len) == 0 && at[len] == ':' && strcmp(at + len + 1, when) == 0)
        raise(stop ? SIGSTOP : SIGKILL);
}

/* ---- one step on every target that lives, in parallel ---- */

struct each {
    struct bn_quiesce *q;
    target_fn fn;
};

static int each_one(void *ctx, size_t i, struct bn_error *err)
{
    struct each *e = ctx;
    struct bn_target *t = &e->q->targets.v[i];
    if (bn_target_gone(t))
        return 0;
    int r = e->fn(e->q, t, err);
    bn_kill_point(e->q->env, e->q->step, "one");
    return r;
}

static int each(struct bn_quiesce *q, target_fn fn, struct bn_error *err)
{
    return bn_parallel(q->targets.n, each_one, &(struct each){q, fn}, err);
}

/* As above for the way up: a process that ends meanwhile needs nothing more. */
static int each_up_one(void *ctx, size_t i, struct bn_error *err)
{
    struct each *e = ctx;
    struct bn_target *t = &e->q->targets.v[i];
    if (bn_target_gone(t))
        return 0;
    struct bn_error why = BN_ERROR_INIT;
    int r = e->fn(e->q, t, &why);
    bn_kill_point(e->q->env, e->q->step, "one");
    if (r < 0 && bn_target_wait_gone(t, GRACE_MS))
        return 0;
    if (r < 0 && err)
        *err = why;
    return r;
}

static int each_up(struct bn_quiesce *q, target_fn fn, struct bn_error *err)
{
    return bn_parallel(q->targets.n, each_up_one, &(struct each){q, fn}, err);
}

/* ---- down ---- */

static int down_find(struct bn_quiesce *q, struct bn_error *err)
{
    int r = bn_targets_find(q->env->gpu, q->root, q->flags, &q->targets, err);
    if (r == 0)
        r = bn_targets_check(&q->targets, q->flags, err);
    return r < 0 ? r : bn_sharing_check(q->env->gpu, &q->targets, q->root, err);
}

static int down_gate(struct bn_quiesce *q, struct bn_error *err)
{
    int r = bn_targets_close_gates(&q->targets, q->env->gate_timeout_ms, err);
    /* Closing takes a while, in which memory may have been given away; now it cannot be any more. */
    return r < 0 ? r : bn_sharing_check(q->env->gpu, &q->targets, q->root, err);
}

static int hand_over(struct bn_quiesce *q, struct bn_target *t, struct bn_error *err)
{
    return bn_target_hand_over(t, q->env->gpu, err);
}
static int down_hand_over(struct bn_quiesce *q, struct bn_error *err)
{
    return each(q, hand_over, err);
}

static int down_copy(struct bn_quiesce *q, struct bn_error *err)
{
    return q->copy_start ? q->copy_start(q, err) : 0;
}

/* From the next step on, the processes depend on us. */
static int down_guard(struct bn_quiesce *q, struct bn_error *err)
{
    return bn_records_put(q, BN_STAGE_GUARDED, err);
}

static int evict(struct bn_quiesce *q, struct bn_target *t, struct bn_error *err)
{
    (void)q;
    return bn_target_evict(t, err);
}
static int down_evict(struct bn_quiesce *q, struct bn_error *err)
{
    return each(q, evict, err);
}

static int lock(struct bn_quiesce *q, struct bn_target *t, struct bn_error *err)
{
    return bn_target_lock(t, q->env->gpu, q->env->lock_timeout_ms, err);
}
static int down_lock(struct bn_quiesce *q, struct bn_error *err)
{
    return q->flags & BN_FIND_KEEP_CONTEXT ? 0 : each(q, lock, err);
}

static int checkpoint(struct bn_quiesce *q, struct bn_target *t, struct bn_error *err)
{
    return bn_target_checkpoint(t, q->env->gpu, err);
}
static int down_checkpoint(struct bn_quiesce *q, struct bn_error *err)
{
    return q->flags & BN_FIND_KEEP_CONTEXT ? 0 : each(q, checkpoint, err);
}

/* ---- up ---- */

static int restore(struct bn_quiesce *q, struct bn_target *t, struct bn_error *err)
{
    if (t->lost && !t->checkpointed) /* found so when it was looked at again */
        return bn_error_set(err, EIO, "driver-restore",
                            "the driver has lost the GPU state of process %d, which can only be killed",
                            t->pid);
    return bn_target_restore(t, q->env->gpu, q->pairs, err);
}
static int up_restore(struct bn_quiesce *q, struct bn_error *err)
{
    return each_up(q, restore, err);
}

static int unlock(struct bn_quiesce *q, struct bn_target *t, struct bn_error *err)
{
    return t->checkpointed ? 0 : bn_target_unlock(t, q->env->gpu, err);
}
static int up_unlock(struct bn_quiesce *q, struct bn_error *err)
{
    return each_up(q, unlock, err);
}

static int give_back(struct bn_quiesce *q, struct bn_target *t, struct bn_error *err)
{
    (void)q;
    return t->locked || t->lost ? 0 : bn_target_give_back(t, err);
}
static int up_give_back(struct bn_quiesce *q, struct bn_error *err)
{
    return each_up(q, give_back, err);
}

static int moved(void *arg, struct bn_target *t, struct bn_error *err)
{
    struct bn_quiesce *q = arg;
    bn_kill_point(q->env, "move-in", "one");
    return bn_record_again(q, t, BN_STAGE_GIVING, err);
}

static int move_in(struct bn_quiesce *q, struct bn_target *t, struct bn_error *err)
{
    return bn_target_move_in(t, moved, q, err);
}

static int up_copy(struct bn_quiesce *q, struct bn_error *err)
{
    int r = q->copy_end ? q->copy_end(q, err) : 0;
    q->copy_failed = r < 0;
    bool barred = false;
    for (size_t i = 0; i < q->targets.n; i++)
        barred |= q->targets.v[i].barred;
    if (r < 0 || !barred)
        return r;
    int phase = bn_report_begin(q->report, "move-in");
    r = each_up(q, move_in, err);
    bn_report_end(q->report, phase, 0);
    return r;
}

static int release(struct bn_quiesce *q, struct bn_target *t, struct bn_error *err)
{
    (void)err;
    if (!t->evicted && !q->copy_failed)
        bn_target_release(t);
    return 0;
}
static int up_release(struct bn_quiesce *q, struct bn_error *err)
{
    return each_up(q, release, err);
}

/* Last of all: a kernel of one process may reach into another's memory, so every gate waits for every give-back. */
static int open_gate(struct bn_quiesce *q, struct bn_target *t, struct bn_error *err)
{
    return t->evicted || t->locked || q->copy_failed ? 0 : bn_target_open_gate(t, err);
}
static int up_gate(struct bn_quiesce *q, struct bn_error *err)
{
    return each_up(q, open_gate, err);
}

static int up_forget(struct bn_quiesce *q, struct bn_error *err)
{
    (void)err;
    bn_records_drop(q, false);
    return 0;
}

/* ---- the table ---- */

static const struct step {
    const char *name;
    step_fn down;
    const char *undo_name;
    step_fn up;
    bool quiet; /* no phase of the report */
} steps[] = {
    {"find", down_find, "forget", up_forget},
    {"gate", down_gate, "open-gate", up_gate},
    {"hand-over", down_hand_over, "release", up_release},
    {"copy", down_copy, "copy-end", up_copy,
     true}, /* times itself: it goes on beside the steps that follow */
    {"guard", down_guard, NULL, NULL, true},
    {"evict", down_evict, "give-back", up_give_back},
    {"driver-lock", down_lock, "driver-unlock", up_unlock},
    {"driver-checkpoint", down_checkpoint, "driver-restore", up_restore},
};

static int run(struct bn_quiesce *q, const char *name, bool quiet, step_fn fn, struct bn_error *err)
{
    q->step = name;
    bn_kill_point(q->env, name, "begin");
    int phase = quiet ? -1 : bn_report_begin(q->report, name);
    int r = fn(q, err);
    bn_report_end(q->report, phase, 0);
    bn_kill_point(q->env, name, "end");
    return r;
}

static int up_from(struct bn_quiesce *q, size_t n, struct bn_error *err)
{
    int first = 0;
    for (size_t s = n; s-- > 0;) {
        bool quiet = steps[s].quiet || s == 0;
        int r = steps[s].up ? run(q, steps[s].undo_name, quiet, steps[s].up, err) : 0;
        if (r < 0 && first == 0)
            first = r;
    }
    return first;
}

static void not_put_back(const struct bn_quiesce *q, int r, const struct bn_error *undo, struct bn_error *err)
{
    char again[64] = "";
    if (bn_quiesce_holds(q)) /* whoever asked keeps it as one that is suspended */
        snprintf(again, sizeof(again), " ('bennu resume %d' tries again)", q->root);
    if (err)
        bn_error_replace(err, r, err->stage, "%.200s; and the process could not be put back: %.190s%s",
                         err->text, undo->text, again);
}

int bn_quiesce_down(struct bn_quiesce *q, struct bn_error *err)
{
    for (size_t s = 0; s < BN_ARRAY_SIZE(steps); s++) {
        int r = run(q, steps[s].name, steps[s].quiet, steps[s].down, err);
        if (r == 0 && (s > 0 || q->targets.n > 0))
            continue;
        if (r < 0 && err && !err->stage[0])
            snprintf(err->stage, sizeof(err->stage), "%s", steps[s].name);
        struct bn_error undo = BN_ERROR_INIT;
        if (r < 0 && up_from(q, s + 1, &undo) < 0)
            not_put_back(q, r, &undo, err);
        return r;
    }
    return 0;
}

int bn_quiesce_up(struct bn_quiesce *q, struct bn_error *err)
{
    return up_from(q, BN_ARRAY_SIZE(steps), err);
}

bool bn_quiesce_holds(const struct bn_quiesce *q)
{
    for (size_t i = 0; i < q->targets.n; i++) {
        const struct bn_target *t = &q->targets.v[i];
        /* A gate alone is opened by the agent when it finds that nobody holds its process any more. */
        if ((t->evicted || t->locked || t->checkpointed) && !bn_target_gone(t))
            return true;
    }
    return false;
}
