/* SPDX-License-Identifier: MIT */

/* Programs that a checkpoint must refuse, or take with care: odd MODE [NUMBER].
 *
 *   plain        no CUDA at all: counts, and checks 8 MiB of its own memory
 *   managed      holds managed memory
 *   import-ipc   maps memory of its child by CUDA IPC        import-vmm   by a descriptor
 *   closed-ipc   has closed again what it had mapped by CUDA IPC
 *   busy [MS]    one stream runs a kernel of that many milliseconds (default 20000), then goes on in rounds
 *   threads [N]  N threads launch kernels as fast as they can, each checking its own memory
 *   hold MIB     takes that much device memory in pieces of 2 MiB
 *   later MIB    the same, when it gets SIGUSR1; begins to use CUDA before
 *
 * Each reports "0 PID ready" and then "0 PID round N" on standard output, and ends with status 1 as soon as a byte is wrong.
 */
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "cuda.h"

#define BYTES ((size_t)4 << 20)
#define WORDS (BYTES / 8)
#define LAUNCHES 64 /* between two checks */

static void say(const char *what)
{
    printf("0 %d %s\n", (int)getpid(), what);
}

static void fill(uint64_t *words, uint64_t seed)
{
    for (size_t i = 0; i < WORDS; i++)
        words[i] = cr_mix(seed + i);
}

static void check(const uint64_t *words, uint64_t seed)
{
    for (size_t i = 0; i < WORDS; i++)
        if (words[i] != cr_mix(seed + i))
            cr_die("WRONG: round %llu, word %zu", (unsigned long long)seed, i);
}

/* For ever: check the memory, change it. `ptr` 0: host memory alone. */
__attribute__((noreturn)) static void rounds(CUdeviceptr ptr)
{
    uint64_t *host = malloc(BYTES), *kept = malloc(BYTES);
    if (!host || !kept)
        cr_die("out of memory");
    say("ready");
    for (uint64_t round = 0;; round++) {
        fill(host, round);
        if (ptr)
            MUST(cuMemcpyHtoD_v2(ptr, host, BYTES));
        else
            memcpy(kept, host, BYTES);
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
        if (ptr)
            MUST(cuMemcpyDtoH_v2(kept, ptr, BYTES));
        check(kept, round);
        printf("0 %d round %llu\n", (int)getpid(), (unsigned long long)round + 1);
    }
}

static CUdeviceptr alloc(size_t bytes)
{
    CUdeviceptr ptr;
    MUST(cuMemAlloc_v2(&ptr, bytes));
    return ptr;
}

static void managed(void)
{
    CUdeviceptr ptr;
    cr_open(0);
    MUST(cuMemAllocManaged(&ptr, BYTES, CU_MEM_ATTACH_GLOBAL));
    rounds(alloc(BYTES));
}

/* ---- imported memory ---- */

struct message {
    CUipcMemHandle ipc;
    char room[CMSG_SPACE(sizeof(int))];
};

static CUmemGenericAllocationHandle create(void)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                .location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}};
    CUmemGenericAllocationHandle handle;
    MUST(cuMemCreate(&handle, BYTES, &prop, 0));
    return handle;
}

static CUdeviceptr map(CUmemGenericAllocationHandle handle)
{
    CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUdeviceptr ptr;
    MUST(cuMemAddressReserve(&ptr, BYTES, 0, 0, 0));
    MUST(cuMemMap(ptr, BYTES, 0, handle, 0));
    MUST(cuMemSetAccess(ptr, BYTES, &access, 1));
    return ptr;
}

static void send_handle(int sock, bool vmm)
{
    struct message m = {0};
    struct iovec iov = {&m.ipc, sizeof(m.ipc)};
    struct msghdr hdr = {.msg_iov = &iov, .msg_iovlen = 1};
    int fd = -1;
    if (vmm) {
        CUmemGenericAllocationHandle handle = create();
        map(handle);
        MUST(cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
        hdr.msg_control = m.room;
        hdr.msg_controllen = sizeof(m.room);
        struct cmsghdr *c = CMSG_FIRSTHDR(&hdr);
        *c = (struct cmsghdr){
            .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(fd))};
        memcpy(CMSG_DATA(c), &fd, sizeof(fd));
    } else {
        MUST(cuIpcGetMemHandle(&m.ipc, alloc(BYTES)));
    }
    if (sendmsg(sock, &hdr, 0) < 0)
        cr_die("sendmsg: %s", strerror(errno));
    if (fd >= 0)
        close(fd);
}

