/* Small allocations that share segments: to the program each is as if it were alone, and they are few to take away. This process is
 * the program and its controller; `cu` is the agent, `native` the driver behind it. */
#include "hold.h"
#include "machine.h"

#include <errno.h>
#include <pthread.h>
#include <unistd.h>

#define MIB ((size_t)1 << 20)
#define UNIT (2 * MIB)
#define MANY 2000

static struct cu cu, native;
static CUcontext ctx;
static struct bn_agent *agent;
static const char *fail_file;

static struct bn_agent_page page(void)
{
    struct bn_agent_page p;
    assert_int_equal(bn_agent_page(agent, &p), 0);
    return p;
}

static size_t free_memory(const struct cu *whose)
{
    size_t free_bytes, total;
    assert_int_equal(whose->cuMemGetInfo_v2(&free_bytes, &total), 0);
    return free_bytes;
}

static size_t units_of(size_t bytes)
{
    return (bytes + UNIT - 1) / UNIT * UNIT;
}

static uint32_t random_state = 7;
static unsigned random_below(unsigned n)
{
    random_state = random_state * 1664525u + 1013904223u;
    return (random_state >> 8) % n;
}

/* ---- blocks whose bytes are known ---- */

struct block {
    CUdeviceptr p; /* 0: none */
    size_t bytes;
    uint32_t seed;
    bool ends; /* only the first and last words have the pattern */
};

static uint32_t buffer[64 * MIB / 4];

static void fill(const struct block *b)
{
    size_t words = b->bytes / 4;
    if (b->ends) {
        uint32_t first = pattern(b->seed, 0), last = pattern(b->seed, words - 1);
        assert_int_equal(cu.cuMemcpyHtoD_v2(b->p, &first, 4), 0);
        assert_int_equal(cu.cuMemcpyHtoD_v2(b->p + (words - 1) * 4, &last, 4), 0);
        return;
    }
    for (size_t i = 0; i < words; i++)
        buffer[i] = pattern(b->seed, i);
    assert_int_equal(cu.cuMemcpyHtoD_v2(b->p, buffer, words * 4), 0);
}

static void check(const struct block *b)
{
    size_t words = b->bytes / 4, wrong = 0;
    if (b->ends) {
        uint32_t first, last;
        assert_int_equal(cu.cuMemcpyDtoH_v2(&first, b->p, 4), 0);
        assert_int_equal(cu.cuMemcpyDtoH_v2(&last, b->p + (words - 1) * 4, 4), 0);
        wrong = (first != pattern(b->seed, 0)) + (last != pattern(b->seed, words - 1));
    } else {
        assert_int_equal(cu.cuMemcpyDtoH_v2(buffer, b->p, words * 4), 0);
        for (size_t i = 0; i < words; i++)
            wrong += buffer[i] != pattern(b->seed, i);
    }
    if (wrong)
        fail_msg("%zu words of a block of %zu bytes differ", wrong, b->bytes);
}

static void get(struct block *b, size_t bytes, bool ends)
{
    static uint32_t seed;
    *b = (struct block){.bytes = bytes, .seed = ++seed, .ends = ends};
    assert_int_equal(cu.cuMemAlloc_v2(&b->p, bytes), 0);
    fill(b);
}

static void put(struct block *b)
{
    check(b);
    assert_int_equal(cu.cuMemFree_v2(b->p), 0);
    b->p = 0;
}

static void put_all(struct block *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (b[i].p)
            put(&b[i]);
}

/* The memory goes and comes back; `anew`: as other memory with the same bytes. Returns the number of segments. */
static size_t around(bool anew)
{
    struct held h = {0};
    CHECK(bn_agent_attach(agent, err));
    CHECK(bn_agent_close_gate(agent, 30000, err));
    held_take(&h, agent);
    if (anew)
        held_read(&h, &native);
    CHECK(bn_agent_evict(agent, err));
    if (anew)
        held_recreate(&h, &native);
    CHECK(bn_agent_import(agent, h.segs, h.fds, h.n, err));
    CHECK(bn_agent_open_gate(agent, err));
    bn_agent_detach(agent);
    size_t n = h.n;
    held_free(&h);
    return n;
}

/* What the page counts, beside what is known. */
static void check_page(const struct bn_agent_page *before, const struct block *b, size_t n, bool only_grown)
{
    struct bn_agent_page now = page();
    size_t live = 0, count = 0;
    for (size_t i = 0; i < n; i++)
        if (b[i].p) {
            live += units_of(b[i].bytes);
            count++;
        }
    size_t held = now.gpu[0].bytes - before->gpu[0].bytes;
    assert_int_equal(now.allocations - before->allocations, count);
    assert_true(held >= live);
    assert_true(now.gpu[0].segments - before->gpu[0].segments <= count);
    if (only_grown)
        assert_true((held - live) * 8 <= live);
    assert_int_equal(free_memory(&cu), free_memory(&native) + (held - live));
}

