#include "checkpoint/tier.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/parallel.h"
#include "checkpoint/cold.h"
#include "checkpoint/describe.h"
#include "checkpoint/suspend_internal.h"

#include <stdlib.h>
#include <string.h>

/* ---- host: pinned memory ---- */

static bool host_has(const struct bn_target_part *part)
{
    return part->mem || part->old;
}

static void host_drop(struct bn_target_part *part)
{
    bn_mem_free(part->mem);
    if (part->old)
        bn_close(part->old->fd);
    free(part->old);
    part->mem = NULL;
    part->old = NULL;
}

static int host_save_part(struct bn_quiesce *q, struct bn_target *t, struct bn_target_part *part, void *arg,
                          struct bn_copy **job, struct bn_error *err)
{
    (void)t, (void)arg;
    if (host_has(part))
        return 0;
    struct bn_env *env = q->env;
    struct bn_error why = BN_ERROR_INIT;
    int r;
    while ((r = bn_mem_alloc(env->pool, part->bytes, &part->mem, &why)) == -ENOMEM)
        if (!env->room || env->room(env, BN_TIER_HOST, 0, part->bytes, NULL) < 0)
            break;
    if (r < 0)
        return bn_error_set(err, r, why.stage, "%s", why.text);
    struct bn_copy_spec spec = {.mode = BN_COPY_TO_HOST, .set = part->set, .mem = part->mem};
    return bn_copy_start(q->env->copier, &spec, job, err);
}

static int host_save(struct bn_suspended *s, struct bn_error *err)
{
    return bn_copies_start(&s->copies, &s->q, "copy-out", host_save_part, NULL, err);
}

static int host_saved(struct bn_suspended *s, const bool *cancel, struct bn_error *err)
{
    return bn_copies_finish(&s->copies, &s->q, cancel, err);
}

