/* A program that fails to get GPU memory while the daemon holds some: this test is the daemon, with memory of the machine's only GPU
 * (64 MiB) in its hands. */
#include "child.h"
#include "machine.h"

#include "base/io.h"
#include "wire/agent_client.h"

#include <errno.h>
#include <poll.h>

#define MIB ((size_t)1 << 20)
#define HELD (48 * MIB)
#define PATIENCE_NS UINT64_C(60000000000)

static struct cu sim;
static CUdeviceptr held;

static void hold(void)
{
    assert_int_equal(sim.cuMemAlloc_v2(&held, HELD), 0);
}

static void let_go(void)
{
    assert_int_equal(sim.cuMemFree_v2(held), 0);
    held = 0;
}

static struct bn_agent *find(const struct child *c)
{
    struct bn_agent *a = NULL;
    assert_int_equal(bn_agent_find(c->pid, &a), 0);
    return a;
}

static struct bn_agent_need need_of(struct bn_agent *a)
{
    struct bn_agent_page page;
    assert_int_equal(bn_agent_page(a, &page), 0);
    return page.need;
}

/* The next want; announces meanwhile. */
static struct bn_agent_want wanted(struct bn_agent *a)
{
    static uint32_t hot;
    struct bn_agent_want want;
    uint64_t end = bn_now_ns() + PATIENCE_NS;
    for (;;) {
        assert_int_equal(bn_agent_announce_hot(a, ++hot ? hot : ++hot), 0);
        int r = bn_agent_wanted(a, &want);
        assert_true(r >= 0);
        if (r > 0)
            return want;
        assert_true(bn_now_ns() < end);
        poll(NULL, 0, 2);
    }
}

static void answer(struct child *c, const char *expected)
{
    assert_non_null(fgets(c->answer, sizeof(c->answer), c->from));
    assert_string_equal(c->answer, expected);
}

static void finish(struct child *c, struct bn_agent *a)
{
    bn_agent_free(a);
    child_end(c);
}

/* A program that tries to allocate, while the daemon says that it holds the memory. */
static struct bn_agent *start_wanting(struct child *c, uint32_t hot, const char *command)
{
    child_start(c, NULL);
    struct bn_agent *a = find(c);
    hold();
    assert_int_equal(bn_agent_announce_hot(a, hot), 0);
    child_send(c, command);
    return a;
}

/* Without a word of the daemon's: the driver's answer at once. */
static void test_nobody_holds(void **state)
{
    (void)state;
    struct child c;
    child_start(&c, NULL);
    struct bn_agent *a = find(&c);
    hold();
    child_send(&c, "try 0 32");
    answer(&c, "no 2\n");
    assert_int_equal(need_of(a).wanted_seq, 0);
    let_go();
    child_do(&c, "try 0 32");
    finish(&c, a);
}

/* Every way to allocate waits, and gets it. */
static void test_gets_it(void **state)
{
    (void)state;
    static const char *const ways[] = {"try 0 32", "try 1 32", "try 2 32", "try 3 32"};
    struct child c;
    child_start(&c, NULL);
    struct bn_agent *a = find(&c);
    for (uint32_t i = 0; i < 4; i++) {
        hold();
        assert_int_equal(bn_agent_announce_hot(a, 1000 + i), 0);
        child_send(&c, ways[i]);
        struct bn_agent_want want = wanted(a);
        struct bn_agent_page page;
        assert_int_equal(bn_agent_page(a, &page), 0);
        assert_int_equal(want.seq, i + 1);
        assert_int_equal(want.bytes, 32 * MIB);
        assert_memory_equal(want.uuid, page.gpu[0].uuid, sizeof(want.uuid));
        let_go();
        assert_int_equal(bn_agent_answer_want(a, want.seq, true), 0);
        answer(&c, "ok\n");
        assert_int_equal(need_of(a).wanted_bytes, 0);
        child_do(&c, "untry");
    }
    finish(&c, a);
}

static void test_asks_again(void **state)
{
    (void)state;
    struct child c;
    struct bn_agent *a = start_wanting(&c, 1, "try 0 32");
    struct bn_agent_want first = wanted(a);
    assert_int_equal(bn_agent_answer_want(a, first.seq, true), 0); /* it was not enough */
    struct bn_agent_want second = wanted(a);
    assert_int_equal(second.seq, first.seq + 1);
    assert_int_equal(bn_agent_answer_want(a, second.seq, false), 0);
    answer(&c, "no 2\n");
    assert_int_equal(need_of(a).wanted_seq, second.seq);
    let_go();
    finish(&c, a);
}

/* The last of it was let go of, and the daemon says no more. */
static void test_no_longer_hot(void **state)
{
    (void)state;
    struct child c;
    struct bn_agent *a = start_wanting(&c, 1, "try 0 32");
    wanted(a);
    let_go();
    assert_int_equal(bn_agent_announce_hot(a, 0), 0);
    answer(&c, "ok\n");
    finish(&c, a);
}

/* A daemon that was killed: found out once, then not waited for. */
static void test_dead_daemon(void **state)
{
    (void)state;
    struct child c;
    struct bn_agent *a = start_wanting(&c, 77, "try 0 32");
    answer(&c, "no 2\n");
    assert_int_equal(need_of(a).wanted_seq, 1);
    assert_int_equal(need_of(a).wanted_bytes, 0);
    child_send(&c, "try 0 32");
    answer(&c, "no 2\n");
    assert_int_equal(need_of(a).wanted_seq, 1);
    assert_int_equal(bn_agent_announce_hot(a, 78), 0); /* the next daemon */
    child_send(&c, "try 0 32");
    struct bn_agent_want want = wanted(a);
    let_go();
    assert_int_equal(bn_agent_answer_want(a, want.seq, true), 0);
    answer(&c, "ok\n");
    finish(&c, a);
}

