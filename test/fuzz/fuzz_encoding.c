/* The decoder of compressed chunks: whatever the bytes are, it writes a chunk or says that they are none. */
#include "fuzz.h"

#include "base/cleanup.h"
#include "store/encoding.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define GUARD 64u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    bn_auto_free uint8_t *out = malloc(BN_CHUNK_SIZE + GUARD);
    if (!out)
        return 0;
    memset(out + BN_CHUNK_SIZE, 0x5a, GUARD);
    int r = bn_decode(data, size, out);
    if (r != 0 && r != -EBADMSG && r != -ENOMEM)
        abort();
    for (unsigned i = 0; i < GUARD; i++)
        if (out[BN_CHUNK_SIZE + i] != 0x5a)
            abort();
    return 0;
}
