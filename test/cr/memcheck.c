/* SPDX-License-Identifier: MIT */

/* A CUDA program that checks itself: memcheck [OPTION...].
 *
 * It holds device memory of every kind: cuMemAlloc of many sizes, cuMemAllocPitch, VMM memory of its own (one handle mapped
 * twice), a module's global, pinned host memory; and streams, events and a graph. Each round it reads every byte of all of it
 * back, compares it with what (process, allocation, offset, round) demand, changes every byte, frees one allocation and makes it
 * anew, and reports "ROLE PID round N" on standard output. At the first wrong byte it says which and ends with status 1.
 * SIGUSR1 ends it with status 42 after a last check.
 *
 *   --allocs N --min BYTES --max BYTES   cuMemAlloc: N blocks, their sizes spread evenly by ratio (K, M, G)
 *   --rounds N                           end after N rounds (default: never)
 *   --pause MS                           between rounds
 *   --children N                         that many children of its own kind, started by fork and exec
 *   --root-without-cuda                  with --children: the root only waits
 *   --keep                               never free one and make it anew
 *   --device N                           the GPU that it uses
 *   --gpus N                             memory on the GPUs 0 to N - 1, kernels on the one that it uses
 *   --host BYTES                         that much of the process's own memory, in two pieces
 *   --spread N                           with --children: the process of role R uses GPU R modulo N
 */
#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "cuda.h"

#define PIECE ((size_t)1 << 20) /* bytes copied at once */
#define STREAMS 3
#define GRAPH_NODES 3
#define REGIONS_MAX 4096
#define EXIT_ASKED 42
#define GPUS_MAX 16

enum kind { ALLOC, PITCH, VMM, PINNED, HOST };
static const char *const kind_name[] = {"cuMemAlloc", "cuMemAllocPitch", "cuMemCreate", "cuMemHostAlloc",
                                        "malloc"};

struct region {
    enum kind kind;
    unsigned device;
    CUdeviceptr ptr, alias; /* alias: the same memory at a second address, or 0 */
    uint64_t *host;         /* PINNED, HOST: read and written by the host */
    size_t bytes;
};

static struct {
    unsigned allocs, children, role, device, gpus, spread;
    size_t min, max, host;
    unsigned long rounds, pause_ms;
    bool root_without_cuda, keep;
} opt = {.allocs = 24, .min = 4, .max = 5u << 20, .pause_ms = 2};

static struct region regions[REGIONS_MAX];
static size_t n_regions;
static uint64_t *staging;

static CUcontext contexts[GPUS_MAX];
static CUstream streams[STREAMS];
static CUevent events[STREAMS];
static CUfunction k_fill, k_increment, k_global_add;
static CUdeviceptr counter, global;
static CUgraphExec graph;
static uint64_t counted, global_sum;
static volatile sig_atomic_t asked;

/* What follows is for this GPU. */
static void use(unsigned device)
{
    static unsigned current = GPUS_MAX;
    if (device == current)
        return;
    MUST(cuCtxSetCurrent(contexts[device]));
    current = device;
}

/* ---- what must be where ---- */

static uint64_t seed_of(size_t region, uint64_t round)
{
    return cr_mix(cr_mix((uint64_t)opt.role << 32 | region) + round);
}

static void expected(uint64_t *out, uint64_t seed, size_t first_word, size_t bytes)
{
    for (size_t i = 0; i < (bytes + 7) / 8; i++)
        out[i] = cr_mix(seed + first_word + i);
}

__attribute__((noreturn)) static void wrong(size_t r, size_t offset, unsigned is, unsigned should,
                                            uint64_t round, const char *where)
{
    printf("%u %d wrong\n", opt.role, (int)getpid());
    cr_die("WRONG: round %llu, allocation %zu (%s of %zu bytes%s), byte %zu is %#x and not %#x",
           (unsigned long long)round, r, kind_name[regions[r].kind], regions[r].bytes, where, offset, is,
           should);
}

static void compare(size_t r, size_t offset, const void *is, size_t bytes, uint64_t round, const char *where)
{
    static uint64_t should[PIECE / 8];
    expected(should, seed_of(r, round), offset / 8, bytes);
    if (memcmp(is, should, bytes) == 0)
        return;
    const uint8_t *a = is, *b = (const uint8_t *)should;
    for (size_t i = 0; i < bytes; i++)
        if (a[i] != b[i])
            wrong(r, offset + i, a[i], b[i], round, where);
}

