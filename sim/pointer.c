/* SPDX-License-Identifier: MIT */

/* cuPointerGetAttribute: what the driver knows about an address. */

#include <string.h>

#include "sim.h"

struct facts {
    const struct alloc *alloc; /* NULL: VMM memory, an opened handle or a free address */
    const struct map *map;     /* NULL: memory of the host */
};

static struct facts lookup(uint64_t addr)
{
    struct facts f;

    f.alloc = (struct alloc *)range_find(&sim.allocs, addr);
    f.map = f.alloc ? f.alloc->map : (struct map *)range_find(&sim.mappings, addr);
    if (f.map && !f.alloc && !f.map->vmm && !f.map->ipc)
        f.map = NULL; /* between small allocations */
    return f;
}

static void put_int(void *out, int value)
{
    memcpy(out, &value, sizeof(value));
}

static void put_u64(void *out, uint64_t value)
{
    memcpy(out, &value, sizeof(value));
}

static bool is_native(const struct facts *f)
{
    return f->alloc && (f->alloc->kind == ALLOC_DEVICE || f->alloc->kind == ALLOC_GLOBAL);
}

static int ordinal_of(const struct facts *f)
{
    if (f->alloc)
        return f->alloc->ctx->ordinal;
    return f->map->phys->ordinal < 0 ? 0 : f->map->phys->ordinal;
}

static CUresult known(void *out, CUpointer_attribute attribute, uint64_t addr, const struct facts *f)
{
    const struct range *r = f->alloc ? &f->alloc->r : &f->map->r;
    bool device = f->map || f->alloc->kind == ALLOC_MANAGED;

    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
        put_u64(out, f->alloc ? (uint64_t)f->alloc->ctx : 0); /* VMM memory belongs to no context */
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        put_int(out,
                device && !(f->map && f->map->phys->ordinal < 0) ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST);
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: put_u64(out, addr); return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        if (f->map)
            return CUDA_ERROR_INVALID_VALUE;
        put_u64(out, addr);
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS: put_int(out, 0); return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
    case CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID:
        put_u64(out, f->alloc ? f->alloc->id : f->map->phys->id);
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
        put_int(out, f->alloc && f->alloc->kind == ALLOC_MANAGED);
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: put_int(out, ordinal_of(f)); return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE: put_int(out, is_native(f)); return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
    case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR: put_u64(out, r->start); return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
    case CU_POINTER_ATTRIBUTE_MAPPING_SIZE: put_u64(out, r->size); return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MAPPED: put_int(out, 1); return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
        put_u64(out, f->map && f->map->vmm ? f->map->phys->handle_types : 0);
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE:
        put_int(out, is_native(f) || (f->map && f->map->vmm && f->map->phys->rdma));
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
        put_int(out, f->map && f->map->vmm ? f->map->access[ordinal_of(f)]
                                           : CU_POINTER_ATTRIBUTE_ACCESS_FLAG_READWRITE);
        return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE: put_u64(out, 0); return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_IS_HW_DECOMPRESS_CAPABLE: put_int(out, 0); return CUDA_SUCCESS;
    default:
        return attribute == CU_POINTER_ATTRIBUTE_P2P_TOKENS ? CUDA_ERROR_NOT_SUPPORTED
                                                            : CUDA_ERROR_INVALID_VALUE;
    }
}

SIM_FN(cuPointerGetAttribute, 0, (void *out, CUpointer_attribute attribute, CUdeviceptr ptr),
       (out, attribute, ptr))
{
    struct facts f;

    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    f = lookup(ptr);
    if (!f.alloc && !f.map) {
        /* An address range that is only reserved is known as not mapped. */
        struct range *r = range_find(&sim.reservations, ptr);

        if (!r)
            return CUDA_ERROR_INVALID_VALUE;
        if (attribute == CU_POINTER_ATTRIBUTE_MAPPED)
            put_int(out, 0);
        else if (attribute == CU_POINTER_ATTRIBUTE_RANGE_START_ADDR)
            put_u64(out, r->start);
        else if (attribute == CU_POINTER_ATTRIBUTE_RANGE_SIZE)
            put_u64(out, r->size);
        else
            return CUDA_ERROR_INVALID_VALUE;
        return CUDA_SUCCESS;
    }
    return known(out, attribute, ptr, &f);
}

static size_t attribute_size(CUpointer_attribute attribute)
{
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
    case CU_POINTER_ATTRIBUTE_MAPPING_SIZE:
    case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR:
    case CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID: return 8;
    default: return 4;
    }
}

/* Unlike the single form, an address the driver does not know gives zeros and success. */
SIM_FN(cuPointerGetAttributes, 0,
       (unsigned count, CUpointer_attribute *attributes, void **data, CUdeviceptr ptr),
       (count, attributes, data, ptr))
{
    struct facts f;

    if (!attributes || !data || count == 0)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    f = lookup(ptr);
    for (unsigned i = 0; i < count; i++) {
        memset(data[i], 0, attribute_size(attributes[i]));
        if (attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL)
            put_int(data[i], -2);
        if (f.alloc || f.map)
            known(data[i], attributes[i], ptr, &f);
    }
    return CUDA_SUCCESS;
}

SIM_FN(cuPointerSetAttribute, 0, (const void *value, CUpointer_attribute attribute, CUdeviceptr ptr),
       (value, attribute, ptr))
{
    struct facts f;

    if (!value || attribute != CU_POINTER_ATTRIBUTE_SYNC_MEMOPS)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    f = lookup(ptr);
    return f.map ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
