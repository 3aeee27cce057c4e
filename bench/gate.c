/* What the gate costs: nanoseconds that the agent adds to a call of the driver.
 *
 * Usage: bench-gate [--threads N] [--kernels PTX] AGENT DRIVER
 *
 * Both libraries are in one process, so the driver's own share is the same code on the same data. Each line is of many pairs of
 * runs, direct and through the agent by turns, and says the medians of both and the median and quartiles of the differences.
 *
 * cuCtxGetCurrent   the driver's cheapest gated call, again and again: all that it touches is in the first cache
 * displaced         the same, but between two calls the first cache, much of the second, and the processor's first table of
 *                   pages are filled with other data and code, as a call that works for microseconds does; each is timed alone
 * cuMemAlloc …      an allocation and its free, of several sizes: not the gate's cost, but that of memory that can be taken away
 * cuLaunchKernel    (--kernels) launches of a kernel that does nothing much, 400 at a time, so that no queue is ever full
 */
#include "agent/api/api_table.h"

#include <dlfcn.h>
#include <getopt.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define HOT_RUNS 21
#define HOT_CALLS 2000000
#define COLD_RUNS 101
#define COLD_CALLS 200
#define COLD_BYTES (384u << 10) /* a second cache has 512 KiB and more, and is to keep some */
#define COLD_CODE (48u << 10)
#define ALLOC_RUNS 51
#define LAUNCH_RUNS 301
#define LAUNCHES 400
#define RUNS_MAX 301

static bn_pfn_cuCtxSetCurrent set_current;
static bn_pfn_cuCtxSynchronize synchronize;
static CUcontext ctx;
static CUfunction function;
static CUdeviceptr counter;

struct side {
    bn_pfn_cuCtxGetCurrent get_current;
    bn_pfn_cuLaunchKernel launch;
    bn_pfn_cuMemAlloc_v2 allocate;
    bn_pfn_cuMemFree_v2 release;
};

static double now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec * 1e9 + (double)ts.tv_nsec;
}

static _Noreturn void give_up(const char *what, const char *why)
{
    fprintf(stderr, "bench-gate: %s: %s\n", what, why);
    exit(1);
}

/* ---- ways to call: nanoseconds a call --------------------------------------------------------------- */

static int threads = 1;

struct job {
    const struct side *side;
    double ns;
};

static void *hot_main(void *arg)
{
    struct job *job = arg;
    bn_pfn_cuCtxGetCurrent call = job->side->get_current;
    CUcontext unused;
    set_current(ctx);
    double start = now_ns();
    for (int i = 0; i < HOT_CALLS; i++)
        call(&unused);
    job->ns = (now_ns() - start) / HOT_CALLS;
    return NULL;
}

/* The mean over all threads. */
static double hot(const struct side *side)
{
    pthread_t ids[64];
    struct job jobs[64];
    double sum = 0;
    for (int i = 0; i < threads; i++) {
        jobs[i] = (struct job){side, 0};
        if (pthread_create(&ids[i], NULL, hot_main, &jobs[i]) != 0)
            give_up("pthread_create", "no thread");
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        sum += jobs[i].ns;
    }
    return sum / threads;
}

#if defined(__x86_64__)
static const unsigned char return_code[] = {0xc3};
#elif defined(__aarch64__)
static const unsigned char return_code[] = {0xc0, 0x03, 0x5f, 0xd6};
#else
static const unsigned char return_code[] = {0};
#endif

static char *other_data, *other_code;

