/* One request from a controller: parsed, done, answered. Apart from the thread so that it can be fed anything. */
#pragma once

#include "agent/agent.h"

#include <stddef.h>

/* `len` bytes of a packet with `nfds` descriptors, which are taken over. True: *answer is to be sent (its head is complete, its
 * descriptors are the caller's to close); false: not worth an answer. */
bool bn_control_handle(const void *packet, size_t len, const int *fds, unsigned nfds,
                       struct bn_answer *answer) BN_API_LOCAL;

/* True while the gate is closed and the memory is as the application left it: then, and only then, it may open without being told
 * so. After an IMPORT the controller may still be copying into the memory. */
bool bn_control_open_alone(void) BN_API_LOCAL;
/* Open it: the controller is gone. Where that fails bn_control_open_alone stays true, for another try. */
void bn_control_open(void) BN_API_LOCAL;
