/* What the command line and the CRIU plugin say to the daemon.
 *
 * Transport: SOCK_SEQPACKET at BENNU_RUNDIR/bennud.sock (owner root, mode 0600; the daemon also checks SO_PEERCRED). One
 * packet is one message: `struct bn_ctl_head`, then a body written with base/cursor.h. A client sends a request and reads
 * messages until the one with `reply` = 1: progress events come in between when it asked for them. One request at a time on a
 * connection; a closed connection cancels what was asked on it, except where said. Descriptors ride along with SCM_RIGHTS.
 */
#pragma once

#include "base/cursor.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define BN_CTL_MAGIC 0x6c746362u
#define BN_CTL_VERSION 1u
#define BN_CTL_MSG_MAX 65536u /* bytes of one packet */
#define BN_CTL_FDS_MAX 4u
#define BN_CTL_SOCKET "bennud.sock"

enum bn_ctl_type {
    /* any client */
    BN_CTL_INFO = 1, /* -> ; reply: struct bn_daemon_info */
    BN_CTL_PS =
        2, /* -> ; a BN_CTL_EV_PROCESS event for each process with an agent or a session; then an empty reply */

    /* command line */
    BN_CTL_SUSPEND = 10, /* u32 pid, u32 tier, u32 flags -> reply: phases. The whole tree below pid. */
    BN_CTL_RESUME = 11,  /* u32 pid -> reply: phases */
    BN_CTL_CHECK =
        12, /* u32 pid -> reply: u32 cuda processes, u32 agents, u64 bytes on GPUs. Refuses (error) what a dump of
                            the tree below pid would refuse; touches nothing. */
    BN_CTL_WATCH =
        13, /* u32 pid (dump), or pid + fd of image directory (dump into it), or 0 + fd (restore): events of the session that
                            will act on it, from now on; reply when that session has ended: phases, or its error. Who watches a
                            dump with BN_CTL_F_LEAVE_RUNNING into its directory waits for its end: if it hangs up before, the
                            dump is undone. */

    BN_CTL_PREPARE =
        14, /* u32 pid, u32 flags, u64 bytes a second (0: no limit), fd image directory with BN_CTL_F_FOLDER, fd of the
                            parent with BN_CTL_F_PARENT. Copies GPU memory ahead of a dump of the tree, while it runs: into that
                            directory, and then only until this connection ends; else into the spool. Reply: phases, struct
                            bn_prepare_reply. The next DUMP_BEGIN of the pid uses it up. */
    BN_CTL_FORGET = 15, /* u32 pid -> reply: u32 1 if something was copied ahead, which is dropped now */

    /* CRIU plugin (and whoever drives CRIU otherwise) */
    BN_CTL_DUMP_BEGIN =
        20, /* u32 root pid, u32 flags, u64 bytes a second of what is copied after the processes were let go (0: no limit),
                                 fd image directory, with F_PARENT fd of the parent's. Gates, evicts, driver-checkpoints the whole tree and starts copying. Reply: u32 CUDA processes handled (0: nothing to do, no session exists). */
    BN_CTL_DUMP_PROCESS =
        21, /* u32 pid -> reply: u32 handled (0: no CUDA in it; error: it uses CUDA and is not part of
                                 the session, e.g. it started meanwhile) */
    BN_CTL_DUMP_END =
        22, /* i32 CRIU's result, u32 flags. Result 0: waits for the copy, writes the manifest; or does so after the reply, see
                                 BN_CTL_F_LEAVE_RUNNING. Else undoes. Reply: phases. After a good reply the daemon lets the processes go on if CRIU leaves them running and
                                 forgets them when they die. A connection closed before the reply undoes everything. */
    BN_CTL_DUMP_THREAD = 23, /* u32 pid -> reply: u32 thread of its agent in our pid namespace, 0: none */
    BN_CTL_DUMP_PURGE =
        24, /* u32 pid, of which every thread but that one is stopped: give back the zero pages of the driver's
                                saved state -> reply: u32 MiB. Optional: an error harms nothing. */
    BN_CTL_RESTORE_BEGIN =
        30, /* u32 flags, fd image directory, and, if host memory is left to the daemon, fd of the listening socket for CRIU's
                                    lazy pages -> reply: u32 CUDA processes (0: no manifest, no session). Checks everything that can be checked, then
                                    starts loading. */
    BN_CTL_RESTORE_PROCESS =
        31, /* u32 pid (ours, restored, may be stopped) -> reply: u32 handled. The first waits until the
                                    host memory of all processes is complete, where that was left to the daemon. */
    BN_CTL_RESTORE_END =
        32, /* i32 CRIU's result. Result 0: waits until every process of the image has its GPU state back
                                    (they must be able to run by now). Reply: phases. On error the caller kills the tree. */

