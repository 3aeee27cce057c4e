/* Everything Bennu asks of a GPU: devices, sets of device memory, pinned host memory, copies, and the
 * driver's checkpoint calls. One implementation: the CUDA driver API, opened at run time. The simulated
 * driver is another file behind the same calls.
 *
 * Threads: every function may be called from any thread, several at once, unless its comment says
 * otherwise. CUDA contexts are pushed and popped inside; the caller's current context is as before.
 * Nothing here logs.
 *
 * Results: 0 (or a value >= 0 where said) or a negative errno, and `err` (may be NULL) filled with a
 * message that names the device, the size or the process. Outputs are written on success only. Destructors
 * take NULL.
 *
 * Sizes and offsets are bytes. Device memory is counted in multiples of BN_GPU_CHUNK.
 */
#pragma once

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Smallest unit of device memory (the granularity of cuMemCreate on every GPU so far), of copies and of
 * images. */
#define BN_GPU_CHUNK (UINT64_C(2) << 20)

/* ---- The driver and its devices ------------------------------------------------------------------------ */

struct bn_gpu; /* an opened driver */

struct bn_gpu_info {
    uint8_t uuid[16];
    char name[96];
    char pci[24];          /* "0000:18:00.0" */
    unsigned major, minor; /* compute capability */
    uint64_t total;        /* bytes of memory */
    bool shareable;        /* can hand memory over by descriptor; if not, Bennu leaves it to the driver */
    bool rdma;             /* memory can be created with BN_GPU_RDMA */
    bool compression;      /* memory can be created with BN_GPU_COMPRESSED */
};

/* Load the driver (`driver_path`, or the system's libcuda.so.1 when NULL: the caller decides what the
 * environment says), check that it is not Bennu's own stand-in, initialise it, read the devices. Takes 0.1
 * to 0.2 s, creates no context. -ENOENT: no driver installed; -ENODEV: no GPU; -ENOSYS: driver too old for
 * sharing memory at all; other: it does not start. Devices are numbered as the driver numbers them
 * for this process (CUDA_VISIBLE_DEVICES counts). */
int bn_gpu_open(const char *driver_path, struct bn_gpu **out, struct bn_error *err);

/* After everything made from it was freed. Releases the contexts; the library stays loaded (the driver
 * does not unload well). */
void bn_gpu_close(struct bn_gpu *gpu);

const char *bn_gpu_driver_path(const struct bn_gpu *gpu); /* the file that was loaded */
unsigned bn_gpu_driver_version(const struct bn_gpu *gpu); /* as cuDriverGetVersion: 13000 is CUDA 13.0 */
bool bn_gpu_simulated(const struct bn_gpu *gpu);

unsigned bn_gpu_count(const struct bn_gpu *gpu);
/* NULL: no such device. Lives as long as gpu. */
const struct bn_gpu_info *bn_gpu_info(const struct bn_gpu *gpu, unsigned dev);
/* Number of the device with this UUID, or -ENODEV. */
int bn_gpu_find(const struct bn_gpu *gpu, const uint8_t uuid[16]);
/* The UUIDs of all GPUs that the kernel's driver has, at most `max`, and how many: first ours, by number, then those that this process is not
 * shown, as /proc/driver/nvidia has them (for the simulated driver the folder BENNU_SIM_PROC, if set). Any thread. */
unsigned bn_gpu_machine(const struct bn_gpu *gpu, uint8_t (*uuids)[16], unsigned max);

/* Create the device's context now (0.1 to 0.2 s) instead of at the first use. It then stays until
 * bn_gpu_close. */
int bn_gpu_warm(struct bn_gpu *gpu, unsigned dev, struct bn_error *err);

/* Memory free at this moment, for everybody on the device, and in all. Warms the device. */
int bn_gpu_mem_info(struct bn_gpu *gpu, unsigned dev, uint64_t *free_bytes, uint64_t *total,
                    struct bn_error *err);

/* ---- Sets of device memory ----------------------------------------------------------------------------- */

/* A set is a row of blocks of one device, mapped one behind the other in one address range of ours, in the
 * order given: to us it is one piece of memory with offsets from 0, however many handles lie behind it. A
 * block is one physical handle, held by a file descriptor; a set of one block is how a single block is
 * made. */
struct bn_gpu_set;

#define BN_GPU_RDMA 1u /* same bits as BN_SEGMENT_RDMA … on the wire */
#define BN_GPU_COMPRESSED 2u

struct bn_gpu_block {
    uint64_t size;  /* multiple of BN_GPU_CHUNK, not 0 */
    uint32_t flags; /* BN_GPU_…; remembered; on creation obeyed where the device can, otherwise left out */
    int fd;         /* import: descriptor of the handle. create: ignored */
};

