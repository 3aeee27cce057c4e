#include "checkpoint/dump.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/parallel.h"
#include "base/proc.h"
#include "checkpoint/copies.h"
#include "checkpoint/describe.h"
#include "checkpoint/record.h"
#include "checkpoint/sending.h"
#include "store/disk.h"
#include "store/host_files.h"
#include "store/image_dir.h"
#include "store/pack.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#define LOOK_MS 1000u

struct bn_dump {
    struct bn_quiesce q;
    int dirfd;
    struct bn_manifest *manifest;
    bool sparse; /* much of it is known beforehand: from a parent, or copied ahead */
    bool ahead;  /* packs lie in the folder already */
    struct bn_pack_writer *writer;
    uint8_t key[BN_HASH_KEY_SIZE]; /* the writer's, once it is open */
    struct bn_copies copies;
    const bool *cancel;
    struct bn_rate rate; /* of what was set aside */
    uint64_t started_ns; /* the copies */
    struct bn_usage aside;
    bool released; /* they need nothing of the processes any more */
    bool let_go;   /* the processes, by the aftermath */
    struct bn_hash_key *hash_key;
    struct bn_send_env send;
    struct bn_sending **parts; /* one a part of a target */
    size_t nparts;
    uint64_t record; /* of the unfinished image; 0: none */
};

static struct bn_dump *of(struct bn_quiesce *q)
{
    return (struct bn_dump *)((char *)q - offsetof(struct bn_dump, q));
}

/* ---- writing ---- */

static int send_part(struct bn_quiesce *q, struct bn_target *t, struct bn_target_part *part, void *arg,
                     struct bn_copy **job, struct bn_error *err)
{
    (void)q, (void)t, (void)part;
    struct bn_sending ***next = arg;
    return bn_sending_start(*(*next)++, job, err);
}

/* Nobody can write to the memory any more: what is hashed now is what will be copied. */
static int choose_chunks(struct bn_dump *d, struct bn_error *err)
{
    struct bn_targets *targets = &d->q.targets;
    size_t parts = bn_targets_parts(targets);
    d->send = (struct bn_send_env){.cancel = d->cancel,
                                   .aside_rate = d->rate.per_second ? &d->rate : NULL,
                                   .slow = d->q.flags >> BN_DUMP_LEVEL_SHIFT,
                                   .gpu = d->q.env->gpu,
                                   .copier = d->q.env->copier,
                                   .writer = d->writer,
                                   .key = d->hash_key = bn_hash_key_new(d->manifest->key)};
    d->parts = calloc(parts ? parts : 1, sizeof(*d->parts));
    if (!d->hash_key || !d->parts)
        return bn_error_set(err, ENOMEM, "hash", "out of memory");
    int phase = bn_report_begin(d->q.report, "hash");
    int r = bn_sending_new(&d->send, targets, d->parts, err);
    d->nparts = r < 0 ? 0 : parts;
    uint64_t hashed = 0;
    for (size_t i = 0; i < d->nparts; i++)
        hashed += bn_sending_hashed(d->parts[i]) ? bn_sending_total(d->parts[i]) : 0;
    bn_report_end(d->q.report, phase, hashed);
    return r;
}

/* What is more than a little, and fits: part by part. */
static int set_aside_on(void *arg, size_t dev, struct bn_error *err)
{
    struct bn_dump *d = arg;
    (void)err;
    for (size_t i = 0; i < d->nparts; i++)
        if (bn_sending_dev(d->parts[i]) == dev && bn_sending_set_aside(d->parts[i]))
            d->aside.gpu[dev] += bn_sending_bytes(d->parts[i]);
    return 0;
}

static void set_aside(struct bn_dump *d)
{
    int phase = bn_report_begin(d->q.report, "set-aside");
    unsigned gpus = bn_gpu_count(d->q.env->gpu);
    gpus = gpus < BN_USAGE_GPUS ? gpus : BN_USAGE_GPUS;
    bn_parallel(gpus, set_aside_on, d, NULL);
    uint64_t bytes = 0;
    for (unsigned dev = 0; dev < gpus; dev++)
        bytes += d->aside.gpu[dev];
    bn_report_end(d->q.report, phase, bytes);
}

