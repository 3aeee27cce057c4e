/* SPDX-License-Identifier: MIT */

/*
 * A program to dump and restore: counter FOLDER. It counts in device memory and, whenever FOLDER/ask holds a new
 * number, checks every byte of its memory, changes it, and writes "NUMBER COUNT" to FOLDER/answer.
 */

#include <fcntl.h>
#include <string.h>
#include <time.h>

#include "cuda.h"

#define BIG (32 * MIB)
#define SHARED (16 * MIB)

static long read_number(const char *path)
{
    FILE *f = fopen(path, "re");
    long n = 0;

    if (f) {
        if (fscanf(f, "%ld", &n) != 1)
            n = 0;
        fclose(f);
    }
    return n;
}

static void answer(const char *folder, long number, unsigned long long count)
{
    char path[512], final[512];
    FILE *f;

    snprintf(path, sizeof(path), "%s/answer.new", folder);
    snprintf(final, sizeof(final), "%s/answer", folder);
    f = fopen(path, "we");
    CHECK(f);
    fprintf(f, "%ld %llu\n", number, count);
    CHECK(fclose(f) == 0);
    CHECK(rename(path, final) == 0);
}

int main(int argc, char **argv)
{
    struct timespec step = {.tv_nsec = 5 * 1000 * 1000};
    CUdeviceptr big, small, shared, counter;
    CUstream stream;
    struct gpu gpu;
    char ask[512];
    long last = 0;

    CHECK(argc == 2);
    snprintf(ask, sizeof(ask), "%s/ask", argv[1]);
    gpu_open(&gpu, 0);
    OK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    OK(cuMemAlloc_v2(&counter, 8));
    OK(cuMemsetD8_v2(counter, 0, 8));
    OK(cuMemAlloc_v2(&small, 1000));
    OK(cuMemAlloc_v2(&big, BIG));
    shared = vmm_map(vmm_create(SHARED), SHARED, 0);
    gpu_fill(&gpu, small, 1000, 1);
    gpu_fill(&gpu, big, BIG, 2);
    gpu_fill(&gpu, shared, SHARED, 3);
    for (uint64_t round = 0;;) {
        long number = read_number(ask);
        uint64_t count;

        OK(cuLaunchKernel(gpu.increment, 1, 1, 1, 1, 1, 1, 0, stream, (void *[]){&counter}, NULL));
        OK(cuStreamSynchronize(stream));
        nanosleep(&step, NULL);
        if (number == last)
            continue;
        CHECK(gpu_bad(&gpu, small, 1000, 3 * round + 1) == 0);
        CHECK(gpu_bad(&gpu, big, BIG, 3 * round + 2) == 0);
        CHECK(gpu_bad(&gpu, shared, SHARED, 3 * round + 3) == 0);
        round++;
        gpu_fill(&gpu, small, 1000, 3 * round + 1);
        gpu_fill(&gpu, big, BIG, 3 * round + 2);
        gpu_fill(&gpu, shared, SHARED, 3 * round + 3);
        OK(cuMemcpyDtoH_v2(&count, counter, 8));
        answer(argv[1], last = number, count);
    }
}
