#include "image/hash.h"

#include "base/cleanup.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SUMS \
    (BN_HASH_LANES * 2u) /* a lane's two products of each row are summed apart: that is how vectors fall */

/* The lanes of one strip: sums[pass][2 * lane + product]. */
struct strip {
    _Alignas(32) uint64_t sums[BN_HASH_PASSES][SUMS];
};

struct bn_hash_key {
    _Alignas(64) struct bn_hash_material m;
    uint8_t bytes[BN_HASH_KEY_SIZE];
};

typedef void rows_fn(const struct bn_hash_material *m, unsigned first, unsigned n, const uint8_t *data,
                     struct strip *s);

/* ---- key expansion: ChaCha20 with a 128-bit key, the level as nonce ---- */

static uint32_t load32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static void store32(uint8_t *p, uint32_t v)
{
    for (unsigned i = 0; i < 4; i++)
        p[i] = (uint8_t)(v >> (8 * i));
}

static uint32_t rotl(uint32_t v, unsigned n)
{
    return v << n | v >> (32 - n);
}

static void quarter_round(uint32_t *a, uint32_t *b, uint32_t *c, uint32_t *d)
{
    *a += *b, *d = rotl(*d ^ *a, 16);
    *c += *d, *b = rotl(*b ^ *c, 12);
    *a += *b, *d = rotl(*d ^ *a, 8);
    *c += *d, *b = rotl(*b ^ *c, 7);
}

static void chacha_block(const uint8_t key[16], uint64_t nonce, uint64_t counter, uint32_t out[16])
{
    uint32_t in[16] = {0x61707865, 0x3120646e, 0x79622d36, 0x6b206574}; /* "expand 16-byte k" */
    for (unsigned i = 0; i < 4; i++)
        in[4 + i] = in[8 + i] = load32(key + 4 * i);
    in[12] = (uint32_t)counter;
    in[13] = (uint32_t)(counter >> 32);
    in[14] = (uint32_t)nonce;
    in[15] = (uint32_t)(nonce >> 32);

    uint32_t x[16];
    memcpy(x, in, sizeof(x));
    for (unsigned round = 0; round < 20; round += 2) {
        for (unsigned i = 0; i < 4; i++)
            quarter_round(&x[i], &x[4 + i], &x[8 + i], &x[12 + i]);
        for (unsigned i = 0; i < 4; i++)
            quarter_round(&x[i], &x[4 + (i + 1) % 4], &x[8 + (i + 2) % 4], &x[12 + (i + 3) % 4]);
    }
    for (unsigned i = 0; i < 16; i++)
        out[i] = x[i] + in[i];
}

struct stream {
    const uint8_t *key;
    uint64_t level, counter;
    uint32_t words[16];
    unsigned used;
};

static uint32_t next32(struct stream *s)
{
    if (s->used == 16) {
        chacha_block(s->key, s->level, s->counter++, s->words);
        s->used = 0;
    }
    return s->words[s->used++];
}

static uint64_t next64(struct stream *s)
{
    uint64_t low = next32(s);
    return low | (uint64_t)next32(s) << 32;
}

static void expand(struct bn_hash_material *m, const uint8_t key[16], uint64_t level)
{
    struct stream s = {.key = key, .level = level, .used = 16};
    for (size_t i = 0; i < BN_ARRAY_SIZE(m->nh); i++)
        for (unsigned w = 0; w < 4; w++)
            m->nh[i][w] = next32(&s);
    for (unsigned p = 0; p < BN_HASH_PASSES; p++)
        for (unsigned half = 0; half < 2; half++)
            for (unsigned lane = 0; lane < BN_HASH_STRIPS * BN_HASH_LANES; lane++)
                m->lanes[p][half][lane] = next64(&s);
    for (unsigned p = 0; p < BN_HASH_PASSES; p++)
        m->length[p] = next64(&s);
    for (unsigned p = 0; p < BN_HASH_PASSES; p++)
        m->add[p] = next64(&s);
    for (unsigned i = 0; i <= BN_HASH_ROUNDS; i++)
        for (unsigned w = 0; w < 4; w++)
            m->last[i][w] = next32(&s);
}

static struct bn_hash_key *key_new(const uint8_t key[16], uint64_t level)
{
    struct bn_hash_key *k = aligned_alloc(64, (sizeof(*k) + 63) / 64 * 64);
    if (!k)
        return NULL;
    memcpy(k->bytes, key, sizeof(k->bytes));
    expand(&k->m, key, level);
    return k;
}

struct bn_hash_key *bn_hash_key_new(const uint8_t key[BN_HASH_KEY_SIZE])
{
    return key_new(key, 0);
}

void bn_hash_key_free(struct bn_hash_key *k)
{
    free(k);
}

const uint8_t *bn_hash_key_bytes(const struct bn_hash_key *k)
{
    return k->bytes;
}

const struct bn_hash_material *bn_hash_key_material(const struct bn_hash_key *k)
{
    return &k->m;
}

