#include "checkpoint/recover.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "checkpoint/cold.h"
#include "checkpoint/suspend_internal.h"
#include "checkpoint/tier.h"
#include "store/image_dir.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define LOOK_MS 1000u
#define ATTACH_MS 10000
#define ATTACH_PAUSE_MS 20
#define TRIES 10 /* LOOK_MS apart: the driver may still be at a step that the killed daemon asked for */

/* ---- from records to targets ---- */

/* The memory that the record holds alive becomes the target's sets. Takes fds[] over, also when it fails. */
static int import_sets(struct bn_target *t, struct bn_gpu *gpu, int *fds, struct bn_error *err)
{
    int r = 0;
    bn_auto_free struct bn_gpu_block *blocks = calloc(t->nsegs ? t->nsegs : 1, sizeof(*blocks));
    if (!blocks)
        r = bn_error_set(err, ENOMEM, "recover", "out of memory");
    for (size_t p = 0; p < t->nparts && r == 0; p++) {
        struct bn_target_part *part = &t->parts[p];
        for (size_t i = 0; i < part->n; i++) {
            const struct bn_agent_segment *seg = &t->segs[part->first + i];
            blocks[i] =
                (struct bn_gpu_block){.size = seg->size, .flags = seg->flags, .fd = fds[part->first + i]};
        }
        r = bn_gpu_set_import(gpu, part->dev, blocks, part->n, &part->set, err);
        for (size_t i = 0; i < part->n && r == 0; i++)
            fds[part->first + i] = -1;
    }
    for (size_t i = 0; i < t->nsegs; i++)
        bn_close(fds[i]);
    return r;
}

/* 1: taken up; 0: the process is gone. */
static int open_one(struct bn_env *env, struct bn_record *record, struct bn_target *t, bool *on_gpu,
                    struct bn_error *err)
{
    bn_auto_free int *fds = NULL;
    struct bn_error why = BN_ERROR_INIT;
    int r = bn_record_target(record, env->gpu, t, &fds, &why);
    if (r == -ESRCH) {
        env->guard->drop(env->guard, record->key);
        return 0;
    }
    if (r < 0) {
        if (err)
            *err = why;
        return r;
    }
    *on_gpu = fds != NULL;
    r = fds ? import_sets(t, env->gpu, fds, err) : 0;
    if (r < 0) {
        bn_target_keep_folder(t);
        bn_target_clear(t);
    }
    return r < 0 ? r : 1;
}

/* All of a tree have one folder, and share what stands for it: the last of them removes it. */
static void share_folder(struct bn_targets *targets)
{
    struct bn_cold *first = NULL;
    for (size_t i = 0; i < targets->n; i++)
        for (size_t p = 0; p < targets->v[i].nparts; p++) {
            struct bn_cold **cold = &targets->v[i].parts[p].cold;
            if (!*cold || *cold == first)
                continue;
            if (first && bn_cold_same(first, bn_cold_dirfd(*cold))) {
                bn_cold_keep(*cold);
                bn_cold_unref(*cold);
                *cold = bn_cold_ref(first);
            } else {
                first = *cold;
            }
        }
}

/* Of a tree that has ended meanwhile. */
static void remove_folders(struct bn_record *const *records, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        struct bn_record_head head;
        if (bn_record_head(records[i], &head) == 0 && (head.flags & BN_RECORD_DISK) && records[i]->nfds > 0)
            bn_cold_remove(records[i]->fds[0]);
    }
}

/* What the driver alone has saved is in host memory, too. */
static const struct bn_tier *tier_of(const struct bn_targets *targets)
{
    for (size_t i = 0; i < targets->n; i++)
        if (targets->v[i].nparts > 0)
            return bn_tier_of(&targets->v[i].parts[0]);
    return bn_tier_find(BN_TIER_HOST);
}

int bn_recover_open(struct bn_env *env, struct bn_record *const *records, size_t n, struct bn_suspended **out,
                    bool *suspended, struct bn_error *err)
{
    struct bn_suspended *s = calloc(1, sizeof(*s));
    struct bn_target *v = calloc(n, sizeof(*v));
    if (!s || !v) {
        free(s);
        free(v);
        return bn_error_set(err, ENOMEM, "recover", "out of memory");
    }
    struct bn_record_head head = {0};
    bool all = true;
    s->look = true;
    s->q = (struct bn_quiesce){.env = env, .targets = {.v = v}};
    for (size_t i = 0; i < n; i++) {
        bool on_gpu = false;
        int r = bn_record_head(records[i], &head);
        if (r == 0)
            r = open_one(env, records[i], &v[s->q.targets.n], &on_gpu, err);
        if (r < 0) {
            for (size_t k = 0; k < s->q.targets.n; k++)
                bn_target_keep_folder(&s->q.targets.v[k]);
            bn_targets_free(&s->q.targets); /* and not their records */
            free(s);
            return bn_error_set(err, r, "recover", "a record of an earlier bennud makes no sense");
        }
        if (r == 0)
            continue;
        s->q.root = head.root;
        s->q.session = head.session;
        s->giving = s->giving || (on_gpu && !(head.flags & BN_RECORD_SUSPENDED));
        all = all && (head.flags & BN_RECORD_SUSPENDED);
        if (head.flags & BN_RECORD_CONTEXT)
            s->q.flags |= BN_FIND_KEEP_CONTEXT;
        else if (head.flags & BN_RECORD_SUSPENDED)
            v[s->q.targets.n].locked = v[s->q.targets.n].checkpointed = true;
        s->q.targets.n++;
    }
    share_folder(&s->q.targets);
    s->tier = tier_of(&s->q.targets);
    s->used_ns = bn_now_ns();
    if (s->q.targets.n == 0) {
        remove_folders(records, n);
        bn_suspended_free(s);
        s = NULL;
    }
    *suspended = all;
    *out = s;
    return 0;
}

