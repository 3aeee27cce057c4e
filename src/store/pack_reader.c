#include "store/pack.h"

#include "base/cleanup.h"
#include "store/disk.h"
#include "store/encoding.h"
#include "store/pack_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct bn_pack_reader {
    const struct bn_manifest *m;
    struct bn_hash_key *key;
    struct bn_disk *disk;
    struct bn_disk_file *files; /* as m->packs; we own their descriptors */
};

/* ---- what to say about a chunk ---- */

struct story {
    char text[160];
};

static struct story whose(const struct bn_manifest *m, uint32_t chunk)
{
    struct story s;
    struct bn_chunk_owner o;
    if (bn_manifest_chunk_owner(m, chunk, &o)) {
        char comm[sizeof(o.process->comm)]; /* of an image: nothing in it may reach a terminal as it is */
        for (size_t i = 0; i < sizeof(comm); i++)
            comm[i] = o.process->comm[i] && (o.process->comm[i] < ' ' || o.process->comm[i] > '~')
                          ? '?'
                          : o.process->comm[i];
        comm[sizeof(comm) - 1] = 0;
        snprintf(s.text, sizeof(s.text),
                 "chunk %u (process %d \"%s\", segment %u at 0x%llx, byte %llu of it)", chunk, o.process->pid,
                 comm, o.segment_index, (unsigned long long)o.segment->va, (unsigned long long)o.offset);
    } else
        snprintf(s.text, sizeof(s.text), "chunk %u", chunk);
    return s;
}

/* ---- open ---- */

int bn_pack_reader_open(int dirfd, const struct bn_manifest *m, struct bn_pack_reader **out,
                        struct bn_error *err)
{
    struct bn_pack_reader *r = calloc(1, sizeof(*r));
    if (!r)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    r->m = m;
    r->key = bn_hash_key_new(m->key);
    r->disk = bn_disk_new(0);
    r->files = malloc((m->n_packs ? m->n_packs : 1) * sizeof(*r->files));
    int rc = 0;
    if (!r->key || !r->files || !r->disk)
        rc = bn_error_set(err, ENOMEM, "store", "out of memory");
    for (uint32_t i = 0; r->files && i < m->n_packs; i++)
        r->files[i] = BN_DISK_FILE_NONE;
    for (uint32_t i = 0; rc >= 0 && i < m->n_packs; i++) {
        rc = bn_pack_file_open(dirfd, &m->packs[i], err);
        if (rc >= 0)
            bn_disk_file_open(r->disk, rc, false, &r->files[i]);
    }
    if (rc < 0) {
        bn_pack_reader_free(r);
        return rc;
    }
    *out = r;
    return 0;
}

static void close_files(struct bn_pack_reader *r)
{
    for (uint32_t i = 0; r->files && i < r->m->n_packs; i++) {
        bn_close(r->files[i].fd);
        bn_disk_file_close(&r->files[i]);
    }
}

void bn_pack_reader_free(struct bn_pack_reader *r)
{
    if (!r)
        return;
    bn_disk_free(r->disk);
    close_files(r);
    free(r->files);
    bn_hash_key_free(r->key);
    free(r);
}

int bn_pack_reader_tune(struct bn_pack_reader *r, unsigned disk_flags, struct bn_error *err)
{
    struct bn_disk *d = bn_disk_new(disk_flags);
    if (!d)
        return bn_error_set(err, ENOMEM, "store", "out of memory");
    bn_disk_free(r->disk);
    r->disk = d;
    for (uint32_t i = 0; i < r->m->n_packs; i++) {
        int fd = r->files[i].fd;
        bn_disk_file_close(&r->files[i]);
        bn_disk_file_open(d, fd, false, &r->files[i]);
    }
    return 0;
}

/* ---- read ---- */

static const struct bn_disk_file *file_of(const struct bn_pack_reader *r, uint32_t pack)
{
    const struct bn_image_pack *p = bn_manifest_find_pack(r->m, pack);
    return p ? &r->files[p - r->m->packs] : NULL;
}

static int read_failed(const struct bn_pack_reader *r, uint32_t chunk, int rc, struct bn_error *err)
{
    const struct bn_image_chunk *c = &r->m->chunks[chunk];
    if (rc == -ENODATA)
        return bn_error_set(err, EBADMSG, "store", "%s is cut off: " BN_PACK_NAME " became shorter",
                            whose(r->m, chunk).text, c->pack);
    return bn_error_set(err, rc, "store", "cannot read %s from " BN_PACK_NAME " at %llu: %s",
                        whose(r->m, chunk).text, c->pack, (unsigned long long)c->offset, strerror(-rc));
}

/* Chunks that are read in one call. */
struct batch {
    struct bn_pack_reader *r;
    struct bn_error *err;
    unsigned flags;
    bool damaged; /* and *err says so already */
    size_t n;
    uint32_t chunks[BN_DISK_PIECES];
    void *to[BN_DISK_PIECES]; /* where it goes; a compressed chunk is read elsewhere first */
    struct bn_disk_piece pieces[BN_DISK_PIECES];
};

static int decode(const struct batch *b, size_t i)
{
    const struct bn_image_chunk *c = &b->r->m->chunks[b->chunks[i]];
    int rc = c->encoding == BN_ENCODING_RAW ? 0 : bn_decode(b->pieces[i].data, c->length, b->to[i]);
    if (rc == -EBADMSG)
        return bn_error_set(b->err, EBADMSG, "store",
                            "%s is damaged: what " BN_PACK_NAME " has at %llu cannot be decompressed",
                            whose(b->r->m, b->chunks[i]).text, c->pack, (unsigned long long)c->offset);
    return rc < 0 ? bn_error_set(b->err, rc, "store", "out of memory") : 0;
}

