/* What the driver answers where its reference is silent. Nothing is judged: the codes are printed, and
 * docs/ARCHITECTURE.md says which of them Bennu relies on.
 *
 *     bench-answers [--driver FILE]                     (as root; takes a few seconds; uses 200 MiB of GPU 0)
 *
 * Without meson: gcc -O2 -D_GNU_SOURCE -Isrc bench/answers.c src/gpu/[a-z]*.c src/base/[a-z]*.c -o
 * bench-answers -lpthread -ldl
 */
#include "base/cleanup.h"
#include "base/io.h"
#include "gpu/driver.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB (UINT64_C(1) << 20)

static struct bn_gpu *gpu;
static const char *driver;

static const char *name(CUresult c)
{
    static char buf[32];
    return c == CUDA_SUCCESS ? "ok" : bn_cuda_name(c, buf);
}

static void answer(const char *what, CUresult c)
{
    printf("  %-66s %4d %s\n", what, (int)c, name(c));
    fflush(stdout);
}

/* ---- Other processes ----------------------------------------------------------------------------------- */

struct child {
    pid_t pid;
    int from, to; /* pipes */
};

enum kind { PLAIN, LOADED, CUDA };

static void child_main(enum kind kind, int in, int out)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    pid_t grandchild = 0;
    struct bn_error err = BN_ERROR_INIT;
    struct bn_gpu_set *set = NULL;
    struct bn_gpu_block block = {.size = 64 * MIB};
    char byte;
    int status = 0;
    if (kind == LOADED && !dlopen(driver ? driver : "libcuda.so.1", RTLD_NOW))
        _exit(1);
    if (kind == CUDA) {
        if (bn_gpu_open(driver, &gpu, &err) < 0 || bn_gpu_set_create(gpu, 0, &block, 1, &set, &err) < 0) {
            fprintf(stderr, "%s\n", err.text);
            _exit(1);
        }
        grandchild = fork(); /* holds the device files, has no CUDA of its own */
        if (grandchild == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (;;)
                pause();
        }
    }
    if (write(out, &grandchild, sizeof(grandchild)) != (ssize_t)sizeof(grandchild))
        _exit(1);
    while (read(in, &byte, 1) < 0 && errno == EINTR)
        ;
    if (kind == CUDA) {
        uint64_t f, t;
        status = bn_gpu_mem_info(gpu, 0, &f, &t, &err) < 0;
        kill(grandchild, SIGKILL);
        waitpid(grandchild, NULL, 0);
    }
    _exit(status);
}

static struct child start(enum kind kind, pid_t *grandchild)
{
    int a[2], b[2];
    pid_t grand = 0;
    if (pipe2(a, O_CLOEXEC) < 0 || pipe2(b, O_CLOEXEC) < 0)
        exit(1);
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0)
        exit(1);
    if (pid == 0) {
        close(a[1]);
        close(b[0]);
        child_main(kind, a[0], b[1]);
    }
    close(a[0]);
    close(b[1]);
    if (read(b[0], &grand, sizeof(grand)) != (ssize_t)sizeof(grand)) {
        fprintf(stderr, "A child did not start.\n");
        exit(1);
    }
    if (grandchild)
        *grandchild = grand;
    return (struct child){pid, b[0], a[1]};
}

static void end(struct child *c, const char *what)
{
    int status = 0;
    close(c->to);
    close(c->from);
    waitpid(c->pid, &status, 0);
    printf("  %-66s %s\n", what,
           WIFEXITED(status) && WEXITSTATUS(status) == 0 ? "went on and ended well" : "FAILED");
}

static pid_t other_thread(pid_t pid)
{
    char path[64];
    pid_t tid = 0;
    snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
    bn_auto_dir DIR *dir = opendir(path);
    struct dirent *e;
    while (dir && (e = readdir(dir)))
        if (atoi(e->d_name) > 0 && atoi(e->d_name) != pid)
            tid = atoi(e->d_name);
    return tid;
}

