/* Copy jobs: every byte in every mode, failures, cancelling, sharing. */
#include "common.h"

#include <errno.h>
#include <poll.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static struct bn_copier *copier;
static struct bn_pool *pool;

static int up(void **state)
{
    struct bn_copier_config config = {.buffer = 4 * MIB, .workers = 3};
    struct bn_pool_config pc = {.limit = 512 * MIB, .slab = 32 * MIB};
    struct bn_error err = BN_ERROR_INIT;
    if (open_gpu(state) < 0 || bn_pool_new(gpu, &pc, &pool, &err) < 0)
        return -1;
    return bn_copier_new(gpu, &config, &copier, &err);
}

static int down(void **state)
{
    bn_copier_free(copier);
    bn_pool_free(pool);
    return close_gpu(state);
}

static struct bn_gpu_set *some_set(unsigned dev, size_t n)
{
    const uint64_t sizes[] = {2 * MIB, 10 * MIB, 4 * MIB};
    return make_set(dev, n, sizes, 3);
}

static struct bn_mem *get(uint64_t bytes)
{
    struct bn_mem *mem;
    struct bn_error err = BN_ERROR_INIT;
    assert_ok(bn_mem_alloc(pool, bytes, &mem, &err), &err);
    return mem;
}

static void mem_pattern(struct bn_mem *mem, uint64_t seed)
{
    for (uint64_t c = 0; c < bn_mem_bytes(mem) / BN_GPU_CHUNK; c++)
        pattern_fill(bn_mem_piece(mem, c * BN_GPU_CHUNK, NULL, NULL), seed, c, 1);
}

static int mem_check(struct bn_mem *mem, uint64_t seed)
{
    int r = 0;
    for (uint64_t c = 0; r == 0 && c < bn_mem_bytes(mem) / BN_GPU_CHUNK; c++)
        r = pattern_check(bn_mem_piece(mem, c * BN_GPU_CHUNK, NULL, NULL), seed, c, 1);
    return r;
}

static int run(const struct bn_copy_spec *spec, struct bn_error *err)
{
    struct bn_copy *job = NULL;
    int r = bn_copy_start(copier, spec, &job, err);
    if (r == 0)
        r = bn_copy_wait(job, NULL, NULL, 0, err);
    bn_copy_free(job);
    return r;
}

static void note_progress(void *arg, uint64_t done, uint64_t total)
{
    uint64_t *last = arg;
    assert_true(done >= *last && done <= total);
    *last = done;
}

static void direct(void **state)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_gpu_set *set = some_set(0, 24); /* 128 MiB: over four slabs, more than one batch */
    uint64_t bytes = bn_gpu_set_bytes(set), last = 0;
    struct bn_mem *out = get(bytes), *in = get(bytes);

    mem_pattern(in, 3);
    struct bn_copy_spec spec = {.mode = BN_COPY_FROM_HOST, .set = set, .mem = in};
    struct bn_copy *job;
    assert_ok(bn_copy_start(copier, &spec, &job, &err), &err);
    struct pollfd p = {bn_copy_fd(job), POLLIN, 0};
    assert_int_equal(poll(&p, 1, -1), 1);
    assert_true(bn_copy_ended(job));
    assert_ok(bn_copy_wait(job, note_progress, &last, 1, &err), &err);
    assert_ok(bn_copy_wait(job, NULL, NULL, 0, &err), &err);
    assert_int_equal(bn_copy_done(job), bytes);
    assert_int_equal(bn_copy_total(job), bytes);
    bn_copy_free(job);

    assert_int_equal(set_check(copier, set, 3), 0);
    spec = (struct bn_copy_spec){.mode = BN_COPY_TO_HOST, .set = set, .mem = out};
    assert_ok(bn_copy_start(copier, &spec, &job, &err), &err);
    assert_ok(bn_copy_wait(job, note_progress, &last, 1, &err), &err);
    bn_copy_free(job);
    assert_int_equal(mem_check(out, 3), 0);
    bn_mem_free(in);
    bn_mem_free(out);
    bn_gpu_set_free(set);
}

