/* Sets of device memory: many handles in one address range.
 *
 * One reservation, one map a block, one cuMemSetAccess over the whole: linear in the number of blocks, and
 * a copy of any length runs across block borders. Handles are kept until the set goes, since a created
 * block is exported only when asked for. */
#include "gpu/driver.h"

#include "base/cleanup.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

struct block {
    CUmemGenericAllocationHandle handle;
    uint64_t offset, size;
    uint32_t flags;
    int fd; /* owned; -1: not exported yet */
};

struct bn_gpu_set {
    struct bn_gpu *gpu;
    unsigned dev;
    size_t count;   /* blocks asked for */
    size_t handles; /* of them: have a handle */
    size_t mapped;  /* of them: are mapped */
    uint64_t bytes;
    CUdeviceptr base;     /* 0: not reserved */
    pthread_mutex_t lock; /* of the exports */
    struct block blocks[];
};

#define MIB(bytes) ((unsigned long long)((bytes) >> 20))

static int set_new(struct bn_gpu *gpu, unsigned dev, const struct bn_gpu_block *blocks, size_t n,
                   const char *stage, struct bn_gpu_set **out, struct bn_error *err)
{
    if (dev >= gpu->count)
        return bn_error_set(err, ENODEV, stage, "There is no GPU %u: the driver shows %u.", dev, gpu->count);
    if (n == 0 || n > (SIZE_MAX - sizeof(struct bn_gpu_set)) / sizeof(struct block))
        return bn_error_set(err, EINVAL, stage, "A set of %zu blocks of GPU memory is not possible.", n);

    struct bn_gpu_set *set = calloc(1, sizeof(*set) + n * sizeof(struct block));
    if (!set)
        return bn_error_set(err, ENOMEM, stage, "Out of memory.");
    pthread_mutex_init(&set->lock, NULL);
    set->gpu = gpu;
    set->dev = dev;
    set->count = n;
    for (size_t i = 0; i < n; i++) {
        uint64_t size = blocks[i].size;
        set->blocks[i] =
            (struct block){.offset = set->bytes, .size = size, .flags = blocks[i].flags, .fd = -1};
        if (size == 0 || size % BN_GPU_CHUNK != 0 || size > (UINT64_C(1) << 47) - set->bytes) {
            bn_gpu_set_free(set);
            return bn_error_set(err, EINVAL, stage,
                                "A block of %llu bytes is not possible: blocks are multiples of 2 MiB.",
                                (unsigned long long)size);
        }
        set->bytes += size;
    }
    *out = set;
    return 0;
}

static CUmemAccessDesc access_of(const struct bn_gpu_set *set)
{
    return (CUmemAccessDesc){
        .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = set->gpu->devices[set->dev].cu},
        .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
}

/* Map every handle and open the range to the device. The context is current. */
static int set_map(struct bn_gpu_set *set, const char *stage, struct bn_error *err)
{
    const struct bn_driver *cu = &set->gpu->cu;
    CUresult r = cu->MemAddressReserve(&set->base, set->bytes, 0, 0, 0);
    if (r != CUDA_SUCCESS) {
        set->base = 0;
        return bn_cuda_fail(err, r, stage, "GPU %u: %llu MiB of addresses cannot be reserved", set->dev,
                            MIB(set->bytes));
    }
    for (; set->mapped < set->count; set->mapped++) {
        const struct block *b = &set->blocks[set->mapped];
        r = cu->MemMap(set->base + b->offset, b->size, 0, b->handle, 0);
        if (r != CUDA_SUCCESS)
            return bn_cuda_fail(err, r, stage, "GPU %u: block %zu (%llu MiB) of %zu cannot be mapped",
                                set->dev, set->mapped, MIB(b->size), set->count);
    }
    CUmemAccessDesc access = access_of(set);
    r = cu->MemSetAccess(set->base, set->bytes, &access, 1);
    if (r != CUDA_SUCCESS)
        return bn_cuda_fail(err, r, stage, "GPU %u: %llu MiB in %zu blocks cannot be made accessible",
                            set->dev, MIB(set->bytes), set->count);
    return 0;
}

