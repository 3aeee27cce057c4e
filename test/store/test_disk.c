/* The ways between memory and files: every way out is forced, and each must bring the same bytes. */
#include "base/io.h"
#include "image/manifest.h"
#include "store/disk.h"
#include "store/pack.h"
#include "store/pack_writer.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* after setjmp.h */
#include <cmocka.h>

#define PIECE ((size_t)128 << 10)
#define PIECES 16u
#define TOTAL (PIECE * PIECES)
#define CHUNK ((size_t)BN_CHUNK_SIZE)

static const unsigned ways[] = {
    0,
    BN_DISK_NO_CACHESTAT,
    BN_DISK_NO_RING,
    BN_DISK_NO_RING | BN_DISK_NO_CACHESTAT,
    BN_DISK_NO_DIRECT,
    BN_DISK_NO_DIRECT | BN_DISK_NO_RING,
};
#define WAYS (sizeof(ways) / sizeof(*ways))

static const char *const folders[] = {NULL,
                                      "/dev/shm"}; /* NULL: TMPDIR or /var/tmp, on a disk if there is one */
#define FOLDERS (sizeof(folders) / sizeof(*folders))

static const char *folder_name(size_t i)
{
    return folders[i] ? folders[i] : getenv("TMPDIR") ? getenv("TMPDIR") : "/var/tmp";
}

static int new_file(size_t folder)
{
    char path[4096];
    snprintf(path, sizeof(path), "%s/bennu-test-disk.XXXXXX", folder_name(folder));
    int fd = mkostemp(path, O_CLOEXEC);
    assert_true(fd >= 0);
    unlink(path);
    return fd;
}

static uint8_t *buffer(size_t bytes)
{
    uint8_t *p = aligned_alloc(BN_DISK_ALIGN, bytes);
    assert_non_null(p);
    memset(p, 0xee, bytes);
    return p;
}

static void fill(uint8_t *out, size_t bytes, uint64_t seed)
{
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        memcpy(out + i, &seed, 8);
    }
}

static void evict(int fd)
{
    fsync(fd);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
}

static bool stable; /* what is read and written stays mapped as long as the rings live */

static void pieces_of(struct bn_disk_piece *p, const struct bn_disk_file *f, uint8_t *data)
{
    for (size_t i = 0; i < PIECES; i++)
        p[i] = (struct bn_disk_piece){f, i * PIECE, data + i * PIECE, PIECE, stable};
}

struct seen {
    uint32_t pieces;
    size_t fail_at; /* PIECES: never */
};

static int done(void *arg, size_t i)
{
    struct seen *s = arg;
    assert_false(s->pieces & 1u << i);
    s->pieces |= 1u << i;
    return i == s->fail_at ? -EBADMSG : 0;
}

/* ---- reading and writing ---- */

static void round_trip(struct bn_disk *d, int fd, bool cold, uint8_t *want, uint8_t *got)
{
    struct bn_disk_piece p[PIECES];
    struct bn_disk_file f;
    bn_disk_file_open(d, fd, true, &f);
    for (int round = 0; round < 3; round++) { /* a ring is used again, and knows its buffers */
        fill(want, TOTAL, (uint64_t)round);
        pieces_of(p, &f, want);
        bn_disk_reserve(&f, TOTAL);
        assert_int_equal(bn_disk_write(d, p, PIECES), 0);
        assert_int_equal(bn_disk_trim(&f, TOTAL), 0);
        struct stat st;
        assert_int_equal(fstat(fd, &st), 0);
        assert_int_equal(st.st_size, TOTAL);
        if (cold)
            evict(fd);
        else
            assert_int_equal(bn_pread_full(fd, got, TOTAL, 0), 0);
        if (round == 1) /* some of it is there */
            assert_int_equal(bn_pread_full(fd, got, 3 * PIECE, 5 * PIECE), 0);
        memset(got, 0xee, TOTAL);
        pieces_of(p, &f, got);
        struct seen s = {.fail_at = PIECES};
        assert_int_equal(bn_disk_read(d, p, PIECES, done, &s, NULL), 0);
        assert_int_equal(s.pieces, (1u << PIECES) - 1);
        assert_memory_equal(got, want, TOTAL);
    }
    bn_disk_file_close(&f);
    bn_disk_file_close(&f);
}

