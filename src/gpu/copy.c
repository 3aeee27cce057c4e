/* Copy jobs: their life, their progress, and the staging buffers they share. How bytes move is in
 * copy_direct.c and copy_stream.c. */
#include "gpu/copy.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/parallel.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define STAGE "copy"
#define BUFFER_DEFAULT (UINT64_C(16) << 20)
#define WORKERS_MAX 64u

/* ---- The copier ---------------------------------------------------------------------------------------- */

/* A worker that waits for buffers. */
struct waiter {
    const struct bn_copy *job;
    struct waiter *next;
};

struct bn_copier {
    struct bn_gpu *gpu;
    struct bn_copier_config config;
    struct bn_pool *pool; /* of the staging buffers; its limit is what all jobs may have together */
    pthread_mutex_t lock;
    pthread_cond_t returned;
    struct bn_mem **idle; /* buffers that nobody has; config.buffers places */
    unsigned nidle;
    unsigned lent;
    unsigned holders;
    struct waiter *waiting; /* in the order in which they came */
};

int bn_copier_new(struct bn_gpu *gpu, const struct bn_copier_config *config, struct bn_copier **out,
                  struct bn_error *err)
{
    struct bn_copier *c = calloc(1, sizeof(*c));
    if (!c)
        return bn_error_set(err, ENOMEM, STAGE, "Out of memory.");
    pthread_mutex_init(&c->lock, NULL);
    pthread_cond_init(&c->returned, NULL);
    c->gpu = gpu;
    c->config = *config;
    if (!c->config.buffer)
        c->config.buffer = BUFFER_DEFAULT;
    if (!c->config.workers)
        c->config.workers = bn_cores(8);
    if (c->config.workers > WORKERS_MAX)
        c->config.workers = WORKERS_MAX;
    if (!c->config.workers_in)
        c->config.workers_in = config->workers ? c->config.workers : bn_cores(16);
    if (c->config.workers_in > WORKERS_MAX)
        c->config.workers_in = WORKERS_MAX;
    if (!c->config.buffers)
        c->config.buffers = (bn_gpu_count(gpu) > 4 ? bn_gpu_count(gpu) : 4) * 2 * c->config.workers;
    c->config.buffers += c->config.buffers % 2; /* they are lent in pairs */

    int r = 0;
    if (c->config.buffer % BN_GPU_CHUNK != 0)
        r = bn_error_set(err, EINVAL, STAGE,
                         "Staging buffers of %llu bytes are not possible: multiples of 2 MiB are.",
                         (unsigned long long)c->config.buffer);
    if (r == 0 && !(c->idle = calloc(c->config.buffers, sizeof(*c->idle))))
        r = bn_error_set(err, ENOMEM, STAGE, "Out of memory.");
    if (r == 0) {
        /* A slab holds whole buffers, so that none lies across two registrations. */
        struct bn_pool_config pc = {.limit = c->config.buffers * c->config.buffer,
                                    .slab = 4 * c->config.buffer};
        r = bn_pool_new(gpu, &pc, &c->pool, err);
    }
    if (r < 0) {
        bn_copier_free(c);
        return r;
    }
    *out = c;
    return 0;
}

void bn_copier_free(struct bn_copier *c)
{
    if (!c)
        return;
    while (c->nidle > 0)
        bn_mem_free(c->idle[--c->nidle]);
    free(c->idle);
    bn_pool_free(c->pool);
    pthread_cond_destroy(&c->returned);
    pthread_mutex_destroy(&c->lock);
    free(c);
}

int bn_copier_warm(struct bn_copier *c, struct bn_error *err)
{
    return bn_pool_reserve(c->pool, 2 * c->config.workers * c->config.buffer, err);
}

void bn_copier_hold(struct bn_copier *c)
{
    pthread_mutex_lock(&c->lock);
    c->holders++;
    pthread_mutex_unlock(&c->lock);
}

void bn_copier_let_go(struct bn_copier *c)
{
    pthread_mutex_lock(&c->lock);
    c->holders--;
    pthread_mutex_unlock(&c->lock);
}

void bn_copier_trim(struct bn_copier *c)
{
    pthread_mutex_lock(&c->lock);
    while (c->nidle > 0 && c->holders == 0)
        bn_mem_free(c->idle[--c->nidle]);
    if (c->holders == 0) /* with the lock: nobody shall begin to hold them meanwhile */
        bn_pool_trim(c->pool);
    pthread_mutex_unlock(&c->lock);
}

uint64_t bn_copier_buffer(const struct bn_copier *c)
{
    return c->config.buffer;
}

unsigned bn_copier_workers(const struct bn_copier *c, enum bn_copy_mode mode)
{
    return mode == BN_COPY_IN ? c->config.workers_in : c->config.workers;
}

