/* A controller takes a program's GPU memory away and gives it back, over the daemon's own client. Every byte is checked, in the
 * controller and in the program. Needs no root. */
#include "child.h"
#include "hold.h"
#include "machine.h"

#include "base/io.h"
#include "base/proc.h"
#include "wire/agent_client.h"
#include "wire/packet.h"

#include <errno.h>
#include <sys/stat.h>

static struct cu sim; /* the controller's own driver */

static struct bn_agent *attach(const struct child *c)
{
    struct bn_agent *a = NULL;
    assert_int_equal(bn_agent_find(c->pid, &a), 0);
    CHECK(bn_agent_attach(a, err));
    return a;
}

static struct bn_agent_page page_of(struct bn_agent *a)
{
    struct bn_agent_page page;
    assert_int_equal(bn_agent_page(a, &page), 0);
    return page;
}

static void populate(struct child *c)
{
    child_do(c, "alloc 2");
    child_do(c, "alloc 3"); /* not a multiple of the granularity */
    child_do(c, "vmm 4 1");
    child_do(c, "vmm 2 3");
    child_do(c, "held 2");
    child_do(c, "alloc 16");
    child_do(c, "small 4096");
}

/* ---- tests ------------------------------------------------------------------------------------------ */

static void test_rounds(void **state)
{
    struct child c;
    child_start(&c, NULL);
    populate(&c);
    char command[64];
    for (int round = 1; round <= 6; round++) {
        struct held h = {0};
        snprintf(command, sizeof(command), "fill %d", round * 100);
        child_do(&c, command);
        struct bn_agent *a = attach(&c);
        assert_int_equal(page_of(a).state, BN_AGENT_ACTIVE);
        CHECK(bn_agent_close_gate(a, 10000, err));
        held_take(&h, a);
        assert_int_equal(h.n, 6);
        held_read(&h, &sim);
        CHECK(bn_agent_evict(a, err));
        assert_int_equal(page_of(a).state, BN_AGENT_EVICTED);
        assert_int_equal(page_of(a).epoch, round);
        if (round % 2)
            held_recreate(&h, &sim);
        CHECK(bn_agent_import(a, h.segs, h.fds, h.n, err));
        CHECK(bn_agent_import(a, h.segs, h.fds, h.n, err)); /* again: nothing happens */
        assert_int_equal(page_of(a).state, BN_AGENT_CLOSED);
        CHECK(bn_agent_open_gate(a, err));
        assert_int_equal(page_of(a).state, BN_AGENT_ACTIVE);
        bn_agent_free(a);
        held_free(&h);
        snprintf(command, sizeof(command), "check %d", round * 100);
        child_do(&c, command);
        child_do(&c, "export 2"); /* imported now, and exported all the same */
    }
    child_do(&c, "free 0");
    child_do(&c, "free 3");
    child_do(&c, "check 600");
    child_end(&c);
}

static void test_page(void **state)
{
    struct child c;
    child_start(&c, NULL);
    populate(&c);
    struct bn_agent *a = attach(&c);
    struct bn_agent_page page = page_of(a);
    assert_int_equal(page.pid, c.pid);
    assert_int_equal(page.gpu_count > 0, 1);
    assert_int_equal(page.allocations, 3);
    assert_int_equal(page.gpu[0].segments, 6);
    assert_int_equal(page.gpu[0].bytes, (size_t)(2 + 4 + 4 + 2 + 2 + 16) << 20);
    assert_int_equal(page.native_bytes, 4096);
    assert_string_equal(page.driver_path, need_env("BENNU_DRIVER"));
    child_do(&c, "free 1");
    page = page_of(a);
    assert_int_equal(page.allocations, 2);
    assert_int_equal(page.gpu[0].segments, 5);
    bn_agent_free(a);
    child_end(&c);
}

