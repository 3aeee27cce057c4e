/* SPDX-License-Identifier: MIT */

/* A CUDA program that writes to its GPU memory all the time, in an order that tells of every moment what must be where:
 * cut [--hot N] [--cold N] [--pause MS] [--plain] [--gaps].
 *
 * Step k fills the hot chunk number mix(k) % N with words that follow from k, and the program's own memory counts the steps. After
 * every ROUND steps all GPU memory is compared, on the GPU, with what the count demands: a checkpoint that is no consistent
 * cut (some chunks of one moment, some of another, or the count of a third) is found in the first round after its restore. A
 * round is reported as "0 PID round N"; the first wrong word ends the program with status 1.
 *
 * Beside the hot chunks there are cold ones, which are never written again; as many that are all alike; as many zeros; and a block
 * that is freed and made anew, with other content, in every round. --plain leaves out what is alike or zero. --gaps also prints
 * "gap SECONDS" with each round, its longest call of the driver. SIGUSR1 makes it rest, outside of the driver, until SIGUSR2.
 */
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>

#include "cuda.h"

#define CHUNK ((size_t)2 << 20)
#define WORDS (CHUNK / 8)
#define BLOCK 4u /* chunks of an allocation */
#define ROUND 32u
#define CHUNKS_MAX 32768u

static unsigned hot = 8, cold = 8, pause_ms = 1;
static bool plain, gaps;
static CUdeviceptr hot_at[CHUNKS_MAX], cold_at[CHUNKS_MAX], same_at[CHUNKS_MAX], zero_at[CHUNKS_MAX], churn,
    errors;
static uint64_t last[CHUNKS_MAX]; /* each hot chunk: the step that wrote it */
static CUfunction k_fill, k_check;
static volatile sig_atomic_t resting;
static sigset_t awake; /* the signals that come while it rests */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* The longest call of the driver since the last report: whoever is stopped is stopped in one. */
static double longest;

#define TIMED(call)                                                    \
    do {                                                               \
        double began_ = now();                                         \
        MUST(call);                                                    \
        longest = now() - began_ > longest ? now() - began_ : longest; \
    } while (0)

static void kernel(CUfunction f, uint64_t a, uint64_t b, uint64_t c, uint64_t d)
{
    void *args[] = {&a, &b, &c, &d};
    TIMED(cuLaunchKernel(f, 64, 1, 1, 128, 1, 1, 0, NULL, args, NULL));
}

static void fill(CUdeviceptr at, size_t words, uint64_t seed)
{
    kernel(k_fill, at, words, cr_mix(seed), 0);
}

static void check(CUdeviceptr at, size_t words, uint64_t seed, const char *what, unsigned i, uint64_t step)
{
    uint64_t bad = 0;
    TIMED(cuMemcpyHtoD_v2(errors, &bad, sizeof(bad)));
    kernel(k_check, at, words, cr_mix(seed), errors);
    TIMED(cuMemcpyDtoH_v2(&bad, errors, sizeof(bad)));
    if (bad)
        cr_die("WRONG: after step %llu, %s chunk %u has %llu words that are not of step %llu",
               (unsigned long long)step, what, i, (unsigned long long)bad, (unsigned long long)seed);
}

static void check_zero(unsigned i, uint64_t step)
{
    static uint64_t words[WORDS];
    TIMED(cuMemcpyDtoH_v2(words, zero_at[i], CHUNK));
    for (size_t w = 0; w < WORDS; w++)
        if (words[w])
            cr_die("WRONG: after step %llu, zero chunk %u is not zero", (unsigned long long)step, i);
}

static void allocate(CUdeviceptr *at, unsigned n)
{
    for (unsigned i = 0; i < n; i += BLOCK) {
        CUdeviceptr block;
        unsigned some = n - i < BLOCK ? n - i : BLOCK;
        MUST(cuMemAlloc_v2(&block, some * CHUNK));
        for (unsigned k = 0; k < some; k++)
            at[i + k] = block + k * CHUNK;
    }
}

