/* Pinned host memory.
 *
 * One memfd and one mapping of its full length, empty at first. It is populated and registered slab by
 * slab, always from the start; a first touch of memory runs at about 1 GB/s a thread on a virtual machine,
 * registering touched memory at 20 GB/s and more, so several threads touch small pieces and whoever
 * finishes a slab registers it while the others go on.
 */
#include "gpu/driver.h"

#include "base/cleanup.h"
#include "base/io.h"
#include "base/parallel.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define STAGE "pinned-memory"
#define SLAB_DEFAULT (UINT64_C(256) << 20)
#define TOUCH_PIECE (UINT64_C(16) << 20)
#define MIB(bytes) ((unsigned long long)((bytes) >> 20))

struct range {
    uint64_t off, len;
};

struct slab {
    bool live;    /* populated and registered */
    unsigned dev; /* whose context registered it */
};

struct bn_pool {
    struct bn_gpu *gpu;
    struct bn_pool_config config;
    int fd;
    uint8_t *base;
    uint64_t length; /* of the mapping */
    size_t nslabs;
    struct slab *slabs;

    pthread_mutex_t lock; /* of everything below, and of slabs[].live */
    pthread_cond_t grown;
    bool growing; /* somebody grows or trims the pool, without the lock */
    uint64_t registered, used;
    struct range *free; /* sorted by offset, never adjacent, only in live slabs */
    size_t nfree, capfree;
    size_t pieces_out; /* in all allocations together */
    struct bn_pool_stats stats;
};

struct bn_mem {
    struct bn_pool *pool;
    uint64_t bytes;
    size_t n;
    struct range pieces[];
};

static uint64_t slab_bytes(const struct bn_pool *pool, size_t i)
{
    uint64_t off = i * pool->config.slab;
    uint64_t left = pool->length - off;
    return left < pool->config.slab ? left : pool->config.slab;
}

/* ---- Free ranges --------------------------------------------------------------------------------------- */

/* Room for `extra` more ranges beside one for every piece that is out: giving memory back must not need
 * memory. */
static int ranges_room(struct bn_pool *pool, size_t extra)
{
    size_t need = pool->nfree + pool->pieces_out + extra;
    if (need <= pool->capfree)
        return 0;
    size_t cap = 2 * need + 64;
    struct range *f = realloc(pool->free, cap * sizeof(*f));
    if (!f)
        return -ENOMEM;
    pool->free = f;
    pool->capfree = cap;
    return 0;
}

/* Room was made before. */
static void range_add(struct bn_pool *pool, uint64_t off, uint64_t len)
{
    size_t lo = 0, hi = pool->nfree;
    while (lo < hi) {
        size_t mid = (lo + hi) / 2;
        if (pool->free[mid].off < off)
            lo = mid + 1;
        else
            hi = mid;
    }
    bool before = lo > 0 && pool->free[lo - 1].off + pool->free[lo - 1].len == off;
    bool after = lo < pool->nfree && off + len == pool->free[lo].off;
    if (before && after) {
        pool->free[lo - 1].len += len + pool->free[lo].len;
        memmove(&pool->free[lo], &pool->free[lo + 1], (pool->nfree - lo - 1) * sizeof(struct range));
        pool->nfree--;
    } else if (before) {
        pool->free[lo - 1].len += len;
    } else if (after) {
        pool->free[lo].off = off;
        pool->free[lo].len += len;
    } else {
        memmove(&pool->free[lo + 1], &pool->free[lo], (pool->nfree - lo) * sizeof(struct range));
        pool->free[lo] = (struct range){off, len};
        pool->nfree++;
    }
}

/* Take exactly [off, off + len) out; it lies in one free range. Needs room for one more range. */
static void range_cut(struct bn_pool *pool, size_t i, uint64_t off, uint64_t len)
{
    struct range r = pool->free[i];
    uint64_t head = off - r.off, tail = r.off + r.len - (off + len);
    if (head && tail) {
        memmove(&pool->free[i + 2], &pool->free[i + 1], (pool->nfree - i - 1) * sizeof(struct range));
        pool->free[i].len = head;
        pool->free[i + 1] = (struct range){off + len, tail};
        pool->nfree++;
    } else if (head) {
        pool->free[i].len = head;
    } else if (tail) {
        pool->free[i] = (struct range){off + len, tail};
    } else {
        memmove(&pool->free[i], &pool->free[i + 1], (pool->nfree - i - 1) * sizeof(struct range));
        pool->nfree--;
    }
}