    /* events */
    BN_CTL_EV_PROGRESS = 100, /* struct bn_progress */
    BN_CTL_EV_PROCESS = 101,  /* struct bn_ps_entry */
    BN_CTL_EV_TRACE = 102,    /* wire/trace.h: before the reply to SUSPEND, RESUME and WATCH */
};

enum bn_tier_id { BN_TIER_HOST = 1, BN_TIER_GPU = 2, BN_TIER_DISK = 3 };
#define BN_TIERS 4u
extern const char *const bn_tier_names[BN_TIERS]; /* [0] is NULL */

/* DUMP_BEGIN / SUSPEND / RESTORE_BEGIN flags */
#define BN_CTL_F_PROGRESS 1u /* send events on this connection */
#define BN_CTL_F_DRIVER_PATH \
    2u /* ignore agents: everything through the driver (for comparison, and for stock images) */
#define BN_CTL_F_STOCK_IMAGE \
    4u /* RESTORE_BEGIN: the image was made by CRIU's own CUDA plugin: no manifest, driver path for
                                     every process that answers as checkpointed */
#define BN_CTL_F_LEAVE_RUNNING \
    8u /* DUMP_BEGIN: the processes go on afterwards. If somebody watches the dump into this directory, DUMP_END is answered as soon as
                                     nothing is copied from their memory any more: the watcher alone learns how it ends. Else it
                                     means nothing. */
#define BN_CTL_F_KEEP_CONTEXT \
    32u /* SUSPEND: only the memory is taken; the driver is asked nothing, and contexts stay */
#define BN_CTL_F_SYNC \
    16u /* DUMP_BEGIN: everything is on the disk, CRIU's files too, before DUMP_END is answered */

#define BN_CTL_F_LEVEL_SHIFT \
    24 /* DUMP_BEGIN, PREPARE: the 8 highest bits are the level of compression, 0 = none */
#define BN_CTL_F_PARENT \
    64u /* DUMP_BEGIN: bytes that the checkpoint in the second descriptor has are shared */

#define BN_CTL_F_FOLDER 256u /* PREPARE: the first descriptor is the image directory */

struct bn_ctl_head {
    uint32_t magic;
    uint16_t version;
    uint16_t type;
    uint32_t reply; /* 1: the answer that ends a request */
    int32_t error;  /* in replies: 0 or positive errno; then stage and text say more and the body is empty */
    char stage[BN_ERROR_STAGE_MAX];
    char text[BN_ERROR_TEXT_MAX];
};

struct bn_progress {
    char phase[32];
    uint64_t done, total; /* bytes; total 0: not known */
};

/* One timed step of a session. */
struct bn_phase {
    char name[32];
    uint64_t start_ns; /* since the session began */
    uint64_t duration_ns;
    uint64_t bytes; /* moved in it, or 0 */
};
#define BN_PHASES_MAX 48u

struct bn_phases {
    uint32_t n;
    struct bn_phase phase[BN_PHASES_MAX];
};

struct bn_prepare_reply {
    uint32_t passes;
    uint64_t gpu_bytes;  /* at the last pass */
    uint64_t sent_bytes; /* in all passes */
    uint64_t last_bytes; /* of these, in the last one */
    uint64_t gate_ns;    /* the longest time that gates were closed */
};