/* Hashed while others are still on their way. */
static int chunk_is_here(void *arg, size_t i)
{
    struct batch *b = arg;
    int rc = decode(b, i);
    if (rc == 0 && b->flags & BN_PACK_VERIFY)
        rc = bn_pack_reader_verify(b->r, b->chunks[i], b->to[i], b->err);
    b->damaged = rc < 0;
    return rc;
}

static void drop_pieces(struct batch *b)
{
    for (size_t i = 0; i < b->n; i++)
        if (b->pieces[i].data != b->to[i])
            free(b->pieces[i].data);
    b->n = 0;
}

static int run_batch(struct batch *b)
{
    size_t failed = 0;
    int rc = bn_disk_read(b->r->disk, b->pieces, b->n, chunk_is_here, b, &failed);
    if (rc < 0 && !b->damaged)
        rc = read_failed(b->r, b->chunks[failed], rc, b->err);
    drop_pieces(b);
    return rc;
}

/* Add a chunk to those that are read next. */
static int add_piece(struct batch *b, uint32_t chunk, void *to)
{
    const struct bn_image_chunk *c = &b->r->m->chunks[chunk];
    const struct bn_disk_file *file = file_of(b->r, c->pack);
    bool raw = c->encoding == BN_ENCODING_RAW;
    if (!file || (raw ? c->length != BN_CHUNK_SIZE : c->length > BN_CHUNK_SIZE))
        return bn_error_set(b->err, EINVAL, "store", "%s has no place", whose(b->r->m, chunk).text);
    /* Whole pages, as they lie on the disk, if the pack has them. */
    uint64_t bytes = (c->length + BN_PACK_ALIGN - 1) / BN_PACK_ALIGN * BN_PACK_ALIGN,
             there = bn_manifest_find_pack(b->r->m, c->pack)->length - c->offset;
    void *data = raw ? to : aligned_alloc(BN_PACK_ALIGN, bytes);
    if (!data)
        return bn_error_set(b->err, ENOMEM, "store", "out of memory");
    b->chunks[b->n] = chunk;
    b->to[b->n] = to;
    b->pieces[b->n++] = (struct bn_disk_piece){.file = file,
                                               .offset = c->offset,
                                               .data = data,
                                               .bytes = bytes < there ? bytes : there,
                                               .stable = raw && b->flags & BN_PACK_STABLE};
    return 0;
}

int bn_pack_reader_read_batch(struct bn_pack_reader *r, uint32_t first, unsigned n, void *dst, unsigned flags,
                              struct bn_error *err)
{
    struct batch b = {.r = r, .err = err, .flags = flags};
    if (first > r->m->n_chunks || n > r->m->n_chunks - first)
        return bn_error_set(err, EINVAL, "store", "chunks %u to %llu of %u", first,
                            (unsigned long long)first + n - 1, r->m->n_chunks);
    int rc = 0;
    for (unsigned i = 0; i < n && rc == 0; i++) {
        const struct bn_image_chunk *c = &r->m->chunks[first + i];
        uint8_t *to = (uint8_t *)dst + (size_t)i * BN_CHUNK_SIZE;
        if (c->flags & BN_CHUNK_ZERO) {
            memset(to, 0, BN_CHUNK_SIZE);
            continue;
        }
        rc = add_piece(&b, first + i, to);
        if (rc == 0 && b.n == BN_DISK_PIECES)
            rc = run_batch(&b);
    }
    if (rc == 0 && b.n > 0)
        rc = run_batch(&b);
    drop_pieces(&b);
    return rc;
}

int bn_pack_reader_read_unverified(struct bn_pack_reader *r, uint32_t chunk, void *dst, struct bn_error *err)
{
    return bn_pack_reader_read_batch(r, chunk, 1, dst, 0, err);
}

int bn_pack_reader_verify(struct bn_pack_reader *r, uint32_t chunk, const void *data, struct bn_error *err)
{
    if (chunk >= r->m->n_chunks)
        return bn_error_set(err, EINVAL, "store", "chunk %u of %u", chunk, r->m->n_chunks);
    const struct bn_image_chunk *c = &r->m->chunks[chunk];
    if ((c->flags & BN_CHUNK_ZERO) && bn_is_zero(data, BN_CHUNK_SIZE))
        return 0;
    struct bn_hash h;
    if (!(c->flags & BN_CHUNK_ZERO)) {
        bn_hash_chunk(r->key, data, BN_CHUNK_SIZE, &h);
        if (bn_hash_equal(&h, &c->hash))
            return 0;
        return bn_error_set(err, EBADMSG, "store",
                            "%s is damaged: its bytes in " BN_PACK_NAME
                            " at %llu are not those that were saved",
                            whose(r->m, chunk).text, c->pack, (unsigned long long)c->offset);
    }
    return bn_error_set(err, EBADMSG, "store", "%s is damaged: it should be zero", whose(r->m, chunk).text);
}

int bn_pack_reader_read(struct bn_pack_reader *r, uint32_t chunk, void *dst, struct bn_error *err)
{
    return bn_pack_reader_read_batch(r, chunk, 1, dst, BN_PACK_VERIFY, err);
}