static int drop_one_aside(void *arg, size_t i, struct bn_error *err)
{
    struct bn_dump *d = arg;
    (void)err;
    bn_sending_drop_aside(d->parts[i]);
    return 0;
}

/* When nobody copies from there any more. */
static void drop_aside(struct bn_dump *d)
{
    bn_parallel(d->nparts, drop_one_aside, d, NULL);
}

static int open_writer(struct bn_dump *d, struct bn_error *err)
{
    int r = d->writer ? 0 : bn_send_open(d->dirfd, -1, d->key, &d->writer, err);
    if (r < 0)
        return r;
    memcpy(d->manifest->key, d->key, sizeof(d->key));
    return bn_pack_writer_relayout(d->writer, d->manifest->n_chunks, err);
}

static int start_writing(struct bn_quiesce *q, struct bn_error *err)
{
    struct bn_dump *d = of(q);
    int r = bn_describe(q, &d->manifest, err);
    if (r == 0 && !d->sparse) /* nobody knows yet how little it will be */
        r = bn_store_check_space(d->dirfd, bn_manifest_bytes(d->manifest), err);
    /* Container runtimes name one directory again and again (a checkpoint that leaves the container running, one that was kept
     * after a restore), and CRIU writes over its files there: the checkpoint that was in it is lost anyway. */
    if (r == 0 && !d->ahead)
        r = bn_image_remove(d->dirfd, err);
    if (r == 0 && !d->ahead)
        r = bn_record_image(q, d->dirfd, &d->record, err);
    if (r == 0)
        r = open_writer(d, err);
    /* What does not fit into the page cache would only push out what other programs use, and wait for the disk all the same. */
    if (r == 0 && (q->flags & BN_DUMP_SYNC || bn_manifest_bytes(d->manifest) > bn_disk_cache_room()))
        r = bn_pack_writer_direct(d->writer, 0, true, err);
    if (r == 0)
        r = bn_pack_writer_compress(d->writer, q->flags >> BN_DUMP_LEVEL_SHIFT, err);
    if (r < 0)
        return r;
    r = choose_chunks(d, err);
    if (r == 0 && q->flags & BN_DUMP_ASIDE)
        set_aside(d);
    struct bn_sending **next = d->parts;
    d->started_ns = bn_now_ns();
    return r < 0 ? r : bn_copies_start(&d->copies, q, "copy-out", send_part, &next, err);
}

static int stop_writing(struct bn_quiesce *q, struct bn_error *err)
{
    (void)err;
    if (!of(q)->released)
        bn_copies_cancel(&of(q)->copies, q);
    return 0;
}

/* ---- life of a dump ---- */

static void drop_image_record(struct bn_dump *d)
{
    if (d->record)
        d->q.env->guard->drop(d->q.env->guard, d->record);
    d->record = 0;
}

void bn_dump_free(struct bn_dump *d)
{
    drop_image_record(d);
    bn_records_drop(&d->q, true);
    bn_targets_free(&d->q.targets);
    bn_manifest_free(d->manifest);
    bn_report_unref(d->q.report);
    bn_close(d->dirfd);
    bn_copier_let_go(d->q.env->copier);
    for (size_t i = 0; i < d->nparts; i++)
        bn_sending_free(d->parts[i]);
    free(d->parts);
    bn_hash_key_free(d->hash_key);
    free(d);
}

void bn_dump_abort(struct bn_dump *d)
{
    bn_copies_cancel(&d->copies, &d->q);
    drop_aside(d);
    bn_pack_writer_abort(d->writer);
    d->writer = NULL;
}

/* Before anything is copied: what others have of it. */
static int join(struct bn_dump *d, const struct bn_dump_options *o, struct bn_error *err)
{
    if (o->parent >= 0) {
        d->sparse = true;
        return bn_send_open(d->dirfd, o->parent, d->key, &d->writer, err);
    }
    if (!o->prepared)
        return 0;
    int r = bn_record_image(&d->q, d->dirfd, &d->record, err);
    if (r < 0)
        return r;
    int phase = bn_report_begin(d->q.report, "take-over");
    struct bn_error why =
        BN_ERROR_INIT; /* if it cannot be used (no room to copy it to), this is a dump like any other */
    if (bn_prepared_use(o->prepared, d->dirfd, &d->writer, d->key, &why) == 0)
        d->sparse = d->ahead = true;
    else
        drop_image_record(d);
    bn_report_end(d->q.report, phase, 0);
    bn_kill_point(d->q.env, "take-over", "one");
    return 0;
}

