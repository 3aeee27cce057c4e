/* Collecting in a store, killed before each of its system calls: every checkpoint stays whole. And what verify finds.
 *
 * Linked with --wrap for the calls below, so that a countdown can end the process before any of them. */
#include "images.h"

#include "base/io.h"
#include "store/catalog.h"
#include "store/collect.h"
#include "store/verify.h"

#include <errno.h>
#include <signal.h>
#include <sys/wait.h>

/* ---- the countdown ---- */

static long countdown = -1; /* calls that are still let through; negative: all */

static void step(void)
{
    if (countdown == 0)
        raise(SIGKILL);
    countdown -= countdown > 0;
}

#define WRAP(type, name, parameters, arguments) \
    type __real_##name parameters;              \
    type __wrap_##name parameters;              \
    type __wrap_##name parameters               \
    {                                           \
        step();                                 \
        return __real_##name arguments;         \
    }
WRAP(int, unlinkat, (int dirfd, const char *name, int flags), (dirfd, name, flags))
WRAP(int, renameat, (int from, const char *old, int to, const char *new), (from, old, to, new))
WRAP(int, linkat, (int from, const char *old, int to, const char *new, int flags),
     (from, old, to, new, flags))
WRAP(int, ftruncate64, (int fd, off_t length), (fd, length)) /* as ftruncate is called with 64-bit offsets */
WRAP(ssize_t, write, (int fd, const void *data, size_t n), (fd, data, n))
WRAP(ssize_t, copy_file_range, (int from, off_t *a, int to, off_t *b, size_t n, unsigned flags),
     (from, a, to, b, n, flags))

/* A folder that can be synced once, before its manifest is replaced, and not again. */
static ino_t broken_folder;
static unsigned folder_syncs;

int __real_fsync(int fd);
int __wrap_fsync(int fd);
int __wrap_fsync(int fd)
{
    struct stat st;
    step();
    if (broken_folder && fstat(fd, &st) == 0 && st.st_ino == broken_folder && ++folder_syncs > 1) {
        errno = EIO;
        return -1;
    }
    return __real_fsync(fd);
}

/* ---- a store ---- */

/* Three checkpoints of one family. Of the first pack, `little` and `other` use three of eight chunks together, of the second all is
 * used; the first checkpoint, which used everything, is gone. */
