#include "checkpoint/sending.h"

#include "base/cleanup.h"
#include "store/image_dir.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* Less is copied as soon as it is set aside. */
#define LITTLE (UINT64_C(64) << 20)
/* What setting aside leaves free, and at least a fiftieth of the GPU: others allocate meanwhile, and the driver brings contexts back. */
#define SPARE (UINT64_C(768) << 20)
#define ASIDE_BLOCK (UINT64_C(1) << 30)
/* What is copied at a time beside an application. Its own copies wait in the same copy engine for what was begun there: 40 us for this,
 * 0.3 ms for a staging buffer of 16 MiB. Four threads write a tmpfs a tenth faster so, as what was copied last is still in the caches. */
#define BESIDE_PIECE BN_GPU_CHUNK

struct bn_sending {
    const struct bn_send_env *env;
    unsigned dev;
    uint64_t first;         /* the writer's number of its first chunk */
    struct bn_gpu_set *set; /* borrowed; for the start */
    size_t n;               /* chunks */
    struct bn_hash *hashes; /* as they were on the GPU; NULL: it does not hash */
    bool *known;            /* each chunk: the writer knew it at once */
    struct bn_copy_extent *extents;
    size_t nextents;
    uint64_t bytes;
    struct bn_gpu_set *aside;
    uint32_t *origin; /* of each chunk there: its number in the set */
};

/* ---- the writer ---- */

static const struct bn_pack_options pack_options = {.flags = BN_PACK_NOSYNC};

int bn_send_open(int dirfd, int parent, uint8_t key[BN_HASH_KEY_SIZE], struct bn_pack_writer **out,
                 struct bn_error *err)
{
    uint8_t own[BN_HASH_KEY_SIZE];
    if (parent < 0) {
        int r = bn_hash_key_random(own);
        if (r < 0)
            return bn_error_set(err, r, "store", "the kernel gives no random key: %s", strerror(-r));
        r = bn_pack_writer_open(dirfd, own, 0, &pack_options, out, err);
        if (r == 0)
            memcpy(key, own, sizeof(own));
        return r;
    }
    struct stat mine, its;
    if (fstat(dirfd, &mine) < 0 || fstat(parent, &its) < 0)
        return bn_error_set(err, errno, "parent", "cannot look at the folders: %m");
    if (mine.st_dev == its.st_dev && mine.st_ino == its.st_ino)
        return bn_error_set(err, EINVAL, "parent",
                            "a checkpoint cannot be its own parent: write it to another folder");
    bn_auto_manifest struct bn_manifest *m = NULL;
    struct bn_error why = BN_ERROR_INIT;
    bn_auto_fd lock = bn_image_lock(parent, false, &why);
    if (lock != -EBUSY)
        why = BN_ERROR_INIT;
    int r = lock == -EBUSY ? lock : bn_image_load(parent, &m, &why);
    if (r < 0)
        return bn_error_set(err, r, "parent", "the parent checkpoint: %s", why.text);
    struct bn_pack_options o = pack_options;
    o.parents = &(struct bn_pack_parent){parent, m};
    o.nparents = 1;
    r = bn_pack_writer_open(dirfd, m->key, 0, &o, out, err);
    if (r == 0)
        memcpy(key, m->key, sizeof(m->key));
    return r;
}

/* ---- choosing ---- */

struct candidate {
    struct bn_hash hash;
    size_t chunk;
};

static int by_hash(const void *a, const void *b)
{
    const struct candidate *x = a, *y = b;
    int c = memcmp(x->hash.b, y->hash.b, BN_HASH_SIZE);
    return c ? c : (x->chunk > y->chunk) - (x->chunk < y->chunk);
}

/* Of chunks that are alike and not known, the first is sent: send[] of the others becomes false. */
static int drop_twins(struct bn_sending *s, bool *send)
{
    bn_auto_free struct candidate *c = malloc((s->n ? s->n : 1) * sizeof(*c));
    size_t n = 0;
    if (!c)
        return -ENOMEM;
    for (size_t i = 0; i < s->n; i++)
        if (send[i])
            c[n++] = (struct candidate){s->hashes[i], i};
    qsort(c, n, sizeof(*c), by_hash);
    for (size_t i = 1; i < n; i++)
        if (bn_hash_equal(&c[i].hash, &c[i - 1].hash))
            send[c[i].chunk] = false;
    return 0;
}

