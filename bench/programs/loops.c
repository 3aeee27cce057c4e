/* SPDX-License-Identifier: MIT */
/*
 * Loops on the GPU through the driver API, timed: what the agent's presence costs a program.
 *
 *     bench-loops --commands FIFO [--kernels PTX] [--scale N]
 *
 * Prints "ready", then obeys lines of the FIFO: the name of a loop runs it once and prints "NAME SECONDS"; "quit" ends it. --scale
 * divides the work of each (for the simulated driver).
 *
 * launches     10,000 launches of a kernel of one thread, and a wait for all
 * allocations  300 allocations and frees of 64 KiB to 256 MiB, 12 of them alive at a time
 * small        20,000 allocations and frees of 256 bytes to 4 MiB, 256 of them alive at a time: many share memory
 * segments     48 allocations and frees of 2 to 252 MiB: all that PyTorch's allocator asks of the driver for the loop `allocations` of
 *              loops.py, where it keeps what it frees and gives it back in bursts
 * memory       copies of 1 GiB within the GPU
 */
#include "driver.h"

#include <getopt.h>

#define ALIVE 12
#define SMALL_ALIVE 256

static unsigned scale = 1;
static CUfunction increment;
static CUdeviceptr counter, from, to;
static size_t copy_bytes;

static void launches(void)
{
    void *params[] = {&counter};
    for (unsigned i = 0; i < 10000 / scale; i++)
        MUST(cuLaunchKernel(increment, 1, 1, 1, 1, 1, 1, 0, NULL, params, NULL));
    MUST(cuCtxSynchronize());
}

static void allocations(void)
{
    CUdeviceptr alive[ALIVE] = {0};
    uint64_t random = 12345;
    for (unsigned i = 0; i < 300 / scale; i++) {
        random = random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        if (alive[i % ALIVE])
            MUST(cuMemFree_v2(alive[i % ALIVE]));
        size_t bytes = (size_t)(UINT64_C(1) << (16 + (random >> 33) % 13)) / scale;
        MUST(cuMemAlloc_v2(&alive[i % ALIVE], bytes));
    }
    for (unsigned i = 0; i < ALIVE; i++)
        if (alive[i])
            MUST(cuMemFree_v2(alive[i]));
}

static void small(void)
{
    static CUdeviceptr alive[SMALL_ALIVE];
    uint64_t random = 54321;
    for (unsigned i = 0; i < 20000 / scale; i++) {
        random = random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        CUdeviceptr *a = &alive[(random >> 40) % SMALL_ALIVE];
        if (*a)
            MUST(cuMemFree_v2(*a));
        MUST(cuMemAlloc_v2(a, (size_t)(UINT64_C(1) << (8 + (random >> 33) % 15))));
    }
    for (unsigned i = 0; i < SMALL_ALIVE; i++) {
        if (alive[i])
            MUST(cuMemFree_v2(alive[i]));
        alive[i] = 0;
    }
}

/* Allocations (MiB), numbered from 1 as they come, and frees of those numbers (negative). */
static const short segment_steps[] = {
    2,   20,  34,  244, 34,  50,  2,   20,  48,  58,  58,  168, 78,  106, 230, 226, 252, -2,  -4,  -5,
    -7,  -8,  -9,  -10, -16, 2,   104, -11, -13, -18, 72,  2,   -15, -17, 114, 184, 230, -14, -19, -21,
    -22, 154, 2,   -12, -23, -24, 138, 194, 2,   154, -3,  -20, -25, -29, -30, 176, 186, 122, 132, -27,
    -28, -32, 172, 170, 244, 218, 138, 248, -26, -33, -36, -38, -39, 2,   2,   198, -31, -37, 138, 200,
    236, 220, 248, -1,  -40, -45, -46, -47, -6,  -34, -35, -41, -42, -43, -44, -48};

static void segments(void)
{
    CUdeviceptr made[49];
    unsigned count = 0;
    for (size_t i = 0; i < sizeof(segment_steps) / sizeof(segment_steps[0]); i++) {
        int step = segment_steps[i];
        if (step > 0)
            MUST(cuMemAlloc_v2(&made[++count], ((size_t)step << 20) / scale));
        else
            MUST(cuMemFree_v2(made[-step]));
    }
}

static void memory(void)
{
    for (unsigned i = 0; i < 512 / scale; i++)
        MUST(cuMemcpyDtoDAsync_v2(to, from, copy_bytes, NULL));
    MUST(cuCtxSynchronize());
}

static const struct {
    const char *name;
    void (*run)(void);
} loops[] = {{"launches", launches},
             {"allocations", allocations},
             {"segments", segments},
             {"small", small},
             {"memory", memory}};

int main(int argc, char **argv)
{
    static const struct option longs[] = {{"kernels", required_argument, NULL, 'k'},
                                          {"commands", required_argument, NULL, 'c'},
                                          {"scale", required_argument, NULL, 's'},
                                          {0}};
    const char *kernels = "sim/kernels.ptx", *commands = NULL;
    char line[64];
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        switch (c) {
        case 'k': kernels = optarg; break;
        case 'c': commands = optarg; break;
        case 's': scale = (unsigned)strtoul(optarg, NULL, 10); break;
        default: commands = NULL; optind = argc;
        }
    }
    if (!commands || scale == 0) {
        fprintf(stderr, "usage: bench-loops --commands FIFO [--kernels PTX] [--scale N]\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    driver_open();
    driver_context();
    CUmodule module = driver_module(kernels);
    MUST(cuModuleGetFunction(&increment, module, "bn_increment"));
    copy_bytes = ((size_t)1 << 30) / scale;
    MUST(cuMemAlloc_v2(&counter, 8));
    MUST(cuMemsetD8_v2(counter, 0, 8));
    MUST(cuMemAlloc_v2(&from, copy_bytes));
    MUST(cuMemAlloc_v2(&to, copy_bytes));
    MUST(cuMemsetD8_v2(from, 1, copy_bytes));
    printf("ready\n");
    while (next_command(commands, line, sizeof(line)) && strcmp(line, "quit") != 0) {
        for (size_t i = 0; i < sizeof(loops) / sizeof(loops[0]); i++) {
            if (strcmp(line, loops[i].name) != 0)
                continue;
            double began = seconds();
            loops[i].run();
            printf("%s %.9f\n", line, seconds() - began);
        }
    }
    return 0;
}