/* Nothing is left on the device: what copies need was made with the context. */
static void full_device(void **state)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_gpu_set *set = some_set(1, 6), *rest = NULL;
    uint64_t bytes = bn_gpu_set_bytes(set);
    struct bn_mem *mem = get(bytes);
    if (!bn_gpu_simulated(gpu)) /* there may be others that allocate on a real one */
        skip();
    assert_int_equal(set_fill(copier, set, 31), 0);
    struct bn_gpu_block all = {.size = gpu_free(1)};
    assert_ok(bn_gpu_set_create(gpu, 1, &all, 1, &rest, &err), &err);
    assert_int_equal(gpu_free(1), 0);

    struct bn_copy_spec spec = {.mode = BN_COPY_TO_HOST, .set = set, .mem = mem};
    assert_ok(run(&spec, &err), &err);
    assert_int_equal(mem_check(mem, 31), 0);
    assert_int_equal(set_check(copier, set, 31), 0);
    mem_pattern(mem, 32);
    spec.mode = BN_COPY_FROM_HOST;
    assert_ok(run(&spec, &err), &err);
    assert_int_equal(set_check(copier, set, 32), 0);
    assert_int_equal(set_fill(copier, set, 33), 0);
    bn_gpu_set_free(rest);
    bn_gpu_set_free(set);
    bn_mem_free(mem);
}

/* Chunks of the set in reverse order, from memory that lies in pieces; odd lengths; what is not named
 * stays as it was. */
static void direct_extents(void **state)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_gpu_set *set = some_set(0, 6);
    uint64_t n = bn_gpu_set_bytes(set) / BN_GPU_CHUNK;
    struct bn_copy_extent e[64];
    struct bn_mem *mem = get(n * BN_GPU_CHUNK), *odd;
    assert_int_equal(set_fill(copier, set, 8), 0);

    for (uint64_t i = 0; i < n; i++)
        e[i] = (struct bn_copy_extent){i * BN_GPU_CHUNK, BN_GPU_CHUNK, (n - 1 - i) * BN_GPU_CHUNK};
    struct bn_copy_spec spec = {.mode = BN_COPY_TO_HOST, .set = set, .mem = mem, .extents = e, .nextents = n};
    assert_ok(run(&spec, &err), &err);
    for (uint64_t i = 0; i < n; i++)
        assert_int_equal(pattern_check(bn_mem_piece(mem, (n - 1 - i) * BN_GPU_CHUNK, NULL, NULL), 8, i, 1),
                         0);

    odd = get(2 * MIB);
    memset(bn_mem_piece(odd, 0, NULL, NULL), 0xee, 2 * MIB);
    e[0] = (struct bn_copy_extent){3 * MIB + 24, 1001, 5};
    e[1] = (struct bn_copy_extent){0, 0, 0};
    spec =
        (struct bn_copy_spec){.mode = BN_COPY_FROM_HOST, .set = set, .mem = odd, .extents = e, .nextents = 2};
    assert_ok(run(&spec, &err), &err);
    spec = (struct bn_copy_spec){.mode = BN_COPY_TO_HOST, .set = set, .mem = mem};
    assert_ok(run(&spec, &err), &err);
    uint8_t *p = bn_mem_piece(mem, 2 * MIB, NULL, NULL), *expect = malloc(BN_GPU_CHUNK);
    pattern_fill(expect, 8, 1, 1);
    memset(expect + MIB + 24, 0xee, 1001);
    assert_memory_equal(p, expect, BN_GPU_CHUNK);
    free(expect);

    spec.nextents = 0; /* nothing to do */
    spec.extents = e;
    assert_ok(run(&spec, &err), &err);
    bn_mem_free(odd);
    bn_mem_free(mem);
    bn_gpu_set_free(set);
}

static void bad_specs(void **state)
{
    struct bn_gpu_set *set = some_set(0, 2);
    struct bn_mem *mem = get(4 * MIB);
    const struct bn_copy_extent bad[] = {
        {bn_gpu_set_bytes(set), 1, 0},
        {0, 5 * MIB, 0},
        {0, 2 * MIB, 3 * MIB},
        {UINT64_MAX, 2, 0},
        {2, UINT64_MAX, 0},
        {0, 1, UINT64_MAX},
    };
    for (size_t i = 0; i < BN_ARRAY_SIZE(bad); i++) {
        struct bn_error err = BN_ERROR_INIT;
        struct bn_copy_spec spec = {
            .mode = BN_COPY_TO_HOST, .set = set, .mem = mem, .extents = &bad[i], .nextents = 1};
        assert_fails(run(&spec, &err), EINVAL, &err);
    }
    struct bn_error err = BN_ERROR_INIT;
    struct bn_copy_spec whole = {.mode = BN_COPY_TO_HOST, .set = set, .mem = mem};
    assert_fails(run(&whole, &err), EINVAL, &err); /* mem is smaller than the set */
    err = BN_ERROR_INIT;
    struct bn_copy_spec none = {.mode = BN_COPY_OUT, .set = set};
    assert_fails(run(&none, &err), EINVAL, &err);
    bn_mem_free(mem);
    bn_gpu_set_free(set);
}

