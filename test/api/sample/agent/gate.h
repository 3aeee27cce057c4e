/* SPDX-License-Identifier: MIT */
#ifndef SAMPLE_AGENT_GATE_H
#define SAMPLE_AGENT_GATE_H

/* Stands in for the agent's gate: counts who went through. */

extern int sample_entered;
extern int sample_left;

static inline void bn_gate_enter(void)
{
    sample_entered++;
}

static inline void bn_gate_leave(void)
{
    sample_left++;
}

#endif