/* The smallest range that holds `want`, else the largest there is. nfree > 0. */
static size_t range_pick(const struct bn_pool *pool, uint64_t want)
{
    size_t best = 0;
    for (size_t i = 1; i < pool->nfree; i++) {
        uint64_t len = pool->free[i].len, have = pool->free[best].len;
        bool fits = len >= want, best_fits = have >= want;
        if ((fits && (!best_fits || len < have)) || (!fits && !best_fits && len > have))
            best = i;
    }
    return best;
}

/* ---- Growing ------------------------------------------------------------------------------------------- */

struct grow_slab {
    size_t index;
    uint64_t off, bytes;
    unsigned pieces_left;
    bool registered;
};

struct grow {
    struct bn_pool *pool;
    unsigned dev;
    struct grow_slab *slabs;
    size_t n;
    size_t next_slab; /* with next_off: where the next piece to touch begins */
    uint64_t next_off;
    uint64_t before; /* bytes registered when it began */
    uint64_t touch_ns, register_ns;
    int result;
    struct bn_error err;
    pthread_mutex_t lock;
};

static int touch(uint8_t *p, uint64_t len)
{
#ifdef MADV_POPULATE_WRITE
    for (;;) {
        if (madvise(p, len, MADV_POPULATE_WRITE) == 0)
            return 0;
        if (errno == EINTR || errno == EAGAIN)
            continue;
        if (errno != EINVAL) /* EINVAL: kernel older than 5.14 */
            return -errno;
        break;
    }
#endif
    for (uint64_t i = 0; i < len; i += 4096)
        *(volatile uint8_t *)(p + i) = 0;
    return 0;
}

static void grow_fail(struct grow *g, int r)
{
    if (g->result == 0)
        g->result = r;
}

/* The lock is held; released around the work. */
static void grow_register(struct grow *g, struct grow_slab *s)
{
    struct bn_gpu *gpu = g->pool->gpu;
    struct bn_error err = BN_ERROR_INIT;
    pthread_mutex_unlock(&g->lock);

    uint64_t t = bn_now_ns();
    int r = bn_gpu_enter(gpu, g->dev, STAGE, &err);
    if (r == 0) {
        CUresult c = gpu->cu.MemHostRegister(g->pool->base + s->off, s->bytes, CU_MEMHOSTREGISTER_PORTABLE);
        if (c != CUDA_SUCCESS)
            r = bn_cuda_fail(&err, c, STAGE,
                             "%llu MiB of host memory cannot be pinned (%llu MiB are already)", MIB(s->bytes),
                             MIB(g->before));
        bn_gpu_leave(gpu);
    }
    t = bn_now_ns() - t;

    pthread_mutex_lock(&g->lock);
    g->register_ns += t;
    if (r == 0) {
        s->registered = true;
    } else {
        if (!bn_error_is_set(&g->err))
            g->err = err;
        grow_fail(g, r);
    }
}

static void *grow_run(void *arg)
{
    struct grow *g = arg;
    pthread_mutex_lock(&g->lock);
    while (g->result == 0 && g->next_slab < g->n) {
        struct grow_slab *s = &g->slabs[g->next_slab];
        uint64_t off = g->next_off;
        uint64_t len = s->bytes - off < TOUCH_PIECE ? s->bytes - off : TOUCH_PIECE;
        g->next_off += len;
        if (g->next_off == s->bytes) {
            g->next_slab++;
            g->next_off = 0;
        }
        pthread_mutex_unlock(&g->lock);
        uint64_t t = bn_now_ns();
        int r = touch(g->pool->base + s->off + off, len);
        t = bn_now_ns() - t;
        pthread_mutex_lock(&g->lock);
        g->touch_ns += t;
        if (r < 0) {
            bn_error_set(&g->err, r, STAGE,
                         "The machine has no %llu MiB of memory left for pinned buffers: %s.", MIB(s->bytes),
                         strerror(-r));
            grow_fail(g, r);
        } else if (--s->pieces_left == 0 && g->result == 0) {
            grow_register(g, s);
        }
    }
    pthread_mutex_unlock(&g->lock);
    return NULL;
}