/* The memory is really gone, and threads that want it wait. */
static void test_threads_wait(void **state)
{
    struct child c;
    child_start(&c, NULL);
    populate(&c);
    child_do(&c, "hammer");
    for (int round = 0; round < 10; round++) {
        struct held h = {0};
        size_t before, between, total;
        struct bn_agent *a = attach(&c);
        CHECK(bn_agent_close_gate(a, 20000, err));
        held_take(&h, a);
        assert_int_equal(sim.cuMemGetInfo_v2(&before, &total), 0);
        CHECK(bn_agent_evict(a, err));
        if (round % 2) {
            held_read(&h, &sim);
            for (size_t i = 0; i < h.n; i++)
                close(h.fds[i]);
            assert_int_equal(sim.cuMemGetInfo_v2(&between, &total), 0);
            assert_int_equal(between - before, (size_t)30 << 20);
            for (size_t i = 0; i < h.n; i++)
                h.fds[i] = dup(0); /* closed by held_recreate */
            held_recreate(&h, &sim);
        }
        CHECK(bn_agent_import(a, h.segs, h.fds, h.n, err));
        CHECK(bn_agent_open_gate(a, err));
        bn_agent_free(a);
        held_free(&h);
    }
    unsigned long calls = 0, wrong = 1;
    child_do(&c, "stop");
    assert_int_equal(sscanf(c.answer, "ok %lu %lu", &calls, &wrong), 2);
    assert_int_equal(wrong, 0);
    assert_true(calls > 0);
    child_do(&c, "check 1");
    child_end(&c);
}

static void test_many_closings(void **state)
{
    struct child c;
    child_start(&c, NULL);
    populate(&c);
    child_do(&c, "hammer");
    struct bn_agent *a = attach(&c);
    for (int round = 0; round < 1000; round++) {
        CHECK(bn_agent_close_gate(a, 20000, err));
        CHECK(bn_agent_open_gate(a, err));
    }
    bn_agent_free(a);
    unsigned long calls = 0, wrong = 1;
    child_do(&c, "stop");
    assert_int_equal(sscanf(c.answer, "ok %lu %lu", &calls, &wrong), 2);
    assert_int_equal(wrong, 0);
    assert_true(calls > 0);
    child_end(&c);
}

/* A controller that is killed at any step leaves a process that the next one can bring back. `steps`: how far it gets. */
static void killed_controller(const struct child *c, int steps, const struct held *h)
{
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        struct bn_agent *a = NULL;
        struct bn_error err = BN_ERROR_INIT;
        struct held mine = {0};
        if (bn_agent_find(c->pid, &a) < 0 || bn_agent_attach(a, &err) < 0)
            _exit(1);
        if (steps > 0 && bn_agent_close_gate(a, 10000, &err) < 0)
            _exit(2);
        if (steps > 1 && bn_agent_list(a, &mine.segs, &mine.n, &err) < 0)
            _exit(3);
        mine.fds = malloc((mine.n + 1) * sizeof(int));
        if (steps == 2 && bn_agent_export(a, mine.segs, mine.n, mine.fds, &err) < 0)
            _exit(4);
        if (steps > 2 && bn_agent_evict(a, &err) < 0)
            _exit(5);
        if (steps > 3 && bn_agent_import(a, h->segs, h->fds, h->n / 2, &err) < 0)
            _exit(6);
        raise(SIGKILL);
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFSIGNALED(status));
}

static void test_killed_controllers(void **state)
{
    struct child c;
    child_start(&c, NULL);
    populate(&c);
    for (int steps = 0; steps <= 4; steps++) {
        struct held h = {0};
        struct bn_agent *a = attach(&c);
        if (steps > 2) {
            /* Somebody must hold the memory when it is evicted. */
            CHECK(bn_agent_close_gate(a, 10000, err));
            held_take(&h, a);
        }
        bn_agent_free(a);
        killed_controller(&c, steps, &h);
        a = attach(&c);
        uint32_t now = page_of(a).state;
        assert_int_equal(now, steps == 0 ? BN_AGENT_ACTIVE : steps <= 2 ? BN_AGENT_CLOSED : BN_AGENT_EVICTED);
        if (now == BN_AGENT_EVICTED)
            CHECK(bn_agent_import(a, h.segs, h.fds, h.n, err));
        if (now != BN_AGENT_ACTIVE)
            CHECK(bn_agent_open_gate(a, err));
        bn_agent_free(a);
        held_free(&h);
        child_do(&c, "check 1");
    }
    child_end(&c);
}

