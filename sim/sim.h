/* SPDX-License-Identifier: MIT */
#ifndef SIM_SIM_H
#define SIM_SIM_H

/*
 * The simulated driver: a stand-in for NVIDIA's libcuda.so.1 that runs on the CPU and follows the real one's rules.
 *
 * Every driver call enters through sim_enter() and leaves through sim_leave(): the gate that the checkpoint calls
 * close, the check for initialisation, injected failures and the trace are there and nowhere else. The library never
 * calls its own exported names, as those may be interposed; it calls the functions below.
 *
 * Locks, in the order in which they are taken:
 *   sim.lock   everything that the library knows: contexts, streams, queues, ranges. The restore thread keeps it from
 *              a successful Lock to the Unlock, so that a tracer may stop all other threads in between.
 *   sim.maps   a reader holds it while it touches device memory; whoever changes what is mapped writes it.
 * A thread that holds sim.maps never takes sim.lock. Queued work runs with neither, or with sim.maps for reading.
 */

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "gpu/cuda_types.h"

#define SIM_EXPORT __attribute__((visibility("default")))

#define SIM_MAX_DEVICES 16
#define SIM_GRANULARITY (2ull << 20)
#define SIM_SMALL_LIMIT (1ull << 20) /* native allocations below this share blocks of SIM_GRANULARITY */
#define SIM_SMALL_ALIGN 256ull

/* ---- Ranges of addresses: sorted sets, searched by address (range.c) ---- */

struct range {
    uint64_t start, size;
};

struct range_set {
    struct range **items;
    size_t count, room;
};

int range_insert(struct range_set *set, struct range *item); /* 0, -EEXIST when it overlaps, -ENOMEM */
void range_remove(struct range_set *set, struct range *item);
struct range *range_find(const struct range_set *set, uint64_t addr); /* the range that holds addr */
struct range *range_next(const struct range_set *set, uint64_t addr); /* the first that ends after addr */
bool range_overlaps(const struct range_set *set, uint64_t start, uint64_t size);

/* ---- Objects ---- */

/* One physical allocation, as this process holds it. It lives while `handles` or `maps` is not zero. */
struct phys {
    struct phys *next;
    uint64_t size;
    int ordinal; /* of the device; -1: host memory */
    int fd;      /* its memfd; -1 for native memory, which its mapping alone keeps alive */
    bool native, imported;
    unsigned handle_types;
    unsigned char rdma, compression;
    unsigned short usage;
    uint64_t id; /* the handle's value */
    unsigned handles, maps;
    void *saved; /* its bytes, while checkpointed */
};

struct slab_map; /* which parts of a shared block are taken: memory.c */

/* Physical memory mapped at an address. */
struct map {
    struct range r;
    struct phys *phys;
    bool vmm, ipc;
    unsigned ipc_opens;
    unsigned char access[SIM_MAX_DEVICES]; /* CUmemAccess_flags of each device; VMM memory only */
    bool host_access;
    struct slab_map *slab;
};

enum alloc_kind { ALLOC_DEVICE, ALLOC_ASYNC, ALLOC_MANAGED, ALLOC_HOST, ALLOC_REGISTERED, ALLOC_GLOBAL };

struct sim_ctx;

/* What the application got from cuMemAlloc, cuMemHostAlloc and their like. */
struct alloc {
    struct range r; /* the size that was asked for */
    enum alloc_kind kind;
    struct sim_ctx *ctx;
    struct map *map; /* device memory only */
    uint64_t id;
    unsigned flags;
    bool freed; /* cuMemFreeAsync was called, the stream has not come to it yet */
};

struct reservation {
    struct range r;
};

struct sim_stream;
struct sim_event;
struct sim_module;
struct sim_graph;

struct sim_ctx {
    struct sim_ctx *next;
    int ordinal;
    bool primary, alive;
    struct sim_ctx *home; /* of a green context: the primary one, whose memory it uses */
    unsigned flags;
    uint64_t id;
    uint32_t peers; /* mask of ordinals that cuCtxEnablePeerAccess was called for */
    CUresult sticky;
    struct sim_stream *null_stream, *thread_stream;
};

enum op_kind { OP_NOP, OP_COPY, OP_COPY2D, OP_SET, OP_KERNEL, OP_HOST, OP_CALLBACK, OP_EVENT, OP_FREE };

struct dep {
    struct sim_stream *stream;
    uint64_t seq;
};

struct op {
    struct op *next;
    enum op_kind kind;
    uint64_t seq;
    unsigned dep_count;
    struct dep *deps;
    struct sim_ctx *ctx;
    void *stage; /* bytes copied away from pageable memory; freed with the op */
    union {
        struct {
            uint64_t dst, src, size;
        } copy;
        struct {
            uint64_t dst, src;
            uint64_t dst_pitch, src_pitch, width, height;
        } copy2d;
        struct {
            uint64_t dst, pitch, width, height; /* width in elements */
            uint32_t value;
            unsigned element;
        } set;
        struct {
            int kernel;
            struct sim_module *module;
            unsigned blocks;
            uint64_t args[8];
        } launch;
        struct {
            CUhostFn fn;
            void *data;
        } host;
        struct {
            CUstreamCallback fn;
            CUstream stream;
            void *data;
        } callback;
        struct {
            struct sim_event *event;
            uint64_t generation;
        } event;
        struct {
            struct alloc *alloc;
        } free_;
    };
};