/* ---- number and waste ---- */

static void test_few_segments_little_waste(void **state)
{
    static struct block b[MANY];
    struct bn_agent_page before = page();
    size_t room = free_memory(&cu);
    for (size_t i = 0; i < MANY; i++) {
        get(&b[i], UNIT, true);
        if (i % 100 == 0)
            check_page(&before, b, i + 1, true);
    }
    assert_true(page().gpu[0].segments - before.gpu[0].segments <= 40 + MANY / 32);
    assert_true(around(false) <= before.gpu[0].segments + 40 + MANY / 32);
    /* Holes, an eviction, and other sizes into the holes. */
    for (size_t i = 0; i < MANY; i++)
        if (random_below(2))
            put(&b[i]);
    check_page(&before, b, MANY, false);
    around(false);
    uint64_t bytes = page().gpu[0].bytes;
    for (size_t i = 0; i < MANY / 3; i++)
        if (!b[i].p)
            get(&b[i], UNIT - 8 - random_below(100), true); /* below the threshold: the driver's own */
    assert_int_equal(page().gpu[0].bytes, bytes);
    put_all(b, MANY / 3);
    for (size_t i = 0; i < MANY / 3; i++)
        get(&b[i], UNIT, true);
    assert_true(page().gpu[0].bytes <= bytes); /* room is used before anything else */
    check_page(&before, b, MANY, false);
    around(false);
    put_all(b, MANY);
    assert_int_equal(page().gpu[0].segments, before.gpu[0].segments);
    assert_int_equal(page().gpu[0].bytes, before.gpu[0].bytes);
    assert_int_equal(free_memory(&cu), room);
}

/* Random sizes, random frees; every byte, also after the memory has been away. */
static void test_bytes(void **state)
{
    static struct block b[40];
    struct bn_agent_page before = page();
    for (int round = 0; round < 4; round++) {
        for (int step = 0; step < 80; step++) {
            struct block *one = &b[random_below(40)];
            if (one->p)
                put(one);
            else
                get(one, random_below(16) ? UNIT + random_below(3 * MIB) / 4 * 4 : 17 * MIB, false);
        }
        check_page(&before, b, 40, false);
        around(round % 2);
        for (size_t i = 0; i < 40; i++)
            if (b[i].p)
                check(&b[i]);
    }
    put_all(b, 40);
    assert_int_equal(page().gpu[0].segments, before.gpu[0].segments);
}

/* A loop that gets and frees has the driver's memory only while it has its own. */
static void test_nothing_is_kept_back(void **state)
{
    struct block b;
    size_t room = free_memory(&native);
    for (int i = 0; i < 10; i++) {
        get(&b, UNIT, true);
        assert_int_equal(free_memory(&native), room - UNIT);
        put(&b);
        assert_int_equal(free_memory(&native), room);
    }
}

/* ---- out of memory ---- */

static void test_every_block_that_fits(void **state)
{
    static struct block b[6000];
    struct bn_agent_page before = page();
    size_t n = 0, fit = free_memory(&native) / UNIT;
    assert_true(fit > 500 && fit < 6000);
    while (n < fit)
        get(&b[n++], UNIT, true);
    CUdeviceptr p;
    assert_int_equal(cu.cuMemAlloc_v2(&p, UNIT), CUDA_ERROR_OUT_OF_MEMORY);
    check_page(&before, b, n, false);
    put(&b[n / 2]);
    put(&b[n / 2 + 1]);
    get(&b[n / 2], UNIT, true);
    get(&b[n / 2 + 1], UNIT, true);
    assert_int_equal(cu.cuMemAlloc_v2(&p, UNIT), CUDA_ERROR_OUT_OF_MEMORY);
    put_all(b, n);
    assert_int_equal(page().gpu[0].segments, before.gpu[0].segments);
    assert_int_equal(free_memory(&native) / UNIT, fit);
}

