/* Zero pages of the driver's saved state. Agent's thread alone. */
#pragma once

#include "agent/api/api_table.h"

#include <stdint.h>

/* Remember what memory there is now: before the driver's checkpoint. */
void bn_purge_note(void) BN_API_LOCAL;
/* Give back the zero pages of what came since; bytes. Every other thread of the process must be stopped. */
uint64_t bn_purge(void) BN_API_LOCAL;