static int add_extents(struct bn_sending *s, const bool *send)
{
    size_t runs = 0;
    for (size_t i = 0; i < s->n; i++)
        runs += send[i] && (i == 0 || !send[i - 1]);
    s->extents = calloc(runs ? runs : 1, sizeof(*s->extents));
    if (!s->extents)
        return -ENOMEM;
    for (size_t i = 0; i < s->n; i++) {
        if (!send[i])
            continue;
        if (i == 0 || !send[i - 1])
            s->extents[s->nextents++] = (struct bn_copy_extent){.offset = i * BN_GPU_CHUNK};
        s->extents[s->nextents - 1].bytes += BN_GPU_CHUNK;
        s->bytes += BN_GPU_CHUNK;
    }
    return 0;
}

/* What the writer knows; -EINVAL and the like are its own. */
static int ask_writer(struct bn_sending *s)
{
    for (size_t i = 0; i < s->n; i++) {
        int r = bn_pack_writer_place(s->env->writer, (uint32_t)(s->first + i), &s->hashes[i]);
        if (r < 0)
            return r;
        s->known[i] = r > 0;
    }
    return 0;
}

static int choose(struct bn_sending *s)
{
    bn_auto_free bool *send = malloc(s->n ? s->n : 1);
    if (!send)
        return -ENOMEM;
    int r = s->hashes ? ask_writer(s) : 0;
    for (size_t i = 0; i < s->n; i++)
        send[i] = !s->known[i];
    if (r == 0 && s->hashes)
        r = drop_twins(s, send);
    return r < 0 ? r : add_extents(s, send);
}

struct start {
    const struct bn_send_env *env;
    struct bn_sending **out;
};

static int new_one(void *arg, struct bn_target *t, struct bn_target_part *part, size_t i,
                   struct bn_error *err)
{
    const struct start *start = arg;
    const struct bn_send_env *env = start->env;
    (void)t;
    struct bn_sending *s = calloc(1, sizeof(*s));
    if (!s)
        return bn_error_set(err, ENOMEM, "hash", "out of memory");
    s->env = env;
    s->dev = part->dev;
    s->first = part->image_chunk;
    s->set = part->set;
    s->n = part->bytes / BN_GPU_CHUNK;
    s->known = calloc(s->n ? s->n : 1, sizeof(*s->known));
    s->hashes = calloc(s->n ? s->n : 1, sizeof(*s->hashes));
    int r = s->known && s->hashes ? 0 : -ENOMEM;
    if (r == 0 && bn_gpu_hash(env->gpu, part->set, env->key, 0, s->n, s->hashes, NULL) < 0) {
        free(s->hashes);
        s->hashes = NULL;
    }
    if (r == 0)
        r = choose(s);
    if (r < 0) {
        bn_sending_free(s);
        return bn_error_set(err, r, "hash", "cannot choose what to send: %s", strerror(-r));
    }
    start->out[i] = s;
    return 0;
}

int bn_sending_new(const struct bn_send_env *env, const struct bn_targets *targets, struct bn_sending **out,
                   struct bn_error *err)
{
    size_t n = bn_targets_parts(targets);
    memset(out, 0, n * sizeof(*out));
    int r = bn_targets_each_part(targets, new_one, &(struct start){env, out}, err);
    for (size_t i = 0; r < 0 && i < n; i++) {
        bn_sending_free(out[i]);
        out[i] = NULL;
    }
    return r;
}

unsigned bn_sending_dev(const struct bn_sending *s)
{
    return s->dev;
}

bool bn_sending_hashed(const struct bn_sending *s)
{
    return s->hashes != NULL;
}

uint64_t bn_sending_total(const struct bn_sending *s)
{
    return s->n * BN_GPU_CHUNK;
}

uint64_t bn_sending_bytes(const struct bn_sending *s)
{
    return s->bytes;
}

/* ---- copying ---- */

static struct bn_rate *rate_of(const struct bn_sending *s)
{
    return s->aside ? s->env->aside_rate : s->env->rate;
}

static int consume(void *arg, uint64_t chunk, unsigned nchunks, const void *data, struct bn_error *err)
{
    const struct bn_sending *s = arg;
    unsigned some = s->env->slow ? 1 : nchunks; /* at the highest levels a chunk takes a second */
    for (unsigned i = 0; i < nchunks; i += some) {
        if (s->env->cancel && __atomic_load_n(s->env->cancel, __ATOMIC_RELAXED))
            return bn_error_set(err, ECANCELED, "copy-out", "cancelled");
        int r = bn_pack_writer_add_run(s->env->writer, (uint32_t)(s->first + chunk + i), some,
                                       (const char *)data + i * BN_GPU_CHUNK, err);
        if (r < 0)
            return r;
    }
    if (rate_of(s))
        bn_rate_pass(rate_of(s), nchunks * BN_CHUNK_SIZE);
    return 0;
}

