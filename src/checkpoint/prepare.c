#include "checkpoint/prepare.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/parallel.h"
#include "base/proc.h"
#include "checkpoint/cold.h"
#include "checkpoint/copies.h"
#include "checkpoint/record.h"
#include "checkpoint/sending.h"
#include "store/image_dir.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define PASSES_MAX 6u
/* What is left is little enough: a sixty-fourth of it all crosses the link in the time that a dump takes anyway. */
#define LITTLE(bytes) ((bytes) / 64)
/* A pass that sends more than this of what the one before sent is the last: the application writes too fast. */
#define SHRUNK(bytes) ((bytes) / 4 * 3)

struct bn_prepared {
    struct bn_env *env;
    pid_t root;
    uint64_t start_time;
    int pidfd;
    int dirfd;
    bool spooled; /* the folder is ours */
    struct bn_pack_writer *writer;
    struct bn_hash_key *key;
    unsigned level;  /* of compression */
    uint64_t record; /* of the folder, 0: none */
};

/* ---- one pass ---- */

struct pass {
    struct bn_prepared *p;
    struct bn_quiesce q;
    struct bn_send_env send;
    struct bn_sending **parts;
    size_t nparts;
    struct bn_copies copies;
    bool hashed;
    uint64_t bytes, sent, gate_ns;
};

static int hand_over(void *arg, size_t i, struct bn_error *err)
{
    struct bn_quiesce *q = arg;
    return bn_target_hand_over(&q->targets.v[i], q->env->gpu, err);
}

/* All that the application notices. */
static int take_hold(struct pass *s, struct bn_error *err)
{
    struct bn_quiesce *q = &s->q;
    struct bn_env *env = q->env;
    int phase = bn_report_begin(q->report, "gate-closed");
    uint64_t began = bn_now_ns();
    bn_kill_point(env, "pre-gate", "begin");
    int r = bn_targets_close_gates(&q->targets, env->gate_timeout_ms, err);
    bn_kill_point(env, "pre-gate", "one");
    if (r == 0)
        r = bn_parallel(q->targets.n, hand_over, q, err);
    for (size_t i = 0; i < q->targets.n; i++) {
        int opened = bn_target_open_gate(&q->targets.v[i], r == 0 ? err : NULL);
        r = r < 0 ? r : opened;
    }
    s->gate_ns = bn_now_ns() - began;
    bn_kill_point(env, "pre-gate", "end");
    bn_report_end(q->report, phase, 0);
    return r;
}

static int choose(struct pass *s, struct bn_error *err)
{
    struct bn_targets *t = &s->q.targets;
    size_t parts = bn_targets_parts(t);
    s->parts = calloc(parts ? parts : 1, sizeof(*s->parts));
    if (!s->parts)
        return bn_error_set(err, ENOMEM, "hash", "out of memory");
    for (size_t i = 0; i < t->n; i++)
        for (size_t k = 0; k < t->v[i].nparts; k++) {
            t->v[i].parts[k].image_chunk = s->bytes / BN_CHUNK_SIZE;
            s->bytes += t->v[i].parts[k].bytes;
        }
    if (s->bytes / BN_CHUNK_SIZE > BN_MANIFEST_CHUNKS_MAX)
        return bn_error_set(err, E2BIG, "hash", "more GPU memory than a checkpoint can have");
    int r = bn_pack_writer_relayout(s->p->writer, (uint32_t)(s->bytes / BN_CHUNK_SIZE), err);
    int phase = bn_report_begin(s->q.report, "hash");
    r = r < 0 ? r : bn_sending_new(&s->send, t, s->parts, err);
    s->nparts = r < 0 ? 0 : parts;
    s->hashed = true;
    for (size_t i = 0; i < s->nparts; i++) {
        s->hashed = s->hashed && bn_sending_hashed(s->parts[i]);
        s->sent += bn_sending_bytes(s->parts[i]);
    }
    bn_report_end(s->q.report, phase, s->hashed ? s->bytes : 0);
    return r;
}

static int send_part(struct bn_quiesce *q, struct bn_target *t, struct bn_target_part *part, void *arg,
                     struct bn_copy **job, struct bn_error *err)
{
    (void)q, (void)t, (void)part;
    struct bn_sending ***next = arg;
    return bn_sending_start(*(*next)++, job, err);
}

static int send_all(struct pass *s, const bool *cancel, struct bn_error *err)
{
    struct bn_sending **next = s->parts;
    int r = bn_copies_start(&s->copies, &s->q, "pre-copy", send_part, &next, err);
    bn_kill_point(s->q.env, "pre-copy", "one");
    return r < 0 ? r : bn_copies_finish(&s->copies, &s->q, cancel, err);
}

static int run_pass(struct pass *s, const bool *cancel, struct bn_error *err)
{
    struct bn_quiesce *q = &s->q;
    int r = bn_targets_find(q->env->gpu, q->root, 0, &q->targets, err);
    if (r == 0)
        r = bn_targets_check(&q->targets, 0, err);
    if (r == 0 && q->targets.n == 0)
        r = bn_error_set(err, ENODATA, "find",
                         "process %d does not use CUDA: there is nothing to copy ahead of a dump", q->root);
    if (r == 0)
        r = take_hold(s, err);
    if (r == 0)
        r = choose(s, err);
    if (r == 0)
        r = send_all(s, cancel, err);
    for (size_t i = 0; i < s->nparts; i++)
        bn_sending_free(s->parts[i]);
    free(s->parts);
    bn_targets_free(&q->targets); /* with the memory */
    return r;
}

