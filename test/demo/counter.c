/* SPDX-License-Identifier: MIT */

/* An ordinary CUDA program that counts in device memory: counter [MIB [STEPS]].
 *
 * The count is nowhere but in device memory: every 32-bit word of MIB mebibytes there holds it. Each step reads all of them
 * back, checks that all are equal, writes the next number to all, and prints "count N". It ends after STEPS steps (default:
 * never), or with status 1 as soon as a word is wrong. libcuda.so.1 is opened at run time, as CUDA's own runtime does.
 */
#include "gpu/cuda_types.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define BLOCK_BYTES ((size_t)8 << 20)
#define BLOCK_WORDS (BLOCK_BYTES / sizeof(uint32_t))
#define STEP_NS 50000000L

static CUresult (*p_init)(unsigned int flags);
static CUresult (*p_device_get)(CUdevice *device, int ordinal);
static CUresult (*p_ctx_retain)(CUcontext *ctx, CUdevice device);
static CUresult (*p_ctx_set)(CUcontext ctx);
static CUresult (*p_alloc)(CUdeviceptr *ptr, size_t bytes);
static CUresult (*p_to_device)(CUdeviceptr dst, const void *src, size_t bytes);
static CUresult (*p_to_host)(void *dst, CUdeviceptr src, size_t bytes);

static void must(CUresult result, const char *what)
{
    if (result != CUDA_SUCCESS) {
        fprintf(stderr, "counter: %s: CUDA error %d\n", what, (int)result);
        exit(1);
    }
}

static void open_driver(void)
{
    static const struct {
        const char *name;
        void *slot;
    } functions[] = {
        {"cuInit", &p_init},
        {"cuDeviceGet", &p_device_get},
        {"cuDevicePrimaryCtxRetain", &p_ctx_retain},
        {"cuCtxSetCurrent", &p_ctx_set},
        {"cuMemAlloc_v2", &p_alloc},
        {"cuMemcpyHtoD_v2", &p_to_device},
        {"cuMemcpyDtoH_v2", &p_to_host},
    };
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver) {
        fprintf(stderr, "counter: %s\n", dlerror());
        exit(1);
    }
    for (size_t i = 0; i < sizeof(functions) / sizeof(functions[0]); i++) {
        void *address = dlsym(driver, functions[i].name);
        if (!address) {
            fprintf(stderr, "counter: the driver has no %s\n", functions[i].name);
            exit(1);
        }
        *(void **)functions[i].slot = address;
    }
}

static void fill(CUdeviceptr block, uint32_t *host, uint32_t value)
{
    for (size_t i = 0; i < BLOCK_WORDS; i++)
        host[i] = value;
    must(p_to_device(block, host, BLOCK_BYTES), "cuMemcpyHtoD");
}

/* Checks every word of every block against the first word of all, and adds one to each. Returns the new count. */
static uint32_t step(const CUdeviceptr *blocks, size_t n_blocks, uint32_t *host)
{
    uint32_t count;
    must(p_to_host(&count, blocks[0], sizeof(count)), "cuMemcpyDtoH");
    for (size_t b = 0; b < n_blocks; b++) {
        must(p_to_host(host, blocks[b], BLOCK_BYTES), "cuMemcpyDtoH");
        for (size_t i = 0; i < BLOCK_WORDS; i++) {
            if (host[i] == count)
                continue;
            fprintf(stderr, "counter: block %zu word %zu holds %u, not %u\n", b, i, host[i], count);
            exit(1);
        }
        fill(blocks[b], host, count + 1);
    }
    return count + 1;
}

int main(int argc, char **argv)
{
    unsigned long mib = argc > 1 ? strtoul(argv[1], NULL, 10) : 64;
    unsigned long steps = argc > 2 ? strtoul(argv[2], NULL, 10) : 0;
    size_t n_blocks = (mib << 20) / BLOCK_BYTES;
    if (n_blocks == 0 || n_blocks > 65536) {
        fprintf(stderr, "usage: counter [MIB (8 or more) [STEPS]]\n");
        return 1;
    }
    CUdeviceptr *blocks = calloc(n_blocks, sizeof(*blocks));
    uint32_t *host = malloc(BLOCK_BYTES);
    if (!blocks || !host) {
        fprintf(stderr, "counter: out of memory\n");
        return 1;
    }
    CUdevice device;
    CUcontext ctx;
    open_driver();
    must(p_init(0), "cuInit");
    must(p_device_get(&device, 0), "cuDeviceGet");
    must(p_ctx_retain(&ctx, device), "cuDevicePrimaryCtxRetain");
    must(p_ctx_set(ctx), "cuCtxSetCurrent");
    for (size_t b = 0; b < n_blocks; b++) {
        must(p_alloc(&blocks[b], BLOCK_BYTES), "cuMemAlloc");
        fill(blocks[b], host, 0);
    }
    for (unsigned long i = 0; steps == 0 || i < steps; i++) {
        printf("count %u\n", step(blocks, n_blocks, host));
        fflush(stdout);
        nanosleep(&(struct timespec){.tv_nsec = STEP_NS}, NULL);
    }
    free(host);
    free(blocks);
    return 0;
}
