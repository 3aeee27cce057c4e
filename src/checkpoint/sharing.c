#include "checkpoint/sharing.h"

#include "base/cleanup.h"
#include "base/proc.h"

#include <stdlib.h>
#include <string.h>

/* What a target has given. */
struct given {
    struct bn_agent_sharing counts;
    uint8_t instance[16];
};

/* A process outside, as far as it matters here. */
struct outsider {
    pid_t pid;
    char comm[16];
    bool agent; /* imports are counted */
    bool names; /* and where they come from an IPC handle of an agent's, all of them are in opened[] */
    uint64_t strangers; /* imports whose owner is not known */
    struct bn_agent_opened opened[BN_AGENT_OPENED_MAX];
};

/* False: nothing, or nothing is known: no agent, or one that is too old. */
static bool find_given(const struct bn_target *t, struct given *out)
{
    struct bn_agent *found = NULL;
    struct bn_agent_page page;
    if (!t->agent && bn_agent_find(t->pid, &found) < 0)
        return false;
    int r = bn_agent_page(t->agent ? t->agent : found, &page);
    bn_agent_free(found);
    if (r < 0 || !(page.knows & BN_AGENT_KNOWS_SHARING))
        return false;
    out->counts = page.sharing;
    memcpy(out->instance, page.instance, sizeof(out->instance));
    const struct bn_agent_sharing *s = &out->counts;
    return s->ipc || s->ipc_native || s->vmm || s->pools || s->elsewhere;
}

/* bennud's processes have memory of other programs open for as long as they move it. */
static bool is_bennud(const char *comm)
{
    return strcmp(comm, "bennud") == 0 || strcmp(comm, "bennud-worker") == 0;
}

/* False: the process can have nothing of anybody's. */
static bool examine(struct bn_gpu *gpu, pid_t pid, struct outsider *o)
{
    enum bn_ckpt_state state;
    struct bn_agent *agent = NULL;
    struct bn_agent_page page;
    *o = (struct outsider){.pid = pid};
    if (pid == getpid() || !bn_target_maps_driver(pid) || bn_proc_comm(pid, o->comm) < 0 ||
        is_bennud(o->comm))
        return false;
    int r = bn_ckpt_state(gpu, pid, &state, NULL);
    if (r == -ESRCH || (r == 0 && (state == BN_CKPT_NO_CUDA || state == BN_CKPT_FILES_ONLY)))
        return false;
    if (bn_agent_find(pid, &agent) < 0)
        return true;
    if (bn_agent_page(agent, &page) == 0 && page.state != BN_AGENT_INACTIVE) {
        uint64_t named = 0;
        o->agent = true;
        memcpy(o->opened, page.sharing.opened, sizeof(o->opened));
        for (size_t i = 0; i < BN_AGENT_OPENED_MAX; i++) {
            named += o->opened[i].handles;
            o->names = o->names || o->opened[i].handles == 0;
        }
        o->names = o->names && page.knows & BN_AGENT_KNOWS_SHARING;
        o->strangers = page.blockers.imported_handles > named ? page.blockers.imported_handles - named : 0;
    }
    bn_agent_free(agent);
    return true;
}

static bool has_open(const struct outsider *o, const uint8_t instance[16])
{
    for (size_t i = 0; i < BN_AGENT_OPENED_MAX; i++)
        if (o->opened[i].handles && memcmp(o->opened[i].owner, instance, sizeof(o->opened[i].owner)) == 0)
            return true;
    return false;
}

static int check_pair(const struct bn_target *t, const struct given *g, const struct outsider *o,
                      struct bn_error *err)
{
    if (has_open(o, g->instance))
        return bn_error_set(
            err, ENOTSUP, "check",
            "process %d (%s) uses GPU memory of process %d (%s) and would keep the old memory: let "
            "it close that memory, or name a process above both of them",
            o->pid, o->comm, t->pid, t->comm);
    /* Handles that an agent made are opened by agents alone. */
    bool by_handle = g->counts.ipc && o->agent && !o->names && o->strangers;
    bool otherwise =
        (g->counts.vmm || g->counts.pools || g->counts.ipc_native) && (!o->agent || o->strangers);
    if (!by_handle && !otherwise)
        return 0;
    return bn_error_set(
        err, ENOTSUP, "check",
        "process %d (%s) has exported GPU memory, and process %d (%s) %s: end one of them, or name a "
        "process above both of them",
        t->pid, t->comm, o->pid, o->comm,
        o->agent ? "has imported some, perhaps that"
                 : "uses CUDA without 'bennu run', so that nobody can tell whether it has it");
}

