/* SPDX-License-Identifier: MIT */

/*
 * Legacy IPC. A handle names the exporter's descriptor of the memory, which the opener takes out of /proc; native
 * memory has no descriptor, so it gets one when it is exported for the first time.
 */

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sim.h"

#define IPC_MAGIC 0x6370696d6973u

struct ipc_handle {
    uint64_t magic, offset, inode;
    int32_t pid, fd;
};

_Static_assert(sizeof(struct ipc_handle) <= CU_IPC_HANDLE_SIZE, "fits the driver's handle");

/* Moves the bytes behind a mapping into a new memfd that stays open. Nothing runs meanwhile. */
static CUresult give_descriptor(struct map *map)
{
    int fd = phys_memfd(sim.physical[map->phys->ordinal], map->r.size);
    CUresult rc = CUDA_SUCCESS;

    if (fd < 0)
        return CUDA_ERROR_OPERATING_SYSTEM;
    pthread_rwlock_wrlock(&sim.maps);
    for (uint64_t at = 0; at < map->r.size && rc == CUDA_SUCCESS;) {
        ssize_t n = pwrite(fd, (const char *)map->r.start + at, map->r.size - at, (off_t)at);

        if (n <= 0)
            rc = CUDA_ERROR_OPERATING_SYSTEM;
        else
            at += (uint64_t)n;
    }
    if (rc == CUDA_SUCCESS && map_mmap(map, fd) < 0)
        rc = CUDA_ERROR_OPERATING_SYSTEM;
    pthread_rwlock_unlock(&sim.maps);
    if (rc == CUDA_SUCCESS)
        map->phys->fd = fd;
    else
        close(fd);
    return rc;
}

SIM_FN(cuIpcGetMemHandle, 0, (CUipcMemHandle * out, CUdeviceptr ptr), (out, ptr))
{
    struct ipc_handle handle = {.magic = IPC_MAGIC, .pid = getpid()};
    struct alloc *alloc;
    struct stat st;

    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    alloc = (struct alloc *)range_find(&sim.allocs, ptr);
    if (!alloc || !alloc->map || alloc->freed || alloc->kind != ALLOC_DEVICE)
        return CUDA_ERROR_INVALID_VALUE; /* VMM memory, stream-ordered memory, the host's */
    if (alloc->map->phys->fd < 0) {
        CUresult rc = give_descriptor(alloc->map);

        if (rc != CUDA_SUCCESS)
            return rc;
    }
    if (fstat(alloc->map->phys->fd, &st) < 0)
        return CUDA_ERROR_OPERATING_SYSTEM;
    handle.fd = alloc->map->phys->fd;
    handle.inode = st.st_ino;
    handle.offset = alloc->r.start - alloc->map->r.start;
    memset(out, 0, sizeof(*out));
    memcpy(out, &handle, sizeof(handle));
    return CUDA_SUCCESS;
}

static CUresult open_descriptor(const struct ipc_handle *handle, int *out, struct stat *st)
{
    char path[64];
    int fd;

    snprintf(path, sizeof(path), "/proc/%d/fd/%d", handle->pid, handle->fd);
    fd = sim_high_fd(open(path, O_RDWR | O_CLOEXEC));
    if (fd < 0)
        return CUDA_ERROR_INVALID_VALUE;
    if (fstat(fd, st) < 0 || st->st_ino != handle->inode || capacity_device_of(fd) < 0 ||
        handle->offset >= (uint64_t)st->st_size) {
        close(fd);
        return CUDA_ERROR_INVALID_VALUE;
    }
    *out = fd;
    return CUDA_SUCCESS;
}

static CUresult map_opened(int fd, uint64_t size, uint64_t inode, struct map **out)
{
    struct phys *phys = calloc(1, sizeof(*phys));
    struct map *map = calloc(1, sizeof(*map));
    uint64_t start = space_reserve(size, SIM_GRANULARITY, 0);
    int ordinal = phys_ordinal(capacity_device_of(fd));

    if (!phys || !map || !start || ordinal < 0)
        goto fail;
    phys->size = size;
    phys->ordinal = ordinal;
    phys->fd = fd;
    phys->imported = true;
    phys->id = inode;
    map->phys = phys;
    map->ipc = true;
    map->r.size = size;
    if (map_place(start, map) < 0)
        goto fail;
    phys->next = sim.physical_list;
    sim.physical_list = phys;
    *out = map;
    return CUDA_SUCCESS;
fail:
    if (start)
        munmap((void *)start, size);
    free(phys);
    free(map);
    return CUDA_ERROR_OUT_OF_MEMORY;
}

SIM_FN(cuIpcOpenMemHandle, 0, (CUdeviceptr * out, CUipcMemHandle opaque, unsigned flags),
       (out, opaque, flags))
{
    struct ipc_handle handle;
    struct sim_ctx *ctx;
    struct map *map = NULL;
    struct stat st;
    int fd;

    memcpy(&handle, &opaque, sizeof(handle));
    if (!out || handle.magic != IPC_MAGIC || flags & ~(unsigned)CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (handle.pid == getpid())
        return CUDA_ERROR_INVALID_CONTEXT; /* not in the process that made it */
    for (size_t i = 0; i < sim.mappings.count && !map; i++) {
        map = (struct map *)sim.mappings.items[i];
        if (!map->ipc || map->phys->id != handle.inode)
            map = NULL;
    }
    if (!map) {
        rc = open_descriptor(&handle, &fd, &st);
        if (rc != CUDA_SUCCESS)
            return rc;
        rc = map_opened(fd, (uint64_t)st.st_size, handle.inode, &map);
        if (rc != CUDA_SUCCESS) {
            close(fd);
            return rc;
        }
    }
    if (handle.offset >= map->r.size)
        return CUDA_ERROR_INVALID_VALUE;
    map->ipc_opens++;
    *out = map->r.start + handle.offset;
    return CUDA_SUCCESS;
}
SIM_ALIAS(cuIpcOpenMemHandle_v2, cuIpcOpenMemHandle);

SIM_FN(cuIpcCloseMemHandle, 0, (CUdeviceptr ptr), (ptr))
{
    struct sim_ctx *ctx;
    struct map *map;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    map = (struct map *)range_find(&sim.mappings, ptr);
    if (!map || !map->ipc)
        return CUDA_ERROR_INVALID_VALUE;
    stream_wait_ctx(ctx);
    map = (struct map *)range_find(&sim.mappings, ptr);
    if (map && map->ipc && --map->ipc_opens == 0)
        map_end(map);
    return CUDA_SUCCESS;
}
