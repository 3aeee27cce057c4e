/* Memory of suspended trees on a GPU makes way for allocations that would fail, and what a dump has set aside there is soon free. While there
 * is such memory, and only then, one thread says so to every agent of the machine and looks whether one of them waits for memory (agent_client.h).
 */
#include "daemon/daemon.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/proc.h"
#include "wire/agent_client.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>

#define LOOK_MS 20
#define SCAN_NS 1000000000ull
/* The driver needs some more than is asked for. */
#define SLACK (UINT64_C(32) << 20)

struct listener {
    pid_t pid;
    struct bn_agent *agent; /* NULL: it may get one soon */
    bool foreign;           /* it uses GPUs that we do not see: its memory is another daemon's business */
};

struct listeners {
    struct listener *v;
    size_t n;
    pid_t *pids; /* all processes at the last look, ascending */
    size_t npids;
    uint32_t hot; /* what is announced */
};

static void forget(struct listeners *l)
{
    for (size_t i = 0; i < l->n; i++)
        bn_agent_free(l->v[i].agent);
    free(l->v);
    l->v = NULL;
    l->n = 0;
}

static bool is_foreign(const struct daemon *d, const struct bn_agent_page *page)
{
    for (uint32_t i = 0; i < page->gpu_count; i++)
        if (bn_gpu_find(d->env.gpu, page->gpu[i].uuid) >= 0)
            return false;
    return true;
}

static void find(const struct daemon *d, struct listener *at)
{
    struct bn_agent_page page;
    if (bn_target_maps_driver(at->pid) <= 0 || bn_agent_find(at->pid, &at->agent) < 0)
        return;
    if (bn_agent_page(at->agent, &page) == 0 && page.gpu_count > 0) {
        at->foreign = is_foreign(d, &page);
        return;
    }
    bn_agent_free(at->agent); /* it has just begun */
    at->agent = NULL;
}

/* To its agent, if it has one by now. */
static void tell(const struct daemon *d, struct listener *at, uint32_t hot)
{
    if (!at->agent)
        find(d, at);
    if (at->agent && !at->foreign)
        (void)!bn_agent_announce_hot(at->agent, hot); /* too old, or gone */
}

static int by_number(const void *a, const void *b)
{
    const pid_t *x = a, *y = b;
    return *x < *y ? -1 : *x > *y;
}

/* The new ones only; with `all`, every process anew: they become other programs. A program allocates soon after it has begun to
 * use CUDA. So what is new, and what has the driver's library but no agent yet, is looked at again and again. */
static void scan(const struct daemon *d, struct listeners *l, bool all)
{
    pid_t *pids = NULL;
    size_t n = 0;
    if (bn_proc_all(&pids, &n) < 0)
        return;
    if (all)
        forget(l);
    for (size_t i = 0; i < n; i++) {
        bool new = !bsearch(&pids[i], l->pids, l->npids, sizeof(*pids), by_number);
        if (!new && !(all && bn_target_maps_driver(pids[i]) > 0))
            continue;
        struct listener *more = reallocarray(l->v, l->n + 1, sizeof(*more));
        if (!more)
            break;
        l->v = more;
        l->v[l->n++] = (struct listener){.pid = pids[i]};
    }
    qsort(pids, n, sizeof(*pids), by_number);
    free(l->pids);
    l->pids = pids;
    l->npids = n;
    for (size_t i = 0; i < l->n; i++)
        if (all || !l->v[i].agent)
            tell(d, &l->v[i], l->hot);
}

/* ---- one want ---- */

struct want {
    struct daemon *d;
    pid_t pid;
    unsigned dev;
    struct bn_agent_want want;
};

static uint64_t bit_of(unsigned dev)
{
    return UINT64_C(1) << dev;
}