static void test_refusals(void **state)
{
    struct child c;
    child_start(&c, NULL);
    populate(&c);
    struct bn_agent *a = attach(&c);
    struct bn_error said = BN_ERROR_INIT;
    child_do(&c, "managed 65536");
    assert_int_equal(page_of(a).blockers.managed_bytes, 65536);
    assert_int_equal(bn_agent_close_gate(a, 5000, &said), -ENOTSUP);
    assert_non_null(strstr(said.text, "managed"));
    child_do(&c, "unmanage");
    assert_int_equal(page_of(a).blockers.managed_bytes, 0);
    child_do(&c, "capture");
    assert_int_equal(page_of(a).captures, 1);
    said = (struct bn_error)BN_ERROR_INIT;
    assert_int_equal(bn_agent_close_gate(a, 5000, &said), -EAGAIN);
    child_do(&c, "free 0"); /* deferred: nothing may be waited for now */
    child_do(&c, "endcapture");
    assert_int_equal(page_of(a).captures, 0);
    assert_int_equal(page_of(a).gpu[0].segments, 5);
    said = (struct bn_error)BN_ERROR_INIT;
    assert_int_equal(bn_agent_open_gate(a, &said), -EINVAL);
    said = (struct bn_error)BN_ERROR_INIT;
    assert_int_equal(bn_agent_evict(a, &said), -EINVAL);
    CHECK(bn_agent_close_gate(a, 5000, err));
    CHECK(bn_agent_open_gate(a, err));
    child_do(&c, "check 1");
    bn_agent_free(a);
    child_end(&c);
}

static void test_nothing_allocated(void **state)
{
    struct child c;
    struct held h = {0};
    child_start(&c, NULL);
    struct bn_agent *a = attach(&c);
    CHECK(bn_agent_close_gate(a, 5000, err));
    held_take(&h, a);
    assert_int_equal(h.n, 0);
    CHECK(bn_agent_evict(a, err));
    CHECK(bn_agent_open_gate(a, err));
    held_free(&h);
    bn_agent_free(a);
    child_do(&c, "alloc 2");
    child_do(&c, "check 1");
    child_end(&c);
}

/* ---- hostile messages -------------------------------------------------------------------------------- */

static int far_end(const struct child *c, struct bn_agent *a)
{
    int pidfd = bn_pidfd_open(c->pid);
    int fd = bn_pidfd_getfd(pidfd, page_of(a).far_fd);
    close(pidfd);
    assert_true(fd >= 0);
    return fd;
}

static void send_raw(int fd, const void *bytes, size_t len, const int *fds, size_t nfds)
{
    struct iovec iov = {(void *)bytes, len};
    assert_int_equal(bn_packet_send(fd, &iov, 1, fds, nfds), 0);
}

static int error_of_next_reply(int fd)
{
    char buf[BN_AGENT_MSG_MAX];
    struct bn_agent_msg head;
    int fds[BN_AGENT_BATCH];
    size_t len, nfds;
    assert_int_equal(bn_packet_recv(fd, buf, sizeof(buf), &len, fds, BN_AGENT_BATCH, &nfds), 0);
    assert_true(len >= sizeof(head));
    assert_int_equal(nfds, 0);
    memcpy(&head, buf, sizeof(head));
    return head.error;
}

static unsigned count_fds(pid_t pid)
{
    char command[64];
    unsigned n = 0;
    snprintf(command, sizeof(command), "ls /proc/%d/fd | wc -l", pid);
    FILE *f = popen(command, "re");
    assert_int_equal(fscanf(f, "%u", &n), 1);
    pclose(f);
    return n;
}

