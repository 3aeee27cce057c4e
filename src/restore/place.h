/* Which GPU of this machine takes the place of which GPU of an image. */
#pragma once

#include "base/error.h"
#include "gpu/gpu.h"
#include "image/manifest.h"

struct bn_place {
    unsigned dev[BN_MANIFEST_GPUS_MAX]; /* image GPU -> ours */
    struct bn_ckpt_pairs pairs;         /* for the driver's restore; none: every GPU is the very same one */
};

/* The same GPU if it is here, else one of the same chip that nothing else of the image took. -ENODEV and a text that names both
 * where there is none. */
int bn_place_gpus(struct bn_gpu *gpu, const struct bn_manifest *m, struct bn_place *out,
                  struct bn_error *err);
