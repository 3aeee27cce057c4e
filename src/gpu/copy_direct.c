/* Direct copies between a set and pinned memory.
 *
 * Two streams take turns, each with batches of up to 64 MiB; four batches are under way at a time. That
 * keeps the link busy whatever the size of the pieces, and bounds what a cancelled job still has to wait
 * for. */
#include "gpu/copy.h"

#include <errno.h>

#define BATCH (UINT64_C(64) << 20)
#define DEPTH 4u
#define STREAMS 2u

struct batch {
    CUevent event;
    uint64_t bytes; /* 0: idle */
};

struct direct {
    struct bn_copy *job;
    const struct bn_driver *cu;
    CUstream streams[STREAMS];
    struct batch batches[DEPTH];
};

static int direct_open(struct direct *d)
{
    CUresult c = CUDA_SUCCESS;
    for (unsigned i = 0; i < STREAMS && c == CUDA_SUCCESS; i++)
        c = d->cu->StreamCreate(&d->streams[i], CU_STREAM_NON_BLOCKING);
    for (unsigned i = 0; i < DEPTH && c == CUDA_SUCCESS; i++)
        c = d->cu->EventCreate(&d->batches[i].event, CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING);
    if (c == CUDA_SUCCESS)
        return 0;
    bn_copy_fail_cuda(d->job, c, "making a copy stream");
    return -EIO;
}

static void direct_close(struct direct *d)
{
    for (unsigned i = 0; i < STREAMS; i++) {
        if (!d->streams[i])
            continue;
        d->cu->StreamSynchronize(d->streams[i]); /* after a failure something may still be under way */
        d->cu->StreamDestroy(d->streams[i]);
    }
    for (unsigned i = 0; i < DEPTH; i++)
        if (d->batches[i].event)
            d->cu->EventDestroy(d->batches[i].event);
}

/* Start copies of one extent's range, piece by contiguous piece. */
static CUresult issue(struct direct *d, CUstream stream, uint64_t off, uint64_t bytes, uint64_t mem_off)
{
    CUdeviceptr dev = bn_gpu_set_ptr(d->job->spec.set) + off;
    CUresult c = CUDA_SUCCESS;
    while (bytes > 0 && c == CUDA_SUCCESS) {
        uint64_t len = 0;
        void *host = bn_mem_dma_piece(d->job->spec.mem, mem_off, &len);
        if (len > bytes)
            len = bytes;
        if (d->job->spec.mode == BN_COPY_TO_HOST)
            c = d->cu->MemcpyDtoHAsync(host, dev, len, stream);
        else
            c = d->cu->MemcpyHtoDAsync(dev, host, len, stream);
        dev += len;
        mem_off += len;
        bytes -= len;
    }
    return c;
}

/* False: nothing left to start, or failed. */
static bool batch_start(struct direct *d, struct batch *b, CUstream stream)
{
    uint64_t off, bytes, mem_off;
    CUresult c = CUDA_SUCCESS;
    while (b->bytes < BATCH && c == CUDA_SUCCESS &&
           bn_copy_next(d->job, BATCH - b->bytes, &off, &bytes, &mem_off)) {
        c = issue(d, stream, off, bytes, mem_off);
        b->bytes += bytes;
    }
    if (b->bytes > 0 && c == CUDA_SUCCESS)
        c = d->cu->EventRecord(b->event, stream);
    if (c != CUDA_SUCCESS) {
        b->bytes = 0;
        bn_copy_fail_cuda(d->job, c, "starting a copy");
    }
    return b->bytes > 0;
}

static void batch_finish(struct direct *d, struct batch *b)
{
    if (b->bytes == 0)
        return;
    CUresult c = d->cu->EventSynchronize(b->event);
    if (c != CUDA_SUCCESS)
        bn_copy_fail_cuda(d->job, c, "a copy");
    else
        atomic_fetch_add(&d->job->done, b->bytes);
    b->bytes = 0;
}

void bn_copy_direct(struct bn_copy *job)
{
    struct direct d = {.job = job, .cu = &job->gpu->cu};
    struct bn_error err = BN_ERROR_INIT;
    int r = bn_gpu_enter(job->gpu, bn_gpu_set_device(job->spec.set), "copy", &err);
    if (r < 0) {
        bn_copy_fail(job, r, &err);
        return;
    }
    if (direct_open(&d) == 0) {
        bool more = true;
        for (unsigned i = 0; more; i++) {
            batch_finish(&d, &d.batches[i % DEPTH]);
            more = batch_start(&d, &d.batches[i % DEPTH], d.streams[i % STREAMS]);
            if (!more) /* the oldest first */
                for (unsigned k = 1; k <= DEPTH; k++)
                    batch_finish(&d, &d.batches[(i + k) % DEPTH]);
        }
    }
    direct_close(&d);
    bn_gpu_leave(job->gpu);
}
