/* The manifest: round trips, limits, and that every damage is found and named. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/cleanup.h"
#include "base/io.h"
#include "image/manifest.h"
#include "make.h"

#include <fcntl.h>
#include <stdio.h>

struct bytes {
    void *p;
    size_t len;
};

static struct bytes encode(const struct bn_manifest *m)
{
    struct bytes b = {0};
    struct bn_error err = BN_ERROR_INIT;
    if (bn_manifest_encode(m, &b.p, &b.len, &err) < 0)
        fail_msg("%s", err.text);
    return b;
}

static void assert_decode_fails(const void *p, size_t len, int code, const char *says)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_manifest *m = NULL;
    assert_int_equal(bn_manifest_decode(p, len, &m, &err), -code);
    assert_null(m);
    assert_int_equal(err.code, code);
    if (says && !strstr(err.text, says))
        fail_msg("\"%s\" is not in \"%s\"", says, err.text);
}

/* Refused by validate, by encode, and by decode when it comes as bytes with a right checksum. */
static void assert_refused(struct bn_manifest *m, const char *says)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bytes b = {0};
    assert_true(bn_manifest_encode(m, &b.p, &b.len, &err) < 0);
    assert_null(b.p);
    if (!strstr(err.text, says))
        fail_msg("\"%s\" is not in \"%s\"", says, err.text);
    assert_int_equal(bn_manifest_encode_unchecked(m, &b.p, &b.len), 0);
    assert_decode_fails(b.p, b.len, EBADMSG, says);
    free(b.p);
}

static void assert_same(const struct bn_manifest *a, const struct bn_manifest *b)
{
    assert_memory_equal(a->key, b->key, sizeof(a->key));
    assert_true(a->incompat == b->incompat && a->compat == b->compat && a->created_ns == b->created_ns);
    assert_int_equal(a->driver_version, b->driver_version);
    assert_string_equal(a->bennu_version, b->bennu_version);
    assert_string_equal(a->host, b->host);
    assert_int_equal(a->n_gpus, b->n_gpus);
    for (uint32_t i = 0; i < a->n_gpus; i++)
        assert_memory_equal(&a->gpus[i], &b->gpus[i], sizeof(a->gpus[i]));
    assert_int_equal(a->n_processes, b->n_processes);
    for (uint32_t i = 0; i < a->n_processes; i++) {
        const struct bn_image_process *p = &a->processes[i], *q = &b->processes[i];
        assert_int_equal(p->pid, q->pid);
        assert_memory_equal(p->instance, q->instance, 16);
        assert_string_equal(p->comm, q->comm);
        assert_int_equal(p->flags, q->flags);
        assert_int_equal(p->driver_state, q->driver_state);
        assert_int_equal(p->n_segments, q->n_segments);
        for (uint32_t s = 0; s < p->n_segments; s++) {
            const struct bn_image_segment *x = &p->segments[s], *y = &q->segments[s];
            assert_true(x->id == y->id && x->size == y->size && x->va == y->va && x->gpu == y->gpu &&
                        x->flags == y->flags && x->first_chunk == y->first_chunk);
        }
    }
    assert_int_equal(a->n_chunks, b->n_chunks);
    for (uint32_t i = 0; i < a->n_chunks; i++) {
        const struct bn_image_chunk *x = &a->chunks[i], *y = &b->chunks[i];
        assert_memory_equal(x->hash.b, y->hash.b, 16);
        assert_true(x->pack == y->pack && x->flags == y->flags && x->encoding == y->encoding &&
                    x->store == y->store && x->offset == y->offset && x->length == y->length);
    }
    assert_int_equal(a->n_packs, b->n_packs);
    for (uint32_t i = 0; i < a->n_packs; i++)
        assert_true(a->packs[i].index == b->packs[i].index && a->packs[i].length == b->packs[i].length);
    assert_int_equal(a->n_phases, b->n_phases);
    for (uint32_t i = 0; i < a->n_phases; i++)
        assert_memory_equal(&a->phases[i], &b->phases[i], sizeof(a->phases[i]));
    assert_memory_equal(a->stdio, b->stdio, sizeof(a->stdio));
    assert_int_equal(a->controlling_tty, b->controlling_tty);
}