static void test_every_way(void **state)
{
    (void)state;
    for (size_t where = 0; where < FOLDERS; where++)
        for (size_t i = 0; i < WAYS; i++)
            for (int how = 0; how < 4; how++) {
                struct bn_disk *d = bn_disk_new(ways[i]);
                uint8_t *want = buffer(TOTAL), *got = buffer(TOTAL);
                int fd = new_file(where);
                stable = how & 2;
                round_trip(d, fd, how & 1, want, got);
                stable = false;
                close(fd);
                bn_disk_free(d);
                free(want);
                free(got);
            }
    bn_disk_free(NULL);
    assert_true(bn_disk_cache_room() > 0);
}

static void test_unaligned(void **state)
{
    (void)state;
    static const struct {
        size_t file, memory, bytes;
    } off[] = {{512, 0, PIECE}, {0, 8, PIECE}, {0, 0, PIECE - 1}, {4096, 4096, 4096}, {0, 0, 1}, {3, 5, 7}};
    struct bn_disk *d = bn_disk_new(0);
    int fd = new_file(0);
    uint8_t *want = buffer(2 * PIECE), *got = buffer(2 * PIECE);
    struct bn_disk_file f;
    bn_disk_file_open(d, fd, true, &f);
    fill(want, 2 * PIECE, 7);
    for (size_t i = 0; i < sizeof(off) / sizeof(*off); i++) {
        struct bn_disk_piece w = {&f, off[i].file, want + off[i].memory, off[i].bytes};
        struct bn_disk_piece r = {&f, off[i].file, got + off[i].memory, off[i].bytes};
        assert_int_equal(ftruncate(fd, 0), 0);
        assert_int_equal(bn_disk_write(d, &w, 1), 0);
        evict(fd);
        memset(got, 0xee, 2 * PIECE);
        assert_int_equal(bn_disk_read(d, &r, 1, NULL, NULL, NULL), 0);
        assert_memory_equal(r.data, w.data, off[i].bytes);
        assert_int_equal(got[off[i].memory + off[i].bytes], 0xee);
    }
    bn_disk_file_close(&f);
    close(fd);
    free(want);
    free(got);
    bn_disk_free(d);
}

/* What was cold is not brought into the page cache, and what is dirty there is what is read. */
static void test_page_cache(void **state)
{
    (void)state;
    struct bn_disk *d = bn_disk_new(0), *other = bn_disk_new(BN_DISK_NO_CACHESTAT);
    int fd = new_file(0);
    uint8_t *want = buffer(TOTAL), *got = buffer(TOTAL);
    struct bn_disk_piece p[PIECES];
    struct bn_disk_file f;
    bn_disk_file_open(d, fd, false, &f);
    fill(want, TOTAL, 3);
    assert_int_equal(bn_pwrite_full(fd, want, TOTAL, 0), 0);
    assert_true(bn_disk_is_cached(d, &f, 0, TOTAL));
    assert_true(bn_disk_is_cached(other, &f, 0, TOTAL));
    evict(fd);
    bool cold = !bn_disk_is_cached(d, &f, PIECE, PIECE);
    assert_int_equal(!bn_disk_is_cached(other, &f, PIECE, PIECE), cold);
    pieces_of(p, &f, got);
    assert_int_equal(bn_disk_read(d, p, PIECES, NULL, NULL, NULL), 0);
    assert_memory_equal(got, want, TOTAL);
    if (cold && f.direct >= 0 && !f.stacked) { /* else the file system has another mind */
        assert_false(bn_disk_is_cached(d, &f, PIECE, PIECE));
        assert_int_equal(bn_pread_full(fd, got, 2 * PIECE, 4096), 0);
        assert_true(bn_disk_is_cached(d, &f, PIECE, PIECE));
    }
    fill(want, PIECE, 4);
    assert_int_equal(bn_pwrite_full(fd, want, 4096, 8192),
                     0); /* dirty, and the piece around it may be cold */
    memmove(want + 8192, want, 4096);
    assert_int_equal(bn_disk_read(d, p, 1, NULL, NULL, NULL), 0);
    assert_memory_equal(got + 8192, want + 8192, 4096);
    bn_disk_file_close(&f);
    close(fd);
    free(want);
    free(got);
    bn_disk_free(d);
    bn_disk_free(other);
}

