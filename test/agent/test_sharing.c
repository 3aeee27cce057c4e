/* Who may have a program's GPU memory open, as far as pages tell. The programs around it are named here: what else runs on the
 * machine does not count. */
#include "child.h"
#include "machine.h"

#include "checkpoint/sharing.h"

#include <errno.h>

static struct bn_gpu *gpu;
static const char *fail_file;

struct people {
    struct child owner, user, stranger; /* with an agent, with one, without */
};

static void start_all(struct people *p)
{
    const char *agent = need_env("BENNU_AGENT");
    child_start(&p->owner, NULL);
    child_start(&p->user, NULL);
    setenv("BENNU_AGENT", need_env("BENNU_DRIVER"), 1);
    child_start(&p->stranger, NULL);
    setenv("BENNU_AGENT", agent, 1);
    child_do(&p->owner, "alloc 2");
    child_do(&p->owner, "vmm 2 1");
}

static void end_all(struct people *p)
{
    child_do(&p->owner, "check 1");
    child_end(&p->owner);
    child_end(&p->user);
    child_end(&p->stranger);
}

static int check(const struct child *owner, const struct child *one, const struct child *two,
                 struct bn_error *err)
{
    struct bn_targets targets;
    const pid_t pids[] = {one->pid, two ? two->pid : 0};
    *err = (struct bn_error)BN_ERROR_INIT;
    assert_int_equal(bn_targets_find(gpu, owner->pid, 0, &targets, err), 0);
    assert_int_equal(targets.n, 1);
    int r = bn_sharing_check_with(gpu, &targets, pids, two ? 2 : 1, err);
    bn_targets_free(&targets);
    return r;
}

static void passes(const struct child *owner, const struct child *one, const struct child *two)
{
    struct bn_error err;
    if (check(owner, one, two, &err) < 0)
        fail_msg("refused: %s", err.text);
}

static void refused(const struct child *owner, const struct child *outside, const char *word)
{
    struct bn_error err;
    char pid[16];
    assert_int_equal(check(owner, outside, NULL, &err), -ENOTSUP);
    snprintf(pid, sizeof(pid), "%d", owner->pid);
    assert_non_null(strstr(err.text, pid));
    snprintf(pid, sizeof(pid), "%d", outside->pid);
    assert_non_null(strstr(err.text, pid));
    assert_non_null(strstr(err.text, word));
    assert_true(strlen(err.text) < sizeof(err.text) - 1);
}

static struct bn_agent_sharing sharing(const struct child *c)
{
    struct bn_agent *a;
    struct bn_agent_page page;
    assert_int_equal(bn_agent_find(c->pid, &a), 0);
    assert_int_equal(bn_agent_page(a, &page), 0);
    assert_true(page.knows & BN_AGENT_KNOWS_SHARING);
    bn_agent_free(a);
    return page.sharing;
}

static void test_nothing_shared(void **state)
{
    (void)state;
    struct people p;
    start_all(&p);
    passes(&p.owner, &p.user, &p.stranger);
    end_all(&p);
}

/* Handles of the agent's: exact. */
static void test_ipc(void **state)
{
    (void)state;
    struct people p;
    char open[256];
    start_all(&p);
    child_do(&p.owner, "ipcget 0");
    child_open_command(&p.owner, 0, open);
    assert_int_equal(sharing(&p.owner).ipc, 1);
    passes(&p.owner, &p.user, &p.stranger);
    child_do(&p.user, open);
    refused(&p.owner, &p.user, "uses GPU memory");
    passes(&p.owner, &p.stranger, NULL);
    child_do(&p.user, "ipcclose");
    passes(&p.owner, &p.user, NULL);
    child_do(&p.user, open);
    child_do(&p.owner, "free 0");
    assert_int_equal(sharing(&p.owner).ipc, 0);
    passes(&p.owner, &p.user, NULL); /* it keeps what the owner has no more */
    end_all(&p);
}

/* Handles of the driver's, for memory that is not the agent's: nobody can be named. */
static void test_native_ipc(void **state)
{
    (void)state;
    struct people p;
    start_all(&p);
    child_do(&p.owner, "small 4096");
    child_do(&p.owner, "ipcsmall");
    assert_int_equal(sharing(&p.owner).ipc_native, 1);
    passes(&p.owner, &p.user, NULL);
    refused(&p.owner, &p.stranger, "bennu run");
    child_do(&p.owner, "freesmall");
    assert_int_equal(sharing(&p.owner).ipc_native, 0);
    passes(&p.owner, &p.user, &p.stranger);
    end_all(&p);
}

/* Descriptors: an agent says that its process has none of anybody's; without one nobody can tell. */
static void test_vmm(void **state)
{
    (void)state;
    struct people p;
    char take[64];
    start_all(&p);
    child_do(&p.owner, "export 1");
    assert_int_equal(sharing(&p.owner).vmm, 1);
    passes(&p.owner, &p.user, NULL);
    refused(&p.owner, &p.stranger, "bennu run");
    child_do(&p.owner, "give 1");
    assert_int_equal(sharing(&p.owner).vmm, 1);
    snprintf(take, sizeof(take), "take %d %d", p.owner.pid, atoi(p.owner.answer + 3));
    child_do(&p.user, take);
    refused(&p.owner, &p.user, "has imported");
    child_do(&p.user, "untake");
    passes(&p.owner, &p.user, NULL);
    child_do(&p.owner, "free 1");
    assert_int_equal(sharing(&p.owner).vmm, 0);
    passes(&p.owner, &p.user, &p.stranger);
    end_all(&p);
}

