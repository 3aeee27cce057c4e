/* SPDX-License-Identifier: MIT */
/*
 * What a disk gives: blocks of 16 MiB, O_DIRECT, several in flight (one a thread), into and out of one new file.
 *
 *     bench-disk FOLDER [BYTES] [THREADS] [ROUNDS]          (default 8G, 8, 3)
 *
 * Prints a line "write GB/s" and "read GB/s" for each round (GB: 10^9 bytes). The time of a write ends with fdatasync. "no O_DIRECT" goes
 * first where the file system has none: then the figures are those of its page cache.
 */
#include "driver.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#define BLOCK ((size_t)16 << 20)
#define MAX_THREADS 64

static int fd;
static bool writing;
static uint64_t n_blocks;
static _Atomic uint64_t next;
static _Atomic bool failed;
static void *buffers[MAX_THREADS];

static void *work(void *buffer)
{
    for (uint64_t i; !failed && (i = atomic_fetch_add(&next, 1)) < n_blocks;) {
        off_t at = (off_t)(i * BLOCK);
        ssize_t n = writing ? pwrite(fd, buffer, BLOCK, at) : pread(fd, buffer, BLOCK, at);
        if (n != (ssize_t)BLOCK) {
            fprintf(stderr, "bench-disk: %s at %lld: %s\n", writing ? "write" : "read", (long long)at,
                    n < 0 ? strerror(errno) : "short");
            failed = true;
        }
    }
    return NULL;
}

static void pass(bool write, unsigned threads)
{
    pthread_t ids[MAX_THREADS];
    double began = seconds();
    writing = write;
    next = 0;
    for (unsigned i = 0; i < threads; i++)
        if (pthread_create(&ids[i], NULL, work, buffers[i]) != 0)
            exit(1);
    for (unsigned i = 0; i < threads; i++)
        pthread_join(ids[i], NULL);
    if (write && fdatasync(fd) < 0)
        failed = true;
    if (!failed)
        printf("%s %.4f GB/s\n", write ? "write" : "read",
               (double)(n_blocks * BLOCK) / 1e9 / (seconds() - began));
}

int main(int argc, char **argv)
{
    uint64_t bytes = argc > 2 ? parse_size(argv[2]) : UINT64_C(8) << 30;
    unsigned threads = argc > 3 ? (unsigned)atoi(argv[3]) : 8,
             rounds = argc > 4 ? (unsigned)atoi(argv[4]) : 3;
    char path[4096];
    n_blocks = bytes / BLOCK;
    if (argc < 2 || n_blocks == 0 || threads < 1 || threads > MAX_THREADS ||
        snprintf(path, sizeof(path), "%s/bench-disk.%d", argv[1], (int)getpid()) >= (int)sizeof(path)) {
        fprintf(stderr, "usage: bench-disk FOLDER [BYTES] [THREADS] [ROUNDS]\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (unsigned i = 0; i < threads; i++) {
        if (posix_memalign(&buffers[i], 4096, BLOCK) != 0)
            return 1;
        uint64_t *p = buffers[i]; /* nothing that could be compressed or left out */
        for (size_t w = 0, x = 88172645463325252ull + i; w < BLOCK / 8; w++)
            p[w] = x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    }
    fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_DIRECT | O_CLOEXEC, 0600);
    if (fd < 0 && errno == EINVAL) {
        printf("no O_DIRECT\n");
        unlink(path); /* some file systems make the file all the same */
        fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    }
    if (fd < 0) {
        perror(path);
        return 1;
    }
    unlink(path);
    for (unsigned i = 0; i < rounds && !failed; i++) {
        pass(true, threads);
        pass(false, threads);
    }
    return failed;
}
