/* Bytes that other checkpoints have: known by their hash from the beginning, brought into the folder at the end. */
#include "store/pack_writer.h"

#include "base/cleanup.h"
#include "base/parallel.h"
#include "store/pack_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* More packs than this are not linked; what is left, the least used ones, is copied, which joins them: else a long line
 * of checkpoints, each with a few packs of its own, would end in one with thousands of packs. */
#define LINKS_MAX 256u
#define COPY_SHARE 32u /* chunks that are worth another thread */

/* ---- know ---- */

static void text_of_parent(struct bn_error *err, const struct bn_error *why)
{
    bn_error_set(err, why->code, why->stage, "the parent checkpoint: %s", why->text);
}

/* Its place among the sources: two parents may share a pack. */
static int64_t add_source(struct bn_pack_writer *w, const struct bn_pack_parent *parent,
                          const struct bn_image_pack *pack, uint32_t first_of_parent, struct bn_error *err)
{
    bn_auto_fd fd = bn_pack_file_open(parent->dirfd, pack, err);
    struct stat st;
    if (fd < 0)
        return fd;
    if (fstat(fd, &st) < 0)
        return bn_error_set(err, errno, "store", "cannot look at " BN_PACK_NAME ": %s", pack->index,
                            strerror(errno));
    for (uint32_t i = 0; i < first_of_parent; i++)
        if (w->sources[i].dev == st.st_dev && w->sources[i].ino == st.st_ino)
            return i;
    struct bn_pack_source *more = realloc(w->sources, (w->n_sources + 1) * sizeof(*more));
    if (!more)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    w->sources = more;
    more[w->n_sources] = (struct bn_pack_source){
        .fd = BN_TAKE_FD(fd), .length = pack->length, .dev = st.st_dev, .ino = st.st_ino, .pack = BN_NO_PACK};
    return w->n_sources++;
}

static int add_parent(struct bn_pack_writer *w, const struct bn_pack_parent *parent, struct bn_error *err)
{
    const struct bn_manifest *m = parent->m;
    if (memcmp(m->key, bn_hash_key_bytes(w->key), BN_HASH_KEY_SIZE))
        return bn_error_set(err, EINVAL, "store", "its chunks are hashed with another key");
    bn_auto_free uint32_t *source_of =
        calloc(m->n_packs ? m->n_packs : 1, sizeof(*source_of)); /* as m->packs */
    if (!source_of)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    uint32_t before = w->n_sources;
    for (uint32_t i = 0; i < m->n_packs; i++) {
        int64_t source = add_source(w, parent, &m->packs[i], before, err);
        if (source < 0)
            return (int)source;
        source_of[i] = (uint32_t)source;
    }
    for (uint32_t i = 0; i < m->n_chunks; i++) {
        const struct bn_image_chunk *c = &m->chunks[i];
        if (c->flags & BN_CHUNK_ZERO || bn_pack_table_find(&w->table, &c->hash))
            continue;
        const struct bn_image_pack *pack = bn_manifest_find_pack(m, c->pack);
        if (!pack)
            return bn_error_set(err, EINVAL, "store", "chunk %u has no place", i);
        struct bn_pack_record *rec = bn_pack_table_add(&w->table, &c->hash);
        if (!rec)
            return bn_error_set(err, ENOMEM, "store", "out of memory");
        rec->source = source_of[pack - m->packs];
        rec->offset = c->offset;
        rec->length = c->length;
        rec->encoding = c->encoding;
    }
    return 0;
}

int bn_pack_sources_open(struct bn_pack_writer *w, const struct bn_pack_parent *parents, size_t n,
                         struct bn_error *err)
{
    int r = 0;
    struct bn_error why = BN_ERROR_INIT;
    for (size_t i = 0; r == 0 && i < n; i++)
        r = add_parent(w, &parents[i], &why);
    if (r < 0)
        text_of_parent(err, &why);
    return r;
}

/* ---- bring ---- */

static bool waits(const struct bn_pack_record *rec)
{
    return rec->used && rec->pack == BN_NO_PACK && rec->source != BN_NO_SOURCE;
}

static int more_used_first(const void *a, const void *b)
{
    const struct bn_pack_source *x = *(struct bn_pack_source *const *)a,
                                *y = *(struct bn_pack_source *const *)b;
    return x->used < y->used ? 1 : x->used > y->used ? -1 : 0;
}

