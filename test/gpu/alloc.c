/* SPDX-License-Identifier: MIT */
/*
 * A CUDA program that keeps many allocations of all kinds and sizes and knows what every byte of them must be.
 *
 * Allocations: from 4 bytes up in a geometric row, and one of --largest bytes; by turns cuMemAlloc, cuMemAllocPitch and the
 * program's own virtual memory (one handle, two handles side by side, or one handle half of which is mapped twice over); besides,
 * a stream-ordered and a pinned host one, a module's global and a counter. Each step, on several streams ordered by events:
 * - checks every byte of every allocation against a function of (allocation, step), then writes that of the next step;
 * - launches a captured graph twice, which turns the words of some allocations over and back, and checks them in between;
 * - adds to the global and to the counter, and compares both;
 * - frees and makes anew one of the smaller allocations.
 * It prints "step N" after each, and on SIGUSR1 ends after the step under way. A wrong byte ends it with status 1.
 */
#include "driver.h"

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define STREAMS 4
#define MAX_ALLOCS 4096
#define PITCH_WIDTH 1000 /* not a multiple of any pitch */
#define CHURN_MAX ((size_t)64 << 20)
#define POOL_BYTES ((size_t)4 << 20)
#define PINNED_BYTES ((size_t)1 << 20)
#define GRAPH_ALLOCS 8
#define FLIP 0x5a5a5a5a5a5a5a5aull

enum kind { PLAIN, PITCHED, VMM_ONE, VMM_TWO, POOL };
static const char *const kind_names[] = {"cuMemAlloc", "cuMemAllocPitch", "VMM", "VMM of two handles",
                                         "cuMemAllocAsync"};

struct alloc {
    enum kind kind;
    CUdeviceptr ptr;
    size_t bytes;  /* all are ours to write */
    size_t wanted; /* what was asked for */
    CUmemGenericAllocationHandle handle[2];
};

static struct alloc allocs[MAX_ALLOCS];
static size_t n_allocs;
static CUstream streams[STREAMS];
static CUevent events[STREAMS], began, ended;
static CUfunction fill, check, flip, increment, global_add;
static CUdeviceptr bad_counts, counter, global;
static uint64_t *pinned;
static CUgraphExec graph;
static size_t graph_allocs[GRAPH_ALLOCS], n_graph_allocs;
static CUdevice device;
static unsigned grid = 1056;
static size_t granularity;
static volatile sig_atomic_t stop;
static bool fork_graph = true; /* the simulated driver captures one stream alone */

static void must_(CUresult result, const char *what)
{
    if (result == CUDA_SUCCESS)
        return;
    fprintf(stderr, "alloc: %s: CUDA error %d\n", what, (int)result);
    exit(1);
}
#define MUST(call) must_(call, #call)

static void on_signal(int sig)
{
    (void)sig;
    stop = 1;
}

static uint64_t seed_of(size_t alloc, uint64_t step)
{
    return (alloc + 1) * 0x9e3779b97f4a7c15ull + step * 0xd1342543de82ef95ull;
}

static uint8_t tail_of(size_t alloc, uint64_t step)
{
    return (uint8_t)(alloc * 7 + step * 13 + 1);
}

static void launch(CUfunction f, CUstream stream, uint64_t words, void **params)
{
    uint64_t blocks = (words + 255) / 256;
    unsigned g = blocks < grid ? (unsigned)(blocks ? blocks : 1) : grid;
    MUST(cuLaunchKernel(f, g, 1, 1, 256, 1, 1, 0, stream, params, NULL));
}

/* ---- the allocations ---- */

static CUmemAllocationProp vmm_prop(void)
{
    return (CUmemAllocationProp){.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                 .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device}};
}

