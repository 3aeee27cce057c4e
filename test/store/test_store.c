/* Packs and image folders on a real file system: what is written is what is read, and what is damaged is found. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "base/cleanup.h"
#include "base/io.h"
#include "store/image_dir.h"
#include "store/pack.h"
#include "images.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>

static void test_round_trip(void **state)
{
    struct folder *f = *state;
    struct bn_error err = BN_ERROR_INIT;
    assert_int_equal(bn_image_present(f->fd), 0);
    bn_auto_manifest struct bn_manifest *m = save(f, 12);
    assert_int_equal(bn_image_present(f->fd), 1);
    bn_auto_manifest struct bn_manifest *loaded = NULL;
    bn_image_load(f->fd, &loaded, &err);
    no_error(&err);
    assert_int_equal(loaded->n_chunks, 12);
    check_content(f, loaded);

    assert_int_equal(loaded->n_packs, 1);                          /* one thread: one pack */
    assert_int_equal(bn_manifest_stored_bytes(loaded), 7 * CHUNK); /* four zero, two alike */
    assert_int_equal(bn_manifest_bytes(loaded), 12 * CHUNK);
    assert_int_equal(loaded->chunks[4].offset, loaded->chunks[7].offset);
    assert_true(bn_hash_equal(&loaded->chunks[4].hash, &loaded->chunks[7].hash));
    assert_int_equal(loaded->chunks[3].flags, BN_CHUNK_ZERO);
    assert_true(bn_hash_equal(&loaded->chunks[3].hash, &loaded->chunks[0].hash));

    struct stat st;
    assert_int_equal(fstatat(f->fd, "bennu-pack-0.img", &st, 0), 0);
    assert_int_equal(st.st_mode & 07777, 0600);

    /* A second image does not go into the same folder. */
    assert_int_equal(bn_image_save(f->fd, m, &err), -EEXIST);
    struct bn_pack_writer *w = NULL;
    err = BN_ERROR_INIT;
    assert_int_equal(bn_pack_writer_open(f->fd, m->key, 2, NULL, &w, &err), 0);
    uint8_t *buf = buffer(1);
    content(1, buf);
    assert_int_equal(bn_pack_writer_add(w, 0, buf, &err), -EEXIST);
    assert_says(&err, EEXIST, "already holds bennu-pack-0.img");
    free(buf);
    bn_pack_writer_abort(w);
    check_content(f, loaded); /* and what is there is left alone */

    err = BN_ERROR_INIT;
    int fd = openat(f->fd, "bennu-pack-1.img.old", O_CREAT | O_WRONLY, 0600);
    close(fd);
    assert_int_equal(bn_image_remove(f->fd, &err), 0);
    assert_false(exists(f, "bennu-pack-0.img"));
    assert_false(exists(f, BN_MANIFEST_NAME));
    assert_true(exists(f, "bennu-pack-1.img.old"));
}

static void test_empty(void **state)
{
    struct folder *f = *state;
    bn_auto_manifest struct bn_manifest *m = save(f, 0);
    bn_auto_manifest struct bn_manifest *loaded = NULL;
    assert_int_equal(bn_image_load(f->fd, &loaded, NULL), 0);
    assert_int_equal(loaded->n_packs, 0);
    assert_false(exists(f, "bennu-pack-0.img"));
    check_content(f, loaded);
}

