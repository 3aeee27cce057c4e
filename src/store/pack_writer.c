#include "store/pack_writer.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "store/encoding.h"
#include "store/image_dir.h"
#include "store/pack_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

int bn_pack_fail(struct bn_pack_writer *w, struct bn_error *err, int code, const char *what, uint32_t pack)
{
    pthread_mutex_lock(&w->lock);
    if (!bn_error_is_set(&w->failure)) {
        if (pack == BN_NO_PACK)
            bn_error_set(&w->failure, code, "store", "%s: %s", what, strerror(abs(code)));
        else if (abs(code) == EEXIST)
            bn_error_set(&w->failure, code, "store",
                         "the folder already holds " BN_PACK_NAME
                         " of another checkpoint: choose an empty folder",
                         pack);
        else
            bn_error_set(&w->failure, code, "store", "cannot %s " BN_PACK_NAME ": %s%s", what, pack,
                         strerror(abs(code)),
                         abs(code) == ENOSPC || abs(code) == EDQUOT
                             ? ": make room or choose a folder on another file system"
                             : "");
    }
    struct bn_error first = w->failure;
    pthread_mutex_unlock(&w->lock);
    return bn_error_set(err, first.code, first.stage, "%s", first.text);
}

/* ---- packs ---- */

int64_t bn_pack_next(struct bn_pack_writer *w, int link, uint64_t length, struct bn_error *err)
{
    pthread_mutex_lock(&w->lock);
    uint32_t index = w->n_packs;
    struct bn_pack_own *more =
        index < BN_MANIFEST_PACKS_MAX ? realloc(w->packs, (index + 1) * sizeof(*more)) : NULL;
    if (more) {
        more[index] = (struct bn_pack_own){.fd = -1, .length = length};
        w->packs = more;
        w->n_packs++;
    }
    pthread_mutex_unlock(&w->lock);
    if (!more)
        return bn_pack_fail(w, err, ENOMEM, "no memory for another pack", BN_NO_PACK);

    int fd;
    if (link < 0)
        fd = bn_pack_file_create(w->dirfd, index);
    else if ((fd = bn_pack_file_link(link, w->dirfd, index)) == 0 &&
             (fd = fcntl(link, F_DUPFD_CLOEXEC, 3)) < 0) {
        fd = -errno;
        bn_pack_file_unlink(w->dirfd, index);
    }
    if (link >= 0 && fd < 0 && bn_pack_cannot_link(fd)) {
        pthread_mutex_lock(&w->lock);
        w->n_packs -= w->n_packs == index + 1; /* give the number back */
        pthread_mutex_unlock(&w->lock);
        return -EXDEV;
    }
    if (fd < 0)
        return bn_pack_fail(w, err, fd, link < 0 ? "create" : "link", index);
    pthread_mutex_lock(&w->lock);
    w->packs[index].fd = fd;
    pthread_mutex_unlock(&w->lock);
    return index;
}

/* A lane nobody writes into, the first of them, so that few threads make few packs; else wait for one. */
static struct bn_pack_lane *lock_lane(struct bn_pack_writer *w, uint32_t hint)
{
    for (unsigned i = 0; i < w->n_lanes; i++)
        if (pthread_mutex_trylock(&w->lanes[i].lock) == 0)
            return &w->lanes[i];
    struct bn_pack_lane *l = &w->lanes[hint % w->n_lanes];
    pthread_mutex_lock(&l->lock);
    return l;
}

/* The file was made longer than what it holds, for the writes to come. */
static int settle(struct bn_pack_writer *w, struct bn_pack_lane *l, struct bn_error *err)
{
    int r = l->file.fd < 0 ? 0 : bn_disk_trim(&l->file, l->length);
    bn_disk_file_close(&l->file);
    return r < 0 ? bn_pack_fail(w, err, r, "write", l->pack) : 0;
}

int bn_pack_lanes_settle(struct bn_pack_writer *w, struct bn_error *err)
{
    int r = 0;
    for (unsigned i = 0; i < w->n_lanes && r == 0; i++)
        r = settle(w, &w->lanes[i], err);
    return r;
}

/* What an idle lane has for writes to come may be all that another lacks. One that is being written into does so when it is done. */
static void give_back(struct bn_pack_lane *l)
{
    if (pthread_mutex_trylock(&l->lock) != 0)
        return;
    if (l->file.fd >= 0 && l->file.reserved > l->length)
        (void)!bn_disk_trim(&l->file, l->length); /* settle() tries again, and tells */
    pthread_mutex_unlock(&l->lock);
}

