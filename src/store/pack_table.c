#include "store/pack_table.h"

#include <stdlib.h>
#include <string.h>

#define RECORDS_MAX (1u << 30)

static uint32_t slot_of(const struct bn_hash *h)
{
    uint32_t v;
    memcpy(&v, h->b, sizeof(v));
    return v;
}

static void insert(struct bn_pack_table *t, uint32_t record)
{
    uint32_t mask = t->n_slots - 1, at = slot_of(&t->records[record].hash) & mask;
    while (t->slots[at])
        at = (at + 1) & mask;
    t->slots[at] = record + 1;
}

static bool grow(struct bn_pack_table *t)
{
    if (t->n < t->cap)
        return true;
    if (t->cap >= RECORDS_MAX)
        return false;
    uint32_t cap = t->cap ? t->cap * 2 : 256;
    struct bn_pack_record *records = realloc(t->records, cap * sizeof(*records));
    if (!records)
        return false;
    t->records = records;
    uint32_t *slots = calloc((size_t)cap * 2, sizeof(*slots));
    if (!slots)
        return false;
    free(t->slots);
    t->slots = slots;
    t->n_slots = cap * 2;
    t->cap = cap;
    for (uint32_t i = 0; i < t->n; i++)
        insert(t, i);
    return true;
}

struct bn_pack_record *bn_pack_table_find(const struct bn_pack_table *t, const struct bn_hash *h)
{
    uint32_t mask = t->n_slots - 1;
    for (uint32_t at = slot_of(h) & mask; t->n_slots && t->slots[at]; at = (at + 1) & mask)
        if (bn_hash_equal(&t->records[t->slots[at] - 1].hash, h))
            return &t->records[t->slots[at] - 1];
    return NULL;
}

struct bn_pack_record *bn_pack_table_add(struct bn_pack_table *t, const struct bn_hash *h)
{
    if (!grow(t))
        return NULL;
    struct bn_pack_record *r = &t->records[t->n++];
    *r = (struct bn_pack_record){.hash = *h, .source = BN_NO_SOURCE, .pack = BN_NO_PACK};
    insert(t, t->n - 1);
    return r;
}

void bn_pack_table_free(struct bn_pack_table *t)
{
    free(t->records);
    free(t->slots);
    *t = (struct bn_pack_table){0};
}
