/* Bytes of the manifest. docs/image-format.md is the specification. */
#include "image/manifest.h"

#include "base/cleanup.h"
#include "base/cursor.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

static const char magic[8] = {'B', 'E', 'N', 'N', 'U', 'M', 'F', '\n'};

#define HEADER_SIZE (sizeof(magic) + 4 + 4 + 3 * 8 + BN_HASH_KEY_SIZE)
#define TRAILER_SIZE BN_HASH_SIZE

enum section {
    SECTION_ORIGIN = 1,
    SECTION_GPUS = 2,
    SECTION_PROCESSES = 3,
    SECTION_STDIO = 4,
    SECTION_CHUNKS = 5,
    SECTION_PACKS = 6,
    SECTION_PHASES = 7,
    SECTION_OTHERS = 8, /* no manifest has to have it, or what comes after it */
    SECTION_FILES = 9,
};
#define SECTION_MUST 1u /* a reader that does not know the section refuses the manifest */

/* Least bytes of a record: no count is believed that the bytes left cannot hold. */
#define MIN_GPU (2 + 4 + 4 + 16 + 8)
#define MIN_PROCESS (4 + 16 + 2 + 4 + 4 + 4)
#define MIN_SEGMENT (8 + 8 + 8 + 4 + 4 + 4 + 4)
#define MIN_CHUNK (16 + 4 + 4 + 8 + 4 + 4)
#define MIN_PACK (4 + 8)
#define MIN_PHASE (2 + 8 + 8 + 8)

/* ---- encoding ---- */

static size_t begin(struct bn_writer *w, enum section type, uint32_t flags)
{
    bn_write_u32(w, type);
    bn_write_u32(w, flags);
    bn_write_u64(w, 0); /* end() puts the length here */
    return w->len;
}

static void put64(struct bn_writer *w, size_t at, uint64_t v)
{
    for (unsigned i = 0; !w->failed && i < 8; i++)
        w->buf[at + i] = (uint8_t)(v >> (8 * i));
}

static void end(struct bn_writer *w, size_t start)
{
    put64(w, start - 8, w->len - start);
}

static void put_origin(struct bn_writer *w, const struct bn_manifest *m)
{
    size_t at = begin(w, SECTION_ORIGIN, SECTION_MUST);
    bn_write_u64(w, m->created_ns);
    bn_write_u32(w, m->driver_version);
    bn_write_string(w, m->bennu_version);
    bn_write_string(w, m->host);
    end(w, at);
}

static void put_gpus(struct bn_writer *w, const struct bn_manifest *m)
{
    size_t at = begin(w, SECTION_GPUS, SECTION_MUST);
    bn_write_u32(w, m->n_gpus);
    for (uint32_t i = 0; i < m->n_gpus; i++) {
        const struct bn_image_gpu *g = &m->gpus[i];
        bn_write_string(w, g->name);
        bn_write_u32(w, g->cc_major);
        bn_write_u32(w, g->cc_minor);
        bn_write_bytes(w, g->uuid, sizeof(g->uuid));
        bn_write_u64(w, g->bytes);
    }
    end(w, at);
}

static void put_processes(struct bn_writer *w, const struct bn_manifest *m)
{
    size_t at = begin(w, SECTION_PROCESSES, SECTION_MUST);
    bn_write_u32(w, m->n_processes);
    for (uint32_t i = 0; i < m->n_processes; i++) {
        const struct bn_image_process *p = &m->processes[i];
        bn_write_u32(w, (uint32_t)p->pid);
        bn_write_bytes(w, p->instance, sizeof(p->instance));
        bn_write_string(w, p->comm);
        bn_write_u32(w, p->flags);
        bn_write_u32(w, p->driver_state);
        bn_write_u32(w, p->n_segments);
        for (uint32_t k = 0; k < p->n_segments; k++) {
            const struct bn_image_segment *s = &p->segments[k];
            bn_write_u64(w, s->id);
            bn_write_u64(w, s->size);
            bn_write_u64(w, s->va);
            bn_write_u32(w, s->gpu);
            bn_write_u32(w, s->flags);
            bn_write_u32(w, s->first_chunk);
            bn_write_u32(w, bn_segment_chunks(s));
        }
    }
    end(w, at);
}