static void test_batch_and_rollover(void **state)
{
    struct folder *f = *state;
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_manifest struct bn_manifest *m = manifest(32);
    struct bn_pack_writer *w = NULL;
    struct bn_pack_options o = {.flags = BN_PACK_NOSYNC, .pack_bytes = 1};
    assert_int_equal(bn_pack_writer_open(f->fd, m->key, 32, &o, &w, &err), 0);
    uint8_t *buf = buffer(BN_PACK_BATCH);
    for (uint32_t i = 0; i < 32; i += BN_PACK_BATCH) {
        struct bn_pack_item items[BN_PACK_BATCH];
        for (uint32_t k = 0; k < BN_PACK_BATCH; k++) {
            content(i + k, buf + k * CHUNK);
            items[k] = (struct bn_pack_item){i + k, (i + k) % 3 ? buf + k * CHUNK : NULL};
        }
        bn_pack_writer_add_batch(w, items, BN_PACK_BATCH, &err);
        no_error(&err);
    }
    struct bn_pack_stats st;
    bn_pack_writer_stats(w, &st);
    assert_int_equal(st.chunks, 32);
    assert_int_equal(st.zero_chunks, 11);
    assert_int_equal(st.same_chunks, 1);
    assert_int_equal(st.stored_bytes, 20 * CHUNK);
    struct bn_pack_item many[BN_PACK_BATCH + 1] = {0};
    struct bn_error other = BN_ERROR_INIT;
    assert_int_equal(bn_pack_writer_add_batch(w, many, BN_PACK_BATCH + 1, &other), -EINVAL);
    other = BN_ERROR_INIT;
    assert_int_equal(bn_pack_writer_add(w, 32, buf, &other), -EINVAL);
    free(buf);
    bn_pack_writer_finish(w, m, &err);
    no_error(&err);
    assert_true(m->n_packs >= 3); /* of 16 MiB each */
    for (uint32_t i = 0; i < m->n_packs; i++)
        assert_true(m->packs[i].length <= BN_PACK_BATCH * CHUNK);
    assert_int_equal(bn_manifest_validate(m, &err), 0);
    check_content(f, m);
    /* The dump failed later on: nothing stays. */
    bn_pack_writer_abort(w);
    assert_false(exists(f, "bennu-pack-0.img"));
    assert_false(exists(f, "bennu-pack-1.img"));
}

static void test_chunk_again(void **state)
{
    struct folder *f = *state;
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_manifest struct bn_manifest *m = manifest(8);
    struct bn_pack_writer *w = NULL;
    assert_int_equal(bn_pack_writer_open(f->fd, m->key, 8, NULL, &w, &err), 0);
    uint8_t *buf = buffer(1);
    content(4, buf); /* 7 will share it with 4; then 4 changes its mind, twice */
    for (uint32_t i = 0; i < 8; i++)
        assert_int_equal(bn_pack_writer_add(w, i, buf, &err), 0);
    struct bn_pack_stats st;
    bn_pack_writer_stats(w, &st);
    assert_int_equal(st.stored_bytes, CHUNK);
    for (uint32_t i = 0; i < 7; i++) {
        content(i, buf);
        assert_int_equal(bn_pack_writer_add(w, i, NULL, &err), 0);
        assert_int_equal(bn_pack_writer_add(w, i, buf, &err), 0);
    }
    free(buf);
    bn_pack_writer_finish(w, m, &err);
    no_error(&err);
    check_content(f, m);
    bn_pack_writer_close(w);
    assert_true(exists(f, "bennu-pack-0.img"));
}

static void test_unfinished(void **state)
{
    struct folder *f = *state;
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_manifest struct bn_manifest *m = manifest(3);
    struct bn_pack_writer *w = NULL;
    uint8_t *buf = buffer(1);
    content(1, buf);
    assert_int_equal(bn_pack_writer_open(f->fd, m->key, 3, NULL, &w, &err), 0);
    assert_int_equal(bn_pack_writer_add(w, 0, buf, &err), 0);
    assert_int_equal(bn_pack_writer_add(w, 2, buf, &err), 0);
    assert_true(exists(f, "bennu-pack-0.img"));
    assert_int_equal(bn_pack_writer_finish(w, m, &err), -EINVAL);
    assert_says(&err, EINVAL, "chunk 1 was never written");
    assert_int_equal(m->n_packs, 0);
    bn_pack_writer_close(w); /* without a finish it removes */
    assert_false(exists(f, "bennu-pack-0.img"));
    free(buf);

    bn_auto_manifest struct bn_manifest *none = NULL;
    err = BN_ERROR_INIT;
    assert_int_equal(bn_image_load(f->fd, &none, &err), -ENOENT);
    assert_says(&err, ENOENT, "not a Bennu checkpoint (no bennu-manifest.img)");
    bn_pack_writer_close(NULL);
    bn_pack_writer_abort(NULL);
    bn_pack_reader_free(NULL);
}

