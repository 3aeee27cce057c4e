/* Processes that cannot be looked at, because descriptors have run out: they are neither gone nor at large. */
#include "base/cleanup.h"
#include "base/proc.h"
#include "checkpoint/recover.h"
#include "checkpoint/record.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static struct rlimit plenty;

/* As many descriptors more as `room` and no more. Its end: fed(). */
static void starve(unsigned room)
{
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &plenty), 0);
    int lowest = dup(0);
    assert_true(lowest >= 0);
    close(lowest);
    struct rlimit few = {.rlim_cur = (rlim_t)lowest + room, .rlim_max = plenty.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
}

static void fed(void)
{
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &plenty), 0);
}

static struct bn_target start(void)
{
    struct bn_target t = {.pid = fork()};
    assert_true(t.pid >= 0);
    if (t.pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    t.pidfd = bn_pidfd_open(t.pid);
    assert_true(t.pidfd >= 0);
    return t;
}

static void end(const struct bn_target *t)
{
    kill(t->pid, SIGKILL);
    assert_int_equal(waitpid(t->pid, NULL, 0), t->pid);
}

static int take_up(pid_t pid, uint64_t started)
{
    uint8_t none[16] = {0};
    bn_auto_writer w = {0};
    bn_write_u32(&w, 2); /* version */
    bn_write_u32(&w, BN_RECORD_SUSPENDED);
    bn_write_u64(&w, 1); /* session */
    bn_write_u32(&w, (uint32_t)pid);
    bn_write_u32(&w, (uint32_t)pid);
    bn_write_u64(&w, started);
    bn_write_bytes(&w, none, sizeof(none));
    bn_write_u32(&w, 0); /* segments, parts */
    bn_write_u32(&w, 0);
    assert_false(w.failed);
    struct bn_record record = {.bytes = w.buf, .nbytes = w.len};
    struct bn_target t;
    int *fds = NULL;
    int r = bn_record_target(&record, NULL, &t, &fds, NULL);
    if (r == 0) {
        assert_int_equal(t.inner, pid);
        bn_target_clear(&t);
    }
    return r;
}

static void test_take_up(void **state)
{
    (void)state;
    uint64_t started;
    struct bn_target t = start();
    assert_int_equal(bn_proc_start_time(t.pid, &started), 0);
    assert_int_equal(take_up(t.pid, started), 0);
    assert_int_equal(take_up(t.pid, started + 1), -ESRCH);
    for (unsigned room = 0; room < 2; room++) { /* one is the pidfd's */
        starve(room);
        int r = take_up(t.pid, started);
        fed();
        assert_int_equal(r, -EMFILE);
    }
    end(&t);
    assert_int_equal(take_up(t.pid, started), -ESRCH);
    close(t.pidfd);
}

static unsigned puts_seen;

static int put(struct bn_guard *g, uint64_t key, uint32_t kind, const struct bn_writer *body, const int *fds,
               size_t nfds, struct bn_error *err)
{
    (void)g, (void)key, (void)kind, (void)body, (void)fds, (void)nfds, (void)err;
    puts_seen++;
    return 0;
}

static uint64_t new_key(struct bn_guard *g)
{
    (void)g;
    return 7;
}

static void test_put(void **state)
{
    (void)state;
    struct bn_guard guard = {.put = put, .new_key = new_key};
    struct bn_env env = {.guard = &guard};
    struct bn_error err = BN_ERROR_INIT;
    struct bn_target t = start();
    struct bn_quiesce q = {.env = &env, .targets = {.v = &t, .n = 1}};
    starve(0);
    int r = bn_records_put(&q, BN_STAGE_GUARDED, &err);
    fed();
    assert_int_equal(r, -EMFILE);
    assert_true(bn_error_is_set(&err));
    assert_int_equal(puts_seen, 0);
    assert_int_equal(bn_records_put(&q, BN_STAGE_GUARDED, NULL), 0);
    assert_int_equal(puts_seen, 1);
    end(&t);
    assert_int_equal(bn_records_put(&q, BN_STAGE_GUARDED, NULL), 0);
    assert_int_equal(puts_seen, 1);
    close(t.pidfd);
}

static void test_wait(void **state)
{
    (void)state;
    struct bn_target t = start();
    assert_int_equal(bn_target_wait_runnable(&t, 10000), 0);
    starve(0);
    assert_int_equal(bn_target_wait_runnable(&t, 20), -ETIMEDOUT);
    fed();
    kill(t.pid, SIGSTOP);
    int status;
    assert_int_equal(waitpid(t.pid, &status, WUNTRACED), t.pid);
    assert_int_equal(bn_target_wait_runnable(&t, 20), -ETIMEDOUT);
    starve(0);
    assert_int_equal(bn_target_wait_runnable(&t, 20), -ETIMEDOUT);
    fed();
    end(&t);
    starve(0);
    assert_int_equal(bn_target_wait_runnable(&t, 10000), -ESRCH);
    fed();
    close(t.pidfd);
}

static void test_agent(void **state)
{
    (void)state;
    struct bn_agent *agent = NULL;
    bn_auto_fd fd = memfd_create(BN_AGENT_MEMFD, MFD_CLOEXEC); /* found, but no agent's */
    assert_true(fd >= 0);
    assert_int_equal(bn_agent_find(getpid(), &agent), -ENOENT);
    for (unsigned room = 0; room < 3; room++) { /* pidfd, folder, file */
        starve(room);
        int r = bn_agent_find(getpid(), &agent);
        fed();
        assert_int_equal(r, -EMFILE);
    }
}

static void test_library(void **state)
{
    (void)state;
    struct bn_target t = start();
    assert_int_equal(bn_target_maps_driver(t.pid), 0);
    starve(0);
    int r = bn_target_maps_driver(t.pid);
    fed();
    assert_int_equal(r, -EMFILE);
    end(&t);
    assert_int_equal(bn_target_maps_driver(t.pid), 0);
    close(t.pidfd);
}

static void test_image(void **state)
{
    (void)state;
    int fds[2] = {open("/proc/self/exe", O_RDONLY | O_CLOEXEC), open("/proc", O_RDONLY | O_CLOEXEC)};
    assert_true(fds[0] >= 0 && fds[1] >= 0);
    struct bn_record record = {.kind = BN_RECORD_IMAGE, .fds = fds, .nfds = 1};
    /* No folder: whether a manifest is in it cannot be told. */
    assert_false(bn_recover_image(&record, true));
    assert_false(bn_recover_image(&record, false));
    record.fds = fds + 1; /* a folder without */
    assert_true(bn_recover_image(&record, true));
    close(fds[0]);
    close(fds[1]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_take_up), cmocka_unit_test(test_put),     cmocka_unit_test(test_wait),
        cmocka_unit_test(test_agent),   cmocka_unit_test(test_library), cmocka_unit_test(test_image),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
