/* Streamed copies: a set on one side, a callback on the other, staging buffers between.
 *
 * Every worker thread has a lane and two buffers of its own and needs no other worker: while its
 * callback works on one buffer the other one is being copied. Buffers of all workers queue up at the GPU's
 * copy engine, which takes them in turn. The buffers are lent by the copier; a worker whose job has more of them than
 * another's gives them back between two pieces, and waits for its next turn. */
#include "gpu/copy.h"

#include <errno.h>
#include <stdlib.h>

struct slot {
    void *data;
    CUevent event;
    uint64_t off, bytes; /* bytes 0: idle */
};

struct worker {
    struct bn_copy *job;
    const struct bn_driver *cu;
    struct bn_gpu_lane *lane;
    struct slot slots[2];
    uint64_t piece; /* bytes at a time */
    pthread_t thread;
    bool started;
};

static int worker_open(struct worker *w)
{
    CUresult c = bn_gpu_lane_take(w->job->gpu, bn_gpu_set_device(w->job->spec.set),
                                  w->job->spec.mode == BN_COPY_IN, &w->lane);
    if (c != CUDA_SUCCESS) {
        bn_copy_fail_cuda(w->job, c, "making ready for a copy");
        return -EIO;
    }
    for (unsigned i = 0; i < 2; i++)
        w->slots[i].event = w->lane->events[i];
    return 0;
}

/* Start the copy of a slot. False: failed, the slot is idle. */
static bool slot_start(struct worker *w, struct slot *s)
{
    CUdeviceptr dev = bn_gpu_set_ptr(w->job->spec.set) + s->off;
    CUresult c = w->job->spec.mode == BN_COPY_OUT
                     ? w->cu->MemcpyDtoHAsync(s->data, dev, s->bytes, w->lane->stream)
                     : w->cu->MemcpyHtoDAsync(dev, s->data, s->bytes, w->lane->stream);
    if (c == CUDA_SUCCESS)
        c = w->cu->EventRecord(s->event, w->lane->stream);
    if (c != CUDA_SUCCESS) {
        s->bytes = 0;
        bn_copy_fail_cuda(w->job, c, "starting a copy");
    }
    return c == CUDA_SUCCESS;
}

static bool slot_wait(struct worker *w, struct slot *s)
{
    CUresult c = w->cu->EventSynchronize(s->event);
    if (c != CUDA_SUCCESS)
        bn_copy_fail_cuda(w->job, c, "a copy");
    return c == CUDA_SUCCESS;
}

/* False: it is another job's turn. */
static bool run_out(struct worker *w)
{
    const struct bn_copy_spec *spec = &w->job->spec;
    bool yield = false;
    for (unsigned i = 0, pieces = 0;; i ^= 1) {
        struct slot *next = &w->slots[i], *ready = &w->slots[i ^ 1];
        yield = yield || (pieces > 0 && bn_copier_yield(w->job->copier, w->job));
        if (!yield && ++pieces && bn_copy_next(w->job, w->piece, &next->off, &next->bytes, NULL))
            slot_start(w, next);
        if (ready->bytes == 0 && next->bytes == 0)
            return !yield;
        if (ready->bytes == 0)
            continue;
        if (!slot_wait(w, ready) || atomic_load(&w->job->stop))
            return true;
        struct bn_error err = BN_ERROR_INIT;
        int r = spec->consume(spec->arg, ready->off / BN_GPU_CHUNK, (unsigned)(ready->bytes / BN_GPU_CHUNK),
                              ready->data, &err);
        if (r < 0) {
            bn_copy_fail(w->job, r, &err);
            return true;
        }
        atomic_fetch_add(&w->job->done, ready->bytes);
        ready->bytes = 0;
    }
}

static bool slot_drain(struct worker *w, struct slot *s)
{
    if (s->bytes == 0)
        return true;
    if (!slot_wait(w, s))
        return false;
    atomic_fetch_add(&w->job->done, s->bytes);
    s->bytes = 0;
    return true;
}

