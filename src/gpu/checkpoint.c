/* The driver's own checkpoint of a process: cuCheckpointProcess*, with answers that a person can act on.
 *
 * What the codes mean beyond the reference: measured on driver 580 (docs/ARCHITECTURE.md), or from
 * NVIDIA/cuda-checkpoint's issues 41 (a thread's number is taken for its process) and 44 (a restore that
 * ran out of memory is final: 304, then 401), and from ai-dynamo/snapshot, whose helper reads
 * INVALID_VALUE for a living process as "no CUDA in it". */
#include "gpu/driver.h"

#include "base/cleanup.h"
#include "base/proc.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define STAGE_STATE "driver-state"

/* ---- The process, without the driver ------------------------------------------------------------------- */

struct who {
    char text[64]; /* "process 123 (python3)" */
};

static struct who who(pid_t pid)
{
    struct who w;
    char comm[16];
    if (bn_proc_comm(pid, comm) < 0) {
        snprintf(w.text, sizeof(w.text), "Process %d", (int)pid);
        return w;
    }
    for (char *p = comm; *p; p++) /* the process chooses its name */
        if (!isprint((unsigned char)*p))
            *p = '?';
    snprintf(w.text, sizeof(w.text), "Process %d (%s)", (int)pid, comm);
    return w;
}

/* The process that `pid` is a thread of; itself when it is one. */
static int thread_group(pid_t pid, pid_t *tgid)
{
    char path[64], line[256];
    snprintf(path, sizeof(path), "/proc/%d/status", (int)pid);
    bn_auto_file FILE *f = fopen(path, "re");
    if (!f)
        return errno == ENOENT ? -ESRCH : -errno;
    while (fgets(line, sizeof(line), f)) {
        int n;
        if (sscanf(line, "Tgid: %d", &n) == 1) {
            *tgid = n;
            return 0;
        }
    }
    return -ESRCH;
}

static bool is_device_file(const char *target)
{
    const char *p = "/dev/nvidia";
    if (strncmp(target, p, strlen(p)) != 0)
        return false;
    p = target + strlen(p);
    return isdigit((unsigned char)*p) || strncmp(p, "ctl", 3) == 0 || strncmp(p, "-uvm", 4) == 0;
}

/* 1: the process has one of the GPU's device files open, 0: it has none. */
static int holds_device_files(pid_t pid)
{
    char path[64], target[256];
    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    bn_auto_dir DIR *dir = opendir(path);
    if (!dir)
        return errno == ENOENT ? -ESRCH : -errno;
    struct dirent *e;
    while ((e = readdir(dir))) {
        ssize_t n = readlinkat(dirfd(dir), e->d_name, target, sizeof(target) - 1);
        if (n < 0)
            continue;
        target[n] = 0;
        if (is_device_file(target))
            return 1;
    }
    return 0;
}

/* The process lives and is no mere thread. */
static int check_process(pid_t pid, const char *stage, struct bn_error *err)
{
    pid_t tgid = 0;
    if (pid <= 0)
        return bn_error_set(err, EINVAL, stage, "%d is no process.", (int)pid);
    int r = thread_group(pid, &tgid);
    if (r == -ESRCH)
        return bn_error_set(err, ESRCH, stage, "There is no process %d.", (int)pid);
    if (r < 0)
        return bn_error_set(err, r, stage, "Process %d cannot be looked at: %s.", (int)pid, strerror(-r));
    if (tgid != pid)
        return bn_error_set(err, EINVAL, stage, "%d is a thread of process %d: name the process.", (int)pid,
                            (int)tgid);
    return 0;
}

static int check_driver(const struct bn_gpu *gpu, bool pairs, const char *stage, struct bn_error *err)
{
    const struct bn_driver *cu = &gpu->cu;
    if (!cu->CheckpointGetState || !cu->CheckpointLock || !cu->CheckpointCheckpoint ||
        !cu->CheckpointRestore || !cu->CheckpointUnlock)
        return bn_error_set(
            err, ENOSYS, stage,
            "The driver (%s, CUDA %u.%u) cannot checkpoint processes: driver 570 or newer is needed.",
            gpu->path, gpu->version / 1000, gpu->version % 1000 / 10);
    if (pairs && gpu->version < 13000)
        return bn_error_set(err, ENOSYS, stage,
                            "The driver (CUDA %u.%u) cannot restore a process onto other GPUs: driver 580 or "
                            "newer is needed.",
                            gpu->version / 1000, gpu->version % 1000 / 10);
    return 0;
}

