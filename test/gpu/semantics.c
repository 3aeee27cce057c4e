/* SPDX-License-Identifier: MIT */
/*
 * Asks the driver many questions about allocations and prints every answer, without anything that differs from run to run. Run with
 * and without the agent the answers must be the same: test/gpu/harness.py compares them.
 */
#include "driver.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)

static CUdevice device;
static CUcontext ctx;

static void say(const char *what, CUresult r)
{
    printf("%-58s %d\n", what, (int)r);
    fflush(stdout);
}
/* The call itself, as text, and what it returned. */
#define ASK(call) say(#call, call)

static void number(const char *what, unsigned long long n)
{
    printf("%-58s = %llu\n", what, n);
    fflush(stdout);
}

static void numbered(const char *what, size_t arg, CUresult r, unsigned long long n)
{
    printf("%s(%zu) -> %d, %llu\n", what, arg, (int)r, n);
    fflush(stdout);
}

/* The largest power of two up to 2 MiB that divides p. */
static unsigned long long alignment(CUdeviceptr p)
{
    for (unsigned long long a = 2 * MIB; a > 1; a /= 2)
        if (p % a == 0)
            return a;
    return 1;
}

static void section(const char *name)
{
    printf("\n== %s\n", name);
}

/* ---- sizes ---- */

static const size_t sizes[] = {
    1,       4,           255,          256,         257,           511,          512,
    513,     4095,        4096,         65535,       65536,         MIB - 1,      MIB,
    MIB + 1, 2 * MIB - 1, 2 * MIB,      2 * MIB + 1, 3 * MIB,       4 * MIB - 17, 5 * MIB + 3,
    8 * MIB, 31 * MIB,    32 * MIB + 1, 100 * MIB,   128 * MIB + 7, 256 * MIB};
#define N_SIZES (sizeof(sizes) / sizeof(sizes[0]))

static void ask_sizes(void)
{
    section("allocation, range, free, by size");
    for (size_t i = 0; i < N_SIZES; i++) {
        CUdeviceptr p = 0, base = 0;
        size_t n = 0;
        CUresult r = cuMemAlloc_v2(&p, sizes[i]);
        numbered("cuMemAlloc", sizes[i], r, alignment(p) >= 256);
        if (r)
            continue;
        r = cuMemGetAddressRange_v2(&base, &n, p);
        numbered("  range at the start", n, r, p - base);
        r = cuMemGetAddressRange_v2(&base, &n, p + sizes[i] / 2);
        numbered("  range in the middle", n, r, p - base);
        r = cuMemGetAddressRange_v2(&base, &n, p + sizes[i] - 1);
        numbered("  range at the last byte", n, r, p - base);
        ASK(cuMemsetD8_v2(p, 1, sizes[i]));
        if (sizes[i] > 1)
            ASK(cuMemFree_v2(p + 1));
        if (sizes[i] > 256)
            ASK(cuMemFree_v2(p + 256));
        ASK(cuMemFree_v2(p));
        ASK(cuMemFree_v2(p));
    }
}

static void ask_pitches(void)
{
    static const size_t widths[] = {1,     3,     4,     16,     31,     64,   100,    127,
                                    128,   129,   255,   256,    500,    511,  512,    513,
                                    1000,  1024,  1025,  2000,   4095,   4096, 4097,   10000,
                                    65535, 65536, 65537, 100000, 131072, MIB,  MIB + 1};
    static const size_t heights[] = {1, 2, 3, 7, 64, 100, 1000};
    static const unsigned elements[] = {4, 8, 16};
    section("pitches");
    for (size_t w = 0; w < sizeof(widths) / sizeof(widths[0]); w++)
        for (size_t h = 0; h < sizeof(heights) / sizeof(heights[0]); h++)
            for (size_t e = 0; e < 3; e++) {
                CUdeviceptr p = 0, base = 0;
                size_t pitch = 0, n = 0;
                CUresult r = cuMemAllocPitch_v2(&p, &pitch, widths[w], heights[h], elements[e]);
                printf("pitch(%zu, %zu, %u) -> %d, %zu", widths[w], heights[h], elements[e], (int)r, pitch);
                if (r == 0) {
                    r = cuMemGetAddressRange_v2(&base, &n, p);
                    printf(", range %d %zu %llu", (int)r, n, p - base);
                    printf(", free %d", (int)cuMemFree_v2(p));
                }
                putchar('\n');
            }
    CUdeviceptr p;
    size_t pitch;
    ASK(cuMemAllocPitch_v2(&p, &pitch, 0, 1, 4));
    ASK(cuMemAllocPitch_v2(&p, &pitch, 1, 0, 4));
    ASK(cuMemAllocPitch_v2(&p, &pitch, 100, 1, 3));
    ASK(cuMemAllocPitch_v2(&p, &pitch, 100, 1, 0));
    ASK(cuMemAllocPitch_v2(&p, &pitch, 100, 1, 32));
    ASK(cuMemAllocPitch_v2(&p, &pitch, (size_t)1 << 40, 1, 4));
    ASK(cuMemAllocPitch_v2(&p, &pitch, 1 << 20, (size_t)1 << 30, 4));
}

