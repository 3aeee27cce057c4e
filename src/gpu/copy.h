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

/* Staging buffers of bn_copier_buffer() bytes: an even number, at most `want`, at least 2; waits while all
 * are lent. 0: the job was stopped, or failed meanwhile. */
unsigned bn_copier_lend(struct bn_copier *copier, struct bn_copy *job, struct bn_mem **buffers,
                        unsigned want);
void bn_copier_return(struct bn_copier *copier, struct bn_mem **buffers, unsigned n);
uint64_t bn_copier_buffer(const struct bn_copier *copier);
unsigned bn_copier_workers(const struct bn_copier *copier, enum bn_copy_mode mode);