/* ---- State --------------------------------------------------------------------------------------------- */

/* The driver did not give a state. Nothing is concluded from its code alone. */
static int no_state(pid_t pid, CUresult c, enum bn_ckpt_state *state, struct bn_error *err)
{
    int r = check_process(pid, STAGE_STATE, err); /* again: it may have ended meanwhile */
    if (r < 0)
        return r;
    if (c != CUDA_ERROR_INVALID_VALUE && c != CUDA_ERROR_NOT_INITIALIZED)
        return bn_cuda_fail(err, c, STAGE_STATE, "%s: the driver does not tell its state", who(pid).text);
    int files = holds_device_files(pid);
    if (files == -ESRCH)
        return bn_error_set(err, ESRCH, STAGE_STATE, "There is no process %d any more.", (int)pid);
    if (files < 0)
        return bn_error_set(err, files, STAGE_STATE, "%s: its open files cannot be seen: %s.", who(pid).text,
                            strerror(-files));
    *state = files ? BN_CKPT_FILES_ONLY : BN_CKPT_NO_CUDA;
    return 0;
}

int bn_ckpt_state(struct bn_gpu *gpu, pid_t pid, enum bn_ckpt_state *state, struct bn_error *err)
{
    int r = check_driver(gpu, false, STAGE_STATE, err);
    if (r == 0)
        r = check_process(pid, STAGE_STATE, err);
    if (r < 0)
        return r;

    CUprocessState s = CU_PROCESS_STATE_FAILED;
    CUresult c = gpu->cu.CheckpointGetState(pid, &s);
    if (c != CUDA_SUCCESS)
        return no_state(pid, c, state, err);
    switch (s) {
    case CU_PROCESS_STATE_RUNNING: *state = BN_CKPT_RUNNING; return 0;
    case CU_PROCESS_STATE_LOCKED: *state = BN_CKPT_LOCKED; return 0;
    case CU_PROCESS_STATE_CHECKPOINTED: *state = BN_CKPT_CHECKPOINTED; return 0;
    case CU_PROCESS_STATE_FAILED: *state = BN_CKPT_FAILED; return 0;
    }
    return bn_error_set(err, EPROTO, STAGE_STATE, "%s: the driver answers with an unknown state, %d.",
                        who(pid).text, (int)s);
}

int bn_ckpt_thread(struct bn_gpu *gpu, pid_t pid, pid_t *tid, struct bn_error *err)
{
    int r = check_driver(gpu, false, STAGE_STATE, err);
    if (r == 0)
        r = check_process(pid, STAGE_STATE, err);
    if (r < 0)
        return r;
    if (!gpu->cu.CheckpointGetThread)
        return bn_error_set(err, ENOSYS, STAGE_STATE, "The driver does not tell its thread in a process.");

    int t = 0;
    CUresult c = gpu->cu.CheckpointGetThread(pid, &t);
    if (c == CUDA_SUCCESS) {
        *tid = t;
        return 0;
    }
    enum bn_ckpt_state state;
    if ((c == CUDA_ERROR_INVALID_VALUE || c == CUDA_ERROR_NOT_INITIALIZED) &&
        no_state(pid, c, &state, err) == 0)
        return bn_error_set(err, ENODEV, STAGE_STATE, "%s does not use CUDA.", who(pid).text);
    return bn_cuda_fail(err, c, STAGE_STATE, "%s: the driver's thread in it cannot be found", who(pid).text);
}

/* ---- The four steps ------------------------------------------------------------------------------------ */

enum step { LOCK, CHECKPOINT, RESTORE, UNLOCK };

static const struct {
    const char *stage, *verb, *needs;
} steps[] = {
    [LOCK] = {"driver-lock", "locked", "running"},
    [CHECKPOINT] = {"driver-checkpoint", "checkpointed", "locked"},
    [RESTORE] = {"driver-restore", "restored", "checkpointed"},
    [UNLOCK] = {"driver-unlock", "unlocked", "locked"},
};

