/* The copies of one session: a job for each part of each target, waited for together. One thread at a time. */
#pragma once

#include "checkpoint/quiesce.h"

struct bn_copies {
    struct bn_copy **jobs;
    struct bn_copy_whose { /* as jobs: for the trace */
        pid_t pid;
        unsigned dev;
        uint64_t start_ns;
        bool apart; /* needs nothing of the target's any more */
    } * whose;
    size_t n;
    int phase; /* of the report, -1 before the start */
    const char *name;
};

/* Makes the job of one part. *job stays NULL where there is nothing to copy. 1 instead of 0: it copies from memory that is not the
 * target's. */
typedef int (*bn_copies_make_fn)(struct bn_quiesce *q, struct bn_target *t, struct bn_target_part *part,
                                 void *arg, struct bn_copy **job, struct bn_error *err);

/* Starts all; on failure none is left. `name` is the phase's. */
int bn_copies_start(struct bn_copies *c, struct bn_quiesce *q, const char *name, bn_copies_make_fn make,
                    void *arg, struct bn_error *err);
/* Waits for all and frees them; the first failure stops the rest. *cancel (may be NULL) set by another thread stops them too. */
int bn_copies_finish(struct bn_copies *c, struct bn_quiesce *q, const bool *cancel, struct bn_error *err);
/* Waits only for those that copy from, or to, the targets' memory; the others go on. *end_ns: when the last of them ended, 0 if there were
 * none. On failure all have been stopped and freed, as by bn_copies_finish. */
int bn_copies_finish_targets(struct bn_copies *c, struct bn_quiesce *q, const bool *cancel, uint64_t *end_ns,
                             struct bn_error *err);
/* Has every one of them ended? */
bool bn_copies_ended(const struct bn_copies *c);
/* Stop and free what runs; does nothing where nothing does. */
void bn_copies_cancel(struct bn_copies *c, struct bn_quiesce *q);
