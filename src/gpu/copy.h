/* Inside src/gpu's copy*.c only: a job, seen by the threads that do its work. */
#pragma once

#include "gpu/driver.h"

#include <stdatomic.h>

struct bn_copy {
    struct bn_copier *copier;
    struct bn_gpu *gpu;
    struct bn_copy_spec spec; /* extents: a copy of our own */
    uint64_t total;
    int eventfd;
    pthread_t thread;
    _Atomic uint64_t done;
    atomic_bool stop; /* cancelled or failed: start nothing new */

    atomic_bool drained; /* every piece is taken */
    unsigned pairs;      /* of buffers that it has; the copier's lock */

    pthread_mutex_t lock; /* of everything below */
    pthread_cond_t cond;
    bool cancelled, ended;
    uint64_t end_ns;
    int result;
    struct bn_error err;
    size_t at;       /* next piece: in extent `at` … */
    uint64_t at_off; /* … from this byte on */
};

/* The next range of the set to copy, at most `max` bytes of one extent. False when there is no more, or
 * the job shall stop. *mem_off: as the extent says. */
bool bn_copy_next(struct bn_copy *job, uint64_t max, uint64_t *off, uint64_t *bytes, uint64_t *mem_off);
/* The first failure is the job's. Stops it. */
void bn_copy_fail(struct bn_copy *job, int r, const struct bn_error *err);
void bn_copy_fail_cuda(struct bn_copy *job, CUresult c, const char *what);

/* The two ways; in the job's own thread. Return when nothing touches the job's memory any more. */
void bn_copy_direct(struct bn_copy *job);
void bn_copy_streamed(struct bn_copy *job);

/* Two staging buffers of bn_copier_buffer() bytes for one worker of the job. While all are lent, waits: the next ones go to the job that
 * has the fewest. False: no more are needed, or can be had; if the job has none at all, it has failed. */
bool bn_copier_lend(struct bn_copier *copier, struct bn_copy *job, struct bn_mem *pair[2]);
void bn_copier_return(struct bn_copier *copier, struct bn_copy *job, struct bn_mem *pair[2]);
/* Another job has fewer buffers and waits for some: the caller is to return its own when it is through with them, and lend again. */
bool bn_copier_yield(struct bn_copier *copier, const struct bn_copy *job);
/* Get memory for so many pairs at once, by many threads. What fails here fails again where it is needed. */
void bn_copier_reserve(struct bn_copier *copier, unsigned pairs);
uint64_t bn_copier_buffer(const struct bn_copier *copier);
unsigned bn_copier_workers(const struct bn_copier *copier, enum bn_copy_mode mode);