static void test_malformed(void **state)
{
    struct child c;
    child_start(&c, NULL);
    populate(&c);
    struct bn_agent *a = attach(&c);
    int fd = far_end(&c, a);
    unsigned before = count_fds(c.pid);
    static char buf[BN_AGENT_MSG_MAX];
    struct bn_agent_msg head = {.magic = BN_AGENT_MAGIC, .type = BN_AGENT_HELLO, .id = 1};
    int extra[3] = {0, 1, 2};

    send_raw(fd, "x", 1, NULL, 0);                   /* no answer */
    send_raw(fd, buf, sizeof(buf), NULL, 0);         /* no magic: no answer */
    send_raw(fd, &head, sizeof(head) - 1, extra, 3); /* too short: no answer, nothing kept */
    head.count = 5;
    send_raw(fd, &head, sizeof(head), NULL, 0);
    assert_int_equal(error_of_next_reply(fd), EBADMSG);
    head.count = 0x10000000;
    send_raw(fd, &head, sizeof(head), NULL, 0);
    assert_int_equal(error_of_next_reply(fd), EBADMSG);
    head.count = 0;
    send_raw(fd, &head, sizeof(head), extra, 3);
    assert_int_equal(error_of_next_reply(fd), EBADMSG);
    head.type = 999;
    send_raw(fd, &head, sizeof(head), NULL, 0);
    assert_int_equal(error_of_next_reply(fd), EOPNOTSUPP);
    head.type = BN_AGENT_IMPORT;
    head.count = 1;
    memcpy(buf, &head, sizeof(head));
    send_raw(fd, buf, sizeof(head) + sizeof(struct bn_agent_segment), extra, 1);
    assert_int_equal(error_of_next_reply(fd), EINVAL);
    head.type = BN_AGENT_LIST;
    head.count = 0;
    head.arg = ~0ULL;
    send_raw(fd, &head, sizeof(head), NULL, 0);
    assert_int_equal(error_of_next_reply(fd), EINVAL);
    CHECK(bn_agent_close_gate(a, 5000, err));
    send_raw(fd, &head, sizeof(head), NULL, 0);
    assert_int_equal(error_of_next_reply(fd), 0);
    head.type = BN_AGENT_EXPORT;
    send_raw(fd, &head, sizeof(head), NULL, 0);
    assert_int_equal(error_of_next_reply(fd), 0);
    CHECK(bn_agent_open_gate(a, err));
    assert_int_equal(count_fds(c.pid), before);
    close(fd);
    child_do(&c, "check 1");
    bn_agent_free(a);
    child_end(&c);
}

/* Nobody reads the answers: the agent still takes requests, and the next controller is served. */
static void test_unread_answers(void **state)
{
    struct child c;
    child_start(&c, NULL);
    struct bn_agent *a = attach(&c);
    int fd = far_end(&c, a);
    struct bn_agent_msg head = {.magic = BN_AGENT_MAGIC, .type = BN_AGENT_HELLO, .id = 1};
    for (int i = 0; i < 3000; i++)
        send_raw(fd, &head, sizeof(head), NULL, 0);
    close(fd);
    bn_agent_detach(a);
    CHECK(bn_agent_attach(a, err));
    CHECK(bn_agent_close_gate(a, 5000, err));
    CHECK(bn_agent_open_gate(a, err));
    bn_agent_free(a);
    child_end(&c);
}

