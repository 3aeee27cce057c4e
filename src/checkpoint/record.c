#include "checkpoint/record.h"

#include "base/cleanup.h"
#include "base/proc.h"
#include "checkpoint/cold.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#define VERSION 2u

void bn_record_clear(struct bn_record *r)
{
    for (size_t i = 0; i < r->nfds; i++)
        bn_close(r->fds[i]);
    free(r->fds);
    free(r->bytes);
    *r = (struct bn_record){0};
}

/* ---- writing ---- */

static void write_head(struct bn_writer *w, const struct bn_quiesce *q, unsigned flags)
{
    bn_write_u32(w, VERSION);
    bn_write_u32(w, flags);
    bn_write_u64(w, q->session);
    bn_write_u32(w, (uint32_t)q->root);
}

/* Where in the host memory's file a part lies: as many contiguous spans as the pool had to make of it. */
static void write_spans(struct bn_writer *w, const struct bn_target_part *part)
{
    if (part->old) {
        bn_write_u32(w, (uint32_t)part->old->n);
        for (size_t i = 0; i < part->old->n; i++) {
            bn_write_u64(w, part->old->spans[i].at);
            bn_write_u64(w, part->old->spans[i].bytes);
        }
        return;
    }
    bn_auto_writer spans = {0};
    uint32_t n = 0;
    for (uint64_t off = 0, len, at; part->mem && off < part->bytes; off += len, n++) {
        bn_mem_piece(part->mem, off, &len, &at);
        len = len < part->bytes - off ? len : part->bytes - off;
        bn_write_u64(&spans, at);
        bn_write_u64(&spans, len);
    }
    bn_write_u32(w, n);
    bn_write_bytes(w, spans.buf, spans.len);
    w->failed |= spans.failed;
}

static void write_target(struct bn_writer *w, const struct bn_target *t, struct bn_gpu *gpu, uint64_t started,
                         unsigned flags)
{
    bn_write_u32(w, (uint32_t)t->pid);
    bn_write_u64(w, started);
    bn_write_bytes(w, t->instance, sizeof(t->instance));
    bn_write_u32(w, (uint32_t)t->nsegs);
    bn_write_u32(w, (uint32_t)t->nparts);
    for (size_t i = 0; i < t->nsegs; i++)
        bn_write_bytes(w, &t->segs[i], sizeof(t->segs[i]));
    for (size_t p = 0; p < t->nparts; p++) {
        bn_write_bytes(w, bn_gpu_info(gpu, t->parts[p].dev)->uuid, 16);
        bn_write_u32(w, (uint32_t)t->parts[p].n);
        bn_write_u64(w, t->parts[p].image_chunk);
        if (flags & BN_RECORD_HOST)
            write_spans(w, &t->parts[p]);
        else
            bn_write_u32(w, 0);
    }
}

/* Descriptors in the order of the record: host memory or folder, then one a segment. Borrowed from pool, folder and sets. */
static int collect(const struct bn_quiesce *q, const struct bn_target *t, unsigned flags, int *fds, size_t *n,
                   struct bn_error *err)
{
    *n = 0;
    if (t->nparts > 0 && (flags & BN_RECORD_HOST))
        fds[(*n)++] = t->parts[0].old ? t->parts[0].old->fd : bn_pool_fd(q->env->pool);
    else if (t->nparts > 0 && (flags & BN_RECORD_DISK))
        fds[(*n)++] = bn_cold_dirfd(t->parts[0].cold);
    for (size_t p = 0; p < t->nparts && (flags & BN_RECORD_GPU); p++)
        for (size_t i = 0; i < t->parts[p].n; i++) {
            int fd = bn_gpu_set_fd(t->parts[p].set, i, err);
            if (fd < 0)
                return fd;
            fds[(*n)++] = fd;
        }
    return 0;
}

static bool is_back(const struct bn_target *t)
{
    return !t->gated && !t->evicted && !t->locked && !t->checkpointed;
}

/* What there is of a target, and of that what its record shall hold. Bytes are in two places while they move from one tier to the one
 * below, and are whole in the lower one when this is called: the other is about to be freed. */
static unsigned what(const struct bn_target *t, enum bn_stage stage)
{
    bool host = t->nparts > 0, disk = t->nparts > 0, gpu = true;
    for (size_t p = 0; p < t->nparts; p++) {
        host = host && (t->parts[p].mem || t->parts[p].old);
        disk = disk && t->parts[p].cold;
        gpu = gpu && t->parts[p].set;
    }
    unsigned bytes = disk ? BN_RECORD_DISK : host ? BN_RECORD_HOST : 0, sets = gpu ? BN_RECORD_GPU : 0;
    switch (stage) {
    case BN_STAGE_GUARDED: return sets;
    case BN_STAGE_SUSPENDED: return BN_RECORD_SUSPENDED | (bytes ? bytes : sets);
    default: return bytes | sets;
    }
}

