#include "store/pack.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "store/pack_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct bn_pack_reader {
    const struct bn_manifest *m;
    struct bn_hash_key *key;
    int *fds; /* as m->packs */
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
    r->fds = malloc((m->n_packs ? m->n_packs : 1) * sizeof(*r->fds));
    int rc = 0;
    if (!r->key || !r->fds)
        rc = bn_error_set(err, ENOMEM, "store", "out of memory");
    for (uint32_t i = 0; r->fds && i < m->n_packs; i++)
        r->fds[i] = -1;
    for (uint32_t i = 0; rc >= 0 && i < m->n_packs; i++)
        rc = r->fds[i] = bn_pack_file_open(dirfd, &m->packs[i], err);
    if (rc < 0) {
        bn_pack_reader_free(r);
        return rc;
    }
    *out = r;
    return 0;
}

void bn_pack_reader_free(struct bn_pack_reader *r)
{
    if (!r)
        return;
    for (uint32_t i = 0; r->fds && i < r->m->n_packs; i++)
        bn_close(r->fds[i]);
    free(r->fds);
    bn_hash_key_free(r->key);
    free(r);
}

/* ---- read ---- */

static int fd_of(const struct bn_pack_reader *r, uint32_t pack)
{
    const struct bn_image_pack *p = bn_manifest_find_pack(r->m, pack);
    return p ? r->fds[p - r->m->packs] : -1;
}

int bn_pack_reader_read_unverified(struct bn_pack_reader *r, uint32_t chunk, void *dst, struct bn_error *err)
{
    if (chunk >= r->m->n_chunks)
        return bn_error_set(err, EINVAL, "store", "chunk %u of %u", chunk, r->m->n_chunks);
    const struct bn_image_chunk *c = &r->m->chunks[chunk];
    if (c->flags & BN_CHUNK_ZERO) {
        memset(dst, 0, BN_CHUNK_SIZE);
        return 0;
    }
    int fd = fd_of(r, c->pack);
    if (fd < 0 || c->length != BN_CHUNK_SIZE)
        return bn_error_set(err, EINVAL, "store", "%s has no place", whose(r->m, chunk).text);
    int rc = bn_pread_full(fd, dst, c->length, c->offset);
    if (rc == -ENODATA)
        return bn_error_set(err, EBADMSG, "store", "%s is cut off: " BN_PACK_NAME " became shorter",
                            whose(r->m, chunk).text, c->pack);
    if (rc < 0)
        return bn_error_set(err, rc, "store", "cannot read %s from " BN_PACK_NAME " at %llu: %s",
                            whose(r->m, chunk).text, c->pack, (unsigned long long)c->offset, strerror(-rc));
    return 0;
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
    int rc = bn_pack_reader_read_unverified(r, chunk, dst, err);
    if (rc < 0 || r->m->chunks[chunk].flags & BN_CHUNK_ZERO)
        return rc;
    return bn_pack_reader_verify(r, chunk, dst, err);
}