static void displace_prepare(void)
{
    other_data = mmap(NULL, COLD_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    other_code = mmap(NULL, COLD_CODE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (other_data == MAP_FAILED || other_code == MAP_FAILED)
        give_up("mmap", "no memory");
    memset(other_data, 1, COLD_BYTES);
    for (size_t at = 0; at < COLD_CODE; at += 64)
        memcpy(other_code + at, return_code, sizeof(return_code));
    __builtin___clear_cache(other_code, other_code + COLD_CODE);
    if (return_code[0] == 0 || mprotect(other_code, COLD_CODE, PROT_READ | PROT_EXEC) < 0)
        other_code = NULL;
}

static void displace(void)
{
    for (size_t at = 0; at < COLD_BYTES; at += 64)
        ((volatile char *)other_data)[at]++;
    for (size_t at = 0; other_code && at < COLD_CODE; at += 64) {
        void (*code)(void);
        char *address = other_code + at;
        memcpy(&code, &address, sizeof(code));
        code();
    }
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* The mean of all but the slowest tenth: free of interrupts, and finer than a clock with steps of 10 ns. */
static double displaced(const struct side *side)
{
    double taken[COLD_CALLS], sum = 0;
    CUcontext unused;
    for (int i = 0; i < COLD_CALLS; i++) {
        displace();
        double start = now_ns();
        side->get_current(&unused);
        taken[i] = now_ns() - start;
    }
    qsort(taken, COLD_CALLS, sizeof(taken[0]), ascending);
    for (int i = 0; i < COLD_CALLS * 9 / 10; i++)
        sum += taken[i];
    return sum / (COLD_CALLS * 9 / 10);
}

static size_t alloc_bytes;

static double allocation(const struct side *side)
{
    CUdeviceptr p;
    double start = now_ns();
    if (side->allocate(&p, alloc_bytes) != CUDA_SUCCESS || side->release(p) != CUDA_SUCCESS)
        give_up("cuMemAlloc", "failed");
    return now_ns() - start;
}

static double launches(const struct side *side)
{
    void *params[] = {&counter};
    double start = now_ns();
    for (int i = 0; i < LAUNCHES; i++)
        if (side->launch(function, 1, 1, 1, 1, 1, 1, 0, NULL, params, NULL) != CUDA_SUCCESS)
            give_up("cuLaunchKernel", "failed");
    double taken = now_ns() - start;
    if (synchronize() != CUDA_SUCCESS)
        give_up("cuCtxSynchronize", "failed");
    return taken / LAUNCHES;
}

/* ---- by turns --------------------------------------------------------------------------------------- */

static void compare(const char *what, double (*run)(const struct side *), int runs, const struct side *direct,
                    const struct side *gated)
{
    double a[RUNS_MAX], b[RUNS_MAX], more[RUNS_MAX];
    run(direct);
    run(gated);
    for (int i = 0; i < runs; i++) {
        if (i % 2)
            a[i] = run(direct);
        b[i] = run(gated);
        if (i % 2 == 0)
            a[i] = run(direct);
        more[i] = b[i] - a[i];
    }
    qsort(a, (size_t)runs, sizeof(a[0]), ascending);
    qsort(b, (size_t)runs, sizeof(b[0]), ascending);
    qsort(more, (size_t)runs, sizeof(more[0]), ascending);
    printf("%s: direct %.2f ns, gated %.2f ns, the %s costs %.2f ns (quartiles of %d pairs %.2f and %.2f)\n",
           what, a[runs / 2], b[runs / 2], run == allocation ? "agent" : "gate", more[runs / 2], runs,
           more[runs / 4], more[runs * 3 / 4]);
}

static void *open_library(const char *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        give_up(path, dlerror());
    return library;
}

static struct side side_of(void *library)
{
    return (struct side){(bn_pfn_cuCtxGetCurrent)dlsym(library, "cuCtxGetCurrent"),
                         (bn_pfn_cuLaunchKernel)dlsym(library, "cuLaunchKernel"),
                         (bn_pfn_cuMemAlloc_v2)dlsym(library, "cuMemAlloc_v2"),
                         (bn_pfn_cuMemFree_v2)dlsym(library, "cuMemFree_v2")};
}

static void load_kernel(void *agent, const struct side *gated, const char *path)
{
    static char text[1 << 20];
    CUmodule module;
    FILE *f = fopen(path, "re");
    if (!f || fread(text, 1, sizeof(text) - 1, f) == 0)
        give_up(path, "cannot be read");
    fclose(f);
    bn_pfn_cuModuleLoadData load = (bn_pfn_cuModuleLoadData)dlsym(agent, "cuModuleLoadData");
    bn_pfn_cuModuleGetFunction get = (bn_pfn_cuModuleGetFunction)dlsym(agent, "cuModuleGetFunction");
    if (load(&module, text) != CUDA_SUCCESS || get(&function, module, "bn_increment") != CUDA_SUCCESS ||
        gated->allocate(&counter, 8) != CUDA_SUCCESS)
        give_up(path, "cannot be loaded");
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {
        {"threads", required_argument, NULL, 't'}, {"kernels", required_argument, NULL, 'k'}, {0}};
    const char *kernels = NULL;
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        switch (c) {
        case 't': threads = atoi(optarg); break;
        case 'k': kernels = optarg; break;
        default: argc = 0;
        }
    }
    if (argc - optind != 2) {
        fprintf(stderr, "usage: bench-gate [--threads N] [--kernels PTX] AGENT DRIVER\n");
        return 2;
    }
    threads = threads < 1 ? 1 : threads > 64 ? 64 : threads;
    setenv("BENNU_DRIVER", argv[optind + 1], 0);
    void *agent = open_library(argv[optind]), *driver = open_library(argv[optind + 1]);
    struct side direct = side_of(driver), gated = side_of(agent);
    bn_pfn_cuInit init = (bn_pfn_cuInit)dlsym(agent, "cuInit");
    bn_pfn_cuCtxCreate_v2 create = (bn_pfn_cuCtxCreate_v2)dlsym(agent, "cuCtxCreate_v2");
    set_current = (bn_pfn_cuCtxSetCurrent)dlsym(driver, "cuCtxSetCurrent");
    synchronize = (bn_pfn_cuCtxSynchronize)dlsym(driver, "cuCtxSynchronize");
    if (init(0) != CUDA_SUCCESS || create(&ctx, 0, 0) != CUDA_SUCCESS)
        give_up("cuInit", "no CUDA device");
    char what[64];
    snprintf(what, sizeof(what), "cuCtxGetCurrent, %d thread(s)", threads);
    compare(what, hot, HOT_RUNS, &direct, &gated);
    displace_prepare();
    compare("cuCtxGetCurrent, displaced", displaced, COLD_RUNS, &direct, &gated);
    static const unsigned mib[] = {2, 20, 64, 160, 252};
    for (size_t i = 0; i < sizeof(mib) / sizeof(mib[0]); i++) {
        snprintf(what, sizeof(what), "cuMemAlloc and cuMemFree of %u MiB", mib[i]);
        alloc_bytes = (size_t)mib[i] << 20;
        compare(what, allocation, ALLOC_RUNS, &direct, &gated);
    }
    if (kernels) {
        load_kernel(agent, &gated, kernels);
        compare("cuLaunchKernel", launches, LAUNCH_RUNS, &direct, &gated);
    }
    return 0;
}