static int consume_aside(void *arg, uint64_t chunk, unsigned nchunks, const void *data, struct bn_error *err)
{
    const struct bn_sending *s = arg;
    const uint32_t *from = &s->origin[chunk];
    for (unsigned i = 0, run; i < nchunks; i += run) {
        for (run = 1; i + run < nchunks && from[i + run] == from[i] + run;)
            run++;
        int r = consume(arg, from[i], run, (const char *)data + i * BN_GPU_CHUNK, err);
        if (r < 0)
            return r;
    }
    return 0;
}

static int make_aside(struct bn_sending *s)
{
    size_t n = (s->bytes + ASIDE_BLOCK - 1) / ASIDE_BLOCK, at = 0;
    bn_auto_free struct bn_gpu_block *blocks = calloc(n, sizeof(*blocks));
    s->origin = malloc(s->bytes / BN_GPU_CHUNK * sizeof(*s->origin));
    if (!blocks || !s->origin)
        return -ENOMEM;
    for (size_t i = 0; i < n; i++)
        blocks[i].size = i + 1 < n ? ASIDE_BLOCK : s->bytes - i * ASIDE_BLOCK;
    for (size_t e = 0; e < s->nextents; e++)
        for (uint64_t off = 0; off < s->extents[e].bytes; off += BN_GPU_CHUNK)
            s->origin[at++] = (uint32_t)((s->extents[e].offset + off) / BN_GPU_CHUNK);
    int r = bn_gpu_set_create(s->env->gpu, s->dev, blocks, n, &s->aside, NULL);
    return r < 0 ? r : bn_gpu_set_gather(s->aside, s->set, s->extents, s->nextents, NULL);
}

bool bn_sending_set_aside(struct bn_sending *s)
{
    uint64_t unused, total;
    if (s->bytes <= LITTLE || bn_gpu_mem_info(s->env->gpu, s->dev, &unused, &total, NULL) < 0)
        return false;
    uint64_t spare = total / 50 > SPARE ? total / 50 : SPARE;
    if (unused < spare || unused - spare < s->bytes)
        return false;
    if (make_aside(s) == 0)
        return true;
    bn_sending_drop_aside(s);
    return false;
}

void bn_sending_drop_aside(struct bn_sending *s)
{
    bn_gpu_set_free(s->aside);
    free(s->origin);
    s->aside = NULL;
    s->origin = NULL;
}

/* Beside an application half of the threads that a dump has, so that it has the cores and the link; with a limit one keeps to it best. */
static unsigned workers(const struct bn_copier *copier, const struct bn_rate *rate)
{
    unsigned all = bn_copier_threads(copier);
    if (!rate)
        return 0;
    return rate->per_second || all < 2 ? 1 : all / 2;
}

int bn_sending_start(struct bn_sending *s, struct bn_copy **job, struct bn_error *err)
{
    const struct bn_copy_extent whole = {.bytes = s->bytes};
    struct bn_copy_spec spec = {.mode = BN_COPY_OUT,
                                .set = s->aside ? s->aside : s->set,
                                .extents = s->aside ? &whole : s->extents,
                                .nextents = s->aside ? 1 : s->nextents,
                                .consume = s->aside ? consume_aside : consume,
                                .arg = s,
                                .workers = workers(s->env->copier, rate_of(s)),
                                .piece = rate_of(s) ? BESIDE_PIECE : 0};
    int r = bn_copy_start(s->env->copier, &spec, job, err);
    return r == 0 && s->aside ? 1 : r;
}

int bn_sending_settle(struct bn_sending *s, struct bn_error *err)
{
    for (size_t i = 0; s->hashes && i < s->n; i++) {
        if (s->known[i])
            continue;
        int r = bn_pack_writer_place(s->env->writer, (uint32_t)(s->first + i), &s->hashes[i]);
        if (r < 0)
            return bn_error_set(err, r, "copy-out", "cannot note a chunk: %s", strerror(-r));
        if (r == 0)
            return bn_error_set(
                err, EIO, "copy-out",
                "chunk %zu of GPU memory arrived with other bytes than were hashed on GPU %u "
                "(%s): try again, and if it happens again suspect that GPU or its link, or its hash: "
                "'bennud --no-gpu-hash' does without",
                i, s->dev, bn_gpu_info(s->env->gpu, s->dev)->name);
    }
    return 0;
}

void bn_sending_free(struct bn_sending *s)
{
    if (!s)
        return;
    bn_sending_drop_aside(s);
    free(s->hashes);
    free(s->known);
    free(s->extents);
    free(s);
}