static void verify(uint64_t step, uint64_t round)
{
    for (unsigned i = 0; i < hot; i++)
        check(hot_at[i], WORDS, last[i], "hot", i, step);
    for (unsigned i = 0; i < cold; i++) {
        check(cold_at[i], WORDS, UINT64_C(1) << 40 | i, "cold", i, step);
        if (plain)
            continue;
        check(same_at[i], WORDS, UINT64_C(1) << 41, "same", i, step);
        check_zero(i, step);
    }
    check(churn, BLOCK * WORDS, UINT64_C(1) << 42 | round, "new", 0, step);
}

static void renew(uint64_t round)
{
    if (churn)
        TIMED(cuMemFree_v2(churn));
    TIMED(cuMemAlloc_v2(&churn, BLOCK * CHUNK));
    fill(churn, BLOCK * WORDS, UINT64_C(1) << 42 | round);
}

static void set_up(void)
{
    static uint8_t zeros[CHUNK];
    cr_open(0);
    k_fill = cr_kernel("bn_fill");
    k_check = cr_kernel("bn_check");
    MUST(cuMemAlloc_v2(&errors, 8));
    allocate(hot_at, hot);
    allocate(cold_at, cold);
    if (!plain) {
        allocate(same_at, cold);
        allocate(zero_at, cold);
    }
    for (unsigned i = 0; i < hot; i++)
        fill(hot_at[i], WORDS, 0);
    for (unsigned i = 0; i < cold; i++) {
        fill(cold_at[i], WORDS, UINT64_C(1) << 40 | i);
        if (plain)
            continue;
        fill(same_at[i], WORDS, UINT64_C(1) << 41);
        MUST(cuMemcpyHtoD_v2(zero_at[i], zeros, CHUNK));
    }
    renew(0);
}

static void on_rest(int sig)
{
    (void)sig;
    resting = 1;
}

static void on_go(int sig)
{
    (void)sig;
    resting = 0;
}

int main(int argc, char **argv)
{
    static const struct option longs[] = {{"hot", 1, NULL, 'h'},   {"cold", 1, NULL, 'c'},
                                          {"pause", 1, NULL, 'p'}, {"plain", 0, NULL, 'P'},
                                          {"gaps", 0, NULL, 'g'},  {0}};
    for (int c; (c = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        switch (c) {
        case 'h': hot = (unsigned)atoi(optarg); break;
        case 'c': cold = (unsigned)atoi(optarg); break;
        case 'p': pause_ms = (unsigned)atoi(optarg); break;
        case 'P': plain = true; break;
        case 'g': gaps = true; break;
        default: return 2;
        }
    }
    if (hot == 0 || hot > CHUNKS_MAX || cold > CHUNKS_MAX)
        return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    sigset_t go;
    sigemptyset(&go);
    sigaddset(&go, SIGUSR2);
    sigprocmask(SIG_BLOCK, &go, &awake); /* it comes in a rest, not before one */
    sigaction(SIGUSR1, &(struct sigaction){.sa_handler = on_rest, .sa_flags = SA_RESTART}, NULL);
    sigaction(SIGUSR2, &(struct sigaction){.sa_handler = on_go}, NULL);
    set_up();
    for (uint64_t step = 1, round = 0;; step++) {
        unsigned i = (unsigned)(cr_mix(step) % hot);
        fill(hot_at[i], WORDS, step);
        last[i] = step;
        nanosleep(&(struct timespec){.tv_nsec = (long)pause_ms * 1000000}, NULL);
        while (resting)
            sigsuspend(&awake);
        if (step % ROUND)
            continue;
        verify(step, round);
        renew(++round);
        if (gaps)
            printf("gap %.6f\n", longest);
        longest = 0;
        printf("0 %d round %llu\n", (int)getpid(), (unsigned long long)round);
    }
}
