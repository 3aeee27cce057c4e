/* SPDX-License-Identifier: MIT */

/* control state|thread|lock|checkpoint|restore|unlock PID: prints what it got, exits with the driver's answer. */

#include <string.h>

#include "cuda.h"

int main(int argc, char **argv)
{
    CUprocessState state = CU_PROCESS_STATE_RUNNING;
    int pid, tid = 0, rc;

    if (argc != 3)
        return 255;
    pid = atoi(argv[2]);
    OK(cuInit(0));
    if (strcmp(argv[1], "state") == 0) {
        rc = (int)cuCheckpointProcessGetState(pid, &state);
        printf("%d\n", (int)state);
    } else if (strcmp(argv[1], "thread") == 0) {
        rc = (int)cuCheckpointProcessGetRestoreThreadId(pid, &tid);
        printf("%d\n", tid);
    } else if (strcmp(argv[1], "lock") == 0) {
        rc = (int)cuCheckpointProcessLock(pid, NULL);
    } else if (strcmp(argv[1], "checkpoint") == 0) {
        rc = (int)cuCheckpointProcessCheckpoint(pid, NULL);
    } else if (strcmp(argv[1], "restore") == 0) {
        rc = (int)cuCheckpointProcessRestore(pid, NULL);
    } else if (strcmp(argv[1], "unlock") == 0) {
        rc = (int)cuCheckpointProcessUnlock(pid, NULL);
    } else {
        return 255;
    }
    return rc > 250 ? 250 : rc;
}
