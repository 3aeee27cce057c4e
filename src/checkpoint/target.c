#include "checkpoint/target.h"

#include "base/cgroup.h"
#include "base/cleanup.h"
#include "base/io.h"
#include "base/parallel.h"
#include "base/proc.h"
#include "checkpoint/cold.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Cheap answer to "could this process have CUDA state": the driver's library is mapped. */
int bn_target_maps_driver(pid_t pid)
{
    static const char *const libraries[] = {"libcuda.so", "libbennu.so"};
    int r = bn_proc_maps(pid, libraries, BN_ARRAY_SIZE(libraries));
    return r == -ESRCH ? 0 : r;
}

void bn_target_drop_saved(struct bn_target *t)
{
    for (size_t i = 0; i < t->nparts; i++) {
        struct bn_target_part *part = &t->parts[i];
        bn_mem_free(part->mem);
        if (part->old)
            bn_close(part->old->fd);
        free(part->old);
        bn_cold_unref(part->cold);
        part->mem = NULL;
        part->old = NULL;
        part->cold = NULL;
    }
}

void bn_target_keep_folder(struct bn_target *t)
{
    for (size_t i = 0; i < t->nparts; i++)
        if (t->parts[i].cold)
            bn_cold_keep(t->parts[i].cold);
}

void bn_target_clear(struct bn_target *t)
{
    bn_target_release(t);
    bn_target_drop_saved(t);
    bn_agent_free(t->agent);
    bn_close(t->pidfd);
    free(t->segs);
    free(t->parts);
}

void bn_targets_free(struct bn_targets *t)
{
    for (size_t i = 0; i < t->n; i++)
        bn_target_clear(&t->v[i]);
    free(t->v);
    *t = (struct bn_targets){0};
}

/* Killed, though the kernel has not taken it apart yet: SIGKILL is pending, or some of its threads are exiting. 1, 0, or
 * negative errno. */
static int dying(pid_t pid)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/status", pid);
    bn_auto_free char *text = NULL;
    size_t len;
    int r = bn_read_file_at(AT_FDCWD, path, 1 << 16, (void **)&text, &len);
    if (r < 0)
        return r;
    static const char *const pending[] = {"\nSigPnd:", "\nShdPnd:"};
    for (size_t i = 0; i < BN_ARRAY_SIZE(pending); i++) {
        const char *at = strstr(text, pending[i]);
        if (at && (strtoull(at + strlen(pending[i]), NULL, 16) & (1ull << (SIGKILL - 1))))
            return 1;
    }
    return strstr(text, "\nVmSize:") == NULL; /* its memory is gone already */
}

static bool has_memory(const struct bn_agent_page *page)
{
    uint64_t segments = 0;
    for (uint32_t g = 0; g < page->gpu_count; g++)
        segments += page->gpu[g].segments;
    return segments > 0 || page->state == BN_AGENT_CLOSED || page->state == BN_AGENT_EVICTED;
}

/* 1: a target, filled in; 0: nothing to do with CUDA, or gone. */
static int examine(struct bn_gpu *gpu, pid_t pid, unsigned flags, struct bn_target *t, struct bn_error *err)
{
    *t = (struct bn_target){.pid = pid, .pidfd = -1};
    struct bn_agent *agent = NULL;
    struct bn_agent_page page;
    int r = bn_target_maps_driver(pid);
    if (r == 0)
        return 0;
    if (r > 0)
        r = bn_agent_find(pid, &agent);
    if (r == 0 && (r = bn_agent_page(agent, &page)) < 0) {
        bn_agent_free(agent);
        agent = NULL;
    }
    if (r < 0 && r != -ENOENT && r != -ESRCH)
        return bn_error_set(err, r, "find", "cannot look into process %d: %s", pid, strerror(-r));

    enum bn_ckpt_state state;
    struct bn_error why = BN_ERROR_INIT;
    r = bn_ckpt_state(gpu, pid, &state, &why);
    if (r == -ESRCH || (r == 0 && bn_ckpt_no_cuda(state))) {
        if (r == 0 && agent && has_memory(&page) && dying(pid) == 0)
            r = bn_error_set(
                err, EAGAIN, "find",
                "the driver says that process %d does not use CUDA, and its agent, that it holds GPU "
                "memory: try again",
                pid);
        bn_agent_free(agent);
        return r == -ESRCH ? 0 : r;
    }
    if (r == 0 && state != BN_CKPT_RUNNING)
        r = bn_error_set(&why, EBUSY, "find",
                         "the driver says that process %d is already locked or checkpointed: unlock it first "
                         "('bennu resume %d' if Bennu suspended it)",
                         pid, pid);
    if (r == 0 && (t->pidfd = bn_pidfd_open(pid)) < 0)
        r = bn_error_set(&why, t->pidfd, "find", "cannot hold process %d: %s", pid, strerror(-t->pidfd));
    if (r < 0) {
        bn_agent_free(agent);
        if (err && !bn_error_is_set(err))
            *err = why;
        return r;
    }

    bn_proc_inner_pid(pid, &t->inner);
    bn_proc_comm(pid, t->comm);
    if (agent && page.state != BN_AGENT_INACTIVE && !(flags & BN_FIND_DRIVER_PATH)) {
        t->agent = agent;
        memcpy(t->instance, page.instance, sizeof(t->instance));
    } else {
        bn_agent_free(agent);
    }
    return 1;
}