/* ---- Streamed ------------------------------------------------------------------------------------------ */

struct seen {
    uint64_t seed;
    atomic_uint count[256];
    atomic_uint calls;
    atomic_uint most; /* chunks at a time */
    uint64_t fail_at; /* chunk */
    int code;
    bool with_text;
    sem_t started, go;
    bool wait;
};

static int visit(struct seen *s, uint64_t chunk, unsigned n, struct bn_error *err)
{
    atomic_fetch_add(&s->calls, 1);
    for (unsigned most = s->most; n > most && !atomic_compare_exchange_weak(&s->most, &most, n);)
        ;
    for (unsigned i = 0; i < n; i++) {
        atomic_fetch_add(&s->count[chunk + i], 1);
        if (s->code && chunk + i == s->fail_at)
            return s->with_text ? bn_error_set(err, s->code, "visit", "The disk is full, says the test.")
                                : s->code;
    }
    if (s->wait) {
        sem_post(&s->started);
        sem_wait(&s->go);
        sem_post(&s->go);
    }
    return 0;
}

static int consume(void *arg, uint64_t chunk, unsigned n, const void *data, struct bn_error *err)
{
    struct seen *s = arg;
    int r = visit(s, chunk, n, err);
    return r < 0 ? r : pattern_check(data, s->seed, chunk, n);
}

static int produce(void *arg, uint64_t chunk, unsigned n, void *data, struct bn_error *err)
{
    struct seen *s = arg;
    pattern_fill(data, s->seed, chunk, n);
    return visit(s, chunk, n, err);
}

static void streamed(void **state)
{
    struct bn_gpu_set *set = some_set(0, 24);
    uint64_t n = bn_gpu_set_bytes(set) / BN_GPU_CHUNK;
    const unsigned workers[] = {0, 1, 2, 5, 64};
    for (size_t w = 0; w < BN_ARRAY_SIZE(workers); w++) {
        for (int in = 1; in >= 0; in--) {
            struct seen s = {.seed = 40 + w};
            struct bn_error err = BN_ERROR_INIT;
            struct bn_copy_spec spec = {.mode = in ? BN_COPY_IN : BN_COPY_OUT,
                                        .set = set,
                                        .consume = consume,
                                        .produce = produce,
                                        .arg = &s,
                                        .workers = workers[w]};
            assert_ok(run(&spec, &err), &err);
            for (uint64_t i = 0; i < 256; i++)
                assert_int_equal(s.count[i], i < n ? 1 : 0);
        }
    }
    bn_gpu_set_free(set);
}

/* A staging buffer holds two chunks here. */
static void streamed_in_pieces(void **state)
{
    struct bn_gpu_set *set = some_set(0, 24);
    const struct {
        uint64_t piece;
        unsigned most; /* chunks */
    } cases[] = {{0, 2}, {2 * MIB, 1}, {3 * MIB, 1}, {4 * MIB, 2}, {64 * MIB, 2}, {1, 1}};
    for (size_t i = 0; i < BN_ARRAY_SIZE(cases); i++) {
        struct seen s = {.seed = 60};
        struct bn_error err = BN_ERROR_INIT;
        struct bn_copy_spec spec = {
            .mode = BN_COPY_IN, .set = set, .produce = produce, .arg = &s, .piece = cases[i].piece};
        assert_ok(run(&spec, &err), &err);
        assert_int_equal(s.most, cases[i].most);
    }
    assert_int_equal(set_check(copier, set, 60), 0);
    bn_gpu_set_free(set);
}

