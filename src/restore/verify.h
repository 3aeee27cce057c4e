/* Is what was loaded into GPU memory what was saved? Asked on the GPU, after the last copy and before any gate opens, so the link
 * and the copies are covered too. */
#pragma once

#include "checkpoint/target.h"
#include "image/manifest.h"
#include "store/pack.h"

/* Hash every chunk of the part on its GPU and compare with the manifest. -EBADMSG: differs, with process, segment, chunk and file
 * if the image is damaged, with the GPU if it is not; -ENOTSUP: the GPU cannot hash, or not any more. Any thread. */
int bn_verify_part(struct bn_gpu *gpu, const struct bn_hash_key *key, const struct bn_manifest *m,
                   struct bn_pack_reader *reader, const struct bn_target_part *part, struct bn_error *err);
