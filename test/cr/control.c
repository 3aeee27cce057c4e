/* SPDX-License-Identifier: MIT */

/* The driver's own checkpoint calls, one by one: control DRIVER CALL PID, CALL being state, lock, checkpoint, restore or unlock.
 * Prints the state, a number of CUprocessState; ends with the driver's answer (250 for what is above). */
#include "agent/api/api_table.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv)
{
    void *driver = argc == 4 ? dlopen(argv[1], RTLD_NOW) : NULL;
    if (!driver) {
        fprintf(stderr, "usage: control DRIVER state|lock|checkpoint|restore|unlock PID\n");
        return 255;
    }
#define GET(name) bn_pfn_##name p_##name = (bn_pfn_##name)dlsym(driver, #name)
    GET(cuInit);
    GET(cuCheckpointProcessGetState);
    GET(cuCheckpointProcessLock);
    GET(cuCheckpointProcessCheckpoint);
    GET(cuCheckpointProcessRestore);
    GET(cuCheckpointProcessUnlock);
    int pid = atoi(argv[3]), r = -1;
    CUprocessState state = CU_PROCESS_STATE_RUNNING;
    if (p_cuInit(0) != CUDA_SUCCESS)
        return 255;
    if (strcmp(argv[2], "state") == 0) {
        r = (int)p_cuCheckpointProcessGetState(pid, &state);
        printf("%d\n", (int)state);
    } else if (strcmp(argv[2], "lock") == 0) {
        CUcheckpointLockArgs args = {.timeoutMs = 10000};
        r = (int)p_cuCheckpointProcessLock(pid, &args);
    } else if (strcmp(argv[2], "checkpoint") == 0) {
        r = (int)p_cuCheckpointProcessCheckpoint(pid, NULL);
    } else if (strcmp(argv[2], "restore") == 0) {
        r = (int)p_cuCheckpointProcessRestore(pid, NULL);
    } else if (strcmp(argv[2], "unlock") == 0) {
        r = (int)p_cuCheckpointProcessUnlock(pid, NULL);
    }
    return r < 0 ? 255 : r > 250 ? 250 : r;
}