static void streamed_extents(void **state)
{
    struct bn_gpu_set *set = some_set(0, 6);
    struct bn_error err = BN_ERROR_INIT;
    assert_int_equal(set_fill(copier, set, 1), 0);
    struct bn_copy_extent e[] = {{10 * MIB, 6 * MIB, 0}, {2 * MIB, 2 * MIB, 0}};
    struct seen s = {.seed = 2};
    struct bn_copy_spec spec = {
        .mode = BN_COPY_IN, .set = set, .produce = produce, .arg = &s, .extents = e, .nextents = 2};
    assert_ok(run(&spec, &err), &err);
    struct bn_mem *mem = get(bn_gpu_set_bytes(set));
    struct bn_copy_spec out = {.mode = BN_COPY_TO_HOST, .set = set, .mem = mem};
    assert_ok(run(&out, &err), &err);
    for (uint64_t i = 0; i < bn_gpu_set_bytes(set) / BN_GPU_CHUNK; i++) {
        bool changed = i == 1 || (i >= 5 && i < 8);
        assert_int_equal(s.count[i], changed);
        assert_int_equal(
            pattern_check(bn_mem_piece(mem, i * BN_GPU_CHUNK, NULL, NULL), changed ? 2 : 1, i, 1), 0);
    }
    e[0].offset = MIB;
    assert_fails(run(&spec, &err), EINVAL, &err);
    bn_mem_free(mem);
    bn_gpu_set_free(set);
}

static void callback_fails(void **state)
{
    struct bn_gpu_set *set = some_set(0, 12);
    assert_int_equal(set_fill(copier, set, 6), 0);
    for (int i = 0; i < 8; i++) {
        struct seen s = {.seed = 6, .fail_at = i < 4 ? 0 : 20, .code = -ENOSPC, .with_text = i & 1};
        struct bn_error err = BN_ERROR_INIT;
        struct bn_copy_spec spec = {.mode = i & 2 ? BN_COPY_IN : BN_COPY_OUT,
                                    .set = set,
                                    .consume = consume,
                                    .produce = produce,
                                    .arg = &s};
        struct bn_copy *job;
        assert_ok(bn_copy_start(copier, &spec, &job, &err), &err);
        assert_fails(bn_copy_wait(job, NULL, NULL, 0, &err), ENOSPC, &err);
        assert_true(bn_copy_done(job) < bn_copy_total(job));
        if (s.with_text)
            assert_string_equal(err.text, "The disk is full, says the test.");
        bn_copy_free(job);
    }
    assert_int_equal(set_fill(copier, set, 7), 0); /* buffers came back */
    assert_int_equal(set_check(copier, set, 7), 0);
    bn_gpu_set_free(set);
}

static void cancelled(void **state)
{
    struct bn_gpu_set *set = some_set(0, 12);
    assert_int_equal(set_fill(copier, set, 6), 0);
    for (int in = 0; in < 2; in++) {
        struct seen s = {.seed = 6, .wait = true};
        struct bn_error err = BN_ERROR_INIT;
        struct bn_copy_spec spec = {.mode = in ? BN_COPY_IN : BN_COPY_OUT,
                                    .set = set,
                                    .consume = consume,
                                    .produce = produce,
                                    .arg = &s};
        struct bn_copy *job;
        sem_init(&s.started, 0, 0);
        sem_init(&s.go, 0, 0);
        assert_ok(bn_copy_start(copier, &spec, &job, &err), &err);
        sem_wait(&s.started);
        assert_false(bn_copy_ended(job));
        bn_copy_cancel(job);
        sem_post(&s.go);
        assert_fails(bn_copy_wait(job, NULL, NULL, 0, &err), ECANCELED, &err);
        assert_true(bn_copy_done(job) < bn_copy_total(job));
        assert_true(s.calls <= 6);
        bn_copy_free(job);
    }
    /* Freed while it runs; and cancelled before it does anything, or after all is done. */
    struct bn_mem *mem = get(bn_gpu_set_bytes(set));
    for (int i = 0; i < 20; i++) {
        struct bn_error err = BN_ERROR_INIT;
        struct bn_copy_spec spec = {.mode = BN_COPY_TO_HOST, .set = set, .mem = mem};
        struct bn_copy *job;
        assert_ok(bn_copy_start(copier, &spec, &job, &err), &err);
        if (i % 2) {
            bn_copy_cancel(job);
            int r = bn_copy_wait(job, NULL, NULL, 0, &err);
            assert_true(r == -ECANCELED || (r == 0 && bn_copy_done(job) == bn_copy_total(job)));
        }
        bn_copy_free(job);
    }
    bn_mem_free(mem);
    bn_gpu_set_free(set);
}

