/* Where the memory of a suspended tree can be. One table (tier.c): all that differs between the tiers is in it. Bytes are told apart
 * part by part, since a daemon that was killed in the middle of a move leaves a tree in two tiers.
 */
#pragma once

#include "checkpoint/copies.h"
#include "wire/control.h"

struct bn_suspended;

struct bn_tier {
    uint32_t id; /* BN_TIER_…; bn_tier_names has its name */

    /* The bytes of this part are here and are what counts: asked in the table's order. */
    bool (*has)(const struct bn_target_part *part);
    void (*drop)(struct bn_target_part *part);
    /* Begin bringing every part's bytes here, from its set or from the tier above. */
    int (*save)(struct bn_suspended *s, struct bn_error *err);
    /* Wait until they are here. *cancel (may be NULL) set by another thread ends it. NULL: they are. */
    int (*saved)(struct bn_suspended *s, const bool *cancel, struct bn_error *err);
    /* Make the job that fills the part's set; NULL: the set has been here all the time. */
    bn_copies_make_fn load;
};

/* NULL: no such tier. */
const struct bn_tier *bn_tier_find(uint32_t id);
/* The one that has the part's bytes. NULL: none, they are the process's own. */
const struct bn_tier *bn_tier_of(const struct bn_target_part *part);
/* For bn_copies_start: from wherever the part's bytes are to its set. */
int bn_tier_load(struct bn_quiesce *q, struct bn_target *t, struct bn_target_part *part, void *arg,
                 struct bn_copy **job, struct bn_error *err);

/* After tier->saved: the bytes are here alone. */
void bn_tier_keep(struct bn_suspended *s, const struct bn_tier *tier);
/* After a failure: free what is here and elsewhere, too. */
void bn_tier_undo(struct bn_suspended *s, const struct bn_tier *tier);
