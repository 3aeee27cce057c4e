/* What a program sees of memory that the agent converted, beside what the driver itself says of memory of its own. Both
 * libraries are in this process: `cu` is the agent, `native` the driver behind it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cu.h"
#include "machine.h"

#include "base/proc.h"
#include "wire/agent_client.h"

#include <fcntl.h>
#include <pthread.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)

static struct cu cu, native;
static CUcontext ctx;
static struct bn_agent *agent;

static struct bn_agent_page page(void)
{
    struct bn_agent_page p;
    assert_int_equal(bn_agent_page(agent, &p), 0);
    return p;
}

static size_t free_memory(void)
{
    size_t free_bytes, total;
    assert_int_equal(cu.cuMemGetInfo_v2(&free_bytes, &total), 0);
    return free_bytes;
}

static void test_conversion_threshold(void **state)
{
    CUdeviceptr small, large;
    struct bn_agent_page before = page();
    assert_int_equal(cu.cuMemAlloc_v2(&small, 2 * MIB - 1), 0);
    assert_int_equal(page().allocations, before.allocations);
    assert_int_equal(page().native_bytes, before.native_bytes + 2 * MIB - 1);
    assert_int_equal(cu.cuMemAlloc_v2(&large, 2 * MIB), 0);
    assert_int_equal(page().allocations, before.allocations + 1);
    assert_int_equal(page().gpu[0].segments, before.gpu[0].segments + 1);
    assert_int_equal(cu.cuMemFree_v2(small), 0);
    assert_int_equal(cu.cuMemFree_v2(large), 0);
    assert_int_equal(page().native_bytes, before.native_bytes);
    assert_int_equal(page().gpu[0].segments, before.gpu[0].segments);
}

static void test_bad_arguments_as_native(void **state)
{
    CUdeviceptr p, wild = 0x1234560000;
    assert_int_equal(cu.cuMemAlloc_v2(NULL, 4 * MIB), native.cuMemAlloc_v2(NULL, 4 * MIB));
    assert_int_equal(cu.cuMemAlloc_v2(&p, 0), native.cuMemAlloc_v2(&p, 0));
    assert_int_equal(cu.cuMemAlloc_v2(&p, ~(size_t)0), native.cuMemAlloc_v2(&p, ~(size_t)0));
    assert_int_equal(cu.cuMemAlloc_v2(&p, (size_t)1 << 45), CUDA_ERROR_OUT_OF_MEMORY);
    assert_int_equal(cu.cuMemFree_v2(wild), native.cuMemFree_v2(wild));
    assert_int_equal(cu.cuMemFree_v2(0), native.cuMemFree_v2(0));
    assert_int_equal(cu.cuMemAlloc_v2(&p, 4 * MIB), 0);
    assert_int_equal(cu.cuMemFree_v2(p + 4096), native.cuMemFree_v2(wild));
    assert_int_equal(cu.cuMemFree_v2(p), 0);
    assert_int_equal(cu.cuMemFree_v2(p), native.cuMemFree_v2(wild));
}

static void test_failure_leaves_nothing(void **state)
{
    CUdeviceptr p;
    struct bn_agent_page before = page();
    size_t room = free_memory();
    for (int i = 0; i < 100; i++)
        assert_int_equal(cu.cuMemAlloc_v2(&p, room + 64 * MIB), CUDA_ERROR_OUT_OF_MEMORY);
    assert_int_equal(free_memory(), room);
    assert_int_equal(page().gpu[0].segments, before.gpu[0].segments);
    assert_int_equal(page().allocations, before.allocations);
}

/* Any step of a conversion fails: the program gets memory of the driver's own or the error it would have got, and nothing is
 * left behind. */
