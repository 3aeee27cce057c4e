/* Checkpoints that share bytes: what is linked, what is copied, and that each folder is complete by itself. */
#include "images.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mount.h>
#include <unistd.h>

static void test_link(void **state)
{
    struct folder first = below(*state, "first"), second = below(*state, "second"),
                  third = below(*state, "third");
    const uint64_t a[] = {1, 2, 3, 4, 0, 5}, b[] = {9, 2, 3, 4, 5, 0, 2, 9}, c[] = {9, 2, 3, 4, 5, 1};
    struct bn_pack_stats st;
    unsigned packs, shared;
    bn_auto_manifest struct bn_manifest *ma = image(&first, a, 6, NULL, (struct bn_pack_options){0}, NULL);
    struct bn_pack_parent pa = {first.fd, ma};
    bn_auto_manifest struct bn_manifest *mb = image(&second, b, 8, &pa, (struct bn_pack_options){0}, &st);
    assert_int_equal(st.chunks, 8);
    assert_int_equal(st.zero_chunks, 1);
    assert_int_equal(st.same_chunks, 1);   /* the second 9 */
    assert_int_equal(st.parent_chunks, 5); /* 2 3 4 5 2 */
    assert_int_equal(st.stored_bytes, CHUNK);
    assert_int_equal(st.linked_bytes, 4 * CHUNK);
    assert_int_equal(st.copied_bytes, 0);
    packs_in(&second, &packs, &shared);
    assert_int_equal(packs, 2);
    assert_int_equal(shared, 1);
    check(&second, b, 8);

    /* The grandchild is of one family with both, and needs nothing new. */
    struct bn_pack_parent pb = {second.fd, mb};
    bn_auto_manifest struct bn_manifest *mc = image(&third, c, 6, &pb, (struct bn_pack_options){0}, &st);
    assert_int_equal(st.parent_chunks, 5);
    assert_int_equal(st.stored_bytes, CHUNK); /* 1 is in the first only, which is no parent of it */
    (void)mc;
    remove_folder(&first);
    check(&second, b, 8);
    remove_folder(&second);
    check(&third, c, 6);
    packs_in(&third, &packs, &shared);
    assert_int_equal(packs, 3);
    assert_int_equal(shared, 0);
    bn_close(third.fd);
}

/* Of a pack that is used but a little the bytes are copied: the folder is not to carry it all. */
static void test_copy_little(void **state)
{
    struct folder first = below(*state, "first"), second = below(*state, "second");
    const uint64_t a[] = {1, 2, 3, 4, 5, 6, 7, 8}, b[] = {6, 20, 3, 8};
    struct bn_pack_stats st;
    unsigned packs, shared;
    bn_auto_manifest struct bn_manifest *ma = image(&first, a, 8, NULL, (struct bn_pack_options){0}, NULL);
    struct bn_pack_parent pa = {first.fd, ma};
    bn_auto_manifest struct bn_manifest *mb = image(&second, b, 4, &pa, (struct bn_pack_options){0}, &st);
    assert_int_equal(st.stored_bytes, CHUNK);
    assert_int_equal(st.linked_bytes, 0);
    assert_int_equal(st.copied_bytes, 3 * CHUNK);
    packs_in(&second, &packs, &shared);
    assert_int_equal(packs, 1);
    assert_int_equal(shared, 0);
    assert_int_equal(mb->packs[0].length, 4 * CHUNK);
    check(&second, b, 4);
    bn_close(first.fd);
    bn_close(second.fd);
}

/* Two parents that share a pack themselves: it is linked once. And a parent that is removed while the child is written. */
static void test_two_parents(void **state)
{
    struct folder first = below(*state, "first"), second = below(*state, "second"),
                  third = below(*state, "third"), fourth = below(*state, "fourth");
    const uint64_t a[] = {1, 2, 3, 4}, b[] = {1, 2, 3, 4, 5, 6}, c[] = {1, 2, 3, 4, 5, 6, 7};
    bn_auto_manifest struct bn_manifest *ma = image(&first, a, 4, NULL, (struct bn_pack_options){0}, NULL);
    struct bn_pack_parent both[2] = {{first.fd, ma}, {second.fd, NULL}};
    bn_auto_manifest struct bn_manifest *mb =
        image(&second, b, 6, &both[0], (struct bn_pack_options){0}, NULL);
    both[1].m = mb;
    for (int again = 0; again < 2; again++) {
        struct folder *f = again ? &fourth : &third;
        struct bn_pack_stats st;
        unsigned packs, shared;
        bn_auto_manifest struct bn_manifest *m = manifest(7);
        memcpy(m->key, ma->key, sizeof(m->key));
        struct bn_pack_writer *w = writer(f->fd, m, (struct bn_pack_options){.parents = both, .nparents = 2});
        put(w, c, 7);
        if (again) { /* third links the packs of the first two, too: it has to go as well */
            remove_folder(&first);
            remove_folder(&second);
            remove_folder(&third);
        }
        finish(f, w, m, &st);
        assert_int_equal(st.stored_bytes, CHUNK);
        assert_int_equal(st.linked_bytes, again ? 0 : 6 * CHUNK);
        assert_int_equal(st.copied_bytes, again ? 6 * CHUNK : 0);
        packs_in(f, &packs, &shared);
        assert_int_equal(packs, again ? 1 : 3);
        assert_int_equal(shared, again ? 0 : 2);
        check(f, c, 7);
    }
    bn_close(fourth.fd);
}