/* There is no memory for a slab of the size that is due, or something else goes wrong with it. */
static void test_smaller_slabs(void **state)
{
    static const struct {
        const char *rule;
        size_t more; /* segments that come of it; 0: the block is the driver's own */
    } cases[] = {{"cuMemCreate:1=2", 1},
                 {"cuMemCreate:1=2,cuMemCreate:2=2", 1},
                 {"cuMemCreate:1=999,cuMemCreate:2=999", 0},
                 {"cuMemMap:1=2", 1},
                 {"cuMemMap:1=999", 0},
                 {"cuMemSetAccess:1=2", 1},
                 {"cuMemAddressReserve:1=2", 0},
                 {"cuMemAddressReserve:1=999", 0}};
    static struct block b[400];
    for (size_t k = 0; k < sizeof(cases) / sizeof(cases[0]); k++) {
        struct bn_agent_page before = page();
        size_t n = 0;
        while (n < 100)
            get(&b[n++], UNIT, true);
        while (page().gpu[0].bytes - before.gpu[0].bytes > n * UNIT)
            get(&b[n++], UNIT, true); /* until the room is used up: the next one needs a slab */
        size_t segments = page().gpu[0].segments, away = free_memory(&native);
        say_failure(fail_file, cases[k].rule);
        get(&b[n++], UNIT, true);
        assert_int_equal(page().gpu[0].segments, segments + cases[k].more);
        assert_true(away - free_memory(&native) < 14 * UNIT); /* 13 would have been its size */
        say_failure(fail_file, "none:1=1");
        put_all(b, n);
        assert_int_equal(page().gpu[0].segments, before.gpu[0].segments);
        assert_int_equal(page().native_bytes, before.native_bytes);
    }
}

/* ---- what the program may ask ---- */

static const CUpointer_attribute all_attributes[] = {
    CU_POINTER_ATTRIBUTE_CONTEXT,
    CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
    CU_POINTER_ATTRIBUTE_SYNC_MEMOPS,
    CU_POINTER_ATTRIBUTE_IS_MANAGED,
    CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
    CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE,
    CU_POINTER_ATTRIBUTE_RANGE_SIZE,
    CU_POINTER_ATTRIBUTE_MAPPED,
    CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES,
    CU_POINTER_ATTRIBUTE_ACCESS_FLAGS,
    CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE,
    CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, /* from here on: not compared by value */
    CU_POINTER_ATTRIBUTE_MAPPING_SIZE,     /* the simulated driver's own mappings have the size asked for */
    CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR,
    CU_POINTER_ATTRIBUTE_BUFFER_ID,
    CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID,
};
#define N_ATTRIBUTES (sizeof(all_attributes) / sizeof(all_attributes[0]))
#define N_COMPARED 11

static uint64_t attribute(CUpointer_attribute which, CUdeviceptr p)
{
    uint64_t value = 0, listed = 0;
    void *data[] = {&listed};
    assert_int_equal(cu.cuPointerGetAttribute(&value, which, p), 0);
    assert_int_equal(cu.cuPointerGetAttributes(1, &which, data, p), 0);
    assert_int_equal(value, listed);
    return value;
}

static void compare_attributes(CUdeviceptr ours, CUdeviceptr theirs)
{
    for (size_t i = 0; i < N_ATTRIBUTES; i++) {
        uint64_t a = 0, b = 0;
        CUresult r = native.cuPointerGetAttribute(&b, all_attributes[i], theirs);
        if (cu.cuPointerGetAttribute(&a, all_attributes[i], ours) != r || (i < N_COMPARED && a != b))
            fail_msg("attribute %d: %llx instead of %llx", all_attributes[i], (unsigned long long)a,
                     (unsigned long long)b);
    }
}

/* Of one that was freed the program is told what the driver tells of memory that is not there. */
static void compare_freed(CUdeviceptr ours, CUdeviceptr theirs)
{
    CUdeviceptr base;
    size_t size;
    CUipcMemHandle ipc;
    CUmemGenericAllocationHandle handle;
    CUmemLocation here = {CU_MEM_LOCATION_TYPE_DEVICE, 0};
    unsigned long long flags;
    int on = 1;
    compare_attributes(ours, theirs);
    assert_int_equal(cu.cuMemGetAddressRange_v2(&base, &size, ours),
                     native.cuMemGetAddressRange_v2(&base, &size, theirs));
    assert_int_equal(cu.cuIpcGetMemHandle(&ipc, ours), native.cuIpcGetMemHandle(&ipc, theirs));
    assert_int_equal(cu.cuMemGetAccess(&flags, &here, ours), native.cuMemGetAccess(&flags, &here, theirs));
    assert_int_equal(cu.cuMemRetainAllocationHandle(&handle, (void *)ours),
                     native.cuMemRetainAllocationHandle(&handle, (void *)theirs));
    assert_int_equal(cu.cuPointerSetAttribute(&on, CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, ours),
                     native.cuPointerSetAttribute(&on, CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, theirs));
    assert_int_equal(cu.cuMemFree_v2(ours), native.cuMemFree_v2(theirs));
}

