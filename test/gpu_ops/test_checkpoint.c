/* The driver's checkpoint calls on other processes. */
#include "common.h"

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct bn_copier *copier;

static int up(void **state)
{
    struct bn_copier_config config = {.buffer = 2 * MIB, .workers = 2};
    struct bn_error err = BN_ERROR_INIT;
    if (open_gpu(state) < 0)
        return -1;
    return bn_copier_new(gpu, &config, &copier, &err);
}

static int down(void **state)
{
    bn_copier_free(copier);
    return close_gpu(state);
}

static void ready(struct child *c)
{
    int r = -1;
    assert_int_equal(hear(c->sock, &r, sizeof(r), NULL, 0), sizeof(r));
    assert_int_equal(r, 0);
}

static void still_right(struct child *c)
{
    say(c->sock, "x", 1, NULL, 0);
    ready(c);
}

static bool asked; /* the driver, by the latest restore */

static void assert_state(struct child *c, enum bn_ckpt_state expected)
{
    enum bn_ckpt_state s = (enum bn_ckpt_state)99;
    struct bn_error err = BN_ERROR_INIT;
    assert_ok(bn_ckpt_state(gpu, c->pid, &s, &err), &err);
    assert_int_equal(s, expected);
}

static void steps(void **state)
{
    struct bn_error err = BN_ERROR_INIT;
    struct child c = child_start("cuda", NULL);
    pid_t tid = 0;
    ready(&c);
    assert_state(&c, BN_CKPT_RUNNING);
    assert_ok(bn_ckpt_thread(gpu, c.pid, &tid, &err), &err);
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/task/%d", (int)c.pid, (int)tid);
    assert_int_equal(access(path, F_OK), 0);

    for (int round = 0; round < 3; round++) {
        assert_ok(bn_ckpt_lock(gpu, c.pid, 10000, &err), &err);
        assert_state(&c, BN_CKPT_LOCKED);
        assert_ok(bn_ckpt_checkpoint(gpu, c.pid, &err), &err);
        assert_state(&c, BN_CKPT_CHECKPOINTED);
        assert_ok(bn_ckpt_restore(gpu, c.pid, NULL, &asked, &err), &err);
        assert_state(&c, BN_CKPT_LOCKED);
        assert_ok(bn_ckpt_unlock(gpu, c.pid, &err), &err);
        assert_state(&c, BN_CKPT_RUNNING);
        still_right(&c);
    }
    child_end(&c);
}

/* No descriptors are left to look at the process with: the driver is not asked, so nothing is lost. */
static void restore_not_tried(void **state)
{
    struct bn_error err = BN_ERROR_INIT;
    struct rlimit full, none;
    struct child c = child_start("cuda", NULL);
    ready(&c);
    assert_ok(bn_ckpt_lock(gpu, c.pid, 10000, &err), &err);
    assert_ok(bn_ckpt_checkpoint(gpu, c.pid, &err), &err);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &full), 0);
    none = (struct rlimit){0, full.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &none), 0);
    int r = bn_ckpt_restore(gpu, c.pid, NULL, &asked, &err);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &full), 0);
    assert_fails(r, EMFILE, &err);
    assert_false(asked);
    err = BN_ERROR_INIT;
    assert_ok(bn_ckpt_restore(gpu, c.pid, NULL, &asked, &err), &err);
    assert_true(asked);
    assert_ok(bn_ckpt_unlock(gpu, c.pid, &err), &err);
    still_right(&c);
    child_end(&c);
}

static void wrong_state(void **state)
{
    struct bn_error err = BN_ERROR_INIT;
    struct child c = child_start("cuda", NULL);
    ready(&c);
    assert_fails(bn_ckpt_checkpoint(gpu, c.pid, &err), EINVAL, &err);
    assert_non_null(strstr(err.text, "is running and would have to be locked"));
    err = BN_ERROR_INIT;
    assert_fails(bn_ckpt_unlock(gpu, c.pid, &err), EINVAL, &err);
    err = BN_ERROR_INIT;
    assert_fails(bn_ckpt_restore(gpu, c.pid, NULL, &asked, &err), EINVAL, &err);
    err = BN_ERROR_INIT;
    assert_ok(bn_ckpt_lock(gpu, c.pid, 10000, &err), &err);
    assert_fails(bn_ckpt_lock(gpu, c.pid, 10000, &err), EINVAL, &err);
    err = BN_ERROR_INIT;
    assert_ok(bn_ckpt_unlock(gpu, c.pid, &err), &err);
    still_right(&c);
    child_end(&c);
}