int bn_gpu_set_import(struct bn_gpu *gpu, unsigned dev, const struct bn_gpu_block *blocks, size_t n,
                      struct bn_gpu_set **out, struct bn_error *err)
{
    const char *stage = "import";
    struct bn_gpu_set *set;
    int r = set_new(gpu, dev, blocks, n, stage, &set, err);
    if (r < 0)
        return r;
    r = bn_gpu_enter(gpu, dev, stage, err);
    if (r < 0) {
        bn_gpu_set_free(set);
        return r;
    }
    for (; r == 0 && set->handles < n; set->handles++) {
        const struct bn_gpu_block *b = &blocks[set->handles];
        CUresult c = gpu->cu.MemImport(&set->blocks[set->handles].handle, (void *)(uintptr_t)b->fd,
                                       CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
        if (c != CUDA_SUCCESS) {
            r = bn_cuda_fail(err, c, stage,
                             "GPU %u: block %zu (%llu MiB) of %zu cannot be taken from its descriptor", dev,
                             set->handles, MIB(b->size), n);
            break;
        }
    }
    if (r == 0)
        r = set_map(set, stage, err);
    bn_gpu_leave(gpu);
    if (r < 0) {
        bn_gpu_set_free(set);
        return r;
    }
    for (size_t i = 0; i < n; i++)
        set->blocks[i].fd = blocks[i].fd;
    *out = set;
    return 0;
}

static int create_failed(struct bn_gpu_set *set, size_t i, CUresult c, struct bn_error *err)
{
    struct bn_gpu *gpu = set->gpu;
    if (c != CUDA_ERROR_OUT_OF_MEMORY)
        return bn_cuda_fail(err, c, "create", "GPU %u: block %zu (%llu MiB) of %zu cannot be created",
                            set->dev, i, MIB(set->blocks[i].size), set->count);
    size_t free_bytes = 0, total = 0;
    gpu->cu.MemGetInfo(&free_bytes, &total);
    return bn_error_set(err, ENOMEM, "create",
                        "GPU %u (%s) has too little free memory: %llu MiB are needed, %llu MiB were free "
                        "when %llu MiB of them "
                        "were taken. Stop or suspend something on it.",
                        set->dev, gpu->devices[set->dev].info.name, MIB(set->bytes),
                        MIB(free_bytes + set->blocks[i].offset), MIB(set->blocks[i].offset));
}

/* The context is current. */
static int create_all(struct bn_gpu_set *set, struct bn_error *err)
{
    const struct bn_gpu_device *d = &set->gpu->devices[set->dev];
    for (; set->handles < set->count; set->handles++) {
        struct block *b = &set->blocks[set->handles];
        CUmemAllocationProp prop = {
            .type = CU_MEM_ALLOCATION_TYPE_PINNED,
            .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
            .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = d->cu},
        };
        if ((b->flags & BN_GPU_RDMA) && d->info.rdma)
            prop.allocFlags.gpuDirectRDMACapable = 1;
        if ((b->flags & BN_GPU_COMPRESSED) && d->info.compression)
            prop.allocFlags.compressionType = CU_MEM_ALLOCATION_COMP_GENERIC;
        CUresult c = set->gpu->cu.MemCreate(&b->handle, b->size, &prop, 0);
        if (c != CUDA_SUCCESS)
            return create_failed(set, set->handles, c, err);
    }
    return 0;
}

int bn_gpu_set_create(struct bn_gpu *gpu, unsigned dev, const struct bn_gpu_block *blocks, size_t n,
                      struct bn_gpu_set **out, struct bn_error *err)
{
    struct bn_gpu_set *set;
    int r = set_new(gpu, dev, blocks, n, "create", &set, err);
    if (r < 0)
        return r;
    r = bn_gpu_enter(gpu, dev, "create", err);
    if (r == 0) {
        r = create_all(set, err);
        if (r == 0)
            r = set_map(set, "create", err);
        bn_gpu_leave(gpu);
    }
    if (r < 0) {
        bn_gpu_set_free(set);
        return r;
    }
    *out = set;
    return 0;
}