static const uint64_t all[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, little[] = {1, 2, 20, 0, 9, 10},
                      other[] = {2, 3, 2, 30};

static struct folder reopen(const struct folder *f, const char *name)
{
    struct folder sub = {.fd = -1};
    assert_true(snprintf(sub.path, sizeof(sub.path), "%s/%s", f->path, name) < (int)sizeof(sub.path));
    sub.fd = open(sub.path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_true(sub.fd >= 0);
    return sub;
}

static uint64_t size_of(const struct folder *f, const char *name)
{
    struct stat st;
    assert_int_equal(fstatat(f->fd, name, &st, AT_SYMLINK_NOFOLLOW), 0);
    return (uint64_t)st.st_size;
}

/* An image whose manifest refers to packs of the parent as they are, however little it uses of them: what is left when the others
 * that used them are gone. */
static struct bn_manifest *link_all(const struct folder *f, const struct folder *from,
                                    const struct bn_manifest *parent, const uint64_t *seeds, uint32_t n)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_manifest *m = manifest(n);
    memcpy(m->key, parent->key, sizeof(m->key));
    struct bn_pack_writer *w = writer(f->fd, m, (struct bn_pack_options){0});
    uint64_t own[16];
    for (uint32_t i = 0; i < n; i++)
        own[i] = seeds[i] <= 10 ? 0 : seeds[i];
    put(w, own, n);
    bn_pack_writer_finish(w, m, &err);
    no_error(&err);
    bn_pack_writer_close(w);
    for (uint32_t i = 0; i < n; i++)
        if (seeds[i] && seeds[i] <= 10) { /* the parent has seed s as chunk s - 1 */
            m->chunks[i] = parent->chunks[seeds[i] - 1];
            m->chunks[i].pack += 10;
        }
    free(m->packs);
    m->packs = calloc(8, sizeof(*m->packs));
    m->n_packs = 0;
    for (uint32_t number = 0; number < 20; number++) {
        char name[BN_PACK_NAME_MAX], old[BN_PACK_NAME_MAX];
        bool used = false;
        for (uint32_t i = 0; i < n; i++)
            used = used || (!(m->chunks[i].flags & BN_CHUNK_ZERO) && m->chunks[i].pack == number);
        snprintf(name, sizeof(name), BN_PACK_NAME, number);
        if (used && number >= 10) {
            snprintf(old, sizeof(old), BN_PACK_NAME, number - 10);
            assert_int_equal(linkat(from->fd, old, f->fd, name, 0), 0);
        }
        if (used)
            m->packs[m->n_packs++] = (struct bn_image_pack){number, size_of(f, name)};
        else
            unlinkat(f->fd, name, 0);
    }
    bn_image_save(f->fd, m, &err);
    no_error(&err);
    return m;
}

static void make_family(const struct folder *f, const char *one, const char *two)
{
    struct folder first = below(f, "first"), second = below(f, one), third = below(f, two);
    struct bn_pack_options small = {.pack_bytes = 1}; /* of 8 chunks */
    bn_auto_manifest struct bn_manifest *m = image(&first, all, 10, NULL, small, NULL);
    bn_auto_manifest struct bn_manifest *a = link_all(&second, &first, m, little, 6);
    bn_auto_manifest struct bn_manifest *b = link_all(&third, &first, m, other, 4);
    close(openat(second.fd, "inventory.img", O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    remove_folder(&first);
    bn_close(second.fd);
    bn_close(third.fd);
}

static void make_store(const struct folder *f)
{
    make_family(f, "second", "third");
    struct folder torn = below(f, "torn");
    close(openat(torn.fd, "bennu-pack-0.img", O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    close(openat(torn.fd, "core-1.img", O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    bn_close(torn.fd);
}

static void check_store(const struct folder *f)
{
    struct folder second = reopen(f, "second"), third = reopen(f, "third");
    check(&second, little, 6);
    check(&third, other, 4);
    bn_close(second.fd);
    bn_close(third.fd);
}

static uint64_t used_bytes(const struct folder *f, const char *name)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_catalog c;
    bn_catalog_read_one(f->fd, name, &c, &err);
    no_error(&err);
    uint64_t bytes = c.entries[0].own + c.entries[0].shared;
    bn_catalog_free(&c);
    return bytes;
}

static void never(void *arg, const struct bn_error *why)
{
    (void)arg;
    fail_msg("skipped: %s", why->text);
}

static struct bn_collected collect(const struct folder *f)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_collected c;
    bn_collect(f->fd, never, NULL, &c, &err);
    no_error(&err);
    return c;
}

static void test_collect(void **state)
{
    struct folder *f = *state;
    make_store(f);
    assert_int_equal(used_bytes(f, "second"), 11 * CHUNK); /* 8 + 2, and one of its own */
    struct bn_collected c = collect(f);
    assert_int_equal(c.folders, 1);
    assert_int_equal(c.leftovers, 0);
    assert_int_equal(c.rewritten, 1);
    assert_int_equal(c.bytes, 5 * CHUNK); /* of 8, 3 are used */
    assert_int_equal(faccessat(f->fd, "torn", F_OK, 0), -1);
    check_store(f);
    assert_int_equal(used_bytes(f, "second"), 6 * CHUNK);
    assert_int_equal(used_bytes(f, "third"), 4 * CHUNK);
    c = collect(f);
    assert_int_equal(c.folders + c.leftovers + c.rewritten, 0);
    check_store(f);
}

static void test_killed_anywhere(void **state)
{
    struct folder *f = *state;
    bool done = false;
    unsigned killed = 0;
    for (long at = 0; !done; at++) {
        char name[32];
        snprintf(name, sizeof(name), "s%ld", at);
        struct folder store = below(f, name);
        make_store(&store);
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            struct bn_collected c;
            countdown = at;
            _exit(bn_collect(store.fd, NULL, NULL, &c, NULL) == 0 ? 0 : 1);
        }
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        done = WIFEXITED(status);
        if (done)
            assert_int_equal(WEXITSTATUS(status), 0);
        else {
            assert_int_equal(WTERMSIG(status), SIGKILL);
            killed++;
        }
        check_store(&store);
        collect(&store); /* and the next one cleans up behind it */
        check_store(&store);
        assert_int_equal(faccessat(store.fd, "torn", F_OK, 0), -1);
        struct bn_collected c = collect(&store);
        assert_int_equal(c.folders + c.leftovers + c.rewritten, 0);
        /* One that had not gone over yet has what it needs for itself, no longer what both need. */
        assert_int_equal(used_bytes(&store, "second"), 6 * CHUNK);
        assert_in_range(used_bytes(&store, "third"), 3 * CHUNK, 4 * CHUNK);
        remove_folder(&store);
    }
    assert_true(killed >= 15);
}

/* The manifest was replaced, but may not be on the disk: whichever of the two a crash leaves, its packs are there. */
static void test_unsafe_manifest(void **state)
{
    struct folder *f = *state;
    static const char *const names[] = {"second", "third"};
    for (size_t i = 0; i < 2; i++) {
        struct folder store = below(f, names[i]);
        make_store(&store);
        struct folder folder = reopen(&store, names[i]);
        bn_auto_manifest struct bn_manifest *before = NULL;
        struct bn_pack_reader *reader = NULL;
        struct bn_error err = BN_ERROR_INIT;
        struct bn_collected c;
        struct stat st;
        bn_image_load(folder.fd, &before, &err);
        no_error(&err);
        assert_int_equal(fstat(folder.fd, &st), 0);
        folder_syncs = 0;
        broken_folder = st.st_ino;
        assert_int_equal(bn_collect(store.fd, never, NULL, &c, &err), -EIO);
        broken_folder = 0;
        assert_int_equal(folder_syncs, 2);
        check_store(&store);
        err = BN_ERROR_INIT;
        bn_pack_reader_open(folder.fd, before, &reader, &err);
        no_error(&err);
        bn_pack_reader_free(reader);
        collect(&store);
        check_store(&store);
        bn_close(folder.fd);
        remove_folder(&store);
    }
}

/* The store is collected all the same: which of the two families comes first does not matter. */
static void test_one_cannot_be_written(void **state)
{
    struct folder *f = *state;
    static const char *const names[] = {"second", "fourth", "third", "fifth"};
    for (size_t i = 0; i < 4; i++) {
        struct folder store = below(f, names[i]);
        make_store(&store);
        make_family(&store, "fourth", "fifth");
        struct folder folder = reopen(&store, names[i]);
        struct bn_error err = BN_ERROR_INIT;
        struct bn_collected c;
        struct stat st;
        char says[64];
        assert_int_equal(fstat(folder.fd, &st), 0);
        folder_syncs = 0;
        broken_folder = st.st_ino;
        bn_collect(store.fd, never, NULL, &c, &err);
        broken_folder = 0;
        snprintf(says, sizeof(says), "%s: left alone: cannot write", names[i]);
        assert_says(&err, EIO, says);
        assert_int_equal(c.rewritten, 1);
        assert_int_equal(c.bytes, 5 * CHUNK);
        assert_int_equal(c.folders, 1);
        assert_int_equal(used_bytes(&store, i % 2 ? "second" : "fourth"), 6 * CHUNK);
        check_store(&store);
        collect(&store);
        check_store(&store);
        bn_close(folder.fd);
        remove_folder(&store);
    }
}

static unsigned skips;
static struct bn_error last_skip;

static void note(void *arg, const struct bn_error *why)
{
    (void)arg;
    skips++;
    last_skip = *why;
}

static void assert_skips(const struct folder *f, const char *says)
{
    struct bn_collected c;
    struct bn_error err = BN_ERROR_INIT;
    skips = 0;
    bn_collect(f->fd, note, NULL, &c, &err);
    no_error(&err);
    assert_true(skips > 0);
    assert_says(&last_skip, EAGAIN, says);
    assert_int_equal(c.skipped, skips);
    assert_int_equal(c.rewritten, 0);
}

static void test_skips(void **state)
{
    struct folder *f = *state;
    make_store(f);
    struct folder second = reopen(f, "second"), torn = reopen(f, "torn");
    /* In use by a writer, by a reader, by a file of somebody else's; shared with the outside; damaged. */
    int lock = bn_image_lock(torn.fd, false, NULL), held = bn_image_lock(second.fd, false, NULL);
    assert_true(lock >= 0 && held >= 0);
    struct bn_catalog c;
    assert_int_equal(bn_catalog_read_one(f->fd, "torn", &c, NULL), 0);
    assert_int_equal(c.entries[0].state, BN_ENTRY_WRITING);
    bn_catalog_free(&c);
    assert_skips(f, "second: shares a pack of which little is used, but is in use");
    assert_true(exists(&torn, "core-1.img"));
    close(lock);
    close(held);
    assert_int_equal(symlinkat("/etc/passwd", torn.fd, "notes.img"), 0);
    assert_int_equal(linkat(second.fd, "bennu-pack-10.img", f->fd, "elsewhere", 0), 0);
    assert_skips(f, "shares a pack of which little is used with one elsewhere");
    assert_int_equal(skips, 2);
    assert_true(exists(&torn, "core-1.img"));
    assert_int_equal(unlinkat(torn.fd, "notes.img", 0), 0);
    assert_int_equal(unlinkat(f->fd, "elsewhere", 0), 0);
    int fd = openat(second.fd, "bennu-pack-10.img", O_RDWR | O_CLOEXEC);
    uint8_t was, now;
    assert_int_equal(bn_pread_full(fd, &was, 1, 100), 0);
    now = was ^ 1;
    assert_int_equal(bn_pwrite_full(fd, &now, 1, 100), 0);
    assert_skips(f, "is damaged: its bytes in bennu-pack-10.img");
    assert_false(exists(&torn, "core-1.img"));
    assert_int_equal(bn_pwrite_full(fd, &was, 1, 100), 0);
    close(fd);
    int all_of_it = bn_image_lock(f->fd, true, NULL);
    struct bn_collected none;
    struct bn_error err = BN_ERROR_INIT;
    assert_int_equal(bn_collect(f->fd, NULL, NULL, &none, &err), -EBUSY);
    assert_says(&err, EBUSY, "another collection is under way");
    close(all_of_it);
    assert_int_equal(collect(f).rewritten, 1);
    check_store(f);
    bn_close(second.fd);
    bn_close(torn.fd);
}

static void test_catalog(void **state)
{
    struct folder *f = *state;
    make_store(f);
    struct bn_error err = BN_ERROR_INIT;
    struct bn_catalog c;
    struct folder not_ours = below(f, "not-ours"), criu = below(f, "criu"), disks = below(f, "disks"),
                  begun = below(f, "begun");
    /* No checkpoint, whatever the names; and one of which the record of the command is all. */
    close(openat(disks.fd, "disk.img", O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    close(openat(disks.fd, "disk.log", O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    close(openat(begun.fd, "bennu-command.json", O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    close(openat(begun.fd, "dump.log", O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    close(openat(not_ours.fd, "notes.txt", O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    assert_int_equal(symlinkat("second", f->fd, "link"), 0);
    int fd = openat(criu.fd, "inventory.img", O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    assert_int_equal(write(fd, "x", 1), 1);
    close(fd);
    struct folder third = reopen(f, "third");
    fd = openat(third.fd, BN_MANIFEST_NAME, O_RDWR | O_CLOEXEC);
    assert_int_equal(bn_pwrite_full(fd, "?", 1, 60), 0);
    close(fd);
    bn_catalog_read(f->fd, &c, &err);
    no_error(&err);
    assert_int_equal(c.n, 5);
    assert_string_equal(c.entries[0].name, "second");
    assert_int_equal(c.entries[0].state, BN_ENTRY_COMPLETE);
    assert_int_equal(c.entries[0].own, 3 * CHUNK); /* its own, and the second pack of the one that is gone */
    assert_int_equal(c.entries[0].shared, 8 * CHUNK);
    assert_string_equal(c.entries[1].name, "begun");
    assert_int_equal(c.entries[1].state, BN_ENTRY_INCOMPLETE);
    assert_string_equal(c.entries[2].name, "criu");
    assert_int_equal(c.entries[2].state, BN_ENTRY_CRIU);
    assert_string_equal(c.entries[3].name, "third");
    assert_int_equal(c.entries[3].state, BN_ENTRY_DAMAGED);
    assert_string_equal(c.entries[4].name, "torn");
    assert_int_equal(c.entries[4].state, BN_ENTRY_INCOMPLETE);
    bn_catalog_free(&c);
    assert_int_equal(bn_catalog_read_one(f->fd, "../x", &c, NULL), -EINVAL);
    assert_int_equal(bn_catalog_read_one(f->fd, "nothing", &c, NULL), -ENOENT);
    assert_int_equal(bn_catalog_read_one(f->fd, "not-ours", &c, NULL), -EINVAL);
    assert_int_equal(bn_catalog_read_one(f->fd, "link", &c, NULL), -EINVAL);
    struct bn_collected done;
    assert_int_equal(bn_collect(f->fd, note, NULL, &done, &err), 0);
    assert_int_equal(done.folders, 2);
    assert_true(exists(&disks, "disk.img"));
    assert_int_equal(bn_catalog_read_one(f->fd, "disks", &c, NULL), -EINVAL);
    assert_true(exists(&criu, "inventory.img"));
    assert_true(exists(&not_ours, "notes.txt"));
    bn_close(third.fd);
    bn_close(criu.fd);
    bn_close(disks.fd);
    bn_close(begun.fd);
    bn_close(not_ours.fd);
}

static void test_verify(void **state)
{
    struct folder *f = *state;
    make_store(f);
    struct bn_error err = BN_ERROR_INIT;
    struct bn_verify_result r;
    struct bn_catalog c;
    bn_catalog_read(f->fd, &c, &err);
    no_error(&err);
    struct bn_verify *v = bn_verify_new();
    assert_int_equal(bn_verify_image(v, c.entries[0].fd, c.entries[0].m, note, NULL, &r, &err), 0);
    assert_int_equal(r.chunks, 5);
    assert_int_equal(r.bytes, 5 * CHUNK);
    assert_int_equal(r.damaged, 0);
    /* The third shares one chunk with it, and has another twice. */
    assert_int_equal(bn_verify_image(v, c.entries[1].fd, c.entries[1].m, note, NULL, &r, &err), 0);
    assert_int_equal(r.chunks, 4);
    assert_int_equal(r.bytes, 2 * CHUNK);
    bn_verify_free(v);

    int fd = openat(c.entries[0].fd, "bennu-pack-10.img", O_RDWR | O_CLOEXEC);
    uint8_t b = 0;
    assert_int_equal(bn_pwrite_full(fd, &b, 1, c.entries[0].m->chunks[1].offset + 77), 0);
    close(fd);
    v = bn_verify_new();
    for (unsigned i = 0; i < 2; i++) { /* both have it: both say so */
        skips = 0;
        assert_int_equal(bn_verify_image(v, c.entries[i].fd, c.entries[i].m, note, NULL, &r, &err), 0);
        assert_int_equal(r.damaged, 1);
        assert_int_equal(skips, 1);
        assert_says(&last_skip, EBADMSG, i == 0 ? "chunk 1 (process 42" : "chunk 0 (process 42");
    }
    bn_verify_free(v);
    bn_catalog_free(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_catalog, setup, teardown),
        cmocka_unit_test_setup_teardown(test_verify, setup, teardown),
        cmocka_unit_test_setup_teardown(test_collect, setup, teardown),
        cmocka_unit_test_setup_teardown(test_unsafe_manifest, setup, teardown),
        cmocka_unit_test_setup_teardown(test_one_cannot_be_written, setup, teardown),
        cmocka_unit_test_setup_teardown(test_skips, setup, teardown),
        cmocka_unit_test_setup_teardown(test_killed_anywhere, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
