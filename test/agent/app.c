/* A CUDA program for the tests, told what to do by lines on its standard input; answers one line each: "ok ...", "no CODE".
 *
 *   alloc MIB           cuMemAlloc, filled with the block's pattern
 *   vmm MIB MAPS        one cuMemCreate mapped MAPS times, the last mapping for reading only
 *   held MIB            cuMemCreate without a mapping
 *   small BYTES         native memory; "ipcsmall" cuIpcGetMemHandle of it, "freesmall"
 *   managed BYTES / unmanage
 *   fill SEED / check SEED   every block
 *   export I            cuMemExportToShareableHandle of block I
 *   give I              the same, and keep the descriptor: its number
 *   take PID FD / untake   import that of another program, hold it / let go of it
 *   try KIND MIB        allocate that much, by cuMemAlloc (0), cuMemAllocPitch (1), cuMemCreate (2), cuMemAllocAsync (3)
 *   tries N MIB         by cuMemAlloc in N threads at once: how many got it
 *   untry               free the last of try, or all of tries
 *   capture / endcapture     on a stream of its own
 *   hammer / stop       threads that copy and check all the time / their number of calls
 *   block / unblock     work on the stream that does not end / ends; "wait" begins a thread that waits for it
 *   free I              block I
 *   swap / swapped      put another open of the same file in the place of each high descriptor of GPU memory; how many: then, and
 *                       still open now
 *   forks / leaks       a thread that forks all the time; ends it: children so far that had GPU memory's descriptors
 *   limit N             soft limit of descriptors
 *   fork                a child that checks what a child may expect
 *   ipcget I            cuIpcGetMemHandle of block I, in hex
 *   ipcopen HEX I SEED  open it (twice: the same address), compare with block I of a program whose seed is SEED
 *   ipcclose            both times; "ipcshut" once
 *   ipcswap             those two act on another opened one from now on, or on the first again
 *   unagent WHAT        close the agent's descriptors: of its page (0), all others (1)
 *   quit
 */
#include "cu.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)
#define BLOCKS 4096

struct block {
    CUdeviceptr at[4];
    int maps;
    size_t bytes;
    CUmemGenericAllocationHandle handle;
    bool vmm, freed;
};

static struct cu cu;
static struct block blocks[BLOCKS];
static int count;
static CUcontext context;
static CUstream stream;
static uint32_t seed = 1;

static void must(CUresult r, const char *what)
{
    if (r != CUDA_SUCCESS) {
        printf("no %d %s\n", r, what);
        fflush(stdout);
        exit(3);
    }
}

static void fill_block(int i)
{
    struct block *b = &blocks[i];
    if (!b->maps || b->freed)
        return;
    uint32_t *host = malloc(b->bytes);
    for (size_t k = 0; k < b->bytes / 4; k++)
        host[k] = pattern(seed + (uint32_t)i, k);
    must(cu.cuMemcpyHtoD_v2(b->at[0], host, b->bytes), "cuMemcpyHtoD");
    free(host);
}

/* The number of words that differ, over all mappings. */
static size_t check_block(int i, uint32_t *host)
{
    struct block *b = &blocks[i];
    size_t wrong = 0;
    for (int m = 0; m < b->maps && !b->freed; m++) {
        must(cu.cuMemcpyDtoH_v2(host, b->at[m], b->bytes), "cuMemcpyDtoH");
        for (size_t k = 0; k < b->bytes / 4; k++)
            wrong += host[k] != pattern(seed + (uint32_t)i, k);
    }
    return wrong;
}

static size_t check_all(void)
{
    size_t most = 4, wrong = 0;
    for (int i = 0; i < count; i++)
        most = blocks[i].bytes > most ? blocks[i].bytes : most;
    uint32_t *host = malloc(most);
    for (int i = 0; i < count; i++)
        wrong += check_block(i, host);
    free(host);
    return wrong;
}