/* It may have given up, or ended. */
static bool still_wanted(void *arg)
{
    const struct want *w = arg;
    struct bn_agent *agent;
    struct bn_agent_want now;
    if (bn_agent_find(w->pid, &agent) < 0)
        return false;
    bool same = bn_agent_wanted(agent, &now) == 1 && now.seq == w->want.seq;
    bn_agent_free(agent);
    return same;
}

static void *serve(void *arg)
{
    struct want *w = arg;
    struct daemon *d = w->d;
    uint64_t bytes = w->want.bytes < UINT64_MAX - SLACK ? w->want.bytes + SLACK : UINT64_MAX;
    bool more = bn_free_gpu(d, w->dev, bytes, bytes, still_wanted, w);
    struct bn_agent *agent;
    if (bn_agent_find(w->pid, &agent) == 0) {
        (void)!bn_agent_answer_want(agent, w->want.seq, more);
        bn_agent_free(agent);
    }
    __atomic_fetch_and(&d->serving_wants, ~bit_of(w->dev), __ATOMIC_RELEASE);
    free(w);
    return NULL;
}

/* In a thread of its own: a move takes longer than an agent goes without hearing of us. One at a time for each GPU. */
static void look(struct daemon *d, const struct listeners *l)
{
    for (size_t i = 0; i < l->n; i++) {
        struct bn_agent_want want;
        if (!l->v[i].agent || l->v[i].foreign || bn_agent_wanted(l->v[i].agent, &want) != 1)
            continue;
        int dev = bn_gpu_find(d->env.gpu, want.uuid);
        if (dev < 0 || (unsigned)dev >= BN_USAGE_GPUS) {
            (void)!bn_agent_answer_want(l->v[i].agent, want.seq, false);
            continue;
        }
        if (__atomic_load_n(&d->serving_wants, __ATOMIC_ACQUIRE) & bit_of((unsigned)dev))
            continue;
        struct want *w = malloc(sizeof(*w));
        if (!w)
            return;
        *w = (struct want){d, l->v[i].pid, (unsigned)dev, want};
        __atomic_fetch_or(&d->serving_wants, bit_of(w->dev), __ATOMIC_RELAXED);
        if (bn_daemon_thread(d, serve, w) < 0) {
            __atomic_fetch_and(&d->serving_wants, ~bit_of(w->dev), __ATOMIC_RELAXED);
            free(w);
        }
    }
}

/* ---- the thread ---- */

static bool is_hot(const struct daemon *d)
{
    for (unsigned g = 0; g < BN_USAGE_GPUS; g++)
        if (d->aside.gpu[g])
            return true;
    for (const struct suspended_entry *e = d->suspended; e; e = e->next)
        for (unsigned g = 0; g < BN_USAGE_GPUS; g++)
            if (e->usage.gpu[g])
                return true;
    return false;
}

static void *listen_to_agents(void *arg)
{
    struct daemon *d = arg;
    struct listeners l = {0};
    uint64_t scanned = 0;
    pthread_setname_np(pthread_self(), "bennud-need");
    for (bool on = true; on;) {
        uint64_t now = bn_now_ns();
        bool all = !scanned || now - scanned >= SCAN_NS;
        if (all) {
            l.hot += l.hot == UINT32_MAX ? 2 : 1;
            scanned = now;
        }
        scan(d, &l, all);
        look(d, &l);
        poll(NULL, 0, LOOK_MS);
        pthread_mutex_lock(&d->lock);
        on = d->listening = is_hot(d);
        pthread_mutex_unlock(&d->lock);
    }
    for (size_t i = 0; i < l.n; i++)
        tell(d, &l.v[i], 0);
    forget(&l);
    free(l.pids);
    return NULL;
}

void bn_need_check(struct daemon *d)
{
    pthread_mutex_lock(&d->lock);
    bool begin = !d->listening && is_hot(d);
    d->listening = d->listening || begin;
    pthread_mutex_unlock(&d->lock);
    if (begin && bn_daemon_thread(d, listen_to_agents, d) < 0)
        d->listening = false; /* until something else changes */
}