int bn_hash_key_random(uint8_t key[BN_HASH_KEY_SIZE])
{
    uint8_t fresh[BN_HASH_KEY_SIZE];
    for (size_t have = 0; have < sizeof(fresh);) {
        long n = syscall(SYS_getrandom, fresh + have, sizeof(fresh) - have, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        have += (size_t)n;
    }
    memcpy(key, fresh, sizeof(fresh));
    return 0;
}

/* ---- first level: NH ---- */

static void rows_portable(const struct bn_hash_material *m, unsigned first, unsigned n, const uint8_t *data,
                          struct strip *s)
{
    for (unsigned r = first; r < first + n; r++)
        for (unsigned lane = 0; lane < BN_HASH_LANES; lane++, data += BN_HASH_WORD) {
            uint32_t x = load32(data), y = load32(data + 4), z = load32(data + 8), w = load32(data + 12);
            for (unsigned p = 0; p < BN_HASH_PASSES; p++) {
                const uint32_t *k = m->nh[r + p];
                s->sums[p][2 * lane] += (uint64_t)(x + k[0]) * (uint32_t)(y + k[1]);
                s->sums[p][2 * lane + 1] += (uint64_t)(z + k[2]) * (uint32_t)(w + k[3]);
            }
        }
}

#if defined(__x86_64__)
#include <immintrin.h>

#define AVX2 __attribute__((target("avx2")))

AVX2 static inline __m256i nh_add(__m256i sum, __m256i data, __m256i key)
{
    __m256i t = _mm256_add_epi32(data, key);
    return _mm256_add_epi64(sum, _mm256_mul_epu32(t, _mm256_srli_epi64(t, 32)));
}

/* Four rows at a time: 2 KiB in a row of memory, seven keys and four sums in registers. The processor's own prefetcher
 * does not see through the order of the loads, so two groups ahead are asked for (beyond the end that does no harm). */
AVX2 static void rows_avx2_4(const struct bn_hash_material *m, unsigned r, const uint8_t *data,
                             struct strip *s)
{
    __m256i k[4 + BN_HASH_PASSES - 1];
#pragma GCC unroll 8
    for (unsigned i = 0; i < BN_ARRAY_SIZE(k); i++)
        k[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)m->nh[r + i]));
    for (unsigned at = 0; at < BN_HASH_ROW; at += 32) {
        __m256i *sums = (__m256i *)&s->sums[0][at / 8], a[BN_HASH_PASSES];
        const size_t pass = SUMS / 4; /* vectors from one pass's sums to the next's */
        _mm_prefetch((const char *)data + 2 * 4 * BN_HASH_ROW + 4 * at, _MM_HINT_T0);
        _mm_prefetch((const char *)data + 2 * 4 * BN_HASH_ROW + 4 * at + 64, _MM_HINT_T0);
#pragma GCC unroll 4
        for (unsigned p = 0; p < BN_HASH_PASSES; p++)
            a[p] = _mm256_load_si256(sums + p * pass);
#pragma GCC unroll 4
        for (unsigned i = 0; i < 4; i++) {
            __m256i d = _mm256_loadu_si256((const __m256i *)(data + i * BN_HASH_ROW + at));
#pragma GCC unroll 4
            for (unsigned p = 0; p < BN_HASH_PASSES; p++)
                a[p] = nh_add(a[p], d, k[i + p]);
        }
#pragma GCC unroll 4
        for (unsigned p = 0; p < BN_HASH_PASSES; p++)
            _mm256_store_si256(sums + p * pass, a[p]);
    }
}

AVX2 static void rows_avx2(const struct bn_hash_material *m, unsigned first, unsigned n, const uint8_t *data,
                           struct strip *s)
{
    for (; n >= 4; n -= 4, first += 4, data += 4 * BN_HASH_ROW)
        rows_avx2_4(m, first, data, s);
    rows_portable(m, first, n, data, s);
}

AVX2 static bool is_zero_avx2(const uint8_t *p, size_t n)
{
    for (; n >= 256; n -= 256, p += 256) {
        const __m256i *v = (const __m256i *)p;
        __m256i a = _mm256_or_si256(_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1));
        __m256i b = _mm256_or_si256(_mm256_loadu_si256(v + 2), _mm256_loadu_si256(v + 3));
        __m256i c = _mm256_or_si256(_mm256_loadu_si256(v + 4), _mm256_loadu_si256(v + 5));
        __m256i d = _mm256_or_si256(_mm256_loadu_si256(v + 6), _mm256_loadu_si256(v + 7));
        a = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
        if (!_mm256_testz_si256(a, a))
            return false;
    }
    for (; n > 0; n--, p++)
        if (*p)
            return false;
    return true;
}

static bool have_avx2(void)
{
    return __builtin_cpu_supports("avx2");
}
#endif

/* ---- second level and the end ---- */

