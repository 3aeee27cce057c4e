#include "base/cursor.h"

#include <stdlib.h>
#include <string.h>

const void *bn_read_bytes(struct bn_reader *r, size_t len)
{
    if (r->failed || (size_t)(r->end - r->p) < len) {
        r->failed = true;
        return NULL;
    }
    const void *at = r->p;
    r->p += len;
    return at;
}

static uint64_t read_le(struct bn_reader *r, unsigned n)
{
    const uint8_t *b = bn_read_bytes(r, n);
    uint64_t v = 0;
    for (unsigned i = 0; b && i < n; i++)
        v |= (uint64_t)b[i] << (8 * i);
    return v;
}

uint8_t bn_read_u8(struct bn_reader *r)
{
    return (uint8_t)read_le(r, 1);
}
uint16_t bn_read_u16(struct bn_reader *r)
{
    return (uint16_t)read_le(r, 2);
}
uint32_t bn_read_u32(struct bn_reader *r)
{
    return (uint32_t)read_le(r, 4);
}
uint64_t bn_read_u64(struct bn_reader *r)
{
    return read_le(r, 8);
}

uint64_t bn_read_varint(struct bn_reader *r)
{
    uint64_t v = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
        uint8_t byte = bn_read_u8(r);
        v |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80))
            return v;
    }
    r->failed = true;
    return 0;
}

void bn_read_string(struct bn_reader *r, char *out, size_t cap)
{
    out[0] = 0;
    size_t len = bn_read_u16(r);
    const char *s = bn_read_bytes(r, len);
    if (!s || len >= cap || memchr(s, 0, len)) {
        r->failed = true;
        return;
    }
    memcpy(out, s, len);
    out[len] = 0;
}

void bn_write_bytes(struct bn_writer *w, const void *data, size_t len)
{
    if (w->failed || len == 0)
        return;
    if (w->cap - w->len < len) {
        size_t cap = w->cap ? w->cap : 256;
        while (cap - w->len < len) {
            if (cap > SIZE_MAX / 2) {
                w->failed = true;
                return;
            }
            cap *= 2;
        }
        uint8_t *buf = realloc(w->buf, cap);
        if (!buf) {
            w->failed = true;
            return;
        }
        w->buf = buf;
        w->cap = cap;
    }
    memcpy(w->buf + w->len, data, len);
    w->len += len;
}

static void write_le(struct bn_writer *w, uint64_t v, unsigned n)
{
    uint8_t b[8];
    for (unsigned i = 0; i < n; i++)
        b[i] = (uint8_t)(v >> (8 * i));
    bn_write_bytes(w, b, n);
}

void bn_write_u8(struct bn_writer *w, uint8_t v)
{
    write_le(w, v, 1);
}
void bn_write_u16(struct bn_writer *w, uint16_t v)
{
    write_le(w, v, 2);
}
void bn_write_u32(struct bn_writer *w, uint32_t v)
{
    write_le(w, v, 4);
}
void bn_write_u64(struct bn_writer *w, uint64_t v)
{
    write_le(w, v, 8);
}

void bn_write_string(struct bn_writer *w, const char *s)
{
    size_t len = strlen(s);
    if (len > UINT16_MAX)
        len = UINT16_MAX;
    bn_write_u16(w, (uint16_t)len);
    bn_write_bytes(w, s, len);
}

void bn_writer_free(struct bn_writer *w)
{
    free(w->buf);
    *w = (struct bn_writer){0};
}
