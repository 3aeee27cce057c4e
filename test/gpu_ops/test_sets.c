/* Devices, sets of device memory, the pinned pool. */
#include "common.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct bn_copier *copier;

static int up(void **state)
{
    struct bn_copier_config config = {.buffer = 4 * MIB, .workers = 3};
    struct bn_error err = BN_ERROR_INIT;
    if (open_gpu(state) < 0)
        return -1;
    return bn_copier_new(gpu, &config, &copier, &err);
}

static int down(void **state)
{
    bn_copier_free(copier);
    return close_gpu(state);
}

static void devices(void **state)
{
    assert_true(bn_gpu_count(gpu) >= 1);
    assert_null(bn_gpu_info(gpu, bn_gpu_count(gpu)));
    for (unsigned i = 0; i < bn_gpu_count(gpu); i++) {
        const struct bn_gpu_info *info = bn_gpu_info(gpu, i);
        assert_int_equal(bn_gpu_find(gpu, info->uuid), (int)i);
        assert_true(strlen(info->name) > 0 && strlen(info->pci) >= 12);
        assert_true(info->major > 0 && info->total > 0 && info->shareable);
        uint64_t f, t;
        struct bn_error err = BN_ERROR_INIT;
        assert_ok(bn_gpu_mem_info(gpu, i, &f, &t, &err), &err);
        assert_true(f > 0 && f <= t && t <= info->total);
    }
    uint8_t nobody[16] = "not a GPU";
    assert_int_equal(bn_gpu_find(gpu, nobody), -ENODEV);
    assert_true(bn_gpu_driver_version(gpu) >= 11000);
    assert_true(strstr(bn_gpu_driver_path(gpu), "libcuda.so") != NULL);
}

static void wrong_drivers(void **state)
{
    struct bn_gpu *g = NULL;
    struct bn_error err = BN_ERROR_INIT;
    char path[4096];
    assert_fails(bn_gpu_open("/nowhere/libcuda.so.1", &g, &err), ENOENT, &err);

    /* What bears the agent's mark is refused, and what is no driver at all. */
    const char *build = getenv("BENNU_BUILD");
    snprintf(path, sizeof(path), "%s/test/gpu_ops/libfake_agent.so", build ? build : "build");
    err = BN_ERROR_INIT;
    assert_fails(bn_gpu_open(path, &g, &err), EINVAL, &err);
    assert_non_null(strstr(err.text, "stand-in"));
    snprintf(path, sizeof(path), "%s/test/gpu_ops/libfake_driver.so", build ? build : "build");
    err = BN_ERROR_INIT;
    assert_fails(bn_gpu_open(path, &g, &err), ENOSYS, &err);
    assert_null(g);
}

static void bad_sets(void **state)
{
    struct bn_gpu_set *set = NULL;
    struct bn_error err = BN_ERROR_INIT;
    struct bn_gpu_block b[2] = {{.size = 2 * MIB}, {.size = 3 * MIB}};
    assert_fails(bn_gpu_set_create(gpu, 0, b, 2, &set, &err), EINVAL, &err);
    err = BN_ERROR_INIT;
    assert_fails(bn_gpu_set_create(gpu, 0, b, 0, &set, &err), EINVAL, &err);
    err = BN_ERROR_INIT;
    assert_fails(bn_gpu_set_create(gpu, 99, b, 1, &set, &err), ENODEV, &err);
    b[1].size = 0;
    err = BN_ERROR_INIT;
    assert_fails(bn_gpu_set_create(gpu, 0, b, 2, &set, &err), EINVAL, &err);
    b[0].size = b[1].size = UINT64_C(1) << 63;
    err = BN_ERROR_INIT;
    assert_fails(bn_gpu_set_create(gpu, 0, b, 2, &set, &err), EINVAL, &err);

    /* More than there is: says so, and nothing stays. */
    uint64_t before = gpu_free(0);
    b[0].size = 4 * MIB;
    b[1].size = bn_gpu_info(gpu, 0)->total / (2 * MIB) * (2 * MIB);
    err = BN_ERROR_INIT;
    assert_fails(bn_gpu_set_create(gpu, 0, b, 2, &set, &err), ENOMEM, &err);
    assert_int_equal(gpu_free(0), before);
    assert_null(set);
}

