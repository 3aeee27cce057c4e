/* SPDX-License-Identifier: MIT */

/* Virtual memory management: addresses and physical memory apart. */

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sim.h"

static CUresult check_prop(const CUmemAllocationProp *prop)
{
    if (!prop || prop->type != CU_MEM_ALLOCATION_TYPE_PINNED)
        return CUDA_ERROR_INVALID_VALUE;
    if (prop->requestedHandleTypes & ~(unsigned)CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
        return prop->requestedHandleTypes & CU_MEM_HANDLE_TYPE_FABRIC ? CUDA_ERROR_NOT_PERMITTED
                                                                      : CUDA_ERROR_NOT_SUPPORTED;
    switch (prop->location.type) {
    case CU_MEM_LOCATION_TYPE_DEVICE:
        return ordinal_valid(prop->location.id) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
    case CU_MEM_LOCATION_TYPE_HOST:
    case CU_MEM_LOCATION_TYPE_HOST_NUMA:
    case CU_MEM_LOCATION_TYPE_HOST_NUMA_CURRENT: return CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}

SIM_FN(cuMemGetAllocationGranularity, 0,
       (size_t * out, const CUmemAllocationProp *prop, CUmemAllocationGranularity_flags option),
       (out, prop, option))
{
    CUresult rc = check_prop(prop);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (!out ||
        (option != CU_MEM_ALLOC_GRANULARITY_MINIMUM && option != CU_MEM_ALLOC_GRANULARITY_RECOMMENDED))
        return CUDA_ERROR_INVALID_VALUE;
    *out = SIM_GRANULARITY;
    return CUDA_SUCCESS;
}

/* ---- Addresses ---- */

SIM_FN(cuMemAddressReserve, 0,
       (CUdeviceptr * out, size_t size, size_t align, CUdeviceptr addr, unsigned long long flags),
       (out, size, align, addr, flags))
{
    struct reservation *r;

    if (!out || size == 0 || size % SIM_GRANULARITY || flags || (align & (align - 1)))
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    r = calloc(1, sizeof(*r));
    if (!r)
        return CUDA_ERROR_OUT_OF_MEMORY;
    r->r.size = size;
    r->r.start = space_reserve(size, align > SIM_GRANULARITY ? align : SIM_GRANULARITY, addr);
    if (!r->r.start) {
        free(r);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    pthread_rwlock_wrlock(&sim.maps);
    int err = range_insert(&sim.reservations, &r->r);
    pthread_rwlock_unlock(&sim.maps);
    if (err) {
        munmap((void *)r->r.start, size);
        free(r);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    *out = r->r.start;
    return CUDA_SUCCESS;
}

SIM_FN(cuMemAddressFree, 0, (CUdeviceptr ptr, size_t size), (ptr, size))
{
    struct range *r;

    SIM_LOCKED();
    r = range_find(&sim.reservations, ptr);
    if (!r || r->start != ptr || r->size != size || range_overlaps(&sim.mappings, ptr, size))
        return CUDA_ERROR_INVALID_VALUE;
    pthread_rwlock_wrlock(&sim.maps);
    range_remove(&sim.reservations, r);
    munmap((void *)ptr, size);
    pthread_rwlock_unlock(&sim.maps);
    free(r);
    return CUDA_SUCCESS;
}

/* ---- Physical memory ---- */

SIM_FN(cuMemCreate, 0,
       (CUmemGenericAllocationHandle * out, size_t size, const CUmemAllocationProp *prop,
        unsigned long long flags),
       (out, size, prop, flags))
{
    struct phys *phys;
    CUresult rc = check_prop(prop);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (!out || size == 0 || size % SIM_GRANULARITY || flags)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    rc =
        phys_create(prop->location.type == CU_MEM_LOCATION_TYPE_DEVICE ? prop->location.id : -1, size, &phys);
    if (rc != CUDA_SUCCESS)
        return rc;
    phys->handle_types = prop->requestedHandleTypes;
    phys->rdma = prop->allocFlags.gpuDirectRDMACapable;
    phys->compression = prop->allocFlags.compressionType;
    phys->usage = prop->allocFlags.usage;
    phys->handles = 1;
    *out = phys->id;
    return CUDA_SUCCESS;
}

SIM_FN(cuMemRelease, 0, (CUmemGenericAllocationHandle handle), (handle))
{
    struct phys *phys;

    SIM_LOCKED();
    phys = phys_by_id(handle);
    if (!phys)
        return CUDA_ERROR_INVALID_VALUE;
    phys->handles--;
    phys_settle(phys);
    return CUDA_SUCCESS;
}

SIM_FN(cuMemRetainAllocationHandle, 0, (CUmemGenericAllocationHandle * out, void *addr), (out, addr))
{
    struct map *map;

    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    map = (struct map *)range_find(&sim.mappings, (uint64_t)addr);
    if (!map || !map->vmm)
        return CUDA_ERROR_INVALID_VALUE;
    map->phys->handles++;
    *out = map->phys->id;
    return CUDA_SUCCESS;
}

SIM_FN(cuMemGetAllocationPropertiesFromHandle, 0,
       (CUmemAllocationProp * prop, CUmemGenericAllocationHandle handle), (prop, handle))
{
    struct phys *phys;

    if (!prop)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    phys = phys_by_id(handle);
    if (!phys)
        return CUDA_ERROR_INVALID_VALUE;
    memset(prop, 0, sizeof(*prop));
    prop->type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop->requestedHandleTypes = (CUmemAllocationHandleType)phys->handle_types;
    prop->location.type = phys->ordinal < 0 ? CU_MEM_LOCATION_TYPE_HOST_NUMA : CU_MEM_LOCATION_TYPE_DEVICE;
    prop->location.id = phys->ordinal < 0 ? 0 : phys->ordinal;
    prop->allocFlags.gpuDirectRDMACapable = phys->rdma;
    prop->allocFlags.compressionType = phys->compression;
    prop->allocFlags.usage = phys->usage;
    return CUDA_SUCCESS;
}

SIM_FN(cuMemExportToShareableHandle, 0,
       (void *out, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType type,
        unsigned long long flags),
       (out, handle, type, flags))
{
    struct phys *phys;
    int fd;

    if (!out || flags || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    phys = phys_by_id(handle);
    /* An imported handle cannot be exported again, and one that was created without the type cannot at all. */
    if (!phys || phys->imported || !(phys->handle_types & type))
        return CUDA_ERROR_INVALID_VALUE;
    fd = fcntl(phys->fd, F_DUPFD_CLOEXEC, 3);
    if (fd < 0)
        return CUDA_ERROR_OPERATING_SYSTEM;
    *(int *)out = fd;
    return CUDA_SUCCESS;
}

static bool shown_at_init(int physical)
{
    for (int i = 0; i < sim.devices; i++)
        if (sim.shown[i] == physical)
            return true;
    return false;
}

SIM_FN(cuMemImportFromShareableHandle, 0,
       (CUmemGenericAllocationHandle * out, void *os_handle, CUmemAllocationHandleType type),
       (out, os_handle, type))
{
    int fd = (int)(intptr_t)os_handle, physical, ordinal;
    struct phys *phys;
    struct stat st;

    if (!out || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    physical = capacity_device_of(fd);
    if (physical < 0 || fstat(fd, &st) < 0 || st.st_size <= 0 || st.st_size % (off_t)SIM_GRANULARITY)
        return CUDA_ERROR_INVALID_VALUE;
    /* A process that a restore has brought to a device that it was not shown at cuInit can never import memory of it, its own
     * included; it can create and export some. (As measured with driver 580 on two H200.) */
    if (!shown_at_init(physical))
        return device_files() == sim.machine_devices ? CUDA_ERROR_NOT_INITIALIZED : CUDA_ERROR_INVALID_DEVICE;
    ordinal = phys_ordinal(physical);
    if (ordinal < 0)
        return CUDA_ERROR_INVALID_DEVICE;
    phys = calloc(1, sizeof(*phys));
    if (!phys)
        return CUDA_ERROR_OUT_OF_MEMORY;
    phys->fd = sim_high_fd(fcntl(fd, F_DUPFD_CLOEXEC, 3));
    if (phys->fd < 0) {
        free(phys);
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
    phys->size = (uint64_t)st.st_size;
    phys->ordinal = ordinal;
    phys->imported = true;
    phys->handle_types = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    phys->handles = 1;
    phys->id = sim.next_id++;
    phys->next = sim.physical_list;
    sim.physical_list = phys;
    *out = phys->id;
    return CUDA_SUCCESS;
}

/* ---- Mapping ---- */

SIM_FN(cuMemMap, 0,
       (CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
        unsigned long long flags),
       (ptr, size, offset, handle, flags))
{
    struct phys *phys;
    struct range *r;
    struct map *map;

    if (offset || flags || size == 0 || size % SIM_GRANULARITY || ptr % SIM_GRANULARITY || ptr + size < ptr)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    phys = phys_by_id(handle);
    r = range_find(&sim.reservations, ptr);
    if (!phys || size > phys->size || !r || ptr + size > r->start + r->size ||
        range_overlaps(&sim.mappings, ptr, size))
        return CUDA_ERROR_INVALID_VALUE;
    map = calloc(1, sizeof(*map));
    if (!map)
        return CUDA_ERROR_OUT_OF_MEMORY;
    map->r.size = size;
    map->vmm = true;
    map->phys = phys;
    if (map_place(ptr, map) < 0) {
        space_clear(ptr, size);
        free(map);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    return CUDA_SUCCESS;
}

/* Whether [start, start + size) is made of whole mappings without a hole. */
static bool whole_mappings(uint64_t start, uint64_t size)
{
    uint64_t at = start, end = start + size;

    if (size == 0 || end < start)
        return false;
    while (at < end) {
        struct map *map = (struct map *)range_find(&sim.mappings, at);

        if (!map || !map->vmm || map->r.start != at)
            return false;
        at += map->r.size;
    }
    return at == end;
}

SIM_FN(cuMemUnmap, 0, (CUdeviceptr ptr, size_t size), (ptr, size))
{
    uint64_t at = ptr;

    SIM_LOCKED();
    if (!whole_mappings(ptr, size))
        return CUDA_ERROR_INVALID_VALUE;
    pthread_rwlock_wrlock(&sim.maps);
    space_clear(ptr, size);
    while (at < ptr + size) {
        struct map *map = (struct map *)range_find(&sim.mappings, at);

        at += map->r.size;
        range_remove(&sim.mappings, &map->r);
        map->phys->maps--;
        phys_settle(map->phys);
        free(map);
    }
    pthread_rwlock_unlock(&sim.maps);
    return CUDA_SUCCESS;
}

static bool access_valid(const CUmemAccessDesc *desc)
{
    if (desc->flags != CU_MEM_ACCESS_FLAGS_PROT_NONE && desc->flags != CU_MEM_ACCESS_FLAGS_PROT_READ &&
        desc->flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
        return false;
    if (desc->location.type == CU_MEM_LOCATION_TYPE_DEVICE)
        return ordinal_valid(desc->location.id);
    return desc->location.type == CU_MEM_LOCATION_TYPE_HOST ||
           desc->location.type == CU_MEM_LOCATION_TYPE_HOST_NUMA;
}

SIM_FN(cuMemSetAccess, 0, (CUdeviceptr ptr, size_t size, const CUmemAccessDesc *desc, size_t count),
       (ptr, size, desc, count))
{
    if (!desc || count == 0)
        return CUDA_ERROR_INVALID_VALUE;
    for (size_t i = 0; i < count; i++)
        if (!access_valid(&desc[i]))
            return desc[i].location.type == CU_MEM_LOCATION_TYPE_DEVICE && !ordinal_valid(desc[i].location.id)
                       ? CUDA_ERROR_INVALID_DEVICE
                       : CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    if (!whole_mappings(ptr, size))
        return CUDA_ERROR_INVALID_VALUE;
    pthread_rwlock_wrlock(&sim.maps);
    for (uint64_t at = ptr; at < ptr + size;) {
        struct map *map = (struct map *)range_find(&sim.mappings, at);

        for (size_t i = 0; i < count; i++) { /* other locations keep what they have */
            if (desc[i].location.type == CU_MEM_LOCATION_TYPE_DEVICE)
                map->access[desc[i].location.id] = (unsigned char)desc[i].flags;
            else if (map->phys->ordinal < 0)
                map->host_access = desc[i].flags != CU_MEM_ACCESS_FLAGS_PROT_NONE;
        }
        mprotect((void *)map->r.start, map->r.size, map_protection(map));
        at += map->r.size;
    }
    pthread_rwlock_unlock(&sim.maps);
    return CUDA_SUCCESS;
}

SIM_FN(cuMemGetAccess, 0, (unsigned long long *flags, const CUmemLocation *location, CUdeviceptr ptr),
       (flags, location, ptr))
{
    struct map *map;

    if (!flags || !location)
        return CUDA_ERROR_INVALID_VALUE;
    if (location->type == CU_MEM_LOCATION_TYPE_DEVICE && !ordinal_valid(location->id))
        return CUDA_ERROR_INVALID_DEVICE;
    SIM_LOCKED();
    map = (struct map *)range_find(&sim.mappings, ptr);
    if (!map || !map->vmm)
        return CUDA_ERROR_INVALID_VALUE;
    if (location->type == CU_MEM_LOCATION_TYPE_DEVICE)
        *flags = map->access[location->id];
    else
        *flags = map->host_access ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_NONE;
    return CUDA_SUCCESS;
}