unsigned bn_copier_threads(const struct bn_copier *c)
{
    return c->config.workers;
}

void bn_copier_reserve(struct bn_copier *c, unsigned pairs)
{
    unsigned buffers = 2 * pairs < c->config.buffers ? 2 * pairs : c->config.buffers;
    bn_pool_reserve(c->pool, buffers * c->config.buffer, NULL);
}

/* Make what is missing of a pair. */
static int make_buffers(struct bn_copier *c, struct bn_mem *pair[2], unsigned have, struct bn_error *err)
{
    for (; have < 2; have++) {
        uint64_t len;
        int r = bn_mem_alloc(c->pool, c->config.buffer, &pair[have], err);
        if (r < 0)
            return r;
        bn_mem_dma_piece(pair[have], 0, &len);
        if (len < c->config.buffer) { /* in pieces: the machine is so small that it cut the pool short */
            bn_mem_free(pair[have]);
            pair[have] = NULL;
            return bn_error_set(err, ENOMEM, STAGE, "The machine has too little memory for staging buffers.");
        }
    }
    return 0;
}

/* Whose turn it is: of the job with the fewest pairs, the one that has waited longest. With the lock; somebody waits. */
static const struct waiter *next_waiter(const struct bn_copier *c)
{
    const struct waiter *next = c->waiting;
    for (const struct waiter *w = c->waiting; w; w = w->next)
        if (w->job->pairs < next->job->pairs)
            next = w;
    return next;
}

/* In line until it is our turn. With the lock, which is released meanwhile. */
static bool wait_turn(struct bn_copier *c, struct bn_copy *job)
{
    struct waiter self = {.job = job}, **end = &c->waiting;
    while (*end)
        end = &(*end)->next;
    *end = &self;
    bool needed;
    while ((needed = !atomic_load(&job->stop) && !atomic_load(&job->drained)) &&
           (c->config.buffers - c->lent < 2 || next_waiter(c) != &self))
        pthread_cond_wait(&c->returned, &c->lock);
    for (end = &c->waiting; *end != &self;)
        end = &(*end)->next;
    *end = self.next;
    pthread_cond_broadcast(&c->returned); /* it may be another's turn now */
    return needed;
}

static void give_back(struct bn_copier *c, struct bn_copy *job, struct bn_mem *pair[2])
{
    for (unsigned i = 0; i < 2; i++)
        if (pair[i])
            c->idle[c->nidle++] = pair[i];
    c->lent -= 2;
    job->pairs--;
    pthread_cond_broadcast(&c->returned);
}

bool bn_copier_lend(struct bn_copier *c, struct bn_copy *job, struct bn_mem *pair[2])
{
    struct bn_error err = BN_ERROR_INIT;
    unsigned n = 0;
    pair[0] = pair[1] = NULL;
    pthread_mutex_lock(&c->lock);
    if (!wait_turn(c, job)) {
        pthread_mutex_unlock(&c->lock);
        return false;
    }
    c->lent += 2;
    job->pairs++;
    while (n < 2 && c->nidle > 0)
        pair[n++] = c->idle[--c->nidle];
    pthread_mutex_unlock(&c->lock);

    int r = make_buffers(c, pair, n, &err);
    if (r == 0)
        return true;
    pthread_mutex_lock(&c->lock);
    give_back(c, job, pair);
    bool alone = job->pairs == 0;
    pthread_mutex_unlock(&c->lock);
    if (alone) /* else fewer workers do it */
        bn_copy_fail(job, r, &err);
    return false;
}

void bn_copier_return(struct bn_copier *c, struct bn_copy *job, struct bn_mem *pair[2])
{
    pthread_mutex_lock(&c->lock);
    give_back(c, job, pair);
    pthread_mutex_unlock(&c->lock);
}

bool bn_copier_yield(struct bn_copier *c, const struct bn_copy *job)
{
    bool yield = false;
    pthread_mutex_lock(&c->lock);
    /* With none at all it takes turns even with a job that has only one pair. */
    if (c->waiting && c->config.buffers - c->lent < 2) {
        unsigned fewest = next_waiter(c)->job->pairs;
        yield = fewest == 0 || fewest + 1 < job->pairs;
    }
    pthread_mutex_unlock(&c->lock);
    return yield;
}

/* ---- For the threads of a job -------------------------------------------------------------------------- */

