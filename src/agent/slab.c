#include "agent/slab.h"

#include <stddef.h>

static uint32_t bits(unsigned at, unsigned units)
{
    return (uint32_t)(((1ULL << units) - 1) << at);
}

static uint32_t free_units(const struct bn_slab *slab)
{
    return ~slab->taken & bits(0, slab->units);
}

/* The longest run of ones. */
static unsigned longest(uint32_t x)
{
    unsigned n = 0;
    for (; x; n++)
        x &= x << 1;
    return n;
}

/* ---- bins ------------------------------------------------------------------------------------------ */

static void into_bin(struct bn_slabs *s, struct bn_slab *slab)
{
    unsigned bin = longest(free_units(slab));
    slab->bin = (uint8_t)bin;
    slab->owner = s;
    slab->next = s->bins[bin];
    slab->link = &s->bins[bin];
    if (slab->next)
        slab->next->link = &slab->next;
    s->bins[bin] = slab;
    s->filled |= 1ULL << bin;
}

static void out_of_bin(struct bn_slabs *s, struct bn_slab *slab)
{
    *slab->link = slab->next;
    if (slab->next)
        slab->next->link = slab->link;
    if (!s->bins[slab->bin])
        s->filled &= ~(1ULL << slab->bin);
}

/* ---- room ------------------------------------------------------------------------------------------ */

/* The shortest run of ones that has `units`; there is one. */
static unsigned best_fit(uint32_t room, unsigned units)
{
    unsigned best = 0, best_length = BN_SLAB_UNITS + 1;
    for (unsigned at = 0; at < BN_SLAB_UNITS && room >> at;) {
        at += (unsigned)__builtin_ctz(room >> at);
        uint64_t rest = ~((uint64_t)room >> at); /* a zero follows in any case */
        unsigned length = (unsigned)__builtin_ctzll(rest);
        if (length >= units && length < best_length) {
            best = at;
            best_length = length;
        }
        at += length;
    }
    return best;
}

struct bn_slab *bn_slab_take(struct bn_slabs *s, unsigned units, unsigned *at)
{
    uint64_t fitting = units <= BN_SLAB_UNITS ? s->filled >> units << units : 0;
    if (!fitting)
        return NULL;
    struct bn_slab *slab = s->bins[__builtin_ctzll(fitting)];
    *at = best_fit(free_units(slab), units);
    out_of_bin(s, slab);
    slab->taken |= bits(*at, units);
    into_bin(s, slab);
    s->room -= units;
    s->used += units;
    return slab;
}

unsigned bn_slab_wish(const struct bn_slabs *s, unsigned units, unsigned most)
{
    uint64_t spare = (s->used + units) / BN_SLAB_SPARING;
    uint64_t size = units + (spare > s->room ? spare - s->room : 0);
    if (most > BN_SLAB_UNITS)
        most = BN_SLAB_UNITS;
    if (size > most)
        size = most;
    return size < units ? units : (unsigned)(size / units * units);
}

unsigned bn_slab_wish_less(unsigned wish, unsigned units)
{
    if (wish <= units)
        return 0;
    unsigned half = wish / 2 / units * units;
    return half ? half : units;
}

void bn_slab_add(struct bn_slabs *s, struct bn_slab *slab, unsigned size, unsigned units)
{
    *slab = (struct bn_slab){.taken = bits(0, units), .units = (uint8_t)size};
    into_bin(s, slab);
    s->used += units;
    s->room += size - units;
}

bool bn_slab_put(struct bn_slab *slab, unsigned at, unsigned units)
{
    struct bn_slabs *s = slab->owner;
    slab->taken &= ~bits(at, units);
    if (s) {
        out_of_bin(s, slab);
        s->used -= units;
        s->room += units;
        if (slab->taken)
            into_bin(s, slab);
        else
            s->room -= slab->units;
    }
    if (slab->taken)
        return false;
    slab->owner = NULL;
    return true;
}

void bn_slab_orphan(struct bn_slabs *s)
{
    for (unsigned i = 0; i <= BN_SLAB_UNITS; i++)
        for (struct bn_slab *slab = s->bins[i], *next; slab; slab = next) {
            next = slab->next;
            slab->owner = NULL;
        }
    *s = (struct bn_slabs){0};
}