/* ---- wrong calls ---- */

static void ask_errors(void)
{
    CUdeviceptr p = 0, base;
    size_t n;
    int host = 0;
    section("wrong arguments");
    ASK(cuMemAlloc_v2(&p, 0));
    ASK(cuMemAlloc_v2(&p, (size_t)1 << 44));
    ASK(cuMemAlloc_v2(&p, SIZE_MAX));
    ASK(cuMemAlloc_v2(&p, SIZE_MAX - 2 * MIB));
    ASK(cuMemFree_v2(0));
    ASK(cuMemFree_v2(1));
    ASK(cuMemFree_v2(0x1000));
    ASK(cuMemFree_v2((CUdeviceptr)(uintptr_t)&host));
    ASK(cuMemFree_v2(~0ull));
    ASK(cuMemGetAddressRange_v2(&base, &n, 0));
    ASK(cuMemGetAddressRange_v2(&base, &n, 1));
    ASK(cuMemGetAddressRange_v2(&base, &n, (CUdeviceptr)(uintptr_t)&host));
    for (size_t size = 64 << 10; size <= 64 * MIB; size *= 32) {
        printf("-- of %zu bytes\n", size);
        ASK(cuMemAlloc_v2(&p, size));
        ASK(cuMemGetAddressRange_v2(NULL, &n, p));
        ASK(cuMemGetAddressRange_v2(&base, NULL, p));
        ASK(cuMemFree_v2(p + size / 2));
        ASK(cuMemFree_v2(p + size));
        ASK(cuMemUnmap(p, size));
        ASK(cuMemUnmap(p, 2 * MIB));
        ASK(cuMemAddressFree(p, size));
        ASK(cuMemcpyHtoD_v2(p, &host, 4));
        ASK(cuMemFreeHost((void *)(uintptr_t)p));
        CUmemGenericAllocationHandle handle = 0;
        ASK(cuMemRetainAllocationHandle(&handle, (void *)(uintptr_t)p));
        unsigned long long flags = 0;
        CUmemLocation here = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
        ASK(cuMemGetAccess(&flags, &here, p));
        ASK(cuMemFree_v2(p));
        ASK(cuMemGetAddressRange_v2(&base, &n, p));
        ASK(cuMemFree_v2(p));
    }
}

/* ---- pointer attributes ---- */

/* Those that every driver from 12.0 on knows, by number: enum CUpointer_attribute in the driver API's reference. */
enum {
    ATTR_CONTEXT = 1,
    ATTR_MEMORY_TYPE,
    ATTR_DEVICE_POINTER,
    ATTR_HOST_POINTER,
    ATTR_P2P_TOKENS,
    ATTR_SYNC_MEMOPS,
    ATTR_BUFFER_ID,
    ATTR_IS_MANAGED,
    ATTR_DEVICE_ORDINAL,
    ATTR_IS_LEGACY_IPC,
    ATTR_RANGE_START,
    ATTR_RANGE_SIZE,
    ATTR_MAPPED,
    ATTR_HANDLE_TYPES,
    ATTR_GPUDIRECT_RDMA,
    ATTR_ACCESS_FLAGS,
    ATTR_MEMPOOL,
    ATTR_MAPPING_SIZE,
    ATTR_MAPPING_BASE,
    ATTR_MEMORY_BLOCK
};

