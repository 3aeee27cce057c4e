/* One connection: requests in, work, replies out. */
#include "daemon/daemon.h"

#include "base/cleanup.h"
#include "base/proc.h"
#include "checkpoint/dump.h"
#include "checkpoint/sharing.h"
#include "config.h"
#include "gpu/hash.h"
#include "restore/restore.h"
#include "wire/control.h"
#include "wire/packet.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define LET_GO_MS 20000u /* a request waits so long for the end of what an earlier one left to be done */
#define TICK_MS 100u     /* between progress events, and looks at whether the client is still there */

struct client {
    struct daemon *d;
    int fd;
    pthread_mutex_t send_lock;
    bool gone; /* the peer hung up: cancels what is under way */

    struct bn_report *report; /* of the session, between its BEGIN and its END */
    struct bn_dump *dump;
    bool may_be_late; /* at its begin it was meant to be: */
    bool late;        /* it is committed after its processes were let go */
    bool has_aside;
    struct bn_usage aside; /* what it has set aside */
    struct bn_restore *restore;
    struct bn_error refused; /* why a process of it may not go on */
};

struct request {
    struct bn_reader body;
    int fd, second; /* descriptors that came along, or -1 */
};

typedef int (*handler_fn)(struct client *c, struct request *rq, struct bn_writer *reply,
                          struct bn_error *err);

static void send_event(struct client *c, uint16_t type, const struct bn_writer *body)
{
    pthread_mutex_lock(&c->send_lock);
    /* A client that does not read its progress must not hold the work up. */
    struct pollfd p = {.fd = c->fd, .events = POLLOUT};
    if (poll(&p, 1, 0) == 1 && (p.revents & POLLOUT))
        bn_ctl_send(c->fd, type, false, NULL, body, NULL, 0);
    pthread_mutex_unlock(&c->send_lock);
}

static void send_progress(struct client *c, const struct bn_progress *progress)
{
    bn_auto_writer w = {0};
    bn_write_progress(&w, progress);
    send_event(c, BN_CTL_EV_PROGRESS, &w);
}

/* Before the reply. */
static void send_trace(struct client *c, struct bn_report *report)
{
    bn_auto_writer w = {0};
    bn_auto_free struct bn_trace *t = calloc(1, sizeof(*t));
    if (!t)
        return;
    bn_report_trace(report, t);
    bn_write_trace(&w, t);
    send_event(c, BN_CTL_EV_TRACE, &w);
}

static bool hung_up(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLRDHUP};
    return poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR));
}

/* ---- the pump: progress out, hang-up in, while the connection's thread is at work ---- */

struct pump {
    struct client *c;
    struct bn_report *report;
    bool events;
    bool stop;
    bool started;
    pthread_t thread;
};

static void *pump_main(void *arg)
{
    struct pump *p = arg;
    while (!__atomic_load_n(&p->stop, __ATOMIC_ACQUIRE)) {
        struct bn_progress progress;
        if (bn_report_wait(p->report, TICK_MS, &progress, NULL))
            break;
        if (hung_up(p->c->fd))
            __atomic_store_n(&p->c->gone, true, __ATOMIC_RELEASE);
        else if (p->events)
            send_progress(p->c, &progress);
    }
    return NULL;
}

static void pump_start(struct pump *p, struct client *c, struct bn_report *report, bool events)
{
    *p = (struct pump){.c = c, .report = report, .events = events};
    p->started = pthread_create(&p->thread, NULL, pump_main, p) == 0;
}

static void pump_stop(struct pump *p)
{
    __atomic_store_n(&p->stop, true, __ATOMIC_RELEASE);
    bn_report_wake(p->report);
    if (p->started)
        pthread_join(p->thread, NULL);
}

/* ---- sessions' beginnings and ends ---- */

