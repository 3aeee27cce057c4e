/* Chunks in a shorter form: zstd (RFC 8878), each chunk by itself. */
#pragma once

#include "image/manifest.h"

#include <stddef.h>
#include <stdint.h>

/* What a chunk may have at most to be worth it: an eighth less. A multiple of BN_PACK_ALIGN. */
#define BN_ENCODED_MAX (BN_CHUNK_SIZE / 8 * 7)
#define BN_COMPRESS_DEFAULT 1u /* docs/image-format.md says why */
#define BN_COMPRESS_MAX 19u    /* the last level that costs no more memory than it is worth */

/* One thread at a time per object. NULL: out of memory. `level`: 1 to BN_COMPRESS_MAX, as zstd counts. */
struct bn_encoder *bn_encoder_new(unsigned level);
void bn_encoder_free(struct bn_encoder *e);

/* Compress BN_CHUNK_SIZE bytes into `out` (BN_ENCODED_MAX bytes). Returns the length, or 0: not worth it, store the bytes themselves. */
size_t bn_encode(struct bn_encoder *e, const void *chunk, void *out);

/* Give back a chunk's BN_CHUNK_SIZE bytes; `data` may be hostile. 0; -EBADMSG: not what bn_encode() makes of any chunk; -ENOMEM.
 * After an error `out` holds rubbish. Any thread. */
int bn_decode(const void *data, size_t bytes, void *out);
