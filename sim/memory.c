/* SPDX-License-Identifier: MIT */

/* Native memory: cuMemAlloc and what is like it. Small pieces share blocks of 2 MiB, as with the real driver. */

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sim.h"

#define SLAB_UNITS (SIM_GRANULARITY / SIM_SMALL_ALIGN)

struct slab_map {
    struct sim_ctx *ctx;
    unsigned used;
    unsigned char taken[SLAB_UNITS];
};

/* ---- Addresses ---- */

uint64_t space_reserve(uint64_t size, uint64_t align, uint64_t hint)
{
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    uint64_t start, aligned;
    void *p;

    if (hint && hint % align == 0) {
        p = mmap((void *)hint, size, PROT_NONE, flags | MAP_FIXED_NOREPLACE, -1, 0);
        if (p != MAP_FAILED && (uint64_t)p == hint)
            return hint;
        if (p != MAP_FAILED)
            munmap(p, size);
    }
    if (size + align < size)
        return 0;
    p = mmap(NULL, size + align, PROT_NONE, flags, -1, 0);
    if (p == MAP_FAILED)
        return 0;
    start = (uint64_t)p;
    aligned = round_up(start, align);
    if (aligned > start)
        munmap(p, aligned - start);
    if (aligned + size < start + size + align)
        munmap((void *)(aligned + size), start + align - aligned);
    return aligned;
}

void space_clear(uint64_t start, uint64_t size)
{
    if (mmap((void *)start, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1,
             0) == MAP_FAILED)
        mprotect((void *)start, size, PROT_NONE);
}

int map_protection(const struct map *map)
{
    int prot = PROT_NONE;

    if (!map->vmm)
        return PROT_READ | PROT_WRITE;
    for (int i = 0; i < SIM_MAX_DEVICES; i++) {
        if (map->access[i] & 1)
            prot |= PROT_READ;
        if (map->access[i] & 2)
            prot |= PROT_WRITE;
    }
    return map->host_access ? PROT_READ | PROT_WRITE : prot;
}

/* Makes the mapping at map->r; no lock, no malloc. */
int map_mmap(const struct map *map, int fd)
{
    void *p = mmap((void *)map->r.start, map->r.size, map_protection(map), MAP_SHARED | MAP_FIXED, fd, 0);

    if (p == MAP_FAILED)
        return -errno;
    madvise(p, map->r.size, MADV_DONTFORK); /* a child has no device memory */
    return 0;
}

int map_place(uint64_t start, struct map *map)
{
    int err;

    map->r.start = start;
    pthread_rwlock_wrlock(&sim.maps);
    err = map_mmap(map, map->phys->fd);
    if (!err)
        err = range_insert(&sim.mappings, &map->r);
    pthread_rwlock_unlock(&sim.maps);
    if (!err)
        map->phys->maps++;
    return err;
}

bool memory_is_device(uint64_t addr)
{
    return range_find(&sim.mappings, addr) || range_find(&sim.reservations, addr);
}

bool memory_is_pinned(uint64_t addr)
{
    struct alloc *alloc = (struct alloc *)range_find(&sim.allocs, addr);

    return alloc && !alloc->map;
}

static bool map_usable(const struct map *map, const struct sim_ctx *ctx, bool write)
{
    unsigned need = write ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ;

    if (!map->vmm)
        return !ctx || map->ipc || map->phys->ordinal == ctx->ordinal || ctx->peers >> map->phys->ordinal & 1;
    if (ctx)
        return (map->access[ctx->ordinal] & need) == need;
    for (int i = 0; i < SIM_MAX_DEVICES; i++)
        if ((map->access[i] & need) == need)
            return true;
    return map->host_access;
}

bool memory_usable(uint64_t start, uint64_t size, const struct sim_ctx *ctx, bool write)
{
    uint64_t end = start + size;

    if (end < start)
        return false;
    if (!memory_is_device(start)) {
        struct alloc *alloc = (struct alloc *)range_find(&sim.allocs, start);

        return alloc && end <= alloc->r.start + alloc->r.size;
    }
    while (start < end) {
        struct map *map = (struct map *)range_find(&sim.mappings, start);

        if (!map || !map_usable(map, ctx, write))
            return false;
        start = map->r.start + map->r.size;
    }
    return true;
}

