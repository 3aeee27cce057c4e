/* The daemon's half of struct bn_agent_need, on pages that this program makes itself: an agent's, an old agent's, and things that
 * only look like one. */
#include "wire/agent_client.h"

#include "base/cleanup.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW)

struct fixture {
    int fd;
    struct bn_agent_page *page;
    struct bn_agent *agent;
};

static void begin(struct fixture *f, uint32_t knows, int seals)
{
    f->fd = memfd_create(BN_AGENT_MEMFD, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_true(f->fd >= 0);
    assert_int_equal(ftruncate(f->fd, BN_AGENT_PAGE_SIZE), 0);
    if (seals)
        assert_int_equal(fcntl(f->fd, F_ADD_SEALS, seals), 0);
    f->page = mmap(NULL, BN_AGENT_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, f->fd, 0);
    assert_true(f->page != MAP_FAILED);
    f->page->magic = BN_AGENT_MAGIC;
    f->page->version = BN_AGENT_VERSION;
    f->page->pid = (uint32_t)getpid();
    f->page->knows = knows;
    assert_int_equal(bn_agent_find(getpid(), &f->agent), 0);
}

static void end(struct fixture *f)
{
    bn_agent_free(f->agent);
    munmap(f->page, BN_AGENT_PAGE_SIZE);
    bn_close(f->fd);
}

static void test_want(void **state)
{
    (void)state;
    struct fixture f;
    struct bn_agent_want want = {0};
    begin(&f, BN_AGENT_KNOWS_NEED, SEALS);
    assert_int_equal(bn_agent_announce_hot(f.agent, 41), 0);
    assert_int_equal(f.page->need.hot, 41);
    assert_int_equal(bn_agent_wanted(f.agent, &want), 0);

    f.page->need.wanted_bytes = 5u << 20;
    memset(f.page->need.wanted_uuid, 7, sizeof(f.page->need.wanted_uuid));
    f.page->need.wanted_seq = 1;
    assert_int_equal(bn_agent_wanted(f.agent, &want), 1);
    assert_int_equal(want.bytes, 5u << 20);
    assert_int_equal(want.seq, 1);
    assert_memory_equal(want.uuid, f.page->need.wanted_uuid, sizeof(want.uuid));
    assert_int_equal(bn_agent_answer_want(f.agent, want.seq, true), 0);
    assert_int_equal(f.page->need.answered_seq, 1);
    assert_int_equal(f.page->need.answered_more, 1);
    assert_int_equal(bn_agent_wanted(f.agent, &want), 0); /* answered, though the agent has not looked yet */

    f.page->need.wanted_seq = 2;
    assert_int_equal(bn_agent_wanted(f.agent, &want), 1);
    assert_int_equal(bn_agent_answer_want(f.agent, want.seq, false), 0);
    assert_int_equal(f.page->need.answered_seq, 2);
    assert_int_equal(f.page->need.answered_more, 0);

    f.page->need.wanted_seq = 3;
    f.page->need.wanted_bytes = 0; /* given up */
    assert_int_equal(bn_agent_wanted(f.agent, &want), 0);
    assert_int_equal(bn_agent_announce_hot(f.agent, 0), 0);
    assert_int_equal(f.page->need.hot, 0);
    end(&f);
}

/* Nothing may be written into what is not a page that expects it. */
static void untouched(uint32_t knows, int seals)
{
    struct fixture f;
    struct bn_agent_want want;
    static struct bn_agent_page before;
    begin(&f, knows, seals);
    f.page->need.wanted_bytes = f.page->need.wanted_seq = 1;
    memcpy(&before, f.page, sizeof(before));
    assert_int_equal(bn_agent_announce_hot(f.agent, 1), -ENOTSUP);
    assert_int_equal(bn_agent_wanted(f.agent, &want), -ENOTSUP);
    assert_int_equal(bn_agent_answer_want(f.agent, 1, true), -ENOTSUP);
    assert_memory_equal(&before, f.page, sizeof(before));
    end(&f);
}

static void test_not_asked(void **state)
{
    (void)state;
    untouched(0, SEALS);
    untouched(BN_AGENT_KNOWS_NEED, 0);
    untouched(BN_AGENT_KNOWS_NEED, F_SEAL_SHRINK);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_want),
        cmocka_unit_test(test_not_asked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
