/* Filling in host memory: the test stands in for CRIU (it sends processes' userfaultfds) and for the processes (it registers memory
 * and touches it). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "../image/make_pagemap.h"
#include "base/cleanup.h"
#include "base/io.h"
#include "image/pagemap.h"
#include "restore/host_fill.h"

#include <fcntl.h>
#include <linux/sockios.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>

#define FINISHED 0x52535446
#define PAGES 700u /* of a process: more than one piece */

static char folder[64];
static int dir, listener, criu;
static struct bn_env env;
static struct bn_report *report;
static struct bn_host_fill *fill;

static int make(void **state)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    snprintf(folder, sizeof(folder), "/tmp/test-host-fill.XXXXXX");
    dir = mkdtemp(folder) ? open(folder, O_RDONLY | O_DIRECTORY) : -1;
    snprintf(name.sun_path, sizeof(name.sun_path), "%s/socket", folder);
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    criu = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (dir < 0 || bind(listener, (struct sockaddr *)&name, sizeof(name)) < 0 || listen(listener, 1) < 0)
        return -1;
    struct bn_error err = BN_ERROR_INIT;
    report = bn_report_new();
    int r = bn_host_fill_start(&env, dir, listener, report, &fill, &err);
    bn_close(listener);
    return r < 0 || connect(criu, (struct sockaddr *)&name, sizeof(name)) < 0;
}

static int clean(void **state)
{
    bn_host_fill_free(fill);
    fill = NULL;
    bn_report_unref(report);
    bn_close(criu);
    bn_auto_dir DIR *d = fdopendir(dir);
    for (struct dirent *e; d && (e = readdir(d)) != NULL;)
        unlinkat(dir, e->d_name, 0);
    return rmdir(folder);
}

/* ---- a process ---- */

struct process {
    uint8_t *memory; /* PAGES pages, and one more that is not in the image */
    int uffd;
};

static uint8_t expected(int pid, size_t page, size_t at)
{
    return (uint8_t)(page * 31 + at + (size_t)pid);
}

/* Two mappings, one behind the other, which are one range in the image. */
static void map(struct process *p)
{
    p->memory = mmap(NULL, (PAGES + 1) * BN_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(p->memory, MAP_FAILED);
    assert_int_equal(madvise(p->memory, 5 * BN_PAGE, MADV_DONTFORK), 0);
}

static void save(int pid, const struct process *p, size_t pages)
{
    bn_auto_writer w = {0};
    char name[32];
    uint8_t page[BN_PAGE];
    put_head(&w, (uint32_t)pid);
    put_entry(&w, (uintptr_t)p->memory, PAGES, LAZY | PRESENT, true);
    snprintf(name, sizeof(name), "pagemap-%d.img", pid);
    bn_auto_fd map = openat(dir, name, O_WRONLY | O_CREAT, 0600);
    assert_int_equal(bn_write_full(map, w.buf, w.len), 0);
    snprintf(name, sizeof(name), "pages-%d.img", pid);
    bn_auto_fd data = openat(dir, name, O_WRONLY | O_CREAT, 0600);
    for (size_t i = 0; i < pages; i++) {
        for (size_t at = 0; at < BN_PAGE; at++)
            page[at] = expected(pid, i, at);
        assert_int_equal(bn_write_full(data, page, BN_PAGE), 0);
    }
}

static void open_uffd_for(struct process *p, uint64_t features)
{
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    p->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (p->uffd < 0) {
        print_message("no userfaultfd here: %s\n", strerror(errno));
        skip();
    }
    assert_int_equal(ioctl(p->uffd, UFFDIO_API, &api), 0);
}

static void open_uffd(struct process *p)
{
    open_uffd_for(p, 0);
}

static void register_memory(const struct process *p)
{
    struct uffdio_register r = {.range = {(uintptr_t)p->memory, (PAGES + 1) * BN_PAGE},
                                .mode = UFFDIO_REGISTER_MODE_MISSING};
    assert_int_equal(ioctl(p->uffd, UFFDIO_REGISTER, &r), 0);
}

static void check(int pid, const struct process *p)
{
    for (size_t i = 0; i < PAGES; i++)
        for (size_t at = 0; at < BN_PAGE; at++)
            if (p->memory[i * BN_PAGE + at] != expected(pid, i, at))
                fail_msg("process %d: byte %zu of page %zu is wrong", pid, at, i);
}

static void unmap(struct process *p)
{
    bn_close(p->uffd);
    munmap(p->memory, (PAGES + 1) * BN_PAGE);
}

/* ---- CRIU ---- */

static void send_word(int32_t word)
{
    assert_int_equal(send(criu, &word, sizeof(word), MSG_NOSIGNAL), sizeof(word));
}

static void send_process(int pid, const struct process *p)
{
    char byte = 0;
    struct iovec iov = {&byte, 1};
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_LEN(sizeof(int))};
    struct cmsghdr *c = &control.head;
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c), &p->uffd, sizeof(int));
    send_word(pid);
    assert_int_equal(sendmsg(criu, &msg, MSG_NOSIGNAL), 1);
}

