/* What a manifest must fulfil beyond being readable: the same rules when it is written and when it is read. */
#include "image/manifest.h"

#include "base/cleanup.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define BAD(err, ...) bn_error_set(err, EINVAL, "manifest", "manifest: " __VA_ARGS__)
#define MANY(err, ...) bn_error_set(err, E2BIG, "manifest", "manifest: " __VA_ARGS__)

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static int compare_instance(const void *a, const void *b)
{
    return memcmp(*(const uint8_t *const *)a, *(const uint8_t *const *)b, 16);
}

/* A restore finds segments by their id: two alike would be one to it. */
static int check_segment_ids(const struct bn_image_process *p, struct bn_error *err)
{
    if (p->n_segments < 2)
        return 0;
    bn_auto_free uint64_t *ids = malloc(p->n_segments * sizeof(*ids));
    if (!ids)
        return bn_error_set(err, ENOMEM, "manifest", "out of memory");
    for (uint32_t i = 0; i < p->n_segments; i++)
        ids[i] = p->segments[i].id;
    qsort(ids, p->n_segments, sizeof(*ids), compare_u64);
    for (uint32_t i = 1; i < p->n_segments; i++)
        if (ids[i] == ids[i - 1])
            return BAD(err, "process %d has two segments with id %" PRIu64, p->pid, ids[i]);
    return 0;
}

static int check_instances(const struct bn_manifest *m, struct bn_error *err)
{
    static const uint8_t none[16];
    bn_auto_free const uint8_t **list = malloc((m->n_processes ? m->n_processes : 1) * sizeof(*list));
    if (!list)
        return bn_error_set(err, ENOMEM, "manifest", "out of memory");
    uint32_t n = 0;
    for (uint32_t i = 0; i < m->n_processes; i++)
        if (memcmp(m->processes[i].instance, none, sizeof(none)))
            list[n++] = m->processes[i].instance;
    qsort(list, n, sizeof(*list), compare_instance);
    for (uint32_t i = 1; i < n; i++)
        if (memcmp(list[i], list[i - 1], sizeof(none)) == 0)
            return BAD(err, "two processes have the same agent instance");
    return 0;
}

static int check_segment(const struct bn_manifest *m, const struct bn_image_process *p, uint32_t index,
                         uint32_t expected, struct bn_error *err)
{
    const struct bn_image_segment *s = &p->segments[index];
    if (s->size == 0 || s->size % BN_CHUNK_SIZE)
        return BAD(err, "segment %u of process %d has %" PRIu64 " bytes, no multiple of 2 MiB", index, p->pid,
                   s->size);
    if (s->va && s->va + s->size < s->va)
        return BAD(err, "segment %u of process %d ends beyond the address space", index, p->pid);
    if (s->gpu >= m->n_gpus)
        return BAD(err, "segment %u of process %d is on GPU %u, but %u are listed", index, p->pid, s->gpu,
                   m->n_gpus);
    if (s->first_chunk > m->n_chunks || s->size / BN_CHUNK_SIZE > m->n_chunks - s->first_chunk)
        return BAD(err, "segment %u of process %d points past the chunk table", index, p->pid);
    if (s->first_chunk != expected)
        return BAD(err, "segment %u of process %d begins at chunk %u instead of %u", index, p->pid,
                   s->first_chunk, expected);
    return 0;
}

static int check_processes(const struct bn_manifest *m, struct bn_error *err)
{
    static const uint8_t none[16];
    uint32_t segments = 0, next_chunk = 0;
    for (uint32_t i = 0; i < m->n_processes; i++) {
        const struct bn_image_process *p = &m->processes[i];
        if (p->pid <= 0)
            return BAD(err, "process %u has pid %d", i, p->pid);
        if (p->flags & ~BN_PROCESS_FLAGS_KNOWN)
            return BAD(err, "process %d has unknown flags 0x%x", p->pid, p->flags);
        if (p->driver_state > 3)
            return BAD(err, "process %d has the unknown driver state %u", p->pid, p->driver_state);
        if (!(p->flags & BN_PROCESS_AGENT) != !memcmp(p->instance, none, sizeof(none)))
            return BAD(err, "process %d has an agent but no instance, or the reverse", p->pid);
        if (p->n_segments && !(p->flags & BN_PROCESS_AGENT))
            return BAD(err, "process %d has segments but no agent", p->pid);
        if (p->n_segments > BN_MANIFEST_SEGMENTS_MAX - segments)
            return MANY(err, "more than %u segments", BN_MANIFEST_SEGMENTS_MAX);
        segments += p->n_segments;
        for (uint32_t s = 0; s < p->n_segments; s++) {
            int r = check_segment(m, p, s, next_chunk, err);
            if (r < 0)
                return r;
            next_chunk += bn_segment_chunks(&p->segments[s]);
        }
        int r = check_segment_ids(p, err);
        if (r < 0)
            return r;
    }
    if (next_chunk != m->n_chunks)
        return BAD(err, "%u chunks, but the segments have %u", m->n_chunks, next_chunk);
    return check_instances(m, err);
}

