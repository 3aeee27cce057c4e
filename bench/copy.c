/* How fast memory moves between a GPU and the host: what the hardware gives, and what Bennu's copies make
 * of it.
 *
 *     bench-copy [--driver FILE] [--device N] [--bytes SIZE] [--rounds N]
 *                [--workers N] [--buffer SIZE] [--touch THREADS] [--no-check]
 *
 * Without meson: gcc -O2 -D_GNU_SOURCE -Isrc bench/copy.c src/gpu/[a-z]*.c src/base/[a-z]*.c -o bench-copy
 * -lpthread -ldl
 *
 * Every figure is printed as it is measured, so that what came before a failure is not lost. Best of the
 * rounds, and the worst in brackets. GB are 10^9 bytes. Exit status: 0 all good, 1 something failed or
 * bytes were wrong. */
#include "base/cleanup.h"
#include "base/io.h"
#include "gpu/cuda_types.h"
#include "gpu/gpu.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#define MIB (UINT64_C(1) << 20)
#define GIB (UINT64_C(1) << 30)

static struct {
    const char *driver;
    unsigned device, rounds, workers, touch;
    uint64_t bytes, buffer;
    bool check;
} opt = {.rounds = 5, .bytes = 16 * GIB, .check = true};

static struct bn_gpu *gpu;
static bool failed;

/* ---- Reporting ----------------------------------------------------------------------------------------- */

static void rate(const char *what, uint64_t bytes, uint64_t best, uint64_t worst)
{
    printf("  %-52s %7.2f GB/s [%6.2f]  %9.2f ms\n", what, (double)bytes / (double)best,
           (double)bytes / (double)worst, (double)best / 1e6);
    fflush(stdout);
}

static void took(const char *what, uint64_t ns)
{
    printf("  %-52s %32.2f ms\n", what, (double)ns / 1e6);
    fflush(stdout);
}

static void headline(const char *text)
{
    printf("%s\n", text);
    fflush(stdout);
}

static int oops(const char *what, int r, const struct bn_error *err)
{
    printf("  %-52s FAILED: %s: %s\n", what, strerror(r < 0 ? -r : r), err ? err->text : "");
    fflush(stdout);
    failed = true;
    return -1;
}

static uint64_t mem_available(void)
{
    char line[128];
    unsigned long long kb = 0;
    bn_auto_file FILE *f = fopen("/proc/meminfo", "re");
    while (f && fgets(line, sizeof(line), f))
        if (sscanf(line, "MemAvailable: %llu kB", &kb) == 1)
            break;
    return kb << 10;
}

static void print_file(const char *name, const char *path)
{
    char text[200] = "?";
    bn_auto_file FILE *f = fopen(path, "re");
    if (f && fgets(text, sizeof(text), f))
        text[strcspn(text, "\n")] = 0;
    printf("  %-16s %s\n", name, text);
}

static void machine(void)
{
    const struct bn_gpu_info *info = bn_gpu_info(gpu, opt.device);
    struct utsname u;
    char now[64];
    time_t t = time(NULL);
    strftime(now, sizeof(now), "%Y-%m-%d %H:%M UTC", gmtime(&t));
    uname(&u);
    headline("machine");
    printf("  %-16s %s\n", "date", now);
    printf("  %-16s %s %s\n", "kernel", u.release, u.machine);
    printf("  %-16s %ld, %.1f GB of memory available\n", "cores", sysconf(_SC_NPROCESSORS_ONLN),
           (double)mem_available() / 1e9);
    printf("  %-16s %s (CUDA %u.%u)%s\n", "driver", bn_gpu_driver_path(gpu),
           bn_gpu_driver_version(gpu) / 1000, bn_gpu_driver_version(gpu) % 1000 / 10,
           bn_gpu_simulated(gpu) ? ", SIMULATED: no figure means anything" : "");
    print_file("module", "/proc/driver/nvidia/version");
    print_file("shmem huge pages", "/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    printf("  %-16s %u of %u: %s, %s, compute %u.%u, %.1f GB, sharing %d, rdma %d, compression %d\n", "gpu",
           opt.device, bn_gpu_count(gpu), info->name, info->pci, info->major, info->minor,
           (double)info->total / 1e9, info->shareable, info->rdma, info->compression);
    fflush(stdout);
}

