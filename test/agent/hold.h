/* GPU memory of a process in the hands of a controller, which is the test. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cu.h"

#include "wire/agent_client.h"

#include <unistd.h>

/* The controller's own driver, with a context; ends the test where there is none. */
static inline void sim_start(struct cu *sim)
{
    static CUcontext context;
    cu_load(sim, need_env("BENNU_DRIVER"), RTLD_NOW | RTLD_LOCAL);
    if (sim->cuInit(0) == CUDA_SUCCESS && sim->cuCtxCreate_v2(&context, 0, 0) == CUDA_SUCCESS)
        return;
    fprintf(stderr, "the simulated driver does not start\n");
    exit(1);
}

/* What a controller holds of a program. */
struct held {
    struct bn_agent_segment *segs;
    size_t n;
    int *fds;
    unsigned char **bytes; /* after held_read */
};

static inline void held_free(struct held *h)
{
    for (size_t i = 0; i < h->n; i++) {
        if (h->fds && h->fds[i] >= 0)
            close(h->fds[i]);
        if (h->bytes)
            free(h->bytes[i]);
    }
    free(h->fds);
    free(h->segs);
    free(h->bytes);
    *h = (struct held){0};
}

#define CHECK(call)                                    \
    do {                                               \
        struct bn_error e_ = BN_ERROR_INIT;            \
        struct bn_error *err = &e_;                    \
        int r_ = (call);                               \
        if (r_ < 0)                                    \
            fail_msg("%s: %d %s", #call, r_, e_.text); \
    } while (0)

/* Take over what a process has, whose gate is closed. */
static inline void held_take(struct held *h, struct bn_agent *a)
{
    CHECK(bn_agent_list(a, &h->segs, &h->n, err));
    h->fds = malloc((h->n + 1) * sizeof(int));
    CHECK(bn_agent_export(a, h->segs, h->n, h->fds, err));
}

/* Map a descriptor's memory here, and copy it to (write) or from `bytes`. */
static inline void held_transfer(const struct cu *sim, int fd, size_t size, unsigned char *bytes, bool write)
{
    CUmemGenericAllocationHandle handle;
    CUdeviceptr va;
    CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    assert_int_equal(sim->cuMemImportFromShareableHandle(&handle, (void *)(intptr_t)fd,
                                                         CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
                     0);
    assert_int_equal(sim->cuMemAddressReserve(&va, size, 0, 0, 0), 0);
    assert_int_equal(sim->cuMemMap(va, size, 0, handle, 0), 0);
    assert_int_equal(sim->cuMemSetAccess(va, size, &access, 1), 0);
    if (write)
        assert_int_equal(sim->cuMemcpyHtoD_v2(va, bytes, size), 0);
    else
        assert_int_equal(sim->cuMemcpyDtoH_v2(bytes, va, size), 0);
    assert_int_equal(sim->cuMemUnmap(va, size), 0);
    assert_int_equal(sim->cuMemAddressFree(va, size), 0);
    assert_int_equal(sim->cuMemRelease(handle), 0);
}

static inline void held_read(struct held *h, const struct cu *sim)
{
    h->bytes = calloc(h->n + 1, sizeof(*h->bytes));
    for (size_t i = 0; i < h->n; i++) {
        h->bytes[i] = malloc(h->segs[i].size);
        held_transfer(sim, h->fds[i], h->segs[i].size, h->bytes[i], false);
    }
}

/* New memory for everything held, with the bytes that were read. */
static inline void held_recreate(struct held *h, const struct cu *sim)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                .location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}};
    for (size_t i = 0; i < h->n; i++) {
        CUmemGenericAllocationHandle handle;
        close(h->fds[i]);
        assert_int_equal(sim->cuMemCreate(&handle, h->segs[i].size, &prop, 0), 0);
        assert_int_equal(sim->cuMemExportToShareableHandle(&h->fds[i], handle,
                                                           CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                         0);
        held_transfer(sim, h->fds[i], h->segs[i].size, h->bytes[i], true);
        assert_int_equal(sim->cuMemRelease(handle), 0);
    }
}
