/* What of the processes' host memory can be filled in: of one process, and of all. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "../image/make_pagemap.h"
#include "base/cleanup.h"
#include "base/io.h"
#include "store/host_pages.h"

#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>

static char folder[64];
static int dir;

static int make_folder(void **state)
{
    snprintf(folder, sizeof(folder), "/tmp/test-host-pages.XXXXXX");
    dir = mkdtemp(folder) ? open(folder, O_RDONLY | O_DIRECTORY) : -1;
    return dir < 0;
}

static int remove_folder(void **state)
{
    bn_auto_dir DIR *d = fdopendir(dir);
    for (struct dirent *e; d && (e = readdir(d)) != NULL;)
        unlinkat(dir, e->d_name, 0);
    return rmdir(folder);
}

static void save(const char *name, struct bn_writer *w)
{
    bn_auto_fd fd = openat(dir, name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(bn_write_full(fd, w->buf, w->len), 0);
    bn_writer_free(w);
    *w = (struct bn_writer){0};
}

static void pages(const char *name, uint64_t n)
{
    bn_auto_fd fd = openat(dir, name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, (off_t)(n * BN_PAGE)), 0);
}

static void process(const char *name, uint32_t id, uint64_t va, uint64_t n)
{
    char file[32];
    struct bn_writer w = {0};
    put_head(&w, id);
    put_entry(&w, va, n, LAZY | PRESENT, true);
    put_entry(&w, va + (n + 1) * BN_PAGE, 3, PRESENT, true);
    save(name, &w);
    snprintf(file, sizeof(file), "pages-%u.img", id);
    pages(file, n + 3);
}

static void one_process(void **state)
{
    struct bn_pagemap m;
    struct bn_error err = BN_ERROR_INIT;
    process("pagemap-12.img", 5, 0x10000, 2);
    bn_auto_fd fd = bn_host_pages_open(dir, 12, &m, &err);
    assert_true(fd >= 0);
    assert_int_equal(m.bytes, 2 * BN_PAGE);
    bn_pagemap_free(&m);

    assert_int_equal(bn_host_pages_open(dir, 13, &m, &err), -ENOENT);
    assert_non_null(strstr(err.text, "pagemap-13.img"));
    err = (struct bn_error)BN_ERROR_INIT;
    pages("pages-5.img", 4); /* what CRIU itself reads is missing */
    assert_int_equal(bn_host_pages_open(dir, 12, &m, &err), -EBADMSG);
    assert_non_null(strstr(err.text, "pages-5.img"));
    err = (struct bn_error)BN_ERROR_INIT;
    assert_int_equal(unlinkat(dir, "pages-5.img", 0), 0);
    assert_int_equal(bn_host_pages_open(dir, 12, &m, &err), -EBADMSG);
    assert_non_null(strstr(err.text, "pages-5.img"));
    err = (struct bn_error)BN_ERROR_INIT;
    assert_int_equal(symlinkat("/dev/zero", dir, "pages-5.img"), 0);
    assert_int_equal(bn_host_pages_open(dir, 12, &m, &err), -ELOOP);
    err = (struct bn_error)BN_ERROR_INIT;
    assert_int_equal(unlinkat(dir, "pages-5.img", 0), 0);
    assert_int_equal(mkfifoat(dir, "pages-5.img", 0600), 0);
    assert_int_equal(bn_host_pages_open(dir, 12, &m, &err), -EBADMSG);
}

static void all_processes(void **state)
{
    struct bn_host_pages sum;
    struct bn_error err = BN_ERROR_INIT;
    assert_int_equal(bn_host_pages_survey(dir, &sum, &err), 0);
    assert_int_equal(sum.bytes, 0);
    process("pagemap-1.img", 1, 0x100000, 10);
    process("pagemap-200.img", 2, 0x105000, 10); /* five pages at the same addresses */
    process("pagemap-3.img", 3, 0x106000, 2);    /* and two that all have */
    process("pagemap-shmem-4.img", 4, 0x100000, 100);
    process("pagemap-5.img.old", 5, 0x100000, 100);
    assert_int_equal(bn_host_pages_survey(dir, &sum, &err), 0);
    assert_int_equal(sum.bytes, 22 * BN_PAGE);
    assert_int_equal(sum.common, 7 * BN_PAGE);

    assert_int_equal(symlinkat("../before", dir, "parent"), 0);
    assert_int_equal(bn_host_pages_survey(dir, &sum, &err), 0);
    assert_int_equal(sum.bytes, 0);
    assert_int_equal(unlinkat(dir, "parent", 0), 0);

    pages("pages-2.img", 12);
    assert_int_equal(bn_host_pages_survey(dir, &sum, &err), -EBADMSG);
    assert_non_null(strstr(err.text, "pages-2.img"));
    pages("pages-2.img", 13);
    err = (struct bn_error)BN_ERROR_INIT;
    struct bn_writer w = {0};
    bn_write_u32(&w, 1);
    save("pagemap-3.img", &w);
    assert_int_equal(bn_host_pages_survey(dir, &sum, &err), -EBADMSG);
    assert_true(bn_error_is_set(&err));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(one_process, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(all_processes, make_folder, remove_folder),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
