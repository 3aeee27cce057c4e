/* The manifest: what a checkpoint holds of GPU memory and how to put it back. Pure bytes, no files: src/store reads and
 * writes them. docs/image-format.md describes the encoding; everything here is decoded from hostile bytes.
 *
 * Thread safety: a manifest that nobody changes may be read by any number of threads.
 */
#pragma once

#include "base/error.h"
#include "image/hash.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BN_CHUNK_SIZE ((uint64_t)2 << 20)
#define BN_PACK_ALIGN 4096u /* of every offset into a pack */
#define BN_NO_CHUNK UINT32_MAX

#define BN_MANIFEST_NAME "bennu-manifest.img"
#define BN_IMAGE_RECORD_NAME "bennu-command.json" /* what the command line notes before CRIU begins */
#define BN_MANIFEST_VERSION 1u

/* Limits, the same for encoding and decoding. */
#define BN_MANIFEST_PROCESSES_MAX 65536u
#define BN_MANIFEST_SEGMENTS_MAX (1u << 20) /* of all processes together */
#define BN_MANIFEST_CHUNKS_MAX (1u << 22)   /* 8 TiB */
#define BN_MANIFEST_PACKS_MAX 65536u
#define BN_MANIFEST_GPUS_MAX 64u
#define BN_MANIFEST_PHASES_MAX 256u
#define BN_MANIFEST_FILES_MAX (1u << 20)
#define BN_MANIFEST_BYTES_MAX ((size_t)256 << 20)

/* Feature bits. A reader refuses a manifest with an incompatible bit that it does not know. */
#define BN_MANIFEST_INCOMPAT_ZSTD UINT64_C(1) /* chunks may be compressed */
#define BN_MANIFEST_INCOMPAT_KNOWN BN_MANIFEST_INCOMPAT_ZSTD

struct bn_image_gpu {
    char name[96];
    uint32_t cc_major, cc_minor; /* compute capability */
    uint8_t uuid[16];            /* as the application knows it */
    uint64_t bytes;              /* memory in all */
};

struct bn_image_segment {
    uint64_t id;          /* the agent's own, unique in its process */
    uint64_t size;        /* bytes, multiple of BN_CHUNK_SIZE, not 0 */
    uint64_t va;          /* where it is mapped; 0 = held but not mapped */
    uint32_t gpu;         /* index into gpus */
    uint32_t flags;       /* BN_SEGMENT_… of the agent's protocol; kept as they are */
    uint32_t first_chunk; /* bn_manifest_layout() sets it; size / BN_CHUNK_SIZE chunks from there on */
};

#define BN_PROCESS_AGENT 1u  /* has an agent; its segments are listed */
#define BN_PROCESS_DRIVER 2u /* GPU memory saved by the driver itself, in CRIU's pages */
#define BN_PROCESS_FLAGS_KNOWN 3u

struct bn_image_process {
    int32_t pid;          /* as the process itself sees it (innermost pid namespace) */
    uint8_t instance[16]; /* of its agent; zero = no agent */
    char comm[16];
    uint32_t flags;                    /* BN_PROCESS_… */
    uint32_t driver_state;             /* CUprocessState at the time of the dump */
    struct bn_image_segment *segments; /* owned */
    uint32_t n_segments;
};

#define BN_CHUNK_ZERO 1u /* all zero and not stored anywhere */
#define BN_CHUNK_FLAGS_KNOWN 1u
#define BN_ENCODING_RAW 0u  /* the bytes themselves */
#define BN_ENCODING_ZSTD 1u /* a zstd frame of them; needs BN_MANIFEST_INCOMPAT_ZSTD */
#define BN_STORE_PACK 0u    /* in a pack of this folder */

struct bn_image_chunk {
    struct bn_hash hash; /* of the 2 MiB in memory, whatever the encoding; valid for zero chunks too */
    uint32_t pack;       /* index of the pack's name, not of packs[] */
    uint8_t flags, encoding, store;
    uint64_t offset; /* in the pack, multiple of BN_PACK_ALIGN */
    uint32_t length; /* bytes stored there */
};

struct bn_image_pack {
    uint32_t index;  /* bennu-pack-%u.img */
    uint64_t length; /* bytes of the file */
};

struct bn_image_phase {
    char name[32];
    uint64_t start_ns, duration_ns; /* from the beginning of the dump */
    uint64_t bytes;                 /* moved by it, 0 = does not apply */
};

/* A file of CRIU's; its hashes are of 2 MiB each, the last of what is left. */
#define BN_IMAGE_FILE_NAME_MAX 96u /* bytes, with the closing NUL */
struct bn_image_file {
    char name[BN_IMAGE_FILE_NAME_MAX]; /* bn_image_file_name_ok */
    uint64_t length;                   /* bytes */
    uint32_t first_hash;               /* index into file_hashes */
};

/* How many hashes a file of so many bytes has. */
static inline uint64_t bn_image_file_pieces(uint64_t length)
{
    return length / BN_CHUNK_SIZE + (length % BN_CHUNK_SIZE != 0);
}

#define BN_IMAGE_STDIO_MAX 257u /* bytes, with the closing NUL */

/* Everything is owned; bn_manifest_free() frees it. The arrays grow by the functions below only.
 * Strings end with a NUL; those of a decoded manifest may hold any other byte: make them safe before a terminal sees them. */
