#include "common.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

struct bn_gpu *gpu;
static char fail_file[64], ledger[64]; /* files that the simulated driver reads, and leaves */

const char *driver_path(void)
{
    static char path[4096];
    const char *given = getenv("BENNU_TEST_DRIVER"), *build = getenv("BENNU_BUILD");
    if (given)
        return given;
    snprintf(path, sizeof(path), "%s/sim/libcuda.so.1", build ? build : "build");
    return path;
}

int open_gpu(void **state)
{
    struct bn_error err = BN_ERROR_INIT;
    snprintf(fail_file, sizeof(fail_file), "/tmp/bennu-gpu-ops-%d", (int)getpid());
    setenv("BENNU_SIM_FAIL_FILE", fail_file, 1);
    setenv("BENNU_SIM_DEVICES", "2", 0);
    setenv("BENNU_SIM_MEMORY", "8G", 0);
    char machine[32];
    snprintf(machine, sizeof(machine), "ops%d", (int)getpid());
    snprintf(ledger, sizeof(ledger), "/dev/shm/cuda-sim.%s", machine);
    setenv("BENNU_SIM_MACHINE", machine, 0);
    if (bn_gpu_open(driver_path(), &gpu, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        return -1;
    }
    return 0;
}

int close_gpu(void **state)
{
    bn_gpu_close(gpu);
    gpu = NULL;
    unlink(fail_file);
    unlink(ledger);
    return 0;
}

void inject(const char *rules)
{
    if (!bn_gpu_simulated(gpu))
        skip();
    int fd = open(fail_file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, rules, strlen(rules)), (ssize_t)strlen(rules));
    close(fd);
}

void check_ok(int r, const struct bn_error *err, const char *file, int line)
{
    if (r >= 0)
        return;
    print_error("%d: [%s] %s\n", r, err ? err->stage : "", err ? err->text : "");
    _fail(file, line);
}

void check_fails(int r, int code, const struct bn_error *err, const char *file, int line)
{
    if (r == -code && err->code == code && strlen(err->text) > 10)
        return;
    print_error("%d instead of %d: [%s] %s (code %d)\n", r, -code, err->stage, err->text, err->code);
    _fail(file, line);
}

uint64_t gpu_free(unsigned dev)
{
    uint64_t f = 0, t = 0;
    struct bn_error err = BN_ERROR_INIT;
    assert_ok(bn_gpu_mem_info(gpu, dev, &f, &t, &err), &err);
    return f;
}

unsigned open_fds(void)
{
    unsigned n = 0;
    DIR *d = opendir("/proc/self/fd");
    assert_non_null(d);
    while (readdir(d))
        n++;
    closedir(d);
    return n;
}

struct bn_gpu_set *make_set(unsigned dev, size_t n, const uint64_t *sizes, size_t nsizes)
{
    struct bn_gpu_block *blocks = calloc(n, sizeof(*blocks));
    struct bn_gpu_set *set = NULL;
    struct bn_error err = BN_ERROR_INIT;
    assert_non_null(blocks);
    for (size_t i = 0; i < n; i++)
        blocks[i] = (struct bn_gpu_block){.size = sizes[i % nsizes], .flags = i % 2 ? BN_GPU_RDMA : 0};
    int r = bn_gpu_set_create(gpu, dev, blocks, n, &set, &err);
    free(blocks);
    assert_ok(r, &err);
    return set;
}

struct bn_gpu_set *import_again(struct bn_gpu_set *set)
{
    size_t n = bn_gpu_set_count(set);
    struct bn_gpu_block *blocks = calloc(n, sizeof(*blocks));
    struct bn_gpu_set *again = NULL;
    struct bn_error err = BN_ERROR_INIT;
    assert_non_null(blocks);
    for (size_t i = 0; i < n; i++) {
        int fd = bn_gpu_set_fd(set, i, &err);
        assert_ok(fd, &err);
        blocks[i] = (struct bn_gpu_block){bn_gpu_set_size(set, i), bn_gpu_set_flags(set, i),
                                          fcntl(fd, F_DUPFD_CLOEXEC, 3)};
        assert_true(blocks[i].fd >= 0);
    }
    int r = bn_gpu_set_import(gpu, bn_gpu_set_device(set), blocks, n, &again, &err);
    free(blocks);
    assert_ok(r, &err);
    return again;
}