int bn_targets_find(struct bn_gpu *gpu, pid_t root, unsigned flags, struct bn_targets *out,
                    struct bn_error *err)
{
    bn_auto_free pid_t *pids = NULL;
    size_t n = 0;
    int r = bn_proc_tree(root, &pids, &n);
    if (r < 0)
        return bn_error_set(err, r, "find",
                            r == -ESRCH ? "no process with pid %d"
                                        : "cannot read the process tree below %d: %s",
                            root, strerror(-r));
    struct bn_targets t = {.v = calloc(n, sizeof(*t.v))};
    if (!t.v)
        return bn_error_set(err, ENOMEM, "find", "out of memory");
    for (size_t i = 0; i < n; i++) {
        r = examine(gpu, pids[i], flags, &t.v[t.n], err);
        if (r < 0) {
            bn_targets_free(&t);
            return r;
        }
        t.n += (size_t)r;
    }
    *out = t;
    return 0;
}

static int check_page(const struct bn_target *t, const struct bn_agent_page *p, unsigned flags,
                      struct bn_error *err)
{
    const struct bn_agent_blockers *b = &p->blockers;
    if (b->managed_bytes)
        return bn_error_set(
            err, ENOTSUP, "check",
            "process %d (%s) uses %llu MiB of managed memory (cuMemAllocManaged), which the driver cannot "
            "checkpoint: run it with plain device memory",
            t->pid, t->comm, (unsigned long long)(b->managed_bytes + (1 << 20) - 1) >> 20);
    if (b->host_vmm_bytes)
        return bn_error_set(
            err, ENOTSUP, "check",
            "process %d (%s) has mapped host memory with cuMemCreate, which the driver cannot restore",
            t->pid, t->comm);
    if (b->imported_handles)
        return bn_error_set(err, ENOTSUP, "check",
                            "process %d (%s) uses GPU memory of another process (CUDA IPC), which cannot be "
                            "restored yet: turn "
                            "peer-to-peer sharing off in the program (for NCCL: NCCL_P2P_DISABLE=1)",
                            t->pid, t->comm);
    if (b->multicast_handles)
        return bn_error_set(
            err, ENOTSUP, "check",
            "process %d (%s) uses NVLink multicast memory, which cannot be restored: set NCCL_NVLS_ENABLE=0",
            t->pid, t->comm);
    if (p->mps == BN_AGENT_MPS_CLIENT && !(flags & BN_FIND_KEEP_CONTEXT))
        return bn_error_set(
            err, ENOTSUP, "check",
            "process %d (%s) is a client of MPS, which the driver cannot checkpoint: start it "
            "without MPS (stop nvidia-cuda-mps-control, or unset CUDA_MPS_PIPE_DIRECTORY)",
            t->pid, t->comm);
    if (((flags & BN_FIND_DRIVER_PATH) || p->state == BN_AGENT_INACTIVE) && p->epoch > 0)
        return bn_error_set(
            err, ENOTSUP, "check",
            "process %d (%s) was resumed by Bennu before: the driver's own path would lose it", t->pid,
            t->comm);
    return 0;
}

int bn_target_page(const struct bn_target *t, struct bn_agent_page *page)
{
    struct bn_agent *found = NULL;
    int r = t->agent ? 0 : bn_agent_find(t->pid, &found);
    if (r == 0)
        r = bn_agent_page(t->agent ? t->agent : found, page);
    bn_agent_free(found);
    return r == 0 ? 1 : r == -ENOENT || r == -ESRCH ? 0 : r;
}

