/* What the gate costs: nanoseconds of the driver's cheapest gated call, direct and through the agent.
 *
 * Usage: bench-gate AGENT DRIVER [THREADS]      with BENNU_DRIVER=DRIVER in the environment (it is set if missing)
 * Prints the median of 21 runs of each, taken in turn, and the difference. Both libraries are in one process, so the driver's
 * own share is the same code on the same data. */
#include "agent/api/api_table.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define RUNS 21
#define CALLS 2000000

typedef CUresult (*get_current_fn)(CUcontext *);

struct job {
    get_current_fn call;
    CUresult (*set_current)(CUcontext);
    CUcontext ctx;
    double ns;
};

static double now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec * 1e9 + (double)ts.tv_nsec;
}

static void *run(void *arg)
{
    struct job *job = arg;
    CUcontext ctx;
    job->set_current(job->ctx);
    double start = now_ns();
    for (int i = 0; i < CALLS; i++)
        job->call(&ctx);
    job->ns = (now_ns() - start) / CALLS;
    return NULL;
}

/* The mean over `threads` threads at once. */
static double measure(struct job job, int threads)
{
    pthread_t ids[64];
    struct job jobs[64];
    double sum = 0;
    for (int i = 0; i < threads; i++) {
        jobs[i] = job;
        if (pthread_create(&ids[i], NULL, run, &jobs[i]) != 0)
            exit(1);
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        sum += jobs[i].ns;
    }
    return sum / threads;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void *open_library(const char *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "bench-gate: cannot open %s: %s\n", path, dlerror());
        exit(1);
    }
    return library;
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: bench-gate AGENT DRIVER [THREADS]\n");
        return 2;
    }
    int threads = argc > 3 ? atoi(argv[3]) : 1;
    threads = threads < 1 ? 1 : threads > 64 ? 64 : threads;
    setenv("BENNU_DRIVER", argv[2], 0);
    void *agent = open_library(argv[1]), *driver = open_library(argv[2]);
    CUcontext ctx;
    CUresult (*init)(unsigned) = (CUresult(*)(unsigned))dlsym(agent, "cuInit");
    bn_pfn_cuCtxCreate_v2 create = (bn_pfn_cuCtxCreate_v2)dlsym(agent, "cuCtxCreate_v2");
    if (init(0) != CUDA_SUCCESS || create(&ctx, 0, 0) != CUDA_SUCCESS) {
        fprintf(stderr, "bench-gate: no CUDA device\n");
        return 1;
    }
    struct job through = {(get_current_fn)dlsym(agent, "cuCtxGetCurrent"), NULL, ctx, 0};
    struct job direct = {(get_current_fn)dlsym(driver, "cuCtxGetCurrent"), NULL, ctx, 0};
    through.set_current = direct.set_current = (CUresult(*)(CUcontext))dlsym(driver, "cuCtxSetCurrent");
    double a[RUNS], b[RUNS];
    for (int i = 0; i < RUNS; i++) {
        a[i] = measure(through, threads);
        b[i] = measure(direct, threads);
    }
    qsort(a, RUNS, sizeof(a[0]), ascending);
    qsort(b, RUNS, sizeof(b[0]), ascending);
    printf("cuCtxGetCurrent, %d thread(s): direct %.2f ns, gated %.2f ns, the gate costs %.2f ns\n", threads,
           b[RUNS / 2], a[RUNS / 2], a[RUNS / 2] - b[RUNS / 2]);
    return 0;
}
