/* What must outlive the daemon. Before a process loses something that only the daemon can give back, a record of it goes to the
 * keeper, with the descriptors that hold it alive: its GPU memory, or the host memory that its bytes lie in. When the daemon is
 * killed, the next one gets the records and puts the processes back (recover.h). A record is dropped when the gate is open again, or
 * the process gone.
 */
#pragma once

#include "base/cursor.h"
#include "checkpoint/quiesce.h"

/* Where records go. Functions from any thread. */
struct bn_guard {
    /* Keep this record, in place of an earlier one of the same key. The descriptors stay the caller's. */
    int (*put)(struct bn_guard *g, uint64_t key, uint32_t kind, const struct bn_writer *body, const int *fds,
               size_t nfds, struct bn_error *err);
    void (*drop)(struct bn_guard *g, uint64_t key);
    uint64_t (*new_key)(struct bn_guard *g);
};

enum bn_record_kind { BN_RECORD_TARGET = 1, BN_RECORD_IMAGE = 2 };

/* One record as it comes back. */
struct bn_record {
    uint64_t key;
    uint32_t kind;
    void *bytes;
    size_t nbytes;
    int *fds; /* -1: taken */
    size_t nfds;
};
/* Frees content, not r itself. */
void bn_record_clear(struct bn_record *r);

/* What the record of a target holds beside its segments. Each stage replaces the one before. */
enum bn_stage {
    BN_STAGE_GUARDED, /* before it is evicted: the GPU memory itself */
    BN_STAGE_SUSPENDED, /* the copy is complete: where the bytes are, be it on the GPU, in host memory or on the disk */
    BN_STAGE_GIVING, /* before a resume gives memory back: that, and the GPU memory that they are going to */
};

/* In the head of a target's record. */
#define BN_RECORD_SUSPENDED 1u /* the process is to stay as it is until somebody resumes it */
#define BN_RECORD_HOST 2u      /* its bytes are in host memory: the first descriptor */
#define BN_RECORD_GPU 4u       /* GPU memory: a descriptor for each segment, the last ones */
#define BN_RECORD_AGENT 8u     /* it has an agent */
#define BN_RECORD_DISK 16u     /* its bytes are in a folder: the first descriptor */
#define BN_RECORD_CONTEXT 32u  /* its contexts stay: the driver has been asked nothing */

/* Record every living target of q. Does nothing without a guard. Records of a tree that is at rest on the disk are copied to its folder,
 * for the time when nobody is left: see below. */
int bn_records_put(struct bn_quiesce *q, enum bn_stage stage, struct bn_error *err);
/* Once more for one that has a record, as its GPU memory is other memory now: until then the record keeps the old alive. */
int bn_record_again(struct bn_quiesce *q, struct bn_target *t, enum bn_stage stage, struct bn_error *err);
/* Drop the records of targets that have everything back or are gone; with `all`, of every one. */
void bn_records_drop(struct bn_quiesce *q, bool all);

/* The image directory of a dump under way. 0 without a guard; else its key in *key. */
int bn_record_image(struct bn_quiesce *q, int dirfd, uint64_t *key, struct bn_error *err);

/* The records that a folder of the disk tier has of its tree, when both the daemon's processes were killed: under new keys, and
 * with the folder's descriptor where it belongs to them. *out is malloced; the caller clears and frees it. -ENOENT: it has none. */
int bn_records_of_folder(struct bn_guard *g, int dirfd, struct bn_record **out, size_t *n);

/* Parts of a target's record that say what it belongs to. */
struct bn_record_head {
    uint64_t session; /* of the suspend or dump: its targets come back together */
    pid_t root;
    unsigned flags;
};
int bn_record_head(const struct bn_record *r, struct bn_record_head *head);

/* The target as it was, without its agent and its sets, which `fds` (malloced, one a segment, or NULL) are for: the caller
 * takes them out of the record. -ESRCH: the process is gone; -EBADMSG: the record makes no sense; -ENODEV: a GPU is missing. */
int bn_record_target(struct bn_record *r, struct bn_gpu *gpu, struct bn_target *t, int **fds,
                     struct bn_error *err);
