/* SPDX-License-Identifier: MIT */

/* The simulated driver's rules inside one process. */

#include <dlfcn.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <cmocka.h>

#include "cuda.h"

static void devices(void)
{
    char name[64];
    int n, value;
    CUuuid a, b;

    setenv("BENNU_SIM_DEVICES", "2", 1);
    IS(CUDA_ERROR_NOT_INITIALIZED, cuDeviceGetCount(&n));
    IS(CUDA_ERROR_INVALID_VALUE, cuInit(1));
    OK(cuInit(0));
    OK(cuDriverGetVersion(&n));
    CHECK(n == 13000);
    OK(cuDeviceGetCount(&n));
    CHECK(n == 2);
    OK(cuDeviceGetName(name, sizeof(name), 0));
    CHECK(strcmp(name, "Simulated GPU") == 0);
    OK(cuDeviceGetUuid_v2(&a, 0));
    OK(cuDeviceGetUuid_v2(&b, 1));
    CHECK(memcmp(&a, &b, sizeof(a)) != 0);
    OK(cuDeviceGetAttribute(&value, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 0));
    CHECK(value == 1);
    OK(cuDeviceGetAttribute(&value, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 1));
    CHECK(value == 9);
    IS(CUDA_ERROR_INVALID_DEVICE, cuDeviceGetName(name, sizeof(name), 2));
}

static void contexts(void)
{
    CUcontext primary, other, got;
    CUdeviceptr p;
    unsigned flags;
    int active;

    OK(cuInit(0));
    OK(cuDevicePrimaryCtxGetState(0, &flags, &active));
    CHECK(!active);
    IS(CUDA_ERROR_INVALID_CONTEXT, cuMemAlloc_v2(&p, 8));
    OK(cuDevicePrimaryCtxRetain(&primary, 0));
    OK(cuCtxSetCurrent(primary));
    OK(cuCtxCreate_v2(&other, 0, 0));
    OK(cuCtxGetCurrent(&got));
    CHECK(got == other);
    OK(cuMemAlloc_v2(&p, 5 * MIB));
    CHECK(gpu_used() == 6 * MIB);
    OK(cuCtxDestroy_v2(other)); /* frees what it owned */
    CHECK(gpu_used() == 0);
    OK(cuCtxGetCurrent(&got));
    CHECK(got == primary);
    IS(CUDA_ERROR_CONTEXT_IS_DESTROYED, cuCtxSetCurrent(other));
    IS(CUDA_ERROR_INVALID_CONTEXT, cuCtxSetCurrent((CUcontext)&flags));
    OK(cuMemAlloc_v2(&p, 5 * MIB));
    OK(cuDevicePrimaryCtxReset_v2(0));
    IS(CUDA_ERROR_CONTEXT_IS_DESTROYED, cuMemAlloc_v2(&p, 8));
    OK(cuDevicePrimaryCtxGetState(0, &flags, &active));
    CHECK(!active);
    IS(CUDA_ERROR_INVALID_CONTEXT, cuDevicePrimaryCtxRelease_v2(0));
}

static void peers(void)
{
    CUcontext a, b;

    setenv("BENNU_SIM_DEVICES", "2", 1);
    OK(cuInit(0));
    OK(cuDevicePrimaryCtxRetain(&a, 0));
    OK(cuDevicePrimaryCtxRetain(&b, 1));
    OK(cuCtxSetCurrent(a));
    IS(CUDA_ERROR_PEER_ACCESS_NOT_ENABLED, cuCtxDisablePeerAccess(b));
    OK(cuCtxEnablePeerAccess(b, 0));
    IS(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, cuCtxEnablePeerAccess(b, 0));
    OK(cuCtxDisablePeerAccess(b));
    IS(CUDA_ERROR_INVALID_CONTEXT, cuCtxEnablePeerAccess(a, 0));
}