/* ---- what goes wrong ---- */

static void test_file_ends(void **state)
{
    (void)state;
    for (size_t i = 0; i < WAYS; i++) {
        struct bn_disk *d = bn_disk_new(ways[i]);
        int fd = new_file(0);
        uint8_t *data = buffer(TOTAL);
        struct bn_disk_piece p[PIECES];
        struct bn_disk_file f;
        bn_disk_file_open(d, fd, false, &f);
        assert_int_equal(bn_pwrite_full(fd, data, 5 * PIECE + 100, 0), 0);
        for (int cold = 0; cold < 2; cold++) {
            size_t failed = 99;
            pieces_of(p, &f, data);
            assert_int_equal(bn_disk_read(d, p, 6, NULL, NULL, &failed), -ENODATA);
            assert_int_equal(failed, 5);
            assert_int_equal(bn_disk_read(d, p, 5, NULL, NULL, NULL), 0);
            evict(fd);
        }
        bn_disk_file_close(&f);
        close(fd);
        free(data);
        bn_disk_free(d);
    }
}

static void test_errors(void **state)
{
    (void)state;
    struct bn_disk_piece many[BN_DISK_PIECES + 1] = {0};
    for (size_t i = 0; i < WAYS; i++) {
        struct bn_disk *d = bn_disk_new(ways[i]);
        uint8_t *data = buffer(TOTAL);
        int fd = new_file(0), mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
        assert_true(mem >= 0);
        /* Where nothing is mapped, reading and writing are input/output errors. */
        struct bn_disk_file f, bad = {.fd = mem, .direct = ways[i] & BN_DISK_NO_DIRECT ? -1 : mem};
        struct bn_disk_piece p[PIECES];
        size_t failed = 99;
        bn_disk_file_open(d, fd, true, &f);
        pieces_of(p, &f, data);
        assert_int_equal(bn_disk_write(d, p, PIECES), 0);
        evict(fd);
        p[4].file = &bad;
        p[4].offset = 4096;
        assert_int_equal(bn_disk_read(d, p, PIECES, NULL, NULL, &failed), -EIO);
        assert_int_equal(failed, 4);
        assert_int_equal(bn_disk_write(d, p, PIECES), -EIO);
        pieces_of(p, &f, data);
        struct seen s = {.fail_at = 3};
        assert_int_equal(bn_disk_read(d, p, PIECES, done, &s, &failed), -EBADMSG);
        assert_int_equal(failed, 3);
        assert_int_equal(bn_disk_read(d, many, BN_DISK_PIECES + 1, NULL, NULL, NULL), -EINVAL);
        assert_int_equal(bn_disk_read(d, many, 0, NULL, NULL, NULL), 0);
        s = (struct seen){.fail_at = PIECES}; /* and it goes on as before */
        assert_int_equal(bn_disk_read(d, p, PIECES, done, &s, NULL), 0);
        assert_int_equal(s.pieces, (1u << PIECES) - 1);
        bn_disk_file_close(&f);
        close(mem);
        close(fd);
        free(data);
        bn_disk_free(d);
    }
}

/* A disk with so many bytes free, as far as it is asked; negative: the real one. Linked with --wrap; the names are those with 64-bit
 * offsets. */
static int64_t left = -1;
#define MUCH (INT64_C(1) << 40)

int __real_fstatvfs64(int fd, struct statvfs *out);
int __wrap_fstatvfs64(int fd, struct statvfs *out);
int __wrap_fstatvfs64(int fd, struct statvfs *out)
{
    int r = __real_fstatvfs64(fd, out);
    if (left >= 0) {
        out->f_blocks = 1;
        out->f_frsize = 1;
        out->f_bavail = (fsblkcnt_t)left;
    }
    return r;
}

