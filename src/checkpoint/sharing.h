/* GPU memory that the targets share with processes that are not checkpointed with them. Such a process would keep the old memory when
 * ours is taken away and given back, and nobody would notice: refused beforehand. */
#pragma once

#include "checkpoint/target.h"

/* -ENOTSUP with the two processes named when somebody outside the tree below `root` has memory of a target open, or may have it.
 *
 * What can be known: who has an allocation open by an IPC handle that an agent made, since the opener has an agent, too, and
 * its page names the owner. Of exported descriptors, pools and the driver's own IPC handles an importer leaves no trace but
 * that it uses CUDA; only its own agent can say that it has imported nothing. A process without CUDA that keeps a descriptor
 * for later is not found. Memory given to a device (dma-buf) or another machine (fabric handle) is always refused.
 * Looks at the pages alone unless something is shared. Any thread. */
int bn_sharing_check(struct bn_gpu *gpu, const struct bn_targets *targets, pid_t root, struct bn_error *err);

/* The same for n processes that may be outsiders, instead of all of the machine. */
int bn_sharing_check_with(struct bn_gpu *gpu, const struct bn_targets *targets, const pid_t *outside,
                          size_t n, struct bn_error *err);