/* The keeper first, who then holds the folder, too. */
static int put_again(struct bn_guard *g, const struct bn_record *r, struct bn_error *err)
{
    struct bn_writer body = {.buf = r->bytes, .len = r->nbytes};
    return g->put(g, r->key, r->kind, &body, r->fds, r->nfds, err);
}

int bn_recover_folder(struct bn_env *env, int dirfd, struct bn_suspended **out, struct bn_error *err)
{
    struct bn_record *records = NULL;
    size_t n = 0;
    bool suspended;
    int r = bn_records_of_folder(env->guard, dirfd, &records, &n);
    if (r < 0)
        return bn_error_set(err, r, "recover", "no tree can be told from its folder: %s", strerror(-r));
    bn_auto_free struct bn_record **all = calloc(n, sizeof(*all));
    if (!all)
        r = bn_error_set(err, ENOMEM, "recover", "out of memory");
    for (size_t i = 0; i < n && r == 0; i++) {
        all[i] = &records[i];
        r = put_again(env->guard, &records[i], err);
    }
    if (r == 0)
        r = bn_recover_open(env, all, n, out, &suspended, err);
    for (size_t i = 0; i < n; i++) {
        if (r < 0)
            env->guard->drop(env->guard, records[i].key);
        bn_record_clear(&records[i]);
    }
    free(records);
    return r;
}

/* ---- host memory ---- */

struct used {
    dev_t dev;
    ino_t ino;
    int fd; /* borrowed */
    uint64_t at, bytes;
};

static int by_place(const void *a, const void *b)
{
    const struct used *x = a, *y = b;
    if (x->dev != y->dev)
        return x->dev < y->dev ? -1 : 1;
    if (x->ino != y->ino)
        return x->ino < y->ino ? -1 : 1;
    return x->at < y->at ? -1 : x->at > y->at;
}

/* The spans of every tree; *out is malloced. False: out of memory. */
static bool collect(struct bn_suspended *const *trees, size_t n, struct used **out, size_t *count)
{
    struct used *v = NULL;
    size_t have = 0;
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; trees[i] && k < trees[i]->q.targets.n; k++)
            for (size_t p = 0; p < trees[i]->q.targets.v[k].nparts; p++) {
                const struct bn_old_host *old = trees[i]->q.targets.v[k].parts[p].old;
                struct stat st;
                if (!old)
                    continue;
                struct used *more = reallocarray(v, have + old->n, sizeof(*v));
                if (!more || fstat(old->fd, &st) < 0) {
                    free(more ? more : v);
                    return false;
                }
                v = more;
                for (size_t s = 0; s < old->n; s++)
                    v[have++] =
                        (struct used){st.st_dev, st.st_ino, old->fd, old->spans[s].at, old->spans[s].bytes};
            }
    *out = v;
    *count = have;
    return true;
}

static void punch(int fd, uint64_t from, uint64_t to)
{
    if (to > from) /* what fails here costs memory and nothing else */
        (void)!fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)from, (off_t)(to - from));
}

void bn_recover_trim(struct bn_suspended *const *trees, size_t n)
{
    bn_auto_free struct used *v = NULL;
    size_t count = 0;
    if (!collect(trees, n, &v, &count) || count == 0)
        return;
    qsort(v, count, sizeof(*v), by_place);
    uint64_t end = 0;
    for (size_t i = 0; i < count; i++) {
        bool first = i == 0 || v[i].dev != v[i - 1].dev || v[i].ino != v[i - 1].ino;
        bool last = i + 1 == count || v[i].dev != v[i + 1].dev || v[i].ino != v[i + 1].ino;
        punch(v[i].fd, first ? 0 : end, v[i].at);
        end = v[i].at + v[i].bytes;
        struct stat st;
        if (last && fstat(v[i].fd, &st) == 0)
            punch(v[i].fd, end, (uint64_t)st.st_size);
    }
}

/* ---- bringing them back ---- */