/* ---- What the hardware gives: one plain allocation on each side, one stream ---------------------------- */

struct plain {
    CUresult (*retain)(CUcontext *, CUdevice), (*release)(CUdevice), (*push)(CUcontext), (*pop)(CUcontext *);
    CUresult (*host_alloc)(void **, size_t, unsigned), (*host_free)(void *);
    CUresult (*alloc)(CUdeviceptr *, size_t), (*free)(CUdeviceptr);
    CUresult (*dtoh)(void *, CUdeviceptr, size_t, CUstream),
        (*htod)(CUdeviceptr, const void *, size_t, CUstream);
    CUresult (*sync)(void);
};

static int plain_load(struct plain *p)
{
    void *lib = dlopen(bn_gpu_driver_path(gpu), RTLD_NOW | RTLD_NOLOAD);
    if (!lib)
        return -1;
    *(void **)&p->retain = dlsym(lib, "cuDevicePrimaryCtxRetain");
    *(void **)&p->release = dlsym(lib, "cuDevicePrimaryCtxRelease_v2");
    *(void **)&p->push = dlsym(lib, "cuCtxPushCurrent_v2");
    *(void **)&p->pop = dlsym(lib, "cuCtxPopCurrent_v2");
    *(void **)&p->host_alloc = dlsym(lib, "cuMemHostAlloc");
    *(void **)&p->host_free = dlsym(lib, "cuMemFreeHost");
    *(void **)&p->alloc = dlsym(lib, "cuMemAlloc_v2");
    *(void **)&p->free = dlsym(lib, "cuMemFree_v2");
    *(void **)&p->dtoh = dlsym(lib, "cuMemcpyDtoHAsync_v2");
    *(void **)&p->htod = dlsym(lib, "cuMemcpyHtoDAsync_v2");
    *(void **)&p->sync = dlsym(lib, "cuCtxSynchronize");
    dlclose(lib);
    return p->retain && p->release && p->push && p->pop && p->host_alloc && p->host_free && p->alloc &&
                   p->free && p->dtoh && p->htod && p->sync
               ? 0
               : -1;
}

static void plain_rounds(const struct plain *p, CUdeviceptr dev, void *host, uint64_t size)
{
    const unsigned times = 8;
    for (int in = 0; in < 2; in++) {
        uint64_t best = UINT64_MAX, worst = 0;
        CUresult c = CUDA_SUCCESS;
        for (unsigned r = 0; r <= opt.rounds && c == CUDA_SUCCESS; r++) { /* the first is not counted */
            uint64_t t = bn_now_ns();
            for (unsigned i = 0; i < times && c == CUDA_SUCCESS; i++)
                c = in ? p->htod(dev, host, size, NULL) : p->dtoh(host, dev, size, NULL);
            if (c == CUDA_SUCCESS)
                c = p->sync();
            t = bn_now_ns() - t;
            best = r && t < best ? t : best;
            worst = r && t > worst ? t : worst;
        }
        if (c == CUDA_SUCCESS)
            rate(in ? "host to device, cuMemHostAlloc + cuMemAlloc"
                    : "device to host, cuMemHostAlloc + cuMemAlloc",
                 times * size, best, worst);
        else
            oops("plain copy", EIO, NULL);
    }
}

static void plain(void)
{
    struct plain p;
    CUcontext ctx;
    CUdeviceptr dev = 0;
    void *host = NULL;
    uint64_t size = opt.bytes < GIB ? opt.bytes : GIB;
    headline("the hardware, 8 copies of one buffer");
    if (plain_load(&p) < 0 || p.retain(&ctx, (CUdevice)opt.device) != CUDA_SUCCESS) {
        oops("plain copies", ENOSYS, NULL);
        return;
    }
    p.push(ctx);
    if (p.alloc(&dev, size) == CUDA_SUCCESS &&
        p.host_alloc(&host, size, CU_MEMHOSTALLOC_PORTABLE) == CUDA_SUCCESS)
        plain_rounds(&p, dev, host, size);
    else
        oops("plain memory", ENOMEM, NULL);
    if (host)
        p.host_free(host);
    if (dev)
        p.free(dev);
    p.pop(&ctx);
    p.release((CUdevice)opt.device);
}