struct bn_manifest {
    uint64_t incompat, compat;     /* feature bits */
    uint8_t key[BN_HASH_KEY_SIZE]; /* of every hash in this image */
    uint64_t created_ns;           /* CLOCK_REALTIME */
    char bennu_version[32];
    char host[65];
    uint32_t driver_version; /* as cuDriverGetVersion; 0 = unknown */

    struct bn_image_gpu *gpus;
    uint32_t n_gpus;
    uint8_t (*others)[16]; /* UUIDs of the GPUs of the machine that are none of them */
    uint32_t n_others;
    struct bn_image_process *processes;
    uint32_t n_processes;
    struct bn_image_chunk *chunks;
    uint32_t n_chunks;
    struct bn_image_pack *packs; /* ascending index */
    uint32_t n_packs;
    struct bn_image_phase *phases;
    uint32_t n_phases;

    struct bn_image_file *files; /* ascending by name; none: it is not known what CRIU's files were */
    uint32_t n_files;
    struct bn_hash *file_hashes;
    uint32_t n_file_hashes;

    /* Of the root process: what /proc/PID/fd/0 … 2 linked to (empty: closed), so that a restore can give it the like. */
    char stdio[3][BN_IMAGE_STDIO_MAX];
    bool controlling_tty;
};

/* A manifest with a fresh key and the time of now. NULL: no memory, or no random bytes. */
struct bn_manifest *bn_manifest_new(void);
void bn_manifest_free(struct bn_manifest *m);
static inline void bn_cleanup_manifest(struct bn_manifest **m)
{
    bn_manifest_free(*m);
}
#define bn_auto_manifest __attribute__((cleanup(bn_cleanup_manifest), unused))

/* Append a zeroed record and return it, to be filled in; NULL when out of memory or beyond the limit. The pointer is good
 * until the next record of that kind is added. */
struct bn_image_gpu *bn_manifest_add_gpu(struct bn_manifest *m);
uint8_t (*bn_manifest_add_other(struct bn_manifest *m))[16]; /* of the machine's GPUs */
struct bn_image_process *bn_manifest_add_process(struct bn_manifest *m);
struct bn_image_segment *bn_process_add_segment(struct bn_image_process *p);
/* 0, -ENOMEM or -E2BIG. A longer name is cut. */
int bn_manifest_add_phase(struct bn_manifest *m, const char *name, uint64_t start_ns, uint64_t duration_ns,
                          uint64_t bytes);

/* Append a file and room for its hashes. Names ascend. -EINVAL: not such a name; -E2BIG; -ENOMEM. */
int bn_manifest_add_file(struct bn_manifest *m, const char *name, uint64_t length);
/* Is it the name of a file of an image that is no pack and not the manifest: CRIU's and our plugin's `*.img`, or the command line's record? */
bool bn_image_file_name_ok(const char *name);

/* Once every segment is known: number the chunks, in the order of the processes and of their segments, and make room for
 * them in `chunks` (zeroed). -EINVAL: a segment's size is no multiple of BN_CHUNK_SIZE; -E2BIG; -ENOMEM. */
int bn_manifest_layout(struct bn_manifest *m, struct bn_error *err);

static inline uint32_t bn_segment_chunks(const struct bn_image_segment *s)
{
    return (uint32_t)(s->size / BN_CHUNK_SIZE);
}
/* Bytes of GPU memory in the image, zero chunks counted; and bytes that the packs hold. */
uint64_t bn_manifest_bytes(const struct bn_manifest *m);
uint64_t bn_manifest_stored_bytes(const struct bn_manifest *m);

/* The process with this agent instance, or the one with this pid and no agent; NULL: not in the image. */
const struct bn_image_process *bn_manifest_find_process(const struct bn_manifest *m,
                                                        const uint8_t instance[16], int32_t pid);

/* Whose a chunk is. */
struct bn_chunk_owner {
    const struct bn_image_process *process;
    const struct bn_image_segment *segment;
    uint32_t segment_index;
    uint64_t offset; /* bytes into the segment */
};
/* False: no segment has it. `m` must be valid (decoded, or laid out). */
bool bn_manifest_chunk_owner(const struct bn_manifest *m, uint32_t chunk, struct bn_chunk_owner *out);

/* The pack with this number, or NULL. The packs must be in the order of their numbers, as those of a valid manifest are. */
const struct bn_image_pack *bn_manifest_find_pack(const struct bn_manifest *m, uint32_t index);

/* Check everything that decoding checks. -EINVAL (E2BIG for limits) and a message that says what is wrong. */
int bn_manifest_validate(const struct bn_manifest *m, struct bn_error *err);

/* Encode into *out (malloced, caller frees). Validates first. -EINVAL, -E2BIG, -ENOMEM. */
int bn_manifest_encode(const struct bn_manifest *m, void **out, size_t *len, struct bn_error *err);

/* Decode. -EBADMSG: truncated, changed or malformed; -EPROTONOSUPPORT: made by a newer Bennu; -ENOMEM. On success the
 * manifest is valid in the sense of bn_manifest_validate(); the caller frees it. */
int bn_manifest_decode(const void *data, size_t len, struct bn_manifest **out, struct bn_error *err);

/* The index of the GPU with this UUID in `gpus`, or -1. */
int bn_manifest_find_gpu(const struct bn_manifest *m, const uint8_t uuid[16]);

/* Encodes without validating: for tests that need a wrong manifest with a right checksum. */
int bn_manifest_encode_unchecked(const struct bn_manifest *m, void **out, size_t *len);
/* Put the right checksum on `len` bytes that were changed: for tests and the fuzzer. -EINVAL: too short. */
int bn_manifest_seal(void *data, size_t len);
