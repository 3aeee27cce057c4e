/* CRIU's list of pages: never crashes, never reads beyond, and what it takes lies where it can lie. */
#include "fuzz.h"

#include "image/pagemap.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_pagemap m = {0};
    int r = bn_pagemap_decode(data, size, &m, &err);
    if (r < 0) {
        if (m.ranges || err.code != -r || !err.text[0])
            abort();
        return 0;
    }
    uint64_t va = 0, offset = 0, bytes = 0;
    for (uint32_t i = 0; i < m.n; i++) {
        const struct bn_page_range *p = &m.ranges[i];
        if (p->va < va || p->offset < offset || p->bytes == 0 || (p->va | p->offset | p->bytes) % BN_PAGE)
            abort();
        va = p->va + p->bytes;
        offset = p->offset + p->bytes;
        bytes += p->bytes;
        if (va < p->va || offset > m.pages_bytes)
            abort();
    }
    if (bytes != m.bytes)
        abort();
    bn_pagemap_free(&m);
    return 0;
}
