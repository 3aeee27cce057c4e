/* A small CUDA program that is linked or loads the driver in one of the ways programs do; argument 1 says which. Prints what it
 * saw, so that two runs can be compared.
 *   linked | local | deepbind | global | twice | rtld-default */
#include "cu.h"

#include <unistd.h>

/* From -lcuda where the program is linked with it. */
#ifdef LINKED
extern CUresult cuInit(unsigned int flags);
#endif

static int fail(const char *what, CUresult r)
{
    printf("%s: %d\n", what, r);
    return 1;
}

int main(int argc, char **argv)
{
    const char *how = argc > 1 ? argv[1] : "local";
    struct cu cu;
    CUcontext ctx;
    CUdeviceptr p;
    uint32_t word = 0;
    int flags = RTLD_NOW | RTLD_LOCAL;
    if (strcmp(how, "deepbind") == 0)
        flags |= RTLD_DEEPBIND;
    if (strcmp(how, "global") == 0 || strcmp(how, "rtld-default") == 0)
        flags = RTLD_LAZY | RTLD_GLOBAL;
    cu_load(&cu, "libcuda.so.1", flags);
    if (strcmp(how, "twice") == 0) {
        dlclose(cu.library);
        cu_load(&cu, "libcuda.so.1", flags);
    }
#ifdef LINKED
    CUresult r = cuInit(0);
#else
    CUresult r = cu.cuInit(0);
#endif
    if (strcmp(how, "rtld-default") == 0 && !dlsym(RTLD_DEFAULT, "cuMemAlloc_v2"))
        return fail("not in the global scope", 0);
    if (r != CUDA_SUCCESS)
        return fail("cuInit", r);
    if ((r = cu.cuCtxCreate_v2(&ctx, 0, 0)) || (r = cu.cuMemAlloc_v2(&p, 4 << 20)) ||
        (r = cu.cuMemsetD32_v2(p, 0xb0b0b0b0, 1 << 20)) || (r = cu.cuMemcpyDtoH_v2(&word, p + 4096, 4)))
        return fail("a call", r);
    printf("%s %x\n", how, word);
    if (getenv("BENNU_EXPECT_AGENT"))
        printf("%s\n", dlsym(cu.library, "bn_agent_version") ? "agent" : "no agent");
    return 0;
}