static void put_stdio(struct bn_writer *w, const struct bn_manifest *m)
{
    size_t at = begin(w, SECTION_STDIO, 0);
    bn_write_u8(w, m->controlling_tty);
    for (unsigned i = 0; i < 3; i++)
        bn_write_string(w, m->stdio[i]);
    end(w, at);
}

static void put_chunks(struct bn_writer *w, const struct bn_manifest *m)
{
    size_t at = begin(w, SECTION_CHUNKS, SECTION_MUST);
    bn_write_u32(w, m->n_chunks);
    for (uint32_t i = 0; i < m->n_chunks; i++) {
        const struct bn_image_chunk *c = &m->chunks[i];
        bn_write_bytes(w, c->hash.b, sizeof(c->hash.b));
        bn_write_u32(w, c->pack);
        bn_write_u8(w, c->flags);
        bn_write_u8(w, c->encoding);
        bn_write_u8(w, c->store);
        bn_write_u8(w, 0);
        bn_write_u64(w, c->offset);
        bn_write_u32(w, c->length);
        bn_write_u32(w, 0);
    }
    end(w, at);
}

static void put_packs(struct bn_writer *w, const struct bn_manifest *m)
{
    size_t at = begin(w, SECTION_PACKS, SECTION_MUST);
    bn_write_u32(w, m->n_packs);
    for (uint32_t i = 0; i < m->n_packs; i++) {
        bn_write_u32(w, m->packs[i].index);
        bn_write_u64(w, m->packs[i].length);
    }
    end(w, at);
}

static void put_phases(struct bn_writer *w, const struct bn_manifest *m)
{
    size_t at = begin(w, SECTION_PHASES, 0);
    bn_write_u32(w, m->n_phases);
    for (uint32_t i = 0; i < m->n_phases; i++) {
        bn_write_string(w, m->phases[i].name);
        bn_write_u64(w, m->phases[i].start_ns);
        bn_write_u64(w, m->phases[i].duration_ns);
        bn_write_u64(w, m->phases[i].bytes);
    }
    end(w, at);
}

static void put_others(struct bn_writer *w, const struct bn_manifest *m)
{
    size_t at = begin(w, SECTION_OTHERS, 0);
    bn_write_u32(w, m->n_others);
    for (uint32_t i = 0; i < m->n_others; i++)
        bn_write_bytes(w, m->others[i], sizeof(m->others[i]));
    end(w, at);
}

static void put_files(struct bn_writer *w, const struct bn_manifest *m)
{
    size_t at = begin(w, SECTION_FILES, 0);
    bn_write_u32(w, m->n_files);
    for (uint32_t i = 0; i < m->n_files; i++) {
        bn_write_string(w, m->files[i].name);
        bn_write_u64(w, m->files[i].length);
    }
    bn_write_bytes(w, m->file_hashes, m->n_file_hashes * sizeof(*m->file_hashes));
    end(w, at);
}

#define KEY_AT (HEADER_SIZE - BN_HASH_KEY_SIZE)
#define TOTAL_AT (KEY_AT - 8)

int bn_manifest_seal(void *data, size_t len)
{
    uint8_t *p = data;
    struct bn_hash h;
    if (len < HEADER_SIZE + TRAILER_SIZE)
        return -EINVAL;
    int r = bn_hash_long(p + KEY_AT, p, len - TRAILER_SIZE, &h);
    if (r == 0)
        memcpy(p + len - TRAILER_SIZE, h.b, TRAILER_SIZE);
    return r;
}

