/* SPDX-License-Identifier: MIT */
/*
 * What a disk gives: blocks of 16 MiB, O_DIRECT, several in flight (one a thread), into and out of one new file.
 *
 *     bench-disk FOLDER [BYTES] [THREADS] [ROUNDS]          (default 8G, 8, 3)
 *
 * Prints lines "write GB/s" and "read GB/s" for each round (GB: 10^9 bytes). The time of a write ends with fdatasync. "no O_DIRECT" goes
 * first where the file system has none: then the figures are those of its page cache. Then the same bytes as packs, by the code that
 * dumps and restores use, with nothing of them in the page cache: "packs-write", "packs-read", and "packs-verify", which hashes on the
 * CPU what it reads.
 */
#include "driver.h"

#include "base/io.h"
#include "store/image_dir.h"
#include "store/pack.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/stat.h>
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
    if (write && ftruncate(fd, 0) <
                     0) /* a dump writes new files, too: what has blocks already is faster here and there */
        failed = true;
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

/* ---- packs ---- */

#define BATCH_CHUNKS (BLOCK / BN_CHUNK_SIZE)

static struct bn_pack_writer *writer;
static struct bn_pack_reader *reader;
static unsigned read_flags;

static void *work_on_packs(void *buffer)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_pack_item items[BATCH_CHUNKS];
    int r = 0;
    for (uint64_t i; !failed && (i = atomic_fetch_add(&next, 1)) < n_blocks && r == 0;) {
        uint32_t first = (uint32_t)(i * BATCH_CHUNKS);
        for (uint32_t k = 0; writing && k < BATCH_CHUNKS; k++) {
            uint64_t *data = (uint64_t *)((uint8_t *)buffer + k * BN_CHUNK_SIZE);
            *data = first + k; /* no two are the same */
            items[k] = (struct bn_pack_item){first + k, data};
        }
        r = writing ? bn_pack_writer_add_batch(writer, items, BATCH_CHUNKS, &err)
                    : bn_pack_reader_read_batch(reader, first, BATCH_CHUNKS, buffer, read_flags, &err);
    }
    if (r < 0) {
        fprintf(stderr, "bench-disk: %s\n", err.text);
        failed = true;
    }
    return NULL;
}

static void must_be(int r, const struct bn_error *err)
{
    if (r >= 0)
        return;
    fprintf(stderr, "bench-disk: %s\n", err->text);
    exit(1);
}

static struct bn_manifest *manifest_of(uint64_t bytes)
{
    struct bn_manifest *m = bn_manifest_new();
    struct bn_image_process *p = m && bn_manifest_add_gpu(m) ? bn_manifest_add_process(m) : NULL;
    struct bn_image_segment *s = p ? bn_process_add_segment(p) : NULL;
    if (!s)
        exit(1);
    p->pid = 1;
    s->id = 1;
    s->size = bytes;
    s->va = UINT64_C(1) << 32;
    struct bn_error err = BN_ERROR_INIT;
    must_be(bn_manifest_layout(m, &err), &err);
    return m;
}

static void pass_of_packs(const char *name, unsigned threads, int dir, struct bn_manifest *m)
{
    pthread_t ids[MAX_THREADS];
    struct bn_error err = BN_ERROR_INIT;
    writing = writer != NULL;
    next = 0;
    uint64_t began = bn_now_ns();
    for (unsigned i = 0; i < threads; i++)
        if (pthread_create(&ids[i], NULL, work_on_packs, buffers[i]) != 0)
            exit(1);
    for (unsigned i = 0; i < threads; i++)
        pthread_join(ids[i], NULL);
    if (writing && !failed)
        must_be(bn_pack_writer_finish(writer, m, &err), &err);
    if (writing && syncfs(dir) < 0)
        failed = true;
    if (!failed)
        printf("%s %.4f GB/s\n", name, (double)(n_blocks * BLOCK) / (double)(bn_now_ns() - began));
}

static void packs(const char *folder, unsigned threads)
{
    char path[4096];
    struct bn_error err = BN_ERROR_INIT;
    struct bn_manifest *m = manifest_of(n_blocks * BLOCK);
    snprintf(path, sizeof(path), "%s/bench-disk.%d.packs", folder, (int)getpid());
    int dir = mkdir(path, 0700) == 0 ? open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (dir < 0) {
        perror(path);
        exit(1);
    }
    must_be(bn_pack_writer_open(dir, m->key, m->n_chunks, &(struct bn_pack_options){.flags = BN_PACK_NOSYNC},
                                &writer, &err),
            &err);
    must_be(bn_pack_writer_direct(writer, 0, true, &err), &err);
    pass_of_packs("packs-write", threads, dir, m);
    bn_pack_writer_close(writer);
    writer = NULL;
    if (!failed) {
        must_be(bn_pack_reader_open(dir, m, &reader, &err), &err);
        read_flags = BN_PACK_STABLE;
        pass_of_packs("packs-read", threads, dir, m);
        read_flags |= BN_PACK_VERIFY;
        pass_of_packs("packs-verify", threads, dir, m);
        bn_pack_reader_free(reader);
    }
    bn_image_remove(dir, NULL);
    close(dir);
    rmdir(path);
    bn_manifest_free(m);
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
        if (!failed)
            packs(argv[1], threads);
    }
    return failed;
}
