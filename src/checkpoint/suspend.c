#include "checkpoint/suspend.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "checkpoint/cold.h"
#include "checkpoint/record.h"
#include "checkpoint/suspend_internal.h"
#include "checkpoint/tier.h"

#include <stdlib.h>
#include <string.h>

static struct bn_suspended *of(struct bn_quiesce *q)
{
    return (struct bn_suspended *)((char *)q - offsetof(struct bn_suspended, q));
}

static int start_saving(struct bn_quiesce *q, struct bn_error *err)
{
    struct bn_suspended *s = of(q);
    int r = s->tier->save(s, err);
    if (r < 0)
        bn_tier_undo(s, s->tier);
    return r;
}

static int drop_saved(struct bn_quiesce *q, struct bn_error *err)
{
    struct bn_suspended *s = of(q);
    (void)err;
    bn_copies_cancel(&s->copies, q);
    bn_tier_undo(s, s->tier);
    return 0;
}

static int finish_loading(struct bn_quiesce *q, struct bn_error *err)
{
    return bn_copies_finish(&of(q)->copies, q, NULL, err);
}

/* Everything was taken away: wait for the bytes to be where they shall be. */
static int rest(struct bn_suspended *s, const bool *cancel, struct bn_error *err)
{
    int r = s->tier->saved ? s->tier->saved(s, cancel, err) : 0;
    bn_kill_point(s->q.env, "suspended", "begin");
    if (r == 0)
        r = bn_records_put(&s->q, BN_STAGE_SUSPENDED, err);
    bn_kill_point(s->q.env, "suspended", "one");
    if (r < 0) {
        bn_records_put(&s->q, BN_STAGE_GUARDED, NULL);
        bn_quiesce_up(&s->q, NULL);
    }
    return r;
}

int bn_suspend(struct bn_env *env, pid_t root, uint32_t tier, unsigned flags, struct bn_report *report,
               const bool *cancel, struct bn_suspended **out, struct bn_error *err)
{
    const struct bn_tier *to = bn_tier_find(tier);
    if (!to)
        return bn_error_set(err, EINVAL, "suspend", "this bennud knows no tier %u", tier);
    struct bn_suspended *s = calloc(1, sizeof(*s));
    if (!s)
        return bn_error_set(err, ENOMEM, "suspend", "out of memory");
    s->tier = to;
    s->q = (struct bn_quiesce){.env = env,
                               .report = report,
                               .root = root,
                               .flags = flags,
                               .copy_start = start_saving,
                               .copy_end = drop_saved};
    int r = bn_quiesce_down(&s->q, err);
    if (r == 0 && s->q.targets.n == 0)
        r = bn_error_set(err, ENODATA, "find", "process %d does not use CUDA: there is nothing to suspend",
                         root);
    else if (r == 0)
        r = rest(s, cancel, err);
    if (r < 0) {
        struct bn_suspended *left = bn_suspended_take(&s->q);
        bn_suspended_free(s);
        if (left)
            *out = left;
        return r;
    }
    bn_tier_keep(s, to);
    s->used_ns = bn_now_ns();
    s->q.report = NULL;
    *out = s;
    bn_kill_point(env, "suspended", "end");
    return 0;
}

struct bn_suspended *bn_suspended_take(struct bn_quiesce *q)
{
    if (!bn_quiesce_holds(q))
        return NULL;
    struct bn_suspended *s = calloc(1, sizeof(*s));
    if (!s) /* what the caller would free now is the only copy: the keeper has records of it for another worker */
        abort();
    s->q = (struct bn_quiesce){
        .env = q->env, .root = q->root, .flags = q->flags, .targets = q->targets, .session = q->session};
    s->tier = bn_tier_find(BN_TIER_GPU);
    s->used_ns = bn_now_ns();
    s->giving = true; /* the bytes are on the GPU, in sets that the processes shall have */
    s->look = true;
    q->targets = (struct bn_targets){0};
    return s;
}

/* Free the GPU again. Records first: what they hold is what counts if we die. */
static void back_to_rest(struct bn_suspended *s)
{
    if (bn_records_put(&s->q, BN_STAGE_SUSPENDED, NULL) == 0)
        bn_tier_undo(s, bn_tier_find(BN_TIER_GPU));
}