int bn_manifest_encode_unchecked(const struct bn_manifest *m, void **out, size_t *len)
{
    bn_auto_writer w = {0};
    bn_write_bytes(&w, magic, sizeof(magic));
    bn_write_u32(&w, BN_MANIFEST_VERSION);
    bn_write_u32(&w, 0);
    bn_write_u64(&w, m->incompat);
    bn_write_u64(&w, m->compat);
    bn_write_u64(&w, 0);
    bn_write_bytes(&w, m->key, sizeof(m->key));
    put_origin(&w, m);
    put_gpus(&w, m);
    put_processes(&w, m);
    put_stdio(&w, m);
    put_chunks(&w, m);
    put_packs(&w, m);
    put_phases(&w, m);
    if (m->n_others > 0)
        put_others(&w, m);
    if (m->n_files > 0)
        put_files(&w, m);
    uint8_t room[TRAILER_SIZE] = {0};
    bn_write_bytes(&w, room, sizeof(room));
    if (w.failed)
        return -ENOMEM;
    put64(&w, TOTAL_AT, w.len);
    int r = bn_manifest_seal(w.buf, w.len);
    if (r < 0)
        return r;
    *out = BN_TAKE_PTR(w.buf);
    *len = w.len;
    return 0;
}

int bn_manifest_encode(const struct bn_manifest *m, void **out, size_t *len, struct bn_error *err)
{
    int r = bn_manifest_validate(m, err);
    if (r < 0)
        return r;
    bn_auto_free void *bytes = NULL;
    size_t n = 0;
    r = bn_manifest_encode_unchecked(m, &bytes, &n);
    if (r < 0)
        return bn_error_set(err, r, "manifest", "out of memory for the manifest");
    if (n > BN_MANIFEST_BYTES_MAX)
        return bn_error_set(err, E2BIG, "manifest", "manifest: %zu bytes, at most %zu are allowed", n,
                            BN_MANIFEST_BYTES_MAX);
    *out = BN_TAKE_PTR(bytes);
    *len = n;
    return 0;
}

/* ---- decoding ---- */

#define BAD(err, ...) bn_error_set(err, EBADMSG, "manifest", "manifest: " __VA_ARGS__)

/* Read a count and allocate that many records of `size` bytes, if the bytes left can hold them. An array of one at least,
 * so that NULL is only ever "no memory". */
static int get_array(struct bn_reader *r, const char *what, uint32_t max, size_t least, size_t size,
                     void **array, uint32_t *n, struct bn_error *err)
{
    uint32_t count = bn_read_u32(r);
    if (r->failed)
        return BAD(err, "the number of %s is cut off", what);
    if (count > max)
        return BAD(err, "%u %s, at most %u are allowed", count, what, max);
    if (count > bn_reader_left(r) / least)
        return BAD(err, "%u %s do not fit into the %zu bytes left", count, what, bn_reader_left(r));
    size_t room = 1; /* a power of two: the functions that append records count on it */
    while (room < count)
        room *= 2;
    *array = calloc(room, size);
    if (!*array)
        return bn_error_set(err, ENOMEM, "manifest", "out of memory for %u %s", count, what);
    *n = count;
    return 0;
}

static void get_fixed(struct bn_reader *r, void *out, size_t len)
{
    const void *p = bn_read_bytes(r, len);
    if (p)
        memcpy(out, p, len);
}

static int get_origin(struct bn_reader *r, struct bn_manifest *m, struct bn_error *err)
{
    m->created_ns = bn_read_u64(r);
    m->driver_version = bn_read_u32(r);
    bn_read_string(r, m->bennu_version, sizeof(m->bennu_version));
    bn_read_string(r, m->host, sizeof(m->host));
    return r->failed ? BAD(err, "the section about the origin is malformed") : 0;
}

static int get_gpus(struct bn_reader *r, struct bn_manifest *m, struct bn_error *err)
{
    int rc = get_array(r, "GPUs", BN_MANIFEST_GPUS_MAX, MIN_GPU, sizeof(*m->gpus), (void **)&m->gpus,
                       &m->n_gpus, err);
    for (uint32_t i = 0; rc == 0 && i < m->n_gpus; i++) {
        struct bn_image_gpu *g = &m->gpus[i];
        bn_read_string(r, g->name, sizeof(g->name));
        g->cc_major = bn_read_u32(r);
        g->cc_minor = bn_read_u32(r);
        get_fixed(r, g->uuid, sizeof(g->uuid));
        g->bytes = bn_read_u64(r);
        if (r->failed)
            rc = BAD(err, "GPU %u is malformed", i);
    }
    return rc;
}