static void new_process(int pid, struct process *p, size_t pages)
{
    open_uffd(p);
    map(p);
    save(pid, p, pages);
    send_process(pid, p);
}

static void finish_fails(int code, const char *says)
{
    for (int i = 0; i < 2; i++) { /* the same answer again */
        struct bn_error err = BN_ERROR_INIT;
        assert_int_equal(bn_host_fill_finish(fill, &err), -code);
        if (!strstr(err.text, says))
            fail_msg("\"%s\" is not in \"%s\"", says, err.text);
    }
}

/* ---- the tests ---- */

static void all_is_there(void **state)
{
    struct process a, b;
    struct bn_error err = BN_ERROR_INIT;
    new_process(71, &a, PAGES);
    register_memory(&a);
    new_process(72, &b, PAGES);                     /* registers late */
    send_word(-73);                                 /* had ended before the dump */
    assert_int_equal(a.memory[PAGES * BN_PAGE], 0); /* waits for a page that is not in the image */
    check(71, &a);
    register_memory(&b);
    send_word(FINISHED);
    assert_int_equal(bn_host_fill_finish(fill, &err), 0);
    check(71, &a);
    check(72, &b);
    assert_int_equal(bn_host_fill_finish(fill, &err), 0);
    struct bn_phases phases;
    bn_report_phases(report, &phases);
    assert_int_equal(phases.n, 1);
    assert_string_equal(phases.phase[0].name, "host-memory");
    assert_int_equal(phases.phase[0].bytes, 2 * PAGES * BN_PAGE);
    unmap(&a);
    unmap(&b);
}

static void no_memory_at_all(void **state)
{
    struct bn_error err = BN_ERROR_INIT;
    send_word(FINISHED);
    assert_int_equal(bn_host_fill_finish(fill, &err), 0);
}

static void *touch(void *arg)
{
    struct process *p = arg;
    return (void *)(uintptr_t)p->memory[0];
}

/* What waits in the process must not wait for ever, or nobody would ever hear of it. */
static void a_file_is_too_short(void **state)
{
    struct process p;
    void *byte;
    pthread_t thread;
    open_uffd(&p);
    map(&p);
    save(71, &p, 10);
    register_memory(&p);
    assert_int_equal(pthread_create(&thread, NULL, touch, &p), 0);
    send_process(71, &p);
    send_word(FINISHED);
    finish_fails(EBADMSG, "shorter");
    bn_close(p.uffd); /* as CRIU's code in the process does */
    assert_int_equal(pthread_join(thread, &byte), 0);
    munmap(p.memory, (PAGES + 1) * BN_PAGE);
}

/* A list of pages may name some that CRIU never registers: a process that waits for another one meanwhile must not do so for ever. */
static void never_registered(void **state)
{
    struct process p;
    void *byte;
    pthread_t thread;
    new_process(71, &p, PAGES);
    struct process rest = {.memory = p.memory + 100 * BN_PAGE, .uffd = p.uffd};
    struct uffdio_register r = {.range = {(uintptr_t)rest.memory, (PAGES - 100) * BN_PAGE},
                                .mode = UFFDIO_REGISTER_MODE_MISSING};
    assert_int_equal(ioctl(p.uffd, UFFDIO_REGISTER, &r), 0);
    assert_int_equal(pthread_create(&thread, NULL, touch, &rest), 0);
    finish_fails(EADDRNOTAVAIL, "--criu-memory");
    bn_close(p.uffd);
    assert_int_equal(pthread_join(thread, &byte), 0);
    munmap(p.memory, (PAGES + 1) * BN_PAGE);
}