/* From the host memory of an earlier daemon. Chunks come in any order. */
static int read_old(const struct bn_old_host *old, uint64_t at, uint64_t left, void *data,
                    struct bn_error *err)
{
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

static int produce_old(void *arg, uint64_t chunk, unsigned nchunks, void *data, struct bn_error *err)
{
    return read_old(arg, chunk * BN_GPU_CHUNK, nchunks * BN_GPU_CHUNK, data, err);
}

static int host_load(struct bn_quiesce *q, struct bn_target *t, struct bn_target_part *part, void *arg,
                     struct bn_copy **job, struct bn_error *err)
{
    (void)t, (void)arg;
    struct bn_copy_spec spec = {.mode = BN_COPY_FROM_HOST, .set = part->set, .mem = part->mem};
    if (part->old)
        spec = (struct bn_copy_spec){
            .mode = BN_COPY_IN, .set = part->set, .produce = produce_old, .arg = part->old};
    return bn_copy_start(q->env->copier, &spec, job, err);
}

/* ---- disk: packs in a folder of the spool ---- */

static bool disk_has(const struct bn_target_part *part)
{
    return part->cold;
}

static void disk_drop(struct bn_target_part *part)
{
    bn_cold_unref(part->cold);
    part->cold = NULL;
}

static int consume(void *arg, uint64_t chunk, unsigned nchunks, const void *data, struct bn_error *err)
{
    const struct bn_target_part *part = arg;
    return bn_cold_write(part->cold, part->image_chunk + chunk, nchunks, data, err);
}

static int produce(void *arg, uint64_t chunk, unsigned nchunks, void *data, struct bn_error *err)
{
    const struct bn_target_part *part = arg;
    return bn_cold_read(part->cold, part->image_chunk + chunk, nchunks, data, err);
}

static int disk_save_part(struct bn_quiesce *q, struct bn_target *t, struct bn_target_part *part, void *arg,
                          struct bn_copy **job, struct bn_error *err)
{
    (void)t;
    part->cold = bn_cold_ref(arg);
    if (host_has(part)) /* written when it is waited for */
        return 0;
    struct bn_copy_spec spec = {.mode = BN_COPY_OUT, .set = part->set, .consume = consume, .arg = part};
    return bn_copy_start(q->env->copier, &spec, job, err);
}

static int disk_save(struct bn_suspended *s, struct bn_error *err)
{
    struct bn_manifest *m = NULL;
    struct bn_cold *cold = NULL;
    struct bn_env *env = s->q.env;
    int r = bn_describe(&s->q, &m, err);
    if (r == 0 && env->room)
        r = env->room(env, BN_TIER_DISK, 0, bn_manifest_bytes(m), err);
    if (r < 0) {
        bn_manifest_free(m);
        return r;
    }
    if (r == 0)
        r = bn_cold_new(s->q.env->spool, s->q.root, m, &cold, err);
    if (r == 0)
        r = bn_copies_start(&s->copies, &s->q, "copy-out", disk_save_part, cold, err);
    bn_cold_unref(cold);
    return r;
}

/* Host memory to packs: pieces, several at once. */
#define PIECE ((uint64_t)64 << 20)
#define BATCH ((uint64_t)16 << 20)

struct pour {
    struct bn_target_part *part;
    const bool *cancel;
    struct bn_report *report;
    uint64_t done;
};

static int pour_batch(struct bn_target_part *part, uint64_t at, uint64_t n, void *buffer,
                      struct bn_error *err)
{
    uint64_t chunk = at / BN_GPU_CHUNK;
    if (part->old) {
        int r = read_old(part->old, at, n, buffer, err);
        return r < 0 ? r : consume(part, chunk, (unsigned)(n / BN_GPU_CHUNK), buffer, err);
    }
    int r = 0;
    for (uint64_t len; n > 0 && r == 0; at += len, n -= len) {
        const void *data = bn_mem_piece(part->mem, at, &len, NULL);
        len = len < n ? len : n;
        r = consume(part, at / BN_GPU_CHUNK, (unsigned)(len / BN_GPU_CHUNK), data, err);
    }
    return r;
}

static int pour_piece(void *ctx, size_t i, struct bn_error *err)
{
    struct pour *p = ctx;
    uint64_t at = i * PIECE, end = at + PIECE < p->part->bytes ? at + PIECE : p->part->bytes;
    bn_auto_free void *buffer = p->part->old ? aligned_alloc(BN_PACK_ALIGN, BATCH) : NULL;
    if (p->part->old && !buffer)
        return bn_error_set(err, ENOMEM, "copy-out", "out of memory");
    int r = 0;
    for (uint64_t n; at < end && r == 0; at += n) {
        if (p->cancel && __atomic_load_n(p->cancel, __ATOMIC_RELAXED))
            return bn_error_set(err, ECANCELED, "copy-out", "cancelled");
        n = end - at < BATCH ? end - at : BATCH;
        r = pour_batch(p->part, at, n, buffer, err);
        uint64_t done = __atomic_add_fetch(&p->done, n, __ATOMIC_RELAXED);
        bn_report_progress(p->report, "copy-out", done, p->part->bytes);
    }
    return r;
}

static int pour(struct bn_suspended *s, struct bn_target_part *part, const bool *cancel, struct bn_error *err)
{
    struct pour p = {.part = part, .cancel = cancel, .report = s->q.report};
    return bn_parallel((size_t)((part->bytes + PIECE - 1) / PIECE), pour_piece, &p, err);
}

static int disk_saved(struct bn_suspended *s, const bool *cancel, struct bn_error *err)
{
    struct bn_cold *cold = NULL;
    int r = bn_copies_finish(&s->copies, &s->q, cancel, err);
    for (size_t i = 0; i < s->q.targets.n; i++)
        for (size_t p = 0; p < s->q.targets.v[i].nparts && r == 0; p++) {
            struct bn_target_part *part = &s->q.targets.v[i].parts[p];
            cold = part->cold;
            r = host_has(part) ? pour(s, part, cancel, err) : 0;
        }
    return r == 0 && cold ? bn_cold_finish(cold, err) : r;
}

static int disk_load(struct bn_quiesce *q, struct bn_target *t, struct bn_target_part *part, void *arg,
                     struct bn_copy **job, struct bn_error *err)
{
    (void)t, (void)arg;
    struct bn_copy_spec spec = {.mode = BN_COPY_IN, .set = part->set, .produce = produce, .arg = part};
    return bn_copy_start(q->env->copier, &spec, job, err);
}

/* ---- gpu: the sets stay as they are ---- */

static int gpu_save(struct bn_suspended *s, struct bn_error *err)
{
    struct bn_env *env = s->q.env;
    struct bn_usage usage;
    bn_suspended_usage(s, &usage);
    int r = 0;
    for (unsigned dev = 0; dev < BN_USAGE_GPUS && env->room && r == 0; dev++)
        if (usage.gpu[dev])
            r = env->room(env, BN_TIER_GPU, dev, usage.gpu[dev], err);
    return r;
}

static bool gpu_has(const struct bn_target_part *part)
{
    return part->set;
}

static void gpu_drop(struct bn_target_part *part)
{
    bn_gpu_set_free(part->set);
    part->set = NULL;
}

/* ---- the table ---- */

/* The GPU is asked last: a part that is on its way up or down has a set as well. */
static const struct bn_tier tiers[] = {
    {BN_TIER_HOST, host_has, host_drop, host_save, host_saved, host_load},
    {BN_TIER_DISK, disk_has, disk_drop, disk_save, disk_saved, disk_load},
    {BN_TIER_GPU, gpu_has, gpu_drop, gpu_save, NULL, NULL},
};

const struct bn_tier *bn_tier_find(uint32_t id)
{
    for (size_t i = 0; i < BN_ARRAY_SIZE(tiers); i++)
        if (tiers[i].id == id)
            return &tiers[i];
    return NULL;
}

const struct bn_tier *bn_tier_of(const struct bn_target_part *part)
{
    for (size_t i = 0; i < BN_ARRAY_SIZE(tiers); i++)
        if (tiers[i].has(part))
            return &tiers[i];
    return NULL;
}

int bn_tier_load(struct bn_quiesce *q, struct bn_target *t, struct bn_target_part *part, void *arg,
                 struct bn_copy **job, struct bn_error *err)
{
    const struct bn_tier *tier = bn_tier_of(part);
    if (!t->gated || !part->set) /* it runs on that memory already; it is gone */
        return 0;
    return tier->load ? tier->load(q, t, part, arg, job, err) : 0;
}

/* Freeing GPU memory takes the driver time in proportion to it. */
static int keep_part(void *tier, struct bn_target *t, struct bn_target_part *part, size_t i,
                     struct bn_error *err)
{
    (void)t, (void)i, (void)err;
    for (size_t k = 0; k < BN_ARRAY_SIZE(tiers); k++)
        if (&tiers[k] != tier)
            tiers[k].drop(part);
    return 0;
}

void bn_tier_keep(struct bn_suspended *s, const struct bn_tier *tier)
{
    bn_targets_each_part(&s->q.targets, keep_part, (void *)tier, NULL);
}

/* What no other tier has stays. */
static int undo_part(void *tier, struct bn_target *t, struct bn_target_part *part, size_t i,
                     struct bn_error *err)
{
    const struct bn_tier *undo = tier;
    (void)t, (void)i, (void)err;
    for (size_t k = 0; k < BN_ARRAY_SIZE(tiers); k++)
        if (&tiers[k] != undo && tiers[k].has(part)) {
            undo->drop(part);
            break;
        }
    return 0;
}

void bn_tier_undo(struct bn_suspended *s, const struct bn_tier *tier)
{
    bn_targets_each_part(&s->q.targets, undo_part, (void *)tier, NULL);
}