static void reserve(struct bn_pack_writer *w, struct bn_pack_lane *l, uint64_t end)
{
    bool plenty = bn_disk_reserve(&l->file, end),
         was = __atomic_exchange_n(&w->tight, !plenty, __ATOMIC_SEQ_CST);
    if (plenty || was)
        return;
    for (unsigned i = 0; i < w->n_lanes; i++)
        if (&w->lanes[i] != l)
            give_back(&w->lanes[i]);
    bn_disk_reserve(&l->file, end);
}

struct bn_pack_lane *bn_pack_lane_take(struct bn_pack_writer *w, uint32_t hint, uint64_t bytes,
                                       struct bn_error *err)
{
    struct bn_pack_lane *l = lock_lane(w, hint);
    if (l->pack != BN_NO_PACK && l->length + bytes <= w->pack_bytes)
        return l;
    int64_t pack = settle(w, l, err);
    if (pack == 0)
        pack = bn_pack_next(w, -1, 0, err);
    if (pack < 0) {
        pthread_mutex_unlock(&l->lock);
        return NULL;
    }
    l->pack = (uint32_t)pack;
    l->length = 0;
    pthread_mutex_lock(&w->lock);
    l->fd = w->packs[l->pack].fd;
    pthread_mutex_unlock(&w->lock);
    return l;
}

void bn_pack_lane_done(struct bn_pack_writer *w, struct bn_pack_lane *l, uint64_t bytes)
{
    if (bytes) {
        l->length += bytes;
        pthread_mutex_lock(&w->lock);
        w->packs[l->pack].length = l->length;
        pthread_mutex_unlock(&w->lock);
    }
    pthread_mutex_unlock(&l->lock);
    if (__atomic_load_n(&w->tight,
                        __ATOMIC_SEQ_CST)) /* not before: it may become so while this one cannot be had */
        give_back(l);
}

static int pwritev_full(int fd, struct iovec *iov, int n, uint64_t off)
{
    while (n > 0) {
        ssize_t done = pwritev(fd, iov, n, (off_t)off);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return -errno;
        if (done == 0)
            return -EIO;
        off += (uint64_t)done;
        while (n > 0 && (size_t)done >= iov->iov_len) {
            done -= (ssize_t)iov->iov_len;
            iov++;
            n--;
        }
        if (n > 0) {
            iov->iov_base = (char *)iov->iov_base + done;
            iov->iov_len -= (size_t)done;
        }
    }
    return 0;
}

static int write_around_cache(struct bn_pack_writer *w, struct bn_pack_lane *l, const struct iovec *iov,
                              unsigned n, bool raw)
{
    struct bn_disk_piece pieces[BN_PACK_BATCH];
    uint64_t end = l->length;
    if (l->file.fd < 0)
        bn_disk_file_open(w->disk, l->fd, true, &l->file);
    for (unsigned i = 0; i < n; i++) {
        pieces[i] = (struct bn_disk_piece){&l->file, end, iov[i].iov_base, iov[i].iov_len, w->stable && raw};
        end += iov[i].iov_len;
    }
    reserve(w, l, end);
    return bn_disk_write(w->disk, pieces, n);
}

static uint64_t padded(uint64_t bytes)
{
    return (bytes + BN_PACK_ALIGN - 1) / BN_PACK_ALIGN * BN_PACK_ALIGN;
}

/* A chunk in the form in which it is stored. */
struct stored {
    uint32_t length;
    uint8_t encoding;
};

/* Compress what is worth it, in the lane's own memory, each filled up with zeros to BN_PACK_ALIGN. Returns the bytes of all. */
static int64_t encode_chunks(const struct bn_pack_writer *w, struct bn_pack_lane *l, struct iovec *iov,
                             struct stored *stored, unsigned n)
{
    uint64_t sum = 0;
    if (w->compress && !l->encoder) {
        if (!l->encoded)
            l->encoded = aligned_alloc(BN_PACK_ALIGN, BN_PACK_BATCH * BN_ENCODED_MAX);
        l->encoder = l->encoded ? bn_encoder_new(w->compress) : NULL;
        if (!l->encoder)
            return -ENOMEM;
    }
    for (unsigned i = 0; i < n; i++) {
        stored[i] = (struct stored){BN_CHUNK_SIZE, BN_ENCODING_RAW};
        uint8_t *out = w->compress ? l->encoded + i * BN_ENCODED_MAX : NULL;
        size_t length = out ? bn_encode(l->encoder, iov[i].iov_base, out) : 0;
        if (length) {
            memset(out + length, 0, padded(length) - length);
            stored[i] = (struct stored){(uint32_t)length, BN_ENCODING_ZSTD};
            iov[i] = (struct iovec){out, padded(length)};
        }
        sum += iov[i].iov_len;
    }
    return (int64_t)sum;
}