static int session_open(struct client *c, pid_t root, int dirfd, struct bn_error *err)
{
    if (c->report)
        return bn_error_set(err, EBUSY, "session", "this connection has a session already");
    c->report = bn_report_new();
    if (!c->report)
        return bn_error_set(err, ENOMEM, "session", "out of memory");
    int r = bn_publish(c->d, c->report, root, dirfd);
    if (r < 0) {
        bn_report_unref(c->report);
        c->report = NULL;
        return bn_error_set(err, r, "session", "cannot note the session: %s", strerror(-r));
    }
    return 0;
}

/* Watchers are told; the tree is not free yet. */
static void session_end(struct client *c, const struct bn_error *err)
{
    if (!c->report)
        return;
    bn_publish_ended(c->d, c->report);
    bn_report_finish(c->report, err);
}

static void session_close(struct client *c, const struct bn_error *err)
{
    if (!c->report)
        return;
    session_end(c, err);
    bn_unpublish(c->d, c->report);
    bn_report_unref(c->report);
    c->report = NULL;
}

/* For what begins to work on a tree. A tree that has gone is left to the work itself to find out. */
static int check_free(struct client *c, pid_t root, struct bn_error *err)
{
    for (unsigned waited = 0;; waited += TICK_MS) {
        bn_auto_free pid_t *tree = NULL;
        struct bn_error why = BN_ERROR_INIT;
        size_t n = 0;
        if (bn_proc_tree(root, &tree, &n) < 0 || n == 0)
            return 0;
        int r = bn_tree_is_free(c->d, c->report, tree, n, &why);
        if (r == 0)
            return 0;
        if (r != -EAGAIN || waited >= LET_GO_MS || hung_up(c->fd))
            return bn_error_set(err, r == -EAGAIN ? EBUSY : r, why.stage, "%s", why.text);
        bn_wait_published(c->d, TICK_MS);
    }
}

static void write_phases(struct client *c, struct bn_writer *reply)
{
    struct bn_phases phases;
    bn_report_phases(c->report, &phases);
    bn_write_phases(reply, &phases);
}

/* What could not be brought back stays as it is until somebody resumes it. */
static void keep_left(struct client *c, struct bn_suspended *left)
{
    if (!left)
        return;
    pid_t root = bn_suspended_root(left);
    if (bn_keep_suspended(c->d, left) == 0)
        fprintf(stderr, "bennud: process %d and its children stay stopped: 'bennu resume %d' tries again\n",
                root, root);
}

/* After a commit or abort. */
static void aside_is_free(struct client *c)
{
    if (c->has_aside)
        bn_room_aside(c->d, c->report, &c->aside, NULL);
    c->has_aside = false;
}

static void aftermath(struct client *c, pid_t root, struct bn_error *err)
{
    struct bn_suspended *left;
    if (bn_dump_aftermath(c->dump, &left, err) < 0)
        fprintf(stderr, "bennud: after the dump of %d: %s\n", root, err->text);
    keep_left(c, left);
}

/* Was it cancelled for the sake of another program? Then the one who watches learns that. */
static void say_needed(struct client *c, struct bn_error *err)
{
    if (err->code != ECANCELED || !bn_room_needed(c->d, c->report))
        return;
    *err = (struct bn_error)BN_ERROR_INIT;
    bn_error_set(err, EBUSY, "set-aside",
                 "another program needed the GPU memory that was set aside: try again, or without "
                 "--leave-running");
}

static void commit_late(struct client *c, pid_t root, struct bn_error *err)
{
    int r = bn_dump_commit(c->dump, &c->gone, err);
    aside_is_free(c);
    if (r < 0)
        say_needed(c, err);
    if (r < 0 && err->code != ECANCELED)
        fprintf(stderr, "bennud: the dump of %d failed at '%s': %s\n", root, err->stage, err->text);
}

/* Is there room for the contexts, which the driver brings back, beside what is set aside? */
static bool contexts_fit(struct client *c)
{
    const struct bn_targets *t = bn_dump_targets(c->dump);
    for (unsigned g = 0; c->has_aside && g < BN_USAGE_GPUS; g++) {
        uint64_t need = 0, unused, total;
        for (size_t i = 0; c->aside.gpu[g] && i < t->n; i++)
            for (size_t p = 0; p < t->v[i].nparts; p++)
                need += t->v[i].parts[p].dev == g ? BN_ROOM_CONTEXTS : 0;
        if (need && (bn_gpu_mem_info(c->d->env.gpu, g, &unused, &total, NULL) < 0 || unused < need))
            return false;
    }
    return true;
}