struct bn_daemon_info {
    char version[32];
    char driver_path[256];
    uint32_t driver_version; /* as cuDriverGetVersion: 13000 */
    bool simulated;
    uint32_t pid;
    uint32_t gpus;
    struct {
        char name[64];
        uint8_t uuid[16];
        uint32_t cc; /* 90 = 9.0 */
        uint64_t total, free;
        char no_hash[160]; /* why it is not used for hashing; empty: it is */
    } gpu[16];
    uint64_t host_limit, host_used; /* bytes of pinned host memory */
};

enum bn_ps_state {
    BN_PS_RUNNING,
    BN_PS_GATED,
    BN_PS_SUSPENDED,
    BN_PS_DUMPING,
    BN_PS_RESTORING,
    BN_PS_LOST,
    BN_PS_NO_AGENT
};

struct bn_ps_entry {
    uint32_t pid;
    char comm[16];
    uint32_t state;      /* enum bn_ps_state */
    uint64_t gpu_bytes;  /* evictable, or kept on the GPU while it is suspended */
    uint64_t host_bytes; /* held for it in host memory */
    uint64_t allocations;
    uint32_t unknown;    /* driver functions newer than the agent */
    char note[160];      /* why stepped aside, blockers, names of unknown functions */
    uint64_t disk_bytes; /* held for it in the spool folder */
    uint32_t tier;       /* suspended: BN_TIER_…; else 0 */
};

/* Sending and receiving. Blocking, any thread, one user of a descriptor at a time. 0 or negative errno. */

/* Body may be NULL. Keeps no reference to anything. */
int bn_ctl_send(int sock, uint16_t type, bool reply, const struct bn_error *err, const struct bn_writer *body,
                const int *fds, size_t nfds);

/* Receives one packet into buf (BN_CTL_MSG_MAX bytes). *body covers what follows the head. Descriptors beyond `max` are closed;
 * fds[*nfds] are the caller's. 0 on a clean end of the stream returns -EPIPE; malformed: -EBADMSG. */
int bn_ctl_recv(int sock, void *buf, struct bn_ctl_head *head, struct bn_reader *body, int *fds, size_t max,
                size_t *nfds);

/* Connect to the daemon. `rundir` NULL: environment BENNU_RUNDIR, else the built-in. -ECONNREFUSED/-ENOENT when it does not run;
 * err then says what to do. Returns a descriptor. */
int bn_ctl_connect(const char *rundir, struct bn_error *err);

typedef void (*bn_ctl_event_fn)(void *arg, const struct bn_ctl_head *head, struct bn_reader *body);

/* A whole request: send, feed events to `on_event` (may be NULL), return when the reply is in. A reply with an error is returned
 * as its negative errno with *err filled. On success *reply covers the reply's body in buf (BN_CTL_MSG_MAX bytes). */
int bn_ctl_call(int sock, uint16_t type, const struct bn_writer *body, const int *fds, size_t nfds,
                bn_ctl_event_fn on_event, void *arg, void *buf, struct bn_reader *reply,
                struct bn_error *err);
/* The second half of that, where the request was sent already. */
int bn_ctl_answer(int sock, uint16_t type, bn_ctl_event_fn on_event, void *arg, void *buf,
                  struct bn_reader *reply, struct bn_error *err);

void bn_write_progress(struct bn_writer *w, const struct bn_progress *p);
void bn_read_progress(struct bn_reader *r, struct bn_progress *p);
void bn_write_phases(struct bn_writer *w, const struct bn_phases *p);
void bn_read_phases(struct bn_reader *r, struct bn_phases *p);
void bn_write_prepare_reply(struct bn_writer *w, const struct bn_prepare_reply *p);
void bn_read_prepare_reply(struct bn_reader *r, struct bn_prepare_reply *p);
void bn_write_daemon_info(struct bn_writer *w, const struct bn_daemon_info *i);
void bn_read_daemon_info(struct bn_reader *r, struct bn_daemon_info *i);
void bn_write_ps_entry(struct bn_writer *w, const struct bn_ps_entry *e);
void bn_read_ps_entry(struct bn_reader *r, struct bn_ps_entry *e);