/* Import `n` >= 1 blocks from descriptors that came out of another process (or out of bn_gpu_set_fd).
 * Takes the descriptors over on success: they are closed with the set, since an imported handle cannot be
 * exported again. On failure they stay the caller's. The descriptors may come from a hostile process: a
 * wrong one is refused (-EINVAL), too large a size as well. The content is left alone. */
int bn_gpu_set_import(struct bn_gpu *gpu, unsigned dev, const struct bn_gpu_block *blocks, size_t n,
                      struct bn_gpu_set **out, struct bn_error *err);

/* Create `n` >= 1 shareable blocks. Content undefined. -ENOMEM: not enough free memory on the device
 * (nothing is left allocated). */
int bn_gpu_set_create(struct bn_gpu *gpu, unsigned dev, const struct bn_gpu_block *blocks, size_t n,
                      struct bn_gpu_set **out, struct bn_error *err);

/* Unmap, release, close. The memory itself lives on while another process has it mapped. No copy of it may
 * be under way. */
void bn_gpu_set_free(struct bn_gpu_set *set);

size_t bn_gpu_set_count(const struct bn_gpu_set *set);
uint64_t bn_gpu_set_bytes(const struct bn_gpu_set *set);
unsigned bn_gpu_set_device(const struct bn_gpu_set *set);
/* Offset, size and flags of block `i` (< count). */
uint64_t bn_gpu_set_offset(const struct bn_gpu_set *set, size_t i);
uint64_t bn_gpu_set_size(const struct bn_gpu_set *set, size_t i);
uint32_t bn_gpu_set_flags(const struct bn_gpu_set *set, size_t i);
/* Descriptor of block `i`, borrowed: what came in, or exported at the first call. Valid until the set is
 * freed. */
int bn_gpu_set_fd(struct bn_gpu_set *set, size_t i, struct bn_error *err);
/* Device address of offset 0, for kernels and tests. */
uint64_t bn_gpu_set_ptr(const struct bn_gpu_set *set);

struct bn_copy_extent; /* below */
/* Copy these ranges of `from`, one behind the other, to the beginning of `to`, which is on the same device, and wait for it: at the rate
 * of the device's memory, not of its link. `mem_off` is ignored. -EINVAL: another device, or too little room. */
int bn_gpu_set_gather(struct bn_gpu_set *to, const struct bn_gpu_set *from,
                      const struct bn_copy_extent *extents, size_t n, struct bn_error *err);

/* Move block `i` to the memory that `fd` (as for an import; the same size, on the same device) stands for: it is copied there, and what
 * it had is let go of. Takes the descriptor over on success. No copy of the block may be under way. */
int bn_gpu_set_swap(struct bn_gpu_set *set, size_t i, int fd, struct bn_error *err);

/* ---- Pinned host memory -------------------------------------------------------------------------------- */

/* Host memory in a memfd, registered once with the driver for every device, handed out and taken back in
 * multiples of BN_GPU_CHUNK. It grows by slabs when asked for more than it has. */
struct bn_pool;

struct bn_pool_config {
    uint64_t limit; /* bytes at most; 0: as much as the machine gives */
    uint64_t keep;  /* bytes that bn_pool_trim leaves registered */
    uint64_t slab;  /* growth step, multiple of BN_GPU_CHUNK; 0: 256 MiB */
    /* Threads that touch new memory: a first touch costs far more than the copy into it. 0: one a core, at
     * most 16. */
    unsigned threads;
};

struct bn_pool_stats {
    uint64_t limit, registered, used;            /* bytes */
    uint64_t grown_bytes, touch_ns, register_ns; /* all growth so far; the times are sums over the threads */
    uint64_t grow_ns;                            /* wall time of all growth so far */
};

/* Allocates nothing yet. `gpu` must outlive the pool. */
int bn_pool_new(struct bn_gpu *gpu, const struct bn_pool_config *config, struct bn_pool **out,
                struct bn_error *err);
/* All of its memory must have been given back. */
void bn_pool_free(struct bn_pool *pool);
/* Have at least `bytes` registered (free or used), so that a later bn_pool_alloc does not wait. */
int bn_pool_reserve(struct bn_pool *pool, uint64_t bytes, struct bn_error *err);
/* Give unused slabs back to the machine, down to config.keep. */
void bn_pool_trim(struct bn_pool *pool);
void bn_pool_stats(struct bn_pool *pool, struct bn_pool_stats *stats);
/* The memfd behind it all, borrowed; bn_mem_piece says where in it memory lies. */
int bn_pool_fd(const struct bn_pool *pool);

/* An allocation: one row of bytes from 0 to its size, in as few contiguous pieces as the pool had. */
struct bn_mem;

/* `bytes` > 0 is rounded up to BN_GPU_CHUNK. Content undefined. -ENOMEM: the limit, or the machine, does
 * not allow it. */
