/* SPDX-License-Identifier: MIT */
#include "cuda.h"

#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

void gpu_open(struct gpu *gpu, int device)
{
    static char text[65536];
    FILE *f = fopen(SIM_KERNELS, "re");

    CHECK(f && fread(text, 1, sizeof(text) - 1, f) > 0);
    fclose(f);
    OK(cuInit(0));
    OK(cuDevicePrimaryCtxRetain(&gpu->ctx, device));
    OK(cuCtxSetCurrent(gpu->ctx));
    OK(cuModuleLoadData(&gpu->module, text));
    OK(cuModuleGetFunction(&gpu->increment, gpu->module, "bn_increment"));
    OK(cuModuleGetFunction(&gpu->fill, gpu->module, "bn_fill"));
    OK(cuModuleGetFunction(&gpu->check, gpu->module, "bn_check"));
    OK(cuModuleGetFunction(&gpu->spin, gpu->module, "bn_spin"));
    OK(cuModuleGetFunction(&gpu->xor_, gpu->module, "bn_xor"));
    OK(cuModuleGetFunction(&gpu->global_add, gpu->module, "bn_global_add"));
}

void gpu_fill(struct gpu *gpu, CUdeviceptr p, size_t bytes, uint64_t seed)
{
    uint64_t words = bytes / 8;
    void *args[] = {&p, &words, &seed};

    OK(cuLaunchKernel(gpu->fill, 2, 1, 1, 64, 1, 1, 0, NULL, args, NULL));
    OK(cuCtxSynchronize());
}

uint64_t gpu_bad(struct gpu *gpu, CUdeviceptr p, size_t bytes, uint64_t seed)
{
    uint64_t words = bytes / 8, bad = 0;
    CUdeviceptr counter;
    void *args[] = {&p, &words, &seed, &counter};

    OK(cuMemAlloc_v2(&counter, 8));
    OK(cuMemsetD8_v2(counter, 0, 8));
    OK(cuLaunchKernel(gpu->check, 2, 1, 1, 64, 1, 1, 0, NULL, args, NULL));
    OK(cuMemcpyDtoH_v2(&bad, counter, 8));
    OK(cuMemFree_v2(counter));
    return bad;
}

void gpu_spin(struct gpu *gpu, uint64_t ns, CUstream stream)
{
    void *args[] = {&ns};

    OK(cuLaunchKernel(gpu->spin, 1, 1, 1, 1, 1, 1, 0, stream, args, NULL));
}

size_t gpu_used(void)
{
    size_t free_bytes, total;

    OK(cuMemGetInfo_v2(&free_bytes, &total));
    return total - free_bytes;
}

CUmemGenericAllocationHandle vmm_create(size_t size)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                .location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}};
    CUmemGenericAllocationHandle handle;

    OK(cuMemCreate(&handle, size, &prop, 0));
    return handle;
}

CUdeviceptr vmm_map(CUmemGenericAllocationHandle handle, size_t size, CUdeviceptr at)
{
    CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};

    if (!at)
        OK(cuMemAddressReserve(&at, size, 0, 0, 0));
    OK(cuMemMap(at, size, 0, handle, 0));
    OK(cuMemSetAccess(at, size, &access, 1));
    return at;
}

int isolated(void (*fn)(void))
{
    char ledger[64];
    int status;
    pid_t pid = fork();

    if (pid == 0) {
        char machine[32];

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        alarm(60);
        /* A machine of its own, so that tests which run side by side do not fill each other's devices. */
        snprintf(machine, sizeof(machine), "test%d", getpid());
        setenv("BENNU_SIM_MACHINE", machine, 1);
        fn();
        exit(0);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid)
        return -1;
    snprintf(ledger, sizeof(ledger), "/dev/shm/cuda-sim.test%d", pid);
    unlink(ledger);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

struct peer peer_start(void (*fn)(int sock))
{
    struct peer peer;
    int pair[2];

    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) == 0);
    peer.pid = fork();
    CHECK(peer.pid >= 0);
    if (peer.pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(pair[0]);
        fn(pair[1]);
        _exit(0);
    }
    close(pair[1]);
    peer.sock = pair[0];
    return peer;
}

void peer_kill(struct peer *peer)
{
    kill(peer->pid, SIGKILL);
    waitpid(peer->pid, NULL, 0);
    close(peer->sock);
}

void say(int sock, uint64_t word)
{
    CHECK(send(sock, &word, sizeof(word), MSG_NOSIGNAL) == (ssize_t)sizeof(word));
}

uint64_t hear(int sock)
{
    uint64_t word = 0;

    CHECK(recv(sock, &word, sizeof(word), 0) == (ssize_t)sizeof(word));
    return word;
}

union control {
    char room[CMSG_SPACE(sizeof(int))];
    struct cmsghdr align;
};

void send_fd(int sock, int fd)
{
    union control control = {0};
    char byte = 0;
    struct iovec iov = {&byte, 1};
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control.room)};
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg);

    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    CHECK(sendmsg(sock, &msg, MSG_NOSIGNAL) == 1);
}

int receive_fd(int sock)
{
    union control control;
    char byte;
    struct iovec iov = {&byte, 1};
    struct msghdr msg = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control.room)};
    int fd;

    CHECK(recvmsg(sock, &msg, MSG_CMSG_CLOEXEC) == 1);
    CHECK(CMSG_FIRSTHDR(&msg));
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(fd));
    return fd;
}