static void native_memory(void)
{
    CUdeviceptr small[3], big, base;
    size_t size, pitch;
    struct gpu gpu;
    char bytes[64];

    setenv("BENNU_SIM_MEMORY", "64M", 1);
    gpu_open(&gpu, 0);
    IS(CUDA_ERROR_INVALID_VALUE, cuMemAlloc_v2(&big, 0));
    for (int i = 0; i < 3; i++) {
        OK(cuMemAlloc_v2(&small[i], 1));
        CHECK(small[i] % 256 == 0);
    }
    OK(cuMemAlloc_v2(&big, 3 * MIB));
    CHECK(big % (2 * MIB) == 0);
    OK(cuMemGetAddressRange_v2(&base, &size, big + 1000));
    CHECK(base == big && size == 3 * MIB);
    OK(cuMemcpyHtoD_v2(big + 3 * MIB - 64, bytes, 64));
    IS(CUDA_ERROR_INVALID_VALUE, cuMemcpyHtoD_v2(big + 3 * MIB - 63, bytes, 64));
    IS(CUDA_ERROR_INVALID_VALUE, cuMemcpyDtoH_v2(bytes, small[1], 2));
    IS(CUDA_ERROR_INVALID_VALUE, cuMemFree_v2(big + 256));
    OK(cuMemFree_v2(big));
    IS(CUDA_ERROR_INVALID_VALUE, cuMemFree_v2(big));
    OK(cuMemFree_v2(0));
    IS(CUDA_ERROR_OUT_OF_MEMORY, cuMemAlloc_v2(&big, 64 * MIB)); /* small ones hold a block */
    OK(cuMemAlloc_v2(&big, 60 * MIB));
    OK(cuMemFree_v2(big));
    OK(cuMemAllocPitch_v2(&big, &pitch, 1000, 100, 4));
    CHECK(pitch == 1024);
    OK(cuMemGetAddressRange_v2(NULL, &size, big));
    CHECK(size == 102400);
    for (int i = 0; i < 3; i++)
        OK(cuMemFree_v2(small[i]));
}

static void copies(void)
{
    uint32_t words[1024];
    CUdeviceptr a, b;
    struct gpu gpu;

    gpu_open(&gpu, 0);
    OK(cuMemAlloc_v2(&a, 4096));
    OK(cuMemAlloc_v2(&b, 4 * MIB));
    OK(cuMemsetD32_v2(a, 0xdeadbeef, 1024));
    OK(cuMemcpyDtoD_v2(b + MIB, a, 4096));
    OK(cuMemcpyDtoH_v2(words, b + MIB, 4096));
    for (int i = 0; i < 1024; i++)
        CHECK(words[i] == 0xdeadbeef);
    IS(CUDA_ERROR_INVALID_VALUE, cuMemcpyDtoD_v2(b + 4 * MIB - 4095, a, 4096));
    IS(CUDA_ERROR_INVALID_VALUE, cuMemsetD32_v2(a + 4, 0, 1024));
}

static void pinned(void)
{
    char path[] = "test_calls.XXXXXX";
    unsigned type;
    struct gpu gpu;
    void *p, *file;
    int fd;

    gpu_open(&gpu, 0);
    OK(cuMemHostAlloc(&p, 10000, 0));
    memset(p, 7, 10000);
    OK(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, (CUdeviceptr)p));
    CHECK(type == CU_MEMORYTYPE_HOST);
    OK(cuMemFreeHost(p));
    IS(CUDA_ERROR_INVALID_VALUE, cuMemFreeHost(p));

    p = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    OK(cuMemHostRegister_v2(p, MIB, 0));
    IS(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, cuMemHostRegister_v2(p, MIB, 0));
    OK(cuMemHostUnregister(p));
    IS(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, cuMemHostUnregister(p));

    fd = mkstemp(path);
    CHECK(fd >= 0);
    unlink(path);
    CHECK(ftruncate(fd, MIB) == 0);
    file = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    IS(CUDA_ERROR_INVALID_VALUE, cuMemHostRegister_v2(file, MIB, 0));
    fd = memfd_create("test", MFD_CLOEXEC);
    CHECK(ftruncate(fd, MIB) == 0);
    file = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    OK(cuMemHostRegister_v2(file, MIB, 0));
}

