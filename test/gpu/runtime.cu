// SPDX-License-Identifier: MIT
// An ordinary program of the CUDA runtime: allocations, streams, a graph, a kernel, a sum. With -DDRIVER it is linked with the driver
// (-lcuda) and calls it too. Prints the same wherever it runs.
#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef DRIVER
#include <cuda.h>
#endif

#define MUST(call)                                                                                             \
    do {                                                                                                       \
        int rc_ = (int)(call);                                                                                 \
        if (rc_ != 0) {                                                                                        \
            printf("%s: %d\n", #call, rc_);                                                                    \
            exit(1);                                                                                           \
        }                                                                                                      \
    } while (0)

__device__ unsigned long long total;

__global__ void add(const unsigned *a, const unsigned *b, unsigned *c, size_t n)
{
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (size_t)blockDim.x)
        c[i] = a[i] + 3 * b[i];
}

__global__ void sum(const unsigned *c, size_t n)
{
    unsigned long long mine = 0;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += gridDim.x * (size_t)blockDim.x)
        mine += c[i];
    atomicAdd(&total, mine);
}

int main()
{
    const size_t n = 5000000;
    unsigned *a, *b, *c, *host = (unsigned *)malloc(n * 4);
    size_t pitch;
    void *pitched, *managed_not_used = NULL;
    cudaStream_t s;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaDeviceProp prop;
    int count;
    MUST(cudaGetDeviceCount(&count));
    MUST(cudaGetDeviceProperties(&prop, 0));
    printf("%d devices, %s, %d.%d\n", count, prop.name, prop.major, prop.minor);
    MUST(cudaMalloc((void **)&a, n * 4));
    MUST(cudaMalloc((void **)&b, n * 4));
    MUST(cudaMallocPitch(&pitched, &pitch, 1000, 5000));
    MUST(cudaStreamCreate(&s));
    MUST(cudaMallocAsync((void **)&c, n * 4, s));
    printf("pitch %zu\n", pitch);
    for (size_t i = 0; i < n; i++)
        host[i] = (unsigned)i;
    MUST(cudaMemcpyAsync(a, host, n * 4, cudaMemcpyHostToDevice, s));
    MUST(cudaMemsetAsync(b, 1, n * 4, s));
    MUST(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
    add<<<200, 256, 0, s>>>(a, b, c, n);
    sum<<<200, 256, 0, s>>>(c, n);
    MUST(cudaStreamEndCapture(s, &graph));
    MUST(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < 10; i++)
        MUST(cudaGraphLaunch(exec, s));
    MUST(cudaStreamSynchronize(s));
    unsigned long long got = 0;
    MUST(cudaMemcpyFromSymbol(&got, total, sizeof(got)));
    printf("sum %llu\n", got);
    cudaPointerAttributes attributes;
    MUST(cudaPointerGetAttributes(&attributes, a + 100));
    printf("pointer: type %d device %d same %d\n", (int)attributes.type, attributes.device,
           attributes.devicePointer == a + 100);
    printf("free of a wrong pointer: %d\n", (int)cudaFree(a + 1));
    cudaGetLastError();
    printf("too much: %d\n", (int)cudaMalloc(&managed_not_used, (size_t)1 << 45));
    cudaGetLastError();
#ifdef DRIVER
    CUdeviceptr base, p;
    size_t size;
    MUST(cuMemGetAddressRange(&base, &size, (CUdeviceptr)(a + 100)));
    printf("range %d %zu\n", base == (CUdeviceptr)a, size);
    MUST(cuMemAlloc(&p, 12345678));
    MUST(cuMemsetD8(p, 7, 12345678));
    MUST(cuMemFree(p));
#endif
    MUST(cudaFreeAsync(c, s));
    MUST(cudaFree(pitched));
    MUST(cudaFree(b));
    MUST(cudaFree(a));
    MUST(cudaDeviceReset());
    puts("ok");
    return 0;
}