static void set_unmap(struct bn_gpu_set *set)
{
    const struct bn_driver *cu = &set->gpu->cu;
    if (set->mapped > 0) {
        const struct block *last = &set->blocks[set->mapped - 1];
        /* One call covers all mappings of the range; a driver that insists on one at a time gets it so. */
        if (cu->MemUnmap(set->base, last->offset + last->size) != CUDA_SUCCESS)
            for (size_t i = 0; i < set->mapped; i++)
                cu->MemUnmap(set->base + set->blocks[i].offset, set->blocks[i].size);
    }
    for (size_t i = 0; i < set->handles; i++)
        cu->MemRelease(set->blocks[i].handle);
    if (set->base)
        cu->MemAddressFree(set->base, set->bytes);
}

void bn_gpu_set_free(struct bn_gpu_set *set)
{
    if (!set)
        return;
    if (set->handles > 0 || set->base) {
        /* The calls name what they free; should the context be unusable, try without. */
        bool entered = bn_gpu_enter(set->gpu, set->dev, "free", NULL) == 0;
        set_unmap(set);
        if (entered)
            bn_gpu_leave(set->gpu);
    }
    for (size_t i = 0; i < set->count; i++)
        bn_close(set->blocks[i].fd);
    pthread_mutex_destroy(&set->lock);
    free(set);
}

size_t bn_gpu_set_count(const struct bn_gpu_set *set)
{
    return set->count;
}

uint64_t bn_gpu_set_bytes(const struct bn_gpu_set *set)
{
    return set->bytes;
}

unsigned bn_gpu_set_device(const struct bn_gpu_set *set)
{
    return set->dev;
}

uint64_t bn_gpu_set_offset(const struct bn_gpu_set *set, size_t i)
{
    return set->blocks[i].offset;
}

uint64_t bn_gpu_set_size(const struct bn_gpu_set *set, size_t i)
{
    return set->blocks[i].size;
}

uint32_t bn_gpu_set_flags(const struct bn_gpu_set *set, size_t i)
{
    return set->blocks[i].flags;
}

uint64_t bn_gpu_set_ptr(const struct bn_gpu_set *set)
{
    return set->base;
}

/* Ranges behind `from`, one behind the other, to `to`. The context is current. */
static CUresult gather(const struct bn_driver *cu, CUdeviceptr to, CUdeviceptr from,
                       const struct bn_copy_extent *extents, size_t n)
{
    CUstream stream;
    CUresult c = cu->StreamCreate(&stream, CU_STREAM_NON_BLOCKING);
    if (c != CUDA_SUCCESS)
        return c;
    uint64_t at = 0;
    for (size_t i = 0; i < n && c == CUDA_SUCCESS; i++) {
        c = cu->MemcpyDtoDAsync(to + at, from + extents[i].offset, extents[i].bytes, stream);
        at += extents[i].bytes;
    }
    CUresult done = cu->StreamSynchronize(stream); /* after a failure something may still be under way */
    cu->StreamDestroy(stream);
    return c != CUDA_SUCCESS ? c : done;
}

int bn_gpu_set_gather(struct bn_gpu_set *to, const struct bn_gpu_set *from,
                      const struct bn_copy_extent *extents, size_t n, struct bn_error *err)
{
    uint64_t bytes = 0;
    bool fits = to->dev == from->dev;
    for (size_t i = 0; i < n && fits; i++) {
        const struct bn_copy_extent *e = &extents[i];
        fits =
            e->offset <= from->bytes && e->bytes <= from->bytes - e->offset && e->bytes <= to->bytes - bytes;
        bytes += e->bytes;
    }
    if (!fits)
        return bn_error_set(err, EINVAL, "gather",
                            "%zu ranges of %llu MiB on GPU %u do not fit into %llu MiB on GPU %u.", n,
                            MIB(from->bytes), from->dev, MIB(to->bytes), to->dev);
    int r = bn_gpu_enter(to->gpu, to->dev, "gather", err);
    if (r < 0)
        return r;
    CUresult c = gather(&to->gpu->cu, to->base, from->base, extents, n);
    bn_gpu_leave(to->gpu);
    return c == CUDA_SUCCESS
               ? 0
               : bn_cuda_fail(err, c, "gather", "GPU %u: %llu MiB cannot be copied on the device", to->dev,
                              MIB(bytes));
}