static void foreign_descriptors(void **state)
{
    int p[2];
    struct bn_gpu_set *set = NULL, *good;
    struct bn_error err = BN_ERROR_INIT;
    uint64_t size = 2 * MIB, before = gpu_free(0);
    good = make_set(0, 1, &size, 1);
    assert_int_equal(pipe2(p, O_CLOEXEC), 0);
    unsigned fds = open_fds();
    int fd = bn_gpu_set_fd(good, 0, &err);
    assert_ok(fd, &err);

    struct bn_gpu_block b[2] = {{size, 0, fd}, {size, 0, p[0]}};
    assert_fails(bn_gpu_set_import(gpu, 0, b, 2, &set, &err), EINVAL, &err);
    b[1].fd = -1;
    err = BN_ERROR_INIT;
    assert_fails(bn_gpu_set_import(gpu, 0, b, 2, &set, &err), EINVAL, &err);
    /* More than the handle has. */
    b[0].size = 2 * size;
    err = BN_ERROR_INIT;
    assert_true(bn_gpu_set_import(gpu, 0, b, 1, &set, &err) < 0);
    /* The descriptors are still ours. */
    assert_true(fcntl(fd, F_GETFD) >= 0 && fcntl(p[0], F_GETFD) >= 0);
    assert_int_equal(open_fds(), fds + 1);
    close(p[0]);
    close(p[1]);
    bn_gpu_set_free(good);
    assert_int_equal(gpu_free(0), before);
}

static void sets_of(size_t n)
{
    const uint64_t sizes[] = {2 * MIB, 6 * MIB, 4 * MIB};
    unsigned dev = n % 2 && bn_gpu_count(gpu) > 1 ? 1 : 0;
    uint64_t before = gpu_free(dev), sum = 0;
    unsigned fds = open_fds();

    struct bn_gpu_set *set = make_set(dev, n, sizes, 3);
    assert_int_equal(bn_gpu_set_count(set), n);
    assert_int_equal(bn_gpu_set_device(set), dev);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(bn_gpu_set_offset(set, i), sum);
        assert_int_equal(bn_gpu_set_size(set, i), sizes[i % 3]);
        assert_int_equal(bn_gpu_set_flags(set, i), i % 2 ? BN_GPU_RDMA : 0);
        sum += sizes[i % 3];
    }
    assert_int_equal(bn_gpu_set_bytes(set), sum);
    assert_int_equal(gpu_free(dev), before - sum);

    assert_int_equal(set_fill(copier, set, n), 0);
    struct bn_gpu_set *again = import_again(set);
    assert_int_not_equal(bn_gpu_set_ptr(again), bn_gpu_set_ptr(set));
    assert_int_equal(set_check(copier, again, n), 0);
    bn_gpu_set_free(set);
    assert_int_equal(gpu_free(dev), before - sum);

    /* An import hands on what it was made from. */
    struct bn_gpu_set *third = import_again(again);
    bn_gpu_set_free(again);
    assert_int_equal(set_check(copier, third, n), 0);
    bn_gpu_set_free(third);
    assert_int_equal(gpu_free(dev), before);
    assert_int_equal(open_fds(), fds);
}

static void sets(void **state)
{
    bn_copier_warm(copier, NULL);
    for (size_t n = 1; n <= 40; n = n * 2 + 1)
        sets_of(n);
}

static void set_of_1000(void **state)
{
    const uint64_t size = 2 * MIB;
    uint64_t before = gpu_free(0);
    struct bn_gpu_set *set = make_set(0, 1000, &size, 1);
    assert_int_equal(set_fill(copier, set, 1000), 0);
    assert_int_equal(set_check(copier, set, 1000), 0);
    bn_gpu_set_free(set);
    assert_int_equal(gpu_free(0), before);
}

