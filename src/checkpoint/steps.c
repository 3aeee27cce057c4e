/* The single steps on targets, forwards and backwards (target.h). */
#include "checkpoint/target.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/parallel.h"
#include "wire/packet.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>

#define GATE_TRY_MS 2000u
#define GATE_PAUSE_MS 20u
/* What a barred process has twice for a moment, unless a single segment is larger. */
#define MOVE_BYTES (UINT64_C(256) << 20)

/* ---- gates ---- */

struct gate_try {
    struct bn_targets *targets;
    unsigned timeout_ms;
};

static int close_one(void *ctx, size_t i, struct bn_error *err)
{
    struct gate_try *try = ctx;
    struct bn_target *t = &try->targets->v[i];
    if (!t->agent)
        return 0;
    int r = bn_agent_attach(t->agent, err);
    if (r < 0)
        return r;
    r = bn_agent_close_gate(t->agent, try->timeout_ms, err);
    if (r == 0)
        t->gated = true;
    return r;
}

int bn_targets_close_gates(struct bn_targets *targets, unsigned timeout_ms, struct bn_error *err)
{
    uint64_t deadline = bn_now_ns() + (uint64_t)timeout_ms * 1000000u;
    for (;;) {
        uint64_t now = bn_now_ns();
        uint64_t left_ms = deadline > now ? (deadline - now) / 1000000u : 0;
        struct gate_try try = {targets, left_ms < GATE_TRY_MS ? (unsigned)left_ms + 1 : GATE_TRY_MS};
        struct bn_error why = BN_ERROR_INIT;
        int r = bn_parallel(targets->n, close_one, &try, &why);
        if (r == 0)
            return 0;
        /* All or none: a peer may wait for a call that our closed gate holds back. */
        for (size_t i = 0; i < targets->n; i++)
            bn_target_open_gate(&targets->v[i], NULL);
        if ((r != -EBUSY && r != -EAGAIN) || bn_now_ns() + GATE_PAUSE_MS * 1000000u >= deadline)
            return bn_error_set(err, why.code, why.stage[0] ? why.stage : "gate", "%s", why.text);
        poll(NULL, 0, GATE_PAUSE_MS);
    }
}

int bn_target_open_gate(struct bn_target *t, struct bn_error *err)
{
    if (!t->agent)
        return 0;
    int r = 0;
    if (t->gated)
        r = bn_agent_open_gate(t->agent, err);
    if (r == 0)
        t->gated = false;
    bn_agent_detach(t->agent);
    return r;
}

/* ---- hand over ---- */

struct handed {
    struct bn_agent_segment seg;
    int fd;
    unsigned dev;
    size_t order;
};

static int by_device(const void *a, const void *b)
{
    const struct handed *x = a, *y = b;
    if (x->dev != y->dev)
        return x->dev < y->dev ? -1 : 1;
    return x->order < y->order ? -1 : x->order > y->order;
}

static int resolve_devices(struct bn_target *t, struct bn_gpu *gpu, struct handed *h, struct bn_error *err)
{
    for (size_t i = 0; i < t->nsegs; i++) {
        int dev = bn_gpu_find(gpu, h[i].seg.uuid);
        if (dev < 0)
            return bn_error_set(
                err, dev, "hand-over",
                "process %d holds memory on a GPU that bennud does not see: start bennud without "
                "CUDA_VISIBLE_DEVICES",
                t->pid);
        h[i].dev = (unsigned)dev;
        h[i].order = i;
    }
    qsort(h, t->nsegs, sizeof(*h), by_device);
    return 0;
}

struct import {
    struct bn_target *t;
    struct bn_gpu *gpu;
    struct handed *h;
};

/* Descriptors of an imported part belong to its set. */
static int import_part(void *arg, size_t p, struct bn_error *err)
{
    struct import *im = arg;
    struct bn_target_part *part = &im->t->parts[p];
    struct handed *h = im->h + part->first;
    bn_auto_free struct bn_gpu_block *blocks = calloc(part->n, sizeof(*blocks));
    if (!blocks)
        return bn_error_set(err, ENOMEM, "hand-over", "out of memory");
    for (size_t i = 0; i < part->n; i++)
        blocks[i] = (struct bn_gpu_block){.size = h[i].seg.size, .flags = h[i].seg.flags, .fd = h[i].fd};
    int r = bn_gpu_set_import(im->gpu, part->dev, blocks, part->n, &part->set, err);
    for (size_t i = 0; r == 0 && i < part->n; i++)
        h[i].fd = -1;
    return r;
}

