/* SPDX-License-Identifier: MIT */
/* The driver's own checkpoint of a process and back, timed: the path that Bennu is compared with.
 *
 *     bench-driver-ckpt PID
 *
 * Prints a line "lock S", "checkpoint S", "restore S", "unlock S" after each step; the GPU is free between checkpoint and restore. */
#include "driver.h"

#define LOCK_TIMEOUT_MS 10000

static int pid;

static CUresult lock(void)
{
    return cuCheckpointProcessLock(pid, &(CUcheckpointLockArgs){.timeoutMs = LOCK_TIMEOUT_MS});
}

static CUresult checkpoint(void)
{
    return cuCheckpointProcessCheckpoint(pid, &(CUcheckpointCheckpointArgs){0});
}

static CUresult restore(void)
{
    return cuCheckpointProcessRestore(pid, &(CUcheckpointRestoreArgs){0});
}

static CUresult unlock(void)
{
    return cuCheckpointProcessUnlock(pid, &(CUcheckpointUnlockArgs){0});
}

/* Ends the program if it fails. */
static void step(const char *name, CUresult (*run)(void))
{
    double began = seconds();
    CUresult r = run();
    if (r != CUDA_SUCCESS) {
        fprintf(stderr, "%s of process %d: CUDA error %d\n", name, pid, (int)r);
        exit(1);
    }
    printf("%s %.6f\n", name, seconds() - began);
}

int main(int argc, char **argv)
{
    pid = argc == 2 ? atoi(argv[1]) : 0;
    if (pid <= 0) {
        fprintf(stderr, "usage: bench-driver-ckpt PID\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    driver_open();
    if (!cuCheckpointProcessLock || !cuCheckpointProcessCheckpoint || !cuCheckpointProcessRestore ||
        !cuCheckpointProcessUnlock) {
        fprintf(stderr, "this driver cannot checkpoint processes\n");
        return 1;
    }
    MUST(cuInit(0));
    step("lock", lock);
    step("checkpoint", checkpoint);
    step("restore", restore);
    step("unlock", unlock);
    return 0;
}
