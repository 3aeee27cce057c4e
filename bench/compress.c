/* SPDX-License-Identifier: MIT */

/* What compression of chunks costs a core, and what it saves: compress [SECONDS].
 *
 * Data: weights as bf16 and as fp32 (normally distributed, deviation 0.02, as trained weights are), text (words of a small
 * vocabulary), bytes without order. Each through src/store/encoding.c, chunk by chunk, on one thread; times are its CPU time.
 */
#include "store/encoding.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHUNKS 4u

static uint64_t state = 1;

/* Of this thread: what else the machine does is not counted. */
static uint64_t cpu_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static uint64_t next(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static float normal(void)
{
    double u = ((double)(next() >> 11) + 1) / 9007199254740993.0,
           v = (double)(next() >> 11) / 9007199254740992.0;
    return (float)(0.02 * sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

static void weights(uint8_t *out, size_t bytes, size_t width)
{
    for (size_t at = 0; at < bytes; at += width) {
        float f = normal();
        uint32_t bits;
        memcpy(&bits, &f, 4);
        if (width == 2)
            bits = (bits + 0x8000) >> 16;
        memcpy(out + at, &bits, width);
    }
}

static void text(uint8_t *out, size_t bytes)
{
    char words[512][12];
    for (unsigned i = 0; i < 512; i++) {
        unsigned n = 2 + (unsigned)(next() % 8);
        for (unsigned k = 0; k < n; k++)
            words[i][k] = (char)('a' + next() % 26);
        words[i][n] = ' ';
        words[i][n + 1] = 0;
    }
    for (size_t at = 0; at < bytes;) {
        const char *word =
            words[(next() % 512) * (next() % 512) / 512]; /* some are more frequent than others */
        size_t n = strlen(word) < bytes - at ? strlen(word) : bytes - at;
        memcpy(out + at, word, n);
        at += n;
    }
}

static void measure(const char *name, unsigned level, const uint8_t *data, double seconds)
{
    struct bn_encoder *e = bn_encoder_new(level);
    uint8_t *out = malloc(CHUNKS * BN_ENCODED_MAX), *back = malloc(BN_CHUNK_SIZE);
    size_t lengths[CHUNKS] = {0}, stored = 0, encoded = 0;
    uint64_t began = cpu_ns(), took = 0, rounds = 0;
    for (; (double)took < seconds * 1e9; took = cpu_ns() - began, rounds++)
        for (unsigned i = 0; i < CHUNKS; i++)
            lengths[i] = bn_encode(e, data + i * BN_CHUNK_SIZE, out + i * BN_ENCODED_MAX);
    double in = (double)(rounds * CHUNKS * BN_CHUNK_SIZE) / (double)took;
    for (unsigned i = 0; i < CHUNKS; i++) {
        stored += lengths[i] ? lengths[i] : BN_CHUNK_SIZE;
        encoded += lengths[i] != 0;
    }
    began = cpu_ns(), took = 0, rounds = 0;
    for (; encoded == CHUNKS && (double)took < seconds * 1e9; took = cpu_ns() - began, rounds++)
        for (unsigned i = 0; i < CHUNKS; i++)
            if (bn_decode(out + i * BN_ENCODED_MAX, lengths[i], back) < 0 ||
                memcmp(back, data + i * BN_CHUNK_SIZE, 64) != 0)
                abort();
    printf("%-14s %5u %10.2f %10.1f", name, level, in, 100.0 * (double)stored / (CHUNKS * BN_CHUNK_SIZE));
    if (rounds)
        printf(" %10.2f\n", (double)(rounds * CHUNKS * BN_CHUNK_SIZE) / (double)took);
    else
        printf(" %10s\n", "raw");
    fflush(stdout);
    bn_encoder_free(e);
    free(out);
    free(back);
}

int main(int argc, char **argv)
{
    double seconds = argc > 1 ? atof(argv[1]) : 1;
    size_t bytes = CHUNKS * BN_CHUNK_SIZE;
    uint8_t *data = malloc(bytes);
    if (!data)
        return 1;
    printf("%-14s %5s %10s %10s %10s\n", "data", "level", "in GB/s", "stored %", "out GB/s");
    for (unsigned kind = 0; kind < 4; kind++) {
        static const char *const names[] = {"weights bf16", "weights fp32", "text", "random"};
        static const unsigned levels[] = {1, 3, 9};
        if (kind < 2)
            weights(data, bytes, kind == 0 ? 2 : 4);
        else if (kind == 2)
            text(data, bytes);
        else
            for (size_t at = 0; at < bytes; at += 8) {
                uint64_t v = next();
                memcpy(data + at, &v, 8);
            }
        for (unsigned i = 0; i < sizeof(levels) / sizeof(levels[0]); i++)
            measure(names[kind], levels[i], data, seconds);
    }
    free(data);
    return 0;
}