static void vmm(void)
{
    CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUmemGenericAllocationHandle h, again;
    CUdeviceptr range, p;
    unsigned long long flags;
    struct gpu gpu;
    uint64_t word = 1, value;
    CUcontext ctx;
    int number;

    gpu_open(&gpu, 0);
    size_t before = gpu_used();

    IS(CUDA_ERROR_INVALID_VALUE, cuMemAddressReserve(&range, MIB, 0, 0, 0));
    OK(cuMemAddressReserve(&range, 64 * MIB, 0, 0, 0));
    h = vmm_create(4 * MIB);
    IS(CUDA_ERROR_INVALID_VALUE, cuMemMap(range, 4 * MIB, 2 * MIB, h, 0));
    IS(CUDA_ERROR_INVALID_VALUE, cuMemMap(range + 62 * MIB, 4 * MIB, 0, h, 0));
    OK(cuMemMap(range, 4 * MIB, 0, h, 0));
    IS(CUDA_ERROR_INVALID_VALUE, cuMemMap(range + 2 * MIB, 4 * MIB, 0, h, 0));
    IS(CUDA_ERROR_INVALID_VALUE, cuMemcpyHtoD_v2(range, &word, 8)); /* no access yet */
    OK(cuMemGetAccess(&flags, &access.location, range));
    CHECK(flags == CU_MEM_ACCESS_FLAGS_PROT_NONE);
    OK(cuMemSetAccess(range, 4 * MIB, &access, 1));
    OK(cuMemcpyHtoD_v2(range, &word, 8));
    IS(CUDA_ERROR_INVALID_VALUE, cuMemAddressFree(range, 64 * MIB)); /* something is mapped */
    OK(cuMemRelease(h));
    IS(CUDA_ERROR_INVALID_VALUE, cuMemRelease(h));
    CHECK(gpu_used() == before + 4 * MIB); /* mapped, so alive */
    OK(cuMemRetainAllocationHandle(&again, (void *)(range + MIB)));
    OK(cuMemUnmap(range, 4 * MIB));
    CHECK(gpu_used() == before + 4 * MIB); /* held, so alive */
    OK(cuMemMap(range + 32 * MIB, 4 * MIB, 0, again, 0));
    OK(cuMemSetAccess(range + 32 * MIB, 4 * MIB, &access, 1));
    OK(cuMemcpyDtoH_v2(&value, range + 32 * MIB, 8));
    CHECK(value == 1);
    OK(cuPointerGetAttribute(&ctx, CU_POINTER_ATTRIBUTE_CONTEXT, range + 32 * MIB));
    CHECK(ctx == NULL);
    OK(cuPointerGetAttribute(&number, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, range + 32 * MIB));
    CHECK(number == 0);
    OK(cuPointerGetAttribute(&value, CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, range + 32 * MIB));
    CHECK(value == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    OK(cuMemUnmap(range + 32 * MIB, 4 * MIB));
    OK(cuMemRelease(again));
    CHECK(gpu_used() == before);
    OK(cuMemAddressFree(range, 64 * MIB));
    p = range; /* an address that is free is given when asked for */
    OK(cuMemAddressReserve(&range, 2 * MIB, 0, p, 0));
    CHECK(range == p);
}

/* Keeps a stream busy until it is let go: no test depends on how long anything takes. */
static int latch[2];

static void wait_latch(void *data)
{
    char byte;

    (void)data;
    CHECK(read(latch[0], &byte, 1) == 1);
}

static void hold(CUstream stream)
{
    CHECK(pipe(latch) == 0);
    OK(cuLaunchHostFunc(stream, wait_latch, NULL));
}

static void let_go(void)
{
    CHECK(write(latch[1], "", 1) == 1);
}

static void streams(void)
{
    CUevent start, end;
    CUstream a, b;
    struct gpu gpu;
    float ms;

    gpu_open(&gpu, 0);
    OK(cuStreamCreate(&a, CU_STREAM_NON_BLOCKING));
    OK(cuStreamCreate(&b, CU_STREAM_NON_BLOCKING));
    OK(cuEventCreate(&start, 0));
    OK(cuEventCreate(&end, 0));
    OK(cuEventRecord(start, a));
    gpu_spin(&gpu, 20 * 1000 * 1000, a);
    hold(a);
    OK(cuEventRecord(end, a));
    IS(CUDA_ERROR_NOT_READY, cuStreamQuery(a)); /* really in flight */
    IS(CUDA_ERROR_NOT_READY, cuEventQuery(end));
    OK(cuStreamWaitEvent(b, end, 0));
    IS(CUDA_ERROR_NOT_READY, cuStreamQuery(b));
    let_go();
    OK(cuStreamSynchronize(b));
    OK(cuEventQuery(end));
    OK(cuEventElapsedTime(&ms, start, end));
    CHECK(ms >= 20);
    OK(cuStreamDestroy_v2(a));
    IS(CUDA_ERROR_INVALID_HANDLE, cuStreamSynchronize(a));
    OK(cuStreamSynchronize(b));
}

static void count_call(void *data)
{
    ++*(int *)data;
}

/* Work on the default stream and on a blocking one is in order without any event. */
static void default_stream(void)
{
    uint64_t value = 0;
    CUstream s;
    struct gpu gpu;
    CUdeviceptr p;
    void *args[] = {&p};
    int calls = 0;

    gpu_open(&gpu, 0);
    OK(cuMemAlloc_v2(&p, 8));
    OK(cuMemsetD8_v2(p, 0, 8));
    OK(cuStreamCreate(&s, CU_STREAM_DEFAULT));
    gpu_spin(&gpu, 50 * 1000 * 1000, s);
    OK(cuLaunchHostFunc(s, count_call, &calls));
    OK(cuLaunchKernel(gpu.increment, 1, 1, 1, 1, 1, 1, 0, s, args, NULL));
    OK(cuMemcpyDtoH_v2(&value, p, 8));
    CHECK(value == 1 && calls == 1);
}

static void graphs(void)
{
    uint64_t value = 0;
    CUgraphExec exec;
    CUgraph graph;
    CUstream s;
    struct gpu gpu;
    CUdeviceptr p;
    void *args[] = {&p};

    gpu_open(&gpu, 0);
    OK(cuMemAlloc_v2(&p, 8));
    OK(cuMemsetD8_v2(p, 0, 8));
    OK(cuStreamCreate(&s, CU_STREAM_NON_BLOCKING));
    OK(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_GLOBAL));
    for (int i = 0; i < 3; i++)
        OK(cuLaunchKernel(gpu.increment, 1, 1, 1, 1, 1, 1, 0, s, args, NULL));
    IS(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuStreamSynchronize(s));
    OK(cuStreamEndCapture(s, &graph));
    OK(cuGraphInstantiateWithFlags(&exec, graph, 0));
    OK(cuGraphDestroy(graph));
    OK(cuMemcpyDtoH_v2(&value, p, 8));
    CHECK(value == 0); /* captured, not run */
    for (int i = 0; i < 2; i++)
        OK(cuGraphLaunch(exec, s));
    OK(cuStreamSynchronize(s));
    OK(cuMemcpyDtoH_v2(&value, p, 8));
    CHECK(value == 6);
    OK(cuGraphExecDestroy(exec));
    IS(CUDA_ERROR_INVALID_VALUE, cuGraphLaunch(exec, s));
}

