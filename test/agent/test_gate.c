/* The gate: while it is closed nobody is inside, and everybody goes on when it opens. Runs under ThreadSanitizer too. */
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "agent/gate.h"

#define SECOND 1000000000ULL

struct hammer {
    pthread_t thread;
    uint64_t calls;
    /* Plain memory on purpose: the gate alone keeps the closer's accesses and the caller's apart. */
    uint64_t inside, entered;
};

#define HAMMERS 3
static struct hammer hammers[HAMMERS];
static uint32_t stop;

static void call(struct hammer *h)
{
    bn_gate_enter();
    h->inside++;
    bn_gate_enter(); /* a wrapper that calls another */
    h->entered++;
    bn_gate_leave();
    h->inside--;
    bn_gate_leave();
    bn_store(&h->calls, h->calls + 1);
}

static void *hammer_main(void *arg)
{
    struct hammer *h = arg;
    while (!bn_load(&stop))
        call(h);
    return NULL;
}

static void wait_for_progress(void)
{
    for (int i = 0; i < HAMMERS; i++) {
        uint64_t before = bn_load(&hammers[i].calls);
        while (bn_load(&hammers[i].calls) == before)
            sched_yield();
    }
}

static void rounds(int n)
{
    stop = 0;
    for (int i = 0; i < HAMMERS; i++) {
        hammers[i] = (struct hammer){0};
        assert_int_equal(pthread_create(&hammers[i].thread, NULL, hammer_main, &hammers[i]), 0);
    }
    for (int round = 0; round < n; round++) {
        pid_t holder;
        assert_int_equal(bn_gate_close(bn_clock_ns() + 60 * SECOND, &holder), 0);
        uint64_t seen[HAMMERS];
        for (int i = 0; i < HAMMERS; i++) {
            assert_int_equal(hammers[i].inside, 0);
            seen[i] = hammers[i].entered;
            hammers[i].entered = seen[i] + 1;
        }
        sched_yield();
        for (int i = 0; i < HAMMERS; i++)
            assert_int_equal(hammers[i].entered, seen[i] + 1);
        bn_gate_open();
        if (round % 100 == 0)
            wait_for_progress();
    }
    bn_store(&stop, 1);
    for (int i = 0; i < HAMMERS; i++)
        pthread_join(hammers[i].thread, NULL);
    for (int i = 0; i < HAMMERS; i++)
        assert_int_equal(hammers[i].entered, hammers[i].calls + (uint64_t)n);
}

static void test_nobody_inside_while_closed(void **state)
{
    rounds(1000);
}

static void test_fenced(void **state)
{
    __atomic_fetch_or(&bn_gate_word, BN_GATE_FENCED, __ATOMIC_SEQ_CST);
    rounds(300);
    __atomic_fetch_and(&bn_gate_word, ~BN_GATE_FENCED, __ATOMIC_SEQ_CST);
}

/* A process where seccomp refuses membarrier, as some containers do: found at start, or only later. */
static int refuse_membarrier(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_membarrier, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof(code) / sizeof(code[0]), code};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
           prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) < 0;
}

static void test_membarrier_refused(void **state)
{
    for (int later = 0; later < 2; later++) {
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            bn_gate_after_fork();
            if (refuse_membarrier())
                _exit(77);
            if (!later)
                bn_gate_init();
            if (!later && !(bn_gate_word & BN_GATE_FENCED))
                _exit(1);
            rounds(20);
            _exit(bn_gate_word == BN_GATE_FENCED ? 0 : 2);
        }
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
            skip();
        assert_int_equal(status, 0);
    }
}

static uint32_t holding, let_go;

static void *holder_main(void *arg)
{
    bn_gate_enter();
    *(pid_t *)arg = (pid_t)syscall(SYS_gettid);
    bn_store_rel(&holding, 1);
    while (!bn_load_acq(&let_go))
        sched_yield();
    bn_gate_leave();
    return NULL;
}

static void test_busy_reopens(void **state)
{
    pthread_t thread;
    pid_t tid = 0, holder = 0;
    holding = let_go = 0;
    assert_int_equal(pthread_create(&thread, NULL, holder_main, &tid), 0);
    while (!bn_load_acq(&holding))
        sched_yield();
    assert_int_equal(bn_gate_close(bn_clock_ns() + 20000000, &holder), -EBUSY);
    assert_int_equal(holder, tid);
    bn_gate_enter(); /* open again, or this would never return */
    bn_gate_leave();
    bn_store_rel(&let_go, 1);
    pthread_join(thread, NULL);
    assert_int_equal(bn_gate_close(bn_clock_ns() + 60 * SECOND, &holder), 0);
    bn_gate_open();
}

static void *brief_main(void *unused)
{
    bn_gate_enter();
    bn_gate_leave();
    return bn_gate_self;
}

static void test_nodes_are_recycled(void **state)
{
    void *first = NULL;
    for (int i = 0; i < 500; i++) {
        pthread_t thread;
        void *node;
        assert_int_equal(pthread_create(&thread, NULL, brief_main, NULL), 0);
        pthread_join(thread, &node);
        assert_non_null(node);
        if (i == 0)
            first = node;
        assert_ptr_equal(node, first);
    }
}

static void *exempt_main(void *unused)
{
    bn_gate_exempt_self();
    bn_gate_enter();
    bn_gate_leave();
    return NULL;
}

static void test_exempt_passes_a_closed_gate(void **state)
{
    pid_t holder;
    pthread_t thread;
    assert_int_equal(bn_gate_close(bn_clock_ns() + 60 * SECOND, &holder), 0);
    assert_int_equal(pthread_create(&thread, NULL, exempt_main, NULL), 0);
    pthread_join(thread, NULL);
    bn_gate_open();
}

static void test_forked_child_is_free(void **state)
{
    pid_t holder;
    assert_int_equal(bn_gate_close(bn_clock_ns() + 60 * SECOND, &holder), 0);
    pid_t child = fork();
    if (child == 0) {
        bn_gate_after_fork();
        bn_gate_enter();
        bn_gate_leave();
        _exit(bn_gate_close(bn_clock_ns() + 60 * SECOND, &holder) == 0 ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    bn_gate_open();
}

int main(void)
{
    bn_gate_init();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_nobody_inside_while_closed), cmocka_unit_test(test_fenced),
        cmocka_unit_test(test_membarrier_refused),         cmocka_unit_test(test_busy_reopens),
        cmocka_unit_test(test_nodes_are_recycled),         cmocka_unit_test(test_exempt_passes_a_closed_gate),
        cmocka_unit_test(test_forked_child_is_free),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
