/* bennud: one a node. Holds what must be warm (contexts, pinned memory, copy streams) and the memory of suspended processes; serves
 * the command line and the CRIU plugin. A thread for each connection runs its requests one after another, since each is a
 * straight line of blocking steps; the event loop takes connections, signals and the ends of suspended processes.
 */
#pragma once

#include "checkpoint/prepare.h"
#include "checkpoint/quiesce.h"
#include "checkpoint/suspend.h"
#include "daemon/keeper.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <systemd/sd-event.h>

struct sd_event;

/* One process of a suspended tree, as it was when nobody worked on the tree. */
struct held {
    pid_t pid;
    uint64_t bytes[BN_TIERS]; /* in each tier */
};

struct suspended_entry {
    struct bn_suspended *s; /* NULL while a request works on it */
    pid_t root;
    bool watched;          /* the event loop has its pidfds */
    bool recovering;       /* the request is our own: an earlier worker was killed */
    bool moving, stop;     /* the request is our own: to another tier; it shall end */
    unsigned failed_round; /* room.c: of those who wanted room, the last for whom it could not be moved */
    uint32_t tier;
    struct bn_usage usage;
    struct held *held;
    size_t nheld;
    struct suspended_entry *next;
};

/* Somebody waits for the report of a session to come. */
struct awaited {
    pid_t root;
    bool folder; /* a dump into it is meant, and its end waited for */
    dev_t dev;
    ino_t ino;
    struct bn_report *report; /* a reference, once it is there */
    struct awaited *next;
};

/* A session's report with what names it to a watcher: the root pid of a dump or suspend, the directory of a dump or restore. */
struct published {
    struct bn_report *report;
    pid_t root; /* 0: a restore */
    dev_t dev;
    ino_t ino;
    bool *cancel;          /* set when the one who waits for its end hangs up, or NULL */
    struct bn_usage aside; /* what it has set aside on GPUs */
    bool *stop;            /* set when others need that, and then also: */
    bool needed;
    bool ended; /* all is said, but its processes are still being let go */
    struct published *next;
};

struct daemon {
    struct bn_env env;
    const char *driver;     /* path, or NULL: the system's */
    const char *spool;      /* folder of the disk tier */
    uint64_t host_limit;    /* bytes of pinned host memory */
    uint64_t gpu_budget;    /* bytes of suspended memory on each GPU; 0: no limit */
    uint64_t disk_budget;   /* bytes in the spool; 0: no limit */
    uint64_t host_keep;     /* bytes of pinned host memory to have at any time */
    uint64_t trim_after;    /* seconds after the last use that the rest is given back */
    sd_event_source *rest;  /* the timer for that; NULL: a private daemon */
    unsigned rounds;        /* room.c */
    struct bn_usage aside;  /* what dumps have set aside on GPUs */
    bool listening;         /* need.c: its thread runs */
    uint64_t serving_wants; /* need.c: GPUs for which one is served, a bit for each */
    uint64_t hashless;      /* GPUs that were said to be unfit for hashing: a bit for each */
    struct bn_error no_gpu; /* set: why the driver could not be opened; every request is answered with it */

    pthread_mutex_t lock;
    pthread_cond_t published_changed;
    struct suspended_entry *suspended;
    struct published *published;
    struct awaited *awaited;
    struct prepared_entry *prepared;
    int wake_fd;      /* eventfd: `suspended` changed */
    bool ending;      /* somebody asked for the end */
    unsigned clients; /* threads that serve connections */
    pthread_cond_t clients_changed;
};

/* Open the driver and make pool and copier. On failure d->no_gpu is set and the error returned. */
int bn_daemon_open_gpu(struct daemon *d, struct bn_error *err);
void bn_daemon_close_gpu(struct daemon *d);
/* Say in the log, once for each, which GPUs were found unfit for hashing. */
void bn_daemon_note_hashing(struct daemon *d);

/* A detached thread that counts as a client: the daemon waits for it before it ends. Negative: there is none. */
int bn_daemon_thread(struct daemon *d, void *(*fn)(void *), void *arg);

/* Serve one connection until it ends, in the calling thread. Owns fd. */
void bn_daemon_serve(struct daemon *d, int fd);

/* ---- registry (registry.c); every function from any thread ---- */

int bn_publish(struct daemon *d, struct bn_report *report, pid_t root, int dirfd);
/* The session is over for watchers, but its tree is still being worked on. */
void bn_publish_ended(struct daemon *d, struct bn_report *report);
void bn_unpublish(struct daemon *d, struct bn_report *report);
/* Until a session begins or ends, or timeout_ms is over. */
void bn_wait_published(struct daemon *d, unsigned timeout_ms);
/* Is any of these processes, a tree with its root first, suspended or in a session other than the one with the report `own` (NULL: none)?
 * Of two sessions that begin at once, the one published later sees the other. -EALREADY or -EBUSY, with a text for a person; -EAGAIN: a
 * session that has ended is still letting its processes go, which is not long as a rule. */
int bn_tree_is_free(struct daemon *d, const struct bn_report *own, const pid_t *tree, size_t n,
                    struct bn_error *err);
/* Wait for the session of a root pid, with dirfd >= 0 only for a dump of it into that directory, or (root 0) for a restore from the
 * directory: one that runs, or the next one, however short it is. bn_await puts `a` on the list, bn_awaited waits up to timeout_ms
 * (NULL: not yet; the reference stays with `a`), bn_await_end takes it off and drops the reference. */