static bool to_load(const struct bn_suspended *s)
{
    for (size_t i = 0; i < s->q.targets.n; i++)
        for (size_t p = 0; p < s->q.targets.v[i].nparts; p++) {
            const struct bn_tier *tier = bn_tier_of(&s->q.targets.v[i].parts[p]);
            if (tier && tier->load)
                return true;
        }
    return false;
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
    q->copy_end = finish_loading;
    s->used_ns = bn_now_ns();

    int phase = bn_report_begin(report, "allocate");
    bn_kill_point(q->env, "allocate", "begin");
    int r = bn_targets_create_sets(&q->targets, q->env->gpu, err);
    bn_report_end(report, phase, 0);
    bn_kill_point(q->env, "allocate", "end");
    if (r == 0)
        r = bn_records_put(q, BN_STAGE_GIVING, err);
    bn_kill_point(q->env, "copy-in", "begin");
    if (r == 0 && to_load(s))
        r = bn_copies_start(&s->copies, q, "copy-in", bn_tier_load, NULL, err);
    bn_kill_point(q->env, "copy-in", "one");
    if (r < 0) {
        if (!s->giving)
            back_to_rest(s);
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

/* A folder is written for a tree as a whole. */
static bool partly_on_disk(const struct bn_suspended *s)
{
    for (size_t i = 0; i < s->q.targets.n; i++)
        for (size_t p = 0; p < s->q.targets.v[i].nparts; p++)
            if (s->q.targets.v[i].parts[p].cold)
                return true;
    return false;
}

int bn_suspended_move(struct bn_suspended *s, uint32_t tier, const bool *cancel, struct bn_error *err)
{
    const struct bn_tier *to = bn_tier_find(tier);
    if (s->giving)
        return bn_error_set(err, EBUSY, "move", "process %d is being brought back", s->q.root);
    int r = s->look ? bn_recover_look(s, err) : 0;
    if (r == 0 && partly_on_disk(s))
        r = bn_error_set(err, EBUSY, "move",
                         "a part of process %d's memory lies on the disk already, since a move was cut off: "
                         "'bennu resume %d' puts it together",
                         s->q.root, s->q.root);
    if (r < 0)
        return r;
    struct bn_report *report = s->q.report = bn_report_new();
    bn_kill_point(s->q.env, "move", "begin");
    r = report ? to->save(s, err) : bn_error_set(err, ENOMEM, "move", "out of memory");
    if (r == 0)
        r = to->saved(s, cancel, err);
    bn_kill_point(s->q.env, "move", "one");
    if (r < 0) {
        bn_copies_cancel(&s->copies, &s->q);
        bn_tier_undo(s, to);
    } else {
        /* Should this fail, some records name the new place already: then the bytes stay in both. */
        r = bn_records_put(&s->q, BN_STAGE_SUSPENDED, err);
    }
    bn_kill_point(s->q.env, "moved", "begin");
    if (r == 0) {
        bn_tier_keep(s, to);
        s->tier = to;
    }
    s->q.report = NULL;
    bn_report_unref(report);
    bn_kill_point(s->q.env, "moved", "end");
    return r;
}

void bn_suspended_free(struct bn_suspended *s)
{
    if (!s)
        return;
    bn_records_drop(&s->q, true);
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

bool bn_suspended_lost(const struct bn_suspended *s)
{
    bool lost = false;
    for (size_t i = 0; i < s->q.targets.n; i++) {
        const struct bn_target *t = &s->q.targets.v[i];
        enum bn_ckpt_state state;
        if (bn_target_gone(t) || !(t->evicted || t->locked || t->checkpointed || t->lost))
            continue;
        if (!t->lost && (bn_ckpt_state(s->q.env->gpu, t->pid, &state, NULL) < 0 || state != BN_CKPT_FAILED))
            return false;
        lost = true;
    }
    return lost;
}

bool bn_suspended_dead(const struct bn_suspended *s)
{
    for (size_t i = 0; i < s->q.targets.n; i++)
        if (!bn_target_gone(&s->q.targets.v[i]))
            return false;
    return true;
}

uint64_t bn_suspended_bytes(const struct bn_target *t, uint32_t tier)
{
    uint64_t bytes = 0;
    for (size_t p = 0; p < t->nparts; p++) {
        const struct bn_tier *has = bn_tier_of(&t->parts[p]);
        bytes += has && has->id == tier ? t->parts[p].bytes : 0;
    }
    return bytes;
}

void bn_suspended_usage(const struct bn_suspended *s, struct bn_usage *usage)
{
    const struct bn_cold *cold = NULL;
    *usage = (struct bn_usage){0};
    for (size_t i = 0; i < s->q.targets.n; i++)
        for (size_t p = 0; p < s->q.targets.v[i].nparts; p++) {
            const struct bn_target_part *part = &s->q.targets.v[i].parts[p];
            if (part->set && part->dev < BN_USAGE_GPUS)
                usage->gpu[part->dev] += part->bytes;
            usage->host += part->mem || part->old ? part->bytes : 0;
            if (part->cold && part->cold != cold)
                usage->disk += bn_cold_stored(part->cold);
            cold = part->cold ? part->cold : cold;
        }
}

bool bn_suspended_movable(const struct bn_suspended *s)
{
    return !s->giving;
}

uint64_t bn_suspended_used(const struct bn_suspended *s)
{
    return s->used_ns;
}

uint32_t bn_suspended_tier(const struct bn_suspended *s)
{
    return s->tier->id;
}