/* Chunk `n` of a set that set_fill(seed) has filled lies at `at` in `set`. */
static int is_chunk(void *arg, uint64_t chunk, unsigned nchunks, const void *data, struct bn_error *err)
{
    const uint64_t *of = arg; /* the seed, and each chunk's number at its origin */
    (void)err;
    for (unsigned i = 0; i < nchunks; i++)
        if (pattern_check((const char *)data + i * BN_GPU_CHUNK, of[0], of[1 + chunk + i], 1) < 0)
            return -EILSEQ;
    return 0;
}

static void gather(void **state)
{
    const uint64_t sizes[] = {2 * MIB, 6 * MIB, 4 * MIB};
    uint64_t before = gpu_free(0);
    struct bn_error err = BN_ERROR_INIT;
    struct bn_gpu_set *from = make_set(0, 9, sizes, 3), *again = import_again(from); /* 18 chunks */
    struct bn_gpu_set *to = make_set(0, 1, &(uint64_t){16 * MIB}, 1);
    assert_int_equal(set_fill(copier, from, 5), 0);

    /* A run across blocks, single chunks, the last one; memory of another process. */
    const struct bn_copy_extent some[] = {{.offset = 2 * MIB, .bytes = 8 * MIB},
                                          {.offset = 14 * MIB, .bytes = 2 * MIB},
                                          {.offset = 34 * MIB, .bytes = 2 * MIB}};
    uint64_t want[] = {5, 1, 2, 3, 4, 7, 17};
    assert_ok(bn_gpu_set_gather(to, again, some, 3, &err), &err);
    assert_int_equal(set_check(copier, from, 5), 0);
    bn_gpu_set_free(again);
    bn_gpu_set_free(from); /* what was gathered depends on neither */
    struct bn_copy_spec spec = {.mode = BN_COPY_OUT,
                                .set = to,
                                .extents = &(struct bn_copy_extent){.bytes = 12 * MIB},
                                .nextents = 1,
                                .consume = is_chunk,
                                .arg = want};
    struct bn_copy *job;
    assert_ok(bn_copy_start(copier, &spec, &job, &err), &err);
    assert_ok(bn_copy_wait(job, NULL, NULL, 0, &err), &err);
    assert_int_equal(bn_copy_done(job), 12 * MIB);
    bn_copy_free(job);
    bn_gpu_set_free(to);
    assert_int_equal(gpu_free(0), before);
}

static void gather_refused(void **state)
{
    uint64_t size = 4 * MIB, before = gpu_free(0);
    struct bn_error err = BN_ERROR_INIT;
    struct bn_gpu_set *from = make_set(0, 1, &size, 1), *to = make_set(0, 1, &size, 1);
    struct bn_copy_extent e[] = {{.bytes = 4 * MIB}, {.bytes = 2 * MIB}};
    assert_fails(bn_gpu_set_gather(to, from, e, 2, &err), EINVAL, &err); /* more than there is room for */
    const struct bn_copy_extent outside[] = {{.offset = 4 * MIB, .bytes = 2 * MIB},
                                             {.offset = 2 * MIB, .bytes = UINT64_MAX - MIB},
                                             {.offset = UINT64_MAX - MIB, .bytes = 2 * MIB}};
    for (size_t i = 0; i < BN_ARRAY_SIZE(outside); i++) {
        err = (struct bn_error)BN_ERROR_INIT;
        assert_fails(bn_gpu_set_gather(to, from, &outside[i], 1, &err), EINVAL, &err);
    }
    if (bn_gpu_count(gpu) > 1) {
        struct bn_gpu_set *other = make_set(1, 1, &size, 1);
        err = (struct bn_error)BN_ERROR_INIT;
        assert_fails(bn_gpu_set_gather(other, from, e, 1, &err), EINVAL, &err);
        bn_gpu_set_free(other);
    }
    bn_gpu_set_free(from);
    bn_gpu_set_free(to);
    assert_int_equal(gpu_free(0), before);
}

