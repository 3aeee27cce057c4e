/* SPDX-License-Identifier: MIT */
#ifndef SIM_CONTROL_H
#define SIM_CONTROL_H

/*
 * How another process reaches the driver inside a process: a page that is a memfd named cuda-sim-control, found in
 * /proc/PID/fd, and a thread there that serves it, known by its name. The caller holds an flock on the memfd from
 * writing the command to reading the answer. Nothing in the page depends on the process's number, so that a dumped
 * and restored process answers as before. Both sides take what they read there for hostile.
 */

#include <stdatomic.h>
#include <stdint.h>

#include "sim.h"

#define CONTROL_NAME "cuda-sim-control"
#define CONTROL_THREAD "cuda00005151" /* the real one is called cuda and hexadecimal digits, too */
#define CONTROL_MAGIC 0x306d6973u
#define CONTROL_SIZE 4096u

enum control_command { CONTROL_LOCK = 1, CONTROL_CHECKPOINT, CONTROL_RESTORE, CONTROL_UNLOCK };

struct control {
    uint32_t magic;
    _Atomic uint32_t request; /* rises with each command; futex */
    _Atomic uint32_t answer;  /* the request that was answered last; futex */
    _Atomic uint32_t state;   /* CUprocessState */
    uint32_t command;
    int32_t result; /* CUresult */
    uint32_t timeout_ms;
    uint32_t pair_count;
    CUcheckpointGpuPair pairs[SIM_MAX_DEVICES];
};

_Static_assert(sizeof(struct control) <= CONTROL_SIZE, "one page");

#endif