/* Runs after the reply, or in its place when the client has gone. */
static void dump_let_go(struct client *c)
{
    if (!c->dump)
        return;
    pid_t root = bn_dump_targets(c->dump)->v[0].pid;
    struct bn_error late = BN_ERROR_INIT, after = BN_ERROR_INIT;
    bool runs = !c->late || bn_dump_runs(c->dump);
    bool first = !c->late || (runs && contexts_fit(c));
    if (!c->late) /* a DUMP_END that made no sense has ended nothing */
        bn_dump_abort(c->dump);
    if (first)
        aftermath(c, root, &after);
    if (c->late)
        commit_late(c, root, &late);
    if (!first && runs)
        aftermath(c, root, &after);
    /* CRIU has heard already that all is well: who watches learns how it ended, and, if well, whether the processes are back. */
    if (c->late)
        session_end(c, bn_error_is_set(&late) ? &late : bn_error_is_set(&after) ? &after : NULL);
    if (!runs)
        aftermath(c, root, &after);
    aside_is_free(c);
    bn_dump_free(c->dump);
    c->dump = NULL;
    c->late = false;
    session_close(c, NULL);
}

/* ---- handlers ---- */

static int on_info(struct client *c, struct request *rq, struct bn_writer *reply, struct bn_error *err)
{
    (void)rq, (void)err;
    struct bn_gpu *gpu = c->d->env.gpu;
    struct bn_daemon_info info = {.driver_version = bn_gpu_driver_version(gpu),
                                  .simulated = bn_gpu_simulated(gpu),
                                  .pid = (uint32_t)getpid(),
                                  .gpus = bn_gpu_count(gpu)};
    struct bn_pool_stats stats;
    snprintf(info.version, sizeof(info.version), "%s", BENNU_VERSION);
    snprintf(info.driver_path, sizeof(info.driver_path), "%s", bn_gpu_driver_path(gpu));
    if (info.gpus > BN_ARRAY_SIZE(info.gpu))
        info.gpus = BN_ARRAY_SIZE(info.gpu);
    for (unsigned g = 0; g < info.gpus; g++) {
        const struct bn_gpu_info *i = bn_gpu_info(gpu, g);
        snprintf(info.gpu[g].name, sizeof(info.gpu[g].name), "%.63s", i->name);
        memcpy(info.gpu[g].uuid, i->uuid, sizeof(i->uuid));
        info.gpu[g].cc = i->major * 10 + i->minor;
        info.gpu[g].total = i->total;
        bn_gpu_mem_info(gpu, g, &info.gpu[g].free, &info.gpu[g].total, NULL);
        struct bn_error why = BN_ERROR_INIT;
        if (bn_gpu_hash_ready(gpu, g, &why) < 0)
            snprintf(info.gpu[g].no_hash, sizeof(info.gpu[g].no_hash), "%.159s", why.text);
    }
    bn_pool_stats(c->d->env.pool, &stats);
    info.host_limit = stats.limit;
    info.host_used = stats.used;
    bn_write_daemon_info(reply, &info);
    return 0;
}

static void ps_line(void *arg, const struct bn_ps_entry *e)
{
    bn_auto_writer w = {0};
    struct client *c = arg;
    bn_write_ps_entry(&w, e);
    pthread_mutex_lock(&c->send_lock);
    bn_ctl_send(c->fd, BN_CTL_EV_PROCESS, false, NULL, &w, NULL, 0);
    pthread_mutex_unlock(&c->send_lock);
}

static int on_ps(struct client *c, struct request *rq, struct bn_writer *reply, struct bn_error *err)
{
    (void)rq, (void)reply;
    return bn_daemon_ps(c->d, ps_line, c, err);
}

