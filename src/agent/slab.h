/* Slabs: segments that several small allocations of one context share, so that thousands of them travel as a few hundred. Here
 * is which room is whose, and nothing else: no driver, no addresses, no memory of its own. Amounts and places are in units, which
 * are as large as the smallest segment (2 MiB, or what the device wants). Not locked: whoever owns the tables locks.
 *
 * No step depends on how many allocations or slabs there are. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#define BN_SLAB_UNITS 32u /* the most that a slab has */
#define BN_SLAB_SHARE 4u  /* an allocation of more than a 4th of the largest slab gets a segment of its own */
#define BN_SLAB_SPARING 8u /* no slab is made with room that would make more than an 8th of what is used */

struct bn_slabs;
/* Zeroed: not a slab. */
struct bn_slab {
    uint32_t taken; /* bit i: unit i */
    uint8_t units;
    uint8_t bin;
    struct bn_slabs *owner; /* NULL: its context is gone, nothing more is put into it */
    struct bn_slab *next, **link;
};

/* The slabs of a context, apart by their longest run of free units. Zeroed at start. */
struct bn_slabs {
    uint64_t used, room; /* units of allocations; free ones */
    uint64_t filled;     /* bit i: bins[i] has some */
    struct bn_slab *bins[BN_SLAB_UNITS + 1];
};

/* `units` in a row out of the room there is, where they fit best; which in *at. NULL: a new slab is needed. */
struct bn_slab *bn_slab_take(struct bn_slabs *s, unsigned units, unsigned *at);
/* How large a new slab should be that is needed for `units`: a multiple of them, and at most `most` unless they are more. */
unsigned bn_slab_wish(const struct bn_slabs *s, unsigned units, unsigned most);
/* Smaller than `wish`, when there is no memory for that: again a multiple of `units`; 0: there is nothing smaller. */
unsigned bn_slab_wish_less(unsigned wish, unsigned units);
/* A new slab of `size` units; the first `units` are taken. */
void bn_slab_add(struct bn_slabs *s, struct bn_slab *slab, unsigned size, unsigned units);
/* Free what was taken. True: the slab is empty, and belongs to nobody any more. */
bool bn_slab_put(struct bn_slab *slab, unsigned at, unsigned units);
/* Let go of all slabs: their context is gone. What is in them may still be put. */
void bn_slab_orphan(struct bn_slabs *s);