static void slab_drop(struct bn_pool *pool, size_t i, unsigned dev, bool registered)
{
    uint64_t off = i * pool->config.slab, len = slab_bytes(pool, i);
    if (registered && bn_gpu_enter(pool->gpu, dev, STAGE, NULL) == 0) {
        pool->gpu->cu.MemHostUnregister(pool->base + off);
        bn_gpu_leave(pool->gpu);
    }
    fallocate(pool->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)off, (off_t)len);
}

static void grow_threads(struct grow *g, uint64_t bytes)
{
    unsigned want = g->pool->config.threads;
    uint64_t pieces = (bytes + TOUCH_PIECE - 1) / TOUCH_PIECE;
    if (want > pieces)
        want = (unsigned)pieces;
    pthread_t threads[64];
    unsigned n = 0;
    while (n + 1 < want && n < BN_ARRAY_SIZE(threads) && bn_gpu_thread(&threads[n], grow_run, g) == 0)
        n++;
    grow_run(g);
    while (n > 0)
        pthread_join(threads[--n], NULL);
}

/* Grow by whole slabs, at least `need` bytes. Called with the lock, which it releases meanwhile;
 * pool->growing is true. */
static int grow(struct bn_pool *pool, uint64_t need, struct bn_error *err)
{
    struct grow g = {.pool = pool, .dev = bn_gpu_any_warm(pool->gpu), .before = pool->registered};
    uint64_t bytes = 0;
    g.slabs = calloc(pool->nslabs, sizeof(*g.slabs));
    if (!g.slabs)
        return bn_error_set(err, ENOMEM, STAGE, "Out of memory.");
    for (size_t i = 0; i < pool->nslabs && bytes < need; i++) {
        if (pool->slabs[i].live)
            continue;
        uint64_t len = slab_bytes(pool, i);
        g.slabs[g.n++] = (struct grow_slab){i, i * pool->config.slab, len,
                                            (unsigned)((len + TOUCH_PIECE - 1) / TOUCH_PIECE), false};
        bytes += len;
    }

    pthread_mutex_unlock(&pool->lock);
    uint64_t start = bn_now_ns();
    pthread_mutex_init(&g.lock, NULL);
    grow_threads(&g, bytes);
    pthread_mutex_destroy(&g.lock);
    /* What was populated in vain goes back. Slabs that did get registered stay: they are good. */
    for (size_t i = 0; i < g.n; i++)
        if (!g.slabs[i].registered)
            slab_drop(pool, g.slabs[i].index, g.dev, false);
    pthread_mutex_lock(&pool->lock);

    for (size_t i = 0; i < g.n; i++) {
        if (!g.slabs[i].registered)
            continue;
        if (ranges_room(pool, 1) < 0) {
            slab_drop(pool, g.slabs[i].index, g.dev, true);
            grow_fail(&g, bn_error_set(&g.err, ENOMEM, STAGE, "Out of memory."));
            continue;
        }
        pool->slabs[g.slabs[i].index] = (struct slab){true, g.dev};
        range_add(pool, g.slabs[i].off, g.slabs[i].bytes);
        pool->registered += g.slabs[i].bytes;
        pool->stats.grown_bytes += g.slabs[i].bytes;
    }
    pool->stats.touch_ns += g.touch_ns;
    pool->stats.register_ns += g.register_ns;
    pool->stats.grow_ns += bn_now_ns() - start;
    free(g.slabs);
    if (g.result < 0)
        return bn_error_set(err, g.result, STAGE, "%s", g.err.text);
    return 0;
}

/* Until `bytes` are free. With the lock held, and so on return. */
static int ensure_free(struct bn_pool *pool, uint64_t bytes, struct bn_error *err)
{
    while (pool->registered - pool->used < bytes) {
        if (pool->growing) {
            pthread_cond_wait(&pool->grown, &pool->lock);
            continue;
        }
        if (bytes > pool->length - pool->used)
            return bn_error_set(err, ENOMEM, STAGE,
                                "%llu MiB of pinned host memory are needed, and of the limit of %llu MiB "
                                "%llu are in use. Raise it (bennud's --host-limit), resume something, or "
                                "suspend to the disk.",
                                MIB(bytes), MIB(pool->length), MIB(pool->used));
        pool->growing = true;
        int r = grow(pool, bytes - (pool->registered - pool->used), err);
        pool->growing = false;
        pthread_cond_broadcast(&pool->grown);
        if (r < 0)
            return r;
    }
    return 0;
}

/* ---- Public -------------------------------------------------------------------------------------------- */