/* More jobs than staging buffers, on all devices, in both directions. */
static void many_jobs(void **state)
{
    struct bn_copier_config config = {.buffer = 2 * MIB, .workers = 2, .buffers = 6};
    struct bn_copier *small;
    struct bn_error err = BN_ERROR_INIT;
    enum { JOBS = 8 };
    struct bn_gpu_set *sets[JOBS];
    struct bn_copy *jobs[JOBS];
    struct seen seen[JOBS] = {0};
    assert_ok(bn_copier_new(gpu, &config, &small, &err), &err);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < JOBS; i++) {
            if (round == 0)
                sets[i] = some_set((unsigned)i % bn_gpu_count(gpu), 6);
            seen[i] = (struct seen){.seed = (uint64_t)i};
            struct bn_copy_spec spec = {.mode = round ? BN_COPY_OUT : BN_COPY_IN,
                                        .set = sets[i],
                                        .consume = consume,
                                        .produce = produce,
                                        .arg = &seen[i]};
            assert_ok(bn_copy_start(small, &spec, &jobs[i], &err), &err);
        }
        for (int i = 0; i < JOBS; i++) {
            assert_ok(bn_copy_wait(jobs[i], NULL, NULL, 0, &err), &err);
            bn_copy_free(jobs[i]);
        }
    }

    /* One that waits for buffers can be cancelled. */
    struct seen hold = {.seed = 0, .wait = true}, never = {.seed = 1};
    sem_init(&hold.started, 0, 0);
    sem_init(&hold.go, 0, 0);
    struct bn_copy_spec spec = {
        .mode = BN_COPY_OUT, .set = sets[0], .consume = consume, .arg = &hold, .workers = 3};
    assert_ok(bn_copy_start(small, &spec, &jobs[0], &err), &err);
    for (int i = 0; i < 3; i++) /* all buffers are lent */
        sem_wait(&hold.started);
    spec.set = sets[1];
    spec.arg = &never;
    assert_ok(bn_copy_start(small, &spec, &jobs[1], &err), &err);
    bn_copy_cancel(jobs[1]);
    assert_fails(bn_copy_wait(jobs[1], NULL, NULL, 0, &err), ECANCELED, &err);
    assert_int_equal(never.calls, 0);
    sem_post(&hold.go);
    err = BN_ERROR_INIT;
    assert_ok(bn_copy_wait(jobs[0], NULL, NULL, 0, &err), &err);
    for (int i = 0; i < 2; i++)
        bn_copy_free(jobs[i]);
    for (int i = 0; i < JOBS; i++)
        bn_gpu_set_free(sets[i]);
    bn_copier_free(small);
}

/* A large job that was first and a small one, with buffers for one of them. */
struct shared {
    atomic_uint large, small; /* calls */
    unsigned large_at_end;    /* of the small one */
};
#define LARGE_CALLS 32u
#define SMALL_CALLS 8u

static int large_call(void *arg, uint64_t chunk, unsigned n, const void *data, struct bn_error *err)
{
    struct shared *s = arg;
    unsigned before = atomic_load(&s->small);
    atomic_fetch_add(&s->large, 1);
    for (int i = 0; i < 100 && before < SMALL_CALLS && atomic_load(&s->small) == before; i++)
        usleep(1000); /* until the small one gets on, or not */
    return 0;
}

static int small_call(void *arg, uint64_t chunk, unsigned n, const void *data, struct bn_error *err)
{
    struct shared *s = arg;
    if (atomic_fetch_add(&s->small, 1) + 1 == SMALL_CALLS)
        s->large_at_end = atomic_load(&s->large);
    return 0;
}

