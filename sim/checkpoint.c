/* SPDX-License-Identifier: MIT */

/*
 * The caller's side of cuCheckpointProcess*. A process without CUDA, or none at all: CUDA_ERROR_INVALID_VALUE, which
 * is what callers of the real driver report. A target that dies meanwhile: CUDA_ERROR_OPERATING_SYSTEM.
 */

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "control.h"

struct target {
    int proc;   /* /proc/PID */
    int thread; /* the restore thread, as this process numbers it */
    int fd;
    struct control *control;
};

static void target_close(struct target *t)
{
    if (t->control)
        munmap(t->control, CONTROL_SIZE);
    close_fd(&t->fd); /* lets go of the flock */
    close_fd(&t->proc);
}

static bool thread_is(int proc, const char *tid)
{
    char path[64], comm[32];
    ssize_t n;
    int fd;

    snprintf(path, sizeof(path), "task/%.16s/comm", tid);
    fd = openat(proc, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    n = read(fd, comm, sizeof(comm) - 1);
    close(fd);
    if (n <= 0)
        return false;
    comm[n] = '\0';
    return strcmp(comm, CONTROL_THREAD "\n") == 0;
}

/* Each number in a folder of /proc until fn says that it is the one. */
static int search(int proc, const char *folder, bool (*fn)(int proc, const char *name))
{
    int fd = openat(proc, folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC), found = -1;
    struct dirent *e;
    DIR *dir;

    if (fd < 0)
        return -1;
    dir = fdopendir(fd);
    if (!dir) {
        close(fd);
        return -1;
    }
    while (found < 0 && (e = readdir(dir)))
        if (e->d_name[0] >= '0' && e->d_name[0] <= '9' && fn(proc, e->d_name))
            found = atoi(e->d_name);
    closedir(dir);
    return found;
}

static bool descriptor_is(int proc, const char *name)
{
    char path[64], link[64];
    ssize_t n;

    snprintf(path, sizeof(path), "fd/%.16s", name);
    n = readlinkat(proc, path, link, sizeof(link) - 1);
    if (n <= 0)
        return false;
    link[n] = '\0';
    return strcmp(link, "/memfd:" CONTROL_NAME " (deleted)") == 0;
}

static CUresult target_open(int pid, struct target *t)
{
    char path[64];
    struct stat st;
    int number;

    *t = (struct target){.proc = -1, .fd = -1};
    if (pid <= 0)
        return CUDA_ERROR_INVALID_VALUE;
    snprintf(path, sizeof(path), "/proc/%d", pid);
    t->proc = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (t->proc < 0)
        return CUDA_ERROR_INVALID_VALUE;
    /* The thread too: a child of a raw clone() has the descriptor but is no CUDA process. */
    t->thread = search(t->proc, "task", thread_is);
    number = t->thread < 0 ? -1 : search(t->proc, "fd", descriptor_is);
    if (number >= 0) {
        snprintf(path, sizeof(path), "fd/%d", number);
        t->fd = openat(t->proc, path, O_RDWR | O_CLOEXEC);
    }
    if (t->fd >= 0 && fstat(t->fd, &st) == 0 && st.st_size >= (off_t)CONTROL_SIZE)
        t->control = mmap(NULL, CONTROL_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, t->fd, 0);
    if (t->control == MAP_FAILED)
        t->control = NULL;
    if (!t->control || t->control->magic != CONTROL_MAGIC) {
        target_close(t);
        return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

static bool target_alive(const struct target *t)
{
    char path[64];

    snprintf(path, sizeof(path), "task/%d/comm", t->thread);
    return faccessat(t->proc, path, F_OK, 0) == 0;
}

static bool wait_answer(const struct target *t, uint32_t request)
{
    uint32_t seen;

    while ((seen = t->control->answer) != request) {
        struct timespec step = {.tv_nsec = 50 * 1000 * 1000};

        if (!target_alive(t))
            return false;
        syscall(SYS_futex, &t->control->answer, FUTEX_WAIT, seen, &step, NULL, 0);
    }
    return true;
}

static CUresult command(int pid, enum control_command what, uint32_t timeout_ms,
                        const CUcheckpointGpuPair *pairs, unsigned count)
{
    struct target t;
    CUresult rc = target_open(pid, &t);

    if (rc != CUDA_SUCCESS)
        return rc;
    while (flock(t.fd, LOCK_EX) < 0 && errno == EINTR)
        ;
    rc = CUDA_ERROR_OPERATING_SYSTEM;
    if (wait_answer(&t, t.control->request)) { /* what a caller that died has left running */
        uint32_t request = t.control->request + 1;

        t.control->command = what;
        t.control->timeout_ms = timeout_ms;
        t.control->pair_count = count;
        if (count)
            memcpy(t.control->pairs, pairs, count * sizeof(*pairs));
        t.control->request = request;
        syscall(SYS_futex, &t.control->request, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
        if (wait_answer(&t, request))
            rc = (CUresult)t.control->result;
    }
    target_close(&t);
    return rc;
}

static bool is_zero(const void *p, size_t size)
{
    const unsigned char *bytes = p;

    while (size--)
        if (*bytes++)
            return false;
    return true;
}

SIM_FN(cuCheckpointProcessGetRestoreThreadId, CALL_UNGATED, (int pid, int *tid), (pid, tid))
{
    struct target t;

    if (!tid)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult rc = target_open(pid, &t);

    if (rc != CUDA_SUCCESS)
        return rc;
    *tid = t.thread;
    target_close(&t);
    return CUDA_SUCCESS;
}

SIM_FN(cuCheckpointProcessGetState, CALL_UNGATED, (int pid, CUprocessState *state), (pid, state))
{
    struct target t;

    if (!state)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult rc = target_open(pid, &t);

    if (rc != CUDA_SUCCESS)
        return rc;
    *state = (CUprocessState)t.control->state;
    target_close(&t);
    return CUDA_SUCCESS;
}

SIM_FN(cuCheckpointProcessLock, CALL_UNGATED, (int pid, CUcheckpointLockArgs *args), (pid, args))
{
    if (args && (args->reserved0 || !is_zero(args->reserved1, sizeof(args->reserved1))))
        return CUDA_ERROR_INVALID_VALUE;
    return command(pid, CONTROL_LOCK, args ? args->timeoutMs : 0, NULL, 0);
}

SIM_FN(cuCheckpointProcessCheckpoint, CALL_UNGATED, (int pid, CUcheckpointCheckpointArgs *args), (pid, args))
{
    if (args && !is_zero(args, sizeof(*args)))
        return CUDA_ERROR_INVALID_VALUE;
    return command(pid, CONTROL_CHECKPOINT, 0, NULL, 0);
}

SIM_FN(cuCheckpointProcessRestore, CALL_UNGATED, (int pid, CUcheckpointRestoreArgs *args), (pid, args))
{
    unsigned count = args ? args->gpuPairsCount : 0;

    if (args && !is_zero(args->reserved, sizeof(args->reserved)))
        return CUDA_ERROR_INVALID_VALUE;
    if (args && args->customStorageInfo_out)
        return CUDA_ERROR_NOT_SUPPORTED; /* a 610 driver's */
    if (count > SIM_MAX_DEVICES || (count && !args->gpuPairs))
        return CUDA_ERROR_INVALID_VALUE;
    return command(pid, CONTROL_RESTORE, 0, count ? args->gpuPairs : NULL, count);
}

SIM_FN(cuCheckpointProcessUnlock, CALL_UNGATED, (int pid, CUcheckpointUnlockArgs *args), (pid, args))
{
    if (args && !is_zero(args, sizeof(*args)))
        return CUDA_ERROR_INVALID_VALUE;
    return command(pid, CONTROL_UNLOCK, 0, NULL, 0);
}