/* Never freed, only used again: a dependency on work of a destroyed stream stays answerable. */
struct sim_stream {
    struct sim_stream *next;
    struct sim_ctx *ctx;
    bool alive, blocking, worker;
    int priority;
    unsigned flags;
    uint64_t id, queued, completed;
    struct op *head, **tail;
    struct sim_graph *capture;
    CUstreamCaptureMode capture_mode;
};

struct sim {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* something was queued or done */
    pthread_rwlock_t maps;

    int devices;
    int physical[SIM_MAX_DEVICES]; /* which of the machine's devices an ordinal stands for */
    int shown[SIM_MAX_DEVICES];    /* what it calls itself: as it was at cuInit */
    int machine_devices;
    bool has_file[SIM_MAX_DEVICES]; /* the machine's devices that it can open: all, but in a container */
    uint64_t memory;                /* of each device, bytes */
    int version;
    bool mps, strict;
    uint64_t state_size;
    char machine[32];

    struct range_set mappings, allocs, reservations;
    struct phys *physical_list;
    struct sim_ctx *contexts;
    struct sim_stream *streams;
    uint64_t next_id;
    unsigned managed; /* live managed allocations */
};

extern struct sim sim;

/* ---- The door (call.c) ---- */

enum {
    CALL_EARLY = 1,  /* needs no cuInit */
    CALL_UNGATED = 2 /* not held back while the process is locked */
};

CUresult sim_enter(const char *name, unsigned flags);
CUresult sim_leave(const char *name, unsigned flags, CUresult rc);

/* Gate, for the restore thread. */
void gate_close(void);
void gate_open(void);
bool gate_wait_empty(uint64_t deadline_ns); /* false: somebody was still inside at the deadline (0: none) */

/* What a call of this name is told to answer: CUDA_SUCCESS for nothing (fault.c). */
CUresult fault_check(const char *name);
void fault_trace(const char *name, CUresult rc);
void fault_init(void);

/*
 * SIM_FN(cuName, flags, (parameters), (arguments)) { body }: the exported function and its body.
 * SIM_FN_STREAM: the same for a function with a parameter named hStream; makes cuName_ptsz too.
 */