static int on_check(struct client *c, struct request *rq, struct bn_writer *reply, struct bn_error *err)
{
    pid_t pid = (pid_t)bn_read_u32(&rq->body);
    struct bn_targets targets = {0};
    int r = check_free(c, pid, err);
    if (r == 0)
        r = bn_targets_find(c->d->env.gpu, pid, 0, &targets, err);
    if (r == 0)
        r = bn_targets_check(&targets, 0, err);
    if (r == 0)
        r = bn_sharing_check(c->d->env.gpu, &targets, pid, err);
    uint32_t agents = 0;
    for (size_t i = 0; i < targets.n; i++)
        agents += targets.v[i].agent != NULL;
    bn_write_u32(reply, (uint32_t)targets.n);
    bn_write_u32(reply, agents);
    bn_write_u64(reply, bn_targets_evictable(&targets));
    bn_targets_free(&targets);
    return r;
}

static int on_suspend(struct client *c, struct request *rq, struct bn_writer *reply, struct bn_error *err)
{
    pid_t pid = (pid_t)bn_read_u32(&rq->body);
    uint32_t tier = bn_read_u32(&rq->body), flags = bn_read_u32(&rq->body);
    struct bn_suspended *s = NULL;
    int r = session_open(c, pid, -1, err);
    if (r < 0)
        return r;
    r = check_free(c, pid, err);
    if (r < 0) {
        session_close(c, err);
        return r;
    }
    struct pump pump;
    pump_start(&pump, c, c->report, flags & BN_CTL_F_PROGRESS);
    r = bn_suspend(&c->d->env, pid, tier, flags & BN_CTL_F_KEEP_CONTEXT ? BN_FIND_KEEP_CONTEXT : 0, c->report,
                   &c->gone, &s, err);
    pump_stop(&pump);
    if (r < 0) {
        keep_left(c, s);
    } else if (bn_keep_suspended(c->d, s) < 0) {
        bn_resume(&s, c->report, NULL);
        r = bn_error_set(err, ENOMEM, "suspend", "out of memory");
    } else {
        bn_keep_budgets(c->d);
    }
    write_phases(c, reply);
    send_trace(c, c->report);
    session_close(c, r < 0 ? err : NULL);
    return r;
}

/* What rests on the GPU makes way for what shall run there. */
static int resume_in_room(struct client *c, struct bn_suspended **s, struct bn_error *err)
{
    struct bn_usage where;
    bool somewhere = bn_room_for_resume(c->d, *s, &where);
    for (;;) {
        struct bn_error why = BN_ERROR_INIT;
        int r = bn_resume(s, c->report, &why);
        if (r != -ENOMEM || !*s || !bn_let_go(c->d, somewhere ? &where : NULL))
            return r < 0 ? bn_error_set(err, r, why.stage, "%s", why.text) : 0;
    }
}

static int on_resume(struct client *c, struct request *rq, struct bn_writer *reply, struct bn_error *err)
{
    pid_t pid = (pid_t)bn_read_u32(&rq->body);
    struct suspended_entry *e;
    struct bn_suspended *s;
    int r = bn_take_suspended(c->d, pid, &e, &s);
    if (r < 0)
        return bn_error_set(err, r, "resume",
                            r == -EBUSY ? "process %d is being worked on"
                                        : "process %d is not suspended: see 'bennu ps'",
                            pid);
    r = session_open(c, pid, -1, err);
    if (r == 0) {
        struct pump pump;
        pump_start(&pump, c, c->report, true);
        r = resume_in_room(c, &s, err);
        pump_stop(&pump);
        write_phases(c, reply);
        send_trace(c, c->report);
        session_close(c, r < 0 ? err : NULL);
    }
    bn_return_suspended(c->d, e, s);
    return r;
}