static void test_conversion_fails(void **state)
{
    static const char *const rules[] = {
        "cuMemAddressReserve:1=999", "cuMemAddressReserve:1=2", "cuMemCreate:1+=999",
        "cuMemCreate:1+=801",        "cuMemMap:1=999",          "cuMemSetAccess:1=999"};
    const char *path = need_env("BENNU_SIM_FAIL_FILE");
    struct bn_agent_page before = page();
    size_t room = free_memory();
    for (size_t i = 0; i <= sizeof(rules) / sizeof(rules[0]); i++) {
        CUdeviceptr p = 0;
        bool last = i == sizeof(rules) / sizeof(rules[0]);
        say_failure(path, last ? "cuMemCreate:1=2" : rules[i]);
        CUresult r = cu.cuMemAlloc_v2(&p, 4 * MIB);
        assert_int_equal(r, last ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS);
        assert_int_equal(page().gpu[0].segments, before.gpu[0].segments);
        if (last)
            break;
        assert_int_equal(cu.cuMemsetD8_v2(p, 1, 4 * MIB), 0);
        assert_int_equal(page().native_bytes, before.native_bytes + 4 * MIB);
        assert_int_equal(cu.cuMemFree_v2(p), 0);
        assert_int_equal(free_memory(), room);
    }
    assert_int_equal(truncate(path, 0), 0);
    assert_int_equal(page().native_bytes, before.native_bytes);
    assert_int_equal(free_memory(), room);
}

static void test_address_range(void **state)
{
    CUdeviceptr p, base;
    size_t size;
    assert_int_equal(cu.cuMemAlloc_v2(&p, 5 * MIB + 12), 0);
    assert_int_equal(cu.cuMemGetAddressRange_v2(&base, &size, p + 3 * MIB), 0);
    assert_int_equal(base, p);
    assert_int_equal(size, 5 * MIB + 12);
    assert_int_equal(cu.cuMemGetAddressRange_v2(&base, NULL, p), 0);
    assert_int_equal(cu.cuMemGetAddressRange_v2(NULL, &size, p), 0);
    assert_int_equal(size, 5 * MIB + 12);
    assert_int_equal(cu.cuMemFree_v2(p), 0);
    assert_int_equal(cu.cuMemGetAddressRange_v2(&base, &size, p),
                     native.cuMemGetAddressRange_v2(&base, &size, 0x1234560000));
}

/* Each attribute that does not name an address is the same for a converted and a native block. */
static void test_pointer_attributes(void **state)
{
    static const CUpointer_attribute same[] = {
        CU_POINTER_ATTRIBUTE_CONTEXT,    CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
        CU_POINTER_ATTRIBUTE_IS_MANAGED, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
        CU_POINTER_ATTRIBUTE_RANGE_SIZE, CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES,
    };
    CUdeviceptr ours, theirs;
    assert_int_equal(cu.cuMemAlloc_v2(&ours, 3 * MIB), 0);
    assert_int_equal(native.cuMemAlloc_v2(&theirs, 3 * MIB), 0);
    for (size_t i = 0; i < sizeof(same) / sizeof(same[0]); i++) {
        uint64_t a = 0, b = 0;
        CUresult r = native.cuPointerGetAttribute(&b, same[i], theirs + 100);
        if (cu.cuPointerGetAttribute(&a, same[i], ours + 100) != r || a != b)
            fail_msg("attribute %d: %llx instead of %llx", same[i], (unsigned long long)a,
                     (unsigned long long)b);
    }
    CUdeviceptr start = 0;
    assert_int_equal(cu.cuPointerGetAttribute(&start, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, ours + 2 * MIB),
                     0);
    assert_int_equal(start, ours);

    CUpointer_attribute several[] = {CU_POINTER_ATTRIBUTE_CONTEXT, CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                                     CU_POINTER_ATTRIBUTE_RANGE_SIZE, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR};
    CUcontext c = NULL;
    unsigned type = 0;
    size_t size = 0;
    void *data[] = {&c, &type, &size, &start};
    assert_int_equal(cu.cuPointerGetAttributes(4, several, data, ours + 7), 0);
    assert_ptr_equal(c, ctx);
    assert_int_equal(type, CU_MEMORYTYPE_DEVICE);
    assert_int_equal(size, 3 * MIB);
    assert_int_equal(start, ours);
    assert_int_equal(cu.cuMemFree_v2(ours), 0);
    assert_int_equal(native.cuMemFree_v2(theirs), 0);
}

