#include "restore/restore.h"

#include "base/cleanup.h"
#include "base/parallel.h"
#include "base/proc.h"
#include "checkpoint/copies.h"
#include "gpu/hash.h"
#include "image/manifest.h"
#include "restore/host_check.h"
#include "restore/host_fill.h"
#include "restore/place.h"
#include "restore/verify.h"
#include "store/image_dir.h"
#include "store/pack.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* CRIU detaches within milliseconds of its last hook; a large tree on a loaded machine may take longer. */
#define RUNNABLE_MS 60000u

struct bn_restore {
    struct bn_quiesce q;
    unsigned flags;
    const bool *cancel;
    struct bn_manifest *manifest;
    struct bn_pack_reader *reader;
    struct bn_place place;
    struct bn_copies copies;
    struct bn_host_fill *host;   /* NULL: CRIU reads it */
    struct bn_host_check *check; /* NULL: of a stock image */
    struct load *loads;          /* one a part */
    size_t nloads;
};

struct load {
    struct bn_pack_reader *reader;
    const struct bn_target_part *part;
    bool gpu_verifies; /* else each chunk is compared with its hash as it is read */
};

static struct bn_restore *of(struct bn_quiesce *q)
{
    return (struct bn_restore *)((char *)q - offsetof(struct bn_restore, q));
}

/* ---- from the manifest to targets ---- */

/* Segments of one process, grouped by GPU as the manifest has them: the dump wrote them in that order. */
static int fill_parts(struct bn_restore *r, struct bn_target *t, const struct bn_image_process *p,
                      struct bn_error *err)
{
    t->nsegs = p->n_segments;
    t->segs = calloc(t->nsegs ? t->nsegs : 1, sizeof(*t->segs));
    t->parts = calloc(t->nsegs ? t->nsegs : 1, sizeof(*t->parts));
    if (!t->segs || !t->parts)
        return bn_error_set(err, ENOMEM, "load", "out of memory");
    for (size_t i = 0; i < t->nsegs; i++) {
        const struct bn_image_segment *s = &p->segments[i];
        t->segs[i] = (struct bn_agent_segment){.id = s->id, .size = s->size, .va = s->va, .flags = s->flags};
        unsigned dev = r->place.dev[s->gpu];
        memcpy(t->segs[i].uuid, bn_gpu_info(r->q.env->gpu, dev)->uuid, sizeof(t->segs[i].uuid));
        struct bn_target_part *last = t->nparts ? &t->parts[t->nparts - 1] : NULL;
        bool follows =
            last && last->dev == dev && last->image_chunk + last->bytes / BN_CHUNK_SIZE == s->first_chunk;
        if (!follows) {
            last = &t->parts[t->nparts++];
            *last = (struct bn_target_part){.dev = dev, .first = i, .image_chunk = s->first_chunk};
        }
        last->n++;
        last->bytes += s->size;
    }
    return 0;
}

static int make_targets(struct bn_restore *r, struct bn_error *err)
{
    struct bn_targets *targets = &r->q.targets;
    targets->v = calloc(r->manifest->n_processes ? r->manifest->n_processes : 1, sizeof(*targets->v));
    if (!targets->v)
        return bn_error_set(err, ENOMEM, "load", "out of memory");
    for (uint32_t i = 0; i < r->manifest->n_processes; i++) {
        const struct bn_image_process *p = &r->manifest->processes[i];
        struct bn_target *t = &targets->v[targets->n++];
        bool agent = p->flags & BN_PROCESS_AGENT;
        *t = (struct bn_target){.inner = p->pid, .pidfd = -1, .locked = true, .checkpointed = true};
        t->gated = t->evicted = agent;
        memcpy(t->comm, p->comm, sizeof(t->comm));
        memcpy(t->instance, p->instance, sizeof(t->instance));
        int rc = fill_parts(r, t, p, err);
        if (rc < 0)
            return rc;
    }
    return bn_targets_create_sets(targets, r->q.env->gpu, err);
}

/* ---- loading ---- */

static int produce(void *arg, uint64_t chunk, unsigned nchunks, void *data, struct bn_error *err)
{
    const struct load *l = arg;
    /* Stable: the copier keeps its staging buffers. */
    return bn_pack_reader_read_batch(l->reader, (uint32_t)(l->part->image_chunk + chunk), nchunks, data,
                                     BN_PACK_STABLE | (l->gpu_verifies ? 0 : BN_PACK_VERIFY), err);
}

static int load_part(struct bn_quiesce *q, struct bn_target *t, struct bn_target_part *part, void *arg,
                     struct bn_copy **job, struct bn_error *err)
{
    (void)t, (void)arg;
    struct load *l = &of(q)->loads[of(q)->nloads++];
    *l = (struct load){.reader = of(q)->reader,
                       .part = part,
                       .gpu_verifies = bn_gpu_hash_ready(q->env->gpu, part->dev, NULL) == 0};
    struct bn_copy_spec spec = {.mode = BN_COPY_IN, .set = part->set, .produce = produce, .arg = l};
    return bn_copy_start(q->env->copier, &spec, job, err);
}