static int on_watch(struct client *c, struct request *rq, struct bn_writer *reply, struct bn_error *err)
{
    pid_t root = (pid_t)bn_read_u32(&rq->body);
    if (root == 0 && rq->fd < 0)
        return bn_error_set(err, EINVAL, "watch", "neither a pid nor a directory to watch");
    struct awaited awaited;
    int r = bn_await(c->d, &awaited, root, rq->fd);
    if (r < 0)
        return bn_error_set(err, r, "watch", "cannot watch: %s", strerror(-r));
    /* Tells the client that nothing will be missed from here on. */
    send_progress(c, &(struct bn_progress){.phase = "waiting"});

    struct bn_report *report = NULL;
    while (!report && !hung_up(c->fd))
        report = bn_awaited(c->d, &awaited, TICK_MS);
    struct bn_progress progress;
    struct bn_error outcome = BN_ERROR_INIT;
    while (report && !bn_report_wait(report, TICK_MS, &progress, &outcome)) {
        if (hung_up(c->fd) && !bn_await_cancel(c->d, &awaited))
            break;
        send_progress(c, &progress); /* who was interrupted still listens */
    }
    struct bn_phases phases = {0};
    if (report) {
        bn_report_phases(report, &phases);
        send_trace(c, report);
    }
    bn_await_end(c->d, &awaited);
    if (!report)
        return -ECANCELED;
    bn_write_phases(reply, &phases);
    if (outcome.code && err)
        *err = outcome;
    return -outcome.code;
}

static int prepare_tree(struct client *c, pid_t root, const struct bn_prepare_options *o,
                        struct bn_prepare_stats *stats, struct bn_error *err)
{
    /* What is there is gone on with, unless something else was asked for. */
    struct bn_prepared *p = bn_take_prepared(c->d, root);
    if (o->parent >= 0) {
        bn_prepared_free(p);
        p = NULL;
    }
    struct pump pump;
    pump_start(&pump, c, c->report, true);
    int r = bn_prepare(&c->d->env, root, o, c->report, &c->gone, &p, stats, err);
    pump_stop(&pump);
    if (r == 0)
        bn_keep_prepared(c->d, p, o->dirfd >= 0 ? c : NULL);
    return r;
}

static int on_prepare(struct client *c, struct request *rq, struct bn_writer *reply, struct bn_error *err)
{
    pid_t root = (pid_t)bn_read_u32(&rq->body);
    uint32_t flags = bn_read_u32(&rq->body);
    struct bn_prepare_options o = {.dirfd = -1, .parent = -1, .per_second = bn_read_u64(&rq->body)};
    o.level = flags >> BN_CTL_F_LEVEL_SHIFT;
    if (flags & BN_CTL_F_FOLDER)
        o.dirfd = rq->fd;
    if (flags & BN_CTL_F_PARENT)
        o.parent = flags & BN_CTL_F_FOLDER ? rq->second : rq->fd;
    if ((flags & BN_CTL_F_FOLDER && o.dirfd < 0) || (flags & BN_CTL_F_PARENT && o.parent < 0))
        return bn_error_set(err, EINVAL, "pre-dump", "a descriptor is missing in the request");
    int r = session_open(c, root, -1, err);
    if (r < 0)
        return r;
    struct bn_prepare_stats stats = {0};
    r = check_free(c, root, err);
    if (r == 0)
        r = prepare_tree(c, root, &o, &stats, err);
    write_phases(c, reply);
    bn_write_prepare_reply(reply, &(struct bn_prepare_reply){.passes = stats.passes,
                                                             .gpu_bytes = stats.gpu_bytes,
                                                             .sent_bytes = stats.sent_bytes,
                                                             .last_bytes = stats.last_bytes,
                                                             .gate_ns = stats.gate_ns});
    session_close(c, r < 0 ? err : NULL);
    return r;
}

static int on_forget(struct client *c, struct request *rq, struct bn_writer *reply, struct bn_error *err)
{
    (void)err;
    struct bn_prepared *p = bn_take_prepared(c->d, (pid_t)bn_read_u32(&rq->body));
    bn_write_u32(reply, p != NULL);
    bn_prepared_free(p);
    return 0;
}

