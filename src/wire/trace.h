/* What a session did when: BN_CTL_EV_TRACE, which comes before the reply that ends it, also after a failure. Any thread. */
#pragma once

#include "wire/control.h"

#define BN_TRACE_PARTS_MAX 128u

/* A piece of work beside the phases: a copy of one process's memory on one GPU, or what CRIU did meanwhile. */
struct bn_trace_part {
    char name[32]; /* of the phase that it is a part of, or "criu" */
    uint32_t pid;  /* 0: of no single process */
    uint32_t gpu;
    uint64_t start_ns; /* since the session began */
    uint64_t duration_ns;
    uint64_t bytes;
};

struct bn_trace {
    uint64_t began_ns; /* the session's beginning, CLOCK_MONOTONIC of this machine */
    struct bn_phases phases;
    uint32_t n;
    struct bn_trace_part parts[BN_TRACE_PARTS_MAX];
};

void bn_write_trace(struct bn_writer *w, const struct bn_trace *t);
/* Sets r->failed when it makes no sense. */
void bn_read_trace(struct bn_reader *r, struct bn_trace *t);
