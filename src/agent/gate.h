/* The gate in front of the driver.
 *
 * Open, it costs two plain stores to memory of the calling thread's own and a load. Each thread has a node; `in` counts its
 * calls under way (nested ones included: a wrapper that calls another). Whoever closes sets the word, makes every thread pass a
 * barrier with membarrier(2), and then sees each thread either inside (its node says so) or sure to see the closed word.
 * Where membarrier is refused (seccomp), threads fence for themselves from the start.
 *
 * State is plain memory and a futex that is always waited for in a loop: it survives a dump and restore of the process.
 */
#pragma once

#include "agent/sync.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define BN_GATE_CLOSED 1u
#define BN_GATE_FENCED 2u /* no membarrier here: every thread takes the slow path, which has a fence */

struct bn_gate_node {
    uint32_t in;     /* calls under way; written by its thread alone */
    uint32_t owned;  /* a thread has it */
    uint32_t exempt; /* the agent's own thread: never waits, is never waited for */
    int32_t tid;
    struct bn_gate_node *next;
} __attribute__((aligned(64)));

#define BN_GATE_LOCAL __attribute__((visibility("hidden")))

extern uint32_t bn_gate_word BN_GATE_LOCAL;
extern __thread struct bn_gate_node *bn_gate_self BN_GATE_LOCAL __attribute__((tls_model("initial-exec")));

struct bn_gate_node *bn_gate_register(void) BN_GATE_LOCAL;
void bn_gate_enter_slow(struct bn_gate_node *n) BN_GATE_LOCAL;

/* Around each call into the driver; they nest. */
static inline __attribute__((always_inline)) void bn_gate_enter(void)
{
    struct bn_gate_node *n = bn_gate_self;
    if (bn_unlikely(!n))
        n = bn_gate_register();
    uint32_t depth = bn_load(&n->in);
    bn_store(&n->in, depth + 1);
    __atomic_signal_fence(__ATOMIC_SEQ_CST); /* the other half is the closer's membarrier */
    if (bn_unlikely(__atomic_load_n(&bn_gate_word, __ATOMIC_ACQUIRE)) && depth == 0)
        bn_gate_enter_slow(n);
}

static inline __attribute__((always_inline)) void bn_gate_leave(void)
{
    struct bn_gate_node *n = bn_gate_self;
    bn_store_rel(&n->in, bn_load(&n->in) - 1);
}

static inline void bn_gate_leave_cleanup(int *unused)
{
    bn_gate_leave();
}
/* Hold the gate until the scope ends. */
#define BN_GATED()   \
    bn_gate_enter(); \
    __attribute__((cleanup(bn_gate_leave_cleanup), unused)) int bn_gated_ = 0

/* Decide between membarrier and fences; before the first bn_gate_close, once. */
void bn_gate_init(void) BN_GATE_LOCAL;
/* The calling thread is the agent's own. */
void bn_gate_exempt_self(void) BN_GATE_LOCAL;
/* Close and wait until no thread is inside or the monotonic clock shows deadline_ns. 0; -EBUSY: the gate is open again and
 * *holder is the id of a thread that was inside; -ENOMEM: a thread could not get a node, the gate cannot close. One closer at
 * a time. */
int bn_gate_close(uint64_t deadline_ns, pid_t *holder) BN_GATE_LOCAL;
void bn_gate_open(void) BN_GATE_LOCAL;
/* In a forked child: open, and the calling thread is the only one. */
void bn_gate_after_fork(void) BN_GATE_LOCAL;
