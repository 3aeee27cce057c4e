#include "store/pack.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#define NONE UINT32_MAX

/* One place in a pack; equal chunks share it. Records are never changed once `offset` is set, and only appended. */
struct record {
    struct bn_hash hash;
    uint32_t pack; /* NONE: not written yet */
    uint64_t offset;
};

/* A pack that is being written. Its lock is held for the whole of a write: the kernel would serialise writes to one file
 * anyway, and so the pack has no holes. */
struct lane {
    pthread_mutex_t lock;
    int fd;
    uint32_t pack; /* NONE: none open */
    uint64_t length;
};

struct pack_file {
    int fd; /* kept open for the fsync at the end */
    uint64_t length;
};

struct bn_pack_writer {
    int dirfd;
    unsigned flags, n_lanes;
    uint64_t pack_bytes;
    struct bn_hash_key *key;
    struct bn_hash zero; /* of a zero chunk */
    bool finished;

    struct lane lanes[BN_PACK_LANES];

    pthread_mutex_t lock; /* everything below */
    struct bn_error failure;
    uint32_t n_chunks;
    uint32_t *chunks; /* chunk -> 1 + record, CHUNK_ZERO, or 0 = not added */
    struct record *records;
    uint32_t n_records, cap_records;
    uint32_t *table; /* hash -> 1 + record, open addressing; a power of two, at most half full */
    uint32_t table_size;
    struct pack_file *packs;
    uint32_t n_packs;
    struct bn_pack_stats stats;
};
#define CHUNK_ZERO NONE