static void test_round_trip(void **state)
{
    (void)state;
    bn_auto_manifest struct bn_manifest *m = make_manifest();
    bn_auto_manifest struct bn_manifest *back = NULL;
    struct bytes b = encode(m);
    struct bn_error err = BN_ERROR_INIT;
    if (bn_manifest_decode(b.p, b.len, &back, &err) < 0)
        fail_msg("%s", err.text);
    assert_same(m, back);
    struct bytes again = encode(back);
    assert_int_equal(b.len, again.len);
    assert_memory_equal(b.p, again.p, b.len);
    free(again.p);
    free(b.p);
    /* A decoded manifest can be added to. */
    for (unsigned i = 0; i < 20; i++) {
        assert_non_null(bn_manifest_add_gpu(back));
        assert_non_null(bn_process_add_segment(&back->processes[0]));
        assert_int_equal(bn_manifest_add_phase(back, "a name that is longer than a phase can have", 0, 0, 0),
                         0);
        assert_int_equal(strlen(back->phases[back->n_phases - 1].name), 31);
    }
    while (bn_manifest_add_phase(back, "x", 0, 0, 0) == 0)
        ;
    assert_int_equal(back->n_phases, BN_MANIFEST_PHASES_MAX);
    while (bn_manifest_add_gpu(back))
        ;
    assert_int_equal(back->n_gpus, BN_MANIFEST_GPUS_MAX);
}

/* A manifest may lack them, and then has no section of them. */
static void test_other_gpus(void **state)
{
    (void)state;
    bn_auto_manifest struct bn_manifest *m = make_manifest();
    bn_auto_manifest struct bn_manifest *back = NULL;
    struct bytes none = encode(m);
    for (unsigned i = 0; i < 3; i++)
        memset(*bn_manifest_add_other(m), (int)(0x60 + i), 16);
    struct bytes b = encode(m);
    assert_int_equal(b.len, none.len + 16 + 4 + 3 * 16);
    assert_int_equal(bn_manifest_decode(b.p, b.len, &back, NULL), 0);
    assert_int_equal(back->n_others, 3);
    assert_memory_equal(back->others, m->others, sizeof(*m->others) * 3);
    assert_int_equal(bn_manifest_find_gpu(back, back->gpus[1].uuid), 1);
    assert_int_equal(bn_manifest_find_gpu(back, back->others[0]), -1);
    while (bn_manifest_add_other(back))
        ;
    assert_int_equal(back->n_others, BN_MANIFEST_GPUS_MAX);
    back->n_others++;
    assert_int_equal(bn_manifest_validate(back, NULL), -E2BIG);
    free(none.p);
    free(b.p);
}

static void refused_files(struct bn_manifest *m)
{
    bn_auto_manifest struct bn_manifest *back = NULL;
    void *p = NULL;
    size_t len;
    assert_int_equal(bn_manifest_encode_unchecked(m, &p, &len), 0);
    assert_int_equal(bn_manifest_decode(p, len, &back, NULL), -EBADMSG);
    free(p);
}