static void states(const char *who, pid_t pid)
{
    static const char *const names[] = {"RUNNING", "LOCKED",  "CHECKPOINTED",
                                        "FAILED",  "NO_CUDA", "FILES_ONLY"};
    char text[100];
    int tid = -1;
    CUprocessState s = (CUprocessState)-1;
    struct bn_error err = BN_ERROR_INIT;
    enum bn_ckpt_state ours;

    snprintf(text, sizeof(text), "GetState of %s", who);
    answer(text, gpu->cu.CheckpointGetState(pid, &s));
    printf("  %-66s %4d\n", "  the state it wrote (-1: none)", (int)s);
    snprintf(text, sizeof(text), "GetRestoreThreadId of %s", who);
    answer(text, gpu->cu.CheckpointGetThread(pid, &tid));
    int r = bn_ckpt_state(gpu, pid, &ours, &err);
    printf("  %-66s %s\n", "  what Bennu makes of it", r < 0 ? err.text : names[ours]);
}

/* ---- The steps, in and out of order -------------------------------------------------------------------- */

static CUresult lock(pid_t pid)
{
    CUcheckpointLockArgs a = {.timeoutMs = 10000};
    return gpu->cu.CheckpointLock(pid, &a);
}
static CUresult checkpoint(pid_t pid)
{
    CUcheckpointCheckpointArgs a = {0};
    return gpu->cu.CheckpointCheckpoint(pid, &a);
}
static CUresult restore(pid_t pid)
{
    CUcheckpointRestoreArgs a = {0};
    return gpu->cu.CheckpointRestore(pid, &a);
}
static CUresult unlock(pid_t pid)
{
    CUcheckpointUnlockArgs a = {0};
    return gpu->cu.CheckpointUnlock(pid, &a);
}

static void step(const char *what, CUresult (*fn)(pid_t), pid_t pid)
{
    char text[100];
    uint64_t t = bn_now_ns();
    CUresult c = fn(pid);
    t = bn_now_ns() - t;
    snprintf(text, sizeof(text), "%-48s %10.2f ms", what, (double)t / 1e6);
    answer(text, c);
}

static void steps(pid_t pid)
{
    step("checkpoint while running", checkpoint, pid);
    step("unlock while running", unlock, pid);
    step("restore while running", restore, pid);
    step("lock", lock, pid);
    step("lock while locked", lock, pid);
    step("restore while locked", restore, pid);
    step("checkpoint", checkpoint, pid);
    step("checkpoint while checkpointed", checkpoint, pid);
    step("lock while checkpointed", lock, pid);
    step("unlock while checkpointed", unlock, pid);
    step("restore", restore, pid);
    step("unlock", unlock, pid);
}

/* ---- Memory -------------------------------------------------------------------------------------------- */

static CUresult create(CUmemGenericAllocationHandle *h, uint64_t size)
{
    CUmemAllocationProp prop = {
        .type = CU_MEM_ALLOCATION_TYPE_PINNED,
        .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = gpu->devices[0].cu},
    };
    return gpu->cu.MemCreate(h, size, &prop, 0);
}