int bn_targets_check(const struct bn_targets *targets, unsigned flags, struct bn_error *err)
{
    for (size_t i = 0; i < targets->n; i++) {
        const struct bn_target *t = &targets->v[i];
        if (!t->agent && (flags & BN_FIND_KEEP_CONTEXT))
            return bn_error_set(
                err, ENOTSUP, "check",
                "process %d (%s) has no agent, so its memory can be taken by the driver alone, "
                "which keeps no contexts: suspend it without --keep-context, or start it with "
                "'bennu run'",
                t->pid, t->comm);
        struct bn_agent_page page;
        int r = bn_target_page(t, &page);
        if (r > 0)
            r = check_page(t, &page, flags, err);
        else if (r < 0)
            bn_error_set(err, r, "check", "cannot look into process %d (%s): %s", t->pid, t->comm,
                         strerror(-r));
        if (r < 0)
            return r;
    }
    return 0;
}

uint64_t bn_targets_evictable(const struct bn_targets *targets)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < targets->n; i++) {
        struct bn_agent_page page;
        if (!targets->v[i].agent || bn_agent_page(targets->v[i].agent, &page) < 0)
            continue;
        for (uint32_t g = 0; g < page.gpu_count; g++)
            bytes += page.gpu[g].bytes;
    }
    return bytes;
}

size_t bn_targets_parts(const struct bn_targets *targets)
{
    size_t parts = 0;
    for (size_t i = 0; i < targets->n; i++)
        parts += targets->v[i].nparts;
    return parts;
}

struct each_part {
    const struct bn_targets *targets;
    bn_part_fn fn;
    void *ctx;
};

static int on_part(void *arg, size_t i, struct bn_error *err)
{
    const struct each_part *e = arg;
    struct bn_target *t = e->targets->v;
    size_t p = i;
    for (; p >= t->nparts; t++)
        p -= t->nparts;
    return e->fn(e->ctx, t, &t->parts[p], i, err);
}

int bn_targets_each_part(const struct bn_targets *targets, bn_part_fn fn, void *ctx, struct bn_error *err)
{
    struct each_part e = {targets, fn, ctx};
    return bn_parallel(bn_targets_parts(targets), on_part, &e, err);
}

uint64_t bn_target_bytes(const struct bn_target *t)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < t->nparts; i++)
        bytes += t->parts[i].bytes;
    return bytes;
}

bool bn_target_gone(const struct bn_target *t)
{
    return t->pidfd >= 0 && bn_pidfd_dead(t->pidfd);
}

bool bn_target_wait_gone(const struct bn_target *t, int timeout_ms)
{
    struct pollfd p = {.fd = t->pidfd, .events = POLLIN};
    return t->pidfd >= 0 && poll(&p, 1, timeout_ms) > 0;
}

ssize_t bn_targets_index(const struct bn_targets *t, pid_t pid)
{
    for (size_t i = 0; i < t->n; i++)
        if (t->v[i].pid == pid)
            return (ssize_t)i;
    return -1;
}

/* 1: it may run; 0: not now, or there is nothing just now to look with; -ESRCH: it has ended. */
static int runnable(const struct bn_target *t)
{
    pid_t tracer;
    char state, group[1024];
    if (bn_pidfd_dead(t->pidfd))
        return -ESRCH;
    int r = bn_proc_tracer(t->pid, &tracer);
    if (r == 0)
        r = bn_proc_state(t->pid, &state);
    if (r == 0)
        r = state == 'Z' || state == 'X' ? 1 : dying(t->pid);
    if (r == -EMFILE || r == -ENFILE || r == -ENOMEM)
        return 0;
    if (r != 0)
        return -ESRCH;
    return tracer == 0 && state != 'T' && state != 't' && !bn_cgroup_is_frozen(t->pid, group, sizeof(group));
}

int bn_target_wait_runnable(const struct bn_target *t, unsigned timeout_ms)
{
    uint64_t deadline = bn_now_ns() + (uint64_t)timeout_ms * 1000000u;
    for (;;) {
        int r = runnable(t);
        if (r != 0)
            return r > 0 ? 0 : r;
        if (bn_now_ns() >= deadline)
            return -ETIMEDOUT;
        /* Nothing tells of a detached tracer: look again soon, or at once when the process ends. */
        struct pollfd p = {.fd = t->pidfd, .events = POLLIN};
        poll(&p, 1, 2);
    }
}