static void shared_buffers(void **state)
{
    struct bn_copier_config config = {.buffer = 2 * MIB, .workers = 1, .buffers = 2};
    struct bn_gpu_set *large = some_set(0, 12), *small = some_set(0, 3);
    struct bn_copier *c;
    struct bn_copy *jobs[2];
    struct shared s = {0};
    struct bn_error err = BN_ERROR_INIT;
    assert_ok(bn_copier_new(gpu, &config, &c, &err), &err);
    struct bn_copy_spec spec = {.mode = BN_COPY_OUT, .set = large, .consume = large_call, .arg = &s};
    assert_ok(bn_copy_start(c, &spec, &jobs[0], &err), &err);
    while (atomic_load(&s.large) == 0)
        usleep(1000);
    spec.set = small;
    spec.consume = small_call;
    assert_ok(bn_copy_start(c, &spec, &jobs[1], &err), &err);
    for (int i = 0; i < 2; i++) {
        assert_ok(bn_copy_wait(jobs[i], NULL, NULL, 0, &err), &err);
        bn_copy_free(jobs[i]);
    }
    assert_int_equal(atomic_load(&s.large), LARGE_CALLS);
    assert_int_equal(atomic_load(&s.small), SMALL_CALLS);
    assert_in_range(s.large_at_end, 1, LARGE_CALLS - 1); /* it did not wait for the end of the large one */
    bn_gpu_set_free(large);
    bn_gpu_set_free(small);
    bn_copier_free(c);
}

/* ---- Every call of the driver fails once --------------------------------------------------------------- */

/* Create, import, all four ways of copying, give back. */
static int scenario(struct bn_error *err)
{
    struct bn_gpu_block block[3] = {{.size = 2 * MIB}, {.size = 4 * MIB}, {.size = 2 * MIB}};
    struct bn_gpu_set *set = NULL, *again = NULL;
    struct bn_pool *p = NULL;
    struct bn_mem *mem = NULL;
    struct bn_copier *c = NULL;
    struct bn_pool_config pc = {.limit = 16 * MIB, .slab = 4 * MIB};
    struct bn_copier_config cc = {.buffer = 2 * MIB, .workers = 2};
    int fds[3] = {-1, -1, -1};

    int r = bn_gpu_set_create(gpu, 0, block, 3, &set, err);
    for (size_t i = 0; r >= 0 && i < 3; i++)
        if ((r = bn_gpu_set_fd(set, i, err)) >= 0)
            block[i].fd = fds[i] = dup(r);
    if (r >= 0 && (r = bn_gpu_set_import(gpu, 0, block, 3, &again, err)) >= 0)
        fds[0] = fds[1] = fds[2] = -1;
    if (r >= 0)
        r = bn_pool_new(gpu, &pc, &p, err);
    if (r >= 0)
        r = bn_mem_alloc(p, 8 * MIB, &mem, err);
    if (r >= 0)
        r = bn_copier_new(gpu, &cc, &c, err);
    for (int mode = 0; r >= 0 && mode < 4; mode++) {
        const enum bn_copy_mode modes[] = {BN_COPY_IN, BN_COPY_TO_HOST, BN_COPY_FROM_HOST, BN_COPY_OUT};
        struct seen s = {.seed = 77};
        struct bn_copy_spec spec = {.mode = modes[mode],
                                    .set = mode % 2 ? again : set,
                                    .mem = mem,
                                    .consume = consume,
                                    .produce = produce,
                                    .arg = &s};
        struct bn_copy *job = NULL;
        r = bn_copy_start(c, &spec, &job, err);
        if (r >= 0)
            r = bn_copy_wait(job, NULL, NULL, 0, err);
        bn_copy_free(job);
    }
    bn_copier_free(c);
    bn_mem_free(mem);
    bn_pool_free(p);
    bn_gpu_set_free(again);
    bn_gpu_set_free(set);
    for (size_t i = 0; i < 3; i++)
        bn_close(fds[i]);
    return r < 0 ? r : 0;
}

/* Memory that pools hold of the machine's: what lies in memfds of theirs. */
static uint64_t pinned(void)
{
    uint64_t blocks = 0;
    for (int fd = 3; fd < 256; fd++) {
        char link[64], name[64];
        struct stat st;
        snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, name, sizeof(name) - 1);
        if (n > 0 && (name[n] = 0, strncmp(name, "/memfd:bennu-pool", 17) == 0) && fstat(fd, &st) == 0)
            blocks += (uint64_t)st.st_blocks;
    }
    return blocks;
}

static int look_only(void *arg, uint64_t chunk, unsigned nchunks, const void *data, struct bn_error *err)
{
    (void)arg, (void)chunk, (void)nchunks, (void)data, (void)err;
    return 0;
}

