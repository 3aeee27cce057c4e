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
