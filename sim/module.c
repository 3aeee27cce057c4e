/* SPDX-License-Identifier: MIT */

/*
 * Modules and kernels. PTX text is searched for its entries and globals; an entry with one of the names below runs
 * its C twin on the CPU, any other can be looked up but not launched (CUDA_ERROR_NOT_SUPPORTED).
 */

#include <ctype.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "sim.h"

#define MAX_FUNCTIONS 64
#define MAX_GLOBALS 32
#define NAME_LENGTH 128

struct sim_function {
    struct sim_module *module;
    char name[NAME_LENGTH];
    int kernel; /* index in kernels[]; -1: no twin */
};

struct sim_global {
    char name[NAME_LENGTH];
    uint64_t size, address;
    struct alloc *alloc;
};

/* Kept for ever once loaded, marked dead: a launch that is queued may still name it. */
struct sim_module {
    struct sim_module *next;
    struct sim_ctx *ctx;
    bool alive;
    unsigned functions, globals;
    struct sim_function function[MAX_FUNCTIONS];
    struct sim_global global[MAX_GLOBALS];
};

static struct sim_module *modules;

/* ---- Kernels ---- */

static uint64_t splitmix64(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static bool usable_words(const struct op *op, uint64_t start, uint64_t words, bool write)
{
    return words <= UINT64_MAX / 8 && start % 8 == 0 &&
           (words == 0 || memory_usable(start, words * 8, op->ctx, write));
}

static CUresult k_increment(struct op *op, const uint64_t *a)
{
    if (!usable_words(op, a[0], 1, true))
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    ++*(uint64_t *)a[0];
    return CUDA_SUCCESS;
}

static CUresult k_fill(struct op *op, const uint64_t *a)
{
    uint64_t *p = (uint64_t *)a[0];

    if (!usable_words(op, a[0], a[1], true))
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    for (uint64_t i = 0; i < a[1]; i++)
        p[i] = splitmix64(a[2] + i);
    return CUDA_SUCCESS;
}

static CUresult k_check(struct op *op, const uint64_t *a)
{
    const uint64_t *p = (const uint64_t *)a[0];
    uint64_t bad = 0;

    if (!usable_words(op, a[0], a[1], false) || !usable_words(op, a[3], 1, true))
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    for (uint64_t i = 0; i < a[1]; i++)
        bad += p[i] != splitmix64(a[2] + i);
    __atomic_fetch_add((uint64_t *)a[3], bad, __ATOMIC_RELAXED);
    return CUDA_SUCCESS;
}

static CUresult k_xor(struct op *op, const uint64_t *a)
{
    uint64_t *p = (uint64_t *)a[0];

    if (!usable_words(op, a[0], a[1], true))
        return CUDA_ERROR_ILLEGAL_ADDRESS;
    for (uint64_t i = 0; i < a[1]; i++)
        p[i] ^= a[2];
    return CUDA_SUCCESS;
}

static CUresult k_global_add(struct op *op, const uint64_t *a)
{
    for (unsigned i = 0; i < op->launch.module->globals; i++) {
        struct sim_global *global = &op->launch.module->global[i];

        if (strcmp(global->name, "bn_global") != 0)
            continue;
        if (!usable_words(op, global->address, 1, true))
            return CUDA_ERROR_ILLEGAL_ADDRESS;
        __atomic_fetch_add((uint64_t *)global->address, a[0], __ATOMIC_RELAXED);
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_LAUNCH_FAILED;
}

static const struct {
    const char *name;
    unsigned args; /* each of 64 bits */
    CUresult (*run)(struct op *op, const uint64_t *args);
} kernels[] = {
    {"bn_increment", 1, k_increment},
    {"bn_fill", 3, k_fill},
    {"bn_check", 4, k_check},
    {"bn_spin", 1, NULL},
    {"bn_xor", 3, k_xor},
    {"bn_global_add", 1, k_global_add},
    {"bn_hash_range", 4, hash_range},
};

#define KERNELS ((int)(sizeof(kernels) / sizeof(kernels[0])))

/* Busy for the time, in steps, so that many spinning streams leave the CPU to others. */
static void spin(uint64_t ns)
{
    uint64_t end = sim_now_ns() + ns, now;

    while ((now = sim_now_ns()) < end) {
        struct timespec step = {.tv_nsec = end - now > 1000000 ? 1000000 : (long)(end - now)};

        nanosleep(&step, NULL);
    }
}

CUresult kernel_run(struct op *op)
{
    int kernel = op->launch.kernel;
    CUresult rc;

    if (!kernels[kernel].run) {
        spin(op->launch.args[0]); /* without sim.maps: memory may be mapped meanwhile */
        return CUDA_SUCCESS;
    }
    pthread_rwlock_rdlock(&sim.maps);
    rc = kernels[kernel].run(op, op->launch.args);
    pthread_rwlock_unlock(&sim.maps);
    return rc;
}

/* ---- Reading PTX ---- */

static const char *skip_space(const char *p)
{
    while (isspace((unsigned char)*p))
        p++;
    return p;
}

static const char *word(const char *p, char out[NAME_LENGTH])
{
    size_t n = 0;

    while (isalnum((unsigned char)*p) || *p == '_' || *p == '$' || *p == '%') {
        if (n + 1 < NAME_LENGTH)
            out[n++] = *p;
        p++;
    }
    out[n] = '\0';
    return p;
}

static void read_entry(struct sim_module *module, const char *p)
{
    struct sim_function *f = &module->function[module->functions];

    if (module->functions == MAX_FUNCTIONS)
        return;
    word(skip_space(p), f->name);
    if (!f->name[0])
        return;
    f->module = module;
    f->kernel = -1;
    for (int i = 0; i < KERNELS; i++)
        if (strcmp(kernels[i].name, f->name) == 0)
            f->kernel = i;
    module->functions++;
}

/* .visible .global .align 8 .u64 NAME[N] = ...; */
static void read_global(struct sim_module *module, const char *p)
{
    struct sim_global *g = &module->global[module->globals];
    uint64_t element = 1;

    if (module->globals == MAX_GLOBALS)
        return;
    for (;;) {
        p = skip_space(p);
        if (*p != '.')
            break;
        if (strncmp(p, ".align", 6) == 0) {
            strtoul(p + 6, (char **)&p, 10);
            continue;
        }
        while (*p && !isspace((unsigned char)*p)) {
            if (isdigit((unsigned char)*p)) {
                element = strtoul(p, (char **)&p, 10) / 8;
                continue;
            }
            p++;
        }
    }
    p = skip_space(word(p, g->name));
    g->size = element ? element : 1;
    if (*p == '[') {
        uint64_t n = strtoull(p + 1, NULL, 10);

        g->size *= n ? n : 1;
    }
    if (g->name[0] && g->size <= sim.memory)
        module->globals++;
}

static void read_ptx(struct sim_module *module, const char *p)
{
    while (*p) {
        if (p[0] == '/' && p[1] == '/') {
            p += strcspn(p, "\n");
        } else if (p[0] == '/' && p[1] == '*') {
            p = strstr(p, "*/");
            if (!p)
                return;
        } else if (strncmp(p, ".visible", 8) == 0) {
            p = skip_space(p + 8);
            if (strncmp(p, ".entry", 6) == 0)
                read_entry(module, p + 6);
            else if (strncmp(p, ".global", 7) == 0)
                read_global(module, p + 7);
            continue;
        }
        if (*p)
            p++;
    }
}

/* ---- Modules ---- */

static void module_end(struct sim_module *module)
{
    for (unsigned i = 0; i < module->globals; i++)
        if (module->global[i].alloc) {
            native_free(module->global[i].alloc);
            module->global[i].alloc = NULL;
        }
    module->alive = false;
}

static CUresult module_load(CUmodule *out, const char *text)
{
    struct sim_ctx *ctx;
    struct sim_module *module;
    CUresult rc = ctx_current(&ctx);

    if (rc != CUDA_SUCCESS)
        return rc;
    if (!out || !text)
        return CUDA_ERROR_INVALID_VALUE;
    /* Read as text only what begins like it: a cubin or fat binary is no text and not ended by a zero. */
    if (!isprint((unsigned char)text[0]) && !isspace((unsigned char)text[0]))
        return CUDA_ERROR_NO_BINARY_FOR_GPU;
    if (!strstr(text, ".version"))
        return CUDA_ERROR_INVALID_IMAGE;
    module = calloc(1, sizeof(*module));
    if (!module)
        return CUDA_ERROR_OUT_OF_MEMORY;
    module->ctx = ctx;
    module->alive = true;
    module->next = modules;
    modules = module;
    read_ptx(module, text);
    for (unsigned i = 0; i < module->globals; i++) {
        struct sim_global *g = &module->global[i];

        rc = native_alloc(ctx, g->size, ALLOC_GLOBAL, &g->address);
        if (rc != CUDA_SUCCESS) {
            module_end(module);
            return rc;
        }
        g->alloc = (struct alloc *)range_find(&sim.allocs, g->address);
        memset((void *)g->address, 0, g->size);
    }
    *out = (CUmodule)module;
    return CUDA_SUCCESS;
}

static CUresult module_find(CUmodule handle, struct sim_module **out)
{
    for (struct sim_module *m = modules; m; m = m->next)
        if (m == (struct sim_module *)handle && m->alive && m->ctx->alive) {
            *out = m;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_HANDLE;
}

SIM_FN(cuModuleLoadData, 0, (CUmodule * out, const void *image), (out, image))
{
    SIM_LOCKED();
    return module_load(out, image);
}

SIM_FN(cuModuleLoadDataEx, 0,
       (CUmodule * out, const void *image, unsigned count, int *options, void **values),
       (out, image, count, options, values))
{
    (void)count;
    (void)options;
    (void)values;
    SIM_LOCKED();
    return module_load(out, image);
}

SIM_FN(cuModuleUnload, 0, (CUmodule handle), (handle))
{
    struct sim_module *module;

    SIM_LOCKED();
    CUresult rc = module_find(handle, &module);

    if (rc != CUDA_SUCCESS)
        return rc;
    stream_wait_ctx(module->ctx);
    rc = module_find(handle, &module);
    if (rc == CUDA_SUCCESS)
        module_end(module);
    return rc;
}

SIM_FN(cuModuleGetFunction, 0, (CUfunction * out, CUmodule handle, const char *name), (out, handle, name))
{
    struct sim_module *module;

    if (!out || !name)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = module_find(handle, &module);

    if (rc != CUDA_SUCCESS)
        return rc;
    for (unsigned i = 0; i < module->functions; i++)
        if (strcmp(module->function[i].name, name) == 0) {
            *out = (CUfunction)&module->function[i];
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_NOT_FOUND;
}

SIM_FN(cuModuleGetGlobal, 0, (CUdeviceptr * out, size_t *size, CUmodule handle, const char *name),
       (out, size, handle, name))
{
    struct sim_module *module;

    if (!name)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = module_find(handle, &module);

    if (rc != CUDA_SUCCESS)
        return rc;
    for (unsigned i = 0; i < module->globals; i++)
        if (strcmp(module->global[i].name, name) == 0) {
            if (out)
                *out = module->global[i].address;
            if (size)
                *size = module->global[i].size;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_NOT_FOUND;
}
SIM_ALIAS(cuModuleGetGlobal_v2, cuModuleGetGlobal);

SIM_FN(cuModuleGetLoadingMode, 0, (int *mode), (mode))
{
    if (!mode)
        return CUDA_ERROR_INVALID_VALUE;
    *mode = 2; /* lazy */
    return CUDA_SUCCESS;
}

/* ---- Functions ---- */

static CUresult function_find(CUfunction handle, struct sim_function **out)
{
    struct sim_function *f = (struct sim_function *)handle;

    for (struct sim_module *m = modules; m; m = m->next)
        if (m->alive && m->ctx->alive && f >= m->function && f < m->function + m->functions) {
            *out = f;
            return CUDA_SUCCESS;
        }
    return CUDA_ERROR_INVALID_HANDLE;
}

SIM_FN(cuFuncGetAttribute, 0, (int *value, int attribute, CUfunction handle), (value, attribute, handle))
{
    struct sim_function *f;

    if (!value || attribute < 0 || attribute > 32)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = function_find(handle, &f);

    if (rc != CUDA_SUCCESS)
        return rc;
    switch (attribute) {
    case 0: /* MAX_THREADS_PER_BLOCK */ *value = 1024; break;
    case 4: /* NUM_REGS */ *value = 32; break;
    case 5: /* PTX_VERSION */ *value = 60; break;
    case 6: /* BINARY_VERSION */ *value = 90; break;
    default: *value = 0;
    }
    return CUDA_SUCCESS;
}

SIM_FN(cuFuncSetAttribute, 0, (CUfunction handle, int attribute, int value), (handle, attribute, value))
{
    struct sim_function *f;

    (void)value;
    if (attribute < 0)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    return function_find(handle, &f);
}

SIM_FN(cuFuncGetModule, 0, (CUmodule * out, CUfunction handle), (out, handle))
{
    struct sim_function *f;

    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = function_find(handle, &f);

    if (rc == CUDA_SUCCESS)
        *out = (CUmodule)f->module;
    return rc;
}

SIM_FN(cuFuncGetName, 0, (const char **out, CUfunction handle), (out, handle))
{
    struct sim_function *f;

    if (!out)
        return CUDA_ERROR_INVALID_VALUE;
    SIM_LOCKED();
    CUresult rc = function_find(handle, &f);

    if (rc == CUDA_SUCCESS)
        *out = f->name;
    return rc;
}

/* From kernelParams or from the buffer of `extra`. */
static CUresult arguments(int kernel, void **params, void **extra, uint64_t *out)
{
    const void *buffer = NULL;
    size_t size = 0;

    if (params) {
        for (unsigned i = 0; i < kernels[kernel].args; i++) {
            if (!params[i])
                return CUDA_ERROR_INVALID_VALUE;
            memcpy(&out[i], params[i], 8);
        }
        return CUDA_SUCCESS;
    }
    for (; extra && extra[0]; extra += 2) { /* CU_LAUNCH_PARAM_BUFFER_POINTER 1, _SIZE 2 */
        if (extra[0] == (void *)1)
            buffer = extra[1];
        else if (extra[0] == (void *)2)
            size = *(size_t *)extra[1];
        else
            return CUDA_ERROR_INVALID_VALUE;
    }
    if (!buffer || size != kernels[kernel].args * 8u)
        return CUDA_ERROR_INVALID_VALUE;
    memcpy(out, buffer, size);
    return CUDA_SUCCESS;
}

static CUresult launch(CUfunction handle, const unsigned grid[3], const unsigned block[3],
                       CUstream stream_handle, void **params, void **extra)
{
    struct sim_ctx *ctx;
    struct sim_stream *stream;
    struct sim_function *f;

    SIM_LOCKED();
    CUresult rc = ctx_current(&ctx);

    if (rc == CUDA_SUCCESS)
        rc = function_find(handle, &f);
    if (rc == CUDA_SUCCESS)
        rc = stream_resolve(stream_handle, ctx, &stream);
    if (rc != CUDA_SUCCESS)
        return rc;
    if (f->module->ctx != ctx)
        return CUDA_ERROR_INVALID_HANDLE;
    for (int i = 0; i < 3; i++)
        if (!grid[i] || !block[i])
            return CUDA_ERROR_INVALID_VALUE;
    if ((uint64_t)block[0] * block[1] * block[2] > 1024)
        return CUDA_ERROR_INVALID_VALUE;
    if (f->kernel < 0)
        return CUDA_ERROR_NOT_SUPPORTED;
    struct op *op = op_new(OP_KERNEL, ctx);

    if (!op)
        return CUDA_ERROR_OUT_OF_MEMORY;
    op->launch.kernel = f->kernel;
    op->launch.module = f->module;
    op->launch.blocks = grid[0] * grid[1] * grid[2];
    rc = arguments(f->kernel, params, extra, op->launch.args);
    if (rc != CUDA_SUCCESS) {
        op_free(op);
        return rc;
    }
    return stream_enqueue(stream, op);
}

SIM_FN_STREAM(cuLaunchKernel, 0,
              (CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
               unsigned shared, CUstream hStream, void **params, void **extra),
              (f, gx, gy, gz, bx, by, bz, shared, hStream, params, extra))
{
    (void)shared;
    return launch(f, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, hStream, params, extra);
}

SIM_FN_STREAM(cuLaunchCooperativeKernel, 0,
              (CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
               unsigned shared, CUstream hStream, void **params),
              (f, gx, gy, gz, bx, by, bz, shared, hStream, params))
{
    (void)shared;
    return launch(f, (unsigned[]){gx, gy, gz}, (unsigned[]){bx, by, bz}, hStream, params, NULL);
}

/* CUlaunchConfig, as far as it matters here: attributes have no effect. */
struct launch_config {
    unsigned grid[3], block[3], shared;
    CUstream stream;
    void *attributes;
    unsigned attribute_count;
};

SIM_FN(cuLaunchKernelEx, 0, (const struct launch_config *c, CUfunction f, void **params, void **extra),
       (c, f, params, extra))
{
    return c ? launch(f, c->grid, c->block, c->stream, params, extra) : CUDA_ERROR_INVALID_VALUE;
}

SIM_FN(cuLaunchKernelEx_ptsz, 0, (const struct launch_config *c, CUfunction f, void **params, void **extra),
       (c, f, params, extra))
{
    if (!c)
        return CUDA_ERROR_INVALID_VALUE;
    return launch(f, c->grid, c->block, c->stream ? c->stream : CU_STREAM_PER_THREAD, params, extra);
}