/* Write `n` chunks behind each other into one pack and note where they are. */
static int write_chunks(struct bn_pack_writer *w, const void *const *data, const uint32_t *records,
                        unsigned n, struct bn_error *err)
{
    struct bn_pack_lane *l = bn_pack_lane_take(w, records[0], n * BN_CHUNK_SIZE, err);
    if (!l)
        return -w->failure.code;
    struct iovec iov[BN_PACK_BATCH];
    struct stored stored[BN_PACK_BATCH];
    for (unsigned i = 0; i < n; i++)
        iov[i] = (struct iovec){(void *)data[i], BN_CHUNK_SIZE};
    int64_t sum = encode_chunks(w, l, iov, stored, n);
    int r = sum < 0   ? (int)sum
            : w->disk ? write_around_cache(w, l, iov, n, sum == (int64_t)(n * BN_CHUNK_SIZE))
                      : pwritev_full(l->fd, iov, (int)n, l->length);
    if (r < 0) {
        r = bn_pack_fail(w, err, r, "write", l->pack);
        bn_pack_lane_done(w, l, 0);
        return r;
    }
    uint64_t at = l->length;
    pthread_mutex_lock(&w->lock);
    for (unsigned i = 0; i < n; i++) {
        struct bn_pack_record *rec = &w->table.records[records[i]];
        rec->offset = at;
        rec->length = stored[i].length;
        rec->encoding = stored[i].encoding;
        rec->pack = l->pack;
        at += padded(stored[i].length);
    }
    w->stats.stored_bytes += (uint64_t)sum;
    pthread_mutex_unlock(&w->lock);
    bn_pack_lane_done(w, l, (uint64_t)sum);
    return 0;
}

/* ---- the calls ---- */

static int open_writer(struct bn_pack_writer *w, int dirfd, const uint8_t key[BN_HASH_KEY_SIZE],
                       const struct bn_pack_options *o, struct bn_error *err)
{
    w->dirfd = fcntl(dirfd, F_DUPFD_CLOEXEC, 3);
    if (w->dirfd < 0)
        return bn_error_set(err, errno, "store", "cannot use the image folder: %s", strerror(errno));
    struct bn_error unlocked = BN_ERROR_INIT;
    w->lock_fd = bn_image_lock(w->dirfd, false, &unlocked);
    if (w->lock_fd == -EBUSY) /* it goes without locks, too */
        return bn_error_set(err, EBUSY, unlocked.stage, "%s", unlocked.text);
    w->key = bn_hash_key_new(key);
    w->chunks = calloc(w->n_chunks ? w->n_chunks : 1, sizeof(*w->chunks));
    bn_auto_free void *zero = aligned_alloc(BN_PACK_ALIGN, BN_CHUNK_SIZE);
    if (!w->key || !w->chunks || !zero)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    bn_hash_chunk(w->key, memset(zero, 0, BN_CHUNK_SIZE), BN_CHUNK_SIZE, &w->zero);
    return bn_pack_sources_open(w, o->parents, o->nparents, err);
}

int bn_pack_writer_open(int dirfd, const uint8_t key[BN_HASH_KEY_SIZE], uint32_t n_chunks,
                        const struct bn_pack_options *options, struct bn_pack_writer **out,
                        struct bn_error *err)
{
    struct bn_pack_options o = options ? *options : (struct bn_pack_options){0};
    if (n_chunks > BN_MANIFEST_CHUNKS_MAX || o.lanes > BN_PACK_LANES)
        return bn_error_set(err, EINVAL, "store", "%u chunks, %u lanes: more than a checkpoint can have",
                            n_chunks, o.lanes);
    struct bn_pack_writer *w = calloc(1, sizeof(*w));
    if (!w)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    uint64_t batch = BN_PACK_BATCH * BN_CHUNK_SIZE;
    w->flags = o.flags;
    w->n_lanes = o.lanes ? o.lanes : BN_PACK_LANES;
    w->pack_bytes = o.pack_bytes ? o.pack_bytes : BN_PACK_BYTES;
    w->pack_bytes = w->pack_bytes < batch ? batch : w->pack_bytes;
    w->n_chunks = n_chunks;
    w->dirfd = w->lock_fd = -1;
    pthread_mutex_init(&w->lock, NULL);
    for (unsigned i = 0; i < BN_PACK_LANES; i++) {
        pthread_mutex_init(&w->lanes[i].lock, NULL);
        w->lanes[i].pack = BN_NO_PACK;
        w->lanes[i].fd = -1;
        w->lanes[i].file = BN_DISK_FILE_NONE;
    }
    int r = open_writer(w, dirfd, key, &o, err);
    if (r < 0) {
        bn_pack_writer_abort(w);
        return r;
    }
    *out = w;
    return 0;
}