static int on_dump_begin(struct client *c, struct request *rq, struct bn_writer *reply, struct bn_error *err)
{
    pid_t root = (pid_t)bn_read_u32(&rq->body);
    uint32_t flags = bn_read_u32(&rq->body);
    uint64_t per_second = bn_read_u64(&rq->body);
    if (rq->fd < 0 || (flags & BN_CTL_F_PARENT && rq->second < 0))
        return bn_error_set(err, EINVAL, "dump", "no image directory came with the request");
    int r = session_open(c, root, rq->fd, err);
    if (r < 0)
        return r;
    r = check_free(c, root, err);
    if (r < 0) {
        session_close(c, err);
        return r;
    }
    struct bn_suspended *left;
    c->may_be_late = flags & BN_CTL_F_LEAVE_RUNNING && bn_is_awaited(c->d, c->report, NULL);
    struct bn_dump_options how = {.flags = (flags & BN_CTL_F_DRIVER_PATH ? BN_FIND_DRIVER_PATH : 0) |
                                           (flags & BN_CTL_F_SYNC ? BN_DUMP_SYNC : 0) |
                                           (c->may_be_late ? BN_DUMP_ASIDE : 0) |
                                           flags >> BN_CTL_F_LEVEL_SHIFT << BN_DUMP_LEVEL_SHIFT,
                                  .dirfd = rq->fd,
                                  .cancel = &c->gone,
                                  .per_second = per_second,
                                  .parent = flags & BN_CTL_F_PARENT ? rq->second : -1,
                                  .prepared = bn_take_prepared(c->d, root)};
    r = bn_dump_begin(&c->d->env, root, &how, c->report, &c->dump, &left, err);
    keep_left(c, left);
    if (r < 0 || !c->dump)
        session_close(c, r < 0 ? err : NULL);
    c->has_aside = c->dump && bn_dump_set_aside(c->dump, &c->aside);
    if (c->has_aside)
        bn_room_aside(c->d, c->report, &c->aside, &c->gone);
    bn_write_u32(reply, c->dump ? (uint32_t)bn_dump_targets(c->dump)->n : 0);
    if (c->dump)
        bn_report_criu(c->report, true);
    return r;
}

static int on_dump_process(struct client *c, struct request *rq, struct bn_writer *reply,
                           struct bn_error *err)
{
    pid_t pid = (pid_t)bn_read_u32(&rq->body);
    int r = c->dump ? bn_dump_covers(c->dump, pid, err) : 0;
    bn_write_u32(reply, r > 0);
    return r < 0 ? r : 0;
}

static int on_dump_thread(struct client *c, struct request *rq, struct bn_writer *reply, struct bn_error *err)
{
    (void)err;
    pid_t pid = (pid_t)bn_read_u32(&rq->body);
    bn_write_u32(reply, c->dump ? (uint32_t)bn_dump_thread(c->dump, pid) : 0);
    return 0;
}

static int on_dump_purge(struct client *c, struct request *rq, struct bn_writer *reply, struct bn_error *err)
{
    pid_t pid = (pid_t)bn_read_u32(&rq->body);
    uint64_t freed = 0;
    int r = c->dump ? bn_dump_purge(c->dump, pid, &freed, err) : 0;
    bn_write_u32(reply, (uint32_t)(freed >> 20));
    return r;
}

static int on_dump_end(struct client *c, struct request *rq, struct bn_writer *reply, struct bn_error *err)
{
    int32_t result = (int32_t)bn_read_u32(&rq->body);
    if (!c->dump)
        return bn_error_set(err, EINVAL, "dump", "no dump is under way on this connection");
    bn_report_criu(c->report, false);
    int r = 0;
    /* He may have gone meanwhile: then nobody but CRIU can be told. */
    bool late = c->may_be_late && result == 0 && bn_is_awaited(c->d, c->report, &c->gone);
    if (result == 0) {
        struct pump pump;
        pump_start(&pump, c, c->report, false);
        r = (late ? bn_dump_release : bn_dump_commit)(c->dump, &c->gone, err);
        pump_stop(&pump);
    } else {
        bn_dump_abort(c->dump);
    }
    write_phases(c, reply);
    if (r < 0)
        say_needed(c, err);
    c->late = late && r == 0;
    if (c->late)
        return 0;
    aside_is_free(c);
    struct bn_error criu = BN_ERROR_INIT;
    bn_error_set(&criu, ECANCELED, "criu", "CRIU could not dump the process (result %d)", result);
    session_end(c, result ? &criu : r < 0 ? err : NULL);
    return r;
}

