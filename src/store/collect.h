/* Collecting garbage in a store (catalog.h says what one is).
 *
 * Killed at any moment, it leaves every checkpoint whole: a manifest is replaced at one moment, by one whose packs lie
 * beside it already, and what the old one alone needed is removed afterwards.
 */
#pragma once

#include "base/error.h"

#include <stdint.h>

struct bn_collected {
    uint32_t folders;   /* incomplete checkpoints that were removed */
    uint32_t leftovers; /* packs that no manifest named, removed */
    uint32_t rewritten; /* packs of which little was used, written anew without the rest */
    uint64_t bytes;     /* freed by all of it */
    uint32_t skipped;   /* what could have been collected, but is in use, damaged, or not ours alone */
};

/* Told of each thing that is skipped, with the reason. */
typedef void (*bn_collect_fn)(void *arg, const struct bn_error *why);

/* Remove what a crash left, and rewrite packs of which less than half is used by any checkpoint in the store. -EBUSY: another
 * collection is under way; others as open(2). A checkpoint whose packs cannot be rewritten (-ENOSPC, -EIO) stays whole and keeps
 * nobody else from being collected: the first such is the error that is returned, when all is done. *out is set unless the
 * store could not be read. */
int bn_collect(int dirfd, bn_collect_fn skipped, void *arg, struct bn_collected *out, struct bn_error *err);
