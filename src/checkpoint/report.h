/* What a session tells about itself while it runs: its phases with their times, how far the current one is, and its end.
 * Written by the session's threads, read by any number of watchers. Counted references; every function from any thread.
 */
#pragma once

#include "base/error.h"
#include "wire/trace.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct bn_report;

/* One reference for the caller. NULL: out of memory. */
struct bn_report *bn_report_new(void);
struct bn_report *bn_report_ref(struct bn_report *r);
void bn_report_unref(struct bn_report *r);

/* Phases may overlap. Returns a number for bn_report_end (-1 when the list is full: then nothing is kept of it). */
int bn_report_begin(struct bn_report *r, const char *name);
void bn_report_end(struct bn_report *r, int phase, uint64_t bytes);
/* For work that went on in the background and ended at `end_ns` (bn_now_ns). */
void bn_report_end_at(struct bn_report *r, int phase, uint64_t end_ns, uint64_t bytes);

/* A phase from the beginning of `first`, if there was that, to the end of `last`, if there was that, or to `end_ns` (bn_now_ns). */
void bn_report_span(struct bn_report *r, const char *first, const char *last, const char *name);
void bn_report_span_to(struct bn_report *r, const char *first, uint64_t end_ns, const char *name);

void bn_report_progress(struct bn_report *r, const char *phase, uint64_t done, uint64_t total);

/* The session has ended; err (may be NULL) says how. Only the first call counts. */
void bn_report_finish(struct bn_report *r, const struct bn_error *err);

void bn_report_phases(struct bn_report *r, struct bn_phases *out);

/* Work beside the phases, from `start_ns` to `end_ns` (bn_now_ns). Nothing is kept of it when the list is full. */
void bn_report_part(struct bn_report *r, const char *name, pid_t pid, unsigned gpu, uint64_t start_ns,
                    uint64_t end_ns, uint64_t bytes);
/* From the reply that lets CRIU work on to the next request of its plugin: what CRIU does by itself. */
void bn_report_criu(struct bn_report *r, bool works);

/* Phases and parts. What has not ended lasts until now. */
void bn_report_trace(struct bn_report *r, struct bn_trace *out);

/* Make those in bn_report_wait return now. */
void bn_report_wake(struct bn_report *r);

/* Wait up to timeout_ms for the end; true when it has come, and then *err is its outcome. *progress is how far it is now. */
bool bn_report_wait(struct bn_report *r, unsigned timeout_ms, struct bn_progress *progress,
                    struct bn_error *err);