static const char *const state_names[] = {
    [BN_CKPT_RUNNING] = "running",           [BN_CKPT_LOCKED] = "locked",
    [BN_CKPT_CHECKPOINTED] = "checkpointed", [BN_CKPT_FAILED] = "failed",
    [BN_CKPT_NO_CUDA] = "without CUDA",      [BN_CKPT_FILES_ONLY] = "without CUDA of its own",
};

/* 801: what the driver refuses, by step. */
static int refused(enum step step, const char *name, struct bn_error *err)
{
    switch (step) {
    case LOCK:
        return bn_error_set(err, ENOTSUP, steps[step].stage,
                            "%s cannot be checkpointed by the driver: it is a client of MPS, most likely. "
                            "Run it without MPS (stop "
                            "nvidia-cuda-mps-control, unset CUDA_MPS_PIPE_DIRECTORY). NOT_SUPPORTED (801)",
                            name);
    case CHECKPOINT:
        return bn_error_set(err, ENOTSUP, steps[step].stage,
                            "%s holds memory that the driver cannot checkpoint: managed memory "
                            "(cuMemAllocManaged), or memory "
                            "shared with another process. Run it without. NOT_SUPPORTED (801)",
                            name);
    case RESTORE:
        return bn_error_set(
            err, ENOTSUP, steps[step].stage,
            "%s cannot be restored by the driver: memory of another process or GPU was mapped in it when it "
            "was "
            "checkpointed. It is lost; end it and restore it from an earlier checkpoint. NOT_SUPPORTED (801)",
            name);
    default: return -ENOTSUP;
    }
}

static int restore_failed(CUresult c, const char *name, struct bn_error *err)
{
    const char *stage = steps[RESTORE].stage;
    if (c == CUDA_ERROR_OUT_OF_MEMORY)
        return bn_error_set(err, ENOMEM, stage,
                            "%s cannot be restored: too little free memory on its GPU. The driver does not "
                            "take a second try; end "
                            "the process, free memory (stop or suspend something there) and restore from the "
                            "checkpoint again. "
                            "OUT_OF_MEMORY (2)",
                            name);
    char buf[32];
    const char *words = bn_cuda_words(c);
    return bn_error_set(
        err, EIO, stage,
        "%s cannot be restored by the driver and is lost; end it and restore it from its checkpoint. "
        "%s%s%s (%d)",
        name, words ? words : "", words ? "; " : "", bn_cuda_name(c, buf), (int)c);
}

static int not_ready(enum step step, const char *name, CUresult c, struct bn_error *err)
{
    char buf[32];
    return bn_error_set(err, EBUSY, steps[step].stage,
                        "%s cannot be %s now: work on its GPU did not end in time. A kernel runs for long, "
                        "or waits for a peer "
                        "process that is stopped already (NCCL): checkpoint the whole group together, or "
                        "allow more time. %s (%d)",
                        name, steps[step].verb, bn_cuda_name(c, buf), (int)c);
}

/* The code alone does not say: look at the process. */
static int wrong_process(struct bn_gpu *gpu, enum step step, pid_t pid, CUresult c, struct bn_error *err)
{
    enum bn_ckpt_state state;
    const char *stage = steps[step].stage;
    struct who w = who(pid);
    struct bn_error why = BN_ERROR_INIT;
    int r = bn_ckpt_state(gpu, pid, &state, &why);
    if (r < 0)
        return bn_error_set(err, r, stage, "%s", why.text);
    if (bn_ckpt_no_cuda(state))
        return bn_error_set(err, ENODEV, stage, "%s cannot be %s: it does not use CUDA%s.", w.text,
                            steps[step].verb,
                            state == BN_CKPT_FILES_ONLY ? ", although it holds the GPU's device files" : "");
    if (c == CUDA_ERROR_ILLEGAL_STATE)
        return bn_error_set(err, EINVAL, stage,
                            "%s cannot be %s: it is %s and would have to be %s. ILLEGAL_STATE (401)", w.text,
                            steps[step].verb, state_names[state], steps[step].needs);
    return bn_cuda_fail(err, c, stage, "%s, which is %s, cannot be %s by the driver", w.text,
                        state_names[state], steps[step].verb);
}