static int fail(struct bn_pack_writer *w, struct bn_error *err, int code, const char *what, uint32_t pack)
{
    pthread_mutex_lock(&w->lock);
    if (!bn_error_is_set(&w->failure)) {
        if (pack == NONE)
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

/* ---- which chunks are where ---- */

static uint32_t slot_of(const struct bn_hash *h)
{
    uint32_t v;
    memcpy(&v, h->b, sizeof(v));
    return v;
}

static void table_insert(struct bn_pack_writer *w, uint32_t record)
{
    uint32_t mask = w->table_size - 1, at = slot_of(&w->records[record].hash) & mask;
    while (w->table[at])
        at = (at + 1) & mask;
    w->table[at] = record + 1;
}

static int grow(struct bn_pack_writer *w)
{
    if (w->n_records < w->cap_records)
        return 0;
    if (w->cap_records >= 1u << 30)
        return -E2BIG;
    uint32_t cap = w->cap_records ? w->cap_records * 2 : 256;
    struct record *records = realloc(w->records, cap * sizeof(*records));
    if (!records)
        return -ENOMEM;
    w->records = records;
    uint32_t *table = calloc((size_t)cap * 2, sizeof(*table));
    if (!table)
        return -ENOMEM;
    free(w->table);
    w->table = table;
    w->table_size = cap * 2;
    w->cap_records = cap;
    for (uint32_t i = 0; i < w->n_records; i++)
        table_insert(w, i);
    return 0;
}

/* The record of these bytes; *fresh when the caller has to write them. */
static int find_record(struct bn_pack_writer *w, const struct bn_hash *h, uint32_t *record, bool *fresh)
{
    uint32_t mask = w->table_size - 1;
    for (uint32_t at = slot_of(h) & mask; w->table_size && w->table[at]; at = (at + 1) & mask)
        if (bn_hash_equal(&w->records[w->table[at] - 1].hash, h)) {
            *record = w->table[at] - 1;
            *fresh = false;
            return 0;
        }
    int r = grow(w);
    if (r < 0)
        return r;
    *record = w->n_records++;
    w->records[*record] = (struct record){.hash = *h, .pack = NONE};
    table_insert(w, *record);
    *fresh = true;
    return 0;
}

/* ---- packs ---- */

/* The next pack, for this lane; the lane's lock is held. */
static int open_pack(struct bn_pack_writer *w, struct lane *l, struct bn_error *err)
{
    pthread_mutex_lock(&w->lock);
    uint32_t index = w->n_packs;
    struct pack_file *more =
        index < BN_MANIFEST_PACKS_MAX ? realloc(w->packs, (index + 1) * sizeof(*more)) : NULL;
    if (more) {
        more[index] = (struct pack_file){.fd = -1};
        w->packs = more;
        w->n_packs++;
    }
    pthread_mutex_unlock(&w->lock);
    if (!more)
        return fail(w, err, ENOMEM, "no memory for another pack", NONE);

    char name[BN_PACK_NAME_MAX];
    snprintf(name, sizeof(name), BN_PACK_NAME, index);
    int fd = openat(w->dirfd, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return fail(w, err, errno, "create", index);
    pthread_mutex_lock(&w->lock);
    w->packs[index].fd = fd;
    pthread_mutex_unlock(&w->lock);
    l->fd = fd;
    l->pack = index;
    l->length = 0;
    return 0;
}

/* A lane nobody writes into, the first of them, so that few threads make few packs; else wait for one. */
static struct lane *take_lane(struct bn_pack_writer *w, uint32_t hint)
{
    for (unsigned i = 0; i < w->n_lanes; i++)
        if (pthread_mutex_trylock(&w->lanes[i].lock) == 0)
            return &w->lanes[i];
    struct lane *l = &w->lanes[hint % w->n_lanes];
    pthread_mutex_lock(&l->lock);
    return l;
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

/* Write `n` chunks behind each other into one pack and note where they are. */
static int write_chunks(struct bn_pack_writer *w, const void *const *data, const uint32_t *records,
                        unsigned n, struct bn_error *err)
{
    struct lane *l = take_lane(w, records[0]);
    int r = 0;
    if (l->pack == NONE || l->length + n * BN_CHUNK_SIZE > w->pack_bytes)
        r = open_pack(w, l, err);
    uint64_t at = l->length;
    if (r == 0) {
        struct iovec iov[BN_PACK_BATCH];
        for (unsigned i = 0; i < n; i++)
            iov[i] = (struct iovec){(void *)data[i], BN_CHUNK_SIZE};
        r = pwritev_full(l->fd, iov, (int)n, at);
        if (r < 0)
            r = fail(w, err, r, "write", l->pack);
    }
    if (r == 0) {
        l->length += n * BN_CHUNK_SIZE;
        pthread_mutex_lock(&w->lock);
        w->packs[l->pack].length = l->length;
        for (unsigned i = 0; i < n; i++) {
            w->records[records[i]].offset = at + i * BN_CHUNK_SIZE;
            w->records[records[i]].pack = l->pack;
        }
        w->stats.stored_bytes += n * BN_CHUNK_SIZE;
        pthread_mutex_unlock(&w->lock);
    }
    pthread_mutex_unlock(&l->lock);
    return r;
}

/* ---- the calls ---- */

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
    pthread_mutex_init(&w->lock, NULL);
    for (unsigned i = 0; i < BN_PACK_LANES; i++) {
        pthread_mutex_init(&w->lanes[i].lock, NULL);
        w->lanes[i].pack = NONE;
        w->lanes[i].fd = -1;
    }
    w->dirfd = fcntl(dirfd, F_DUPFD_CLOEXEC, 3);
    int dup_errno = errno;
    w->key = bn_hash_key_new(key);
    w->chunks = calloc(n_chunks ? n_chunks : 1, sizeof(*w->chunks));
    void *zero = aligned_alloc(BN_PACK_ALIGN, BN_CHUNK_SIZE);
    int r = 0;
    if (w->dirfd < 0)
        r = bn_error_set(err, dup_errno, "store", "cannot use the image folder: %s", strerror(dup_errno));
    else if (!w->key || !w->chunks || !zero)
        r = bn_error_set(err, ENOMEM, "store", "out of memory");
    else
        bn_hash_chunk(w->key, memset(zero, 0, BN_CHUNK_SIZE), BN_CHUNK_SIZE, &w->zero);
    free(zero);
    if (r < 0) {
        bn_pack_writer_abort(w);
        return r;
    }
    *out = w;
    return 0;
}

/* Note where a chunk of these bytes is or will be. */
static int place(struct bn_pack_writer *w, uint32_t chunk, const struct bn_hash *h, uint32_t *record,
                 bool *fresh)
{
    int r = 0;
    pthread_mutex_lock(&w->lock);
    if (bn_error_is_set(&w->failure))
        r = -w->failure.code;
    else if (!h)
        *fresh = false;
    else
        r = find_record(w, h, record, fresh);
    if (r == 0) {
        w->chunks[chunk] = h ? *record + 1 : CHUNK_ZERO;
        w->stats.chunks++;
        w->stats.zero_chunks += !h;
        w->stats.same_chunks += h && !*fresh;
    }
    pthread_mutex_unlock(&w->lock);
    return r;
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
            return fail(w, err, r, "no memory for the chunk table", NONE);
        if (fresh)
            data[todo++] = it->data;
    }
    return todo ? write_chunks(w, data, records, todo, err) : 0;
}

int bn_pack_writer_add(struct bn_pack_writer *w, uint32_t chunk, const void *data, struct bn_error *err)
{
    return bn_pack_writer_add_batch(w, &(struct bn_pack_item){chunk, data}, 1, err);
}

void bn_pack_writer_stats(const struct bn_pack_writer *w, struct bn_pack_stats *out)
{
    struct bn_pack_writer *mutable = (struct bn_pack_writer *)w; /* the lock is all that changes */
    pthread_mutex_lock(&mutable->lock);
    *out = w->stats;
    pthread_mutex_unlock(&mutable->lock);
}

static int sync_packs(struct bn_pack_writer *w, struct bn_error *err)
{
    for (uint32_t i = 0; i < w->n_packs; i++) /* let the disk have all of them before waiting for the first */
        sync_file_range(w->packs[i].fd, 0, 0, SYNC_FILE_RANGE_WRITE);
    for (uint32_t i = 0; i < w->n_packs; i++)
        if (fsync(w->packs[i].fd) < 0)
            return fail(w, err, errno, "write", i);
    if (fsync(w->dirfd) < 0 && errno != EINVAL)
        return fail(w, err, errno, "cannot write the image folder", NONE);
    return 0;
}

static int fill_chunks(const struct bn_pack_writer *w, struct bn_image_chunk *chunks, struct bn_error *err)
{
    for (uint32_t i = 0; i < w->n_chunks; i++) {
        if (w->chunks[i] == 0)
            return bn_error_set(err, EINVAL, "store", "chunk %u was never written", i);
        if (w->chunks[i] == CHUNK_ZERO) {
            chunks[i] = (struct bn_image_chunk){.hash = w->zero, .flags = BN_CHUNK_ZERO};
            continue;
        }
        const struct record *rec = &w->records[w->chunks[i] - 1];
        if (rec->pack == NONE)
            return bn_error_set(err, EINVAL, "store", "chunk %u is still being written", i);
        chunks[i] = (struct bn_image_chunk){
            .hash = rec->hash, .pack = rec->pack, .offset = rec->offset, .length = BN_CHUNK_SIZE};
    }
    return 0;
}

int bn_pack_writer_finish(struct bn_pack_writer *w, struct bn_manifest *m, struct bn_error *err)
{
    if (bn_error_is_set(&w->failure))
        return fail(w, err, w->failure.code, "", NONE);
    if (w->finished || m->n_chunks != w->n_chunks ||
        memcmp(m->key, bn_hash_key_bytes(w->key), BN_HASH_KEY_SIZE))
        return bn_error_set(err, EINVAL, "store", "the packs were not written for this manifest");
    bn_auto_free struct bn_image_chunk *chunks = calloc(w->n_chunks ? w->n_chunks : 1, sizeof(*chunks));
    bn_auto_free struct bn_image_pack *packs = calloc(w->n_packs ? w->n_packs : 1, sizeof(*packs));
    if (!chunks || !packs)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    int r = fill_chunks(w, chunks, err);
    if (r == 0 && !(w->flags & BN_PACK_NOSYNC))
        r = sync_packs(w, err);
    if (r < 0)
        return r;
    for (uint32_t i = 0; i < w->n_packs; i++)
        packs[i] = (struct bn_image_pack){i, w->packs[i].length};
    free(m->chunks);
    free(m->packs);
    m->chunks = BN_TAKE_PTR(chunks);
    m->packs = BN_TAKE_PTR(packs);
    m->n_packs = w->n_packs;
    w->finished = true;
    return 0;
}

static void destroy(struct bn_pack_writer *w, bool remove)
{
    if (!w)
        return;
    for (uint32_t i = 0; i < w->n_packs; i++) {
        if (w->packs[i].fd < 0) /* could not be made: it is not ours to remove */
            continue;
        bn_close(w->packs[i].fd);
        char name[BN_PACK_NAME_MAX];
        snprintf(name, sizeof(name), BN_PACK_NAME, i);
        if (remove)
            unlinkat(w->dirfd, name, 0);
    }
    for (unsigned i = 0; i < BN_PACK_LANES; i++)
        pthread_mutex_destroy(&w->lanes[i].lock);
    pthread_mutex_destroy(&w->lock);
    bn_close(w->dirfd);
    bn_hash_key_free(w->key);
    free(w->chunks);
    free(w->records);
    free(w->table);
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
