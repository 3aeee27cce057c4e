/* Byte cursors: every parser and every writer of Bennu's formats goes through these. Little endian, unaligned, bounds
 * checked. A cursor that ran over its end stays failed: callers may read a whole record and look once at `failed`. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bn_reader {
    const uint8_t *p, *end;
    bool failed;
};

struct bn_writer {
    uint8_t *buf; /* owned; grown with realloc */
    size_t len, cap;
    bool failed; /* out of memory */
};

static inline struct bn_reader bn_reader_init(const void *data, size_t len)
{
    const uint8_t *p = data;
    return (struct bn_reader){p, p + len, false};
}
static inline size_t bn_reader_left(const struct bn_reader *r)
{
    return r->failed ? 0 : (size_t)(r->end - r->p);
}
uint8_t bn_read_u8(struct bn_reader *r);
uint16_t bn_read_u16(struct bn_reader *r);
uint32_t bn_read_u32(struct bn_reader *r);
uint64_t bn_read_u64(struct bn_reader *r);
/* Variable length, as protobuf has it; failed when it does not end within 10 bytes. */
uint64_t bn_read_varint(struct bn_reader *r);
/* `len` bytes; NULL and failed when fewer are left. Points into the reader's buffer. */
const void *bn_read_bytes(struct bn_reader *r, size_t len);
/* u16 length + bytes, copied with a closing NUL; failed when longer than cap - 1 or when it holds a NUL. */
void bn_read_string(struct bn_reader *r, char *out, size_t cap);

void bn_write_u8(struct bn_writer *w, uint8_t v);
void bn_write_u16(struct bn_writer *w, uint16_t v);
void bn_write_u32(struct bn_writer *w, uint32_t v);
void bn_write_u64(struct bn_writer *w, uint64_t v);
void bn_write_bytes(struct bn_writer *w, const void *data, size_t len);
void bn_write_string(struct bn_writer *w, const char *s);
void bn_writer_free(struct bn_writer *w);
#define bn_auto_writer __attribute__((cleanup(bn_writer_free))) struct bn_writer