static void test_pitch(void **state)
{
    static const size_t widths[] = {1, 100, 512, 5000, 65536, 100001};
    for (size_t i = 0; i < sizeof(widths) / sizeof(widths[0]); i++) {
        CUdeviceptr a, b;
        size_t pa = 0, pb = 0, height = 4 * MIB / (widths[i] + 512) + 1, size;
        assert_int_equal(native.cuMemAllocPitch_v2(&b, &pb, widths[i], height, 4), 0);
        assert_int_equal(cu.cuMemAllocPitch_v2(&a, &pa, widths[i], height, 4), 0);
        assert_int_equal(pa, pb);
        assert_int_equal(cu.cuMemGetAddressRange_v2(NULL, &size, a), 0);
        assert_true(size >= pa * height);
        assert_int_equal(cu.cuMemFree_v2(a), 0);
        assert_int_equal(native.cuMemFree_v2(b), 0);
    }
    CUdeviceptr a;
    size_t pitch;
    assert_int_equal(cu.cuMemAllocPitch_v2(&a, NULL, 4096, 4096, 4),
                     native.cuMemAllocPitch_v2(&a, NULL, 4096, 4096, 4));
    assert_int_equal(cu.cuMemAllocPitch_v2(&a, &pitch, 4096, 4096, 3),
                     native.cuMemAllocPitch_v2(&a, &pitch, 4096, 4096, 3));
}

static void test_vmm_calls_refuse_converted_memory(void **state)
{
    CUdeviceptr p;
    CUmemGenericAllocationHandle h;
    CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, 0}, CU_MEM_ACCESS_FLAGS_PROT_READ};
    assert_int_equal(cu.cuMemAlloc_v2(&p, 2 * MIB), 0);
    assert_int_equal(cu.cuMemUnmap(p, 2 * MIB), CUDA_ERROR_INVALID_VALUE);
    assert_int_equal(cu.cuMemAddressFree(p, 2 * MIB), CUDA_ERROR_INVALID_VALUE);
    assert_int_equal(cu.cuMemSetAccess(p, 2 * MIB, &access, 1), CUDA_ERROR_INVALID_VALUE);
    assert_int_equal(cu.cuMemRetainAllocationHandle(&h, (void *)p), CUDA_ERROR_INVALID_VALUE);
    assert_int_equal(cu.cuMemsetD8_v2(p, 7, 2 * MIB), 0);
    assert_int_equal(cu.cuMemFree_v2(p), 0);
}

static void test_context_takes_its_memory_along(void **state)
{
    CUcontext other, current;
    CUdeviceptr p;
    size_t size;
    struct bn_agent_page before = page();
    assert_int_equal(cu.cuCtxCreate_v2(&other, 0, 0), 0);
    size_t room = free_memory();
    for (int i = 0; i < 10; i++)
        assert_int_equal(cu.cuMemAlloc_v2(&p, 3 * MIB), 0);
    assert_int_equal(cu.cuMemAlloc_v2(&p, 100), 0);
    assert_true(free_memory() <= room - 40 * MIB);
    assert_int_equal(cu.cuCtxDestroy_v2(other), 0);
    assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
    assert_true(free_memory() >= room);
    assert_int_equal(page().allocations, before.allocations);
    assert_int_equal(page().native_bytes, before.native_bytes);
    assert_int_not_equal(cu.cuMemGetAddressRange_v2(NULL, &size, p), 0);

    /* A primary context: by its last release, and by a reset. */
    for (int reset = 0; reset < 2; reset++) {
        assert_int_equal(cu.cuDevicePrimaryCtxRetain(&other, 0), 0);
        assert_int_equal(cu.cuDevicePrimaryCtxRetain(&other, 0), 0);
        assert_int_equal(cu.cuCtxSetCurrent(other), 0);
        room = free_memory();
        assert_int_equal(cu.cuMemAlloc_v2(&p, 6 * MIB), 0);
        assert_int_equal(cu.cuDevicePrimaryCtxRelease_v2(0), 0);
        assert_int_equal(cu.cuCtxGetCurrent(&current), 0);
        assert_int_equal(page().allocations, before.allocations + 1);
        if (reset)
            assert_int_equal(cu.cuDevicePrimaryCtxReset_v2(0), 0);
        else
            assert_int_equal(cu.cuDevicePrimaryCtxRelease_v2(0), 0);
        assert_int_equal(page().allocations, before.allocations);
        assert_int_equal(page().gpu[0].segments, before.gpu[0].segments);
        if (reset)
            cu.cuDevicePrimaryCtxRelease_v2(0);
        assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
        assert_true(free_memory() >= room);
    }
}

