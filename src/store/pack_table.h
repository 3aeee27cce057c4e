/* Which bytes are known, by their hash, and where they lie. One thread at a time, but for what is said. */
#pragma once

#include "image/manifest.h"

#define BN_NO_PACK UINT32_MAX
#define BN_NO_SOURCE UINT32_MAX

/* One place; equal chunks share it. */
struct bn_pack_record {
    struct bn_hash hash;
    uint32_t
        source; /* a pack of another checkpoint that has it (index of the writer's sources), or BN_NO_SOURCE */
    uint32_t
        pack; /* the pack in this folder that has it; BN_NO_PACK: not written yet, or still in the source */
    uint64_t offset;
    uint32_t length; /* bytes stored */
    uint8_t encoding;
    bool used; /* by a chunk, found out at the end */
};

struct bn_pack_table {
    struct bn_pack_record *records; /* moved when it grows; a record keeps its index */
    uint32_t n, cap;
    uint32_t *slots; /* hash -> 1 + record, open addressing; a power of two, at most half full */
    uint32_t n_slots;
};

/* The record of these bytes, or NULL. */
struct bn_pack_record *bn_pack_table_find(const struct bn_pack_table *t, const struct bn_hash *h);
/* A new one for bytes that have none; zeroed but for hash, source and pack (none). NULL: out of memory. */
struct bn_pack_record *bn_pack_table_add(struct bn_pack_table *t, const struct bn_hash *h);
void bn_pack_table_free(struct bn_pack_table *t);
