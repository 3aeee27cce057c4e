/* From the targets of a dump to the manifest of its image. */
#pragma once

#include "checkpoint/quiesce.h"
#include "image/manifest.h"

/* Everything but chunks, packs and phases; sets image_chunk of every part. Caller frees the manifest, which is made even of no
 * segments at all (driver path). */
int bn_describe(struct bn_quiesce *q, struct bn_manifest **out, struct bn_error *err);
