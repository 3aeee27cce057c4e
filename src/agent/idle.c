/* cuCtxSynchronize cannot be given a deadline, and a kernel that waits for a peer process may never end. So a thread of its own
 * waits, and the agent's thread waits for that one as long as it was told to. The thread is made at the first need and stays. */
#include "agent/idle.h"

#include "agent/gate.h"
#include "agent/track.h"

#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>

#define CONTEXTS_MAX 1024
#define STACK_SIZE (1u << 20)

static struct {
    bool running;
    uint32_t asked, done; /* rounds; equal: the thread rests */
    uint32_t cancel;
    CUresult result;
    unsigned count;
    CUcontext ctxs[CONTEXTS_MAX];
} idle;

struct start {
    void *(*main)(void *);
    void *arg;
    char name[16];
};

static struct start starts[2]; /* one a thread; they are never freed */
static uint32_t starts_used;

static void *trampoline(void *arg)
{
    struct start *s = arg;
    prctl(PR_SET_NAME, s->name, 0, 0, 0);
    bn_gate_exempt_self();
    return s->main(s->arg);
}

int bn_thread_start(const char *name, void *(*main)(void *), void *arg)
{
    uint32_t slot = __atomic_fetch_add(&starts_used, 1, __ATOMIC_RELAXED) % 2;
    struct start *s = &starts[slot];
    *s = (struct start){main, arg, ""};
    strncpy(s->name, name, sizeof(s->name) - 1);

    pthread_attr_t attr;
    pthread_t thread;
    sigset_t all, before;
    int r = pthread_attr_init(&attr);
    if (r)
        return -r;
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, STACK_SIZE);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all,
                    &before); /* inherited by the thread, so never a moment unblocked in it */
    r = pthread_create(&thread, &attr, trampoline, s);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return -r;
}

static void wait_for_all(void)
{
    CUresult result = CUDA_SUCCESS;
    for (unsigned i = 0; i < idle.count && !bn_load_acq(&idle.cancel); i++) {
        CUresult r = bn_real.cuCtxSetCurrent(idle.ctxs[i]);
        if (r == CUDA_SUCCESS)
            r = bn_real.cuCtxSynchronize();
        if (r != CUDA_SUCCESS && r != CUDA_ERROR_CONTEXT_IS_DESTROYED && result == CUDA_SUCCESS)
            result = r;
    }
    bn_real.cuCtxSetCurrent(NULL);
    idle.result = result;
}

static void *idle_main(void *unused)
{
    CUstreamCaptureMode relaxed = CU_STREAM_CAPTURE_MODE_RELAXED;
    if (bn_real.cuThreadExchangeStreamCaptureMode)
        bn_real.cuThreadExchangeStreamCaptureMode(&relaxed);
    for (;;) {
        uint32_t done = bn_load(&idle.done);
        while (bn_load_acq(&idle.asked) == done)
            bn_futex_wait(&idle.asked, done, 0);
        wait_for_all();
        bn_store_rel(&idle.done, done + 1);
        bn_futex_wake(&idle.done, INT32_MAX);
    }
    return NULL;
}

/* True when the thread rests. */
static bool rests_by(uint64_t deadline_ns)
{
    for (;;) {
        uint32_t done = bn_load_acq(&idle.done);
        if (done == bn_load(&idle.asked))
            return true;
        uint64_t now = bn_clock_ns();
        if (now >= deadline_ns)
            return false;
        bn_futex_wait(&idle.done, done, deadline_ns - now);
    }
}

static bool add_context(CUcontext ctx)
{
    for (unsigned i = 0; i < idle.count; i++)
        if (idle.ctxs[i] == ctx)
            return true;
    if (idle.count == CONTEXTS_MAX)
        return false;
    idle.ctxs[idle.count++] = ctx;
    return true;
}

/* 0; -E2BIG; -EIO: the driver does not say what there is, *cuda why. */
static int collect(CUresult *cuda)
{
    BN_LOCKED();
    idle.count = 0;
    for (struct bn_ctx *c = bn_track.ctxs; c; c = c->next)
        if (c->kind != BN_CTX_PRIMARY && !add_context(c->ctx))
            return -E2BIG;
    for (int dev = 0; dev < bn_track.device_count; dev++) {
        CUcontext ctx;
        *cuda = bn_ctx_primary(dev, &ctx);
        if (*cuda != CUDA_SUCCESS)
            return -EIO;
        if (ctx && !add_context(ctx))
            return -E2BIG;
    }
    return 0;
}

int bn_idle_wait(uint64_t deadline_ns, CUresult *cuda)
{
    if (!idle.running) {
        if (bn_thread_start("bennu-idle", idle_main, NULL) < 0)
            return -EAGAIN;
        idle.running = true;
    }
    if (!rests_by(deadline_ns)) /* an earlier, given up round */
        return -EBUSY;
    int r = collect(cuda);
    if (r < 0)
        return r;
    bn_store(&idle.cancel, 0);
    bn_store_rel(&idle.asked, idle.asked + 1);
    bn_futex_wake(&idle.asked, 1);
    if (!rests_by(deadline_ns)) {
        bn_store_rel(&idle.cancel, 1);
        return -EBUSY;
    }
    *cuda = idle.result;
    return idle.result == CUDA_SUCCESS ? 0 : -EIO;
}

void bn_idle_after_fork(void)
{
    memset(&idle, 0, sizeof(idle));
    starts_used = 0;
}