static int pool_map(struct bn_pool *pool, struct bn_error *err)
{
    pool->fd = (int)syscall(SYS_memfd_create, "bennu-pool", MFD_CLOEXEC);
    if (pool->fd < 0)
        return bn_error_set(err, errno, STAGE, "memfd_create: %s.", strerror(errno));
    if (ftruncate(pool->fd, (off_t)pool->length) < 0)
        return bn_error_set(err, errno, STAGE, "A memfd of %llu MiB cannot be made: %s.", MIB(pool->length),
                            strerror(errno));
    void *p = mmap(NULL, pool->length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, pool->fd, 0);
    if (p == MAP_FAILED)
        return bn_error_set(err, errno, STAGE, "%llu MiB cannot be mapped: %s.", MIB(pool->length),
                            strerror(errno));
    pool->base = p;
    /* Hints: larger pages where the machine allows them for shared memory; nothing of this in children or
     * core files. */
    madvise(p, pool->length, MADV_HUGEPAGE);
    madvise(p, pool->length, MADV_DONTFORK);
    madvise(p, pool->length, MADV_DONTDUMP);
    return 0;
}

int bn_pool_new(struct bn_gpu *gpu, const struct bn_pool_config *config, struct bn_pool **out,
                struct bn_error *err)
{
    struct bn_pool *pool = calloc(1, sizeof(*pool));
    if (!pool)
        return bn_error_set(err, ENOMEM, STAGE, "Out of memory.");
    pool->gpu = gpu;
    pool->config = *config;
    pool->fd = -1;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->grown, NULL);
    if (!pool->config.slab)
        pool->config.slab = SLAB_DEFAULT;
    if (!pool->config.threads)
        pool->config.threads = bn_cores(16);

    uint64_t physical = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    pool->length = config->limit && config->limit < physical ? config->limit : physical;
    pool->length -= pool->length % BN_GPU_CHUNK;
    int r = 0;
    if (pool->config.slab % BN_GPU_CHUNK != 0 || pool->length == 0)
        r = bn_error_set(err, EINVAL, STAGE, "A pool of %llu bytes in steps of %llu is not possible.",
                         (unsigned long long)config->limit, (unsigned long long)config->slab);
    if (r == 0) {
        pool->nslabs = (size_t)((pool->length + pool->config.slab - 1) / pool->config.slab);
        pool->slabs = calloc(pool->nslabs, sizeof(*pool->slabs));
        r = pool->slabs ? pool_map(pool, err) : bn_error_set(err, ENOMEM, STAGE, "Out of memory.");
    }
    if (r < 0) {
        bn_pool_free(pool);
        return r;
    }
    *out = pool;
    return 0;
}

