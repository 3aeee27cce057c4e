/* Folders with images in them, for the tests of src/store. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/cleanup.h"
#include "store/image_dir.h"
#include "store/pack.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define CHUNK ((size_t)BN_CHUNK_SIZE)

struct folder {
    char path[64];
    int fd;
};

static inline int setup(void **state)
{
    struct folder *f = calloc(1, sizeof(*f));
    strcpy(f->path, "/tmp/bennu-test-store-XXXXXX");
    if (!mkdtemp(f->path))
        return -1;
    f->fd = open(f->path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    *state = f;
    return f->fd < 0;
}

static inline int teardown(void **state)
{
    struct folder *f = *state;
    char command[128];
    close(f->fd);
    snprintf(command, sizeof(command), "%s/there", f->path); /* what a failed test left mounted */
    umount2(command, MNT_DETACH);
    snprintf(command, sizeof(command), "rm -rf %s", f->path);
    int r = system(command);
    free(f);
    return r;
}

/* The content of test chunk `i`: every third is zero, 4 and 7 are alike, the others differ. */
static inline void content(uint32_t i, uint8_t *out)
{
    memset(out, 0, CHUNK);
    if (i % 3 == 0)
        return;
    uint64_t v = i == 7 ? 4 : i;
    for (size_t at = 0; at < CHUNK; at += 64) {
        v = v * 6364136223846793005u + 1442695040888963407u;
        memcpy(out + at, &v, 8);
    }
}

static inline uint8_t *buffer(size_t chunks)
{
    uint8_t *p = aligned_alloc(BN_PACK_ALIGN, chunks * CHUNK);
    assert_non_null(p);
    return p;
}

static inline struct bn_manifest *manifest(uint32_t chunks)
{
    struct bn_manifest *m = bn_manifest_new();
    assert_non_null(m);
    strcpy(m->bennu_version, "test");
    assert_non_null(bn_manifest_add_gpu(m));
    struct bn_image_process *p = bn_manifest_add_process(m);
    assert_non_null(p);
    p->pid = 42;
    p->flags = BN_PROCESS_AGENT;
    p->instance[3] = 9;
    strcpy(p->comm, "worker\x1b[1m");
    for (uint32_t left = chunks, i = 0; left > 0; i++) {
        uint32_t n = i == 0 && left > 2 ? 2 : left;
        struct bn_image_segment *s = bn_process_add_segment(p);
        assert_non_null(s);
        s->id = 100 + i;
        s->size = n * CHUNK;
        s->va = 0x7f0000000000 + ((uint64_t)i << 32);
        left -= n;
    }
    assert_int_equal(bn_manifest_layout(m, NULL), 0);
    assert_int_equal(m->n_chunks, chunks);
    return m;
}

static inline void no_error(const struct bn_error *err)
{
    if (bn_error_is_set(err))
        fail_msg("%s: %s", err->stage, err->text);
}

static inline void assert_says(const struct bn_error *err, int code, const char *part)
{
    assert_int_equal(err->code, code);
    if (!strstr(err->text, part))
        fail_msg("\"%s\" is not in \"%s\"", part, err->text);
}

static inline bool exists(const struct folder *f, const char *name)
{
    return faccessat(f->fd, name, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

/* A whole image of `n` chunks in the folder. */
static inline struct bn_manifest *save(const struct folder *f, uint32_t n)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_manifest *m = manifest(n);
    struct bn_pack_writer *w = NULL;
    assert_int_equal(bn_pack_writer_open(f->fd, m->key, n, NULL, &w, &err), 0);
    uint8_t *buf = buffer(1);
    for (uint32_t i = 0; i < n; i++) {
        content(i, buf);
        bn_pack_writer_add(w, i, buf, &err);
        no_error(&err);
    }
    free(buf);
    bn_pack_writer_finish(w, m, &err);
    no_error(&err);
    bn_image_save(f->fd, m, &err);
    no_error(&err);
    bn_pack_writer_close(w);
    return m;
}

static inline void check_content(const struct folder *f, const struct bn_manifest *m)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_pack_reader *r = NULL;
    bn_pack_reader_open(f->fd, m, &r, &err);
    no_error(&err);
    uint8_t *want = buffer(1), *got = buffer(1);
    for (uint32_t i = 0; i < m->n_chunks; i++) {
        memset(got, 0xaa, CHUNK);
        content(i, want);
        bn_pack_reader_read(r, i, got, &err);
        no_error(&err);
        assert_int_equal(memcmp(got, want, CHUNK), 0); /* assert_memory_equal would take a second a chunk */
        assert_int_equal(bn_pack_reader_verify(r, i, want, &err), 0);
    }
    assert_int_equal(bn_pack_reader_read(r, m->n_chunks, got, &err), -EINVAL);
    free(want);
    free(got);
    bn_pack_reader_free(r);
}