void pattern_fill(void *data, uint64_t seed, uint64_t chunk, unsigned nchunks)
{
    uint64_t *p = data, words = BN_GPU_CHUNK / 8;
    for (uint64_t i = 0; i < nchunks * words; i++)
        p[i] = (chunk * words + i) * UINT64_C(0x9e3779b97f4a7c15) + seed;
}

int pattern_check(const void *data, uint64_t seed, uint64_t chunk, unsigned nchunks)
{
    const uint64_t *p = data, words = BN_GPU_CHUNK / 8;
    for (uint64_t i = 0; i < nchunks * words; i++)
        if (p[i] != (chunk * words + i) * UINT64_C(0x9e3779b97f4a7c15) + seed)
            return -EILSEQ;
    return 0;
}

static int fill_some(void *arg, uint64_t chunk, unsigned nchunks, void *data, struct bn_error *err)
{
    pattern_fill(data, *(uint64_t *)arg, chunk, nchunks);
    return 0;
}

static int check_some(void *arg, uint64_t chunk, unsigned nchunks, const void *data, struct bn_error *err)
{
    return pattern_check(data, *(uint64_t *)arg, chunk, nchunks);
}

static int run(struct bn_copier *copier, const struct bn_copy_spec *spec)
{
    struct bn_copy *job = NULL;
    struct bn_error err = BN_ERROR_INIT;
    int r = bn_copy_start(copier, spec, &job, &err);
    if (r == 0)
        r = bn_copy_wait(job, NULL, NULL, 0, &err);
    if (r == 0 && (bn_copy_done(job) != bn_gpu_set_bytes(spec->set) || !bn_copy_ended(job)))
        r = -EPROTO;
    bn_copy_free(job);
    return r;
}

int set_fill(struct bn_copier *copier, struct bn_gpu_set *set, uint64_t seed)
{
    struct bn_copy_spec spec = {.mode = BN_COPY_IN, .set = set, .produce = fill_some, .arg = &seed};
    return run(copier, &spec);
}

int set_check(struct bn_copier *copier, struct bn_gpu_set *set, uint64_t seed)
{
    struct bn_copy_spec spec = {.mode = BN_COPY_OUT, .set = set, .consume = check_some, .arg = &seed};
    return run(copier, &spec);
}

struct child child_start(const char *mode, const char *env)
{
    int s[2];
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
    assert_true(n > 0);
    self[n] = 0;
    char *slash = strrchr(self, '/');
    assert_non_null(slash);
    snprintf(slash, sizeof(self) - (size_t)(slash - self), "/gpu_ops_helper");
    assert_int_equal(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, s), 0);
    char *copy = env ? strdup(env) : NULL;
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        unsetenv("BENNU_SIM_FAIL_FILE");
        if (copy)
            putenv(copy);
        if (dup2(s[1], 3) == 3) { /* clears close-on-exec, unless it was 3 already */
            fcntl(3, F_SETFD, 0);
            execl(self, self, mode, (char *)NULL);
        }
        _exit(126);
    }
    free(copy);
    close(s[1]);
    return (struct child){pid, s[0]};
}

void child_end(struct child *c)
{
    int status = 0;
    c->sock = bn_close(c->sock);
    assert_int_equal(waitpid(c->pid, &status, 0), c->pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
}

void child_kill(struct child *c)
{
    kill(c->pid, SIGKILL);
    c->sock = bn_close(c->sock);
    waitpid(c->pid, NULL, 0);
}

void say(int sock, const void *data, size_t len, const int *fds, size_t nfds)
{
    char control[CMSG_SPACE(64 * sizeof(int))] = {0};
    struct iovec iov = {(void *)data, len};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (nfds) {
        msg.msg_control = control;
        msg.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(nfds * sizeof(int));
        memcpy(CMSG_DATA(c), fds, nfds * sizeof(int));
    }
    if (sendmsg(sock, &msg, MSG_NOSIGNAL) != (ssize_t)len) {
        perror("sendmsg");
        abort();
    }
}

size_t hear(int sock, void *data, size_t len, int *fds, size_t nfds)
{
    char control[CMSG_SPACE(64 * sizeof(int))];
    struct iovec iov = {data, len};
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    ssize_t n;
    while ((n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR)
        ;
    struct cmsghdr *c = n > 0 ? CMSG_FIRSTHDR(&msg) : NULL;
    if (nfds) {
        if (!c || c->cmsg_len != CMSG_LEN(nfds * sizeof(int)))
            abort();
        memcpy(fds, CMSG_DATA(c), nfds * sizeof(int));
    }
    return n > 0 ? (size_t)n : 0;
}
