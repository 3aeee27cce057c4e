/* CRIU's account of a process's memory (pagemap-PID.img): which pages lie where in its pages-ID.img. Source: CRIU's
 * images/pagemap.proto and criu/pagemap.c, 4.0 to 4.2. Only what Bennu fills in itself at a restore is kept of it: pages that
 * CRIU calls lazy (private, anonymous, not locked, no stack) and that are in the file. Pure bytes, any thread.
 */
#pragma once

#include "base/error.h"

#include <stddef.h>
#include <stdint.h>

#define BN_PAGE 4096u /* bytes; CRIU's images of x86-64 know no other */

/* All in bytes, all multiples of BN_PAGE. */
struct bn_page_range {
    uint64_t va, bytes;
    uint64_t offset; /* in the pages image */
};

struct bn_pagemap {
    uint32_t pages_id; /* of the pages image */
    uint32_t n;
    struct bn_page_range *ranges; /* ascending, disjoint */
    uint64_t bytes;               /* of all of them */
    uint64_t pages_bytes;         /* that the pages image has at least */
};

/* `data`: the whole file. On success *out is the caller's: bn_pagemap_free. -EBADMSG: damaged, or of a CRIU that writes it otherwise;
 * -ENOMEM. *err is filled. */
int bn_pagemap_decode(const void *data, size_t len, struct bn_pagemap *out, struct bn_error *err);
void bn_pagemap_free(struct bn_pagemap *m);