static void ask_attribute(const char *kind, CUdeviceptr p, CUdeviceptr start, int attribute, uint64_t *id)
{
    uint64_t value[4] = {0};
    CUresult r = cuPointerGetAttribute(value, attribute, p);
    unsigned long long v = value[0];
    switch (attribute) {
    case ATTR_CONTEXT: v = (CUcontext)(uintptr_t)value[0] == ctx ? 1 : value[0] != 0 ? 2 : 0; break;
    case ATTR_DEVICE_POINTER:
    case ATTR_HOST_POINTER:
    case ATTR_RANGE_START:
    case ATTR_MAPPING_BASE: v = value[0] == 0 ? 0 : value[0] - start + 1; break;
    case ATTR_BUFFER_ID: *id = value[0], v = value[0] != 0; break;
    case ATTR_P2P_TOKENS:
    case ATTR_MEMPOOL:
    case ATTR_MEMORY_BLOCK: v = value[0] != 0; break;
    case ATTR_MEMORY_TYPE:
    case ATTR_DEVICE_ORDINAL:
    case ATTR_ACCESS_FLAGS: v = (uint32_t)v; break;
    case ATTR_SYNC_MEMOPS:
    case ATTR_IS_MANAGED:
    case ATTR_IS_LEGACY_IPC:
    case ATTR_MAPPED:
    case ATTR_GPUDIRECT_RDMA: v = (uint8_t)v; break;
    default: break;
    }
    printf("%s attribute %d -> %d, %llu\n", kind, attribute, (int)r, v);
}

static void ask_pointer(const char *kind, CUdeviceptr p, CUdeviceptr start)
{
    uint64_t id = 0, again = 0;
    for (int a = ATTR_CONTEXT; a <= ATTR_MEMORY_BLOCK; a++)
        if (a != ATTR_P2P_TOKENS)
            ask_attribute(kind, p, start, a, &id);
    cuPointerGetAttribute(&again, ATTR_BUFFER_ID, p);
    number("  buffer id stays", id == again);
    int names[] = {ATTR_MEMORY_TYPE, ATTR_DEVICE_ORDINAL, ATTR_RANGE_SIZE, ATTR_MAPPED};
    unsigned type = 0;
    int ordinal = 0;
    size_t range = 0;
    unsigned char mapped = 0;
    CUresult r = cuPointerGetAttributes(4, names, (void *[]){&type, &ordinal, &range, &mapped}, p);
    printf("%s four at once -> %d: %u %d %zu %u\n", kind, (int)r, type, ordinal, range, mapped);
}

static void ask_pointers(void)
{
    CUdeviceptr p, pitched;
    size_t pitch;
    void *host;
    static int plain;
    section("pointer attributes");
    static const size_t of[] = {100, 4096, MIB, 2 * MIB, 5 * MIB + 3, 64 * MIB};
    for (size_t i = 0; i < sizeof(of) / sizeof(of[0]); i++) {
        char kind[64];
        if (cuMemAlloc_v2(&p, of[i]) != 0)
            continue;
        snprintf(kind, sizeof(kind), "[%zu bytes, start]", of[i]);
        ask_pointer(kind, p, p);
        snprintf(kind, sizeof(kind), "[%zu bytes, middle]", of[i]);
        ask_pointer(kind, p + of[i] / 2, p);
        int on = 1;
        ASK(cuPointerSetAttribute(&on, ATTR_SYNC_MEMOPS, p));
        ASK(cuMemFree_v2(p));
        snprintf(kind, sizeof(kind), "[%zu bytes, freed]", of[i]);
        uint64_t id;
        ask_attribute(kind, p, p, ATTR_MEMORY_TYPE, &id);
    }
    if (cuMemAllocPitch_v2(&pitched, &pitch, 5000, 1000, 4) == 0) {
        ask_pointer("[pitched]", pitched + pitch, pitched);
        ASK(cuMemFree_v2(pitched));
    }
    if (cuMemHostAlloc(&host, MIB, 0) == 0) {
        ask_pointer("[pinned host]", (CUdeviceptr)(uintptr_t)host, (CUdeviceptr)(uintptr_t)host);
        ASK(cuMemFreeHost(host));
    }
    ask_pointer("[plain host]", (CUdeviceptr)(uintptr_t)&plain, (CUdeviceptr)(uintptr_t)&plain);
    ask_pointer("[null]", 0, 0);
}

/* ---- amounts ---- */

