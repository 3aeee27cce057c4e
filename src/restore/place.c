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

    /* The driver wants every GPU of the machine named once on either side (facts: driver 580). GPUs of this machine
     * that the image did not use fill up whatever is free. */
    for (uint32_t g = 0; g < m->n_gpus; g++) {
        memcpy(out->pairs[g].from, m->gpus[g].uuid, 16);
        memcpy(out->pairs[g].to, bn_gpu_info(gpu, out->dev[g])->uuid, 16);
    }
    out->npairs = m->n_gpus;
    for (unsigned d = 0; d < count; d++) {
        if (taken[d])
            continue;
        memcpy(out->pairs[out->npairs].from, bn_gpu_info(gpu, d)->uuid, 16);
        memcpy(out->pairs[out->npairs].to, bn_gpu_info(gpu, d)->uuid, 16);
        out->npairs++;
    }
    return 0;
}