bool bn_copy_next(struct bn_copy *job, uint64_t max, uint64_t *off, uint64_t *bytes, uint64_t *mem_off)
{
    if (atomic_load(&job->stop))
        return false;
    pthread_mutex_lock(&job->lock);
    while (job->at < job->spec.nextents && job->at_off == job->spec.extents[job->at].bytes) {
        job->at++;
        job->at_off = 0;
    }
    bool more = job->at < job->spec.nextents;
    if (more) {
        const struct bn_copy_extent *e = &job->spec.extents[job->at];
        uint64_t left = e->bytes - job->at_off;
        *bytes = left < max ? left : max;
        *off = e->offset + job->at_off;
        if (mem_off)
            *mem_off = e->mem_off + job->at_off;
        job->at_off += *bytes;
    }
    if (!more)
        atomic_store(&job->drained, true);
    pthread_mutex_unlock(&job->lock);
    return more;
}

void bn_copy_fail(struct bn_copy *job, int r, const struct bn_error *err)
{
    pthread_mutex_lock(&job->lock);
    if (job->result == 0) {
        job->result = r < 0 ? r : -EIO;
        if (bn_error_is_set(err))
            job->err = *err;
        else
            bn_error_set(&job->err, job->result, STAGE, "A copy of %llu MiB of GPU memory failed: %s.",
                         (unsigned long long)(job->total >> 20), strerror(-job->result));
    }
    atomic_store(&job->stop, true);
    pthread_mutex_unlock(&job->lock);
}

void bn_copy_fail_cuda(struct bn_copy *job, CUresult c, const char *what)
{
    struct bn_error err = BN_ERROR_INIT;
    int r = bn_cuda_fail(
        &err, c, STAGE, "GPU %u: %s failed, %llu of %llu MiB done", bn_gpu_set_device(job->spec.set), what,
        (unsigned long long)(atomic_load(&job->done) >> 20), (unsigned long long)(job->total >> 20));
    bn_copy_fail(job, r, &err);
}

/* ---- A job's life -------------------------------------------------------------------------------------- */

static bool streamed(const struct bn_copy_spec *spec)
{
    return spec->mode == BN_COPY_OUT || spec->mode == BN_COPY_IN;
}

static int check_extent(const struct bn_copy_spec *spec, const struct bn_copy_extent *e, struct bn_error *err)
{
    uint64_t bytes = bn_gpu_set_bytes(spec->set);
    if (e->offset > bytes || e->bytes > bytes - e->offset)
        return bn_error_set(
            err, EINVAL, STAGE, "A copy of %llu bytes at %llu lies outside of the %llu bytes of GPU memory.",
            (unsigned long long)e->bytes, (unsigned long long)e->offset, (unsigned long long)bytes);
    if (streamed(spec)) {
        if (e->offset % BN_GPU_CHUNK != 0 || e->bytes % BN_GPU_CHUNK != 0)
            return bn_error_set(err, EINVAL, STAGE,
                                "A streamed copy of %llu bytes at %llu: whole chunks of 2 MiB are needed.",
                                (unsigned long long)e->bytes, (unsigned long long)e->offset);
        return 0;
    }
    bytes = bn_mem_bytes(spec->mem);
    if (e->mem_off > bytes || e->bytes > bytes - e->mem_off)
        return bn_error_set(
            err, EINVAL, STAGE, "A copy of %llu bytes at %llu lies outside of the %llu bytes of host memory.",
            (unsigned long long)e->bytes, (unsigned long long)e->mem_off, (unsigned long long)bytes);
    return 0;
}

/* Own copies of the extents, all checked, and their sum. */
static int take_extents(struct bn_copy *job, const struct bn_copy_spec *spec, struct bn_error *err)
{
    const struct bn_copy_extent whole = {.bytes = bn_gpu_set_bytes(spec->set)};
    const struct bn_copy_extent *from = spec->extents ? spec->extents : &whole;
    size_t n = spec->extents ? spec->nextents : 1;
    struct bn_copy_extent *own = calloc(n ? n : 1, sizeof(*own));
    if (!own)
        return bn_error_set(err, ENOMEM, STAGE, "Out of memory.");
    job->spec.extents = own;
    job->spec.nextents = n;
    for (size_t i = 0; i < n; i++) {
        int r = check_extent(spec, &from[i], err);
        if (r < 0)
            return r;
        own[i] = from[i];
        job->total += own[i].bytes;
    }
    return 0;
}

static void *job_run(void *arg)
{
    struct bn_copy *job = arg;
    if (job->total > 0) {
        if (streamed(&job->spec))
            bn_copy_streamed(job);
        else
            bn_copy_direct(job);
    }
    pthread_mutex_lock(&job->lock);
    if (job->result == 0 && job->cancelled && atomic_load(&job->done) < job->total) {
        job->result = -ECANCELED;
        bn_error_set(&job->err, ECANCELED, STAGE, "The copy was cancelled after %llu of %llu MiB.",
                     (unsigned long long)(atomic_load(&job->done) >> 20),
                     (unsigned long long)(job->total >> 20));
    }
    job->ended = true;
    job->end_ns = bn_now_ns();
    pthread_cond_broadcast(&job->cond);
    uint64_t one = 1;
    ssize_t w = write(job->eventfd, &one, sizeof(one));
    (void)w;
    pthread_mutex_unlock(&job->lock);
    return NULL;
}