static int start_loading(struct bn_restore *r, struct bn_error *err)
{
    size_t parts = bn_targets_parts(&r->q.targets);
    r->loads = calloc(parts ? parts : 1, sizeof(*r->loads));
    if (!r->loads)
        return bn_error_set(err, ENOMEM, "load", "out of memory");
    return bn_copies_start(&r->copies, &r->q, "load", load_part, NULL, err);
}

struct verify {
    const struct bn_restore *r;
    const struct bn_hash_key *key;
};

static int verify_load(void *arg, size_t i, struct bn_error *err)
{
    const struct verify *v = arg;
    const struct bn_restore *r = v->r;
    const struct load *l = &r->loads[i];
    if (!l->gpu_verifies)
        return 0;
    return bn_verify_part(r->q.env->gpu, v->key, r->manifest, r->reader, l->part, err);
}

/* What the copy threads did not compare. */
static int verify(struct bn_restore *r, struct bn_error *err)
{
    struct bn_hash_key *key = bn_hash_key_new(r->manifest->key);
    if (!key)
        return bn_error_set(err, ENOMEM, "verify", "out of memory");
    int phase = bn_report_begin(r->q.report, "verify");
    uint64_t bytes = 0;
    for (size_t i = 0; i < r->nloads; i++)
        bytes += r->loads[i].gpu_verifies ? r->loads[i].part->bytes : 0;
    int rc = bn_parallel(r->nloads, verify_load, &(struct verify){r, key}, err);
    bn_report_end(r->q.report, phase, bytes);
    bn_hash_key_free(key);
    return rc;
}

static int finish_loading(struct bn_quiesce *q, struct bn_error *err)
{
    int rc = bn_copies_finish(&of(q)->copies, q, of(q)->cancel, err);
    return rc < 0 || of(q)->nloads == 0 ? rc : verify(of(q), err); /* a stock image has no manifest either */
}

static int check_driver(const struct bn_restore *r, struct bn_error *err)
{
    unsigned have = bn_gpu_driver_version(r->q.env->gpu);
    if (r->manifest->driver_version > have)
        return bn_error_set(err, EPROTONOSUPPORT, "load",
                            "the checkpoint was made with a driver for CUDA %u.%u and this machine's is for "
                            "%u.%u: install the same "
                            "or a newer driver",
                            r->manifest->driver_version / 1000, r->manifest->driver_version % 1000 / 10,
                            have / 1000, have % 1000 / 10);
    return 0;
}

static int begin(struct bn_restore *r, int dirfd, int lazy_pages, struct bn_error *err)
{
    /* Until the packs are open: nobody writes them anew between the manifest and them. Without locks it goes as well. */
    struct bn_error busy = BN_ERROR_INIT;
    bn_auto_fd lock = bn_image_lock(dirfd, false, &busy);
    if (lock == -EBUSY)
        return bn_error_set(err, EBUSY, busy.stage, "%s", busy.text);
    int rc = bn_image_load(dirfd, &r->manifest, err);
    if (rc == 0)
        rc = check_driver(r, err);
    if (rc == 0)
        rc = bn_place_gpus(r->q.env->gpu, r->manifest, &r->place, err);
    if (rc == 0)
        rc = bn_pack_reader_open(dirfd, r->manifest, &r->reader, err);
    if (rc == 0)
        rc = bn_host_check_start(dirfd, r->manifest, r->q.report, &r->check, err);
    if (rc == 0) {
        int phase = bn_report_begin(r->q.report, "allocate");
        rc = make_targets(r, err);
        bn_report_end(r->q.report, phase, 0);
    }
    if (rc == 0)
        rc = start_loading(r, err);
    if (rc == 0 && lazy_pages >= 0)
        rc = bn_host_fill_start(r->q.env, dirfd, lazy_pages, r->q.report, &r->host, err);
    r->q.pairs = r->place.pairs.n ? &r->place.pairs : NULL;
    return rc;
}

int bn_restore_begin(struct bn_env *env, int dirfd, int lazy_pages, unsigned flags, struct bn_report *report,
                     struct bn_restore **out, struct bn_error *err)
{
    struct bn_restore *r = calloc(1, sizeof(*r));
    if (!r)
        return bn_error_set(err, ENOMEM, "load", "out of memory");
    r->flags = flags;
    bn_copier_hold(env->copier); /* the reader's BN_PACK_STABLE */
    r->q = (struct bn_quiesce){.env = env, .report = bn_report_ref(report), .copy_end = finish_loading};
    int rc = flags & BN_RESTORE_STOCK ? 0 : begin(r, dirfd, lazy_pages, err);
    if (rc < 0) {
        bn_restore_free(r);
        return rc;
    }
    *out = r;
    return 0;
}

