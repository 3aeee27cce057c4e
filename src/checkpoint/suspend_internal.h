/* What suspend.c, tier.c and recover.c share. */
#pragma once

#include "checkpoint/copies.h"
#include "checkpoint/suspend.h"

struct bn_suspended {
    struct bn_quiesce q;
    struct bn_copies copies;
    const struct bn_tier *tier; /* where it is, or was on its way to when a daemon was killed */
    uint64_t used_ns;           /* when it was suspended, or somebody last tried to resume it */
    bool giving;                /* a resume has begun to give memory back: its sets are the processes' now */
    bool look; /* taken up from a record: what has been done to the processes is still to be found out */
};

/* recover.c: set the targets' flags to what the processes themselves say. They must be able to run. */
int bn_recover_look(struct bn_suspended *s, struct bn_error *err);
