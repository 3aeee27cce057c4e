/* SPDX-License-Identifier: MIT */
/*
 * Works in steps, one after another without end, as training does: each rewrites some of its GPU memory and leaves the rest alone. It
 * knows nothing of checkpoints.
 *
 *     bench-step --commands FIFO [--kernels PTX] [--cold SIZE] [--hot SIZE] [--period MS]
 *
 * Prints "ready", and "step N TIME" after each (CLOCK_MONOTONIC, s), which has rewritten --hot bytes and taken --period at
 * the least. A line "check" in the FIFO compares every byte on the GPU: "checked N: BAD wrong words"; "quit" ends it.
 */
#include "driver.h"

#include <fcntl.h>
#include <getopt.h>
#include <unistd.h>

#define BLOCK ((uint64_t)1 << 30)
#define BLOCKS_MAX 256

static struct area {
    uint64_t bytes;
    CUdeviceptr at[BLOCKS_MAX];
} cold, hot;
static CUdeviceptr bad;
static CUfunction fill, check;

static void launch(CUfunction f, const struct area *a, uint64_t seed)
{
    for (uint64_t i = 0; i * BLOCK < a->bytes; i++) {
        uint64_t left = a->bytes - i * BLOCK, words = (left < BLOCK ? left : BLOCK) / 8, s = seed + i * BLOCK;
        uint64_t grid = (words + 255) / 256, at = a->at[i];
        void *params[] = {&at, &words, &s, &bad};
        MUST(cuLaunchKernel(f, grid < 2112 ? (unsigned)grid : 2112, 1, 1, 256, 1, 1, 0, NULL, params, NULL));
    }
}

static void allocate(struct area *a)
{
    for (uint64_t i = 0; i * BLOCK < a->bytes; i++) {
        uint64_t left = a->bytes - i * BLOCK;
        MUST(cuMemAlloc_v2(&a->at[i], left < BLOCK ? left : BLOCK));
    }
}

static uint64_t seed_of(uint64_t step)
{
    return (step + 1) * UINT64_C(0xd1342543de82ef95);
}

static void check_all(uint64_t step)
{
    static unsigned long long checks;
    uint64_t wrong = 0;
    MUST(cuMemsetD8_v2(bad, 0, 8));
    launch(check, &cold, seed_of(UINT64_MAX - 1));
    launch(check, &hot, seed_of(step));
    MUST(cuCtxSynchronize());
    MUST(cuMemcpyDtoH_v2(&wrong, bad, 8));
    printf("checked %llu: %llu wrong words\n", ++checks, (unsigned long long)wrong);
}

/* False: it is to end. */
static bool obey(int fifo, uint64_t step)
{
    char text[64];
    ssize_t n = read(fifo, text, sizeof(text) - 1);
    if (n <= 0)
        return true;
    text[n] = 0;
    if (strstr(text, "check"))
        check_all(step);
    return !strstr(text, "quit");
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {{"kernels", 1, NULL, 'k'}, {"commands", 1, NULL, 'c'},
                                          {"cold", 1, NULL, 'C'},    {"hot", 1, NULL, 'h'},
                                          {"period", 1, NULL, 'p'},  {0}};
    const char *kernels = "sim/kernels.ptx", *commands = NULL;
    double period = 0;
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        switch (c) {
        case 'k': kernels = optarg; break;
        case 'c': commands = optarg; break;
        case 'C': cold.bytes = parse_size(optarg); break;
        case 'h': hot.bytes = parse_size(optarg); break;
        case 'p': period = atof(optarg) / 1000; break;
        default: return 2;
        }
    }
    int fifo = commands ? open(commands, O_RDWR | O_NONBLOCK | O_CLOEXEC) : -1;
    if (fifo < 0 || hot.bytes == 0 || cold.bytes > BLOCK * BLOCKS_MAX || hot.bytes > BLOCK * BLOCKS_MAX) {
        fprintf(
            stderr,
            "usage: bench-step --commands FIFO [--kernels PTX] [--cold SIZE] [--hot SIZE] [--period MS]\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    driver_open();
    driver_context();
    CUmodule module = driver_module(kernels);
    MUST(cuModuleGetFunction(&fill, module, "bn_fill"));
    MUST(cuModuleGetFunction(&check, module, "bn_check"));
    MUST(cuMemAlloc_v2(&bad, 8));
    allocate(&cold);
    allocate(&hot);
    launch(fill, &cold, seed_of(UINT64_MAX - 1));
    MUST(cuCtxSynchronize());
    printf("ready\n");
    uint64_t step = 0;
    do {
        double began = seconds();
        launch(fill, &hot, seed_of(++step));
        MUST(cuCtxSynchronize());
        double left = began + period - seconds();
        if (left > 0)
            nanosleep(&(struct timespec){(time_t)left, (long)((left - (double)(time_t)left) * 1e9)}, NULL);
        printf("step %llu %.6f\n", (unsigned long long)step, seconds());
    } while (obey(fifo, step));
    return 0;
}