static void verify_at(size_t r, CUdeviceptr ptr, uint64_t round, const char *where)
{
    use(regions[r].device);
    for (size_t at = 0; at < regions[r].bytes; at += PIECE) {
        size_t n = regions[r].bytes - at < PIECE ? regions[r].bytes - at : PIECE;
        MUST(cuMemcpyDtoH_v2(staging, ptr + at, n));
        compare(r, at, staging, n, round, where);
    }
}

static uint64_t read_word(CUdeviceptr ptr)
{
    uint64_t word;
    use(opt.device);
    MUST(cuMemcpyDtoH_v2(&word, ptr, sizeof(word)));
    return word;
}

static void verify(uint64_t round)
{
    for (size_t r = 0; r < n_regions; r++) {
        if (regions[r].host) {
            for (size_t at = 0; at < regions[r].bytes; at += PIECE) {
                size_t n = regions[r].bytes - at < PIECE ? regions[r].bytes - at : PIECE;
                compare(r, at, (char *)regions[r].host + at, n, round, "");
            }
            continue;
        }
        verify_at(r, regions[r].ptr, round, "");
        if (regions[r].alias)
            verify_at(r, regions[r].alias, round, ", at its second address");
    }
    uint64_t is = read_word(counter);
    if (is != counted)
        cr_die("WRONG: round %llu, the kernels' counter is %llu and not %llu", (unsigned long long)round,
               (unsigned long long)is, (unsigned long long)counted);
    is = read_word(global);
    if (is != global_sum)
        cr_die("WRONG: round %llu, the module's global is %llu and not %llu", (unsigned long long)round,
               (unsigned long long)is, (unsigned long long)global_sum);
}

/* ---- changing all of it ---- */

static void fill_by_copy(size_t r, uint64_t round, size_t from)
{
    use(regions[r].device);
    for (size_t at = from; at < regions[r].bytes; at += PIECE) {
        size_t n = regions[r].bytes - at < PIECE ? regions[r].bytes - at : PIECE;
        expected(staging, seed_of(r, round), at / 8, n);
        MUST(cuMemcpyHtoD_v2(regions[r].ptr + at, staging, n));
    }
}

static void fill(size_t r, uint64_t round)
{
    struct region *g = &regions[r];
    uint64_t words = g->bytes / 8, seed = seed_of(r, round);
    if (g->host) {
        expected(g->host, seed, 0, g->bytes);
    } else if (words == 0 || g->device != opt.device || (r + round) % 3 == 0) {
        fill_by_copy(r, round, 0);
    } else {
        CUdeviceptr ptr = g->alias && round % 2 ? g->alias : g->ptr;
        void *args[] = {&ptr, &words, &seed};
        use(opt.device);
        MUST(cuLaunchKernel(k_fill, 64, 1, 1, 128, 1, 1, 0, streams[r % STREAMS], args, NULL));
        fill_by_copy(r, round, words * 8);
    }
}

static void launch(CUfunction f, uint64_t argument, CUstream stream)
{
    void *args[] = {&argument};
    use(opt.device);
    MUST(cuLaunchKernel(f, 1, 1, 1, 1, 1, 1, 0, stream, args, NULL));
}

/* One counter, incremented in every stream, each waiting for the one before it; then by the graph. */
static void count(uint64_t round)
{
    for (int s = 0; s < STREAMS; s++) {
        if (s > 0)
            MUST(cuStreamWaitEvent(streams[s], events[s - 1], 0));
        launch(k_increment, counter, streams[s]);
        MUST(cuEventRecord(events[s], streams[s]));
    }
    MUST(cuGraphLaunch(graph, streams[STREAMS - 1]));
    counted += STREAMS + GRAPH_NODES;
    launch(k_global_add, round, streams[0]);
    global_sum += round;
}

static void make_again(size_t r)
{
    if (regions[r].kind != ALLOC)
        return;
    use(regions[r].device);
    MUST(cuMemFree_v2(regions[r].ptr));
    MUST(cuMemAlloc_v2(&regions[r].ptr, regions[r].bytes));
}

static void change(uint64_t round)
{
    if (round > 0 && !opt.keep)
        make_again(round % n_regions);
    for (size_t r = 0; r < n_regions; r++)
        fill(r, round);
    count(round);
    for (int s = 0; s < STREAMS; s++)
        MUST(cuStreamSynchronize(streams[s]));
    for (int s = 0; s < STREAMS; s++)
        MUST(cuEventQuery(events[s]));
}

/* ---- set-up ---- */