int bn_dump_begin(struct bn_env *env, pid_t root, const struct bn_dump_options *options,
                  struct bn_report *report, struct bn_dump **out, struct bn_suspended **left,
                  struct bn_error *err)
{
    *left = NULL;
    struct bn_dump *d = calloc(1, sizeof(*d));
    if (!d) {
        bn_prepared_free(options->prepared);
        return bn_error_set(err, ENOMEM, "dump", "out of memory");
    }
    bn_copier_hold(env->copier); /* the writer may be told that staging buffers are stable */
    d->cancel = options->cancel;
    d->rate = BN_RATE_INIT(options->per_second, options->cancel);
    d->dirfd = fcntl(options->dirfd, F_DUPFD_CLOEXEC, 3);
    d->q = (struct bn_quiesce){.env = env,
                               .report = bn_report_ref(report),
                               .root = root,
                               .flags = options->flags,
                               .copy_start = start_writing,
                               .copy_end = stop_writing};
    int r = d->dirfd < 0 ? bn_error_set(err, errno, "dump", "cannot hold the directory: %m") : 0;
    if (r == 0)
        r = join(d, options, err); /* before any process is touched */
    bn_prepared_free(options->prepared);
    if (r == 0)
        r = bn_quiesce_down(&d->q, err);
    if (r < 0 || d->q.targets.n == 0) {
        bn_dump_abort(d);
        *left = bn_suspended_take(&d->q);
        bn_dump_free(d);
        d = NULL;
    }
    if (r == 0)
        *out = d;
    return r;
}

bool bn_dump_set_aside(const struct bn_dump *d, struct bn_usage *usage)
{
    bool any = false;
    for (unsigned g = 0; g < BN_USAGE_GPUS; g++)
        any = any || d->aside.gpu[g];
    *usage = d->aside;
    return any;
}

const struct bn_targets *bn_dump_targets(const struct bn_dump *d)
{
    return &d->q.targets;
}

int bn_dump_covers(const struct bn_dump *d, pid_t pid, struct bn_error *err)
{
    if (bn_targets_index(&d->q.targets, pid) >= 0)
        return 1;
    enum bn_ckpt_state state;
    int r = bn_ckpt_state(d->q.env->gpu, pid, &state, err);
    if (r < 0)
        return r == -ESRCH ? 0 : r;
    if (bn_ckpt_no_cuda(state))
        return 0;
    return bn_error_set(err, EAGAIN, "find",
                        "process %d began to use CUDA while the checkpoint was under way: try again", pid);
}

static struct bn_agent *agent_of(const struct bn_dump *d, pid_t pid)
{
    ssize_t i = bn_targets_index(&d->q.targets, pid);
    return i < 0 ? NULL : d->q.targets.v[i].agent;
}

pid_t bn_dump_thread(const struct bn_dump *d, pid_t pid)
{
    struct bn_agent *agent = agent_of(d, pid);
    pid_t tid = agent ? bn_agent_tid(agent) : 0;
    return tid > 0 ? tid : 0;
}

int bn_dump_purge(const struct bn_dump *d, pid_t pid, uint64_t *freed, struct bn_error *err)
{
    struct bn_agent *agent = agent_of(d, pid);
    if (!agent)
        return bn_error_set(err, ENOENT, "purge", "process %d has no agent", pid);
    bn_kill_point(d->q.env, "purge", "begin");
    int phase = bn_report_begin(d->q.report, "purge");
    int r = bn_agent_purge(agent, freed, err);
    bn_kill_point(d->q.env, "purge", "end");
    bn_report_end(d->q.report, phase, r == 0 ? *freed : 0);
    return r;
}

static int add_phases(struct bn_dump *d)
{
    struct bn_phases phases;
    bn_report_phases(d->q.report, &phases);
    int r = 0;
    for (uint32_t i = 0; i < phases.n && r == 0; i++)
        r = bn_manifest_add_phase(d->manifest, phases.phase[i].name, phases.phase[i].start_ns,
                                  phases.phase[i].duration_ns, phases.phase[i].bytes);
    return r;
}