/* Records of a tree at rest, for its folder. */
struct note {
    struct bn_writer bytes;
    bool elsewhere; /* some of the tree is not in the folder */
};

static void note_record(struct note *note, const struct bn_target *t, unsigned flags,
                        const struct bn_writer *record)
{
    note->elsewhere = note->elsewhere || (t->nparts > 0 && !(flags & BN_RECORD_DISK));
    bn_write_u32(&note->bytes, (uint32_t)record->len);
    bn_write_bytes(&note->bytes, record->buf, record->len);
}

static int put_target(struct bn_quiesce *q, struct bn_target *t, enum bn_stage stage, struct note *note,
                      struct bn_error *err)
{
    uint64_t started;
    unsigned flags = what(t, stage) | (t->agent ? BN_RECORD_AGENT : 0) |
                     (q->flags & BN_FIND_KEEP_CONTEXT ? BN_RECORD_CONTEXT : 0);
    if (stage != BN_STAGE_GUARDED && (is_back(t) || (t->gated && !t->evicted && !(flags & BN_RECORD_GPU))))
        return 0; /* it has its memory; at most its gate waits */
    int r = bn_target_gone(t) ? -ESRCH : bn_proc_start_time(t->pid, &started);
    if (r == -ESRCH)
        return 0;
    if (r < 0)
        return bn_error_set(err, r, "guard", "cannot look at process %d: %s", t->pid, strerror(-r));
    bn_auto_free int *fds = calloc(t->nsegs + 1, sizeof(*fds));
    if (!fds)
        return bn_error_set(err, ENOMEM, "guard", "out of memory");
    size_t nfds;
    r = collect(q, t, flags, fds, &nfds, err);
    if (r < 0)
        return r;
    bn_auto_writer w = {0};
    write_head(&w, q, flags);
    write_target(&w, t, q->env->gpu, started, flags);
    if (w.failed)
        return bn_error_set(err, ENOMEM, "guard", "out of memory");
    struct bn_guard *g = q->env->guard;
    uint64_t key = t->record ? t->record : g->new_key(g);
    r = g->put(g, key, BN_RECORD_TARGET, &w, fds, nfds, err);
    if (r == 0) {
        t->record = key;
        note_record(note, t, flags, &w);
    }
    return r;
}

static struct bn_cold *folder_of(const struct bn_quiesce *q)
{
    for (size_t i = 0; i < q->targets.n; i++)
        for (size_t p = 0; p < q->targets.v[i].nparts; p++)
            if (q->targets.v[i].parts[p].cold)
                return q->targets.v[i].parts[p].cold;
    return NULL;
}

int bn_records_put(struct bn_quiesce *q, enum bn_stage stage, struct bn_error *err)
{
    struct bn_guard *g = q->env->guard;
    if (!g)
        return 0;
    if (q->session == 0)
        q->session = g->new_key(g);
    struct bn_cold *folder = folder_of(q);
    struct note note = {0};
    int r = 0;
    if (folder &&
        stage != BN_STAGE_SUSPENDED) /* from here on the folder alone does not tell what has to be done */
        bn_cold_note(folder, NULL, 0);
    for (size_t i = 0; i < q->targets.n && r == 0; i++)
        r = put_target(q, &q->targets.v[i], stage, &note, err);
    /* A second safeguard: what fails here is missed only when keeper and worker are killed. */
    if (folder && stage == BN_STAGE_SUSPENDED && r == 0) {
        bool whole = !note.elsewhere && !note.bytes.failed;
        bn_cold_note(folder, whole ? note.bytes.buf : NULL, whole ? note.bytes.len : 0);
    }
    bn_writer_free(&note.bytes);
    return r;
}

int bn_record_again(struct bn_quiesce *q, struct bn_target *t, enum bn_stage stage, struct bn_error *err)
{
    struct note note = {0};
    int r = t->record ? put_target(q, t, stage, &note, err) : 0;
    bn_writer_free(&note.bytes);
    return r;
}

void bn_records_drop(struct bn_quiesce *q, bool all)
{
    for (size_t i = 0; i < q->targets.n; i++) {
        struct bn_target *t = &q->targets.v[i];
        if (t->record == 0 || !(all || is_back(t) || bn_target_gone(t)))
            continue;
        q->env->guard->drop(q->env->guard, t->record);
        t->record = 0;
    }
}

int bn_record_image(struct bn_quiesce *q, int dirfd, uint64_t *key, struct bn_error *err)
{
    struct bn_guard *g = q->env->guard;
    if (!g)
        return 0;
    if (q->session == 0)
        q->session = g->new_key(g);
    bn_auto_writer w = {0};
    write_head(&w, q, 0);
    if (w.failed)
        return bn_error_set(err, ENOMEM, "guard", "out of memory");
    uint64_t k = g->new_key(g);
    int r = g->put(g, k, BN_RECORD_IMAGE, &w, &dirfd, 1, err);
    if (r == 0)
        *key = k;
    return r;
}

