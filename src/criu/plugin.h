/* The CRIU plugin's parts. All of it runs in CRIU's main process, on its one thread, except where said. */
#pragma once

#include "base/error.h"

#include <stdbool.h>
#include <sys/types.h>

/* --- log: CRIU's own --- */
enum bnp_level { BNP_ERROR = 1, BNP_WARN = 2, BNP_INFO = 3, BNP_DEBUG = 4 };
void bnp_log(enum bnp_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* --- daemon.c --- */
/* A connection to the daemon: the one that runs, else a private one started for this session. Returns a descriptor, or a
 * negative errno with *err filled. */
int bnp_daemon_open(struct bn_error *err);
/* Path of the folder that the plugin was loaded from, or "". */
const char *bnp_own_folder(void);

/* --- tree.c --- */
enum bnp_cuda {
    BNP_CUDA_NO,    /* nothing in the tree can be using CUDA */
    BNP_CUDA_MAYBE, /* a driver library is loaded, but nothing shows that it is in use */
    BNP_CUDA_YES,   /* an agent, or the driver's devices, are open */
};
/* Looks at `root` and its descendants in /proc. *who: the process that gave the answer. Never fails: what cannot be read is
 * not CUDA. */
enum bnp_cuda bnp_tree_cuda(pid_t root, pid_t *who);
/* Has this one mapped a part of NVIDIA's devices? */
bool bnp_maps_gpu(pid_t pid);

/* --- freezer.c --- */
#define BNP_FROZEN_MAX 8
struct bnp_thaw {
    int n;
    char dir[BNP_FROZEN_MAX][512];
    bool v2[BNP_FROZEN_MAX];
    char leaf[2][512]; /* the process's own group: v1, v2; "" none */
};
/* If `pid` is held by a cgroup freezer, let it run and remember what was changed. 0 if it was not frozen or runs now. */
int bnp_thaw(pid_t pid, struct bnp_thaw *t, struct bn_error *err);
/* Put back what bnp_thaw changed, and wait until it is in force. */
void bnp_refreeze(struct bnp_thaw *t);

/* --- extfile.c: handles on NVIDIA's devices that a process kept beside CUDA (NVML) --- */
/* Hooks of CRIU. DUMP: -ENOTSUP, or 0 when the descriptor was recorded. RESTORE runs in the restored task and returns a new
 * descriptor. */
int bnp_dump_ext_file(int fd, int id);
int bnp_restore_ext_file(int id, bool *retry_needed);

/* --- restore.c --- */
int bnp_restore_init(void);
int bnp_restore_resume(int pid);
void bnp_restore_exit(int ret);

/* --- cgroup.c --- */
/* In init() of a restore: an image of ours that runc restores gets the cgroup that runc wants for it. */
void bnp_restore_cgroup(void);

/* --- shm.c --- */
/* Would the restore of this container replace what is in the machine's /dev/shm? */
bool bnp_shm_would_be_replaced(pid_t root);

/* --- dump.c --- */
void bnp_dump_reset(void);
bool bnp_dump_active(void);
int bnp_dump_pause(int pid);
int bnp_dump_process(int pid);
int bnp_dump_checkpoint(int pid);
void bnp_dump_exit(int ret);

/* --- thread.c: one thread of a task that CRIU holds stopped --- */
int bnp_thread_run(pid_t tid);
/* Stop it again, as it was. -ESRCH: it ended meanwhile. */
int bnp_thread_stop(pid_t tid);

/* --- cancel.c --- */
void bnp_cancel_init(void);
/* True once bennu(1) was told to stop. */
bool bnp_cancelled(void);
/* Waits until there is an answer on `sock`, as long as its deadline allows, or that. */
bool bnp_cancelled_before_answer(int sock);

/* --- requests, in daemon.c. 0 or negative errno with *err filled. --- */
/* `fd` >= 0 rides along; out (may be NULL) receives the reply's u32. Thread safe as long as each socket has one user. */
int bnp_call(int sock, unsigned type, const unsigned *args, int nargs, int fd, unsigned *out,
             struct bn_error *err);
/* The same with any number of descriptors. */
int bnp_call_fds(int sock, unsigned type, const unsigned *args, int nargs, const int *fds, size_t nfds,
                 unsigned *out, struct bn_error *err);
/* Do not wait longer than this for the daemon. 0: without end. */
void bnp_set_deadline(int sock, int seconds);