static void no_such_process(void **state)
{
    struct process p;
    open_uffd(&p);
    map(&p);
    send_process(71, &p);
    finish_fails(ENOENT, "pagemap-71.img");
    unmap(&p);
}

static void memory_is_there_already(void **state)
{
    struct process p;
    open_uffd(&p);
    map(&p);
    save(71, &p, PAGES);
    p.memory[600 * BN_PAGE] = 1;
    register_memory(&p);
    send_process(71, &p);
    finish_fails(EEXIST, "cannot fill in the memory of process 71");
    finish_fails(EEXIST, "--criu-memory"); /* what to do */
    unmap(&p);
}

static void no_descriptor(void **state)
{
    send_word(71);
    send_word(72);
    finish_fails(EBADMSG, "no descriptor for process 71");
}

static void *drop(void *arg)
{
    const struct process *p = arg;
    return (void *)(intptr_t)madvise(p->memory + PAGES * BN_PAGE, BN_PAGE, MADV_DONTNEED);
}

static uint64_t cpu_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* While a change of a process's mappings is not read from its userfaultfd, nothing can be filled in; and the one who reads it waits for
 * those who fill in when something has failed. */
static void a_failure_while_mappings_change(void **state)
{
    struct process p;
    pthread_t thread;
    uint8_t word[4] = {72};
    void *result;
    int unread = 1;
    open_uffd_for(&p, UFFD_FEATURE_EVENT_REMOVE);
    map(&p);
    save(71, &p, PAGES);
    send_process(71, &p);
    struct uffdio_register last = {.range = {(uintptr_t)p.memory + PAGES * BN_PAGE, BN_PAGE},
                                   .mode = UFFDIO_REGISTER_MODE_MISSING};
    assert_int_equal(ioctl(p.uffd, UFFDIO_REGISTER, &last), 0);
    assert_int_equal(send(criu, word, 1, MSG_NOSIGNAL), 1);
    while (unread > 0) /* then the server waits for the rest of the word */
        assert_int_equal(ioctl(criu, SIOCOUTQ, &unread), 0);
    assert_int_equal(pthread_create(&thread, NULL, drop, &p), 0);
    uint64_t start = cpu_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu_ns(CLOCK_THREAD_CPUTIME_ID);
    while (cpu_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu_ns(CLOCK_THREAD_CPUTIME_ID) - start < 20000000)
        sched_yield(); /* the workers are trying */
    assert_int_equal(send(criu, word + 1, 3, MSG_NOSIGNAL), 3);
    send_word(73);
    finish_fails(EBADMSG, "no descriptor for process 72");
    bn_host_fill_free(fill);
    fill = NULL;
    unmap(&p); /* lets go of the thread */
    assert_int_equal(pthread_join(thread, &result), 0);
}

static void criu_hangs_up(void **state)
{
    struct process p;
    new_process(71, &p, PAGES);
    register_memory(&p);
    shutdown(criu, SHUT_RDWR);
    finish_fails(EPIPE, "CRIU ended");
    check(71, &p); /* it may run on */
    unmap(&p);
}

static void nobody_waits(void **state)
{
    struct process a, b;
    new_process(71, &a, PAGES);
    new_process(72, &b, PAGES);
    register_memory(&a);
    register_memory(&b);
    bn_host_fill_free(fill);
    fill = NULL;
    check(71, &a);
    check(72, &b);
    unmap(&a);
    unmap(&b);
}

static void nothing_happens(void **state)
{
    bn_host_fill_free(fill);
    fill = NULL;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(all_is_there, make, clean),
        cmocka_unit_test_setup_teardown(no_memory_at_all, make, clean),
        cmocka_unit_test_setup_teardown(a_file_is_too_short, make, clean),
        cmocka_unit_test_setup_teardown(never_registered, make, clean),
        cmocka_unit_test_setup_teardown(no_such_process, make, clean),
        cmocka_unit_test_setup_teardown(memory_is_there_already, make, clean),
        cmocka_unit_test_setup_teardown(no_descriptor, make, clean),
        cmocka_unit_test_setup_teardown(a_failure_while_mappings_change, make, clean),
        cmocka_unit_test_setup_teardown(criu_hangs_up, make, clean),
        cmocka_unit_test_setup_teardown(nobody_waits, make, clean),
        cmocka_unit_test_setup_teardown(nothing_happens, make, clean),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
