/* The hash against the vectors of the independent reference, and its own properties. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "image/hash.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK BN_HASH_LENGTH_MAX

static uint64_t mix(uint64_t *state)
{
    uint64_t z = *state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
}

static void fill(const char *pattern, uint8_t *p, size_t len)
{
    uint64_t state = 0, word = 0;
    for (size_t i = 0; i < len; i++)
        if (strcmp(pattern, "zero") == 0)
            p[i] = 0;
        else if (strcmp(pattern, "ones") == 0)
            p[i] = 0xff;
        else if (strcmp(pattern, "count") == 0)
            p[i] = (uint8_t)(i + (i >> 8));
        else {
            assert_string_equal(pattern, "mix");
            if (i % 8 == 0)
                word = mix(&state);
            p[i] = (uint8_t)(word >> (8 * (i % 8)));
        }
}

static void unhex(const char *hex, uint8_t *out, size_t n)
{
    assert_int_equal(strlen(hex), 2 * n);
    for (size_t i = 0; i < n; i++) {
        unsigned v;
        assert_int_equal(sscanf(hex + 2 * i, "%2x", &v), 1);
        out[i] = (uint8_t)v;
    }
}

static void test_vectors(void **state)
{
    (void)state;
    FILE *f = fopen(TEST_GOLDEN "/hash_vectors.txt", "re");
    assert_non_null(f);
    char line[256], key_hex[64], pattern[16], hash_hex[64];
    unsigned seen = 0;
    while (fgets(line, sizeof(line), f)) {
        if (line[0] == '#')
            continue;
        size_t len;
        assert_int_equal(sscanf(line, "%63s %15s %zu %63s", key_hex, pattern, &len, hash_hex), 4);
        uint8_t key[16];
        struct bn_hash want, got;
        unhex(key_hex, key, 16);
        unhex(hash_hex, want.b, 16);
        uint8_t *data = malloc(len + 1);
        assert_non_null(data);
        for (size_t skew = 0; skew < 2; skew++) { /* alignment must not matter */
            fill(pattern, data + skew, len);
            assert_int_equal(bn_hash_long(key, data + skew, len, &got), 0);
            assert_memory_equal(got.b, want.b, 16);
            if (len <= CHUNK) {
                struct bn_hash_key *k = bn_hash_key_new(key);
                assert_non_null(k);
                bn_hash_chunk(k, data + skew, len, &got);
                assert_memory_equal(got.b, want.b, 16);
                bn_hash_chunk_portable(k, data + skew, len, &got);
                assert_memory_equal(got.b, want.b, 16);
                bn_hash_key_free(k);
            }
        }
        free(data);
        seen++;
    }
    fclose(f);
    assert_true(seen > 30);
}

static void test_every_length(void **state)
{
    (void)state;
    uint8_t data[3000], key[16] = {9};
    struct bn_hash_key *k = bn_hash_key_new(key);
    fill("zero", data, sizeof(data));
    struct bn_hash last = {{0}}, a, b;
    for (size_t len = 0; len < sizeof(data); len++) { /* zeros: only the length tells them apart */
        bn_hash_chunk(k, data, len, &a);
        bn_hash_chunk_portable(k, data, len, &b);
        assert_true(bn_hash_equal(&a, &b));
        assert_false(bn_hash_equal(&a, &last));
        last = a;
    }
    bn_hash_key_free(k);
}

static void test_single_bits(void **state)
{
    (void)state;
    uint8_t key[16] = {7}, *data = malloc(CHUNK);
    assert_non_null(data);
    struct bn_hash_key *k = bn_hash_key_new(key);
    fill("mix", data, CHUNK);
    struct bn_hash base, h;
    bn_hash_chunk(k, data, CHUNK, &base);
    unsigned flips = 0, changed = 0;
    uint64_t rng = 1;
    for (unsigned i = 0; i < 300; i++, flips++) {
        uint64_t bit = i < 64 ? i : i < 128 ? CHUNK * 8 - 1 - (i - 64) : mix(&rng) % (CHUNK * 8);
        data[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        bn_hash_chunk(k, data, CHUNK, &h);
        data[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        assert_false(bn_hash_equal(&h, &base));
        for (unsigned b = 0; b < 16; b++)
            changed += (unsigned)__builtin_popcount(h.b[b] ^ base.b[b]);
    }
    /* 300 x 128 fair coins: 19200 heads, standard deviation 98. */
    assert_in_range(changed, 19200 - 600, 19200 + 600);
    (void)flips;
    /* Exchanged words, rows and strips are other chunks. */
    const size_t places[][2] = {
        {0, 4}, {0, 8}, {0, 16}, {0, 512}, {4096, 8192}, {0, 131072}, {512, 1048576 + 512}};
    for (unsigned i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        uint8_t was[2][4];
        memcpy(was[0], data + places[i][0], 4);
        memcpy(was[1], data + places[i][1], 4);
        memcpy(data + places[i][0], was[1], 4);
        memcpy(data + places[i][1], was[0], 4);
        bn_hash_chunk(k, data, CHUNK, &h);
        assert_false(bn_hash_equal(&h, &base));
        memcpy(data + places[i][0], was[0], 4);
        memcpy(data + places[i][1], was[1], 4);
    }
    bn_hash_key_free(k);
    key[15] ^= 1;
    k = bn_hash_key_new(key);
    bn_hash_chunk(k, data, CHUNK, &h);
    assert_false(bn_hash_equal(&h, &base));
    bn_hash_key_free(k);
    free(data);
}

static void test_keys(void **state)
{
    (void)state;
    uint8_t a[16] = {0}, b[16] = {0};
    assert_int_equal(bn_hash_key_random(a), 0);
    assert_int_equal(bn_hash_key_random(b), 0);
    assert_memory_not_equal(a, b, 16);
    struct bn_hash_key *k = bn_hash_key_new(a);
    assert_memory_equal(bn_hash_key_bytes(k), a, 16);
    bn_hash_key_free(k);
    bn_hash_key_free(NULL);
    /* The published first words of ChaCha20's stream with a 128-bit key and nonce of zeros. */
    uint8_t zero[16] = {0};
    k = bn_hash_key_new(zero);
    const struct bn_hash_material *m = bn_hash_key_material(k);
    assert_int_equal(m->nh[0][0], 0x52096789u);
    assert_int_equal(m->nh[0][1], 0xfd648360u);
    bn_hash_key_free(k);
}

static void test_zero(void **state)
{
    (void)state;
    static uint8_t data[5000];
    for (size_t len = 0; len <= 1100; len++)
        for (size_t skew = 0; skew < 3; skew++)
            assert_true(bn_is_zero(data + skew, len));
    for (size_t at = 0; at < sizeof(data); at++) {
        data[at] = at & 1 ? 0x80 : 1;
        assert_false(bn_is_zero(data, sizeof(data)));
        assert_true(bn_is_zero(data, at));
        assert_true(bn_is_zero(data + at + 1, sizeof(data) - at - 1));
        data[at] = 0;
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_vectors),     cmocka_unit_test(test_every_length),
        cmocka_unit_test(test_single_bits), cmocka_unit_test(test_keys),
        cmocka_unit_test(test_zero),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