static int get_process(struct bn_reader *r, uint32_t index, struct bn_image_process *p, struct bn_error *err)
{
    p->pid = (int32_t)bn_read_u32(r);
    get_fixed(r, p->instance, sizeof(p->instance));
    bn_read_string(r, p->comm, sizeof(p->comm));
    p->flags = bn_read_u32(r);
    p->driver_state = bn_read_u32(r);
    if (r->failed)
        return BAD(err, "process %u is malformed", index);
    int rc = get_array(r, "segments", BN_MANIFEST_SEGMENTS_MAX, MIN_SEGMENT, sizeof(*p->segments),
                       (void **)&p->segments, &p->n_segments, err);
    for (uint32_t i = 0; rc == 0 && i < p->n_segments; i++) {
        struct bn_image_segment *s = &p->segments[i];
        s->id = bn_read_u64(r);
        s->size = bn_read_u64(r);
        s->va = bn_read_u64(r);
        s->gpu = bn_read_u32(r);
        s->flags = bn_read_u32(r);
        s->first_chunk = bn_read_u32(r);
        uint32_t count = bn_read_u32(r);
        if (s->size / BN_CHUNK_SIZE != count)
            rc = BAD(err, "segment %u of process %d has %" PRIu64 " bytes but %u chunks", i, p->pid, s->size,
                     count);
    }
    return rc;
}

static int get_processes(struct bn_reader *r, struct bn_manifest *m, struct bn_error *err)
{
    int rc = get_array(r, "processes", BN_MANIFEST_PROCESSES_MAX, MIN_PROCESS, sizeof(*m->processes),
                       (void **)&m->processes, &m->n_processes, err);
    for (uint32_t i = 0; rc == 0 && i < m->n_processes; i++)
        rc = get_process(r, i, &m->processes[i], err);
    return rc;
}

static int get_stdio(struct bn_reader *r, struct bn_manifest *m, struct bn_error *err)
{
    uint8_t tty = bn_read_u8(r);
    m->controlling_tty = tty == 1;
    for (unsigned i = 0; i < 3; i++)
        bn_read_string(r, m->stdio[i], sizeof(m->stdio[i]));
    return r->failed || tty > 1 ? BAD(err, "the section about standard input and output is malformed") : 0;
}

static int get_chunks(struct bn_reader *r, struct bn_manifest *m, struct bn_error *err)
{
    int rc = get_array(r, "chunks", BN_MANIFEST_CHUNKS_MAX, MIN_CHUNK, sizeof(*m->chunks),
                       (void **)&m->chunks, &m->n_chunks, err);
    for (uint32_t i = 0; rc == 0 && i < m->n_chunks; i++) {
        struct bn_image_chunk *c = &m->chunks[i];
        get_fixed(r, c->hash.b, sizeof(c->hash.b));
        c->pack = bn_read_u32(r);
        c->flags = bn_read_u8(r);
        c->encoding = bn_read_u8(r);
        c->store = bn_read_u8(r);
        uint8_t reserved8 = bn_read_u8(r);
        c->offset = bn_read_u64(r);
        c->length = bn_read_u32(r);
        if (bn_read_u32(r) || reserved8)
            rc = BAD(err, "chunk %u has reserved bytes that are not zero", i);
    }
    return rc;
}

static int get_packs(struct bn_reader *r, struct bn_manifest *m, struct bn_error *err)
{
    int rc = get_array(r, "packs", BN_MANIFEST_PACKS_MAX, MIN_PACK, sizeof(*m->packs), (void **)&m->packs,
                       &m->n_packs, err);
    for (uint32_t i = 0; rc == 0 && i < m->n_packs; i++) {
        m->packs[i].index = bn_read_u32(r);
        m->packs[i].length = bn_read_u64(r);
    }
    return rc;
}

