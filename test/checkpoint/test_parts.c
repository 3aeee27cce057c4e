/* What is done to the memory of several GPUs: on all of them at once, and what of it failed. */
#include "base/cleanup.h"
#include "base/parallel.h"
#include "checkpoint/target.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <pthread.h>
#include <string.h>

#define PARTS 8u

struct seen {
    pthread_barrier_t all;
    struct bn_target *target[PARTS];
    struct bn_target_part *part[PARTS];
};

/* Nobody gets past the barrier before the last of them has come. */
static int meet(void *ctx, struct bn_target *t, struct bn_target_part *part, size_t i, struct bn_error *err)
{
    struct seen *s = ctx;
    (void)err;
    s->target[i] = t;
    s->part[i] = part;
    pthread_barrier_wait(&s->all);
    return 0;
}

static void test_at_once(void **state)
{
    (void)state;
    struct bn_target_part parts[PARTS];
    /* Processes on five GPUs, on none, two, one. */
    struct bn_target v[] = {{.parts = parts, .nparts = 5},
                            {.nparts = 0},
                            {.parts = parts + 5, .nparts = 2},
                            {.parts = parts + 7, .nparts = 1},
                            {.nparts = 0}};
    struct bn_targets targets = {.v = v, .n = BN_ARRAY_SIZE(v)};
    static const size_t whose[PARTS] = {0, 0, 0, 0, 0, 2, 2, 3};
    struct seen s;
    assert_int_equal(pthread_barrier_init(&s.all, NULL, PARTS), 0);
    assert_int_equal(bn_targets_each_part(&targets, meet, &s, NULL), 0);
    for (size_t i = 0; i < PARTS; i++) {
        assert_ptr_equal(s.target[i], &v[whose[i]]);
        assert_ptr_equal(s.part[i], &parts[i]);
    }
    pthread_barrier_destroy(&s.all);
}

static void test_nothing(void **state)
{
    (void)state;
    struct bn_target v[2] = {{.nparts = 0}};
    struct bn_targets targets = {.v = v, .n = 2};
    assert_int_equal(bn_targets_each_part(&targets, meet, NULL, NULL), 0);
}

struct fail {
    pthread_barrier_t all;
    bool ran[PARTS];
};

/* Every second one, in any order. */
static int fail_odd(void *ctx, size_t i, struct bn_error *err)
{
    struct fail *f = ctx;
    pthread_barrier_wait(&f->all);
    f->ran[i] = true;
    return i % 2 ? bn_error_set(err, i == 3 ? EBUSY : ENOMEM, "test", "item %zu", i) : 0;
}

static void test_first_failure(void **state)
{
    (void)state;
    struct fail f = {0};
    struct bn_error err = BN_ERROR_INIT;
    assert_int_equal(pthread_barrier_init(&f.all, NULL, PARTS), 0);
    assert_int_equal(bn_parallel(PARTS, fail_odd, &f, &err), -ENOMEM);
    assert_string_equal(err.text, "item 1");
    for (size_t i = 0; i < PARTS; i++)
        assert_true(f.ran[i]);
    assert_int_equal(bn_parallel(PARTS, fail_odd, &f, NULL), -ENOMEM);
    pthread_barrier_destroy(&f.all);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_at_once),
        cmocka_unit_test(test_nothing),
        cmocka_unit_test(test_first_failure),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