static int check_chunk(const struct bn_manifest *m, uint32_t index, struct bn_error *err)
{
    const struct bn_image_chunk *c = &m->chunks[index];
    if (c->flags & ~BN_CHUNK_FLAGS_KNOWN)
        return BAD(err, "chunk %u has unknown flags 0x%x", index, c->flags);
    if (c->encoding != BN_ENCODING_RAW &&
        (c->encoding != BN_ENCODING_ZSTD || !(m->incompat & BN_MANIFEST_INCOMPAT_ZSTD)))
        return BAD(err, "chunk %u has the unknown encoding %u", index, c->encoding);
    if (c->store != BN_STORE_PACK)
        return BAD(err, "chunk %u lies in a store of the unknown kind %u", index, c->store);
    if (c->flags & BN_CHUNK_ZERO) {
        if (c->pack || c->offset || c->length || c->encoding)
            return BAD(err, "chunk %u is zero and yet has a place", index);
        return 0;
    }
    const struct bn_image_pack *pack = bn_manifest_find_pack(m, c->pack);
    if (!pack)
        return BAD(err, "chunk %u is in pack %u, which is not listed", index, c->pack);
    if (c->encoding == BN_ENCODING_RAW ? c->length != BN_CHUNK_SIZE
                                       : c->length == 0 || c->length >= BN_CHUNK_SIZE)
        return BAD(err, "chunk %u has %u bytes stored instead of 2 MiB%s", index, c->length,
                   c->encoding == BN_ENCODING_RAW ? "" : " compressed");
    if (c->offset % BN_PACK_ALIGN)
        return BAD(err, "chunk %u begins at %" PRIu64 ", no multiple of %u", index, c->offset, BN_PACK_ALIGN);
    if (c->offset > pack->length || c->length > pack->length - c->offset)
        return BAD(err, "chunk %u points past the end of pack %u", index, c->pack);
    return 0;
}

static int check_limits(const struct bn_manifest *m, struct bn_error *err)
{
    if (m->n_gpus > BN_MANIFEST_GPUS_MAX)
        return MANY(err, "%u GPUs, at most %u are allowed", m->n_gpus, BN_MANIFEST_GPUS_MAX);
    if (m->n_others > BN_MANIFEST_GPUS_MAX)
        return MANY(err, "%u other GPUs, at most %u are allowed", m->n_others, BN_MANIFEST_GPUS_MAX);
    if (m->n_processes > BN_MANIFEST_PROCESSES_MAX)
        return MANY(err, "%u processes, at most %u are allowed", m->n_processes, BN_MANIFEST_PROCESSES_MAX);
    if (m->n_chunks > BN_MANIFEST_CHUNKS_MAX)
        return MANY(err, "%u chunks, at most %u are allowed", m->n_chunks, BN_MANIFEST_CHUNKS_MAX);
    if (m->n_packs > BN_MANIFEST_PACKS_MAX)
        return MANY(err, "%u packs, at most %u are allowed", m->n_packs, BN_MANIFEST_PACKS_MAX);
    if (m->n_phases > BN_MANIFEST_PHASES_MAX)
        return MANY(err, "%u phases, at most %u are allowed", m->n_phases, BN_MANIFEST_PHASES_MAX);
    return 0;
}

static int check_files(const struct bn_manifest *m, struct bn_error *err)
{
    for (uint32_t i = 1; i < m->n_files; i++)
        if (strcmp(m->files[i - 1].name, m->files[i].name) >= 0)
            return BAD(err, "the files of CRIU's are not in the order of their names");
    return 0;
}

int bn_manifest_validate(const struct bn_manifest *m, struct bn_error *err)
{
    int r = check_limits(m, err);
    if (r < 0)
        return r;
    if (m->incompat & ~BN_MANIFEST_INCOMPAT_KNOWN)
        return BAD(err, "unknown feature bits 0x%" PRIx64, m->incompat);
    for (uint32_t i = 0; i < m->n_packs; i++) {
        if (i && m->packs[i].index <= m->packs[i - 1].index)
            return BAD(err, "pack %u is out of order", m->packs[i].index);
        if (m->packs[i].length > INT64_MAX)
            return BAD(err, "pack %u is longer than a file can be", m->packs[i].index);
    }
    r = check_files(m, err);
    if (r == 0)
        r = check_processes(m, err);
    for (uint32_t i = 0; r == 0 && i < m->n_chunks; i++)
        r = check_chunk(m, i, err);
    return r;
}
