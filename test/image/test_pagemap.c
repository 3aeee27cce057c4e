/* CRIU's list of pages: what is kept of it, and that every damage is found. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "image/pagemap.h"
#include "make_pagemap.h"

#include <errno.h>

static void expect(const struct bn_pagemap *m, uint32_t i, uint64_t va, uint64_t pages, uint64_t offset_pages)
{
    assert_true(i < m->n);
    assert_int_equal(m->ranges[i].va, va);
    assert_int_equal(m->ranges[i].bytes, pages * BN_PAGE);
    assert_int_equal(m->ranges[i].offset, offset_pages * BN_PAGE);
}

static void what_is_lazy_and_present(void **state)
{
    bn_auto_writer w = {0};
    struct bn_pagemap m;
    struct bn_error err = BN_ERROR_INIT;
    put_head(&w, 7);
    put_entry(&w, 0x10000, 2, LAZY | PRESENT, false);
    put_entry(&w, 0x12000, 3, LAZY | PRESENT, false); /* goes on: one range */
    put_entry(&w, 0x20000, 4, PRESENT, false);        /* CRIU's own */
    put_entry(&w, 0x30000, 5, LAZY, false);           /* not in the file */
    put_entry(&w, 0x40000, 6, PARENT, false);
    put_entry(&w, 0x50000, 1, LAZY | PRESENT, false); /* another place in both */
    put_entry(&w, 0x51000, 1, NO_FLAGS, false);       /* of an old CRIU */
    put_entry(&w, 0x7fff00000000, (UINT64_C(1) << 33) / BN_PAGE, LAZY | PRESENT, true);
    assert_int_equal(bn_pagemap_decode(w.buf, w.len, &m, &err), 0);
    assert_int_equal(m.pages_id, 7);
    assert_int_equal(m.n, 3);
    expect(&m, 0, 0x10000, 5, 0);
    expect(&m, 1, 0x50000, 1, 9);
    expect(&m, 2, 0x7fff00000000, (UINT64_C(1) << 33) / BN_PAGE, 11);
    assert_int_equal(m.bytes, 6 * BN_PAGE + (UINT64_C(1) << 33));
    assert_int_equal(m.pages_bytes, 11 * BN_PAGE + (UINT64_C(1) << 33));
    bn_pagemap_free(&m);
    assert_int_equal(m.n, 0);
}

static void many_ranges(void **state)
{
    bn_auto_writer w = {0};
    struct bn_pagemap m;
    struct bn_error err = BN_ERROR_INIT;
    put_head(&w, 1);
    for (uint64_t i = 0; i < 5000; i++)
        put_entry(&w, (1 + 2 * i) * BN_PAGE, 1, LAZY | PRESENT, i % 2);
    assert_int_equal(bn_pagemap_decode(w.buf, w.len, &m, &err), 0);
    assert_int_equal(m.n, 5000);
    expect(&m, 4999, (1 + 2 * 4999) * BN_PAGE, 1, 4999);
    bn_pagemap_free(&m);
}

static void assert_damaged(struct bn_writer *w)
{
    struct bn_pagemap m = {0};
    struct bn_error err = BN_ERROR_INIT;
    assert_int_equal(bn_pagemap_decode(w->buf, w->len, &m, &err), -EBADMSG);
    assert_int_equal(err.code, EBADMSG);
    assert_null(m.ranges);
    bn_writer_free(w);
    *w = (struct bn_writer){0};
}

static void damaged(void **state)
{
    struct bn_writer w = {0};
    assert_damaged(&w); /* empty */
    bn_write_u64(&w, 0x5608402554564318);
    assert_damaged(&w);
    put_head(&w, UINT64_C(1) << 32);
    assert_damaged(&w);
    const struct {
        uint64_t va, pages;
    } wrong[] = {
        {0x10800, 1}, {0xf000, 1}, {0x20000, 0}, {0x20000, UINT64_MAX / BN_PAGE}, {UINT64_MAX - 0xfff, 1}};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        put_head(&w, 1);
        put_entry(&w, 0xf000, 2, LAZY | PRESENT, false); /* the second wrong one begins before its end */
        put_entry(&w, wrong[i].va, wrong[i].pages, LAZY | PRESENT, true);
        assert_damaged(&w);
    }
    struct bn_writer body = {0};
    put_head(&w, 1);
    put_varint(&body, 1 << 3 | 2); /* no number */
    put_varint(&body, 0);
    put_message(&w, &body);
    assert_damaged(&w);
    put_head(&w, 1);
    put_field(&body, 2, 3); /* no address */
    put_message(&w, &body);
    assert_damaged(&w);
}

static void cut_off_anywhere(void **state)
{
    bn_auto_writer w = {0};
    put_head(&w, 300);
    size_t first = w.len;
    put_entry(&w, 0x123456000, 70000, LAZY | PRESENT, true);
    for (size_t len = 0; len < w.len; len++) {
        struct bn_pagemap m = {0};
        struct bn_error err = BN_ERROR_INIT;
        int r = bn_pagemap_decode(w.buf, len, &m, &err);
        assert_int_equal(r, len == first ? 0 : -EBADMSG);
        bn_pagemap_free(&m);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_lazy_and_present),
        cmocka_unit_test(many_ranges),
        cmocka_unit_test(damaged),
        cmocka_unit_test(cut_off_anywhere),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