/* ---- Callbacks ----------------------------------------------------------------------------------------- */

static int null_consume(void *arg, uint64_t chunk, unsigned n, const void *data, struct bn_error *err)
{
    return 0;
}

static int null_produce(void *arg, uint64_t chunk, unsigned n, void *data, struct bn_error *err)
{
    return 0;
}

/* Reads every byte, as hashing would at best. */
static int sum_consume(void *arg, uint64_t chunk, unsigned n, const void *data, struct bn_error *err)
{
    const uint64_t *p = data;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < n * BN_GPU_CHUNK / 8; i++)
        sum += p[i];
    atomic_fetch_add((_Atomic uint64_t *)arg, sum);
    return 0;
}

static int copy_produce(void *arg, uint64_t chunk, unsigned n, void *data, struct bn_error *err)
{
    const uint8_t *from = arg;
    for (unsigned i = 0; i < n; i++)
        memcpy((uint8_t *)data + i * BN_GPU_CHUNK, from + (chunk + i) % 64 * BN_GPU_CHUNK, BN_GPU_CHUNK);
    return 0;
}

static uint64_t word(uint64_t seed, uint64_t i)
{
    return i * UINT64_C(0x9e3779b97f4a7c15) + seed;
}

static int pattern_produce(void *arg, uint64_t chunk, unsigned n, void *data, struct bn_error *err)
{
    uint64_t *p = data, seed = *(uint64_t *)arg, first = chunk * (BN_GPU_CHUNK / 8);
    for (uint64_t i = 0; i < n * BN_GPU_CHUNK / 8; i++)
        p[i] = word(seed, first + i);
    return 0;
}

static int pattern_consume(void *arg, uint64_t chunk, unsigned n, const void *data, struct bn_error *err)
{
    const uint64_t *p = data;
    uint64_t seed = *(uint64_t *)arg, first = chunk * (BN_GPU_CHUNK / 8);
    for (uint64_t i = 0; i < n * BN_GPU_CHUNK / 8; i++)
        if (p[i] != word(seed, first + i))
            return bn_error_set(err, EILSEQ, "check", "Byte %llu of the set is wrong.",
                                (unsigned long long)(8 * (first + i)));
    return 0;
}

/* ---- Jobs ---------------------------------------------------------------------------------------------- */

static int job(struct bn_copier *copier, const struct bn_copy_spec *spec, struct bn_error *err)
{
    struct bn_copy *j = NULL;
    int r = bn_copy_start(copier, spec, &j, err);
    if (r == 0)
        r = bn_copy_wait(j, NULL, NULL, 0, err);
    bn_copy_free(j);
    return r;
}

/* The first round is not counted. */
static void rounds(struct bn_copier *copier, const char *what, const struct bn_copy_spec *spec)
{
    uint64_t best = UINT64_MAX, worst = 0;
    for (unsigned i = 0; i <= opt.rounds; i++) {
        struct bn_error err = BN_ERROR_INIT;
        uint64_t t = bn_now_ns();
        int r = job(copier, spec, &err);
        t = bn_now_ns() - t;
        if (r < 0) {
            oops(what, r, &err);
            return;
        }
        best = i && t < best ? t : best;
        worst = i && t > worst ? t : worst;
    }
    rate(what, bn_gpu_set_bytes(spec->set), best, worst);
}

