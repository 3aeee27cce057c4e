/* The agent's descriptors in a program that forks, closes what is not its own, and has a limit. */
#include "child.h"
#include "hold.h"
#include "machine.h"

#include "base/proc.h"

#include <errno.h>
#include <sched.h>

static struct bn_agent *attach(const struct child *c)
{
    struct bn_agent *a = NULL;
    assert_int_equal(bn_agent_find(c->pid, &a), 0);
    CHECK(bn_agent_attach(a, err));
    return a;
}

static void take(struct bn_agent *a, struct held *h)
{
    CHECK(bn_agent_close_gate(a, 10000, err));
    held_take(h, a);
    assert_in_range(h->n, 1, 256);
    CHECK(bn_agent_evict(a, err));
}

static void give(struct bn_agent *a, struct held *h)
{
    CHECK(bn_agent_import(a, h->segs, h->fds, h->n, err));
    CHECK(bn_agent_open_gate(a, err));
    held_free(h);
}

/* The program has put files there that look just like those that it closed: same device, same inode. */
static void test_other_file_in_place(void **state)
{
    (void)state;
    struct child c;
    struct held h = {0};
    struct bn_error said = BN_ERROR_INIT;
    child_start(&c, NULL);
    for (int i = 0; i < 3; i++)
        child_do(&c, "vmm 2 1"); /* a segment each */
    struct bn_agent *a = attach(&c);
    take(a, &h);
    give(a, &h);
    child_do(&c, "swap");
    int there = atoi(c.answer + 3);
    assert_true(there >= 3);
    CHECK(bn_agent_close_gate(a, 10000, err));
    int fds[3];
    CHECK(bn_agent_list(a, &h.segs, &h.n, err));
    assert_int_equal(h.n, 3);
    assert_int_equal(bn_agent_export(a, h.segs, h.n, fds, &said), -EIO);
    assert_non_null(strstr(said.text, "closed the descriptor"));
    CHECK(bn_agent_open_gate(a, err));
    held_free(&h);
    child_do(&c, "check 1");
    child_do(&c, "free 0");
    child_do(&c, "swapped");
    assert_int_equal(atoi(c.answer + 3), there); /* the program's, and nobody else's to close */
    child_do(&c, "check 1");
    bn_agent_free(a);
    child_end(&c);
}

/* Once the agent's thread waits for the next request. */
static unsigned long soft_limit(const struct child *c, struct bn_agent *a)
{
    char state = 0;
    pid_t tid = bn_agent_tid(a);
    while (state != 'S') {
        assert_int_equal(bn_proc_state(tid, &state), 0);
        sched_yield();
    }
    char path[64], line[256];
    unsigned long soft = 0;
    snprintf(path, sizeof(path), "/proc/%d/limits", c->pid);
    FILE *f = fopen(path, "re");
    assert_non_null(f);
    while (fgets(line, sizeof(line), f))
        sscanf(line, "Max open files %lu", &soft);
    fclose(f);
    return soft;
}

/* A checkpoint that is made while the memory is away has the program's own limit. */
static void test_limit_while_away(void **state)
{
    (void)state;
    struct child c;
    struct held h = {0};
    child_start(&c, NULL);
    for (int i = 0; i < 100; i++)
        child_do(&c, "vmm 2 1"); /* a segment each */
    child_do(&c, "limit 64");
    struct bn_agent *a = attach(&c);
    for (int round = 0; round < 2; round++) {
        take(a, &h);
        assert_int_equal(soft_limit(&c, a), 64);
        CHECK(bn_agent_import(a, h.segs, h.fds, 70, err));
        assert_int_equal(soft_limit(&c, a), 64);
        give(a, &h);
        assert_int_equal(soft_limit(&c, a), 64);
        child_do(&c, "check 1");
    }
    bn_agent_free(a);
    child_end(&c);
}

/* Children that are forked while descriptors of the memory travel have none of them. */
static void test_forks_meanwhile(void **state)
{
    (void)state;
    struct child c;
    struct held h = {0};
    int leaks = -1, forks = 0;
    child_start(&c, NULL);
    for (int i = 0; i < 128; i++)
        child_do(&c, "vmm 2 1"); /* a segment each */
    struct bn_agent *a = attach(&c);
    child_do(&c, "forks");
    for (int round = 0; round < 24; round++) {
        take(a, &h);
        give(a, &h);
    }
    child_do(&c, "leaks");
    assert_int_equal(sscanf(c.answer, "ok %d of %d", &leaks, &forks), 2);
    assert_int_equal(leaks, 0);
    assert_true(forks > 0);
    child_do(&c, "check 1");
    bn_agent_free(a);
    child_end(&c);
}

int main(void)
{
    own_machine("agent-fds");
    signal(SIGPIPE, SIG_IGN);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_other_file_in_place),
        cmocka_unit_test(test_limit_while_away),
        cmocka_unit_test(test_forks_meanwhile),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
