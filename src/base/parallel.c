#include "base/parallel.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#define THREADS_MAX 16u

struct run {
    bn_parallel_fn fn;
    void *ctx;
    size_t n;
    atomic_size_t next;
    pthread_mutex_t lock; /* of the failure */
    size_t failed;        /* the first so far; n: none */
    int r;
    struct bn_error err;
};

static void fail(struct run *run, size_t i, int r, const struct bn_error *err)
{
    pthread_mutex_lock(&run->lock);
    if (i < run->failed) {
        run->failed = i;
        run->r = r;
        run->err = *err;
    }
    pthread_mutex_unlock(&run->lock);
}

static void *work(void *arg)
{
    struct run *run = arg;
    for (;;) {
        struct bn_error err = BN_ERROR_INIT;
        size_t i = atomic_fetch_add(&run->next, 1);
        if (i >= run->n)
            return NULL;
        int r = run->fn(run->ctx, i, &err);
        if (r < 0)
            fail(run, i, r, &err);
    }
}

int bn_parallel(size_t n, bn_parallel_fn fn, void *ctx, struct bn_error *err)
{
    if (n == 0)
        return 0;
    if (n == 1)
        return fn(ctx, 0, err);

    struct run run = {.fn = fn, .ctx = ctx, .n = n, .failed = n};
    pthread_mutex_init(&run.lock, NULL);
    pthread_t threads[THREADS_MAX];
    size_t started = 0;
    for (size_t want = n - 1 < THREADS_MAX ? n - 1 : THREADS_MAX; started < want; started++)
        if (pthread_create(&threads[started], NULL, work, &run) != 0)
            break;
    work(&run);
    for (size_t i = 0; i < started; i++)
        pthread_join(threads[i], NULL);

    pthread_mutex_destroy(&run.lock);
    if (run.r < 0 && err && !bn_error_is_set(err))
        *err = run.err;
    return run.r;
}

unsigned bn_cores(unsigned most)
{
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n < (long)most ? (unsigned)n : most;
}