int bn_pack_writer_direct(struct bn_pack_writer *w, unsigned disk_flags, bool stable, struct bn_error *err)
{
    struct bn_disk *d = bn_disk_new(disk_flags);
    if (!d)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    bn_disk_free(w->disk);
    w->disk = d;
    w->stable = stable;
    return 0;
}

static void count(struct bn_pack_writer *w, const struct bn_pack_record *rec, bool fresh)
{
    w->stats.chunks++;
    w->stats.zero_chunks += !rec;
    w->stats.same_chunks += rec && !fresh && rec->source == BN_NO_SOURCE;
    w->stats.parent_chunks += rec && rec->source != BN_NO_SOURCE;
}

/* Note where a chunk of these bytes (NULL: zero) is or will be. *fresh: the caller has to write them, as *record. */
static int place(struct bn_pack_writer *w, uint32_t chunk, const struct bn_hash *h, uint32_t *record,
                 bool *fresh)
{
    int r = 0;
    *fresh = false;
    pthread_mutex_lock(&w->lock);
    struct bn_pack_record *rec = h ? bn_pack_table_find(&w->table, h) : NULL;
    if (bn_error_is_set(&w->failure))
        r = -w->failure.code;
    else if (h && !rec) {
        rec = bn_pack_table_add(&w->table, h);
        *fresh = true;
        r = rec ? 0 : -ENOMEM;
    }
    if (r == 0) {
        *record = rec ? (uint32_t)(rec - w->table.records) : 0;
        w->chunks[chunk] = rec ? *record + 1 : BN_CHUNK_IS_ZERO;
        count(w, rec, *fresh);
    }
    pthread_mutex_unlock(&w->lock);
    return r;
}

int bn_pack_writer_place(struct bn_pack_writer *w, uint32_t chunk, const struct bn_hash *h)
{
    if (chunk >= w->n_chunks || w->finished)
        return -EINVAL;
    int known = 0;
    pthread_mutex_lock(&w->lock);
    bool zero = bn_hash_equal(h, &w->zero);
    const struct bn_pack_record *rec = zero ? NULL : bn_pack_table_find(&w->table, h);
    if (bn_error_is_set(&w->failure))
        known = -w->failure.code;
    else if (zero || rec) {
        w->chunks[chunk] = rec ? (uint32_t)(rec - w->table.records) + 1 : BN_CHUNK_IS_ZERO;
        count(w, rec, false);
        known = 1;
    }
    pthread_mutex_unlock(&w->lock);
    return known;
}

int bn_pack_writer_add_batch(struct bn_pack_writer *w, const struct bn_pack_item *items, size_t n,
                             struct bn_error *err)
{
    const void *data[BN_PACK_BATCH];
    uint32_t records[BN_PACK_BATCH];
    unsigned todo = 0;
    if (n > BN_PACK_BATCH || w->finished)
        return bn_error_set(err, EINVAL, "store", "%zu chunks in one batch, or after the end", n);
    for (size_t i = 0; i < n; i++)
        if (items[i].chunk >= w->n_chunks)
            return bn_error_set(err, EINVAL, "store", "chunk %u of %u", items[i].chunk, w->n_chunks);
    for (size_t i = 0; i < n; i++) {
        const struct bn_pack_item *it = &items[i];
        struct bn_hash h;
        bool zero = !it->data || bn_is_zero(it->data, BN_CHUNK_SIZE), fresh = false;
        if (!zero)
            bn_hash_chunk(w->key, it->data, BN_CHUNK_SIZE, &h);
        int r = place(w, it->chunk, zero ? NULL : &h, &records[todo], &fresh);
        if (r < 0)
            return bn_pack_fail(w, err, r, "no memory for the chunk table", BN_NO_PACK);
        if (fresh)
            data[todo++] = it->data;
    }
    return todo ? write_chunks(w, data, records, todo, err) : 0;
}