/* Whether the primary context went with a release cannot be told: what is allocated in it stays. */
static void test_context_that_cannot_be_asked_about(void **state)
{
    CUcontext primary;
    CUdeviceptr p;
    uint32_t word = 0;
    const char *path = need_env("BENNU_SIM_FAIL_FILE");
    struct bn_agent_page before = page();
    for (int i = 0; i < 2; i++)
        assert_int_equal(cu.cuDevicePrimaryCtxRetain(&primary, 0), 0);
    assert_int_equal(cu.cuCtxSetCurrent(primary), 0);
    assert_int_equal(cu.cuMemAlloc_v2(&p, 6 * MIB), 0);
    assert_int_equal(cu.cuMemsetD32_v2(p, 0x12345678, 6 * MIB / 4), 0);
    say_failure(path, "cuDevicePrimaryCtxGetState:2=999");
    assert_int_equal(cu.cuDevicePrimaryCtxRelease_v2(0), 0);
    assert_int_equal(truncate(path, 0), 0);
    assert_int_equal(page().allocations, before.allocations + 1);
    assert_int_equal(cu.cuMemcpyDtoH_v2(&word, p + 5 * MIB, sizeof(word)), 0);
    assert_int_equal(word, 0x12345678);
    assert_int_equal(cu.cuDevicePrimaryCtxRelease_v2(0), 0);
    assert_int_equal(page().allocations, before.allocations);
    assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
}

/* ---- peer access ------------------------------------------------------------------------------------- */