/* CRIU has written all of its files. */
static int note_host_files(struct bn_dump *d, const bool *cancel, struct bn_error *err)
{
    uint64_t bytes = 0;
    int phase = bn_report_begin(d->q.report, "host-files");
    int r = bn_host_files_note(d->dirfd, d->manifest, cancel, &bytes, err);
    bn_report_end(d->q.report, phase, bytes);
    return r;
}

/* CRIU's own files lie in the same file system: one call brings all of it to the disk. */
static int sync_all(struct bn_dump *d, struct bn_error *err)
{
    if (!(d->q.flags & BN_DUMP_SYNC))
        return 0;
    int phase = bn_report_begin(d->q.report, "sync");
    int r = syncfs(d->dirfd) < 0
                ? bn_error_set(err, errno, "sync", "cannot bring the checkpoint to the disk: %m")
                : 0;
    bn_report_end(d->q.report, phase, 0);
    return r;
}

int bn_dump_release(struct bn_dump *d, const bool *cancel, struct bn_error *err)
{
    uint64_t last = 0;
    int r = bn_copies_finish_targets(&d->copies, &d->q, cancel, &last, err);
    if (r < 0) {
        bn_dump_abort(d);
        return r;
    }
    bn_report_span_to(d->q.report, "gate", last > d->started_ns ? last : d->started_ns, "gpu-pause");
    d->released = true;
    return 0;
}

static int check_cancel(const bool *cancel, struct bn_error *err)
{
    return cancel && __atomic_load_n(cancel, __ATOMIC_ACQUIRE)
               ? bn_error_set(err, ECANCELED, "commit", "cancelled")
               : 0;
}

/* What has been written, and what CRIU has: it is no checkpoint. */
static void give_up(struct bn_dump *d)
{
    bn_dump_abort(d);
    bn_image_spoil(d->dirfd, NULL);
}

int bn_dump_commit(struct bn_dump *d, const bool *cancel, struct bn_error *err)
{
    bn_kill_point(d->q.env, "commit", "begin");
    if (!d->let_go) /* they wait for it */
        bn_rate_lift(&d->rate);
    int r = d->released ? 0 : bn_dump_release(d, cancel, err);
    if (r == 0)
        r = bn_copies_finish(&d->copies, &d->q, cancel, err);
    drop_aside(d);
    for (size_t i = 0; r == 0 && i < d->nparts; i++)
        r = bn_sending_settle(d->parts[i], err);
    if (r == 0)
        r = note_host_files(d, cancel, err);
    if (r == 0)
        r = bn_pack_writer_finish(d->writer, d->manifest, err);
    bn_kill_point(d->q.env, "commit", "one");
    if (r == 0)
        r = check_cancel(cancel, err);
    if (r == 0)
        r = sync_all(d, err);
    if (r == 0)
        r = check_cancel(cancel, err);
    if (r == 0 && add_phases(d) < 0)
        r = bn_error_set(err, ENOMEM, "manifest", "out of memory");
    if (r == 0)
        r = bn_image_save(d->dirfd, d->manifest, err);
    if (r < 0) {
        give_up(d);
        return r;
    }
    bn_pack_writer_close(d->writer);
    d->writer = NULL;
    bn_kill_point(d->q.env, "commit", "end");
    return 0;
}

bool bn_dump_runs(struct bn_dump *d)
{
    for (size_t i = 0; i < d->q.targets.n; i++)
        while (bn_target_wait_runnable(&d->q.targets.v[i], LOOK_MS) == -ETIMEDOUT)
            if (bn_copies_ended(&d->copies))
                return false;
    return true;
}

int bn_dump_aftermath(struct bn_dump *d, struct bn_suspended **left, struct bn_error *err)
{
    for (size_t i = 0; i < d->q.targets.n; i++)
        while (bn_target_wait_runnable(&d->q.targets.v[i], LOOK_MS) == -ETIMEDOUT)
            ; /* still in CRIU's hands, or in a frozen cgroup: it needs nothing until it may run */
    int r = bn_quiesce_up(&d->q, err);
    bn_report_span(d->q.report, "gate", "open-gate", "pause");
    *left = r < 0 ? bn_suspended_take(&d->q) : NULL;
    d->let_go = true;
    return r;
}