/* ---- Allocations ---- */

void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

CUresult map_new(int ordinal, uint64_t size, struct map **out)
{
    struct map *map = calloc(1, sizeof(*map));
    struct phys *phys;
    uint64_t start;
    CUresult rc;

    if (!map)
        return CUDA_ERROR_OUT_OF_MEMORY;
    rc = phys_create(ordinal, size, &phys);
    if (rc != CUDA_SUCCESS) {
        free(map);
        return rc;
    }
    phys->native = true;
    map->phys = phys;
    map->r.size = size;
    start = space_reserve(size, SIM_GRANULARITY, 0);
    if (!start || map_place(start, map) < 0) {
        if (start)
            munmap((void *)start, size);
        phys_settle(phys);
        free(map);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    /* The mapping keeps it alive; a descriptor for each allocation would use up the process's. */
    close_fd(&phys->fd);
    *out = map;
    return CUDA_SUCCESS;
}

void map_end(struct map *map)
{
    pthread_rwlock_wrlock(&sim.maps);
    range_remove(&sim.mappings, &map->r);
    munmap((void *)map->r.start, map->r.size);
    pthread_rwlock_unlock(&sim.maps);
    map->phys->maps--;
    phys_settle(map->phys);
    free(map->slab);
    free(map);
}

struct alloc *alloc_new(struct sim_ctx *ctx, enum alloc_kind kind, uint64_t start, uint64_t size)
{
    struct alloc *alloc = calloc(1, sizeof(*alloc));

    if (!alloc)
        return NULL;
    alloc->ctx = ctx;
    alloc->kind = kind;
    alloc->id = sim.next_id++;
    alloc->r.start = start;
    alloc->r.size = size;

    pthread_rwlock_wrlock(&sim.maps);
    int err = range_insert(&sim.allocs, &alloc->r);
    pthread_rwlock_unlock(&sim.maps);

    if (err) {
        free(alloc);
        return NULL;
    }
    return alloc;
}

static void alloc_end(struct alloc *alloc)
{
    pthread_rwlock_wrlock(&sim.maps);
    range_remove(&sim.allocs, &alloc->r);
    pthread_rwlock_unlock(&sim.maps);
    free(alloc);
}

/* A place of `units` in the block, or -1. */
static long slab_find(const struct slab_map *slab, unsigned units)
{
    unsigned run = 0;

    if (slab->used + units > SLAB_UNITS)
        return -1;
    for (unsigned i = 0; i < SLAB_UNITS; i++) {
        run = slab->taken[i] ? 0 : run + 1;
        if (run == units)
            return (long)(i + 1 - units);
    }
    return -1;
}

static CUresult small_place(struct sim_ctx *ctx, unsigned units, struct map **out, uint64_t *start)
{
    struct map *map = NULL;
    long at = -1;

    for (size_t i = 0; i < sim.mappings.count && at < 0; i++) {
        map = (struct map *)sim.mappings.items[i];
        if (map->slab && map->slab->ctx == ctx)
            at = slab_find(map->slab, units);
    }
    if (at < 0) {
        CUresult rc = map_new(ctx->ordinal, SIM_GRANULARITY, &map);

        if (rc != CUDA_SUCCESS)
            return rc;
        map->slab = calloc(1, sizeof(*map->slab));
        if (!map->slab) {
            map_end(map);
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        map->slab->ctx = ctx;
        at = 0;
    }
    memset(map->slab->taken + at, 1, units);
    map->slab->used += units;
    *out = map;
    *start = map->r.start + (uint64_t)at * SIM_SMALL_ALIGN;
    return CUDA_SUCCESS;
}

static void small_drop(struct map *map, uint64_t start, uint64_t size)
{
    unsigned units = (unsigned)(round_up(size, SIM_SMALL_ALIGN) / SIM_SMALL_ALIGN);

    memset(map->slab->taken + (start - map->r.start) / SIM_SMALL_ALIGN, 0, units);
    map->slab->used -= units;
    if (map->slab->used == 0)
        map_end(map);
}

CUresult native_alloc(struct sim_ctx *ctx, uint64_t size, enum alloc_kind kind, uint64_t *out)
{
    bool small = size < SIM_SMALL_LIMIT;
    struct alloc *alloc;
    struct map *map;
    uint64_t start;
    CUresult rc;

    if (ctx->home)
        ctx = ctx->home;
    if (size > sim.memory)
        return CUDA_ERROR_OUT_OF_MEMORY;
    if (small) {
        rc = small_place(ctx, (unsigned)(round_up(size, SIM_SMALL_ALIGN) / SIM_SMALL_ALIGN), &map, &start);
    } else {
        rc = map_new(ctx->ordinal, round_up(size, SIM_GRANULARITY), &map);
        start = rc == CUDA_SUCCESS ? map->r.start : 0;
    }
    if (rc != CUDA_SUCCESS)
        return rc;
    alloc = alloc_new(ctx, kind, start, size);
    if (!alloc) {
        if (small)
            small_drop(map, start, size);
        else
            map_end(map);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    alloc->map = map;
    *out = start;
    return CUDA_SUCCESS;
}

/* Also page-locked and managed memory; what was registered is only forgotten. */
void native_free(struct alloc *alloc)
{
    struct map *map = alloc->map;
    uint64_t start = alloc->r.start, size = alloc->r.size;
    enum alloc_kind kind = alloc->kind;

    alloc_end(alloc);
    if (kind == ALLOC_MANAGED)
        sim.managed--;
    if (kind == ALLOC_HOST || kind == ALLOC_MANAGED)
        munmap((void *)start, round_up(size, 4096));
    else if (map && map->slab)
        small_drop(map, start, size);
    else if (map)
        map_end(map);
}

void memory_drop_ctx(struct sim_ctx *ctx)
{
    for (size_t i = 0; i < sim.allocs.count;) {
        struct alloc *alloc = (struct alloc *)sim.allocs.items[i];

        if (alloc->ctx == ctx)
            native_free(alloc);
        else
            i++;
    }
}

SIM_FN(cuMemAlloc, 0, (CUdeviceptr * out, size_t size), (out, size))
{
    struct sim_ctx *ctx;
    uint64_t start;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (!out || size == 0)
        return CUDA_ERROR_INVALID_VALUE;
    rc = native_alloc(ctx, size, ALLOC_DEVICE, &start);
    if (rc == CUDA_SUCCESS)
        *out = start;
    return rc;
}
SIM_ALIAS(cuMemAlloc_v2, cuMemAlloc);

SIM_FN(cuMemAllocPitch, 0, (CUdeviceptr * out, size_t *pitch, size_t width, size_t height, unsigned element),
       (out, pitch, width, height, element))
{
    struct sim_ctx *ctx;
    uint64_t start, row;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (!out || !pitch || !width || !height || (element != 4 && element != 8 && element != 16) ||
        width > 0x7fffffff)
        return CUDA_ERROR_INVALID_VALUE;
    row = round_up(width, 512);
    if (height > UINT64_MAX / row)
        return CUDA_ERROR_OUT_OF_MEMORY;
    rc = native_alloc(ctx, row * height, ALLOC_DEVICE, &start);
    if (rc == CUDA_SUCCESS) {
        *out = start;
        *pitch = row;
    }
    return rc;
}
SIM_ALIAS(cuMemAllocPitch_v2, cuMemAllocPitch);

/* The allocation that starts at an address and may be freed as one of these kinds. */
static struct alloc *alloc_at(uint64_t start)
{
    struct alloc *alloc = (struct alloc *)range_find(&sim.allocs, start);

    return alloc && alloc->r.start == start ? alloc : NULL;
}

SIM_FN(cuMemFree, 0, (CUdeviceptr ptr), (ptr))
{
    struct sim_ctx *ctx;
    struct alloc *alloc;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS || !ptr)
        return rc;
    alloc = alloc_at(ptr);
    if (!alloc || alloc->freed || alloc->kind > ALLOC_MANAGED)
        return CUDA_ERROR_INVALID_VALUE;
    stream_wait_ctx(alloc->ctx); /* lets go of the lock: look again */
    alloc = alloc_at(ptr);
    if (!alloc || alloc->freed || alloc->kind > ALLOC_MANAGED)
        return CUDA_ERROR_INVALID_VALUE;
    native_free(alloc);
    return ctx->sticky;
}
SIM_ALIAS(cuMemFree_v2, cuMemFree);

SIM_FN(cuMemGetInfo, 0, (size_t * free_bytes, size_t *total), (free_bytes, total))
{
    struct sim_ctx *ctx;
    int physical;

    if (!free_bytes || !total)
        return CUDA_ERROR_INVALID_VALUE;
    {
        SIM_LOCKED();
        CUresult rc = ctx_current(&ctx);

        if (rc != CUDA_SUCCESS)
            return rc;
        physical = sim.physical[ctx->ordinal];
    }
    uint64_t used = capacity_used(physical);

    *total = sim.memory;
    *free_bytes = used < sim.memory ? sim.memory - used : 0;
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuMemGetInfo_v2, cuMemGetInfo);

SIM_FN(cuMemGetAddressRange, 0, (CUdeviceptr * base, size_t *size, CUdeviceptr ptr), (base, size, ptr))
{
    struct sim_ctx *ctx;
    struct range *r;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    r = range_find(&sim.allocs, ptr);
    if (r && ((struct alloc *)r)->kind == ALLOC_REGISTERED)
        r = NULL;
    if (!r) { /* VMM memory and opened handles: the mapping */
        struct map *map = (struct map *)range_find(&sim.mappings, ptr);

        r = map && (map->vmm || map->ipc) ? &map->r : NULL;
    }
    if (!r)
        return CUDA_ERROR_NOT_FOUND;
    if (base)
        *base = r->start;
    if (size)
        *size = r->size;
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuMemGetAddressRange_v2, cuMemGetAddressRange);

/* ---- Stream-ordered ---- */

SIM_FN_STREAM(cuMemAllocAsync, 0, (CUdeviceptr * out, size_t size, CUstream hStream), (out, size, hStream))
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;
    uint64_t start;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc == CUDA_SUCCESS)
        rc = stream_resolve(hStream, ctx, &stream);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (!out || size == 0)
        return CUDA_ERROR_INVALID_VALUE;
    if (stream->capture)
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    rc = native_alloc(ctx, size, ALLOC_ASYNC, &start);
    if (rc == CUDA_ERROR_OUT_OF_MEMORY) { /* what is about to be freed counts */
        stream_wait(stream, stream->queued);
        rc = native_alloc(ctx, size, ALLOC_ASYNC, &start);
    }
    if (rc == CUDA_SUCCESS)
        *out = start;
    return rc;
}

