/* SPDX-License-Identifier: MIT */

/* Page-locked memory of the host. Nothing is locked here; the rules are those of the real driver. */

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "sim.h"

static CUresult host_alloc(void **out, size_t size, unsigned flags)
{
    struct sim_ctx *ctx;
    struct alloc *alloc;
    void *p;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (!out || size == 0 || flags & ~7u)
        return CUDA_ERROR_INVALID_VALUE;
    p = mmap(NULL, round_up(size, 4096), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return CUDA_ERROR_OUT_OF_MEMORY;
    alloc = alloc_new(ctx, ALLOC_HOST, (uint64_t)p, size);
    if (!alloc) {
        munmap(p, round_up(size, 4096));
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    alloc->flags = flags | CU_MEMHOSTALLOC_DEVICEMAP;
    *out = p;
    return CUDA_SUCCESS;
}

SIM_FN(cuMemHostAlloc, 0, (void **out, size_t size, unsigned flags), (out, size, flags))
{
    return host_alloc(out, size, flags);
}

SIM_FN(cuMemAllocHost, 0, (void **out, size_t size), (out, size))
{
    return host_alloc(out, size, 0);
}
SIM_ALIAS(cuMemAllocHost_v2, cuMemAllocHost);

SIM_FN(cuMemFreeHost, 0, (void *p), (p))
{
    struct sim_ctx *ctx;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS || !p)
        return rc;
    struct alloc *alloc = (struct alloc *)range_find(&sim.allocs, (uint64_t)p);

    if (!alloc || alloc->r.start != (uint64_t)p || alloc->kind != ALLOC_HOST)
        return CUDA_ERROR_INVALID_VALUE;
    stream_wait_ctx(ctx);
    alloc = (struct alloc *)range_find(&sim.allocs, (uint64_t)p);
    if (!alloc || alloc->r.start != (uint64_t)p || alloc->kind != ALLOC_HOST)
        return CUDA_ERROR_INVALID_VALUE;
    native_free(alloc);
    return CUDA_SUCCESS;
}

/* A shared mapping of a regular file cannot be registered; tmpfs and memfd can (measured with driver 580). */
static bool line_registrable(const char *perms, unsigned long inode, const char *path)
{
    struct statfs fs;

    if (perms[3] != 's' || inode == 0 || strncmp(path, "/memfd:", 7) == 0 || strncmp(path, "/SYSV", 5) == 0 ||
        strncmp(path, "/dev/zero", 9) == 0)
        return true;
    if (statfs(path, &fs) < 0)
        return strncmp(path, "/dev/shm/", 9) == 0;
    return fs.f_type == TMPFS_MAGIC;
}

static bool registrable(uint64_t start, uint64_t end)
{
    char line[PATH_MAX + 128], perms[8], path[PATH_MAX];
    FILE *maps = fopen("/proc/self/maps", "re");
    bool good = true;

    if (!maps)
        return false;
    while (good && start < end && fgets(line, sizeof(line), maps)) {
        unsigned long from, to, inode = 0;

        path[0] = '\0';
        if (sscanf(line, "%lx-%lx %7s %*x %*x:%*x %lu %4095[^\n]", &from, &to, perms, &inode, path) < 4)
            continue;
        if (to <= start)
            continue;
        if (from > start)
            break; /* a hole */
        good = line_registrable(perms, inode, path);
        start = to;
    }
    fclose(maps);
    return good && start >= end;
}

SIM_FN(cuMemHostRegister, 0, (void *p, size_t size, unsigned flags), (p, size, flags))
{
    struct sim_ctx *ctx;
    struct alloc *alloc;
    uint64_t start = (uint64_t)p;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (!p || size == 0 || flags & ~15u || start + size < start)
        return CUDA_ERROR_INVALID_VALUE;
    if (range_overlaps(&sim.allocs, start, size))
        return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    if (range_overlaps(&sim.mappings, start, size) || range_overlaps(&sim.reservations, start, size) ||
        !registrable(start, start + size))
        return CUDA_ERROR_INVALID_VALUE;
    alloc = alloc_new(ctx, ALLOC_REGISTERED, start, size);
    if (!alloc)
        return CUDA_ERROR_OUT_OF_MEMORY;
    alloc->flags = flags | CU_MEMHOSTREGISTER_DEVICEMAP;
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuMemHostRegister_v2, cuMemHostRegister);

SIM_FN(cuMemHostUnregister, 0, (void *p), (p))
{
    struct sim_ctx *ctx;
    struct alloc *alloc;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    stream_wait_ctx(ctx);
    alloc = (struct alloc *)range_find(&sim.allocs, (uint64_t)p);
    if (!alloc || alloc->kind != ALLOC_REGISTERED || alloc->r.start != (uint64_t)p)
        return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    native_free(alloc);
    return CUDA_SUCCESS;
}

SIM_FN(cuMemHostGetDevicePointer, 0, (CUdeviceptr * out, void *p, unsigned flags), (out, p, flags))
{
    struct sim_ctx *ctx;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (!out || flags || !memory_is_pinned((uint64_t)p))
        return CUDA_ERROR_INVALID_VALUE;
    *out = (CUdeviceptr)p;
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuMemHostGetDevicePointer_v2, cuMemHostGetDevicePointer);

SIM_FN(cuMemHostGetFlags, 0, (unsigned *out, void *p), (out, p))
{
    struct sim_ctx *ctx;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);
    struct alloc *alloc = (struct alloc *)range_find(&sim.allocs, (uint64_t)p);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (!out || !alloc || alloc->kind != ALLOC_HOST)
        return CUDA_ERROR_INVALID_VALUE;
    *out = alloc->flags;
    return CUDA_SUCCESS;
}