static void gather_fails(void **state)
{
    inject("cuMemcpyDtoDAsync:2=999");
    uint64_t size = 4 * MIB;
    struct bn_error err = BN_ERROR_INIT;
    struct bn_gpu_set *from = make_set(0, 1, &size, 1), *to = make_set(0, 1, &size, 1);
    const struct bn_copy_extent e[] = {{.bytes = 2 * MIB}, {.offset = 2 * MIB, .bytes = 2 * MIB}};
    int r = bn_gpu_set_gather(to, from, e, 2, &err);
    inject("");
    assert_true(r < 0 && bn_error_is_set(&err));
    assert_ok(bn_gpu_set_gather(to, from, e, 2, &err), &err);
    bn_gpu_set_free(from);
    bn_gpu_set_free(to);
}

/* Memory of `size` bytes that somebody else made: a descriptor of it, and the only one. */
static int memory_of_another(uint64_t size)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_gpu_set *set = make_set(0, 1, &size, 1);
    int fd = fcntl(bn_gpu_set_fd(set, 0, &err), F_DUPFD_CLOEXEC, 0);
    assert_true(fd >= 0);
    bn_gpu_set_free(set);
    return fd;
}

static void swap(void **state)
{
    const uint64_t sizes[] = {2 * MIB, 6 * MIB, 4 * MIB};
    struct bn_error err = BN_ERROR_INIT;
    uint64_t before = gpu_free(0);
    struct bn_gpu_set *set = make_set(0, 6, sizes, 3);
    assert_int_equal(set_fill(copier, set, 8), 0);
    uint64_t with = gpu_free(0);
    for (size_t i = 0; i < 6; i++) {
        int fd = memory_of_another(sizes[i % 3]), same = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        assert_ok(bn_gpu_set_swap(set, i, fd, &err), &err);
        assert_int_equal(bn_gpu_set_fd(set, i, &err), fd);
        assert_int_equal(gpu_free(0), with); /* what it had is gone */

        /* It is that memory, and not a copy. */
        struct bn_gpu_set *other;
        const struct bn_gpu_block block = {.size = sizes[i % 3], .fd = same};
        assert_ok(bn_gpu_set_import(gpu, 0, &block, 1, &other, &err), &err);
        assert_int_equal(gpu_free(0), with);
        bn_gpu_set_free(other);
    }
    assert_int_equal(set_check(copier, set, 8), 0);
    assert_int_equal(set_fill(copier, set, 9), 0);
    assert_int_equal(set_check(copier, set, 9), 0);
    bn_gpu_set_free(set);
    assert_int_equal(gpu_free(0), before);
}

static void swap_fails(void **state)
{
    static const char *const rules[] = {"cuMemImportFromShareableHandle:1=999",
                                        "cuMemAddressReserve:1=2",
                                        "cuMemMap:1=2",
                                        "cuMemSetAccess:1=999",
                                        "cuStreamCreate:1=2",
                                        "cuMemcpyDtoDAsync:1=999",
                                        "cuMemUnmap:2=999",
                                        "cuMemMap:2=2",
                                        "cuMemSetAccess:2=999"};
    const uint64_t size = 4 * MIB;
    uint64_t before = gpu_free(0);
    struct bn_gpu_set *set = make_set(0, 3, &size, 1);
    assert_int_equal(set_fill(copier, set, 8), 0);
    int fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    struct bn_error err = BN_ERROR_INIT;
    assert_true(bn_gpu_set_swap(set, 1, fd, &err) < 0);
    close(fd);
    uint64_t with = gpu_free(0);
    fd = memory_of_another(size);
    for (size_t i = 0; i < BN_ARRAY_SIZE(rules); i++) {
        err = (struct bn_error)BN_ERROR_INIT;
        inject(rules[i]);
        int r = bn_gpu_set_swap(set, 1, fd, &err);
        inject("");
        assert_true(r < 0 && bn_error_is_set(&err));
        assert_int_equal(set_check(copier, set, 8), 0);
        assert_int_equal(gpu_free(0), with - size); /* the other memory is held by `fd` alone */
    }
    err = (struct bn_error)BN_ERROR_INIT;
    assert_ok(bn_gpu_set_swap(set, 1, fd, &err), &err);
    assert_int_equal(set_check(copier, set, 8), 0);
    bn_gpu_set_free(set);
    assert_int_equal(gpu_free(0), before);
}