static void *sleeper(void *arg)
{
    sem_t *s = arg;
    sem_wait(s);
    return NULL;
}

static void no_cuda(void **state)
{
    struct bn_error err = BN_ERROR_INIT;
    enum bn_ckpt_state s;
    pid_t tid;
    struct child c = child_start("plain", NULL);
    ready(&c);
    assert_state(&c, BN_CKPT_NO_CUDA);
    assert_fails(bn_ckpt_thread(gpu, c.pid, &tid, &err), ENODEV, &err);
    err = BN_ERROR_INIT;
    assert_fails(bn_ckpt_lock(gpu, c.pid, 1000, &err), ENODEV, &err);
    err = BN_ERROR_INIT;
    assert_fails(bn_ckpt_restore(gpu, c.pid, NULL, &asked, &err), ENODEV, &err);
    pid_t gone = c.pid;
    child_end(&c);
    err = BN_ERROR_INIT;
    assert_fails(bn_ckpt_state(gpu, gone, &s, &err), ESRCH, &err);
    err = BN_ERROR_INIT;
    assert_fails(bn_ckpt_lock(gpu, gone, 0, &err), ESRCH, &err);
    err = BN_ERROR_INIT;
    assert_fails(bn_ckpt_state(gpu, -1, &s, &err), EINVAL, &err);

    /* A thread is no process, whatever the driver thinks. Ours are easy to find. */
    pthread_t t;
    sem_t end;
    sem_init(&end, 0, 0);
    assert_int_equal(pthread_create(&t, NULL, sleeper, &end), 0);
    assert_ok(bn_ckpt_thread(gpu, getpid(), &tid, &err), &err);
    err = BN_ERROR_INIT;
    assert_int_not_equal(tid, getpid());
    assert_fails(bn_ckpt_state(gpu, tid, &s, &err), EINVAL, &err);
    sem_post(&end);
    pthread_join(t, NULL);
}

/* The GPU's files open and no CUDA that the driver knows of: neither "no CUDA" nor a CUDA process. */
static void files_only(void **state)
{
    struct bn_error err = BN_ERROR_INIT;
    int r = -1;
    struct child c = child_start("files", NULL);
    assert_int_equal(hear(c.sock, &r, sizeof(r), NULL, 0), sizeof(r));
    if (r == 77) {
        child_end(&c);
        skip();
    }
    assert_int_equal(r, 0);
    assert_state(&c, BN_CKPT_FILES_ONLY);
    assert_fails(bn_ckpt_lock(gpu, c.pid, 1000, &err), ENODEV, &err);
    assert_non_null(strstr(err.text, "device files"));
    child_end(&c);
}

/* The driver's "invalid value" for a process that does use CUDA must not read as "no CUDA" to the steps. */
static void other_answers(void **state)
{
    struct bn_error err = BN_ERROR_INIT;
    enum bn_ckpt_state s;
    struct child c = child_start("cuda", NULL);
    ready(&c);
    inject("cuCheckpointProcessGetState:1=999");
    assert_fails(bn_ckpt_state(gpu, c.pid, &s, &err), EIO, &err);
    inject("cuCheckpointProcessLock:1=600");
    err = BN_ERROR_INIT;
    assert_fails(bn_ckpt_lock(gpu, c.pid, 1, &err), EBUSY, &err);
    inject("cuCheckpointProcessLock:1=1");
    err = BN_ERROR_INIT;
    assert_fails(bn_ckpt_lock(gpu, c.pid, 1, &err), EINVAL, &err);
    assert_non_null(strstr(err.text, "which is running"));
    inject("");
    err = BN_ERROR_INIT;
    assert_ok(bn_ckpt_lock(gpu, c.pid, 10000, &err), &err);
    inject("cuCheckpointProcessCheckpoint:1=801");
    assert_fails(bn_ckpt_checkpoint(gpu, c.pid, &err), ENOTSUP, &err);
    inject("");
    err = BN_ERROR_INIT;
    assert_ok(bn_ckpt_checkpoint(gpu, c.pid, &err), &err);
    inject("cuCheckpointProcessRestore:1=2");
    assert_fails(bn_ckpt_restore(gpu, c.pid, NULL, &asked, &err), ENOMEM, &err);
    inject("cuCheckpointProcessRestore:1=304");
    err = BN_ERROR_INIT;
    assert_fails(bn_ckpt_restore(gpu, c.pid, NULL, &asked, &err), EIO, &err);
    inject("");
    err = BN_ERROR_INIT;
    assert_ok(bn_ckpt_restore(gpu, c.pid, NULL, &asked, &err), &err);
    assert_ok(bn_ckpt_unlock(gpu, c.pid, &err), &err);
    still_right(&c);
    child_end(&c);
}