/* ---- reading ---- */

static void read_head(struct bn_reader *b, struct bn_record_head *head)
{
    if (bn_read_u32(b) != VERSION)
        b->failed = true;
    head->flags = bn_read_u32(b);
    head->session = bn_read_u64(b);
    head->root = (pid_t)bn_read_u32(b);
}

int bn_record_head(const struct bn_record *r, struct bn_record_head *head)
{
    struct bn_reader b = bn_reader_init(r->bytes, r->nbytes), version = b;
    if (bn_read_u32(&version) != VERSION && !version.failed)
        return -EPROTO;
    read_head(&b, head);
    return b.failed ? -EBADMSG : 0;
}

#define SESSION_AT 8u /* in a record: behind version and flags */

/* One record of a note, as one of a new session. */
static int read_noted(struct bn_reader *b, struct bn_guard *g, uint64_t session, int dirfd,
                      struct bn_record *r)
{
    struct bn_record_head head;
    uint32_t len = bn_read_u32(b);
    const void *bytes = bn_read_bytes(b, len);
    *r = (struct bn_record){.key = g->new_key(g), .kind = BN_RECORD_TARGET};
    if (!bytes || len < SESSION_AT + sizeof(session))
        return -EBADMSG;
    r->bytes = malloc(len);
    r->fds = malloc(sizeof(*r->fds));
    if (!r->bytes || !r->fds)
        return -ENOMEM;
    memcpy(r->bytes, bytes, len);
    for (unsigned i = 0; i < sizeof(session); i++)
        ((uint8_t *)r->bytes)[SESSION_AT + i] = (uint8_t)(session >> 8 * i);
    r->nbytes = len;
    int rc = bn_record_head(r, &head);
    if (rc < 0)
        return rc;
    if (!(head.flags & BN_RECORD_SUSPENDED))
        return -EBADMSG; /* whether it has all that its flags say is looked at where it is opened */
    if (!(head.flags & BN_RECORD_DISK))
        return 0;
    r->fds[0] = fcntl(dirfd, F_DUPFD_CLOEXEC, 3);
    if (r->fds[0] < 0)
        return -errno;
    r->nfds = 1;
    return 0;
}

int bn_records_of_folder(struct bn_guard *g, int dirfd, struct bn_record **out, size_t *n)
{
    bn_auto_free void *bytes = NULL;
    size_t len, have = 0;
    struct bn_record *v = NULL;
    int r = bn_cold_read_note(dirfd, &bytes, &len);
    if (r < 0)
        return r;
    struct bn_reader b = bn_reader_init(bytes, len);
    uint64_t session = g->new_key(g);
    while (r == 0 && bn_reader_left(&b) > 0) {
        struct bn_record *more = reallocarray(v, have + 1, sizeof(*v));
        if (!more) {
            r = -ENOMEM;
            break;
        }
        v = more;
        r = read_noted(&b, g, session, dirfd, &v[have++]);
    }
    if (r == 0 && have > 0) {
        *out = v;
        *n = have;
        return 0;
    }
    for (size_t i = 0; i < have; i++)
        bn_record_clear(&v[i]);
    free(v);
    return r < 0 ? r : -EBADMSG;
}

/* The part's bytes in host memory, its file duplicated. *out stays NULL where there are none. */
static int read_old(struct bn_reader *b, uint64_t bytes, int fd, struct bn_old_host **out)
{
    uint32_t n = bn_read_u32(b);
    if (n == 0)
        return 0;
    if (fd < 0 || n > bn_reader_left(b) / 16)
        return -EBADMSG;
    struct bn_old_host *old = calloc(1, sizeof(*old) + n * sizeof(old->spans[0]));
    if (!old)
        return -ENOMEM;
    old->n = n;
    for (uint32_t i = 0; i < n; i++) {
        old->spans[i].at = bn_read_u64(b);
        old->spans[i].bytes = bn_read_u64(b);
        bytes -= old->spans[i].bytes; /* overflow ends in a number that is not 0 */
    }
    old->fd = bytes == 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 3) : -1;
    if (old->fd < 0) {
        int r = bytes == 0 ? -errno : -EBADMSG;
        free(old);
        return r;
    }
    *out = old;
    return 0;
}