SIM_FN_STREAM(cuMemFreeAsync, 0, (CUdeviceptr ptr, CUstream hStream), (ptr, hStream))
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;
    struct alloc *alloc;
    struct op *op;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc == CUDA_SUCCESS)
        rc = stream_resolve(hStream, ctx, &stream);
    if (rc != CUDA_SUCCESS || !ptr)
        return rc;
    alloc = alloc_at(ptr);
    if (!alloc || alloc->freed || alloc->kind > ALLOC_ASYNC)
        return CUDA_ERROR_INVALID_VALUE;
    op = op_new(OP_FREE, ctx);
    if (!op)
        return CUDA_ERROR_OUT_OF_MEMORY;
    op->free_.alloc = alloc;
    rc = stream_enqueue(stream, op);
    if (rc == CUDA_SUCCESS)
        alloc->freed = true;
    return rc;
}

/* ---- Managed: ordinary memory here. What matters is that a process that has any cannot be checkpointed. ---- */

SIM_FN(cuMemAllocManaged, 0, (CUdeviceptr * out, size_t size, unsigned flags), (out, size, flags))
{
    struct sim_ctx *ctx;
    struct alloc *alloc;
    void *p;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (!out || size == 0 || (flags != CU_MEM_ATTACH_GLOBAL && flags != CU_MEM_ATTACH_HOST))
        return CUDA_ERROR_INVALID_VALUE;
    p = mmap(NULL, round_up(size, 4096), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return CUDA_ERROR_OUT_OF_MEMORY;
    alloc = alloc_new(ctx, ALLOC_MANAGED, (uint64_t)p, size);
    if (!alloc) {
        munmap(p, round_up(size, 4096));
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    sim.managed++;
    *out = (CUdeviceptr)p;
    return CUDA_SUCCESS;
}
