/* Stream captures: the driver refuses some calls while one is under way, and the gate cannot close then. */
#pragma once

#include "agent/api/api_table.h"

#include <stdbool.h>

/* A capture is under way as far as we know. */
bool bn_capture_any(void) BN_API_LOCAL;
/* While a capture is under way: what the driver answers to a call that allocates (or frees) memory in this thread, asked by
 * making a tiny one. CUDA_SUCCESS: such a call may go on. */
CUresult bn_capture_probe(void) BN_API_LOCAL;
/* Look again which of the known captures are still under way; returns how many. With the gate closed. */
unsigned bn_capture_recount(void) BN_API_LOCAL;
