/* Manifests for tests and for the corpora: the same on every run. */
#pragma once

#include "image/manifest.h"

#include <stdlib.h>
#include <string.h>

#define MAKE_ASSERT(p) \
    do {               \
        if (!(p))      \
            abort();   \
    } while (0)

static inline struct bn_image_process *make_process(struct bn_manifest *m, int32_t pid, unsigned segments,
                                                    unsigned chunks_each)
{
    struct bn_image_process *p = bn_manifest_add_process(m);
    MAKE_ASSERT(p);
    p->pid = pid;
    p->driver_state = 2;
    strcpy(p->comm, "python3");
    p->flags = segments ? BN_PROCESS_AGENT : BN_PROCESS_DRIVER;
    for (unsigned i = 0; segments && i < 16; i++)
        p->instance[i] = (uint8_t)(pid + (int)i);
    for (unsigned i = 0; i < segments; i++) {
        struct bn_image_segment *s = bn_process_add_segment(p);
        MAKE_ASSERT(s);
        s->id = 1000 + i;
        s->size = (i + chunks_each) * BN_CHUNK_SIZE;
        s->va = 0x7f4000000000 + (uint64_t)i * (1u << 30);
        s->gpu = i % m->n_gpus;
        s->flags = i % 2;
    }
    return p;
}

/* Three processes, two GPUs, eight chunks in two packs, phases; every field has a value of its own. */
static inline struct bn_manifest *make_manifest(void)
{
    struct bn_manifest *m = bn_manifest_new();
    MAKE_ASSERT(m);
    for (unsigned i = 0; i < BN_HASH_KEY_SIZE; i++)
        m->key[i] = (uint8_t)(0xa0 + i);
    m->created_ns = 1795300000123456789;
    m->driver_version = 13000;
    strcpy(m->bennu_version, "0.1.0");
    strcpy(m->host, "node-7.example");
    for (unsigned i = 0; i < 2; i++) {
        struct bn_image_gpu *g = bn_manifest_add_gpu(m);
        MAKE_ASSERT(g);
        strcpy(g->name, "NVIDIA H100 80GB HBM3");
        g->cc_major = 9;
        g->bytes = (uint64_t)80 << 30;
        for (unsigned b = 0; b < 16; b++)
            g->uuid[b] = (uint8_t)(16 * i + b);
    }
    make_process(m, 1, 2, 1);
    make_process(m, 17, 0, 0);
    make_process(m, 18, 2, 2);
    MAKE_ASSERT(bn_manifest_layout(m, NULL) == 0);
    m->packs = calloc(2, sizeof(*m->packs));
    MAKE_ASSERT(m->packs && m->n_chunks == 8);
    m->n_packs = 2;
    m->packs[0] = (struct bn_image_pack){0, 4 * BN_CHUNK_SIZE};
    m->packs[1] = (struct bn_image_pack){3, 2 * BN_CHUNK_SIZE + 4096};
    for (uint32_t i = 0; i < m->n_chunks; i++) {
        struct bn_image_chunk *c = &m->chunks[i];
        memset(c->hash.b, (int)(0x30 + i), sizeof(c->hash.b));
        if (i == 2 || i == 5) {
            c->flags = BN_CHUNK_ZERO;
            continue;
        }
        c->pack = i < 4 ? 0 : 3;
        c->offset = i < 4 ? i * BN_CHUNK_SIZE : (i % 2) * BN_CHUNK_SIZE + 4096;
        c->length = BN_CHUNK_SIZE;
    }
    MAKE_ASSERT(bn_manifest_add_phase(m, "gate", 0, 1500000, 0) == 0);
    MAKE_ASSERT(bn_manifest_add_phase(m, "copy", 1500000, 900000000, 8 * BN_CHUNK_SIZE) == 0);
    strcpy(m->stdio[0], "/dev/null");
    strcpy(m->stdio[1], "/dev/pts/3");
    memset(m->stdio[2], 'x', BN_IMAGE_STDIO_MAX - 1);
    m->controlling_tty = true;
    return m;
}