static int get_phases(struct bn_reader *r, struct bn_manifest *m, struct bn_error *err)
{
    int rc = get_array(r, "phases", BN_MANIFEST_PHASES_MAX, MIN_PHASE, sizeof(*m->phases),
                       (void **)&m->phases, &m->n_phases, err);
    for (uint32_t i = 0; rc == 0 && i < m->n_phases; i++) {
        struct bn_image_phase *p = &m->phases[i];
        bn_read_string(r, p->name, sizeof(p->name));
        p->start_ns = bn_read_u64(r);
        p->duration_ns = bn_read_u64(r);
        p->bytes = bn_read_u64(r);
        if (r->failed)
            rc = BAD(err, "phase %u is malformed", i);
    }
    return rc;
}

static int get_others(struct bn_reader *r, struct bn_manifest *m, struct bn_error *err)
{
    int rc = get_array(r, "other GPUs", BN_MANIFEST_GPUS_MAX, sizeof(*m->others), sizeof(*m->others),
                       (void **)&m->others, &m->n_others, err);
    for (uint32_t i = 0; rc == 0 && i < m->n_others; i++)
        get_fixed(r, m->others[i], sizeof(m->others[i]));
    return rc;
}

static int get_files(struct bn_reader *r, struct bn_manifest *m, struct bn_error *err)
{
    uint32_t n = bn_read_u32(r);
    int rc = 0;
    if (r->failed || n > BN_MANIFEST_FILES_MAX)
        return BAD(err, "the section about CRIU's files is malformed");
    for (uint32_t i = 0; rc == 0 && i < n; i++) {
        char name[BN_IMAGE_FILE_NAME_MAX];
        bn_read_string(r, name, sizeof(name));
        uint64_t length = bn_read_u64(r);
        uint64_t pieces = bn_image_file_pieces(length);
        if (r->failed || pieces > bn_reader_left(r) / BN_HASH_SIZE ||
            m->n_file_hashes > bn_reader_left(r) / BN_HASH_SIZE - pieces)
            return BAD(err, "file %u of CRIU's is malformed, or its hashes are not there", i);
        rc = bn_manifest_add_file(m, name, length);
        if (rc == -ENOMEM)
            return bn_error_set(err, ENOMEM, "manifest", "out of memory");
        if (rc < 0)
            return BAD(err, "file %u of CRIU's has an impossible name or length", i);
    }
    if (m->n_file_hashes > 0)
        get_fixed(r, m->file_hashes, m->n_file_hashes * sizeof(*m->file_hashes));
    return r->failed ? BAD(err, "the hashes of CRIU's files are cut off") : 0;
}

typedef int section_fn(struct bn_reader *r, struct bn_manifest *m, struct bn_error *err);

static const struct {
    section_fn *read;
    const char *name;
} sections[] = {
    [SECTION_ORIGIN] = {get_origin, "origin"},
    [SECTION_GPUS] = {get_gpus, "GPUs"},
    [SECTION_PROCESSES] = {get_processes, "processes"},
    [SECTION_STDIO] = {get_stdio, "standard input and output"},
    [SECTION_CHUNKS] = {get_chunks, "chunks"},
    [SECTION_PACKS] = {get_packs, "packs"},
    [SECTION_PHASES] = {get_phases, "phases"},
    [SECTION_OTHERS] = {get_others, "other GPUs"},
    [SECTION_FILES] = {get_files, "CRIU's files"},
};

static int get_section(struct bn_reader *r, uint32_t *last, struct bn_manifest *m, struct bn_error *err)
{
    uint32_t type = bn_read_u32(r), flags = bn_read_u32(r);
    uint64_t len = bn_read_u64(r);
    if (r->failed || len > bn_reader_left(r))
        return BAD(err, "section %u is cut off", type);
    if (type <= *last)
        return BAD(err, "section %u is out of order or there twice", type);
    *last = type;
    struct bn_reader body = bn_reader_init(bn_read_bytes(r, (size_t)len), (size_t)len);
    if (type >= BN_ARRAY_SIZE(sections) || !sections[type].read) {
        if (flags & SECTION_MUST)
            return bn_error_set(
                err, EPROTONOSUPPORT, "manifest",
                "the checkpoint uses section %u, unknown to this Bennu: restore with a newer one", type);
        return 0;
    }
    int rc = sections[type].read(&body, m, err);
    if (rc == 0 && body.failed)
        rc = BAD(err, "the section of the %s is cut off", sections[type].name);
    if (rc == 0 && bn_reader_left(&body) > 0)
        rc = BAD(err, "%zu bytes too many in the section of the %s", bn_reader_left(&body),
                 sections[type].name);
    return rc;
}

