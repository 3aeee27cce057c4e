/* The manifest's decoder: never crashes, never reads beyond, and what it takes can be written and read again. */
#include "fuzz.h"

#include "base/cleanup.h"
#include "image/manifest.h"

#include <stdlib.h>
#include <string.h>

static void one(const uint8_t *data, size_t size)
{
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_manifest struct bn_manifest *m = NULL;
    int r = bn_manifest_decode(data, size, &m, &err);
    if (r < 0) {
        if (m || err.code != -r || !err.text[0])
            abort();
        return;
    }
    bn_auto_free void *bytes = NULL;
    bn_auto_manifest struct bn_manifest *again = NULL;
    size_t len;
    if (bn_manifest_encode(m, &bytes, &len, NULL) < 0 || bn_manifest_decode(bytes, len, &again, NULL) < 0)
        abort();
    for (uint32_t i = 0; i < m->n_chunks; i++) {
        struct bn_chunk_owner o;
        if (!bn_manifest_chunk_owner(m, i, &o) || o.offset >= o.segment->size)
            abort();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    one(data, size);
    /* No mutation hits the checksum: put the right length and checksum on it. */
    bn_auto_free uint8_t *copy = malloc(size ? size : 1);
    if (!copy || size < 72)
        return 0;
    memcpy(copy, data, size);
    for (unsigned i = 0; i < 8; i++)
        copy[32 + i] = (uint8_t)((uint64_t)size >> (8 * i));
    if (bn_manifest_seal(copy, size) == 0)
        one(copy, size);
    return 0;
}