/* ---- damage ---- */

static void overwrite(const struct folder *f, const char *name, uint64_t at)
{
    uint8_t b;
    int fd = openat(f->fd, name, O_RDWR);
    assert_int_equal(bn_pread_full(fd, &b, 1, at), 0);
    b ^= 0x10;
    assert_int_equal(bn_pwrite_full(fd, &b, 1, at), 0);
    close(fd);
}

static void assert_open_fails(const struct folder *f, const struct bn_manifest *m, int code, const char *says)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_pack_reader *r = NULL;
    assert_int_equal(bn_pack_reader_open(f->fd, m, &r, &err), -code);
    assert_says(&err, code, says);
    assert_null(r);
}

static void test_damaged_pack(void **state)
{
    struct folder *f = *state;
    bn_auto_manifest struct bn_manifest *m = save(f, 9);
    struct bn_error err = BN_ERROR_INIT;
    struct bn_pack_reader *r = NULL;
    uint8_t *buf = buffer(1);
    bn_pack_reader_open(f->fd, m, &r, &err);
    no_error(&err);
    overwrite(f, "bennu-pack-0.img", m->chunks[5].offset + 1234567);
    for (uint32_t i = 0; i < 9; i++)
        if (i != 5)
            assert_int_equal(bn_pack_reader_read(r, i, buf, &err), 0);
    assert_int_equal(bn_pack_reader_read(r, 5, buf, &err), -EBADMSG);
    assert_says(&err, EBADMSG,
                "chunk 5 (process 42 \"worker?[1m\", segment 1 at 0x7f0100000000, byte 6291456 of it) is "
                "damaged: its bytes in bennu-pack-0.img at ");
    assert_int_equal(bn_pack_reader_read_unverified(r, 5, buf, NULL), 0);
    assert_int_equal(bn_pack_reader_verify(r, 5, buf, NULL), -EBADMSG);
    assert_int_equal(bn_pack_reader_verify(r, 0, buf, NULL), -EBADMSG); /* zero it should be */
    overwrite(f, "bennu-pack-0.img", m->chunks[5].offset + 1234567);
    assert_int_equal(bn_pack_reader_read(r, 5, buf, NULL), 0);

    /* Cut off under an open reader. */
    int fd = openat(f->fd, "bennu-pack-0.img", O_RDWR);
    struct stat st;
    fstat(fd, &st);
    assert_int_equal(ftruncate(fd, st.st_size - 1), 0);
    err = BN_ERROR_INIT;
    assert_int_equal(bn_pack_reader_read(r, 8, buf, &err), -EBADMSG);
    assert_says(&err, EBADMSG, "became shorter");
    bn_pack_reader_free(r);
    free(buf);

    assert_open_fails(f, m, EBADMSG, "bennu-pack-0.img is truncated: it has");
    assert_int_equal(ftruncate(fd, st.st_size + 1), 0);
    assert_open_fails(f, m, EBADMSG, "bennu-pack-0.img is too long");
    close(fd);
    unlinkat(f->fd, "bennu-pack-0.img", 0);
    assert_open_fails(f, m, ENOENT, "bennu-pack-0.img is missing");
    assert_int_equal(symlinkat("/dev/zero", f->fd, "bennu-pack-0.img"), 0);
    assert_open_fails(f, m, EBADMSG, "symbolic link");
    unlinkat(f->fd, "bennu-pack-0.img", 0);
    assert_int_equal(mkfifoat(f->fd, "bennu-pack-0.img", 0600), 0);
    assert_open_fails(f, m, EBADMSG, "no regular file");
}

static void assert_load_fails(const struct folder *f, int code, const char *says)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_manifest *m = NULL;
    assert_int_equal(bn_image_load(f->fd, &m, &err), -code);
    assert_says(&err, code, says);
    assert_null(m);
}

