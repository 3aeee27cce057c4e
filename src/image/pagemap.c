#include "image/pagemap.h"

#include "image/protobuf.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

/* CRIU's magic.h */
#define PAGEMAP_MAGIC 0x56084025u
#define VA_END (UINT64_C(1) << 56) /* what five levels of page tables reach */

enum { FLAG_PARENT = 1, FLAG_LAZY = 2, FLAG_PRESENT = 4 };
enum { FIELD_VADDR = 1, FIELD_PAGES = 2, FIELD_IN_PARENT = 3, FIELD_FLAGS = 4, FIELD_PAGES_64 = 5, FIELDS };

/* A message of numbers alone: fields[] in the order of their numbers, bit i of *seen for each that was there. */
static bool read_message(struct bn_reader *r, uint64_t fields[FIELDS], unsigned *seen)
{
    uint32_t len = bn_read_u32(r);
    const void *bytes = bn_read_bytes(r, len);
    if (!bytes)
        return false;
    struct bn_reader body = bn_reader_init(bytes, len);
    *seen = 0;
    while (bn_reader_left(&body) > 0) {
        struct bn_pb_field f;
        if (!bn_pb_next(&body, &f) || f.has_body)
            return false;
        if (f.number < FIELDS) {
            fields[f.number] = f.value;
            *seen |= 1u << f.number;
        }
    }
    return true;
}

/* Goes on where the last one ends, in memory and in the file: one with it. */
static int add_range(struct bn_pagemap *m, uint32_t *cap, struct bn_page_range range)
{
    struct bn_page_range *last = m->n ? &m->ranges[m->n - 1] : NULL;
    m->bytes += range.bytes;
    if (last && last->va + last->bytes == range.va && last->offset + last->bytes == range.offset) {
        last->bytes += range.bytes;
        return 0;
    }
    if (m->n == *cap) {
        uint32_t more = *cap ? 2 * *cap : 256;
        struct bn_page_range *grown = reallocarray(m->ranges, more, sizeof(*grown));
        if (!grown)
            return -ENOMEM;
        m->ranges = grown;
        *cap = more;
    }
    m->ranges[m->n++] = range;
    return 0;
}

static int read_entries(struct bn_reader *r, struct bn_pagemap *m)
{
    uint64_t end = 0; /* of the entry before */
    uint32_t cap = 0;
    while (bn_reader_left(r) > 0) {
        uint64_t f[FIELDS] = {0};
        unsigned seen;
        if (!read_message(r, f, &seen) || !(seen & 1u << FIELD_VADDR))
            return -EBADMSG;
        uint64_t pages = seen & 1u << FIELD_PAGES_64 ? f[FIELD_PAGES_64] : f[FIELD_PAGES];
        uint64_t flags = seen & 1u << FIELD_FLAGS ? f[FIELD_FLAGS]
                         : f[FIELD_IN_PARENT]     ? FLAG_PARENT
                                                  : FLAG_PRESENT;
        uint64_t va = f[FIELD_VADDR];
        if (va % BN_PAGE || va < end || va > VA_END || pages == 0 || pages > (VA_END - va) / BN_PAGE)
            return -EBADMSG;
        struct bn_page_range range = {.va = va, .bytes = pages * BN_PAGE, .offset = m->pages_bytes};
        end = va + range.bytes;
        if (!(flags & FLAG_PRESENT))
            continue;
        m->pages_bytes += range.bytes; /* less than VA_END in all, as entries do not overlap */
        int rc = flags & FLAG_LAZY ? add_range(m, &cap, range) : 0;
        if (rc < 0)
            return rc;
    }
    return r->failed ? -EBADMSG : 0;
}

int bn_pagemap_decode(const void *data, size_t len, struct bn_pagemap *out, struct bn_error *err)
{
    struct bn_reader r = bn_reader_init(data, len);
    struct bn_pagemap m = {0};
    uint64_t head[FIELDS] = {0};
    unsigned seen = 0;
    int rc = -EBADMSG;
    if (bn_read_u32(&r) == BN_CRIU_IMAGE_MAGIC && bn_read_u32(&r) == PAGEMAP_MAGIC &&
        read_message(&r, head, &seen) && seen & 1u << FIELD_VADDR && head[1] <= UINT32_MAX) {
        m.pages_id = (uint32_t)head[1];
        rc = read_entries(&r, &m);
    }
    if (rc == 0) {
        *out = m;
        return 0;
    }
    bn_pagemap_free(&m);
    return bn_error_set(err, rc, "host-memory", "CRIU's list of pages %s",
                        rc == -ENOMEM ? "does not fit into memory" : "is damaged");
}

void bn_pagemap_free(struct bn_pagemap *m)
{
    free(m->ranges);
    *m = (struct bn_pagemap){0};
}