/* What CRIU's files were. A manifest may lack them, too. */
static void test_files(void **state)
{
    (void)state;
    bn_auto_manifest struct bn_manifest *m = make_manifest();
    bn_auto_manifest struct bn_manifest *back = NULL;
    static const char *const bad[] = {"",        ".img",     "bennu-pack-0.img", "bennu-manifest.img",
                                      "a/b.img", "../x.img", "stats-dump",       "x.img.gz"};
    for (size_t i = 0; i < BN_ARRAY_SIZE(bad); i++)
        assert_int_equal(bn_manifest_add_file(m, bad[i], 1), -EINVAL);
    assert_int_equal(bn_manifest_add_file(m, "core-1.img", 0), 0);
    assert_int_equal(bn_manifest_add_file(m, "mm-1.img", 1), 0);
    assert_int_equal(bn_manifest_add_file(m, "pages-1.img", 2 * BN_CHUNK_SIZE), 0);
    assert_int_equal(bn_manifest_add_file(m, "pages-2.img", 2 * BN_CHUNK_SIZE + 1), 0);
    assert_int_equal(bn_manifest_add_file(m, "pages-3.img", UINT64_MAX), -E2BIG);
    assert_int_equal(m->n_file_hashes, 1 + 2 + 3);
    for (unsigned i = 0; i < 6; i++)
        memset(m->file_hashes[i].b, (int)(0x70 + i), BN_HASH_SIZE);
    struct bytes b = encode(m);
    assert_int_equal(bn_manifest_decode(b.p, b.len, &back, NULL), 0);
    assert_int_equal(back->n_files, 4);
    assert_int_equal(back->n_file_hashes, 6);
    assert_memory_equal(back->file_hashes, m->file_hashes, 6 * sizeof(*m->file_hashes));
    for (unsigned i = 0; i < 4; i++) {
        assert_string_equal(back->files[i].name, m->files[i].name);
        assert_int_equal(back->files[i].length, m->files[i].length);
        assert_int_equal(back->files[i].first_hash, m->files[i].first_hash);
    }
    free(b.p);

    strcpy(m->files[3].name, "mm-1.img"); /* out of order */
    assert_int_equal(bn_manifest_validate(m, NULL), -EINVAL);
    refused_files(m);
    strcpy(m->files[3].name, "pages-1.img"); /* twice */
    refused_files(m);
    strcpy(m->files[3].name, "../pages.img");
    refused_files(m);
    strcpy(m->files[3].name, "pages-2.img");
    static const uint64_t lengths[] = {3 * BN_CHUNK_SIZE + 1, UINT64_MAX, BN_CHUNK_SIZE};
    for (size_t i = 0; i < BN_ARRAY_SIZE(lengths); i++) { /* not as many hashes as there are */
        m->files[3].length = lengths[i];
        refused_files(m);
    }
}

static void test_empty(void **state)
{
    (void)state;
    bn_auto_manifest struct bn_manifest *m = bn_manifest_new(), *other = bn_manifest_new();
    assert_memory_not_equal(m->key, other->key, sizeof(m->key));
    assert_true(m->created_ns > 1600000000000000000);
    assert_int_equal(bn_manifest_layout(m, NULL), 0);
    struct bytes b = encode(m);
    bn_auto_manifest struct bn_manifest *back = NULL;
    assert_int_equal(bn_manifest_decode(b.p, b.len, &back, NULL), 0);
    assert_same(m, back);
    free(b.p);
    bn_manifest_free(NULL);
}

/* The file in the tree was written by version 1 and must be readable for good. */
static void test_golden(void **state)
{
    (void)state;
    bn_auto_manifest struct bn_manifest *want = make_manifest();
    bn_auto_manifest struct bn_manifest *got = NULL;
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_free void *p = NULL;
    size_t len;
    assert_int_equal(bn_read_file_at(AT_FDCWD, TEST_GOLDEN "/manifest-1.img", 1 << 20, &p, &len), 0);
    if (bn_manifest_decode(p, len, &got, &err) < 0)
        fail_msg("%s", err.text);
    assert_same(want, got);
    struct bytes b = encode(want);
    assert_int_equal(b.len, len);
    assert_memory_equal(b.p, p, len);
    free(b.p);
}

static void test_truncated(void **state)
{
    (void)state;
    bn_auto_manifest struct bn_manifest *m = make_manifest();
    struct bytes b = encode(m);
    for (size_t len = 0; len < b.len; len++) {
        bn_auto_free uint8_t *cut = malloc(len ? len : 1); /* of its own, so that ASan sees a read beyond */
        memcpy(cut, b.p, len);
        assert_decode_fails(cut, len, EBADMSG, NULL);
        /* The same with length and checksum made right: only the structure can give it away. */
        if (len < 80)
            continue;
        for (unsigned i = 0; i < 8; i++)
            cut[32 + i] = (uint8_t)((uint64_t)len >> (8 * i));
        assert_int_equal(bn_manifest_seal(cut, len), 0);
        assert_decode_fails(cut, len, EBADMSG, NULL);
    }
    uint8_t *longer = calloc(1, b.len + 1);
    memcpy(longer, b.p, b.len);
    assert_decode_fails(longer, b.len + 1, EBADMSG, "too long");
    free(longer);
    free(b.p);
}