static void kernels(void)
{
    uint64_t value = 5, words = MIB, mask = ~0ull, buffer[1];
    CUdeviceptr p, global;
    size_t size;
    struct gpu gpu;
    CUfunction f;

    gpu_open(&gpu, 0);
    IS(CUDA_ERROR_NOT_FOUND, cuModuleGetFunction(&f, gpu.module, "bn_nothing"));
    OK(cuMemAlloc_v2(&p, 8 * MIB));
    gpu_fill(&gpu, p, 8 * MIB, 99);
    CHECK(gpu_bad(&gpu, p, 8 * MIB, 99) == 0);
    CHECK(gpu_bad(&gpu, p, 8 * MIB, 98) == MIB);
    OK(cuLaunchKernel(gpu.xor_, 1, 1, 1, 1, 1, 1, 0, NULL, (void *[]){&p, &words, &mask}, NULL));
    CHECK(gpu_bad(&gpu, p, 8 * MIB, 99) == MIB);
    OK(cuModuleGetGlobal_v2(&global, &size, gpu.module, "bn_global"));
    CHECK(size == 8);
    OK(cuLaunchKernel(gpu.global_add, 3, 1, 1, 7, 1, 1, 0, NULL, (void *[]){&value}, NULL));
    buffer[0] = 7; /* arguments by buffer */
    size = sizeof(buffer);
    OK(cuLaunchKernel(gpu.global_add, 1, 1, 1, 1, 1, 1, 0, NULL, NULL,
                      (void *[]){(void *)1, buffer, (void *)2, &size, NULL}));
    OK(cuMemcpyDtoH_v2(&value, global, 8));
    CHECK(value == 12);
    p = 4096; /* an address that is nobody's: an error that stays */
    OK(cuLaunchKernel(gpu.increment, 1, 1, 1, 1, 1, 1, 0, NULL, (void *[]){&p}, NULL));
    IS(CUDA_ERROR_ILLEGAL_ADDRESS, cuCtxSynchronize());
    IS(CUDA_ERROR_ILLEGAL_ADDRESS, cuMemAlloc_v2(&p, 8));
}

static void stream_ordered(void)
{
    CUdeviceptr p;
    struct gpu gpu;

    gpu_open(&gpu, 0);
    size_t before = gpu_used();

    OK(cuMemAllocAsync(&p, 8 * MIB, NULL));
    hold(NULL);
    OK(cuMemFreeAsync(p, NULL));
    IS(CUDA_ERROR_INVALID_VALUE, cuMemFreeAsync(p, NULL));
    CHECK(gpu_used() == before + 8 * MIB); /* its turn has not come */
    let_go();
    OK(cuCtxSynchronize());
    CHECK(gpu_used() == before);
}

