#include "store/verify.h"

#include "base/cleanup.h"
#include "base/parallel.h"
#include "store/pack.h"
#include "store/pack_table.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define THREADS_MAX 16u

struct file {
    dev_t dev;
    ino_t ino;
};

struct bn_verify {
    struct file *files;
    uint32_t n_files;
    struct bn_pack_table seen; /* places that were good: source is the file */
};

/* One image under way. */
struct run {
    struct bn_pack_reader *reader;
    const struct bn_manifest *m;
    uint32_t *todo; /* chunks, each place once, in the order in which they lie */
    uint32_t n;
    pthread_mutex_t lock; /* everything below */
    uint32_t next;
    bool *bad; /* as todo */
    bn_verify_fn damaged;
    void *arg;
    struct bn_verify_result result;
};

struct bn_verify *bn_verify_new(void)
{
    return calloc(1, sizeof(struct bn_verify));
}

void bn_verify_free(struct bn_verify *v)
{
    if (!v)
        return;
    bn_pack_table_free(&v->seen);
    free(v->files);
    free(v);
}

/* The number of the file behind a pack; the reader has it open already, so it is there. */
static int64_t file_of(struct bn_verify *v, int dirfd, uint32_t pack)
{
    char name[BN_PACK_NAME_MAX];
    struct stat st;
    snprintf(name, sizeof(name), BN_PACK_NAME, pack);
    if (fstatat(dirfd, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return -errno;
    for (uint32_t i = 0; i < v->n_files; i++)
        if (v->files[i].dev == st.st_dev && v->files[i].ino == st.st_ino)
            return i;
    struct file *more = realloc(v->files, (v->n_files + 1) * sizeof(*more));
    if (!more)
        return -ENOMEM;
    v->files = more;
    more[v->n_files] = (struct file){st.st_dev, st.st_ino};
    return v->n_files++;
}

static bool is_seen(const struct bn_verify *v, const struct bn_image_chunk *c, uint32_t file)
{
    const struct bn_pack_record *rec = bn_pack_table_find(&v->seen, &c->hash);
    return rec && rec->source == file && rec->offset == c->offset && rec->length == c->length &&
           rec->encoding == c->encoding;
}

static int compare_places(const void *a, const void *b, void *arg)
{
    const struct bn_image_chunk *chunks = arg, *x = &chunks[*(const uint32_t *)a],
                                *y = &chunks[*(const uint32_t *)b];
    if (x->pack != y->pack)
        return x->pack < y->pack ? -1 : 1;
    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return memcmp(x->hash.b, y->hash.b, sizeof(x->hash.b));
}

/* Chunks to read: none that was read before, and of chunks that share a place and a hash one. */
static void choose(struct bn_verify *v, struct run *run, const uint32_t *files)
{
    const struct bn_manifest *m = run->m;
    for (uint32_t i = 0; i < m->n_chunks; i++) {
        const struct bn_image_chunk *c = &m->chunks[i];
        if (c->flags & BN_CHUNK_ZERO)
            continue;
        run->result.chunks++;
        if (!is_seen(v, c, files[bn_manifest_find_pack(m, c->pack) - m->packs]))
            run->todo[run->n++] = i;
    }
    qsort_r(run->todo, run->n, sizeof(*run->todo), compare_places, m->chunks);
    uint32_t kept = 0;
    for (uint32_t i = 0; i < run->n; i++)
        if (kept == 0 || compare_places(&run->todo[i], &run->todo[kept - 1], m->chunks) != 0)
            run->todo[kept++] = run->todo[i];
    run->n = kept;
}

static int work(void *ctx, size_t index, struct bn_error *err)
{
    (void)index;
    struct run *run = ctx;
    bn_auto_free void *buffer = aligned_alloc(BN_PACK_ALIGN, BN_CHUNK_SIZE);
    if (!buffer)
        return bn_error_set(err, ENOMEM, "verify", "out of memory");
    for (;;) {
        pthread_mutex_lock(&run->lock);
        uint32_t i = run->next < run->n ? run->next++ : UINT32_MAX;
        pthread_mutex_unlock(&run->lock);
        if (i == UINT32_MAX)
            return 0;
        struct bn_error why = BN_ERROR_INIT;
        int r = bn_pack_reader_read(run->reader, run->todo[i], buffer, &why);
        pthread_mutex_lock(&run->lock);
        run->result.bytes += run->m->chunks[run->todo[i]].length;
        if (r < 0) {
            run->bad[i] = true;
            run->result.damaged++;
            run->damaged(run->arg, &why);
        }
        pthread_mutex_unlock(&run->lock);
    }
}

static int remember(struct bn_verify *v, const struct run *run, const uint32_t *files)
{
    for (uint32_t i = 0; i < run->n; i++) {
        const struct bn_image_chunk *c = &run->m->chunks[run->todo[i]];
        if (run->bad[i] || bn_pack_table_find(&v->seen, &c->hash))
            continue;
        struct bn_pack_record *rec = bn_pack_table_add(&v->seen, &c->hash);
        if (!rec)
            return -ENOMEM;
        rec->source = files[bn_manifest_find_pack(run->m, c->pack) - run->m->packs];
        rec->offset = c->offset;
        rec->length = c->length;
        rec->encoding = c->encoding;
    }
    return 0;
}

int bn_verify_image(struct bn_verify *v, int dirfd, const struct bn_manifest *m, bn_verify_fn damaged,
                    void *arg, struct bn_verify_result *result, struct bn_error *err)
{
    struct run run = {.m = m, .damaged = damaged, .arg = arg, .lock = PTHREAD_MUTEX_INITIALIZER};
    int r = bn_pack_reader_open(dirfd, m, &run.reader, err);
    if (r < 0)
        return r;
    size_t n = m->n_chunks ? m->n_chunks : 1;
    bn_auto_free uint32_t *todo = run.todo = calloc(n, sizeof(*todo));
    bn_auto_free bool *bad = run.bad = calloc(n, sizeof(*bad));
    bn_auto_free uint32_t *files = calloc(m->n_packs ? m->n_packs : 1, sizeof(*files));
    if (!todo || !bad || !files)
        r = -ENOMEM;
    for (uint32_t i = 0; r == 0 && i < m->n_packs; i++) {
        int64_t file = file_of(v, dirfd, m->packs[i].index);
        files[i] = (uint32_t)file;
        r = file < 0 ? (int)file : 0;
    }
    if (r == 0) {
        choose(v, &run, files);
        size_t threads = bn_cores(THREADS_MAX);
        r = bn_parallel(threads < run.n ? threads : run.n, work, &run, err);
    }
    if (r == 0)
        r = remember(v, &run, files);
    bn_pack_reader_free(run.reader);
    if (r < 0)
        return bn_error_set(err, r, "verify", "%s", strerror(-r));
    *result = run.result;
    return 0;
}