static void test_peer_access(void **state)
{
    int n = 0;
    CUcontext two;
    CUdeviceptr early, late, mine;
    char bytes[64] = "over there";
    assert_int_equal(cu.cuDeviceGetCount(&n), 0);
    if (n < 2)
        skip();
    assert_int_equal(cu.cuMemAlloc_v2(&early, 2 * MIB), 0);
    assert_int_equal(cu.cuMemcpyHtoD_v2(early, bytes, sizeof(bytes)), 0);
    assert_int_equal(cu.cuCtxCreate_v2(&two, 0, 1), 0); /* current now */
    assert_int_equal(cu.cuMemAlloc_v2(&mine, 2 * MIB), 0);
    unsigned long long flags = 9;
    CUmemLocation second = {CU_MEM_LOCATION_TYPE_DEVICE, 1};
    assert_int_equal(cu.cuMemGetAccess(&flags, &second, early), 0);
    assert_int_equal(flags, CU_MEM_ACCESS_FLAGS_PROT_NONE);

    assert_int_equal(cu.cuCtxDisablePeerAccess(ctx), CUDA_ERROR_PEER_ACCESS_NOT_ENABLED);
    /* Where it cannot be mirrored it is not had. */
    static const char *const unknown[] = {"cuCtxGetCurrent:1=999", "cuCtxGetDevice:1=999"};
    for (size_t i = 0; i < 2; i++) {
        say_failure(need_env("BENNU_SIM_FAIL_FILE"), unknown[i]);
        assert_int_equal(cu.cuCtxEnablePeerAccess(ctx, 0), CUDA_ERROR_UNKNOWN);
    }
    assert_int_equal(cu.cuCtxEnablePeerAccess(ctx, 0), 0);
    assert_int_equal(cu.cuCtxEnablePeerAccess(ctx, 0), CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
    assert_int_equal(cu.cuMemGetAccess(&flags, &second, early), 0);
    assert_int_equal(flags, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    assert_int_equal(cu.cuMemcpyDtoD_v2(mine, early, sizeof(bytes)), 0);
    memset(bytes, 0, sizeof(bytes));
    assert_int_equal(cu.cuMemcpyDtoH_v2(bytes, mine, sizeof(bytes)), 0);
    assert_string_equal(bytes, "over there");

    assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
    assert_int_equal(cu.cuMemAlloc_v2(&late, 2 * MIB), 0);
    assert_int_equal(cu.cuMemGetAccess(&flags, &second, late), 0);
    assert_int_equal(flags, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
    assert_int_equal(cu.cuCtxSetCurrent(two), 0);
    assert_int_equal(cu.cuCtxDisablePeerAccess(ctx), 0);
    assert_int_equal(cu.cuMemGetAccess(&flags, &second, late), 0);
    assert_int_equal(flags, CU_MEM_ACCESS_FLAGS_PROT_NONE);
    assert_int_equal(cu.cuCtxDestroy_v2(two), 0);
    assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
    assert_int_equal(cu.cuMemFree_v2(early), 0);
    assert_int_equal(cu.cuMemFree_v2(late), 0);
}

/* ---- the program's own VMM memory -------------------------------------------------------------------- */

static const CUmemAllocationProp device_prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                                .location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}};
static const CUmemAccessDesc device_rw = {{CU_MEM_LOCATION_TYPE_DEVICE, 0},
                                          CU_MEM_ACCESS_FLAGS_PROT_READWRITE};

static void test_tokens(void **state)
{
    CUmemGenericAllocationHandle h[2], again;
    CUdeviceptr va;
    size_t room = free_memory();
    struct bn_agent_page before = page();
    assert_int_equal(cu.cuMemAddressReserve(&va, 8 * MIB, 0, 0, 0), 0);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(cu.cuMemCreate(&h[i], 4 * MIB, &device_prop, 0), 0);
        assert_int_equal(cu.cuMemMap(va + (size_t)i * 4 * MIB, 4 * MIB, 0, h[i], 0), 0);
    }
    assert_int_not_equal(h[0], h[1]);
    assert_int_equal(cu.cuMemSetAccess(va, 8 * MIB, &device_rw, 1), 0);
    assert_int_equal(page().gpu[0].segments, before.gpu[0].segments + 2);

    CUmemAllocationProp prop;
    int fd = -1;
    assert_int_equal(cu.cuMemGetAllocationPropertiesFromHandle(&prop, h[0]), 0);
    assert_int_equal(prop.requestedHandleTypes, CU_MEM_HANDLE_TYPE_NONE); /* as asked for */
    assert_int_equal(cu.cuMemExportToShareableHandle(&fd, h[0], CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                     CUDA_ERROR_INVALID_VALUE); /* as the driver would without our own request */

    assert_int_equal(cu.cuMemRetainAllocationHandle(&again, (void *)(va + 5 * MIB)), 0);
    assert_int_equal(again, h[1]);
    assert_int_equal(cu.cuMemRelease(again), 0);
    assert_int_equal(cu.cuMemRelease(h[0]), 0);
    assert_int_equal(cu.cuMemRelease(h[1]), 0);
    assert_int_equal(cu.cuMemRelease(h[1]), CUDA_ERROR_INVALID_VALUE);
    /* The mappings keep the memory. */
    assert_int_equal(cu.cuMemsetD32_v2(va, 0x5a5a5a5a, 2 * MIB), 0);
    assert_int_equal(page().gpu[0].segments, before.gpu[0].segments + 2);
    assert_int_equal(cu.cuMemRetainAllocationHandle(&again, (void *)va), 0);
    assert_int_equal(cu.cuMemUnmap(va, 8 * MIB), 0);
    assert_int_equal(page().gpu[0].segments, before.gpu[0].segments + 1);
    assert_int_equal(cu.cuMemRelease(again), 0);
    assert_int_equal(page().gpu[0].segments, before.gpu[0].segments);
    assert_int_equal(cu.cuMemAddressFree(va, 8 * MIB), 0);
    assert_int_equal(free_memory(), room);
}

static void test_foreign_and_host_memory_is_counted(void **state)
{
    CUmemAllocationProp prop = device_prop;
    CUmemGenericAllocationHandle theirs, ours;
    int fd;
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    assert_int_equal(native.cuMemCreate(&theirs, 2 * MIB, &prop, 0), 0);
    assert_int_equal(
        native.cuMemExportToShareableHandle(&fd, theirs, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0), 0);
    assert_int_equal(cu.cuMemImportFromShareableHandle(&ours, (void *)(intptr_t)fd,
                                                       CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
                     0);
    assert_int_equal(page().blockers.imported_handles, 1);
    assert_int_equal(cu.cuMemRelease(ours), 0);
    assert_int_equal(page().blockers.imported_handles, 0);
    assert_int_equal(native.cuMemRelease(theirs), 0);
    close(fd);

    prop = device_prop;
    prop.location = (CUmemLocation){CU_MEM_LOCATION_TYPE_HOST_NUMA, 0};
    assert_int_equal(cu.cuMemCreate(&ours, 2 * MIB, &prop, 0), 0);
    assert_int_equal(page().blockers.host_vmm_bytes, 2 * MIB);
    assert_int_equal(cu.cuMemRelease(ours), 0);
    assert_int_equal(page().blockers.host_vmm_bytes, 0);
}

/* ---- look-ups ----------------------------------------------------------------------------------------- */

static void test_get_proc_address(void **state)
{
    void *p = NULL, *self = NULL;
    CUdriverProcAddressQueryResult status;
    assert_int_equal(cu.cuGetProcAddress_v2("cuMemAlloc", &p, 12000, 0, &status), 0);
    assert_ptr_not_equal(p, NULL);
    assert_ptr_not_equal(p, (void *)native.cuMemAlloc_v2);
    struct bn_agent_page before = page();
    CUdeviceptr d;
    assert_int_equal(((bn_pfn_cuMemAlloc_v2)p)(&d, 2 * MIB), 0);
    assert_int_equal(page().allocations, before.allocations + 1);
    assert_int_equal(cu.cuMemFree_v2(d), 0);

    assert_int_equal(cu.cuGetProcAddress_v2("cuGetProcAddress", &self, 12000, 0, &status), 0);
    assert_ptr_not_equal(self, (void *)native.cuGetProcAddress_v2);
    void *again = NULL;
    assert_int_equal(((bn_pfn_cuGetProcAddress_v2)self)("cuMemAlloc", &again, 12000, 0, &status), 0);
    assert_ptr_equal(again, p);

    CUdriverProcAddressQueryResult other;
    void *none = &none, *none_native = &none;
    CUresult r = native.cuGetProcAddress_v2("cuNoSuchThing", &none_native, 12000, 0, &other);
    assert_int_equal(cu.cuGetProcAddress_v2("cuNoSuchThing", &none, 12000, 0, &status), r);
    assert_int_equal(status, other);
    assert_ptr_equal(none, none_native);
    assert_int_equal(cu.cuGetProcAddress_v2(NULL, &p, 12000, 0, NULL),
                     native.cuGetProcAddress_v2(NULL, &p, 12000, 0, NULL));
    assert_int_equal(cu.cuGetProcAddress_v2("cuInit", NULL, 12000, 0, NULL),
                     native.cuGetProcAddress_v2("cuInit", NULL, 12000, 0, NULL));
}

/* ---- threads, children -------------------------------------------------------------------------------- */

static void *allocator(void *unused)
{
    CUdeviceptr held[16] = {0};
    uint32_t x = (uint32_t)(uintptr_t)&held;
    if (cu.cuCtxSetCurrent(ctx) != CUDA_SUCCESS)
        return (void *)1;
    for (int i = 0; i < 300; i++) {
        x = x * 1664525u + 1013904223u;
        unsigned slot = (x >> 16) % 16;
        if (held[slot]) {
            uint32_t word = 0;
            if (cu.cuMemcpyDtoH_v2(&word, held[slot], 4) != CUDA_SUCCESS || word != (uint32_t)held[slot] ||
                cu.cuMemFree_v2(held[slot]) != CUDA_SUCCESS)
                return (void *)2;
            held[slot] = 0;
        } else {
            if (cu.cuMemAlloc_v2(&held[slot], x & 1 ? 2 * MIB : 1000) != CUDA_SUCCESS)
                return (void *)3;
            uint32_t word = (uint32_t)held[slot];
            if (cu.cuMemcpyHtoD_v2(held[slot], &word, 4) != CUDA_SUCCESS)
                return (void *)4;
        }
    }
    for (int i = 0; i < 16; i++)
        if (held[i] && cu.cuMemFree_v2(held[i]) != CUDA_SUCCESS)
            return (void *)5;
    return NULL;
}

static void test_threads_allocate(void **state)
{
    pthread_t threads[4];
    struct bn_agent_page before = page();
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, allocator, NULL), 0);
    for (int i = 0; i < 4; i++) {
        void *result;
        pthread_join(threads[i], &result);
        assert_ptr_equal(result, NULL);
    }
    assert_int_equal(page().allocations, before.allocations);
    assert_int_equal(page().native_bytes, before.native_bytes);
}