static void test_damaged_manifest(void **state)
{
    struct folder *f = *state;
    bn_auto_manifest struct bn_manifest *m = save(f, 5);
    overwrite(f, BN_MANIFEST_NAME, 200);
    assert_load_fails(f, EBADMSG, "bennu-manifest.img: manifest: wrong checksum");
    overwrite(f, BN_MANIFEST_NAME, 200);
    int fd = openat(f->fd, BN_MANIFEST_NAME, O_RDWR);
    struct stat st;
    fstat(fd, &st);
    assert_int_equal(ftruncate(fd, st.st_size - 16), 0);
    assert_load_fails(f, EBADMSG, "truncated");
    assert_int_equal(ftruncate(fd, 0), 0);
    assert_load_fails(f, EBADMSG, "not a Bennu manifest");
    assert_int_equal(ftruncate(fd, (off_t)BN_MANIFEST_BYTES_MAX + 1), 0);
    assert_load_fails(f, EBADMSG, "no manifest is that long");
    close(fd);
    unlinkat(f->fd, BN_MANIFEST_NAME, 0);
    assert_int_equal(mkfifoat(f->fd, BN_MANIFEST_NAME, 0600), 0);
    assert_load_fails(f, EBADMSG, "no regular file");
    unlinkat(f->fd, BN_MANIFEST_NAME, 0);
    assert_int_equal(symlinkat("elsewhere", f->fd, BN_MANIFEST_NAME), 0);
    assert_load_fails(f, EBADMSG, "symbolic link");
    unlinkat(f->fd, BN_MANIFEST_NAME, 0);
    assert_load_fails(f, ENOENT, "not a Bennu checkpoint");
    assert_int_equal(bn_image_has_criu(f->fd), 0);
    close(openat(f->fd, "inventory.img", O_CREAT | O_WRONLY, 0600));
    assert_int_equal(bn_image_has_criu(f->fd), 0);
    assert_load_fails(f, ENOENT, "one of CRIU alone");
    fd = openat(f->fd, "inventory.img", O_WRONLY);
    assert_int_equal(write(fd, "x", 1), 1);
    close(fd);
    assert_int_equal(bn_image_has_criu(f->fd), 1);
}

static void test_wrong_manifest_not_saved(void **state)
{
    struct folder *f = *state;
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_manifest struct bn_manifest *m = manifest(2); /* its chunks have no place yet */
    assert_int_equal(bn_image_save(f->fd, m, &err), -EINVAL);
    assert_says(&err, EINVAL, "chunk 0 is in pack 0, which is not listed");
    assert_int_equal(bn_image_present(f->fd), 0);
    struct bn_pack_writer *w = NULL;
    bn_auto_manifest struct bn_manifest *other = manifest(2);
    err = BN_ERROR_INIT;
    assert_int_equal(bn_pack_writer_open(f->fd, m->key, 2, NULL, &w, &err), 0);
    for (uint32_t i = 0; i < 2; i++)
        assert_int_equal(bn_pack_writer_add(w, i, NULL, &err), 0);
    assert_int_equal(bn_pack_writer_finish(w, other, &err), -EINVAL); /* another key */
    err = BN_ERROR_INIT;
    assert_int_equal(bn_pack_writer_finish(w, m, &err), 0);
    assert_int_equal(bn_pack_writer_finish(w, m, &err), -EINVAL);
    err = BN_ERROR_INIT;
    assert_int_equal(bn_pack_writer_add(w, 0, NULL, &err), -EINVAL);
    bn_pack_writer_close(w);
}

/* ---- many threads ---- */

#define THREADS 8
#define MANY 96u

struct job {
    struct bn_pack_writer *w;
    struct bn_pack_reader *r;
    unsigned first;
    int result;
};

static void *write_some(void *arg)
{
    struct job *j = arg;
    uint8_t *buf = aligned_alloc(BN_PACK_ALIGN, 2 * CHUNK);
    for (uint32_t i = j->first; j->result == 0 && i < MANY; i += 2 * THREADS) {
        struct bn_pack_item items[2] = {{i, buf}, {i + THREADS, buf + CHUNK}};
        content(i % 48, buf); /* the second half is as the first: threads race for the same bytes */
        content((i + THREADS) % 48, buf + CHUNK);
        j->result = bn_pack_writer_add_batch(j->w, items, 2, NULL);
    }
    free(buf);
    return NULL;
}