static void job_free(struct bn_copy *job)
{
    bn_close(job->eventfd);
    free((void *)job->spec.extents);
    pthread_cond_destroy(&job->cond);
    pthread_mutex_destroy(&job->lock);
    free(job);
}

int bn_copy_start(struct bn_copier *copier, const struct bn_copy_spec *spec, struct bn_copy **out,
                  struct bn_error *err)
{
    if (!spec->set || (!streamed(spec) && !spec->mem) || (spec->mode == BN_COPY_OUT && !spec->consume) ||
        (spec->mode == BN_COPY_IN && !spec->produce))
        return bn_error_set(err, EINVAL, STAGE, "A copy lacks one of its ends.");

    struct bn_copy *job = calloc(1, sizeof(*job));
    if (!job)
        return bn_error_set(err, ENOMEM, STAGE, "Out of memory.");
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&job->lock, NULL);
    pthread_cond_init(&job->cond, &attr);
    pthread_condattr_destroy(&attr);
    job->copier = copier;
    job->gpu = copier->gpu;
    job->spec = *spec;
    job->spec.extents = NULL;
    job->eventfd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    int r = job->eventfd < 0 ? bn_error_set(err, errno, STAGE, "eventfd: %s.", strerror(errno)) : 0;
    if (r == 0)
        r = take_extents(job, spec, err);
    if (r == 0 && (r = bn_gpu_thread(&job->thread, job_run, job)) < 0)
        bn_error_set(err, r, STAGE, "A thread for a copy cannot be started: %s.", strerror(-r));
    if (r < 0) {
        job_free(job);
        return r;
    }
    *out = job;
    return 0;
}

uint64_t bn_copy_done(const struct bn_copy *job)
{
    return atomic_load(&((struct bn_copy *)job)->done);
}

uint64_t bn_copy_total(const struct bn_copy *job)
{
    return job->total;
}

void bn_copy_cancel(struct bn_copy *job)
{
    pthread_mutex_lock(&job->lock);
    job->cancelled = true;
    atomic_store(&job->stop, true);
    pthread_mutex_unlock(&job->lock);
    /* It may be waiting for buffers. */
    pthread_mutex_lock(&job->copier->lock);
    pthread_cond_broadcast(&job->copier->returned);
    pthread_mutex_unlock(&job->copier->lock);
}

int bn_copy_fd(const struct bn_copy *job)
{
    return job->eventfd;
}

bool bn_copy_ended(const struct bn_copy *job)
{
    pthread_mutex_t *lock = &((struct bn_copy *)job)->lock;
    pthread_mutex_lock(lock);
    bool ended = job->ended;
    pthread_mutex_unlock(lock);
    return ended;
}

uint64_t bn_copy_end_ns(const struct bn_copy *job)
{
    pthread_mutex_t *lock = &((struct bn_copy *)job)->lock;
    pthread_mutex_lock(lock);
    uint64_t ns = job->end_ns;
    pthread_mutex_unlock(lock);
    return ns;
}

static struct timespec from_now(unsigned ms)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    t.tv_sec += ms / 1000;
    t.tv_nsec += (long)(ms % 1000) * 1000000;
    if (t.tv_nsec >= 1000000000) {
        t.tv_nsec -= 1000000000;
        t.tv_sec++;
    }
    return t;
}

int bn_copy_wait(struct bn_copy *job, bn_copy_progress_fn progress, void *arg, unsigned interval_ms,
                 struct bn_error *err)
{
    pthread_mutex_lock(&job->lock);
    while (!job->ended) {
        if (!progress) {
            pthread_cond_wait(&job->cond, &job->lock);
            continue;
        }
        struct timespec until = from_now(interval_ms ? interval_ms : 100);
        int r = 0;
        while (!job->ended && r == 0)
            r = pthread_cond_timedwait(&job->cond, &job->lock, &until);
        pthread_mutex_unlock(&job->lock);
        progress(arg, atomic_load(&job->done), job->total);
        pthread_mutex_lock(&job->lock);
    }
    int result = job->result;
    if (result < 0 && err && !bn_error_is_set(err))
        *err = job->err;
    pthread_mutex_unlock(&job->lock);
    return result;
}

void bn_copy_free(struct bn_copy *job)
{
    if (!job)
        return;
    bn_copy_cancel(job);
    pthread_join(job->thread, NULL);
    job_free(job);
}
