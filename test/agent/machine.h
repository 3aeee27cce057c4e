/* A simulated machine that is this process's own: the tests of two builds may run side by side, and each counts its memory. */
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static pid_t machine_owner;
static char machine_ledger[64]; /* the simulated driver's file */

static inline void leave_machine(void)
{
    if (getpid() == machine_owner) /* not in a forked child */
        unlink(machine_ledger);
}

/* First of all in main: the driver reads the name in cuInit. */
static inline void own_machine(const char *test)
{
    char name[32];
    machine_owner = getpid();
    snprintf(name, sizeof(name), "%s-%d", test, (int)machine_owner);
    snprintf(machine_ledger, sizeof(machine_ledger), "/dev/shm/cuda-sim.%s", name);
    setenv("BENNU_SIM_MACHINE", name, 1);
    atexit(leave_machine);
}

/* What the driver of a program started with BENNU_SIM_FAIL_FILE=path answers from now on; see sim/README.md. */
static inline void say_failure(const char *path, const char *rule)
{
    static int number;
    FILE *f = fopen(path, "we");
    if (!f || fprintf(f, "%s,none:%d=1\n", rule, ++number) < 0 || fclose(f)) { /* never the same text twice */
        perror(path);
        abort();
    }
}