void bn_pool_free(struct bn_pool *pool)
{
    if (!pool)
        return;
    for (size_t i = 0; pool->slabs && i < pool->nslabs; i++)
        if (pool->slabs[i].live)
            slab_drop(pool, i, pool->slabs[i].dev, true);
    if (pool->base)
        munmap(pool->base, pool->length);
    bn_close(pool->fd);
    free(pool->slabs);
    free(pool->free);
    pthread_cond_destroy(&pool->grown);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

int bn_pool_reserve(struct bn_pool *pool, uint64_t bytes, struct bn_error *err)
{
    int r = 0;
    pthread_mutex_lock(&pool->lock);
    if (bytes > pool->length)
        bytes = pool->length;
    if (bytes > pool->used)
        r = ensure_free(pool, bytes - pool->used, err);
    pthread_mutex_unlock(&pool->lock);
    return r;
}

/* The free range that covers all of slab i, or nfree. */
static size_t covering(const struct bn_pool *pool, size_t i)
{
    uint64_t off = i * pool->config.slab, len = slab_bytes(pool, i);
    for (size_t k = 0; k < pool->nfree; k++)
        if (pool->free[k].off <= off && off + len <= pool->free[k].off + pool->free[k].len)
            return k;
    return pool->nfree;
}

void bn_pool_trim(struct bn_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    while (pool->growing)
        pthread_cond_wait(&pool->grown, &pool->lock);
    pool->growing = true; /* shrinking, this time: it takes a while and needs to be alone, too */
    for (size_t i = pool->nslabs; i-- > 0;) {
        uint64_t len = slab_bytes(pool, i);
        if (!pool->slabs[i].live || pool->registered < len || pool->registered - len < pool->config.keep)
            continue;
        size_t k = covering(pool, i);
        if (k == pool->nfree || ranges_room(pool, 1) < 0)
            continue;
        range_cut(pool, k, i * pool->config.slab, len);
        pool->registered -= len;
        pthread_mutex_unlock(&pool->lock);
        slab_drop(pool, i, pool->slabs[i].dev, true);
        pthread_mutex_lock(&pool->lock);
        pool->slabs[i].live = false;
    }
    pool->growing = false;
    pthread_cond_broadcast(&pool->grown);
    pthread_mutex_unlock(&pool->lock);
}

void bn_pool_stats(struct bn_pool *pool, struct bn_pool_stats *stats)
{
    pthread_mutex_lock(&pool->lock);
    *stats = pool->stats;
    stats->limit = pool->length;
    stats->registered = pool->registered;
    stats->used = pool->used;
    pthread_mutex_unlock(&pool->lock);
}

int bn_pool_fd(const struct bn_pool *pool)
{
    return pool->fd;
}

/* Cut `bytes` out of the free ranges. With the lock held and enough free. */
static int take(struct bn_pool *pool, uint64_t bytes, struct bn_mem **out)
{
    struct bn_mem *mem = NULL;
    size_t cap = 0;
    uint64_t left = bytes;
    while (left > 0) {
        if (!mem || mem->n == cap) {
            size_t c = cap ? 2 * cap : 4;
            struct bn_mem *m = realloc(mem, sizeof(*m) + c * sizeof(struct range));
            if (!m)
                break;
            if (!mem)
                *m = (struct bn_mem){.pool = pool, .bytes = bytes};
            mem = m;
            cap = c;
        }
        if (ranges_room(pool, mem->n + 1) < 0)
            break;
        size_t i = range_pick(pool, left);
        struct range r = pool->free[i];
        if (r.len > left)
            r.len = left;
        range_cut(pool, i, r.off, r.len); /* from the start of a range: needs no room */
        mem->pieces[mem->n++] = r;
        left -= r.len;
    }
    if (left > 0) { /* every cut left room behind for its return */
        for (size_t i = 0; mem && i < mem->n; i++)
            range_add(pool, mem->pieces[i].off, mem->pieces[i].len);
        free(mem);
        return -ENOMEM;
    }
    pool->pieces_out += mem->n;
    pool->used += bytes;
    *out = mem;
    return 0;
}

int bn_mem_alloc(struct bn_pool *pool, uint64_t bytes, struct bn_mem **out, struct bn_error *err)
{
    uint64_t rounded = (bytes + BN_GPU_CHUNK - 1) / BN_GPU_CHUNK * BN_GPU_CHUNK;
    if (bytes == 0 || rounded < bytes)
        return bn_error_set(err, EINVAL, STAGE, "%llu bytes of pinned memory are not possible.",
                            (unsigned long long)bytes);

    pthread_mutex_lock(&pool->lock);
    int r = ensure_free(pool, rounded, err);
    if (r == 0) {
        r = take(pool, rounded, out);
        if (r < 0)
            bn_error_set(err, r, STAGE, "Out of memory.");
    }
    pthread_mutex_unlock(&pool->lock);
    return r;
}

void bn_mem_free(struct bn_mem *mem)
{
    if (!mem)
        return;
    struct bn_pool *pool = mem->pool;
    pthread_mutex_lock(&pool->lock);
    for (size_t i = 0; i < mem->n; i++)
        range_add(pool, mem->pieces[i].off, mem->pieces[i].len);
    pool->pieces_out -= mem->n;
    pool->used -= mem->bytes;
    pthread_mutex_unlock(&pool->lock);
    free(mem);
}

uint64_t bn_mem_bytes(const struct bn_mem *mem)
{
    return mem->bytes;
}

void *bn_mem_piece(const struct bn_mem *mem, uint64_t off, uint64_t *len, uint64_t *fd_off)
{
    for (size_t i = 0; i < mem->n; i++) {
        const struct range *r = &mem->pieces[i];
        if (off < r->len) {
            if (len)
                *len = r->len - off;
            if (fd_off)
                *fd_off = r->off + off;
            return mem->pool->base + r->off + off;
        }
        off -= r->len;
    }
    return NULL;
}

void *bn_mem_dma_piece(const struct bn_mem *mem, uint64_t off, uint64_t *len)
{
    uint64_t at, slab = mem->pool->config.slab;
    void *p = bn_mem_piece(mem, off, len, &at);
    if (p && *len > slab - at % slab)
        *len = slab - at % slab;
    return p;
}