static CUdeviceptr receive_handle(int sock, bool vmm)
{
    struct message m = {0};
    struct iovec iov = {&m.ipc, sizeof(m.ipc)};
    struct msghdr hdr = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = m.room, .msg_controllen = sizeof(m.room)};
    if (recvmsg(sock, &hdr, 0) <= 0)
        cr_die("the child has sent nothing");
    CUdeviceptr ptr;
    if (!vmm) {
        MUST(cuIpcOpenMemHandle_v2(&ptr, m.ipc, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS));
        return ptr;
    }
    int fd;
    CUmemGenericAllocationHandle handle;
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&hdr)), sizeof(fd));
    MUST(cuMemImportFromShareableHandle(&handle, (void *)(intptr_t)fd,
                                        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    close(fd);
    return map(handle);
}

static void import(bool vmm, bool close_it)
{
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) < 0)
        cr_die("socketpair: %s", strerror(errno));
    if (fork() == 0) { /* nothing of CUDA has been touched yet */
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        cr_open(0);
        send_handle(pair[1], vmm);
        for (;;)
            pause();
    }
    cr_open(0);
    CUdeviceptr ptr = receive_handle(pair[0], vmm);
    if (close_it) {
        MUST(cuIpcCloseMemHandle(ptr));
        ptr = alloc(BYTES);
    }
    rounds(ptr);
}

/* ---- work on the GPU ---- */

static void busy(uint64_t ms)
{
    uint64_t ns = ms * 1000000;
    void *args[] = {&ns};
    CUstream stream;
    cr_open(0);
    CUdeviceptr ptr = alloc(BYTES);
    MUST(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    MUST(cuLaunchKernel(cr_kernel("bn_spin"), 1, 1, 1, 1, 1, 1, 0, stream, args, NULL));
    rounds(ptr);
}

static CUcontext context;

static void *hammer(void *arg)
{
    uint64_t n = (uintptr_t)arg, words = WORDS / 16, seed = n << 32;
    uint64_t *host = malloc(words * 8);
    CUstream stream;
    MUST(cuCtxSetCurrent(context));
    MUST(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    CUdeviceptr ptr = alloc(words * 8), counter = alloc(8);
    CUfunction fill_it = cr_kernel("bn_fill"), add = cr_kernel("bn_increment");
    uint64_t zero = 0, is;
    MUST(cuMemcpyHtoD_v2(counter, &zero, 8));
    for (uint64_t round = 0;; round++) {
        void *fill_args[] = {&ptr, &words, &seed}, *add_args[] = {&counter};
        seed++;
        for (int i = 0; i < LAUNCHES; i++)
            MUST(cuLaunchKernel(add, 1, 1, 1, 1, 1, 1, 0, stream, add_args, NULL));
        MUST(cuLaunchKernel(fill_it, 1, 1, 1, 32, 1, 1, 0, stream, fill_args, NULL));
        MUST(cuStreamSynchronize(stream));
        MUST(cuMemcpyDtoH_v2(&is, counter, 8));
        MUST(cuMemcpyDtoH_v2(host, ptr, words * 8));
        if (is != (round + 1) * LAUNCHES)
            cr_die("WRONG: thread %d, counter %llu in round %llu", (int)n, (unsigned long long)is,
                   (unsigned long long)round);
        for (size_t i = 0; i < words; i++)
            if (host[i] != cr_mix(seed + i))
                cr_die("WRONG: thread %d, word %zu in round %llu", (int)n, i, (unsigned long long)round);
        if (n == 0)
            printf("0 %d round %llu\n", (int)getpid(), (unsigned long long)round + 1);
    }
    return NULL;
}

static void threads(unsigned n)
{
    CUdevice device;
    pthread_t thread;
    cr_open(0);
    MUST(cuDeviceGet(&device, 0));
    MUST(cuDevicePrimaryCtxRetain(&context, device));
    say("ready");
    for (unsigned i = 1; i < n; i++)
        if (pthread_create(&thread, NULL, hammer, (void *)(uintptr_t)i) != 0)
            cr_die("pthread_create failed");
    hammer(NULL);
}

static void hold(unsigned mib, bool later)
{
    sigset_t set;
    int sig;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigprocmask(SIG_BLOCK, &set, NULL);
    cr_open(0);
    if (later) {
        say("open");
        sigwait(&set, &sig);
    }
    for (unsigned i = 2; i < mib; i += 2)
        alloc((size_t)2 << 20);
    rounds(alloc(BYTES));
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";
    unsigned number = argc > 2 ? (unsigned)atoi(argv[2]) : 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (strcmp(mode, "plain") == 0)
        rounds(0);
    else if (strcmp(mode, "managed") == 0)
        managed();
    else if (strcmp(mode, "import-ipc") == 0)
        import(false, false);
    else if (strcmp(mode, "import-vmm") == 0)
        import(true, false);
    else if (strcmp(mode, "closed-ipc") == 0)
        import(false, true);
    else if (strcmp(mode, "busy") == 0)
        busy(number ? number : 20000);
    else if (strcmp(mode, "threads") == 0)
        threads(number ? number : 8);
    else if (strcmp(mode, "hold") == 0 || strcmp(mode, "later") == 0)
        hold(number, strcmp(mode, "later") == 0);
    fprintf(stderr,
            "usage: odd plain|managed|import-ipc|import-vmm|closed-ipc|busy|threads|hold|later [NUMBER]\n");
    return 2;
}
