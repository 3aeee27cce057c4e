/* A controller that leaves a program in the middle of things that failed: the program comes back by itself. */
#include "child.h"
#include "hold.h"
#include "machine.h"

#include <errno.h>

static int file_of_its_own(char *path)
{
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    return close(fd);
}

static struct bn_agent_page page_of(const struct child *c)
{
    struct bn_agent *a = NULL;
    struct bn_agent_page page;
    assert_int_equal(bn_agent_find(c->pid, &a), 0);
    assert_int_equal(bn_agent_page(a, &page), 0);
    bn_agent_free(a);
    return page;
}

/* How often the driver has refused to map something. */
static unsigned refusals(const char *trace)
{
    char line[256];
    unsigned n = 0;
    FILE *f = fopen(trace, "re");
    assert_non_null(f);
    while (fgets(line, sizeof(line), f))
        n += strstr(line, " cuMemMap 999") != NULL;
    fclose(f);
    return n;
}

/* An eviction fails, and so does putting back what it had unmapped, the first times that the agent tries alone. `closed`: the
 * program closes the agent's descriptors meanwhile. */
static void tries_again(bool closed)
{
    char rules[] = "/tmp/bennu-agent-test-XXXXXX", trace[] = "/tmp/bennu-agent-test-XXXXXX";
    struct bn_error said = BN_ERROR_INIT;
    struct bn_agent *a = NULL;
    struct child c;
    assert_int_equal(file_of_its_own(rules) | file_of_its_own(trace), 0);
    setenv("BENNU_SIM_FAIL_FILE", rules, 1);
    setenv("BENNU_SIM_TRACE", trace, 1);
    child_start(&c, NULL);
    child_do(&c, "vmm 2 1");
    child_do(&c, "vmm 2 1");
    assert_int_equal(bn_agent_find(c.pid, &a), 0);
    CHECK(bn_agent_attach(a, err));
    CHECK(bn_agent_close_gate(a, 10000, err));
    say_failure(rules, "cuMemUnmap:2=999,cuMemMap:1+=999");
    assert_int_equal(bn_agent_evict(a, &said), -EIO);
    assert_non_null(strstr(said.text, "nor mapped again"));
    assert_int_equal(page_of(&c).state, BN_AGENT_CLOSED);
    unsigned before = refusals(trace);
    assert_true(before > 0);
    if (closed)
        child_do(&c, "unagent 1");
    bn_agent_free(a);
    while (refusals(trace) < before + 2)
        usleep(1000);
    say_failure(rules, "none:1=1");
    while (page_of(&c).state != (closed ? BN_AGENT_INACTIVE : BN_AGENT_ACTIVE))
        usleep(1000);
    child_do(&c, "check 1");
    child_end(&c);
    unlink(rules);
    unlink(trace);
}

static void test_controller_ends(void **state)
{
    (void)state;
    tries_again(false);
}

static void test_descriptors_closed(void **state)
{
    (void)state;
    tries_again(true);
}

int main(void)
{
    own_machine("agent-left");
    signal(SIGPIPE, SIG_IGN);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_controller_ends),
        cmocka_unit_test(test_descriptors_closed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