static void refusals(void **state)
{
    if (!bn_gpu_simulated(gpu))
        skip();
    struct bn_error err = BN_ERROR_INIT;
    struct child c = child_start("cuda", "BENNU_SIM_MPS=1");
    ready(&c);
    assert_fails(bn_ckpt_lock(gpu, c.pid, 1000, &err), ENOTSUP, &err);
    assert_non_null(strstr(err.text, "MPS"));
    child_end(&c);

    /* Imported memory still mapped at the checkpoint: the restore fails for good. */
    struct {
        uint64_t size[64], expect, leave;
        uint32_t n;
    } order = {.size = {2 * MIB}, .expect = 1, .leave = 2, .n = 1};
    uint64_t size = 2 * MIB;
    struct bn_gpu_set *set = make_set(0, 1, &size, 1);
    assert_int_equal(set_fill(copier, set, 1), 0);
    int fd = bn_gpu_set_fd(set, 0, &err);
    c = child_start("import", NULL);
    say(c.sock, &order.n, sizeof(order.n), NULL, 0);
    say(c.sock, &order, sizeof(order), &fd, 1);
    ready(&c);
    err = BN_ERROR_INIT;
    assert_ok(bn_ckpt_lock(gpu, c.pid, 10000, &err), &err);
    assert_ok(bn_ckpt_checkpoint(gpu, c.pid, &err), &err);
    assert_fails(bn_ckpt_restore(gpu, c.pid, NULL, &asked, &err), ENOTSUP, &err);
    assert_non_null(strstr(err.text, "lost"));
    child_kill(&c);
    bn_gpu_set_free(set);
}

static void other_gpu(void **state)
{
    if (bn_gpu_count(gpu) < 2)
        skip();
    struct bn_error err = BN_ERROR_INIT;
    struct bn_ckpt_pairs pairs = {.n = bn_gpu_count(gpu), .used = 1};
    for (unsigned i = 0; i < pairs.n; i++) {
        memcpy(pairs.v[i].from, bn_gpu_info(gpu, i)->uuid, 16);
        memcpy(pairs.v[i].to, bn_gpu_info(gpu, (i + 1) % pairs.n)->uuid, 16);
    }
    struct child c = child_start("cuda", NULL);
    ready(&c);
    assert_ok(bn_ckpt_lock(gpu, c.pid, 10000, &err), &err);
    assert_ok(bn_ckpt_checkpoint(gpu, c.pid, &err), &err);
    if (bn_gpu_simulated(gpu)) { /* the same call on a driver that has no gpuPairs yet */
        struct bn_gpu *old;
        setenv("BENNU_SIM_DRIVER_VERSION", "12080", 1);
        assert_ok(bn_gpu_open(driver_path(), &old, &err), &err);
        unsetenv("BENNU_SIM_DRIVER_VERSION");
        assert_fails(bn_ckpt_restore(old, c.pid, &pairs, &asked, &err), ENOSYS, &err);
        bn_gpu_close(old);
        err = BN_ERROR_INIT;
    }
    assert_ok(bn_ckpt_restore(gpu, c.pid, &pairs, &asked, &err), &err);
    assert_ok(bn_ckpt_unlock(gpu, c.pid, &err), &err);
    still_right(&c);
    child_end(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(steps),         cmocka_unit_test(restore_not_tried), cmocka_unit_test(wrong_state),
        cmocka_unit_test(no_cuda),       cmocka_unit_test(refusals),          cmocka_unit_test(other_gpu),
        cmocka_unit_test(other_answers), cmocka_unit_test(files_only),
    };
    return cmocka_run_group_tests(tests, up, down);
}