/* Staging buffers that somebody holds are the same memory in the next job. */
static void held_buffers(void **state)
{
    struct bn_copier_config config = {.buffer = 2 * MIB, .workers = 1, .buffers = 2};
    struct bn_gpu_set *set = some_set(0, 3);
    struct bn_copier *c;
    struct bn_copy *job;
    struct bn_error err = BN_ERROR_INIT;
    uint64_t before = pinned();
    assert_ok(bn_copier_new(gpu, &config, &c, &err), &err);
    bn_copier_hold(c);
    struct bn_copy_spec spec = {.mode = BN_COPY_OUT, .set = set, .consume = look_only};
    assert_ok(bn_copy_start(c, &spec, &job, &err), &err);
    assert_ok(bn_copy_wait(job, NULL, NULL, 0, &err), &err);
    bn_copy_free(job);
    uint64_t used = pinned();
    assert_true(used > before);
    bn_copier_trim(c);
    assert_int_equal(pinned(), used);
    bn_copier_let_go(c);
    bn_copier_trim(c);
    assert_int_equal(pinned(), before);
    bn_gpu_set_free(set);
    bn_copier_free(c);
}

/* What copies need is made with the context or not at all, and then at the next try. */
static void context_fails(void **state)
{
    static const char *const rules[] = {
        "cuDevicePrimaryCtxRetain:1=2", "cuCtxPushCurrent:1=2", "cuStreamCreate:1=2",
        "cuStreamCreate:7=2",           "cuEventCreate:2=2",    "cuEventCreate:33=2"};
    for (size_t i = 0; i < BN_ARRAY_SIZE(rules); i++) {
        struct bn_error err = BN_ERROR_INIT;
        struct bn_gpu *other;
        assert_ok(bn_gpu_open(driver_path(), &other, &err), &err);
        inject(rules[i]);
        assert_fails(bn_gpu_warm(other, 1, &err), ENOMEM, &err);
        assert_ok(bn_gpu_warm(other, 1, &err), &err);
        inject("");
        bn_gpu_close(other);
    }
}

static void every_call_fails(void **state)
{
    static const char *const calls[] = {
        "cuCtxPushCurrent",
        "cuMemCreate",
        "cuMemExportToShareableHandle",
        "cuMemImportFromShareableHandle",
        "cuMemAddressReserve",
        "cuMemMap",
        "cuMemSetAccess",
        "cuMemHostRegister",
        "cuMemcpyDtoHAsync",
        "cuMemcpyHtoDAsync",
        "cuEventRecord",
        "cuEventSynchronize",
    };
    char rule[96];
    struct bn_error err = BN_ERROR_INIT;
    inject("");
    assert_ok(scenario(&err), &err);
    uint64_t before = gpu_free(0);
    unsigned fds = open_fds();
    for (size_t i = 0; i < BN_ARRAY_SIZE(calls); i++) {
        unsigned failures = 0;
        for (unsigned nth = 1, fine = 0; nth < 40 && !fine; nth++) {
            snprintf(rule, sizeof(rule), "%s:%u=%d", calls[i], nth, nth % 2 ? 2 : 999);
            inject(rule);
            err = BN_ERROR_INIT;
            int r = scenario(&err);
            inject("");
            if (r < 0)
                assert_fails(r, nth % 2 ? ENOMEM : EIO, &err);
            /* A context that cannot be entered while something is freed is not an error: it was freed
             * without. */
            fine = r == 0;
            failures += r < 0;
            assert_int_equal(gpu_free(0), before);
            assert_int_equal(open_fds(), fds);
        }
        assert_true(failures > 0);
    }
    assert_ok(scenario(&err), &err);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(full_device),        cmocka_unit_test(direct),
        cmocka_unit_test(direct_extents),     cmocka_unit_test(bad_specs),
        cmocka_unit_test(streamed),           cmocka_unit_test(streamed_extents),
        cmocka_unit_test(streamed_in_pieces), cmocka_unit_test(callback_fails),
        cmocka_unit_test(cancelled),          cmocka_unit_test(many_jobs),
        cmocka_unit_test(shared_buffers),     cmocka_unit_test(held_buffers),
        cmocka_unit_test(context_fails),      cmocka_unit_test(every_call_fails),
    };
    return cmocka_run_group_tests(tests, up, down);
}