/* One part for each run of equal devices. */
static int import_parts(struct bn_target *t, struct bn_gpu *gpu, struct handed *h, struct bn_error *err)
{
    t->parts = calloc(bn_gpu_count(gpu), sizeof(*t->parts));
    if (!t->parts)
        return bn_error_set(err, ENOMEM, "hand-over", "out of memory");
    for (size_t i = 0; i < t->nsegs; i++) {
        if (i == 0 || h[i].dev != h[i - 1].dev)
            t->parts[t->nparts++] = (struct bn_target_part){.dev = h[i].dev, .first = i};
        t->parts[t->nparts - 1].n++;
        t->parts[t->nparts - 1].bytes += h[i].seg.size;
    }
    return bn_parallel(t->nparts, import_part, &(struct import){t, gpu, h}, err);
}

int bn_target_hand_over(struct bn_target *t, struct bn_gpu *gpu, struct bn_error *err)
{
    if (!t->agent)
        return 0;
    int r = bn_agent_list(t->agent, &t->segs, &t->nsegs, err);
    if (r < 0 || t->nsegs == 0)
        return r;
    bn_auto_free struct handed *h = calloc(t->nsegs, sizeof(*h));
    bn_auto_free int *fds = calloc(t->nsegs, sizeof(*fds));
    if (!h || !fds)
        return bn_error_set(err, ENOMEM, "hand-over", "out of memory");
    r = bn_agent_export(t->agent, t->segs, t->nsegs, fds, err);
    if (r < 0)
        return r;
    for (size_t i = 0; i < t->nsegs; i++)
        h[i] = (struct handed){.seg = t->segs[i], .fd = fds[i]};

    r = resolve_devices(t, gpu, h, err);
    if (r == 0)
        r = import_parts(t, gpu, h, err);
    for (size_t i = 0; i < t->nsegs; i++) {
        t->segs[i] = h[i].seg;
        bn_close(h[i].fd); /* those that no set took */
    }
    return r;
}

static int create_set(void *gpu, struct bn_target *t, struct bn_target_part *part, size_t i,
                      struct bn_error *err)
{
    (void)i;
    if (part->set || !t->evicted || bn_target_gone(t))
        return 0;
    bn_auto_free struct bn_gpu_block *blocks = calloc(part->n, sizeof(*blocks));
    if (!blocks)
        return bn_error_set(err, ENOMEM, "allocate", "out of memory");
    for (size_t k = 0; k < part->n; k++)
        blocks[k] = (struct bn_gpu_block){
            .size = t->segs[part->first + k].size, .flags = t->segs[part->first + k].flags, .fd = -1};
    return bn_gpu_set_create(gpu, part->dev, blocks, part->n, &part->set, err);
}

int bn_targets_create_sets(struct bn_targets *targets, struct bn_gpu *gpu, struct bn_error *err)
{
    return bn_targets_each_part(targets, create_set, gpu, err);
}

void bn_target_release(struct bn_target *t)
{
    for (size_t i = 0; i < t->nparts; i++) {
        bn_gpu_set_free(t->parts[i].set);
        t->parts[i].set = NULL;
    }
}

/* ---- evict and give back ---- */

int bn_target_evict(struct bn_target *t, struct bn_error *err)
{
    if (!t->agent)
        return 0;
    int r = bn_agent_evict(t->agent, err);
    struct bn_agent_page page;
    /* After a failure as well, when only the handles could not be let go; and where no answer came, it may yet do it: until it says
     * otherwise, what we hold is the only copy. */
    t->evicted = r == 0 || !bn_agent_answered(t->agent) || bn_agent_page(t->agent, &page) < 0 ||
                 page.state != BN_AGENT_CLOSED;
    return r;
}

