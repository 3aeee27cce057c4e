/* What CRIU's files were, and whether they still are. */
#include "images.h"

#include "store/host_files.h"

#include <errno.h>

#define LARGE (5 * CHUNK / 2 + 3)

static void write_file(const struct folder *f, const char *name, size_t bytes)
{
    char path[128];
    snprintf(path, sizeof(path), "%s/%s", f->path, name);
    FILE *out = fopen(path, "w");
    assert_non_null(out);
    for (size_t i = 0; i < bytes; i++)
        fputc((int)(i * 7 + i / 4096), out);
    assert_int_equal(fclose(out), 0);
}

static void flip(const struct folder *f, const char *name, off_t at)
{
    uint8_t byte;
    int fd = openat(f->fd, name, O_RDWR | O_CLOEXEC);
    assert_int_equal(pread(fd, &byte, 1, at), 1);
    byte ^= 1;
    assert_int_equal(pwrite(fd, &byte, 1, at), 1);
    close(fd);
}

static struct bn_manifest *noted(const struct folder *f)
{
    struct bn_manifest *m = bn_manifest_new();
    struct bn_error err = BN_ERROR_INIT;
    uint64_t bytes;
    write_file(f, "core-1.img", 1000);
    write_file(f, "empty-1.img", 0);
    write_file(f, "pages-1.img", LARGE);
    write_file(f, "pages-2.img", CHUNK);
    write_file(f, "dump.log", 10);
    write_file(f, "bennu-pack-0.img", 10);
    assert_int_equal(symlinkat("pages-1.img", f->fd, "link-1.img"), 0);
    assert_int_equal(mkdirat(f->fd, "folder.img", 0700), 0);
    assert_int_equal(bn_host_files_note(f->fd, m, NULL, &bytes, &err), 0);
    assert_int_equal(bytes, 1000 + LARGE + CHUNK);
    return m;
}

struct found {
    unsigned n;
    char text[BN_ERROR_TEXT_MAX];
};

static void find(void *arg, const struct bn_error *what)
{
    struct found *found = arg;
    found->n++;
    strcpy(found->text, what->text);
}

/* How much of it differs. */
static struct found differences(const struct folder *f, const struct bn_manifest *m, unsigned which)
{
    struct found found = {0};
    uint64_t bytes;
    assert_int_equal(bn_host_files_compare(f->fd, m, which, 0, NULL, find, &found, &bytes, NULL), 0);
    return found;
}

static void test_as_they_were(void **state)
{
    struct folder *f = *state;
    bn_auto_manifest struct bn_manifest *m = noted(f);
    uint64_t small, large;
    assert_int_equal(m->n_files, 4);
    assert_int_equal(m->n_file_hashes, 1 + 3 + 1);
    assert_int_equal(differences(f, m, BN_HOST_FILES_ALL).n, 0);
    assert_int_equal(bn_host_files_check(f->fd, m, BN_HOST_FILES_SMALL, 1, NULL, &small, NULL), 0);
    assert_int_equal(bn_host_files_check(f->fd, m, BN_HOST_FILES_LARGE, 3, NULL, &large, NULL), 0);
    assert_int_equal(small, 1000 + CHUNK);
    assert_int_equal(large, LARGE);
    write_file(f, "stats-restore", 10); /* what comes later is none of the image's */
    write_file(f, "later.img", 10);
    assert_int_equal(differences(f, m, BN_HOST_FILES_ALL).n, 0);
    bn_auto_manifest struct bn_manifest *none = bn_manifest_new();
    assert_int_equal(differences(f, none, BN_HOST_FILES_ALL).n, 0);
}

static void test_damage(void **state)
{
    struct folder *f = *state;
    bn_auto_manifest struct bn_manifest *m = noted(f);
    const off_t at[] = {0, CHUNK - 1, CHUNK, 2 * CHUNK, LARGE - 1};
    for (size_t i = 0; i < BN_ARRAY_SIZE(at); i++) {
        char where[64];
        flip(f, "pages-1.img", at[i]);
        struct found found = differences(f, m, BN_HOST_FILES_ALL);
        assert_int_equal(found.n, 1);
        snprintf(where, sizeof(where), "pages-1.img is damaged: bytes %llu to ",
                 (unsigned long long)(at[i] / (off_t)CHUNK * (off_t)CHUNK));
        assert_non_null(strstr(found.text, where));
        assert_int_equal(differences(f, m, BN_HOST_FILES_SMALL).n, 0);
        flip(f, "pages-1.img", at[i]);
    }
    flip(f, "core-1.img", 500);
    flip(f, "pages-1.img", 0);
    flip(f, "pages-1.img", 2 * CHUNK);
    assert_int_equal(differences(f, m, BN_HOST_FILES_ALL).n, 3);
    assert_int_equal(differences(f, m, BN_HOST_FILES_SMALL).n, 1);
    struct bn_error err = BN_ERROR_INIT;
    uint64_t bytes;
    assert_int_equal(bn_host_files_check(f->fd, m, BN_HOST_FILES_SMALL, 0, NULL, &bytes, &err), -EBADMSG);
    assert_non_null(strstr(err.text, "core-1.img"));
}

/* Each is said once, however long it was. */
static void test_other_files(void **state)
{
    struct folder *f = *state;
    bn_auto_manifest struct bn_manifest *m = noted(f);
    write_file(f, "empty-1.img", 1);
    assert_non_null(strstr(differences(f, m, BN_HOST_FILES_ALL).text, "empty-1.img"));
    write_file(f, "empty-1.img", 0);
    write_file(f, "pages-1.img", LARGE - 1);
    assert_int_equal(differences(f, m, BN_HOST_FILES_ALL).n, 1);
    assert_int_equal(unlinkat(f->fd, "pages-1.img", 0), 0);
    struct found found = differences(f, m, BN_HOST_FILES_ALL);
    assert_int_equal(found.n, 1);
    assert_non_null(strstr(found.text, "pages-1.img is missing"));
    assert_int_equal(symlinkat("pages-2.img", f->fd, "pages-1.img"), 0);
    assert_int_equal(differences(f, m, BN_HOST_FILES_ALL).n, 1);
}

static void test_cancelled(void **state)
{
    struct folder *f = *state;
    bn_auto_manifest struct bn_manifest *m = noted(f), *other = bn_manifest_new();
    const bool cancel = true;
    uint64_t bytes;
    assert_int_equal(bn_host_files_note(f->fd, other, &cancel, &bytes, NULL), -ECANCELED);
    assert_int_equal(bn_host_files_check(f->fd, m, BN_HOST_FILES_ALL, 0, &cancel, &bytes, NULL), -ECANCELED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_as_they_were, setup, teardown),
        cmocka_unit_test_setup_teardown(test_damage, setup, teardown),
        cmocka_unit_test_setup_teardown(test_other_files, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cancelled, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
