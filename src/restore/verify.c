#include "restore/verify.h"

#include "base/cleanup.h"
#include "gpu/hash.h"

#include <stdlib.h>

/* Whose fault? What the image holds is read once more: if that is damaged too, the message is the reader's. */
static int tell(struct bn_gpu *gpu, const struct bn_manifest *m, struct bn_pack_reader *reader,
                const struct bn_target_part *part, uint32_t chunk, struct bn_error *err)
{
    bn_auto_free void *data = aligned_alloc(BN_PACK_ALIGN, BN_CHUNK_SIZE);
    int r = data ? bn_pack_reader_read(reader, chunk, data, err) : 0;
    if (r < 0)
        return r;
    struct bn_chunk_owner o;
    bool known = bn_manifest_chunk_owner(m, chunk, &o);
    return bn_error_set(
        err, EBADMSG, "verify",
        "chunk %u (process %d, segment %u at 0x%llx, byte %llu of it) is whole in the checkpoint, but not "
        "what "
        "lies on GPU %u (%s) after loading: try again, and if it happens again suspect that GPU or its "
        "link, or its hash: 'bennud --no-gpu-hash' does without",
        chunk, known ? o.process->pid : 0, known ? o.segment_index : 0,
        (unsigned long long)(known ? o.segment->va : 0), (unsigned long long)(known ? o.offset : 0),
        part->dev, bn_gpu_info(gpu, part->dev)->name);
}

int bn_verify_part(struct bn_gpu *gpu, const struct bn_hash_key *key, const struct bn_manifest *m,
                   struct bn_pack_reader *reader, const struct bn_target_part *part, struct bn_error *err)
{
    size_t n = part->bytes / BN_CHUNK_SIZE;
    bn_auto_free struct bn_hash *have = calloc(n ? n : 1, sizeof(*have));
    if (!have)
        return bn_error_set(err, ENOMEM, "verify", "out of memory");
    int r = bn_gpu_hash(gpu, part->set, key, 0, n, have, err);
    for (size_t i = 0; r == 0 && i < n; i++)
        if (!bn_hash_equal(&have[i], &m->chunks[part->image_chunk + i].hash))
            r = tell(gpu, m, reader, part, (uint32_t)(part->image_chunk + i), err);
    return r;
}