/* Who waits stands outside of the gate. */
static void test_gate(void **state)
{
    (void)state;
    struct child c;
    struct bn_error err = BN_ERROR_INIT;
    child_start(&c, NULL);
    child_do(&c, "alloc 4");
    struct bn_agent *a = find(&c);
    hold();
    assert_int_equal(bn_agent_announce_hot(a, 1), 0);
    child_send(&c, "try 0 32");
    struct bn_agent_want want = wanted(a);
    assert_int_equal(bn_agent_attach(a, &err), 0);
    if (bn_agent_close_gate(a, 5000, &err) < 0)
        fail_msg("%s", err.text);
    struct bn_agent_segment *segs;
    size_t n;
    int fd;
    assert_int_equal(bn_agent_list(a, &segs, &n, &err), 0);
    assert_int_equal(n, 1);
    assert_int_equal(bn_agent_export(a, segs, n, &fd, &err), 0);
    let_go();
    assert_int_equal(bn_agent_answer_want(a, want.seq, true), 0); /* and yet it waits: at the gate */
    assert_int_equal(bn_agent_evict(a, &err), 0);
    assert_int_equal(need_of(a).hot, 0);
    assert_int_equal(bn_agent_import(a, segs, &fd, n, &err), 0);
    close(fd);
    assert_int_equal(bn_agent_open_gate(a, &err), 0);
    answer(&c, "ok\n");
    free(segs);
    bn_agent_detach(a);
    child_do(&c, "check 1");
    finish(&c, a);
}

/* Several threads: each gets its turn. */
static void test_threads(void **state)
{
    (void)state;
    struct child c;
    struct bn_agent *a = start_wanting(&c, 1, "tries 4 10"); /* one of them finds room */
    uint32_t refused = 0;
    do {
        struct bn_agent_want want = wanted(a);
        assert_int_equal(want.bytes, 10 * MIB);
        assert_int_equal(bn_agent_answer_want(a, want.seq, false), 0);
    } while (++refused < 3);
    answer(&c, "ok 1\n");
    child_do(&c, "untry");
    child_send(&c, "tries 4 10");
    struct bn_agent_want want = wanted(a);
    let_go();
    struct pollfd p = {.fd = fileno(c.from), .events = POLLIN};
    do { /* who was about to ask meanwhile asks in vain, and gets it all the same */
        assert_int_equal(bn_agent_announce_hot(a, ++want.seq + 1000), 0);
        if (bn_agent_wanted(a, &want) > 0)
            assert_int_equal(bn_agent_answer_want(a, want.seq, false), 0);
    } while (poll(&p, 1, 2) == 0);
    answer(&c, "ok 4\n");
    finish(&c, a);
}

/* Other daemons on the machine tell every program what they hold that has libbennu.so or libcuda.so mapped: ours has not. */
static char folder[] = "/tmp/bennu-oom.XXXXXX";
static const char *const libraries[][2] = {{"BENNU_AGENT", "agent.so"}, {"BENNU_DRIVER", "driver.so"}};

static int copy_libraries(void)
{
    if (!mkdtemp(folder))
        return -errno;
    for (size_t i = 0; i < 2; i++) {
        char path[64];
        void *bytes = NULL;
        size_t len;
        snprintf(path, sizeof(path), "%s/%s", folder, libraries[i][1]);
        int r = bn_read_file_at(AT_FDCWD, need_env(libraries[i][0]), 64 * MIB, &bytes, &len);
        int fd = r < 0 ? r : open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0700);
        if (r == 0)
            r = fd < 0 ? -errno : bn_write_full(fd, bytes, len);
        if (fd >= 0)
            close(fd);
        free(bytes);
        if (r < 0)
            return r;
        setenv(libraries[i][0], path, 1);
    }
    return 0;
}

static void remove_libraries(void)
{
    for (size_t i = 0; i < 2; i++) {
        char path[64];
        snprintf(path, sizeof(path), "%s/%s", folder, libraries[i][1]);
        unlink(path);
    }
    rmdir(folder);
}

int main(void)
{
    CUcontext context;
    own_machine("agent-oom");
    signal(SIGPIPE, SIG_IGN);
    int copied = copy_libraries();
    atexit(remove_libraries);
    if (copied < 0) {
        fprintf(stderr, "cannot copy the libraries: %s\n", strerror(-copied));
        return 1;
    }
    cu_load(&sim, need_env("BENNU_DRIVER"), RTLD_NOW | RTLD_LOCAL);
    if (sim.cuInit(0) != CUDA_SUCCESS || sim.cuCtxCreate_v2(&context, 0, 0) != CUDA_SUCCESS) {
        fprintf(stderr, "the simulated driver does not start\n");
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nobody_holds), cmocka_unit_test(test_gets_it),
        cmocka_unit_test(test_asks_again),   cmocka_unit_test(test_no_longer_hot),
        cmocka_unit_test(test_dead_daemon),  cmocka_unit_test(test_gate),
        cmocka_unit_test(test_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
