/* Letting one thread run while CRIU holds all others. CRIU's main thread traces them, and hooks run on it. */
#include "criu/plugin.h"

#include <errno.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

int bnp_thread_run(pid_t tid)
{
    return ptrace(PTRACE_CONT, tid, NULL, NULL) < 0 ? -errno : 0;
}

int bnp_thread_stop(pid_t tid)
{
    if (ptrace(PTRACE_INTERRUPT, tid, NULL, NULL) < 0)
        return -errno;
    for (;;) {
        int status;
        pid_t got = waitpid(tid, &status, __WALL);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -errno;
        if (!WIFSTOPPED(status))
            return -ESRCH;
        if (status >> 16 == PTRACE_EVENT_STOP)
            return 0;
        /* A signal came first: it keeps it, and stops as asked right after. */
        if (ptrace(PTRACE_CONT, tid, NULL, (void *)(long)WSTOPSIG(status)) < 0)
            return -errno;
    }
}