int __real_ftruncate64(int fd, off_t bytes);
int __wrap_ftruncate64(int fd, off_t bytes);
int __wrap_ftruncate64(int fd, off_t bytes)
{
    struct stat st;
    if (left >= 0 && fstat(fd, &st) == 0)
        left += st.st_size - bytes;
    return __real_ftruncate64(fd, bytes);
}

static void test_reserve(void **state)
{
    (void)state;
    left = MUCH;
    for (size_t where = 0; where < FOLDERS; where++) {
        struct bn_disk *d = bn_disk_new(0);
        int fd = new_file(where);
        struct bn_disk_file f;
        struct stat st;
        bn_disk_file_open(d, fd, true, &f);
        bn_disk_reserve(&f, 4096);
        if (f.direct >= 0 && f.reserved != UINT64_MAX) {
            assert_int_equal(f.reserved, BN_DISK_STEP);
            bn_disk_reserve(&f, BN_DISK_STEP); /* has it */
            assert_int_equal(f.reserved, BN_DISK_STEP);
        }
        assert_int_equal(bn_disk_trim(&f, 4096), 0);
        assert_int_equal(fstat(fd, &st), 0);
        assert_true(st.st_size <= 4096);
        assert_true((uint64_t)st.st_blocks * 512 <= 65536);
        bn_disk_file_close(&f);
        close(fd);
        bn_disk_free(d);
    }
    left = -1;
}

/* As ext4 does it when it is full: of what cannot be had it takes what there is, and leaves the file that much longer. */
static bool full;
static unsigned refused;
int __real_fallocate64(int fd, int mode, off_t offset, off_t bytes);
int __wrap_fallocate64(int fd, int mode, off_t offset, off_t bytes);
int __wrap_fallocate64(int fd, int mode, off_t offset, off_t bytes)
{
    const off_t there = 8 << 20;
    bool fits = (!full || offset + bytes <= there) && (left < 0 || bytes <= left);
    int r = fits ? __real_fallocate64(fd, mode, offset, bytes) : -1;
    left -= left >= 0 && r == 0 ? bytes : 0;
    if (fits)
        return r;
    if (full)
        assert_int_equal(ftruncate(fd, there), 0);
    refused++;
    errno = ENOSPC;
    return -1;
}

static void test_reserve_when_full(void **state)
{
    (void)state;
    struct bn_disk *d = bn_disk_new(0);
    int fd = new_file(0);
    struct bn_disk_file f;
    struct stat st;
    uint8_t *data = buffer(TOTAL);
    struct bn_disk_piece p[PIECES];
    bn_disk_file_open(d, fd, true, &f);
    full = true;
    bn_disk_reserve(&f, TOTAL); /* of a whole step there is only a part; this much is there */
    pieces_of(p, &f, data);
    assert_int_equal(bn_disk_write(d, p, PIECES), 0);
    assert_int_equal(bn_disk_trim(&f, TOTAL), 0);
    full = false;
    assert_true(refused > 0 || f.direct < 0);
    assert_int_equal(fstat(fd, &st), 0);
    assert_int_equal(st.st_size, TOTAL);
    bn_disk_file_close(&f);
    close(fd);
    free(data);
    bn_disk_free(d);
}

/* ---- in a child: what the kernel refuses ---- */

static void in_child(void (*fn)(void *), void *arg)
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        fn(arg);
        _exit(0);
    }
    int status;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
}

static void check(bool ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "in the child: %s: %s\n", what, strerror(errno));
    _exit(1);
}

static bool same_bytes(unsigned flags, const struct bn_disk_file *given, int fd)
{
    struct bn_disk *d = bn_disk_new(flags);
    uint8_t *want = aligned_alloc(BN_DISK_ALIGN, TOTAL), *got = aligned_alloc(BN_DISK_ALIGN, TOTAL);
    struct bn_disk_file f;
    struct bn_disk_piece p[PIECES];
    if (given)
        f = *given;
    else
        bn_disk_file_open(d, fd, true, &f);
    fill(want, TOTAL, 11);
    stable = true;
    pieces_of(p, &f, want);
    bool ok = bn_disk_write(d, p, PIECES) == 0;
    evict(fd);
    pieces_of(p, &f, got);
    ok = ok && bn_disk_read(d, p, PIECES, NULL, NULL, NULL) == 0 && memcmp(want, got, TOTAL) == 0;
    if (!given)
        bn_disk_file_close(&f);
    bn_disk_free(d);
    free(want);
    free(got);
    return ok;
}