static void ask_amounts(void)
{
    section("cuMemGetInfo");
    static const size_t of[] = {2 * MIB, 4 * MIB, 64 * MIB, 100 * MIB + 1, 1024 * MIB};
    size_t before, after, total, again;
    CUdeviceptr p;
    for (size_t i = 0; i < sizeof(of) / sizeof(of[0]); i++) {
        ASK(cuMemGetInfo_v2(&before, &total));
        CUresult r = cuMemAlloc_v2(&p, of[i]);
        cuMemGetInfo_v2(&after, &again);
        /* In units of 2 MiB and at least the size: what the driver takes besides depends on what it has in hand. */
        numbered("  total stays, at least the size is gone", of[i], r,
                 total == again && before - after >= of[i] / (2 * MIB) * (2 * MIB));
        numbered("  no more than 4 MiB besides is gone", of[i], r, before - after <= of[i] + 4 * MIB);
        cuMemFree_v2(p);
        cuMemGetInfo_v2(&after, &again);
        numbered("  all back", of[i], 0, before == after);
    }
    section("out of memory");
    size_t free_now;
    cuMemGetInfo_v2(&free_now, &total);
    ASK(cuMemAlloc_v2(&p, total));
    ASK(cuMemAlloc_v2(&p, free_now + 64 * MIB));
    size_t pitch;
    ASK(cuMemAllocPitch_v2(&p, &pitch, MIB, total / MIB + 1, 4));
    cuMemGetInfo_v2(&after, &total);
    number("free memory is as before", after == free_now);
    ASK(cuMemAlloc_v2(&p, 16 * MIB));
    ASK(cuMemFree_v2(p));
}

/* ---- many at once ---- */

#define MANY 400
static struct small {
    CUdeviceptr p;
    size_t bytes;
    uint64_t id;
} many[MANY];

static uint64_t id_of(CUdeviceptr p)
{
    uint64_t id = 0;
    return cuPointerGetAttribute(&id, ATTR_BUFFER_ID, p) == 0 ? id : 0;
}

static bool get_small(size_t i)
{
    static const size_t of[] = {2 * MIB, 2 * MIB, 2 * MIB + 5, 4 * MIB,
                                3 * MIB, 2 * MIB, 7 * MIB + 1, 16 * MIB};
    struct small *s = &many[i];
    s->bytes = of[i % (sizeof(of) / sizeof(of[0]))];
    if (cuMemAlloc_v2(&s->p, s->bytes) != 0)
        s->p = 0;
    uint32_t mark = (uint32_t)i;
    return s->p && cuMemcpyHtoD_v2(s->p, &mark, 4) == 0 &&
           cuMemcpyHtoD_v2(s->p + s->bytes - 4, &mark, 4) == 0;
}

static bool marks_right(size_t i)
{
    uint32_t first = ~0u, last = ~0u;
    const struct small *s = &many[i];
    return cuMemcpyDtoH_v2(&first, s->p, 4) == 0 && cuMemcpyDtoH_v2(&last, s->p + s->bytes - 4, 4) == 0 &&
           first == i && last == i;
}

static bool is_range(const struct small *s, size_t at)
{
    CUdeviceptr base = 0, start = 0;
    size_t n = 0, size = 0;
    return cuMemGetAddressRange_v2(&base, &n, s->p + at) == 0 && base == s->p && n == s->bytes &&
           cuPointerGetAttribute(&start, ATTR_RANGE_START, s->p + at) == 0 && start == s->p &&
           cuPointerGetAttribute(&size, ATTR_RANGE_SIZE, s->p + at) == 0 && size == s->bytes;
}

static void ask_live(void)
{
    size_t ranges = 0, bases = 0, mapped = 0, twice = 0, marked = 0, live = 0, synchronous = 0;
    for (size_t i = 0; i < MANY; i++) {
        const struct small *s = &many[i];
        if (!s->p)
            continue;
        CUdeviceptr base = 0;
        size_t size = 0;
        unsigned sync = 0;
        live++;
        ranges += is_range(s, 0) && is_range(s, s->bytes / 2) && is_range(s, s->bytes - 1);
        cuPointerGetAttribute(&base, ATTR_MAPPING_BASE, s->p + s->bytes / 2);
        cuPointerGetAttribute(&size, ATTR_MAPPING_SIZE, s->p + s->bytes / 2);
        cuPointerGetAttribute(&sync, ATTR_SYNC_MEMOPS, s->p);
        bases += base == s->p;
        mapped += size;
        synchronous += (uint8_t)sync;
        for (size_t k = 0; k < i; k++)
            twice += many[k].p && id_of(many[k].p) == id_of(s->p);
        marked += marks_right(i);
    }
    number("live", live);
    number("each has its range", ranges);
    number("each is its mapping", bases);
    number("sizes of mappings", mapped);
    number("buffer ids that are used twice", twice);
    number("synchronous", synchronous);
    number("each has its bytes", marked);
}