int bn_mem_alloc(struct bn_pool *pool, uint64_t bytes, struct bn_mem **out, struct bn_error *err);
void bn_mem_free(struct bn_mem *mem);
uint64_t bn_mem_bytes(const struct bn_mem *mem);
/* Address of `off` (< bytes); *len (may be NULL) is how many bytes from there on are contiguous, *fd_off
 * (may be NULL) where it lies in bn_pool_fd. */
void *bn_mem_piece(const struct bn_mem *mem, uint64_t off, uint64_t *len, uint64_t *fd_off);

/* ---- Copies -------------------------------------------------------------------------------------------- */

/* The copier lends staging buffers to jobs and starts their threads. One for a process is enough: jobs run
 * side by side; buffers go to the job that has the fewest, between any two pieces, so that they share the link evenly. */
struct bn_copier;

struct bn_copier_config {
    uint64_t buffer;  /* bytes of a staging buffer, multiple of BN_GPU_CHUNK; 0: 16 MiB */
    unsigned workers; /* threads of a BN_COPY_OUT job; 0: one a core, at most 8. Each has two buffers. */
    /* The same for BN_COPY_IN, whose threads copy from the page cache and gain from more; 0: one a core, at most 16. */
    unsigned workers_in;
    /* Staging buffers for all jobs together. Jobs beyond get fewer, or wait. 0: enough for four jobs, and for one on each GPU. */
    unsigned buffers;
};

/* `gpu` must outlive it. Buffers are pinned at first use and kept. */
int bn_copier_new(struct bn_gpu *gpu, const struct bn_copier_config *config, struct bn_copier **out,
                  struct bn_error *err);
/* All jobs must have been freed. */
void bn_copier_free(struct bn_copier *copier);
/* From one to the other nothing is trimmed: whoever has named staging buffers to somebody else (the kernel, for its I/O) and
 * counts on them being the same memory in a later job. */
void bn_copier_hold(struct bn_copier *copier);
void bn_copier_let_go(struct bn_copier *copier);
/* Give back the staging buffers that no job has, unless somebody holds them. */
void bn_copier_trim(struct bn_copier *copier);
/* Threads of a BN_COPY_OUT job. */
unsigned bn_copier_threads(const struct bn_copier *copier);
/* Pin the staging buffers of one job now. */
int bn_copier_warm(struct bn_copier *copier, struct bn_error *err);

enum bn_copy_mode {
    BN_COPY_TO_HOST,   /* set -> mem, directly */
    BN_COPY_FROM_HOST, /* mem -> set, directly */
    BN_COPY_OUT,       /* set -> staging buffers -> consume() */
    BN_COPY_IN,        /* produce() -> staging buffers -> set */
};

/* A range of the set. Streamed copies: both multiples of BN_GPU_CHUNK. */
struct bn_copy_extent {
    uint64_t offset; /* in the set */
    uint64_t bytes;
    uint64_t mem_off; /* direct copies: where in mem */
};

/* Called by the job's threads, several at once, in any order, each chunk exactly once. `chunk` is the
 * set's offset divided by BN_GPU_CHUNK; `data` is pinned memory, aligned to a page at least, valid until
 * the call returns. 0, or a negative errno with `err` filled or not: the first failure stops the job and
 * becomes its result. */
typedef int (*bn_copy_consume_fn)(void *arg, uint64_t chunk, unsigned nchunks, const void *data,
                                  struct bn_error *err);
/* As above, and must fill all of nchunks * BN_GPU_CHUNK bytes. */
typedef int (*bn_copy_produce_fn)(void *arg, uint64_t chunk, unsigned nchunks, void *data,
                                  struct bn_error *err);

struct bn_copy_spec {
    enum bn_copy_mode mode;
    struct bn_gpu_set *set;
    struct bn_mem *mem; /* direct modes */
    /* Copied by bn_copy_start; must not overlap. NULL: the whole set, at the same offsets in mem. */
    const struct bn_copy_extent *extents;
    size_t nextents;
    bn_copy_consume_fn consume; /* BN_COPY_OUT */
    bn_copy_produce_fn produce; /* BN_COPY_IN */
    void *arg;
    unsigned workers; /* streamed modes; 0: the copier's */
    uint64_t
        piece; /* streamed modes: most bytes at a time, a chunk at least; 0: what a staging buffer holds */
};

struct bn_copy; /* a job */

/* Start a job. Set, mem and arg must stay until it has been freed. */
int bn_copy_start(struct bn_copier *copier, const struct bn_copy_spec *spec, struct bn_copy **out,
                  struct bn_error *err);
