/* The daemon's end of the agent protocol (agent_proto.h): find the agent in a process, take its socket, talk.
 *
 * The process may be hostile, stopped, or dying: every call has a deadline, everything received is checked, and nothing of it
 * is mapped (a page that the process truncates would raise SIGBUS here). One thread at a time per object. Functions return 0 or
 * negative errno; `err` gets a text that names the process.
 */
#pragma once

#include "base/error.h"
#include "wire/agent_proto.h"

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

struct bn_agent;

/* -ENOENT: the process has no agent (its own answer: nothing is wrong). -ESRCH: no such process. Caller frees with
 * bn_agent_free, which also lets go of the process (flock, socket). */
int bn_agent_find(pid_t pid, struct bn_agent **out);
void bn_agent_free(struct bn_agent *a);

/* A checked copy of the page as it is now; strings are terminated, counts within their arrays. */
int bn_agent_page(struct bn_agent *a, struct bn_agent_page *page);

/* The daemon's half of struct bn_agent_need, for processes that run; nobody has to be attached. -ENOTSUP: the agent is too old to
 * want anything, or this is no page of an agent's.
 *
 * Say that memory is held on GPUs (a number that is not 0 and changes with each call, about once a second), or is not any more (0). */
int bn_agent_announce_hot(struct bn_agent *a, uint32_t hot);

struct bn_agent_want {
    uint64_t bytes;   /* that one allocation failed to get */
    uint8_t uuid[16]; /* on this GPU, as the application knows it */
    uint32_t seq;     /* names the want in the answer */
};
/* 1: the process waits for memory, *want says for how much; 0: it does not. */
int bn_agent_wanted(struct bn_agent *a, struct bn_agent_want *want);
/* More: memory was let go of, so it may try again. Otherwise its allocation fails. */
int bn_agent_answer_want(struct bn_agent *a, uint32_t seq, bool more);

/* Become the one controller, if that is not so already, and check that the agent's thread answers: then nothing that was asked of it
 * before is left to be done, and its page says how things are. -EBUSY: somebody else is talking to it. */
int bn_agent_attach(struct bn_agent *a, struct bn_error *err);
void bn_agent_detach(struct bn_agent *a);

/* See the message types of the same names. */
int bn_agent_close_gate(struct bn_agent *a, unsigned timeout_ms, struct bn_error *err);
int bn_agent_open_gate(struct bn_agent *a, struct bn_error *err);
int bn_agent_evict(struct bn_agent *a, struct bn_error *err);
/* Whether the latest of these was answered. One that was not waits in the agent's queue: a process that was stopped does it when it
 * goes on, before whatever is asked of it afterwards. */
bool bn_agent_answered(const struct bn_agent *a);

/* Bytes given back. The caller has stopped every thread but bn_agent_tid(), the agent's, in our pid namespace (-ESRCH). */
int bn_agent_purge(struct bn_agent *a, uint64_t *freed, struct bn_error *err);
pid_t bn_agent_tid(struct bn_agent *a);

/* Every segment, in the agent's order. *segs is malloced; caller frees. */
int bn_agent_list(struct bn_agent *a, struct bn_agent_segment **segs, size_t *n, struct bn_error *err);
/* A descriptor for each of the n segments of the list just taken, into fds[n]; the caller closes them. On error none. */
int bn_agent_export(struct bn_agent *a, const struct bn_agent_segment *segs, size_t n, int *fds,
                    struct bn_error *err);
/* Give segments back; the descriptors stay the caller's. -ENODEV: the process cannot take memory of this GPU. */
int bn_agent_import(struct bn_agent *a, const struct bn_agent_segment *segs, const int *fds, size_t n,
                    struct bn_error *err);
/* For such a process: have it create memory for n <= BN_AGENT_BATCH segments. A descriptor for each into fds[n]; the caller closes
 * them. -ENOMEM: the GPU has not enough; on error none. */
int bn_agent_create(struct bn_agent *a, const struct bn_agent_segment *segs, size_t n, int *fds,
                    struct bn_error *err);
/* That memory holds what it should: it becomes the segments'. */
int bn_agent_map(struct bn_agent *a, const struct bn_agent_segment *segs, size_t n, struct bn_error *err);