static int on_restore_begin(struct client *c, struct request *rq, struct bn_writer *reply,
                            struct bn_error *err)
{
    uint32_t flags = bn_read_u32(&rq->body);
    if (rq->fd < 0)
        return bn_error_set(err, EINVAL, "restore", "no image directory came with the request");
    int r = session_open(c, 0, rq->fd, err);
    if (r < 0)
        return r;
    struct bn_error why;
    do { /* what rests on the GPUs makes way */
        why = (struct bn_error)BN_ERROR_INIT;
        r = bn_restore_begin(&c->d->env, rq->fd, rq->second,
                             flags & BN_CTL_F_STOCK_IMAGE ? BN_RESTORE_STOCK : 0, c->report, &c->restore,
                             &why);
    } while (r == -ENOMEM && bn_let_go(c->d, NULL));
    if (r < 0) {
        bn_error_set(err, r, why.stage, "%s", why.text);
        session_close(c, err);
    }
    bn_write_u32(reply, c->restore ? (uint32_t)bn_restore_count(c->restore) : 0);
    if (c->restore)
        bn_report_criu(c->report, true);
    return r;
}

static int on_restore_process(struct client *c, struct request *rq, struct bn_writer *reply,
                              struct bn_error *err)
{
    pid_t pid = (pid_t)bn_read_u32(&rq->body);
    int r = c->restore ? bn_restore_claim(c->restore, pid, err) : 0;
    if (r < 0 && !bn_error_is_set(&c->refused))
        c->refused = *err;
    bn_write_u32(reply, r > 0);
    return r < 0 ? r : 0;
}

static int on_restore_end(struct client *c, struct request *rq, struct bn_writer *reply, struct bn_error *err)
{
    int32_t result = (int32_t)bn_read_u32(&rq->body);
    if (!c->restore)
        return bn_error_set(err, EINVAL, "restore", "no restore is under way on this connection");
    bn_report_criu(c->report, false);
    int r = 0;
    if (result == 0) {
        struct pump pump;
        pump_start(&pump, c, c->report, false);
        r = bn_restore_finish(c->restore, &c->gone, err);
        pump_stop(&pump);
    }
    bn_restore_free(c->restore);
    c->restore = NULL;
    write_phases(c, reply);
    struct bn_error criu = BN_ERROR_INIT;
    bn_error_set(&criu, ECANCELED, "criu", "CRIU could not restore the process (result %d)", result);
    if (result)
        session_close(c, bn_error_is_set(&c->refused) ? &c->refused : &criu);
    else
        session_close(c, r < 0 ? err : NULL);
    c->refused = (struct bn_error)BN_ERROR_INIT;
    return r;
}

static const struct {
    uint16_t type;
    handler_fn fn;
    unsigned least; /* bytes of a request: a shorter one is not acted on */
} handlers[] = {
    {BN_CTL_INFO, on_info},
    {BN_CTL_PS, on_ps},
    {BN_CTL_SUSPEND, on_suspend, 12},
    {BN_CTL_RESUME, on_resume, 4},
    {BN_CTL_CHECK, on_check, 4},
    {BN_CTL_WATCH, on_watch, 4},
    {BN_CTL_PREPARE, on_prepare, 16},
    {BN_CTL_FORGET, on_forget, 4},
    {BN_CTL_DUMP_BEGIN, on_dump_begin, 8},
    {BN_CTL_DUMP_PROCESS, on_dump_process, 4},
    {BN_CTL_DUMP_THREAD, on_dump_thread, 4},
    {BN_CTL_DUMP_PURGE, on_dump_purge, 4},
    {BN_CTL_DUMP_END, on_dump_end, 4},
    {BN_CTL_RESTORE_BEGIN, on_restore_begin, 4},
    {BN_CTL_RESTORE_PROCESS, on_restore_process, 4},
    {BN_CTL_RESTORE_END, on_restore_end, 4},
};