static void *read_some(void *arg)
{
    struct job *j = arg;
    uint8_t *buf = aligned_alloc(BN_PACK_ALIGN, 2 * CHUNK);
    for (uint32_t i = j->first; j->result == 0 && i < MANY; i += THREADS / 2) {
        content(i % 48, buf);
        j->result = bn_pack_reader_read(j->r, i, buf + CHUNK, NULL);
        if (j->result == 0 && memcmp(buf, buf + CHUNK, CHUNK))
            j->result = -EILSEQ;
    }
    free(buf);
    return NULL;
}

static void run_threads(void *(*body)(void *), struct bn_pack_writer *w, struct bn_pack_reader *r)
{
    pthread_t threads[THREADS];
    struct job jobs[THREADS];
    for (unsigned i = 0; i < THREADS; i++) {
        jobs[i] = (struct job){w, r, i, 0};
        assert_int_equal(pthread_create(&threads[i], NULL, body, &jobs[i]), 0);
    }
    for (unsigned i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        assert_int_equal(jobs[i].result, 0);
    }
}

static void test_threads(void **state)
{
    struct folder *f = *state;
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_manifest struct bn_manifest *m = manifest(MANY);
    struct bn_pack_writer *w = NULL;
    assert_int_equal(bn_pack_writer_open(f->fd, m->key, MANY, NULL, &w, &err), 0);
    run_threads(write_some, w, NULL);
    bn_pack_writer_finish(w, m, &err);
    no_error(&err);
    bn_pack_writer_close(w);
    assert_int_equal(bn_manifest_validate(m, &err), 0);
    assert_int_equal(bn_manifest_stored_bytes(m), 31 * CHUNK); /* of 48: 16 zero, one twice */
    assert_true(m->n_packs <= THREADS);
    struct bn_pack_reader *r = NULL;
    assert_int_equal(bn_pack_reader_open(f->fd, m, &r, &err), 0);
    run_threads(read_some, NULL, r);
    bn_pack_reader_free(r);
}

/* ---- a disk that does not take it ---- */

/* The limit on a file's size stops a write in the middle of the second chunk: a short write, then an error. */
static void test_write_error(void **state)
{
    struct folder *f = *state;
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_manifest struct bn_manifest *m = manifest(3);
    struct bn_pack_writer *w = NULL;
    assert_int_equal(bn_pack_writer_open(f->fd, m->key, 3, NULL, &w, &err), 0);
    uint8_t *buf = buffer(2);
    content(1, buf);
    content(2, buf + CHUNK);
    struct rlimit was, small;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &was), 0);
    small = (struct rlimit){3u << 20, was.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    struct bn_pack_item items[2] = {{1, buf}, {2, buf + CHUNK}};
    int r = bn_pack_writer_add_batch(w, items, 2, &err);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &was), 0);
    assert_int_equal(r, -EFBIG);
    assert_says(&err, EFBIG, "cannot write bennu-pack-0.img: File too large");
    struct bn_pack_stats st;
    bn_pack_writer_stats(w, &st);
    assert_int_equal(st.stored_bytes, 0);
    assert_int_equal(bn_pack_writer_add(w, 0, buf, NULL), -EFBIG); /* the first failure stays */
    assert_int_equal(bn_pack_writer_finish(w, m, NULL), -EFBIG);
    bn_pack_writer_close(w);
    assert_false(exists(f, "bennu-pack-0.img"));
    free(buf);
}

