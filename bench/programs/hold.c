/* SPDX-License-Identifier: MIT */
/*
 * Holds GPU memory and knows what every byte of it must be; does nothing else, and knows nothing of checkpoints.
 *
 *     bench-hold --commands FIFO [--kernels PTX] [--bytes SIZE] [--block SIZE] [--seed N]
 *
 * Prints "ready BYTES in N blocks, S s" when the memory is filled. No word of it is zero or there twice, so that nothing can be left out
 * of a copy. Then it obeys lines of the FIFO: "check" compares every byte on the GPU and prints "checked N: BAD wrong words, S s" (N
 * counts the checks), "quit" ends it. SIZE may be 0: a context and nothing else.
 */
#include "driver.h"

#include <getopt.h>

static struct {
    const char *kernels, *commands;
    uint64_t bytes, block, seed;
} opt = {.kernels = "sim/kernels.ptx", .bytes = UINT64_C(1) << 30, .block = UINT64_C(1) << 30, .seed = 1};

static CUdeviceptr *blocks, bad;
static size_t n_blocks;
static CUfunction fill, check;

static uint64_t block_bytes(size_t i)
{
    uint64_t left = opt.bytes - (uint64_t)i * opt.block;
    return left < opt.block ? left : opt.block;
}

/* Word w of the whole is a function of seed + w, whichever block it is in. */
static void launch(CUfunction f, size_t i, bool counts)
{
    uint64_t words = block_bytes(i) / 8, seed = opt.seed * UINT64_C(0x9e3779b97f4a7c15) + i * (opt.block / 8);
    uint64_t grid = (words + 255) / 256;
    void *params[] = {&blocks[i], &words, &seed, counts ? &bad : NULL};
    MUST(cuLaunchKernel(f, grid < 2112 ? (unsigned)grid : 2112, 1, 1, 256, 1, 1, 0, NULL, params, NULL));
}

static void allocate(void)
{
    double began = seconds();
    n_blocks = (size_t)((opt.bytes + opt.block - 1) / opt.block);
    blocks = calloc(n_blocks + 1, sizeof(*blocks));
    MUST(cuMemAlloc_v2(&bad, 8));
    for (size_t i = 0; i < n_blocks; i++) {
        MUST(cuMemAlloc_v2(&blocks[i], block_bytes(i)));
        launch(fill, i, false);
    }
    MUST(cuCtxSynchronize());
    printf("ready %llu in %zu blocks, %.3f s\n", (unsigned long long)opt.bytes, n_blocks, seconds() - began);
}

static void check_all(void)
{
    static unsigned long long checks;
    uint64_t wrong = 0;
    double began = seconds();
    MUST(cuMemsetD8_v2(bad, 0, 8));
    for (size_t i = 0; i < n_blocks; i++)
        launch(check, i, true);
    MUST(cuCtxSynchronize());
    MUST(cuMemcpyDtoH_v2(&wrong, bad, 8));
    printf("checked %llu: %llu wrong words, %.3f s\n", ++checks, (unsigned long long)wrong,
           seconds() - began);
}

static int usage(void)
{
    fprintf(stderr,
            "usage: bench-hold --commands FIFO [--kernels PTX] [--bytes SIZE] [--block SIZE] [--seed N]\n");
    return 2;
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {
        {"kernels", required_argument, NULL, 'k'}, {"commands", required_argument, NULL, 'c'},
        {"bytes", required_argument, NULL, 'b'},   {"block", required_argument, NULL, 'B'},
        {"seed", required_argument, NULL, 's'},    {0}};
    char line[64];
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        switch (c) {
        case 'k': opt.kernels = optarg; break;
        case 'c': opt.commands = optarg; break;
        case 'b': opt.bytes = parse_size(optarg); break;
        case 'B': opt.block = parse_size(optarg); break;
        case 's': opt.seed = strtoull(optarg, NULL, 10); break;
        default: return usage();
        }
    }
    if (!opt.commands || opt.block < 8 || opt.block % 8 != 0 || opt.bytes % 8 != 0)
        return usage();
    setvbuf(stdout, NULL, _IOLBF, 0);
    driver_open();
    driver_context();
    CUmodule module = driver_module(opt.kernels);
    MUST(cuModuleGetFunction(&fill, module, "bn_fill"));
    MUST(cuModuleGetFunction(&check, module, "bn_check"));
    allocate();
    while (next_command(opt.commands, line, sizeof(line)) && strcmp(line, "quit") != 0)
        if (strcmp(line, "check") == 0)
            check_all();
    return 0;
}
