/* How fast the hash and the zero test are on one core: from cache (one chunk over and over) and from memory (256 MiB). */
#include "base/io.h"
#include "image/hash.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SMALL ((size_t)64 << 10)
#define CHUNK BN_HASH_LENGTH_MAX
#define BIG ((size_t)256 << 20)

enum what { HASH, HASH_PORTABLE, ZERO };

static volatile unsigned sink;

/* Best of five, in GB/s (10^9). */
static double rate(enum what what, const struct bn_hash_key *k, const uint8_t *data, size_t step, size_t span,
                   size_t bytes)
{
    double best = 0;
    for (int run = 0; run < 5; run++) {
        uint64_t t0 = bn_now_ns();
        for (size_t done = 0; done < bytes; done += step) {
            const uint8_t *p = data + done % span;
            struct bn_hash h = {{0}};
            if (what == HASH)
                bn_hash_chunk(k, p, step, &h);
            else if (what == HASH_PORTABLE)
                bn_hash_chunk_portable(k, p, step, &h);
            else
                h.b[0] = bn_is_zero(p, step);
            sink += h.b[0];
        }
        double gbs = (double)bytes / (double)(bn_now_ns() - t0);
        best = gbs > best ? gbs : best;
    }
    return best;
}

int main(void)
{
    uint8_t key[BN_HASH_KEY_SIZE] = {1, 2, 3};
    struct bn_hash_key *k = bn_hash_key_new(key);
    uint8_t *data = aligned_alloc(4096, BIG);
    if (!k || !data)
        return 1;
    memset(data, 0, BIG);
    printf("%-34s %6.1f GB/s\n", "hash, one chunk of 2 MiB again",
           rate(HASH, k, data, CHUNK, CHUNK, 4 * BIG));
    printf("%-34s %6.1f GB/s\n", "hash, 256 MiB", rate(HASH, k, data, CHUNK, BIG, 4 * BIG));
    printf("%-34s %6.1f GB/s\n", "hash, no vectors", rate(HASH_PORTABLE, k, data, CHUNK, CHUNK, BIG));
    printf("%-34s %6.1f GB/s\n", "zero test, 64 KiB again", rate(ZERO, k, data, SMALL, SMALL, 4 * BIG));
    printf("%-34s %6.1f GB/s\n", "zero test, one chunk again", rate(ZERO, k, data, CHUNK, CHUNK, 4 * BIG));
    printf("%-34s %6.1f GB/s\n", "zero test, 256 MiB", rate(ZERO, k, data, CHUNK, BIG, 4 * BIG));
    free(data);
    bn_hash_key_free(k);
    return 0;
}
