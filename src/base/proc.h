/* What /proc says of other processes. The answers come from processes that may change or end at any moment and that may
 * be hostile: nothing here trusts their content. 0 or negative errno (-ESRCH: no such process). Any thread. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Ticks since boot at which `pid` started: with the pid it names one process for good. */
int bn_proc_start_time(pid_t pid, uint64_t *ticks);
/* The state letter of /proc/PID/stat (R S D T t Z …). */
int bn_proc_state(pid_t pid, char *state);
/* The pid as the process itself sees it (last NSpid), and its tracer in our namespace (0: none). */
int bn_proc_inner_pid(pid_t pid, pid_t *inner);
int bn_proc_tracer(pid_t pid, pid_t *tracer);
/* The thread of `pid` that sees itself as `inner`, in our pid namespace. -ESRCH: there is none. */
pid_t bn_proc_thread(pid_t pid, pid_t inner);
/* Command name, at most 15 characters. */
int bn_proc_comm(pid_t pid, char out[16]);

/* `root` and all its descendants, root first, parents before children; *pids is malloced, caller frees. At most 65536. */
int bn_proc_tree(pid_t root, pid_t **pids, size_t *n);
/* Every process of the machine that we can see. */
int bn_proc_all(pid_t **pids, size_t *n);

/* Does a line of the process's memory mappings contain one of the `n` texts? 1 or 0; -ESRCH: it is gone; or another negative errno. */
int bn_proc_maps(pid_t pid, const char *const *texts, size_t n);

/* Open read-write, on a file description of our own, the memfd called `name` that `pid` has open. `accept` (may be NULL) looks at
 * the opened file and says whether it is the one sought. -ENOENT: it has none. Returns a descriptor. */
int bn_proc_open_memfd(pid_t pid, const char *name, bool (*accept)(int fd, void *arg), void *arg);

/* pidfd_open(2), pidfd_getfd(2): a descriptor or negative errno. */
int bn_pidfd_open(pid_t pid);
int bn_pidfd_getfd(int pidfd, int fd);
/* True once the process behind the pidfd has ended. */
bool bn_pidfd_dead(int pidfd);