void bn_recover_wait(const struct bn_suspended *s)
{
    for (size_t i = 0; i < s->q.targets.n; i++)
        while (bn_target_wait_runnable(&s->q.targets.v[i], LOOK_MS) == -ETIMEDOUT)
            ;
}

/* Our predecessor's lock went with it; but an agent that finds itself alone takes it for a moment to open its gate. */
static int attach(struct bn_target *t, struct bn_error *err)
{
    for (int left = ATTACH_MS;; left -= ATTACH_PAUSE_MS) {
        struct bn_error why = BN_ERROR_INIT;
        int r = bn_agent_attach(t->agent, &why);
        if (r != -EBUSY || left <= 0) {
            if (r < 0 && err)
                *err = why;
            return r;
        }
        if (bn_target_wait_gone(t, ATTACH_PAUSE_MS))
            return bn_error_set(err, ESRCH, "recover", "process %d ended", t->pid);
    }
}

/* What the agent says is so once it has answered: then nothing that the killed daemon asked for is left to be done. */
static int look_at_agent(struct bn_target *t, struct bn_error *err)
{
    struct bn_agent_page page;
    int r = t->agent ? 0 : bn_agent_find(t->pid, &t->agent);
    if (r == 0)
        r = bn_agent_page(t->agent, &page);
    if (r == 0 && memcmp(page.instance, t->instance, sizeof(t->instance)) != 0)
        r = -ENOENT;
    if (r < 0)
        return bn_error_set(err, r, "recover",
                            "the agent in process %d is not there any more: its gate stays closed", t->pid);
    r = attach(t, err);
    if (r == 0)
        r = bn_agent_page(t->agent, &page);
    if (r < 0)
        return r;
    t->gated = page.state == BN_AGENT_CLOSED || page.state == BN_AGENT_EVICTED;
    t->evicted = page.state == BN_AGENT_EVICTED;
    if (!t->gated) { /* it goes on already, and what we hold of it is old */
        bn_agent_detach(t->agent);
        bn_target_release(t);
        bn_target_drop_saved(t);
        return 0;
    }
    bool has_sets = true;
    for (size_t p = 0; p < t->nparts; p++)
        has_sets = has_sets && t->parts[p].set;
    if (t->gated && !t->evicted && !has_sets)
        return bn_error_set(err, EUCLEAN, "recover",
                            "process %d holds memory that no record knows: its gate stays closed", t->pid);
    return 0;
}

static int look(struct bn_quiesce *q, struct bn_target *t, struct bn_error *err)
{
    enum bn_ckpt_state state;
    /* A gate that only could not be opened, after the memory was given back, holds nothing of ours. */
    int r = t->evicted ? look_at_agent(t, err) : 0;
    if (r == 0 && (q->flags & BN_FIND_KEEP_CONTEXT))
        return 0;
    if (r == 0)
        r = bn_ckpt_state(q->env->gpu, t->pid, &state, err);
    /* The driver's "no CUDA" is not believed of one that it may have checkpointed; after an exec it is true. */
    if (r == 0 && bn_ckpt_no_cuda(state) && bn_target_maps_driver(t->pid) != 0)
        r = bn_error_set(err, EAGAIN, "recover",
                         "the driver says that process %d does not use CUDA: try again", t->pid);
    if (r < 0)
        return bn_target_wait_gone(t, 0) ? 0 : r;
    t->checkpointed = state == BN_CKPT_CHECKPOINTED;
    t->locked = t->checkpointed || state == BN_CKPT_LOCKED;
    t->lost = state == BN_CKPT_FAILED;
    return 0;
}

int bn_recover_look(struct bn_suspended *s, struct bn_error *err)
{
    for (size_t i = 0; i < s->q.targets.n; i++) {
        struct bn_target *t = &s->q.targets.v[i];
        int r = bn_target_gone(t) ? 0 : look(&s->q, t, err);
        if (r < 0)
            return r;
    }
    s->look = false;
    return 0;
}

int bn_recover(struct bn_suspended **s, struct bn_report *report, struct bn_error *err)
{
    for (int tries = 1;; tries++) {
        struct bn_error why = BN_ERROR_INIT;
        (*s)->look = true;
        int r = bn_resume(s, report, &why);
        if (r == 0)
            return 0;
        if (tries == TRIES || bn_suspended_dead(*s)) {
            if (err)
                *err = why;
            return r;
        }
        poll(NULL, 0, LOOK_MS);
    }
}

/* ---- images ---- */

bool bn_recover_image(const struct bn_record *record, bool processes_run)
{
    if (record->nfds != 1)
        return true;
    int dirfd = record->fds[0];
    int manifest = bn_image_present(dirfd);
    int criu = manifest > 0 && processes_run ? bn_image_has_criu(dirfd) : 1;
    if (manifest < 0 || criu < 0 || (manifest && !processes_run)) /* not known counts as not yet */
        return false;
    if (manifest ? criu == 0 : !processes_run)
        bn_image_spoil(dirfd, NULL);
    return true;
}
