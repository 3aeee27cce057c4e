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
static void pair(struct bn_place *out, const uint8_t from[16], const uint8_t to[16])
{
    struct bn_ckpt_pair *p = &out->pairs[out->npairs++];
    memcpy(p->from, from, 16);
    memcpy(p->to, to, 16);
}

static bool in_image(const struct bn_manifest *m, const uint8_t uuid[16])
{
    for (uint32_t g = 0; g < m->n_gpus; g++)
        if (memcmp(m->gpus[g].uuid, uuid, 16) == 0)
            return true;
    return false;
}

/* Driver 580 wants every GPU that the kernel has named once on either side, also those that we are not shown
 * (github.com/NVIDIA/cuda-checkpoint, issue 35). What the image did not use stays where it is, or, if that is taken, goes where the
 * image was. */
static void pair_all(struct bn_gpu *gpu, const struct bn_manifest *m, struct bn_place *out)
{
    uint8_t uuids[BN_MANIFEST_GPUS_MAX][16];
    bool taken[BN_MANIFEST_GPUS_MAX] = {0};
    unsigned n = bn_gpu_machine(gpu, uuids, BN_MANIFEST_GPUS_MAX), from = 0;
    for (uint32_t g = 0; g < m->n_gpus; g++) {
        taken[out->dev[g]] = true;
        pair(out, m->gpus[g].uuid, uuids[out->dev[g]]);
    }
    for (unsigned d = 0; d < n; d++)
        if (!taken[d] && !in_image(m, uuids[d]))
            pair(out, uuids[d], uuids[d]);
    for (unsigned d = 0; d < n; d++) {
        if (taken[d] || !in_image(m, uuids[d]))
            continue;
        while (from < n && (!taken[from] || in_image(m, uuids[from])))
            from++;
        if (from < n)
            pair(out, uuids[from++], uuids[d]);
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