static void refuse(long nr, int error)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0), /* the number is the first word */
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)nr, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (uint32_t)error),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog prog = {.len = sizeof(code) / sizeof(*code), .filter = code};
    check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs");
    check(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog) == 0, "seccomp");
}

static void without_uring(void *arg)
{
    refuse(SYS_io_uring_setup, *(int *)arg);
    check(syscall(SYS_io_uring_setup, 1, NULL) < 0 && errno == *(int *)arg, "the filter");
    check(same_bytes(0, NULL, new_file(0)), "other bytes");
}

static void without_registration(void *arg)
{
    (void)arg;
    refuse(SYS_io_uring_register, ENOMEM);
    check(same_bytes(0, NULL, new_file(0)), "other bytes");
}

static void without_submission(void *arg)
{
    (void)arg;
    refuse(SYS_io_uring_enter, EPERM); /* a ring, and nothing gets into it */
    check(same_bytes(0, NULL, new_file(0)), "other bytes");
}

/* Memory may not be locked: nobody's process with a limit of 0. */
static void with_little_memlock(void *arg)
{
    (void)arg;
    struct bn_disk *d = bn_disk_new(0);
    struct bn_disk_file f;
    int fd = new_file(0);
    bn_disk_file_open(d, fd, true, &f);
    check(setrlimit(RLIMIT_MEMLOCK, &(struct rlimit){0, 0}) == 0, "RLIMIT_MEMLOCK");
    check(geteuid() != 0 || setresuid(65534, 65534, 65534) == 0, "setresuid");
    check(same_bytes(0, &f, fd), "other bytes");
    bn_disk_file_close(&f);
    bn_disk_free(d);
}

static void test_refused(void **state)
{
    (void)state;
    static int errors[] = {EPERM, ENOSYS};
    in_child(without_uring, &errors[0]);
    in_child(without_uring, &errors[1]);
    in_child(without_registration, NULL);
    in_child(without_submission, NULL);
    in_child(with_little_memlock, NULL);
}

/* ---- many threads ---- */

struct reader {
    struct bn_disk *d;
    const struct bn_disk_file *f;
    const uint8_t *want;
    pthread_t thread;
    int result;
};

static void *read_often(void *arg)
{
    struct reader *r = arg;
    uint8_t *got = buffer(TOTAL);
    struct bn_disk_piece p[PIECES];
    for (int i = 0; i < 8 && r->result == 0; i++) {
        pieces_of(p, r->f, got);
        r->result = bn_disk_read(r->d, p, PIECES, NULL, NULL, NULL);
        if (r->result == 0 && memcmp(got, r->want, TOTAL) != 0)
            r->result = -EBADMSG;
        evict(r->f->fd);
    }
    return got; /* registered: it stays until the rings are gone */
}

static void test_threads(void **state)
{
    (void)state;
    struct reader r[6];
    struct bn_disk *d = bn_disk_new(0);
    int fd = new_file(0);
    uint8_t *want = buffer(TOTAL);
    void *kept[6];
    stable = true;
    struct bn_disk_file f;
    bn_disk_file_open(d, fd, false, &f);
    fill(want, TOTAL, 5);
    assert_int_equal(bn_pwrite_full(fd, want, TOTAL, 0), 0);
    for (int i = 0; i < 6; i++) {
        r[i] = (struct reader){.d = d, .f = &f, .want = want};
        assert_int_equal(pthread_create(&r[i].thread, NULL, read_often, &r[i]), 0);
    }
    for (int i = 0; i < 6; i++) {
        pthread_join(r[i].thread, &kept[i]);
        assert_int_equal(r[i].result, 0);
    }
    bn_disk_free(d);
    for (int i = 0; i < 6; i++)
        free(kept[i]);
    stable = false;
    bn_disk_file_close(&f);
    close(fd);
    free(want);
}

/* ---- packs ---- */

#define CHUNKS 20u