static bool run_in(struct worker *w)
{
    const struct bn_copy_spec *spec = &w->job->spec;
    bool yield = false;
    for (unsigned i = 0, pieces = 0;; i ^= 1, pieces++) {
        struct slot *s = &w->slots[i];
        if (!slot_drain(w, s))
            return true;
        yield = pieces > 0 && bn_copier_yield(w->job->copier, w->job);
        if (yield || !bn_copy_next(w->job, w->piece, &s->off, &s->bytes, NULL))
            break;
        struct bn_error err = BN_ERROR_INIT;
        int r = spec->produce(spec->arg, s->off / BN_GPU_CHUNK, (unsigned)(s->bytes / BN_GPU_CHUNK), s->data,
                              &err);
        if (r < 0) {
            s->bytes = 0;
            bn_copy_fail(w->job, r, &err);
            return true;
        }
        if (!slot_start(w, s))
            return true;
    }
    slot_drain(w, &w->slots[0]);
    slot_drain(w, &w->slots[1]);
    return !yield;
}

/* With buffers, as long as there is something to do. */
static void run_turns(struct worker *w)
{
    struct bn_mem *pair[2];
    bool done = false;
    while (!done && bn_copier_lend(w->job->copier, w->job, pair)) {
        for (unsigned k = 0; k < 2; k++)
            w->slots[k].data = bn_mem_piece(pair[k], 0, NULL, NULL);
        done = w->job->spec.mode == BN_COPY_OUT ? run_out(w) : run_in(w);
        if (done)
            w->cu->StreamSynchronize(
                w->lane->stream); /* after a failure something may still reach the buffers */
        bn_copier_return(w->job->copier, w->job, pair);
    }
}

static void *worker_run(void *arg)
{
    struct worker *w = arg;
    struct bn_error err = BN_ERROR_INIT;
    int r = bn_gpu_enter(w->job->gpu, bn_gpu_set_device(w->job->spec.set), "copy", &err);
    if (r < 0) {
        bn_copy_fail(w->job, r, &err);
        return NULL;
    }
    if (worker_open(w) == 0)
        run_turns(w);
    bn_gpu_lane_return(w->job->gpu, bn_gpu_set_device(w->job->spec.set), w->lane);
    bn_gpu_leave(w->job->gpu);
    return NULL;
}

/* Small jobs get small pieces, so that every worker has a few. */
static uint64_t piece_size(const struct bn_copy *job, unsigned workers)
{
    uint64_t most = bn_copier_buffer(job->copier), piece = job->total / (4 * (uint64_t)workers);
    if (job->spec.piece && job->spec.piece < most)
        most = job->spec.piece;
    if (piece > most)
        piece = most;
    piece -= piece % BN_GPU_CHUNK;
    return piece ? piece : BN_GPU_CHUNK;
}

static void run_workers(struct bn_copy *job, struct worker *workers, unsigned n)
{
    uint64_t piece = piece_size(job, n);
    for (unsigned i = 0; i < n; i++) {
        struct worker *w = &workers[i];
        *w = (struct worker){.job = job, .cu = &job->gpu->cu, .piece = piece};
        /* This thread is worker 0. Fewer threads than wished for do the job as well. */
        w->started = i > 0 && bn_gpu_thread(&w->thread, worker_run, w) == 0;
    }
    worker_run(&workers[0]);
    for (unsigned i = 1; i < n; i++)
        if (workers[i].started)
            pthread_join(workers[i].thread, NULL);
}

void bn_copy_streamed(struct bn_copy *job)
{
    unsigned want = job->spec.workers ? job->spec.workers : bn_copier_workers(job->copier, job->spec.mode);
    uint64_t chunks = job->total / BN_GPU_CHUNK;
    if (want > chunks)
        want = (unsigned)chunks;
    struct worker *workers = calloc(want, sizeof(*workers));
    if (!workers) {
        bn_copy_fail(job, -ENOMEM, NULL);
        return;
    }
    bn_copier_reserve(job->copier, want);
    run_workers(job, workers, want);
    free(workers);
}
