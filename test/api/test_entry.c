/* SPDX-License-Identifier: MIT */
/* What the generated entry points do, on a table with one function of each kind. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <cmocka.h>

#include "agent/api/api_table.h"

/* The exported names, as an application calls them. */
CUresult cuSampleWrap(CUdeviceptr *dptr, size_t bytesize);
CUresult cuSampleGate(const void *desc, int mode, unsigned flags);
CUresult cuSampleGate_v2(CUdeviceptr *dptr, CUipcMemHandle handle, unsigned int flags);
CUresult cuSampleAbsent(void);
CUresult cuSamplePass(CUresult error, const char **pStr);
CUresult cuSampleWrapAbsent(int value);
/* Exported by assembly without a type; these are the types of what stands behind them here. */
long cuSampleOpaque(long a, long b, long c, long d, long e, long f, long g, long h, long i, double p,
                    double q, double r, double s, double t, double u, double v, double w, double x, double y);
CUresult cuSampleOpaqueAbsent(void);

int sample_entered;
int sample_left;

static int resolved;          /* calls of bn_real_resolve */
static int entered_in_driver; /* the gate's counters, as the driver's function saw them */
static int left_in_driver;
static int wrapped;
static bool driver_present;

struct many {
    long ints[9];
    double doubles[10];
};
static struct many seen;

static void note_gate(void)
{
    entered_in_driver = sample_entered;
    left_in_driver = sample_left;
}

static CUresult real_gate(const void *desc, int mode, unsigned flags)
{
    note_gate();
    return desc == &seen && mode == -5 && flags == 0xfffffffeu ? CUDA_ERROR_ALREADY_MAPPED
                                                               : CUDA_ERROR_UNKNOWN;
}

static CUresult real_gate_v2(CUdeviceptr *dptr, CUipcMemHandle handle, unsigned int flags)
{
    note_gate();
    for (int i = 0; i < CU_IPC_HANDLE_SIZE; i++) {
        if (handle.reserved[i] != (char)(i * 3))
            return CUDA_ERROR_UNKNOWN;
    }
    *dptr = flags;
    return CUDA_SUCCESS;
}

static CUresult real_pass(CUresult error, const char **name)
{
    note_gate();
    *name = "passed";
    return error;
}

static CUresult real_wrap(CUdeviceptr *dptr, size_t bytesize)
{
    *dptr = bytesize + 1;
    return CUDA_SUCCESS;
}

static long real_opaque(long a, long b, long c, long d, long e, long f, long g, long h, long i, double p,
                        double q, double r, double s, double t, double u, double v, double w, double x,
                        double y)
{
    seen = (struct many){{a, b, c, d, e, f, g, h, i}, {p, q, r, s, t, u, v, w, x, y}};
    return 0x123456789abcdefL;
}

/* Uses every register that may carry an argument, as a real resolver does by calling dlopen. */
static void __attribute__((noinline)) clobber(void)
{
#if defined(__x86_64__)
    __asm__ volatile(
        "xor %%eax, %%eax; xor %%edi, %%edi; xor %%esi, %%esi; xor %%edx, %%edx; xor %%ecx, %%ecx;"
        "xor %%r8d, %%r8d; xor %%r9d, %%r9d;"
        "xorps %%xmm0, %%xmm0; xorps %%xmm1, %%xmm1; xorps %%xmm2, %%xmm2; xorps %%xmm3, %%xmm3;"
        "xorps %%xmm4, %%xmm4; xorps %%xmm5, %%xmm5; xorps %%xmm6, %%xmm6; xorps %%xmm7, %%xmm7" ::
            : "rax", "rdi", "rsi", "rdx", "rcx", "r8", "r9", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5",
              "xmm6", "xmm7", "cc");
#elif defined(__aarch64__)
    __asm__ volatile(
        "mov x0, xzr; mov x1, xzr; mov x2, xzr; mov x3, xzr; mov x4, xzr; mov x5, xzr; mov x6, xzr;"
        "mov x7, xzr; mov x8, xzr; fmov d0, xzr; fmov d1, xzr; fmov d2, xzr; fmov d3, xzr;"
        "fmov d4, xzr; fmov d5, xzr; fmov d6, xzr; fmov d7, xzr" ::
            : "x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "v0", "v1", "v2", "v3", "v4", "v5", "v6",
              "v7");
#endif
}

void bn_real_resolve(void)
{
    resolved++;
    clobber();
    if (driver_present) {
        bn_real.cuSampleGate = real_gate;
        bn_real.cuSampleGate_v2 = real_gate_v2;
        bn_real.cuSamplePass = real_pass;
        bn_real.cuSampleWrap = real_wrap;
        bn_real.cuSampleOpaque = (bn_pfn_cuSampleOpaque)(void *)real_opaque;
    }
    __atomic_store_n(&bn_real_ready, 1, __ATOMIC_RELEASE);
}

CUresult bn_real_missing(unsigned fn)
{
    return fn == BN_FN_cuSampleWrapAbsent ? CUDA_ERROR_NO_DEVICE : CUDA_ERROR_NOT_FOUND;
}

CUresult bn_wrap_cuSampleWrap(CUdeviceptr *dptr, size_t bytesize)
{
    note_gate();
    wrapped++;
    return bn_real.cuSampleWrap(dptr, bytesize * 2);
}

CUresult bn_wrap_cuSampleWrapAbsent(int value)
{
    wrapped++;
    return CUDA_SUCCESS;
}

static int fresh(void **state)
{
    memset(&bn_real, 0, sizeof(bn_real));
    memset(&seen, 0, sizeof(seen));
    bn_real_ready = 0;
    resolved = wrapped = sample_entered = sample_left = entered_in_driver = left_in_driver = 0;
    driver_present = true;
    return 0;
}