static void do_vmm(size_t mib, int maps)
{
    struct block *b = &blocks[count++];
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                .location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}};
    b->vmm = true;
    b->bytes = mib * MIB;
    b->maps = maps;
    must(cu.cuMemCreate(&b->handle, b->bytes, &prop, 0), "cuMemCreate");
    for (int m = 0; m < maps; m++) {
        bool last = m > 0 && m + 1 == maps;
        CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, 0},
                                  last ? CU_MEM_ACCESS_FLAGS_PROT_READ : CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
        must(cu.cuMemAddressReserve(&b->at[m], b->bytes, 0, 0, 0), "cuMemAddressReserve");
        must(cu.cuMemMap(b->at[m], b->bytes, 0, b->handle, 0), "cuMemMap");
        must(cu.cuMemSetAccess(b->at[m], b->bytes, &access, 1), "cuMemSetAccess");
    }
}

static void do_free(int i)
{
    struct block *b = &blocks[i];
    b->freed = true;
    if (!b->vmm) {
        must(cu.cuMemFree_v2(b->at[0]), "cuMemFree");
        return;
    }
    for (int m = 0; m < b->maps; m++) {
        must(cu.cuMemUnmap(b->at[m], b->bytes), "cuMemUnmap");
        must(cu.cuMemAddressFree(b->at[m], b->bytes), "cuMemAddressFree");
    }
    must(cu.cuMemRelease(b->handle), "cuMemRelease");
}

/* ---- threads ---------------------------------------------------------------------------------------- */

static pthread_t hammers[3];
static int stop_hammers;
static unsigned long hammered, hammer_wrong;