static int read_parts(struct bn_reader *b, struct bn_gpu *gpu, struct bn_target *t, size_t n, int host_fd,
                      struct bn_cold *cold)
{
    size_t first = 0;
    for (; t->nparts < n; t->nparts++) {
        struct bn_target_part *part = &t->parts[t->nparts];
        const uint8_t *uuid = bn_read_bytes(b, 16);
        part->first = first;
        part->n = bn_read_u32(b);
        part->image_chunk = bn_read_u64(b);
        if (!uuid || part->n > t->nsegs - first)
            return -EBADMSG;
        for (size_t i = 0; i < part->n; i++)
            part->bytes += t->segs[first + i].size;
        first += part->n;
        int dev = bn_gpu_find(gpu, uuid);
        if (dev < 0)
            return dev;
        part->dev = (unsigned)dev;
        int r = read_old(b, part->bytes, host_fd, &part->old);
        if (r < 0)
            return r;
        part->cold = cold ? bn_cold_ref(cold) : NULL;
    }
    return first == t->nsegs ? 0 : -EBADMSG;
}

static int read_target(struct bn_reader *b, struct bn_record *r, unsigned flags, struct bn_gpu *gpu,
                       struct bn_target *t, uint64_t *started)
{
    t->pid = (pid_t)bn_read_u32(b);
    *started = bn_read_u64(b);
    const void *instance = bn_read_bytes(b, sizeof(t->instance));
    size_t nsegs = bn_read_u32(b), nparts = bn_read_u32(b);
    if (!instance || nsegs > bn_reader_left(b) / sizeof(*t->segs) || nparts > nsegs)
        return -EBADMSG;
    bool host = nparts > 0 && (flags & BN_RECORD_HOST), disk = nparts > 0 && (flags & BN_RECORD_DISK);
    if (r->nfds != (flags & BN_RECORD_GPU ? nsegs : 0) + host + disk)
        return -EBADMSG;
    memcpy(t->instance, instance, sizeof(t->instance));
    t->segs = calloc(nsegs ? nsegs : 1, sizeof(*t->segs));
    t->parts = calloc(nparts ? nparts : 1, sizeof(*t->parts));
    if (!t->segs || !t->parts)
        return -ENOMEM;
    t->nsegs = nsegs;
    memcpy(t->segs, bn_read_bytes(b, nsegs * sizeof(*t->segs)), nsegs * sizeof(*t->segs));
    t->gated = t->evicted = flags & BN_RECORD_AGENT; /* until somebody looks */
    struct bn_cold *cold = NULL;
    int rc = disk ? bn_cold_open(r->fds[0], &cold, NULL) : 0;
    if (rc == 0)
        rc = read_parts(b, gpu, t, nparts, host ? r->fds[0] : -1, cold);
    if (cold && rc < 0)
        bn_cold_keep(cold);
    bn_cold_unref(cold);
    return rc;
}

/* The number may be another process's by now. -ESRCH only where that is certain: what the record holds is dropped then. */
static int hold_process(struct bn_target *t, uint64_t started)
{
    uint64_t now;
    t->pidfd = bn_pidfd_open(t->pid);
    if (t->pidfd < 0)
        return t->pidfd;
    int r = bn_proc_start_time(t->pid, &now);
    if (r == 0)
        r = now == started ? bn_proc_inner_pid(t->pid, &t->inner) : -ESRCH;
    if (bn_pidfd_dead(t->pidfd))
        return -ESRCH;
    bn_proc_comm(t->pid, t->comm);
    return r;
}

/* Those of the segments are the last ones. */
static int take_fds(struct bn_record *r, unsigned flags, size_t n, int **out)
{
    *out = NULL;
    if (!(flags & BN_RECORD_GPU))
        return 0;
    size_t first = r->nfds - n;
    int *fds = calloc(n ? n : 1, sizeof(*fds));
    if (!fds)
        return -ENOMEM;
    for (size_t i = 0; i < n; i++)
        fds[i] = BN_TAKE_FD(r->fds[first + i]);
    *out = fds;
    return 0;
}

int bn_record_target(struct bn_record *r, struct bn_gpu *gpu, struct bn_target *t, int **fds,
                     struct bn_error *err)
{
    struct bn_record_head head;
    uint64_t started = 0;
    struct bn_reader b = bn_reader_init(r->bytes, r->nbytes);
    struct bn_target made = {.pidfd = -1};
    read_head(&b, &head);
    int rc = b.failed ? -EBADMSG : read_target(&b, r, head.flags, gpu, &made, &started);
    if (rc == 0 && b.failed)
        rc = -EBADMSG;
    if (rc == 0)
        rc = hold_process(&made, started);
    if (rc == 0)
        rc = take_fds(r, head.flags, made.nsegs, fds);
    if (rc < 0) {
        bn_target_keep_folder(&made); /* others of its tree may need it */
        bn_target_clear(&made);
        return bn_error_set(err, rc, "recover", "cannot take up process %d again: %s", made.pid,
                            strerror(-rc));
    }
    made.record = r->key;
    *t = made;
    return 0;
}