static void ask_freed(CUdeviceptr p)
{
    CUdeviceptr base;
    size_t n;
    CUipcMemHandle handle;
    CUmemGenericAllocationHandle retained;
    unsigned long long flags = 0;
    int on = 1;
    CUmemLocation here = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device};
    ASK(cuMemFree_v2(p));
    ASK(cuMemGetAddressRange_v2(&base, &n, p));
    ASK(cuMemGetAddressRange_v2(&base, &n, p + MIB));
    ASK(cuPointerSetAttribute(&on, ATTR_SYNC_MEMOPS, p));
    ASK(cuIpcGetMemHandle(&handle, p));
    ASK(cuMemGetAccess(&flags, &here, p));
    ASK(cuMemRetainAllocationHandle(&retained, (void *)(uintptr_t)p));
    ask_pointer("[one of many, freed]", p, p);
    ask_pointer("[one of many, freed, middle]", p + MIB, p);
}

static void ask_many(void)
{
    size_t before, after, total, sum = 0, good = 0, old = 0;
    CUipcMemHandle handles[2];
    int on = 1;
    section("many small allocations");
    cuMemGetInfo_v2(&before, &total);
    for (size_t i = 0; i < MANY; i++) {
        good += get_small(i);
        sum += many[i].bytes / (2 * MIB) * (2 * MIB);
        many[i].id = id_of(many[i].p);
    }
    number("allocated", good);
    cuMemGetInfo_v2(&after, &total);
    number("at least their sizes are gone", before - after >= sum);
    number("no more than 2 MiB each besides", before - after <= sum + MANY * 2 * MIB + 4 * MIB);
    ask_live();
    ask_pointer("[one of many]", many[200].p, many[200].p);
    ask_pointer("[one of many, middle]", many[203].p + 2 * MIB, many[203].p);
    ASK(cuPointerSetAttribute(&on, ATTR_SYNC_MEMOPS, many[200].p));
    ASK(cuIpcGetMemHandle(&handles[0], many[200].p));
    ASK(cuIpcGetMemHandle(&handles[1], many[201].p));
    number("their handles differ", memcmp(&handles[0], &handles[1], sizeof(handles[0])) != 0);
    ASK(cuMemFree_v2(many[203].p + 2 * MIB));
    ASK(cuMemUnmap(many[200].p, 2 * MIB));
    ASK(cuMemAddressFree(many[200].p, 2 * MIB));
    CUdeviceptr gone = many[205].p;
    good = 0;
    for (size_t i = 1; i < MANY; i += 2) {
        good += cuMemFree_v2(many[i].p) == 0;
        many[i].p = 0;
    }
    number("freed", good);
    ask_live();
    ask_freed(gone);
    good = 0;
    for (size_t i = 1; i < MANY; i += 2) {
        good += get_small(i);
        for (size_t k = 0; k < MANY; k++)
            old += id_of(many[i].p) == many[k].id;
    }
    number("allocated again", good);
    number("buffer ids that were used before", old);
    ask_live();
    good = 0;
    for (size_t i = MANY; i-- > 0;)
        good += cuMemFree_v2(many[i].p) == 0;
    number("freed", good);
    cuMemGetInfo_v2(&after, &total);
    number("all back (within 64 MiB)", after + 64 * MIB > before);
}

/* ---- the program's own virtual memory ---- */