static void faults(const char *rules)
{
    FILE *f = fopen(fail_file, "w");
    assert_non_null(f);
    assert_true(fputs(rules, f) >= 0);
    assert_int_equal(fclose(f), 0);
}

/* Gates may be closed meanwhile: a process outside is looked at once. The first question to the driver is about the owner, the
 * second about the stranger; after a third, which says that it does not use CUDA, it would pass. */
static void test_looked_at_once(void **state)
{
    (void)state;
    struct people p;
    start_all(&p);
    child_do(&p.owner, "export 1");
    faults("cuCheckpointProcessGetState:3+=3");
    refused(&p.owner, &p.stranger, "bennu run");
    faults("");
    child_do(&p.owner, "free 1");
    end_all(&p);
}

/* What may still use the memory cannot be waited for: it stays open. */
static void test_not_closed(void **state)
{
    (void)state;
    struct people p;
    char open[256];
    start_all(&p);
    child_open_command(&p.owner, 0, open);
    child_do(&p.user, open);
    child_do(&p.user, "ipcshut");
    faults("cuCtxSynchronize:1=700");
    child_send(&p.user, "ipcshut");
    assert_non_null(fgets(p.user.answer, sizeof(p.user.answer), p.user.from));
    assert_string_equal(p.user.answer, "no 700\n");
    refused(&p.owner, &p.user, "uses GPU memory");
    faults("");
    child_do(&p.user, "ipcshut");
    passes(&p.owner, &p.user, NULL);
    end_all(&p);
}

/* More owners than there are entries: not named, but counted, whoever of the others closes his. */
static void test_many_owners(void **state)
{
    (void)state;
    struct people p;
    struct child more[BN_AGENT_OPENED_MAX];
    char open[256];
    start_all(&p);
    child_do(&p.owner, "ipcget 0");
    for (unsigned i = 0; i < BN_AGENT_OPENED_MAX; i++) {
        passes(&p.owner, &p.user, NULL);
        child_start(&more[i], NULL);
        child_do(&more[i], "alloc 2");
        child_open_command(&more[i], 0, open);
        child_do(&p.user, open);
        if (i == 0)
            child_do(&p.user, "ipcswap");
    }
    child_open_command(&p.owner, 0, open);
    child_do(&p.user, open);
    refused(&p.owner, &p.user, "has imported");
    child_do(&p.user, "ipcswap");
    child_do(&p.user, "ipcclose");
    refused(&p.owner, &p.user, "has imported");
    refused(&more[1], &p.user, "uses GPU memory");
    child_do(&p.user, "ipcswap");
    child_do(&p.user, "ipcclose");
    refused(&more[1], &p.user, "uses GPU memory");
    for (unsigned i = 0; i < BN_AGENT_OPENED_MAX; i++)
        child_end(&more[i]);
    end_all(&p);
}

/* What a program has open it keeps when its agent is gone. */
static void test_agent_gone(void **state)
{
    (void)state;
    for (int page = 0; page < 2; page++) {
        struct people p;
        struct bn_agent *a;
        struct bn_agent_page now;
        char open[256];
        start_all(&p);
        child_open_command(&p.owner, 0, open);
        child_do(&p.user, open);
        if (page) {
            child_do(&p.user, "unagent 0");
            refused(&p.owner, &p.user, "closed the descriptors");
        } else {
            assert_int_equal(bn_agent_find(p.user.pid, &a), 0);
            child_do(&p.user, "unagent 1");
            do
                assert_int_equal(bn_agent_page(a, &now), 0);
            while (now.state != BN_AGENT_INACTIVE && usleep(1000) == 0);
            bn_agent_free(a);
            refused(&p.owner, &p.user, "uses GPU memory");
            child_do(&p.user, "ipcclose");
            passes(&p.owner, &p.user, NULL);
        }
        end_all(&p);
    }
}

/* The driver says of a program that is checkpointed now and then that it has no CUDA: its page knows better. */
static void test_driver_is_wrong(void **state)
{
    (void)state;
    struct people p;
    char open[256];
    start_all(&p);
    child_open_command(&p.owner, 0, open);
    child_do(&p.user, open);
    faults("cuCheckpointProcessGetState:2+=3");
    refused(&p.owner, &p.user, "uses GPU memory");
    faults("");
    end_all(&p);
}

int main(void)
{
    struct bn_error err = BN_ERROR_INIT;
    char path[] = "/tmp/bennu-agent-test-XXXXXX";
    int fd = mkstemp(path);
    own_machine("agent-sharing");
    if (fd < 0)
        return 1;
    close(fd);
    fail_file = path;
    setenv("BENNU_SIM_FAIL_FILE", path, 1);
    signal(SIGPIPE, SIG_IGN);
    if (bn_gpu_open(need_env("BENNU_DRIVER"), &gpu, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        unlink(path);
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nothing_shared),  cmocka_unit_test(test_ipc),
        cmocka_unit_test(test_native_ipc),      cmocka_unit_test(test_vmm),
        cmocka_unit_test(test_looked_at_once),  cmocka_unit_test(test_not_closed),
        cmocka_unit_test(test_many_owners),     cmocka_unit_test(test_agent_gone),
        cmocka_unit_test(test_driver_is_wrong),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    bn_gpu_close(gpu);
    unlink(path);
    return failed;
}