static int handle(struct client *c, uint16_t type, struct request *rq, struct bn_writer *reply,
                  struct bn_error *err)
{
    if (!c->d->env.gpu) {
        *err = c->d->no_gpu;
        return -err->code;
    }
    for (size_t i = 0; i < BN_ARRAY_SIZE(handlers); i++)
        if (handlers[i].type == type) {
            if (bn_reader_left(&rq->body) < handlers[i].least)
                return bn_error_set(err, EBADMSG, "request", "a request of type %u is too short", type);
            return handlers[i].fn(c, rq, reply, err);
        }
    return bn_error_set(err, EPROTO, "request", "unknown request %u: are command and daemon of one version?",
                        type);
}

static void log_failure(uint16_t type, const struct bn_error *err)
{
    if (err->code != ECANCELED)
        fprintf(stderr, "bennud: request %u failed at '%s': %s\n", type, err->stage, err->text);
}

static bool answer(struct client *c, void *buf)
{
    struct bn_ctl_head head;
    struct request rq = {.fd = -1, .second = -1};
    int fds[BN_CTL_FDS_MAX];
    size_t nfds = 0;
    int r = bn_ctl_recv(c->fd, buf, &head, &rq.body, fds, BN_CTL_FDS_MAX, &nfds);
    if (r < 0)
        return false;
    if (nfds > 0)
        rq.fd = fds[0];
    if (nfds > 1)
        rq.second = fds[1];

    bn_auto_writer reply = {0};
    struct bn_error err = BN_ERROR_INIT;
    r = handle(c, head.type, &rq, &reply, &err);
    bn_close_all(fds, nfds);
    bn_daemon_note_hashing(c->d);
    if (r < 0) {
        bn_error_set(&err, r, "request", "%s", strerror(-r));
        log_failure(head.type, &err);
    }
    if (head.type == BN_CTL_DUMP_END)
        bn_kill_point(&c->d->env, "reply", "begin");
    pthread_mutex_lock(&c->send_lock);
    r = bn_ctl_send(c->fd, head.type, true, &err, err.code ? NULL : &reply, NULL, 0);
    pthread_mutex_unlock(&c->send_lock);
    if (head.type == BN_CTL_DUMP_END) {
        bn_kill_point(&c->d->env, "reply", "end");
        if (r < 0) /* CRIU has not heard that all is well, and fails: nothing is finished for it */
            __atomic_store_n(&c->gone, true, __ATOMIC_RELEASE);
        dump_let_go(c);
    }
    return r == 0;
}

/* The connection ended in the middle of a session: whoever drove CRIU died or gave up. */
static void abandon(struct client *c)
{
    struct bn_error err = BN_ERROR_INIT;
    bn_error_set(&err, EPIPE, "session", "CRIU ended in the middle: see its log");
    if (c->dump)
        bn_dump_abort(c->dump);
    aside_is_free(c);
    c->late = false;
    session_end(c, &err);
    dump_let_go(c);
    session_close(c, NULL);
    bn_restore_free(c->restore);
    c->restore = NULL;
    bn_drop_prepared_of(c->d, c);
}

void bn_daemon_serve(struct daemon *d, int fd)
{
    struct client c = {.d = d, .fd = fd};
    bn_auto_free void *buf = malloc(BN_CTL_MSG_MAX);
    pthread_mutex_init(&c.send_lock, NULL);
    while (buf && answer(&c, buf))
        ;
    abandon(&c);
    bn_close(fd);
    pthread_mutex_destroy(&c.send_lock);
}
