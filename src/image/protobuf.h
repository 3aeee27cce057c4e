/* Fields of protobuf messages, which CRIU's images consist of. Source: the encoding as protobuf.dev describes it. Pure bytes, any thread. */
#pragma once

#include "base/cursor.h"

#include <stdbool.h>
#include <stdint.h>

/* What each of CRIU's images begins with; a number of its kind follows (CRIU's magic.h). */
#define BN_CRIU_IMAGE_MAGIC 0x54564319u

struct bn_pb_field {
    uint64_t number;
    uint64_t value;        /* of a number, of whichever wire type */
    bool has_body;         /* a message, a string or packed numbers: */
    struct bn_reader body; /* its bytes; of a number none. Points into the reader's buffer */
};

/* The next field of a message that has not come to its end. False: it is damaged. */
bool bn_pb_next(struct bn_reader *r, struct bn_pb_field *f);
