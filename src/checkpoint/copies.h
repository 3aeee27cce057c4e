/* The copies of one session: a job for each part of each target, waited for together. One thread at a time. */
#pragma once

#include "checkpoint/quiesce.h"

struct bn_copies {
    struct bn_copy **jobs;
    struct bn_copy_whose { /* as jobs: for the trace */
        pid_t pid;
        unsigned dev;
        uint64_t start_ns;
    } * whose;
    size_t n;
    int phase; /* of the report, -1 before the start */
    const char *name;
};

/* Makes the job of one part. *job stays NULL where there is nothing to copy. */
typedef int (*bn_copies_make_fn)(struct bn_quiesce *q, struct bn_target *t, struct bn_target_part *part,
                                 void *arg, struct bn_copy **job, struct bn_error *err);

/* Starts all; on failure none is left. `name` is the phase's. */
int bn_copies_start(struct bn_copies *c, struct bn_quiesce *q, const char *name, bn_copies_make_fn make,
                    void *arg, struct bn_error *err);
/* Waits for all and frees them; the first failure stops the rest. *cancel (may be NULL) set by another thread stops them too. */
int bn_copies_finish(struct bn_copies *c, struct bn_quiesce *q, const bool *cancel, struct bn_error *err);
/* Stop and free what runs; does nothing where nothing does. */
void bn_copies_cancel(struct bn_copies *c, struct bn_quiesce *q);
