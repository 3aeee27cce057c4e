#include "daemon/daemon.h"

#include "base/cleanup.h"
#include "base/proc.h"
#include "wire/agent_client.h"

#include <stdlib.h>
#include <string.h>

/* What is held of a suspended process, and where. */
static void look_suspended(struct daemon *d, pid_t pid, struct bn_ps_entry *out)
{
    pthread_mutex_lock(&d->lock);
    for (struct suspended_entry *e = d->suspended; e; e = e->next) {
        const struct held *held = bn_held(e, pid);
        if (!held)
            continue;
        out->state = e->s || e->moving ? BN_PS_SUSPENDED : BN_PS_RESTORING;
        out->tier = e->tier;
        out->gpu_bytes = held->bytes[BN_TIER_GPU];
        out->host_bytes = held->bytes[BN_TIER_HOST];
        out->disk_bytes = held->bytes[BN_TIER_DISK];
        break;
    }
    pthread_mutex_unlock(&d->lock);
}

static void describe(const struct bn_agent_page *p, struct bn_ps_entry *e)
{
    for (uint32_t g = 0; g < p->gpu_count; g++)
        e->gpu_bytes += p->gpu[g].bytes;
    e->allocations = p->allocations;
    e->unknown = p->unknown_count;
    if (p->state == BN_AGENT_INACTIVE) {
        e->state = BN_PS_NO_AGENT;
        snprintf(e->note, sizeof(e->note), "agent stepped aside: %.130s", p->reason);
    } else if (p->state == BN_AGENT_CLOSED) {
        e->state = BN_PS_GATED;
    } else if (p->state == BN_AGENT_EVICTED) {
        e->state = BN_PS_DUMPING;
    }
    if (p->blockers.managed_bytes)
        snprintf(e->note, sizeof(e->note), "uses managed memory: cannot be checkpointed");
    else if (p->mps == BN_AGENT_MPS_CLIENT)
        snprintf(e->note, sizeof(e->note), "client of MPS: cannot be checkpointed");
    else if (p->blockers.imported_handles)
        snprintf(e->note, sizeof(e->note),
                 "uses memory of another process (CUDA IPC): cannot be checkpointed yet");
    else if (!e->note[0] && p->unknown_count)
        snprintf(e->note, sizeof(e->note), "newer driver functions: %s%s", p->unknown[0],
                 p->unknown_count > 1 ? ", …" : "");
}

/* bennud's own processes, and those of private ones, use CUDA on behalf of others. */
static bool is_bennud(const char *comm)
{
    return strcmp(comm, "bennud") == 0 || strcmp(comm, "bennud-worker") == 0;
}

/* True: worth a line. */
static bool look(struct daemon *d, pid_t pid, struct bn_ps_entry *e)
{
    *e = (struct bn_ps_entry){.pid = (uint32_t)pid, .state = BN_PS_RUNNING};
    if (bn_proc_comm(pid, e->comm) < 0 || is_bennud(e->comm))
        return false;
    struct bn_agent *agent = NULL;
    struct bn_agent_page page;
    bool has_agent = bn_agent_find(pid, &agent) == 0 && bn_agent_page(agent, &page) == 0;
    bn_agent_free(agent);
    if (has_agent) {
        describe(&page, e);
    } else {
        enum bn_ckpt_state state;
        if (bn_ckpt_state(d->env.gpu, pid, &state, NULL) < 0 || bn_ckpt_no_cuda(state))
            return false;
        e->state = state == BN_CKPT_FAILED ? BN_PS_LOST : BN_PS_NO_AGENT;
        snprintf(e->note, sizeof(e->note), "no agent: the driver's own path, slow");
    }
    look_suspended(d, pid, e);
    if (bn_is_recovering(d, pid)) {
        e->state = BN_PS_RESTORING;
        snprintf(e->note, sizeof(e->note), "being brought back: bennud was killed");
    }
    return true;
}

int bn_daemon_ps(struct daemon *d, bn_ps_fn fn, void *arg, struct bn_error *err)
{
    bn_auto_free pid_t *pids = NULL;
    size_t n = 0;
    int r = bn_proc_all(&pids, &n);
    if (r < 0)
        return bn_error_set(err, r, "ps", "cannot read /proc: %s", strerror(-r));
    for (size_t i = 0; i < n; i++) {
        struct bn_ps_entry e;
        if (pids[i] != getpid() && look(d, pids[i], &e))
            fn(arg, &e);
    }
    return 0;
}