static void test_spawn(void **state)
{
    extern char **environ;
    char *args[] = {"true", NULL};
    pid_t pid;
    int status;
    assert_int_equal(posix_spawn(&pid, "/bin/true", NULL, NULL, args, environ), 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    pid = vfork();
    if (pid == 0) {
        execv("/bin/true", args);
        _exit(1);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    struct bn_error err = BN_ERROR_INIT;
    assert_int_equal(bn_agent_attach(agent, &err), 0);
    assert_int_equal(bn_agent_close_gate(agent, 10000, &err), 0);
    assert_int_equal(bn_agent_open_gate(agent, &err), 0);
    bn_agent_detach(agent);
}

static void test_capture_rules(void **state)
{
    CUstream stream;
    CUgraph graph;
    CUdeviceptr p, kept;
    assert_int_equal(cu.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), 0);
    assert_int_equal(cu.cuMemAlloc_v2(&kept, 4 * MIB), 0);
    assert_int_equal(cu.cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_RELAXED), 0);
    assert_int_equal(page().captures, 1);
    assert_int_equal(cu.cuMemAlloc_v2(&p, 4 * MIB), 0);
    struct bn_agent_page before = page();
    assert_int_equal(cu.cuMemFree_v2(kept), 0);
    assert_int_equal(page().allocations, before.allocations - 1);
    assert_int_not_equal(cu.cuMemFree_v2(kept), 0);
    assert_int_equal(cu.cuStreamEndCapture(stream, &graph), 0);
    assert_int_equal(page().captures, 0);
    assert_int_equal(page().gpu[0].segments, before.gpu[0].segments - 1);
    assert_int_equal(cu.cuGraphDestroy(graph), 0);
    assert_int_equal(cu.cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_RELAXED), 0);
    assert_int_equal(cu.cuStreamDestroy_v2(stream), 0);
    assert_int_equal(page().captures, 0);
    assert_int_equal(cu.cuMemFree_v2(p), 0);
}

