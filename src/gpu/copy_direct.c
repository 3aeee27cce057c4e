/* Direct copies between a set and pinned memory.
 *
 * Two lanes take turns, each with batches of up to 64 MiB; four batches are under way at a time. That
 * keeps the link busy whatever the size of the pieces, and bounds what a cancelled job still has to wait
 * for. */
#include "gpu/copy.h"

#include <errno.h>

#define BATCH (UINT64_C(64) << 20)
#define DEPTH 4u
#define LANES 2u

struct direct {
    struct bn_copy *job;
    const struct bn_driver *cu;
    struct bn_gpu_lane *lanes[LANES];
    uint64_t batches[DEPTH]; /* bytes of each; 0: idle */
};

static int direct_open(struct direct *d)
{
    unsigned dev = bn_gpu_set_device(d->job->spec.set);
    CUresult c = CUDA_SUCCESS;
    for (unsigned i = 0; i < LANES && c == CUDA_SUCCESS; i++)
        c = bn_gpu_lane_take(d->job->gpu, dev, d->job->spec.mode == BN_COPY_FROM_HOST, &d->lanes[i]);
    if (c == CUDA_SUCCESS)
        return 0;
    bn_copy_fail_cuda(d->job, c, "making ready for a copy");
    return -EIO;
}

static void direct_close(struct direct *d)
{
    for (unsigned i = 0; i < LANES; i++) {
        if (d->lanes[i]) /* after a failure something may still be under way */
            d->cu->StreamSynchronize(d->lanes[i]->stream);
        bn_gpu_lane_return(d->job->gpu, bn_gpu_set_device(d->job->spec.set), d->lanes[i]);
    }
}

/* Of batch i: each lane has the events of two that are under way. */
static CUevent event_of(const struct direct *d, unsigned i)
{
    return d->lanes[i % LANES]->events[i / LANES % 2];
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
static bool batch_start(struct direct *d, unsigned i)
{
    uint64_t *batch = &d->batches[i % DEPTH];
    CUstream stream = d->lanes[i % LANES]->stream;
    uint64_t off, bytes, mem_off;
    CUresult c = CUDA_SUCCESS;
    while (*batch < BATCH && c == CUDA_SUCCESS &&
           bn_copy_next(d->job, BATCH - *batch, &off, &bytes, &mem_off)) {
        c = issue(d, stream, off, bytes, mem_off);
        *batch += bytes;
    }
    if (*batch > 0 && c == CUDA_SUCCESS)
        c = d->cu->EventRecord(event_of(d, i), stream);
    if (c != CUDA_SUCCESS) {
        *batch = 0;
        bn_copy_fail_cuda(d->job, c, "starting a copy");
    }
    return *batch > 0;
}

static void batch_finish(struct direct *d, unsigned i)
{
    uint64_t *batch = &d->batches[i % DEPTH];
    if (*batch == 0)
        return;
    CUresult c = d->cu->EventSynchronize(event_of(d, i));
    if (c != CUDA_SUCCESS)
        bn_copy_fail_cuda(d->job, c, "a copy");
    else
        atomic_fetch_add(&d->job->done, *batch);
    *batch = 0;
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
            batch_finish(&d, i);
            more = batch_start(&d, i);
            if (!more) /* the oldest first */
                for (unsigned k = 1; k <= DEPTH; k++)
                    batch_finish(&d, i + k);
        }
    }
    direct_close(&d);
    bn_gpu_leave(job->gpu);
}