static struct bn_manifest *manifest(void)
{
    struct bn_manifest *m = bn_manifest_new();
    assert_non_null(m);
    strcpy(m->bennu_version, "test");
    assert_non_null(bn_manifest_add_gpu(m));
    struct bn_image_process *p = bn_manifest_add_process(m);
    assert_non_null(p);
    p->pid = 42;
    p->flags = BN_PROCESS_AGENT;
    p->instance[3] = 9;
    strcpy(p->comm, "worker");
    struct bn_image_segment *s = bn_process_add_segment(p);
    assert_non_null(s);
    s->id = 1;
    s->size = CHUNKS * CHUNK;
    s->va = 0x7f0000000000;
    assert_int_equal(bn_manifest_layout(m, NULL), 0);
    return m;
}

/* Chunk 3 is zero, chunk 9 is like chunk 8, the others are all different. */
static void fill_chunks(uint8_t *all)
{
    for (uint32_t i = 0; i < CHUNKS; i++)
        fill(all + i * CHUNK, CHUNK, i == 9 ? 8 : i);
    memset(all + 3 * CHUNK, 0, CHUNK);
}

static int write_all(int dirfd, struct bn_manifest *m, const uint8_t *all, const unsigned *direct,
                     struct bn_error *err)
{
    struct bn_pack_writer *w = NULL;
    struct bn_pack_options o = {.flags = BN_PACK_NOSYNC};
    int r = bn_pack_writer_open(dirfd, m->key, CHUNKS, &o, &w, err);
    if (r == 0 && direct)
        r = bn_pack_writer_direct(w, *direct, stable, err);
    for (uint32_t at = 0; r == 0 && at < CHUNKS; at += 4) {
        struct bn_pack_item items[4];
        for (uint32_t k = 0; k < 4; k++)
            items[k] = (struct bn_pack_item){at + k, all + (at + k) * CHUNK};
        r = bn_pack_writer_add_batch(w, items, 4, err);
    }
    if (r == 0)
        r = bn_pack_writer_finish(w, m, err);
    bn_pack_writer_close(w);
    return r;
}

static int new_folder(char *path, size_t cap, size_t folder)
{
    snprintf(path, cap, "%s/bennu-test-disk.XXXXXX", folder_name(folder));
    assert_non_null(mkdtemp(path));
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    assert_true(fd >= 0);
    return fd;
}

static void remove_folder(const char *path, int fd)
{
    for (unsigned i = 0; i < BN_PACK_LANES; i++) {
        char name[BN_PACK_NAME_MAX];
        snprintf(name, sizeof(name), BN_PACK_NAME, i);
        unlinkat(fd, name, 0);
    }
    close(fd);
    assert_int_equal(rmdir(path), 0);
}

static int open_first_pack(int dirfd, int flags)
{
    int fd = openat(dirfd, "bennu-pack-0.img", flags | O_CLOEXEC);
    assert_true(fd >= 0);
    return fd;
}

static void read_all(int dirfd, const struct bn_manifest *m, const uint8_t *all, unsigned flags)
{
    struct bn_pack_reader *r;
    struct bn_error err = BN_ERROR_INIT;
    uint8_t *got = buffer(CHUNKS * CHUNK);
    assert_int_equal(bn_pack_reader_open(dirfd, m, &r, &err), 0);
    assert_int_equal(bn_pack_reader_tune(r, flags, &err), 0);
    int pack = open_first_pack(dirfd, O_RDONLY);
    for (int verify = 0; verify < 2; verify++) {
        evict(pack);
        memset(got, 0xee, CHUNKS * CHUNK);
        assert_int_equal(
            bn_pack_reader_read_batch(r, 0, CHUNKS, got, verify ? BN_PACK_VERIFY | BN_PACK_STABLE : 0, &err),
            0);
        assert_memory_equal(got, all, CHUNKS * CHUNK);
    }
    assert_int_equal(bn_pack_reader_read_batch(r, 2, 3, got, BN_PACK_VERIFY, &err), 0);
    assert_memory_equal(got, all + 2 * CHUNK, 3 * CHUNK);
    assert_int_equal(bn_pack_reader_read_batch(r, 1, CHUNKS, got, BN_PACK_VERIFY, NULL), -EINVAL);
    assert_int_equal(bn_pack_reader_read_batch(r, CHUNKS, 0, got, BN_PACK_VERIFY, NULL), 0);
    assert_int_equal(bn_pack_reader_read_batch(r, UINT32_MAX, 2, got, BN_PACK_VERIFY, NULL), -EINVAL);
    close(pack);
    bn_pack_reader_free(r);
    free(got);
}