static void test_each_seems_alone(void **state)
{
    static const size_t sizes[] = {UNIT, UNIT + 5, 2 * UNIT, 2 * UNIT + MIB, 7 * MIB + 3, 16 * MIB};
    static struct block b[120];
    static uint64_t ids[120];
    struct bn_agent_page before = page();
    for (size_t i = 0; i < 120; i++) {
        get(&b[i], sizes[i % 6], true);
        ids[i] = attribute(CU_POINTER_ATTRIBUTE_BUFFER_ID, b[i].p);
        for (size_t k = 0; k < i; k++)
            assert_int_not_equal(ids[i], ids[k]);
    }
    assert_true(page().gpu[0].segments - before.gpu[0].segments < 80);
    for (size_t i = 0; i < 120; i++) {
        CUdeviceptr base, theirs, at = b[i].p + b[i].bytes - 1;
        size_t size;
        assert_int_equal(cu.cuMemGetAddressRange_v2(&base, &size, at), 0);
        assert_int_equal(base, b[i].p);
        assert_int_equal(size, b[i].bytes);
        assert_int_equal(attribute(CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, at), b[i].p);
        assert_int_equal(attribute(CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, at), b[i].p);
        assert_int_equal(attribute(CU_POINTER_ATTRIBUTE_MAPPING_SIZE, at), units_of(b[i].bytes));
        assert_int_equal(attribute(CU_POINTER_ATTRIBUTE_BUFFER_ID, at), ids[i]);
        assert_int_equal(native.cuMemAlloc_v2(&theirs, b[i].bytes), 0);
        compare_attributes(b[i].p + 100, theirs + 100);
        assert_int_equal(native.cuMemFree_v2(theirs), 0);
        if (b[i].bytes > UNIT) /* a place inside is no allocation */
            assert_int_equal(cu.cuMemFree_v2(b[i].p + UNIT), native.cuMemFree_v2(theirs));
    }
    /* The same place again is another buffer. */
    for (size_t i = 30; i < 90; i += 7) {
        CUdeviceptr theirs, was = b[i].p;
        put(&b[i]);
        assert_int_equal(native.cuMemAlloc_v2(&theirs, b[i].bytes), 0);
        assert_int_equal(native.cuMemFree_v2(theirs), 0);
        compare_freed(was, theirs);
        compare_freed(was + MIB, theirs);
        get(&b[i], b[i].bytes, true);
        for (size_t k = 0; k < 120; k++)
            assert_int_not_equal(attribute(CU_POINTER_ATTRIBUTE_BUFFER_ID, b[i].p), ids[k]);
    }
    around(false);
    for (size_t i = 0; i < 30; i++)
        assert_int_equal(attribute(CU_POINTER_ATTRIBUTE_BUFFER_ID, b[i].p), ids[i]);
    put_all(b, 120);
}

/* The driver refuses to set it for our memory, which the simulated one does when told to. */
static void test_sync_memops_of_one(void **state)
{
    static struct block b[40];
    int on = 1;
    for (size_t i = 0; i < 40; i++)
        get(&b[i], UNIT, true);
    say_failure(fail_file, "cuPointerSetAttribute:1=801");
    assert_int_equal(cu.cuPointerSetAttribute(&on, CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, b[20].p), 0);
    say_failure(fail_file, "none:1=1");
    for (size_t i = 0; i < 40; i++)
        assert_int_equal(attribute(CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, b[i].p), i == 20);
    put_all(b, 40);
    get(&b[0], UNIT, true);
    assert_int_equal(attribute(CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, b[0].p), 0);
    put(&b[0]);
}

/* A handle on a range of addresses is of one allocation, not of its neighbours. */
static void test_range_handles(void **state)
{
    static struct block b[40];
    int fd = -1;
    for (size_t i = 0; i < 40; i++)
        get(&b[i], UNIT + 4096, true);
    CUdeviceptr p = b[30].p;
    CUresult inside = native.cuMemGetHandleForAddressRange(&fd, p, UNIT, 1, 0);
    assert_int_not_equal(inside, CUDA_ERROR_INVALID_VALUE);
    assert_int_equal(cu.cuMemGetHandleForAddressRange(&fd, p, UNIT, 1, 0), inside);
    assert_int_equal(cu.cuMemGetHandleForAddressRange(&fd, p, 2 * UNIT, 1, 0), inside);
    assert_int_equal(cu.cuMemGetHandleForAddressRange(&fd, p, 2 * UNIT + 4096, 1, 0),
                     CUDA_ERROR_INVALID_VALUE);
    assert_int_equal(cu.cuMemGetHandleForAddressRange(&fd, p + UNIT, 2 * UNIT, 1, 0),
                     CUDA_ERROR_INVALID_VALUE);
    assert_int_equal(cu.cuMemGetHandleForAddressRange(&fd, p, ~(size_t)0, 1, 0), CUDA_ERROR_INVALID_VALUE);
    put(&b[30]);
    assert_int_equal(cu.cuMemGetHandleForAddressRange(&fd, p, UNIT, 1, 0), CUDA_ERROR_INVALID_VALUE);
    put_all(b, 40);
}

