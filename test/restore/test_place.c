/* Which GPU takes the place of which: the pairs that a driver is given. On three simulated GPUs. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "restore/place.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct bn_gpu *gpu;
static char ledger[64];

static int make(void **state)
{
    char path[4096], machine[32];
    struct bn_error err = BN_ERROR_INIT;
    const char *build = getenv("BENNU_BUILD");
    (void)state;
    snprintf(path, sizeof(path), "%s/sim/libcuda.so.1", build ? build : "build");
    snprintf(machine, sizeof(machine), "place%d", (int)getpid());
    snprintf(ledger, sizeof(ledger), "/dev/shm/cuda-sim.%s", machine);
    setenv("BENNU_SIM_MACHINE", machine, 1);
    setenv("BENNU_SIM_DEVICES", "3", 1);
    if (bn_gpu_open(path, &gpu, &err) < 0)
        fail_msg("%s", err.text);
    return 0;
}

static int drop(void **state)
{
    (void)state;
    bn_gpu_close(gpu);
    unlink(ledger);
    return 0;
}

static const uint8_t *here(unsigned dev)
{
    return bn_gpu_info(gpu, dev)->uuid;
}

static const uint8_t *elsewhere(unsigned dev)
{
    static uint8_t uuids[8][16];
    memset(uuids[dev], (int)(0xa0 + dev), 16);
    return uuids[dev];
}

/* An image with memory on the first `used` of `n` GPUs. */
static struct bn_manifest *image(const uint8_t *(*uuid)(unsigned), unsigned used, unsigned n)
{
    struct bn_manifest *m = bn_manifest_new();
    assert_non_null(m);
    for (unsigned i = 0; i < used; i++) {
        const struct bn_gpu_info *info = bn_gpu_info(gpu, 0);
        struct bn_image_gpu *g = bn_manifest_add_gpu(m);
        assert_non_null(g);
        snprintf(g->name, sizeof(g->name), "%s", info->name);
        g->cc_major = info->major;
        g->cc_minor = info->minor;
        g->bytes = info->total;
        memcpy(g->uuid, uuid(i), 16);
    }
    for (unsigned i = used; i < n; i++)
        memcpy(*bn_manifest_add_other(m), uuid(i), 16);
    return m;
}

static struct bn_ckpt_pairs pairs_of(const struct bn_manifest *m)
{
    static struct bn_place place;
    struct bn_error err = BN_ERROR_INIT;
    if (bn_place_gpus(gpu, m, &place, &err) < 0)
        fail_msg("%s", err.text);
    return place.pairs;
}

static void assert_pair(const struct bn_ckpt_pairs *pairs, size_t i, const uint8_t *from, const uint8_t *to)
{
    assert_true(i < pairs->n);
    assert_memory_equal(pairs->v[i].from, from, 16);
    assert_memory_equal(pairs->v[i].to, to, 16);
}

static void same_gpus(void **state)
{
    (void)state;
    for (unsigned used = 1; used <= 3; used++) {
        bn_auto_manifest struct bn_manifest *m = image(here, used, 3);
        assert_int_equal(pairs_of(m).n, 0);
    }
}

/* All GPUs of the other machine, those with memory first, and no other. */
static void another_machine(void **state)
{
    (void)state;
    for (unsigned n = 1; n <= 3; n++)
        for (unsigned used = 1; used <= n; used++) {
            bn_auto_manifest struct bn_manifest *m = image(elsewhere, used, n);
            struct bn_ckpt_pairs pairs = pairs_of(m);
            assert_int_equal(pairs.n, n);
            assert_int_equal(pairs.used, used);
            for (unsigned i = 0; i < n; i++)
                assert_pair(&pairs, i, elsewhere(i), here(i));
        }
}

/* No two come to be one, whatever has to be left out. */
static void another_machine_with_more(void **state)
{
    (void)state;
    bn_auto_manifest struct bn_manifest *m = image(elsewhere, 2, 8);
    struct bn_ckpt_pairs pairs = pairs_of(m);
    assert_int_equal(pairs.used, 2);
    assert_true(pairs.n >= 3);
    for (size_t i = 0; i < pairs.n; i++)
        for (size_t j = 0; j < i; j++)
            assert_memory_not_equal(pairs.v[i].to, pairs.v[j].to, 16);
}

/* One GPU of the image is not here any more, and takes another's place: what is not displaced stays. */
static void one_is_gone(void **state)
{
    (void)state;
    bn_auto_manifest struct bn_manifest *m = image(elsewhere, 1, 1);
    memcpy(*bn_manifest_add_other(m), here(2), 16);
    memcpy(*bn_manifest_add_other(m), here(0), 16);
    struct bn_ckpt_pairs pairs = pairs_of(m);
    assert_int_equal(pairs.n, 3);
    assert_pair(&pairs, 0, elsewhere(0), here(0));
    assert_pair(&pairs, 1, here(2), here(2));
    assert_pair(&pairs, 2, here(0), here(1));
}

/* What an image says twice, or of a GPU that it uses, is heard once. */
static void said_twice(void **state)
{
    (void)state;
    bn_auto_manifest struct bn_manifest *m = image(elsewhere, 1, 2);
    memcpy(*bn_manifest_add_other(m), elsewhere(1), 16);
    memcpy(*bn_manifest_add_other(m), elsewhere(0), 16);
    assert_int_equal(pairs_of(m).n, 2);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_gpus),   cmocka_unit_test(another_machine),
        cmocka_unit_test(one_is_gone), cmocka_unit_test(another_machine_with_more),
        cmocka_unit_test(said_twice),
    };
    return cmocka_run_group_tests(tests, make, drop);
}
