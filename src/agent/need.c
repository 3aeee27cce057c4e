#include "agent/need.h"

#include "agent/agent.h"
#include "agent/gate.h"
#include "agent/track.h"

#include <string.h>

#define LOOK_NS 5000000u
/* A look that took longer was of a process that was stopped, or is not the one that it was: it may have been restored, with
 * another clock. */
#define LOOK_MAX_NS 50000000u
#define NEED_NS (BN_AGENT_NEED_MS * UINT64_C(1000000))
#define DEAD_NS (BN_AGENT_HOT_DEAD_MS * UINT64_C(1000000))

static uint32_t asking; /* a thread has the page's one place for a want */
static uint32_t dead;   /* the `hot` of a daemon that was killed, or 0 */

static bool take_place(void)
{
    uint32_t none = 0;
    return __atomic_compare_exchange_n(&asking, &none, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

/* Let a moment pass; false when it is time to give up. */
static bool look_again(struct bn_need *n)
{
    uint64_t before = bn_clock_ns();
    struct timespec ts = {0, LOOK_NS};
    nanosleep(&ts, NULL);
    uint64_t passed = bn_clock_ns() - before;
    if (passed > LOOK_MAX_NS)
        passed = LOOK_MAX_NS;
    uint32_t hot = bn_load(&bn_agent_page()->need.hot);
    n->still_ns = hot == n->hot ? n->still_ns + passed : 0;
    n->hot = hot;
    n->waited_ns += passed;
    if (n->still_ns >= DEAD_NS)
        bn_store(&dead, hot);
    return n->waited_ns < NEED_NS && n->still_ns < DEAD_NS;
}

/* The place is ours. */
static bool ask(struct bn_need *n, CUdevice dev, size_t bytes)
{
    struct bn_agent_need *page = &bn_agent_page()->need;
    uint32_t seq = bn_load(&page->wanted_seq) + 1;
    uint64_t whole = (bytes + BN_CONVERT_MIN - 1) & ~(uint64_t)(BN_CONVERT_MIN - 1);
    bool more = false, waits = true;
    memcpy(page->wanted_uuid, bn_track.devices[dev].uuid, sizeof(page->wanted_uuid));
    bn_store(&page->wanted_bytes, whole);
    bn_store_rel(&page->wanted_seq, seq);
    while (waits) {
        if (bn_load_acq(&page->answered_seq) == seq) {
            more = bn_load(&page->answered_more) != 0;
            break;
        }
        if (bn_load(&page->hot) == 0) { /* all of it was let go of */
            more = true;
            break;
        }
        waits = look_again(n);
    }
    bn_store(&page->wanted_bytes, 0);
    return more;
}

static bool wait_outside(struct bn_need *n, CUdevice dev, size_t bytes)
{
    if (!take_place())
        return look_again(n); /* what is let go of for the other may do for both */
    bool more = ask(n, dev, bytes);
    bn_store_rel(&asking, 0);
    return more;
}

bool bn_need_wait(struct bn_need *need, CUdevice dev, size_t bytes)
{
    uint32_t hot = bn_load(&bn_agent_page()->need.hot);
    if (hot == 0 || hot == bn_load(&dead) || need->waited_ns >= NEED_NS || bytes > SIZE_MAX / 2)
        return false;
    /* Further out, a call of the driver's is under way in this thread: the gate could not be left. */
    if (bn_load(&bn_gate_self->in) != 1)
        return false;
    if (dev < 0 && bn_real.cuCtxGetDevice(&dev) != CUDA_SUCCESS)
        return false;
    if (dev < 0 || dev >= bn_track.device_count)
        return false;
    int saved = errno;
    if (need->hot == 0)
        need->hot = hot;
    bn_gate_leave();
    if (!wait_outside(need, dev, bytes))
        need->waited_ns = NEED_NS; /* one last try: something may have come free while another thread asked */
    bn_gate_enter();
    errno = saved;
    return true;
}

void bn_need_after_fork(void)
{
    asking = dead = 0;
}

/* ---- memory in the order of streams, which is the driver's ------------------------------------------- */

#define ASYNC(name, params, args)                      \
    CUresult bn_wrap_##name params                     \
    {                                                  \
        BN_GATED();                                    \
        struct bn_need need = {0};                     \
        CUresult r;                                    \
        do                                             \
            r = bn_real.name args;                     \
        while (bn_need_again(&need, r, -1, bytesize)); \
        return r;                                      \
    }

ASYNC(cuMemAllocAsync, (CUdeviceptr * dptr, size_t bytesize, CUstream hStream), (dptr, bytesize, hStream))
ASYNC(cuMemAllocAsync_ptsz, (CUdeviceptr * dptr, size_t bytesize, CUstream hStream),
      (dptr, bytesize, hStream))
ASYNC(cuMemAllocFromPoolAsync, (CUdeviceptr * dptr, size_t bytesize, CUmemoryPool pool, CUstream hStream),
      (dptr, bytesize, pool, hStream))
ASYNC(cuMemAllocFromPoolAsync_ptsz,
      (CUdeviceptr * dptr, size_t bytesize, CUmemoryPool pool, CUstream hStream),
      (dptr, bytesize, pool, hStream))
