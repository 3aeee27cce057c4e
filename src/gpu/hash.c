/* The kernel on a device: loading, test, launches (hash.h). */
#include "gpu/hash.h"

#include "base/cleanup.h"
#include "gpu/driver.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define STAGE "hash"

/* hash.ptx, ended by a zero: written by kernels/embed when Bennu is built. */
extern const char bn_hash_ptx[];

#define BLOCK 512u /* threads; a block hashes a chunk */
/* Chunks of one launch: 2 GiB, well under a millisecond, so that an application on the same GPU gets its turn between two. */
#define LAUNCH 1024u

/* The scratch block on the device, and its image in pinned memory: the material, then values. */
#define VALUES_AT (UINT64_C(64) << 10)
#define VALUES_MAX ((BN_GPU_CHUNK - VALUES_AT) / BN_HASH_SIZE)
_Static_assert(sizeof(struct bn_hash_material) <= VALUES_AT, "the material lies before the values");

struct bn_gpu_hashing {
    pthread_mutex_t lock;
    bool tested;
    struct bn_error off; /* set: why this device does not hash */
    CUmodule module;
    CUfunction range;
    CUstream stream;
    struct bn_gpu_set *scratch;
    struct bn_pool *pool;
    struct bn_mem *mem;
    uint8_t *pinned;
    bool has_key;
    uint8_t key[BN_HASH_KEY_SIZE]; /* whose material lies on the device */
};

/* ---- launches; the lock is held and the context current ---- */

static int failed(CUresult c, unsigned dev, const char *what, struct bn_error *err)
{
    return bn_cuda_fail(err, c, STAGE, "GPU %u: %s failed", dev, what);
}

static int wait(struct bn_gpu *gpu, unsigned dev, const char *what, struct bn_error *err)
{
    CUresult c = gpu->cu.StreamSynchronize(gpu->devices[dev].hashing->stream);
    return c == CUDA_SUCCESS ? 0 : failed(c, dev, what, err);
}

static int upload_key(struct bn_gpu *gpu, unsigned dev, const struct bn_hash_key *key, struct bn_error *err)
{
    struct bn_gpu_hashing *h = gpu->devices[dev].hashing;
    if (h->has_key && memcmp(h->key, bn_hash_key_bytes(key), sizeof(h->key)) == 0)
        return 0;
    h->has_key = false;
    memcpy(h->pinned, bn_hash_key_material(key), sizeof(struct bn_hash_material));
    CUresult c = gpu->cu.MemcpyHtoDAsync(bn_gpu_set_ptr(h->scratch), h->pinned,
                                         sizeof(struct bn_hash_material), h->stream);
    if (c != CUDA_SUCCESS)
        return failed(c, dev, "handing the key over", err);
    int r = wait(gpu, dev, "handing the key over", err);
    if (r == 0) {
        memcpy(h->key, bn_hash_key_bytes(key), sizeof(h->key));
        h->has_key = true;
    }
    return r;
}

/* At most VALUES_MAX chunks from `base` on; the values are in pinned memory afterwards. */
static int launch(struct bn_gpu *gpu, unsigned dev, CUdeviceptr base, size_t n, struct bn_error *err)
{
    struct bn_gpu_hashing *h = gpu->devices[dev].hashing;
    CUdeviceptr material = bn_gpu_set_ptr(h->scratch);
    uint64_t stride = BN_GPU_CHUNK;
    for (size_t at = 0; at < n; at += LAUNCH) {
        CUdeviceptr from = base + at * BN_GPU_CHUNK, to = material + VALUES_AT + at * BN_HASH_SIZE;
        unsigned grid = n - at < LAUNCH ? (unsigned)(n - at) : LAUNCH;
        void *args[] = {&from, &stride, &material, &to};
        CUresult c = gpu->cu.LaunchKernel(h->range, grid, 1, 1, BLOCK, 1, 1, 0, h->stream, args, NULL);
        if (c != CUDA_SUCCESS)
            return failed(c, dev, "starting the hash", err);
    }
    CUresult c =
        gpu->cu.MemcpyDtoHAsync(h->pinned + VALUES_AT, material + VALUES_AT, n * BN_HASH_SIZE, h->stream);
    if (c != CUDA_SUCCESS)
        return failed(c, dev, "fetching hashes", err);
    return wait(gpu, dev, "hashing", err);
}