int bn_pack_writer_add(struct bn_pack_writer *w, uint32_t chunk, const void *data, struct bn_error *err)
{
    return bn_pack_writer_add_batch(w, &(struct bn_pack_item){chunk, data}, 1, err);
}

int bn_pack_writer_add_run(struct bn_pack_writer *w, uint32_t first, unsigned n, const void *data,
                           struct bn_error *err)
{
    struct bn_pack_item items[BN_PACK_BATCH];
    for (unsigned at = 0, count; at < n; at += count) {
        count = n - at < BN_PACK_BATCH ? n - at : BN_PACK_BATCH;
        for (unsigned i = 0; i < count; i++)
            items[i] = (struct bn_pack_item){.chunk = first + at + i,
                                             .data = (const uint8_t *)data + (at + i) * BN_CHUNK_SIZE};
        int r = bn_pack_writer_add_batch(w, items, count, err);
        if (r < 0)
            return r;
    }
    return 0;
}

void bn_pack_writer_stats(const struct bn_pack_writer *w, struct bn_pack_stats *out)
{
    struct bn_pack_writer *mutable = (struct bn_pack_writer *)w; /* the lock is all that changes */
    pthread_mutex_lock(&mutable->lock);
    *out = w->stats;
    pthread_mutex_unlock(&mutable->lock);
}

int bn_pack_writer_compress(struct bn_pack_writer *w, unsigned level, struct bn_error *err)
{
    if (level > BN_COMPRESS_MAX)
        return bn_error_set(err, EINVAL, "store", "compression has levels from 1 to %u, not %u",
                            BN_COMPRESS_MAX, level);
    w->compress = level;
    for (unsigned i = 0; i < w->n_lanes; i++) {
        bn_encoder_free(w->lanes[i].encoder); /* they are made anew, of that level */
        w->lanes[i].encoder = NULL;
    }
    return 0;
}

int bn_pack_writer_relayout(struct bn_pack_writer *w, uint32_t n_chunks, struct bn_error *err)
{
    if (w->finished || n_chunks > BN_MANIFEST_CHUNKS_MAX)
        return bn_error_set(err, EINVAL, "store", "a new order of %u chunks: too many, or after the end",
                            n_chunks);
    uint32_t *chunks = calloc(n_chunks ? n_chunks : 1, sizeof(*chunks));
    if (!chunks)
        return bn_error_set(err, ENOMEM, "store", "out of memory for a table of %u chunks", n_chunks);
    pthread_mutex_lock(&w->lock);
    free(w->chunks);
    w->chunks = chunks;
    w->n_chunks = n_chunks;
    w->stats.chunks = w->stats.zero_chunks = w->stats.same_chunks = w->stats.parent_chunks = 0;
    pthread_mutex_unlock(&w->lock);
    return 0;
}

/* ---- the end ---- */

static int sync_packs(struct bn_pack_writer *w, struct bn_error *err)
{
    for (uint32_t i = 0; i < w->n_packs; i++) /* let the disk have all of them before waiting for the first */
        if (w->packs[i].fd >= 0)
            sync_file_range(w->packs[i].fd, 0, 0, SYNC_FILE_RANGE_WRITE);
    for (uint32_t i = 0; i < w->n_packs; i++)
        if (w->packs[i].fd >= 0 && fsync(w->packs[i].fd) < 0)
            return bn_pack_fail(w, err, errno, "write", i);
    if (fsync(w->dirfd) < 0 && errno != EINVAL)
        return bn_pack_fail(w, err, errno, "cannot write the image folder", BN_NO_PACK);
    return 0;
}

/* Which records this image needs: packs may hold more (chunks that were added twice, those of a pre-dump). */
static int mark_used(struct bn_pack_writer *w, struct bn_error *err)
{
    for (uint32_t i = 0; i < w->table.n; i++)
        w->table.records[i].used = false;
    for (uint32_t i = 0; i < w->n_chunks; i++) {
        if (w->chunks[i] == 0)
            return bn_error_set(err, EINVAL, "store", "chunk %u was never written", i);
        if (w->chunks[i] == BN_CHUNK_IS_ZERO)
            continue;
        struct bn_pack_record *rec = &w->table.records[w->chunks[i] - 1];
        if (rec->pack == BN_NO_PACK && rec->source == BN_NO_SOURCE)
            return bn_error_set(err, EINVAL, "store", "chunk %u is still being written", i);
        rec->used = true;
    }
    return 0;
}

