/* The worker's side of the keeper, with a keeper that is slow, or gone; and a tree that a move has left in two places. */
#include "base/cleanup.h"
#include "checkpoint/suspend_internal.h"
#include "daemon/keeper.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <string.h>
#include <sys/socket.h>

static int keeper;

static struct bn_guard *open_guard(void)
{
    int pair[2];
    struct bn_guard *g;
    struct bn_record *records;
    size_t n;
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair), 0);
    keeper = pair[0];
    assert_int_equal(keeper_send(keeper, KEEPER_LAST, 0, 0, 0), 0);
    assert_int_equal(bn_guard_open(pair[1], &g, &records, &n, NULL), 0);
    assert_int_equal(n, 0);
    return g;
}

static int put(struct bn_guard *g, struct bn_error *err)
{
    bn_auto_writer body = {0};
    bn_write_u32(&body, 4711);
    *err = (struct bn_error)BN_ERROR_INIT;
    return g->put(g, 7, BN_RECORD_TARGET, &body, NULL, 0, err);
}

/* What a silent keeper holds is not known, so nothing may rest on it; and what it says in the end answers no later question. */
static void test_slow(void **state)
{
    (void)state;
    struct bn_error err;
    struct bn_guard *g = open_guard();
    assert_int_equal(put(g, &err), -ETIMEDOUT);
    assert_non_null(strstr(err.text, "does not answer"));
    assert_int_equal(keeper_send(keeper, KEEPER_DONE, 7, 1, 0), 0);
    assert_int_equal(keeper_send(keeper, KEEPER_DONE, 7, 2, ENOSPC), 0);
    assert_int_equal(put(g, &err), -ENOSPC);
    assert_int_equal(keeper_send(keeper, KEEPER_DONE, 7, 3, 0), 0);
    assert_int_equal(put(g, &err), 0);
    bn_guard_free(g);
    close(keeper);
}

/* Nobody believes the records of one that is gone: the work goes on. */
static void test_gone(void **state)
{
    (void)state;
    struct bn_error err;
    struct bn_guard *g = open_guard();
    close(keeper);
    assert_int_equal(put(g, &err), 0);
    assert_int_equal(put(g, &err), 0);
    bn_guard_free(g);
}

/* A daemon was killed between two records of a move: one process's bytes are in the folder of the disk tier, the other's in host memory. A new
 * folder would forget the first. */
static void test_split(void **state)
{
    (void)state;
    struct bn_error err = BN_ERROR_INIT;
    struct bn_target_part parts[2] = {{.cold = (struct bn_cold *)&err}, {.mem = (struct bn_mem *)&err}};
    struct bn_target targets[2] = {{.pid = 1, .parts = &parts[0], .nparts = 1},
                                   {.pid = 2, .parts = &parts[1], .nparts = 1}};
    struct bn_suspended s = {.q = {.root = 1, .targets = {targets, 2}}};
    assert_int_equal(bn_suspended_move(&s, BN_TIER_DISK, NULL, &err), -EBUSY);
    assert_non_null(strstr(err.text, "bennu resume 1"));
    assert_ptr_equal(parts[0].cold, &err);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_slow), cmocka_unit_test(test_gone),
                                       cmocka_unit_test(test_split)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
