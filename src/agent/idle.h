/* Waiting until the GPU has finished what every context was given, with a deadline. */
#pragma once

#include "agent/api/api_table.h"

/* With the gate closed; agent's thread alone. 0; -EBUSY: some context was still at work at deadline_ns (the waiting goes on in
 * the background and its outcome is dropped); -EIO: a context is broken, or the driver does not say which there are, *cuda says
 * how; -E2BIG: more contexts than it can wait for; -EAGAIN: no thread to be had. */
int bn_idle_wait(uint64_t deadline_ns, CUresult *cuda) BN_API_LOCAL;
/* In a forked child: the waiting thread is not there. */
void bn_idle_after_fork(void) BN_API_LOCAL;
/* The agent's threads: blocked signals, a small stack, a name. 0 or -errno. */
int bn_thread_start(const char *name, void *(*main)(void *), void *arg) BN_API_LOCAL;
/* The device's primary context, however it was retained, or NULL if none is active. Holds no reference. An error is the driver's:
 * whether there is one is not known. */
CUresult bn_ctx_primary(CUdevice dev, CUcontext *ctx) BN_API_LOCAL;
