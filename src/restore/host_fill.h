/* Host memory of restored processes, filled in by several threads where CRIU would read it with one.
 *
 * CRIU is run with its option "lazy-pages". It then leaves private anonymous memory empty, registers it with a userfaultfd(2) of each
 * process and sends that, behind the process's pid in the image, through a stream socket to whoever fills it in: here, from CRIU's
 * own images. (Source: criu/uffd.c of 4.0 to 4.2.) Nothing is lazy about it here: all of it is there before CRIU lets any process go.
 * What CRIU's own code inside a process touches before waits in the kernel until it is there.
 *
 *   start    CRIU has not connected yet
 *   finish   CRIU has stopped all processes at the end of its work: wait until their memory is complete
 *
 * One thread at a time per object.
 */
#pragma once

#include "checkpoint/quiesce.h"

struct bn_host_fill;

/* `listener`: a listening stream socket; it and dirfd are duplicated. Errors: -ENOMEM, -EMFILE, -EAGAIN (no threads). */
int bn_host_fill_start(struct bn_env *env, int dirfd, int listener, struct bn_report *report,
                       struct bn_host_fill **out, struct bn_error *err);
/* On failure the processes must be killed. -EBADMSG: the image is damaged; -ESRCH: a process ended; -EPIPE: CRIU went away before it
 * had sent all; others as read(2) and ioctl_userfaultfd(2). A second call answers as the first did. */
int bn_host_fill_finish(struct bn_host_fill *f, struct bn_error *err);
/* Before a successful finish: if CRIU is gone its processes may run on, so they get what they lack first, as far as CRIU had come. */
void bn_host_fill_free(struct bn_host_fill *f);
