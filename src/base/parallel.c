#include "base/parallel.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#define THREADS_MAX 16u

struct run {
    bn_parallel_fn fn;
    void *ctx;
    size_t n;
    atomic_size_t next;
    struct {
        int r;
        struct bn_error err;
    } * results;
};

static void *work(void *arg)
{
    struct run *run = arg;
    for (;;) {
        size_t i = atomic_fetch_add(&run->next, 1);
        if (i >= run->n)
            return NULL;
        run->results[i].r = run->fn(run->ctx, i, &run->results[i].err);
    }
}

int bn_parallel(size_t n, bn_parallel_fn fn, void *ctx, struct bn_error *err)
{
    if (n == 0)
        return 0;
    if (n == 1)
        return fn(ctx, 0, err);

    struct run run = {.fn = fn, .ctx = ctx, .n = n};
    run.results = calloc(n, sizeof(*run.results));
    if (!run.results)
        return bn_error_set(err, ENOMEM, "", "out of memory");

    pthread_t threads[THREADS_MAX];
    size_t started = 0;
    for (size_t want = n - 1 < THREADS_MAX ? n - 1 : THREADS_MAX; started < want; started++)
        if (pthread_create(&threads[started], NULL, work, &run) != 0)
            break;
    work(&run);
    for (size_t i = 0; i < started; i++)
        pthread_join(threads[i], NULL);

    int r = 0;
    for (size_t i = 0; i < n && r == 0; i++) {
        r = run.results[i].r;
        if (r < 0 && err && !bn_error_is_set(err))
            *err = run.results[i].err;
    }
    free(run.results);
    return r;
}
