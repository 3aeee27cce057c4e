/* Bennu's hash on the GPU: is it the CPU's on many chunks, patterns and keys, and how fast is it?
 *
 *     bench-hash-gpu [--driver FILE] [--device N] [--chunks N] [--keys N] [--bytes SIZE] [--rounds N]
 *
 * First --chunks chunks (default 2,048) of random, constant, sparse and counting content are hashed on the GPU and, as they come out of a
 * copy, on the CPU, with --keys keys (default 8): every value must be the same. Then --bytes of GPU memory (default 16G) with random
 * content are hashed --rounds times (default 9): launch, kernel and the values' way back; and the same bytes on one core. Prints "compared N values: BAD wrong"
 * and lines "NAME RATE GB/s". Exit status: 0 all the same, 1 a difference or a failure. */
#include "base/cleanup.h"
#include "base/io.h"
#include "gpu/gpu.h"
#include "gpu/hash.h"

#include <getopt.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WORDS (BN_GPU_CHUNK / 8)
#define BLOCK (UINT64_C(1) << 30)
#define CORE_CHUNKS 256u

static struct {
    const char *driver;
    unsigned device, keys, rounds;
    uint64_t chunks, bytes;
} opt = {.keys = 8, .rounds = 9, .chunks = 2048, .bytes = UINT64_C(16) << 30};

static struct bn_gpu *gpu;
static struct bn_copier *copier;

static void must(int r, const struct bn_error *err)
{
    if (r >= 0)
        return;
    fprintf(stderr, "bench-hash-gpu: %s\n", err->text);
    exit(1);
}

/* ---- content ---- */

static uint64_t random_word(uint64_t *state)
{
    uint64_t x = *state += UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

static void fill_random(uint64_t *words, uint64_t seed)
{
    for (size_t i = 0; i < WORDS; i++)
        words[i] = random_word(&seed);
}

/* By turns: random; one bit otherwise than the random chunk before it; zeros but for one bit; one byte all over, zero among
 * them; small counting words; random words among zeros. */
static void fill_pattern(uint64_t *words, uint64_t chunk)
{
    uint64_t seed = chunk, at = random_word(&seed);
    switch (chunk % 6) {
    case 0: fill_random(words, chunk); break;
    case 1:
        fill_random(words, chunk - 1);
        words[at % WORDS] ^= UINT64_C(1) << (at >> 32) % 64;
        break;
    case 2:
        memset(words, 0, BN_GPU_CHUNK);
        words[at % WORDS] = UINT64_C(1) << (at >> 32) % 64;
        break;
    case 3: memset(words, (int)(chunk / 6 % 256), BN_GPU_CHUNK); break;
    case 4:
        for (size_t i = 0; i < WORDS; i++)
            words[i] = chunk + i;
        break;
    default:
        memset(words, 0, BN_GPU_CHUNK);
        for (size_t i = 0; i < 100; i++)
            words[random_word(&seed) % WORDS] = random_word(&seed);
    }
}

struct filling {
    bool patterns;
};

static int produce(void *arg, uint64_t chunk, unsigned n, void *data, struct bn_error *err)
{
    const struct filling *f = arg;
    (void)err;
    for (unsigned i = 0; i < n; i++) {
        uint64_t *words = (uint64_t *)data + i * WORDS;
        if (f->patterns)
            fill_pattern(words, chunk + i);
        else
            fill_random(words, ~(chunk + i));
    }
    return 0;
}

static struct bn_gpu_set *make_set(uint64_t bytes, bool patterns)
{
    struct bn_error err = BN_ERROR_INIT;
    size_t n = (size_t)((bytes + BLOCK - 1) / BLOCK);
    struct bn_gpu_block *blocks = calloc(n, sizeof(*blocks));
    struct bn_gpu_set *set;
    struct bn_copy *job;
    if (!blocks)
        exit(1);
    for (size_t i = 0; i < n; i++)
        blocks[i].size = bytes - i * BLOCK < BLOCK ? bytes - i * BLOCK : BLOCK;
    must(bn_gpu_set_create(gpu, opt.device, blocks, n, &set, &err), &err);
    free(blocks);
    struct filling f = {patterns};
    struct bn_copy_spec spec = {.mode = BN_COPY_IN, .set = set, .produce = produce, .arg = &f};
    must(bn_copy_start(copier, &spec, &job, &err), &err);
    must(bn_copy_wait(job, NULL, NULL, 0, &err), &err);
    bn_copy_free(job);
    return set;
}

/* ---- values ---- */

struct comparison {
    const struct bn_hash_key *key;
    const struct bn_hash *values;
    _Atomic uint64_t wrong;
};

static int compare(void *arg, uint64_t chunk, unsigned n, const void *data, struct bn_error *err)
{
    struct comparison *c = arg;
    (void)err;
    for (unsigned i = 0; i < n; i++) {
        struct bn_hash want;
        bn_hash_chunk(c->key, (const uint64_t *)data + i * WORDS, BN_GPU_CHUNK, &want);
        if (bn_hash_equal(&want, &c->values[chunk + i]))
            continue;
        if (atomic_fetch_add(&c->wrong, 1) == 0)
            printf("chunk %llu has another value on the GPU than on the CPU\n",
                   (unsigned long long)(chunk + i));
    }
    return 0;
}

static uint64_t check_values(void)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_gpu_set *set = make_set(opt.chunks * BN_GPU_CHUNK, true);
    struct bn_hash *values = calloc(opt.chunks, sizeof(*values));
    uint64_t seed = 1, wrong = 0;
    for (unsigned k = 0; values && k < opt.keys; k++) {
        uint64_t bytes[BN_HASH_KEY_SIZE / 8] = {k == 0 ? 0 : random_word(&seed),
                                                k == 0 ? 0 : random_word(&seed)};
        struct bn_hash_key *key = bn_hash_key_new((const uint8_t *)bytes);
        struct bn_copy *job;
        if (!key)
            exit(1);
        must(bn_gpu_hash(gpu, set, key, 0, opt.chunks, values, &err), &err);
        struct comparison c = {key, values, 0};
        struct bn_copy_spec spec = {.mode = BN_COPY_OUT, .set = set, .consume = compare, .arg = &c};
        must(bn_copy_start(copier, &spec, &job, &err), &err);
        must(bn_copy_wait(job, NULL, NULL, 0, &err), &err);
        bn_copy_free(job);
        wrong += c.wrong;
        bn_hash_key_free(key);
    }
    printf("compared %llu values: %llu wrong\n", (unsigned long long)(opt.chunks * opt.keys),
           (unsigned long long)wrong);
    free(values);
    bn_gpu_set_free(set);
    return wrong;
}