static void test_place(void **state)
{
    struct folder first = below(*state, "first"), second = below(*state, "second");
    const uint64_t a[] = {1, 2}, b[] = {2, 3, 0, 3, 1};
    struct bn_error err = BN_ERROR_INIT;
    struct bn_pack_stats st;
    struct bn_hash h[5];
    bn_auto_manifest struct bn_manifest *ma = image(&first, a, 2, NULL, (struct bn_pack_options){0}, NULL);
    bn_auto_manifest struct bn_manifest *mb = manifest(5);
    memcpy(mb->key, ma->key, sizeof(mb->key));
    struct bn_pack_parent pa = {first.fd, ma};
    struct bn_pack_writer *w = writer(second.fd, mb, (struct bn_pack_options){.parents = &pa, .nparents = 1});
    uint8_t *buf = buffer(1);
    for (unsigned i = 0; i < 5; i++) {
        fill(b[i], buf);
        hash_of(mb, b[i] ? buf : memset(buf, 0, CHUNK), &h[i]);
    }
    assert_int_equal(bn_pack_writer_place(w, 0, &h[0]), 1);
    assert_int_equal(bn_pack_writer_place(w, 1, &h[1]), 0);
    assert_int_equal(bn_pack_writer_place(w, 2, &h[2]), 1);
    assert_int_equal(bn_pack_writer_place(w, 3, &h[3]), 0);
    assert_int_equal(bn_pack_writer_place(w, 4, &h[4]), 1);
    assert_int_equal(bn_pack_writer_place(w, 5, &h[4]), -EINVAL);
    assert_int_equal(bn_pack_writer_finish(w, mb, &err), -EINVAL);
    assert_says(&err, EINVAL, "chunk 1 was never written");
    fill(3, buf);
    assert_int_equal(bn_pack_writer_add(w, 1, buf, NULL), 0);
    free(buf);
    assert_int_equal(bn_pack_writer_place(w, 3, &h[3]), 1);
    finish(&second, w, mb, &st);
    assert_int_equal(st.chunks, 5);
    assert_int_equal(st.zero_chunks, 1);
    assert_int_equal(st.same_chunks, 1);
    assert_int_equal(st.parent_chunks, 2);
    assert_int_equal(st.stored_bytes, CHUNK);
    check(&second, b, 5);
    bn_close(first.fd);
    bn_close(second.fd);
}

static void test_parent_refused(void **state)
{
    struct folder first = below(*state, "first"), second = below(*state, "second");
    const uint64_t a[] = {1, 2};
    struct bn_error err = BN_ERROR_INIT;
    struct bn_pack_writer *w = NULL;
    bn_auto_manifest struct bn_manifest *ma = image(&first, a, 2, NULL, (struct bn_pack_options){0}, NULL);
    bn_auto_manifest struct bn_manifest *mb = manifest(2);
    struct bn_pack_parent pa = {first.fd, ma};
    struct bn_pack_options o = {.parents = &pa, .nparents = 1};
    assert_int_equal(bn_pack_writer_open(second.fd, mb->key, 2, &o, &w, &err), -EINVAL);
    assert_says(&err, EINVAL, "the parent checkpoint: its chunks are hashed with another key");
    memcpy(mb->key, ma->key, sizeof(mb->key));
    int fd = openat(first.fd, "bennu-pack-0.img", O_WRONLY);
    assert_int_equal(ftruncate(fd, CHUNK), 0);
    close(fd);
    err = BN_ERROR_INIT;
    assert_int_equal(bn_pack_writer_open(second.fd, mb->key, 2, &o, &w, &err), -EBADMSG);
    assert_says(&err, EBADMSG, "the parent checkpoint: bennu-pack-0.img is truncated");
    assert_int_equal(unlinkat(first.fd, "bennu-pack-0.img", 0), 0);
    err = BN_ERROR_INIT;
    assert_int_equal(bn_pack_writer_open(second.fd, mb->key, 2, &o, &w, &err), -ENOENT);
    assert_null(w);
    bn_close(first.fd);
    bn_close(second.fd);
}