static void direct(struct bn_copier *copier, struct bn_gpu_set *set, struct bn_mem *mem)
{
    struct bn_copy_spec out = {.mode = BN_COPY_TO_HOST, .set = set, .mem = mem};
    struct bn_copy_spec in = {.mode = BN_COPY_FROM_HOST, .set = set, .mem = mem};
    uint64_t half = bn_gpu_set_bytes(set) / 2 / BN_GPU_CHUNK * BN_GPU_CHUNK;
    rounds(copier, "direct, device to pool", &out);
    rounds(copier, "direct, pool to device", &in);
    if (half == 0)
        return;
    struct bn_copy_extent lower = {0, half, 0}, upper = {half, half, half};
    out.extents = &lower;
    in.extents = &upper;
    out.nextents = in.nextents = 1;

    uint64_t t = bn_now_ns();
    struct bn_error err = BN_ERROR_INIT;
    struct bn_copy *a = NULL, *b = NULL;
    int r = bn_copy_start(copier, &out, &a, &err);
    if (r == 0)
        r = bn_copy_start(copier, &in, &b, &err);
    if (r == 0)
        r = bn_copy_wait(a, NULL, NULL, 0, &err);
    if (r == 0)
        r = bn_copy_wait(b, NULL, NULL, 0, &err);
    bn_copy_free(a);
    bn_copy_free(b);
    t = bn_now_ns() - t;
    if (r < 0)
        oops("direct, both directions at once", r, &err);
    else
        rate("direct, both directions at once (sum)", 2 * half, t, t);
}

static void streamed(struct bn_copier *copier, struct bn_gpu_set *set)
{
    _Atomic uint64_t sum = 0;
    uint8_t *source = malloc(64 * BN_GPU_CHUNK);
    struct bn_copy_spec out = {.mode = BN_COPY_OUT, .set = set, .consume = null_consume, .arg = &sum};
    struct bn_copy_spec in = {.mode = BN_COPY_IN, .set = set, .produce = null_produce, .arg = source};
    rounds(copier, "streamed out, null consumer", &out);
    out.consume = sum_consume;
    rounds(copier, "streamed out, consumer reads every byte", &out);
    rounds(copier, "streamed in, null producer", &in);
    if (source) {
        memset(source, 1, 64 * BN_GPU_CHUNK);
        in.produce = copy_produce;
        rounds(copier, "streamed in, producer copies from memory", &in);
    }
    free(source);
    const unsigned few[] = {1, 2, 4};
    for (unsigned i = 0; i < BN_ARRAY_SIZE(few); i++) {
        char what[80];
        out.consume = null_consume;
        in.produce = null_produce;
        out.workers = in.workers = few[i];
        snprintf(what, sizeof(what), "streamed out, null consumer, %u worker%s", few[i],
                 few[i] > 1 ? "s" : "");
        rounds(copier, what, &out);
        snprintf(what, sizeof(what), "streamed in, null producer, %u worker%s", few[i],
                 few[i] > 1 ? "s" : "");
        rounds(copier, what, &in);
    }
}

/* In by stream, out directly, back in directly to an overwritten set, out by stream: every byte. */
static void check(struct bn_copier *copier, struct bn_gpu_set *set, struct bn_mem *mem)
{
    uint64_t seed = bn_now_ns(), other = ~seed;
    struct bn_error err = BN_ERROR_INIT;
    struct bn_copy_spec fill = {.mode = BN_COPY_IN, .set = set, .produce = pattern_produce, .arg = &seed};
    struct bn_copy_spec out = {.mode = BN_COPY_TO_HOST, .set = set, .mem = mem};
    struct bn_copy_spec in = {.mode = BN_COPY_FROM_HOST, .set = set, .mem = mem};
    struct bn_copy_spec look = {.mode = BN_COPY_OUT, .set = set, .consume = pattern_consume, .arg = &seed};
    int r = job(copier, &fill, &err);
    if (r == 0)
        r = job(copier, &out, &err);
    fill.arg = &other;
    if (r == 0)
        r = job(copier, &fill, &err);
    if (r == 0)
        r = job(copier, &in, &err);
    if (r == 0)
        r = job(copier, &look, &err);
    if (r < 0)
        oops("every byte compared", r, &err);
    else
        printf("  %-52s ok\n", "every byte compared, all four ways");
}

/* ---- Sets ---------------------------------------------------------------------------------------------- */

