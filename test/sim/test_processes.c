/* SPDX-License-Identifier: MIT */

/* The simulated driver's rules between processes: sharing, capacity, checkpoint and restore. */

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "cuda.h"

#define SIZE (8 * MIB)

/* ---- Sharing ---- */

static void exporter(int sock)
{
    CUmemGenericAllocationHandle handle;
    struct gpu gpu;
    CUdeviceptr p;
    int fd;

    gpu_open(&gpu, 0);
    handle = vmm_create(SIZE);
    p = vmm_map(handle, SIZE, 0);
    gpu_fill(&gpu, p, SIZE, 1);
    OK(cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    send_fd(sock, fd);
    close(fd);
    hear(sock);
    CHECK(gpu_bad(&gpu, p, SIZE, 2) == 0); /* what the importer wrote */
    OK(cuMemUnmap(p, SIZE));
    OK(cuMemRelease(handle));
    say(sock, 0);
    hear(sock);
}

static void share(void)
{
    struct peer peer = peer_start(exporter);
    CUmemGenericAllocationHandle handle;
    struct gpu gpu;
    CUdeviceptr p;
    int fd, again;

    gpu_open(&gpu, 0);
    fd = receive_fd(peer.sock);
    OK(cuMemImportFromShareableHandle(&handle, (void *)(intptr_t)fd,
                                      CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    close(fd);
    p = vmm_map(handle, SIZE, 0);
    CHECK(gpu_bad(&gpu, p, SIZE, 1) == 0);
    gpu_fill(&gpu, p, SIZE, 2);
    IS(CUDA_ERROR_INVALID_VALUE,
       cuMemExportToShareableHandle(&again, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    say(peer.sock, 0);
    hear(peer.sock);
    CHECK(gpu_bad(&gpu, p, SIZE, 2) == 0); /* alive although its maker let go */
    OK(cuMemUnmap(p, SIZE));
    OK(cuMemRelease(handle));
    IS(CUDA_ERROR_INVALID_VALUE, cuMemImportFromShareableHandle(&handle, (void *)(intptr_t)0,
                                                                CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    peer_kill(&peer);
}

static void ipc_exporter(int sock)
{
    CUipcMemHandle handle;
    struct gpu gpu;
    CUdeviceptr p, v;

    gpu_open(&gpu, 0);
    OK(cuMemAlloc_v2(&p, SIZE));
    gpu_fill(&gpu, p, SIZE, 1);
    v = vmm_map(vmm_create(2 * MIB), 2 * MIB, 0);
    IS(CUDA_ERROR_INVALID_VALUE, cuIpcGetMemHandle(&handle, v));
    OK(cuIpcGetMemHandle(&handle, p));
    CHECK(send(sock, &handle, sizeof(handle), 0) == (ssize_t)sizeof(handle));
    hear(sock);
    CHECK(gpu_bad(&gpu, p, SIZE, 2) == 0);
    say(sock, 0);
    hear(sock);
}

static void ipc(void)
{
    struct peer peer = peer_start(ipc_exporter);
    CUipcMemHandle handle;
    struct gpu gpu;
    CUdeviceptr p, q;

    gpu_open(&gpu, 0);
    CHECK(recv(peer.sock, &handle, sizeof(handle), 0) == (ssize_t)sizeof(handle));
    OK(cuIpcOpenMemHandle_v2(&p, handle, 1));
    OK(cuIpcOpenMemHandle_v2(&q, handle, 1));
    CHECK(p == q);
    CHECK(gpu_bad(&gpu, p, SIZE, 1) == 0);
    gpu_fill(&gpu, p, SIZE, 2);
    say(peer.sock, 0);
    hear(peer.sock);
    OK(cuIpcCloseMemHandle(p));
    OK(cuIpcCloseMemHandle(p));
    IS(CUDA_ERROR_INVALID_VALUE, cuIpcCloseMemHandle(p));
    peer_kill(&peer);
}

/* ---- Capacity ---- */

static void hog(int sock)
{
    struct gpu gpu;
    CUdeviceptr p;
    int fd;

    gpu_open(&gpu, 0);
    OK(cuMemAlloc_v2(&p, 20 * MIB));
    CUmemGenericAllocationHandle handle = vmm_create(20 * MIB);

    OK(cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    send_fd(sock, fd);
    hear(sock);
}

static void capacity(void)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}};
    CUmemGenericAllocationHandle handle;
    struct gpu gpu;
    CUdeviceptr p;
    int fd;

    setenv("BENNU_SIM_MEMORY", "64M", 1);
    struct peer peer = peer_start(hog);

    fd = receive_fd(peer.sock);
    gpu_open(&gpu, 0);
    CHECK(gpu_used() == 44 * MIB); /* two blocks of small things: this process's and its */
    IS(CUDA_ERROR_OUT_OF_MEMORY, cuMemAlloc_v2(&p, 22 * MIB));
    IS(CUDA_ERROR_OUT_OF_MEMORY, cuMemCreate(&handle, 22 * MIB, &prop, 0));
    OK(cuMemAlloc_v2(&p, 20 * MIB));
    OK(cuMemFree_v2(p));
    peer_kill(&peer);
    CHECK(gpu_used() == 22 * MIB); /* the descriptor keeps what it names */
    IS(CUDA_ERROR_OUT_OF_MEMORY, cuMemAlloc_v2(&p, 44 * MIB));
    close(fd);
    CHECK(gpu_used() == 2 * MIB);
    OK(cuMemAlloc_v2(&p, 62 * MIB));
}

/* ---- Checkpoint ---- */

static unsigned count_descriptors(int pid, const char *text)
{
    char command[160];
    unsigned n = 0;
    FILE *f;

    snprintf(command, sizeof(command), "ls -l /proc/%d/fd | grep -c '%s'", pid, text);
    f = popen(command, "re");
    CHECK(f && fscanf(f, "%u", &n) == 1);
    pclose(f);
    return n;
}

/* Memory of every kind; then, at each word heard, checks all of it and writes it anew. */
static void application(int sock)
{
    static const size_t sizes[] = {4, 300, 100000, MIB, 3 * MIB, 16 * MIB};
    const unsigned n = sizeof(sizes) / sizeof(sizes[0]);
    CUdeviceptr p[8], global;
    CUstream stream;
    struct gpu gpu;
    uint64_t value, seed = 1;
    size_t size;
    void *host;

    gpu_open(&gpu, 0);
    for (unsigned i = 0; i < n; i++)
        OK(cuMemAlloc_v2(&p[i], sizes[i]));
    p[n] = vmm_map(vmm_create(SIZE), SIZE, 0);
    OK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    OK(cuMemHostAlloc(&host, MIB, 0));
    OK(cuModuleGetGlobal_v2(&global, &size, gpu.module, "bn_global"));
    for (unsigned i = 0; i <= n; i++)
        gpu_fill(&gpu, p[i], i == n ? SIZE : sizes[i], seed + i);
    say(sock, 0);
    for (uint64_t round = 1;; round++) {
        hear(sock);
        for (unsigned i = 0; i <= n; i++)
            CHECK(gpu_bad(&gpu, p[i], i == n ? SIZE : sizes[i], seed + i) == 0);
        OK(cuMemcpyDtoH_v2(&value, global, 8));
        CHECK(value == round - 1);
        value = 1;
        OK(cuLaunchKernel(gpu.global_add, 1, 1, 1, 1, 1, 1, 0, stream, (void *[]){&value}, NULL));
        OK(cuStreamSynchronize(stream));
        seed += 100;
        for (unsigned i = 0; i <= n; i++)
            gpu_fill(&gpu, p[i], i == n ? SIZE : sizes[i], seed + i);
        say(sock, round);
    }
}

static CUprocessState state_of(int pid)
{
    CUprocessState state;

    OK(cuCheckpointProcessGetState(pid, &state));
    return state;
}

static void checkpoint(void)
{
    struct peer peer = peer_start(application);
    CUprocessState state;
    int tid;

    hear(peer.sock);
    OK(cuInit(0));
    IS(CUDA_ERROR_INVALID_VALUE, cuCheckpointProcessGetState(1, &state)); /* no CUDA there */
    CUcontext ctx;

    OK(cuDevicePrimaryCtxRetain(&ctx, 0));
    OK(cuCtxSetCurrent(ctx));
    OK(cuCheckpointProcessGetRestoreThreadId(peer.pid, &tid));
    CHECK(tid > 0 && tid != peer.pid);
    IS(CUDA_ERROR_ILLEGAL_STATE, cuCheckpointProcessUnlock(peer.pid, NULL));
    IS(CUDA_ERROR_ILLEGAL_STATE, cuCheckpointProcessCheckpoint(peer.pid, NULL));
    IS(CUDA_ERROR_ILLEGAL_STATE, cuCheckpointProcessRestore(peer.pid, NULL));

    size_t used = gpu_used();

    for (int round = 0; round < 5; round++) {
        CHECK(state_of(peer.pid) == CU_PROCESS_STATE_RUNNING);
        OK(cuCheckpointProcessLock(peer.pid, NULL));
        CHECK(state_of(peer.pid) == CU_PROCESS_STATE_LOCKED);
        IS(CUDA_ERROR_ILLEGAL_STATE, cuCheckpointProcessLock(peer.pid, NULL));
        say(peer.sock, 0); /* its calls wait */
        OK(cuCheckpointProcessCheckpoint(peer.pid, NULL));
        CHECK(state_of(peer.pid) == CU_PROCESS_STATE_CHECKPOINTED);
        IS(CUDA_ERROR_ILLEGAL_STATE, cuCheckpointProcessUnlock(peer.pid, NULL));
        CHECK(gpu_used() == 0);
        CHECK(count_descriptors(peer.pid, "cuda-sim:\\|anon_inode") == 0);
        char byte;

        CHECK(recv(peer.sock, &byte, 1, MSG_DONTWAIT) < 0 && errno == EAGAIN);
        OK(cuCheckpointProcessRestore(peer.pid, NULL));
        CHECK(state_of(peer.pid) == CU_PROCESS_STATE_LOCKED);
        CHECK(gpu_used() == used);
        OK(cuCheckpointProcessUnlock(peer.pid, NULL));
        hear(peer.sock);
    }
    kill(peer.pid, SIGKILL);
    waitpid(peer.pid, NULL, 0);
    IS(CUDA_ERROR_INVALID_VALUE, cuCheckpointProcessGetState(peer.pid, &state));
}

/* All threads but the restore thread are stopped by a tracer, as CRIU does it. */
static void checkpoint_traced(void)
{
    struct peer peer = peer_start(application);
    int tid, status;
    unsigned stopped = 0;
    char line[64];
    pid_t tids[64];

    hear(peer.sock);
    OK(cuInit(0));
    OK(cuCheckpointProcessGetRestoreThreadId(peer.pid, &tid));
    OK(cuCheckpointProcessLock(peer.pid, NULL));
    snprintf(line, sizeof(line), "ls /proc/%d/task", peer.pid);
    FILE *f = popen(line, "re");

    CHECK(f);
    while (stopped < 64 && fscanf(f, "%d", &tids[stopped]) == 1)
        if (tids[stopped] != tid)
            stopped++;
    pclose(f);
    CHECK(stopped > 1);
    for (unsigned i = 0; i < stopped; i++) {
        CHECK(ptrace(PTRACE_SEIZE, tids[i], NULL, NULL) == 0);
        CHECK(ptrace(PTRACE_INTERRUPT, tids[i], NULL, NULL) == 0);
        CHECK(waitpid(tids[i], &status, __WALL) == tids[i]);
    }
    OK(cuCheckpointProcessCheckpoint(peer.pid, NULL));
    OK(cuCheckpointProcessRestore(peer.pid, NULL));
    OK(cuCheckpointProcessUnlock(peer.pid, NULL));
    for (unsigned i = 0; i < stopped; i++)
        CHECK(ptrace(PTRACE_DETACH, tids[i], NULL, NULL) == 0);
    say(peer.sock, 0);
    hear(peer.sock);
    peer_kill(&peer);
}

static void busy(int sock)
{
    struct gpu gpu;

    gpu_open(&gpu, 0);
    gpu_spin(&gpu, 3000ull * 1000 * 1000, NULL);
    say(sock, 0);
    OK(cuCtxSynchronize());
    say(sock, 0);
    hear(sock);
}

static void lock_timeout(void)
{
    struct peer peer = peer_start(busy);
    CUcheckpointLockArgs args = {.timeoutMs = 100};

    hear(peer.sock);
    OK(cuInit(0));
    IS(CUDA_ERROR_NOT_READY, cuCheckpointProcessLock(peer.pid, &args));
    CHECK(state_of(peer.pid) == CU_PROCESS_STATE_RUNNING);
    hear(peer.sock); /* it goes on */
    args.timeoutMs = 30000;
    OK(cuCheckpointProcessLock(peer.pid, &args));
    peer_kill(&peer);
}

/* ---- Refusals ---- */

static void managed(int sock)
{
    struct gpu gpu;
    CUdeviceptr p;

    gpu_open(&gpu, 0);
    OK(cuMemAllocManaged(&p, MIB, CU_MEM_ATTACH_GLOBAL));
    say(sock, 0);
    hear(sock);
    OK(cuMemFree_v2(p));
    say(sock, 0);
    hear(sock);
}

static void refuse_managed(void)
{
    struct peer peer = peer_start(managed);

    hear(peer.sock);
    OK(cuInit(0));
    OK(cuCheckpointProcessLock(peer.pid, NULL));
    IS(CUDA_ERROR_NOT_SUPPORTED, cuCheckpointProcessCheckpoint(peer.pid, NULL));
    OK(cuCheckpointProcessUnlock(peer.pid, NULL));
    say(peer.sock, 0);
    hear(peer.sock);
    OK(cuCheckpointProcessLock(peer.pid, NULL));
    OK(cuCheckpointProcessCheckpoint(peer.pid, NULL));
    peer_kill(&peer);
}

static void importer(int sock)
{
    CUmemGenericAllocationHandle handle;
    struct gpu gpu;
    int fd;

    gpu_open(&gpu, 0);
    fd = receive_fd(sock);
    OK(cuMemImportFromShareableHandle(&handle, (void *)(intptr_t)fd,
                                      CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    close(fd);
    vmm_map(handle, SIZE, 0);
    say(sock, 0);
    hear(sock);
}

static void refuse_imported(void)
{
    struct peer peer = peer_start(importer);
    struct gpu gpu;
    int fd;

    gpu_open(&gpu, 0);
    OK(cuMemExportToShareableHandle(&fd, vmm_create(SIZE), CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    send_fd(peer.sock, fd);
    hear(peer.sock);
    OK(cuCheckpointProcessLock(peer.pid, NULL));
    OK(cuCheckpointProcessCheckpoint(peer.pid, NULL));
    IS(CUDA_ERROR_NOT_SUPPORTED, cuCheckpointProcessRestore(peer.pid, NULL));
    CHECK(state_of(peer.pid) == CU_PROCESS_STATE_FAILED);
    IS(CUDA_ERROR_ILLEGAL_STATE, cuCheckpointProcessRestore(peer.pid, NULL));
    IS(CUDA_ERROR_ILLEGAL_STATE, cuCheckpointProcessUnlock(peer.pid, NULL));
    peer_kill(&peer);
}

static void host_numa(int sock)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .location = {CU_MEM_LOCATION_TYPE_HOST_NUMA, 0}};
    CUmemGenericAllocationHandle handle;
    struct gpu gpu;

    gpu_open(&gpu, 0);
    OK(cuMemCreate(&handle, SIZE, &prop, 0));
    vmm_map(handle, SIZE, 0);
    say(sock, 0);
    hear(sock);
}

static void refuse_host_numa(void)
{
    struct peer peer = peer_start(host_numa);

    hear(peer.sock);
    OK(cuInit(0));
    OK(cuCheckpointProcessLock(peer.pid, NULL));
    OK(cuCheckpointProcessCheckpoint(peer.pid, NULL));
    IS(CUDA_ERROR_UNKNOWN, cuCheckpointProcessRestore(peer.pid, NULL));
    IS(CUDA_ERROR_ILLEGAL_STATE, cuCheckpointProcessUnlock(peer.pid, NULL));
    peer_kill(&peer);
}

static void refuse_mps(void)
{
    setenv("BENNU_SIM_MPS", "1", 1);
    struct peer peer = peer_start(application);

    hear(peer.sock);
    OK(cuInit(0));
    IS(CUDA_ERROR_NOT_SUPPORTED, cuCheckpointProcessLock(peer.pid, NULL));
    CHECK(state_of(peer.pid) == CU_PROCESS_STATE_RUNNING);
    say(peer.sock, 0);
    hear(peer.sock);
    peer_kill(&peer);
}

/* A restore that lacks memory is the end of the process, also when there is memory again. */
static void restore_out_of_memory(void)
{
    setenv("BENNU_SIM_MEMORY", "64M", 1);
    struct peer peer = peer_start(application);
    CUdeviceptr p;
    CUcontext ctx;

    hear(peer.sock);
    OK(cuInit(0));
    OK(cuDevicePrimaryCtxRetain(&ctx, 0));
    OK(cuCtxSetCurrent(ctx));
    OK(cuCheckpointProcessLock(peer.pid, NULL));
    OK(cuCheckpointProcessCheckpoint(peer.pid, NULL));
    OK(cuMemAlloc_v2(&p, 60 * MIB));
    IS(CUDA_ERROR_OUT_OF_MEMORY, cuCheckpointProcessRestore(peer.pid, NULL));
    OK(cuMemFree_v2(p));
    CHECK(state_of(peer.pid) == CU_PROCESS_STATE_CHECKPOINTED);
    IS(CUDA_ERROR_OPERATING_SYSTEM, cuCheckpointProcessRestore(peer.pid, NULL));
    IS(CUDA_ERROR_ILLEGAL_STATE, cuCheckpointProcessUnlock(peer.pid, NULL));
    peer_kill(&peer);
}

static void remap(void)
{
    CUcheckpointGpuPair pairs[2];
    CUcheckpointRestoreArgs args = {.gpuPairs = pairs, .gpuPairsCount = 1};
    CUcontext ctx;

    setenv("BENNU_SIM_DEVICES", "2", 1);
    struct peer peer = peer_start(application);

    hear(peer.sock);
    OK(cuInit(0));
    OK(cuDevicePrimaryCtxRetain(&ctx, 1));
    OK(cuCtxSetCurrent(ctx));
    CHECK(gpu_used() == 0);
    OK(cuDeviceGetUuid_v2(&pairs[0].oldUuid, 0));
    OK(cuDeviceGetUuid_v2(&pairs[0].newUuid, 1));
    OK(cuDeviceGetUuid_v2(&pairs[1].oldUuid, 1));
    OK(cuDeviceGetUuid_v2(&pairs[1].newUuid, 0));
    OK(cuCheckpointProcessLock(peer.pid, NULL));
    OK(cuCheckpointProcessCheckpoint(peer.pid, NULL));
    IS(CUDA_ERROR_INVALID_VALUE,
       cuCheckpointProcessRestore(peer.pid, &args)); /* every device must be listed */
    args.gpuPairsCount = 2;
    OK(cuCheckpointProcessRestore(peer.pid, &args));
    CHECK(gpu_used() > 20 * MIB); /* on the other device now */
    OK(cuCheckpointProcessUnlock(peer.pid, NULL));
    say(peer.sock, 0);
    hear(peer.sock);
    peer_kill(&peer);
}

static void forker(int sock)
{
    struct gpu gpu;
    pid_t child;

    gpu_open(&gpu, 0);
    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        say(sock, (uint64_t)getpid()); /* what the library does in a child is done by now */
        pause();
    }
    pause();
}

static void forked_child(void)
{
    struct peer peer = peer_start(forker);
    CUprocessState state;
    int child;

    child = (int)hear(peer.sock);
    OK(cuInit(0));
    OK(cuCheckpointProcessGetState(peer.pid, &state));
    IS(CUDA_ERROR_INVALID_VALUE, cuCheckpointProcessGetState(child, &state));
    CHECK(count_descriptors(child, "cuda-sim") == 0);
    peer_kill(&peer);
}

#define TEST(name)                           \
    static void test_##name(void **state)    \
    {                                        \
        (void)state;                         \
        assert_int_equal(isolated(name), 0); \
    }

TEST(share)
TEST(ipc)
TEST(capacity)
TEST(checkpoint)
TEST(checkpoint_traced)
TEST(lock_timeout)
TEST(refuse_managed)
TEST(refuse_imported)
TEST(refuse_host_numa)
TEST(refuse_mps)
TEST(restore_out_of_memory)
TEST(remap)
TEST(forked_child)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_share),
        cmocka_unit_test(test_ipc),
        cmocka_unit_test(test_capacity),
        cmocka_unit_test(test_checkpoint),
        cmocka_unit_test(test_checkpoint_traced),
        cmocka_unit_test(test_lock_timeout),
        cmocka_unit_test(test_refuse_managed),
        cmocka_unit_test(test_refuse_imported),
        cmocka_unit_test(test_refuse_host_numa),
        cmocka_unit_test(test_refuse_mps),
        cmocka_unit_test(test_restore_out_of_memory),
        cmocka_unit_test(test_remap),
        cmocka_unit_test(test_forked_child),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
