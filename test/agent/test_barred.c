/* A process that cannot import memory of its GPU, as a restore has brought it to one that it was not shown at cuInit: it creates its
 * memory itself, and a controller fills it. Every byte is checked. Needs no root. */
#include "child.h"
#include "hold.h"
#include "machine.h"

#include <errno.h>

#define CANNOT "cuMemImportFromShareableHandle:1+=3"

static struct cu sim; /* the controller's own driver */
static char rules[] = "/tmp/bennu-agent-test-XXXXXX";

struct barred {
    struct child child;
    struct bn_agent *agent;
    struct held held;
};

static struct bn_agent_page page_of(struct bn_agent *a)
{
    struct bn_agent_page page;
    assert_int_equal(bn_agent_page(a, &page), 0);
    return page;
}

/* Its memory is with us, and it can take none from us. */
static void evict(struct barred *b)
{
    CHECK(bn_agent_close_gate(b->agent, 30000, err));
    held_take(&b->held, b->agent);
    held_read(&b->held, &sim);
    CHECK(bn_agent_evict(b->agent, err));
    say_failure(rules, CANNOT);
}

static void start(struct barred *b)
{
    *b = (struct barred){0};
    child_start_failing(&b->child, rules);
    child_do(&b->child, "alloc 2");
    child_do(&b->child, "vmm 4 3");
    child_do(&b->child, "held 2");
    child_do(&b->child, "small 4096");
    child_do(&b->child, "fill 5");
    assert_int_equal(bn_agent_find(b->child.pid, &b->agent), 0);
    CHECK(bn_agent_attach(b->agent, err));
    evict(b);
}

/* Have it create memory for all, and fill that; `upto` of it. */
static void create(struct barred *b, size_t upto)
{
    struct held *h = &b->held;
    int fds[BN_AGENT_BATCH];
    CHECK(bn_agent_create(b->agent, h->segs, h->n, fds, err));
    for (size_t i = 0; i < h->n; i++) {
        if (i < upto)
            held_transfer(&sim, fds[i], h->segs[i].size, h->bytes[i], true);
        close(fds[i]);
    }
}

static void go_on(struct barred *b)
{
    CHECK(bn_agent_open_gate(b->agent, err));
    held_free(&b->held);
    child_do(&b->child, "check 5");
}

static void end(struct barred *b)
{
    held_free(&b->held);
    bn_agent_free(b->agent);
    unlink(rules);
    memcpy(rules + strlen(rules) - 6, "XXXXXX", 6);
    child_end(&b->child);
}

static void test_rounds(void **state)
{
    struct barred b;
    start(&b);
    for (int round = 0; round < 3; round++) {
        struct held *h = &b.held;
        struct bn_error said = BN_ERROR_INIT;
        if (round)
            evict(&b);
        assert_true(h->n > 1);
        assert_int_equal(bn_agent_import(b.agent, h->segs, h->fds, h->n, &said), -ENODEV);
        assert_non_null(strstr(said.text, "CUDA_ERROR_NOT_INITIALIZED"));
        assert_int_equal(page_of(b.agent).state, BN_AGENT_EVICTED);
        create(&b, h->n);
        assert_int_equal(page_of(b.agent).state, BN_AGENT_EVICTED);
        CHECK(bn_agent_map(b.agent, h->segs, 1, err));
        assert_int_equal(page_of(b.agent).state, BN_AGENT_EVICTED);
        CHECK(bn_agent_map(b.agent, h->segs, h->n, err));
        CHECK(bn_agent_map(b.agent, h->segs, h->n, err)); /* again: nothing happens */
        CHECK(bn_agent_import(b.agent, h->segs, h->fds, h->n, err));
        assert_int_equal(page_of(b.agent).state, BN_AGENT_CLOSED);
        go_on(&b);
    }
    end(&b);
}