static struct bn_gpu_set *import_again(struct bn_gpu_set *set, size_t n)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_gpu_set *again = NULL;
    struct bn_gpu_block *blocks = calloc(n, sizeof(*blocks));
    int r = blocks ? 0 : -ENOMEM;
    uint64_t t = bn_now_ns();
    size_t i = 0;
    for (; r >= 0 && i < n; i++)
        if ((r = bn_gpu_set_fd(set, i, &err)) >= 0)
            blocks[i] = (struct bn_gpu_block){bn_gpu_set_size(set, i), 0, r};
    if (r >= 0)
        took("export descriptors", bn_now_ns() - t);
    for (i = 0; r >= 0 && i < n; i++)
        if ((r = blocks[i].fd = fcntl(blocks[i].fd, F_DUPFD_CLOEXEC, 3)) < 0)
            r = bn_error_set(&err, errno, "dup", "Descriptor %zu of %zu: raise the limit of open files.", i,
                             n);
    t = bn_now_ns();
    if (r >= 0)
        r = bn_gpu_set_import(gpu, opt.device, blocks, n, &again, &err);
    if (r >= 0)
        took("import + map", bn_now_ns() - t);
    else
        oops("import", r, &err);
    free(blocks);
    return again;
}

static void shape(struct bn_copier *copier, struct bn_pool *pool, uint64_t block)
{
    size_t n = (size_t)(opt.bytes / block);
    char what[80];
    struct bn_error err = BN_ERROR_INIT;
    if (n == 0)
        return;
    snprintf(what, sizeof(what), "\n%zu blocks of %llu MiB", n, (unsigned long long)(block / MIB));
    headline(what);
    struct bn_gpu_block *blocks = calloc(n, sizeof(*blocks));
    for (size_t i = 0; blocks && i < n; i++)
        blocks[i].size = block;
    struct bn_gpu_set *set = NULL;
    uint64_t t = bn_now_ns();
    int r = blocks ? bn_gpu_set_create(gpu, opt.device, blocks, n, &set, &err) : -ENOMEM;
    free(blocks);
    if (r < 0) {
        oops("create", r, &err);
        return;
    }
    took("create + map", bn_now_ns() - t);

    struct bn_gpu_set *again = import_again(set, n);
    struct bn_mem *mem = NULL;
    r = bn_mem_alloc(pool, n * block, &mem, &err);
    if (r < 0)
        oops("pinned memory", r, &err);
    if (again && mem) { /* through the import, as the daemon works */
        direct(copier, again, mem);
        streamed(copier, again);
        if (opt.check)
            check(copier, again, mem);
    }
    bn_mem_free(mem);
    t = bn_now_ns();
    bn_gpu_set_free(again);
    took("unmap + release the import", bn_now_ns() - t);
    t = bn_now_ns();
    bn_gpu_set_free(set);
    took("unmap + release the last owner", bn_now_ns() - t);
}

/* ---- The pool ------------------------------------------------------------------------------------------ */

static void pool_times(struct bn_pool *pool)
{
    struct bn_pool_stats s;
    struct bn_error err = BN_ERROR_INIT;
    headline("pinned pool");
    for (int again = 0; again < 2; again++) {
        struct bn_pool_stats before;
        bn_pool_stats(pool, &before);
        uint64_t t = bn_now_ns();
        int r = bn_pool_reserve(pool, opt.bytes, &err);
        t = bn_now_ns() - t;
        if (r < 0) {
            oops("reserve", r, &err);
            return;
        }
        bn_pool_stats(pool, &s);
        rate(again ? "touch + register once more" : "touch + register, fresh memory", s.registered, t, t);
        took("  of it touching, all threads together", s.touch_ns - before.touch_ns);
        took("  of it registering, all threads together", s.register_ns - before.register_ns);
        if (again)
            return;
        t = bn_now_ns();
        bn_pool_trim(pool); /* keep is 0 */
        took("unregister + give back", bn_now_ns() - t);
    }
}

/* ---- Main ---------------------------------------------------------------------------------------------- */

static uint64_t size_arg(const char *text)
{
    char *end;
    double v = strtod(text, &end);
    uint64_t unit = *end == 'G' || *end == 'g' ? GIB : *end == 'M' || *end == 'm' ? MIB : 1;
    return (uint64_t)(v * (double)unit) / BN_GPU_CHUNK * BN_GPU_CHUNK;
}