/* Map `size` bytes of a handle, for our device, at `at`, a part of a reservation. The context is current. */
static CUresult map_at(const struct bn_gpu_set *set, CUdeviceptr at, uint64_t size,
                       CUmemGenericAllocationHandle handle)
{
    const struct bn_driver *cu = &set->gpu->cu;
    CUmemAccessDesc access = access_of(set);
    CUresult c = cu->MemMap(at, size, 0, handle, 0);
    if (c != CUDA_SUCCESS)
        return c;
    c = cu->MemSetAccess(at, size, &access, 1);
    if (c != CUDA_SUCCESS)
        cu->MemUnmap(at, size);
    return c;
}

/* Copy block `b` to other memory of the same device. The context is current. */
static CUresult copy_block(const struct bn_gpu_set *set, const struct block *b,
                           CUmemGenericAllocationHandle to)
{
    const struct bn_driver *cu = &set->gpu->cu;
    const struct bn_copy_extent whole = {.offset = b->offset, .bytes = b->size};
    CUdeviceptr at;
    CUresult c = cu->MemAddressReserve(&at, b->size, 0, 0, 0);
    if (c != CUDA_SUCCESS)
        return c;
    c = map_at(set, at, b->size, to);
    if (c == CUDA_SUCCESS) {
        c = gather(cu, at, set->base, &whole, 1);
        cu->MemUnmap(at, b->size);
    }
    cu->MemAddressFree(at, b->size);
    return c;
}

/* Put other memory in the place of block `b`. On error the old one is there, if the driver allows. The context is current. */
static CUresult replace_block(struct bn_gpu_set *set, struct block *b, CUmemGenericAllocationHandle with)
{
    CUdeviceptr at = set->base + b->offset;
    CUresult c = set->gpu->cu.MemUnmap(at, b->size);
    if (c != CUDA_SUCCESS)
        return c;
    c = map_at(set, at, b->size, with);
    if (c != CUDA_SUCCESS) {
        map_at(set, at, b->size, b->handle);
        return c;
    }
    set->gpu->cu.MemRelease(b->handle);
    b->handle = with;
    return CUDA_SUCCESS;
}

int bn_gpu_set_swap(struct bn_gpu_set *set, size_t i, int fd, struct bn_error *err)
{
    struct bn_gpu *gpu = set->gpu;
    struct block *b = &set->blocks[i];
    CUmemGenericAllocationHandle handle;
    int r = bn_gpu_enter(gpu, set->dev, "swap", err);
    if (r < 0)
        return r;
    CUresult c = gpu->cu.MemImport(&handle, (void *)(uintptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    if (c == CUDA_SUCCESS) {
        c = copy_block(set, b, handle);
        if (c == CUDA_SUCCESS)
            c = replace_block(set, b, handle);
        if (c != CUDA_SUCCESS)
            gpu->cu.MemRelease(handle);
    }
    bn_gpu_leave(gpu);
    if (c != CUDA_SUCCESS)
        return bn_cuda_fail(err, c, "swap", "GPU %u: block %zu (%llu MiB) cannot be moved to other memory",
                            set->dev, i, MIB(b->size));
    pthread_mutex_lock(&set->lock);
    bn_close(b->fd);
    b->fd = fd;
    pthread_mutex_unlock(&set->lock);
    return 0;
}

int bn_gpu_set_fd(struct bn_gpu_set *set, size_t i, struct bn_error *err)
{
    struct block *b = &set->blocks[i];
    struct bn_gpu *gpu = set->gpu;

    pthread_mutex_lock(&set->lock);
    int r = b->fd;
    if (r < 0 && (r = bn_gpu_enter(gpu, set->dev, "export", err)) == 0) {
        int fd = -1;
        CUresult c = gpu->cu.MemExport(&fd, b->handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
        bn_gpu_leave(gpu);
        if (c != CUDA_SUCCESS) {
            r = bn_cuda_fail(err, c, "export", "GPU %u: block %zu (%llu MiB) cannot be handed over", set->dev,
                             i, MIB(b->size));
        } else {
            fcntl(fd, F_SETFD, FD_CLOEXEC);
            r = b->fd = fd;
        }
    }
    pthread_mutex_unlock(&set->lock);
    return r;
}