/* ---- contexts ---- */

static void test_contexts_share_nothing(void **state)
{
    static struct block mine[150], others[150];
    CUcontext other;
    struct bn_agent_page before = page();
    for (int reset = 0; reset < 2; reset++) {
        if (reset)
            assert_int_equal(cu.cuDevicePrimaryCtxRetain(&other, 0), 0);
        else
            assert_int_equal(cu.cuCtxCreate_v2(&other, 0, 0), 0);
        for (size_t i = 0; i < 150; i++) {
            assert_int_equal(cu.cuCtxSetCurrent(i % 2 ? ctx : other), 0);
            get(&mine[i], UNIT, true);
            assert_int_equal(cu.cuCtxSetCurrent(i % 2 ? other : ctx), 0);
            get(&others[i], 2 * UNIT, true);
        }
        for (size_t i = 0; i < 150; i += 3) { /* freed from wherever */
            put(&mine[i]);
            put(&others[i]);
        }
        if (reset)
            assert_int_equal(cu.cuDevicePrimaryCtxReset_v2(0), 0);
        else
            assert_int_equal(cu.cuCtxDestroy_v2(other), 0);
        if (reset)
            cu.cuDevicePrimaryCtxRelease_v2(0);
        assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
        for (size_t i = 0; i < 150; i++) { /* exactly theirs are gone */
            struct block *gone = i % 2 ? &others[i] : &mine[i];
            CUdeviceptr base;
            if (gone->p)
                assert_int_not_equal(cu.cuMemGetAddressRange_v2(&base, NULL, gone->p), 0);
            gone->p = 0;
        }
        struct block all[300];
        memcpy(all, mine, sizeof(mine));
        memcpy(all + 150, others, sizeof(others));
        check_page(&before, all, 300, false);
        around(false);
        put_all(mine, 150);
        put_all(others, 150);
        assert_int_equal(page().gpu[0].segments, before.gpu[0].segments);
    }
}

static unsigned access_from(int device, CUdeviceptr p)
{
    unsigned long long flags = 9;
    CUmemLocation from = {CU_MEM_LOCATION_TYPE_DEVICE, device};
    assert_int_equal(cu.cuMemGetAccess(&flags, &from, p), 0);
    return (unsigned)flags;
}

