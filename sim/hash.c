/* SPDX-License-Identifier: MIT */

/*
 * The kernel bn_hash_range, from docs/image-format.md, "Hash": a value of 128 bits for each chunk of 2 MiB. Written for
 * itself, so that it does not share the errors of the program under test.
 */

#include <stdlib.h>
#include <string.h>

#include "sim.h"

enum { PASSES = 4, STRIPS = 16, COLUMNS = 32, STRIP_ROWS = 256, LANES = STRIPS * COLUMNS, ROUNDS = 8 };
#define CHUNK_BYTES (2ull << 20)

struct material {
    uint32_t nh[STRIP_ROWS + PASSES][4];
    uint64_t low_high[PASSES][2][LANES];
    uint64_t length[PASSES], add[PASSES];
    uint32_t last[ROUNDS + 1][4];
};
_Static_assert(sizeof(struct material) == 37136, "as the format has it");

static uint32_t turn(uint32_t v, int bits)
{
    return v << bits | v >> (32 - bits);
}

static void permute(const struct material *m, uint32_t v[4])
{
    for (int round = 0; round < ROUNDS; round++) {
        for (int w = 0; w < 4; w++)
            v[w] ^= m->last[round][w];
        v[0] += v[1];
        v[3] = turn(v[3] ^ v[0], 16);
        v[2] += v[3];
        v[1] = turn(v[1] ^ v[2], 12);
        v[0] += v[1];
        v[3] = turn(v[3] ^ v[0], 8);
        v[2] += v[3];
        v[1] = turn(v[1] ^ v[2], 7);
    }
    for (int w = 0; w < 4; w++)
        v[w] ^= m->last[ROUNDS][w];
}

/* sums[c]: N of pass p for the lanes of one strip. */
static void strip_pass(const struct material *m, int p, const uint32_t (*rows)[COLUMNS][4],
                       uint64_t sums[COLUMNS])
{
    memset(sums, 0, COLUMNS * sizeof(*sums));
    for (int r = 0; r < STRIP_ROWS; r++) {
        const uint32_t *k = m->nh[r + p];

        for (int c = 0; c < COLUMNS; c++) {
            const uint32_t *d = rows[r][c];

            sums[c] += (uint64_t)(d[0] + k[0]) * (uint32_t)(d[1] + k[1]) +
                       (uint64_t)(d[2] + k[2]) * (uint32_t)(d[3] + k[3]);
        }
    }
}

static void hash_chunk(const struct material *m, const void *chunk, uint32_t value[4])
{
    const uint32_t(*rows)[COLUMNS][4] = chunk;

    for (int p = 0; p < PASSES; p++) {
        uint64_t total = m->add[p] + m->length[p] * CHUNK_BYTES;

        for (int s = 0; s < STRIPS; s++) {
            uint64_t sums[COLUMNS];

            strip_pass(m, p, rows + s * STRIP_ROWS, sums);
            for (int c = 0; c < COLUMNS; c++)
                total += m->low_high[p][0][s * COLUMNS + c] * (uint32_t)sums[c] +
                         m->low_high[p][1][s * COLUMNS + c] * (sums[c] >> 32);
        }
        value[p] = (uint32_t)(total >> 32);
    }
    permute(m, value);
}

CUresult hash_range(struct op *op, const uint64_t *a)
{
    static atomic_uint launches;
    const char *how = getenv("BENNU_SIM_HASH");
    bool first = atomic_fetch_add(&launches, 1) == 0;
    bool wrong = how && (strcmp(how, "wrong") == 0 || (strcmp(how, "later") == 0 && !first));
    uint64_t base = a[0], stride = a[1], blocks = op->launch.blocks;

    if (base % 16 || stride % 16 || a[2] % 16 || a[3] % 16 || stride > UINT64_MAX / 2 / blocks)
        return CUDA_ERROR_MISALIGNED_ADDRESS;
    if (!memory_usable(base, stride * (blocks - 1) + CHUNK_BYTES, op->ctx, false) ||
        !memory_usable(a[2], sizeof(struct material), op->ctx, false) ||
        !memory_usable(a[3], blocks * 16, op->ctx, true))
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    for (uint64_t b = 0; b < blocks; b++) {
        uint32_t *value = (uint32_t *)(a[3] + b * 16);

        hash_chunk((const struct material *)a[2], (const void *)(base + b * stride), value);
        if (wrong)
            value[b % 4] ^= 1;
    }
    return CUDA_SUCCESS;
}