/* ---- images of seeds ---- */

/* A folder below the test's own. */
static inline struct folder below(const struct folder *f, const char *name)
{
    struct folder sub = {.fd = -1};
    assert_int_equal(mkdirat(f->fd, name, 0700), 0);
    assert_true(snprintf(sub.path, sizeof(sub.path), "%s/%s", f->path, name) < (int)sizeof(sub.path));
    sub.fd = open(sub.path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_true(sub.fd >= 0);
    return sub;
}

/* Bytes that are another's for each `seed`. */
static inline void fill(uint64_t seed, uint8_t *out)
{
    seed = seed * 2654435761u + 1;
    for (size_t at = 0; at < CHUNK; at += 8) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        memcpy(out + at, &seed, 8);
    }
}

static inline void hash_of(const struct bn_manifest *m, const uint8_t *data, struct bn_hash *h)
{
    struct bn_hash_key *key = bn_hash_key_new(m->key);
    bn_hash_chunk(key, data, CHUNK, h);
    bn_hash_key_free(key);
}

static inline struct bn_pack_writer *writer(int dirfd, const struct bn_manifest *m, struct bn_pack_options o)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_pack_writer *w = NULL;
    o.flags = BN_PACK_NOSYNC;
    bn_pack_writer_open(dirfd, m->key, m->n_chunks, &o, &w, &err);
    no_error(&err);
    return w;
}

/* Chunk i of the image has the bytes of seed seeds[i]; seed 0 is the zero chunk. */
static inline void put(struct bn_pack_writer *w, const uint64_t *seeds, uint32_t n)
{
    struct bn_error err = BN_ERROR_INIT;
    uint8_t *buf = buffer(1);
    for (uint32_t i = 0; i < n; i++) {
        fill(seeds[i], buf);
        bn_pack_writer_add(w, i, seeds[i] ? buf : NULL, &err);
        no_error(&err);
    }
    free(buf);
}

static inline void finish(const struct folder *f, struct bn_pack_writer *w, struct bn_manifest *m,
                          struct bn_pack_stats *stats)
{
    struct bn_error err = BN_ERROR_INIT;
    bn_pack_writer_finish(w, m, &err);
    no_error(&err);
    bn_pack_writer_stats(w, stats);
    bn_image_save(f->fd, m, &err);
    no_error(&err);
    bn_pack_writer_close(w);
}

static inline struct bn_manifest *image(const struct folder *f, const uint64_t *seeds, uint32_t n,
                                        const struct bn_pack_parent *parent, struct bn_pack_options o,
                                        struct bn_pack_stats *stats)
{
    struct bn_pack_stats unused;
    struct bn_manifest *m = manifest(n);
    if (parent) {
        memcpy(m->key, parent->m->key, sizeof(m->key));
        o.parents = parent;
        o.nparents = 1;
    }
    struct bn_pack_writer *w = writer(f->fd, m, o);
    put(w, seeds, n);
    finish(f, w, m, stats ? stats : &unused);
    return m;
}

/* The folder alone has these bytes: read as a stranger would. */
static inline void check(const struct folder *f, const uint64_t *seeds, uint32_t n)
{
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_manifest struct bn_manifest *m = NULL;
    struct bn_pack_reader *r = NULL;
    bn_image_load(f->fd, &m, &err);
    no_error(&err);
    assert_int_equal(m->n_chunks, n);
    bn_pack_reader_open(f->fd, m, &r, &err);
    no_error(&err);
    uint8_t *want = buffer(1), *got = buffer(1);
    for (uint32_t i = 0; i < n; i++) {
        if (seeds[i])
            fill(seeds[i], want);
        else
            memset(want, 0, CHUNK);
        bn_pack_reader_read(r, i, got, &err);
        no_error(&err);
        assert_int_equal(memcmp(want, got, CHUNK), 0);
    }
    free(want);
    free(got);
    bn_pack_reader_free(r);
}

static inline void packs_in(const struct folder *f, unsigned *n, unsigned *shared)
{
    *n = *shared = 0;
    for (unsigned i = 0; i < 64; i++) {
        char name[BN_PACK_NAME_MAX];
        struct stat st;
        snprintf(name, sizeof(name), BN_PACK_NAME, i);
        if (fstatat(f->fd, name, &st, AT_SYMLINK_NOFOLLOW) == 0) {
            ++*n;
            *shared += st.st_nlink > 1;
        }
    }
}

static inline void remove_folder(struct folder *f)
{
    char command[128];
    f->fd = bn_close(f->fd);
    snprintf(command, sizeof(command), "rm -r %s", f->path);
    assert_int_equal(system(command), 0);
}
