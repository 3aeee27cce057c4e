/* Run one function on many items at once, a thread each (at most 16 at a time), and wait for all. */
#pragma once

#include "base/error.h"

#include <stddef.h>

typedef int (*bn_parallel_fn)(void *ctx, size_t i, struct bn_error *err);

/* The first failure (by index) is returned with its error; the others run to their ends all the same. Has none of its own: where no
 * thread can be made the caller's does the work. Any thread. */
int bn_parallel(size_t n, bn_parallel_fn fn, void *ctx, struct bn_error *err);

/* Processors, but no more than `most`: for how many threads there is work that keeps a processor busy. At least 1. Any thread. */
unsigned bn_cores(unsigned most);