/* Bytes that have arrived, and in all. */
uint64_t bn_copy_done(const struct bn_copy *job);
uint64_t bn_copy_total(const struct bn_copy *job);
/* Ask it to stop; returns at once. The job then ends with -ECANCELED unless it had ended already. */
void bn_copy_cancel(struct bn_copy *job);
/* A descriptor that becomes readable when the job has ended, for poll and event loops. Borrowed. */
int bn_copy_fd(const struct bn_copy *job);
/* True once it has ended; bn_copy_wait then returns at once. */
bool bn_copy_ended(const struct bn_copy *job);

/* When it ended (bn_now_ns); 0: not yet. */
uint64_t bn_copy_end_ns(const struct bn_copy *job);

typedef void (*bn_copy_progress_fn)(void *arg, uint64_t done, uint64_t total);
/* Wait for the end and return the result. `progress` (may be NULL) is called here every `interval_ms`. May
 * be called again. */
int bn_copy_wait(struct bn_copy *job, bn_copy_progress_fn progress, void *arg, unsigned interval_ms,
                 struct bn_error *err);
/* Cancels and waits where need be. After it nobody touches set, mem or arg any more. */
void bn_copy_free(struct bn_copy *job);

/* ---- The driver's own checkpoint ----------------------------------------------------------------------- */

enum bn_ckpt_state {
    BN_CKPT_RUNNING,
    BN_CKPT_LOCKED,
    BN_CKPT_CHECKPOINTED,
    BN_CKPT_FAILED,  /* lost: the driver can neither restore nor unlock it */
    BN_CKPT_NO_CUDA, /* the process lives and has never initialised CUDA */
    /* The driver knows no CUDA in it, but it holds the GPU's device files: a child forked without exec, a user
     * of NVML alone, or cuInit under way. The driver does nothing for it, and CRIU cannot dump it. */
    BN_CKPT_FILES_ONLY,
};

/* The driver has nothing to checkpoint in such a process. */
static inline bool bn_ckpt_no_cuda(enum bn_ckpt_state state)
{
    return state == BN_CKPT_NO_CUDA || state == BN_CKPT_FILES_ONLY;
}

/* What the driver says of a process. "No CUDA" is not read from the driver's error alone (it answers
 * INVALID_VALUE for that and for more): the process must live, be a process and not a thread, and hold
 * none of the GPU's device files. -ESRCH: no such process; -ENOSYS: the driver (older than 570) has no
 * checkpoint calls. */
int bn_ckpt_state(struct bn_gpu *gpu, pid_t pid, enum bn_ckpt_state *state, struct bn_error *err);

/* The thread of the process through which the driver acts on it (it must be able to run for the calls
 * below). */
int bn_ckpt_thread(struct bn_gpu *gpu, pid_t pid, pid_t *tid, struct bn_error *err);

struct bn_ckpt_pair {
    uint8_t from[16], to[16]; /* UUIDs */
};
/* Which GPU takes the place of which, for a restore. The driver wants to hear of each GPU that the process could have used, no more and no
 * less: of all those of the machine that it was checkpointed on (the whole list), or, in a container, of those whose device files it had
 * (driver 580). Which of the two it is is tried out, as a list that is refused changes nothing. */
#define BN_CKPT_PAIRS_MAX 64u
struct bn_ckpt_pairs {
    struct bn_ckpt_pair v[BN_CKPT_PAIRS_MAX];
    size_t n;
    size_t used; /* so many, the first ones, are those that the checkpoint has memory of */
};

/* The four steps; each blocks as long as the driver needs, in lock at most timeout_ms (0: no limit). Errors:
 *   -ESRCH    no such process
 *   -ENODEV   it has no CUDA state
 *   -EINVAL   it is in another state than the step needs, or a thread
 *   -ENOTSUP  the driver cannot checkpoint what it does (MPS, managed memory, peer mappings): the text says
 *   -EBUSY    lock: work on the GPU did not end in time
 *   -ENOMEM   restore: not enough free memory on the GPU
 *   -ENOSYS   no checkpoint calls in this driver, or (pairs) older than 580
 *   other     the driver's own reason; after a restore that the driver was asked for and refused the process is lost
 * After a failed checkpoint the process is still locked: unlock it. */
int bn_ckpt_lock(struct bn_gpu *gpu, pid_t pid, unsigned timeout_ms, struct bn_error *err);
int bn_ckpt_checkpoint(struct bn_gpu *gpu, pid_t pid, struct bn_error *err);
/* `pairs` NULL: onto the GPUs it came from; otherwise those of one pair are of one chip. *asked: whether the driver was called; otherwise
 * everything is as it was. */
int bn_ckpt_restore(struct bn_gpu *gpu, pid_t pid, const struct bn_ckpt_pairs *pairs, bool *asked,
                    struct bn_error *err);
int bn_ckpt_unlock(struct bn_gpu *gpu, pid_t pid, struct bn_error *err);