/* Header and checksum; leaves the reader at the first section, its end before the checksum. */
static int get_header(struct bn_reader *r, const uint8_t *data, size_t len, struct bn_manifest *m,
                      struct bn_error *err)
{
    if (len < sizeof(magic) || memcmp(data, magic, sizeof(magic)))
        return BAD(err, "this is not a Bennu manifest (wrong first bytes)");
    if (len < HEADER_SIZE + TRAILER_SIZE)
        return BAD(err, "truncated: %zu bytes", len);
    bn_read_bytes(r, sizeof(magic));
    uint32_t version = bn_read_u32(r), reserved = bn_read_u32(r);
    m->incompat = bn_read_u64(r);
    m->compat = bn_read_u64(r);
    uint64_t total = bn_read_u64(r);
    get_fixed(r, m->key, sizeof(m->key));
    if (version != BN_MANIFEST_VERSION)
        return bn_error_set(
            err, EPROTONOSUPPORT, "manifest",
            "the checkpoint has format %u, this Bennu reads %u: restore with the Bennu that made it", version,
            BN_MANIFEST_VERSION);
    if (total != len)
        return BAD(err, "%s: %zu bytes of %" PRIu64, len < total ? "truncated" : "too long", len, total);
    struct bn_hash h;
    int rc = bn_hash_long(m->key, data, len - TRAILER_SIZE, &h);
    if (rc < 0)
        return bn_error_set(err, rc, "manifest", "out of memory");
    if (memcmp(h.b, data + len - TRAILER_SIZE, TRAILER_SIZE))
        return BAD(err, "wrong checksum: the file was changed or damaged");
    if (reserved)
        return BAD(err, "reserved bytes are not zero");
    if (m->incompat & ~BN_MANIFEST_INCOMPAT_KNOWN)
        return bn_error_set(err, EPROTONOSUPPORT, "manifest",
                            "the checkpoint uses features (0x%" PRIx64
                            ") unknown to this Bennu: restore with a newer one",
                            m->incompat & ~BN_MANIFEST_INCOMPAT_KNOWN);
    r->end -= TRAILER_SIZE;
    return 0;
}

int bn_manifest_decode(const void *data, size_t len, struct bn_manifest **out, struct bn_error *err)
{
    if (len > BN_MANIFEST_BYTES_MAX)
        return BAD(err, "%zu bytes, at most %zu are allowed", len, BN_MANIFEST_BYTES_MAX);
    bn_auto_manifest struct bn_manifest *m = calloc(1, sizeof(*m));
    if (!m)
        return bn_error_set(err, ENOMEM, "manifest", "out of memory");
    struct bn_reader r = bn_reader_init(data, len);
    int rc = get_header(&r, data, len, m, err);
    uint32_t last = 0;
    unsigned seen = 0;
    while (rc == 0 && bn_reader_left(&r) > 0) {
        rc = get_section(&r, &last, m, err);
        seen |= last < 32 ? 1u << last : 0;
    }
    for (uint32_t i = 1; rc == 0 && i < SECTION_OTHERS; i++)
        if (!(seen & 1u << i))
            rc = BAD(err, "the section of the %s is missing", sections[i].name);
    if (rc == 0) {
        rc = bn_manifest_validate(m, err);
        if (rc == -EINVAL || rc == -E2BIG) { /* to a reader these are faults of the file */
            rc = -EBADMSG;
            if (err)
                err->code = EBADMSG;
        }
    }
    if (rc < 0)
        return rc;
    *out = BN_TAKE_PTR(m);
    return 0;
}