/* Written around the page cache, packs are what they are otherwise: same length, no tail, same bytes. */
static void test_packs(void **state)
{
    (void)state;
    uint8_t *all = buffer(CHUNKS * CHUNK);
    fill_chunks(all);
    stable = true;
    for (size_t where = 0; where < FOLDERS; where++)
        for (size_t i = 0; i < WAYS; i += 2) { /* ring, no ring, page cache */
            char path[4096];
            struct bn_error err = BN_ERROR_INIT;
            struct bn_manifest *m = manifest();
            int dirfd = new_folder(path, sizeof(path), where);
            assert_int_equal(write_all(dirfd, m, all, &ways[i], &err), 0);
            assert_int_equal(m->n_packs, 1);
            assert_int_equal(m->packs[0].length, (CHUNKS - 2) * CHUNK);
            read_all(dirfd, m, all, ways[i]);
            bn_manifest_free(m);
            remove_folder(path, dirfd);
        }
    stable = false;
    free(all);
}

static void add(struct bn_pack_writer *w, const uint8_t *all, uint32_t at)
{
    struct bn_error err = BN_ERROR_INIT;
    assert_int_equal(bn_pack_writer_add_run(w, at, 4, all + at * CHUNK, &err), 0);
}

/* What one lane has beyond its need, and a dump that fits does not fail for. */
static void test_nearly_full(void **state)
{
    (void)state;
    const int64_t little = 5 * (int64_t)CHUNK;
    char path[4096];
    uint8_t *all = buffer(CHUNKS * CHUNK);
    struct bn_error err = BN_ERROR_INIT;
    struct bn_manifest *m = manifest();
    struct bn_pack_writer *w;
    int dirfd = new_folder(path, sizeof(path), 0);
    fill_chunks(all);
    assert_int_equal(bn_pack_writer_open(dirfd, m->key, CHUNKS, &(struct bn_pack_options){0}, &w, &err), 0);
    assert_int_equal(bn_pack_writer_direct(w, 0, false, &err), 0);
    const struct bn_disk_file *one = &w->lanes[0].file, *other = &w->lanes[1].file;
    left = MUCH;
    refused = 0;
    struct bn_pack_lane *held = bn_pack_lane_take(w, 0, CHUNK, &err); /* somebody else is at work */
    add(w, all, 0);
    bn_pack_lane_done(w, held, 0);
    bool reserves = other->direct >= 0 && other->reserved != UINT64_MAX;
    assert_true(!reserves || other->reserved == BN_DISK_STEP);

    left = little; /* meanwhile others have written */
    add(w, all, 4);
    assert_true(!reserves || (one->reserved == 4 * CHUNK && other->reserved == 3 * CHUNK));
    assert_true(!reserves || left == little - 4 * (int64_t)CHUNK + (int64_t)(BN_DISK_STEP - 3 * CHUNK));
    add(w, all, 8);
    assert_true(!reserves || one->reserved == 7 * CHUNK);

    left = MUCH; /* and it may be had again */
    add(w, all, 12);
    assert_true(!reserves || one->reserved == BN_DISK_STEP);
    held = bn_pack_lane_take(w, 0, CHUNK, &err);
    left = little;
    add(w, all, 16);
    assert_true(!reserves || (one->reserved == BN_DISK_STEP && other->reserved == 7 * CHUNK));
    bn_pack_lane_done(w, held, 0);
    assert_true(!reserves || one->reserved == 11 * CHUNK);
    assert_int_equal(bn_pack_writer_finish(w, m, &err), 0);
    assert_int_equal(refused, 0);
    left = -1;
    bn_pack_writer_close(w);
    read_all(dirfd, m, all, 0);
    bn_manifest_free(m);
    remove_folder(path, dirfd);
    free(all);
}