static void test_peers(void **state)
{
    static struct block b[60];
    CUcontext second, third;
    CUdeviceptr there;
    assert_int_equal(cu.cuCtxCreate_v2(&third, 0, 0), 0); /* of the same device: not concerned */
    struct block apart[20];
    for (size_t i = 0; i < 20; i++)
        get(&apart[i], UNIT, true);
    assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
    for (size_t i = 0; i < 30; i++)
        get(&b[i], UNIT, true);
    assert_int_equal(cu.cuCtxCreate_v2(&second, 0, 1), 0);
    assert_int_equal(cu.cuMemAlloc_v2(&there, UNIT), 0);
    assert_int_equal(cu.cuCtxEnablePeerAccess(ctx, 0), 0);
    assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
    for (size_t i = 30; i < 60; i++)
        get(&b[i], UNIT, true);
    for (int round = 0; round < 2; round++) {
        for (size_t i = 0; i < 60; i++)
            assert_int_equal(access_from(1, b[i].p), CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
        for (size_t i = 0; i < 20; i++)
            assert_int_equal(access_from(1, apart[i].p), CU_MEM_ACCESS_FLAGS_PROT_NONE);
        around(false);
    }
    assert_int_equal(cu.cuCtxSetCurrent(second), 0);
    assert_int_equal(cu.cuCtxDisablePeerAccess(ctx), 0);
    for (size_t i = 0; i < 60; i++)
        assert_int_equal(access_from(1, b[i].p), CU_MEM_ACCESS_FLAGS_PROT_NONE);
    /* Half-way through the driver refuses: all is as before. */
    say_failure(fail_file, "cuMemSetAccess:5=999");
    assert_int_equal(cu.cuCtxEnablePeerAccess(ctx, 0), CUDA_ERROR_UNKNOWN);
    say_failure(fail_file, "none:1=1");
    for (size_t i = 0; i < 60; i++)
        assert_int_equal(access_from(1, b[i].p), CU_MEM_ACCESS_FLAGS_PROT_NONE);
    assert_int_equal(cu.cuCtxDestroy_v2(second), 0);
    assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
    assert_int_equal(cu.cuCtxDestroy_v2(third), 0);
    put_all(b, 60);
}

/* ---- when room may be used again ---- */

/* Get blocks until one lies at `p`, and free them: whether one did. */
static bool comes_again(CUdeviceptr p)
{
    CUdeviceptr got[40];
    bool seen = false;
    for (size_t i = 0; i < 40; i++) {
        assert_int_equal(cu.cuMemAlloc_v2(&got[i], UNIT), 0);
        seen = seen || got[i] == p;
    }
    for (size_t i = 0; i < 40; i++)
        assert_int_equal(cu.cuMemFree_v2(got[i]), 0);
    return seen;
}

static void test_room_waits_for_captures(void **state)
{
    static struct block b[60];
    CUstream stream;
    CUgraph graph;
    struct bn_agent_page before = page();
    for (size_t i = 0; i < 60; i++)
        get(&b[i], UNIT, true);
    CUdeviceptr p = b[50].p;
    assert_int_equal(cu.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), 0);
    assert_int_equal(cu.cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_RELAXED), 0);
    assert_int_equal(cu.cuMemFree_v2(p), 0);
    b[50].p = 0;
    assert_int_not_equal(cu.cuMemFree_v2(p), 0);
    assert_int_equal(page().allocations, before.allocations + 59);
    assert_false(comes_again(p));
    assert_int_equal(cu.cuStreamEndCapture(stream, &graph), 0);
    assert_true(comes_again(p));
    /* Freed during a capture in a context that goes meanwhile. */
    CUcontext other;
    CUdeviceptr theirs[20];
    assert_int_equal(cu.cuCtxCreate_v2(&other, 0, 0), 0);
    for (size_t i = 0; i < 20; i++)
        assert_int_equal(cu.cuMemAlloc_v2(&theirs[i], UNIT), 0);
    assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
    assert_int_equal(cu.cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_RELAXED), 0);
    assert_int_equal(cu.cuMemFree_v2(theirs[19]), 0);
    assert_int_equal(cu.cuMemFree_v2(theirs[10]), 0);
    assert_int_equal(cu.cuCtxDestroy_v2(other), 0);
    assert_int_equal(cu.cuStreamEndCapture(stream, &graph), 0);
    assert_int_equal(cu.cuStreamDestroy_v2(stream), 0);
    put_all(b, 60);
    assert_int_equal(page().gpu[0].segments, before.gpu[0].segments);
    assert_int_equal(page().allocations, before.allocations);
}

static void none_is(CUdeviceptr p, CUdeviceptr got[40])
{
    for (size_t i = 0; i < 40; i++) {
        assert_int_equal(cu.cuMemAlloc_v2(&got[i], UNIT), 0);
        assert_int_not_equal(got[i], p);
    }
}

/* What was freed during a capture, and cannot be waited for after it, is given to nobody until it can, or until its context has
 * gone. Another context's is not held up by that. */
static void test_room_that_cannot_be_waited_for(void **state)
{
    static struct block b[60];
    CUdeviceptr theirs[20], got[40];
    CUcontext other;
    CUstream stream;
    CUgraph graph;
    struct bn_agent_page before = page();
    for (int round = 0; round < 2; round++) {
        for (size_t i = 0; i < 60; i++)
            get(&b[i], UNIT, true);
        CUdeviceptr p = b[50].p;
        assert_int_equal(cu.cuCtxCreate_v2(&other, 0, 0), 0);
        for (size_t i = 0; i < 20; i++)
            assert_int_equal(cu.cuMemAlloc_v2(&theirs[i], UNIT), 0);
        assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
        assert_int_equal(cu.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), 0);
        assert_int_equal(cu.cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_RELAXED), 0);
        for (size_t i = 0; i < 20; i++)
            assert_int_equal(cu.cuMemFree_v2(theirs[i]), 0);
        assert_int_equal(cu.cuMemFree_v2(p), 0);
        b[50].p = 0;
        uint64_t segments = page().gpu[0].segments;
        say_failure(fail_file, round == 0 ? "cuCtxSynchronize:1+=700" : "cuCtxSynchronize:1=700");
        assert_int_equal(cu.cuStreamEndCapture(stream, &graph), 0);
        if (round == 1) { /* p was the first to be tried */
            assert_true(page().gpu[0].segments < segments);
        } else {
            assert_int_equal(page().gpu[0].segments, segments);
            none_is(p, got);
            assert_int_equal(cu.cuCtxDestroy_v2(other), 0);
            say_failure(fail_file, "none:1=1");
            for (size_t i = 0; i < 40; i++)
                assert_int_equal(cu.cuMemFree_v2(got[i]), 0);
        }
        assert_true(comes_again(p));
        if (round == 1)
            assert_int_equal(cu.cuCtxDestroy_v2(other), 0);
        assert_int_equal(cu.cuGraphDestroy(graph), 0);
        assert_int_equal(cu.cuStreamDestroy_v2(stream), 0);
        put_all(b, 60);
        assert_int_equal(page().gpu[0].segments, before.gpu[0].segments);
        assert_int_equal(page().allocations, before.allocations);
    }
}

