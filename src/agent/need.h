/* GPU memory that the daemon could let go of: an allocation that failed waits for it (struct bn_agent_need). */
#pragma once

#include "agent/api/api_table.h"
#include "agent/sync.h"

#include <stdbool.h>
#include <stddef.h>

/* One call of the application's that allocates; begins as zeros. */
struct bn_need {
    uint64_t waited_ns;
    uint64_t still_ns; /* since `hot` changed last */
    uint32_t hot;
};

/* True: memory may have come free, try once more. Called inside the gate, without a lock; leaves the gate meanwhile, so that
 * everything may have been taken away and given back. dev: -1 for the current context's. */
bool bn_need_wait(struct bn_need *need, CUdevice dev, size_t bytes) BN_API_LOCAL;
void bn_need_after_fork(void) BN_API_LOCAL;

static inline bool bn_need_again(struct bn_need *need, CUresult r, CUdevice dev, size_t bytes)
{
    return bn_unlikely(r == CUDA_ERROR_OUT_OF_MEMORY) && bn_need_wait(need, dev, bytes);
}