static void second_process(void **state)
{
    struct {
        uint64_t size[64], expect, leave;
        uint32_t n;
    } order = {.expect = 17, .leave = 18, .n = 20};
    const uint64_t sizes[] = {2 * MIB, 4 * MIB};
    int fds[64], r = -1;
    uint64_t before = gpu_free(0);
    struct bn_error err = BN_ERROR_INIT;

    struct child child = child_start("import", NULL);
    struct bn_gpu_set *set = make_set(0, order.n, sizes, 2);
    assert_int_equal(set_fill(copier, set, order.expect), 0);
    for (uint32_t i = 0; i < order.n; i++) {
        order.size[i] = bn_gpu_set_size(set, i);
        fds[i] = bn_gpu_set_fd(set, i, &err);
        assert_ok(fds[i], &err);
    }
    say(child.sock, &order.n, sizeof(order.n), NULL, 0);
    say(child.sock, &order, sizeof(order), fds, order.n);
    assert_int_equal(hear(child.sock, &r, sizeof(r), NULL, 0), sizeof(r));
    assert_int_equal(r, 0);
    assert_int_equal(set_check(copier, set, order.leave), 0);
    bn_gpu_set_free(set);
    child_end(&child);
    assert_int_equal(gpu_free(0), before);
}

/* ---- The pool ------------------------------------------------------------------------------------------ */

static struct bn_pool *new_pool(uint64_t limit, uint64_t keep, uint64_t slab)
{
    struct bn_pool *pool;
    struct bn_pool_config config = {.limit = limit, .keep = keep, .slab = slab};
    struct bn_error err = BN_ERROR_INIT;
    assert_ok(bn_pool_new(gpu, &config, &pool, &err), &err);
    return pool;
}

static struct bn_mem *get(struct bn_pool *pool, uint64_t bytes)
{
    struct bn_mem *mem;
    struct bn_error err = BN_ERROR_INIT;
    assert_ok(bn_mem_alloc(pool, bytes, &mem, &err), &err);
    return mem;
}

/* Write own bytes everywhere through the pieces. */
static void scribble(struct bn_mem *mem, int value)
{
    uint64_t len;
    for (uint64_t off = 0; off < bn_mem_bytes(mem); off += len) {
        void *p = bn_mem_piece(mem, off, &len, NULL);
        memset(p, value, len);
    }
}

static void holds(struct bn_pool *pool, struct bn_mem *mem, int value)
{
    uint64_t len, at;
    for (uint64_t off = 0; off < bn_mem_bytes(mem); off += len) {
        uint8_t *p = bn_mem_piece(mem, off, &len, &at), b = 0;
        assert_int_equal(p[0], value);
        assert_memory_equal(p, p + 1, len - 1);
        assert_int_equal(pread(bn_pool_fd(pool), &b, 1, (off_t)(at + len - 1)), 1);
        assert_int_equal(b, value);
    }
    assert_null(bn_mem_piece(mem, bn_mem_bytes(mem), NULL, NULL));
}

static void pool_limit(void **state)
{
    struct bn_pool *pool = new_pool(21 * MIB, 0, 8 * MIB); /* 20 MiB: a last slab of 4 */
    struct bn_pool_stats s;
    struct bn_mem *mem = NULL;
    struct bn_error err = BN_ERROR_INIT;
    assert_fails(bn_mem_alloc(pool, 21 * MIB, &mem, &err), ENOMEM, &err);
    err = BN_ERROR_INIT;
    assert_fails(bn_mem_alloc(pool, 0, &mem, &err), EINVAL, &err);
    err = BN_ERROR_INIT;
    assert_fails(bn_mem_alloc(pool, UINT64_MAX, &mem, &err), EINVAL, &err);
    struct bn_mem *all = get(pool, 20 * MIB - 5);
    assert_int_equal(bn_mem_bytes(all), 20 * MIB);
    scribble(all, 1);
    err = BN_ERROR_INIT;
    assert_fails(bn_mem_alloc(pool, 1, &mem, &err), ENOMEM, &err);
    bn_pool_stats(pool, &s);
    assert_true(s.limit == 20 * MIB && s.registered == 20 * MIB && s.used == 20 * MIB &&
                s.grown_bytes == 20 * MIB);
    holds(pool, all, 1);
    bn_mem_free(all);
    bn_pool_trim(pool);
    bn_pool_stats(pool, &s);
    assert_true(s.registered == 0 && s.used == 0);
    bn_mem_free(get(pool, 2 * MIB));
    bn_pool_free(pool);
}

