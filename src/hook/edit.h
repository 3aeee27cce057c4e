/* What is done to a container's configuration (config.json of the OCI runtime specification) so that its programs load the agent
 * where they look for the driver's library.
 *
 * mount    the configuration mounts a driver's libcuda into the container: that mount moves to BENNU_CONTAINER_DRIVER, where the
 *          agent looks first, and the agent is mounted in its place. Nothing in the environment; every way to load libcuda
 *          finds the agent.
 * preload  the container gets GPUs, but its libcuda comes some other way (a folder that is mounted, NVIDIA's own hook, the image):
 *          the agent is mounted at BENNU_CONTAINER_AGENT and LD_PRELOAD names it.
 *
 * The annotation dev.bennu.agent says "off" or "preload" for one container; "on" is as if there were none (it is what Podman looks
 * for where only chosen containers are to have the agent). */
#pragma once

#include <stddef.h>

#define BN_HOOK_ANNOTATION "dev.bennu.agent"

struct bn_hook_options {
    const char *agent; /* absolute path of libbennu.so on this machine */
};

/* Returns 1: *out (malloced, *out_len bytes) is the new configuration; caller frees. 0: nothing is to be changed; `why` says so if
 * the container asks for GPUs and gets no agent, else it is empty. Negative errno: the configuration, or this machine, is not as it
 * should be; `why` says what. Reads files that the configuration names; changes none. Any thread. */
int bn_hook_edit(const char *text, size_t len, const struct bn_hook_options *options, char **out,
                 size_t *out_len, char *why, size_t why_len);