static int run_passes(struct bn_prepared *p, struct bn_report *report, struct bn_rate *rate,
                      const bool *cancel, struct bn_prepare_stats *stats, struct bn_error *err)
{
    for (unsigned n = 0; n < PASSES_MAX; n++) {
        struct pass s = {.p = p,
                         .q = {.env = p->env, .report = report, .root = p->root},
                         .send = {.gpu = p->env->gpu,
                                  .copier = p->env->copier,
                                  .writer = p->writer,
                                  .key = p->key,
                                  .cancel = cancel,
                                  .slow = p->level,
                                  .rate = rate}};
        int r = run_pass(&s, cancel, err);
        if (r < 0)
            return r;
        uint64_t before = stats->last_bytes;
        stats->passes++;
        stats->gpu_bytes = s.bytes;
        stats->sent_bytes += s.sent;
        stats->last_bytes = s.sent;
        stats->gate_ns = s.gate_ns > stats->gate_ns ? s.gate_ns : stats->gate_ns;
        if (!s.hashed || s.sent <= LITTLE(s.bytes) || (n > 0 && s.sent > SHRUNK(before)))
            return 0;
    }
    return 0;
}

/* ---- life ---- */

static int open_folder(struct bn_prepared *p, int dirfd, struct bn_error *err)
{
    p->spooled = dirfd < 0;
    p->dirfd = p->spooled ? bn_cold_folder(p->env->spool, p->root) : fcntl(dirfd, F_DUPFD_CLOEXEC, 3);
    if (p->dirfd < 0 && p->spooled)
        return bn_error_set(err, p->dirfd, "spool", "cannot make a folder in %s: %s", p->env->spool,
                            strerror(-p->dirfd));
    if (p->dirfd < 0)
        return bn_error_set(err, errno, "pre-dump", "cannot hold the folder: %m");
    if (p->spooled)
        return 0; /* without its lock it is removed by the next daemon */
    struct bn_quiesce q = {.env = p->env, .root = p->root};
    return bn_record_image(&q, p->dirfd, &p->record, err);
}

static int prepared_new(struct bn_env *env, pid_t root, const struct bn_prepare_options *o,
                        struct bn_prepared **out, struct bn_error *err)
{
    struct bn_prepared *p = calloc(1, sizeof(*p));
    if (!p)
        return bn_error_set(err, ENOMEM, "pre-dump", "out of memory");
    *p = (struct bn_prepared){
        .env = env, .root = root, .dirfd = -1, .pidfd = bn_pidfd_open(root), .level = o->level};
    uint8_t key[BN_HASH_KEY_SIZE];
    int r = p->pidfd < 0 ? p->pidfd : bn_proc_start_time(root, &p->start_time);
    if (r < 0)
        bn_error_set(err, r, "find", "no process with pid %d", root);
    if (r == 0)
        r = open_folder(p, o->dirfd, err);
    if (r == 0)
        r = bn_send_open(p->dirfd, o->parent, key, &p->writer, err);
    if (r == 0)
        r = bn_pack_writer_compress(p->writer, o->level, err);
    if (r == 0 && !(p->key = bn_hash_key_new(key)))
        r = bn_error_set(err, ENOMEM, "pre-dump", "out of memory");
    if (r < 0) {
        bn_prepared_free(p);
        return r;
    }
    *out = p;
    return 0;
}

int bn_prepare(struct bn_env *env, pid_t root, const struct bn_prepare_options *o, struct bn_report *report,
               const bool *cancel, struct bn_prepared **p, struct bn_prepare_stats *stats,
               struct bn_error *err)
{
    struct bn_rate rate = BN_RATE_INIT(o->per_second, cancel);
    *stats = (struct bn_prepare_stats){0};
    int r = *p ? 0 : prepared_new(env, root, o, p, err);
    if (r == 0)
        r = run_passes(*p, report, &rate, cancel, stats, err);
    if (r < 0) {
        bn_prepared_free(*p);
        *p = NULL;
    }
    return r;
}

pid_t bn_prepared_root(const struct bn_prepared *p)
{
    return p->root;
}

int bn_prepared_pidfd(const struct bn_prepared *p)
{
    return p->pidfd;
}

bool bn_prepared_for(const struct bn_prepared *p, pid_t root)
{
    uint64_t start;
    return p->root == root && !bn_pidfd_dead(p->pidfd) && bn_proc_start_time(root, &start) == 0 &&
           start == p->start_time;
}

static bool same_folder(int a, int b)
{
    struct stat x, y;
    return fstat(a, &x) == 0 && fstat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

int bn_prepared_use(struct bn_prepared *p, int dirfd, struct bn_pack_writer **writer,
                    uint8_t key[BN_HASH_KEY_SIZE], struct bn_error *err)
{
    if (!same_folder(p->dirfd, dirfd)) {
        /* What lies there is replaced, as any dump does. */
        int r = bn_image_remove(dirfd, err);
        if (r == 0)
            r = bn_pack_writer_retarget(p->writer, dirfd, err);
        if (r < 0)
            return r;
    }
    memcpy(key, bn_hash_key_bytes(p->key), BN_HASH_KEY_SIZE);
    *writer = BN_TAKE_PTR(p->writer);
    return 0;
}

void bn_prepared_free(struct bn_prepared *p)
{
    if (!p)
        return;
    bn_pack_writer_abort(p->writer);
    if (p->record)
        p->env->guard->drop(p->env->guard, p->record);
    if (p->dirfd >= 0 && p->spooled)
        bn_cold_remove(p->dirfd);
    bn_close(p->dirfd);
    bn_close(p->pidfd);
    bn_hash_key_free(p->key);
    free(p);
}