/* A process fills the queue that requests go into, and reads none: whoever talks to it is not held up for ever. */
static void test_full_queue(void **state)
{
    struct child c;
    child_start(&c, NULL);
    struct bn_agent *a = attach(&c);
    int fd = far_end(&c, a);
    struct bn_agent_msg head = {.magic = BN_AGENT_MAGIC, .type = BN_AGENT_HELLO, .id = 1};
    struct iovec iov = {&head, sizeof(head)};
    int r;
    bn_agent_detach(a);
    kill(c.pid, SIGSTOP);
    while (bn_proc_state(c.pid, c.answer) == 0 && c.answer[0] != 'T')
        usleep(1000);
    while ((r = bn_packet_try_send(fd, &iov, 1, NULL, 0)) == 0)
        ;
    assert_int_equal(r, -EAGAIN);
    struct bn_error why = BN_ERROR_INIT;
    assert_int_equal(bn_agent_attach(a, &why), -ETIMEDOUT);
    kill(c.pid, SIGCONT);
    close(fd);
    CHECK(bn_agent_attach(a, err));
    bn_agent_free(a);
    child_end(&c);
}

/* ---- descriptors ------------------------------------------------------------------------------------- */

static void test_low_limit(void **state)
{
    /* Room for what the driver needs, far too little for a descriptor a segment: the soft limit is lifted meanwhile. */
    struct child c;
    child_start(&c, NULL);
    for (int i = 0; i < 100; i++)
        child_do(&c, "vmm 2 1");
    child_do(&c, "limit 64");
    for (int round = 0; round < 2; round++) {
        struct held h = {0};
        struct bn_agent *a = attach(&c);
        CHECK(bn_agent_close_gate(a, 10000, err));
        held_take(&h, a);
        assert_int_equal(h.n, 100);
        CHECK(bn_agent_evict(a, err));
        CHECK(bn_agent_import(a, h.segs, h.fds, h.n, err));
        CHECK(bn_agent_open_gate(a, err));
        bn_agent_free(a);
        held_free(&h);
        child_do(&c, "check 1");
    }
    child_end(&c);
}

static void test_no_descriptors_at_all(void **state)
{
    /* The agent finds no room at start: it steps aside, and the program works as without it. */
    struct child c;
    char limit[16];
    struct bn_agent *a = NULL;
    bool stepped_aside = false;
    for (int n = 64; n > 4 && !stepped_aside; n--) {
        snprintf(limit, sizeof(limit), "%d", n);
        pid_t pid = -1;
        int from[2];
        assert_int_equal(pipe2(from, O_CLOEXEC), 0);
        fflush(stdout);
        pid = fork();
        if (pid == 0) {
            dup2(from[1], 1);
            char *args[] = {"app", limit, NULL};
            execv(need_env("BENNU_TEST_APP"), args);
            _exit(127);
        }
        close(from[1]);
        char answer[64] = "";
        FILE *f = fdopen(from[0], "re");
        bool up = fgets(answer, sizeof(answer), f) && strncmp(answer, "ok", 2) == 0;
        int r = up ? bn_agent_find(pid, &a) : 0;
        if (up && (r == -ENOENT || page_of(a).state == BN_AGENT_INACTIVE))
            stepped_aside = true;
        if (up && r == 0) {
            bn_agent_free(a);
            a = NULL;
        }
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        fclose(f);
        if (!up)
            break;
    }
    if (!stepped_aside)
        skip(); /* this driver needs more descriptors than the agent */
    child_start(&c, limit);
    child_do(&c, "alloc 2");
    child_do(&c, "check 1");
    child_end(&c);
}

static void evict_and_restore(struct bn_agent *a)
{
    struct held h = {0};
    CHECK(bn_agent_close_gate(a, 10000, err));
    held_take(&h, a);
    CHECK(bn_agent_evict(a, err));
    CHECK(bn_agent_import(a, h.segs, h.fds, h.n, err));
    CHECK(bn_agent_open_gate(a, err));
    held_free(&h);
}

static void not_opened(struct child *user, const char *open)
{
    child_send(user, open);
    assert_non_null(fgets(user->answer, sizeof(user->answer), user->from));
    assert_string_equal(user->answer, "no 1 cuIpcOpenMemHandle\n");
}

/* IPC handles of converted memory: opened by another process, which is refused then; good again after an eviction. Blocks 10 to 29
 * share segments, and each handle is of one block all the same. */