int bn_target_give_back(struct bn_target *t, struct bn_error *err)
{
    if (!t->agent || !t->evicted)
        return 0;
    bn_auto_free int *fds = calloc(t->nsegs ? t->nsegs : 1, sizeof(*fds));
    if (!fds)
        return bn_error_set(err, ENOMEM, "give-back", "out of memory");
    for (size_t p = 0; p < t->nparts; p++) {
        const struct bn_target_part *part = &t->parts[p];
        for (size_t i = 0; i < part->n; i++) {
            int fd = bn_gpu_set_fd(part->set, i, err);
            if (fd < 0)
                return fd;
            fds[part->first + i] = fd;
        }
    }
    struct bn_error why = BN_ERROR_INIT;
    int r = bn_agent_attach(t->agent, &why);
    if (r == 0)
        r = bn_agent_import(t->agent, t->segs, fds, t->nsegs, &why);
    t->barred = r == -ENODEV;
    if (t->barred)
        return 0;
    if (r == 0)
        t->evicted = false;
    else if (err)
        *err = why;
    return r;
}

/* A few of a part's segments, from its `at`th on. */
static int move_some(struct bn_target *t, const struct bn_target_part *part, size_t at, size_t n,
                     struct bn_error *err)
{
    const struct bn_agent_segment *segs = t->segs + part->first + at;
    int fds[BN_AGENT_BATCH], r = bn_agent_create(t->agent, segs, n, fds, err);
    if (r == -ENOMEM) {
        uint64_t bytes = 0;
        for (size_t i = 0; i < n; i++)
            bytes += segs[i].size;
        bn_error_replace(
            err, r, "move-in",
            "process %d was brought to another GPU, where its memory has to be copied once more: %llu MiB "
            "more must be free on that GPU for a moment. Stop or suspend something on it",
            t->pid, (unsigned long long)bytes >> 20);
    }
    if (r < 0)
        return r;
    size_t done = 0;
    while (r == 0 && done < n) {
        r = bn_gpu_set_swap(part->set, at + done, fds[done], err);
        done += r == 0;
    }
    bn_close_all(fds + done, n - done);
    return r;
}

/* How many from the `at`th on go together. */
static size_t together(const struct bn_target *t, const struct bn_target_part *part, size_t at)
{
    uint64_t bytes = 0;
    size_t n = 0;
    for (; n < BN_AGENT_BATCH && at + n < part->n; n++) {
        bytes += t->segs[part->first + at + n].size;
        if (n > 0 && bytes > MOVE_BYTES)
            break;
    }
    return n;
}

int bn_target_move_in(struct bn_target *t, bn_target_fn moved, void *arg, struct bn_error *err)
{
    for (size_t p = 0; t->barred && p < t->nparts; p++) {
        const struct bn_target_part *part = &t->parts[p];
        for (size_t at = 0, n = 0; at < part->n; at += n) {
            struct bn_error why = BN_ERROR_INIT;
            n = together(t, part, at);
            int r = move_some(t, part, at, n, &why);
            while (r == -ENOMEM && n > 1) { /* one may still fit */
                n /= 2;
                why = (struct bn_error)BN_ERROR_INIT;
                r = move_some(t, part, at, n, &why);
            }
            if (r == 0)
                r = moved(arg, t, &why);
            if (r == 0)
                r = bn_agent_map(t->agent, t->segs + part->first + at, n, &why);
            if (r < 0 && err)
                *err = why;
            if (r < 0)
                return r;
        }
    }
    if (t->barred)
        t->barred = t->evicted = false;
    return 0;
}

/* ---- the driver's half ---- */

int bn_target_lock(struct bn_target *t, struct bn_gpu *gpu, unsigned timeout_ms, struct bn_error *err)
{
    int r = bn_ckpt_lock(gpu, t->pid, timeout_ms, err);
    if (r == 0)
        t->locked = true;
    return r;
}

int bn_target_checkpoint(struct bn_target *t, struct bn_gpu *gpu, struct bn_error *err)
{
    int r = bn_ckpt_checkpoint(gpu, t->pid, err);
    if (r == 0)
        t->checkpointed = true;
    return r;
}

int bn_target_restore(struct bn_target *t, struct bn_gpu *gpu, const struct bn_ckpt_pairs *pairs,
                      struct bn_error *err)
{
    if (!t->checkpointed)
        return 0;
    bool asked;
    int r = bn_ckpt_restore(gpu, t->pid, pairs, &asked, err);
    if (r == 0)
        t->checkpointed = t->lost = false;
    else if (asked && r != -ESRCH)
        t->lost = true;
    return r;
}

int bn_target_unlock(struct bn_target *t, struct bn_gpu *gpu, struct bn_error *err)
{
    if (!t->locked)
        return 0;
    int r = bn_ckpt_unlock(gpu, t->pid, err);
    if (r == 0)
        t->locked = false;
    return r;
}
