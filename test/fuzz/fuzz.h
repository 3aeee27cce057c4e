#pragma once

#include <stddef.h>
#include <stdint.h>

/* What libFuzzer, or replay.c in its place, calls. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
