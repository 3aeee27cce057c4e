// A program with the static CUDA runtime in it: what does it see?
#include <cstdio>
#include <cuda_runtime.h>

int main()
{
    int count = -1, version = -1;
    cudaError_t e = cudaGetDeviceCount(&count);
    printf("cudaGetDeviceCount %d %s\n", e, cudaGetErrorName(e));
    e = cudaDriverGetVersion(&version);
    printf("cudaDriverGetVersion %d %s\n", e, version > 0 ? "some" : "none");
    void *p = nullptr;
    e = cudaMalloc(&p, 4 << 20);
    printf("cudaMalloc %d\n", e);
    return 0;
}
