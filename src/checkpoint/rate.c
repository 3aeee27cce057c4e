#include "checkpoint/rate.h"

#include "base/io.h"

#include <poll.h>
#include <stddef.h>

#define LOOK_NS UINT64_C(50000000) /* between two looks at what ends the wait */

static uint64_t limit(const struct bn_rate *r)
{
    return __atomic_load_n(&r->per_second, __ATOMIC_RELAXED);
}

void bn_rate_pass(struct bn_rate *r, uint64_t bytes)
{
    uint64_t per_second = limit(r);
    if (per_second == 0)
        return;
    pthread_mutex_lock(&r->lock);
    uint64_t now = bn_now_ns();
    if (r->free_ns < now) /* time that nobody used is not saved up */
        r->free_ns = now;
    uint64_t until = r->free_ns += (uint64_t)((double)bytes / (double)per_second * 1e9);
    pthread_mutex_unlock(&r->lock);
    for (; now < until && limit(r) && !(r->cancel && __atomic_load_n(r->cancel, __ATOMIC_RELAXED));
         now = bn_now_ns()) {
        uint64_t left = until - now < LOOK_NS ? until - now : LOOK_NS;
        poll(NULL, 0, (int)(left / 1000000) + 1);
    }
}

void bn_rate_lift(struct bn_rate *r)
{
    __atomic_store_n(&r->per_second, 0, __ATOMIC_RELAXED);
}
