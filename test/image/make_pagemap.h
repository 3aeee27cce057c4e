/* Pagemaps as CRIU writes them. */
#pragma once

#include "base/cursor.h"

#include <stdbool.h>

enum { PARENT = 1, LAZY = 2, PRESENT = 4, NO_FLAGS = 8 };

static inline void put_varint(struct bn_writer *w, uint64_t v)
{
    for (; v >= 0x80; v >>= 7)
        bn_write_u8(w, (uint8_t)(v | 0x80));
    bn_write_u8(w, (uint8_t)v);
}

static inline void put_field(struct bn_writer *w, unsigned number, uint64_t value)
{
    put_varint(w, number << 3);
    put_varint(w, value);
}

/* Frees the body. */
static inline void put_message(struct bn_writer *w, struct bn_writer *body)
{
    bn_write_u32(w, (uint32_t)body->len);
    bn_write_bytes(w, body->buf, body->len);
    bn_writer_free(body);
    *body = (struct bn_writer){0};
}

static inline void put_head(struct bn_writer *w, uint64_t pages_id)
{
    struct bn_writer body = {0};
    bn_write_u32(w, 0x54564319);
    bn_write_u32(w, 0x56084025);
    put_field(&body, 1, pages_id);
    put_message(w, &body);
}

/* `wide`: as CRIU from 4.2 on, where the number has a field of its own. */
static inline void put_entry(struct bn_writer *w, uint64_t va, uint64_t pages, unsigned flags, bool wide)
{
    struct bn_writer body = {0};
    put_field(&body, 1, va);
    put_field(&body, 2, wide ? 0 : pages);
    if (!(flags & NO_FLAGS))
        put_field(&body, 4, flags);
    if (wide)
        put_field(&body, 5, pages);
    put_message(w, &body);
}
