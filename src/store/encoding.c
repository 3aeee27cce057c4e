#include "store/encoding.h"

#include <errno.h>
#include <stdlib.h>
#include <zstd.h>

struct bn_encoder {
    ZSTD_CCtx *ctx;
};

struct bn_encoder *bn_encoder_new(unsigned level)
{
    struct bn_encoder *e = calloc(1, sizeof(*e));
    if (!e)
        return NULL;
    e->ctx = ZSTD_createCCtx();
    if (!e->ctx || ZSTD_isError(ZSTD_CCtx_setParameter(e->ctx, ZSTD_c_compressionLevel, (int)level))) {
        bn_encoder_free(e);
        return NULL;
    }
    return e;
}

void bn_encoder_free(struct bn_encoder *e)
{
    if (!e)
        return;
    ZSTD_freeCCtx(e->ctx);
    free(e);
}

size_t bn_encode(struct bn_encoder *e, const void *chunk, void *out)
{
    size_t n = ZSTD_compress2(e->ctx, out, BN_ENCODED_MAX, chunk, BN_CHUNK_SIZE);
    return ZSTD_isError(n) ? 0 : n; /* the only error there can be: it does not fit */
}

int bn_decode(const void *data, size_t bytes, void *out)
{
    /* One context a thread would save a malloc of 100 KiB in a millisecond: not worth a way to free it. */
    ZSTD_DCtx *ctx = ZSTD_createDCtx();
    if (!ctx)
        return -ENOMEM;
    size_t n = ZSTD_decompressDCtx(ctx, out, BN_CHUNK_SIZE, data, bytes);
    ZSTD_freeDCtx(ctx);
    return n == BN_CHUNK_SIZE ? 0 : -EBADMSG; /* errors are numbers near SIZE_MAX */
}