static int arguments(int argc, char **argv)
{
    static const struct option options[] = {
        {"driver", required_argument, NULL, 'd'},
        {"device", required_argument, NULL, 'g'},
        {"bytes", required_argument, NULL, 'b'},
        {"rounds", required_argument, NULL, 'r'},
        {"workers", required_argument, NULL, 'w'},
        {"buffer", required_argument, NULL, 's'},
        {"touch", required_argument, NULL, 't'},
        {"no-check", no_argument, NULL, 'n'},
        {0},
    };
    int c;
    while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (c) {
        case 'd': opt.driver = optarg; break;
        case 'g': opt.device = (unsigned)atoi(optarg); break;
        case 'b': opt.bytes = size_arg(optarg); break;
        case 'r': opt.rounds = atoi(optarg) > 0 ? (unsigned)atoi(optarg) : 1; break;
        case 'w': opt.workers = (unsigned)atoi(optarg); break;
        case 's': opt.buffer = size_arg(optarg); break;
        case 't': opt.touch = (unsigned)atoi(optarg); break;
        case 'n': opt.check = false; break;
        default:
            fprintf(stderr,
                    "usage: %s [--driver FILE] [--device N] [--bytes SIZE, default 16G] [--rounds N] "
                    "[--workers N] "
                    "[--buffer SIZE] [--touch THREADS] [--no-check]\n",
                    argv[0]);
            return -1;
        }
    }
    return 0;
}

/* Not more than fits on the GPU beside the plain buffer, nor more than 60 % of the host's free memory. */
static int clamp(struct bn_error *err)
{
    uint64_t f, t, want = opt.bytes, host = mem_available() / 10 * 6;
    int r = bn_gpu_mem_info(gpu, opt.device, &f, &t, err);
    if (r < 0)
        return r;
    if (opt.bytes > f / 10 * 9)
        opt.bytes = f / 10 * 9;
    if (opt.bytes > host)
        opt.bytes = host;
    opt.bytes -= opt.bytes % BN_GPU_CHUNK;
    if (opt.bytes > GIB)
        opt.bytes -= opt.bytes % GIB;
    printf("  %-16s %.2f GB%s, best of %u rounds after one to warm up\n", "bytes", (double)opt.bytes / 1e9,
           opt.bytes < want ? " (all that fits)" : "", opt.rounds);
    return opt.bytes ? 0 : bn_error_set(err, ENOMEM, "bench", "There is no memory to measure with.");
}

int main(int argc, char **argv)
{
    struct bn_error err = BN_ERROR_INIT;
    struct bn_pool *pool = NULL;
    struct bn_copier *copier = NULL;
    if (arguments(argc, argv) < 0)
        return 2;
    struct rlimit files = {1 << 20, 1 << 20};
    if (setrlimit(RLIMIT_NOFILE, &files) < 0 && getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }

    uint64_t t = bn_now_ns();
    if (bn_gpu_open(opt.driver, &gpu, &err) < 0 || !bn_gpu_info(gpu, opt.device)) {
        fprintf(stderr, "%s\n", bn_error_is_set(&err) ? err.text : "There is no such device.");
        return 1;
    }
    uint64_t opened = bn_now_ns() - t;
    machine();
    t = bn_now_ns();
    int r = bn_gpu_warm(gpu, opt.device, &err);
    uint64_t warm = bn_now_ns() - t;
    if (r == 0)
        r = clamp(&err);
    headline("\nstart");
    took("load the driver + cuInit", opened);
    took("first context", warm);

    struct bn_pool_config pc = {.limit = opt.bytes, .threads = opt.touch};
    struct bn_copier_config cc = {.buffer = opt.buffer, .workers = opt.workers};
    if (r == 0)
        r = bn_pool_new(gpu, &pc, &pool, &err);
    if (r == 0)
        r = bn_copier_new(gpu, &cc, &copier, &err);
    t = bn_now_ns();
    if (r == 0)
        r = bn_copier_warm(copier, &err);
    if (r < 0) {
        oops("start", r, &err);
    } else {
        took("pin the staging buffers of one job", bn_now_ns() - t);
        plain();
        pool_times(pool);
        shape(copier, pool, opt.bytes < GIB ? opt.bytes : GIB);
        shape(copier, pool, BN_GPU_CHUNK);
    }
    bn_copier_free(copier);
    bn_pool_free(pool);
    bn_gpu_close(gpu);
    headline(failed || r < 0 ? "\nFAILED" : "\ndone");
    return failed || r < 0;
}