static int check_elsewhere(const struct bn_target *t, const struct given *g, struct bn_error *err)
{
    if (g->counts.elsewhere)
        return bn_error_set(
            err, ENOTSUP, "check",
            "process %d (%s) has given GPU memory to a device (dma-buf) or to other machines "
            "(fabric handles), which would keep the old memory: turn GPUDirect RDMA off in the "
            "program (for NCCL: NCCL_NET_GDR_LEVEL=LOC, NCCL_MNNVL_ENABLE=0)",
            t->pid, t->comm);
    return 0;
}

/* Who has something for sure, or is known to have imported, is named before one of whom nothing is known. */
static int check_target(const struct bn_target *t, const struct given *g, const struct outsider *o, size_t n,
                        struct bn_error *err)
{
    for (int agents = 1; agents >= 0; agents--)
        for (size_t i = 0; i < n; i++) {
            int r = o[i].agent == agents ? check_pair(t, g, &o[i], err) : 0;
            if (r < 0)
                return r;
        }
    return 0;
}

/* Those of pids[n] that may have something, in *out, malloced. */
static int examine_all(struct bn_gpu *gpu, const pid_t *pids, size_t n, struct outsider **out, size_t *nout)
{
    bn_auto_free struct outsider *list = NULL;
    size_t have = 0;
    for (size_t i = 0; i < n; i++) {
        struct outsider o;
        if (!examine(gpu, pids[i], &o))
            continue;
        struct outsider *more = reallocarray(list, have + 1, sizeof(*list));
        if (!more)
            return -ENOMEM;
        list = more;
        list[have++] = o;
    }
    *out = BN_TAKE_PTR(list);
    *nout = have;
    return 0;
}

/* Each process outside is looked at once, however many targets have given something: their gates may be closed meanwhile. */
int bn_sharing_check_with(struct bn_gpu *gpu, const struct bn_targets *targets, const pid_t *outside,
                          size_t n, struct bn_error *err)
{
    bn_auto_free struct outsider *others = NULL;
    size_t nothers = 0;
    bool examined = false;
    for (size_t i = 0; i < targets->n; i++) {
        struct given g;
        if (!find_given(&targets->v[i], &g))
            continue;
        int r = check_elsewhere(&targets->v[i], &g, err);
        if (r < 0)
            return r;
        if (!examined && (r = examine_all(gpu, outside, n, &others, &nothers)) < 0)
            return bn_error_set(err, r, "check", "cannot look for users of shared GPU memory: %s",
                                strerror(-r));
        examined = true;
        r = check_target(&targets->v[i], &g, others, nothers, err);
        if (r < 0)
            return r;
    }
    return 0;
}

static bool among(const pid_t *pids, size_t n, pid_t pid)
{
    for (size_t i = 0; i < n; i++)
        if (pids[i] == pid)
            return true;
    return false;
}

int bn_sharing_check(struct bn_gpu *gpu, const struct bn_targets *targets, pid_t root, struct bn_error *err)
{
    bn_auto_free pid_t *tree = NULL, *all = NULL;
    size_t ntree = 0, nall = 0, n = 0;
    bool any = false;
    for (size_t i = 0; i < targets->n && !any; i++)
        any = find_given(&targets->v[i], &(struct given){0});
    if (!any)
        return 0;
    int r = bn_proc_tree(root, &tree, &ntree);
    if (r == 0)
        r = bn_proc_all(&all, &nall);
    if (r < 0)
        return bn_error_set(err, r, "check", "cannot look for users of shared GPU memory: %s", strerror(-r));
    for (size_t i = 0; i < nall; i++)
        if (!among(tree, ntree, all[i]))
            all[n++] = all[i];
    return bn_sharing_check_with(gpu, targets, all, n, err);
}