static void ask_vmm(void)
{
    section("virtual memory");
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device}};
    CUmemAccessDesc access = {.location = prop.location, .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE},
                    read_only = access;
    read_only.flags = CU_MEM_ACCESS_FLAGS_PROT_READ;
    CUmemGenericAllocationHandle h = 0, again = 0, other = 0;
    CUmemAllocationProp got;
    CUdeviceptr va = 0, base;
    size_t g = 0, n, free_before, free_after, total;
    unsigned long long flags = 0;
    int fd = -1;
    ASK(cuMemGetAllocationGranularity(&g, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
    number("granularity", g);
    ASK(cuMemGetAllocationGranularity(&g, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
    number("granularity, recommended", g);
    cuMemGetInfo_v2(&free_before, &total);
    ASK(cuMemCreate(&h, g + 1, &prop, 0));
    ASK(cuMemCreate(&h, 0, &prop, 0));
    ASK(cuMemCreate(&h, g, &prop, 1));
    ASK(cuMemCreate(&h, (size_t)1 << 44, &prop, 0));
    ASK(cuMemCreate(&h, 4 * g, &prop, 0));
    ASK(cuMemGetAllocationPropertiesFromHandle(&got, h));
    number("handle types asked for", got.requestedHandleTypes);
    ASK(cuMemExportToShareableHandle(&fd, h, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    ASK(cuMemAddressReserve(&va, 8 * g, 0, 0, 0));
    ASK(cuMemGetAddressRange_v2(&base, &n, va));
    ASK(cuMemMap(va, 4 * g, 0, h, 0));
    ASK(cuMemMap(va, 4 * g, 0, h, 0));
    ASK(cuMemMap(va + 4 * g, g, g, h, 0));
    ASK(cuMemMap(va + 4 * g, 5 * g, 0, h, 0));
    ASK(cuMemGetAccess(&flags, &access.location, va));
    number("access before", flags);
    ASK(cuMemsetD8_v2(va, 1, 4 * g));
    ASK(cuMemSetAccess(va, 4 * g, &access, 1));
    ASK(cuMemGetAccess(&flags, &access.location, va));
    number("access after", flags);
    ASK(cuMemsetD8_v2(va, 1, 4 * g));
    ask_pointer("[VMM, start]", va, va);
    ask_pointer("[VMM, middle]", va + 2 * g + 5, va);
    ASK(cuMemGetAddressRange_v2(&base, &n, va + g));
    number("range starts at", va - base);
    number("range has", n);
    ASK(cuMemFree_v2(va));
    ASK(cuMemRetainAllocationHandle(&again, (void *)(uintptr_t)(va + g)));
    number("the same handle", again == h);
    ASK(cuMemRelease(again));
    ASK(cuMemRelease(h));
    ASK(cuMemRelease(h));
    ASK(cuMemsetD8_v2(va, 2, 4 * g));
    ASK(cuMemUnmap(va, g));
    ASK(cuMemSetAccess(va, 4 * g, &read_only, 1));
    ASK(cuMemAddressFree(va, 8 * g));
    ASK(cuMemUnmap(va, 4 * g));
    ASK(cuMemUnmap(va, 4 * g));
    ASK(cuMemAddressFree(va, 4 * g));
    ASK(cuMemAddressFree(va, 8 * g));
    ASK(cuMemRelease(0));
    cuMemGetInfo_v2(&free_after, &total);
    number("free memory is as before", free_after == free_before);
    section("virtual memory that is to be shared");
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    ASK(cuMemCreate(&other, 2 * g, &prop, 0));
    ASK(cuMemExportToShareableHandle(&fd, other, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    number("a descriptor", fd >= 0 && close(fd) == 0);
    ASK(cuMemGetAllocationPropertiesFromHandle(&got, other));
    number("handle types asked for", got.requestedHandleTypes);
    ASK(cuMemRelease(other));
}

/* ---- inter-process handles, peers, streams ---- */

static void ask_others(void)
{
    CUdeviceptr p, q;
    CUipcMemHandle handle;
    int n = 0, can = 0;
    section("handles for other processes");
    static const size_t of[] = {4096, 2 * MIB, 64 * MIB};
    for (size_t i = 0; i < 3; i++) {
        ASK(cuMemAlloc_v2(&p, of[i]));
        ASK(cuIpcGetMemHandle(&handle, p));
        ASK(cuIpcGetMemHandle(&handle, p + 256));
        ASK(cuMemFree_v2(p));
        ASK(cuIpcGetMemHandle(&handle, p));
    }
    section("peers");
    ASK(cuDeviceGetCount(&n));
    ASK(cuDeviceCanAccessPeer(&can, device, device));
    number("can access itself", can);
    ASK(cuCtxEnablePeerAccess(ctx, 0));
    section("stream-ordered");
    CUstream s;
    ASK(cuStreamCreate(&s, CU_STREAM_NON_BLOCKING));
    ASK(cuMemAllocAsync(&p, 4 * MIB, s));
    ASK(cuMemsetD8Async(p, 1, 4 * MIB, s));
    ASK(cuStreamSynchronize(s));
    ask_pointer("[stream-ordered]", p, p);
    ASK(cuMemFreeAsync(p, s));
    ASK(cuMemAlloc_v2(&q, 4 * MIB));
    ASK(cuMemFreeAsync(q, s));
    ASK(cuStreamSynchronize(s));
    ASK(cuMemAlloc_v2(&q, 4096));
    ASK(cuMemFreeAsync(q, s));
    ASK(cuMemAllocAsync(&p, 4 * MIB, s));
    ASK(cuStreamSynchronize(s));
    ASK(cuMemFree_v2(p));
    section("allocation in a stream that is captured");
    CUgraph graph = NULL;
    ASK(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_GLOBAL));
    ASK(cuMemAlloc_v2(&p, 4096));
    ASK(cuStreamEndCapture(s, &graph));
    ASK(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_GLOBAL));
    ASK(cuMemAlloc_v2(&p, 64 * MIB));
    ASK(cuStreamEndCapture(s, &graph));
    ASK(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_RELAXED));
    ASK(cuMemAlloc_v2(&p, 64 * MIB));
    ASK(cuMemFree_v2(p));
    ASK(cuStreamEndCapture(s, &graph));
    ASK(cuStreamDestroy_v2(s));
}

/* ---- threads and contexts ---- */

static void *no_context(void *arg)
{
    (void)arg;
    CUdeviceptr p = 0, base;
    size_t n;
    ASK(cuMemAlloc_v2(&p, 4096));
    ASK(cuMemAlloc_v2(&p, 64 * MIB));
    ASK(cuMemFree_v2(*(CUdeviceptr *)arg));
    ASK(cuMemAlloc_v2((CUdeviceptr *)arg, 4 * MIB));
    ASK(cuMemGetAddressRange_v2(&base, &n, *(CUdeviceptr *)arg));
    ASK(cuMemGetInfo_v2(&n, &n));
    return NULL;
}

static void ask_contexts(void)
{
    CUcontext second = NULL, was = NULL;
    CUdeviceptr p = 0, q = 0, base;
    size_t n, before, after, total;
    pthread_t thread;
    section("a thread without a context");
    ASK(cuMemAlloc_v2(&p, 64 * MIB));
    if (pthread_create(&thread, NULL, no_context, &p) == 0)
        pthread_join(thread, NULL);
    ASK(cuMemFree_v2(p));
    section("a second context");
    cuMemGetInfo_v2(&before, &total);
    ASK(cuCtxCreate_v2(&second, 0, device));
    if (!second)
        return;
    ASK(cuMemAlloc_v2(&p, 64 * MIB));
    ASK(cuMemAlloc_v2(&q, 4096));
    for (size_t i = 0; i < 60; i++) { /* of either, by turns */
        ASK(cuCtxSetCurrent(i % 2 ? ctx : second));
        number("one of many", get_small(i));
    }
    ASK(cuCtxSetCurrent(second));
    ASK(cuCtxPopCurrent_v2(&was));
    uint64_t whose = 0;
    ASK(cuPointerGetAttribute(&whose, ATTR_CONTEXT, p));
    number("belongs to the second", (CUcontext)(uintptr_t)whose == second);
    ASK(cuMemGetAddressRange_v2(&base, &n, p));
    ASK(cuMemFree_v2(q));
    ASK(cuCtxPushCurrent_v2(second));
    ASK(cuMemsetD8_v2(p, 1, 64 * MIB));
    ASK(cuCtxDestroy_v2(second));
    ASK(cuPointerGetAttribute(&whose, ATTR_CONTEXT, p));
    ASK(cuMemGetAddressRange_v2(&base, &n, p));
    ASK(cuMemFree_v2(p));
    ASK(cuMemGetAddressRange_v2(&base, &n, many[30].p));
    ASK(cuCtxSetCurrent(ctx));
    for (size_t i = 0; i < 60; i++) {
        ASK(cuMemGetAddressRange_v2(&base, &n, many[i].p));
        ASK(cuMemFree_v2(many[i].p));
    }
    cuMemGetInfo_v2(&after, &total);
    number("its memory is back (within 64 MiB)", after + 64 * MIB > before);
}

static void ask_reset(void)
{
    CUdeviceptr p = 0, q = 0, base;
    size_t n;
    unsigned flags;
    int active = 0;
    section("reset of the primary context");
    ASK(cuMemAlloc_v2(&p, 64 * MIB));
    ASK(cuMemAlloc_v2(&q, 4096));
    ASK(cuDevicePrimaryCtxReset_v2(device));
    ASK(cuDevicePrimaryCtxGetState(device, &flags, &active));
    number("active", (unsigned long long)active);
    ASK(cuMemAlloc_v2(&q, 4 * MIB));
    ASK(cuMemFree_v2(p));
    ASK(cuDevicePrimaryCtxRetain(&ctx, device));
    ASK(cuCtxSetCurrent(ctx));
    ASK(cuMemGetAddressRange_v2(&base, &n, p));
    ASK(cuMemFree_v2(p));
    ASK(cuMemAlloc_v2(&p, 64 * MIB));
    ASK(cuMemsetD8_v2(p, 1, 64 * MIB));
    ASK(cuMemFree_v2(p));
    ASK(cuDevicePrimaryCtxRelease_v2(device));
}

/* ---- last: calls that a driver may not survive ---- */

static void on_fault(int sig)
{
    static const char text[] = "a fault; the rest is not asked\n\nend\n";
    (void)sig;
    if (write(STDOUT_FILENO, text, sizeof(text) - 1) < 0)
        _exit(1);
    _exit(0);
}

static void ask_nulls(void)
{
    CUdeviceptr p = 0;
    CUmemGenericAllocationHandle h = 0;
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = device}};
    size_t pitch;
    section("no place for the answer");
    signal(SIGSEGV, on_fault);
    signal(SIGBUS, on_fault);
    signal(SIGABRT, on_fault);
    ASK(cuDevicePrimaryCtxRetain(&ctx, device));
    ASK(cuCtxSetCurrent(ctx));
    ASK(cuMemAlloc_v2(NULL, 4096));
    ASK(cuMemAlloc_v2(NULL, 4 * MIB));
    ASK(cuMemAlloc_v2(NULL, 0));
    ASK(cuMemAllocPitch_v2(NULL, &pitch, 100, 1, 4));
    ASK(cuMemAllocPitch_v2(&p, NULL, 100, 1, 4));
    ASK(cuMemAllocPitch_v2(&p, NULL, 5000, 1000, 4));
    ASK(cuMemAlloc_v2(&p, 4 * MIB));
    ASK(cuMemGetAddressRange_v2(NULL, NULL, p));
    ASK(cuMemGetAddressRange_v2(NULL, NULL, 0));
    ASK(cuPointerGetAttribute(NULL, ATTR_MEMORY_TYPE, p));
    ASK(cuMemFree_v2(p));
    ASK(cuMemHostAlloc(NULL, 4096, 0));
    ASK(cuMemCreate(NULL, 2 * MIB, &prop, 0));
    ASK(cuMemCreate(&h, 2 * MIB, NULL, 0));
    ASK(cuMemAddressReserve(NULL, 2 * MIB, 0, 0, 0));
    ASK(cuCtxEnablePeerAccess(NULL, 0));
    ASK(cuMemGetInfo_v2(NULL, NULL));
}

int main(void)
{
    CUdeviceptr p = 0;
    driver_open();
    section("before cuInit");
    ASK(cuMemAlloc_v2(&p, 4096));
    ASK(cuMemAlloc_v2(&p, 4 * MIB));
    ASK(cuMemFree_v2(4096));
    ASK(cuInit(1));
    ASK(cuInit(0));
    section("before there is a context");
    ASK(cuDeviceGet(&device, 0));
    ASK(cuMemAlloc_v2(&p, 4096));
    ASK(cuMemAlloc_v2(&p, 4 * MIB));
    ASK(cuDevicePrimaryCtxRetain(&ctx, device));
    ASK(cuCtxSetCurrent(ctx));
    ask_sizes();
    ask_pitches();
    ask_errors();
    ask_pointers();
    ask_amounts();
    ask_many();
    ask_vmm();
    ask_others();
    ask_contexts();
    ask_reset();
    ask_nulls();
    puts("\nend");
    return 0;
}