static void test_ipc(void **state)
{
    static const int given[] = {0, 12, 15, 27, 30};
    enum { GIVEN = sizeof(given) / sizeof(given[0]) };
    struct child owner, user;
    char open[GIVEN][256];
    child_start(&owner, NULL);
    child_start(&user, NULL);
    for (int i = 0; i < 30; i++)
        child_do(&owner, "alloc 2");
    child_do(&owner, "alloc 3");
    struct bn_agent *a = attach(&owner), *b = attach(&user);
    assert_true(page_of(a).gpu[0].segments < 25);
    for (int i = 0; i < GIVEN; i++)
        child_open_command(&owner, given[i], open[i]);
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < GIVEN; i++) {
            struct bn_error said = BN_ERROR_INIT;
            child_do(&user, open[i]);
            assert_int_equal(page_of(b).blockers.imported_handles, 1);
            assert_int_equal(bn_agent_close_gate(b, 5000, &said), -ENOTSUP);
            child_do(&user, "ipcclose");
            assert_int_equal(page_of(b).blockers.imported_handles, 0);
        }
        evict_and_restore(b);
        evict_and_restore(a);
        child_do(&owner, "check 1");
    }
    /* The segment lives on with a neighbour; the handle does not. */
    child_do(&owner, "free 12");
    not_opened(&user, open[1]);
    child_do(&user, open[2]);
    child_do(&user, "ipcclose");
    child_do(&owner, "free 30");
    not_opened(&user, open[4]);
    bn_agent_free(a);
    bn_agent_free(b);
    child_end(&owner);
    child_end(&user);
}

/* Work that does not end in time: the answer names it, the program goes on, and the next try finds it done. */
static void test_busy(void **state)
{
    struct child c;
    child_start(&c, NULL);
    populate(&c);
    struct bn_agent *a = attach(&c);
    for (int inside = 0; inside < 2; inside++) {
        struct bn_error said = BN_ERROR_INIT;
        child_do(&c, "block");
        if (inside)
            child_do(&c, "wait");
        assert_int_equal(bn_agent_close_gate(a, 150, &said), -EBUSY);
        assert_non_null(strstr(said.text, "did not end within 150 ms"));
        assert_int_equal(page_of(a).state, BN_AGENT_ACTIVE);
        said = (struct bn_error)BN_ERROR_INIT;
        assert_int_equal(bn_agent_close_gate(a, 150, &said), -EBUSY);
        child_do(&c, "alloc 2"); /* the gate is open */
        child_do(&c, "unblock");
        CHECK(bn_agent_close_gate(a, 30000, err));
        CHECK(bn_agent_open_gate(a, err));
    }
    child_do(&c, "check 1");
    bn_agent_free(a);
    child_end(&c);
}

/* Whether the GPU is at work in the primary context cannot be told: then nothing may be taken away. */
static void test_work_unknown(void **state)
{
    static const char *const calls[] = {"cuDevicePrimaryCtxGetState", "cuDevicePrimaryCtxRetain",
                                        "cuCtxSetCurrent", "cuCtxSynchronize"};
    char path[] = "/tmp/bennu-agent-test-XXXXXX", rule[128];
    struct child c;
    setenv("BENNU_TEST_PRIMARY", "1", 1);
    child_start_failing(&c, path);
    unsetenv("BENNU_TEST_PRIMARY");
    populate(&c);
    struct bn_agent *a = attach(&c);
    for (size_t i = 0; i < sizeof(calls) / sizeof(calls[0]); i++) {
        struct bn_error said = BN_ERROR_INIT;
        child_do(&c, "block");
        snprintf(rule, sizeof(rule), "%s:1=999", calls[i]);
        say_failure(path, rule);
        assert_int_equal(bn_agent_close_gate(a, 150, &said), -EIO);
        assert_non_null(strstr(said.text, "CUDA_ERROR_UNKNOWN"));
        assert_int_equal(page_of(a).state, BN_AGENT_ACTIVE);
        child_do(&c, "unblock");
        CHECK(bn_agent_close_gate(a, 30000, err));
        CHECK(bn_agent_open_gate(a, err));
    }
    /* A context of which the agent never learns. */
    struct bn_error said = BN_ERROR_INIT;
    say_failure(path, "cuCtxFromGreenCtx:1=999");
    child_do(&c, "green");
    assert_int_equal(bn_agent_close_gate(a, 30000, &said), -ENOTSUP);
    assert_non_null(strstr(said.text, "kept track of"));
    child_do(&c, "check 1");
    unlink(path);
    bn_agent_free(a);
    child_end(&c);
}

