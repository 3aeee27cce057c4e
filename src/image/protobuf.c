#include "image/protobuf.h"

#include <stddef.h>

enum { WIRE_VARINT = 0, WIRE_64 = 1, WIRE_BODY = 2, WIRE_32 = 5 };

bool bn_pb_next(struct bn_reader *r, struct bn_pb_field *f)
{
    uint64_t key = bn_read_varint(r);
    *f = (struct bn_pb_field){.number = key >> 3, .body = bn_reader_init("", 0)};
    switch (key & 7) {
    case WIRE_VARINT: f->value = bn_read_varint(r); break;
    case WIRE_64: f->value = bn_read_u64(r); break;
    case WIRE_32: f->value = bn_read_u32(r); break;
    case WIRE_BODY: {
        uint64_t len = bn_read_varint(r);
        const void *bytes = len <= bn_reader_left(r) ? bn_read_bytes(r, len) : NULL;
        if (!bytes)
            return false;
        f->body = bn_reader_init(bytes, len);
        f->has_body = true;
        break;
    }
    default: return false;
    }
    return !r->failed;
}