static void faults(void)
{
    char path[] = "test_calls.XXXXXX";
    CUdeviceptr p;
    struct gpu gpu;
    int fd = mkstemp(path);

    CHECK(fd >= 0);
    setenv("BENNU_SIM_FAIL", "cuMemAlloc:2=2,cuMemFree:1+=999", 1);
    gpu_open(&gpu, 0);
    OK(cuMemAlloc_v2(&p, 8));
    IS(CUDA_ERROR_OUT_OF_MEMORY, cuMemAlloc_v2(&p, 8));
    OK(cuMemAlloc_v2(&p, 8));
    IS(CUDA_ERROR_UNKNOWN, cuMemFree_v2(p));
    IS(CUDA_ERROR_UNKNOWN, cuMemFree_v2(p));
    unlink(path);
}

static void fault_file(void)
{
    char path[] = "test_calls.XXXXXX";
    CUdeviceptr p;
    struct gpu gpu;
    int fd = mkstemp(path);

    CHECK(fd >= 0);
    setenv("BENNU_SIM_FAIL_FILE", path, 1);
    gpu_open(&gpu, 0);
    OK(cuMemAlloc_v2(&p, 8));
    CHECK(write(fd, "cuMemAlloc:2=719", 16) == 16); /* counts from here */
    OK(cuMemAlloc_v2(&p, 8));
    IS(CUDA_ERROR_LAUNCH_FAILED, cuMemAlloc_v2(&p, 8));
    CHECK(ftruncate(fd, 0) == 0);
    OK(cuMemAlloc_v2(&p, 8));
    unlink(path);
}

static void lookups(void)
{
    CUdriverProcAddressQueryResult status;
    void *p, *q;

    OK(cuGetProcAddress_v2("cuMemAlloc", &p, 12000, 0, &status));
    CHECK(p == (void *)cuMemAlloc_v2 && status == CU_GET_PROC_ADDRESS_SUCCESS);
    CHECK(dlsym(RTLD_DEFAULT, "cuMemAlloc") != p); /* each name has an address of its own */
    OK(cuGetProcAddress_v2("cuLaunchKernel", &p, 12000, CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM,
                           &status));
    OK(cuGetProcAddress_v2("cuLaunchKernel", &q, 12000, CU_GET_PROC_ADDRESS_LEGACY_STREAM, &status));
    CHECK(p != q && q == (void *)cuLaunchKernel);
    OK(cuGetProcAddress_v2("cuTexObjectCreate", &p, 12000, 0, &status)); /* not implemented, but there */
    CHECK(p && ((CUresult(*)(void *, void *, void *, void *))p)(NULL, NULL, NULL, NULL) ==
                   CUDA_ERROR_NOT_SUPPORTED);
    OK(cuGetProcAddress_v2("cuNothing", &p, 12000, 0, &status));
    CHECK(!p && status == CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
}

/* A child is no CUDA process and cannot become one; its parent goes on. */
static void forks(void)
{
    struct gpu gpu;
    CUdeviceptr p;
    int status;
    pid_t pid;

    gpu_open(&gpu, 0);
    OK(cuMemAlloc_v2(&p, 4 * MIB));
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        IS(CUDA_ERROR_NOT_INITIALIZED, cuMemFree_v2(p));
        IS(CUDA_ERROR_NOT_INITIALIZED, cuInit(0));
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid && status == 0);
    gpu_fill(&gpu, p, 4 * MIB, 1);
    CHECK(gpu_bad(&gpu, p, 4 * MIB, 1) == 0);
}

#define TEST(name)                           \
    static void test_##name(void **state)    \
    {                                        \
        (void)state;                         \
        assert_int_equal(isolated(name), 0); \
    }

TEST(devices)
TEST(contexts)
TEST(peers)
TEST(native_memory)
TEST(copies)
TEST(pinned)
TEST(vmm)
TEST(streams)
TEST(default_stream)
TEST(graphs)
TEST(kernels)
TEST(stream_ordered)
TEST(faults)
TEST(fault_file)
TEST(lookups)
TEST(forks)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_devices),
        cmocka_unit_test(test_contexts),
        cmocka_unit_test(test_peers),
        cmocka_unit_test(test_native_memory),
        cmocka_unit_test(test_copies),
        cmocka_unit_test(test_pinned),
        cmocka_unit_test(test_vmm),
        cmocka_unit_test(test_streams),
        cmocka_unit_test(test_default_stream),
        cmocka_unit_test(test_graphs),
        cmocka_unit_test(test_kernels),
        cmocka_unit_test(test_stream_ordered),
        cmocka_unit_test(test_faults),
        cmocka_unit_test(test_fault_file),
        cmocka_unit_test(test_lookups),
        cmocka_unit_test(test_forks),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