static uint64_t seen_at_work;

static void look_after_a_while(void *unused)
{
    usleep(100000); /* time to take the memory away too early */
    seen_at_work = page().gpu[0].segments;
}

/* Memory freed during a capture may be in use by work outside of it, here in another context, for longer than the capture
 * lasts. */
static void test_free_during_capture_waits(void **state)
{
    CUstream captured, busy;
    CUgraph graph;
    CUdeviceptr p;
    CUcontext other;
    assert_int_equal(cu.cuStreamCreate(&busy, CU_STREAM_NON_BLOCKING), 0);
    assert_int_equal(cu.cuMemAlloc_v2(&p, 4 * MIB), 0);
    assert_int_equal(cu.cuCtxCreate_v2(&other, 0, 0), 0);
    assert_int_equal(cu.cuStreamCreate(&captured, CU_STREAM_NON_BLOCKING), 0);
    uint64_t before = page().gpu[0].segments;
    assert_int_equal(cu.cuStreamBeginCapture_v2(captured, CU_STREAM_CAPTURE_MODE_RELAXED), 0);
    assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
    assert_int_equal(cu.cuLaunchHostFunc(busy, look_after_a_while, NULL), 0);
    assert_int_equal(cu.cuCtxSetCurrent(other), 0);
    assert_int_equal(cu.cuMemFree_v2(p), 0);
    assert_int_equal(cu.cuStreamEndCapture(captured, &graph), 0);
    assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
    assert_int_equal(cu.cuStreamSynchronize(busy), 0);
    assert_int_equal(seen_at_work, before);
    assert_int_equal(page().gpu[0].segments, before - 1);
    assert_int_equal(cu.cuGraphDestroy(graph), 0);
    assert_int_equal(cu.cuStreamDestroy_v2(busy), 0);
    assert_int_equal(cu.cuCtxDestroy_v2(other), 0);
    assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
}

