/* The agent as a whole: is it at work, its page, its thread. */
#pragma once

#include "agent/api/api_table.h"
#include "wire/agent_proto.h"

#include <stdbool.h>

/* Start after a successful cuInit: page, socketpair, thread. Any thread, any number of times. */
void bn_agent_start(void) BN_API_LOCAL;
/* Allocations made now are to be evictable. */
bool bn_agent_converting(void) BN_API_LOCAL;
/* Never NULL; before the start, or where it failed, nobody else sees it. */
struct bn_agent_page *bn_agent_page(void) BN_API_LOCAL;

/* A descriptor of the agent's own that has nothing to do with the driver, or -1. */
int bn_agent_placeholder(void) BN_API_LOCAL;

/* real.c: the driver in use. */
const char *bn_real_path(void) BN_API_LOCAL;
/* procaddr.c: add a name that the table lacks to the page. */
void bn_unknown_name(const char *name) BN_API_LOCAL;
void bn_procaddr_after_fork(void) BN_API_LOCAL;

/* evict.c: what the controller asks for. Agent's thread alone. 0 or negative errno with text and CUresult. */
struct bn_answer {
    struct bn_agent_msg head; /* error, cuda_error, count, arg, text to be sent */
    struct bn_agent_segment segs[BN_AGENT_BATCH];
    int fds[BN_AGENT_BATCH]; /* sent, then closed */
    unsigned nfds;
};
int bn_evict_close(uint64_t timeout_ms, struct bn_answer *a) BN_API_LOCAL;
int bn_evict_open(struct bn_answer *a) BN_API_LOCAL;
int bn_evict_list(uint64_t first, struct bn_answer *a) BN_API_LOCAL;
int bn_evict_export(uint64_t first, struct bn_answer *a) BN_API_LOCAL;
int bn_evict_evict(struct bn_answer *a) BN_API_LOCAL;
/* Takes over fds[n]; those not kept are closed. */
int bn_evict_import(const struct bn_agent_segment *segs, unsigned n, const int *fds,
                    struct bn_answer *a) BN_API_LOCAL;
int bn_evict_create(const struct bn_agent_segment *segs, unsigned n, struct bn_answer *a) BN_API_LOCAL;
int bn_evict_map(const struct bn_agent_segment *segs, unsigned n, struct bn_answer *a) BN_API_LOCAL;
/* Set error and text of an answer; returns -error. */
int bn_answer_fail(struct bn_answer *a, int error, CUresult cuda, const char *fmt, ...) BN_API_LOCAL
    __attribute__((format(printf, 4, 5)));
void bn_evict_after_fork(void) BN_API_LOCAL;

/* fds.c: descriptors out of the application's way. */
/* Move fd to a high number with O_CLOEXEC; the new number, or -errno and fd is unchanged. */
int bn_fd_high(int fd) BN_API_LOCAL;
struct bn_kept;
/* Take `fd` over into `kept`, at a high number. */
int bn_kept_take(struct bn_kept *kept, int fd) BN_API_LOCAL;
/* Another file was put at its number. */
void bn_kept_moved(struct bn_kept *kept) BN_API_LOCAL;
/* Still the file that was taken over? */
bool bn_kept_valid(const struct bn_kept *kept) BN_API_LOCAL;
void bn_kept_close(struct bn_kept *kept) BN_API_LOCAL;
/* Lift the soft limit of descriptors to the hard one, and put it back. Nest not. */
void bn_fd_limit_lift(void) BN_API_LOCAL;
void bn_fd_limit_restore(void) BN_API_LOCAL;
