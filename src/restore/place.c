#include "restore/place.h"

#include <errno.h>
#include <string.h>

static bool same_chip(const struct bn_gpu_info *have, const struct bn_image_gpu *want)
{
    return have->major == want->cc_major && have->minor == want->cc_minor &&
           strcmp(have->name, want->name) == 0 && have->total >= want->bytes;
}

static int choose(struct bn_gpu *gpu, const struct bn_image_gpu *want, const bool *taken,
                  struct bn_error *err)
{
    const struct bn_gpu_info *info = NULL;
    for (unsigned d = 0; (info = bn_gpu_info(gpu, d)); d++)
        if (!taken[d] && same_chip(info, want))
            return (int)d;
    info = bn_gpu_info(gpu, 0);
    return bn_error_set(err, ENODEV, "place",
                        "the checkpoint was made on a %s (compute capability %u.%u) and this machine has no "
                        "free one (it has %s, "
                        "%u.%u): restore it on the same type of GPU",
                        want->name, want->cc_major, want->cc_minor, info ? info->name : "no GPU",
                        info ? info->major : 0, info ? info->minor : 0);
}

/* From one GPU to another, for the driver. */
static void pair(struct bn_ckpt_pairs *pairs, const uint8_t from[16], const uint8_t to[16])
{
    if (pairs->n == BN_CKPT_PAIRS_MAX)
        return;
    struct bn_ckpt_pair *p = &pairs->v[pairs->n++];
    memcpy(p->from, from, 16);
    memcpy(p->to, to, 16);
}

enum side { FROM, TO };

static bool listed(const struct bn_ckpt_pairs *pairs, enum side side, const uint8_t uuid[16])
{
    for (size_t i = 0; i < pairs->n; i++)
        if (memcmp(side == FROM ? pairs->v[i].from : pairs->v[i].to, uuid, 16) == 0)
            return true;
    return false;
}

/* A GPU that nothing has been brought to: of this machine, or, if we see no such one, one that the image has left. NULL: there is none. */
static const uint8_t *vacant(const struct bn_ckpt_pairs *pairs, uint8_t (*here)[16], unsigned n)
{
    for (unsigned d = 0; d < n; d++)
        if (!listed(pairs, TO, here[d]))
            return here[d];
    for (size_t i = 0; i < pairs->used; i++)
        if (!listed(pairs, TO, pairs->v[i].from))
            return pairs->v[i].from;
    return NULL;
}

/* Besides the GPUs of the image the driver may want to hear of those that its machine had (struct bn_ckpt_pairs), though nothing is on them.
 * They stay what they are, or take the place of any other. */
static void pair_all(struct bn_gpu *gpu, const struct bn_manifest *m, struct bn_place *out)
{
    uint8_t here[BN_MANIFEST_GPUS_MAX][16];
    unsigned n = bn_gpu_machine(gpu, here, BN_MANIFEST_GPUS_MAX);
    struct bn_ckpt_pairs *pairs = &out->pairs;
    for (uint32_t g = 0; g < m->n_gpus; g++)
        pair(pairs, m->gpus[g].uuid, here[out->dev[g]]);
    pairs->used = pairs->n;
    for (uint32_t i = 0; i < m->n_others; i++)
        for (unsigned d = 0; d < n; d++)
            if (memcmp(m->others[i], here[d], 16) == 0 && !listed(pairs, TO, here[d]) &&
                !listed(pairs, FROM, here[d]))
                pair(pairs, here[d], here[d]);
    for (uint32_t i = 0; i < m->n_others; i++) {
        const uint8_t *to = listed(pairs, FROM, m->others[i]) ? NULL : vacant(pairs, here, n);
        if (to)
            pair(pairs, m->others[i], to);
    }
}

int bn_place_gpus(struct bn_gpu *gpu, const struct bn_manifest *m, struct bn_place *out, struct bn_error *err)
{
    bool taken[BN_MANIFEST_GPUS_MAX] = {0}, moved = false;
    unsigned count = bn_gpu_count(gpu) < BN_MANIFEST_GPUS_MAX ? bn_gpu_count(gpu) : BN_MANIFEST_GPUS_MAX;
    int dev[BN_MANIFEST_GPUS_MAX];
    *out = (struct bn_place){0};

    for (uint32_t g = 0; g < m->n_gpus; g++) {
        dev[g] = bn_gpu_find(gpu, m->gpus[g].uuid);
        if (dev[g] >= (int)count)
            dev[g] = -ENODEV;
        if (dev[g] >= 0 && !same_chip(bn_gpu_info(gpu, (unsigned)dev[g]), &m->gpus[g]))
            dev[g] = -ENODEV;
        if (dev[g] >= 0)
            taken[dev[g]] = true;
    }
    for (uint32_t g = 0; g < m->n_gpus; g++) {
        if (dev[g] < 0) {
            dev[g] = choose(gpu, &m->gpus[g], taken, err);
            if (dev[g] < 0)
                return dev[g];
            taken[dev[g]] = moved = true;
        }
        out->dev[g] = (unsigned)dev[g];
    }
    if (!moved)
        return 0;

    pair_all(gpu, m, out);
    return 0;
}