static int hash_all(struct bn_gpu *gpu, unsigned dev, const struct bn_hash_key *key, CUdeviceptr base,
                    size_t n, struct bn_hash *out, struct bn_error *err)
{
    struct bn_gpu_hashing *h = gpu->devices[dev].hashing;
    int r = upload_key(gpu, dev, key, err);
    for (size_t at = 0; r == 0 && at < n;) {
        size_t some = n - at < VALUES_MAX ? n - at : VALUES_MAX;
        r = launch(gpu, dev, base + at * BN_GPU_CHUNK, some, err);
        if (r == 0)
            memcpy(out + at, h->pinned + VALUES_AT, some * BN_HASH_SIZE);
        at += some;
    }
    return r;
}

/* ---- the test ---- */

#define TEST_CHUNKS 4u

static uint64_t mix(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

/* Zeros; bytes without pattern; the same with its last bit turned; every bit set. */
static void fill(unsigned which, uint8_t *data)
{
    if (which == 0 || which == 3) {
        memset(data, which ? 0xff : 0, BN_GPU_CHUNK);
        return;
    }
    uint64_t state = 1;
    for (size_t i = 0; i < BN_GPU_CHUNK; i += 8) {
        uint64_t word = mix(&state);
        memcpy(data + i, &word, 8);
    }
    if (which == 2)
        data[BN_GPU_CHUNK - 1] ^= 0x80;
}

static int compare(struct bn_gpu *gpu, unsigned dev, const struct bn_hash_key *key, struct bn_gpu_set *set,
                   const struct bn_hash *want, struct bn_error *err)
{
    struct bn_hash got[TEST_CHUNKS];
    int r = hash_all(gpu, dev, key, bn_gpu_set_ptr(set), TEST_CHUNKS, got, err);
    for (unsigned i = 0; r == 0 && i < TEST_CHUNKS; i++)
        if (!bn_hash_equal(&got[i], &want[i]))
            r = bn_error_set(err, ENOTSUP, STAGE,
                             "GPU %u (%s) gives other hashes than the CPU (test chunk %u)", dev,
                             gpu->devices[dev].info.name, i);
    return r;
}

static int test(struct bn_gpu *gpu, unsigned dev, struct bn_error *err)
{
    static const uint8_t bytes[BN_HASH_KEY_SIZE] = "does a GPU hash";
    struct bn_gpu_hashing *h = gpu->devices[dev].hashing;
    struct bn_gpu_set *set = NULL;
    struct bn_hash want[TEST_CHUNKS];
    struct bn_hash_key *key = bn_hash_key_new(bytes);
    int r = key ? bn_gpu_set_create(gpu, dev, &(struct bn_gpu_block){.size = TEST_CHUNKS * BN_GPU_CHUNK}, 1,
                                    &set, err)
                : bn_error_set(err, ENOMEM, STAGE, "Out of memory.");
    for (unsigned i = 0; r == 0 && i < TEST_CHUNKS; i++) {
        fill(i, h->pinned);
        bn_hash_chunk(key, h->pinned, BN_GPU_CHUNK, &want[i]);
        CUresult c = gpu->cu.MemcpyHtoDAsync(bn_gpu_set_ptr(set) + i * BN_GPU_CHUNK, h->pinned, BN_GPU_CHUNK,
                                             h->stream);
        r = c == CUDA_SUCCESS ? wait(gpu, dev, "a copy", err) : failed(c, dev, "a copy", err);
    }
    if (r == 0)
        r = compare(gpu, dev, key, set, want, err);
    bn_gpu_set_free(set);
    bn_hash_key_free(key);
    return r;
}

/* ---- making ready ---- */

static void take_apart(struct bn_gpu *gpu, struct bn_gpu_hashing *h)
{
    if (h->stream) {
        gpu->cu.StreamSynchronize(h->stream); /* after a failure something may still be under way */
        gpu->cu.StreamDestroy(h->stream);
    }
    if (h->module)
        gpu->cu.ModuleUnload(h->module);
    bn_gpu_set_free(h->scratch);
    bn_mem_free(h->mem);
    bn_pool_free(h->pool);
    h->stream = NULL;
    h->module = NULL;
    h->scratch = NULL;
    h->mem = NULL;
    h->pool = NULL;
    h->has_key = false;
}

static int load(struct bn_gpu *gpu, unsigned dev, struct bn_error *err)
{
    struct bn_gpu_hashing *h = gpu->devices[dev].hashing;
    if (!gpu->cu.ModuleLoadData || !gpu->cu.ModuleUnload || !gpu->cu.ModuleGetFunction ||
        !gpu->cu.LaunchKernel)
        return bn_error_set(err, ENOTSUP, STAGE, "The driver %s cannot start kernels", gpu->path);
    CUresult c = gpu->cu.ModuleLoadData(&h->module, bn_hash_ptx);
    if (c != CUDA_SUCCESS)
        return failed(c, dev, "loading the hash's kernel", err);
    if ((c = gpu->cu.ModuleGetFunction(&h->range, h->module, "bn_hash_range")) != CUDA_SUCCESS)
        return failed(c, dev, "finding the hash's kernel", err);
    if ((c = gpu->cu.StreamCreate(&h->stream, CU_STREAM_NON_BLOCKING)) != CUDA_SUCCESS)
        return failed(c, dev, "making a stream", err);
    return 0;
}

static int make_ready(struct bn_gpu *gpu, unsigned dev, struct bn_error *err)
{
    struct bn_gpu_hashing *h = gpu->devices[dev].hashing;
    struct bn_pool_config config = {.limit = BN_GPU_CHUNK, .slab = BN_GPU_CHUNK, .threads = 1};
    int r = bn_gpu_set_create(gpu, dev, &(struct bn_gpu_block){.size = BN_GPU_CHUNK}, 1, &h->scratch, err);
    if (r == 0)
        r = bn_pool_new(gpu, &config, &h->pool, err);
    if (r == 0)
        r = bn_mem_alloc(h->pool, BN_GPU_CHUNK, &h->mem, err);
    if (r < 0)
        return r;
    h->pinned = bn_mem_piece(h->mem, 0, NULL, NULL);
    r = load(gpu, dev, err);
    return r < 0 ? r : test(gpu, dev, err);
}

static void switch_off(struct bn_gpu *gpu, struct bn_gpu_hashing *h, const struct bn_error *why)
{
    take_apart(gpu, h);
    bn_error_set(&h->off, ENOTSUP, STAGE, "%s", why->text[0] ? why->text : "its test failed");
}

static int ready(struct bn_gpu *gpu, unsigned dev, struct bn_error *err)
{
    struct bn_gpu_hashing *h = gpu->devices[dev].hashing;
    if (bn_error_is_set(&h->off))
        return bn_error_set(err, ENOTSUP, STAGE, "%s", h->off.text);
    if (h->tested)
        return 0;
    struct bn_error why = BN_ERROR_INIT;
    int r = make_ready(gpu, dev, &why);
    if (r == 0) {
        h->tested = true;
        return 0;
    }
    if (r != -ENOMEM) {
        switch_off(gpu, h, &why);
        return bn_error_set(err, ENOTSUP, STAGE, "%s", h->off.text);
    }
    take_apart(gpu, h);
    return bn_error_set(err, r, STAGE, "%s", why.text);
}

/* The device's own, made at its first use. */
static struct bn_gpu_hashing *hashing_of(struct bn_gpu *gpu, unsigned dev)
{
    struct bn_gpu_device *d = &gpu->devices[dev];
    pthread_mutex_lock(&d->lock);
    if (!d->hashing && (d->hashing = calloc(1, sizeof(*d->hashing))))
        pthread_mutex_init(&d->hashing->lock, NULL);
    struct bn_gpu_hashing *h = d->hashing;
    pthread_mutex_unlock(&d->lock);
    return h;
}

int bn_gpu_hash_ready(struct bn_gpu *gpu, unsigned dev, struct bn_error *err)
{
    int r = bn_gpu_enter(gpu, dev, STAGE, err);
    if (r < 0)
        return r;
    struct bn_gpu_hashing *h = hashing_of(gpu, dev);
    if (h) {
        pthread_mutex_lock(&h->lock);
        r = ready(gpu, dev, err);
        pthread_mutex_unlock(&h->lock);
    } else {
        r = bn_error_set(err, ENOMEM, STAGE, "Out of memory.");
    }
    bn_gpu_leave(gpu);
    return r;
}

int bn_gpu_hash(struct bn_gpu *gpu, const struct bn_gpu_set *set, const struct bn_hash_key *key,
                uint64_t first, size_t n, struct bn_hash *out, struct bn_error *err)
{
    unsigned dev = bn_gpu_set_device(set);
    uint64_t chunks = bn_gpu_set_bytes(set) / BN_GPU_CHUNK;
    if (first > chunks || n > chunks - first)
        return bn_error_set(err, EINVAL, STAGE, "Chunks %llu to %llu of %llu cannot be hashed.",
                            (unsigned long long)first, (unsigned long long)(first + n),
                            (unsigned long long)chunks);
    int r = bn_gpu_hash_ready(gpu, dev, err);
    if (r == 0)
        r = bn_gpu_enter(gpu, dev, STAGE, err);
    if (r < 0)
        return r;
    struct bn_gpu_hashing *h = gpu->devices[dev].hashing;
    struct bn_error why = BN_ERROR_INIT;
    pthread_mutex_lock(&h->lock);
    r = ready(gpu, dev, err); /* another thread may have found it wanting meanwhile */
    if (r == 0 &&
        (r = hash_all(gpu, dev, key, bn_gpu_set_ptr(set) + first * BN_GPU_CHUNK, n, out, &why)) < 0) {
        switch_off(gpu, h, &why);
        r = bn_error_set(err, ENOTSUP, STAGE, "%s", h->off.text);
    }
    pthread_mutex_unlock(&h->lock);
    bn_gpu_leave(gpu);
    return r;
}

void bn_gpu_hash_switch_off(struct bn_gpu *gpu, unsigned dev, const char *text)
{
    struct bn_gpu_hashing *h = dev < gpu->count ? hashing_of(gpu, dev) : NULL;
    if (!h || bn_gpu_enter(gpu, dev, STAGE, NULL) < 0)
        return;
    struct bn_error why = BN_ERROR_INIT;
    bn_error_set(&why, ENOTSUP, STAGE, "%s", text);
    pthread_mutex_lock(&h->lock);
    if (!bn_error_is_set(&h->off))
        switch_off(gpu, h, &why);
    pthread_mutex_unlock(&h->lock);
    bn_gpu_leave(gpu);
}

bool bn_gpu_hash_off(struct bn_gpu *gpu, unsigned dev, struct bn_error *why)
{
    struct bn_gpu_hashing *h = dev < gpu->count ? hashing_of(gpu, dev) : NULL;
    if (!h)
        return false;
    pthread_mutex_lock(&h->lock);
    bool off = bn_error_is_set(&h->off);
    if (off && why)
        *why = h->off;
    pthread_mutex_unlock(&h->lock);
    return off;
}

void bn_gpu_hash_free(struct bn_gpu *gpu, unsigned dev)
{
    struct bn_gpu_hashing *h = gpu->devices[dev].hashing;
    if (!h)
        return;
    bool entered = bn_gpu_enter(gpu, dev, STAGE, NULL) == 0;
    take_apart(gpu, h);
    if (entered)
        bn_gpu_leave(gpu);
    pthread_mutex_destroy(&h->lock);
    free(h);
    gpu->devices[dev].hashing = NULL;
}