int bn_await(struct daemon *d, struct awaited *a, pid_t root, int dirfd);
struct bn_report *bn_awaited(struct daemon *d, struct awaited *a, unsigned timeout_ms);
void bn_await_end(struct daemon *d, struct awaited *a);
/* Does somebody wait for the end of this dump, whose directory he named? *cancel (may be NULL) is then set if he hangs up, until the
 * report is unpublished. */
bool bn_is_awaited(struct daemon *d, struct bn_report *report, bool *cancel);
/* Who waits has hung up. False: nothing depends on it. */
bool bn_await_cancel(struct daemon *d, struct awaited *a);

int bn_keep_suspended(struct daemon *d, struct bn_suspended *s);
/* Its process `pid`, or NULL. With d->lock. */
const struct held *bn_held(const struct suspended_entry *e, pid_t pid);
/* Take the suspended tree that `pid` belongs to out of its entry, for a request to work on; give it back, or drop the
 * entry (s NULL). A move to another tier ends for it. -ENOENT, -EBUSY (another request has it). */
int bn_take_suspended(struct daemon *d, pid_t pid, struct suspended_entry **e, struct bn_suspended **s);
void bn_return_suspended(struct daemon *d, struct suspended_entry *e, struct bn_suspended *s);
/* Free those whose processes are all gone. */
void bn_reap_suspended(struct daemon *d);
/* Bring everything back, as far as possible: before the daemon ends. Returns how many stay suspended. */
unsigned bn_resume_all(struct daemon *d);

/* An entry for a tree that is being brought back; to be given to bn_return_suspended. NULL: out of memory. */
struct suspended_entry *bn_enter_recovering(struct daemon *d, const struct bn_suspended *s);
bool bn_is_recovering(struct daemon *d, pid_t pid);

/* ---- budgets (room.c) ---- */

/* bn_env's room. */
int bn_make_room(struct bn_env *env, uint32_t tier, unsigned dev, uint64_t bytes, struct bn_error *err);
/* After a tree was added: two that were suspended at the same time may be too much together. */
void bn_keep_budgets(struct daemon *d);
/* Before a resume: move trees away until what it needs is free, as far as that can be known, since a process for which the driver finds
 * too little memory is lost. *where: what it surely needs on the GPUs that it has memory on; false: there are none. */
bool bn_room_for_resume(struct daemon *d, const struct bn_suspended *s, struct bn_usage *where);
/* Move one tree out of the memory of a GPU that has less free than `where` says (NULL: of any), or wait a while for what a dump has set
 * aside there. False: there is none, or it would not be enough. */
bool bn_let_go(struct daemon *d, const struct bn_usage *where);
/* Do so until `bytes` are free on GPU dev (below BN_USAGE_GPUS) or nothing more can go. False: too little is free and nothing went. A
 * dump's memory is waited for only if `least` bytes could be free with it.
 * `wanted` (may be NULL): asked now and then while a dump's memory is waited for; when it says no that ends, and in a few seconds dumps
 * are cancelled that have set memory aside there. */
bool bn_free_gpu(struct daemon *d, unsigned dev, uint64_t least, uint64_t bytes, bool (*wanted)(void *),
                 void *arg);

/* What the driver needs for the contexts of a process: 0.5 GiB on an H100. */
#define BN_ROOM_CONTEXTS (UINT64_C(768) << 20)
/* The dump with this report, which is published, has set this aside, and *stop ends it; or (NULL) has freed it. */
void bn_room_aside(struct daemon *d, const struct bn_report *report, const struct bn_usage *usage,
                   bool *stop);
/* Was it stopped because others needed that? */
bool bn_room_needed(struct daemon *d, const struct bn_report *report);

/* ---- allocations of others (need.c) ---- */

/* See that somebody listens to the agents as long as a GPU has memory of suspended trees, or a dump has set some aside. From the event loop. */
void bn_need_check(struct daemon *d);

/* ---- at rest (rest.c); in the event loop's thread ---- */

int bn_rest_open(struct daemon *d, sd_event *event);
/* Something has ended: in a while it may be time to give memory back. */
void bn_rest_later(struct daemon *d);

/* ---- what was copied ahead of a dump (prepared.c); every function from any thread ---- */

/* Taken out of the list: NULL if there is nothing for the process that has this pid now. */
struct bn_prepared *bn_take_prepared(struct daemon *d, pid_t root);
/* Takes p. `owner`: dropped with this connection; NULL: kept until it is used or the process ends. */
void bn_keep_prepared(struct daemon *d, struct bn_prepared *p, const void *owner);
void bn_drop_prepared_of(struct daemon *d, const void *owner);
void bn_drop_all_prepared(struct daemon *d);
/* Drop each when its process ends; in the event loop's thread, after each bn_keep_prepared (which sets d->wake_fd). */
void bn_watch_prepared(struct daemon *d, struct sd_event *loop);

/* ---- recovery (recover.c) ---- */

/* Put right what the records of killed workers tell of, each session in a thread of its own (counted in d->clients). The records are
 * used up. Before any request is served. */
void bn_daemon_recover(struct daemon *d, struct bn_record *records, size_t n);
/* Then: suspended trees whose keeper was killed, too, from the folders that their memory is in. Removes the folders that are of no use. */
void bn_daemon_take_folders(struct daemon *d);

/* ---- ps (ps.c) ---- */

typedef void (*bn_ps_fn)(void *arg, const struct bn_ps_entry *e);
int bn_daemon_ps(struct daemon *d, bn_ps_fn fn, void *arg, struct bn_error *err);
