#include "checkpoint/sharing.h"

#include "base/cleanup.h"
#include "base/proc.h"

#include <errno.h>
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
    bool imported;
    bool lost;          /* they were, until the program closed the agent's descriptors */
    bool names;         /* where they come from an IPC handle of an agent's, all of them are in opened[] */
    uint64_t strangers; /* imports whose owner is not known */
    struct bn_agent_opened opened[BN_AGENT_OPENED_MAX];
};

/* 1: something; 0: nothing, or nothing is known (no agent, or one that is too old). */
static int find_given(const struct bn_target *t, struct given *out)
{
    struct bn_agent_page page;
    int r = bn_target_page(t, &page);
    if (r <= 0)
        return r;
    if (!(page.knows & BN_AGENT_KNOWS_SHARING))
        return 0;
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

/* An agent that gave up (INACTIVE) counts no more, but what it has counted may still be open. One that is older than the entry of
 * those left over, and has none to spare, may have left some out. */
static void note_imports(const struct bn_agent_page *page, struct outsider *o)
{
    uint8_t others[16];
    uint64_t named = 0, imported = page->blockers.imported_handles;
    bool spare = false, left_over = false;
    memset(others, 0xff, sizeof(others));
    o->imported = imported != 0;
    o->agent = page->state != BN_AGENT_INACTIVE;
    memcpy(o->opened, page->sharing.opened, sizeof(o->opened));
    for (size_t i = 0; i < BN_AGENT_OPENED_MAX; i++) {
        const struct bn_agent_opened *e = &o->opened[i];
        if (e->handles == 0)
            spare = true;
        else if (memcmp(e->owner, others, sizeof(others)) == 0)
            left_over = true;
        else
            named += e->handles;
    }
    o->names = spare && !left_over && page->knows & BN_AGENT_KNOWS_SHARING;
    o->strangers = imported > named ? imported - named : 0;
}

/* 1, 0: it has no agent; -ESRCH: it is gone; or another -errno. */
static int look_at_agent(struct outsider *o)
{
    static const char *const its_page[] = {"/memfd:" BN_AGENT_MEMFD};
    struct bn_agent *agent = NULL;
    struct bn_agent_page page;
    int r = bn_agent_find(o->pid, &agent);
    if (r == 0)
        r = bn_agent_page(agent, &page);
    bn_agent_free(agent);
    if (r == 0)
        note_imports(&page, o);
    if (r != -ENOENT)
        return r < 0 ? r : 1;
    r = bn_proc_maps(o->pid, its_page, 1);
    o->lost = r == 1;
    return r < 0 ? r : 0;
}

/* 1, 0: the process can have nothing of anybody's; or -errno. */
static int examine(struct bn_gpu *gpu, pid_t pid, struct outsider *o)
{
    enum bn_ckpt_state state;
    *o = (struct outsider){.pid = pid};
    int r = pid == getpid() ? 0 : bn_target_maps_driver(pid);
    if (r == -EACCES || r == -EPERM) /* of another user, where we are not root */
        return 0;
    if (r <= 0 || bn_proc_comm(pid, o->comm) < 0 || is_bennud(o->comm))
        return r < 0 ? r : 0;
    r = look_at_agent(o);
    if (r >= 0 && !o->imported) { /* the driver may be wrong about one that is checkpointed */
        int asked = bn_ckpt_state(gpu, pid, &state, NULL);
        if (asked == -ESRCH || (asked == 0 && bn_ckpt_no_cuda(state)))
            return 0;
    }
    return r == -ESRCH ? 0 : r < 0 ? r : 1;
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
    bool by_handle = g->counts.ipc && (o->lost || (!o->names && o->strangers));
    bool otherwise =
        (g->counts.vmm || g->counts.pools || g->counts.ipc_native) && (!o->agent || o->strangers);
    if (!by_handle && !otherwise)
        return 0;
    return bn_error_set(
        err, ENOTSUP, "check",
        "process %d (%s) has exported GPU memory, and process %d (%s) %s: end one of them, or name a "
        "process above both of them",
        t->pid, t->comm, o->pid, o->comm,
        o->agent || o->strangers ? "has imported some, perhaps that"
        : o->lost ? "has closed the descriptors of its agent, so that nobody can tell whether it has it"
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
        int r = examine(gpu, pids[i], &o);
        if (r < 0)
            return r;
        if (r == 0)
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

static int cannot_look(int r, struct bn_error *err)
{
    return bn_error_set(err, r, "check", "cannot look for users of shared GPU memory: %s", strerror(-r));
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
        int r = find_given(&targets->v[i], &g);
        if (r < 0)
            return cannot_look(r, err);
        if (r == 0)
            continue;
        r = check_elsewhere(&targets->v[i], &g, err);
        if (r < 0)
            return r;
        if (!examined && (r = examine_all(gpu, outside, n, &others, &nothers)) < 0)
            return cannot_look(r, err);
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
    int r = 0;
    for (size_t i = 0; i < targets->n && r == 0; i++)
        r = find_given(&targets->v[i], &(struct given){0});
    if (r <= 0)
        return r < 0 ? cannot_look(r, err) : 0;
    r = bn_proc_tree(root, &tree, &ntree);
    if (r == 0)
        r = bn_proc_all(&all, &nall);
    if (r < 0)
        return cannot_look(r, err);
    for (size_t i = 0; i < nall; i++)
        if (!among(tree, ntree, all[i]))
            all[n++] = all[i];
    return bn_sharing_check_with(gpu, targets, all, n, err);
}