/* On each GPU in turn. */
static struct region *add(enum kind kind, size_t bytes)
{
    unsigned device = opt.gpus ? (unsigned)(n_regions % opt.gpus) : opt.device;
    if (n_regions == REGIONS_MAX)
        cr_die("too many allocations");
    use(device);
    regions[n_regions] = (struct region){.kind = kind, .device = device, .bytes = bytes};
    return &regions[n_regions++];
}

static CUdeviceptr map_at_new_address(CUmemGenericAllocationHandle handle, unsigned device, size_t size)
{
    CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, (int)device}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUdeviceptr ptr;
    MUST(cuMemAddressReserve(&ptr, size, 0, 0, 0));
    MUST(cuMemMap(ptr, size, 0, handle, 0));
    MUST(cuMemSetAccess(ptr, size, &access, 1));
    return ptr;
}

static void add_vmm(size_t size, unsigned handle_types, bool twice, bool keep_handle)
{
    struct region *r = add(VMM, size);
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .requestedHandleTypes = handle_types,
                                .location = {CU_MEM_LOCATION_TYPE_DEVICE, (int)r->device}};
    CUmemGenericAllocationHandle handle;
    MUST(cuMemCreate(&handle, size, &prop, 0));
    r->ptr = map_at_new_address(handle, r->device, size);
    if (twice)
        r->alias = map_at_new_address(handle, r->device, size);
    if (!keep_handle)
        MUST(cuMemRelease(handle));
}

static void allocate(void)
{
    double ratio = opt.allocs > 1 ? pow((double)opt.max / (double)opt.min, 1.0 / (opt.allocs - 1)) : 1;
    double size = (double)opt.min;
    for (unsigned i = 0; i < opt.allocs; i++, size *= ratio) {
        struct region *r = add(ALLOC, (size_t)(size + 0.5));
        MUST(cuMemAlloc_v2(&r->ptr, r->bytes));
    }
    size_t pitch;
    struct region *small = add(PITCH, 0);
    MUST(cuMemAllocPitch_v2(&small->ptr, &pitch, 100, 7, 4));
    small->bytes = pitch * 7;
    struct region *large = add(PITCH, 0);
    MUST(cuMemAllocPitch_v2(&large->ptr, &pitch, 5000, 500, 8));
    large->bytes = pitch * 500;

    for (unsigned i = 0; i < (opt.gpus ? opt.gpus : 1); i++) {
        add_vmm((size_t)2 << 20, 0, false, false);
        add_vmm((size_t)2 << 20, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, true, true);
    }

    struct region *pinned = add(PINNED, 300000);
    MUST(cuMemHostAlloc((void **)&pinned->host, pinned->bytes + 8, 0));

    for (unsigned i = 0; opt.host && i < 2; i++) {
        struct region *host = add(HOST, opt.host / 2);
        host->host = malloc(host->bytes + 8);
        if (!host->host)
            cr_die("no memory");
    }
}

