/* Reading every chunk of checkpoints and comparing it with its hash. */
#pragma once

#include "base/error.h"
#include "image/manifest.h"

#include <stdint.h>

struct bn_verify;

/* What is compared once is not read again for another checkpoint that shares it. NULL: out of memory. */
struct bn_verify *bn_verify_new(void);
void bn_verify_free(struct bn_verify *v);

struct bn_verify_result {
    uint64_t chunks;  /* of the image, that are stored */
    uint64_t bytes;   /* read */
    uint64_t damaged; /* chunks */
};

/* Called for each damaged chunk, by one thread at a time. */
typedef void (*bn_verify_fn)(void *arg, const struct bn_error *what);

/* One image, with a thread a CPU. 0 also if chunks are damaged: see the result. Errors as bn_pack_reader_open(), and -ENOMEM.
 * One thread at a time per object. */
int bn_verify_image(struct bn_verify *v, int dirfd, const struct bn_manifest *m, bn_verify_fn damaged,
                    void *arg, struct bn_verify_result *result, struct bn_error *err);