/* A dump that fails takes its own names away and nobody else's. */
static void test_abort_keeps_parent(void **state)
{
    struct folder first = below(*state, "first"), second = below(*state, "second");
    const uint64_t a[] = {1, 2, 3}, b[] = {1, 2, 4};
    unsigned packs, shared;
    bn_auto_manifest struct bn_manifest *ma = image(&first, a, 3, NULL, (struct bn_pack_options){0}, NULL);
    bn_auto_manifest struct bn_manifest *mb = manifest(3);
    memcpy(mb->key, ma->key, sizeof(mb->key));
    struct bn_pack_parent pa = {first.fd, ma};
    struct bn_pack_writer *w = writer(second.fd, mb, (struct bn_pack_options){.parents = &pa, .nparents = 1});
    put(w, b, 3);
    assert_int_equal(bn_pack_writer_finish(w, mb, NULL), 0);
    packs_in(&second, &packs, &shared);
    assert_int_equal(packs, 2);
    bn_pack_writer_abort(w);
    packs_in(&second, &packs, &shared);
    assert_int_equal(packs, 0);
    check(&first, a, 3);
    bn_close(first.fd);
    bn_close(second.fd);
}

/* A pre-dump's packs under a dump with other segments, in another folder, one that fits and one on another file system. */
static void relayout_into(const struct folder *from, const struct folder *to)
{
    const uint64_t a[] = {1, 2, 3, 4}, b[] = {3, 5, 1};
    struct bn_pack_stats st;
    struct bn_error err = BN_ERROR_INIT;
    unsigned packs, shared;
    bn_auto_manifest struct bn_manifest *first = manifest(4), *m = manifest(3);
    memcpy(m->key, first->key, sizeof(m->key));
    struct bn_pack_writer *w = writer(from->fd, first, (struct bn_pack_options){0});
    put(w, a, 4);

    close(openat(to->fd, "bennu-pack-0.img", O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    assert_int_equal(bn_pack_writer_retarget(w, to->fd, &err), -EEXIST);
    assert_says(&err, EEXIST, "already holds bennu-pack-0.img");
    packs_in(from, &packs, &shared);
    assert_int_equal(packs, 1);
    assert_int_equal(shared, 0);
    assert_int_equal(unlinkat(to->fd, "bennu-pack-0.img", 0), 0);

    err = BN_ERROR_INIT;
    bn_pack_writer_retarget(w, to->fd, &err);
    no_error(&err);
    packs_in(from, &packs, &shared);
    assert_int_equal(packs, 0);
    assert_int_equal(bn_pack_writer_relayout(w, BN_MANIFEST_CHUNKS_MAX + 1, &err), -EINVAL);
    assert_int_equal(bn_pack_writer_relayout(w, 3, NULL), 0);
    assert_int_equal(bn_pack_writer_finish(w, m, NULL), -EINVAL); /* none of them is there yet */
    put(w, b, 3);
    finish(to, w, m, &st);
    assert_int_equal(st.chunks, 3);
    assert_int_equal(st.same_chunks, 2);
    assert_int_equal(st.stored_bytes, 5 * CHUNK);
    check(to, b, 3);
}

static void test_retarget(void **state)
{
    struct folder first = below(*state, "first"), second = below(*state, "second");
    relayout_into(&first, &second);
    bn_close(first.fd);
    bn_close(second.fd);
}

static void test_other_file_system(void **state)
{
    struct folder there = below(*state, "there"), first = below(*state, "first"), other, moved;
    if (mount("other", there.path, "tmpfs", 0, "size=64m") < 0) {
        bn_close(there.fd);
        bn_close(first.fd);
        print_message("no mount(2) here (%s): other file systems are not tried\n", strerror(errno));
        skip();
    }
    bn_close(there.fd);
    there.fd = open(there.path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    other = below(&there, "other");
    moved = below(&there, "moved");
    const uint64_t a[] = {1, 2, 3}, b[] = {1, 2, 4};
    struct bn_pack_stats st;
    bn_auto_manifest struct bn_manifest *ma = image(&first, a, 3, NULL, (struct bn_pack_options){0}, NULL);
    struct bn_pack_parent pa = {first.fd, ma};
    bn_auto_manifest struct bn_manifest *mb = image(&other, b, 3, &pa, (struct bn_pack_options){0}, &st);
    assert_int_equal(st.linked_bytes, 0);
    assert_int_equal(st.copied_bytes, 2 * CHUNK);
    check(&other, b, 3);
    remove_folder(&first);
    first = below(*state, "first");
    relayout_into(&first, &moved);
    bn_close(first.fd);
    bn_close(other.fd);
    bn_close(moved.fd);
    bn_close(there.fd);
    assert_int_equal(umount(there.path), 0);
}

/* Many packs, and a pack of which nothing is used in the end. */
static void test_many_packs(void **state)
{
    struct folder first = below(*state, "first"), second = below(*state, "second");
    uint64_t a[24], b[24];
    unsigned packs, shared;
    struct bn_pack_stats st;
    for (unsigned i = 0; i < 24; i++) {
        a[i] = 100 + i;
        b[i] = i < 8 ? 100 + i : i < 10 ? 200 + i : 110 + i % 2; /* of pack 1 a quarter, of pack 2 nothing */
    }
    struct bn_pack_options small = {.pack_bytes = 1};
    bn_auto_manifest struct bn_manifest *ma = image(&first, a, 24, NULL, small, NULL);
    assert_int_equal(ma->n_packs, 3);
    struct bn_pack_parent pa = {first.fd, ma};
    bn_auto_manifest struct bn_manifest *mb = image(&second, b, 24, &pa, small, &st);
    assert_int_equal(st.stored_bytes, 2 * CHUNK);
    assert_int_equal(st.linked_bytes, 8 * CHUNK);
    assert_int_equal(st.copied_bytes, 2 * CHUNK);
    packs_in(&second, &packs, &shared);
    assert_int_equal(packs, 2);
    assert_int_equal(shared, 1);
    check(&second, b, 24);

    /* Chunks that were added and then added anew leave a pack without use behind: it goes, and the numbers have a gap. */
    struct folder third = below(*state, "third");
    bn_auto_manifest struct bn_manifest *m = manifest(24);
    struct bn_pack_writer *w = writer(third.fd, m, small);
    put(w, a, 24);
    for (unsigned i = 0; i < 24; i++)
        a[i] = i < 16 ? 116 + i % 8 : a[i];
    put(w, a, 24);
    finish(&third, w, m, &st);
    assert_int_equal(m->n_packs, 1);
    assert_int_equal(m->packs[0].index, 2);
    assert_false(exists(&third, "bennu-pack-0.img"));
    check(&third, a, 24);
    bn_close(first.fd);
    bn_close(second.fd);
    bn_close(third.fd);
}

/* Chunks that shrink and chunks that do not, in one image; and one that shares them, with other options. */
static void test_compressed(void **state)
{
    struct folder first = below(*state, "first"), second = below(*state, "second");
    struct bn_error err = BN_ERROR_INIT;
    uint8_t *buf = buffer(BN_PACK_BATCH), *got = buffer(BN_PACK_BATCH);
    for (unsigned i = 0; i < BN_PACK_BATCH; i++) {
        if (i % 2)
            memset(buf + i * CHUNK, (int)i, CHUNK); /* nearly nothing is left of it */
        else
            fill(i + 1, buf + i * CHUNK); /* nothing is gained with it */
    }
    bn_auto_manifest struct bn_manifest *m = manifest(BN_PACK_BATCH);
    struct bn_pack_writer *w = writer(first.fd, m, (struct bn_pack_options){0});
    assert_int_equal(bn_pack_writer_compress(w, 100, &err), -EINVAL);
    assert_says(&err, EINVAL, "levels from 1 to 19, not 100");
    assert_int_equal(bn_pack_writer_compress(w, 3, NULL), 0);
    struct bn_pack_item items[BN_PACK_BATCH];
    for (unsigned i = 0; i < BN_PACK_BATCH; i++)
        items[i] = (struct bn_pack_item){i, buf + i * CHUNK};
    assert_int_equal(bn_pack_writer_add_batch(w, items, BN_PACK_BATCH, NULL), 0);
    struct bn_pack_stats st;
    finish(&first, w, m, &st);
    assert_true(m->incompat & BN_MANIFEST_INCOMPAT_ZSTD);
    assert_int_equal(st.stored_bytes, m->packs[0].length);
    assert_true(st.stored_bytes < 5 * CHUNK);
    for (unsigned i = 0; i < BN_PACK_BATCH; i++) {
        assert_int_equal(m->chunks[i].encoding, i % 2 ? BN_ENCODING_ZSTD : BN_ENCODING_RAW);
        assert_int_equal(m->chunks[i].offset % BN_PACK_ALIGN, 0);
    }

    /* The child does not compress, and has both forms all the same; of its parent's pack it copies a part. */
    struct bn_pack_parent p = {first.fd, m};
    bn_auto_manifest struct bn_manifest *child = manifest(3);
    memcpy(child->key, m->key, sizeof(child->key));
    w = writer(second.fd, child, (struct bn_pack_options){.parents = &p, .nparents = 1});
    for (unsigned i = 0; i < 3; i++)
        assert_int_equal(bn_pack_writer_add(w, i, buf + (3 - i) * CHUNK, NULL), 0);
    finish(&second, w, child, &st);
    assert_int_equal(st.copied_bytes, m->chunks[1].length + m->chunks[2].length + m->chunks[3].length);
    assert_true(child->incompat & BN_MANIFEST_INCOMPAT_ZSTD);
    struct bn_pack_reader *r = NULL;
    assert_int_equal(bn_pack_reader_open(second.fd, child, &r, NULL), 0);
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(bn_pack_reader_read(r, i, got, NULL), 0);
        assert_int_equal(memcmp(got, buf + (3 - i) * CHUNK, CHUNK), 0);
    }
    bn_pack_reader_free(r);

    bn_auto_manifest struct bn_manifest *loaded = NULL;
    bn_image_load(first.fd, &loaded, &err);
    assert_int_equal(bn_pack_reader_open(first.fd, loaded, &r, NULL), 0);
    assert_int_equal(bn_pack_reader_read_batch(r, 0, BN_PACK_BATCH, got, BN_PACK_VERIFY, NULL), 0);
    assert_int_equal(memcmp(got, buf, BN_PACK_BATCH * CHUNK), 0);

    /* Another's bytes in the place of a frame: rubbish, and a frame that is right but another one's. */
    const struct bn_image_chunk *one = &loaded->chunks[1], *three = &loaded->chunks[3];
    int fd = openat(first.fd, "bennu-pack-0.img", O_RDWR | O_CLOEXEC);
    bn_auto_free uint8_t *frame = malloc(one->length);
    assert_int_equal(pread(fd, frame, one->length, (off_t)three->offset), one->length);
    assert_int_equal(pwrite(fd, frame, one->length, (off_t)one->offset), one->length);
    err = BN_ERROR_INIT;
    assert_int_equal(bn_pack_reader_read(r, 1, got, &err), -EBADMSG);
    assert_says(&err, EBADMSG, "chunk 1 (process 42");
    assert_int_equal(pwrite(fd, "rubbish", 7, (off_t)one->offset), 7);
    err = BN_ERROR_INIT;
    assert_int_equal(bn_pack_reader_read_unverified(r, 1, got, &err), -EBADMSG);
    assert_says(&err, EBADMSG, "cannot be decompressed");
    bn_pack_reader_free(r);
    close(fd);
    free(buf);
    free(got);
    bn_close(first.fd);
    bn_close(second.fd);
}

static void test_lock(void **state)
{
    struct folder *f = *state;
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_manifest struct bn_manifest *m = manifest(1);
    struct bn_pack_writer *w = writer(f->fd, m, (struct bn_pack_options){0});
    assert_int_equal(bn_image_lock(f->fd, true, &err), -EBUSY);
    assert_says(&err, EBUSY, "being written or read");
    int shared = bn_image_lock(f->fd, false, NULL);
    assert_true(shared >= 0);
    bn_pack_writer_abort(w);
    assert_int_equal(bn_image_lock(f->fd, true, NULL), -EBUSY);
    close(shared);
    int alone = bn_image_lock(f->fd, true, NULL);
    assert_true(alone >= 0);
    err = BN_ERROR_INIT;
    w = NULL;
    assert_int_equal(bn_pack_writer_open(f->fd, m->key, 1, NULL, &w, &err), -EBUSY);
    assert_says(&err, EBUSY, "being removed or rewritten");
    close(alone);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_link, setup, teardown),
        cmocka_unit_test_setup_teardown(test_copy_little, setup, teardown),
        cmocka_unit_test_setup_teardown(test_two_parents, setup, teardown),
        cmocka_unit_test_setup_teardown(test_place, setup, teardown),
        cmocka_unit_test_setup_teardown(test_parent_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_abort_keeps_parent, setup, teardown),
        cmocka_unit_test_setup_teardown(test_retarget, setup, teardown),
        cmocka_unit_test_setup_teardown(test_other_file_system, setup, teardown),
        cmocka_unit_test_setup_teardown(test_many_packs, setup, teardown),
        cmocka_unit_test_setup_teardown(test_compressed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_lock, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