static int step_failed(struct bn_gpu *gpu, enum step step, pid_t pid, CUresult c, struct bn_error *err)
{
    struct who w = who(pid);
    if (c == CUDA_ERROR_NOT_SUPPORTED && step != UNLOCK)
        return refused(step, w.text, err);
    if (c == CUDA_ERROR_NOT_READY || c == CUDA_ERROR_TIMEOUT)
        return not_ready(step, w.text, c, err);
    if (step == RESTORE && c != CUDA_ERROR_INVALID_VALUE && c != CUDA_ERROR_NOT_INITIALIZED &&
        c != CUDA_ERROR_ILLEGAL_STATE)
        return restore_failed(c, w.text, err);
    return wrong_process(gpu, step, pid, c, err);
}

static int prepare(struct bn_gpu *gpu, enum step step, pid_t pid, bool pairs, struct bn_error *err)
{
    int r = check_driver(gpu, pairs, steps[step].stage, err);
    return r < 0 ? r : check_process(pid, steps[step].stage, err);
}

int bn_ckpt_lock(struct bn_gpu *gpu, pid_t pid, unsigned timeout_ms, struct bn_error *err)
{
    int r = prepare(gpu, LOCK, pid, false, err);
    if (r < 0)
        return r;
    CUcheckpointLockArgs args = {.timeoutMs = timeout_ms};
    CUresult c = gpu->cu.CheckpointLock(pid, &args);
    return c == CUDA_SUCCESS ? 0 : step_failed(gpu, LOCK, pid, c, err);
}

int bn_ckpt_checkpoint(struct bn_gpu *gpu, pid_t pid, struct bn_error *err)
{
    int r = prepare(gpu, CHECKPOINT, pid, false, err);
    if (r < 0)
        return r;
    CUcheckpointCheckpointArgs args = {0};
    CUresult c = gpu->cu.CheckpointCheckpoint(pid, &args);
    return c == CUDA_SUCCESS ? 0 : step_failed(gpu, CHECKPOINT, pid, c, err);
}

/* n 0: onto the GPUs it came from. */
static CUresult ask_restore(struct bn_gpu *gpu, pid_t pid, const struct bn_ckpt_pairs *pairs, size_t n)
{
    CUcheckpointGpuPair map[BN_CKPT_PAIRS_MAX];
    for (size_t i = 0; i < n; i++) {
        memcpy(map[i].oldUuid.bytes, pairs->v[i].from, 16);
        memcpy(map[i].newUuid.bytes, pairs->v[i].to, 16);
    }
    CUcheckpointRestoreArgs args = {.gpuPairs = n ? map : NULL, .gpuPairsCount = (unsigned)n};
    return gpu->cu.CheckpointRestore(pid, &args);
}

int bn_ckpt_restore(struct bn_gpu *gpu, pid_t pid, const struct bn_ckpt_pairs *pairs, bool *asked,
                    struct bn_error *err)
{
    *asked = false;
    int r = prepare(gpu, RESTORE, pid, pairs != NULL, err);
    if (r < 0)
        return r;
    *asked = true;
    CUresult c = ask_restore(gpu, pid, pairs, pairs ? pairs->n : 0);
    if (c == CUDA_ERROR_INVALID_VALUE && pairs && pairs->used < pairs->n)
        c = ask_restore(gpu, pid, pairs, pairs->used);
    return c == CUDA_SUCCESS ? 0 : step_failed(gpu, RESTORE, pid, c, err);
}

int bn_ckpt_unlock(struct bn_gpu *gpu, pid_t pid, struct bn_error *err)
{
    int r = prepare(gpu, UNLOCK, pid, false, err);
    if (r < 0)
        return r;
    CUcheckpointUnlockArgs args = {0};
    CUresult c = gpu->cu.CheckpointUnlock(pid, &args);
    return c == CUDA_SUCCESS ? 0 : step_failed(gpu, UNLOCK, pid, c, err);
}