size_t bn_restore_count(const struct bn_restore *r)
{
    return r->flags & BN_RESTORE_STOCK ? 0 : r->q.targets.n;
}

/* ---- claiming ---- */

static struct bn_target *match(struct bn_restore *r, pid_t inner, const uint8_t *instance)
{
    static const uint8_t none[16];
    for (size_t i = 0; i < r->q.targets.n; i++) {
        struct bn_target *t = &r->q.targets.v[i];
        if (t->pid != 0)
            continue;
        bool driver_path = memcmp(t->instance, none, sizeof(none)) == 0;
        if (driver_path ? t->inner == inner : instance && memcmp(t->instance, instance, sizeof(none)) == 0)
            return t;
    }
    return NULL;
}

/* A process of a stock image becomes a target when the driver says that it is checkpointed. */
static int claim_stock(struct bn_restore *r, pid_t pid, struct bn_target **out, struct bn_error *err)
{
    enum bn_ckpt_state state;
    int rc = bn_ckpt_state(r->q.env->gpu, pid, &state, err);
    if (rc < 0)
        return rc;
    if (state != BN_CKPT_CHECKPOINTED && state != BN_CKPT_LOCKED)
        return 0;
    struct bn_target *v = reallocarray(r->q.targets.v, r->q.targets.n + 1, sizeof(*v));
    if (!v)
        return bn_error_set(err, ENOMEM, "claim", "out of memory");
    r->q.targets.v = v;
    *out = &v[r->q.targets.n++];
    **out = (struct bn_target){.pidfd = -1, .locked = true, .checkpointed = state == BN_CKPT_CHECKPOINTED};
    return 1;
}

int bn_restore_claim(struct bn_restore *r, pid_t pid, struct bn_error *err)
{
    struct bn_target *t = NULL;
    struct bn_agent *agent = NULL;
    pid_t inner = 0;
    /* Of all processes, whoever comes first: from here on CRIU lets them go. */
    int rc = r->host ? bn_host_fill_finish(r->host, err) : 0;
    if (rc == 0 && r->check)
        rc = bn_host_check_wait(r->check, err);
    if (rc < 0)
        return rc;
    rc = bn_proc_inner_pid(pid, &inner);
    if (rc < 0)
        return bn_error_set(err, rc, "claim", "the restored process %d is gone", pid);
    if (r->flags & BN_RESTORE_STOCK) {
        rc = claim_stock(r, pid, &t, err);
        if (rc <= 0)
            return rc;
    } else {
        struct bn_agent_page page;
        rc = bn_agent_find(pid, &agent);
        if (rc == 0 && bn_agent_page(agent, &page) < 0)
            rc = -EIO;
        t = match(r, inner, rc == 0 ? page.instance : NULL);
        if (!t || t->gated == false) {
            bn_agent_free(agent); /* the driver path takes no notice of it */
            agent = NULL;
        }
        if (!t)
            return 0;
    }
    t->pid = pid;
    t->inner = inner;
    t->agent = agent;
    bn_proc_comm(pid, t->comm);
    t->pidfd = bn_pidfd_open(pid);
    return t->pidfd < 0 ? bn_error_set(err, t->pidfd, "claim", "cannot hold process %d", pid) : 1;
}

/* ---- the end ---- */

static int wait_for_processes(struct bn_restore *r, struct bn_error *err)
{
    for (size_t i = 0; i < r->q.targets.n; i++) {
        const struct bn_target *t = &r->q.targets.v[i];
        if (t->pid == 0)
            return bn_error_set(err, ESRCH, "claim",
                                "CRIU did not bring back process %d (%s) of the checkpoint", t->inner,
                                t->comm);
        int rc = bn_target_wait_runnable(t, RUNNABLE_MS);
        if (rc < 0)
            return bn_error_set(err, rc, "claim",
                                rc == -ETIMEDOUT ? "the restored process %d stays stopped"
                                                 : "the restored process %d ended",
                                t->pid);
    }
    return 0;
}

int bn_restore_finish(struct bn_restore *r, const bool *cancel, struct bn_error *err)
{
    r->cancel = cancel;
    int phase = bn_report_begin(r->q.report, "criu-detach");
    int rc = wait_for_processes(r, err);
    bn_report_end(r->q.report, phase, 0);
    return rc < 0 ? rc : bn_quiesce_up(&r->q, err);
}

void bn_restore_free(struct bn_restore *r)
{
    if (!r)
        return;
    bn_host_fill_free(r->host);
    bn_host_check_free(r->check);
    bn_copies_cancel(&r->copies, &r->q);
    bn_targets_free(&r->q.targets);
    bn_pack_reader_free(r->reader);
    bn_copier_let_go(r->q.env->copier);
    bn_manifest_free(r->manifest);
    bn_report_unref(r->q.report);
    free(r->loads);
    free(r);
}