static void test_full(void **state)
{
    struct folder *f = *state;
    struct bn_error err = BN_ERROR_INIT;
    assert_int_equal(bn_store_check_space(f->fd, 1, &err), 0);
    assert_int_equal(bn_store_check_space(f->fd, UINT64_MAX, &err), -ENOSPC);
    assert_says(&err, ENOSPC, "GiB free, the checkpoint needs");

    char small[96];
    snprintf(small, sizeof(small), "%s/small", f->path);
    assert_int_equal(mkdir(small, 0700), 0);
    if (mount("small", small, "tmpfs", 0, "size=5m") < 0) {
        print_message("no mount(2) here (%s): the full disk is not tried\n", strerror(errno));
        skip();
    }
    int fd = open(small, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bn_auto_manifest struct bn_manifest *m = manifest(8);
    struct bn_pack_writer *w = NULL;
    err = BN_ERROR_INIT;
    int r = bn_pack_writer_open(fd, m->key, 8, NULL, &w, &err);
    uint8_t *buf = buffer(1);
    uint32_t i = 0;
    for (; r == 0 && i < 8; i++) {
        content(i, buf);
        r = bn_pack_writer_add(w, i, buf, &err);
    }
    struct bn_error again = BN_ERROR_INIT;
    int later = bn_pack_writer_add(w, 0, NULL, &again), finish = bn_pack_writer_finish(w, m, &again);
    bn_pack_writer_abort(w);
    free(buf);
    struct bn_error space = BN_ERROR_INIT;
    int enough = bn_store_check_space(fd, 5u << 20, &space),
        too_much = bn_store_check_space(fd, 6u << 20, &space);
    int fill = openat(fd, "fill", O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    char page[4096] = {0};
    while (write(fill, page, sizeof(page)) == (ssize_t)sizeof(page))
        ;
    close(fill);
    bn_auto_manifest struct bn_manifest *empty = manifest(0);
    struct bn_error unsaved = BN_ERROR_INIT;
    int saved = bn_image_save(fd, empty, &unsaved), present = bn_image_present(fd);
    int left_over = faccessat(fd, "." BN_MANIFEST_NAME ".tmp", F_OK, 0);
    int full = bn_store_check_space(fd, 4u << 20, NULL);
    renameat(fd, "fill", fd, "bennu-pack-0.img");
    int replacing = bn_store_check_space(fd, 4u << 20, NULL);
    int linked = linkat(fd, "bennu-pack-0.img", fd, "of-another", 0);
    int shared = bn_store_check_space(fd, 4u << 20, NULL);
    close(fd);
    assert_int_equal(umount(small), 0);
    assert_int_equal(saved, -ENOSPC);
    assert_says(&unsaved, ENOSPC, "cannot write bennu-manifest.img: No space left on device: make room");
    assert_int_equal(present, 0);
    assert_int_equal(left_over, -1);
    assert_int_equal(full, -ENOSPC);
    assert_int_equal(replacing, 0); /* the packs that are there make room */
    assert_int_equal(linked, 0);
    assert_int_equal(shared, -ENOSPC);
    assert_int_equal(r, -ENOSPC);
    assert_int_equal(i, 5); /* chunks 1 and 2 fit, 0 and 3 are zero, 4 does not */
    assert_says(&err, ENOSPC, "cannot write bennu-pack-0.img: No space left on device");
    assert_int_equal(later, -ENOSPC);
    assert_int_equal(finish, -ENOSPC);
    assert_string_equal(again.text, err.text);
    assert_int_equal(enough, 0); /* abort gave the room back */
    assert_int_equal(too_much, -ENOSPC);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_round_trip, setup, teardown),
        cmocka_unit_test_setup_teardown(test_empty, setup, teardown),
        cmocka_unit_test_setup_teardown(test_batch_and_rollover, setup, teardown),
        cmocka_unit_test_setup_teardown(test_chunk_again, setup, teardown),
        cmocka_unit_test_setup_teardown(test_unfinished, setup, teardown),
        cmocka_unit_test_setup_teardown(test_damaged_pack, setup, teardown),
        cmocka_unit_test_setup_teardown(test_damaged_manifest, setup, teardown),
        cmocka_unit_test_setup_teardown(test_wrong_manifest_not_saved, setup, teardown),
        cmocka_unit_test_setup_teardown(test_threads, setup, teardown),
        cmocka_unit_test_setup_teardown(test_write_error, setup, teardown),
        cmocka_unit_test_setup_teardown(test_full, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
