/* What the agent uses in place of pthread's locks: nothing here allocates, and a forked child can reset it. */
#pragma once

#include <errno.h>
#include <linux/futex.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define bn_likely(x) __builtin_expect(!!(x), 1)
#define bn_unlikely(x) __builtin_expect(!!(x), 0)

#define bn_load(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define bn_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define bn_load_acq(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define bn_store_rel(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)

/* A full fence. ThreadSanitizer knows none, but understands a read-modify-write. */
static inline void bn_fence(void)
{
#ifdef __SANITIZE_THREAD__
    static uint32_t word;
    __atomic_fetch_add(&word, 0, __ATOMIC_SEQ_CST);
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

/* Sleep while *word is value, at most ns nanoseconds (0: no limit). May return early; the caller looks again. Keeps errno. */
static inline void bn_futex_wait(uint32_t *word, uint32_t value, uint64_t ns)
{
    struct timespec ts = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
    int saved = errno;
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, ns ? &ts : NULL, NULL, 0);
    errno = saved;
}

static inline void bn_futex_wake(uint32_t *word, int count)
{
    int saved = errno;
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
    errno = saved;
}

/* Monotonic nanoseconds. */
static inline uint64_t bn_clock_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Not recursive. Zero is free. */
struct bn_lock {
    uint32_t word; /* 0 free, 1 held, 2 held and somebody waits */
};

static inline void bn_lock(struct bn_lock *l)
{
    uint32_t seen = 0;
    if (bn_likely(__atomic_compare_exchange_n(&l->word, &seen, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)))
        return;
    while (__atomic_exchange_n(&l->word, 2, __ATOMIC_ACQUIRE) != 0)
        bn_futex_wait(&l->word, 2, 0);
}

static inline void bn_unlock(struct bn_lock *l)
{
    if (bn_unlikely(__atomic_exchange_n(&l->word, 0, __ATOMIC_RELEASE) == 2))
        bn_futex_wake(&l->word, 1);
}