static void make_vmm(struct alloc *a)
{
    CUmemAllocationProp prop = vmm_prop();
    CUmemAccessDesc access = {.location = prop.location, .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    size_t unit = a->kind == VMM_TWO ? 2 * granularity : granularity;
    size_t parts = a->kind == VMM_TWO ? 2 : 1;
    a->bytes = (a->wanted + unit - 1) / unit * unit;
    MUST(cuMemAddressReserve(&a->ptr, a->bytes, 0, 0, 0));
    for (size_t i = 0; i < parts; i++) {
        size_t part = a->bytes / parts;
        MUST(cuMemCreate(&a->handle[i], part, &prop, 0));
        MUST(cuMemMap(a->ptr + i * part, part, 0, a->handle[i], 0));
    }
    MUST(cuMemSetAccess(a->ptr, a->bytes, &access, 1));
    /* Two ways that programs have: some keep the handle, some release it while it is mapped. */
    if (a->kind == VMM_ONE) {
        MUST(cuMemRelease(a->handle[0]));
        a->handle[0] = 0;
    }
}

static void make(struct alloc *a)
{
    size_t pitch;
    switch (a->kind) {
    case PLAIN:
        a->bytes = a->wanted;
        MUST(cuMemAlloc_v2(&a->ptr, a->bytes));
        break;
    case PITCHED: {
        size_t rows = (a->wanted + PITCH_WIDTH - 1) / PITCH_WIDTH;
        MUST(cuMemAllocPitch_v2(&a->ptr, &pitch, PITCH_WIDTH, rows, 4));
        a->bytes = pitch * rows;
        break;
    }
    case VMM_ONE:
    case VMM_TWO: make_vmm(a); break;
    case POOL:
        a->bytes = a->wanted;
        MUST(cuMemAllocAsync(&a->ptr, a->bytes, streams[0]));
        MUST(cuStreamSynchronize(streams[0]));
        break;
    }
}

static void unmake(struct alloc *a)
{
    size_t parts = a->kind == VMM_TWO ? 2 : 1;
    switch (a->kind) {
    case PLAIN:
    case PITCHED: MUST(cuMemFree_v2(a->ptr)); break;
    case POOL: MUST(cuMemFreeAsync(a->ptr, streams[0])); break;
    case VMM_ONE:
    case VMM_TWO:
        for (size_t i = 0; i < parts; i++) {
            MUST(cuMemUnmap(a->ptr + i * (a->bytes / parts), a->bytes / parts));
            if (a->handle[i])
                MUST(cuMemRelease(a->handle[i]));
        }
        MUST(cuMemAddressFree(a->ptr, a->bytes));
        break;
    }
}

static void plan(size_t count, size_t row_end, size_t largest, bool pool)
{
    double size = 4, factor = 1;
    /* The count-1'th root of row_end / 4, by bisection: no libm. */
    for (double low = 1, high = 4; high - low > 1e-12;) {
        double p = 1;
        factor = (low + high) / 2;
        for (size_t i = 0; i + 2 < count; i++)
            p *= factor;
        if (p * 4 > (double)row_end)
            high = factor;
        else
            low = factor;
    }
    for (size_t i = 0; i + 1 < count; i++, size *= factor) {
        struct alloc *a = &allocs[n_allocs++];
        static const enum kind turns[] = {PLAIN, PLAIN, PITCHED, VMM_ONE, PLAIN, VMM_TWO};
        a->wanted = i == 0 ? 4 : (size_t)size;
        a->kind = turns[i % 6];
        if (a->wanted < granularity / 2 && a->kind >= VMM_ONE)
            a->kind = PLAIN; /* rounded up they would all be of one size */
        if (a->wanted < PITCH_WIDTH && a->kind == PITCHED)
            a->kind = PLAIN;
    }
    allocs[n_allocs++] = (struct alloc){.kind = PLAIN, .wanted = largest};
    if (pool)
        allocs[n_allocs++] = (struct alloc){.kind = POOL, .wanted = POOL_BYTES};
}

/* ---- a step ---- */

static void fill_alloc(size_t i, uint64_t step)
{
    struct alloc *a = &allocs[i];
    CUstream s = streams[i % STREAMS];
    uint64_t words = a->bytes / 8, seed = seed_of(i, step);
    if (words)
        launch(fill, s, words, (void *[]){&a->ptr, &words, &seed});
    if (a->bytes % 8)
        MUST(cuMemsetD8Async(a->ptr + words * 8, tail_of(i, step), a->bytes % 8, s));
}

static void check_alloc(size_t i, uint64_t step)
{
    struct alloc *a = &allocs[i];
    uint64_t words = a->bytes / 8, seed = seed_of(i, step);
    CUdeviceptr bad = bad_counts + i * 8;
    if (words)
        launch(check, streams[i % STREAMS], words, (void *[]){&a->ptr, &words, &seed, &bad});
}

static void check_tail(size_t i, uint64_t step)
{
    struct alloc *a = &allocs[i];
    uint8_t got[8], n = a->bytes % 8;
    if (n == 0)
        return;
    MUST(cuMemcpyDtoH_v2(got, a->ptr + a->bytes - n, n));
    for (unsigned b = 0; b < n; b++) {
        if (got[b] == tail_of(i, step))
            continue;
        fprintf(stderr, "alloc: step %llu: allocation %zu (%s, %zu bytes): tail byte %u is %02x, not %02x\n",
                (unsigned long long)step, i, kind_names[a->kind], a->bytes, b, got[b], tail_of(i, step));
        exit(1);
    }
}

/* Every stream waits for all. */
static void join_streams(void)
{
    for (int s = 0; s < STREAMS; s++)
        MUST(cuEventRecord(events[s], streams[s]));
    for (int s = 0; s < STREAMS; s++)
        for (int e = 0; e < STREAMS; e++)
            if (e != s)
                MUST(cuStreamWaitEvent(streams[s], events[e], 0));
}

/* Compares the counts of bad words with what they must be, and clears them. `flipped`: those of the graph are all wrong. */
static void expect_bad(uint64_t step, bool flipped)
{
    static uint64_t counts[MAX_ALLOCS];
    bool wrong = false;
    MUST(cuCtxSynchronize());
    MUST(cuMemcpyDtoH_v2(counts, bad_counts, n_allocs * 8));
    for (size_t i = 0; i < n_allocs; i++) {
        uint64_t want = 0;
        for (size_t g = 0; flipped && g < n_graph_allocs; g++)
            if (graph_allocs[g] == i)
                want = allocs[i].bytes / 8;
        if (counts[i] == want)
            continue;
        fprintf(
            stderr,
            "alloc: step %llu: allocation %zu (%s, %zu bytes at %llx): %llu words are wrong, expected %llu\n",
            (unsigned long long)step, i, kind_names[allocs[i].kind], allocs[i].bytes, allocs[i].ptr,
            (unsigned long long)counts[i], (unsigned long long)want);
        wrong = true;
    }
    if (wrong)
        exit(1);
    MUST(cuMemsetD8_v2(bad_counts, 0, n_allocs * 8));
    MUST(cuCtxSynchronize());
}

static void turn_over(uint64_t step)
{
    for (int twice = 0; twice < 2; twice++) {
        MUST(cuGraphLaunch(graph, streams[0]));
        join_streams();
        for (size_t g = 0; g < n_graph_allocs; g++)
            check_alloc(graph_allocs[g], step);
        expect_bad(step, twice == 0);
        join_streams();
    }
}

static void check_word(const char *what, uint64_t step, CUdeviceptr at, uint64_t want)
{
    uint64_t got;
    MUST(cuMemcpyDtoH_v2(&got, at, 8));
    if (got == want)
        return;
    fprintf(stderr, "alloc: step %llu: the %s is %llu, not %llu\n", (unsigned long long)step, what,
            (unsigned long long)got, (unsigned long long)want);
    exit(1);
}

static void check_pinned(uint64_t step)
{
    for (size_t w = 0; w < PINNED_BYTES / 8; w++) {
        if (pinned[w] == seed_of(w, step))
            continue;
        fprintf(stderr, "alloc: step %llu: word %zu of the pinned memory is wrong\n",
                (unsigned long long)step, w);
        exit(1);
    }
    for (size_t w = 0; w < PINNED_BYTES / 8; w++)
        pinned[w] = seed_of(w, step + 1);
}

static bool in_graph(size_t i)
{
    for (size_t g = 0; g < n_graph_allocs; g++)
        if (graph_allocs[g] == i)
            return true;
    return false;
}

static void churn(uint64_t step)
{
    size_t i = step % n_allocs;
    struct alloc *a = &allocs[i];
    if (a->bytes > CHURN_MAX || in_graph(i))
        return;
    MUST(cuCtxSynchronize());
    unmake(a);
    make(a);
    fill_alloc(i, step + 1);
}

static void do_step(uint64_t step)
{
    float ms;
    MUST(cuEventRecord(began, streams[0]));
    for (size_t i = 0; i < n_allocs; i++)
        check_alloc(i, step);
    for (size_t i = 0; i < n_allocs; i++)
        check_tail(i, step);
    expect_bad(step, false);
    turn_over(step);
    check_pinned(step);
    check_word("module's global", step, global, step * 3);
    check_word("counter", step, counter, step);
    uint64_t three = 3;
    launch(global_add, streams[1], 1, (void *[]){&three});
    launch(increment, streams[2], 1, (void *[]){&counter});
    for (size_t i = 0; i < n_allocs; i++)
        fill_alloc(i, step + 1);
    join_streams();
    MUST(cuEventRecord(ended, streams[0]));
    MUST(cuEventSynchronize(ended));
    MUST(cuEventElapsedTime(&ms, began, ended));
    churn(step);
    MUST(cuCtxSynchronize());
    printf("step %llu\n", (unsigned long long)step);
    fflush(stdout);
}

/* ---- beginning ---- */

/* A graph that forks to a second stream and joins again. */
static void capture(void)
{
    CUgraph g;
    CUevent fork, join;
    MUST(cuEventCreate(&fork, CU_EVENT_DISABLE_TIMING));
    MUST(cuEventCreate(&join, CU_EVENT_DISABLE_TIMING));
    for (size_t i = 3; i < n_allocs && n_graph_allocs < GRAPH_ALLOCS; i += n_allocs / GRAPH_ALLOCS)
        if (allocs[i].bytes >= 8 && allocs[i].bytes <= CHURN_MAX)
            graph_allocs[n_graph_allocs++] = i;
    MUST(cuStreamBeginCapture_v2(streams[0], CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    if (fork_graph) {
        MUST(cuEventRecord(fork, streams[0]));
        MUST(cuStreamWaitEvent(streams[1], fork, 0));
    }
    for (size_t i = 0; i < n_graph_allocs; i++) {
        struct alloc *a = &allocs[graph_allocs[i]];
        uint64_t words = a->bytes / 8, v = FLIP;
        launch(flip, streams[fork_graph ? i % 2 : 0], words, (void *[]){&a->ptr, &words, &v});
    }
    if (fork_graph) {
        MUST(cuEventRecord(join, streams[1]));
        MUST(cuStreamWaitEvent(streams[0], join, 0));
    }
    MUST(cuStreamEndCapture(streams[0], &g));
    MUST(cuGraphInstantiateWithFlags(&graph, g, 0));
    MUST(cuGraphDestroy(g));
}

static void open_gpu(const char *ptx)
{
    CUcontext ctx;
    CUmodule module;
    size_t size;
    driver_open();
    MUST(cuInit(0));
    MUST(cuDeviceGet(&device, 0));
    MUST(cuDevicePrimaryCtxRetain(&ctx, device));
    MUST(cuCtxSetCurrent(ctx));
    MUST(cuModuleLoadData(&module, driver_read_text(ptx)));
    MUST(cuModuleGetFunction(&fill, module, "bn_fill"));
    MUST(cuModuleGetFunction(&check, module, "bn_check"));
    MUST(cuModuleGetFunction(&flip, module, "bn_xor"));
    MUST(cuModuleGetFunction(&increment, module, "bn_increment"));
    MUST(cuModuleGetFunction(&global_add, module, "bn_global_add"));
    MUST(cuModuleGetGlobal_v2(&global, &size, module, "bn_global"));
    for (int s = 0; s < STREAMS; s++) {
        MUST(cuStreamCreate(&streams[s], s % 2 ? CU_STREAM_NON_BLOCKING : CU_STREAM_DEFAULT));
        MUST(cuEventCreate(&events[s], CU_EVENT_DISABLE_TIMING));
    }
    MUST(cuEventCreate(&began, CU_EVENT_DEFAULT));
    MUST(cuEventCreate(&ended, CU_EVENT_DEFAULT));
    CUmemAllocationProp prop = vmm_prop();
    MUST(cuMemGetAllocationGranularity(&granularity, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
}

static size_t parse_size(const char *s)
{
    char *end;
    size_t v = strtoull(s, &end, 10);
    switch (*end) {
    case 'K': return v << 10;
    case 'M': return v << 20;
    case 'G': return v << 30;
    default: return v;
    }
}

static void allocate_all(void)
{
    MUST(cuMemAlloc_v2(&bad_counts, MAX_ALLOCS * 8));
    MUST(cuMemsetD8_v2(bad_counts, 0, MAX_ALLOCS * 8));
    MUST(cuMemAlloc_v2(&counter, 8));
    MUST(cuMemsetD8_v2(counter, 0, 8));
    MUST(cuMemHostAlloc((void **)&pinned, PINNED_BYTES, 0));
    for (size_t w = 0; w < PINNED_BYTES / 8; w++)
        pinned[w] = seed_of(w, 0);
    size_t total = 0;
    for (size_t i = 0; i < n_allocs; i++) {
        make(&allocs[i]);
        fill_alloc(i, 0);
        total += allocs[i].bytes;
    }
    MUST(cuCtxSynchronize());
    printf("allocations %zu bytes %zu\n", n_allocs, total);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {{"kernels", required_argument, NULL, 'k'},
                                          {"count", required_argument, NULL, 'n'},
                                          {"row", required_argument, NULL, 'r'},
                                          {"largest", required_argument, NULL, 'l'},
                                          {"steps", required_argument, NULL, 's'},
                                          {"pause-ms", required_argument, NULL, 'p'},
                                          {"no-pool", no_argument, NULL, 'P'},
                                          {"no-fork", no_argument, NULL, 'F'},
                                          {0}};
    const char *ptx = "sim/kernels.ptx";
    size_t count = 100, row = (size_t)512 << 20, largest = (size_t)8 << 30;
    unsigned long long steps = 0;
    long pause_ms = 0;
    bool pool = true;
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        switch (c) {
        case 'k': ptx = optarg; break;
        case 'n': count = strtoul(optarg, NULL, 10); break;
        case 'r': row = parse_size(optarg); break;
        case 'l': largest = parse_size(optarg); break;
        case 's': steps = strtoull(optarg, NULL, 10); break;
        case 'p': pause_ms = strtol(optarg, NULL, 10); break;
        case 'P': pool = false; break;
        case 'F': fork_graph = false; break;
        default: return 2;
        }
    }
    if (count < 16 || count > MAX_ALLOCS - 1 || row < 4096) {
        fprintf(stderr, "usage: alloc [--kernels PTX] [--count N] [--row SIZE] [--largest SIZE] [--steps N] "
                        "[--pause-ms N] [--no-pool] [--no-fork]\n");
        return 2;
    }
    sigaction(SIGUSR1, &(struct sigaction){.sa_handler = on_signal}, NULL);
    open_gpu(ptx);
    plan(count, row, largest, pool);
    allocate_all();
    capture();
    uint64_t step = 0;
    for (; !stop && (steps == 0 || step < steps); step++) {
        do_step(step);
        if (pause_ms)
            nanosleep(&(struct timespec){pause_ms / 1000, pause_ms % 1000 * 1000000}, NULL);
    }
    for (size_t i = 0; i < n_allocs; i++)
        unmake(&allocs[i]);
    MUST(cuCtxSynchronize());
    printf("done %llu\n", (unsigned long long)step);
    return 0;
}