static void make_streams(void)
{
    CUgraph captured;
    use(opt.device);
    for (int s = 0; s < STREAMS; s++) {
        MUST(cuStreamCreate(&streams[s], CU_STREAM_NON_BLOCKING));
        MUST(cuEventCreate(&events[s], 0));
    }
    MUST(cuStreamBeginCapture_v2(streams[0], CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    for (int i = 0; i < GRAPH_NODES; i++)
        launch(k_increment, counter, streams[0]);
    MUST(cuStreamEndCapture(streams[0], &captured));
    MUST(cuGraphInstantiateWithFlags(&graph, captured, 0));
}

static void open_gpus(void)
{
    cr_open((int)opt.device);
    for (unsigned i = 0; i < GPUS_MAX; i++) {
        CUdevice device;
        if (i != opt.device && i >= opt.gpus)
            continue;
        MUST(cuDeviceGet(&device, (int)i));
        MUST(cuDevicePrimaryCtxRetain(&contexts[i], device));
    }
    use(opt.device);
}

static void set_up(void)
{
    uint64_t zero = 0;
    size_t bytes;
    open_gpus();
    k_fill = cr_kernel("bn_fill");
    k_increment = cr_kernel("bn_increment");
    k_global_add = cr_kernel("bn_global_add");
    staging = malloc(PIECE);
    if (!staging)
        cr_die("out of memory");
    MUST(cuMemAlloc_v2(&counter, sizeof(zero)));
    MUST(cuMemcpyHtoD_v2(counter, &zero, sizeof(zero)));
    MUST(cuModuleGetGlobal_v2(&global, &bytes, cu.module, "bn_global"));
    MUST(cuMemcpyHtoD_v2(global, &zero, sizeof(zero)));
    make_streams();
    allocate();
}

/* ---- the tree ---- */

static void start_children(char **argv)
{
    for (unsigned i = 1; i <= opt.children; i++) {
        pid_t pid = fork();
        if (pid < 0)
            cr_die("fork: %s", strerror(errno));
        if (pid > 0)
            continue;
        char role[16], *args[32];
        int n = 0;
        snprintf(role, sizeof(role), "--role=%u", i);
        while (argv[n] && n < 30) {
            args[n] = argv[n];
            n++;
        }
        args[n++] = role;
        args[n] = NULL;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        execv("/proc/self/exe", args);
        _exit(127);
    }
}

static void check_children(int flags)
{
    int status;
    if (opt.role > 0 || opt.children == 0)
        return;
    pid_t pid = waitpid(-1, &status, flags);
    if (pid > 0)
        cr_die("child %d ended with status %#x", (int)pid, (unsigned)status);
}

static void on_usr1(int sig)
{
    (void)sig;
    asked = 1;
}

static size_t size_of(const char *text)
{
    static const char units[] = "KMG";
    char *end;
    size_t v = strtoull(text, &end, 10);
    const char *u = *end ? strchr(units, *end) : NULL;
    return u ? v << (10 * (u - units + 1)) : v;
}

static void parse(int argc, char **argv)
{
    static const struct option longs[] = {
        {"allocs", 1, NULL, 'a'},
        {"min", 1, NULL, 'm'},
        {"max", 1, NULL, 'M'},
        {"rounds", 1, NULL, 'r'},
        {"pause", 1, NULL, 'p'},
        {"children", 1, NULL, 'c'},
        {"role", 1, NULL, 'R'},
        {"device", 1, NULL, 'd'},
        {"root-without-cuda", 0, NULL, 'w'},
        {"gpus", 1, NULL, 'g'},
        {"spread", 1, NULL, 's'},
        {"keep", 0, NULL, 'k'},
        {"host", 1, NULL, 'h'},
        {0},
    };
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        switch (c) {
        case 'a': opt.allocs = (unsigned)atoi(optarg); break;
        case 'm': opt.min = size_of(optarg); break;
        case 'M': opt.max = size_of(optarg); break;
        case 'r': opt.rounds = strtoul(optarg, NULL, 10); break;
        case 'p': opt.pause_ms = strtoul(optarg, NULL, 10); break;
        case 'c': opt.children = (unsigned)atoi(optarg); break;
        case 'R': opt.role = (unsigned)atoi(optarg); break;
        case 'd': opt.device = (unsigned)atoi(optarg); break;
        case 'g': opt.gpus = (unsigned)atoi(optarg); break;
        case 's': opt.spread = (unsigned)atoi(optarg); break;
        case 'k': opt.keep = true; break;
        case 'h': opt.host = size_of(optarg); break;
        case 'w': opt.root_without_cuda = true; break;
        default: exit(2);
        }
    }
    if (opt.min == 0 || opt.max < opt.min)
        cr_die("--min and --max make no sense");
    if (opt.spread)
        opt.device = opt.role % opt.spread;
    if (opt.device >= GPUS_MAX || opt.gpus > GPUS_MAX)
        cr_die("at most %d GPUs", GPUS_MAX);
}

int main(int argc, char **argv)
{
    parse(argc, argv);
    setvbuf(stdout, NULL, _IOLBF, 0);
    sigaction(SIGUSR1, &(struct sigaction){.sa_handler = on_usr1}, NULL);
    if (opt.role == 0)
        start_children(argv);
    while (opt.role == 0 && opt.root_without_cuda && !asked)
        check_children(0);
    if (asked)
        return EXIT_ASKED;
    set_up();
    change(0);
    for (uint64_t round = 0;; round++) {
        verify(round);
        if (asked || (opt.rounds && round == opt.rounds))
            break;
        change(round + 1);
        printf("%u %d round %llu\n", opt.role, (int)getpid(), (unsigned long long)round + 1);
        check_children(WNOHANG);
        nanosleep(&(struct timespec){(time_t)(opt.pause_ms / 1000), (long)(opt.pause_ms % 1000) * 1000000},
                  NULL);
    }
    printf("%u %d end\n", opt.role, (int)getpid());
    return asked ? EXIT_ASKED : 0;
}
