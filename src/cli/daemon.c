#include "cli/cli.h"

#include "base/cleanup.h"
#include "base/io.h"

#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

/* How long the daemon may say nothing between CRIU's end and the session's: undoing a dump puts GPU memory back. */
#define END_EXPECTED_MS 120000u
#define LOOK_MS 50u /* whether a signal has come */
#define END_UNKNOWN_MS 300u
#define READY_MS 5000u /* it answers at once, or is an older one that says nothing */

struct cli_watch {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int sock;
    bool ready, seen, done; /* the daemon watches; a session began; the answer came */
    int result;
    struct bn_writer request;
    int dirfd;
    struct cli_progress *progress;
    uint64_t heard_ns; /* the last event */
    struct bn_phases phases;
    struct bn_error err;
};

int cli_daemon_connect(struct bn_error *err)
{
    return bn_ctl_connect(cli_rundir(), err);
}

int cli_daemon_exit_code(const struct bn_error *err)
{
    switch (err->code) {
    case EBADMSG:
    case EILSEQ:
    case ENODATA: return CLI_BAD_IMAGE;
    case ENOTSUP: return CLI_REFUSED;
    default: return CLI_FAILED;
    }
}

bool cli_daemon_silent(const struct bn_error *err)
{
    /* What the daemon says has another stage. */
    return bn_error_is_set(err) && strcmp(err->stage, "daemon") == 0;
}

static void on_event(void *arg, const struct bn_ctl_head *head, struct bn_reader *body)
{
    struct cli_watch *w = arg;
    struct bn_progress now;
    cli_trace_event(head, body);
    if (head->type != BN_CTL_EV_PROGRESS)
        return;
    bn_read_progress(body, &now);
    if (body->failed)
        return;
    /* The daemon says so at once, before there is any session: nothing will be missed from then on. */
    bool waiting = strcmp(now.phase, "waiting") == 0;
    pthread_mutex_lock(&w->lock);
    w->ready = true;
    w->seen = w->seen || !waiting;
    w->heard_ns = bn_now_ns();
    pthread_cond_signal(&w->changed);
    pthread_mutex_unlock(&w->lock);
    if (!waiting)
        cli_progress_update(w->progress, &now);
}

static void *watch(void *arg)
{
    struct cli_watch *w = arg;
    struct bn_reader reply;
    struct bn_phases phases = {0};
    struct bn_error err = BN_ERROR_INIT;
    bn_auto_free void *buf = malloc(BN_CTL_MSG_MAX);
    int r = -ENOMEM;
    if (buf)
        r = bn_ctl_call(w->sock, BN_CTL_WATCH, &w->request, &w->dirfd, w->dirfd >= 0 ? 1 : 0, on_event, w,
                        buf, &reply, &err);
    if (r == 0) {
        bn_read_phases(&reply, &phases);
        if (reply.failed)
            r = bn_error_set(&err, EBADMSG, "daemon", "bennud sent a table of phases that makes no sense");
    }
    pthread_mutex_lock(&w->lock);
    w->result = r;
    w->err = err;
    w->phases = phases;
    w->done = true;
    pthread_cond_signal(&w->changed);
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

static void watch_free(struct cli_watch *w)
{
    bn_close(w->sock);
    bn_writer_free(&w->request);
    pthread_cond_destroy(&w->changed);
    pthread_mutex_destroy(&w->lock);
    free(w);
}

static struct timespec in_ms(unsigned ms)
{
    uint64_t until = bn_now_ns() + ms * 1000000ull;
    return (struct timespec){.tv_sec = (time_t)(until / 1000000000), .tv_nsec = (long)(until % 1000000000)};
}

int cli_watch_start(int sock, pid_t pid, int dirfd, struct cli_progress *progress, struct cli_watch **out,
                    struct bn_error *err)
{
    struct cli_watch *w = calloc(1, sizeof(*w));
    if (!w) {
        bn_close(sock);
        return bn_error_set(err, ENOMEM, "daemon", "out of memory");
    }
    w->sock = sock;
    w->dirfd = dirfd;
    w->progress = progress;
    bn_write_u32(&w->request, (uint32_t)pid);
    pthread_mutex_init(&w->lock, NULL);
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&w->changed, &attr);
    pthread_condattr_destroy(&attr);
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int r = pthread_create(&w->thread, NULL, watch, w);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r != 0) {
        watch_free(w);
        return bn_error_set(err, r, "daemon", "cannot start a thread: %s", strerror(r));
    }
    struct timespec until = in_ms(READY_MS);
    pthread_mutex_lock(&w->lock);
    while (!w->ready && !w->done && r == 0)
        r = pthread_cond_timedwait(&w->changed, &w->lock, &until);
    pthread_mutex_unlock(&w->lock);
    *out = w;
    return 0;
}

/* With the lock. After a signal the daemon undoes what is not finished, and still tells of its end. */
static void wait_for_end(struct cli_watch *w, bool expected, const struct cli_cancel *cancel)
{
    bool told = false;
    uint64_t began = bn_now_ns(),
             patience = (expected || w->seen ? END_EXPECTED_MS : END_UNKNOWN_MS) * 1000000ull;
    while (!w->done) {
        uint64_t since = w->heard_ns > began ? w->heard_ns : began;
        if (bn_now_ns() - since >= patience)
            return;
        if (!told && cli_cancel_signal(cancel) != 0)
            told = shutdown(w->sock, SHUT_WR) == 0;
        struct timespec ts = in_ms(LOOK_MS);
        pthread_cond_timedwait(&w->changed, &w->lock, &ts);
    }
}

int cli_watch_finish(struct cli_watch *w, bool expected, const struct cli_cancel *cancel,
                     struct bn_phases *phases, struct bn_error *err)
{
    *phases = (struct bn_phases){0};
    if (!w)
        return 0;
    pthread_mutex_lock(&w->lock);
    wait_for_end(w, expected, cancel);
    bool answered = w->done, seen = w->seen;
    pthread_mutex_unlock(&w->lock);
    if (!answered)
        shutdown(w->sock, SHUT_RDWR); /* the thread's call returns */
    pthread_join(w->thread, NULL);

    int r = 0;
    if (answered && w->result == 0)
        *phases = w->phases;
    else if (answered)
        r = bn_error_set(err, w->err.code, w->err.stage, "%s", w->err.text);
    else if (expected || seen)
        r = bn_error_set(err, ETIMEDOUT, "daemon", "bennud has not said in %u s how it ended: see its log",
                         END_EXPECTED_MS / 1000);
    watch_free(w);
    return r;
}
