/* Chunks hashed on the device: the CPU's values, and what happens when a device cannot be believed. */
#include "common.h"

#include "gpu/hash.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static struct bn_copier *copier;

static const uint8_t key_bytes[2][BN_HASH_KEY_SIZE] = {{1, 2, 3}, {250, 1, 7, 9}};

static int start(void **state)
{
    if (open_gpu(state) < 0)
        return -1;
    struct bn_copier_config config = {.buffer = 2 * MIB, .workers = 2};
    return bn_copier_new(gpu, &config, &copier, NULL);
}

static int stop(void **state)
{
    bn_copier_free(copier);
    return close_gpu(state);
}

/* A driver opened anew, whose devices have not been tested yet. */
static struct bn_gpu *fresh(void)
{
    struct bn_gpu *other;
    struct bn_error err = BN_ERROR_INIT;
    assert_ok(bn_gpu_open(driver_path(), &other, &err), &err);
    return other;
}

struct expect {
    const struct bn_hash_key *key;
    struct bn_hash *values;
};

static int on_cpu(void *arg, uint64_t chunk, unsigned n, const void *data, struct bn_error *err)
{
    (void)err;
    struct expect *e = arg;
    for (unsigned i = 0; i < n; i++)
        bn_hash_chunk(e->key, (const uint8_t *)data + i * BN_GPU_CHUNK, BN_GPU_CHUNK, &e->values[chunk + i]);
    return 0;
}

/* What the CPU says of the memory as it comes out of a copy. */
static void hash_copy(struct bn_gpu_set *set, const struct bn_hash_key *key, struct bn_hash *values)
{
    struct bn_error err = BN_ERROR_INIT;
    struct expect e = {key, values};
    struct bn_copy_spec spec = {.mode = BN_COPY_OUT, .set = set, .consume = on_cpu, .arg = &e};
    struct bn_copy *job;
    assert_ok(bn_copy_start(copier, &spec, &job, &err), &err);
    assert_ok(bn_copy_wait(job, NULL, NULL, 0, &err), &err);
    bn_copy_free(job);
}

#define CHUNKS 21

static void test_values(void **state)
{
    (void)state;
    struct bn_error err = BN_ERROR_INIT;
    const uint64_t sizes[] = {2 * MIB, 6 * MIB, 34 * MIB};
    for (unsigned dev = 0; dev < bn_gpu_count(gpu) && dev < 2; dev++) {
        assert_ok(bn_gpu_hash_ready(gpu, dev, &err), &err);
        struct bn_gpu_set *set = make_set(dev, 3, sizes, 3);
        assert_ok(set_fill(copier, set, 5), &err);
        for (unsigned k = 0; k < 4; k++) { /* keys alternate: the material of one replaces the other's */
            struct bn_hash_key *key = bn_hash_key_new(key_bytes[k % 2]);
            struct bn_hash want[CHUNKS], got[CHUNKS], part[5];
            hash_copy(set, key, want);
            assert_ok(bn_gpu_hash(gpu, set, key, 0, CHUNKS, got, &err), &err);
            assert_memory_equal(got, want, sizeof(want));
            assert_ok(bn_gpu_hash(gpu, set, key, 3, 5, part, &err), &err);
            assert_memory_equal(part, want + 3, sizeof(part));
            assert_ok(bn_gpu_hash(gpu, set, key, CHUNKS, 0, part, &err), &err);
            bn_hash_key_free(key);
        }
        bn_gpu_set_free(set);
    }
}

static void test_limits(void **state)
{
    (void)state;
    const uint64_t sizes[] = {4 * MIB};
    struct bn_gpu_set *set = make_set(0, 1, sizes, 1);
    struct bn_hash_key *key = bn_hash_key_new(key_bytes[0]);
    struct bn_hash out[3];
    struct bn_error err = BN_ERROR_INIT;
    assert_fails(bn_gpu_hash(gpu, set, key, 0, 3, out, &err), EINVAL, &err);
    err = BN_ERROR_INIT;
    assert_fails(bn_gpu_hash(gpu, set, key, 3, 0, out, &err), EINVAL, &err);
    err = BN_ERROR_INIT;
    assert_fails(bn_gpu_hash_ready(gpu, 77, &err), ENODEV, &err);
    bn_hash_key_free(key);
    bn_gpu_set_free(set);
}

static void refused(struct bn_gpu *g, const char *part)
{
    struct bn_error err = BN_ERROR_INIT;
    assert_fails(bn_gpu_hash_ready(g, 0, &err), ENOTSUP, &err);
    assert_non_null(strstr(err.text, part));
}

static void test_wrong_values(void **state)
{
    (void)state;
    inject("");
    struct bn_gpu *g = fresh();
    setenv("BENNU_SIM_HASH", "wrong", 1);
    refused(g, "other hashes than the CPU");
    unsetenv("BENNU_SIM_HASH");
    refused(g, "other hashes than the CPU"); /* once off, off */
    struct bn_error err = BN_ERROR_INIT;
    assert_ok(bn_gpu_hash_ready(g, 1, &err), &err); /* each device speaks for itself */
    bn_gpu_close(g);
}

static void test_no_kernel(void **state)
{
    (void)state;
    static const char *const calls[] = {"cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"};
    for (size_t i = 0; i < BN_ARRAY_SIZE(calls); i++) {
        char rules[64];
        struct bn_gpu *g = fresh();
        snprintf(rules, sizeof(rules), "%s:1=222", calls[i]);
        inject(rules);
        refused(g, "GPU 0");
        inject("");
        refused(g, "GPU 0");
        bn_gpu_close(g);
    }
}

/* No memory is no verdict. */
static void test_no_memory(void **state)
{
    (void)state;
    struct bn_gpu *g = fresh();
    struct bn_error err = BN_ERROR_INIT;
    inject("cuMemCreate:1=2");
    assert_fails(bn_gpu_hash_ready(g, 0, &err), ENOMEM, &err);
    inject("");
    err = BN_ERROR_INIT;
    assert_ok(bn_gpu_hash_ready(g, 0, &err), &err);
    bn_gpu_close(g);
}

/* A device that fails when it is used is not asked again. */
static void test_failure_later(void **state)
{
    (void)state;
    inject("");
    struct bn_gpu *g = fresh();
    struct bn_gpu_set *set;
    struct bn_error err = BN_ERROR_INIT;
    struct bn_gpu_block block = {.size = 2 * MIB};
    assert_ok(bn_gpu_set_create(g, 0, &block, 1, &set, &err), &err);
    assert_ok(bn_gpu_hash_ready(g, 0, &err), &err);
    struct bn_hash_key *key = bn_hash_key_new(key_bytes[0]);
    struct bn_hash out;
    inject("cuLaunchKernel:1=1");
    assert_fails(bn_gpu_hash(g, set, key, 0, 1, &out, &err), ENOTSUP, &err);
    inject("");
    err = BN_ERROR_INIT;
    assert_fails(bn_gpu_hash(g, set, key, 0, 1, &out, &err), ENOTSUP, &err);
    bn_hash_key_free(key);
    bn_gpu_set_free(set);
    bn_gpu_close(g);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_values),       cmocka_unit_test(test_limits),
        cmocka_unit_test(test_wrong_values), cmocka_unit_test(test_no_kernel),
        cmocka_unit_test(test_no_memory),    cmocka_unit_test(test_failure_later),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