/* The driver fails in the middle of things: nothing is lost, and another try succeeds. */
static void test_driver_fails(void **state)
{
    static const char *const evict[] = {"cuMemUnmap:1=999", "cuMemUnmap:4=999",
                                        "cuMemExportToShareableHandle:3=304"};
    static const char *const import[] = {"cuMemImportFromShareableHandle:1=2", "cuMemMap:3=2",
                                         "cuMemSetAccess:5=999", "cuMemImportFromShareableHandle:6=999"};
    char path[] = "/tmp/bennu-agent-test-XXXXXX";
    struct child c;
    child_start_failing(&c, path);
    populate(&c);
    struct bn_agent *a = attach(&c);
    for (size_t i = 0; i < sizeof(evict) / sizeof(evict[0]); i++) {
        struct held h = {0};
        struct bn_error said = BN_ERROR_INIT;
        CHECK(bn_agent_close_gate(a, 10000, err));
        CHECK(bn_agent_list(a, &h.segs, &h.n, err));
        h.fds = malloc((h.n + 1) * sizeof(int));
        say_failure(path, evict[i]);
        int r = bn_agent_export(a, h.segs, h.n, h.fds, &said);
        if (r == 0)
            r = bn_agent_evict(a, &said);
        else
            h.n = 0;
        assert_int_equal(r, -EIO);
        assert_int_equal(page_of(a).state, BN_AGENT_CLOSED);
        CHECK(bn_agent_open_gate(a, err));
        held_free(&h);
        child_do(&c, "check 1");
    }
    for (size_t i = 0; i < sizeof(import) / sizeof(import[0]); i++) {
        struct held h = {0};
        struct bn_error said = BN_ERROR_INIT;
        CHECK(bn_agent_close_gate(a, 10000, err));
        held_take(&h, a);
        CHECK(bn_agent_evict(a, err));
        say_failure(path, import[i]);
        int r = bn_agent_import(a, h.segs, h.fds, h.n, &said);
        assert_true(r == -ENOMEM || r == -EIO);
        assert_int_equal(page_of(a).state, BN_AGENT_EVICTED);
        said = (struct bn_error)BN_ERROR_INIT;
        assert_int_equal(bn_agent_open_gate(a, &said), -EINVAL);
        CHECK(bn_agent_import(a, h.segs, h.fds, h.n, err));
        CHECK(bn_agent_open_gate(a, err));
        held_free(&h);
        child_do(&c, "check 1");
    }
    unlink(path);
    bn_agent_free(a);
    child_end(&c);
}

/* A program frees memory that came back to it, and the driver does not let go: as long as it does not, a checkpoint could not be
 * restored. Nor is the memory lost for good. */