static void gate_is_entered_around_the_call(void **state)
{
    assert_int_equal(cuSampleGate(&seen, -5, 0xfffffffeu), CUDA_ERROR_ALREADY_MAPPED);
    assert_int_equal(entered_in_driver, 1);
    assert_int_equal(left_in_driver, 0);
    assert_int_equal(sample_entered, 1);
    assert_int_equal(sample_left, 1);
}

static void structure_by_value_arrives(void **state)
{
    CUipcMemHandle handle;
    CUdeviceptr out = 0;

    for (int i = 0; i < CU_IPC_HANDLE_SIZE; i++)
        handle.reserved[i] = (char)(i * 3);
    assert_int_equal(cuSampleGate_v2(&out, handle, 77), CUDA_SUCCESS);
    assert_int_equal(out, 77);
    assert_int_equal(sample_left, 1);
}

static void pass_uses_no_gate(void **state)
{
    const char *name = NULL;

    assert_int_equal(cuSamplePass(CUDA_ERROR_TIMEOUT, &name), CUDA_ERROR_TIMEOUT);
    assert_string_equal(name, "passed");
    assert_int_equal(sample_entered + sample_left, 0);
}

static void wrap_calls_the_hand_written_one(void **state)
{
    CUdeviceptr out = 0;

    assert_int_equal(cuSampleWrap(&out, 21), CUDA_SUCCESS);
    assert_int_equal(out, 43);
    assert_int_equal(wrapped, 1);
    assert_int_equal(sample_entered + sample_left, 0);
}

static void table_is_resolved_once(void **state)
{
    const char *name;
    CUdeviceptr out;

    cuSamplePass(CUDA_SUCCESS, &name);
    cuSampleWrap(&out, 1);
    cuSampleGate(&seen, 0, 0);
    assert_int_equal(resolved, 1);
}

static void what_the_driver_lacks_is_missing(void **state)
{
    assert_int_equal(cuSampleAbsent(), CUDA_ERROR_NOT_FOUND);
    assert_int_equal(cuSampleWrapAbsent(1), CUDA_ERROR_NO_DEVICE);
    assert_int_equal(wrapped, 0);
    assert_int_equal(sample_entered + sample_left, 0);
    assert_int_equal(cuSampleOpaqueAbsent(), CUDA_ERROR_NOT_FOUND);
}

static void without_a_driver_everything_is_missing(void **state)
{
    CUdeviceptr out = 9;

    driver_present = false;
    assert_int_equal(cuSampleWrap(&out, 1), CUDA_ERROR_NOT_FOUND);
    assert_int_equal(cuSampleGate(&seen, -5, 0xfffffffeu), CUDA_ERROR_NOT_FOUND);
    long result = cuSampleOpaque(1, 2, 3, 4, 5, 6, 7, 8, 9, .5, .5, .5, .5, .5, .5, .5, .5, .5, .5);
    assert_int_equal((CUresult)result, CUDA_ERROR_NOT_FOUND);
    assert_int_equal(out, 9);
    assert_int_equal(resolved, 1);
}

static void opaque_call_keeps_every_argument(void **state)
{
    /* The first call resolves the table on its way, the second finds it resolved. */
    for (int round = 0; round < 2; round++) {
        memset(&seen, 0, sizeof(seen));
        long result =
            cuSampleOpaque(1, 2, 3, 4, 5, 6, 7, 8, 9, .5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5);
        assert_true(result == 0x123456789abcdefL);
        for (int i = 0; i < 9; i++)
            assert_int_equal(seen.ints[i], i + 1);
        for (int i = 0; i < 10; i++)
            assert_true(seen.doubles[i] == i + .5);
    }
    assert_int_equal(resolved, 1);
    assert_int_equal(sample_entered + sample_left, 0);
}

static void entries_match_the_table(void **state)
{
    assert_int_equal(BN_FN_COUNT, 8);
    for (unsigned i = 0; i < BN_FN_COUNT; i++) {
        assert_int_equal(bn_entries[i].offset, i * sizeof(void *));
        assert_ptr_equal(bn_real_slot(i), (char *)&bn_real + bn_entries[i].offset);
        if (i)
            assert_true(strcmp(bn_entries[i - 1].name, bn_entries[i].name) < 0);
    }
    assert_string_equal(bn_entries[BN_FN_cuSampleGate_v2].name, "cuSampleGate_v2");
    assert_ptr_equal(bn_entries[BN_FN_cuSampleGate_v2].entry, (void *)cuSampleGate_v2);
    assert_ptr_equal(bn_entries[BN_FN_cuSampleWrap].entry, (void *)cuSampleWrap);
    assert_ptr_equal(bn_entries[BN_FN_cuSampleOpaque].entry, (void *)cuSampleOpaque);
    assert_ptr_equal(bn_real_slot(BN_FN_cuSamplePass), &bn_real.cuSamplePass);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(gate_is_entered_around_the_call, fresh),
        cmocka_unit_test_setup(structure_by_value_arrives, fresh),
        cmocka_unit_test_setup(pass_uses_no_gate, fresh),
        cmocka_unit_test_setup(wrap_calls_the_hand_written_one, fresh),
        cmocka_unit_test_setup(table_is_resolved_once, fresh),
        cmocka_unit_test_setup(what_the_driver_lacks_is_missing, fresh),
        cmocka_unit_test_setup(without_a_driver_everything_is_missing, fresh),
        cmocka_unit_test_setup(opaque_call_keeps_every_argument, fresh),
        cmocka_unit_test_setup(entries_match_the_table, fresh),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