int main(void)
{
    char path[] = "/tmp/bennu-agent-test-XXXXXX";
    int fd = mkstemp(path);
    own_machine("agent-semantics");
    if (fd < 0)
        return 1;
    close(fd);
    setenv("BENNU_SIM_FAIL_FILE", path, 1);
    cu_load(&cu, need_env("BENNU_AGENT"), RTLD_NOW | RTLD_LOCAL);
    cu_load(&native, need_env("BENNU_DRIVER"), RTLD_NOW | RTLD_LOCAL);
    if (cu.cuInit(0) != CUDA_SUCCESS || cu.cuCtxCreate_v2(&ctx, 0, 0) != CUDA_SUCCESS ||
        bn_agent_find(getpid(), &agent) < 0) {
        fprintf(stderr, "the agent does not start\n");
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_conversion_threshold),
        cmocka_unit_test(test_bad_arguments_as_native),
        cmocka_unit_test(test_failure_leaves_nothing),
        cmocka_unit_test(test_conversion_fails),
        cmocka_unit_test(test_address_range),
        cmocka_unit_test(test_pointer_attributes),
        cmocka_unit_test(test_pitch),
        cmocka_unit_test(test_vmm_calls_refuse_converted_memory),
        cmocka_unit_test(test_context_takes_its_memory_along),
        cmocka_unit_test(test_context_that_cannot_be_asked_about),
        cmocka_unit_test(test_peer_access),
        cmocka_unit_test(test_tokens),
        cmocka_unit_test(test_foreign_and_host_memory_is_counted),
        cmocka_unit_test(test_get_proc_address),
        cmocka_unit_test(test_threads_allocate),
        cmocka_unit_test(test_spawn),
        cmocka_unit_test(test_capture_rules),
        cmocka_unit_test(test_free_during_capture_waits),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    bn_agent_free(agent);
    unlink(path);
    return failed;
}
