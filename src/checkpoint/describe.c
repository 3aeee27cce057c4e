#include "checkpoint/describe.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "config.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DRIVER_CHECKPOINTED 2u /* CU_PROCESS_STATE_CHECKPOINTED */

/* Index of the GPU in the manifest, added at first sight. */
static int gpu_index(struct bn_manifest *m, struct bn_gpu *gpu, unsigned dev, const uint8_t uuid[16])
{
    int known = bn_manifest_find_gpu(m, uuid);
    if (known >= 0)
        return known;
    const struct bn_gpu_info *info = bn_gpu_info(gpu, dev);
    struct bn_image_gpu *g = bn_manifest_add_gpu(m);
    if (!g)
        return -ENOMEM;
    memcpy(g->uuid, uuid, 16);
    memcpy(g->name, info->name, sizeof(g->name) < sizeof(info->name) ? sizeof(g->name) : sizeof(info->name));
    g->name[sizeof(g->name) - 1] = 0;
    g->cc_major = info->major;
    g->cc_minor = info->minor;
    g->bytes = info->total;
    return (int)m->n_gpus - 1;
}

static int add_segments(struct bn_manifest *m, struct bn_gpu *gpu, const struct bn_target *t,
                        struct bn_image_process *p)
{
    for (size_t part = 0; part < t->nparts; part++)
        for (size_t i = 0; i < t->parts[part].n; i++) {
            const struct bn_agent_segment *s = &t->segs[t->parts[part].first + i];
            int g = gpu_index(m, gpu, t->parts[part].dev, s->uuid);
            struct bn_image_segment *to = g < 0 ? NULL : bn_process_add_segment(p);
            if (!to)
                return -ENOMEM;
            *to = (struct bn_image_segment){
                .id = s->id, .size = s->size, .va = s->va, .gpu = (uint32_t)g, .flags = s->flags};
        }
    return 0;
}

static int add_process(struct bn_manifest *m, struct bn_gpu *gpu, const struct bn_target *t)
{
    bool agent = t->agent || t->nsegs > 0; /* of one that is gone, what is held of it */
    struct bn_image_process *p = bn_manifest_add_process(m);
    if (!p)
        return -ENOMEM;
    p->pid = t->inner;
    p->flags = agent ? BN_PROCESS_AGENT : BN_PROCESS_DRIVER;
    p->driver_state = DRIVER_CHECKPOINTED;
    memcpy(p->instance, t->instance, sizeof(p->instance));
    memcpy(p->comm, t->comm, sizeof(p->comm));
    if (agent)
        return add_segments(m, gpu, t, p);
    /* The driver does not say which GPU a process uses; the chip is what a restore must know. */
    const struct bn_gpu_info *first = bn_gpu_info(gpu, 0);
    return m->n_gpus == 0 && first ? (gpu_index(m, gpu, 0, first->uuid) < 0 ? -ENOMEM : 0) : 0;
}

/* Those that none of the processes has anything on. */
static int note_others(struct bn_manifest *m, struct bn_gpu *gpu)
{
    uint8_t uuids[BN_MANIFEST_GPUS_MAX][16];
    unsigned n = bn_gpu_machine(gpu, uuids, BN_MANIFEST_GPUS_MAX);
    for (unsigned i = 0; i < n; i++) {
        if (bn_manifest_find_gpu(m, uuids[i]) >= 0)
            continue;
        uint8_t(*other)[16] = bn_manifest_add_other(m);
        if (!other)
            return -ENOMEM;
        memcpy(*other, uuids[i], sizeof(*other));
    }
    return 0;
}

static void note_stdio(struct bn_manifest *m, pid_t root)
{
    for (int fd = 0; fd < 3; fd++) {
        char path[64];
        snprintf(path, sizeof(path), "/proc/%d/fd/%d", root, fd);
        char link[BN_IMAGE_STDIO_MAX];
        ssize_t n = readlink(path, link, sizeof(link) - 1);
        link[n > 0 ? n : 0] = 0;
        snprintf(m->stdio[fd], sizeof(m->stdio[fd]), "%s", link);
        if (strncmp(m->stdio[fd], "/dev/pts/", 9) == 0 || strcmp(m->stdio[fd], "/dev/tty") == 0)
            m->controlling_tty = true;
    }
}

int bn_describe(struct bn_quiesce *q, struct bn_manifest **out, struct bn_error *err)
{
    bn_auto_manifest struct bn_manifest *m = bn_manifest_new();
    if (!m)
        return bn_error_set(err, ENOMEM, "manifest", "out of memory");
    snprintf(m->bennu_version, sizeof(m->bennu_version), "%s", BENNU_VERSION);
    gethostname(m->host, sizeof(m->host) - 1);
    m->driver_version = bn_gpu_driver_version(q->env->gpu);
    note_stdio(m, q->root);
    for (size_t i = 0; i < q->targets.n; i++)
        if (add_process(m, q->env->gpu, &q->targets.v[i]) < 0)
            return bn_error_set(err, ENOMEM, "manifest", "out of memory");
    if (note_others(m, q->env->gpu) < 0)
        return bn_error_set(err, ENOMEM, "manifest", "out of memory");
    int r = bn_manifest_layout(m, err);
    if (r < 0)
        return r;
    for (size_t i = 0; i < q->targets.n; i++) {
        struct bn_target *t = &q->targets.v[i];
        for (size_t p = 0; p < t->nparts; p++)
            t->parts[p].image_chunk = m->processes[i].segments[t->parts[p].first].first_chunk;
    }
    *out = BN_TAKE_PTR(m);
    return 0;
}
