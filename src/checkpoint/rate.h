/* A limit on how fast bytes are moved, for work that goes on beside a running application. Any thread, several at once. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct bn_rate {
    uint64_t per_second; /* bytes; 0: no limit (any more) */
    const bool *cancel;  /* nobody waits any more once this is set; may be NULL */
    pthread_mutex_t lock;
    uint64_t free_ns; /* when all that was accounted for has had its time */
};
#define BN_RATE_INIT(bytes, flag)                                                  \
    (struct bn_rate)                                                               \
    {                                                                              \
        .per_second = (bytes), .cancel = (flag), .lock = PTHREAD_MUTEX_INITIALIZER \
    }

/* Account for `bytes` that were just moved, and wait until the next may be. */
void bn_rate_pass(struct bn_rate *r, uint64_t bytes);
/* No limit from now on; who waits goes on. */
void bn_rate_lift(struct bn_rate *r);
