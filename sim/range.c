/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "sim.h"

/* Index of the first range that ends after addr. */
static size_t lower(const struct range_set *set, uint64_t addr)
{
    size_t low = 0, high = set->count;

    while (low < high) {
        size_t mid = low + (high - low) / 2;

        if (set->items[mid]->start + set->items[mid]->size > addr)
            high = mid;
        else
            low = mid + 1;
    }
    return low;
}

struct range *range_next(const struct range_set *set, uint64_t addr)
{
    size_t i = lower(set, addr);

    return i < set->count ? set->items[i] : NULL;
}

struct range *range_find(const struct range_set *set, uint64_t addr)
{
    struct range *r = range_next(set, addr);

    return r && r->start <= addr ? r : NULL;
}

bool range_overlaps(const struct range_set *set, uint64_t start, uint64_t size)
{
    struct range *r = range_next(set, start);

    return r && r->start < start + size;
}

int range_insert(struct range_set *set, struct range *item)
{
    if (range_overlaps(set, item->start, item->size))
        return -EEXIST;
    if (set->count == set->room) {
        size_t room = set->room ? set->room * 2 : 64;
        struct range **items = realloc(set->items, room * sizeof(*items));

        if (!items)
            return -ENOMEM;
        set->items = items;
        set->room = room;
    }

    size_t i = lower(set, item->start);

    memmove(set->items + i + 1, set->items + i, (set->count - i) * sizeof(*set->items));
    set->items[i] = item;
    set->count++;
    return 0;
}

void range_remove(struct range_set *set, struct range *item)
{
    size_t i = lower(set, item->start);

    if (i >= set->count || set->items[i] != item)
        return;
    memmove(set->items + i, set->items + i + 1, (set->count - i - 1) * sizeof(*set->items));
    set->count--;
}