/* A lane's sum goes into the multilinear hash of each pass as two 32-bit halves. */
static void add_strip(const struct bn_hash_material *m, unsigned strip, const struct strip *s,
                      uint64_t total[BN_HASH_PASSES])
{
    for (unsigned p = 0; p < BN_HASH_PASSES; p++)
        for (unsigned lane = 0; lane < BN_HASH_LANES; lane++) {
            uint64_t v = s->sums[p][2 * lane] + s->sums[p][2 * lane + 1];
            unsigned at = strip * BN_HASH_LANES + lane;
            total[p] += m->lanes[p][0][at] * (v & UINT32_MAX) + m->lanes[p][1][at] * (v >> 32);
        }
}

static void finish(const struct bn_hash_material *m, const uint64_t total[BN_HASH_PASSES], uint64_t len,
                   struct bn_hash *out)
{
    uint32_t x[4];
    for (unsigned p = 0; p < BN_HASH_PASSES; p++)
        x[p] = (uint32_t)((total[p] + m->length[p] * len + m->add[p]) >> 32);
    for (unsigned i = 0; i < BN_HASH_ROUNDS; i++) {
        for (unsigned w = 0; w < 4; w++)
            x[w] ^= m->last[i][w];
        quarter_round(&x[0], &x[1], &x[2], &x[3]);
    }
    for (unsigned w = 0; w < 4; w++)
        store32(out->b + 4 * w, x[w] ^ m->last[BN_HASH_ROUNDS][w]);
}

static void hash(const struct bn_hash_material *m, rows_fn *rows, const uint8_t *data, size_t len,
                 struct bn_hash *out)
{
    uint64_t total[BN_HASH_PASSES] = {0};
    size_t left = len;
    for (unsigned strip = 0; left > 0; strip++) {
        struct strip s = {0};
        unsigned whole = left / BN_HASH_ROW < BN_HASH_ROWS ? (unsigned)(left / BN_HASH_ROW) : BN_HASH_ROWS;
        rows(m, 0, whole, data, &s);
        data += whole * BN_HASH_ROW;
        left -= whole * BN_HASH_ROW;
        if (whole < BN_HASH_ROWS && left > 0) { /* the last row, filled up with zeros */
            uint8_t row[BN_HASH_ROW] = {0};
            memcpy(row, data, left);
            rows(m, whole, 1, row, &s);
            left = 0;
        }
        add_strip(m, strip, &s, total);
    }
    finish(m, total, len, out);
}

void bn_hash_chunk_portable(const struct bn_hash_key *k, const void *data, size_t len, struct bn_hash *out)
{
    hash(&k->m, rows_portable, data, len, out);
}

void bn_hash_chunk(const struct bn_hash_key *k, const void *data, size_t len, struct bn_hash *out)
{
#if defined(__x86_64__)
    if (have_avx2()) {
        hash(&k->m, rows_avx2, data, len, out);
        return;
    }
#endif
    hash(&k->m, rows_portable, data, len, out);
}

int bn_hash_long(const uint8_t key[BN_HASH_KEY_SIZE], const void *data, size_t len, struct bn_hash *out)
{
    bn_auto_free uint8_t *list = NULL; /* the values of the level below */
    const uint8_t *p = data;
    for (uint64_t level = 0;; level++) {
        struct bn_hash_key *k =
            key_new(key, level); /* each level has material of its own: the proof asks for it */
        if (!k)
            return -ENOMEM;
        size_t pieces = len / BN_HASH_LENGTH_MAX + (len % BN_HASH_LENGTH_MAX != 0);
        if (pieces <= 1) {
            bn_hash_chunk(k, p, len, out);
            bn_hash_key_free(k);
            return 0;
        }
        uint8_t *next = malloc(pieces * BN_HASH_SIZE);
        for (size_t i = 0; next && i < pieces; i++) {
            size_t n = len - i * BN_HASH_LENGTH_MAX;
            struct bn_hash h;
            bn_hash_chunk(k, p + i * BN_HASH_LENGTH_MAX, n < BN_HASH_LENGTH_MAX ? n : BN_HASH_LENGTH_MAX, &h);
            memcpy(next + i * BN_HASH_SIZE, h.b, BN_HASH_SIZE);
        }
        bn_hash_key_free(k);
        free(list);
        list = next;
        if (!next)
            return -ENOMEM;
        p = list;
        len = pieces * BN_HASH_SIZE;
    }
}

bool bn_hash_equal(const struct bn_hash *a, const struct bn_hash *b)
{
    return memcmp(a->b, b->b, BN_HASH_SIZE) == 0;
}

bool bn_is_zero(const void *data, size_t len)
{
    const uint8_t *p = data;
#if defined(__x86_64__)
    if (have_avx2())
        return is_zero_avx2(p, len);
#endif
    /* Sixteen bytes that are zero, and every byte equal to the one sixteen before it. */
    for (size_t i = 0; i < len && i < 16; i++)
        if (p[i])
            return false;
    return len <= 16 || memcmp(p, p + 16, len - 16) == 0;
}