static void test_freeing_fails(void **state)
{
    static const char *const rules[] = {"cuMemRelease:1+=999", "cuMemUnmap:1+=999"};
    for (size_t i = 0; i < sizeof(rules) / sizeof(rules[0]); i++) {
        char path[] = "/tmp/bennu-agent-test-XXXXXX";
        struct bn_error said = BN_ERROR_INIT;
        size_t before, between, total;
        struct held h = {0};
        struct child c;
        assert_int_equal(sim.cuMemGetInfo_v2(&before, &total), 0);
        child_start_failing(&c, path);
        child_do(&c, "alloc 80");
        child_do(&c, "alloc 2");
        child_do(&c, "vmm 4 1");
        struct bn_agent *a = attach(&c);
        evict_and_restore(a);
        say_failure(path, rules[i]);
        child_do(&c, "free 0");
        CHECK(bn_agent_close_gate(a, 10000, err));
        held_take(&h, a);
        assert_int_equal(bn_agent_evict(a, &said), -EIO);
        assert_int_equal(page_of(a).state, BN_AGENT_CLOSED);
        CHECK(bn_agent_open_gate(a, err));
        held_free(&h);
        child_do(&c, "check 1");

        say_failure(path, "none:1=1");
        CHECK(bn_agent_close_gate(a, 10000, err));
        held_take(&h, a);
        assert_int_equal(h.n, 2);
        held_read(&h, &sim);
        CHECK(bn_agent_evict(a, err));
        for (size_t k = 0; k < h.n; k++)
            close(h.fds[k]);
        assert_int_equal(sim.cuMemGetInfo_v2(&between, &total), 0);
        assert_int_equal(between, before);
        for (size_t k = 0; k < h.n; k++)
            h.fds[k] = dup(0); /* closed by held_recreate */
        held_recreate(&h, &sim);
        CHECK(bn_agent_import(a, h.segs, h.fds, h.n, err));
        CHECK(bn_agent_open_gate(a, err));
        held_free(&h);
        child_do(&c, "check 1");
        unlink(path);
        bn_agent_free(a);
        child_end(&c);
    }
}

/* The same of another program's memory. */
static void test_closing_fails(void **state)
{
    char path[] = "/tmp/bennu-agent-test-XXXXXX", open[256];
    struct bn_error said = BN_ERROR_INIT;
    struct child owner, user;
    child_start(&owner, NULL);
    child_start_failing(&user, path);
    child_do(&owner, "alloc 2");
    child_open_command(&owner, 0, open);
    child_do(&user, open);
    say_failure(path, "cuMemUnmap:1+=999");
    child_do(&user, "ipcclose");
    struct bn_agent *a = attach(&user);
    assert_int_equal(bn_agent_close_gate(a, 10000, &said), -ENOTSUP);
    assert_non_null(strstr(said.text, "imported"));
    assert_int_equal(page_of(a).state, BN_AGENT_ACTIVE);
    say_failure(path, "none:1=1");
    evict_and_restore(a);
    assert_int_equal(page_of(a).blockers.imported_handles, 0);
    unlink(path);
    bn_agent_free(a);
    child_end(&owner);
    child_end(&user);
}

static void test_fork(void **state)
{
    struct child c;
    child_start(&c, NULL);
    populate(&c);
    child_do(&c, "ipcget 0"); /* which keeps a descriptor */
    child_do(&c, "fork");
    child_do(&c, "check 1");
    struct bn_agent *a = attach(&c);
    CHECK(bn_agent_close_gate(a, 5000, err));
    CHECK(bn_agent_open_gate(a, err));
    bn_agent_free(a);
    child_end(&c);
}

int main(void)
{
    own_machine("agent-evict");
    signal(SIGPIPE, SIG_IGN);
    sim_start(&sim);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rounds),
        cmocka_unit_test(test_page),
        cmocka_unit_test(test_threads_wait),
        cmocka_unit_test(test_many_closings),
        cmocka_unit_test(test_killed_controllers),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_nothing_allocated),
        cmocka_unit_test(test_malformed),
        cmocka_unit_test(test_unread_answers),
        cmocka_unit_test(test_full_queue),
        cmocka_unit_test(test_low_limit),
        cmocka_unit_test(test_no_descriptors_at_all),
        cmocka_unit_test(test_fork),
        cmocka_unit_test(test_ipc),
        cmocka_unit_test(test_busy),
        cmocka_unit_test(test_work_unknown),
        cmocka_unit_test(test_driver_fails),
        cmocka_unit_test(test_freeing_fails),
        cmocka_unit_test(test_closing_fails),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