static int held_up;

static void hold_up(void *unused)
{
    while (__atomic_load_n(&held_up, __ATOMIC_ACQUIRE))
        usleep(1000);
}

static void *free_it(void *p)
{
    if (cu.cuCtxSetCurrent(ctx) != CUDA_SUCCESS)
        return (void *)1;
    return cu.cuMemFree_v2(*(CUdeviceptr *)p) == CUDA_SUCCESS ? NULL : (void *)2;
}

/* As with the driver's cuMemFree, nobody gets memory that work of before may still use. */
static void room_waits(CUcontext owner, CUcontext worker)
{
    static struct block b[60];
    CUstream stream;
    pthread_t thread;
    CUdeviceptr base;
    void *result;
    assert_int_equal(cu.cuCtxSetCurrent(owner), 0);
    for (size_t i = 0; i < 60; i++)
        get(&b[i], UNIT, true);
    assert_int_equal(cu.cuCtxSetCurrent(worker), 0);
    assert_int_equal(cu.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), 0);
    held_up = 1;
    assert_int_equal(cu.cuLaunchHostFunc(stream, hold_up, NULL), 0);
    assert_int_equal(cu.cuCtxSetCurrent(owner), 0);
    CUdeviceptr p = b[50].p;
    assert_int_equal(pthread_create(&thread, NULL, free_it, &p), 0);
    while (cu.cuMemGetAddressRange_v2(&base, NULL, p) == CUDA_SUCCESS) /* until it is being freed */
        usleep(1000);
    CUdeviceptr got[40];
    none_is(p, got);
    __atomic_store_n(&held_up, 0, __ATOMIC_RELEASE);
    pthread_join(thread, &result);
    assert_null(result);
    for (size_t i = 0; i < 40; i++)
        assert_int_equal(cu.cuMemFree_v2(got[i]), 0);
    assert_true(comes_again(p));
    b[50].p = 0;
    put_all(b, 60);
    assert_int_equal(cu.cuCtxSetCurrent(worker), 0);
    assert_int_equal(cu.cuStreamDestroy_v2(stream), 0);
    assert_int_equal(cu.cuCtxSetCurrent(owner), 0);
}

static void test_room_waits_for_work(void **state)
{
    room_waits(ctx, ctx);
}

/* However many may use it. */
static void test_room_waits_for_peers(void **state)
{
    CUcontext peers[70], top;
    for (size_t i = 0; i < 70; i++) {
        assert_int_equal(cu.cuCtxCreate_v2(&peers[i], 0, 1), 0);
        assert_int_equal(cu.cuCtxEnablePeerAccess(ctx, 0), 0);
        assert_int_equal(cu.cuCtxPopCurrent_v2(&top), 0);
    }
    room_waits(ctx, peers[0]);
    room_waits(ctx, peers[69]);
    for (size_t i = 0; i < 70; i++)
        assert_int_equal(cu.cuCtxDestroy_v2(peers[i]), 0);
    assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
}

/* ---- green contexts: their memory is the primary context's ---- */

static void test_green(void **state)
{
    static struct block b[30];
    struct bn_agent_page before = page();
    CUgreenCtx green, other;
    CUcontext current, primary, whose = NULL;
    CUdeviceptr little;
    assert_int_equal(cu.cuGreenCtxCreate(&green, NULL, 0, 0), 0);
    assert_int_equal(cu.cuCtxFromGreenCtx(&current, green), 0);
    assert_int_equal(cu.cuCtxSetCurrent(current), 0);
    assert_int_equal(cu.cuMemAlloc_v2(&little, 4096), 0);
    for (size_t i = 0; i < 30; i++)
        get(&b[i], UNIT, true);
    assert_int_equal(cu.cuDevicePrimaryCtxRetain(&primary, 0), 0);
    assert_int_equal(cu.cuPointerGetAttribute(&whose, CU_POINTER_ATTRIBUTE_CONTEXT, b[7].p), 0);
    assert_ptr_equal(whose, primary);
    room_waits(current, primary);

    assert_int_equal(cu.cuCtxSetCurrent(primary), 0);
    assert_int_equal(cu.cuGreenCtxDestroy(green), 0);
    for (size_t i = 0; i < 30; i++)
        check(&b[i]);
    check_page(&before, b, 30, true);
    assert_true(page().native_bytes > before.native_bytes);
    around(true);
    put_all(b, 30);
    assert_int_equal(cu.cuMemFree_v2(little), 0);
    assert_int_equal(page().native_bytes, before.native_bytes);

    /* The last that keeps the primary context: everything goes. */
    assert_int_equal(cu.cuGreenCtxCreate(&other, NULL, 0, 0), 0);
    assert_int_equal(cu.cuDevicePrimaryCtxRelease_v2(0), 0);
    assert_int_equal(cu.cuCtxFromGreenCtx(&current, other), 0);
    assert_int_equal(cu.cuCtxSetCurrent(current), 0);
    get(&b[0], UNIT, true);
    assert_int_equal(cu.cuGreenCtxDestroy(other), 0);
    assert_int_equal(cu.cuCtxSetCurrent(ctx), 0);
    assert_int_equal(page().gpu[0].segments, before.gpu[0].segments);
    assert_int_equal(page().allocations, before.allocations);
}