static void *hammer(void *unused)
{
    uint32_t host[1024];
    must(cu.cuCtxSetCurrent(context), "cuCtxSetCurrent");
    for (int i = 0; !__atomic_load_n(&stop_hammers, __ATOMIC_RELAXED); i = (i + 1) % count) {
        struct block *b = &blocks[i];
        if (!b->maps || b->freed)
            continue;
        size_t at = (size_t)(i * 37) % (b->bytes / 4 - 1024);
        must(cu.cuMemcpyDtoH_v2(host, b->at[0] + at * 4, sizeof(host)), "cuMemcpyDtoH in a thread");
        for (size_t k = 0; k < 1024; k++)
            if (host[k] != pattern(seed + (uint32_t)i, at + k))
                __atomic_fetch_add(&hammer_wrong, 1, __ATOMIC_RELAXED);
        __atomic_fetch_add(&hammered, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static void start_hammers(void)
{
    stop_hammers = 0;
    hammered = hammer_wrong = 0;
    for (size_t i = 0; i < 3; i++)
        pthread_create(&hammers[i], NULL, hammer, NULL);
}

static void end_hammers(void)
{
    __atomic_store_n(&stop_hammers, 1, __ATOMIC_RELAXED);
    for (size_t i = 0; i < 3; i++)
        pthread_join(hammers[i], NULL);
    printf("ok %lu %lu\n", hammered, hammer_wrong);
}

/* A child has none of the agent's descriptors, and the driver refuses it without more ado. */
static void do_fork(void)
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        for (int fd = 0; fd < 2048; fd++) {
            char path[64], link[256] = "";
            snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
            bool open = readlink(path, link, sizeof(link) - 1) > 0;
            if (open && (fd >= 512 || strstr(link, "bennu-agent"))) /* up there is nobody else's */
                _exit(10);
        }
        int n;
        CUresult r = cu.cuDeviceGetCount(&n); /* must return, whatever it says */
        char *args[] = {"true", NULL};
        if (r != CUDA_SUCCESS)
            execv("/bin/true", args);
        _exit(11);
    }
    int status = 0;
    waitpid(child, &status, 0);
    printf(status == 0 ? "ok\n" : "no %d child\n", WEXITSTATUS(status));
}

/* Is it a descriptor of GPU memory? */
static bool is_memory(int fd)
{
    char path[64], link[256] = "";
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return readlink(path, link, sizeof(link) - 1) > 0 && strstr(link, "/memfd:cuda-sim.") == link;
}

#define NUMBERS 2048
static bool swapped[NUMBERS];

static void swap(void)
{
    int n = 0;
    for (int fd = 512; fd < NUMBERS; fd++) {
        char path[64];
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        int other = is_memory(fd) ? open(path, O_RDWR | O_CLOEXEC) : -1;
        if (other < 0)
            continue;
        dup2(other, fd);
        close(other);
        swapped[fd] = true;
        n++;
    }
    printf("ok %d\n", n);
}

static void close_agent(bool page)
{
    for (int fd = 512; fd < NUMBERS; fd++) {
        char path[64], link[256] = "";
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        if (readlink(path, link, sizeof(link) - 1) > 0 && page == (strstr(link, "bennu-agent") != NULL))
            close(fd);
    }
    printf("ok\n");
}

static void count_swapped(void)
{
    int n = 0;
    for (int fd = 0; fd < NUMBERS; fd++)
        n += swapped[fd] && is_memory(fd);
    printf("ok %d\n", n);
}

static pthread_t forker;
static int stop_forks, forks, leaks;

static void *fork_on(void *unused)
{
    while (!__atomic_load_n(&stop_forks, __ATOMIC_RELAXED)) {
        int status = 0;
        pid_t child = fork();
        if (child == 0) {
            for (int fd = 3; fd < NUMBERS; fd++)
                if (is_memory(fd))
                    _exit(1);
            _exit(0);
        }
        waitpid(child, &status, 0);
        leaks += status != 0;
        __atomic_fetch_add(&forks, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

static bool forking(const char *word)
{
    if (strcmp(word, "forks") == 0) {
        stop_forks = forks = leaks = 0;
        pthread_create(&forker, NULL, fork_on, NULL);
        while (__atomic_load_n(&forks, __ATOMIC_RELAXED) == 0)
            usleep(1000);
        printf("ok\n");
    } else if (strcmp(word, "leaks") == 0) {
        __atomic_store_n(&stop_forks, 1, __ATOMIC_RELAXED);
        pthread_join(forker, NULL);
        printf("ok %d of %d\n", leaks, forks);
    } else if (strcmp(word, "swap") == 0) {
        swap();
    } else if (strcmp(word, "swapped") == 0) {
        count_swapped();
    } else {
        return false;
    }
    return true;
}

static void set_limit(unsigned n)
{
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = n;
    printf(setrlimit(RLIMIT_NOFILE, &limit) == 0 ? "ok\n" : "no 0 setrlimit\n");
}

static int blocked;
static pthread_t waiter;

static void hold_stream(void *unused)
{
    while (__atomic_load_n(&blocked, __ATOMIC_ACQUIRE))
        usleep(1000);
}

static void *wait_for_stream(void *unused)
{
    must(cu.cuCtxSetCurrent(context), "cuCtxSetCurrent");
    must(cu.cuStreamSynchronize(stream), "cuStreamSynchronize");
    return NULL;
}

static bool blocking(const char *word)
{
    if (strcmp(word, "block") == 0) {
        blocked = 1;
        must(cu.cuLaunchHostFunc(stream, hold_stream, NULL), "cuLaunchHostFunc");
    } else if (strcmp(word, "wait") == 0) {
        pthread_create(&waiter, NULL, wait_for_stream, NULL);
        usleep(50000); /* it is inside soon; the test does not depend on it */
    } else if (strcmp(word, "unblock") == 0) {
        __atomic_store_n(&blocked, 0, __ATOMIC_RELEASE);
        if (waiter)
            pthread_join(waiter, NULL);
        waiter = 0;
        must(cu.cuStreamSynchronize(stream), "cuStreamSynchronize");
    } else {
        return false;
    }
    printf("ok\n");
    return true;
}

static CUdeviceptr managed, opened, opened_other, small;

static void ipc_get(int i)
{
    CUipcMemHandle handle;
    must(cu.cuIpcGetMemHandle(&handle, blocks[i].at[0]), "cuIpcGetMemHandle");
    printf("ok ");
    for (size_t k = 0; k < sizeof(handle); k++)
        printf("%02x", ((unsigned char *)&handle)[k]);
    printf("\n");
}

static void ipc_open(const char *line)
{
    char hex[160] = "";
    unsigned i = 0, other = 0, byte;
    CUipcMemHandle handle;
    CUdeviceptr again;
    size_t bytes = 0;
    sscanf(line, "ipcopen %159s %u %u", hex, &i, &other);
    for (size_t k = 0; k < sizeof(handle) && sscanf(hex + 2 * k, "%2x", &byte) == 1; k++)
        ((unsigned char *)&handle)[k] = (unsigned char)byte;
    CUresult r = cu.cuIpcOpenMemHandle_v2(&opened, handle, 0);
    if (r != CUDA_SUCCESS) {
        printf("no %d cuIpcOpenMemHandle\n", r);
        return;
    }
    must(cu.cuIpcOpenMemHandle_v2(&again, handle, 0), "cuIpcOpenMemHandle");
    must(cu.cuMemGetAddressRange_v2(NULL, &bytes, opened), "cuMemGetAddressRange");
    uint32_t *host = malloc(bytes);
    must(cu.cuMemcpyDtoH_v2(host, opened, bytes), "cuMemcpyDtoH");
    size_t wrong = opened != again || cu.cuMemFree_v2(opened) == CUDA_SUCCESS;
    /* What lies around it in the same segment is not told of. */
    size_t other_bytes;
    wrong += cu.cuMemGetAddressRange_v2(NULL, &other_bytes, opened - 1) == CUDA_SUCCESS;
    wrong += cu.cuMemGetAddressRange_v2(NULL, &other_bytes, opened + bytes) == CUDA_SUCCESS;
    for (size_t k = 0; k < bytes / 4; k++)
        wrong += host[k] != pattern(other + i, k);
    free(host);
    printf(wrong ? "no 0 %zu words differ\n" : "ok\n", wrong);
}

static void ipc_close(void)
{
    must(cu.cuIpcCloseMemHandle(opened), "cuIpcCloseMemHandle");
    must(cu.cuIpcCloseMemHandle(opened), "cuIpcCloseMemHandle");
    CUresult r = cu.cuIpcCloseMemHandle(opened);
    printf(r == CUDA_SUCCESS ? "no 0 closed thrice\n" : "ok\n");
}

static void ipc_swap(void)
{
    CUdeviceptr p = opened;
    opened = opened_other;
    opened_other = p;
    printf("ok\n");
}

static void ipc_shut(void)
{
    CUresult r = cu.cuIpcCloseMemHandle(opened);
    printf(r == CUDA_SUCCESS ? "ok\n" : "no %d\n", r);
}

static CUmemGenericAllocationHandle taken;

static CUresult give(int i)
{
    int fd = -1;
    CUresult r =
        cu.cuMemExportToShareableHandle(&fd, blocks[i].handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
    if (r == CUDA_SUCCESS)
        printf("ok %d\n", fd);
    return r;
}

static CUresult take(pid_t pid, int number)
{
    int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
    int fd = (int)syscall(SYS_pidfd_getfd, pidfd, number, 0);
    CUresult r = cu.cuMemImportFromShareableHandle(&taken, (void *)(intptr_t)fd,
                                                   CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    close(fd);
    close(pidfd);
    return r;
}

/* Memory between programs. */
static bool sharing(const char *word, unsigned long a, unsigned long b)
{
    CUresult r;
    if (strcmp(word, "give") == 0) {
        r = give((int)a);
        if (r == CUDA_SUCCESS)
            return true;
    } else if (strcmp(word, "take") == 0) {
        r = take((pid_t)a, (int)b);
    } else if (strcmp(word, "untake") == 0) {
        r = cu.cuMemRelease(taken);
    } else {
        return false;
    }
    printf(r == CUDA_SUCCESS ? "ok\n" : "no %d %s\n", r, word);
    return true;
}

/* ---- allocations that may fail ---------------------------------------------------------------------- */

#define TRIES 8
static CUdeviceptr tried[TRIES];
static CUmemGenericAllocationHandle tried_handle;
static size_t try_bytes;

static CUresult try_one(unsigned kind, size_t bytes)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}};
    size_t pitch;
    switch (kind) {
    case 0: return cu.cuMemAlloc_v2(&tried[0], bytes);
    case 1: return cu.cuMemAllocPitch_v2(&tried[0], &pitch, bytes / 1024, 1024, 4);
    case 2: return cu.cuMemCreate(&tried_handle, bytes, &prop, 0);
    default: return cu.cuMemAllocAsync(&tried[0], bytes, stream);
    }
}

static void *try_thread(void *arg)
{
    must(cu.cuCtxSetCurrent(context), "cuCtxSetCurrent");
    if (cu.cuMemAlloc_v2(arg, try_bytes) != CUDA_SUCCESS)
        *(CUdeviceptr *)arg = 0;
    return NULL;
}

static unsigned try_threads(unsigned n, size_t bytes)
{
    pthread_t threads[TRIES];
    unsigned got = 0;
    try_bytes = bytes;
    for (unsigned i = 0; i < n && i < TRIES; i++)
        pthread_create(&threads[i], NULL, try_thread, &tried[i]);
    for (unsigned i = 0; i < n && i < TRIES; i++) {
        pthread_join(threads[i], NULL);
        got += tried[i] != 0;
    }
    return got;
}

static void untry(void)
{
    for (unsigned i = 0; i < TRIES; i++)
        if (tried[i])
            must(cu.cuMemFree_v2(tried[i]), "cuMemFree");
    memset(tried, 0, sizeof(tried));
    if (tried_handle)
        must(cu.cuMemRelease(tried_handle), "cuMemRelease");
    tried_handle = 0;
}

static bool trying(const char *word, unsigned long a, unsigned long b)
{
    if (strcmp(word, "try") == 0) {
        CUresult r = try_one((unsigned)a, b * MIB);
        printf(r == CUDA_SUCCESS ? "ok\n" : "no %d\n", r);
    } else if (strcmp(word, "tries") == 0) {
        printf("ok %u\n", try_threads((unsigned)a, b * MIB));
    } else if (strcmp(word, "untry") == 0) {
        untry();
        printf("ok\n");
    } else {
        return false;
    }
    return true;
}

/* The rarer commands. */
static bool special(const char *word, unsigned long a)
{
    CUresult r = CUDA_SUCCESS;
    CUgraph graph = NULL;
    CUgreenCtx green;
    int fd = -1;
    CUipcMemHandle handle;
    if (strcmp(word, "small") == 0) {
        r = cu.cuMemAlloc_v2(&small, a);
    } else if (strcmp(word, "ipcsmall") == 0) {
        r = cu.cuIpcGetMemHandle(&handle, small);
    } else if (strcmp(word, "freesmall") == 0) {
        r = cu.cuMemFree_v2(small);
    } else if (strcmp(word, "green") == 0) {
        r = cu.cuGreenCtxCreate(&green, NULL, 0, 0);
    } else if (strcmp(word, "managed") == 0) {
        r = cu.cuMemAllocManaged(&managed, a, CU_MEM_ATTACH_GLOBAL);
    } else if (strcmp(word, "unmanage") == 0) {
        r = cu.cuMemFree_v2(managed);
    } else if (strcmp(word, "capture") == 0) {
        r = cu.cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_RELAXED);
    } else if (strcmp(word, "endcapture") == 0) {
        r = cu.cuStreamEndCapture(stream, &graph);
    } else if (strcmp(word, "export") == 0) {
        r = cu.cuMemExportToShareableHandle(&fd, blocks[a].handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                            0);
        if (r == CUDA_SUCCESS)
            close(fd);
    } else {
        return false;
    }
    printf(r == CUDA_SUCCESS ? "ok\n" : "no %d %s\n", r, word);
    return true;
}

static void obey(const char *word, unsigned long a, unsigned long b)
{
    if (strcmp(word, "unagent") == 0)
        close_agent(a == 0);
    else if (blocking(word) || special(word, a) || sharing(word, a, b) || trying(word, a, b) || forking(word))
        return;
    else if (strcmp(word, "alloc") == 0) {
        struct block *block = &blocks[count++];
        block->bytes = a * MIB;
        block->maps = 1;
        must(cu.cuMemAlloc_v2(&block->at[0], block->bytes), "cuMemAlloc");
        fill_block(count - 1);
        printf("ok %llx\n", block->at[0]);
    } else if (strcmp(word, "vmm") == 0) {
        do_vmm(a, (int)b);
        fill_block(count - 1);
        printf("ok\n");
    } else if (strcmp(word, "held") == 0) {
        do_vmm(a, 0);
        printf("ok\n");
    } else if (strcmp(word, "fill") == 0) {
        seed = (uint32_t)a;
        for (int i = 0; i < count; i++)
            fill_block(i);
        printf("ok\n");
    } else if (strcmp(word, "check") == 0) {
        size_t wrong = a == seed ? check_all() : ~(size_t)0;
        printf(wrong ? "no %zu words differ\n" : "ok\n", wrong);
    } else if (strcmp(word, "hammer") == 0) {
        start_hammers();
        printf("ok\n");
    } else if (strcmp(word, "stop") == 0) {
        end_hammers();
    } else if (strcmp(word, "free") == 0) {
        do_free((int)a);
        printf("ok\n");
    } else if (strcmp(word, "fork") == 0) {
        do_fork();
    } else if (strcmp(word, "limit") == 0) {
        set_limit((unsigned)a);
    } else {
        printf("no 0 such command\n");
    }
}

int main(int argc, char **argv)
{
    char line[256], word[32];
    if (argc > 1) {
        struct rlimit limit = {(rlim_t)atoi(argv[1]), (rlim_t)atoi(argv[1])};
        setrlimit(RLIMIT_NOFILE, &limit);
    }
    cu_load(&cu, need_env("BENNU_AGENT"), RTLD_NOW | RTLD_LOCAL);
    must(cu.cuInit(0), "cuInit");
    if (getenv("BENNU_TEST_PRIMARY")) {
        must(cu.cuDevicePrimaryCtxRetain(&context, 0), "cuDevicePrimaryCtxRetain");
        must(cu.cuCtxSetCurrent(context), "cuCtxSetCurrent");
    } else {
        must(cu.cuCtxCreate_v2(&context, 0, 0), "cuCtxCreate");
    }
    must(cu.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
    printf("ok\n");
    fflush(stdout);
    while (fgets(line, sizeof(line), stdin)) {
        unsigned long a = 0, b = 0;
        if (sscanf(line, "%31s %lu %lu", word, &a, &b) < 1)
            continue;
        if (strcmp(word, "quit") == 0)
            return 0;
        if (strcmp(word, "ipcget") == 0)
            ipc_get((int)a);
        else if (strcmp(word, "ipcopen") == 0)
            ipc_open(line);
        else if (strcmp(word, "ipcclose") == 0)
            ipc_close();
        else if (strcmp(word, "ipcshut") == 0)
            ipc_shut();
        else if (strcmp(word, "ipcswap") == 0)
            ipc_swap();
        else
            obey(word, a, b);
        fflush(stdout);
    }
    return 0;
}
