/* A process that is stopped does not answer, and does what it was asked when it goes on. Compiled with less patience. */
#include "child.h"
#include "hold.h"
#include "machine.h"

#include "checkpoint/target.h"

#include <errno.h>

static void stop(struct child *c)
{
    int status;
    assert_int_equal(kill(c->pid, SIGSTOP), 0);
    assert_int_equal(waitpid(c->pid, &status, WUNTRACED), c->pid);
    assert_true(WIFSTOPPED(status));
}

/* What is held of it is the only copy from the moment on at which it was told to let go, whether it says so or not. */
static void test_evict(void **state)
{
    struct child c;
    struct held h = {0};
    struct bn_target t = {.gated = true};
    struct bn_error said = BN_ERROR_INIT;
    child_start(&c, NULL);
    child_do(&c, "alloc 4");
    child_do(&c, "fill 7");
    t.pid = c.pid;
    assert_int_equal(bn_agent_find(c.pid, &t.agent), 0);
    CHECK(bn_agent_attach(t.agent, err));
    CHECK(bn_agent_close_gate(t.agent, 30000, err));
    held_take(&h, t.agent);

    stop(&c);
    assert_int_equal(bn_target_evict(&t, &said), -ETIMEDOUT);
    assert_true(t.evicted);
    said = (struct bn_error)BN_ERROR_INIT;
    assert_int_equal(bn_agent_import(t.agent, h.segs, h.fds, h.n, &said), -ETIMEDOUT);
    said = (struct bn_error)BN_ERROR_INIT;
    assert_int_equal(bn_agent_attach(t.agent, &said), -ETIMEDOUT);
    assert_int_equal(kill(c.pid, SIGCONT), 0);

    /* Whoever reaches it knows what it did of all that. */
    struct bn_agent_page page;
    CHECK(bn_agent_attach(t.agent, err));
    assert_int_equal(bn_agent_page(t.agent, &page), 0);
    assert_int_equal(page.epoch, 1);
    assert_int_equal(page.state, BN_AGENT_CLOSED);
    CHECK(bn_agent_import(t.agent, h.segs, h.fds, h.n, err));
    CHECK(bn_agent_open_gate(t.agent, err));
    child_do(&c, "check 7");
    bn_agent_free(t.agent);
    held_free(&h);
    child_end(&c);
}

/* It says that it did not: then everything is in its place. */
static void test_refused(void **state)
{
    struct child c;
    struct bn_target t = {.gated = true};
    struct bn_error said = BN_ERROR_INIT;
    char path[] = "/tmp/bennu-agent-test-XXXXXX";
    child_start_failing(&c, path);
    child_do(&c, "alloc 4");
    assert_int_equal(bn_agent_find(c.pid, &t.agent), 0);
    CHECK(bn_agent_attach(t.agent, err));
    CHECK(bn_agent_close_gate(t.agent, 30000, err));
    say_failure(path, "cuMemUnmap:1=999");
    assert_int_equal(bn_target_evict(&t, &said), -EIO);
    assert_false(t.evicted);
    CHECK(bn_agent_open_gate(t.agent, err));
    child_do(&c, "check 1");
    unlink(path);
    bn_agent_free(t.agent);
    child_end(&c);
}

int main(void)
{
    own_machine("agent-unanswered");
    signal(SIGPIPE, SIG_IGN);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_evict),
        cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
