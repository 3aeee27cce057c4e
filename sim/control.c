/* SPDX-License-Identifier: MIT */

/* The target's side of the checkpoint calls: the control page and the restore thread. See control.h. */

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/memfd.h>
#include <limits.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "control.h"

static struct control *control;
static int control_fd = -1, device_fd = -1;
static bool restore_failed; /* for want of memory; no later attempt succeeds */

/* ---- The open device ---- */

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

/*
 * The real driver keeps /dev/nvidiactl open, which CRIU cannot dump. What stands for it must be refused by CRIU, need
 * no privilege and do nothing: an idle userfaultfd, else an empty Landlock rule set.
 */
void control_open_device(void)
{
    uint64_t rules[3] = {1, 0, 0}; /* handled_access_fs */
    long fd;

    if (!sim.strict || device_fd >= 0)
        return;
    fd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
#ifdef SYS_landlock_create_ruleset
    if (fd < 0)
        fd = syscall(SYS_landlock_create_ruleset, rules, sizeof(rules[0]), 0);
#endif
    (void)rules;
    device_fd = sim_high_fd((int)fd);
}

void control_close_device(void)
{
    close_fd(&device_fd);
}

void control_forked(void)
{
    close_fd(&device_fd);
    close_fd(&control_fd);
}

/* ---- Commands, in the restore thread: no malloc, no stdio from here on ---- */

static CUresult do_lock(uint32_t timeout_ms)
{
    uint64_t deadline = timeout_ms ? sim_now_ns() + timeout_ms * 1000000ull : 0;

    if (control->state != CU_PROCESS_STATE_RUNNING)
        return CUDA_ERROR_ILLEGAL_STATE;
    if (sim.mps)
        return CUDA_ERROR_NOT_SUPPORTED;
    gate_close();
    if (!gate_wait_empty(deadline)) {
        gate_open();
        return CUDA_ERROR_NOT_READY;
    }
    pthread_mutex_lock(&sim.lock); /* and kept: see sim.h */
    if (!streams_drain(deadline)) {
        pthread_mutex_unlock(&sim.lock);
        gate_open();
        return CUDA_ERROR_NOT_READY;
    }
    control->state = CU_PROCESS_STATE_LOCKED;
    return CUDA_SUCCESS;
}

static CUresult do_unlock(void)
{
    if (control->state != CU_PROCESS_STATE_LOCKED)
        return CUDA_ERROR_ILLEGAL_STATE;
    control->state = CU_PROCESS_STATE_RUNNING;
    pthread_mutex_unlock(&sim.lock);
    gate_open();
    return CUDA_SUCCESS;
}

static CUresult do_checkpoint(void)
{
    CUresult rc;

    if (control->state != CU_PROCESS_STATE_LOCKED)
        return CUDA_ERROR_ILLEGAL_STATE;
    if (sim.managed)
        return CUDA_ERROR_NOT_SUPPORTED;
    rc = save_checkpoint();
    if (rc == CUDA_SUCCESS)
        control->state = CU_PROCESS_STATE_CHECKPOINTED;
    return rc;
}

static CUresult do_restore(void)
{
    CUcheckpointGpuPair pairs[SIM_MAX_DEVICES];
    uint32_t count = control->pair_count;
    CUresult rc;

    if (control->state != CU_PROCESS_STATE_CHECKPOINTED)
        return CUDA_ERROR_ILLEGAL_STATE;
    if (restore_failed)
        return CUDA_ERROR_OPERATING_SYSTEM;
    if (count > SIM_MAX_DEVICES)
        return CUDA_ERROR_INVALID_VALUE;
    memcpy(pairs, control->pairs, sizeof(pairs));
    rc = save_restore(pairs, count);
    if (rc == CUDA_SUCCESS)
        control->state = CU_PROCESS_STATE_LOCKED;
    else if (rc == CUDA_ERROR_OUT_OF_MEMORY)
        restore_failed = true; /* "checkpointed" it stays, but it is lost */
    else if (rc != CUDA_ERROR_INVALID_VALUE)
        control->state = CU_PROCESS_STATE_FAILED;
    return rc;
}

static CUresult serve(void)
{
    switch (control->command) {
    case CONTROL_LOCK: return do_lock(control->timeout_ms);
    case CONTROL_CHECKPOINT: return do_checkpoint();
    case CONTROL_RESTORE: return do_restore();
    case CONTROL_UNLOCK: return do_unlock();
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}

static void *restore_thread(void *arg)
{
    uint32_t served = control->answer, request;

    (void)arg;
    for (;;) {
        request = control->request;
        if (request == served) { /* waits without a limit: CRIU starts the call again as it was */
            syscall(SYS_futex, &control->request, FUTEX_WAIT, request, NULL, NULL, 0);
            continue;
        }
        control->result = (int32_t)serve();
        control->answer = served = request;
        syscall(SYS_futex, &control->answer, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
    return NULL;
}

CUresult control_start(void)
{
    sigset_t all, old;
    pthread_attr_t attr;
    pthread_t thread;
    int err;

    if (control)
        return CUDA_SUCCESS;
    control_fd = sim_high_fd((int)syscall(SYS_memfd_create, CONTROL_NAME, MFD_CLOEXEC));
    if (control_fd < 0 || ftruncate(control_fd, CONTROL_SIZE) < 0) {
        close_fd(&control_fd);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    control = mmap(NULL, CONTROL_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, control_fd, 0);
    if (control == MAP_FAILED) {
        control = NULL;
        close_fd(&control_fd);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    madvise(control, CONTROL_SIZE, MADV_DONTFORK);
    control->magic = CONTROL_MAGIC;

    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, 256 << 10);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    err = pthread_create(&thread, &attr, restore_thread, NULL);
    if (!err) /* not in the thread, which may get to it only after cuInit has returned */
        pthread_setname_np(thread, CONTROL_THREAD);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    if (err) {
        munmap(control, CONTROL_SIZE);
        control = NULL;
        close_fd(&control_fd);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    control_open_device();
    return CUDA_SUCCESS;
}