static void mappings(void)
{
    const struct bn_driver *cu = &gpu->cu;
    CUmemGenericAllocationHandle h[2] = {0}, imported = 0;
    CUdeviceptr va = 0;
    int fd = -1, again = -1;
    size_t before = 0, free_bytes = 0, total;
    cu->MemGetInfo(&before, &total);
    answer("create 8 MiB, twice",
           create(&h[0], 8 * MIB) == CUDA_SUCCESS ? create(&h[1], 8 * MIB) : CUDA_ERROR_UNKNOWN);
    answer("reserve 32 MiB of addresses", cu->MemAddressReserve(&va, 32 * MIB, 0, 0, 0));
    answer("map 16 MiB of a handle that has 8", cu->MemMap(va, 16 * MIB, 0, h[0], 0));
    answer("map 2 MiB of a handle that has 8", cu->MemMap(va, 2 * MIB, 0, h[0], 0));
    cu->MemUnmap(va, 2 * MIB);
    answer("map all of it", cu->MemMap(va, 8 * MIB, 0, h[0], 0));
    answer("map the other one behind it", cu->MemMap(va + 8 * MIB, 8 * MIB, 0, h[1], 0));
    answer("unmap a part of a mapping", cu->MemUnmap(va, 2 * MIB));
    answer("export", cu->MemExport(&fd, h[0], CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    answer("import into the same process",
           cu->MemImport(&imported, (void *)(uintptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    answer("export what was imported",
           cu->MemExport(&again, imported, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    bn_close(again);
    answer("unmap two mappings with one call", cu->MemUnmap(va, 16 * MIB));
    answer("release the import", cu->MemRelease(imported));
    cu->MemRelease(h[0]);
    cu->MemRelease(h[1]);
    answer("free the addresses", cu->MemAddressFree(va, 32 * MIB));
    cu->MemGetInfo(&free_bytes, &total);
    printf("  %-66s %4lld MiB\n", "still taken while only the descriptor is open",
           ((long long)before - (long long)free_bytes) >> 20);
    bn_close(fd);
    cu->MemGetInfo(&free_bytes, &total);
    printf("  %-66s %4lld MiB\n", "and after it was closed",
           ((long long)before - (long long)free_bytes) >> 20);
    int pipes[2];
    if (pipe2(pipes, O_CLOEXEC) == 0) {
        answer("import a pipe", cu->MemImport(&imported, (void *)(uintptr_t)pipes[0],
                                              CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
        close(pipes[0]);
        close(pipes[1]);
    }
}

static void pinned(void)
{
    const struct bn_driver *cu = &gpu->cu;
    struct bn_gpu_block block = {.size = 8 * MIB};
    struct bn_gpu_set *set = NULL;
    int fd = (int)syscall(SYS_memfd_create, "answers", 0u);
    uint8_t *p = MAP_FAILED;
    if (fd >= 0 && ftruncate(fd, 8 * MIB) == 0)
        p = mmap(NULL, 8 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    bn_close(fd);
    if (p == MAP_FAILED || bn_gpu_set_create(gpu, 0, &block, 1, &set, NULL) < 0)
        return;
    CUdeviceptr dev = bn_gpu_set_ptr(set);
    answer("register 4 MiB of a memfd", cu->MemHostRegister(p, 4 * MIB, CU_MEMHOSTREGISTER_PORTABLE));
    answer("register the 4 MiB behind it",
           cu->MemHostRegister(p + 4 * MIB, 4 * MIB, CU_MEMHOSTREGISTER_PORTABLE));
    answer("register some of it again", cu->MemHostRegister(p, 2 * MIB, CU_MEMHOSTREGISTER_PORTABLE));
    answer("copy across the two registrations", cu->MemcpyDtoHAsync(p, dev, 8 * MIB, NULL));
    answer("  and its end", cu->StreamSynchronize(NULL));
    cu->MemHostUnregister(p);
    cu->MemHostUnregister(p + 4 * MIB);
    munmap(p, 8 * MIB);
    bn_gpu_set_free(set);
}

int main(int argc, char **argv)
{
    struct bn_error err = BN_ERROR_INIT;
    pid_t grandchild = 0;
    if (argc == 3 && strcmp(argv[1], "--driver") == 0)
        driver = argv[2];
    else if (argc != 1) {
        fprintf(stderr, "usage: %s [--driver FILE]\n", argv[0]);
        return 2;
    }
    struct child plain = start(PLAIN, NULL), loaded = start(LOADED, NULL),
                 cuda = start(CUDA, &grandchild); /* before our cuInit */
    if (bn_gpu_open(driver, &gpu, &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    printf("driver %s, CUDA %u%s\n", bn_gpu_driver_path(gpu), bn_gpu_driver_version(gpu),
           bn_gpu_simulated(gpu) ? " (simulated)" : "");
    if (gpu->cu.CheckpointGetState && gpu->cu.CheckpointGetThread) {
        states("a process that uses CUDA", cuda.pid);
        states("one of its threads", other_thread(cuda.pid));
        states("its forked child", grandchild);
        states("a process that loaded libcuda only", loaded.pid);
        states("a process without CUDA", plain.pid);
        states("process 1", 1);
        states("no process", 0x3fffffff);
        states("ourselves", getpid());
        step("lock a process without CUDA", lock, plain.pid);
        step("lock no process", lock, 0x3fffffff);
        steps(cuda.pid);
    } else {
        printf("  no checkpoint calls\n");
    }
    end(&cuda, "the process that uses CUDA");
    end(&loaded, "the process that loaded libcuda only");
    end(&plain, "the process without CUDA");
    if (bn_gpu_enter(gpu, 0, "context", &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    mappings();
    pinned();
    bn_gpu_leave(gpu);
    bn_gpu_close(gpu);
    return 0;
}