static void fill_chunks(struct bn_pack_writer *w, struct bn_image_chunk *chunks)
{
    for (uint32_t i = 0; i < w->n_chunks; i++) {
        if (w->chunks[i] == BN_CHUNK_IS_ZERO) {
            chunks[i] = (struct bn_image_chunk){.hash = w->zero, .flags = BN_CHUNK_ZERO};
            continue;
        }
        const struct bn_pack_record *rec = &w->table.records[w->chunks[i] - 1];
        chunks[i] = (struct bn_image_chunk){.hash = rec->hash,
                                            .pack = rec->pack,
                                            .offset = rec->offset,
                                            .length = rec->length,
                                            .encoding = rec->encoding};
        w->packs[rec->pack].used = true;
    }
}

/* The packs that are used, in the order of their numbers; the others are removed. Returns how many. */
static uint32_t keep_packs(struct bn_pack_writer *w, struct bn_image_pack *packs)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < w->n_packs; i++) {
        struct bn_pack_own *p = &w->packs[i];
        if (p->used)
            packs[n++] = (struct bn_image_pack){i, p->length};
        else if (p->fd >= 0) {
            bn_pack_file_unlink(w->dirfd, i);
            p->fd = bn_close(p->fd);
        }
    }
    return n;
}

int bn_pack_writer_finish(struct bn_pack_writer *w, struct bn_manifest *m, struct bn_error *err)
{
    if (bn_error_is_set(&w->failure))
        return bn_pack_fail(w, err, w->failure.code, "", BN_NO_PACK);
    if (w->finished || m->n_chunks != w->n_chunks ||
        memcmp(m->key, bn_hash_key_bytes(w->key), BN_HASH_KEY_SIZE))
        return bn_error_set(err, EINVAL, "store", "the packs were not written for this manifest");
    int r = mark_used(w, err);
    if (r == 0)
        r = bn_pack_lanes_settle(w, err);
    if (r == 0)
        r = bn_pack_sources_bring(w, err);
    if (r < 0)
        return r;
    bn_auto_free struct bn_image_chunk *chunks = calloc(w->n_chunks ? w->n_chunks : 1, sizeof(*chunks));
    bn_auto_free struct bn_image_pack *packs = calloc(w->n_packs ? w->n_packs : 1, sizeof(*packs));
    if (!chunks || !packs)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    fill_chunks(w, chunks);
    uint32_t n = keep_packs(w, packs);
    if (!(w->flags & BN_PACK_NOSYNC))
        r = sync_packs(w, err);
    if (r < 0)
        return r;
    m->incompat &= ~BN_MANIFEST_INCOMPAT_ZSTD;
    for (uint32_t i = 0; i < w->n_chunks; i++)
        if (chunks[i].encoding == BN_ENCODING_ZSTD) /* of ours or of a parent */
            m->incompat |= BN_MANIFEST_INCOMPAT_ZSTD;
    free(m->chunks);
    free(m->packs);
    m->chunks = BN_TAKE_PTR(chunks);
    m->packs = BN_TAKE_PTR(packs);
    m->n_packs = n;
    w->finished = true;
    return 0;
}

static void destroy(struct bn_pack_writer *w, bool remove)
{
    if (!w)
        return;
    for (uint32_t i = 0; i < w->n_packs; i++) {
        if (w->packs[i].fd < 0)
            continue;
        bn_close(w->packs[i].fd);
        if (remove)
            bn_pack_file_unlink(w->dirfd, i);
    }
    for (unsigned i = 0; i < BN_PACK_LANES; i++) {
        bn_disk_file_close(&w->lanes[i].file);
        bn_encoder_free(w->lanes[i].encoder);
        free(w->lanes[i].encoded);
        pthread_mutex_destroy(&w->lanes[i].lock);
    }
    pthread_mutex_destroy(&w->lock);
    bn_disk_free(w->disk);
    bn_pack_sources_close(w);
    bn_close(w->dirfd);
    bn_close(w->lock_fd);
    bn_hash_key_free(w->key);
    free(w->chunks);
    bn_pack_table_free(&w->table);
    free(w->packs);
    free(w);
}

void bn_pack_writer_abort(struct bn_pack_writer *w)
{
    destroy(w, true);
}

void bn_pack_writer_close(struct bn_pack_writer *w)
{
    destroy(w, w && !w->finished);
}