/* ---- threads ---- */

static void *churn(void *arg)
{
    CUdeviceptr held[24] = {0};
    uint32_t x = (uint32_t)(uintptr_t)arg * 2654435761u, marks[24] = {0};
    if (cu.cuCtxSetCurrent(ctx) != CUDA_SUCCESS)
        return (void *)1;
    for (int i = 0; i < 600; i++) {
        x = x * 1664525u + 1013904223u;
        unsigned slot = (x >> 16) % 24, units = 1 + (x >> 8) % 3;
        if (held[slot]) {
            uint32_t word = 0;
            if (cu.cuMemcpyDtoH_v2(&word, held[slot], 4) != CUDA_SUCCESS || word != marks[slot] ||
                cu.cuMemFree_v2(held[slot]) != CUDA_SUCCESS)
                return (void *)2;
            held[slot] = 0;
        } else {
            marks[slot] = x;
            if (cu.cuMemAlloc_v2(&held[slot], units * UNIT) != CUDA_SUCCESS ||
                cu.cuMemcpyHtoD_v2(held[slot], &marks[slot], 4) != CUDA_SUCCESS)
                return (void *)3;
        }
    }
    for (int i = 0; i < 24; i++)
        if (held[i] && cu.cuMemFree_v2(held[i]) != CUDA_SUCCESS)
            return (void *)4;
    return NULL;
}

static void test_threads(void **state)
{
    pthread_t threads[4];
    struct bn_agent_page before = page();
    for (size_t i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, churn, (void *)(i + 1)), 0);
    for (int round = 0; round < 5; round++)
        around(false);
    for (int i = 0; i < 4; i++) {
        void *result;
        pthread_join(threads[i], &result);
        assert_ptr_equal(result, NULL);
    }
    assert_int_equal(page().allocations, before.allocations);
    assert_int_equal(page().gpu[0].segments, before.gpu[0].segments);
}

int main(void)
{
    char path[] = "/tmp/bennu-agent-test-XXXXXX";
    int fd = mkstemp(path);
    own_machine("agent-slabs");
    if (fd < 0)
        return 1;
    close(fd);
    fail_file = path;
    setenv("BENNU_SIM_FAIL_FILE", path, 1);
    cu_load(&cu, need_env("BENNU_AGENT"), RTLD_NOW | RTLD_LOCAL);
    cu_load(&native, need_env("BENNU_DRIVER"), RTLD_NOW | RTLD_LOCAL);
    if (cu.cuInit(0) != CUDA_SUCCESS || cu.cuCtxCreate_v2(&ctx, 0, 0) != CUDA_SUCCESS ||
        bn_agent_find(getpid(), &agent) < 0) {
        fprintf(stderr, "the agent does not start\n");
        unlink(path);
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_few_segments_little_waste),
        cmocka_unit_test(test_bytes),
        cmocka_unit_test(test_nothing_is_kept_back),
        cmocka_unit_test(test_every_block_that_fits),
        cmocka_unit_test(test_smaller_slabs),
        cmocka_unit_test(test_each_seems_alone),
        cmocka_unit_test(test_sync_memops_of_one),
        cmocka_unit_test(test_range_handles),
        cmocka_unit_test(test_contexts_share_nothing),
        cmocka_unit_test(test_peers),
        cmocka_unit_test(test_room_waits_for_captures),
        cmocka_unit_test(test_room_that_cannot_be_waited_for),
        cmocka_unit_test(test_room_waits_for_work),
        cmocka_unit_test(test_room_waits_for_peers),
        cmocka_unit_test(test_green),
        cmocka_unit_test(test_threads),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    bn_agent_free(agent);
    unlink(path);
    return failed;
}