static void pool_pieces(void **state)
{
    struct bn_pool *pool = new_pool(24 * MIB, 8 * MIB, 8 * MIB);
    struct bn_pool_stats s;
    struct bn_mem *m[12];
    for (int i = 0; i < 12; i++)
        scribble(m[i] = get(pool, 2 * MIB), i);
    for (int i = 0; i < 12; i += 2)
        bn_mem_free(m[i]);
    struct bn_mem *holes = get(pool, 12 * MIB); /* only as six pieces */
    scribble(holes, 100);
    holds(pool, holes, 100);
    for (int i = 1; i < 12; i += 2)
        holds(pool, m[i], i);
    for (int i = 1; i < 12; i += 2)
        bn_mem_free(m[i]);
    bn_pool_trim(pool); /* every slab holds a piece */
    holds(pool, holes, 100);
    bn_pool_stats(pool, &s);
    assert_true(s.registered == 24 * MIB && s.used == 12 * MIB);
    bn_mem_free(holes);
    bn_pool_trim(pool);
    bn_pool_stats(pool, &s);
    assert_true(s.registered == 8 * MIB && s.used == 0);
    struct bn_error err = BN_ERROR_INIT;
    assert_ok(bn_pool_reserve(pool, 24 * MIB, &err), &err);
    bn_pool_stats(pool, &s);
    assert_int_equal(s.registered, 24 * MIB);
    bn_pool_free(pool);
}

static void *pool_user(void *arg)
{
    struct bn_pool *pool = arg;
    for (unsigned i = 0; i < 50; i++) {
        struct bn_mem *mem;
        if (bn_mem_alloc(pool, (1 + i % 4) * 2 * MIB, &mem, NULL) < 0)
            return (void *)1;
        int value = (int)(i & 127);
        uint64_t len;
        memset(bn_mem_piece(mem, 0, &len, NULL), value, 4096);
        if (*(uint8_t *)bn_mem_piece(mem, 4095, NULL, NULL) != value)
            return (void *)2;
        bn_mem_free(mem);
        if (i % 10 == 0)
            bn_pool_trim(pool);
    }
    return NULL;
}

static void pool_threads(void **state)
{
    struct bn_pool *pool = new_pool(64 * MIB, 0, 4 * MIB);
    struct bn_pool_stats s;
    pthread_t t[4];
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&t[i], NULL, pool_user, pool), 0);
    for (int i = 0; i < 4; i++) {
        void *r;
        pthread_join(t[i], &r);
        assert_null(r);
    }
    bn_pool_stats(pool, &s);
    assert_int_equal(s.used, 0);
    bn_pool_free(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(devices),        cmocka_unit_test(wrong_drivers),
        cmocka_unit_test(bad_sets),       cmocka_unit_test(sets),
        cmocka_unit_test(set_of_1000),    cmocka_unit_test(foreign_descriptors),
        cmocka_unit_test(pool_limit),     cmocka_unit_test(gather),
        cmocka_unit_test(gather_refused), cmocka_unit_test(gather_fails),
        cmocka_unit_test(swap),           cmocka_unit_test(swap_fails),
        cmocka_unit_test(second_process), cmocka_unit_test(pool_pieces),
        cmocka_unit_test(pool_threads),
    };
    return cmocka_run_group_tests(tests, up, down);
}