/* Created and never mapped: it is not the program's memory. */
static void test_given_up(void **state)
{
    struct barred b;
    struct bn_error said = BN_ERROR_INIT;
    size_t before, between, total;
    start(&b);
    struct held *h = &b.held;
    assert_int_equal(bn_agent_map(b.agent, h->segs, h->n, &said), -EINVAL);
    assert_int_equal(sim.cuMemGetInfo_v2(&before, &total), 0);
    create(&b, 1);
    said = (struct bn_error)BN_ERROR_INIT;
    assert_int_equal(bn_agent_open_gate(b.agent, &said), -EINVAL);
    assert_int_equal(sim.cuMemGetInfo_v2(&between, &total), 0);
    assert_true(between < before);
    say_failure(rules, "none:1=1");
    CHECK(bn_agent_import(b.agent, h->segs, h->fds, h->n, err));
    assert_int_equal(sim.cuMemGetInfo_v2(&between, &total), 0);
    assert_int_equal(between, before);
    go_on(&b);

    /* The controller has gone after some were mapped: the next one begins anew. */
    evict(&b);
    create(&b, h->n);
    CHECK(bn_agent_map(b.agent, h->segs, 2, err));
    bn_agent_detach(b.agent);
    CHECK(bn_agent_attach(b.agent, err));
    create(&b, h->n);
    CHECK(bn_agent_map(b.agent, h->segs, h->n, err));
    go_on(&b);
    end(&b);
}

static void test_driver_fails(void **state)
{
    static const struct {
        const char *rule;
        int create, map;
    } cases[] = {
        {"cuMemCreate:2=2", -ENOMEM, 0},
        {"cuMemCreate:1+=999", -EIO, 0},
        {"cuMemExportToShareableHandle:3=999", -EIO, 0},
        {"cuMemMap:2=999", 0, -EIO},
        {"cuMemMap:1=2", 0, -ENOMEM},
        {"cuMemSetAccess:2=999", 0, -EIO},
        {"cuMemMap:2=999,cuMemUnmap:1=999", 0, -EIO},
    };
    struct barred b;
    start(&b);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct held *h = &b.held;
        struct bn_error said = BN_ERROR_INIT;
        int fds[BN_AGENT_BATCH];
        size_t before, after, total;
        if (i)
            evict(&b);
        assert_int_equal(sim.cuMemGetInfo_v2(&before, &total), 0);
        say_failure(rules, cases[i].rule);
        if (cases[i].create < 0) {
            assert_int_equal(bn_agent_create(b.agent, h->segs, h->n, fds, &said), cases[i].create);
            assert_int_equal(sim.cuMemGetInfo_v2(&after, &total), 0);
            assert_int_equal(after, before);
        } else {
            create(&b, h->n);
            assert_int_equal(bn_agent_map(b.agent, h->segs, h->n, &said), cases[i].map);
        }
        assert_int_equal(page_of(b.agent).state, BN_AGENT_EVICTED);
        say_failure(rules, CANNOT);
        create(&b, h->n);
        CHECK(bn_agent_map(b.agent, h->segs, h->n, err));
        go_on(&b);
    }
    end(&b);
}

static void test_wrong_size(void **state)
{
    struct barred b;
    struct bn_error said = BN_ERROR_INIT;
    int fds[BN_AGENT_BATCH];
    start(&b);
    struct bn_agent_segment wrong = b.held.segs[0];
    wrong.size *= 2;
    assert_int_equal(bn_agent_create(b.agent, &wrong, 1, fds, &said), -EINVAL);
    wrong = (struct bn_agent_segment){.id = 12345, .size = 2 << 20};
    said = (struct bn_error)BN_ERROR_INIT;
    assert_int_equal(bn_agent_create(b.agent, &wrong, 1, fds, &said), -EINVAL);
    said = (struct bn_error)BN_ERROR_INIT;
    assert_int_equal(bn_agent_map(b.agent, &wrong, 1, &said), -EINVAL);
    create(&b, b.held.n);
    CHECK(bn_agent_map(b.agent, b.held.segs, b.held.n, err));
    go_on(&b);
    said = (struct bn_error)BN_ERROR_INIT;
    assert_int_equal(bn_agent_create(b.agent, &wrong, 1, fds, &said), -EINVAL); /* not evicted */
    end(&b);
}

int main(void)
{
    own_machine("agent-barred");
    signal(SIGPIPE, SIG_IGN);
    sim_start(&sim);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rounds),
        cmocka_unit_test(test_given_up),
        cmocka_unit_test(test_driver_fails),
        cmocka_unit_test(test_wrong_size),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