static void test_bit_flips(void **state)
{
    (void)state;
    bn_auto_manifest struct bn_manifest *m = make_manifest();
    struct bytes b = encode(m);
    uint8_t *p = b.p;
    for (size_t bit = 0; bit < b.len * 8; bit++) {
        p[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        struct bn_manifest *out = NULL;
        int r = bn_manifest_decode(p, b.len, &out, NULL);
        p[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        if (r != -EBADMSG && r != -EPROTONOSUPPORT)
            fail_msg("bit %zu of byte %zu: %d", bit % 8, bit / 8, r);
    }
    assert_decode_fails("BENNUMF", 7, EBADMSG, "not a Bennu manifest");
    free(b.p);
}

/* Every byte changed in several ways, with a right checksum: must not crash, and what decodes must encode again. */
static void test_resealed(void **state)
{
    (void)state;
    static const uint8_t changes[] = {0x01, 0x80, 0xff};
    bn_auto_manifest struct bn_manifest *m = make_manifest();
    struct bytes b = encode(m);
    uint8_t *p = b.p;
    for (size_t at = 0; at < b.len - 16; at++)
        for (unsigned c = 0; c < sizeof(changes); c++) {
            p[at] ^= changes[c];
            assert_int_equal(bn_manifest_seal(p, b.len), 0);
            bn_auto_manifest struct bn_manifest *out = NULL;
            if (bn_manifest_decode(p, b.len, &out, NULL) == 0) {
                struct bytes again = encode(out);
                free(again.p);
            }
            p[at] ^= changes[c];
        }
    free(b.p);
}

static void test_versions(void **state)
{
    (void)state;
    bn_auto_manifest struct bn_manifest *m = make_manifest();
    struct bytes b = encode(m);
    uint8_t *p = b.p;
    p[8] = 2;
    bn_manifest_seal(p, b.len);
    assert_decode_fails(p, b.len, EPROTONOSUPPORT, "has format 2, this Bennu reads 1");
    p[8] = 1;
    p[16] = 4; /* an incompatible feature */
    bn_manifest_seal(p, b.len);
    assert_decode_fails(p, b.len, EPROTONOSUPPORT, "uses features (0x4) unknown");
    p[16] = 0;
    p[24] = 4; /* a compatible one */
    bn_manifest_seal(p, b.len);
    bn_auto_manifest struct bn_manifest *back = NULL;
    assert_int_equal(bn_manifest_decode(p, b.len, &back, NULL), 0);
    assert_int_equal(back->compat, 4);
    p[24] = 0;

    /* A section of the future, 5 bytes, before the checksum: skipped if it may be. */
    uint8_t *more = calloc(1, b.len + 21);
    memcpy(more, p, b.len - 16);
    uint8_t *s = more + b.len - 16;
    size_t len = b.len + 21;
    s[0] = 99;
    s[8] = 5;
    for (unsigned i = 0; i < 8; i++)
        more[32 + i] = (uint8_t)((uint64_t)len >> (8 * i));
    bn_manifest_seal(more, len);
    bn_auto_manifest struct bn_manifest *future = NULL;
    assert_int_equal(bn_manifest_decode(more, len, &future, NULL), 0);
    assert_same(m, future);
    s[4] = 1;
    bn_manifest_seal(more, len);
    assert_decode_fails(more, len, EPROTONOSUPPORT, "uses section 99");
    s[0] = 3;
    bn_manifest_seal(more, len);
    assert_decode_fails(more, len, EBADMSG, "out of order or there twice");
    s[0] = 99;
    s[8] = 6;
    bn_manifest_seal(more, len);
    assert_decode_fails(more, len, EBADMSG, "section 99 is cut off");
    free(more);
    free(b.p);
}

#define REFUSED(change, says)                                     \
    do {                                                          \
        bn_auto_manifest struct bn_manifest *m = make_manifest(); \
        struct bn_image_process *p = m->processes;                \
        struct bn_image_chunk *c = m->chunks;                     \
        (void)p;                                                  \
        (void)c;                                                  \
        change;                                                   \
        assert_refused(m, says);                                  \
    } while (0)

static void test_rules(void **state)
{
    (void)state;
    REFUSED(p[0].segments[1].first_chunk = 7, "segment 1 of process 1 points past the chunk table");
    REFUSED(p[0].segments[1].first_chunk = UINT32_MAX, "points past the chunk table");
    REFUSED(p[2].segments[0].first_chunk = 2, "segment 0 of process 18 begins at chunk 2 instead of 3");
    REFUSED(p[2].segments[1].size += 4096, "no multiple of 2 MiB");
    REFUSED(p[0].segments[0].size = 0, "no multiple of 2 MiB");
    REFUSED(p[0].segments[0].size = (uint64_t)1 << 62, "");
    REFUSED(p[0].segments[0].va = UINT64_MAX - 4095, "beyond the address space");
    REFUSED(p[0].segments[0].gpu = 2, "is on GPU 2, but 2 are listed");
    REFUSED(p[0].segments[1].id = p[0].segments[0].id, "two segments with id 1000");
    REFUSED(p[2].n_segments = 1, "8 chunks, but the segments have 5");
    REFUSED(p[0].pid = 0, "process 0 has pid 0");
    REFUSED(p[0].flags |= 64, "process 1 has unknown flags");
    REFUSED(p[0].driver_state = 4, "driver state 4");
    REFUSED(p[1].instance[0] = 1, "has an agent but no instance, or the reverse");
    REFUSED(memset(p[0].instance, 0, 16), "has an agent but no instance, or the reverse");
    REFUSED(memcpy(p[2].instance, p[0].instance, 16), "the same agent instance");
    REFUSED((p[0].flags = 0, memset(p[0].instance, 0, 16)), "has segments but no agent");
    REFUSED(c[0].flags = 2, "chunk 0 has unknown flags 0x2");
    REFUSED(c[0].encoding = 1, "unknown encoding 1"); /* without the feature bit */
    REFUSED((m->incompat = BN_MANIFEST_INCOMPAT_ZSTD, c[0].encoding = 2), "unknown encoding 2");
    REFUSED((m->incompat = BN_MANIFEST_INCOMPAT_ZSTD, c[0].encoding = 1),
            "stored instead of 2 MiB compressed");
    REFUSED((m->incompat = BN_MANIFEST_INCOMPAT_ZSTD, c[0].encoding = 1, c[0].length = 0),
            "has 0 bytes stored");
    REFUSED((m->incompat = BN_MANIFEST_INCOMPAT_ZSTD, c[2].encoding = 1),
            "chunk 2 is zero and yet has a place");
    REFUSED(c[0].store = 1, "unknown kind 1");
    REFUSED(c[2].offset = 4096, "chunk 2 is zero and yet has a place");
    REFUSED(c[2].length = 1, "chunk 2 is zero and yet has a place");
    REFUSED(c[0].pack = 1, "chunk 0 is in pack 1, which is not listed");
    REFUSED(c[0].length = 4096, "has 4096 bytes stored instead of 2 MiB");
    REFUSED(c[0].offset = 512, "no multiple of 4096");
    REFUSED(c[3].offset += 4096, "chunk 3 points past the end of pack 0");
    REFUSED(c[3].offset = UINT64_MAX - 4095, "chunk 3 points past the end of pack 0");
    REFUSED(m->packs[1].index = 0, "pack 0 is out of order");
    REFUSED(m->packs[0].length = UINT64_MAX, "longer than a file can be");
    REFUSED(m->packs[0].length -= 1, "points past the end of pack 0");
}

/* Counts that the bytes cannot hold, or that are beyond the limits, are refused before anything is allocated. */
static void test_counts(void **state)
{
    (void)state;
    bn_auto_manifest struct bn_manifest *m = bn_manifest_new();
    struct bytes b = encode(m);
    uint8_t *p = b.p;
    static const char *const names[] = {"", "", "GPUs", "processes", "", "chunks", "packs", "phases"};
    for (size_t at = 56; at < b.len - 16;) { /* sections follow the header of 56 bytes */
        uint32_t type = p[at], len = p[at + 8];
        uint8_t *count = p + at + 16;
        at += 16 + len;
        if (!names[type][0])
            continue;
        char says[64];
        static const uint32_t counts[] = {1, 30, 200, 60000, 1000000, 4194304, 4194305, UINT32_MAX};
        for (unsigned i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
            memcpy(count, &counts[i], 4);
            bn_manifest_seal(p, b.len);
            snprintf(says, sizeof(says), "%u %s", counts[i], names[type]);
            assert_decode_fails(p, b.len, EBADMSG, says);
        }
        memset(count, 0, 4);
    }
    bn_manifest_seal(p, b.len);
    bn_auto_manifest struct bn_manifest *back = NULL;
    assert_int_equal(bn_manifest_decode(p, b.len, &back, NULL), 0);
    free(b.p);
}

static void test_layout(void **state)
{
    (void)state;
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_manifest struct bn_manifest *m = make_manifest();
    static const struct {
        uint32_t chunk;
        int32_t pid;
        uint32_t segment;
        uint64_t chunks_in;
    } want[] = {{0, 1, 0, 0},  {1, 1, 1, 0},  {2, 1, 1, 1}, {3, 18, 0, 0},
                {4, 18, 0, 1}, {5, 18, 1, 0}, {7, 18, 1, 2}};
    struct bn_chunk_owner o;
    for (unsigned i = 0; i < sizeof(want) / sizeof(want[0]); i++) {
        assert_true(bn_manifest_chunk_owner(m, want[i].chunk, &o));
        assert_int_equal(o.process->pid, want[i].pid);
        assert_int_equal(o.segment_index, want[i].segment);
        assert_int_equal(o.offset, want[i].chunks_in * BN_CHUNK_SIZE);
    }
    assert_false(bn_manifest_chunk_owner(m, 8, &o));
    assert_false(bn_manifest_chunk_owner(m, UINT32_MAX, &o));

    assert_ptr_equal(bn_manifest_find_process(m, m->processes[2].instance, 99), &m->processes[2]);
    assert_ptr_equal(bn_manifest_find_process(m, NULL, 17), &m->processes[1]);
    assert_ptr_equal(bn_manifest_find_process(m, (uint8_t[16]){0}, 17), &m->processes[1]);
    assert_null(bn_manifest_find_process(m, NULL, 18));
    assert_null(bn_manifest_find_process(m, (uint8_t[16]){77}, 18));

    m->processes[0].segments[0].size = BN_CHUNK_SIZE * ((uint64_t)BN_MANIFEST_CHUNKS_MAX + 1);
    assert_int_equal(bn_manifest_layout(m, &err), -E2BIG);
    m->processes[0].segments[0].size = UINT64_MAX / BN_CHUNK_SIZE * BN_CHUNK_SIZE;
    assert_int_equal(bn_manifest_layout(m, NULL), -E2BIG);
    m->processes[0].segments[0].size = 5;
    assert_int_equal(bn_manifest_layout(m, NULL), -EINVAL);
    assert_int_equal(m->n_chunks, 8);
}

/* A whole-size one: 100,000 chunks, so that the checksum is a tree. */
static void test_big(void **state)
{
    (void)state;
    bn_auto_manifest struct bn_manifest *m = bn_manifest_new();
    assert_non_null(bn_manifest_add_gpu(m));
    make_process(m, 5, 300, 184);
    assert_int_equal(bn_manifest_layout(m, NULL), 0);
    assert_true(m->n_chunks > 100000);
    for (uint32_t i = 0; i < m->n_chunks; i++)
        m->chunks[i].flags = BN_CHUNK_ZERO;
    struct bytes b = encode(m);
    assert_true(b.len > 2 * BN_HASH_LENGTH_MAX - 300000);
    bn_auto_manifest struct bn_manifest *back = NULL;
    assert_int_equal(bn_manifest_decode(b.p, b.len, &back, NULL), 0);
    assert_same(m, back);
    for (size_t at = 56; at < b.len; at += 99991) {
        ((uint8_t *)b.p)[at] ^= 4;
        assert_decode_fails(b.p, b.len, EBADMSG, "wrong checksum");
        ((uint8_t *)b.p)[at] ^= 4;
    }
    free(b.p);
}

int main(int argc, char **argv)
{
    if (argc == 3 &&
        strcmp(argv[1], "--write") == 0) { /* makes test/golden/manifest-1.img and the first of the corpus */
        struct bn_manifest *m = make_manifest();
        struct bytes b = encode(m);
        FILE *f = fopen(argv[2], "we");
        int r = !f || fwrite(b.p, 1, b.len, f) != b.len || fclose(f);
        free(b.p);
        bn_manifest_free(m);
        return r;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_other_gpus),
        cmocka_unit_test(test_files),      cmocka_unit_test(test_empty),
        cmocka_unit_test(test_golden),     cmocka_unit_test(test_truncated),
        cmocka_unit_test(test_bit_flips),  cmocka_unit_test(test_resealed),
        cmocka_unit_test(test_versions),   cmocka_unit_test(test_rules),
        cmocka_unit_test(test_counts),     cmocka_unit_test(test_layout),
        cmocka_unit_test(test_big),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