static int link_sources(struct bn_pack_writer *w, struct bn_error *err)
{
    bn_auto_free struct bn_pack_source **order = calloc(w->n_sources, sizeof(struct bn_pack_source *));
    if (!order)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    uint32_t n = 0;
    for (uint32_t i = 0; i < w->n_sources; i++)
        if (w->sources[i].used && w->sources[i].pack == BN_NO_PACK &&
            w->sources[i].used >= w->sources[i].length / 2)
            order[n++] = &w->sources[i];
    qsort(order, n, sizeof(struct bn_pack_source *), more_used_first);
    for (uint32_t i = 0; i < n && i < LINKS_MAX; i++) {
        int64_t pack = bn_pack_next(w, order[i]->fd, order[i]->length, err);
        if (pack < 0 && pack != -EXDEV)
            return (int)pack;
        if (pack < 0) /* this one is copied */
            continue;
        order[i]->pack = (uint32_t)pack;
        w->stats.linked_bytes += order[i]->used;
    }
    return 0;
}

struct copy {
    struct bn_pack_writer *w;
    uint32_t *records; /* in the order in which they lie */
    uint32_t n, share;
};

static int compare_places(const void *a, const void *b, void *arg)
{
    const struct bn_pack_record *records = arg, *x = &records[*(const uint32_t *)a],
                                *y = &records[*(const uint32_t *)b];
    if (x->source != y->source)
        return x->source < y->source ? -1 : 1;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static int copy_record(struct bn_pack_writer *w, struct bn_pack_record *rec, struct bn_error *err)
{
    uint64_t room = (rec->length + BN_PACK_ALIGN - 1) / BN_PACK_ALIGN * BN_PACK_ALIGN;
    struct bn_pack_lane *l = bn_pack_lane_take(w, rec->source, room, err);
    if (!l)
        return -w->failure.code;
    int r = bn_pack_file_copy(w->sources[rec->source].fd, rec->offset, l->fd, l->length, rec->length);
    if (r == 0 && room > rec->length && ftruncate(l->fd, (off_t)(l->length + room)) < 0)
        r = -errno;
    if (r < 0) {
        uint32_t pack = l->pack;
        bn_pack_lane_done(w, l, 0);
        return bn_pack_fail(w, err, r,
                            r == -ENODATA ? "read a pack of the parent, which became shorter, for" : "write",
                            pack);
    }
    pthread_mutex_lock(&w->lock);
    rec->offset = l->length;
    rec->pack = l->pack;
    w->stats.copied_bytes += rec->length;
    pthread_mutex_unlock(&w->lock);
    bn_pack_lane_done(w, l, room);
    return 0;
}

static int copy_share(void *ctx, size_t index, struct bn_error *err)
{
    struct copy *c = ctx;
    uint32_t first = (uint32_t)index * c->share, end = c->n - first < c->share ? c->n : first + c->share;
    int r = 0;
    for (uint32_t i = first; r == 0 && i < end; i++)
        r = copy_record(c->w, &c->w->table.records[c->records[i]], err);
    return r;
}

static int copy_sources(struct bn_pack_writer *w, struct bn_error *err)
{
    bn_auto_free uint32_t *records = calloc(w->table.n ? w->table.n : 1, sizeof(*records));
    if (!records)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    struct copy c = {.w = w, .records = records};
    for (uint32_t i = 0; i < w->table.n; i++)
        if (waits(&w->table.records[i]))
            records[c.n++] = i;
    if (c.n == 0)
        return 0;
    qsort_r(records, c.n, sizeof(*records), compare_places, w->table.records);
    uint32_t threads = (c.n + COPY_SHARE - 1) / COPY_SHARE;
    threads = threads > w->n_lanes ? w->n_lanes : threads;
    c.share = (c.n + threads - 1) / threads;
    return bn_parallel((c.n + c.share - 1) / c.share, copy_share, &c, err);
}

int bn_pack_sources_bring(struct bn_pack_writer *w, struct bn_error *err)
{
    if (w->n_sources == 0)
        return 0;
    for (uint32_t i = 0; i < w->n_sources; i++)
        w->sources[i].used = 0;
    for (uint32_t i = 0; i < w->table.n; i++)
        if (waits(&w->table.records[i]))
            w->sources[w->table.records[i].source].used += w->table.records[i].length;
    int r = link_sources(w, err);
    for (uint32_t i = 0; i < w->table.n; i++) {
        struct bn_pack_record *rec = &w->table.records[i];
        if (waits(rec))
            rec->pack = w->sources[rec->source].pack;
    }
    return r < 0 ? r : copy_sources(w, err);
}

void bn_pack_sources_close(struct bn_pack_writer *w)
{
    for (uint32_t i = 0; i < w->n_sources; i++)
        bn_close(w->sources[i].fd);
    free(w->sources);
    w->sources = NULL;
    w->n_sources = 0;
}
