/* SPDX-License-Identifier: MIT */

/* A server with a model: model WEIGHTS_MIB [SEED [STATE_MIB]].
 *
 * The weights are made from SEED (default 1; 0: of few different words, so that they can be compressed) and never change, so two
 * of the same seed are replicas; the state (default 2 MiB)
 * changes with every round. Each round checks every byte of both and reports "0 PID round N" on standard output; a wrong
 * byte ends it with status 1.
 */
#include <errno.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#include "cuda.h"

#define PIECE ((size_t)2 << 20)
#define WORDS (PIECE / 8)

static uint64_t *host;

static uint64_t word(uint64_t seed, size_t i)
{
    return seed >> 40 ? cr_mix(seed + i) : seed + i % 512;
}

static void write_piece(CUdeviceptr ptr, uint64_t seed)
{
    for (size_t i = 0; i < WORDS; i++)
        host[i] = word(seed, i);
    MUST(cuMemcpyHtoD_v2(ptr, host, PIECE));
}

static void check_piece(CUdeviceptr ptr, uint64_t seed, const char *what)
{
    MUST(cuMemcpyDtoH_v2(host, ptr, PIECE));
    for (size_t i = 0; i < WORDS; i++)
        if (host[i] != word(seed, i))
            cr_die("WRONG: %s, seed %llu, word %zu", what, (unsigned long long)seed, i);
}

static uint64_t weight_seed(uint64_t seed, size_t at)
{
    return seed << 40 | at;
}

static uint64_t state_seed(uint64_t round, size_t at)
{
    return (uint64_t)getpid() << 44 | round << 24 | at;
}

int main(int argc, char **argv)
{
    size_t weights = (argc > 1 ? strtoul(argv[1], NULL, 10) : 16) << 20;
    uint64_t seed = argc > 2 ? strtoul(argv[2], NULL, 10) : 1;
    size_t state = (argc > 3 ? strtoul(argv[3], NULL, 10) : 2) << 20;
    CUdeviceptr w, s;
    setvbuf(stdout, NULL, _IOLBF, 0);
    host = malloc(PIECE);
    if (!host || weights % PIECE || state % PIECE)
        cr_die("sizes are multiples of 2 MiB");
    cr_open(0);
    MUST(cuMemAlloc_v2(&w, weights));
    MUST(cuMemAlloc_v2(&s, state));
    for (size_t at = 0; at < weights; at += PIECE)
        write_piece(w + at, weight_seed(seed, at));
    for (uint64_t round = 1;; round++) {
        for (size_t at = 0; at < state; at += PIECE)
            write_piece(s + at, state_seed(round, at));
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
        for (size_t at = 0; at < weights; at += PIECE)
            check_piece(w + at, weight_seed(seed, at), "weights");
        for (size_t at = 0; at < state; at += PIECE)
            check_piece(s + at, state_seed(round, at), "state");
        printf("0 %d round %llu\n", (int)getpid(), (unsigned long long)round);
    }
}