#define SIM_FN(name, flags, params, args)                    \
    static CUresult body_##name params;                      \
    SIM_EXPORT CUresult name params;                         \
    SIM_EXPORT CUresult name params                          \
    {                                                        \
        CUresult rc_ = sim_enter(#name, flags);              \
        if (rc_ == CUDA_SUCCESS)                             \
            rc_ = sim_leave(#name, flags, body_##name args); \
        return rc_;                                          \
    }                                                        \
    static CUresult body_##name params

#define SIM_FN_STREAM(name, flags, params, args)             \
    static CUresult body_##name params;                      \
    SIM_EXPORT CUresult name params;                         \
    SIM_EXPORT CUresult name params                          \
    {                                                        \
        CUresult rc_ = sim_enter(#name, flags);              \
        if (rc_ == CUDA_SUCCESS)                             \
            rc_ = sim_leave(#name, flags, body_##name args); \
        return rc_;                                          \
    }                                                        \
    SIM_EXPORT CUresult name##_ptsz params;                  \
    SIM_EXPORT CUresult name##_ptsz params                   \
    {                                                        \
        if (!hStream)                                        \
            hStream = CU_STREAM_PER_THREAD;                  \
        CUresult rc_ = sim_enter(#name, flags);              \
        if (rc_ == CUDA_SUCCESS)                             \
            rc_ = sim_leave(#name, flags, body_##name args); \
        return rc_;                                          \
    }                                                        \
    static CUresult body_##name params

/*
 * Another name of the same function, at an address of its own as in the real driver: whoever tells functions apart by
 * what a look-up gave must be able to.
 */
#if defined(__x86_64__)
#define SIM_JUMP "jmp "
#elif defined(__aarch64__)
#define SIM_JUMP "b "
#else
#error "no jump instruction known for this processor"
#endif
#define SIM_ALIAS(alias_, target)                                                                       \
    __asm__(".pushsection .text\n.balign 16\n.globl " #alias_ "\n.type " #alias_ ",%function\n" #alias_ \
            ":\n\t" SIM_JUMP #target "\n.size " #alias_ ",.-" #alias_ "\n.popsection");                 \
    _Static_assert(1, "")

/* ---- Helpers ---- */

static inline void sim_unlock_cleanup(int *unused)
{
    (void)unused;
    pthread_mutex_unlock(&sim.lock);
}

/* Holds sim.lock to the end of the scope. */
#define SIM_LOCKED() \
    int locked_ __attribute__((cleanup(sim_unlock_cleanup), unused)) = pthread_mutex_lock(&sim.lock)

static inline uint64_t round_up(uint64_t value, uint64_t to)
{
    return (value + to - 1) / to * to;
}

uint64_t sim_now_ns(void);
int sim_high_fd(int fd); /* moves a descriptor to a high number, close-on-exec; takes fd over */

/* ---- Contexts (context.c); sim.lock held ---- */

CUresult ctx_current(struct sim_ctx **out);
CUresult ctx_check(CUcontext handle, struct sim_ctx **out);
struct sim_ctx *ctx_primary(int ordinal); /* NULL when it is not active */
bool ordinal_valid(int ordinal);

/* ---- Streams (stream.c); sim.lock held unless said otherwise ---- */

CUresult stream_resolve(CUstream handle, struct sim_ctx *ctx, struct sim_stream **out);
struct sim_stream *stream_new(struct sim_ctx *ctx, unsigned flags, int priority);
struct op *op_new(enum op_kind kind, struct sim_ctx *ctx);
void op_free(struct op *op);
CUresult stream_enqueue(struct sim_stream *stream, struct op *op); /* takes op over, also on failure */
void stream_wait(struct sim_stream *stream, uint64_t seq);         /* lets go of sim.lock meanwhile */
void stream_wait_ctx(struct sim_ctx *ctx);                         /* everything queued in the context */
void stream_wait_legacy(struct sim_ctx *ctx); /* what a call on the default stream waits for */
void stream_close_ctx(struct sim_ctx *ctx);
bool streams_drain(uint64_t deadline_ns); /* all streams of all contexts; false: not done at the deadline */
bool streams_capturing(const struct sim_ctx *ctx);
CUresult graph_record(struct sim_graph *graph, struct op *op);

/* ---- Memory ---- */

CUresult phys_create(int ordinal, uint64_t size,
                     struct phys **out);     /* capacity.c: counts against the device */
int phys_memfd(int physical, uint64_t size); /* an fd, or -errno; no accounting */
void phys_settle(struct phys *phys);         /* frees it when nothing holds it */
uint64_t capacity_used(int physical);        /* bytes alive on a device; no lock, no malloc */
int capacity_lock(void);                     /* a descriptor to close, or -1 */
bool capacity_take(int lock_fd, int physical, uint64_t size); /* false: does not fit */
bool capacity_has(int physical, uint64_t size);               /* it would fit now */
int capacity_device_of(int fd);                               /* physical device of a memfd, -1: not ours */
int device_files(void);                                       /* of how many devices it has the file */
int phys_ordinal(int physical);                               /* ordinal that stands for it, -1: none */

int map_place(uint64_t start, struct map *map); /* maps map->phys there with the protection it should have */
int map_protection(const struct map *map);
int map_mmap(const struct map *map, int fd);                          /* no lock, no malloc */
uint64_t space_reserve(uint64_t size, uint64_t align, uint64_t hint); /* PROT_NONE addresses; 0: none */
void space_clear(uint64_t start, uint64_t size);                      /* back to PROT_NONE */
struct phys *phys_by_id(uint64_t id);

CUresult native_alloc(struct sim_ctx *ctx, uint64_t size, enum alloc_kind kind, uint64_t *out);
void native_free(struct alloc *alloc);
struct alloc *alloc_new(struct sim_ctx *ctx, enum alloc_kind kind, uint64_t start, uint64_t size);
CUresult map_new(int ordinal, uint64_t size, struct map **out); /* native memory of its own */
void map_end(struct map *map);
void close_fd(int *fd);
CUresult op_execute(struct op *op);        /* copy.c; no lock held */
void memory_drop_ctx(struct sim_ctx *ctx); /* frees what a destroyed context owned */

/*
 * Whether [start, start + size) may be touched: device memory that is accessible, or memory of the host. ctx: for
 * whom a kernel runs, NULL for a copy. Needs sim.lock or sim.maps.
 */
bool memory_usable(uint64_t start, uint64_t size, const struct sim_ctx *ctx, bool write);
bool memory_is_device(uint64_t addr);
bool memory_is_pinned(uint64_t addr); /* page-locked by this library */

/* ---- Modules (module.c) ---- */

CUresult kernel_run(struct op *op); /* no lock held */

/* ---- Bennu's hash (hash.c) ---- */

CUresult hash_range(struct op *op, const uint64_t *args); /* kernel: base, stride, material, values */

/* ---- Checkpoint ---- */

CUresult control_start(void); /* control.c: makes the control page and the restore thread; sim.lock held */
void control_forked(void);
void control_open_device(void);
void control_close_device(void);

/* save.c: run by the restore thread, which holds sim.lock; no malloc, no stdio. */
CUresult save_checkpoint(void);
CUresult save_restore(const CUcheckpointGpuPair *pairs, unsigned count);

void device_uuid(int physical, CUuuid *out);

#endif