static void test_damaged_packs(void **state)
{
    (void)state;
    uint8_t *all = buffer(CHUNKS * CHUNK), *got = buffer(CHUNKS * CHUNK);
    fill_chunks(all);
    for (size_t i = 0; i < WAYS; i += 2) { /* ring, no ring, page cache */
        char path[4096];
        struct bn_error err = BN_ERROR_INIT;
        struct bn_manifest *m = manifest();
        struct bn_pack_reader *r;
        int dirfd = new_folder(path, sizeof(path), 0);
        assert_int_equal(write_all(dirfd, m, all, NULL, &err), 0);
        int pack = open_first_pack(dirfd, O_RDWR);
        assert_int_equal(bn_pwrite_full(pack, "x", 1, m->chunks[6].offset + 77), 0);
        assert_int_equal(bn_pack_reader_open(dirfd, m, &r, &err), 0);
        assert_int_equal(bn_pack_reader_tune(r, ways[i], &err), 0);
        for (int cold = 0; cold < 2; cold++) {
            err = BN_ERROR_INIT;
            assert_int_equal(bn_pack_reader_read_batch(r, 0, 8, got, 0, &err), 0);
            assert_int_equal(bn_pack_reader_read_batch(r, 0, 8, got, BN_PACK_VERIFY, &err), -EBADMSG);
            assert_non_null(strstr(err.text, "chunk 6 "));
            assert_non_null(strstr(err.text, "damaged"));
            evict(pack);
        }
        /* Half of chunk 12 goes while the reader has the file open. */
        assert_int_equal(ftruncate(pack, (off_t)(m->chunks[12].offset + CHUNK / 2)), 0);
        err = BN_ERROR_INIT;
        assert_int_equal(bn_pack_reader_read_batch(r, 10, 3, got, BN_PACK_VERIFY, &err), -EBADMSG);
        assert_non_null(strstr(err.text, "chunk 12 "));
        assert_non_null(strstr(err.text, "bennu-pack-0.img became shorter"));
        assert_int_equal(bn_pack_reader_read_batch(r, 10, 2, got, BN_PACK_VERIFY, &err), 0);
        bn_pack_reader_free(r);
        close(pack);
        bn_manifest_free(m);
        remove_folder(path, dirfd);
    }
    free(all);
    free(got);
}

/* A full file system, in a mount namespace of our own. */
static void on_a_full_disk(void *arg)
{
    char path[] = "/var/tmp/bennu-test-disk.XXXXXX";
    if (!mkdtemp(path) || unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("none", path, "tmpfs", 0, "size=24m") < 0) {
        rmdir(path);
        _exit(0); /* not for us */
    }
    uint8_t *all = aligned_alloc(BN_DISK_ALIGN, CHUNKS * CHUNK);
    fill_chunks(all);
    struct bn_manifest *m = manifest();
    struct bn_error err = BN_ERROR_INIT;
    int dirfd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int r = write_all(dirfd, m, all, arg, &err);
    bool empty = faccessat(dirfd, "bennu-pack-0.img", F_OK, 0) < 0;
    close(dirfd);
    umount2(path, MNT_DETACH);
    rmdir(path);
    check(r == -ENOSPC, "no -ENOSPC");
    check(strstr(err.text, "bennu-pack-0.img") && strstr(err.text, "make room"), err.text);
    check(empty, "a pack was left");
    bn_manifest_free(m);
    free(all);
}

static void test_full(void **state)
{
    (void)state;
    for (size_t i = 0; i < WAYS; i += 3) /* ring, no ring, page cache */
        in_child(on_a_full_disk, (void *)&ways[i]);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_way),
        cmocka_unit_test(test_unaligned),
        cmocka_unit_test(test_page_cache),
        cmocka_unit_test(test_file_ends),
        cmocka_unit_test(test_errors),
        cmocka_unit_test(test_reserve),
        cmocka_unit_test(test_reserve_when_full),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_packs),
        cmocka_unit_test(test_nearly_full),
        cmocka_unit_test(test_damaged_packs),
        cmocka_unit_test(test_full),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