/* ---- rates ---- */

static int by_number(const void *a, const void *b)
{
    return *(const double *)a < *(const double *)b ? -1 : *(const double *)a > *(const double *)b;
}

static void print_median(const char *name, double *rates)
{
    qsort(rates, opt.rounds, sizeof(*rates), by_number);
    printf("%s %.3f GB/s\n", name, rates[opt.rounds / 2]);
}

static void measure(void)
{
    struct bn_error err = BN_ERROR_INIT;
    uint8_t bytes[BN_HASH_KEY_SIZE] = {1, 2, 3};
    struct bn_hash_key *key = bn_hash_key_new(bytes);
    struct bn_gpu_set *set = make_set(opt.bytes, false);
    uint64_t n = opt.bytes / BN_GPU_CHUNK;
    struct bn_hash *values = calloc(n, sizeof(*values));
    uint64_t *data = aligned_alloc(4096, CORE_CHUNKS * BN_GPU_CHUNK);
    double *rates = calloc(opt.rounds, sizeof(*rates));
    if (!key || !values || !data || !rates)
        exit(1);
    for (unsigned r = 0; r <= opt.rounds; r++) { /* the first is not counted */
        uint64_t began = bn_now_ns();
        must(bn_gpu_hash(gpu, set, key, 0, n, values, &err), &err);
        if (r)
            rates[r - 1] = (double)opt.bytes / (double)(bn_now_ns() - began);
    }
    print_median("gpu", rates);
    unsigned some = n < CORE_CHUNKS ? (unsigned)n : CORE_CHUNKS;
    for (unsigned i = 0; i < some; i++)
        fill_random(data + i * WORDS, ~(uint64_t)i);
    for (unsigned r = 0; r < opt.rounds; r++) {
        uint64_t began = bn_now_ns();
        for (unsigned i = 0; i < some; i++)
            bn_hash_chunk(key, data + i * WORDS, BN_GPU_CHUNK, &values[i]);
        rates[r] = (double)(some * BN_GPU_CHUNK) / (double)(bn_now_ns() - began);
    }
    print_median("core", rates);
    free(rates);
    free(data);
    free(values);
    bn_gpu_set_free(set);
    bn_hash_key_free(key);
}

static uint64_t size_of(const char *s)
{
    char *end;
    uint64_t v = strtoull(s, &end, 10);
    return *end == 'M' ? v << 20 : *end == 'G' ? v << 30 : v;
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {{"driver", 1, NULL, 'D'},
                                          {"device", 1, NULL, 'd'},
                                          {"chunks", 1, NULL, 'c'},
                                          {"keys", 1, NULL, 'k'},
                                          {"bytes", 1, NULL, 'b'},
                                          {"rounds", 1, NULL, 'r'},
                                          {0}};
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        switch (c) {
        case 'D': opt.driver = optarg; break;
        case 'd': opt.device = (unsigned)atoi(optarg); break;
        case 'c': opt.chunks = strtoull(optarg, NULL, 10); break;
        case 'k': opt.keys = (unsigned)atoi(optarg); break;
        case 'b': opt.bytes = size_of(optarg) / BN_GPU_CHUNK * BN_GPU_CHUNK; break;
        case 'r': opt.rounds = (unsigned)atoi(optarg); break;
        default: return 2;
        }
    }
    if (opt.chunks == 0 || opt.keys == 0 || opt.rounds == 0 || opt.bytes == 0)
        return 2;
    struct bn_error err = BN_ERROR_INIT;
    struct bn_copier_config config = {0};
    setvbuf(stdout, NULL, _IOLBF, 0);
    must(bn_gpu_open(opt.driver, &gpu, &err), &err);
    must(bn_copier_new(gpu, &config, &copier, &err), &err);
    must(bn_gpu_hash_ready(gpu, opt.device, &err), &err);
    uint64_t wrong = check_values();
    if (wrong == 0)
        measure();
    bn_copier_free(copier);
    bn_gpu_close(gpu);
    return wrong ? 1 : 0;
}
